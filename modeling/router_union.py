"""The router of Union of Experts: which of the parts of one dense block a token uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import MoERouter, RouterSite, register_router
from .moe_schedules import ramp, schedule_fraction


@dataclass
class UnionRouterConfig(RouterConfig):
    """Config of `UnionRouter`.

    > Parameters that control the selection

    Args:
        num_experts_per_tok (`int`, *optional*):
            Experts per token at the end of the schedule (k), `None` for the site's number.
        weights (`"one"`, `"soft"` or `"none"`, *optional*, defaults to `"one"`):
            Weight of a chosen expert: 1 with the gradient of its probability; its probability times the number of
            experts; or 1 without a gradient, as in the authors' language model, whose router does not learn.
        anneal (`bool`, *optional*, defaults to `True`):
            Whether training starts with all experts, which is the dense block, and goes down to k.
        steps (`int`, *optional*):
            Optimizer steps until k is reached. `None` means the whole training.

    > Parameters that change over training

    A model that was never trained uses all experts where `anneal` is set.
    """

    num_experts_per_tok: int | None = None
    weights: Literal["one", "soft", "none"] = "one"
    anneal: bool = True
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_experts_per_tok", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.steps is not None and not self.anneal:
            raise ValueError(f"`steps` ({self.steps}) goes with `anneal=True`; otherwise k is constant.")

    @property
    def schedule_steps(self) -> int | None:
        return self.steps


@register_router("union")
class UnionRouter(MoERouter):
    """The k best of a softmax, each with weight one: experts are parts of a block, whose sum is the block.

    "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer" (2503.02495), token by
    token, so that a choice does not depend on other tokens; its code normalises over the batch. Nothing is
    renormalised: leaving parts out lowers the sum, as switching them off in the dense block does.
    """

    config_class = UnionRouterConfig
    paper = "Union of Experts (2503.02495)"
    needs = "experts that are parts of a dense block"
    expert_rows = ()
    moe_config: UnionRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> RouterConfig:
        raise NotImplementedError("its experts have weight one each, which no gate of a stock family gives them.")

    @classmethod
    def check(cls, config: UnionRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        k = config.num_experts_per_tok or site.top_k
        if k > site.num_experts:
            raise ValueError(f'`num_experts_per_tok` ({k}) exceeds the {site.num_experts} experts of "{site.key}".')
        if site.zero_experts is not None:
            raise ValueError("the `union` router chooses parts of a block; zero-computation experts are none.")

    @classmethod
    def num_slots(cls, config: Any, site: RouterSite) -> int:
        k: int = config.num_experts_per_tok or site.top_k
        return site.num_experts if config.anneal else k

    def setup(self) -> None:
        if self.moe_config.anneal:
            self.use_progress()

    def active(self) -> Any:
        """Experts of a token now."""
        site, config = self.moe_site, self.moe_config
        k = config.num_experts_per_tok or site.top_k
        if not config.anneal:
            return k
        return ramp(schedule_fraction(self.moe_progress, config.steps), site.num_experts, k).round()

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        site, config = self.moe_site, self.moe_config
        logits = self.router_logits(hidden, *args, **kwargs)
        scores = logits.float().softmax(dim=-1)
        chosen, index = scores.topk(self.num_slots(config, site), dim=-1)
        weights = torch.ones_like(chosen)
        if config.weights == "one":
            weights = 1 + (chosen - chosen.detach())
        elif config.weights == "soft":
            weights = site.num_experts * chosen
        unused = (torch.arange(index.shape[-1], device=index.device) >= self.active()).expand_as(index)
        weights = weights.masked_fill(unused, 0)
        return RouteRecord(logits, scores, weights, index.masked_fill(unused, site.num_choices), config)
