"""The experts as operators of PyTorch, for graphs: `torch.compile` sees one node forward and one backward.

    moe_ext::experts            (hidden, index, weights, tensors, layout, keep) -> (out, kept)
    moe_ext::experts_backward   (grad, ..., kept, needs) -> gradients

Shapes do not depend on the routing.
"""

from __future__ import annotations

from typing import Any

import torch

from .dispatch import fallback_reason, kernels_of
from .expert_weights import ExpertWeights, Layout, read_experts
from .namespace import NAMESPACE


_NAMES = "Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias"
_LAYOUT = "str kind, float alpha, float? limit, float shift, bool has_gate, bool is_transposed, bool is_concatenated"
_INPUTS = f"Tensor hidden, Tensor index, Tensor weights, {_NAMES}, {_LAYOUT}"
_FIRST_PARAMETER, _FIRST_LAYOUT = 3, 7


def _experts(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, index, weights, up, down, up_bias, down_bias, *layout, keep = args
    experts = ExpertWeights.from_layout(tuple(layout), up, down, up_bias, down_bias)
    kernels: Any = kernels_of(hidden.device.type)
    kept = _kept_like(*args)  # for all slots: how many rows are in use is not known to the graph
    if not keep:
        return kernels.infer(hidden, index, weights, experts), kept
    out, kept = kernels.forward(hidden, index, weights, experts, kept)
    return out, kept


def _kept_like(*args: Any) -> torch.Tensor:
    hidden, index, _, up, down, *_ = args
    is_transposed, keep = args[-3], args[-1]
    return hidden.new_empty((index.numel() if keep else 0, up.shape[2 if is_transposed else 1]), dtype=down.dtype)


def _experts_backward(*args: Any) -> list[torch.Tensor]:
    grad, hidden, index, weights, up, down, up_bias, down_bias, *layout, kept, needs = args
    experts = ExpertWeights.from_layout(tuple(layout), up, down, up_bias, down_bias)
    kernels: Any = kernels_of(grad.device.type)
    found = kernels.backward(grad, hidden, index, weights, experts, kept, needs)
    return [grad.new_empty(0) if gradient is None else gradient for gradient in found]


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(f"experts({_INPUTS}, bool keep) -> (Tensor, Tensor)")
_library.define(f"experts_backward(Tensor grad, {_INPUTS}, Tensor kept, bool[] needs) -> Tensor[]")
for _key in ("CPU", "CUDA"):
    _library.impl("experts", _experts, _key)
    _library.impl("experts_backward", _experts_backward, _key)


@torch.library.register_fake(f"{NAMESPACE}::experts", lib=_library)
def _experts_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(args[0], memory_format=torch.contiguous_format), _kept_like(*args)


@torch.library.register_fake(f"{NAMESPACE}::experts_backward", lib=_library)
def _experts_backward_fake(*args: Any) -> list[torch.Tensor]:
    grad, hidden, _, *tensors = args[:8]
    needs = args[-1]
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else grad.new_empty(0)
        for tensor, needed in zip((hidden, *tensors), needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_FIRST_LAYOUT], output[1])
    ctx.layout = inputs[_FIRST_LAYOUT:-1]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    *inputs, kept = ctx.saved_tensors
    places = (0, *range(2, _FIRST_LAYOUT))
    found: list[torch.Tensor | None] = [None] * (len(inputs) + len(ctx.layout) + 1)
    if grad is not None:
        needs = [ctx.needs_input_grad[place] for place in places]
        gradients = _operators.experts_backward(grad, *inputs, *ctx.layout, kept, needs)
        for place, needed, gradient in zip(places, needs, gradients, strict=True):
            found[place] = gradient if needed else None
    return tuple(found)


torch.library.register_autograd(f"{NAMESPACE}::experts", _differentiate, setup_context=_setup_context, lib=_library)
_operators = getattr(torch.ops, NAMESPACE)


@torch._dynamo.assume_constant_result
def constant_layout(module: Any, device_type: str) -> Any:
    """The layout of a module, for a graph: looked at once, when the graph is made. `None` if no kernel can run it."""
    kernels, experts = kernels_of(device_type), read_experts(module)
    return None if kernels is None or fallback_reason(module, experts, kernels) is not None else experts.layout


def run(experts: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, layout: Any) -> torch.Tensor:
    """(T, H), (T, K), (T, K) -> (T, H), as one node."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    up_bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    down_bias = experts.down_proj_bias if experts.has_bias else None
    parameters = (getattr(experts, name), experts.down_proj, up_bias, down_bias)
    return run_tensors(hidden, index, weights, parameters, layout)


def run_tensors(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    layout: Layout,
) -> torch.Tensor:
    """The same without a module: `parameters` are up, down and their biases."""
    tensors = (hidden, weights, *parameters)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out: torch.Tensor = _operators.experts(hidden, index, weights, *parameters, *layout, keep)[0]
    return out
