# mypy: disable-error-code="no-untyped-def"
# (the arguments of a kernel have no types of Python's)
"""The experts layer for few tokens, in two launches: no sorting, no tiles, every weight is read once for a slot.

With few slots the time is that of reading the weights, so products are made without tensor cores: a program reads
some rows of one expert's matrix, multiplies by the token and adds up in float32. `decode_up` has one program for each
slot and block of the intermediate size; `decode_down` one for each token and block of the hidden size, which goes
through the slots of the token in order, so that nothing has to be combined afterwards.

Axes: T tokens, K slots of a token, S = T*K slots, E experts, H hidden size, I intermediate size. Ids outside 0..E-1
are unused slots: their weights are not read, and nothing of theirs is written. A token has the same bits in any batch,
as long as the config is the same.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_config import DecodeConfig, default_decode_config
from .expert_weights import Activation, ExpertWeights
from .tile_config import next_power_of_2
from .triton_routing import Launch
from .triton_tiles import activate, activate_gated
from .tuning import config_for, expert_key


FEW_SLOTS = 64  # up to here a program finds by itself which slots have the same expert


def most_slots(num_experts: int) -> int:
    """Up to how many slots to decode: each slot reads its expert anew, which is too much where experts are few.

    Mixtral's 8 experts on an H100: 1.08 times as fast as `grouped_mm` with two slots each, 0.74 times with four.
    """
    return min(FEW_SLOTS, 2 * num_experts)


# Kernels ------------------------------------------------------------------------------------------------------------


@triton.jit
def _slot_in_order(index, position, num_slots, num_experts, BLOCK: tl.constexpr):
    """The slot that stands at `position` when the slots are sorted by expert; those of one expert in their order."""
    slot = tl.arange(0, BLOCK)
    expert = tl.load(index + slot, mask=slot < num_slots, other=num_experts)
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)
    key = tl.where(slot < num_slots, expert, num_experts + 1) * BLOCK + slot
    rank = tl.sum((key[None, :] < key[:, None]).to(tl.int32), axis=1)
    return tl.sum(tl.where(rank == position, slot, 0), axis=0)


@triton.jit
def decode_up(
    hidden,  # (T, H)
    up,  # (E, 2I or I, H) by strides
    up_bias,  # (E, 2I or I)
    index,  # (T, K), contiguous
    activated,  # (S, I)
    num_slots,
    num_experts,
    slots_per_token,
    hidden_size,
    intermediate_size,
    hidden_row,  # strides
    hidden_column,
    up_expert,
    up_row,
    up_column,
    bias_expert,
    bias_row,
    HAS_GATE: tl.constexpr,
    CONCATENATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    SLOTS: tl.constexpr,  # 0 leaves the slots in their order
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,  # whether STEP divides H
    STAGES: tl.constexpr,
):
    slot = tl.program_id(0)
    if SLOTS > 0:
        # Programs that run at the same time read the same expert, so the second one finds it in the cache.
        slot = _slot_in_order(index, slot, num_slots, num_experts, SLOTS)
    expert = tl.load(index + slot).to(tl.int64)
    if (expert >= 0) & (expert < num_experts):
        first = tl.program_id(1) * ROWS
        # Gate and up rows are one tile, in the order they have in memory, so that what is contiguous stays so.
        PARTS: tl.constexpr = 2 if HAS_GATE else 1
        line = tl.arange(0, PARTS * ROWS)
        if not HAS_GATE:
            row = first + line
            in_rows = row < intermediate_size
        elif CONCATENATED:
            row = first + line % ROWS
            in_rows = row < intermediate_size
            row += (line // ROWS) * intermediate_size
        else:
            row = 2 * first + line
            in_rows = row < 2 * intermediate_size
        step = tl.arange(0, STEP)
        token = (slot // slots_per_token).to(tl.int64)
        x_at = hidden + token * hidden_row + step.to(tl.int64) * hidden_column
        w_at = up + expert * up_expert + row.to(tl.int64)[:, None] * up_row + step.to(tl.int64)[None, :] * up_column
        total = tl.zeros((PARTS * ROWS, STEP), tl.float32)
        for start in tl.range(0, hidden_size, STEP, num_stages=STAGES):
            here = tl.full((1,), start, tl.int64)
            if EVEN:
                x = tl.load(x_at + here * hidden_column).to(tl.float32)
                w = tl.load(
                    w_at + here[:, None] * up_column,
                    mask=in_rows[:, None],
                    other=0.0,
                    eviction_policy="evict_first",
                ).to(tl.float32)
            else:
                inside = step < hidden_size - start
                x = tl.load(x_at + here * hidden_column, mask=inside, other=0.0).to(tl.float32)
                w = tl.load(
                    w_at + here[:, None] * up_column,
                    mask=in_rows[:, None] & inside[None, :],
                    other=0.0,
                    eviction_policy="evict_first",
                ).to(tl.float32)
            total += w * x[None, :]
        pre = tl.sum(total, axis=1)
        if HAS_BIAS:
            bias_at = up_bias + expert * bias_expert + row.to(tl.int64) * bias_row
            pre += tl.load(bias_at, mask=in_rows, other=0.0).to(tl.float32)
        if HAS_GATE:
            if CONCATENATED:
                gate, value = tl.split(tl.permute(tl.reshape(pre, (2, ROWS)), (1, 0)))
            else:
                gate, value = tl.split(tl.reshape(pre, (ROWS, 2)))
            value = activate_gated(gate, value, KIND, ALPHA, LIMIT, SHIFT)
        else:
            value = activate(pre, KIND, ALPHA)
        column = first + tl.arange(0, ROWS)
        out = activated + slot.to(tl.int64) * intermediate_size + column
        tl.store(out, value, mask=column < intermediate_size)


@triton.jit
def decode_down(
    activated,  # (S, I)
    down,  # (E, H, I) by strides
    down_bias,  # (E, H)
    index,  # (T, K), contiguous
    factors,  # (T, K), contiguous
    out,  # (T, H), contiguous
    num_experts,
    slots_per_token,
    hidden_size,
    intermediate_size,
    down_expert,  # strides
    down_row,
    down_column,
    bias_expert,
    bias_row,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,  # whether STEP divides I
    STAGES: tl.constexpr,
):
    token = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_rows = row < hidden_size
    step = tl.arange(0, STEP)
    w_part = down + row.to(tl.int64)[:, None] * down_row + step.to(tl.int64)[None, :] * down_column
    total = tl.zeros((ROWS, STEP), tl.float32)
    bias = tl.zeros((ROWS,), tl.float32)
    for k in range(slots_per_token):
        slot = token * slots_per_token + k
        expert = tl.load(index + slot).to(tl.int64)
        if (expert >= 0) & (expert < num_experts):
            factor = tl.load(factors + slot).to(tl.float32)
            a_at = activated + slot.to(tl.int64) * intermediate_size + step
            w_at = w_part + expert * down_expert
            for start in tl.range(0, intermediate_size, STEP, num_stages=STAGES):
                here = tl.full((1,), start, tl.int64)
                if EVEN:
                    a = tl.load(a_at + start).to(tl.float32)
                    w = tl.load(
                        w_at + here[:, None] * down_column,
                        mask=in_rows[:, None],
                        other=0.0,
                        eviction_policy="evict_first",
                    ).to(tl.float32)
                else:
                    inside = step < intermediate_size - start
                    a = tl.load(a_at + start, mask=inside, other=0.0).to(tl.float32)
                    w = tl.load(
                        w_at + here[:, None] * down_column,
                        mask=in_rows[:, None] & inside[None, :],
                        other=0.0,
                        eviction_policy="evict_first",
                    ).to(tl.float32)
                total += w * (a * factor)[None, :]
            if HAS_BIAS:
                bias_at = down_bias + expert * bias_expert + row.to(tl.int64) * bias_row
                bias += factor * tl.load(bias_at, mask=in_rows, other=0.0).to(tl.float32)
    result = tl.sum(total, axis=1) + bias
    tl.store(out + token.to(tl.int64) * hidden_size + row, result, mask=in_rows)


# Launches -----------------------------------------------------------------------------------------------------------


def decode(
    hidden: Tensor,
    weights: ExpertWeights,
    index: Tensor,
    routing_weights: Tensor,
    *,
    config: DecodeConfig | None = None,
) -> Tensor:
    """`sum_k routing_weights[t, k] * expert(index[t, k], hidden[t])` for few tokens; no gradients.

    Right for any number of slots, made for up to 64.

    Args:
        hidden: (T, H), any strides.
        weights: of the experts, in any layout, with a known activation.
        index: (T, K) int32 or int64; ids outside 0..E-1 are unused slots.
        routing_weights: (T, K); not read in unused slots.
        config: sizes of the programs; measured ones or `default_decode_config(weights)` if not given.

    Returns:
        (T, H) in the dtype of `hidden`; 0 for a token without an expert.

    Raises:
        ValueError: for experts that need more than a formula: an unknown activation or a norm of their own; and for
            shapes that do not fit.
        RuntimeError: where a gradient would be needed.
    """
    if weights.activation is None or weights.post_norm is not None:
        raise ValueError("decoding needs experts whose activation is known and that have no norm of their own.")
    if hidden.ndim != 2 or hidden.shape[1] != weights.hidden_size:
        raise ValueError(f"`hidden` must be (T, {weights.hidden_size}), got {tuple(hidden.shape)}.")
    if index.shape != routing_weights.shape or index.ndim != 2 or len(index) != len(hidden):
        raise ValueError(
            f"`index` and `routing_weights` must be ({len(hidden)}, K), got {tuple(index.shape)} and "
            f"{tuple(routing_weights.shape)}."
        )
    tensors = (hidden, routing_weights, weights.up, weights.down, weights.up_bias, weights.down_bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError("decoding has no backward; call it under `torch.no_grad()`.")
    if config is None:
        config = config_for(expert_key("decode", weights, index.numel()), lambda: default_decode_config(weights))
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    for launch in _launches(hidden, weights, index.contiguous(), routing_weights.contiguous(), out, config):
        launch.run(hidden)
    return out


def _launches(
    hidden: Tensor, weights: ExpertWeights, index: Tensor, factors: Tensor, out: Tensor, config: DecodeConfig
) -> list[Launch]:
    (tokens, slots_per_token), num_slots = index.shape, index.numel()
    hidden_size, intermediate_size = weights.hidden_size, weights.intermediate_size
    activation = weights.activation or Activation()
    dtype = torch.float32 if config.activated_in_float32 else hidden.dtype
    activated = torch.empty(num_slots, intermediate_size, dtype=dtype, device=hidden.device)
    sizes = {
        "index": index,
        "activated": activated,
        "num_experts": weights.num_experts,
        "slots_per_token": slots_per_token,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "STAGES": config.num_stages,
    }
    up_strides = weights.up.stride()
    down_strides = weights.down.stride()
    if weights.is_transposed:
        up_strides, down_strides = (up_strides[0], *up_strides[:0:-1]), (down_strides[0], *down_strides[:0:-1])
    up = {
        **sizes,
        "hidden": hidden,
        "up": weights.up,
        "up_bias": weights.up_bias,
        "num_slots": num_slots,
        "hidden_row": hidden.stride(0),
        "hidden_column": hidden.stride(1),
        **dict(zip(("up_expert", "up_row", "up_column"), up_strides, strict=True)),
        **_bias_strides(weights.up_bias),
        "HAS_GATE": weights.has_gate,
        "CONCATENATED": weights.is_concatenated,
        "KIND": activation.kind,
        "ALPHA": activation.alpha,
        "LIMIT": activation.limit,
        "SHIFT": activation.shift,
        "SLOTS": next_power_of_2(num_slots) if tokens > 1 and num_slots <= FEW_SLOTS else 0,
        "ROWS": config.up_rows,
        "STEP": config.up_step,
        "EVEN": hidden_size % config.up_step == 0,
    }
    down = {
        **sizes,
        "down": weights.down,
        "down_bias": weights.down_bias,
        "factors": factors,
        "out": out,
        **dict(zip(("down_expert", "down_row", "down_column"), down_strides, strict=True)),
        **_bias_strides(weights.down_bias),
        "ROWS": config.down_rows,
        "STEP": config.down_step,
        "EVEN": intermediate_size % config.down_step == 0,
    }
    return [
        Launch(decode_up, (num_slots, triton.cdiv(intermediate_size, config.up_rows)), up, num_warps=config.num_warps),
        Launch(decode_down, (tokens, triton.cdiv(hidden_size, config.down_rows)), down, num_warps=config.num_warps),
    ]


def _bias_strides(bias: Tensor | None) -> dict[str, Any]:
    expert, row = (0, 0) if bias is None else bias.stride()
    return {"HAS_BIAS": bias is not None, "bias_expert": expert, "bias_row": row}


def compile_cases() -> dict[str, Launch]:
    """Launches at the size of real models, on tensors without data."""
    cases = {}
    for name, tokens, slots, experts, hidden_size, intermediate_size in (
        ("qwen3", 8, 8, 128, 2048, 768),
        ("mixtral", 1, 2, 8, 4096, 14336),
        ("gpt_oss", 4, 4, 32, 2880, 2880),
    ):
        swap = name == "gpt_oss"
        up = torch.empty(experts, 2 * intermediate_size, hidden_size, dtype=torch.bfloat16, device="meta")
        down = up.new_empty(experts, hidden_size, intermediate_size)
        weights = ExpertWeights(
            up.new_empty(experts, hidden_size, 2 * intermediate_size) if swap else up,
            down.new_empty(experts, intermediate_size, hidden_size) if swap else down,
            up.new_empty(experts, 2 * intermediate_size) if swap else None,
            up.new_empty(experts, hidden_size) if swap else None,
            has_gate=True,
            is_transposed=swap,
            is_concatenated=not swap,
            activation=Activation("silu", 1.702, 7.0, 1.0) if swap else Activation(),
            apply=torch.relu,  # not called
            post_norm=None,
        )
        hidden = up.new_empty(tokens, hidden_size)
        index = torch.empty(tokens, slots, dtype=torch.int32, device="meta")
        factors = torch.empty(tokens, slots, device="meta")
        launches = _launches(hidden, weights, index, factors, torch.empty_like(hidden), default_decode_config(weights))
        cases.update({f"{launch.kernel.__name__}-{name}": launch for launch in launches})
    return cases
