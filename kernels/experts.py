"""`"moe_ext"`, the experts implementation that picks the fastest way for a device, a data type and a size.

`model.set_experts_implementation("moe_ext")` puts it into any stock model. What no kernel of ours can do (see
`fallback_reason`) goes to the portable form of the same name, in plain PyTorch, with one warning.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from . import cpu_experts, operators
from .expert_weights import ExpertWeights, has_dropout, read_experts


logger = logging.get_logger(__name__)

NAME = "moe_ext"

ExpertsFunction = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def fallback_reason(experts: nn.Module, known: ExpertWeights) -> str | None:
    """Why the kernels cannot run this module, or `None`."""
    if known.post_norm is not None:
        return "the output of each expert is normalised before it is weighted"
    if known.activation is None:
        # Backward computes the activation again, and hands on nothing but the gradient of its input.
        if experts.training and has_dropout(experts):
            return "there is dropout inside the experts"
        if any(True for child in experts.children() for _ in child.parameters()):
            return "the activation has parameters of its own"
    return None


def register_experts() -> None:
    """Put the kernels under the name `"moe_ext"`; what stands there, the portable function, becomes their fallback."""
    portable = ALL_EXPERTS_FUNCTIONS[NAME]
    if not getattr(portable, "has_kernels", False):
        ALL_EXPERTS_FUNCTIONS.register(NAME, make_experts_function(portable))


def make_experts_function(portable: ExpertsFunction) -> ExpertsFunction:
    """The function to register: (T, H), (T, K), (T, K) -> (T, H). Unused slots (ids from E on) cost nothing.

    Args:
        portable: does what no kernel can.
    """

    def moe_ext_experts(
        self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if hidden_states.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return portable(self, hidden_states, top_k_index, top_k_weights)
        if torch.compiler.is_compiling():
            layout = operators.constant_layout(self)
            if layout is None:
                return portable(self, hidden_states, top_k_index, top_k_weights)
            return operators.run(self, hidden_states, top_k_index, top_k_weights, layout)
        known = read_experts(self)
        reason = fallback_reason(self, known)
        if reason is not None:
            logger.warning_once(f"{type(self).__name__}: {reason}, so the portable implementation runs.")
            return portable(self, hidden_states, top_k_index, top_k_weights)
        return cpu_experts.run(hidden_states, top_k_index, top_k_weights, known)

    moe_ext_experts.handles_unused_slots = True  # type: ignore[attr-defined]
    moe_ext_experts.has_kernels = True  # type: ignore[attr-defined]
    return moe_ext_experts
