"""Which kernels run experts with weights in few bits, with gradients; `dispatch` for what `quantized_weights` holds.

A device has a module of kernels, with three functions:

    infer(hidden, index, weights, experts) -> out
    forward(hidden, index, weights, experts) -> out, kept
    backward(grad, hidden, index, weights, experts, kept, needs) -> gradients of hidden and weights

Axes: T tokens, K slots of a token, E experts, H hidden size.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch

from . import cpu_quantized
from .quantized_weights import QuantizedExperts


def quantized_kernels_of(device_type: str) -> ModuleType:
    """The module of kernels of a device. Triton is imported here, and only for a device that needs it.

    Raises:
        NotImplementedError: there is none, or Triton is not installed.
    """
    if device_type == "cpu":
        return cpu_quantized
    if device_type == "cuda" and importlib.util.find_spec("triton"):
        from . import triton_quantized

        return triton_quantized
    raise NotImplementedError(
        f"quantised experts run on a CPU, or on CUDA with Triton installed, not on {device_type}."
    )


def infer_quantized(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: QuantizedExperts, kernels: Any = None
) -> torch.Tensor:
    """(T, H), (T, K), (T, K) -> (T, H), without gradients. Ids of E and above are unused slots, and cost nothing.

    Args:
        kernels: `cpu_quantized` or `triton_quantized`; those of the device where it is not given.
    """
    kernels = kernels or quantized_kernels_of(hidden.device.type)
    with torch.no_grad():
        out: torch.Tensor = kernels.infer(hidden, index, weights, experts)
    return out


def run_quantized(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: QuantizedExperts, kernels: Any = None
) -> torch.Tensor:
    """As `infer_quantized`, with gradients of `hidden` and `weights` where they are asked for: the experts are frozen.

    In training they are dequantised for the forward and again for the backward, so nothing of them is kept in between
    but the few bits, as in QLoRA.

    Raises:
        ValueError: a bias asks for a gradient.
    """
    if torch.is_grad_enabled():
        if any(bias is not None and bias.requires_grad for bias in (experts.up_bias, experts.down_bias)):
            raise ValueError("quantised experts are frozen with their biases, but a bias requires a gradient.")
        if hidden.requires_grad or weights.requires_grad:
            kernels = kernels or quantized_kernels_of(hidden.device.type)
            out: torch.Tensor = _Frozen.apply(hidden, index, weights, experts, kernels)
            return out
    return infer_quantized(hidden, index, weights, experts, kernels)


class _Frozen(torch.autograd.Function):
    """Keeps the tokens, the routing and the projections before the activation, like `experts.Experts`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        experts: QuantizedExperts,
        kernels: Any,
    ) -> torch.Tensor:
        out, kept = kernels.forward(hidden, index, weights, experts)
        ctx.experts, ctx.kernels = experts, kernels
        ctx.save_for_backward(hidden, index, weights, kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        hidden, index, weights, kept = ctx.saved_tensors
        d_hidden, d_weights = ctx.kernels.backward(grad, hidden, index, weights, ctx.experts, kept, needs)
        return d_hidden, None, d_weights, None, None
