"""Sparse upcycling: every expert is a copy of the dense block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .methods import ExpertStack, FeedForward, UpcyclingMethod, register_upcycling_method


@register_upcycling_method("sparse")
@dataclass
class SparseUpcycling(UpcyclingMethod):
    """Copies ("Sparse Upcycling", huggingface.co/papers/2212.05055).

    The result computes the dense function wherever the weights of the chosen experts sum to one.
    """

    def convert(self, dense: FeedForward, num_copies: int, seed: int) -> ExpertStack:
        def copies(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            return tensor.expand(num_copies, *tensor.shape).clone(memory_format=torch.contiguous_format)

        up, down = copies(dense.up), copies(dense.down)
        assert up is not None and down is not None
        return ExpertStack(up, down, copies(dense.up_bias), copies(dense.down_bias))
