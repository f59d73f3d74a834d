"""The kernels as functions of tensors, for those who have no model of Transformers: what an export offers."""

from __future__ import annotations

import importlib.util
from typing import Any, get_args

import torch

from . import dispatch, operators
from .expert_weights import ActivationKind, ExpertWeights, Layout
from .route_rule import RouteRule


__all__ = ["RouteRule", "experts", "route"]


def experts(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_proj_bias: torch.Tensor | None = None,
    down_proj_bias: torch.Tensor | None = None,
    *,
    activation: ActivationKind = "silu",
    alpha: float = 1.0,
    limit: float | None = None,
    shift: float = 0.0,
    has_gate: bool = True,
    is_transposed: bool = False,
    is_concatenated: bool = True,
) -> torch.Tensor:
    """`sum_k weights[t, k] * expert(index[t, k], hidden[t])`, with gradients, on a CPU or a GPU, also compiled.

    T tokens, K slots of a token, E experts, H hidden, I intermediate.

    Args:
        hidden: (T, H).
        index: (T, K) integers. An id from E on is an unused slot: it costs nothing, its weight is not read.
        weights: (T, K).
        gate_up_proj: (E, 2I, H), gate rows before up rows; (E, I, H) without a gate.
        down_proj: (E, H, I).
        gate_up_proj_bias, down_proj_bias: (E, 2I) or (E, I), and (E, H).
        activation: of the gate: "silu", "gelu", "gelu_tanh" or "relu"; without a gate also "relu2" and "identity".
        alpha, limit, shift: an expert computes `act(alpha * min(gate, limit)) / alpha * (clamp(up, -limit, limit) +
            shift)`, where `None` is no limit and `alpha` goes with "silu" alone.
        has_gate: whether `gate_up_proj` holds gate and up.
        is_transposed: whether the last two axes of both projections are swapped.
        is_concatenated: gate rows before up rows; else they alternate.

    Returns:
        (T, H) in the dtype of `hidden`.

    Raises:
        ValueError: for shapes that do not fit, an unknown activation, and devices without kernels.
        TypeError: for dtypes that the kernels do not compute in.
    """
    kernels: Any = dispatch.kernels_of(hidden.device.type)
    if kernels is None:
        raise ValueError(
            f"there are no kernels for `{hidden.device.type}`: CPUs have some, and with Triton NVIDIA's Hopper GPUs, "
            "and others where `HF_MOE_EXT_TRITON=1` is in the environment."
        )
    if activation not in (allowed := get_args(ActivationKind)):
        raise ValueError(f"`activation` must be one of {allowed}, got {activation!r}.")
    parameters = (gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias)
    layout: Layout = (activation, float(alpha), limit, float(shift), has_gate, is_transposed, is_concatenated)
    read = ExpertWeights.from_layout(layout, *parameters)
    _check(hidden, index, weights, read)
    reason = kernels.refusal(read)
    if reason is not None:
        raise TypeError(f"the kernels cannot run these experts: {reason}.")
    if torch.compiler.is_compiling():
        return operators.run_tensors(hidden, index, weights, parameters, layout)
    return dispatch.run(hidden, index, weights, read, kernels)


def _check(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights) -> None:
    if experts.up.ndim != 3 or experts.down.ndim != 3:
        raise ValueError("`gate_up_proj` and `down_proj` must have three axes.")
    number, wide, narrow = experts.num_experts, experts.hidden_size, experts.intermediate_size
    rows = (2 if experts.has_gate else 1) * narrow
    if hidden.ndim != 2 or hidden.shape[1] != wide:
        raise ValueError(f"`hidden` must be (T, {wide}), got {tuple(hidden.shape)}.")
    if index.ndim != 2 or index.shape != weights.shape or len(index) != len(hidden):
        raise ValueError(
            f"`index` and `weights` must be ({len(hidden)}, K), got {tuple(index.shape)} and {tuple(weights.shape)}."
        )
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"`index` must hold integers, got {index.dtype}.")
    found = {
        tensor.dtype for tensor in (experts.up, experts.down, experts.up_bias, experts.down_bias) if tensor is not None
    }
    if len(found) > 1 or not experts.up.is_floating_point() or not hidden.is_floating_point():
        raise TypeError(
            f"weights must be of one floating point type, got {found}, and tokens of any, got {hidden.dtype}."
        )
    wanted = {
        "gate_up_proj": (experts.up, (number, wide, rows) if experts.is_transposed else (number, rows, wide)),
        "gate_up_proj_bias": (experts.up_bias, (number, rows)),
        "down_proj_bias": (experts.down_bias, (number, wide)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"`{name}` must be {shape}, got {tuple(tensor.shape)}.")


def route(logits: torch.Tensor, k: int, **options: Any) -> tuple[torch.Tensor, ...]:
    """Choose k of the columns for each row and weigh them, with gradients. One launch on a GPU.

    Args:
        logits: (T, C) float32, bfloat16 or float16.
        k: K, from 1 to C.
        **options: `rule` (a `RouteRule`: softmax, top-k, divided by the sum, where it is not given), `bias` (C,),
            `counts` (T,), `return_lse`.

    Returns:
        weights (T, K) float32, index (T, K) int32, and lse (T,) if asked for.

    Raises:
        ValueError: for shapes, dtypes and options that do not go together, and for tensors that are not on a GPU.
        ImportError: where Triton is missing.
    """
    if importlib.util.find_spec("triton") is None:
        raise ImportError("`route` needs the package `triton`.")
    import triton

    from . import triton_router

    if not logits.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"`route` runs on a GPU, got a tensor on `{logits.device}`.")
    return triton_router.route(logits, k, **options)
