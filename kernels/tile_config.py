"""Sizes of the tiles that the Triton kernels work on. Plain Python: choosing them needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


MANY = 132  # multiprocessors of an H100


@dataclass(frozen=True)
class KernelConfig:
    """How one matrix product over the rows of experts is cut into tiles.

    Args:
        BLOCK_M: rows of a tile, all of one expert.
        BLOCK_N: columns of the product in a tile. In the up projection of gated experts half of them are gate columns
            and half are the up columns that belong to them.
        BLOCK_K: length of one step along the contraction.
        num_warps, num_stages: as Triton has them.
        GROUP_M: tiles of rows that are done for one block of columns before the next one; 1 goes along the columns
            first.
        persistent: as many programs as the device has multiprocessors, each of which works on several tiles.
        tma: load by tensor descriptors what has a layout for it (contraction contiguous, gate rows before up rows,
            16-byte strides). Everything else is loaded by pointers all the same.
        halves: work on half a tile where no more of its rows exist: the last rows of an expert.
        precision: of products of float32 inputs, as `tl.dot` has it: "ieee", "tf32" or "tf32x3".

    Sizes are powers of 2, of at least 16. Raises `ValueError` otherwise.
    """

    BLOCK_M: int = 64
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    num_warps: int = 4
    num_stages: int = 3
    GROUP_M: int = 8
    persistent: bool = False
    tma: bool = False
    halves: bool = False
    precision: str = "ieee"

    def __post_init__(self) -> None:
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"`{name}` must be a power of 2 of at least 16, got {size}.")
        if self.halves and self.BLOCK_M < 32:
            raise ValueError(f"`halves` needs a `BLOCK_M` of at least 32, got {self.BLOCK_M}.")
        if self.GROUP_M < 1:
            raise ValueError(f"`GROUP_M` must be positive, got {self.GROUP_M}.")


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below `number`; 1 for numbers below 1."""
    return 1 << max(number - 1, 0).bit_length()


def default_config(
    kind: Literal["up", "up_kept", "down"],
    rows_per_expert: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    num_experts: int | None = None,
    batch_invariant: bool = False,
) -> KernelConfig:
    """A tile by rule, where no measured one is known.

    Many rows want tiles of 128 x 256; few rows want tiles of no more rows than they are, since a tile costs the same
    however full it is.

    Args:
        kind: the product: "up", with its activation, "up_kept", which writes both, or "down".
        rows_per_expert: S / E, rounded up: a number that the host knows, about what an expert gets.
        n: columns of the product: 2I (I without a gate) for "up" and "up_kept", H for "down".
        k: length of the contraction.
        dtype: of the inputs.
        num_experts: E. Where it is given, tiles are 256 wide only if two or more of them come to each of the `MANY`
            multiprocessors of a large GPU.
        batch_invariant: ignore the number of rows. A row of the result is then the same, bit for bit, whatever the
            other rows of the batch are.

    Raises:
        ValueError: `kind` is neither.
    """
    if kind not in ("up", "up_kept", "down"):
        raise ValueError(f'`kind` must be "up", "up_kept" or "down", got {kind!r}.')
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    rows_per_expert = 64 if batch_invariant else rows_per_expert
    rows = min(max(next_power_of_2(rows_per_expert), 16), 128)
    if dtype == torch.float32:
        rows = min(rows, 64)
    columns, depth = max(next_power_of_2(n), 16), max(next_power_of_2(k), 16)
    # Down the rows while several tiles share the weights of an expert, else along the columns, which share the rows.
    group = 8 if rows_per_expert > 2 * rows else 1
    if dtype == torch.float32:
        return KernelConfig(rows, min(64, columns), min(32, depth), GROUP_M=group, precision=precision)
    depth = min(64, depth)
    if rows == 128:
        tiles = (num_experts or 0) * -(-rows_per_expert // 128) * -(-n // 256)
        if columns >= 256 and (num_experts is None or tiles >= 2 * MANY):
            # With many tiles of an expert the last one does not matter; two bodies of a loop cost registers then.
            halves = kind != "down" and rows_per_expert <= 1024
            if kind == "up_kept":
                return KernelConfig(128, 256, depth, 8, num_stages=4, GROUP_M=group, tma=True, halves=halves)
            return KernelConfig(128, 256, depth, 8, 3, group, persistent=True, tma=True, halves=halves)
        return KernelConfig(128, min(128, columns), depth, 8, num_stages=4, GROUP_M=group, tma=True)
    return KernelConfig(rows, min(128, columns), depth, 4, num_stages=4, GROUP_M=group, tma=True)
