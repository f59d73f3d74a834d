# mypy: disable-error-code="no-untyped-def"
# (the arguments of a kernel have no types of Python's)
"""The router in Triton: from logits to weights and ids in one launch, and back in one.

Axes: T tokens, C columns of the logits (the experts, and what a router may choose beside them), K slots of a token.
One program holds several rows. Few choices are taken by passes of "largest, then mask it", many by one sort. The keys
of both are integers with the order of the floats: a row that holds NaN still gives valid ids (NaN comes first, as in
`torch.topk`), and equal values go to the lower column. No row touches another one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _order(x):
    """float32 -> int32 with the same order. NaN is above everything, -0.0 equals 0.0, and the lowest int is unused."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def _score(x, SCORE: tl.constexpr):
    """Elementwise scores of float32 logits."""
    if SCORE == "sigmoid":
        value = 1.0 / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(SCORE == "sqrt_softplus")
        # log(1 + e) for e = exp(-|x|), without the loss of the digits of a small e: the error of `1 + e` cancels.
        e = tl.exp(-tl.abs(x))
        one_more = 1.0 + e
        log1p = tl.where(one_more == 1.0, e, tl.log(one_more) * (e / tl.where(one_more == 1.0, 1.0, one_more - 1.0)))
        # Below -80 softplus is exp(x), and x / 2 has a root where exp(x) has no digits left.
        value = tl.where(x < -80.0, tl.exp(0.5 * x), tl.sqrt(tl.where(x > 0.0, x, 0.0) + log1p))
        value = tl.where(x != x, x, value)
    return value


@triton.jit
def _slope(x, score, SCORE: tl.constexpr):
    """Derivative of `_score`."""
    if SCORE == "sigmoid":
        slope = score * (1.0 - score)
    else:
        # Divide last: for very low logits both factors vanish, and their ratio is exp(x / 2).
        slope = tl.where(x < -80.0, 0.5 * score, 0.5 / (1.0 + tl.exp(-x)) / score)
    return slope


@triton.jit
def _best_groups(choice, key, COUNT: tl.constexpr, KEEP: tl.constexpr, TOP2: tl.constexpr, LOWEST: tl.constexpr):
    """(rows, groups, size) choice and key -> (rows, groups): whether a group is one of the best."""
    best = tl.max(choice, axis=2)
    if TOP2:
        inside = tl.arange(0, choice.shape[2])[None, None, :]
        top = tl.max(key, axis=2)
        at = tl.min(tl.where(key == top[:, :, None], inside, choice.shape[2]), axis=2)
        best += tl.max(tl.where(inside == at[:, :, None], float("-inf"), choice), axis=2)
    group = tl.arange(0, choice.shape[1])[None, :]
    rank = tl.where(group < COUNT, _order(best), LOWEST)
    kept = tl.zeros(best.shape, tl.int1)
    for _ in range(KEEP):
        first = tl.min(tl.where(rank == tl.max(rank, axis=1)[:, None], group, choice.shape[1]), axis=1)
        chosen = group == first[:, None]
        kept = kept | chosen
        rank = tl.where(chosen, LOWEST, rank)
    return kept


