"""Routers for the attention experts that an architecture has itself (ModuleFormer, JetMoE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .configuration_moe_ext import AttentionConfig, RouterConfig
from .moe_adapters import JetMoeRoutedAttention, get_adapter
from .moe_attention import AttentionPart, AttentionPlan, check_attention_router, install_router, register_attention
from .moe_context import RoutingLink
from .moe_families import MoeSpec, get_by_path, has_path
from .moe_install import install
from .moe_router import RouterSite, get_router
from .moe_structure import gate_rule, resize, stock_counts
from .router_top_k import TopKRouterConfig


@dataclass
class RoutedAttentionConfig(AttentionConfig):
    """Config of `RoutedAttention`.

    Args:
        router (`RouterConfig`, `dict` or `str`, *optional*):
            Router of the attention experts. `None` is the rule of the architecture itself, with records and auxiliary
            losses added.
        num_experts (`int`, *optional*):
            Attention experts of the layer, where they are not as many as the config of the model says.
        num_experts_per_tok (`int`, *optional*):
            How many of them a token uses; `None` is the number of the architecture.
    """

    router: Any = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.router, str):
            self.router = {"type": self.router}
        if isinstance(self.router, dict):
            self.router = RouterConfig.from_dict(self.router)
        if self.router is None:
            self.router = TopKRouterConfig()
        if not isinstance(self.router, RouterConfig):
            raise TypeError(f"`router` must be a RouterConfig or its dict, got {self.router!r}.")
        for name in ("num_experts", "num_experts_per_tok"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


@register_attention("routed")
class RoutedAttention(AttentionPart):
    """A router of this package in front of the gate that chooses among a layer's attention experts."""

    config_class = RoutedAttentionConfig
    paper = "ModuleFormer (2306.04640), JetMoE (2404.07413)"

    @classmethod
    def _site(cls, config: RoutedAttentionConfig, plan: AttentionPlan) -> tuple[MoeSpec, RouterSite]:
        spec = plan.spec.experts
        if spec is None or not has_path(plan.layer, spec.block):
            raise ValueError(
                f'the attention of layer "{plan.key}" has no experts, so there is nothing to route. Leave '
                "`attention` out there."
            )
        block = get_by_path(plan.layer, spec.block)
        num_experts, top_k = stock_counts(spec, plan.model_config, get_by_path(block, spec.experts))
        if config.num_experts not in (None, num_experts) and spec.adapter is not None:
            raise ValueError(
                f"all layers of this architecture have as many attention experts, {num_experts} according to its "
                f'config; layer "{plan.key}" cannot have {config.num_experts}.'
            )
        if config.num_experts not in (None, num_experts) and not plan.building:
            raise ValueError(
                f'layer "{plan.key}" has {num_experts} attention experts, `num_experts` asks for '
                f"{config.num_experts}. `extend` keeps weights as they are."
            )
        num_experts = config.num_experts or num_experts
        top_k = min(config.num_experts_per_tok or top_k, num_experts)
        return spec, plan.router_site(num_experts, top_k, gate_rule(spec, plan.model_config))

    @classmethod
    def check(cls, config: RoutedAttentionConfig, plan: AttentionPlan) -> None:
        _, site = cls._site(config, plan)
        check_attention_router(config.router, site)

    @classmethod
    def install(
        cls, config: RoutedAttentionConfig, plan: AttentionPlan, attention: nn.Module, link: RoutingLink
    ) -> None:
        spec, site = cls._site(config, plan)
        block = get_by_path(plan.layer, spec.block)
        gate = get_by_path(block, spec.router)
        resize(gate, get_by_path(block, spec.experts), site.num_experts, site.top_k)
        install_router(gate, config.router, site, link)
        if spec.adapter is not None:
            install(block, get_adapter(spec.adapter), moe_spec=spec)
            block.setup(plan.model_config)
            slots = get_router(config.router.type).num_slots(config.router, site)
            install(attention, JetMoeRoutedAttention, moe_slots=slots)
