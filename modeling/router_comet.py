"""COMET: trees whose leaves are experts, differentiable and sparse at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_losses import _masked_mean
from .moe_permutation import (
    PermutedRouter,
    PermutedRouterConfig,
    extra_losses,
    permute,
    refuse_z_loss,
    to_distribution,
)
from .moe_router import MoERouter, RouterSite, register_router


# A leaf that is reached with less is not reached. Far above it, logarithms and their gradients are finite.
_TINY = 1e-30


@dataclass
class CometRouterConfig(PermutedRouterConfig):
    """Config of `CometRouter` (2306.02824).

    > Parameters that control the trees

    Args:
        num_experts_per_tok (`int`, *optional*):
            Number of trees (k), the most experts a token uses once all splits are sharp. `None` takes the family's.
        smooth_step_width (`float`, *optional*, defaults to 1.0):
            Width of the range in which a split is soft (gamma). A narrow one is sharp sooner and trains less.
        split_bias (`bool`, *optional*, defaults to `True`):
            Whether splits have a bias.
        leaf_init_range (`float`, *optional*, defaults to 0.05):
            The weights of leaves start uniform in plus or minus this.

    > Parameters that control the auxiliary losses

    Args:
        tree_entropy_coef (`float`, *optional*, defaults to 0.1):
            Weight of the entropy of the leaves (lambda), which makes splits sharp.
    """

    num_experts_per_tok: int | None = None
    smooth_step_width: float = 1.0
    split_bias: bool = True
    leaf_init_range: float = 0.05
    tree_entropy_coef: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_selectors(self)
        for name in ("tree_entropy_coef", "leaf_init_range"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")


@register_router("comet")
class CometRouter(PermutedRouter):
    """A mixture of k soft decision trees, whose splits are exactly 0 or 1 outside a narrow range.

    "COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search" (2306.02824). While splits
    are soft a token may have a weight for every expert: training gives C slots. Evaluation keeps the k largest
    weights.
    """

    config_class = CometRouterConfig
    paper = "COMET (2306.02824)"
    needs = "training from scratch"
    own_logits = True
    holds_zero_experts = False
    moe_config: CometRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> RouterConfig:
        raise NotImplementedError("trees with a smooth step cannot express a linear gate with top-k.")

    @classmethod
    def check(cls, config: CometRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        check_choices(config.num_experts_per_tok or site.top_k, site)

    def setup(self) -> None:
        config, site = self.moe_config, self.moe_site
        trees, leaves = config.num_experts_per_tok or site.top_k, site.num_choices
        first = next(self.parameters())

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=first.device, dtype=first.dtype))

        self.freeze_stock()
        self.moe_split_weight = parameter(trees, leaves - 1, site.hidden_size)
        self.moe_split_bias = parameter(trees, leaves - 1) if config.split_bias else None
        self.moe_leaf_weight = parameter(trees, leaves, site.hidden_size)
        self.moe_leaf_bias = parameter(trees, leaves)
        self.setup_permutation(trees)

    def reset_parameters(self) -> None:
        config = self.moe_config
        init_splits(self.moe_split_weight, self.moe_split_bias, config.smooth_step_width)
        init.uniform_(self.moe_leaf_weight, -config.leaf_init_range, config.leaf_init_range)
        init.zeros_(self.moe_leaf_bias)
        self.reset_permutation()

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, site = self.moe_config, self.moe_site
        splits = affine(hidden, self.moe_split_weight, self.moe_split_bias)
        leaf_logits = affine(hidden, self.moe_leaf_weight, self.moe_leaf_bias)
        reached = leaf_probabilities(smooth_step(splits, config.smooth_step_width))  # (T, k, C)
        reached_logits = leaf_logits + reached.clamp_min(_TINY).log()
        mixture = reached_logits.masked_fill(reached <= _TINY, float("-inf")).flatten(1).softmax(dim=-1)
        matrices = self.permutation(context)
        experts = permute(mixture.view_as(reached), matrices)
        extras = self.permutation_extras(matrices, len(hidden))
        scores = to_distribution(experts)
        if config.tree_entropy_coef:
            extras["selectors"] = reached
        slots = site.num_choices if self.training else config.num_experts_per_tok or site.top_k
        weights, index = self.largest(scores, slots)
        weights = self.final_weights(weights, index, None)
        return RouteRecord(scores.clamp_min(_TINY).log(), scores, weights, index, config, extras=extras)

    @staticmethod
    def aux_losses(record: RouteRecord, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        losses = {**MoERouter.aux_losses(record, mask), **extra_losses(record, mask, "permutation")}
        return {**losses, **selector_losses(record, mask, "tree_entropy")}


# --- shared with DSelect-k ---


def check_selectors(config: Any) -> None:
    """Raise `ValueError` for what no number of experts allows."""
    refuse_z_loss(config)
    if config.num_experts_per_tok is not None and config.num_experts_per_tok < 1:
        raise ValueError(f"`num_experts_per_tok` must be at least 1, got {config.num_experts_per_tok}.")
    if config.smooth_step_width <= 0:
        raise ValueError(f"`smooth_step_width` must be positive, got {config.smooth_step_width}.")


def check_choices(count: int, site: RouterSite) -> None:
    """Raise `ValueError` where a layer has too few experts."""
    if site.num_choices < 2:
        raise ValueError(f'layer "{site.key}" has one expert; this router chooses between two or more.')
    if count > site.num_choices:
        raise ValueError(
            f'`num_experts_per_tok` ({count}) exceeds the {site.num_choices} experts of layer "{site.key}".'
        )


def init_splits(weight: torch.Tensor, bias: torch.Tensor | None, width: float) -> None:
    """Uniform in plus or minus a hundredth of the width, as in the papers, at the width 768 of BERT.

    For other hidden sizes the range is scaled by `1 / sqrt(H / 768)`: at a fixed range the share of splits that are
    dead from the start (inputs of unit RMS) is 0.2% at 768, 18% at 4096, 34% at 8192.
    """
    bound = width / 100 * math.sqrt(768 / weight.shape[-1])
    init.uniform_(weight, -bound, bound)
    if bias is not None:
        init.uniform_(bias, -width / 100, width / 100)


def affine(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(T, H) by (..., H) to (T, ...) in float32, also under autocast: a split has to meet 0 and 1 exactly."""
    with maybe_autocast(hidden.device.type, enabled=False):
        out = F.linear(hidden.float(), weight.float().flatten(0, -2)).unflatten(-1, weight.shape[:-1])
    return out if bias is None else out + bias.float()


