"""BAM: whole attention blocks as experts that every token uses, mixed by a soft router.

"BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts" (2408.08274), section 3.

The output projection is linear, so the mixture `sum_j g_j W_o^j o_j` is one wide attention: the projections of all
experts side by side, and each expert's heads multiplied by its gate in front of the output projection. The stock
attention computes it, with its positions, masks, cache and attention function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .attention_heads import HeadLayout, HeadOutput, RoutedHeads
from .configuration_moe_ext import AttentionConfig, RouterConfig
from .moe_attention import (
    AttentionPart,
    AttentionPlan,
    add_attention_router,
    check_attention_router,
    register_attention,
)
from .moe_context import RoutingLink
from .moe_families import AttentionSpec, get_by_path, has_path
from .moe_install import install, own_names, remember_added
from .moe_router import RouterSite
from .router_top_k import TopKRouterConfig


@dataclass
class BamAttentionConfig(AttentionConfig):
    """Config of `BamAttention`.

    Args:
        num_experts (`int`):
            Attention experts of each layer (N).
        key_values (`"expert"` or `"shared"`, *optional*, defaults to `"expert"`):
            Whether each expert has keys and values of its own, and the cache is N times as large, or all use the same.
        router (`RouterConfig`, `dict` or `str`, *optional*):
            Router of the experts. `None` is soft routing: softmax over all experts, all of which are used. Attention
            is computed for all experts whatever the router chooses.
    """

    num_experts: int = 2
    key_values: Literal["expert", "shared"] = "expert"
    router: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts < 1:
            raise ValueError(f"`num_experts` must be at least 1, got {self.num_experts}.")
        if isinstance(self.router, str):
            self.router = {"type": self.router}
        if isinstance(self.router, dict):
            self.router = RouterConfig.from_dict(self.router)
        if self.router is not None and not isinstance(self.router, RouterConfig):
            raise TypeError(f"`router` must be a RouterConfig or its dict, got {self.router!r}.")


class BamAttentionModule(RoutedHeads):
    """Installed in front of a stock attention: asks the router for the gates of the query tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.route_heads(args, kwargs)
        return super().forward(*args, **kwargs)


@register_attention("bam")
class BamAttention(AttentionPart):
    """Attention blocks as experts, all of them computed, mixed by the gates of the query token."""

    config_class = BamAttentionConfig
    paper = "BAM (2408.08274)"
    of_models = True

    @classmethod
    def site(cls, config: BamAttentionConfig, plan: AttentionPlan) -> RouterSite:
        """Where its router stands."""
        return plan.router_site(config.num_experts, config.num_experts)

    @classmethod
    def router(cls, config: BamAttentionConfig) -> RouterConfig:
        """The declared router, or the soft one."""
        return config.router or TopKRouterConfig(num_experts_per_tok=config.num_experts)

    @classmethod
    def check(cls, config: BamAttentionConfig, plan: AttentionPlan) -> None:
        if not plan.building:
            raise ValueError(
                "attention experts are made of several models, or copies of one; `extend` keeps weights as they are. "
                'Use `upcycle([...], method="bam")`.'
            )
        reason = cannot_merge(plan.spec, plan.attention, config.key_values)
        if reason is not None:
            raise ValueError(f'the attention of layer "{plan.key}" cannot hold experts: {reason}.')
        check_attention_router(cls.router(config), cls.site(config, plan))

    @classmethod
    def install(cls, config: BamAttentionConfig, plan: AttentionPlan, attention: nn.Module, link: RoutingLink) -> None:
        site, layout = cls.site(config, plan), head_layout(config, plan.model_config)
        widen(plan.spec, attention, layout)
        output = get_by_path(attention, plan.spec.output)
        first = output.weight
        add_attention_router(attention, cls.router(config), site, link, device=first.device, dtype=first.dtype)
        install(attention, BamAttentionModule, moe_link=link, moe_order=plan.order, moe_output=plan.spec.output)
        where: dict[str, Any] = {"moe_link": link, "moe_order": plan.order, "moe_site": site}
        install(output, HeadOutput, **where, moe_layout=layout, moe_width=output.in_features)


def cannot_merge(spec: AttentionSpec, attention: nn.Module, key_values: str) -> str | None:
    """Why the projections of several attentions of this form cannot stand side by side, or `None`."""
    if spec.experts is not None:
        return "it has attention experts already"
    if spec.fused is not None and key_values == "shared":
        return "queries, keys and values come from one projection, so keys and values cannot be shared"
    if key_values == "shared" and set(spec.head_counts) & set(spec.key_counts):
        return "it has as many heads of keys as of queries, so keys and values cannot be shared"
    for path in projections(spec):
        module = get_by_path(attention, path) if has_path(attention, path) else None
        if not isinstance(module, nn.Linear) or hasattr(module, "base_layer"):
            return f"its `{path}` is no plain linear layer"
    for path in spec.other_norms:
        if has_path(attention, path):
            return f"`{path}` normalises over all heads or has one weight for all of them, which experts do not share"
    return None


def projections(spec: AttentionSpec) -> tuple[str, ...]:
    """Paths of the projections of an attention, the output last."""
    inner = (spec.query, spec.key, spec.value) if spec.fused is None else (spec.fused,)
    return (*inner, spec.output)


def head_layout(config: BamAttentionConfig, model_config: Any) -> HeadLayout:
    """The layout of the experts' heads."""
    heads = int(model_config.num_attention_heads)
    key_heads = int(getattr(model_config, "num_key_value_heads", None) or heads)
    return HeadLayout(config.num_experts, heads, key_heads, config.key_values == "shared")


def widen(spec: AttentionSpec, attention: nn.Module, layout: HeadLayout) -> None:
    """Give the projections and per-head norms of an attention the sizes for all experts. New tensors are empty."""
    count = layout.num_experts

    def empty(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
        old = module._parameters[name]
        assert old is not None
        module._parameters[name] = nn.Parameter(old.new_empty(shape), old.requires_grad)
        vars(module).pop("_is_hf_initialized", None)

    for path in projections(spec)[:-1]:
        module = get_by_path(attention, path)
        if layout.shared and path in (spec.key, spec.value):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty(module, name, (count * parameter.shape[0], *parameter.shape[1:]))
        module.out_features *= count
    output = get_by_path(attention, spec.output)
    empty(output, "weight", (output.weight.shape[0], count * output.weight.shape[1]))
    output.in_features *= count
    if output.bias is not None:
        before = own_names(output)
        output.moe_bias = nn.Parameter(output.bias.new_empty(count, *output.bias.shape), output.bias.requires_grad)
        remember_added(output, before)
        output.bias = None
    for place, heads in ((spec.query_norm, layout.heads), (spec.key_norm, layout.key_heads)):
        if place is None or not has_path(attention, place) or (layout.shared and place == spec.key_norm):
            continue
        norm = get_by_path(attention, place)
        for name, parameter in list(norm.named_parameters(recurse=False)):
            shape = (count * heads, *([1] if spec.norm_heads_first else []), parameter.shape[-1])
            empty(norm, name, shape)
    for name in {*spec.head_counts, *(() if layout.shared else spec.key_counts)}:
        setattr(attention, name, count * getattr(attention, name))
    if layout.shared:
        attention.num_key_value_groups = count * layout.group
