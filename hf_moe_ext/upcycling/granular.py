"""Granular upcycling: experts are slices of copies, and the router always takes whole copies at first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .methods import ExpertStack, FeedForward, UpcyclingMethod, register_upcycling_method


@register_upcycling_method("granular")
@dataclass
class GranularUpcycling(UpcyclingMethod):
    """Virtual groups ("Upcycling Large Language Models into Mixture of Experts", huggingface.co/papers/2410.07524).

    The block is cut along its intermediate axis into G slices, and each slice is copied E times: expert `e * G + g` is
    slice g of copy e. The router's rows are repeated G times, so the slices of a copy are chosen together until
    training parts them. A slice gets 1/G of its copy's weight, which a factor G on its output makes up for.

    Args:
        granularity (`int`, *optional*, defaults to 2):
            G, slices per copy. Must divide the intermediate size.
        scale_mode (`"down_only"` or `"spread"`, *optional*, defaults to `"down_only"`):
            Where the factor goes: into the down projection, or in equal shares into all projections (its cube root for
            gated blocks and squared ReLU, its square root for other plain blocks). The paper spreads it, which is
            exact for ReLU and squared ReLU only: a factor before SiLU or GELU is not a factor after it. So the default
            here differs.
        scale (`float`, *optional*):
            The factor. `None` means G, which preserves the function where the weights of the chosen slices sum to one.
    """

    granularity: int = 2
    scale_mode: Literal["down_only", "spread"] = "down_only"
    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity < 1:
            raise ValueError(f"`granularity` must be at least 1, got {self.granularity}.")
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"`scale` must be positive, got {self.scale}.")

    @property
    def experts_per_copy(self) -> int:
        return self.granularity

    def expert_width(self, intermediate_size: int, num_copies: int = 1) -> int:
        if intermediate_size % self.granularity:
            divisors = [g for g in range(1, 65) if intermediate_size % g == 0]
            raise ValueError(
                f"`granularity` ({self.granularity}) must divide the intermediate size ({intermediate_size}); "
                f"possible up to 64: {', '.join(map(str, divisors))}."
            )
        return intermediate_size // self.granularity

    def convert(self, dense: FeedForward, num_copies: int, seed: int) -> ExpertStack:
        slices, width = self.granularity, self.expert_width(dense.intermediate_size)
        parts, _, hidden = dense.up.shape
        scale = float(slices) if self.scale is None else self.scale
        up_scale, down_scale = 1.0, scale
        if self.scale_mode == "spread":
            up_scale = down_scale = scale ** (1 / (parts + dense.activation_degree))

        def copies(tensor: torch.Tensor, factor: float) -> torch.Tensor:
            if factor != 1.0:
                tensor = tensor * factor
            tensor = tensor.expand(num_copies, *tensor.shape)
            return tensor.clone(memory_format=torch.contiguous_format).flatten(0, 1)

        up = copies(dense.up.view(parts, slices, width, hidden).transpose(0, 1), up_scale)
        down = copies(dense.down.view(hidden, slices, width).transpose(0, 1), down_scale)
        up_bias = down_bias = None
        if dense.up_bias is not None and dense.down_bias is not None:
            up_bias = copies(dense.up_bias.view(parts, slices, width).transpose(0, 1), up_scale)
            # The weights of all chosen slices sum to one, so every slice carries the whole bias.
            down_bias = dense.down_bias.expand(num_copies * slices, hidden).clone()
        return ExpertStack(up, down, up_bias, down_bias)
