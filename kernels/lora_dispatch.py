"""Which kernels run experts with adapters, with gradients; `dispatch` for what `lora` finds.

A device has a module of kernels, with four functions:

    refusal(experts, lora) -> why it cannot run them, or `None`
    infer(hidden, index, weights, experts, lora) -> out
    forward(hidden, index, weights, experts, lora) -> out, kept
    backward(grad, hidden, index, weights, experts, lora, kept, needs) -> gradients of hidden, weights, and A and B of
        both projections
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import cpu_lora
from .dispatch import uses_triton
from .expert_weights import ExpertWeights, read_experts
from .lora import ExpertLora, LowRank, read_adapted


def lora_kernels_of(device_type: str) -> ModuleType | None:
    """The module of kernels of a device, or `None`. Triton is imported here, and only for a device that needs it."""
    if device_type == "cpu":
        return cpu_lora
    if device_type == "cuda" and uses_triton():
        from . import triton_lora

        return triton_lora
    return None


class ExpertsWithLora(torch.autograd.Function):
    """Forward and backward of frozen experts with adapters. Keeps what the experts alone would, and nothing more."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        up_a: torch.Tensor | None,
        up_b: torch.Tensor | None,
        down_a: torch.Tensor | None,
        down_b: torch.Tensor | None,
        experts: ExpertWeights,
        lora: ExpertLora,
        kernels: Any,
    ) -> torch.Tensor:
        adapters = (up_a, up_b, down_a, down_b)
        out, kept = kernels.forward(hidden, index, weights, experts, lora.with_tensors(adapters))
        ctx.kernels, ctx.lora = kernels, lora.with_tensors((None,) * 4)
        ctx.experts = replace(experts, up=None, down=None, up_bias=None, down_bias=None)
        parameters = (experts.up, experts.down, experts.up_bias, experts.down_bias)
        ctx.save_for_backward(hidden, index, weights, *adapters, *parameters, kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, index, weights, *tensors, kept = ctx.saved_tensors
        up, down, up_bias, down_bias = tensors[4:]
        experts = replace(ctx.experts, up=up, down=down, up_bias=up_bias, down_bias=down_bias)
        lora = ctx.lora.with_tensors(tensors[:4])
        needs = [ctx.needs_input_grad[place] for place in (0, 2, 3, 4, 5, 6)]
        d_hidden, *others = ctx.kernels.backward(grad, hidden, index, weights, experts, lora, kept, needs)
        return d_hidden, None, *others, None, None, None


def run(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    lora: ExpertLora,
    kernels: Any,
) -> torch.Tensor:
    """(T, H), (T, K), (T, K) -> (T, H), with gradients where they are asked for; the experts get none."""
    needed = (hidden, weights, *lora.tensors)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in needed):
        out: torch.Tensor = ExpertsWithLora.apply(hidden, index, weights, *lora.tensors, experts, lora, kernels)
        return out
    out = kernels.infer(hidden, index, weights, experts, lora)
    return out


def run_adapted(
    module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor | None:
    """(T, H), (T, K), (T, K) -> (T, H), for a module whose adapters can be left apart from its weights.

    Returns:
        `None` where they cannot, or where there are none (see `read_adapted`): then reading the parameters gives the
        weights with the adapters in them.
    """
    found = read_adapted(module)
    kernels = None if found is None else lora_kernels_of(hidden.device.type)
    if found is None or kernels is None or kernels.refusal(found.experts, found.lora) is not None:
        return None
    return run(hidden, index, weights, found.experts, found.lora, kernels)


def run_beside(
    module: Any,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: tuple[torch.Tensor, torch.Tensor] | None,
    down: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
) -> torch.Tensor | None:
    """(T, H), (T, K), (T, K) -> (T, H), for experts whose adapters stand beside them.

    Args:
        module: experts made with `use_experts_implementation`.
        hidden, index, weights: as for experts functions.
        up, down: A (E, r, in) and B (E, out, r) of the projections; `None` where one has none.
        scale: factor of the products.

    Returns:
        `None` where no kernel can: under autocast or `torch.compile`, where the experts are trained themselves, or do
        more than a known activation between their projections, or on a device without kernels.
    """
    device_type = hidden.device.type
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type):
        return None
    kernels = lora_kernels_of(device_type)
    if kernels is None or any(p.requires_grad for p in module.parameters(recurse=False)):
        return None
    experts = read_experts(module)
    if experts.layout is None:
        return None
    lora = ExpertLora(
        None if up is None else LowRank(*up, scale),
        None if down is None else LowRank(*down, scale),
    )
    if kernels.refusal(experts, lora) is not None:
        return None
    return run(hidden, index, weights, experts, lora, kernels)
