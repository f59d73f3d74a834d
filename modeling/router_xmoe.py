"""X-MoE: cosine routing in a space of few dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import MoERouter, RouterSite, as_distribution, expert_scores, register_router


@dataclass
class XMoERouterConfig(RouterConfig):
    """Config of `XMoERouter`.

    > Parameters that control the selection

    Args:
        projection_size (`int`, *optional*):
            Dimensions of the space in which tokens and experts are compared (d_e in the paper). `None` means half the
            number of experts, at least 2.
        temperature (`float`, *optional*, defaults to 0.07):
            First value of the learned temperature (tau_0).
        num_experts_per_tok (`int`, *optional*):
            Experts per token (k), `None` for the family's number. The paper has 1.
        score (`"softmax"` or `"sigmoid"`, *optional*, defaults to `"softmax"`):
            Map from cosines over the temperature to scores.
        renormalize (`bool`, *optional*, defaults to `False`):
            Whether the k weights are divided by their sum; `None` does as the stock family. The paper does not; an
            upcycled dense model needs it to start as the dense model.
        scale (`float`, *optional*):
            Factor on the weights, `None` for the family's.
    """

    projection_size: int | None = None
    temperature: float = 0.07
    num_experts_per_tok: int | None = None
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool | None = False
    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection_size is not None and self.projection_size < 2:
            raise ValueError(
                f"`projection_size` must be at least 2, got {self.projection_size}; in one dimension every cosine is "
                "1 or -1."
            )
        if self.temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")
        if self.num_experts_per_tok is not None and self.num_experts_per_tok < 1:
            raise ValueError(f"`num_experts_per_tok` must be at least 1, got {self.num_experts_per_tok}.")


@register_router("xmoe")
class XMoERouter(MoERouter):
    """Cosine between a low-rank projection of the token and an embedding of the expert, over a learned temperature.

    "On the Representation Collapse of Sparse Mixture of Experts" (2204.09179), section 3. The stock gate is not used
    and is excluded from training.

    The temperature is kept as its logarithm, so that it stays positive. `norm` at the end of the parameter's name is
    what the Transformers trainer goes by: it takes such parameters out of weight decay, which would pull the
    temperature towards 1.
    """

    config_class = XMoERouterConfig
    replays = True
    paper = "X-MoE (2204.09179)"
    needs = "own gate, trained anew"
    own_logits = True
    moe_config: XMoERouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> XMoERouterConfig:
        raise NotImplementedError("cosines in a space of few dimensions cannot be the logits of a linear gate.")

    @classmethod
    def check(cls, config: XMoERouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        k = config.num_experts_per_tok or site.top_k
        if k > site.num_choices:
            raise ValueError(f'`num_experts_per_tok` ({k}) exceeds the {site.num_choices} experts of "{site.key}".')
        size = config.projection_size
        if size is not None and size > site.hidden_size:
            raise ValueError(f"`projection_size` ({size}) exceeds the hidden size ({site.hidden_size}).")

    def setup(self) -> None:
        site = self.moe_site
        size = self.moe_config.projection_size or min(max(site.num_choices // 2, 2), site.hidden_size)
        place = {"device": self.own_device, "dtype": next(self.parameters()).dtype}
        self.freeze_stock()
        self.moe_projection = nn.Parameter(torch.empty(size, site.hidden_size, **place))
        self.moe_expert_embeddings = nn.Parameter(torch.empty(site.num_choices, size, **place))
        self.moe_log_temperature_norm = nn.Parameter(torch.empty(1, **place))

    def reset_parameters(self) -> None:
        size, hidden = self.moe_projection.shape
        init.normal_(self.moe_projection, mean=0.0, std=hidden**-0.5)
        init.normal_(self.moe_expert_embeddings, mean=0.0, std=size**-0.5)
        init.constant_(self.moe_log_temperature_norm, math.log(self.moe_config.temperature))

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, rule = self.moe_config, self.moe_site.rule
        # In float32: a cosine is divided by a small temperature.
        tokens = F.normalize(F.linear(hidden.float(), self.moe_projection.float()), dim=-1)
        experts = F.normalize(self.moe_expert_embeddings.float(), dim=-1)
        logits = F.linear(tokens, experts) * torch.exp(-self.moe_log_temperature_norm.float())
        logits = self.hold_zero_experts(logits)
        scores = expert_scores(logits, config.score)
        index = (
            self.selection_scores(scores, None, None)
            .topk(config.num_experts_per_tok or self.moe_site.top_k, dim=-1)
            .indices
        )
        renormalize = config.renormalize
        if renormalize is None:
            renormalize = rule.renormalize or (config.score == "softmax" and rule.order == "topk_score")
        weights = self.slot_weights(logits, scores, index, score=config.score, renormalize=renormalize)
        weights = self.final_weights(weights, index, config.scale)
        return RouteRecord(logits, as_distribution(scores, config.score), weights, index, config)
