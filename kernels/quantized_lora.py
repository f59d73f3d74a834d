"""Adapters on experts in few bits: what QLoRA (https://arxiv.org/abs/2305.14314) does to linear layers.

Nothing of the experts is kept between forward and backward but their few bits; each is made again when its turn comes
(on a GPU, all in use at once). The kernels are those of experts with adapters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from . import cpu_experts
from .lora import ExpertLora, LowRank
from .quantized_weights import QuantizedExperts


def run_quantized_lora(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: QuantizedExperts,
    lora: ExpertLora,
    kernels: Any,
) -> torch.Tensor:
    """(T, H), (T, K), (T, K) -> (T, H), with gradients of tokens, routing weights and adapters.

    Args:
        kernels: `cpu_lora` or `triton_lora`.
    """
    needed = (hidden, weights, *lora.tensors)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in needed):
        out: torch.Tensor = _QuantizedLora.apply(hidden, index, weights, *lora.tensors, experts, lora, kernels)
        return out
    with torch.no_grad():
        return _forward(hidden, index, weights, experts, lora, kernels, None)


class _QuantizedLora(torch.autograd.Function):
    """Keeps the tokens, the routing, the adapters, and the projections before the activation."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, index: Any, weights: Any, *rest: Any) -> torch.Tensor:
        *adapters, experts, lora, kernels = rest
        kept: list[Any] = []
        out = _forward(hidden, index, weights, experts, lora.with_tensors(adapters), kernels, kept)
        ctx.experts, ctx.lora, ctx.kernels = experts, lora.with_tensors((None,) * 4), kernels
        ctx.save_for_backward(hidden, index, weights, *adapters, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        hidden, index, weights, *rest = ctx.saved_tensors
        adapters, kept = rest[:4], rest[4:]
        needs = [ctx.needs_input_grad[place] for place in (0, 2, 3, 4, 5, 6)]
        lora = ctx.lora.with_tensors(adapters)
        found = _backward(grad, hidden, index, weights, ctx.experts, lora, ctx.kernels, kept, needs)
        return found[0], None, *found[1:], None, None, None


def _one(lora: ExpertLora, number: int) -> ExpertLora:
    """The adapters of one expert, (1, ...)."""

    def part(adapter: LowRank | None) -> LowRank | None:
        if adapter is None:
            return None
        return replace(adapter, a=adapter.a[number : number + 1], b=adapter.b[number : number + 1])

    return ExpertLora(part(lora.up), part(lora.down))


def _forward(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: QuantizedExperts,
    lora: ExpertLora,
    kernels: Any,
    kept: list[Any] | None,
) -> torch.Tensor:
    """The projections before the activation are appended to `kept`: of each expert in use on a CPU, else of all."""
    if hidden.device.type != "cpu":
        dense = experts.dequantize()
        if kept is None:
            result: torch.Tensor = kernels.infer(hidden, index, weights, dense, lora)
            return result
        result, projections = kernels.forward(hidden, index, weights, dense, lora)
        kept.append(projections)
        return result
    from .cpu_quantized import _one_on_cpu, _sum_like

    slots, out = cpu_experts.sort_slots(index, experts.num_experts), _sum_like(hidden)
    for number, first, last in slots.experts:
        tokens, factors = slots.tokens[first:last], weights.reshape(-1)[slots.order[first:last], None]
        one = hidden[tokens], torch.zeros_like(tokens)[:, None], factors, _one_on_cpu(experts, number)
        if kept is None:
            rows = kernels.infer(*one, _one(lora, number))
        else:
            rows, projections = kernels.forward(*one, _one(lora, number))
            kept.append(projections)
        out.index_add_(0, tokens, rows.to(out.dtype))
    return out.to(hidden.dtype)


def _backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: QuantizedExperts,
    lora: ExpertLora,
    kernels: Any,
    kept: list[torch.Tensor],
    needs: list[bool],
) -> list[torch.Tensor | None]:
    """Gradients of hidden, weights, and A and B of both projections, each where `needs` says so."""
    if hidden.device.type != "cpu":
        dense = experts.dequantize()
        found: list[torch.Tensor | None] = kernels.backward(grad, hidden, index, weights, dense, lora, kept[0], needs)
        return found
    from .cpu_quantized import _one_on_cpu, _sum_like

    slots = cpu_experts.sort_slots(index, experts.num_experts)
    d_hidden, d_weights = _sum_like(hidden), torch.zeros_like(weights)
    totals = [
        tensor.new_zeros(tensor.shape) if wanted and tensor is not None else None
        for tensor, wanted in zip(lora.tensors, needs[2:], strict=True)
    ]
    for (number, first, last), projections in zip(slots.experts, kept, strict=True):
        tokens, order = slots.tokens[first:last], slots.order[first:last]
        ids, factors = torch.zeros_like(tokens)[:, None], weights.reshape(-1)[order, None]
        one, adapters = _one_on_cpu(experts, number), _one(lora, number)
        d_rows, d_factors, *parts = kernels.backward(
            grad[tokens], hidden[tokens], ids, factors, one, adapters, projections, needs
        )
        if d_rows is not None:
            d_hidden.index_add_(0, tokens, d_rows.to(d_hidden.dtype))
        if d_factors is not None:
            d_weights.view(-1)[order] = d_factors[:, 0]
        for total, part in zip(totals, parts, strict=True):
            if total is not None:
                total[number] = part[0]
    return [d_hidden.to(hidden.dtype) if needs[0] else None, d_weights if needs[1] else None, *totals]
