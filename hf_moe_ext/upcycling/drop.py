"""Drop-Upcycling: copies in which a random part of the neurons starts anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .methods import ExpertStack, FeedForward, UpcyclingMethod, derive_seed, register_upcycling_method


@register_upcycling_method("drop")
@dataclass
class DropUpcycling(UpcyclingMethod):
    """Drop-Upcycling (huggingface.co/papers/2502.19261).

    Each expert is a copy whose neurons are permuted (which changes nothing) and of which `floor(drop_ratio * I)` are
    drawn anew. Experts differ from the first step on, at the price of the dense function.

    Args:
        drop_ratio (`float`, *optional*, defaults to 0.5):
            Share of the intermediate neurons that are drawn anew (r in the paper). 0 keeps the function.
        shared_indices (`bool`, *optional*, defaults to `True`):
            Whether the rows of gate and up and the columns of down that are drawn anew belong to the same neurons, as
            in the paper. The authors' code draws different ones for each matrix (`False`).
        reinit (`"statistics"` or `"noise"`, *optional*, defaults to `"statistics"`):
            Draw from a normal distribution with mean and standard deviation of the entries replaced, or add normal
            noise of `noise_std` to them.
        noise_std (`float`, *optional*, defaults to 0.02):
            For `reinit="noise"`.
        permute (`bool`, *optional*, defaults to `True`):
            Whether the neurons of each expert are permuted.
    """

    drop_ratio: float = 0.5
    shared_indices: bool = True
    reinit: Literal["statistics", "noise"] = "statistics"
    noise_std: float = 0.02
    permute: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop_ratio <= 1:
            raise ValueError(f"`drop_ratio` must be in [0, 1], got {self.drop_ratio}.")
        if self.noise_std < 0:
            raise ValueError(f"`noise_std` must be non-negative, got {self.noise_std}.")

    def convert(self, dense: FeedForward, num_copies: int, seed: int) -> ExpertStack:
        size = dense.intermediate_size
        count = int(self.drop_ratio * size)
        up_bias, down_bias = dense.up_bias, dense.down_bias
        stack = ExpertStack(_empty(dense.up, num_copies), _empty(dense.down, num_copies))
        if up_bias is not None and down_bias is not None:
            stack.up_bias, stack.down_bias = _empty(up_bias, num_copies), down_bias.repeat(num_copies, 1)
        for expert in range(num_copies):
            generator = torch.Generator().manual_seed(derive_seed(seed, str(expert)))
            order = torch.randperm(size, generator=generator) if self.permute else torch.arange(size)
            order = order.to(dense.up.device)
            up, down = stack.up[expert], stack.down[expert]
            torch.index_select(dense.up, 1, order, out=up)
            torch.index_select(dense.down, 1, order, out=down)
            if stack.up_bias is not None and up_bias is not None:
                stack.up_bias[expert] = up_bias[:, order]
            if count == 0:
                continue
            chosen = torch.randperm(size, generator=generator)[:count]
            for part in range(up.shape[0]):
                self._redraw(up[part], chosen, 0, generator)
                if stack.up_bias is not None:
                    self._redraw(stack.up_bias[expert, part], chosen, 0, generator)
                if not self.shared_indices:
                    chosen = torch.randperm(size, generator=generator)[:count]
            self._redraw(down, chosen, 1, generator)
        return stack

    def _redraw(self, matrix: torch.Tensor, chosen: torch.Tensor, dim: int, generator: torch.Generator) -> None:
        index = chosen.to(matrix.device)
        old = matrix.index_select(dim, index).float()
        # Drawn on the CPU in float32, so that a seed means the same numbers on every device.
        noise = torch.randn(old.shape, generator=generator).to(old.device)
        if self.reinit == "noise":
            new = old + self.noise_std * noise
        else:
            new = old.mean() + old.std(correction=0) * noise
        matrix.index_copy_(dim, index, new.to(matrix.dtype))


def _empty(tensor: torch.Tensor, num_copies: int) -> torch.Tensor:
    return tensor.new_empty(num_copies, *tensor.shape)
