"""Kernels on weights in few bits: products that unpack them in registers, and the way back to plain matrices.

The weights are the left operand of a product whose columns are the rows of the layer, so that 64 of them fill an
instruction of Hopper's however few tokens there are. Scales are applied to sums in float32: before them codes are
exact in every dtype, and only the table of NF4 is rounded to that of the layer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantized_weights import NF4
from .triton_tiles import activate, activate_gated, place_tile


_TABLE = tl.constexpr(NF4)


@triton.jit
def _nf4(code: tl.tensor) -> tl.tensor:
    """Entries of the table, in float32. Chosen bit by bit: loads from a table would go ahead of those of the data."""
    odd = code % 2 == 1
    v0 = tl.where(odd, _TABLE[1], _TABLE[0])
    v2 = tl.where(odd, _TABLE[3], _TABLE[2])
    v4 = tl.where(odd, _TABLE[5], _TABLE[4])
    v6 = tl.where(odd, _TABLE[7], _TABLE[6])
    v8 = tl.where(odd, _TABLE[9], _TABLE[8])
    v10 = tl.where(odd, _TABLE[11], _TABLE[10])
    v12 = tl.where(odd, _TABLE[13], _TABLE[12])
    v14 = tl.where(odd, _TABLE[15], _TABLE[14])
    second = (code & 2) != 0
    v0 = tl.where(second, v2, v0)
    v4 = tl.where(second, v6, v4)
    v8 = tl.where(second, v10, v8)
    v12 = tl.where(second, v14, v12)
    third = (code & 4) != 0
    return tl.where((code & 8) != 0, tl.where(third, v12, v8), tl.where(third, v4, v0))


@triton.jit
def _unpack(packed: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Bytes (n, k / numbers in a byte) -> (n, k): numbers in units of the scale, but for the offset of int4."""
    if FORMAT == "int8":
        out = packed.to(tl.float32)
    elif FORMAT == "ternary":
        even = tl.join(packed & 3, (packed >> 4) & 3)
        odd = tl.join((packed >> 2) & 3, packed >> 6)
        out = tl.join(even, odd).reshape(packed.shape[0], 4 * packed.shape[1]).to(tl.float32) - 1.0
    else:
        code = tl.join(packed & 15, packed >> 4).reshape(packed.shape[0], 2 * packed.shape[1])
        out = _nf4(code) if FORMAT == "nf4" else code.to(tl.float32)
    return out


@triton.jit
def _weights_at(
    packed_at: tl.tensor,
    zeros_at: tl.tensor,
    bytes_left: tl.tensor,
    FORMAT: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EVEN_K: tl.constexpr,
) -> tl.tensor:
    """A tile in units of the scale, float32. Past the end of a row it holds anything finite."""
    if EVEN_K:
        packed = tl.load(packed_at)
    else:
        packed = tl.load(packed_at, mask=tl.arange(0, packed_at.shape[1])[None, :] < bytes_left, other=0)
    out = _unpack(packed, FORMAT)
    if FORMAT == "int4":
        if HAS_ZEROS:
            out -= tl.load(zeros_at).to(tl.float32)[:, None]
        else:
            out -= 8.0
    return out


