"""Frozen experts with low-rank adapters in Triton: the functions of `cpu_lora` on a GPU.

`x @ A^T` and the other thin products are the kernels of `triton_forward` on matrices of r columns; `triton_low_rank`
brings them back to the rows.

So an adapted projection is written, read and written once more, in the dtype of the weights, and rounded twice: 4I
numbers a slot of traffic for the up projection beside that of the experts alone, 2H for the down projection, and the
like in the backward. A last step of the contraction inside the kernels of the projections would save that. Few tokens
take the same way as many.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .expert_weights import ExpertWeights
from .lora import ExpertLora, LowRank
from .tile_config import default_config
from .triton_backward import down_backward
from .triton_experts import refusal as experts_refusal
from .triton_forward import _down_launch, _up_launch, combine, down_forward, up_forward
from .triton_gradients import example_groups, input_gradient, weight_gradient
from .triton_low_rank import activation_backward, add_low_rank
from .triton_routing import Launch, SlotGroups, group_slots


def refusal(experts: ExpertWeights, lora: ExpertLora) -> str | None:
    """Why the kernels cannot run these experts, or `None`."""
    if experts.activation is None:
        return "the activation is not known as a formula"
    dtypes = {tensor.dtype for tensor in (experts.down, *lora.tensors) if tensor is not None}
    return experts_refusal(experts) if len(dtypes) == 1 else "experts and adapters differ in their dtype"


def _product(x: Tensor, matrices: Tensor, groups: SlotGroups, *, is_tokens: bool) -> Tensor:
    """`x @ matrix^T` for each row: (T, n) where `is_tokens`, else (S, n), and (E, m, n) by any strides -> (S, m)."""
    plain = _plain(matrices, is_tokens)
    if not is_tokens:
        return down_forward(x, plain, groups)
    _, out = up_forward(x, plain, groups, keep=True)
    assert out is not None
    return out


def _plain(matrices: Tensor, is_up: bool) -> ExpertWeights:
    """Experts of which one projection is (E, m, n), and does nothing else."""
    turned = matrices.transpose(1, 2)
    up, down = (matrices, turned) if is_up else (turned, matrices)
    return ExpertWeights(up, down, None, None, False, False, True, None, _nothing, None)


def _nothing(x: Tensor) -> Tensor:
    return x


def _dense(lora: ExpertLora) -> ExpertLora:
    """With B contiguous: in that of PEFT the experts lie side by side, and no two numbers of one expert."""

    def dense(adapter: LowRank | None) -> LowRank | None:
        return None if adapter is None else replace(adapter, b=adapter.b.contiguous())

    return ExpertLora(dense(lora.up), dense(lora.down))


def infer(hidden: Tensor, index: Tensor, weights: Tensor, experts: ExpertWeights, lora: ExpertLora) -> Tensor:
    """(T, H), (T, K), (T, K) -> (T, H), without gradients."""
    return _forward(hidden, index, weights, experts, _dense(lora), keep=False)[0]


def forward(
    hidden: Tensor, index: Tensor, weights: Tensor, experts: ExpertWeights, lora: ExpertLora
) -> tuple[Tensor, Tensor]:
    """(T, H), (T, K), (T, K) -> (T, H), and what `backward` wants beside the inputs: the projections before the
    activation, (S, 2I), with the share of the adapters in them."""
    out, pre = _forward(hidden, index, weights, experts, _dense(lora), keep=True)
    assert pre is not None
    return out, pre


def _forward(
    hidden: Tensor, index: Tensor, weights: Tensor, experts: ExpertWeights, lora: ExpertLora, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    groups, x = group_slots(index, experts.num_experts), hidden.to(experts.down.dtype)
    if lora.up is None:
        activated, pre = up_forward(x, experts, groups, keep=keep)
    else:
        _, pre = up_forward(x, replace(experts, activation=None), groups, keep=True)
        assert pre is not None
        low = _product(x, lora.up.a, groups, is_tokens=True)
        activated = add_low_rank(pre, low, lora.up.b, lora.up.scale, groups, experts=experts)
    assert activated is not None
    rows = down_forward(activated, experts, groups)
    if lora.down is not None:
        low = _product(activated, lora.down.a, groups, is_tokens=False)
        add_low_rank(rows, low, lora.down.b, lora.down.scale, groups)
    return combine(rows, groups, weights, len(hidden), out_dtype=hidden.dtype), pre


def backward(
    grad: Tensor,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    lora: ExpertLora,
    kept: Tensor,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of hidden, weights, and A and B of the up and the down projection, each where `needs` says so."""
    wants_hidden, wants_weights, wants_up_a, wants_up_b, wants_down_a, wants_down_b = needs
    groups, dtype = group_slots(index, experts.num_experts), experts.down.dtype
    grad, x, lora = grad.to(dtype), hidden.to(dtype), _dense(lora)
    found: list[Tensor | None] = [None] * 6
    if lora.down is None:
        d_pre, _, d_weights = down_backward(grad, experts, kept, weights, groups)
    else:
        down = experts.down if experts.is_transposed else experts.down.transpose(1, 2)
        d = _product(grad, down, groups, is_tokens=True)
        low = _product(grad, lora.down.b.transpose(1, 2), groups, is_tokens=True)
        d_pre, weighted, d_weights = activation_backward(d, low, lora.down, experts, kept, weights, groups)
        if wants_weights and experts.down_bias is not None:
            d_weights += _of_slots(_product(grad, experts.down_bias[:, None], groups, is_tokens=True), groups)
        if wants_down_a:
            found[4] = _gradient(low, weighted, groups, lora.down.scale)
        if wants_down_b:
            low = _product(weighted, lora.down.a, groups, is_tokens=False)
            found[5] = _gradient(grad, low, groups, lora.down.scale, left_is_tokens=True)
    if wants_weights:
        found[1] = d_weights.to(weights.dtype)
    rows = input_gradient(d_pre, experts, groups) if wants_hidden else None
    if lora.up is not None:
        if wants_hidden or wants_up_a:
            low = _product(d_pre, lora.up.b.transpose(1, 2), groups, is_tokens=False)
            if rows is not None:
                add_low_rank(rows, low, lora.up.a.transpose(1, 2), lora.up.scale, groups)
            if wants_up_a:
                found[2] = _gradient(low, x, groups, lora.up.scale, right_is_tokens=True)
        if wants_up_b:
            low = _product(x, lora.up.a, groups, is_tokens=True)
            found[3] = _gradient(d_pre, low, groups, lora.up.scale)
    if rows is not None:
        found[0] = combine(rows, groups, None, len(hidden), out_dtype=hidden.dtype)
    return found


