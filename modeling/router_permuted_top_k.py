"""Top-k with permutation local search."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .moe_context import RouteRecord, RoutingContext
from .moe_permutation import PermutedRouter, PermutedRouterConfig, extra_losses, permute, to_distribution
from .moe_router import RouterSite, register_router
from .router_top_k import TopKRouter, TopKRouterConfig


@dataclass
class PermutedTopKRouterConfig(PermutedRouterConfig, TopKRouterConfig):
    """Config of `PermutedTopKRouter`: that of `TopKRouter`, with a learned permutation of experts (2306.02824)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.permutation_per_selector:
            raise ValueError("`permutation_per_selector=True` needs a gate with several selectors; top-k is one.")


@register_router("permuted_top_k")
class PermutedTopKRouter(PermutedRouter, TopKRouter):
    """Top-k, whose columns and experts are matched during the first steps of training.

    "COMET" (2306.02824), where the permutation goes with every sparse gate. Scores and logits of the record are those
    of experts, that is, after the permutation.
    """

    config_class = PermutedTopKRouterConfig
    replays = False  # the choice is made among permuted experts
    paper = "COMET (2306.02824)"
    needs = "training with a schedule"
    moe_config: PermutedTopKRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> PermutedTopKRouterConfig:
        """A diagonal that is far above the temperature: the permutation starts as the identity."""
        return PermutedTopKRouterConfig(permutation_steps=100, permutation_diagonal=1.0, permutation_coef=0.0)

    @classmethod
    def check(cls, config: TopKRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        super().check(config, site)
        for what, present in (
            ("zero-computation experts", site.zero_experts is not None),
            ("a factor for each expert", site.rule.expert_scale is not None),
            ("a selection bias that the trainer moves", bool(config.bias_update_rate)),
        ):
            if present:
                raise ValueError(f'the `permuted_top_k` router does not go with {what} (layer "{site.key}").')

    def setup(self) -> None:
        super().setup()
        self.setup_permutation()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.reset_permutation()

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        record = super().route(hidden, context, *args, **kwargs)
        matrices = self.permutation(context)
        if matrices is None:
            return record
        size = self.moe_site.num_choices

        def of_experts(values: torch.Tensor) -> torch.Tensor:
            # A gate's "skip" class stands behind the experts.
            return torch.cat([permute(values[:, None, :size], matrices), values[:, size:].float()], dim=-1)

        scores = of_experts(record.scores)
        weights, index = self.permute_slots(record.weights, record.index, matrices)
        return replace(
            record,
            logits=of_experts(record.logits),
            scores=to_distribution(scores),  # rows of a soft permutation sum to nearly 1
            weights=weights,
            index=index,
            extras={**record.extras, **self.permutation_extras(matrices, len(hidden))},
        )

    @staticmethod
    def aux_losses(record: RouteRecord, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return {**TopKRouter.aux_losses(record, mask), **extra_losses(record, mask, "permutation")}
