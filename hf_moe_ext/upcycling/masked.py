"""Masked upcycling: copies in which random weights are zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .methods import ExpertStack, FeedForward, UpcyclingMethod, derive_seed, register_upcycling_method


@register_upcycling_method("masked")
@dataclass
class MaskedUpcycling(UpcyclingMethod):
    """The expert-diversify phase of EvoMoE (huggingface.co/papers/2112.14397).

    Each expert is a copy of which a random part of the weights is zero, drawn for every weight and expert by itself.
    Experts differ from the first step on, at the price of the dense function. Biases are copied.

    Args:
        keep (`float`, *optional*, defaults to 0.9):
            Probability that a weight is kept. 1 keeps the function.
        rescale (`bool`, *optional*, defaults to `False`):
            Whether the kept weights are divided by `keep`, so that each projection keeps its mean output.
    """

    keep: float = 0.9
    rescale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ValueError(f"`keep` must be in (0, 1], got {self.keep}.")

    def convert(self, dense: FeedForward, num_copies: int, seed: int) -> ExpertStack:
        def masked(matrix: torch.Tensor, name: str) -> torch.Tensor:
            copies = matrix.expand(num_copies, *matrix.shape).clone(memory_format=torch.contiguous_format)
            for expert in range(num_copies if self.keep < 1 else 0):
                # Drawn on the CPU, so that a seed means the same masks on every device.
                generator = torch.Generator().manual_seed(derive_seed(seed, str(expert), name))
                dropped = torch.rand(matrix.shape, generator=generator) >= self.keep
                copies[expert].masked_fill_(dropped.to(matrix.device), 0)
            return copies / self.keep if self.rescale and self.keep < 1 else copies

        stack = ExpertStack(masked(dense.up, "up"), masked(dense.down, "down"))
        if dense.up_bias is not None and dense.down_bias is not None:
            stack.up_bias, stack.down_bias = (
                bias.expand(num_copies, *bias.shape).clone(memory_format=torch.contiguous_format)
                for bias in (dense.up_bias, dense.down_bias)
            )
        return stack
