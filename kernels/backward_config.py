"""Sizes of tiles for the kernels of the backward, by rule. Plain Python: choosing them needs no Triton."""

from __future__ import annotations

from dataclasses import replace

import torch

from .tile_config import KernelConfig, default_config, next_power_of_2


def down_backward_config(
    rows_per_expert: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    num_experts: int | None = None,
    narrow: bool = False,
    batch_invariant: bool = False,
) -> KernelConfig:
    """A tile for `down_backward`, where no measured one is known.

    That of a down projection, with one tile for a program.

    Args:
        rows_per_expert: S / E, rounded up.
        n: columns of the product, I.
        k: length of the contraction, H.
        dtype: of the inputs.
        num_experts: E, as in `default_config`.
        narrow: no wide tiles, for what needs more registers: gate and up that alternate, and the error function.
        batch_invariant: ignore `rows_per_expert`, so that a row does not depend on the rest of the batch.
    """
    config = default_config(
        "down", rows_per_expert, n, k, dtype, num_experts=num_experts, batch_invariant=batch_invariant
    )
    config = replace(config, persistent=False, BLOCK_N=min(config.BLOCK_N, 128) if narrow else config.BLOCK_N)
    return config if config.BLOCK_M < 128 else replace(config, num_stages=4 if config.BLOCK_N > 128 else 5)


def weight_gradient_config(
    rows_per_expert: int, m: int, n: int, dtype: torch.dtype, *, gathers_left: bool
) -> KernelConfig:
    """A tile for the gradient of a projection, (E, m, n), where no measured one is known.

    Values of a token wait for the load of its number, and both are pipelined, so these want more stages than where
    nothing is gathered. What is gathered costs more to load, so it gets the narrow side of a tile.

    Args:
        rows_per_expert: S / E, rounded up: the length of the contraction.
        m, n: rows and columns of the result.
        dtype: of the operands.
        gathers_left: whether the rows of the result are those of tokens.
    """
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    rows, columns = max(next_power_of_2(m), 16), max(next_power_of_2(n), 16)
    step = min(max(next_power_of_2(rows_per_expert), 16), 64)
    if dtype == torch.float32:
        return KernelConfig(min(64, rows), min(64, columns), min(32, step), num_stages=5, precision=precision)
    if rows >= 128 and columns >= 128:
        wide = (128, min(256, columns)) if gathers_left else (min(256, rows), 128)
        return KernelConfig(*wide, step, num_warps=8, num_stages=5, tma=True)
    return KernelConfig(min(64, rows), min(128, columns), step, num_stages=5, tma=True)
