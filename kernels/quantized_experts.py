"""Which kernels run experts with weights in few bits, with gradients; `dispatch` for what `quantized_weights` holds.

A device has a module of kernels, with three functions:

    infer(hidden, index, weights, experts) -> out
    forward(hidden, index, weights, experts) -> out, kept
    backward(grad, hidden, index, weights, experts, kept, needs) -> gradients of hidden and weights

Axes: T tokens, K slots of a token, E experts, H hidden size.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import cpu_quantized
from .dispatch import fallback_reason, kernels_of
from .expert_weights import ExpertWeights, read_experts
from .lora import ExpertLora, LowRank, read_adapted
from .lora_dispatch import lora_kernels_of
from .quantized_lora import run_quantized_lora
from .quantized_tensor import QuantizedTensor
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


def run_quantized_module(
    module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor | None:
    """(T, H), (T, K), (T, K) -> (T, H), for a module whose parameters are `QuantizedTensor`s, with adapters of PEFT.

    Returns:
        `None` where they are not, or where no kernel can do what the module does: then reading the parameters gives
        their numbers, expert by expert.
    """
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if not all(isinstance(_stored(module, name), QuantizedTensor) for name in names):
        return None
    device_type, lora = hidden.device.type, None
    if parametrize.is_parametrized(module):
        adapted = read_adapted(module)
        if adapted is None:
            return None
        read, lora = adapted.experts, adapted.lora
    else:
        read = read_experts(module)
    if kernels_of(device_type) is None or fallback_reason(module, read, _NoRefusal) is not None:
        return None
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else read.down.dtype
    experts, hidden = _in_dtype(read, dtype), hidden.to(dtype)
    with torch.autocast(device_type, enabled=False):  # all is in its dtype now
        if lora is None:
            return run_quantized(hidden, index, weights, experts)
        lora = ExpertLora(_cast(lora.up, dtype), _cast(lora.down, dtype))
        return run_quantized_lora(hidden, index, weights, experts, lora, lora_kernels_of(device_type))


class _NoRefusal:
    """Stands for kernels that have the dtypes and sizes of all quantised experts."""

    @staticmethod
    def refusal(experts: Any) -> None:
        return None


def _stored(module: nn.Module, name: str) -> Any:
    """The parameter below what parametrizations make of it."""
    lists: Any = module._modules.get("parametrizations")
    return lists[name].original if lists is not None and name in lists else getattr(module, name, None)


def _in_dtype(read: ExpertWeights, dtype: torch.dtype) -> QuantizedExperts:
    up: Any = read.up
    down: Any = read.down
    return QuantizedExperts(
        up.stack(dtype),
        down.stack(dtype),
        None if read.up_bias is None else read.up_bias.to(dtype),
        None if read.down_bias is None else read.down_bias.to(dtype),
        read.has_gate,
        read.is_concatenated,
        read.activation,
        read.apply,
    )


def _cast(adapter: LowRank | None, dtype: torch.dtype) -> LowRank | None:
    return None if adapter is None else replace(adapter, a=adapter.a.to(dtype), b=adapter.b.to(dtype))


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
