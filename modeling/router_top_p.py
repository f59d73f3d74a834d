"""Dynamic routing: as many experts as it takes to reach a probability threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import (
    MoERouter,
    RouterSite,
    as_distribution,
    expert_scores,
    register_router,
)
from .router_top_k import check_rule_known


@dataclass
class TopPRouterConfig(RouterConfig):
    """Config of `TopPRouter`. Defaults are those of the paper (2403.07652).

    > Parameters that control the selection

    Args:
        threshold (`float`, *optional*, defaults to 0.4):
            Probability that the chosen experts must exceed together (p in the paper), in (0, 1]. Near 0 it keeps one
            expert, 1 keeps `max_slots`.
        max_slots (`int`, *optional*):
            Most experts a token may use; the number of slots of the routing tensors. `None` means all experts.
        min_experts (`int`, *optional*, defaults to 1):
            Fewest experts a token uses.
        renormalize (`bool`, *optional*, defaults to `False`):
            Whether the weights of the chosen experts are divided by their sum; `None` does as the stock family. The
            paper does not; an upcycled dense model needs it to start as the dense model.
        score (`"softmax"` or `"sigmoid"`, *optional*):
            Map from logits to scores, `None` for the family's. Sigmoid scores are divided by their sum (an extension).
        scale (`float`, *optional*):
            Factor on the weights, `None` for the family's.

    > Parameters that control the auxiliary losses

    Args:
        balance_coef (`float`, *optional*, defaults to 1e-2):
            alpha in the paper.
        entropy_coef (`float`, *optional*, defaults to 1e-4):
            beta in the paper: weight of the dynamic loss, which keeps the router from going flat to use more experts.
    """

    threshold: float = 0.4
    max_slots: int | None = None
    min_experts: int = 1
    renormalize: bool | None = False
    score: Literal["softmax", "sigmoid"] | None = None
    scale: float | None = None
    balance_coef: float = 1e-2
    entropy_coef: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"`threshold` is a probability in (0, 1], got {self.threshold}. For one expert per token take the "
                "router `top_k` with `num_experts_per_tok=1`; 1 keeps `max_slots` experts."
            )
        if self.min_experts < 1:
            raise ValueError(f"`min_experts` must be at least 1, got {self.min_experts}.")
        if self.max_slots is not None and self.max_slots < self.min_experts:
            raise ValueError(f"`max_slots` ({self.max_slots}) must not be below `min_experts` ({self.min_experts}).")


@register_router("top_p")
class TopPRouter(MoERouter):
    """The shortest prefix of experts, in order of probability, whose probabilities sum to more than the threshold.

    "Harder Tasks Need More Experts: Dynamic Routing in MoE Models" (2403.07652), section 3. Position j of the sorted
    experts is kept iff the sum of the strictly earlier ones does not exceed the threshold, so the expert that crosses
    is included. What the dynamic loss does at the paper's weight over 100 billion tokens is not reproduced in the
    tests; they show its direction at larger weights.
    """

    config_class = TopPRouterConfig
    replays = True
    stateless = True
    paper = "Harder Tasks Need More Experts (2403.07652)"
    expert_rows = ()
    moe_config: TopPRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> TopPRouterConfig:
        """Threshold 1 with `top_k` slots keeps exactly the stock top-k."""
        if site.rule.score == "custom":
            raise NotImplementedError("this family's gate has a rule of its own, which a threshold cannot express.")
        config = TopPRouterConfig(threshold=1.0, max_slots=site.top_k, min_experts=site.top_k, renormalize=None)
        config.balance_coef = config.entropy_coef = 0.0
        return config

    @classmethod
    def check(cls, config: TopPRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        for name in ("max_slots", "min_experts"):
            value = getattr(config, name)
            if value is not None and value > site.num_choices:
                raise ValueError(f'`{name}` ({value}) exceeds the {site.num_choices} experts of layer "{site.key}".')
        check_rule_known(config.score, site, True)

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, rule = self.moe_config, self.moe_site.rule
        score = config.score or rule.score
        logits = self.router_logits(hidden, *args, **kwargs)
        raw = expert_scores(logits, score)
        scores = as_distribution(raw, score)
        choice = self.selection_scores(raw, self.selection_bias(*args), rule.groups)

        slots = config.max_slots or self.moe_site.num_choices
        index = choice.topk(slots, dim=-1).indices
        probs = scores.gather(-1, index)
        # Shifted cumulative sum in float32: `cumsum - self` would misplace the cut by rounding.
        earlier = F.pad(probs.detach().cumsum(dim=-1)[..., :-1], (1, 0))
        keep = earlier <= config.threshold
        if config.min_experts > 1:
            keep = keep | (torch.arange(slots, device=logits.device) < config.min_experts)
        if config.threshold == 1:
            keep = torch.ones_like(keep)  # rounding may lift a cumulative sum above 1
        if rule.groups is not None:
            keep = keep & choice.gather(-1, index).isfinite()
        if logits.shape[-1] > self.moe_site.num_choices:
            keep = keep & (index < self.moe_site.num_choices)  # a gate's "skip" class is nobody

        renormalize = config.renormalize
        if renormalize is None:
            renormalize = rule.order == "topk_score" or rule.renormalize
            values = raw
        else:
            values = raw if renormalize else scores
        weights = self.slot_weights(logits, values, index, score=score, renormalize=renormalize, keep=keep)
        weights = self.final_weights(weights, index, config.scale)
        return RouteRecord(logits, scores, weights, index.masked_fill(~keep, self.moe_site.num_choices), config)
