"""What a training run trains, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..modeling.moe_lora import STACK, adapter_names
from .freezing import ExpertMask, adapter_routers, moe_parts


@dataclass(frozen=True)
class ParameterReport:
    """Numbers of trained and frozen parameters.

    Attributes:
        trained, frozen: over the whole model.
        routers: layer keys whose router is trained.
        experts: the trained experts of every MoE layer, by layer key.
        num_experts: the number of experts, by layer key.
        adapters: trained parameters of adapters, without their routers.
        adapter_routers: keys of the routers of LoRA experts that are trained.
    """

    trained: int
    frozen: int
    routers: tuple[str, ...]
    experts: dict[str, tuple[int, ...]]
    num_experts: dict[str, int]
    adapters: int = 0
    adapter_routers: tuple[str, ...] = ()

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
            own = (p for name, p in part.experts.named_parameters() if not name.startswith(f"{STACK}."))
            some = any(parameter.requires_grad for parameter in own)
            selected = every[part.num_experts] if mask is None else mask.trained[part.key]
            experts[part.key] = selected if some else ()
        routers = tuple(p.key for p in parts if any(q.requires_grad for q in p.router.parameters()))
        names, gates = adapter_names(model), adapter_routers(model)
        of_gates = {id(parameter) for gate in gates.values() for parameter in gate.parameters()}
        adapters = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if name in names and parameter.requires_grad and id(parameter) not in of_gates
        )
        trained_gates = tuple(key for key, gate in gates.items() if any(p.requires_grad for p in gate.parameters()))
        counts = {part.key: part.num_experts for part in parts}
        return cls(trained, total - trained, routers, experts, counts, adapters, trained_gates)

    def __str__(self) -> str:
        total = max(self.trained + self.frozen, 1)
        lines = [
            f"Training {self.trained:,} of {total:,} parameters ({100 * self.trained / total:.1f} %); "
            f"{self.frozen:,} stay frozen.",
        ]
        if self.experts or not self.adapters:
            lines.append(f"Routers trained: {len(self.routers)} of {len(self.experts)} layers.")
        if self.adapters:
            lines.append(
                f"Adapters trained: {self.adapters:,} parameters, and {len(self.adapter_routers)} routers of theirs."
            )
        groups: dict[tuple[tuple[int, ...], int], list[str]] = {}
        for key, experts in self.experts.items():
            groups.setdefault((experts, self.num_experts[key]), []).append(key)
        for (experts, count), keys in groups.items():
            which = "all" if len(experts) == count else ", ".join(map(str, experts)) or "none"
            lines.append(f"Experts trained: {which} of {count} in the layers {', '.join(keys)}.")
        return "\n".join(lines)
