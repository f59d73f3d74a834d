"""Expert choice: every expert picks its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import MoERouter, RouterSite, as_distribution, expert_scores, register_router
from .router_top_k import check_rule_known


@dataclass
class ExpertChoiceRouterConfig(RouterConfig):
    """Config of `ExpertChoiceRouter`. Defaults are those of the paper (2202.09368).

    > Parameters that control the selection

    Args:
        capacity_factor (`float`, *optional*, defaults to 2.0):
            Mean number of experts per token (c in the paper): each of E experts picks `capacity_factor * T / E` of T
            tokens, rounded up.
        max_slots (`int`, *optional*):
            Most experts a token may use; the number of slots of the routing tensors. A token that more experts picked
            keeps its best ones. `None` means all experts.
        score (`"softmax"` or `"sigmoid"`, *optional*, defaults to `"softmax"`):
            Map from logits to scores, over the experts of a token. `None` for the family's.
        renormalize (`bool`, *optional*, defaults to `False`):
            Whether the weights of a token are divided by their sum; `None` does as the stock family. The paper does
            not; Sparse Upcycling (2212.05055) does for vision models, so that copies start near the dense model.
        scale (`float`, *optional*):
            Factor on the weights, `None` for the family's.
        allow_non_causal (`bool`, *optional*, defaults to `False`):
            Whether the router may stand in layers whose attention is causal. There it leaks: whether an expert picks a
            token depends on later ones. Such a model does not generate.
    """

    capacity_factor: float = 2.0
    max_slots: int | None = None
    score: Literal["softmax", "sigmoid"] | None = "softmax"
    renormalize: bool | None = False
    scale: float | None = None
    allow_non_causal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.capacity_factor <= 0:
            raise ValueError(f"`capacity_factor` must be positive, got {self.capacity_factor}.")
        if self.max_slots is not None and self.max_slots < 1:
            raise ValueError(f"`max_slots` must be at least 1, got {self.max_slots}.")


@register_router("expert_choice")
class ExpertChoiceRouter(MoERouter):
    """Every expert takes the tokens of the batch with the highest scores for it, the same number for each expert.

    "Mixture-of-Experts with Expert Choice Routing" (2202.09368), section 3.2. Tokens that count are those of the whole
    batch; padding is never picked and does not raise the capacity, so it changes nothing.
    """

    config_class = ExpertChoiceRouterConfig
    paper = "Expert Choice Routing (2202.09368)"
    needs = "bidirectional layers"
    causal = False
    moe_config: ExpertChoiceRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> ExpertChoiceRouterConfig:
        raise NotImplementedError(
            "padding is never picked, so only a batch without padding can be routed as by the stock gate "
            "(`capacity_factor` = number of experts, `max_slots` = experts per token)."
        )

    @classmethod
    def check(cls, config: ExpertChoiceRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        refuse_causal(config, site)
        if config.max_slots is not None and config.max_slots > site.num_choices:
            raise ValueError(
                f'`max_slots` ({config.max_slots}) exceeds the {site.num_choices} experts of layer "{site.key}".'
            )
        if config.capacity_factor > site.num_choices:
            raise ValueError(
                f"`capacity_factor` ({config.capacity_factor}) exceeds the {site.num_choices} experts of layer "
                f'"{site.key}": at that value every expert picks every token.'
            )
        check_rule_known(config.score, site, True)

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, rule, choices = self.moe_config, self.moe_site.rule, self.moe_site.num_choices
        score = config.score or rule.score
        logits = self.router_logits(hidden, *args, **kwargs)[..., :choices]
        raw = expert_scores(logits, score)
        picked = pick_tokens(raw, config.capacity_factor, None if context is None else context.token_mask(len(raw)))

        # A bias of the family shifts all scores of an expert alike: it only matters where a token keeps its best ones.
        bias = self.selection_bias(*args)
        bias = None if bias is None else bias[:choices]  # a gate's "skip" class picks nobody
        choice = self.selection_scores(raw, bias, None).masked_fill(~picked, float("-inf"))
        index = choice.topk(config.max_slots or choices, dim=-1).indices
        keep = picked.gather(-1, index)
        renormalize = config.renormalize
        if renormalize is None:
            renormalize = rule.renormalize or (score == "softmax" and rule.order == "topk_score")
        weights = self.slot_weights(logits, raw, index, score=score, renormalize=renormalize, keep=keep)
        weights = self.final_weights(weights, index, config.scale)
        return RouteRecord(logits, as_distribution(raw, score), weights, index.masked_fill(~keep, choices), config)


def pick_tokens(scores: torch.Tensor, capacity_factor: float, mask: torch.Tensor | None) -> torch.Tensor:
    """(T, E) bool: the tokens that each expert picks.

    Args:
        scores: (T, E).
        capacity_factor: c; an expert picks `ceil(c * n / E)` of the n tokens that count.
        mask: (T,) tokens that count; `None` for all.
    """
    total, experts = scores.shape
    largest = min(math.ceil(total * capacity_factor / experts), total)
    if mask is None:
        best = scores.topk(largest, dim=0).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(0, best, True)
    # The capacity is a value then, not a shape: of the most that any mask allows, the first ranks are kept.
    mask = mask.to(scores.device)
    best = scores.masked_fill(~mask[:, None], float("-inf")).topk(largest, dim=0).indices
    capacity = torch.ceil(mask.sum().double() * capacity_factor / experts)  # in the precision of Python
    rank = torch.arange(largest, device=scores.device)[:, None]
    keep = (rank < capacity) & mask[best]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, best, keep)


def refuse_causal(config: Any, site: RouterSite) -> None:
    """Raise `ValueError` where a router that looks at later tokens would stand in a causal layer."""
    if site.causal and not config.allow_non_causal:
        raise ValueError(
            f'layer "{site.key}" has causal attention, and the `{config.type}` router looks at all tokens at once: in '
            "training each token would see later ones, and the model could not generate. It belongs into encoders. "
            "`allow_non_causal=True` puts it here all the same."
        )