def _gradient(
    left: Tensor,
    right: Tensor,
    groups: SlotGroups,
    scale: float,
    *,
    left_is_tokens: bool = False,
    right_is_tokens: bool = False,
) -> Tensor:
    """`scale * left^T @ right` of the rows of each expert, rounded once."""
    total = weight_gradient(
        left, right, groups, left_is_tokens=left_is_tokens, right_is_tokens=right_is_tokens, out=torch.float32
    )
    return total.mul_(scale).to(left.dtype)


def _of_slots(rows: Tensor, groups: SlotGroups) -> Tensor:
    """(S, 1) over rows -> (T, K) over slots, float32, 0 for unused ones."""
    where = groups.row_of_slot.view(-1, groups.slots_per_token).long()
    return torch.where(where >= 0, rows[:, 0].float()[where.clamp(min=0)], 0.0)


def compile_cases() -> dict[str, Launch]:
    """The kernels of the projections on matrices of few columns, at the size of real models, without data."""
    cases: dict[str, Launch] = {}
    tokens, slots, experts, width = 8192, 8, 128, 2048
    for rank in (8, 16, 64):
        for rows in (16, 128):
            config = default_config("up", rows, rank, width, torch.bfloat16, num_experts=experts)
            groups, tiles = example_groups(tokens, slots, experts, config.BLOCK_M)
            for name, x in (("up", tokens), ("down", tokens * slots)):
                values = torch.empty(x, width, dtype=torch.bfloat16, device="meta")
                dense = values.new_empty(experts, rank, width)
                for layout, matrices in (("", dense), ("-turned", dense.transpose(1, 2).contiguous().transpose(1, 2))):
                    plain, label = _plain(matrices, name == "up"), f"thin-{name}-{rank}-{rows}-rows{layout}"
                    if name == "up":
                        cases[label] = _up_launch(values, plain, groups, tiles, True, config)[0]
                    else:
                        cases[label] = _down_launch(values, plain, groups, tiles, config)[0]
    return cases
