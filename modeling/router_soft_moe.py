"""Soft MoE: experts work on mixtures of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import MoERouter, RouterSite, register_router
from .router_expert_choice import refuse_causal


@dataclass
class SoftMoERouterConfig(RouterConfig):
    """Config of `SoftMoERouter`. Defaults are those of the paper (2308.00951).

    > Parameters that control the selection

    Args:
        slots_per_expert (`int`, *optional*, defaults to 1):
            Mixtures of tokens that each expert processes for each sequence (p in the paper).
        normalize (`bool`, *optional*, defaults to `True`):
            Whether tokens and slots are compared by a cosine times a learned scale (section 2.3).
        scale (`float`, *optional*):
            Factor on the output of the experts, `None` for the family's.
        allow_non_causal (`bool`, *optional*, defaults to `False`):
            Whether the router may stand in layers whose attention is causal. There it leaks: every token is mixed with
            later ones. Such a model does not generate.
    """

    slots_per_expert: int = 1
    normalize: bool = True
    scale: float | None = None
    allow_non_causal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots_per_expert < 1:
            raise ValueError(f"`slots_per_expert` must be at least 1, got {self.slots_per_expert}.")


@register_router("soft_moe")
class SoftMoERouter(MoERouter):
    """Each slot of an expert is a mean of all tokens of a sequence, each token's output a mean of all slots'.

    "From Sparse to Soft Mixtures of Experts" (2308.00951), sections 2.1 and 2.3. Padding is in no slot. The stock gate
    is not used and is excluded from training.

    The record describes it to losses and statistics as a router that uses every expert: `scores` are the weights of a
    token's slots, summed for each expert, and `logits` their logarithms before they are normalised. The experts get
    the two mixing matrices through the context (`RoutedExperts`).
    """

    config_class = SoftMoERouterConfig
    paper = "Soft MoE (2308.00951)"
    needs = "own gate, trained anew; bidirectional layers"
    causal = False
    own_logits = True
    mixes_tokens = True
    moe_config: SoftMoERouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> SoftMoERouterConfig:
        raise NotImplementedError("experts get mixtures of tokens, which no stock gate makes.")

    @classmethod
    def check(cls, config: SoftMoERouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        refuse_causal(config, site)
        if site.zero_experts is not None:
            raise ValueError(
                "the `soft_moe` router mixes tokens for real experts; it does not go with `zero_experts`."
            )

    def setup(self) -> None:
        site, config = self.moe_site, self.moe_config
        place = {"device": self.own_device, "dtype": next(self.parameters()).dtype}
        self.freeze_stock()
        self.moe_slots = nn.Parameter(
            torch.empty(site.num_experts * config.slots_per_expert, site.hidden_size, **place)
        )
        if config.normalize:
            self.moe_scale = nn.Parameter(torch.empty(1, **place))

    def reset_parameters(self) -> None:
        init.normal_(self.moe_slots, mean=0.0, std=self.moe_slots.shape[-1] ** -0.5)
        if self.moe_config.normalize:
            init.ones_(self.moe_scale)

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, site = self.moe_config, self.moe_site
        tokens, slots = hidden.float(), self.moe_slots.float()
        if config.normalize:
            tokens, slots = F.normalize(tokens, dim=-1), self.moe_scale.float() * F.normalize(slots, dim=-1)
        affinity = F.linear(tokens, slots)  # (T, E*P): the slots of an expert stand side by side
        if context is not None:
            self._mix(affinity, context)

        logits = affinity.unflatten(-1, (site.num_experts, -1)).logsumexp(dim=-1)
        scores = logits.softmax(dim=-1)
        index = torch.arange(site.num_experts, device=hidden.device).expand(len(hidden), -1)
        return RouteRecord(logits, scores, self.final_weights(scores, index, config.scale), index, config)

    def _mix(self, affinity: torch.Tensor, context: RoutingContext) -> None:
        """Leave the (B, S, E*P) matrices for the experts: `dispatch` from tokens to slots, `combine` back."""
        site = self.moe_site
        batch = context.batch_size
        if not batch or len(affinity) % batch:
            raise ValueError(f"it is not known to which sequences the {len(affinity)} tokens of this forward belong.")
        mask = context.token_mask(len(affinity))
        # The least number, not -inf: a row of padding alone must not be NaN.
        real = affinity if mask is None else affinity.masked_fill(~mask.to(affinity.device)[:, None], -3e38)
        slot_expert = torch.arange(site.num_experts, device=affinity.device)
        slot_expert = slot_expert.repeat_interleave(self.moe_config.slots_per_expert).expand(len(affinity), -1)
        combine = self.final_weights(affinity.softmax(dim=-1), slot_expert, self.moe_config.scale)
        context.carry[(site.order, "dispatch")] = real.unflatten(0, (batch, -1)).softmax(dim=1)
        context.carry[(site.order, "combine")] = combine.unflatten(0, (batch, -1))
