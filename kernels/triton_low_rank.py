"""Thin products that come back to the rows of experts, in Triton: adapters added to a projection and to its gradient.

One kernel adds `scale * low @ B^T` to the rows of a projection and applies the activation on the way, another adds the
adapter's share to the gradient of the activated values and goes back through the activation.

Axes: T tokens, K slots of a token, S = T*K slots, E experts, H hidden size, I intermediate size, r rank. Buffers over
rows have S rows in the order of `SlotGroups`; what lies past `offsets[E]` is not written, and of no effect.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backward_config import down_backward_config
from .expert_weights import Activation, ExpertWeights
from .lora import LowRank
from .tile_config import KernelConfig, default_config, next_power_of_2
from .triton_backward import _SLOTS_A_PROGRAM, _finish_columns, _sum_partials_kernel
from .triton_gradients import example_experts, example_groups, product_launch
from .triton_routing import Launch, SlotGroups, tile_list
from .triton_tiles import activate, activate_gated, multiply, place_tile


# Kernels ------------------------------------------------------------------------------------------------------------


@triton.jit
def _add_kernel(
    low_ptr: tl.tensor,  # (S, r)
    w_ptr: tl.tensor,  # (E, parts of I, r) by strides
    rows_ptr: tl.tensor,  # (S, parts of I), added to
    activated_ptr: tl.tensor,  # (S, I)
    offsets_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    num_tiles: tl.tensor,
    intermediate: tl.tensor,
    rank: tl.tensor,
    scale: tl.tensor,
    stride_we: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    PARTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of `rows += scale * low @ w^T`, and of its activation unless `KIND` is None."""
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    place, block = place_tile(tl.program_id(0), num_tiles, tl.cdiv(intermediate, WIDTH), GROUP_M)
    expert = tl.load(tiles_ptr + place.to(tl.int64) * 2)
    if expert < 0:
        return
    first_row = tl.load(tiles_ptr + place.to(tl.int64) * 2 + 1)
    row = first_row + tl.arange(0, BLOCK_M)
    exists = row < tl.load(offsets_ptr + expert + 1)

    # Columns in the order of `rows`: pairs of gate and up side by side, or a block of each.
    first = block * WIDTH
    i = tl.arange(0, BLOCK_N)
    if PARTS == 2 and not INTERLEAVED:
        column = first + i % WIDTH
        n = i // WIDTH * intermediate + column
    else:
        n = first * PARTS + i
        column = n // PARTS
    inside = exists[:, None] & (column < intermediate)[None, :]
    n = tl.where(column < intermediate, n, 0)
    if RUN > 1:
        n = tl.max_contiguous(tl.multiple_of(n, RUN), RUN)
    n = n.to(tl.int64)

    # Rows of the next expert are computed as the first row again, and not stored.
    added = multiply(
        low_ptr,
        low_ptr + tl.where(exists, row, first_row).to(tl.int64) * rank,
        1,
        first_row,
        w_ptr,
        w_ptr + expert.to(tl.int64) * stride_we + n * stride_wn,
        stride_wk,
        expert,
        0,
        rank,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        False,
        None,
        PRECISION,
    )
    at = rows_ptr + row.to(tl.int64)[:, None] * (PARTS * intermediate) + n[None, :]
    out = tl.load(at, mask=inside, other=0.0).to(tl.float32) + scale * added
    tl.store(at, out.to(rows_ptr.dtype.element_ty), mask=inside)
    if KIND is not None:
        if PARTS == 2:
            if INTERLEAVED:
                gate, up = tl.split(out.reshape(BLOCK_M, WIDTH, 2))
            else:
                gate, up = tl.split(out.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1))
            value = activate_gated(gate, up, KIND, ALPHA, LIMIT, SHIFT)
        else:
            value = activate(out, KIND, ALPHA)
        column = first + tl.arange(0, WIDTH)
        target = activated_ptr + row.to(tl.int64)[:, None] * intermediate + column[None, :]
        mask = exists[:, None] & (column < intermediate)[None, :]
        tl.store(target, value.to(activated_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _activation_backward_kernel(
    d_ptr: tl.tensor,  # (S, I)
    low_ptr: tl.tensor,  # (S, r)
    a_ptr: tl.tensor,  # (E, r, I) by strides
    pre_ptr: tl.tensor,
    routing_weights_ptr: tl.tensor,  # (S,) over slots
    slot_of_row_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    grad_pre_ptr: tl.tensor,
    weighted_ptr: tl.tensor,  # (S, I)
    partials_ptr: tl.tensor,  # (column blocks, S) float32
    num_tiles: tl.tensor,
    num_slots: tl.tensor,
    intermediate: tl.tensor,
    rank: tl.tensor,
    scale: tl.tensor,
    stride_ae: tl.tensor,
    stride_ar: tl.tensor,
    stride_ai: tl.tensor,
    HAS_GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of the gradient before the activation, from `d + scale * low @ a`."""
    place, block = place_tile(tl.program_id(0), num_tiles, tl.cdiv(intermediate, BLOCK_N), GROUP_M)
    expert = tl.load(tiles_ptr + place.to(tl.int64) * 2)
    if expert < 0:
        return
    first_row = tl.load(tiles_ptr + place.to(tl.int64) * 2 + 1)
    row = first_row + tl.arange(0, BLOCK_M)
    exists = row < tl.load(offsets_ptr + expert + 1)
    slot = tl.load(slot_of_row_ptr + row, mask=exists, other=0)
    factor = tl.load(routing_weights_ptr + slot, mask=exists, other=0.0).to(tl.float32)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.where(column < intermediate, column, 0)
    if RUN > 1:
        n = tl.max_contiguous(tl.multiple_of(n, RUN), RUN)
    added = multiply(
        low_ptr,
        low_ptr + tl.where(exists, row, first_row).to(tl.int64) * rank,
        1,
        first_row,
        a_ptr,
        a_ptr + expert.to(tl.int64) * stride_ae + n.to(tl.int64) * stride_ai,
        stride_ar,
        expert,
        0,
        rank,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        False,
        None,
        PRECISION,
    )
    at = d_ptr + row.to(tl.int64)[:, None] * intermediate + column[None, :]
    mask = exists[:, None] & (column < intermediate)[None, :]
    partial = _finish_columns(
        tl.load(at, mask=mask, other=0.0).to(tl.float32) + scale * added,
        block * BLOCK_N,
        factor,
        row.to(tl.int64),
        exists,
        pre_ptr,
        grad_pre_ptr,
        weighted_ptr,
        intermediate,
        BLOCK_N,
        HAS_GATE,
        INTERLEAVED,
        KIND,
        ALPHA,
        LIMIT,
        SHIFT,
    )
    tl.store(partials_ptr + block.to(tl.int64) * num_slots + row, partial, mask=exists)


# Launches -----------------------------------------------------------------------------------------------------------


def add_low_rank(
    rows: Tensor,
    low: Tensor,
    matrices: Tensor,
    scale: float,
    groups: SlotGroups,
    *,
    experts: ExpertWeights | None = None,
    config: KernelConfig | None = None,
) -> Tensor | None:
    """`rows += scale * low @ matrices^T` in place, expert by expert, with the activation where experts are given.

    Args:
        rows: (S, N), contiguous.
        low: (S, r), contiguous, of the same dtype.
        matrices: (E, N, r), any strides.
        scale: factor of the product.
        groups: the routing.
        experts: whose known activation is applied to what comes out; N is then 2I, or I without a gate.
        config: BLOCK_M rows, BLOCK_N of the columns, BLOCK_K along r; by rule where it is not given.

    Returns:
        The activated rows (S, I), or `None` without `experts`.

    Raises:
        ValueError: shapes do not match, or a buffer is not contiguous.
    """
    num_slots, expected = groups.slot_of_row.numel(), (groups.num_experts, rows.shape[1], low.shape[1])
    if rows.shape[0] != num_slots or low.shape[0] != num_slots or matrices.shape != expected:
        found = f"{tuple(rows.shape)}, {tuple(low.shape)} and {tuple(matrices.shape)}"
        raise ValueError(f"rows, their low form and matrices must be (S, N), (S, r) and (E, N, r), got {found}.")
    if not rows.is_contiguous() or not low.is_contiguous():
        raise ValueError("rows and their low form must be contiguous.")
    config = config or _thin_config(groups, rows.shape[1], low.shape[1], rows.dtype)
    launch, activated = _add_launch(
        rows, low, matrices, scale, groups, tile_list(groups, config.BLOCK_M), experts, config
    )
    launch.run(rows)
    return activated


def _thin_config(groups: SlotGroups, columns: int, rank: int, dtype: torch.dtype) -> KernelConfig:
    """Tiles of 128 columns at most: these kernels read and write, the product hardly counts."""
    num_rows = triton.cdiv(groups.slot_of_row.numel(), groups.num_experts)
    config = default_config("down", num_rows, min(columns, 128), rank, dtype)
    return _in_steps(config, rank)


def _in_steps(config: KernelConfig, rank: int) -> KernelConfig:
    """Along r. Nothing to prefetch where one step is all, and more programs fit without a place for the next one."""
    depth = max(16, min(next_power_of_2(rank), 64))
    return replace(config, BLOCK_K=depth, num_stages=1 if rank <= depth else 3, persistent=False, tma=False)


def _add_launch(
    rows: Tensor,
    low: Tensor,
    matrices: Tensor,
    scale: float,
    groups: SlotGroups,
    tiles: Tensor,
    experts: ExpertWeights | None,
    config: KernelConfig,
) -> tuple[Launch, Tensor | None]:
    parts = 2 if experts is not None and experts.has_gate else 1
    intermediate = rows.shape[1] // parts
    activated = None if experts is None else rows.new_empty(rows.shape[0], intermediate)
    arguments = {
        "low_ptr": low,
        "w_ptr": matrices,
        "rows_ptr": rows,
        "activated_ptr": rows if activated is None else activated,
        "offsets_ptr": groups.offsets,
        "tiles_ptr": tiles,
        "num_tiles": tiles.shape[0],
        "intermediate": intermediate,
        "rank": low.shape[1],
        "scale": float(scale),
        "stride_we": matrices.stride(0),
        "stride_wn": matrices.stride(1),
        "stride_wk": matrices.stride(2),
        "EVEN_K": low.shape[1] % config.BLOCK_K == 0,
        "PARTS": parts,
        "INTERLEAVED": experts is not None and experts.has_gate and not experts.is_concatenated,
        **_formula(None if experts is None else experts.activation),
        "RUN": 8 if intermediate % 8 == 0 else 1,
    }
    grid = (tiles.shape[0] * triton.cdiv(intermediate, config.BLOCK_N // parts),)
    return product_launch(_add_kernel, grid, arguments, config, rows.dtype), activated


def _formula(activation: Activation | None) -> dict[str, Any]:
    known = Activation() if activation is None else activation
    kind = None if activation is None else known.kind
    return {"KIND": kind, "ALPHA": known.alpha, "LIMIT": known.limit, "SHIFT": known.shift}


def activation_backward(
    d: Tensor,
    low: Tensor,
    adapter: LowRank,
    experts: ExpertWeights,
    pre: Tensor,
    routing_weights: Tensor,
    groups: SlotGroups,
    *,
    config: KernelConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Back through routing weights and activation, from `d + scale * low @ A`.

    Args:
        d: (S, I), the gradient of the output times the weights of the down projection, for each row.
        low: (S, r), the same gradient times B of the adapter.
        adapter: of the down projection.
        experts: their activation is known.
        pre: (S, 2I), or (S, I) without a gate: the up projection, with all that belongs to it.
        routing_weights: (T, K); those of unused slots are never read.
        groups: the routing.
        config: BLOCK_M rows, BLOCK_N of the I columns, BLOCK_K along r; by rule where it is not given.

    Returns:
        grad_pre, like `pre`; weighted_activated (S, I); grad_weights (T, K) float32, without the share of a bias of
        the down projection, and 0 for unused slots.
    """
    config = config or _activation_config(groups, experts, low.shape[1])
    tiles = tile_list(groups, config.BLOCK_M)
    launches, results = _activation_launches(d, low, adapter, experts, pre, routing_weights, groups, tiles, config)
    for launch in launches:
        launch.run(d)
    return results


def _activation_config(groups: SlotGroups, experts: ExpertWeights, rank: int) -> KernelConfig:
    """As many columns as `down_backward` finishes at a time, since pairs of them need registers."""
    num_rows = triton.cdiv(groups.slot_of_row.numel(), groups.num_experts)
    config = down_backward_config(num_rows, experts.intermediate_size, rank, experts.down.dtype)
    columns = 32 if experts.has_gate and not experts.is_concatenated else 64
    return _in_steps(replace(config, BLOCK_N=min(config.BLOCK_N, columns)), rank)


def _activation_launches(
    d: Tensor,
    low: Tensor,
    adapter: LowRank,
    experts: ExpertWeights,
    pre: Tensor,
    routing_weights: Tensor,
    groups: SlotGroups,
    tiles: Tensor,
    config: KernelConfig,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    num_slots, intermediate = d.shape
    grad_pre, weighted = torch.empty_like(pre), torch.empty_like(d)
    blocks = triton.cdiv(intermediate, config.BLOCK_N)
    partials = torch.empty(blocks, num_slots, dtype=torch.float32, device=d.device)
    grad_weights = torch.empty(routing_weights.shape, dtype=torch.float32, device=d.device)
    arguments = {
        "d_ptr": d,
        "low_ptr": low,
        "a_ptr": adapter.a,
        "pre_ptr": pre,
        "routing_weights_ptr": routing_weights.contiguous(),
        "slot_of_row_ptr": groups.slot_of_row,
        "offsets_ptr": groups.offsets,
        "tiles_ptr": tiles,
        "grad_pre_ptr": grad_pre,
        "weighted_ptr": weighted,
        "partials_ptr": partials,
        "num_tiles": tiles.shape[0],
        "num_slots": num_slots,
        "intermediate": intermediate,
        "rank": low.shape[1],
        "scale": float(adapter.scale),
        "stride_ae": adapter.a.stride(0),
        "stride_ar": adapter.a.stride(1),
        "stride_ai": adapter.a.stride(2),
        "EVEN_K": low.shape[1] % config.BLOCK_K == 0,
        "HAS_GATE": experts.has_gate,
        "INTERLEAVED": experts.has_gate and not experts.is_concatenated,
        **_formula(experts.activation),
        "RUN": 8 if intermediate % 8 == 0 else 1,
    }
    sums = {
        "partials_ptr": partials,
        "row_of_slot_ptr": groups.row_of_slot,
        "out_ptr": grad_weights,
        "num_slots": num_slots,
        "num_blocks": blocks,
        "BLOCK": _SLOTS_A_PROGRAM,
    }
    launches = [
        product_launch(_activation_backward_kernel, (tiles.shape[0] * blocks,), arguments, config, d.dtype),
        Launch(_sum_partials_kernel, (triton.cdiv(num_slots, _SLOTS_A_PROGRAM),), sums),
    ]
    return launches, (grad_pre, weighted, grad_weights)


def compile_cases() -> dict[str, Launch]:
    """Launches at the size of real models, on tensors without data."""
    cases = {}
    gpt_oss = Activation("silu", alpha=1.702, limit=7.0, shift=1.0)
    for name, tokens, slots, num_experts, hidden, intermediate, rank, is_gpt_oss, gate in (
        ("qwen3", 8192, 8, 128, 2048, 768, 16, False, True),
        ("rank-64", 8192, 8, 128, 2048, 768, 64, False, True),
        ("few_rows", 256, 8, 128, 2048, 768, 16, False, True),
        ("gpt_oss", 8192, 4, 32, 2880, 2880, 16, True, True),
        ("no_gate", 8192, 8, 128, 2048, 768, 8, False, False),
    ):
        activation = gpt_oss if is_gpt_oss else Activation("silu" if gate else "relu2")
        experts = example_experts(num_experts, hidden, intermediate, activation, gpt_oss=is_gpt_oss, gate=gate)
        width = (2 if gate else 1) * intermediate
        x = torch.empty(tokens * slots, rank, dtype=torch.bfloat16, device="meta")
        pre, rows, d = (x.new_empty(len(x), size) for size in (width, hidden, intermediate))
        up_b, down_b = (x.new_empty(num_experts, size, rank) for size in (width, hidden))
        adapter = LowRank(x.new_empty(num_experts, rank, intermediate), down_b, 2.0)
        groups, _ = example_groups(tokens, slots, num_experts, 64)
        factors = torch.empty(tokens, slots, device="meta")

        for kind, target, matrices, owner in (("up", pre, up_b, experts), ("down", rows, down_b, None)):
            config = _thin_config(groups, target.shape[1], rank, x.dtype)
            launch, _ = _add_launch(
                target,
                x,
                matrices,
                2.0,
                groups,
                example_groups(tokens, slots, num_experts, config.BLOCK_M)[1],
                owner,
                config,
            )
            cases[f"add-{kind}-{name}"] = launch
        config = _activation_config(groups, experts, rank)
        launches, _ = _activation_launches(
            d,
            x,
            adapter,
            experts,
            pre,
            factors,
            groups,
            example_groups(tokens, slots, num_experts, config.BLOCK_M)[1],
            config,
        )
        cases[f"activation_backward-{name}"] = launches[0]
    return cases