@triton.jit
def _add_product(
    total: tl.tensor,
    w: tl.tensor,
    x: tl.tensor,
    scales_at: tl.tensor,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """`total + scale * w @ x`; a scale of whole rows is left to the end."""
    if GROUPED:
        # The step lies in one group, so its sum has one scale.
        product = tl.dot(w.to(x.dtype), x, input_precision=PRECISION)
        total += product * tl.load(scales_at).to(tl.float32)[:, None]
    else:
        total = tl.dot(w.to(x.dtype), x, total, input_precision=PRECISION)
    return total


@triton.jit
def packed_kernel(
    x_ptr: tl.tensor,  # (T, length) if GATHER, else (S, length)
    packed_ptr: tl.tensor,  # (E, PARTS * width, bytes)
    scales_ptr: tl.tensor,  # (E, PARTS * width, groups)
    zeros_ptr: tl.tensor,  # of the same strides
    bias_ptr: tl.tensor,  # (E, PARTS * width)
    out_ptr: tl.tensor,  # (S, width)
    offsets_ptr: tl.tensor,
    slot_of_row_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    num_tiles: tl.tensor,
    width: tl.tensor,
    length: tl.tensor,
    slots_per_token: tl.tensor,
    stride_xr: tl.tensor,
    stride_xk: tl.tensor,
    stride_pe: tl.tensor,
    stride_pn: tl.tensor,
    stride_se: tl.tensor,
    stride_sn: tl.tensor,
    stride_be: tl.tensor,
    stride_bn: tl.tensor,
    GATHER: tl.constexpr,
    PARTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_BYTE: tl.constexpr,
    GROUP: tl.constexpr,  # numbers with one scale; 0 for whole rows
    HAS_ZEROS: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """BLOCK_N columns of the activation of `x @ w^T + bias`, for BLOCK_M rows of one expert."""
    place, block = place_tile(tl.program_id(0), num_tiles, tl.cdiv(width, BLOCK_N), GROUP_M)
    expert = tl.load(tiles_ptr + place.to(tl.int64) * 2).to(tl.int64)
    if expert < 0:
        return
    first_row = tl.load(tiles_ptr + place.to(tl.int64) * 2 + 1)
    row = first_row + tl.arange(0, BLOCK_M)
    exists = row < tl.load(offsets_ptr + expert + 1)
    # Rows of the next expert are computed as those of token 0 or as the first row again, and not stored.
    if GATHER:
        source = tl.load(slot_of_row_ptr + row, mask=exists, other=0) // slots_per_token
    else:
        source = tl.where(exists, row, first_row)

    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    n = tl.where(inside, column, 0).to(tl.int64)
    other = n  # the rows of up, where n are those of gate
    if PARTS == 2:
        other = 2 * n + 1 if INTERLEAVED else n + width
        n = 2 * n if INTERLEAVED else n

    k = tl.arange(0, BLOCK_K).to(tl.int64)
    byte = tl.arange(0, BLOCK_K // PER_BYTE).to(tl.int64)
    x_at = x_ptr + source.to(tl.int64)[None, :] * stride_xr + k[:, None] * stride_xk
    packed_at = packed_ptr + expert * stride_pe + byte[None, :]
    first = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    second = first
    for done in range(0, length, BLOCK_K):
        step = tl.full((), done, tl.int64)
        if EVEN_K:
            x = tl.load(x_at + step * stride_xk)
        else:
            x = tl.load(x_at + step * stride_xk, mask=k[:, None] < length - done, other=0.0)
        at = packed_at + done // PER_BYTE
        group = 0
        if GROUP > 0:
            group = done // GROUP
        left = (length - done) // PER_BYTE
        scale = expert * stride_se + group
        w = _weights_at(
            at + n[:, None] * stride_pn, zeros_ptr + scale + n * stride_sn, left, FORMAT, HAS_ZEROS, EVEN_K
        )
        first = _add_product(first, w, x, scales_ptr + scale + n * stride_sn, GROUP > 0, PRECISION)
        if PARTS == 2:
            w = _weights_at(
                at + other[:, None] * stride_pn, zeros_ptr + scale + other * stride_sn, left, FORMAT, HAS_ZEROS, EVEN_K
            )
            second = _add_product(second, w, x, scales_ptr + scale + other * stride_sn, GROUP > 0, PRECISION)

    if GROUP == 0:
        scale = expert * stride_se
        first *= tl.load(scales_ptr + scale + n * stride_sn).to(tl.float32)[:, None]
        if PARTS == 2:
            second *= tl.load(scales_ptr + scale + other * stride_sn).to(tl.float32)[:, None]
    if HAS_BIAS:
        bias_at = bias_ptr + expert * stride_be
        first += tl.load(bias_at + n * stride_bn).to(tl.float32)[:, None]
        if PARTS == 2:
            second += tl.load(bias_at + other * stride_bn).to(tl.float32)[:, None]
    if PARTS == 2:
        out = activate_gated(first, second, KIND, ALPHA, LIMIT, SHIFT)
    else:
        out = activate(first, KIND, ALPHA)
    to = out_ptr + row.to(tl.int64)[None, :] * width + column[:, None]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=exists[None, :] & inside[:, None])


@triton.jit
def dequantize_kernel(
    packed_ptr: tl.tensor,  # (E, N, bytes)
    scales_ptr: tl.tensor,  # (E, N, groups)
    zeros_ptr: tl.tensor,
    out_ptr: tl.tensor,  # (E, N, length), contiguous
    offsets_ptr: tl.tensor,
    num_rows: tl.tensor,
    length: tl.tensor,
    stride_pe: tl.tensor,
    stride_pn: tl.tensor,
    stride_se: tl.tensor,
    stride_sn: tl.tensor,
    FORMAT: tl.constexpr,
    PER_BYTE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
) -> None:
    """One tile of one expert's matrix; nothing for an expert without rows."""
    blocks = tl.cdiv(num_rows, BLOCK_N)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    if tl.load(offsets_ptr + expert) == tl.load(offsets_ptr + expert + 1):
        return
    row = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < num_rows
    n = tl.where(inside, row, 0).to(tl.int64)
    done = tl.program_id(1) * BLOCK_K
    group = 0
    if GROUP > 0:
        group = done // GROUP
    byte = done // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)
    at = packed_ptr + expert * stride_pe + n[:, None] * stride_pn + byte[None, :]
    scale = expert * stride_se + n * stride_sn + group
    out = _weights_at(at, zeros_ptr + scale, (length - done) // PER_BYTE, FORMAT, HAS_ZEROS, EVEN_K)
    out *= tl.load(scales_ptr + scale).to(tl.float32)[:, None]
    k = done + tl.arange(0, BLOCK_K)
    to = out_ptr + (expert * num_rows + n)[:, None] * length + k[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (k[None, :] < length))
