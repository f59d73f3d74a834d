"""The backward of the experts layer in Triton: routing weights, down projection and activation in one kernel.

Nothing but the input and `pre`, the output of the up projection, has to be kept for it: the activation is computed
again after the product with the down projection, and the gradient of a routing weight is `<d, activated>` with
`d = grad_out @ down`, which needs no output of an expert (as in SonicMoE, https://arxiv.org/abs/2512.14080).

The whole backward of a layer is `down_backward`, `weight_gradient` for `down` and `up`, `bias_gradient`, and
`input_gradient`, whose rows `combine` sums over the slots of a token.

Axes: T tokens, K slots of a token, S = T*K slots, E experts, H hidden size, I intermediate size. Buffers over rows
have S rows in the order of `SlotGroups`; what lies past `offsets[E]` is not written, and of no effect. Sums are in
float32 and in a fixed order, so that two runs give the same bits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backward_config import down_backward_config
from .expert_weights import Activation, ActivationKind, ExpertWeights
from .tile_config import KernelConfig
from .triton_forward import dense_axis, descriptor
from .triton_gradients import (
    bias_gradient,
    check_rows,
    check_weights,
    dense_columns,
    example_experts,
    example_groups,
    half_columns,
    input_gradient,
    product_launch,
    weight_gradient,
)
from .triton_routing import Launch, SlotGroups, tile_list
from .triton_tiles import multiply, place_tile
from .tuning import config_for, expert_key


__all__ = ["bias_gradient", "down_backward", "down_backward_plain", "input_gradient", "weight_gradient"]

_SLOTS_A_PROGRAM = 256  # of the sum over column blocks


# Kernels ------------------------------------------------------------------------------------------------------------


@triton.jit
def _value_and_slope(x: tl.tensor, KIND: tl.constexpr, ALPHA: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The function of the gate and its derivative, in float32; at a kink the one that PyTorch takes. NaN stays NaN."""
    if KIND == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-ALPHA * x))
        value = x * sigmoid
        slope = sigmoid + ALPHA * value * (1.0 - sigmoid)
    elif KIND == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * below
        slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) is sigmoid(2 * y).
        sigmoid = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
        value = x * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == "relu":
        value = tl.where(x <= 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    elif KIND == "relu2":
        positive = tl.where(x <= 0.0, 0.0, x)
        value = positive * positive
        slope = 2.0 * positive
    else:
        tl.static_assert(KIND == "identity")
        value = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def _finish_columns(
    d: tl.tensor,  # (BLOCK_M, WIDTH) float32: gradient of the activated values before the routing weight
    first: tl.tensor,  # number of its first column
    factor: tl.tensor,  # (BLOCK_M,) float32: routing weights
    rows: tl.tensor,  # (BLOCK_M,) int64
    row_mask: tl.tensor,
    pre_ptr: tl.tensor,
    grad_pre_ptr: tl.tensor,
    weighted_ptr: tl.tensor,
    intermediate: tl.tensor,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
) -> tl.tensor:
    """Write `grad_pre` and `weighted` at these columns; return the sum of d * activated over them, (BLOCK_M,)."""
    columns = first + tl.arange(0, WIDTH)
    mask = row_mask[:, None] & (columns < intermediate)[None, :]
    at = rows[:, None] * intermediate + columns[None, :]
    if HAS_GATE:
        if INTERLEAVED:
            # Whole pairs are loaded and split in registers: loads with a step of two would not coalesce.
            pair_columns = 2 * first + tl.arange(0, 2 * WIDTH)
            pair_mask = row_mask[:, None] & (pair_columns < 2 * intermediate)[None, :]
            pair_at = rows[:, None] * (2 * intermediate) + pair_columns[None, :]
            pairs = tl.load(pre_ptr + pair_at, mask=pair_mask, other=0.0).to(tl.float32)
            gate, up = tl.split(tl.reshape(pairs, (d.shape[0], WIDTH, 2)))
        else:
            gate_at = rows[:, None] * (2 * intermediate) + columns[None, :]
            gate = tl.load(pre_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(pre_ptr + gate_at + intermediate, mask=mask, other=0.0).to(tl.float32)
        bounded_gate = gate
        bounded_up = up
        if LIMIT is not None:  # by comparisons: a minimum would turn NaN into the limit
            bounded_gate = tl.where(gate > LIMIT, LIMIT, gate)
            bounded_up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        value, slope = _value_and_slope(bounded_gate, KIND, ALPHA)
        bounded_up += SHIFT
        activated = value * bounded_up
        weighted_d = factor[:, None] * d
        grad_gate = weighted_d * slope * bounded_up
        grad_up = weighted_d * value
        if LIMIT is not None:
            grad_gate = tl.where(gate > LIMIT, 0.0, grad_gate)
            grad_up = tl.where((up > LIMIT) | (up < -LIMIT), 0.0, grad_up)
        kept = grad_pre_ptr.dtype.element_ty
        if INTERLEAVED:
            pairs = tl.reshape(tl.join(grad_gate, grad_up), (d.shape[0], 2 * WIDTH))
            tl.store(grad_pre_ptr + pair_at, pairs.to(kept), mask=pair_mask)
        else:
            tl.store(grad_pre_ptr + gate_at, grad_gate.to(kept), mask=mask)
            tl.store(grad_pre_ptr + gate_at + intermediate, grad_up.to(kept), mask=mask)
    else:
        x = tl.load(pre_ptr + at, mask=mask, other=0.0).to(tl.float32)
        activated, slope = _value_and_slope(x, KIND, ALPHA)
        tl.store(grad_pre_ptr + at, (factor[:, None] * d * slope).to(grad_pre_ptr.dtype.element_ty), mask=mask)
    tl.store(weighted_ptr + at, (factor[:, None] * activated).to(weighted_ptr.dtype.element_ty), mask=mask)
    return tl.sum(tl.where(mask, d * activated, 0.0), axis=1)


@triton.jit
def _down_backward_kernel(
    grad_out_ptr: tl.tensor,  # (T, H)
    grad_out_row: tl.tensor,
    down: tl.tensor,  # (E, H, I) by strides, or a descriptor
    down_expert: tl.tensor,
    down_hidden: tl.tensor,
    down_intermediate: tl.tensor,
    down_bias_ptr: tl.tensor,  # (E, H)
    down_bias_expert: tl.tensor,
    pre_ptr: tl.tensor,
    routing_weights_ptr: tl.tensor,  # (S,)
    slot_of_row_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    grad_pre_ptr: tl.tensor,
    weighted_ptr: tl.tensor,  # (S, I)
    partials_ptr: tl.tensor,  # (column blocks, S) float32
    num_tiles: tl.tensor,
    num_slots: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    SLOTS_PER_TOKEN: tl.constexpr,
    HAS_GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    W_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of rows of one expert, BLOCK_N of the I columns."""
    tile, block = place_tile(tl.program_id(0), num_tiles, tl.cdiv(intermediate, BLOCK_N), GROUP_M)
    expert = tl.load(tiles_ptr + 2 * tile)
    if expert < 0:
        return
    rows = tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, BLOCK_M)
    row_mask = rows < tl.load(offsets_ptr + expert + 1)
    slots = tl.load(slot_of_row_ptr + rows, mask=row_mask, other=0)
    factor = tl.load(routing_weights_ptr + slots, mask=row_mask, other=0.0).to(tl.float32)
    grad_rows = grad_out_ptr + (slots // SLOTS_PER_TOKEN).to(tl.int64) * grad_out_row

    partial = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if HAS_BIAS:
        if block == 0:  # the bias is part of what the routing weight multiplies
            bias = down_bias_ptr + expert.to(tl.int64) * down_bias_expert
            steps = tl.arange(0, BLOCK_K)
            for start in range(0, hidden, BLOCK_K):
                inside = steps < hidden - start
                mask = row_mask[:, None] & inside[None, :]
                grad = tl.load(grad_rows[:, None] + start + steps[None, :], mask=mask, other=0.0).to(tl.float32)
                part = tl.load(bias + start + steps, mask=inside, other=0.0).to(tl.float32)
                partial += tl.sum(grad * part[None, :], axis=1)

    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.where(column < intermediate, column, 0)
    if RUN > 1:
        n = tl.max_contiguous(tl.multiple_of(n, RUN), RUN)
    # Rows of the next expert are computed as rows of token 0, columns past the end as column 0. They are not stored.
    d = multiply(
        grad_out_ptr,
        grad_rows,
        1,
        0,
        down,
        0 if W_TMA is not None else down + expert.to(tl.int64) * down_expert + n.to(tl.int64) * down_intermediate,
        down_hidden,
        expert,
        block * BLOCK_N,
        hidden,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        False,
        W_TMA,
        PRECISION,
    )
    # Part by part where they are wide: all columns at once need more registers than a thread has, and pairs need more.
    WIDTH: tl.constexpr = min(BLOCK_N if BLOCK_N < 64 else BLOCK_N // 2, 32 if INTERLEAVED else 64)
    PARTS: tl.constexpr = BLOCK_N // WIDTH
    for number in tl.static_range(PARTS):
        if PARTS == 1:
            part = d
        elif PARTS == 2:
            part = half_columns(d, number)
        elif PARTS == 4:
            part = half_columns(half_columns(d, number // 2), number % 2)
        else:
            tl.static_assert(PARTS == 8)
            part = half_columns(half_columns(half_columns(d, number // 4), number // 2 % 2), number % 2)
        partial += _finish_columns(
            part,
            block * BLOCK_N + number * WIDTH,
            factor,
            rows.to(tl.int64),
            row_mask,
            pre_ptr,
            grad_pre_ptr,
            weighted_ptr,
            intermediate,
            WIDTH,
            HAS_GATE,
            INTERLEAVED,
            KIND,
            ALPHA,
            LIMIT,
            SHIFT,
        )
    tl.store(partials_ptr + block.to(tl.int64) * num_slots + rows, partial, mask=row_mask)


@triton.jit
def _sum_partials_kernel(
    partials_ptr: tl.tensor,  # (num_blocks, S) over rows
    row_of_slot_ptr: tl.tensor,
    out_ptr: tl.tensor,  # (S,) over slots
    num_slots: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Gradients of routing weights: partial sums in the order of the column blocks, 0 for unused slots."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < num_slots
    rows = tl.load(row_of_slot_ptr + slots, mask=inside, other=-1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(0, num_blocks):
        start = tl.cast(block, tl.int64) * num_slots
        total += tl.load(partials_ptr + start + rows, mask=rows >= 0, other=0.0)
    tl.store(out_ptr + slots, total, mask=inside)


# Launches -----------------------------------------------------------------------------------------------------------


def down_backward(
    grad_out: Tensor,
    weights: ExpertWeights,
    pre: Tensor,
    routing_weights: Tensor,
    groups: SlotGroups,
    *,
    config: KernelConfig | None = None,
    tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Back through routing weights, down projection and activation.

    Args:
        grad_out: (T, H), gradient of the layer's output; rounded to the dtype of the weights where it has another one.
        weights: experts whose `activation` is known and that have no `post_norm`.
        pre: (S, 2I), or (S, I) without a gate: the up projection with its bias, in the module's own column order.
        routing_weights: (T, K); those of unused slots are never read.
        groups: the routing.
        config: BLOCK_M rows, BLOCK_N of the I columns, BLOCK_K along H; measured or by rule where it is not given.
            Rows are loaded by pointers, since they are gathered.
        tiles: `tile_list(groups, config.BLOCK_M)`, if it is there already.

    Returns:
        grad_pre, like `pre`; weighted_activated (S, I), the activated values times the routing weight, which the
        gradient of `down` is made from; grad_weights (T, K) float32, 0 for unused slots.

    Raises:
        ValueError: the experts are none of these, or shapes do not fit.
    """
    if weights.activation is None:
        raise ValueError("the activation is not known as a formula; `down_backward_plain` works with any.")
    return _run(grad_out, weights, pre, routing_weights, groups, weights.activation, weights.has_gate, config, tiles)


def down_backward_plain(
    grad_out: Tensor,
    weights: ExpertWeights,
    activated: Tensor,
    routing_weights: Tensor,
    groups: SlotGroups,
    *,
    config: KernelConfig | None = None,
    tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Back through routing weights and down projection, for an activation that the caller differentiates.

    Args:
        grad_out: (T, H), gradient of the layer's output; rounded to the dtype of the weights where it has another one.
        weights: experts without `post_norm`.
        activated: (S, I), what the down projection got.
        routing_weights: (T, K); those of unused slots are never read.
        groups: the routing.
        config, tiles: as for `down_backward`.

    Returns:
        grad_activated (S, I); weighted_activated (S, I); grad_weights (T, K) float32, 0 for unused slots.

    Raises:
        ValueError: the experts have a `post_norm`, or shapes do not fit.
    """
    # The identity without a gate: what comes in is what is activated.
    return _run(grad_out, weights, activated, routing_weights, groups, Activation("identity"), False, config, tiles)


def _run(
    grad_out: Tensor,
    weights: ExpertWeights,
    pre: Tensor,
    routing_weights: Tensor,
    groups: SlotGroups,
    activation: Activation,
    has_gate: bool,
    config: KernelConfig | None,
    tiles: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if config is None:
        num_slots = groups.slot_of_row.numel()
        rows, n, k = triton.cdiv(num_slots, groups.num_experts), weights.intermediate_size, weights.hidden_size
        narrow = (has_gate and not weights.is_concatenated) or activation.kind == "gelu"
        config = config_for(
            expert_key("down_backward", weights, num_slots),
            lambda: down_backward_config(
                rows, n, k, weights.down.dtype, num_experts=groups.num_experts, narrow=narrow
            ),
        )
        if config.BLOCK_N > 128 and (narrow or dense_axis(weights.down.transpose(1, 2)) is None):
            config = replace(config, BLOCK_N=128)  # no registers for more
    tiles = tile_list(groups, config.BLOCK_M) if tiles is None else tiles
    launches, results = _launches(grad_out, weights, pre, routing_weights, groups, tiles, activation, has_gate, config)
    for launch in launches:
        launch.run(grad_out)
    return results


def _launches(
    grad_out: Tensor,
    weights: ExpertWeights,
    pre: Tensor,
    routing_weights: Tensor,
    groups: SlotGroups,
    tiles: Tensor,
    activation: Activation,
    has_gate: bool,
    config: KernelConfig,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    if weights.post_norm is not None:
        raise ValueError("no kernel goes back through a norm after the down projection.")
    if weights.num_experts != groups.num_experts:
        raise ValueError(f"the groups are of {groups.num_experts} experts, the weights of {weights.num_experts}.")
    down, hidden, intermediate = weights.down, weights.hidden_size, weights.intermediate_size
    check_rows("grad_out", grad_out, groups, columns=hidden, tokens=True)
    check_rows("pre", pre, groups, columns=2 * intermediate if has_gate else intermediate, tokens=False)
    check_weights("routing_weights", routing_weights, groups)
    grad_out, pre = dense_columns(grad_out.to(down.dtype)), pre.contiguous()
    bias = None if weights.down_bias is None else dense_columns(weights.down_bias)
    w = down if weights.is_transposed else down.transpose(1, 2)  # (E, I, H): columns of the product, its length
    w_tma = dense_axis(w) if config.tma else None
    num_slots, blocks = pre.shape[0], triton.cdiv(intermediate, config.BLOCK_N)
    grad_pre, weighted = torch.empty_like(pre), pre.new_empty(num_slots, intermediate)
    partials = pre.new_empty(blocks, num_slots, dtype=torch.float32)
    grad_weights = pre.new_empty(routing_weights.shape, dtype=torch.float32)
    product = {
        "grad_out_ptr": grad_out,
        "grad_out_row": grad_out.stride(0),
        "down": descriptor(w, 1, config) if w_tma else w,
        "down_expert": w.stride(0),
        "down_hidden": w.stride(2),
        "down_intermediate": w.stride(1),
        "down_bias_ptr": groups.offsets if bias is None else bias,
        "down_bias_expert": 0 if bias is None else bias.stride(0),
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
        "hidden": hidden,
        "intermediate": intermediate,
        "SLOTS_PER_TOKEN": groups.slots_per_token,
        "HAS_GATE": has_gate,
        "INTERLEAVED": has_gate and not weights.is_concatenated,
        "HAS_BIAS": bias is not None,
        "KIND": activation.kind,
        "ALPHA": activation.alpha,
        "LIMIT": activation.limit,
        "SHIFT": activation.shift,
        "RUN": 8 if intermediate % 8 == 0 else 1,  # columns that lie side by side, from a multiple of 8 on
        "EVEN_K": hidden % config.BLOCK_K == 0,
        "W_TMA": w_tma,
    }
    total = {
        "partials_ptr": partials,
        "row_of_slot_ptr": groups.row_of_slot,
        "out_ptr": grad_weights,
        "num_slots": num_slots,
        "num_blocks": blocks,
        "BLOCK": _SLOTS_A_PROGRAM,
    }
    launches = [
        product_launch(_down_backward_kernel, (tiles.shape[0] * blocks,), product, config, down.dtype),
        Launch(_sum_partials_kernel, (triton.cdiv(num_slots, _SLOTS_A_PROGRAM),), total),
    ]
    return launches, (grad_pre, weighted, grad_weights)


def compile_cases() -> dict[str, Launch]:
    """Launches at the size of real models, on tensors without data."""
    kinds: tuple[ActivationKind, ...] = ("silu", "gelu", "gelu_tanh", "relu")
    sizes = {"qwen3": (8192, 8, 128, 2048, 768), "few_rows": (256, 8, 128, 2048, 768)}
    cases = {}
    for name, activation, size, gpt_oss, gate in (
        *((f"qwen3-{kind}", Activation(kind), sizes["qwen3"], False, True) for kind in kinds),
        ("few_rows", Activation(), sizes["few_rows"], False, True),
        ("plain", Activation("relu2"), sizes["qwen3"], False, False),
        ("gpt_oss", Activation("silu", 1.702, 7.0, 1.0), (8192, 4, 32, 2880, 2880), True, True),
    ):
        tokens, slots, experts, hidden, intermediate = size
        weights = example_experts(experts, hidden, intermediate, activation, gpt_oss=gpt_oss, gate=gate)
        dtype = weights.down.dtype
        rows, narrow = triton.cdiv(tokens * slots, experts), gpt_oss or activation.kind == "gelu"
        config = down_backward_config(rows, intermediate, hidden, dtype, num_experts=experts, narrow=narrow)
        groups, tiles = example_groups(tokens, slots, experts, config.BLOCK_M)
        grad_out = torch.empty(tokens, hidden, dtype=dtype, device="meta")
        pre = grad_out.new_empty(tokens * slots, 2 * intermediate if gate else intermediate)
        factors = grad_out.new_empty(tokens, slots, dtype=torch.float32)
        launches, _ = _launches(grad_out, weights, pre, factors, groups, tiles, activation, gate, config)
        cases.update({f"{launch.kernel.__name__}-{name}": launch for launch in launches})
    return cases
