"""Distillation: a model learns from the predictions of a teacher, for the whole training or its first part.

The staged form is that of Mixture-of-Students: DeepSpeed-MoE (2201.05596), section 4.2, finds that a teacher helps at
first and holds back later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .consistency import logits_of


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, *, temperature: float, shift: bool
) -> torch.Tensor:
    """Mean over the positions that have a label of `T^2 KL(softmax(teacher / T) || softmax(student / T))`, in float32.

    The factor T^2 keeps gradients as large at every temperature. 0 where no position has a label.

    Args:
        student, teacher: logits (B, S, V), or (B, V) of classifiers. The teacher's get no gradient.
        labels: (B, S) or (B,), -100 where there is none.
        temperature: T.
        shift: whether a position predicts the label of the next one.

    Raises:
        ValueError: where logits and labels do not fit each other.
    """
    if shift:
        student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
    if student.shape != teacher.shape or labels.shape != student.shape[:-1]:
        raise ValueError(
            f"distillation compares distributions over the same tokens: logits of shape {tuple(student.shape)}, the "
            f"teacher's of shape {tuple(teacher.shape)} and labels of shape {tuple(labels.shape)} do not fit."
        )
    used = labels.to(student.device) != -100
    wanted = (teacher.detach()[used.to(teacher.device)].to(student.device).float() / temperature).log_softmax(dim=-1)
    found = (student[used].float() / temperature).log_softmax(dim=-1)
    divergence = (wanted.exp() * (wanted - found)).sum()
    return temperature**2 * divergence / used.sum().clamp(min=1)


class Teacher:
    """The model that another one learns from, in evaluation mode and without gradients.

    Args:
        model: the teacher.
        student: the model that learns, whose vocabulary must be the same.

    Raises:
        TypeError: for a teacher that is no model of Transformers.
        ValueError: where the vocabularies differ, or the teacher is the student.
    """

    def __init__(self, model: Any, student: nn.Module) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"`teacher` must be a model of Transformers, got {type(model).__name__}.")
        if model is student:
            raise ValueError("`teacher` is the model that is trained; it has to be another one, such as a copy.")
        sizes = [getattr(getattr(m, "config", None), "vocab_size", None) for m in (model, student)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the teacher has a vocabulary of {sizes[0]}, the model one of {sizes[1]}.")
        self.model = model.eval().requires_grad_(False)

    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Its logits for a batch."""
        own = {name: value for name, value in inputs.items() if name != "labels"}
        device = next((v.device for v in own.values() if isinstance(v, torch.Tensor)), self.model.device)
        if self.model.device != device and getattr(self.model, "hf_device_map", None) is None:
            self.model.to(device)
        with torch.no_grad():
            return logits_of(self.model(**own))
