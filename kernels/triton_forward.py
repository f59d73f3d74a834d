"""The forward of the experts layer in Triton: up projection with activation, down projection, sum over slots.

Hidden states are gathered inside the up projection and summed from contiguous rows at the end, so neither gathered
inputs nor weighted outputs are ever stored. All sums are in float32 and in a fixed order.

Axes: T tokens, K slots of a token, S = T*K slots, E experts, H hidden size, I intermediate size. Buffers over rows
have the layout that `SlotGroups` describes: rows past `offsets[E]` are not written.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .expert_weights import Activation, ExpertWeights
from .tile_config import KernelConfig, default_config, next_power_of_2
from .triton_routing import Launch, SlotGroups, tile_list
from .triton_tiles import down_kernel, up_kernel
from .tuning import config_for, expert_key


Kind: TypeAlias = Literal["up", "up_kept", "down"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _combine(
    rows_ptr: tl.tensor,
    row_of_slot_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    add_ptr: tl.tensor,
    out_ptr: tl.tensor,
    hidden: tl.tensor,
    stride_row: tl.tensor,
    stride_wt: tl.tensor,
    stride_wk: tl.tensor,
    stride_at: tl.tensor,
    stride_ah: tl.tensor,
    scale: tl.tensor,
    SLOTS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """`scale * sum_k weights[t, k] * rows[row_of_slot[t, k]] + add[t]` for a block of columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.range(0, SLOTS, loop_unroll_factor=UNROLL):
        row = tl.load(row_of_slot_ptr + token * SLOTS + k)
        used = row >= 0
        # Nothing of an unused slot is read: its weight may be NaN, and it has no row.
        at = rows_ptr + row.to(tl.int64) * stride_row + column
        value = tl.load(at, mask=column < tl.where(used, hidden, 0), other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            value *= tl.load(weights_ptr + token * stride_wt + k * stride_wk, mask=used, other=0.0).to(tl.float32)
        total += value
    total *= scale
    if HAS_ADD:
        at = add_ptr + token * stride_at + column.to(tl.int64) * stride_ah
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def up_forward(
    hidden: Tensor,
    weights: ExpertWeights,
    groups: SlotGroups,
    *,
    keep: bool,
    config: KernelConfig | None = None,
    tiles: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Up projection of the token of each row, with the activation where its formula is known.

    Args:
        hidden: (T, H) in any layout, float32, float16 or bfloat16.
        weights: of the same dtype.
        groups: rows and their experts.
        keep: return the projection too, for the backward.
        config: tiles; measured or by rule where it is not given.
        tiles: `tile_list(groups, config.BLOCK_M)`, if it is there already.

    Returns:
        `activated` (S, I), `None` if `weights.activation` is: then the caller applies `weights.apply` to `pre`; and
        `pre` (S, 2I), or (S, I) without a gate, in the column order of the module, `None` unless kept or needed.

    Raises:
        ValueError: shapes do not match.
        TypeError: dtypes do not match, or are none that the kernel computes in.
    """
    _check(hidden, weights, hidden.shape[0] * groups.slots_per_token, weights.hidden_size, groups)
    config = config or _default("up_kept" if keep else "up", weights, groups)
    tiles = tile_list(groups, config.BLOCK_M) if tiles is None else tiles
    launch, activated, pre = _up_launch(hidden, weights, groups, tiles, keep, config)
    launch.run(hidden)
    return activated, pre


def _up_launch(
    hidden: Tensor, weights: ExpertWeights, groups: SlotGroups, tiles: Tensor, keep: bool, config: KernelConfig
) -> tuple[Launch, Tensor | None, Tensor | None]:
    num_slots, intermediate = groups.slot_of_row.numel(), weights.intermediate_size
    parts = 2 if weights.has_gate else 1
    formula = weights.activation
    activated = None if formula is None else hidden.new_empty(num_slots, intermediate)
    pre = hidden.new_empty(num_slots, parts * intermediate) if keep or formula is None else None
    interleaved = weights.has_gate and not weights.is_concatenated
    w = _columns_first(weights.up, weights.is_transposed)
    w_tma = dense_axis(w) if config.tma else None
    if w_tma == "columns" and parts == 2 and not interleaved and intermediate * w.element_size() % 16:
        w_tma = None  # the up columns begin where no step leads to
    bias = weights.up_bias
    nothing = groups.offsets  # in the place of a pointer that the kernel does not use
    arguments = {
        "x": hidden,
        "w": descriptor(w, 1 if interleaved else parts, config) if w_tma else w,
        "bias_ptr": nothing if bias is None else bias,
        "activated_ptr": nothing if activated is None else activated,
        "pre_ptr": nothing if pre is None else pre,
        "offsets_ptr": groups.offsets,
        "slot_of_row_ptr": groups.slot_of_row,
        "tiles_ptr": tiles,
        "num_tiles": tiles.shape[0],
        "hidden": hidden.shape[1],
        "intermediate": intermediate,
        "slots_per_token": groups.slots_per_token,
        "stride_xt": hidden.stride(0),
        "stride_xh": hidden.stride(1),
        "stride_we": w.stride(0),
        "stride_wn": w.stride(1),
        "stride_wk": w.stride(2),
        "stride_be": 0 if bias is None else bias.stride(0),
        "stride_bn": 0 if bias is None else bias.stride(1),
        "PARTS": parts,
        "INTERLEAVED": interleaved,
        "HAS_BIAS": bias is not None,
        "KEEP": pre is not None,
        **_activation_constants(formula),
        **_tile_constants(config, intermediate, hidden.shape[1]),
        "W_TMA": w_tma,
    }
    grid = _grid(tiles.shape[0] * triton.cdiv(intermediate, config.BLOCK_N // parts), config, hidden)
    return _launch(up_kernel, grid, arguments, config, hidden), activated, pre


def down_forward(
    activated: Tensor,
    weights: ExpertWeights,
    groups: SlotGroups,
    *,
    config: KernelConfig | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """Down projection of each row, with bias: (S, I) -> (S, H), contiguous. The rest is as in `up_forward`."""
    _check(activated, weights, activated.shape[0], weights.intermediate_size, groups)
    config = config or _default("down", weights, groups)
    tiles = tile_list(groups, config.BLOCK_M) if tiles is None else tiles
    launch, out = _down_launch(activated, weights, groups, tiles, config)
    launch.run(activated)
    return out


def _down_launch(
    activated: Tensor, weights: ExpertWeights, groups: SlotGroups, tiles: Tensor, config: KernelConfig
) -> tuple[Launch, Tensor]:
    hidden, intermediate = weights.hidden_size, weights.intermediate_size
    out = activated.new_empty(activated.shape[0], hidden)
    w = _columns_first(weights.down, weights.is_transposed)
    x_tma, w_tma = config.tma and dense_axis(activated) == "length", dense_axis(w) if config.tma else None
    bias = weights.down_bias
    half = config.BLOCK_M // 2 if config.halves else config.BLOCK_M
    x, x_half = (
        TensorDescriptor.from_tensor(activated, [rows, config.BLOCK_K]) if x_tma else activated
        for rows in (config.BLOCK_M, half)
    )
    arguments = {
        "x": x,
        "x_half": x_half,
        "w": descriptor(w, 1, config) if w_tma else w,
        "bias_ptr": groups.offsets if bias is None else bias,
        "out_ptr": out,
        "offsets_ptr": groups.offsets,
        "tiles_ptr": tiles,
        "num_tiles": tiles.shape[0],
        "hidden": hidden,
        "intermediate": intermediate,
        "stride_xr": activated.stride(0),
        "stride_xi": activated.stride(1),
        "stride_we": w.stride(0),
        "stride_wn": w.stride(1),
        "stride_wk": w.stride(2),
        "stride_be": 0 if bias is None else bias.stride(0),
        "stride_bn": 0 if bias is None else bias.stride(1),
        "HAS_BIAS": bias is not None,
        **_tile_constants(config, hidden, intermediate),
        "X_TMA": x_tma,
        "W_TMA": w_tma,
    }
    grid = _grid(tiles.shape[0] * triton.cdiv(hidden, config.BLOCK_N), config, activated)
    return _launch(down_kernel, grid, arguments, config, activated), out


def combine(
    rows: Tensor,
    groups: SlotGroups,
    routing_weights: Tensor | None,
    num_tokens: int,
    *,
    out_dtype: torch.dtype,
    add: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`scale * sum_k weights[t, k] * rows[row_of_slot[t, k]] + add[t]`, in float32, k ascending.

    Args:
        rows: (S, H), contiguous along H.
        groups: rows of the slots; unused slots are skipped, so a token without any gives 0.
        routing_weights: (T, K), in any layout and floating dtype; `None` for 1.
        num_tokens: T.
        out_dtype: of the result.
        add: (T, H) in any layout, for instance the output of shared experts.
        scale: of the sum, not of `add`.

    Returns:
        (T, H), contiguous.

    Raises:
        ValueError: shapes do not match, or `rows` is not contiguous along H.
    """
    hidden, slots = rows.shape[1], groups.slots_per_token
    if rows.shape[0] != num_tokens * slots or groups.row_of_slot.numel() != rows.shape[0]:
        raise ValueError(f"`rows` must have T*K = {num_tokens * slots} rows, got {rows.shape[0]}.")
    if hidden > 1 and rows.stride(1) != 1:
        raise ValueError("`rows` must be contiguous along its last axis.")
    if routing_weights is not None and routing_weights.shape != (num_tokens, slots):
        raise ValueError(f"`routing_weights` must be {(num_tokens, slots)}, got {tuple(routing_weights.shape)}.")
    if add is not None and add.shape != (num_tokens, hidden):
        raise ValueError(f"`add` must be {(num_tokens, hidden)}, got {tuple(add.shape)}.")
    launch, out = _combine_launch(rows, groups, routing_weights, num_tokens, out_dtype, add, scale)
    launch.run(rows)
    return out


def _combine_launch(
    rows: Tensor,
    groups: SlotGroups,
    routing_weights: Tensor | None,
    num_tokens: int,
    out_dtype: torch.dtype,
    add: Tensor | None,
    scale: float,
) -> tuple[Launch, Tensor]:
    hidden = rows.shape[1]
    out = rows.new_empty(num_tokens, hidden, dtype=out_dtype)
    block = min(next_power_of_2(hidden), 2048)
    arguments = {
        "rows_ptr": rows,
        "row_of_slot_ptr": groups.row_of_slot,
        "weights_ptr": rows if routing_weights is None else routing_weights,
        "add_ptr": rows if add is None else add,
        "out_ptr": out,
        "hidden": hidden,
        "stride_row": rows.stride(0),
        "stride_wt": 0 if routing_weights is None else routing_weights.stride(0),
        "stride_wk": 0 if routing_weights is None else routing_weights.stride(1),
        "stride_at": 0 if add is None else add.stride(0),
        "stride_ah": 0 if add is None else add.stride(1),
        "scale": float(scale),
        "SLOTS": groups.slots_per_token,
        "HAS_WEIGHTS": routing_weights is not None,
        "HAS_ADD": add is not None,
        "BLOCK": block,
        "UNROLL": min(groups.slots_per_token, 8),
    }
    grid = (num_tokens, triton.cdiv(hidden, block))
    return Launch(_combine, grid, arguments, num_warps=8 if block >= 2048 else 4), out


def _check(x: Tensor, weights: ExpertWeights, num_rows: int, width: int, groups: SlotGroups) -> None:
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"the input must be (rows, {width}), got {tuple(x.shape)}.")
    if num_rows != groups.slot_of_row.numel() or weights.num_experts != groups.num_experts:
        raise ValueError(
            f"the groups are of {groups.slot_of_row.numel()} slots and {groups.num_experts} experts, "
            f"the input has {num_rows} and {weights.num_experts}."
        )
    found = {tensor.dtype for tensor in (x, weights.up, weights.down)}
    if len(found) > 1 or x.dtype not in DTYPES:
        raise TypeError(f"input and weights must be of one dtype out of {DTYPES}, got {found}.")


def rule_config(kind: Kind, weights: ExpertWeights, num_slots: int) -> KernelConfig:
    """The tile of `default_config` for these experts and S slots, as far as the layout of their weights allows it."""
    w = matrices(kind, weights)
    rows, (num_experts, columns, length) = triton.cdiv(num_slots, weights.num_experts), w.shape
    return _fitting(default_config(kind, rows, columns, length, w.dtype, num_experts=num_experts), w)


def _default(kind: Kind, weights: ExpertWeights, groups: SlotGroups) -> KernelConfig:
    num_slots = groups.slot_of_row.numel()
    found = config_for(expert_key(kind, weights, num_slots), lambda: rule_config(kind, weights, num_slots))
    return _fitting(found, matrices(kind, weights))


def _fitting(config: KernelConfig, w: Tensor) -> KernelConfig:
    if config.BLOCK_N > 128 and dense_axis(w) is None:
        # Pointers to 256 columns, beside as many sums, are more than there are registers.
        return replace(config, BLOCK_N=128, num_stages=4, persistent=False)
    return config


def matrices(kind: Kind, weights: ExpertWeights) -> Tensor:
    """(E, columns of the product, its length), a view."""
    return _columns_first(weights.down if kind == "down" else weights.up, weights.is_transposed)


def _columns_first(w: Tensor, is_transposed: bool) -> Tensor:
    """As (E, columns of the output, contraction), without a copy."""
    return w.transpose(1, 2) if is_transposed else w


def dense_axis(tensor: Tensor) -> Literal["length", "columns"] | None:
    """Which of the last two axes, (..., columns, length), a descriptor can load along on this device, if any can.

    That axis must be contiguous, and every other step one of 16 bytes.
    """
    if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < (9, 0):
        return None
    if tensor.numel() == 0 or tensor.storage_offset() * tensor.element_size() % 16:
        return None
    *steps, columns, length = tensor.stride()
    for axis, dense, other in (("length", length, columns), ("columns", columns, length)):
        if dense == 1 and all(step * tensor.element_size() % 16 == 0 for step in (*steps, other)):
            return axis  # type: ignore[return-value]
    return None


def descriptor(w: Tensor, parts: int, config: KernelConfig) -> TensorDescriptor:
    """Of matrices (E, columns, length): a block has the same columns of each of the parts. See `multiply`."""
    experts, columns, length = w.shape
    size, width = columns // parts, config.BLOCK_N // parts
    if dense_axis(w) == "length":
        shape, stride = [experts, parts, size, length], [w.stride(0), size * w.stride(1), w.stride(1), 1]
        return TensorDescriptor(w, shape, stride, [1, parts, width, config.BLOCK_K])
    shape, stride = [experts, length, parts, size], [w.stride(0), w.stride(2), size, 1]
    return TensorDescriptor(w, shape, stride, [1, config.BLOCK_K, parts, width])


def _activation_constants(formula: Activation | None) -> dict[str, Any]:
    if formula is None:
        return {"KIND": None, "ALPHA": 1.0, "LIMIT": None, "SHIFT": 0.0}
    return {"KIND": formula.kind, "ALPHA": formula.alpha, "LIMIT": formula.limit, "SHIFT": formula.shift}


def _tile_constants(config: KernelConfig, columns: int, length: int) -> dict[str, Any]:
    return {
        "RUN": 8 if columns % 8 == 0 else 1,  # columns that lie side by side in transposed weights, a multiple of 8
        "BLOCK_M": config.BLOCK_M,
        "HALVES": config.halves,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "GROUP_M": config.GROUP_M,
        "EVEN_K": length % config.BLOCK_K == 0,
        "PERSISTENT": config.persistent,
        "PRECISION": config.precision,
    }


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    # Not on a GPU: a few programs, so that each of them has several tiles.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _grid(num_tiles: int, config: KernelConfig, like: Tensor) -> tuple[int]:
    return (min(num_tiles, _multiprocessors(like.device)) if config.persistent else num_tiles,)


def _launch(kernel: Any, grid: tuple[int], arguments: dict[str, Any], config: KernelConfig, like: Tensor) -> Launch:
    wgmma = config.BLOCK_M >= 64 and like.element_size() == 2
    return Launch(kernel, grid, arguments, config.num_warps, config.num_stages, wgmma)


def compile_cases() -> dict[str, Launch]:
    """Launches at the size of real models, on tensors without data: every kind of tile, layout and epilogue."""
    tokens, slots, hidden, intermediate, experts = 8192, 8, 2048, 768, 128
    large = KernelConfig(128, 256, 64, num_warps=8, num_stages=3, persistent=True, tma=True)
    gpt_oss = Activation("silu", alpha=1.702, limit=7.0, shift=1.0)
    half = replace(large, BLOCK_N=128, num_stages=4, persistent=False)
    cases: dict[str, Launch] = {}

    def add(
        name: str, config: KernelConfig, dtype: torch.dtype = torch.bfloat16, keep: bool = True, **form: Any
    ) -> None:
        form = {"activation": Activation(), "gate": True, "bias": False, "transposed": False, "joined": True, **form}

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        up = empty(experts, (2 if form["gate"] else 1) * intermediate, hidden)
        down = empty(experts, hidden, intermediate)
        if form["transposed"]:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        weights = ExpertWeights(
            up=up,
            down=down,
            up_bias=empty(*up.shape[:1], intermediate * (2 if form["gate"] else 1)) if form["bias"] else None,
            down_bias=empty(experts, hidden) if form["bias"] else None,
            has_gate=form["gate"],
            is_transposed=form["transposed"],
            is_concatenated=form["joined"],
            activation=form["activation"],
            apply=lambda x: x,
            post_norm=None,
        )
        number = torch.empty(tokens * slots, dtype=torch.int32, device="meta")
        groups = SlotGroups(number[: experts + 1], number, number, experts, slots)
        tiles = number.new_empty(tokens * slots // config.BLOCK_M + experts, 2)
        cases[f"up-{name}"] = _up_launch(empty(tokens, hidden), weights, groups, tiles, keep, config)[0]
        rows = empty(tokens * slots, intermediate)
        cases[f"down-{name}"], out = _down_launch(rows, weights, groups, tiles, config)
        if name in ("large", "gpt-oss", "fp32"):
            factors, shared = (
                torch.empty(tokens, slots, device="meta"),
                empty(tokens, hidden) if form["bias"] else None,
            )
            cases[f"combine-{name}"] = _combine_launch(out, groups, factors, tokens, dtype, shared, 1.0)[0]

    add("large", large)
    add("large-inference", large, keep=False)
    add("large-pointers", replace(large, tma=False, persistent=False))
    add("large-fp16", large, torch.float16)
    add("large-halves", replace(large, halves=True))
    add("large-halves-kept", replace(large, halves=True, num_stages=4, persistent=False))
    add("half", half)
    add("half-pointers", replace(half, tma=False))
    add("half-persistent", replace(half, persistent=True))
    for rows in (16, 32, 64, 128):
        add(f"{rows}-rows", default_config("up", rows, hidden, hidden, torch.bfloat16))
    add("fp32", default_config("up", 64, hidden, hidden, torch.float32), torch.float32)
    add("fp32-tf32", replace(default_config("up", 64, hidden, hidden, torch.float32), precision="tf32"), torch.float32)
    add("gpt-oss", half, activation=gpt_oss, bias=True, transposed=True, joined=False)
    add("interleaved", large, activation=gpt_oss, bias=True, joined=False)
    add("transposed", large, transposed=True)
    add("no-gate", large, activation=Activation("relu2"), gate=False)
    add("gelu", large, activation=Activation("gelu"))
    add("unknown-activation", large, activation=None)
    return cases
