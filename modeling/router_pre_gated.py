"""Pre-gated routing: a block's experts are chosen from the input of an earlier block, so they are known in advance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .moe_context import RouteRecord, RoutingContext
from .moe_router import RouterSite, register_router
from .router_top_k import TopKRouter, TopKRouterConfig


@dataclass
class PreGatedRouterConfig(TopKRouterConfig):
    """Config of `PreGatedRouter`: that of `top_k`, and how far ahead experts are chosen.

    > Parameters that control the selection

    Args:
        level (`int`, *optional*, defaults to 1):
            A block is routed by what the gate would see this many MoE blocks earlier (the activation level N of
            2308.12066). 0 is the stock order.
    """

    level: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level < 0:
            raise ValueError(f"`level` must be non-negative, got {self.level}.")


@register_router("pre_gated")
class PreGatedRouter(TopKRouter):
    """Top-k on the gate input of an earlier MoE block.

    "Pre-gated MoE" (2308.12066), section 4: the gate that decides for block n + 1 is evaluated at the start of block
    n, and both indices and weights are handed on. Its gate for block n + 1 is here that block's own gate, so nothing
    is added, and a model is converted back by `level=0`. The first `level` blocks of every forward are routed by
    their own input.

    What the paper says about time and memory belongs to an offloading runtime, which is not part of a router.
    """

    config_class = PreGatedRouterConfig
    paper = "Pre-gated MoE (2308.12066)"
    crosses_layers = True
    moe_config: PreGatedRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> PreGatedRouterConfig:
        return PreGatedRouterConfig(level=0)

    @classmethod
    def check_stack(cls, members: list[tuple[Any, RouterSite]]) -> None:
        super().check_stack(members)
        for config, site in members:
            if config.level >= len(members):
                raise ValueError(
                    f'`level` ({config.level}) of layer "{site.key}" must be below the number of MoE layers with this '
                    f"router ({len(members)}); otherwise no layer would be routed in advance."
                )

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        source = hidden
        if context is not None:
            order = self.moe_site.order
            context.carry[order, "gate_input"] = hidden
            source = context.carry.get((order - self.moe_config.level, "gate_input"), hidden)
        return super().route(source.to(hidden.device), context, *args, **kwargs)
