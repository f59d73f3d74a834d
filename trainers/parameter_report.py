"""What a training run trains, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .freezing import ExpertMask, moe_parts


@dataclass(frozen=True)
class ParameterReport:
    """Numbers of trained and frozen parameters.

    Attributes:
        trained, frozen: over the whole model.
        routers: layer keys whose router is trained.
        experts: the trained experts of every MoE layer, by layer key.
        num_experts: the number of experts, by layer key.
    """

    trained: int
    frozen: int
    routers: tuple[str, ...]
    experts: dict[str, tuple[int, ...]]
    num_experts: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, mask: ExpertMask | None = None) -> ParameterReport:
        """The report of a model, with the experts that `train_experts` selected."""
        total = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        trained -= mask.num_masked() if mask is not None else 0
        parts = moe_parts(model)
        every = {count: tuple(range(count)) for count in {part.num_experts for part in parts}}
        experts = {}
        for part in parts:
            some = any(parameter.requires_grad for parameter in part.experts.parameters())
            selected = every[part.num_experts] if mask is None else mask.trained[part.key]
            experts[part.key] = selected if some else ()
        routers = tuple(p.key for p in parts if any(q.requires_grad for q in p.router.parameters()))
        return cls(trained, total - trained, routers, experts, {part.key: part.num_experts for part in parts})

    def __str__(self) -> str:
        total = max(self.trained + self.frozen, 1)
        lines = [
            f"Training {self.trained:,} of {total:,} parameters ({100 * self.trained / total:.1f} %); "
            f"{self.frozen:,} stay frozen.",
            f"Routers trained: {len(self.routers)} of {len(self.experts)} layers.",
        ]
        groups: dict[tuple[tuple[int, ...], int], list[str]] = {}
        for key, experts in self.experts.items():
            groups.setdefault((experts, self.num_experts[key]), []).append(key)
        for (experts, count), keys in groups.items():
            which = "all" if len(experts) == count else ", ".join(map(str, experts)) or "none"
            lines.append(f"Experts trained: {which} of {count} in the layers {', '.join(keys)}.")
        return "\n".join(lines)