@triton.jit
def route_kernel(
    logits,  # (T, C)
    bias,  # (C,), for the choice alone
    counts,  # (T,)
    weights,  # (T, K)
    index,  # (T, K)
    lse,  # (T,)
    num_rows,
    row_stride,
    column_stride,
    bias_stride,
    num_choices,
    null_start,
    null_end,
    scale,
    threshold,
    min_kept,
    K: tl.constexpr,
    SKIP: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_WIDTH: tl.constexpr,
    SIZE_WIDTH: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    SCORE: tl.constexpr,
    DIVIDE: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SORT: tl.constexpr,
    WITH_LSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    LOWEST: tl.constexpr = -(2**31)  # the key of what cannot be chosen, or has been
    WIDTH: tl.constexpr = GROUPS_WIDTH * SIZE_WIDTH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    # Each group lies in a power of two of places.
    place = tl.arange(0, WIDTH)
    column = (place // SIZE_WIDTH) * GROUP_SIZE + place % SIZE_WIDTH
    is_column = (place // SIZE_WIDTH < GROUPS) & (place % SIZE_WIDTH < GROUP_SIZE)
    row_logits = logits + row.to(tl.int64)[:, None] * row_stride
    x = tl.load(
        row_logits + column.to(tl.int64)[None, :] * column_stride,
        mask=in_rows[:, None] & is_column[None, :],
        other=0.0,
    ).to(tl.float32)
    x = tl.where(is_column[None, :], x, float("-inf"))

    # Scores of all columns
    largest = tl.max(x, axis=1)
    if SCORE == "softmax":
        score = tl.exp(x - largest[:, None])
        total = tl.sum(score, axis=1)
        score = score / total[:, None]
    else:
        score = tl.where(is_column[None, :], _score(x, SCORE), 0.0)
        total = tl.sum(score, axis=1)
    if WITH_LSE:
        sum_exp = total if SCORE == "softmax" else tl.sum(tl.exp(x - largest[:, None]), axis=1)
        tl.store(lse + row, largest + tl.log(sum_exp), mask=in_rows)

    # What columns are chosen by. All scores grow with the logit, so where nothing is added, the logit decides: it does
    # not saturate, and no rounding of `exp` can change the choice.
    if HAS_BIAS:
        added = tl.load(bias + column * bias_stride, mask=is_column, other=0.0).to(tl.float32)
        choice = score + added[None, :]
    else:
        choice = score if GROUPS > 1 else x
    key = tl.where(is_column[None, :], _order(choice), LOWEST)
    if GROUPS > 1:
        grouped = tl.reshape(tl.where(is_column[None, :], choice, float("-inf")), (ROWS, GROUPS_WIDTH, SIZE_WIDTH))
        group_key = tl.reshape(key, (ROWS, GROUPS_WIDTH, SIZE_WIDTH))
        kept = _best_groups(grouped, group_key, GROUPS, TOPK_GROUPS, TOP2, LOWEST)
        key = tl.reshape(tl.where(kept[:, :, None], group_key, LOWEST), (ROWS, WIDTH))

    # The best ones, in order
    slot = tl.arange(0, SLOTS)[None, :]
    if SORT:
        tl.static_assert(SLOTS == WIDTH)
        packed = (key.to(tl.int64) << 16) | (65535 - place)[None, :]
        packed = tl.sort(packed, dim=1, descending=True)
        at = 65535 - (packed & 65535).to(tl.int32)
        found = (packed >> 16) != LOWEST
    else:
        at = tl.zeros((ROWS, SLOTS), tl.int32)
        found = tl.zeros((ROWS, SLOTS), tl.int1)
        for taken in range(K + SKIP):
            top = tl.max(key, axis=1)
            first = tl.min(tl.where(key == top[:, None], place[None, :], WIDTH), axis=1)
            at = tl.where(slot == taken, first[:, None], at)
            found = tl.where(slot == taken, (top != LOWEST)[:, None], found)
            key = tl.where(place[None, :] == first[:, None], LOWEST, key)
    at = (at // SIZE_WIDTH) * GROUP_SIZE + at % SIZE_WIDTH
    written = in_rows[:, None] & (slot >= SKIP) & (slot < K + SKIP)
    found = found & written
    chosen = tl.load(row_logits + at.to(tl.int64) * column_stride, mask=found, other=0.0).to(tl.float32)
    if SCORE == "softmax":
        chosen_score = tl.exp(chosen - largest[:, None]) / total[:, None]
    else:
        chosen_score = _score(chosen, SCORE)
    chosen_share = chosen_score if SCORE == "softmax" else chosen_score / tl.maximum(total, 1e-20)[:, None]

    # Which slots are used
    keep = found
    if KEEP == "top_p":
        # Sums grow along the slots: the number of those within the threshold is the last slot that is kept.
        within = tl.cumsum(tl.where(found, chosen_share, 0.0), axis=1) <= threshold
        last = tl.sum(within.to(tl.int32), axis=1)
        keep = keep & ((slot <= last[:, None]) | (slot < min_kept))
    elif KEEP == "threshold":
        keep = keep & ((chosen_share > threshold) | (slot == 0))
    elif KEEP == "count":
        keep = keep & (slot - SKIP < tl.load(counts + row, mask=in_rows, other=0)[:, None])
    keep = keep & (at < num_choices)
    counted = keep & ((at < null_start) | (at >= null_end))

    if DIVIDE == "chosen":
        if SCORE == "softmax":  # of the chosen logits, which does not underflow
            chosen = tl.where(counted, chosen, float("-inf"))
            value = tl.exp(chosen - tl.max(chosen, axis=1)[:, None])
            value = value / tl.sum(tl.where(counted, value, 0.0), axis=1)[:, None]
        else:
            value = chosen_score / (tl.sum(tl.where(counted, chosen_score, 0.0), axis=1) + 1e-20)[:, None]
    else:
        value = chosen_share if DIVIDE == "all" else chosen_score
    value = tl.where(counted, value * scale, 0.0)
    out = row.to(tl.int64)[:, None] * K + slot - SKIP
    tl.store(weights + out, value, mask=written)
    tl.store(index + out, tl.where(keep, at, num_choices), mask=written)


@triton.jit
def route_backward_kernel(
    logits,  # (T, C)
    index,  # (T, K), ids of a row differ
    grad_weights,  # (T, K)
    grad_lse,  # (T,)
    grad_logits,  # (T, C)
    num_rows,
    num_columns,
    row_stride,
    column_stride,
    num_choices,
    null_start,
    null_end,
    scale,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SCORE: tl.constexpr,
    DIVIDE: tl.constexpr,
    WITH_LSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    slot = tl.arange(0, SLOTS)[None, :]
    column = tl.arange(0, WIDTH)
    inside = in_rows[:, None] & (column < num_columns)[None, :]
    row_logits = logits + row.to(tl.int64)[:, None] * row_stride
    in_slots = row.to(tl.int64)[:, None] * K + slot
    exists = in_rows[:, None] & (slot < K)
    at = tl.load(index + in_slots, mask=exists, other=num_choices)
    counted = exists & (at >= 0) & (at < num_choices) & ((at < null_start) | (at >= null_end))
    grad = tl.load(grad_weights + in_slots, mask=counted, other=0.0).to(tl.float32) * scale
    chosen = tl.load(row_logits + at.to(tl.int64) * column_stride, mask=counted, other=0.0).to(tl.float32)

    WHOLE: tl.constexpr = WITH_LSE or DIVIDE == "all" or (SCORE == "softmax" and DIVIDE == "none")
    rest = tl.zeros((ROWS, WIDTH), tl.float32)  # gradient of all columns, beside what a chosen one has for itself
    if WHOLE:
        x = tl.load(row_logits + column.to(tl.int64)[None, :] * column_stride, mask=inside, other=0.0).to(tl.float32)
        x = tl.where((column < num_columns)[None, :], x, float("-inf"))
        if SCORE == "softmax" or WITH_LSE:
            largest = tl.max(x, axis=1)
            probability = tl.exp(x - largest[:, None])
            sum_exp = tl.sum(probability, axis=1)
            probability = probability / sum_exp[:, None]
            chosen_probability = tl.exp(chosen - largest[:, None]) / sum_exp[:, None]

    if SCORE == "softmax":
        if DIVIDE == "chosen":
            masked = tl.where(counted, chosen, float("-inf"))
            value = tl.exp(masked - tl.max(masked, axis=1)[:, None])
            value = tl.where(counted, value, 0.0)
            value = value / tl.sum(value, axis=1)[:, None]
        else:
            value = chosen_probability
        mean = tl.sum(tl.where(counted, value * grad, 0.0), axis=1)
        own = value * (grad - mean[:, None])
        if DIVIDE != "chosen":
            rest -= probability * mean[:, None]
    else:
        value = _score(chosen, SCORE)
        slope = _slope(chosen, value, SCORE)
        if DIVIDE == "none":
            own = grad * slope
        elif DIVIDE == "chosen":
            total = tl.sum(tl.where(counted, value, 0.0), axis=1) + 1e-20
            mean = tl.sum(tl.where(counted, value * grad, 0.0), axis=1) / total
            own = (grad - mean[:, None]) / total[:, None] * slope
        else:
            score = tl.where((column < num_columns)[None, :], _score(x, SCORE), 0.0)
            total = tl.sum(score, axis=1)
            floor = tl.maximum(total, 1e-20)  # as in the forward; a sum below it has no gradient
            mean = tl.sum(tl.where(counted, value * grad, 0.0), axis=1) / floor
            mean = tl.where(total < 1e-20, 0.0, mean)
            own = (grad - mean[:, None]) / floor[:, None] * slope
            rest -= mean[:, None] / floor[:, None] * _slope(x, score, SCORE)
    if WITH_LSE:
        from_lse = tl.load(grad_lse + row, mask=in_rows, other=0.0).to(tl.float32)
        rest += from_lse[:, None] * probability
        own += from_lse[:, None] * chosen_probability

    out = grad_logits + row.to(tl.int64)[:, None] * num_columns
    tl.store(out + column[None, :], rest, mask=inside)
    tl.debug_barrier()  # the chosen columns are written again, by other threads of the program
    tl.store(out + at, own, mask=counted)
