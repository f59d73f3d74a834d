"""Capacity: the most tokens that an expert takes in one forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .configuration_parts import CapacityConfig
from .moe_context import RouteRecord, RoutingContext, RoutingLink
from .moe_install import install
from .moe_losses import expert_counts
from .moe_parts import LayerPart, register_part
from .moe_router import RouterSite, get_router
from .moe_structure import LayerPlan


# Under this name the record keeps the capacity that was applied.
CAPACITY = "capacity"


def expert_capacity(counts: torch.Tensor, factor: float, minimum: int) -> torch.Tensor:
    """`max(ceil(sum(counts) / E * factor), minimum)`, the capacity of every expert, an int64 scalar.

    Args:
        counts: (E,) how many tokens chose each expert.
        factor: relative to an even load.
        minimum: the least capacity.
    """
    # The product is taken in float64, and a hair is left for its rounding: 20 / 4 * 1.2 must not become 7.
    even = counts.sum().double() * (factor / len(counts))
    return (even * (1 - 1e-12)).ceil().long().clamp(min=minimum)


def keep_within_capacity(
    index: torch.Tensor, priority: torch.Tensor, num_experts: int, capacity: torch.Tensor
) -> torch.Tensor:
    """Which slots keep their expert: of each expert, the `capacity` slots of highest priority.

    Args:
        index: (T, K) experts; `num_experts` and above for slots that take no part, which are kept.
        priority: (T, K), higher goes first. Equal ones go by slot, then by token: all first choices before all second.
        num_experts: E.
        capacity: of every expert, a scalar.

    Returns:
        (T, K) bool.
    """
    experts = index.T.reshape(-1).clamp(max=num_experts)  # slot by slot
    order = priority.T.reshape(-1).argsort(descending=True, stable=True)
    order = order[experts[order].argsort(stable=True)]  # by expert, and by priority among its slots
    sizes = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device)
    sizes = sizes.scatter_add(0, experts, torch.ones_like(experts))
    begin = sizes.cumsum(0) - sizes
    place = torch.arange(len(order), device=index.device) - begin[experts[order]]
    kept = (place < capacity) | (experts[order] == num_experts)
    return torch.zeros_like(kept).scatter(0, order, kept).view(index.shape[1], -1).T


class CapacityGate(nn.Module):
    """Installed in front of a router: tokens above the capacity of an expert lose it."""

    moe_capacity: CapacityConfig
    moe_link: RoutingLink
    moe_site: RouterSite

    def decide(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> RouteRecord:
        """As the router's, with the slots that are dropped set to nobody. The record's `choices` are those before."""
        record: RouteRecord = super().decide(hidden, *args, **kwargs)
        config: CapacityConfig = self.moe_capacity
        factor = config.factor if self.training else config.eval_factor
        if factor is None:
            return record
        context = self.moe_link.slots.layer_context
        mask = None if context is None else context.token_mask(len(record.index))
        experts, real = record.index, record.num_experts
        if mask is not None:  # padding takes no place
            experts = experts.masked_fill(~mask.to(experts.device)[:, None], real)
        capacity = expert_capacity(expert_counts(experts, real), factor, config.minimum)
        keep = keep_within_capacity(experts, self._priority(record, context), real, capacity)
        weights = record.weights.masked_fill(~keep, 0)
        if config.renormalize:
            kept = weights.sum(dim=-1, keepdim=True)
            weights = weights * torch.where(kept == 0, 1, record.weights.sum(dim=-1, keepdim=True) / kept)
        record.extras[CAPACITY] = capacity
        record.choices = record.chosen
        record.index, record.weights = record.index.masked_fill(~keep, real), weights
        return record

    def _priority(self, record: RouteRecord, context: RoutingContext | None) -> torch.Tensor:
        """(T, K), by the policy."""
        if self.moe_capacity.policy == "position":
            return torch.zeros_like(record.weights)
        if self.moe_capacity.policy == "score":
            scores = record.scores.detach()
            return scores.gather(-1, record.chosen.clamp(max=scores.shape[-1] - 1))

        def make(generator: torch.Generator | None) -> torch.Tensor:
            return torch.rand(record.index.shape, generator=generator, device=record.index.device)

        return make(None) if context is None else context.draw(self.moe_site.order, "capacity", make)


@register_part("capacity")
class CapacityPart(LayerPart):
    """A bound on the tokens of each expert."""

    @classmethod
    def check(cls, config: CapacityConfig, plan: LayerPlan) -> None:
        router = plan.parts.router
        if router is None:
            raise ValueError(
                "`capacity` bounds what a router of this package chooses, and the declaration has none; add one, such "
                'as `"router": {"type": "top_k"}`.'
            )
        if get_router(router.type).mixes_tokens:
            raise ValueError(f"`capacity` drops tokens, and the `{router.type}` router mixes them.")

    @classmethod
    def install(
        cls,
        config: CapacityConfig,
        plan: LayerPlan,
        block: nn.Module,
        gate: nn.Module,
        experts: nn.Module,
        link: RoutingLink,
    ) -> None:
        install(gate, CapacityGate, moe_capacity=config)
