"""What optimizers do to rows of a tensor: decay, and what they remember of them, also in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


_BLOCK = 256  # numbers with one scale in the 8-bit states of bitsandbytes


def check_blocks(optimizer: Any, masks: Mapping[nn.Parameter, list[int]]) -> None:
    """Refuse a state in 8 bits whose blocks go over the end of a frozen expert: zero is rounded there."""
    settings: Any = getattr(optimizer, "args", None)
    if not type(optimizer).__module__.startswith("bitsandbytes.") or getattr(settings, "optim_bits", 32) != 8:
        return
    for parameter, kept in masks.items():
        size = parameter[0].numel()
        ends = [row for row in range(1, len(parameter)) if (row in kept) != (row - 1 in kept)]
        if parameter.numel() >= settings.min_8bit_size and any(row * size % _BLOCK for row in ends):
            raise ValueError(
                f"{type(optimizer).__name__} keeps its state in blocks of {_BLOCK} numbers, and the trained experts "
                f"of a tensor of the shape {list(parameter.shape)} share blocks with frozen ones, which would move. "
                'Use an optimizer whose state is not in 8 bits (`optim="adamw_torch"`), or train whole tensors.'
            )


def clear_state(state: Mapping[str, Any], parameter: nn.Parameter, rows: torch.Tensor) -> None:
    """Set what an optimizer remembers of some rows to zero. In 8 bits, that is the code of zero (bitsandbytes)."""
    for name, value in state.items():
        # Two moments of one kind may be stacked in front (AdEMAMix).
        axis = value.dim() - parameter.dim() if isinstance(value, torch.Tensor) else -1
        if axis in (0, 1) and value.shape[axis:] == parameter.shape:
            code = 0 if value.is_floating_point() else int(state[name.replace("state", "qmap")].abs().argmin())
            value.index_fill_(axis, rows.to(value.device), code)


def decay_rule(optimizer: Any) -> Callable[[nn.Parameter, int, Any, float], None]:
    """How the optimizer would have decayed the rows of one expert: of the weight itself, or through the gradient."""
    name = type(optimizer).__name__.lower()
    if type(optimizer).__module__.startswith("bitsandbytes."):  # its Adam decays the weight, too
        decoupled = any(word in name for word in ("adam", "ademamix", "lion"))
        if decoupled or any(word in name for word in ("sgd", "rmsprop", "adagrad")):
            return _decay_weight if decoupled else _decay_gradient
    if "adamw" in name or getattr(optimizer, "defaults", {}).get("decoupled_weight_decay"):
        return _decay_weight
    if name in ("sgd", "adam"):
        return _decay_gradient
    raise ValueError(
        f"`train_experts` with weight decay is not supported for {type(optimizer).__name__}. Set `weight_decay=0`, or "
        'use an AdamW (`optim="adamw_torch"`), Adam or SGD.'
    )


def _decay_weight(parameter: nn.Parameter, expert: int, lr: Any, decay: float) -> None:
    parameter[expert].mul_(1 - lr * decay)


def _decay_gradient(parameter: nn.Parameter, expert: int, lr: Any, decay: float) -> None:
    assert parameter.grad is not None
    parameter.grad[expert].add_(parameter[expert], alpha=decay)
