"""DSelect-k: selectors that write the number of an expert in soft binary digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_permutation import PermutedRouter, PermutedRouterConfig, extra_losses, permute
from .moe_router import MoERouter, RouterSite, register_router
from .router_comet import affine, check_choices, check_selectors, init_splits, selector_losses, smooth_step


# As in the papers' code: keeps the leak term finite.
_LEAK_OFFSET = 1e-6
_SELECTOR_INIT_RANGE = 0.05


@dataclass
class DSelectKRouterConfig(PermutedRouterConfig):
    """Config of `DSelectKRouter` (2106.03760).

    > Parameters that control the selectors

    Args:
        num_experts_per_tok (`int`, *optional*):
            Number of selectors (k), the most experts a token uses once all digits are sharp. `None` takes the
            family's.
        smooth_step_width (`float`, *optional*, defaults to 1.0):
            Width of the range in which a digit is soft (gamma).

    > Parameters that control the auxiliary losses

    Args:
        code_entropy_coef (`float`, *optional*, defaults to 0.1):
            Weight of the entropy of the selectors (lambda), which makes digits sharp.
        leak_coef (`float`, *optional*, defaults to 1.0):
            Weight of the term that keeps selectors from numbers without an expert, where the number of experts is no
            power of two.
    """

    num_experts_per_tok: int | None = None
    smooth_step_width: float = 1.0
    code_entropy_coef: float = 0.1
    leak_coef: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_selectors(self)
        for name in ("code_entropy_coef", "leak_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")


@register_router("dselect_k")
class DSelectKRouter(PermutedRouter):
    """A mixture of k selectors, each a product of soft binary digits that are exactly 0 or 1 outside a narrow range.

    "DSelect-k: Differentiable Selection in the Mixture of Experts with Applications to Multi-Task Learning"
    (2106.03760), the form that depends on the input, with the permutation of COMET (2306.02824). While digits are soft
    a token may have a weight for every expert: training gives C slots. Evaluation keeps the k largest weights.
    """

    config_class = DSelectKRouterConfig
    paper = "DSelect-k (2106.03760)"
    needs = "training from scratch"
    own_logits = True
    holds_zero_experts = False
    moe_config: DSelectKRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> RouterConfig:
        raise NotImplementedError("products of binary digits cannot express a linear gate with top-k.")

    @classmethod
    def check(cls, config: DSelectKRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        check_choices(config.num_experts_per_tok or site.top_k, site)

    def setup(self) -> None:
        site = self.moe_site
        selectors = self.moe_config.num_experts_per_tok or site.top_k
        digits = (site.num_choices - 1).bit_length()
        first = next(self.parameters())

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=first.device, dtype=first.dtype))

        self.freeze_stock()
        self.moe_code_weight = parameter(selectors, digits, site.hidden_size)
        self.moe_code_bias = parameter(selectors, digits)
        self.moe_selector_weight = parameter(selectors, site.hidden_size)
        self.moe_selector_bias = parameter(selectors)
        self.setup_permutation(selectors)

    def reset_parameters(self) -> None:
        init_splits(self.moe_code_weight, self.moe_code_bias, self.moe_config.smooth_step_width)
        init.uniform_(self.moe_selector_weight, -_SELECTOR_INIT_RANGE, _SELECTOR_INIT_RANGE)
        init.uniform_(self.moe_selector_bias, -_SELECTOR_INIT_RANGE, _SELECTOR_INIT_RANGE)
        self.reset_permutation()

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, site = self.moe_config, self.moe_site
        digits = smooth_step(affine(hidden, self.moe_code_weight, self.moe_code_bias), config.smooth_step_width)
        selected = code_probabilities(digits)[..., : site.num_choices]  # (T, k, C)
        share = affine(hidden, self.moe_selector_weight, self.moe_selector_bias).softmax(dim=-1)
        matrices = self.permutation(context)
        experts = permute(share.unsqueeze(-1) * selected, matrices)
        extras = self.permutation_extras(matrices, len(hidden))
        if config.code_entropy_coef:
            extras["selectors"] = selected
        if config.leak_coef and site.num_choices & (site.num_choices - 1):
            extras["leak"] = (1 / (_LEAK_OFFSET + selected.sum(dim=-1))).sum(dim=-1)
        # What has leaked is missing in the weights, as in the paper; scores are a distribution in any case.
        even = 1e-20
        scores = (experts + even) / (experts.sum(dim=-1, keepdim=True) + site.num_choices * even)
        slots = site.num_choices if self.training else config.num_experts_per_tok or site.top_k
        weights, index = self.largest(experts, slots)
        weights = self.final_weights(weights, index, None)
        return RouteRecord(scores.clamp_min(1e-30).log(), scores, weights, index, config, extras=extras)

    @staticmethod
    def aux_losses(record: RouteRecord, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        losses = {**MoERouter.aux_losses(record, mask), **extra_losses(record, mask, "permutation", "leak")}
        return {**losses, **selector_losses(record, mask, "code_entropy")}


def code_probabilities(digits: torch.Tensor) -> torch.Tensor:
    """Probability of every number from its binary digits, lowest first: (..., m) -> (..., 2^m)."""
    numbers = torch.ones_like(digits[..., :1])
    for digit in digits.unbind(dim=-1):
        digit = digit.unsqueeze(-1)
        numbers = torch.cat([numbers * (1 - digit), numbers * digit], dim=-1)
    return numbers
