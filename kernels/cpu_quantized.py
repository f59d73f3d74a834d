"""Experts with weights in few bits on a CPU: frozen, but else with the same three functions as `cpu_experts`.

Each expert in use is dequantised into a buffer that stays, and then run as a layer of its own.
"""

from __future__ import annotations

import torch

from . import cpu_experts
from .expert_weights import ExpertWeights
from .quantized_weights import QuantizedExperts, QuantizedStack, kept_buffer


def infer(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: QuantizedExperts) -> torch.Tensor:
    """(T, H), (T, K), (T, K) -> (T, H), without gradients."""
    return _on_cpu(hidden, index, weights, experts, None)


def forward(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: QuantizedExperts
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H), (T, K), (T, K) -> (T, H), and what `backward` wants beside the inputs: (R, 2I) for the R used slots."""
    used = int((index < experts.num_experts).sum())
    kept = torch.empty(used, experts.up.shape[1], dtype=experts.down.dtype)
    return _on_cpu(hidden, index, weights, experts, kept), kept


def backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: QuantizedExperts,
    kept: torch.Tensor,
    needs: list[bool],
) -> list[torch.Tensor | None]:
    """Gradients of hidden and weights, each where `needs` says so."""
    slots = cpu_experts.sort_slots(index, experts.num_experts)
    d_hidden, d_weights = _sum_like(hidden), torch.zeros(weights.shape, dtype=weights.dtype)
    for number, first, last in slots.experts:
        tokens, order = slots.tokens[first:last], slots.order[first:last]
        d_rows, d_factors, *_ = cpu_experts.backward(
            grad[tokens],
            hidden[tokens],
            torch.zeros_like(tokens)[:, None],
            weights.reshape(-1)[order, None],
            _one_on_cpu(experts, number),
            kept[first:last],
            [*needs, False, False, False, False],
        )
        if d_rows is not None:
            d_hidden.index_add_(0, tokens, d_rows.to(d_hidden.dtype))
        if d_factors is not None:
            d_weights.view(-1)[order] = d_factors[:, 0]
    return [d_hidden.to(hidden.dtype) if needs[0] else None, d_weights if needs[1] else None]


def _sum_like(hidden: torch.Tensor) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))


def _one_on_cpu(experts: QuantizedExperts, number: int) -> ExpertWeights:
    def matrix(name: str, stack: QuantizedStack) -> torch.Tensor:
        _, rows, length = stack.shape
        buffer = kept_buffer(name, rows * length, stack.dtype, stack.packed.device).view(rows, length)
        return stack.dequantize_into(number, buffer)[None]

    return experts.with_stacks(matrix("up", experts.up), matrix("down", experts.down), number)


def _on_cpu(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: QuantizedExperts,
    kept: torch.Tensor | None,
) -> torch.Tensor:
    slots, out = cpu_experts.sort_slots(index, experts.num_experts), _sum_like(hidden)
    for number, first, last in slots.experts:
        tokens, factors = slots.tokens[first:last], weights.reshape(-1)[slots.order[first:last], None]
        rows, ids, one = hidden[tokens], torch.zeros_like(tokens)[:, None], _one_on_cpu(experts, number)
        if kept is None:
            result = cpu_experts.infer(rows, ids, factors, one)
        else:
            result, _ = cpu_experts.forward(rows, ids, factors, one, kept[first:last])
        out.index_add_(0, tokens, result.to(out.dtype))
    return out.to(hidden.dtype)
