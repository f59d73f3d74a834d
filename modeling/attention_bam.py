"""BAM: whole attention blocks as experts that every token uses, mixed by a soft router.

"BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts" (2408.08274), section 3.

The output projection is linear, so the mixture `sum_j g_j W_o^j o_j` is one wide attention: the projections of all
experts side by side, and each expert's heads multiplied by its gate in front of the output projection. The stock
attention computes it, with its positions, masks, cache and attention function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

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
from .moe_router import MoERouter, RouterSite
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


@dataclass(frozen=True)
class HeadLayout:
    """How the heads of N experts stand side by side.

    Attributes:
        num_experts: N.
        heads: query heads of one expert.
        key_heads: heads of keys and values of one expert.
        shared: whether all experts have the same keys and values.
    """

    num_experts: int
    heads: int
    key_heads: int
    shared: bool

    @property
    def group(self) -> int:
        """Query heads of one expert for each head of keys."""
        return self.heads // self.key_heads

    def merge_queries(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Rows by query heads, (heads * d, ...) of each expert, to those of all: in the order [expert, head], or
        [key head, expert, query in group] where keys are shared, so that grouped attention gives each query its keys.
        """
        if not self.shared:
            return torch.cat(parts)
        rows = torch.stack([part.unflatten(0, (self.key_heads, -1)) for part in parts], dim=1)
        return rows.flatten(0, 2)

    def weigh(self, heads: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Multiply the heads' outputs (..., N * heads * d) by the gates (..., N) of their experts."""
        gates = gates.to(heads.dtype)
        if not self.shared:
            return (heads.unflatten(-1, (self.num_experts, -1)) * gates[..., None]).flatten(-2)
        rows = heads.unflatten(-1, (self.key_heads, self.num_experts, -1))
        return (rows * gates[..., None, :, None]).flatten(-3)


class BamAttentionModule(nn.Module):
    """Installed in front of a stock attention: asks the router for the gates of the query tokens."""

    moe_gate: MoERouter
    moe_link: RoutingLink
    moe_order: int
    moe_output: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        context = self.moe_link.slots.layer_context
        if context is None:
            raise ValueError("attention experts run only inside a forward of their model.")
        site = self.moe_gate.moe_site
        record = self.moe_gate.decide(hidden.reshape(-1, hidden.shape[-1]))
        gates = record.weights.new_zeros(len(record.index), site.num_experts + 1)
        gates = gates.scatter_add(1, record.index.clamp(max=site.num_experts), record.weights)[:, :-1]
        context.at(site).carry[self.moe_order, "gates"] = gates.view(*hidden.shape[:-1], -1)
        output = get_by_path(self, self.moe_output)
        if not isinstance(output, BamWeighing):
            install(output, BamWrapper, **{name: getattr(output.base_layer, name) for name in BamWeighing.shared})
        return super().forward(*args, **kwargs)


class BamWeighing(nn.Module):
    """What applies the gates in front of an output projection: once, in the outermost module of it."""

    shared: ClassVar[tuple[str, ...]] = ("moe_link", "moe_order", "moe_site", "moe_layout", "moe_width")

    moe_link: RoutingLink
    moe_order: int
    moe_site: RouterSite
    moe_layout: HeadLayout
    moe_width: int

    def weigh(self, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads times the gates, and the gates."""
        context = self.moe_link.slots.layer_context
        assert context is not None
        carry = context.at(self.moe_site).carry
        if (self.moe_order, "weighed") in carry:
            return heads, carry.pop((self.moe_order, "weighed"))
        if heads.shape[-1] != self.moe_width:
            raise ValueError(
                f"the heads of all attention experts together are {self.moe_width} wide, and {heads.shape[-1]} "
                "arrived. Tensor parallelism would divide them without regard to experts; load the model without "
                "`tp_plan`."
            )
        gates = carry.pop((self.moe_order, "gates"))
        return self.moe_layout.weigh(heads, gates), gates


class BamWrapper(BamWeighing):
    """Installed in front of what stands around an output projection, such as LoRA, which has to see the weighed heads
    as the projection does."""

    def forward(self, heads: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        heads, gates = self.weigh(heads)
        context = self.moe_link.slots.layer_context
        assert context is not None
        context.at(self.moe_site).carry[self.moe_order, "weighed"] = gates
        out: torch.Tensor = super().forward(heads, *args, **kwargs)
        return out


class BamOutput(BamWeighing):
    """Installed in front of the output projection of a stock attention: applies the gates.

    Where the projection has a bias, each expert has its own, `moe_bias` (N, H), mixed by the gates as well.
    """

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        heads, gates = self.weigh(heads)
        out = super().forward(heads)
        if "moe_bias" in self._parameters:
            out = out + gates.to(out.dtype) @ self.moe_bias
        return out


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
        install(output, BamOutput, **where, moe_layout=layout, moe_width=output.in_features)


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
