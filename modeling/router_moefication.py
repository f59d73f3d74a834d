"""The router of MoEfication: which parts of a dense block would be active, foretold from the block's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import initialization as init

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import RouterSite, register_router
from .tanh_gate import TanhGateRouter


@dataclass
class MoEficationRouterConfig(RouterConfig):
    """Config of `MoEficationRouter`.

    > Parameters that control the selection

    Args:
        num_experts_per_tok (`int`, *optional*):
            Experts per token (k), `None` for the site's number.
        predictor (`"centroid"` or `"mlp"`, *optional*, defaults to `"centroid"`):
            What foretells how active an expert is: the product of the token's direction with the expert's row of the
            gate; or a network of two layers, of which that product is the first.
    """

    num_experts_per_tok: int | None = None
    predictor: Literal["centroid", "mlp"] = "centroid"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts_per_tok is not None and self.num_experts_per_tok < 1:
            raise ValueError(f"`num_experts_per_tok` must be at least 1, got {self.num_experts_per_tok}.")


@register_router("moefication")
class MoEficationRouter(TanhGateRouter):
    """The k experts that are foretold to be most active, each with weight one, which has no gradient.

    "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts" (2110.01786), section 3.3. Experts are parts
    of one block whose activation is zero for many neurons; leaving out those whose neurons are zero changes nothing.
    """

    config_class = MoEficationRouterConfig
    paper = "MoEfication (2110.01786)"
    needs = "experts that are parts of a dense ReLU block"
    moe_config: MoEficationRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> RouterConfig:
        raise NotImplementedError("its experts have weight one each, which no gate of a stock family gives them.")

    @classmethod
    def check(cls, config: MoEficationRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        k = cls.num_slots(config, site)
        if k > site.num_experts:
            raise ValueError(f'`num_experts_per_tok` ({k}) exceeds the {site.num_experts} experts of "{site.key}".')
        if site.zero_experts is not None:
            raise ValueError("the `moefication` router chooses parts of a block; zero-computation experts are none.")
        if config.predictor == "mlp":
            cls.check_second_layer(site)

    def setup(self) -> None:
        if self.moe_config.predictor == "mlp":
            self.add_second_layer()

    def reset_parameters(self) -> None:
        if self.moe_config.predictor == "mlp":  # the identity, so that it ranks as the first layer alone
            init.copy_(self.moe_mix_weight, torch.eye(self.moe_site.num_experts, device=self.own_device))

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        direction = F.normalize(hidden.float(), dim=-1).to(hidden.dtype)
        logits = self.router_logits(direction, *args, **kwargs)
        index = logits.topk(self.num_slots(self.moe_config, self.moe_site), dim=-1).indices
        weights = torch.ones_like(index, dtype=torch.float32)
        return RouteRecord(logits, logits.float().softmax(dim=-1), weights, index, self.moe_config)
