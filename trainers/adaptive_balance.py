"""A weight of the load-balancing loss that follows the load, layer by layer. Skywork-MoE (2406.06563), section 4.2."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..modeling.moe_capacity import CAPACITY
from ..modeling.moe_context import RoutingContext
from ..modeling.moe_losses import expert_counts
from ..modeling.moe_router import MoERouter


_KEPT = 0.99  # of the weight, from step to step
_LARGEST = 0.01


class AdaptiveBalance:
    """After each optimizer step, `a <- 0.99 a + 0.01 min(rate d, 0.01)` in every layer whose router has a
    load-balancing loss. a is its weight, `balance_coef` at first, and d the layer's drop rate in that step.

    d is the share of token-expert pairs above the capacity `capacity_factor T K / E` of the experts, forward by
    forward, where T K are the pairs that count and E is the number of experts. Nothing is dropped for it; where a
    layer has a capacity that drops, that one counts.

    Args:
        routers: of the model.
        rate: xi in the paper, 1/5 there.
        capacity_factor: relative to an even load.

    Raises:
        ValueError: where no router has a load-balancing loss.
    """

    def __init__(self, routers: Iterable[MoERouter], rate: float, capacity_factor: float) -> None:
        self.rate, self.capacity_factor = rate, capacity_factor
        self.routers = {r.moe_site.key: r for r in routers if r.moe_config.loss_coefs.get("balance")}
        if not self.routers:
            raise ValueError(
                "`adaptive_balance` moves the weight of the load-balancing loss, and no router of this model has one; "
                "declare `balance_coef`, the weight at first."
            )
        self._sums: dict[str, torch.Tensor] = {}

    def begin(self, state: dict[str, float]) -> None:
        """Start with the weights of a checkpoint, or those of the configs."""
        self._sums = {}
        for key, router in self.routers.items():
            value = state.get(key, router.moe_config.balance_coef)
            router.moe_coefs = {"balance": torch.tensor(value, dtype=torch.float32, device=router.own_device)}

    def end(self) -> None:
        """Give the routers the weights of their configs back."""
        for router in self.routers.values():
            router.moe_coefs = None

    @property
    def coefs(self) -> dict[str, float]:
        """The weight of each layer, by key."""
        given = {key: router.moe_coefs for key, router in self.routers.items()}
        return {key: float(coefs["balance"]) for key, coefs in given.items() if coefs is not None}

    @torch.no_grad()
    def update(self, contexts: Iterable[RoutingContext]) -> None:
        """Count what one forward would have dropped."""
        for context in contexts:
            for key, record in context.all_records().items():
                if key not in self.routers:
                    continue
                mask = context.token_mask(len(record.index))
                counts = expert_counts(record.chosen, record.num_experts, mask).double()
                capacity = record.extras.get(CAPACITY, counts.sum() * self.capacity_factor / record.num_experts)
                sums = torch.stack([(counts - capacity).clamp(min=0).sum(), counts.sum()])
                self._sums[key] = sums + self._sums[key] if key in self._sums else sums

    @torch.no_grad()
    def step(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move the weights at the end of an optimizer step. `reduce` sums a tensor over all processes, each of which
        must call this."""
        sums, self._sums = self._sums, {}
        none = torch.zeros(2, dtype=torch.float64)
        device = next((value.device for value in sums.values()), none.device)
        packed = reduce(torch.stack([sums.get(key, none).to(device) for key in self.routers]))
        for router, (dropped, assigned) in zip(self.routers.values(), packed, strict=True):
            if router.moe_coefs is None:
                continue
            weight = router.moe_coefs["balance"]
            target = (self.rate * dropped / assigned.clamp(min=1)).clamp(max=_LARGEST).to(weight)
            # In place, so that a compiled forward sees it.
            weight.mul_(_KEPT).add_(target, alpha=1 - _KEPT)
