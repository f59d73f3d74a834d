"""Experts with low-rank adapters on a CPU: each product gains two thin ones, and B @ A is never made.

The loop over experts, its buffers and what is kept are those of `cpu_experts`. The weights of the experts are frozen,
so backward gives the gradients of the adapters, of the tokens and of the routing weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cpu_experts import (
    _WORKSPACE_BYTES,
    SortedSlots,
    _activate,
    _activation_gradient,
    _gather,
    _matrices,
    _sum_slots,
    sort_slots,
    workspace,
)
from .cpu_matmul import product
from .expert_weights import ExpertWeights
from .lora import ExpertLora, LowRank


def refusal(experts: ExpertWeights, lora: ExpertLora) -> str | None:
    """Why the CPU cannot run these experts, or `None`: it runs all."""
    return None


@dataclass(frozen=True)
class _Adapter:
    """One matrix of A and B for each expert, B contiguous: PEFT's has a dense axis over experts only."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @classmethod
    def of(cls, adapter: LowRank | None) -> _Adapter | None:
        return None if adapter is None else cls(adapter.a.contiguous(), adapter.b.contiguous(), adapter.scale)

    def low(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """`x @ A^T`: (n, in) -> (n, r)."""
        return x @ self.a[number].t()

    def add(self, out: torch.Tensor, x: torch.Tensor, number: int) -> torch.Tensor:
        """`out + scale * x @ A^T @ B^T`, in place: (n, out), (n, in)."""
        return out.addmm_(self.low(x, number), self.b[number].t(), alpha=self.scale)

    def outer(self, left: torch.Tensor, right: torch.Tensor, stack: torch.Tensor | None, number: int) -> None:
        """`scale * left^T @ right` into one matrix of a gradient, rounded once."""
        if stack is not None:
            torch.addmm(stack[number], left.t(), right, beta=0, alpha=self.scale, out=stack[number])


def infer(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights, lora: ExpertLora
) -> torch.Tensor:
    """(T, H), (T, K), (T, K) -> (T, H), without gradients."""
    tokens, slots = index.shape
    if tokens == 1:
        return _one_token(hidden, index, weights, experts, lora)
    part = max(1, _WORKSPACE_BYTES // (slots * hidden.shape[-1] * experts.down.element_size()))
    if tokens > part:
        split = zip(hidden.split(part), index.split(part), weights.split(part), strict=True)
        return torch.cat([infer(rows, ids, scales, experts, lora) for rows, ids, scales in split])
    return _forward(hidden, sort_slots(index, experts.num_experts), weights, experts, lora, None)


def _one_token(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights, lora: ExpertLora
) -> torch.Tensor:
    """The form for decoding, as in `cpu_experts`. Only the chosen experts' A and B are looked at."""
    dtype, (up, down) = experts.down.dtype, _matrices(experts)
    x, ids = hidden.to(dtype), index[0].tolist()
    used = [slot for slot, number in enumerate(ids) if number < experts.num_experts]
    if not used:
        return torch.zeros_like(hidden)
    buffer = workspace("up", up.shape[1], dtype)
    rows = workspace("out", len(used) * down.shape[1], dtype).view(len(used), 1, down.shape[1])
    for row, slot in zip(rows, used, strict=True):
        number = ids[slot]
        middle = product(x, up, number, buffer)
        if experts.up_bias is not None:
            middle = middle + experts.up_bias[number]
        _add_to_vector(middle, x, lora.up, number)
        middle = _activate(middle, experts)
        product(middle, down, number, row.view(-1), row_major=True)
        if experts.down_bias is not None:
            row += experts.down_bias[number]
        _add_to_vector(row, middle, lora.down, number)
    scale = weights[:, used].to(torch.promote_types(dtype, torch.float32))
    return (scale @ rows[:, 0].to(scale.dtype)).to(hidden.dtype)


def _add_to_vector(out: torch.Tensor, x: torch.Tensor, adapter: LowRank | None, number: int) -> None:
    """`out + scale * x @ A^T @ B^T`, in place: (1, out), (1, in)."""
    if adapter is not None:
        out[0].addmv_(adapter.b[number], torch.mv(adapter.a[number], x[0]), alpha=adapter.scale)


def forward(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights, lora: ExpertLora
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H), (T, K), (T, K) -> (T, H), and what `backward` wants beside the inputs: the projections before the
    activation, (used slots, 2I), with the share of the adapters in them."""
    slots = sort_slots(index, experts.num_experts)
    kept = torch.empty(slots.num_rows, _matrices(experts)[0].shape[1], dtype=experts.down.dtype)
    return _forward(hidden, slots, weights, experts, lora, kept), kept


def _forward(
    hidden: torch.Tensor,
    slots: SortedSlots,
    weights: torch.Tensor,
    experts: ExpertWeights,
    lora: ExpertLora,
    kept: torch.Tensor | None,
) -> torch.Tensor:
    """As in `cpu_experts`; the routing weight comes early or late for the reasons given there."""
    dtype, (up, down) = experts.down.dtype, _matrices(experts)
    if slots.num_rows == 0:
        return torch.zeros_like(hidden)
    up_adapter, down_adapter = _Adapter.of(lora.up), _Adapter.of(lora.down)
    early = dtype != torch.float32 and experts.down_bias is None
    scale = weights.reshape(-1)[slots.order, None] if early else None
    source = hidden.to(dtype)
    out = workspace("out", (slots.num_rows + 1) * down.shape[1], dtype).view(-1, down.shape[1])
    for number, first, last in slots.experts:
        x = _gather(source, slots.tokens[first:last], "hidden")
        if kept is not None:
            pre = product(x, up, number, kept[first:last].view(-1), row_major=True)
        else:
            pre = product(x, up, number, workspace("up", x.shape[0] * up.shape[1], dtype))
        if experts.up_bias is not None:
            pre = pre.add_(experts.up_bias[number])
        if up_adapter is not None:
            pre = up_adapter.add(pre, x, number)
        y = _activate(pre, experts, keep=kept is not None)
        if scale is not None:
            # Out of place where `pre` is kept: the activation may have handed it through.
            y = y.mul_(scale[first:last]) if kept is None else (y * scale[first:last]).to(dtype)
        rows = product(y, down, number, out[first:last].view(-1), row_major=True)
        if experts.down_bias is not None:
            rows += experts.down_bias[number]
        if down_adapter is not None:
            down_adapter.add(rows, y, number)
    return _sum_slots(out, slots, None if early else weights.to(dtype)).to(hidden.dtype)


def backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    lora: ExpertLora,
    kept: torch.Tensor,
    needs: list[bool],
) -> list[torch.Tensor | None]:
    """Gradients of hidden, weights, and A and B of the up and the down projection, each where `needs` says so.

    With d the gradient of the token and s the scale, `down` gives `d @ W + s * d @ B @ A`, whose product with the
    activated values is the gradient of the routing weight.
    """
    dtype, (up, down) = experts.down.dtype, _matrices(experts)
    wants_hidden, wants_weights, *_ = needs
    up_adapter, down_adapter = _Adapter.of(lora.up), _Adapter.of(lora.down)
    d_up_a, d_up_b, d_down_a, d_down_b = (
        tensor.new_zeros(tensor.shape) if wanted and tensor is not None else None
        for tensor, wanted in zip(lora.tensors, needs[2:], strict=True)
    )
    wants_pre = wants_hidden or d_up_a is not None or d_up_b is not None
    slots = sort_slots(index, experts.num_experts)
    row_weights = weights.reshape(-1)[slots.order, None]
    exact = torch.promote_types(weights.dtype, torch.float32)
    d_weights = torch.zeros_like(weights, dtype=exact) if wants_weights else None
    d_rows = workspace("out", (slots.num_rows + 1) * hidden.shape[1], dtype).view(-1, hidden.shape[1])
    grad, source = grad.to(dtype), hidden.to(dtype)
    for number, first, last in slots.experts:
        rows = slots.tokens[first:last]
        d_out, scale = _gather(grad, rows, "grad"), row_weights[first:last]
        d_middle = product(d_out, down.transpose(1, 2), number, workspace("up", (last - first) * down.shape[2], dtype))
        activated, backward = _activation_gradient(kept[first:last], experts)
        if down_adapter is not None:
            low = d_out @ down_adapter.b[number]
            d_middle.addmm_(low, down_adapter.a[number], alpha=down_adapter.scale)
            weighted = (activated * scale).to(dtype)
            down_adapter.outer(low, weighted, d_down_a, number)
            if d_down_b is not None:
                down_adapter.outer(d_out, down_adapter.low(weighted, number), d_down_b, number)
        if d_weights is not None:
            part = (d_middle.to(d_weights.dtype) * activated).sum(-1)
            if experts.down_bias is not None:
                part += d_out.to(d_weights.dtype) @ experts.down_bias[number].to(d_weights.dtype)
            d_weights.view(-1)[slots.order[first:last]] = part
        if not wants_pre:
            continue
        d_pre = backward((d_middle * scale).to(dtype))
        if wants_hidden:
            product(d_pre, up.transpose(1, 2), number, d_rows[first:last].view(-1), row_major=True)
        if up_adapter is not None:
            low = d_pre @ up_adapter.b[number]
            if wants_hidden:
                d_rows[first:last].addmm_(low, up_adapter.a[number], alpha=up_adapter.scale)
            x = _gather(source, rows, "hidden")
            up_adapter.outer(low, x, d_up_a, number)
            if d_up_b is not None:
                up_adapter.outer(d_pre, up_adapter.low(x, number), d_up_b, number)
    d_hidden = _sum_slots(d_rows, slots, None).to(hidden.dtype) if wants_hidden else None
    d_weights = None if d_weights is None else d_weights.to(weights.dtype)
    return [d_hidden, d_weights, d_up_a, d_up_b, d_down_a, d_down_b]
