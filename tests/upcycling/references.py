"""Slow references: one token and one expert at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_moe_ext.upcycling import ExpertStack, FeedForward


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0) ** 2


def dense_token(block: FeedForward, token: torch.Tensor, activation: Callable) -> torch.Tensor:
    """One token through a feed-forward block, neuron by neuron."""
    parts, width, hidden = block.up.shape
    out = torch.zeros(hidden, dtype=torch.float64)
    for neuron in range(width):
        values = []
        for part in range(parts):
            value = (block.up[part, neuron].double() * token.double()).sum()
            if block.up_bias is not None:
                value = value + block.up_bias[part, neuron].double()
            values.append(value)
        inner = activation(values[0])
        if parts == 2:
            inner = inner * values[1]
        out += inner * block.down[:, neuron].double()
    if block.down_bias is not None:
        out += block.down_bias.double()
    return out


def expert_of(stack: ExpertStack, expert: int) -> FeedForward:
    """One expert as a block."""
    biases = (None, None)
    if stack.up_bias is not None and stack.down_bias is not None:
        biases = (stack.up_bias[expert], stack.down_bias[expert])
    return FeedForward(stack.up[expert], stack.down[expert], *biases)


def moe_token(
    stack: ExpertStack, gate: torch.Tensor, token: torch.Tensor, activation: Callable, top_k: int
) -> tuple[torch.Tensor, set[int]]:
    """One token through the experts: softmax, top-k, renormalise. Also the experts it used."""
    logits = [float((row.double() * token.double()).sum()) for row in gate]
    chosen = sorted(range(len(logits)), key=lambda expert: -logits[expert])[:top_k]
    scores = torch.tensor(logits, dtype=torch.float64).softmax(dim=0)
    total = sum(scores[expert] for expert in chosen)
    out = torch.zeros(token.shape[0], dtype=torch.float64)
    for expert in chosen:
        out += scores[expert] / total * dense_token(expert_of(stack, expert), token, activation)
    return out, set(chosen)


def random_block(gated: bool = True, bias: bool = False, width: int = 12, hidden: int = 5) -> FeedForward:
    """A block in float64, so that what is left of a difference is not rounding."""
    parts = 2 if gated else 1
    up_bias = down_bias = None
    if bias:
        up_bias = torch.randn(parts, width, dtype=torch.float64)
        down_bias = torch.randn(hidden, dtype=torch.float64)
    up = torch.randn(parts, width, hidden, dtype=torch.float64)
    return FeedForward(up, torch.randn(hidden, width, dtype=torch.float64), up_bias, down_bias)
