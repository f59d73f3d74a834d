"""The gate of BASE layers: pick by the logit, weigh by its sigmoid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import MoERouter, RouterSite, as_distribution, expert_scores, register_router


@dataclass
class SigmoidRouterConfig(RouterConfig):
    """Config of `SigmoidRouter`. Defaults are those of the papers (2103.16716, 2204.08396).

    > Parameters that control the selection

    Args:
        num_experts_per_tok (`int`, *optional*, defaults to 1):
            Experts per token (k); `None` for the family's number.
        scale (`float`, *optional*):
            Factor on the weights, `None` for the family's.
    """

    num_experts_per_tok: int | None = 1
    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts_per_tok is not None and self.num_experts_per_tok < 1:
            raise ValueError(f"`num_experts_per_tok` must be at least 1, got {self.num_experts_per_tok}.")


@register_router("sigmoid")
class SigmoidRouter(MoERouter):
    """The experts with the largest logits, each weighted by the sigmoid of its own logit; weights do not sum to 1.

    "BASE Layers: Simplifying Training of Large, Sparse Models" (2103.16716), section 3, as at test time, and
    "StableMoE" (2204.08396), section 3. The balanced assignment of BASE in training, which solves a linear program
    over the batch, is not part of it; nor are the two stages of StableMoE.
    """

    config_class = SigmoidRouterConfig
    replays = True
    paper = "BASE Layers (2103.16716), StableMoE (2204.08396)"
    expert_rows = ()
    moe_config: SigmoidRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> SigmoidRouterConfig:
        """The stock top-k, where the family has sigmoid weights that are not divided by their sum."""
        rule = site.rule
        if (rule.score, rule.order, rule.renormalize) != ("sigmoid", "score_topk", False):
            raise NotImplementedError("this family's weights are not the sigmoids of the logits.")
        return SigmoidRouterConfig(num_experts_per_tok=site.top_k)

    @classmethod
    def check(cls, config: SigmoidRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        k = config.num_experts_per_tok or site.top_k
        if k > site.num_choices:
            raise ValueError(f'`num_experts_per_tok` ({k}) exceeds the {site.num_choices} experts of "{site.key}".')
        if site.rule.groups is not None and site.rule.groups[0] > 1:
            count, keep, _ = site.rule.groups
            if k > site.num_experts // count * keep:
                raise ValueError(f"the {keep} expert groups that a token may use hold fewer than k={k} experts.")

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, site, rule = self.moe_config, self.moe_site, self.moe_site.rule
        logits = self.router_logits(hidden, *args, **kwargs)
        scores = expert_scores(logits, "sigmoid")
        bias = self.selection_bias(*args)
        # A bias and the sum over a group are made for scores. Logits have the same order, but do not saturate.
        plain = bias is None and rule.groups is None
        choice = logits.float() if plain else self.selection_scores(scores, bias, rule.groups)
        index = choice.topk(config.num_experts_per_tok or site.top_k, dim=-1).indices
        weights = self.slot_weights(logits, scores, index, score="sigmoid", renormalize=False)
        weights = self.final_weights(weights, index, config.scale)
        return RouteRecord(logits, as_distribution(scores, "sigmoid"), weights, index, config)
