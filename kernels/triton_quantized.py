"""The experts layer in Triton with weights in few bits (see `quantized_weights`); the weights are frozen.

Few rows an expert: the weights stay packed until they are in registers, so no more than their few bits are read.
Many rows, and training: the experts in use are dequantised once, and the kernels of `triton_forward` and
`triton_backward` run.

Axes: T tokens, K slots of a token, S = T*K slots, E experts, H hidden size, I intermediate size. Buffers over rows
have the layout that `SlotGroups` describes: rows past `offsets[E]` are not written.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_experts
from .expert_weights import Activation, ExpertWeights
from .quantized_weights import PER_BYTE, QuantizedExperts, QuantizedStack
from .tile_config import KernelConfig, next_power_of_2
from .triton_forward import combine, down_forward, up_forward
from .triton_quantized_tiles import dequantize_kernel, packed_kernel
from .triton_routing import Launch, SlotGroups, group_slots, tile_list


MANY_ROWS = 256  # rows an expert from which on dequantising is a small part of the work


# Launches -----------------------------------------------------------------------------------------------------------


def packed_config(rows_per_expert: int, width: int, stack: QuantizedStack) -> KernelConfig:
    """A tile for `packed_up` and `packed_down`, where no measured one is known.

    64 columns fill an instruction of Hopper's, and the rows are no more than there are; a step along the contraction
    does not go beyond a group.

    Args:
        rows_per_expert: S / E, rounded up.
        width: columns of the result; for gated experts of the activation.
        stack: the weights.
    """
    rows = min(max(next_power_of_2(rows_per_expert), 16), 64)
    # With few rows a long step keeps more bytes under way, with many the registers are needed for sums.
    depth = min(stack.group_size or 128, max(next_power_of_2(stack.shape[2]), 16), 128 if rows < 64 else 64)
    group = 8 if rows_per_expert > 2 * rows else 1
    if stack.dtype == torch.float32:
        precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
        columns = min(max(next_power_of_2(width), 16), 32)
        return KernelConfig(min(rows, 32), columns, min(depth, 32), GROUP_M=group, precision=precision)
    return KernelConfig(rows, 64, depth, GROUP_M=group, num_stages=4)


def packed_up(
    hidden: Tensor,
    experts: QuantizedExperts,
    groups: SlotGroups,
    *,
    config: KernelConfig | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """Up projection of the token of each row, with its activation: (T, H) -> (S, I).

    Args:
        hidden: (T, H) in any layout, of the dtype of the weights.
        experts: those whose activation is known as a formula.
        groups: rows and their experts.
        config: BLOCK_N columns of the activation, BLOCK_K within a group; by rule where it is not given. Loads are by
            pointers.
        tiles: `tile_list(groups, config.BLOCK_M)`, if it is there already.

    Raises:
        ValueError: the activation is not known, the shapes do not match, or BLOCK_K is larger than a group.
        TypeError: the dtypes do not match.
    """
    if experts.activation is None:
        raise ValueError("the activation is not known as a formula.")
    _check(hidden, experts.up, hidden.shape[0] * groups.slots_per_token, groups)
    config = config or packed_config(_rows_per_expert(groups), experts.intermediate_size, experts.up)
    tiles = tile_list(groups, config.BLOCK_M) if tiles is None else tiles
    launch, out = _packed_launch(hidden, experts, groups, tiles, config, is_up=True)
    launch.run(hidden)
    return out


def packed_down(
    activated: Tensor,
    experts: QuantizedExperts,
    groups: SlotGroups,
    *,
    config: KernelConfig | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """Down projection of each row, with bias: (S, I) -> (S, H). The rest is as in `packed_up`."""
    _check(activated, experts.down, activated.shape[0], groups)
    config = config or packed_config(_rows_per_expert(groups), experts.hidden_size, experts.down)
    tiles = tile_list(groups, config.BLOCK_M) if tiles is None else tiles
    launch, out = _packed_launch(activated, experts, groups, tiles, config, is_up=False)
    launch.run(activated)
    return out


def _check(x: Tensor, stack: QuantizedStack, num_rows: int, groups: SlotGroups) -> None:
    if x.ndim != 2 or x.shape[1] != stack.shape[2]:
        raise ValueError(f"the input must be (rows, {stack.shape[2]}), got {tuple(x.shape)}.")
    if num_rows != groups.slot_of_row.numel() or stack.shape[0] != groups.num_experts:
        raise ValueError(
            f"the groups are of {groups.slot_of_row.numel()} slots and {groups.num_experts} experts, "
            f"the input has {num_rows} and {stack.shape[0]}."
        )
    if x.dtype != stack.dtype:
        raise TypeError(f"the input must be in {stack.dtype}, as the weights were, got {x.dtype}.")


def _rows_per_expert(groups: SlotGroups) -> int:
    return triton.cdiv(groups.slot_of_row.numel(), groups.num_experts)


def _stack_arguments(stack: QuantizedStack, nothing: Tensor) -> dict[str, Any]:
    """`nothing` stands in the place of a pointer that is not used."""
    packed, scales, zeros = stack.packed.contiguous(), stack.scales.contiguous(), stack.zeros
    return {
        "packed_ptr": packed,
        "scales_ptr": scales,
        "zeros_ptr": nothing if zeros is None else zeros.contiguous(),
        "stride_pe": packed.stride(0),
        "stride_pn": packed.stride(1),
        "stride_se": scales.stride(0),
        "stride_sn": scales.stride(1) if scales.shape[1] == stack.shape[1] else 0,
        "FORMAT": stack.kind,
        "PER_BYTE": PER_BYTE[stack.kind],
        "GROUP": stack.group_size or 0,
        "HAS_ZEROS": zeros is not None,
    }


def _packed_launch(
    x: Tensor, experts: QuantizedExperts, groups: SlotGroups, tiles: Tensor, config: KernelConfig, *, is_up: bool
) -> tuple[Launch, Tensor]:
    stack, bias = (experts.up, experts.up_bias) if is_up else (experts.down, experts.down_bias)
    if stack.group_size is not None and config.BLOCK_K > stack.group_size:
        raise ValueError(f"`BLOCK_K` must be at most the group of {stack.group_size}, got {config.BLOCK_K}.")
    formula = experts.activation if is_up and experts.activation is not None else Activation("identity")
    gated = is_up and experts.has_gate
    width, length = experts.intermediate_size if is_up else experts.hidden_size, stack.shape[2]
    out = x.new_empty(groups.slot_of_row.numel(), width)
    arguments = {
        **_stack_arguments(stack, groups.offsets),
        "x_ptr": x,
        "bias_ptr": groups.offsets if bias is None else bias,
        "out_ptr": out,
        "offsets_ptr": groups.offsets,
        "slot_of_row_ptr": groups.slot_of_row,
        "tiles_ptr": tiles,
        "num_tiles": tiles.shape[0],
        "width": width,
        "length": length,
        "slots_per_token": groups.slots_per_token,
        "stride_xr": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_be": 0 if bias is None else bias.stride(0),
        "stride_bn": 0 if bias is None else bias.stride(1),
        "GATHER": is_up,
        "PARTS": 2 if gated else 1,
        "INTERLEAVED": gated and not experts.is_concatenated,
        "HAS_BIAS": bias is not None,
        "KIND": formula.kind,
        "ALPHA": formula.alpha,
        "LIMIT": formula.limit,
        "SHIFT": formula.shift,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "GROUP_M": config.GROUP_M,
        "EVEN_K": length % config.BLOCK_K == 0,
        "PRECISION": config.precision,
    }
    grid = (tiles.shape[0] * triton.cdiv(width, config.BLOCK_N),)
    wgmma = config.BLOCK_N >= 64 and x.element_size() == 2
    return Launch(packed_kernel, grid, arguments, config.num_warps, config.num_stages, wgmma), out


def dequantize_used(stack: QuantizedStack, groups: SlotGroups) -> Tensor:
    """(E, N, K) in the dtype of the stack; matrices of experts without rows are not written."""
    launch, out = _dequantize_launch(stack, groups)
    launch.run(out)
    return out


def _dequantize_launch(stack: QuantizedStack, groups: SlotGroups) -> tuple[Launch, Tensor]:
    experts, rows, length = stack.shape
    out = torch.empty(stack.shape, dtype=stack.dtype, device=stack.packed.device)
    block_k = min(stack.group_size or 128, max(next_power_of_2(length), 16))
    block_n = min(4096 // block_k, next_power_of_2(rows))
    arguments = {
        **_stack_arguments(stack, groups.offsets),
        "out_ptr": out,
        "offsets_ptr": groups.offsets,
        "num_rows": rows,
        "length": length,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "EVEN_K": length % block_k == 0,
    }
    grid = (experts * triton.cdiv(rows, block_n), triton.cdiv(length, block_k))
    return Launch(dequantize_kernel, grid, arguments), out


# The layer ----------------------------------------------------------------------------------------------------------


def infer(hidden: Tensor, index: Tensor, weights: Tensor, experts: QuantizedExperts) -> Tensor:
    """(T, H), (T, K), (T, K) -> (T, H), without gradients."""
    groups, dtype = group_slots(index, experts.num_experts), experts.down.dtype
    if _rows_per_expert(groups) > MANY_ROWS or experts.activation is None:
        plain = _dequantized(experts, groups)
        activated, pre = up_forward(hidden.to(dtype), plain, groups, keep=False)
        rows = down_forward(experts.apply(pre) if activated is None else activated, plain, groups)
    else:
        rows = packed_down(packed_up(hidden.to(dtype), experts, groups), experts, groups)
    return combine(rows, groups, weights, len(hidden), out_dtype=hidden.dtype)


def _dequantized(experts: QuantizedExperts, groups: SlotGroups) -> ExpertWeights:
    return experts.with_stacks(dequantize_used(experts.up, groups), dequantize_used(experts.down, groups))


def forward(hidden: Tensor, index: Tensor, weights: Tensor, experts: QuantizedExperts) -> tuple[Tensor, Tensor]:
    """(T, H), (T, K), (T, K) -> (T, H), and what `backward` wants beside the inputs."""
    plain = _dequantized(experts, group_slots(index, experts.num_experts))
    return triton_experts.forward(hidden, index, weights, plain)


def backward(
    grad: Tensor,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    experts: QuantizedExperts,
    kept: Tensor,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of hidden and weights, each where `needs` says so."""
    plain = _dequantized(experts, group_slots(index, experts.num_experts))
    wanted = [*needs, False, False, False, False]
    return triton_experts.backward(grad, hidden, index, weights, plain, kept, wanted)[:2]


