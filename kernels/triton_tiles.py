"""Tiles of the matrix products of the forward: rows of one expert times its weights, with bias and activation.

Every layout of the weights comes by its strides. A row of a result depends on its own row of the input alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x: tl.tensor, KIND: tl.constexpr, ALPHA: tl.constexpr) -> tl.tensor:
    """`Activation.act` in float32. NaN stays NaN."""
    if KIND == "silu":
        out = x * tl.sigmoid(ALPHA * x)
    elif KIND == "gelu":
        out = 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2z); 2 * sqrt(2 / pi)
        out = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "relu":
        out = tl.where(x < 0, 0.0, x)
    elif KIND == "relu2":
        out = tl.where(x < 0, 0.0, x) * x
    else:
        tl.static_assert(KIND == "identity", "an activation that the kernel does not know")
        out = x
    return out


@triton.jit
def activate_gated(
    gate: tl.tensor,
    up: tl.tensor,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
) -> tl.tensor:
    """`Activation.glu` in float32; `LIMIT` is None for no bound. NaN stays NaN, unlike with minimum and maximum."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return activate(gate, KIND, ALPHA) * (up + SHIFT)


@triton.jit
def place_tile(
    program: tl.tensor, num_rows: tl.tensor, num_columns: tl.tensor, GROUP_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Number of a tile -> its row and column in the grid: down GROUP_M tiles of rows, then the next column."""
    per_group = GROUP_M * num_columns
    first = program // per_group * GROUP_M
    rows = tl.minimum(num_rows - first, GROUP_M)
    return first + program % per_group % rows, program % per_group // rows


@triton.jit
def multiply(
    x: tl.tensor,
    x_rows: tl.tensor,
    stride_x: tl.tensor,
    first_row: tl.tensor,
    w: tl.tensor,
    w_columns: tl.tensor,
    stride_w: tl.tensor,
    expert: tl.tensor,
    first_column: tl.tensor,
    length: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """A tile (BLOCK_M, BLOCK_N) of rows times columns, in float32.

    `x_rows` and `w_columns` point to the begin of each row and column, `stride_x` and `stride_w` are the steps along
    the contraction of `length`. Where `x` is a descriptor of (rows, length), the tile begins at `first_row`; where `w`
    is one, the tile begins at `first_column` of each part of `expert`: `W_TMA` is "length" for one of (E, parts,
    columns, length), and "columns" for one of (E, length, parts, columns); the last axis lies dense in memory.
    """
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64)
    if not X_TMA:
        x_at = x_rows[:, None] + k[None, :] * stride_x
    if W_TMA is None:
        w_at = w_columns[None, :] + k[:, None] * stride_w
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for done in range(0, length, BLOCK_K):
        if X_TMA:
            left = x.load([first_row, done])
        else:
            left = tl.load(x_at) if EVEN_K else tl.load(x_at, mask=k[None, :] < length - done, other=0.0)
            x_at += step * stride_x
        if W_TMA == "length":
            right = w.load([expert, 0, first_column, done]).reshape(BLOCK_N, BLOCK_K).T
        elif W_TMA == "columns":
            right = w.load([expert, done, 0, first_column]).reshape(BLOCK_K, BLOCK_N)
        else:
            right = tl.load(w_at) if EVEN_K else tl.load(w_at, mask=k[:, None] < length - done, other=0.0)
            w_at += step * stride_w
        out = tl.dot(left, right, out, input_precision=PRECISION)
    return out


@triton.jit
def _up_tile(
    x: tl.tensor,
    w: tl.tensor,
    bias_ptr: tl.tensor,
    activated_ptr: tl.tensor,
    pre_ptr: tl.tensor,
    slot_of_row_ptr: tl.tensor,
    expert: tl.tensor,
    first_row: tl.tensor,
    last_row: tl.tensor,
    block: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    slots_per_token: tl.tensor,
    stride_xt: tl.tensor,
    stride_xh: tl.tensor,
    stride_we: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_be: tl.tensor,
    stride_bn: tl.tensor,
    PARTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    W_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of `up_kernel`."""
    WIDTH: tl.constexpr = BLOCK_N // PARTS  # columns of the activation
    row = first_row + tl.arange(0, ROWS)
    exists = row < last_row
    # Rows of the next expert are computed as rows of token 0, and not stored.
    token = tl.load(slot_of_row_ptr + row, mask=exists, other=0) // slots_per_token

    # Columns in the order of the weights: gate and up columns side by side, or a block of each.
    first = block * WIDTH
    i = tl.arange(0, BLOCK_N)
    if PARTS == 2 and not INTERLEAVED:
        column = first + i % WIDTH
        n = i // WIDTH * intermediate + column
    else:
        n = first * PARTS + i
        column = n // PARTS
    n = tl.where(column < intermediate, n, 0)
    if RUN > 1:
        n = tl.max_contiguous(tl.multiple_of(n, RUN), RUN)
    n = n.to(tl.int64)

    out = multiply(
        x,
        x + token.to(tl.int64) * stride_xt,
        stride_xh,
        first_row,
        w,
        0 if W_TMA is not None else w + expert.to(tl.int64) * stride_we + n * stride_wn,
        stride_wk,
        expert,
        first * PARTS if INTERLEAVED else first,
        hidden,
        ROWS,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        False,
        W_TMA,
        PRECISION,
    )
    if HAS_BIAS:
        out += tl.load(bias_ptr + expert.to(tl.int64) * stride_be + n * stride_bn).to(tl.float32)[None, :]

    column = first + tl.arange(0, WIDTH)
    mask = exists[:, None] & (column[None, :] < intermediate)
    at = row.to(tl.int64)[:, None] * intermediate + column[None, :]
    if PARTS == 2:
        if INTERLEAVED:
            gate, up = tl.split(out.reshape(ROWS, WIDTH, 2))
        else:
            gate, up = tl.split(out.reshape(ROWS, 2, WIDTH).permute(0, 2, 1))
    if KEEP:
        kind = pre_ptr.dtype.element_ty
        at_pre = pre_ptr + row.to(tl.int64)[:, None] * (PARTS * intermediate)
        if PARTS == 2 and not INTERLEAVED:
            at_pre += column[None, :]
            tl.store(at_pre, gate.to(kind), mask=mask)
            tl.store(at_pre + intermediate, up.to(kind), mask=mask)
        else:
            all_columns = first * PARTS + i
            inside = exists[:, None] & (all_columns[None, :] < PARTS * intermediate)
            tl.store(at_pre + all_columns[None, :], out.to(kind), mask=inside)
    if KIND is not None:
        if PARTS == 2:
            value = activate_gated(gate, up, KIND, ALPHA, LIMIT, SHIFT)
        else:
            value = activate(out, KIND, ALPHA)
        tl.store(activated_ptr + at, value.to(activated_ptr.dtype.element_ty), mask=mask)


@triton.jit
def up_kernel(
    x: tl.tensor,
    w: tl.tensor,
    bias_ptr: tl.tensor,
    activated_ptr: tl.tensor,
    pre_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    slot_of_row_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    num_tiles: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    slots_per_token: tl.tensor,
    stride_xt: tl.tensor,
    stride_xh: tl.tensor,
    stride_we: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_be: tl.tensor,
    stride_bn: tl.tensor,
    PARTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PERSISTENT: tl.constexpr,
    W_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Rows of `pre = x[token] @ up^T + bias`, and of its activation where the formula is known."""
    num_columns = tl.cdiv(intermediate, BLOCK_N // PARTS)
    program = tl.program_id(0)
    end = num_tiles * num_columns if PERSISTENT else program + 1
    for tile in tl.range(program, end, tl.num_programs(0)):
        place, block = place_tile(tile, num_tiles, num_columns, GROUP_M)
        expert = tl.load(tiles_ptr + place.to(tl.int64) * 2)
        if expert >= 0:
            first_row = tl.load(tiles_ptr + place.to(tl.int64) * 2 + 1)
            last_row = tl.load(offsets_ptr + expert + 1)
            if HALVES and last_row - first_row <= BLOCK_M // 2:
                _up_tile(
                    x,
                    w,
                    bias_ptr,
                    activated_ptr,
                    pre_ptr,
                    slot_of_row_ptr,
                    expert,
                    first_row,
                    last_row,
                    block,
                    hidden,
                    intermediate,
                    slots_per_token,
                    stride_xt,
                    stride_xh,
                    stride_we,
                    stride_wn,
                    stride_wk,
                    stride_be,
                    stride_bn,
                    PARTS,
                    INTERLEAVED,
                    HAS_BIAS,
                    KEEP,
                    KIND,
                    ALPHA,
                    LIMIT,
                    SHIFT,
                    RUN,
                    BLOCK_M // 2,
                    BLOCK_N,
                    BLOCK_K,
                    EVEN_K,
                    W_TMA,
                    PRECISION,
                )
            else:
                _up_tile(
                    x,
                    w,
                    bias_ptr,
                    activated_ptr,
                    pre_ptr,
                    slot_of_row_ptr,
                    expert,
                    first_row,
                    last_row,
                    block,
                    hidden,
                    intermediate,
                    slots_per_token,
                    stride_xt,
                    stride_xh,
                    stride_we,
                    stride_wn,
                    stride_wk,
                    stride_be,
                    stride_bn,
                    PARTS,
                    INTERLEAVED,
                    HAS_BIAS,
                    KEEP,
                    KIND,
                    ALPHA,
                    LIMIT,
                    SHIFT,
                    RUN,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    EVEN_K,
                    W_TMA,
                    PRECISION,
                )


@triton.jit
def _down_tile(
    x: tl.tensor,
    w: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    expert: tl.tensor,
    first_row: tl.tensor,
    last_row: tl.tensor,
    block: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    stride_xr: tl.tensor,
    stride_xi: tl.tensor,
    stride_we: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_be: tl.tensor,
    stride_bn: tl.tensor,
    HAS_BIAS: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of `down_kernel`."""
    row = first_row + tl.arange(0, ROWS)
    exists = row < last_row
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.where(column < hidden, column, 0)
    if RUN > 1:
        n = tl.max_contiguous(tl.multiple_of(n, RUN), RUN)
    n = n.to(tl.int64)
    # With a descriptor the rows of the next expert are read, else the first row again. They are not stored.
    out = multiply(
        x,
        0 if X_TMA else x + tl.where(exists, row, first_row).to(tl.int64) * stride_xr,
        stride_xi,
        first_row,
        w,
        0 if W_TMA is not None else w + expert.to(tl.int64) * stride_we + n * stride_wn,
        stride_wk,
        expert,
        block * BLOCK_N,
        intermediate,
        ROWS,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        X_TMA,
        W_TMA,
        PRECISION,
    )
    if HAS_BIAS:
        out += tl.load(bias_ptr + expert.to(tl.int64) * stride_be + n * stride_bn).to(tl.float32)[None, :]
    at = out_ptr + row.to(tl.int64)[:, None] * hidden + column[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (column[None, :] < hidden))


@triton.jit
def down_kernel(
    x: tl.tensor,
    x_half: tl.tensor,
    w: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    num_tiles: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    stride_xr: tl.tensor,
    stride_xi: tl.tensor,
    stride_we: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_be: tl.tensor,
    stride_bn: tl.tensor,
    HAS_BIAS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PERSISTENT: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Rows of `x @ down^T + bias`. `x_half` is `x`, as a descriptor of half the rows where `x` is one."""
    num_columns = tl.cdiv(hidden, BLOCK_N)
    program = tl.program_id(0)
    end = num_tiles * num_columns if PERSISTENT else program + 1
    for tile in tl.range(program, end, tl.num_programs(0)):
        place, block = place_tile(tile, num_tiles, num_columns, GROUP_M)
        expert = tl.load(tiles_ptr + place.to(tl.int64) * 2)
        if expert >= 0:
            first_row = tl.load(tiles_ptr + place.to(tl.int64) * 2 + 1)
            last_row = tl.load(offsets_ptr + expert + 1)
            if HALVES and last_row - first_row <= BLOCK_M // 2:
                _down_tile(
                    x_half,
                    w,
                    bias_ptr,
                    out_ptr,
                    expert,
                    first_row,
                    last_row,
                    block,
                    hidden,
                    intermediate,
                    stride_xr,
                    stride_xi,
                    stride_we,
                    stride_wn,
                    stride_wk,
                    stride_be,
                    stride_bn,
                    HAS_BIAS,
                    RUN,
                    BLOCK_M // 2,
                    BLOCK_N,
                    BLOCK_K,
                    EVEN_K,
                    X_TMA,
                    W_TMA,
                    PRECISION,
                )
            else:
                _down_tile(
                    x,
                    w,
                    bias_ptr,
                    out_ptr,
                    expert,
                    first_row,
                    last_row,
                    block,
                    hidden,
                    intermediate,
                    stride_xr,
                    stride_xi,
                    stride_we,
                    stride_wn,
                    stride_wk,
                    stride_be,
                    stride_bn,
                    HAS_BIAS,
                    RUN,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    EVEN_K,
                    X_TMA,
                    W_TMA,
                    PRECISION,
                )
