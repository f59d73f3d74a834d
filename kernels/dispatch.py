"""Which kernels run, with gradients: everything between a device and its kernels that needs no more than PyTorch.

A device has a module of kernels, with three functions:

    infer(hidden, index, weights, experts) -> out
    forward(hidden, index, weights, experts, kept=None) -> out, kept
    backward(grad, hidden, index, weights, experts, kept, needs, into) -> gradients of hidden, weights, four parameters
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import cpu_experts
from .accumulation import gradient_in_place, release_memory
from .expert_weights import ExpertWeights, has_dropout


_SETTING = "HF_MOE_EXT_TRITON"


@functools.cache
def uses_triton() -> bool:
    """Whether Triton kernels run on the GPU: on NVIDIA's Hopper, where they were tested, if Triton is installed.

    `HF_MOE_EXT_TRITON=1` asks for them on any other GPU, `HF_MOE_EXT_TRITON=0` does without: PyTorch's grouped
    products do the work then.

    Raises:
        ValueError: the variable is neither.
        ImportError: the kernels are asked for, and there is no Triton.
    """
    setting = os.environ.get(_SETTING)
    if setting not in (None, "0", "1"):
        raise ValueError(f"`{_SETTING}` must be 0 or 1, got {setting!r}.")
    has_triton = importlib.util.find_spec("triton") is not None
    if setting == "1" and not has_triton:
        raise ImportError(f"`{_SETTING}=1` needs Triton: pip install triton.")
    return setting == "1" or (setting is None and has_triton and _is_hopper())


def _is_hopper() -> bool:
    # On AMD's GPUs the same numbers mean other devices.
    return torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def kernels_of(device_type: str) -> ModuleType | None:
    """The module of kernels of a device, or `None`. Triton is imported here, and only for a device that needs it."""
    if device_type == "cpu":
        return cpu_experts
    if device_type == "cuda" and uses_triton():
        from . import triton_experts

        return triton_experts
    return None


class Experts(torch.autograd.Function):
    """Forward and backward of the experts. Keeps the tokens, the routing and the projections before the activation."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        experts: ExpertWeights,
        kernels: Any,
    ) -> torch.Tensor:
        ctx.kernels, ctx.experts = kernels, replace(experts, up=None, down=None, up_bias=None, down_bias=None)
        experts = replace(experts, up=up, down=down, up_bias=up_bias, down_bias=down_bias)
        out, kept = kernels.forward(hidden, index, weights, experts)
        ctx.save_for_backward(hidden, index, weights, up, down, up_bias, down_bias, kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.makes_graph = torch.is_grad_enabled()
        return _backward(ctx, grad)


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    hidden, index, weights, up, down, up_bias, down_bias, kept = ctx.saved_tensors
    experts = replace(ctx.experts, up=up, down=down, up_bias=up_bias, down_bias=down_bias)
    needs = [ctx.needs_input_grad[place] for place in (0, 2, 3, 4, 5, 6)]
    into = [
        gradient_in_place(ctx, place, weight) if ctx.needs_input_grad[place] and not ctx.makes_graph else None
        for place, weight in ((3, up), (4, down))
    ]
    d_hidden, *others = ctx.kernels.backward(grad, hidden, index, weights, experts, kept, needs, into)
    return d_hidden, None, *others, None, None


def run(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights, kernels: Any
) -> torch.Tensor:
    """(T, H), (T, K), (T, K) -> (T, H), with gradients where they are asked for."""
    tensors = (experts.up, experts.down, experts.up_bias, experts.down_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weights, *tensors)):
        out: torch.Tensor = Experts.apply(hidden, index, weights, *tensors, experts, kernels)
        return out
    release_memory(experts.up, experts.down)
    out = kernels.infer(hidden, index, weights, experts)
    return out


def fallback_reason(module: nn.Module, experts: ExpertWeights, kernels: Any) -> str | None:
    """Why the kernels cannot run this module, or `None`."""
    if experts.post_norm is not None:
        return "the output of each expert is normalised before it is weighted"
    if experts.activation is None:
        # Backward computes the activation again, and hands on nothing but the gradient of its input.
        if module.training and has_dropout(module):
            return "there is dropout inside the experts"
        if any(True for child in module.children() for _ in child.parameters()):
            return "the activation has parameters of its own"
    reason: str | None = kernels.refusal(experts)
    return reason