def compile_cases() -> dict[str, Launch]:
    """Launches at the size of real models, on tensors without data."""
    tokens, slots, experts, hidden, intermediate = 128, 8, 128, 2048, 768
    cases: dict[str, Launch] = {}

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def stack(rows: int, length: int, kind: Any, group: int | None, zeros: bool, dtype: torch.dtype) -> QuantizedStack:
        packed = empty(experts, rows, length // PER_BYTE[kind], dtype=torch.int8 if kind == "int8" else torch.uint8)
        shape = (experts, rows, 1 if group is None else length // group)
        scales = empty(*shape, dtype=torch.float32 if group is None else torch.bfloat16)
        points = empty(*shape, dtype=torch.uint8) if zeros else None
        return QuantizedStack(kind, packed, scales, points, (experts, rows, length), group, dtype)

    def add(
        name: str,
        kind: str,
        group: int | None = None,
        zeros: bool = False,
        *,
        dtype: torch.dtype = torch.bfloat16,
        rows: int = 16,
        gate: bool = True,
        gpt_oss: bool = False,
    ) -> None:
        formula = Activation("silu", alpha=1.702, limit=7.0, shift=1.0) if gpt_oss else Activation()
        width = 2 * intermediate if gate else intermediate
        up, down = (stack(*size, kind, group, zeros, dtype) for size in ((width, hidden), (hidden, intermediate)))
        up_bias, down_bias = empty(experts, width, dtype=dtype), empty(experts, hidden, dtype=dtype)
        weights = QuantizedExperts(up, down, None, None, gate, not gpt_oss, formula, formula.act)
        if gpt_oss:
            weights = replace(weights, up_bias=up_bias, down_bias=down_bias)
        number = empty(tokens * slots, dtype=torch.int32)
        groups = SlotGroups(number[: experts + 1], number, number, experts, slots)
        for is_up, x in ((True, (tokens, hidden)), (False, (tokens * slots, intermediate))):
            columns, side = (intermediate, up) if is_up else (hidden, down)
            config = packed_config(rows, columns, side)
            tiles = number.new_empty(tokens * slots // config.BLOCK_M + experts, 2)
            values = empty(*x, dtype=dtype)
            case, _ = _packed_launch(values, weights, groups, tiles, config, is_up=is_up)
            cases[f"{'up' if is_up else 'down'}-{name}"] = case
        number = number.new_empty(experts + 1)
        cases[f"dequantize-{name}"] = _dequantize_launch(up, replace(groups, offsets=number))[0]

    add("int8", "int8")
    add("int8-many", "int8", rows=64)
    for size in (32, 64, 128):
        add(f"int4-{size}", "int4", size)
    add("int4-zeros", "int4", 128, True)
    add("int4-many", "int4", 128, True, rows=64)
    add("nf4", "nf4", 64)
    add("nf4-many", "nf4", 64, rows=64)
    add("ternary", "ternary")
    add("ternary-many", "ternary", rows=64)
    add("gpt-oss", "int4", 64, gpt_oss=True)
    add("no-gate", "int4", 64, gate=False)
    add("fp16", "int4", 64, dtype=torch.float16)
    add("fp32", "nf4", 64, dtype=torch.float32)
    return cases
