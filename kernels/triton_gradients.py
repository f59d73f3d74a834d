"""Gradients in Triton that are plain products and sums over the rows of each expert: projections, biases, input.

Axes: T tokens, K slots of a token, S = T*K slots, E experts, H hidden size, I intermediate size. Buffers over rows
have S rows in the order of `SlotGroups`; what lies past `offsets[E]` is not written, and of no effect. Sums are in
float32 and in a fixed order, so that two runs give the same bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .backward_config import weight_gradient_config
from .expert_weights import Activation, ExpertWeights
from .tile_config import KernelConfig
from .triton_forward import dense_axis, down_forward
from .triton_routing import Launch, SlotGroups
from .triton_tiles import place_tile
from .tuning import config_for, gradient_key


_BIAS_ROWS, _BIAS_COLUMNS = 32, 128


@triton.jit
def half_columns(x: tl.tensor, HALF: tl.constexpr) -> tl.tensor:
    """The left (0) or right (1) half of the columns of a tile: in the layout of a product, a cut between registers."""
    left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
    return left if HALF == 0 else right


@triton.jit
def _weight_gradient_kernel(
    left: tl.tensor,  # (S or T, M), or a descriptor of it
    left_ptr: tl.tensor,
    left_row: tl.tensor,
    right: tl.tensor,  # (S or T, N), or a descriptor of it
    right_ptr: tl.tensor,
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
    LEFT_TMA: tl.constexpr,
    RIGHT_TMA: tl.constexpr,
    EVEN_LEFT: tl.constexpr,
    EVEN_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One (BLOCK_M, BLOCK_N) block of the gradient of one expert: a product whose contraction runs over its rows."""
    tiles_left, tiles_right = tl.cdiv(num_left, BLOCK_M), tl.cdiv(num_right, BLOCK_N)
    index = tl.program_id(0)
    expert = index // (tiles_left * tiles_right)
    tile_left, tile_right = place_tile(index % (tiles_left * tiles_right), tiles_left, tiles_right, GROUP_M)
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    if ACCUMULATE:
        if begin == end:
            return

    at_left = tile_left * BLOCK_M + tl.arange(0, BLOCK_M)
    at_right = tile_right * BLOCK_N + tl.arange(0, BLOCK_N)
    left_mask, right_mask = at_left < num_left, at_right < num_right
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    whole = begin + (end - begin) // BLOCK_K * BLOCK_K
    for start in range(begin, whole, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        if LEFT_IS_TOKENS or RIGHT_IS_TOKENS:
            tokens = tl.load(slot_of_row_ptr + rows) // SLOTS_PER_TOKEN
        if LEFT_TMA:
            a = left.load([start, tile_left * BLOCK_M])
        else:
            at = (tokens if LEFT_IS_TOKENS else rows).to(tl.int64)[:, None] * left_row + at_left[None, :]
            a = tl.load(left + at) if EVEN_LEFT else tl.load(left + at, mask=left_mask[None, :], other=0.0)
        if RIGHT_TMA:
            b = right.load([start, tile_right * BLOCK_N])
        else:
            at = (tokens if RIGHT_IS_TOKENS else rows).to(tl.int64)[:, None] * right_row + at_right[None, :]
            b = tl.load(right + at) if EVEN_RIGHT else tl.load(right + at, mask=right_mask[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    if whole < end:
        # The last rows: zero on both sides past the end, since what lies there may be NaN, and 0 * NaN is NaN.
        rows = whole + tl.arange(0, BLOCK_K)
        inside = rows < end
        if LEFT_IS_TOKENS or RIGHT_IS_TOKENS:
            tokens = tl.load(slot_of_row_ptr + rows, mask=inside, other=0) // SLOTS_PER_TOKEN
        at = (tokens if LEFT_IS_TOKENS else rows).to(tl.int64)[:, None] * left_row + at_left[None, :]
        a = tl.load(left_ptr + at, mask=inside[:, None] & left_mask[None, :], other=0.0)
        at = (tokens if RIGHT_IS_TOKENS else rows).to(tl.int64)[:, None] * right_row + at_right[None, :]
        b = tl.load(right_ptr + at, mask=inside[:, None] & right_mask[None, :], other=0.0)
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


def dense_columns(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is dense, as the kernels want it; else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def check_rows(name: str, tensor: Tensor, groups: SlotGroups, *, columns: int | None = None, tokens: bool) -> None:
    """Raise `ValueError` unless the tensor is (S, columns), or (T, columns) where `tokens`."""
    num_slots = groups.slot_of_row.shape[0]
    rows = num_slots // groups.slots_per_token if tokens else num_slots
    if tensor.ndim != 2 or tensor.shape[0] != rows or columns not in (None, tensor.shape[1]):
        expected = f"({rows}, {'any' if columns is None else columns})"
        raise ValueError(f"`{name}` must be {expected}, got {tuple(tensor.shape)}.")


def check_weights(name: str, weights: Tensor, groups: SlotGroups) -> None:
    """Raise `ValueError` unless the tensor is (T, K)."""
    expected = (groups.slot_of_row.shape[0] // groups.slots_per_token, groups.slots_per_token)
    if weights.shape != expected:
        raise ValueError(f"`{name}` must be {expected}, got {tuple(weights.shape)}.")


def product_launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], config: KernelConfig, dtype: torch.dtype
) -> Launch:
    """A launch with what all products take from a config."""
    tile = {
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "GROUP_M": config.GROUP_M,
        "PRECISION": config.precision,
    }
    uses_wgmma = dtype.itemsize == 2 and config.BLOCK_M >= 64
    return Launch(kernel, grid, {**arguments, **tile}, config.num_warps, config.num_stages, uses_wgmma)


def input_gradient(
    grad_pre: Tensor,
    weights: ExpertWeights,
    groups: SlotGroups,
    *,
    config: KernelConfig | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """`grad_pre @ up`: the gradient of the input of each row. `combine` without weights makes (T, H) of it.

    Args:
        grad_pre: (S, 2I), or (S, I) without a gate, in the module's own column order.
        weights: the experts, of the same dtype.
        groups: the routing.
        config: BLOCK_M rows, BLOCK_N of the H columns, BLOCK_K along the contraction; by rule where it is not given.
        tiles: `tile_list(groups, config.BLOCK_M)`, if it is there already.

    Returns:
        (S, H).

    Raises:
        ValueError: shapes do not match.
        TypeError: dtypes do not match.
    """
    # A down projection whose matrices are those of the up projection, read along the other axis.
    turned = replace(weights, down=weights.up, down_bias=None, is_transposed=not weights.is_transposed)
    return down_forward(grad_pre, turned, groups, config=config, tiles=tiles)


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
    config: KernelConfig | None = None,
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
        config: BLOCK_M x BLOCK_N of the result, BLOCK_K rows of the expert a step; by rule where it is not given.

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
    dtype = min(left.dtype, right.dtype, key=lambda kind: kind.itemsize)
    left, right = dense_columns(left.to(dtype)), dense_columns(right.to(dtype))
    if config is None:
        rows = triton.cdiv(groups.slot_of_row.numel(), groups.num_experts)
        config = config_for(
            gradient_key(shape, dtype, left.device, groups.slot_of_row.numel(), gathers_left=left_is_tokens),
            lambda: weight_gradient_config(rows, shape[1], shape[2], dtype, gathers_left=left_is_tokens),
        )
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
    num_experts, num_left, num_right = result.shape
    # What is gathered is loaded by pointers.
    left_tma = config.tma and not left_is_tokens and dense_axis(left) == "length"
    right_tma = config.tma and not right_is_tokens and dense_axis(right) == "length"
    arguments = {
        "left": TensorDescriptor.from_tensor(left, [config.BLOCK_K, config.BLOCK_M]) if left_tma else left,
        "left_ptr": left,
        "left_row": left.stride(0),
        "right": TensorDescriptor.from_tensor(right, [config.BLOCK_K, config.BLOCK_N]) if right_tma else right,
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
        "LEFT_TMA": left_tma,
        "RIGHT_TMA": right_tma,
        "EVEN_LEFT": num_left % config.BLOCK_M == 0,
        "EVEN_RIGHT": num_right % config.BLOCK_N == 0,
    }
    blocks = triton.cdiv(num_left, config.BLOCK_M) * triton.cdiv(num_right, config.BLOCK_N)
    return product_launch(_weight_gradient_kernel, (num_experts * blocks,), arguments, config, left.dtype)


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


# What is compiled without a device ----------------------------------------------------------------------------------


# Name, T, K, E, H, I, and whether the layout is that of GPT-OSS.
EXAMPLES = (
    ("qwen3", 8192, 8, 128, 2048, 768, False),
    ("gpt_oss", 8192, 4, 32, 2880, 2880, True),
    ("few_rows", 256, 8, 128, 2048, 768, False),
)


def example_groups(tokens: int, slots: int, experts: int, block_rows: int) -> tuple[SlotGroups, Tensor]:
    """Groups and tiles of a real size, without data."""
    number = torch.empty(tokens * slots, dtype=torch.int32, device="meta")
    tiles = number.new_empty(tokens * slots // block_rows + experts, 2)
    return SlotGroups(number.new_empty(experts + 1), number, number, experts, slots), tiles


def example_experts(
    experts: int, hidden: int, intermediate: int, activation: Activation, *, gpt_oss: bool = False, gate: bool = True
) -> ExpertWeights:
    """bfloat16 experts without data, in the stock layout or in that of GPT-OSS (biases, transposed, interleaved)."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    width = 2 * intermediate if gate else intermediate
    up, down = meta(experts, width, hidden), meta(experts, hidden, intermediate)
    return ExpertWeights(
        up=meta(experts, hidden, width) if gpt_oss else up,
        down=meta(experts, intermediate, hidden) if gpt_oss else down,
        up_bias=meta(experts, width) if gpt_oss else None,
        down_bias=meta(experts, hidden) if gpt_oss else None,
        has_gate=gate,
        is_transposed=gpt_oss,
        is_concatenated=not gpt_oss,
        activation=activation,
        apply=activation.act,
        post_norm=None,
    )


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
            config = weight_gradient_config(
                triton.cdiv(tokens * slots, experts), m, n, x.dtype, gathers_left=left is x
            )
            for accumulate, out in ((False, x.dtype), (True, torch.float32)):
                result = x.new_empty(experts, m, n, dtype=out)
                cases[f"weight_gradient-{side}-{name}{'-accumulate' * accumulate}"] = _weight_gradient_launch(
                    left, right, groups, left is x, right is x, result, accumulate=accumulate, config=config
                )
    return cases
