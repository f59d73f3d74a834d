"""The consistency loss between two passes whose experts were drawn independently. THOR (2110.04260), section 3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..modeling.moe_router import MoERouter


def consistency_coef(routers: Iterable[MoERouter]) -> float:
    """The weight of the consistency loss that the routers of a model ask for; 0 where none does.

    Raises:
        ValueError: where routers ask for different ones.
    """
    asked = {float(r.moe_config.consistency_coef) for r in routers if hasattr(r.moe_config, "consistency_coef")}
    if len(asked) > 1:
        raise ValueError(
            f"the routers of this model have different values of `consistency_coef`: {sorted(asked)}. The loss "
            "compares outputs of the model, so it has one weight; give all routers the same."
        )
    return asked.pop() if asked else 0.0


def symmetric_kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """`1/2 (KL(p || q) + KL(q || p))` of two sets of logits (..., V), in float32: (...). Both get a gradient."""
    log_first, log_second = first.float().log_softmax(dim=-1), second.float().log_softmax(dim=-1)
    return 0.5 * ((log_first.exp() - log_second.exp()) * (log_first - log_second)).sum(dim=-1)


def consistency_loss(first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor, *, shift: bool) -> torch.Tensor:
    """Mean symmetric KL over the positions that have a label; 0 where none has.

    Args:
        first, second: logits (B, S, V) of the two passes, or (B, V) of a classifier.
        labels: (B, S) or (B,), -100 where there is none.
        shift: whether a position predicts the label of the next one.

    Raises:
        ValueError: where the labels are no classes of the logits.
    """
    if shift:
        first, second, labels = first[:, :-1], second[:, :-1], labels[:, 1:]
    if labels.is_floating_point() or labels.shape != first.shape[:-1]:
        raise ValueError(
            f"the consistency loss compares distributions over classes: labels of shape {tuple(labels.shape)} and "
            f"type {labels.dtype} do not fit logits of shape {tuple(first.shape)}. Set `consistency_coef=0`."
        )
    used = labels.to(first.device) != -100
    return symmetric_kl(first[used], second[used]).sum() / used.sum().clamp(min=1)


def logits_of(outputs: Any) -> torch.Tensor:
    """The logits of a model's output.

    Raises:
        ValueError: where it has none.
    """
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            "losses that compare predictions (consistency, distillation) need the logits, which this model does not "
            "return. Switch off what fuses them into the loss, or those losses."
        )
    return logits
