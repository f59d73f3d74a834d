"""The experts on a GPU, put together from the Triton kernels; the same three functions as in `cpu_experts`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .expert_weights import ExpertWeights
from .triton_backward import bias_gradient, down_backward, down_backward_plain, input_gradient, weight_gradient
from .triton_decode import decode, most_slots
from .triton_forward import DTYPES, combine, down_forward, up_forward
from .triton_routing import SlotGroups, group_slots


def refusal(experts: ExpertWeights) -> str | None:
    """Why the kernels cannot run these experts, or `None`."""
    found = {
        tensor.dtype for tensor in (experts.up, experts.down, experts.up_bias, experts.down_bias) if tensor is not None
    }
    if len(found) > 1 or experts.down.dtype not in DTYPES:
        return f"the weights are in {', '.join(sorted(map(str, found)))}"
    return None


def infer(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights) -> torch.Tensor:
    """(T, H), (T, K), (T, K) -> (T, H), without gradients."""
    if index.numel() <= most_slots(experts.num_experts) and experts.activation is not None:
        return decode(hidden, experts, index, weights)
    groups = group_slots(index, experts.num_experts)
    return _forward(hidden, weights, experts, groups, keep=False)[0]


def forward(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H), (T, K), (T, K) -> (T, H), and what `backward` wants beside the inputs.

    Args:
        kept: (S, 2I), filled for as many rows as there are used slots; made where it is not given.
    """
    groups = group_slots(index, experts.num_experts)
    out, pre = _forward(hidden, weights, experts, groups, keep=True)
    assert pre is not None
    return out, pre if kept is None else kept.copy_(pre)


def _forward(
    hidden: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights, groups: SlotGroups, *, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    activated, pre = up_forward(hidden.to(experts.down.dtype), experts, groups, keep=keep)
    if activated is None:
        activated = experts.apply(pre)
    rows = down_forward(activated, experts, groups)
    return combine(rows, groups, weights, len(hidden), out_dtype=hidden.dtype), pre


def backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    kept: torch.Tensor,
    needs: list[bool],
    into: Sequence[torch.Tensor | None] = (None, None),
) -> list[torch.Tensor | None]:
    """Gradients of hidden, weights, up, down, up_bias and down_bias, each where `needs` says so.

    Those of up and down are added to the tensors of `into` where these are given; `None` is returned in their place.
    """
    wants_hidden, wants_weights, wants_up, wants_down, wants_up_bias, wants_down_bias = needs
    groups, transposed = group_slots(index, experts.num_experts), experts.is_transposed
    dtype, grad = experts.down.dtype, grad.to(experts.down.dtype)
    if experts.activation is not None:
        d_pre, weighted, d_weights = down_backward(grad, experts, kept, weights, groups)
    else:
        with torch.enable_grad():
            leaf = kept.detach().requires_grad_()
            activated = experts.apply(leaf)
        d_activated, weighted, d_weights = down_backward_plain(grad, experts, activated.detach(), weights, groups)
        (d_pre,) = torch.autograd.grad(activated, leaf, d_activated)
    found: list[torch.Tensor | None] = [None] * 6
    if wants_hidden:
        rows = input_gradient(d_pre, experts, groups)
        found[0] = combine(rows, groups, None, len(hidden), out_dtype=hidden.dtype)
    if wants_weights:
        found[1] = d_weights.to(weights.dtype)
    if wants_up:
        found[2] = weight_gradient(
            d_pre,
            hidden.to(dtype),
            groups,
            left_is_tokens=False,
            right_is_tokens=True,
            out=dtype,
            transposed=transposed,
            accumulate_into=into[0],
        )
    if wants_down:
        found[3] = weight_gradient(
            grad,
            weighted,
            groups,
            left_is_tokens=True,
            right_is_tokens=False,
            out=dtype,
            transposed=transposed,
            accumulate_into=into[1],
        )
    found[2:4] = [made if given is None else None for made, given in zip(found[2:4], into, strict=True)]
    if wants_up_bias:
        found[4] = bias_gradient(d_pre, groups, is_tokens=False, out=dtype)
    if wants_down_bias:
        found[5] = bias_gradient(grad, groups, weights, is_tokens=True, out=dtype)
    return found
