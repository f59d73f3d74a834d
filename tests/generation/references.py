"""Self-contrast as a plain loop: two models, every text anew in each step, no cache and nothing of the package."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn


def weak_mixtral(model: nn.Module, *, rank: int | None = None, top_k: int | None = None) -> nn.Module:
    """A copy of a stock Mixtral whose gates take the expert of one rank, or the `top_k` best."""
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        gate = layer.mlp.gate

        def forward(hidden: torch.Tensor, weight: torch.Tensor = gate.weight) -> tuple[torch.Tensor, ...]:
            logits = hidden.reshape(-1, hidden.shape[-1]) @ weight.T
            order = logits.argsort(dim=-1, descending=True)
            index = order[:, rank - 1 : rank] if rank else order[:, :top_k]
            weights = logits.gather(-1, index).float().softmax(dim=-1)
            return logits, weights.to(hidden.dtype), index

        gate.forward = forward
    return twin


@torch.no_grad()
def last_logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(B, V) float64 after the last token."""
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if mask is not None:
        inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return model(**inputs).logits[:, -1].double()


def contrast_reference(strong: torch.Tensor, weak: torch.Tensor, beta: float, alpha: float) -> torch.Tensor:
    """One row after the other, one token after the other."""
    out = torch.full_like(strong, float("-inf"))
    for row in range(len(strong)):
        best = max(strong[row].tolist())
        for token in range(strong.shape[1]):
            if alpha == 0 or strong[row, token] >= math.log(alpha) + best:
                out[row, token] = (1 + beta) * strong[row, token] - beta * weak[row, token]
    return out


def decode(
    strong: nn.Module, weak: nn.Module, ids: torch.Tensor, steps: int, *, beta: float, alpha: float, mask: Any = None
) -> torch.Tensor:
    """(B, S + steps) ids, greedily."""
    for _ in range(steps):
        scores = contrast_reference(last_logits(strong, ids, mask), last_logits(weak, ids, mask), beta, alpha)
        ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=-1)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
    return ids
