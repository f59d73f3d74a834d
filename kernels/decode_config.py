"""Sizes of the programs that decode. Plain Python: choosing them needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass

from .expert_weights import ExpertWeights
from .tile_config import next_power_of_2


@dataclass(frozen=True)
class DecodeConfig:
    """Sizes of the programs. None of them may depend on T where a token has to give the same bits in any batch.

    Args:
        up_rows: rows of the intermediate size in a program of the up projection; gated experts read twice as many.
        up_step: length of one step along H there.
        down_rows: rows of the hidden size in a program of the down projection.
        down_step: length of one step along I there.
        num_warps: as Triton has them.
        num_stages: loads under way in the loops; 1 leaves them to the order of the instructions.
        activated_in_float32: keep what is between the projections in float32, else in the dtype of `hidden`.

    Raises:
        ValueError: for sizes that are no powers of 2.
    """

    up_rows: int = 8
    up_step: int = 256
    down_rows: int = 8
    down_step: int = 256
    num_warps: int = 4
    num_stages: int = 3
    activated_in_float32: bool = True

    def __post_init__(self) -> None:
        for name in ("up_rows", "up_step", "down_rows", "down_step"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"`{name}` must be a power of 2, got {size}.")


def default_decode_config(weights: ExpertWeights) -> DecodeConfig:
    """Sizes by rule, where no measured ones are known: wide along the axis that lies contiguous in memory."""
    hidden, intermediate = next_power_of_2(weights.hidden_size), next_power_of_2(weights.intermediate_size)
    rows, steps = (64, 32) if weights.is_transposed else (8, 256)
    return DecodeConfig(
        up_rows=min(rows // 2 if weights.has_gate and weights.is_transposed else rows, intermediate),
        up_step=min(steps, hidden),
        down_rows=min(rows, hidden),
        down_step=min(steps, intermediate),
    )