def smooth_step(value: torch.Tensor, width: float) -> torch.Tensor:
    """`-2 t^3 / g^3 + 3 t / (2 g) + 1/2` for |t| < g/2 with width g; 0 below and 1 above, exactly.

    In the form `x^2 (3 - 2x)`, which is not negative by rounding.
    """
    x = (value / width + 0.5).clamp(0, 1)
    return (x * x * (3 - 2 * x)).clamp(max=1)


def leaf_probabilities(left: torch.Tensor) -> torch.Tensor:
    """Probability of each leaf of a binary tree, (..., n - 1) -> (..., n), leaves from left to right.

    Nodes are numbered as in a heap: node q has the children 2q + 1 and 2q + 2, and those from n - 1 on are leaves.
    `left` is the probability of the left child. The lower one of the two levels with leaves stands to the left.
    """
    splits, first = left.shape[-1], 0
    level = torch.ones_like(left[..., :1])
    beside: list[torch.Tensor] = []
    while first < splits:
        size = level.shape[-1]
        inner = min(size, splits - first)
        parents, beside_inner = level[..., :inner], level[..., inner:]
        share = left[..., first : first + inner]
        beside = [beside_inner, *beside]
        level = torch.stack([parents * share, parents * (1 - share)], dim=-1).flatten(-2)
        first += size
    return torch.cat([level, *beside], dim=-1)


def selector_losses(record: RouteRecord, mask: torch.Tensor | None, name: str) -> dict[str, torch.Tensor]:
    """The mean entropy of the selectors in the record's `extras`, as the loss `name`, where it has a weight."""
    if not record.config.loss_coefs.get(name):
        return {}
    return {name: _masked_mean(selector_entropy(record.extras["selectors"]), mask)}


def selector_entropy(selected: torch.Tensor) -> torch.Tensor:
    """Entropy of every selector in nats, added up: (T, k, n) -> (T,)."""
    return -(selected * selected.clamp_min(_TINY).log()).sum(dim=(-2, -1))
