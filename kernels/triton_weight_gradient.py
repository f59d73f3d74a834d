"""The gradients of projections and biases in Triton: sums over the rows of each expert.

Axes: T tokens, K slots of a token, S = T*K slots, E experts. Buffers over rows have S rows in the order of
`SlotGroups`; those past `offsets[E]` are not read. Sums are in float32 and in a fixed order, so that two runs give the
same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backward_config import weight_gradient_config
from .tile_config import KernelConfig
from .triton_input_gradient import (
    EXAMPLES,
    check_rows,
    check_weights,
    dense_columns,
    example_groups,
    half_columns,
    place,
    product_launch,
)
from .triton_routing import Launch, SlotGroups


_BIAS_ROWS, _BIAS_COLUMNS = 32, 128


@triton.jit
def _weight_gradient_kernel(
    left_ptr: tl.tensor,  # (S or T, M)
    left_row: tl.tensor,
    right_ptr: tl.tensor,  # (S or T, N)
    right_row: tl.tensor,
    slot_of_row_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    out_ptr: tl.tensor,  # (E, M, N) by strides
    out_expert: tl.tensor,
    out_row: tl.tensor,
    out_column: tl.tensor,
    num_left: tl.tensor,
    num_right: tl.tensor,
    SLOTS_PER_TOKEN: tl.constexpr,
    LEFT_IS_TOKENS: tl.constexpr,
    RIGHT_IS_TOKENS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One (BLOCK_M, BLOCK_N) block of the gradient of one expert: a product whose contraction runs over its rows."""
    tiles_left, tiles_right = tl.cdiv(num_left, BLOCK_M), tl.cdiv(num_right, BLOCK_N)
    index = tl.program_id(0)
    expert = index // (tiles_left * tiles_right)
    tile_left, tile_right = place(index % (tiles_left * tiles_right), tiles_left, tiles_right, GROUP)
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    if ACCUMULATE:
        if begin == end:
            return

    at_left = tile_left * BLOCK_M + tl.arange(0, BLOCK_M)
    at_right = tile_right * BLOCK_N + tl.arange(0, BLOCK_N)
    left_mask, right_mask = at_left < num_left, at_right < num_right
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        inside = rows < end
        left_at = rows
        right_at = rows
        if LEFT_IS_TOKENS or RIGHT_IS_TOKENS:
            tokens = tl.load(slot_of_row_ptr + rows, mask=inside, other=0) // SLOTS_PER_TOKEN
            if LEFT_IS_TOKENS:
                left_at = tokens
            if RIGHT_IS_TOKENS:
                right_at = tokens
        # Zero on both sides past the end: what lies there may be NaN, and 0 * NaN is NaN.
        a = tl.load(
            left_ptr + left_at.to(tl.int64)[:, None] * left_row + at_left[None, :],
            mask=inside[:, None] & left_mask[None, :],
            other=0.0,
        )
        b = tl.load(
            right_ptr + right_at.to(tl.int64)[:, None] * right_row + at_right[None, :],
            mask=inside[:, None] & right_mask[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)

    HALVES: tl.constexpr = 2 if ACCUMULATE and BLOCK_N >= 64 else 1  # what is there needs registers too
    WIDTH: tl.constexpr = BLOCK_N // HALVES
    for half in tl.static_range(HALVES):
        part = total if HALVES == 1 else half_columns(total, half)
        columns = tile_right * BLOCK_N + half * WIDTH + tl.arange(0, WIDTH)
        mask = left_mask[:, None] & (columns < num_right)[None, :]
        target = out_ptr + expert.to(tl.int64) * out_expert
        target += at_left.to(tl.int64)[:, None] * out_row + columns.to(tl.int64)[None, :] * out_column
        if ACCUMULATE:
            part += tl.load(target, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, part.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gradient_kernel(
    rows_ptr: tl.tensor,  # (S or T, N)
    stride: tl.tensor,
    row_weights_ptr: tl.tensor,  # (S,) over slots
    slot_of_row_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    out_ptr: tl.tensor,  # (E, N)
    num_columns: tl.tensor,
    SLOTS_PER_TOKEN: tl.constexpr,
    IS_TOKENS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """BLOCK_N columns of one expert: the sum over its rows, in their order."""
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    total = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        inside = rows < end
        at = rows
        if IS_TOKENS or WEIGHTED:
            slots = tl.load(slot_of_row_ptr + rows, mask=inside, other=0)
            if IS_TOKENS:
                at = slots // SLOTS_PER_TOKEN
        part = tl.load(
            rows_ptr + at.to(tl.int64)[:, None] * stride + columns[None, :],
            mask=inside[:, None] & (columns < num_columns)[None, :],
            other=0.0,
        ).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(row_weights_ptr + slots, mask=inside, other=0.0).to(tl.float32)[:, None]
        total += part
    result = tl.sum(total, axis=0)
    tl.store(
        out_ptr + expert.to(tl.int64) * num_columns + columns,
        result.to(out_ptr.dtype.element_ty),
        columns < num_columns,
    )


# Launches -----------------------------------------------------------------------------------------------------------


def weight_gradient(
    left: Tensor,
    right: Tensor,
    groups: SlotGroups,
    *,
    left_is_tokens: bool,
    right_is_tokens: bool,
    out: torch.dtype,
    transposed: bool = False,
    accumulate_into: Tensor | None = None,
    config: KernelConfig,
) -> Tensor:
    """The sum of `left[row]^T right[row]` over the rows of each expert.

    With `grad_out` and `weighted_activated` it is the gradient of `down`, with `grad_pre` and `hidden` that of `up`.

    Args:
        left: (S, M) over rows, or (T, M) where `left_is_tokens`; then a row reads its token.
        right: (S, N), or (T, N) where `right_is_tokens`.
        groups: the routing.
        left_is_tokens, right_is_tokens: what the operands are.
        out: dtype of the result; sums are rounded once.
        transposed: give (E, N, M), as modules with `is_transposed` have their weights.
        accumulate_into: of the result's shape and dtype, with any strides: the sums are added to it in place, and it
            is returned. Experts without a row stay as they are.
        config: BLOCK_M x BLOCK_N of the result, BLOCK_K rows of the expert a step.

    Returns:
        (E, M, N), exact zeros for experts without a row. Where the operands differ in dtype, the wider one is rounded
        to the dtype of the other.

    Raises:
        ValueError: shapes do not fit, or the dtype of `accumulate_into` is not `out`.
    """
    if transposed:  # the operands change places, so that the result is written along its dense axis
        left, right, left_is_tokens, right_is_tokens = right, left, right_is_tokens, left_is_tokens
    shape = (groups.num_experts, left.shape[-1], right.shape[-1])
    if accumulate_into is not None and (accumulate_into.shape != shape or accumulate_into.dtype != out):
        found = f"{tuple(accumulate_into.shape)} of {accumulate_into.dtype}"
        raise ValueError(f"`accumulate_into` must be {shape} of {out}, got {found}.")
    result = torch.empty(shape, dtype=out, device=left.device) if accumulate_into is None else accumulate_into
    accumulate = accumulate_into is not None
    _weight_gradient_launch(
        left, right, groups, left_is_tokens, right_is_tokens, result, accumulate=accumulate, config=config
    ).run(left)
    return result


def _weight_gradient_launch(
    left: Tensor,
    right: Tensor,
    groups: SlotGroups,
    left_is_tokens: bool,
    right_is_tokens: bool,
    result: Tensor,
    *,
    accumulate: bool,
    config: KernelConfig,
) -> Launch:
    check_rows("left", left, groups, tokens=left_is_tokens)
    check_rows("right", right, groups, tokens=right_is_tokens)
    dtype = min(left.dtype, right.dtype, key=lambda kind: kind.itemsize)
    left, right = dense_columns(left.to(dtype)), dense_columns(right.to(dtype))
    num_experts, num_left, num_right = result.shape
    arguments = {
        "left_ptr": left,
        "left_row": left.stride(0),
        "right_ptr": right,
        "right_row": right.stride(0),
        "slot_of_row_ptr": groups.slot_of_row,
        "offsets_ptr": groups.offsets,
        "out_ptr": result,
        "out_expert": result.stride(0),
        "out_row": result.stride(1),
        "out_column": result.stride(2),
        "num_left": num_left,
        "num_right": num_right,
        "SLOTS_PER_TOKEN": groups.slots_per_token,
        "LEFT_IS_TOKENS": left_is_tokens,
        "RIGHT_IS_TOKENS": right_is_tokens,
        "ACCUMULATE": accumulate,
    }
    blocks = triton.cdiv(num_left, config.BLOCK_M) * triton.cdiv(num_right, config.BLOCK_N)
    return product_launch(_weight_gradient_kernel, (num_experts * blocks,), arguments, config, dtype)


def bias_gradient(
    rows: Tensor, groups: SlotGroups, row_weights: Tensor | None = None, *, is_tokens: bool, out: torch.dtype
) -> Tensor:
    """The sum over the rows of each expert.

    Of `grad_pre` it is the gradient of `up_bias`; of `grad_out`, with the routing weights, that of `down_bias`.

    Args:
        rows: (S, N) over rows, or (T, N) where `is_tokens`; then a row reads its token.
        groups: the routing.
        row_weights: (T, K), factors of the slots; `None` means 1.
        is_tokens: what `rows` is.
        out: dtype of the result; sums are rounded once.

    Returns:
        (E, N), exact zeros for experts without a row.

    Raises:
        ValueError: shapes do not fit.
    """
    launch, result = _bias_gradient_launch(rows, groups, row_weights, is_tokens, out)
    launch.run(rows)
    return result


def _bias_gradient_launch(
    rows: Tensor, groups: SlotGroups, row_weights: Tensor | None, is_tokens: bool, out: torch.dtype
) -> tuple[Launch, Tensor]:
    check_rows("rows", rows, groups, tokens=is_tokens)
    if row_weights is not None:
        check_weights("row_weights", row_weights, groups)
    rows = dense_columns(rows)
    result = torch.empty(groups.num_experts, rows.shape[1], dtype=out, device=rows.device)
    arguments = {
        "rows_ptr": rows,
        "stride": rows.stride(0),
        "row_weights_ptr": rows if row_weights is None else row_weights.contiguous(),
        "slot_of_row_ptr": groups.slot_of_row,
        "offsets_ptr": groups.offsets,
        "out_ptr": result,
        "num_columns": rows.shape[1],
        "SLOTS_PER_TOKEN": groups.slots_per_token,
        "IS_TOKENS": is_tokens,
        "WEIGHTED": row_weights is not None,
        "BLOCK_R": _BIAS_ROWS,
        "BLOCK_N": _BIAS_COLUMNS,
    }
    grid = (groups.num_experts, triton.cdiv(rows.shape[1], _BIAS_COLUMNS))
    return Launch(_bias_gradient_kernel, grid, arguments), result


# What is compiled without a device ----------------------------------------------------------------------------------


def compile_cases() -> dict[str, Launch]:
    """Launches at the size of real models, on tensors without data."""
    cases = {}
    for name, tokens, slots, experts, hidden, intermediate, _ in EXAMPLES:
        groups, _ = example_groups(tokens, slots, experts, 64)
        x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="meta")
        grad_pre, weighted = x.new_empty(tokens * slots, 2 * intermediate), x.new_empty(tokens * slots, intermediate)
        factors = x.new_empty(tokens, slots, dtype=torch.float32)
        cases[f"bias_gradient-up-{name}"] = _bias_gradient_launch(grad_pre, groups, None, False, x.dtype)[0]
        cases[f"bias_gradient-down-{name}"] = _bias_gradient_launch(x, groups, factors, True, x.dtype)[0]
        for side, left, right in (("down", x, weighted), ("up", grad_pre, x), ("up_transposed", x, grad_pre)):
            m, n = left.shape[1], right.shape[1]
            config = weight_gradient_config(-(-tokens * slots // experts), m, n, x.dtype)
            for accumulate, out in ((False, x.dtype), (True, torch.float32)):
                result = x.new_empty(experts, m, n, dtype=out)
                cases[f"weight_gradient-{side}-{name}{'-accumulate' * accumulate}"] = _weight_gradient_launch(
                    left, right, groups, left is x, right is x, result, accumulate=accumulate, config=config
                )
    return cases
