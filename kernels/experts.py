"""`"moe_ext"`, the experts implementation that picks the fastest way for a device, a data type and a size.

`model.set_experts_implementation("moe_ext")` puts it into any stock model. What no kernel of ours can do (see
`fallback_reason`) goes to the portable form of the same name, in plain PyTorch, with one warning.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from packaging.version import Version
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from .dispatch import fallback_reason, kernels_of, run
from .expert_weights import read_experts
from .lora_dispatch import run_adapted, run_beside
from .quantized_experts import run_quantized_module


logger = logging.get_logger(__name__)

NAME = "moe_ext"

# Earlier versions of `torch.compile` cannot hand a module to what reads its layout.
_GRAPHS_READ_MODULES = Version(torch.__version__).release >= (2, 13)

ExpertsFunction = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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
        device_type = hidden_states.device.type
        if device_type in ("cpu", "cuda") and not torch.compiler.is_compiling():
            quantized = run_quantized_module(self, hidden_states, top_k_index, top_k_weights)
            if quantized is not None:
                return quantized
        # Under autocast weights are cast expert by expert, as they are used.
        if device_type not in ("cpu", "cuda") or torch.is_autocast_enabled(device_type):
            return portable(self, hidden_states, top_k_index, top_k_weights)
        if torch.compiler.is_compiling():
            if not _GRAPHS_READ_MODULES:
                return portable(self, hidden_states, top_k_index, top_k_weights)
            from . import operators

            layout = operators.constant_layout(self, device_type)
            if layout is None:
                return portable(self, hidden_states, top_k_index, top_k_weights)
            return operators.run(self, hidden_states, top_k_index, top_k_weights, layout)
        kernels = kernels_of(device_type)
        if kernels is None:
            return portable(self, hidden_states, top_k_index, top_k_weights)
        adapted = run_adapted(self, hidden_states, top_k_index, top_k_weights)
        if adapted is not None:
            return adapted
        experts = read_experts(self)
        reason = fallback_reason(self, experts, kernels)
        if reason is not None:
            logger.warning_once(f"{type(self).__name__}: {reason}, so the portable implementation runs.")
            return portable(self, hidden_states, top_k_index, top_k_weights)
        return run(hidden_states, top_k_index, top_k_weights, experts, kernels)

    moe_ext_experts.handles_unused_slots = True  # type: ignore[attr-defined]
    moe_ext_experts.has_kernels = True  # type: ignore[attr-defined]
    moe_ext_experts.run_lora = run_beside  # type: ignore[attr-defined]
    return moe_ext_experts
