"""Layers that the package `kernels` can put in the place of others: a `forward`, and nothing of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import dispatch, operators
from .expert_weights import read_experts


class MoeExtExperts(nn.Module):
    """The experts of any model of Transformers that are made with `use_experts_implementation`.

    It reads the weights, the layout and the activation off the module that it is put into. What no kernel can do, it
    leaves to the forward that the module's class has.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, H), (T, K), (T, K) -> (T, H). Ids from E on are unused slots."""
        device_type = hidden_states.device.type
        stock: Any = type(self).forward
        kernels = dispatch.kernels_of(device_type)
        # Under autocast weights are cast expert by expert, as they are used.
        if kernels is None or torch.is_autocast_enabled(device_type):
            out: torch.Tensor = stock(self, hidden_states, top_k_index, top_k_weights)
            return out
        if torch.compiler.is_compiling():
            layout = operators.constant_layout(self, device_type)
            if layout is not None:
                return operators.run(self, hidden_states, top_k_index, top_k_weights, layout)
        else:
            experts = read_experts(self)
            if dispatch.fallback_reason(self, experts, kernels) is None:
                return dispatch.run(hidden_states, top_k_index, top_k_weights, experts, kernels)
        out = stock(self, hidden_states, top_k_index, top_k_weights)
        return out
