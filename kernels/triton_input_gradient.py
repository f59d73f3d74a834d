"""The gradient of the experts' input in Triton, and what all products of the backward share.

Axes: T tokens, K slots of a token, S = T*K slots, E experts, H hidden size, I intermediate size. Buffers over rows
have S rows in the order of `SlotGroups`; those past `offsets[E]` are neither read nor written. Sums are in float32 and
in a fixed order, so that two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backward_config import backward_config
from .expert_weights import Activation, ExpertWeights
from .tile_config import KernelConfig
from .triton_routing import Launch, SlotGroups, tile_list


@triton.jit
def place(
    index: tl.tensor, num_rows: tl.tensor, num_columns: tl.tensor, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Number of a program -> row and column of its tile. GROUP rows go side by side, so both operands are reused."""
    size = GROUP * num_columns
    first = (index // size) * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    inside = index % size
    return first + inside % height, inside // height


@triton.jit
def half_columns(x: tl.tensor, HALF: tl.constexpr) -> tl.tensor:
    """The left (0) or right (1) half of the columns of a tile: in the layout of a product, a cut between registers."""
    left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
    return left if HALF == 0 else right


@triton.jit
def multiply(
    left_rows: tl.tensor,  # pointers to the first element of each row
    row_mask: tl.tensor,
    right: tl.tensor,  # pointer to a matrix
    right_row: tl.tensor,  # its strides
    right_column: tl.tensor,
    columns: tl.tensor,
    column_mask: tl.tensor,
    length: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_M, length) rows times a (length, N) matrix, at BLOCK_N of its columns, in float32."""
    steps = tl.arange(0, BLOCK_K)
    left = left_rows[:, None] + steps[None, :]
    right += steps.to(tl.int64)[:, None] * right_row + columns.to(tl.int64)[None, :] * right_column
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, length, BLOCK_K):
        if EVEN_K:
            a = tl.load(left, mask=row_mask[:, None], other=0.0)
            b = tl.load(right, mask=column_mask[None, :], other=0.0)
        else:
            inside = steps < length - start
            a = tl.load(left, mask=row_mask[:, None] & inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None] & column_mask[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += BLOCK_K
        right += tl.cast(right_row, tl.int64) * BLOCK_K
    return total


@triton.jit
def _input_gradient_kernel(
    grad_pre_ptr: tl.tensor,  # (S, width)
    up_ptr: tl.tensor,  # (E, width, H) by strides
    up_expert: tl.tensor,
    up_width: tl.tensor,
    up_hidden: tl.tensor,
    offsets_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    out_ptr: tl.tensor,  # (S, H)
    num_tiles: tl.tensor,
    width: tl.tensor,
    hidden: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of rows of one expert, BLOCK_N of the H columns."""
    tile, block = place(tl.program_id(0), num_tiles, tl.cdiv(hidden, BLOCK_N), GROUP)
    expert = tl.load(tiles_ptr + 2 * tile)
    if expert < 0:
        return
    rows = tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, BLOCK_M)
    row_mask = rows < tl.load(offsets_ptr + expert + 1)
    rows = rows.to(tl.int64)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    total = multiply(
        grad_pre_ptr + rows * width,
        row_mask,
        up_ptr + expert.to(tl.int64) * up_expert,
        up_width,
        up_hidden,
        columns,
        columns < hidden,
        width,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        PRECISION,
    )
    mask = row_mask[:, None] & (columns < hidden)[None, :]
    tl.store(out_ptr + rows[:, None] * hidden + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


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
        "GROUP": config.GROUP_M,
        "PRECISION": config.precision,
    }
    uses_wgmma = dtype.itemsize == 2 and config.BLOCK_M >= 64
    return Launch(kernel, grid, {**arguments, **tile}, config.num_warps, config.num_stages, uses_wgmma)


def input_gradient(grad_pre: Tensor, weights: ExpertWeights, groups: SlotGroups, *, config: KernelConfig) -> Tensor:
    """`grad_pre @ up`: the gradient of the input of each row. `combine` without weights makes (T, H) of it.

    Args:
        grad_pre: (S, 2I), or (S, I) without a gate, in the module's own column order.
        weights: the experts.
        groups: the routing.
        config: BLOCK_M rows, BLOCK_N of the H columns, BLOCK_K along the contraction. Loads are by pointers.

    Returns:
        (S, H), in the dtype of `grad_pre`.

    Raises:
        ValueError: shapes do not fit.
    """
    launch, result = _input_gradient_launch(grad_pre, weights, groups, tile_list(groups, config.BLOCK_M), config)
    launch.run(grad_pre)
    return result


def _input_gradient_launch(
    grad_pre: Tensor, weights: ExpertWeights, groups: SlotGroups, tiles: Tensor, config: KernelConfig
) -> tuple[Launch, Tensor]:
    up, hidden = weights.up, weights.hidden_size
    # Of the two axes of a matrix, which is which.
    width_axis, hidden_axis = (2, 1) if weights.is_transposed else (1, 2)
    width = up.shape[width_axis]
    check_rows("grad_pre", grad_pre, groups, columns=width, tokens=False)
    result = grad_pre.new_empty(grad_pre.shape[0], hidden)
    arguments = {
        "grad_pre_ptr": grad_pre.to(up.dtype).contiguous(),
        "up_ptr": up,
        "up_expert": up.stride(0),
        "up_width": up.stride(width_axis),
        "up_hidden": up.stride(hidden_axis),
        "offsets_ptr": groups.offsets,
        "tiles_ptr": tiles,
        "out_ptr": result,
        "num_tiles": tiles.shape[0],
        "width": width,
        "hidden": hidden,
        "EVEN_K": width % config.BLOCK_K == 0,
    }
    grid = (tiles.shape[0] * triton.cdiv(hidden, config.BLOCK_N),)
    return product_launch(_input_gradient_kernel, grid, arguments, config, up.dtype), result


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
    for name, tokens, slots, experts, hidden, intermediate, gpt_oss in EXAMPLES:
        weights = example_experts(experts, hidden, intermediate, Activation(), gpt_oss=gpt_oss)
        dtype, width = weights.up.dtype, 2 * intermediate
        config = backward_config("input_gradient", -(-tokens * slots // experts), hidden, width, dtype)
        groups, tiles = example_groups(tokens, slots, experts, config.BLOCK_M)
        grad_pre = torch.empty(tokens * slots, width, dtype=dtype, device="meta")
        cases[f"input_gradient-{name}"] = _input_gradient_launch(grad_pre, weights, groups, tiles, config)[0]
    return cases
