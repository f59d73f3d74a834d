"""Sizes of tiles for the kernels of the backward, by rule. Plain Python: choosing them needs no Triton."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from .tile_config import KernelConfig, default_config, next_power_of_2


def backward_config(
    kind: Literal["down_backward", "input_gradient"],
    rows_per_expert: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    batch_invariant: bool = False,
) -> KernelConfig:
    """A tile for a product of the backward, where no measured one is known.

    Args:
        kind: "down_backward", whose epilogue has no registers for more than 128 columns, or "input_gradient".
        rows_per_expert: S / E, rounded up.
        n: columns of the product: I, or H for "input_gradient".
        k: length of the contraction: H, or 2I (I without a gate).
        dtype: of the inputs.
        batch_invariant: ignore `rows_per_expert`, so that a row does not depend on the rest of the batch.

    Raises:
        ValueError: for another `kind`.
    """
    if kind not in ("down_backward", "input_gradient"):
        raise ValueError(f'`kind` must be "down_backward" or "input_gradient", got {kind!r}.')
    # Both are the shape of a down projection; what they load has no layout for tensor descriptors.
    config = default_config("down", rows_per_expert, n, k, dtype, batch_invariant=batch_invariant)
    config = replace(config, persistent=False, tma=False)
    if kind == "down_backward" and config.BLOCK_N > 128:
        config = replace(config, BLOCK_N=128, num_stages=4)
    return config


def weight_gradient_config(rows_per_expert: int, m: int, n: int, dtype: torch.dtype) -> KernelConfig:
    """A tile for the gradient of a projection, (E, m, n), where no measured one is known.

    The load of a row's token, on which the load of its values waits, takes half of the pipeline's stages beyond two:
    five of them keep as many steps in flight as three do where nothing is gathered.

    Args:
        rows_per_expert: S / E, rounded up: the length of the contraction.
        m, n: rows and columns of the result.
        dtype: of the operands.
    """
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    rows, columns = max(next_power_of_2(m), 16), max(next_power_of_2(n), 16)
    step = min(max(next_power_of_2(rows_per_expert), 16), 64)
    if dtype == torch.float32:
        return KernelConfig(min(64, rows), min(64, columns), min(32, step), num_stages=5, precision=precision)
    if rows >= 128 and columns >= 256:
        return KernelConfig(128, 256, step, num_warps=8, num_stages=5)
    if rows >= 128 and columns == 128:
        return KernelConfig(128, 128, step, num_warps=8, num_stages=5)
    return KernelConfig(min(64, rows), min(128, columns), step, num_stages=5)
