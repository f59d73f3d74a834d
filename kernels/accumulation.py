"""Gradients of expert weights added where they will end up.

The gradient of a stack of experts is as large as the stack. Made as a tensor of its own and then added to the `.grad`
of an earlier micro-batch, it is written, read again and thrown away: on a CPU most of that time are page faults.
"""

from __future__ import annotations

from typing import Any

import torch


def gradient_in_place(ctx: Any, place: int, parameter: torch.Tensor) -> torch.Tensor | None:
    """The `.grad` that the running backward is about to add to, where adding to it at once is the same; else `None`.

    It is the same where nobody sees the difference: no hooks that want the new gradient by itself, no processes whose
    gradients are reduced, no graph of the backward pass; and where the backward pass is one that accumulates into
    leaves at all (`loss.backward()`), not one that returns gradients (`torch.autograd.grad`).

    Args:
        ctx: of the autograd function whose backward runs.
        place: of the parameter among the function's inputs.
        parameter: as the function saved it.
    """
    node = ctx.next_functions[place][0]
    leaf = getattr(node, "variable", None)  # only a node that accumulates into a leaf has one
    if leaf is None or torch.is_grad_enabled():
        return None
    grad = leaf.grad
    if grad is None or type(grad) is not torch.Tensor or not grad.is_contiguous() or grad.requires_grad:
        return None
    if (grad.shape, grad.dtype, grad.device) != (parameter.shape, parameter.dtype, parameter.device):
        return None
    if leaf._backward_hooks or leaf._post_accumulate_grad_hooks:
        return None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    try:
        accumulates = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # the gradient of this leaf is asked for and not accumulated
        return None
    return grad if accumulates else None
