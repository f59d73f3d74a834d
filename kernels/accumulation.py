"""Memory for the gradients of expert weights.

The gradient of a stack of experts is as large as the stack. Made as a tensor of its own and then added to the `.grad`
of an earlier micro-batch, it is written, read again and thrown away: on a CPU most of that time are page faults. So it
is added where it will end up. And where a step of the optimizer has dropped the last one, its memory is taken again.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary


_LEAST_BYTES = 2**20  # below that, allocators keep memory by themselves
# Parameter -> a tensor of its gradient's shape, and how often its storage is referred to while nobody else uses it.
_kept: Any = WeakTensorKeyDictionary()
_lock = threading.Lock()


def gradient_memory(parameter: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor for the gradient of `parameter` on a CPU, with any content: on the memory of an earlier one
    that nobody holds any more, or on new memory.

    Memory is kept for parameters of a model in one process, until a pass without gradients (`release_memory`).
    Processes whose gradients are reduced have buffers for that, and split models are to use little memory.
    """
    keeps = isinstance(parameter, nn.Parameter) and parameter.nbytes >= _LEAST_BYTES
    if not keeps or _is_distributed() or not hasattr(torch._C, "_storage_Use_Count"):
        return torch.empty_like(parameter, memory_format=torch.contiguous_format)
    with _lock:
        memory, idle = _kept.get(parameter, (None, 0))
        # Users may keep a gradient, or parts of it, after `.grad` is set anew.
        if memory is None or not _like(memory, parameter) or _uses(memory) != idle:
            memory = torch.empty_like(parameter, memory_format=torch.contiguous_format, requires_grad=False)
            _kept[parameter] = memory, _uses(memory)
        # Another tensor on the same memory: autograd takes a gradient over only where it has the last reference.
        return memory.detach()


def release_memory(*parameters: torch.Tensor) -> None:
    """Give the memory of gradients back, where some is kept."""
    if len(_kept):
        for parameter in parameters:
            _kept.pop(parameter, None)


def _uses(tensor: torch.Tensor) -> int:
    uses: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return uses


def _like(tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    return (tensor.shape, tensor.dtype, tensor.device) == (parameter.shape, parameter.dtype, parameter.device)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


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
    if not _like(grad, parameter):
        return None
    if leaf._backward_hooks or leaf._post_accumulate_grad_hooks:
        return None
    if _is_distributed():
        return None
    try:
        accumulates = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # the gradient of this leaf is asked for and not accumulated
        return None
    return grad if accumulates else None
