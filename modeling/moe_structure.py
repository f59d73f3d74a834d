"""Structure: which module stands where. Applies a `MoeExtension` to a stock model, in place, and takes it back.

The same function serves a live model (`extend`) and the `__init__` of the registered classes, so both give the same
model. Installed classes derive from the stock ones (`moe_install.py`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .configuration_moe_ext import (
    _OUTSIDE_BLOCKS,
    AttentionConfig,
    ExpertsConfig,
    LayerExtension,
    MoeExtension,
    RouterConfig,
)
from .moe_adapters import get_adapter
from .moe_attention import AttentionPlan, get_attention, install_router
from .moe_context import RoutingContext, RoutingLink
from .moe_experts import MoeExtBlock, MoeExtExperts, MoeExtGate, RoutedExperts
from .moe_families import DenseSpec, Family, MoeSpec, get_by_path, has_path, iter_bases, iter_layers, set_by_path
from .moe_install import Reference, install, is_installed, put_in_place, uninstall
from .moe_lora import LoraPlan, check_lora_plans, freeze_base, install_lora, plan_lora, remember_sequences
from .moe_parts import PartModule, list_parts
from .moe_router import BlockBias, GateRule, MoERouter, RouterSite, get_router


class _Held:
    """A context as the argument of a layer. FSDP2 takes dataclasses among the arguments apart and hands on copies of
    them, in which the records and the carry of the layer would be lost; it lets other objects be."""

    __slots__ = ("context",)

    def __init__(self, context: RoutingContext) -> None:
        self.context = context


class RoutedLayer(nn.Module):
    """Installed in front of a decoder layer class: binds the routing context of its forward.

    The context becomes a keyword argument before the layer's checkpointing wrapper runs, so a recomputation during
    backward sees the context of its own forward, also after further forwards.
    """

    moe_link: RoutingLink
    moe_crosses_layers: bool
    moe_ahead: Reference | None  # the layer's router, if it has something to do before the layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = self.moe_link.slots.context
        if context is not None:
            if self.moe_ahead is not None:
                # The wrapper of activation checkpointing drops the cache; so does this.
                recomputed = self.training and getattr(self, "gradient_checkpointing", False)
                cache = None if recomputed else layer_cache(args, kwargs)
                self.moe_ahead.module.before_layer(context, cache)
            if self.moe_link.sequences and context.sequences is None:
                context.sequences = remember_sequences(layer_cache(args, kwargs))
            kwargs["moe_ctx"] = _Held(context)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, moe_ctx: _Held | None = None, **kwargs: Any) -> Any:
        slots = self.moe_link.slots
        previous, slots.layer_context = slots.layer_context, None if moe_ctx is None else moe_ctx.context
        try:
            return super().forward(*args, **kwargs)
        finally:
            slots.layer_context = previous


REENTRANT = (
    "reentrant checkpointing (`use_reentrant=True`) recomputes a layer outside the graph of its forward, which gives "
    "wrong gradients for auxiliary losses and for routing state that crosses layers. Remove the option or set "
    '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
)


@dataclass(frozen=True)
class LayerPlan:
    """What will be done to one layer."""

    key: str
    layer: nn.Module
    parts: LayerExtension
    site: RouterSite
    config: Any
    moe: MoeSpec | None = None
    dense: DenseSpec | None = None


@dataclass(frozen=True)
class ExtensionPlan:
    """What will be done to a model: to blocks with experts, to attention, and to linear layers."""

    layers: list[LayerPlan]
    attention: list[AttentionPlan]
    lora: list[LoraPlan]


def find_moe_spec(layer: nn.Module, family: Family) -> MoeSpec | None:
    """The family's MoE record if this layer has a MoE block, `None` for a dense layer."""
    spec = family.moe
    if spec is None or not has_path(layer, spec.block):
        return None
    block = get_by_path(layer, spec.block)
    if not has_path(block, spec.experts) or not has_path(block, spec.router):
        return None
    return None if type(get_by_path(block, spec.router)).__name__ in spec.fixed_routers else spec


def gate_rule(spec: MoeSpec, config: Any) -> GateRule:
    """The record's rule with config keys replaced by this model's values."""
    import transformers
    from packaging.version import Version

    returns = spec.returns
    for version, order in spec.returns_before:
        if Version(transformers.__version__) < Version(version):
            returns = order
            break

    def value(entry: Any, default: Any) -> Any:
        return config_value(config, entry, default) if isinstance(entry, str) else entry

    groups = None
    if spec.groups is not None:
        num_groups, topk_groups, how = spec.groups
        count = config_value(config, num_groups, None)
        groups = (count, config_value(config, topk_groups, count), how) if count else None
    return GateRule(
        score=spec.score,
        order=spec.order,
        renormalize=bool(value(spec.renormalize, False)),
        scale=float(value(spec.scale, 1.0)),
        bias=spec.bias,
        expert_scale=spec.expert_scale,
        groups=groups,
        logits=spec.logits,
        returns=returns,
        input_3d=spec.input_3d,
    )


def stock_counts(spec: MoeSpec, config: Any, experts: nn.Module) -> tuple[int, int]:
    """(experts the router chooses from, experts per token) of a stock block."""
    num_experts = int(config_value(config, spec.num_experts, 0) or experts.num_experts)
    return num_experts, int(config_value(config, spec.top_k, 1)) if spec.top_k else 1


def config_value(config: Any, key: str, default: Any) -> Any:
    """Value of a config key; `default` where it is missing or null. `"a.b"` looks into a nested config or a list,
    `"a+b"` adds two."""
    if "+" in key:
        return sum(config_value(config, part, 0) for part in key.split("+"))
    found = config
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part, None)
    return default if found is None else found


def dense_linears(layer: nn.Module, spec: DenseSpec) -> dict[str, nn.Module]:
    """The projections of a dense block by role: `up` and `down`, with `gate` or `fused` where the block is gated."""
    roles = {"gate": spec.gate, "fused": spec.fused, "up": spec.up, "down": spec.down}
    found = {role: get_by_path(layer, path) for role, path in roles.items() if path and has_path(layer, path)}
    if "fused" in found:
        found.pop("up", None)
    return found


def dense_sizes(layer: nn.Module, spec: DenseSpec) -> tuple[int, int]:
    """(hidden size, intermediate size) of a dense block."""
    weight = dense_linears(layer, spec)["down"].weight
    hidden, intermediate = (weight.shape[1], weight.shape[0]) if spec.transposed else weight.shape
    return hidden, intermediate


def plan_extension(model: nn.Module, family: Family, extension: MoeExtension, *, building: bool) -> ExtensionPlan:
    """Resolve and check everything before anything is changed.

    Args:
        building: whether the model is being built (weights come later), so that experts may be created or resized.

    Raises:
        ValueError: where the declaration does not fit the model; nothing has been changed then.
    """
    plans: list[LayerPlan] = []
    attention: list[AttentionPlan] = []
    lora: list[LoraPlan] = []
    keys = []
    for key, layer, base in iter_layers(model, family):
        keys.append(key)
        parts = extension.for_layer(key)
        if parts is None or parts.is_empty:
            continue
        if is_installed(layer):
            raise ValueError(f'layer "{key}" is extended already; call `restore(model)` before extending it anew.')
        moe = find_moe_spec(layer, family)
        if replace(parts, **dict.fromkeys(_OUTSIDE_BLOCKS)).is_empty:
            pass
        elif moe is not None:
            plans.append(_plan_moe(key, len(plans), layer, base, parts, moe, building))
        elif parts.experts is not None and family.dense is not None and has_path(layer, family.dense.site):
            plans.append(_plan_dense(key, len(plans), layer, _live_config(model, base), parts, family.dense, building))
        if parts.attention is not None:
            attention.append(_plan_attention(key, len(attention), layer, base, parts.attention, family, building))
        if parts.lora_experts is not None:
            replaced = family.dense.site if parts.experts is not None and moe is None and family.dense else None
            lora.append(plan_lora(key, layer, base, parts.lora_experts, family, moe, is_causal(layer), replaced))
            if parts.attention is not None and get_attention(parts.attention.type).of_models:
                site = "" if family.attention is None else f"{family.attention.site}."
                if any(target.path.startswith(site) for target in lora[-1].targets):
                    raise ValueError(
                        f'layer "{key}" gets attention experts, whose projections are wider than those that '
                        "`lora_experts` would stand on. Leave the attention out of its modules."
                    )
    unknown = [key for key in extension.layers if key not in keys]
    if unknown:
        raise ValueError(f"`layers` names {unknown}, but this model has the layers {keys[0]} to {keys[-1]}.")
    if not plans and (not (attention or lora) or extension.declares_block):
        raise ValueError(
            f"nothing to extend: no layer of this {family.name} model has a Mixture-of-Experts block"
            + (". To make one from a dense model, use `upcycle(model, ...)`." if family.dense else ".")
        )
    for plan in plans:
        router = plan.parts.router
        if router is not None:
            router_class = get_router(router.type)
            router_class.check(router, plan.site)
            if router_class.mixes_tokens and plan.moe is not None and plan.moe.adapter is not None:
                raise ValueError(
                    f"the `{router.type}` router gives experts mixtures of tokens, which the blocks of {family.name} "
                    "models cannot take."
                )
        elif plan.parts.zero_experts is not None:
            raise ValueError(
                "`zero_experts` are choices of a router of this package, and the declaration has none; add one, such "
                'as `"router": {"type": "top_k"}`.'
            )
        for name, part in _declared_parts(plan):
            part.check(getattr(plan.parts, name), plan)
    for router_class, stack in _stacks(plans):
        members = [(plan.parts.router, plan.site) for plan in stack if plan.parts.router is not None]
        router_class.check_stack(members)
    for name, part in list_parts().items():
        having = [plan for plan in plans if getattr(plan.parts, name) is not None]
        for prefix in dict.fromkeys(plan.key.rpartition(".")[0] for plan in having):
            part.check_stack([plan for plan in having if plan.key.rpartition(".")[0] == prefix])
    for attention_plan in attention:
        get_attention(attention_plan.config.type).check(attention_plan.config, attention_plan)
    check_lora_plans(model, lora)
    for members_of_stack in _attention_stacks(attention):
        get_attention(members_of_stack[0].config.type).check_stack(members_of_stack)
    if any(crosses_layers(plan) for plan in plans):
        refuse_reentrant(model)
    return ExtensionPlan(plans, attention, lora)


def _attention_stacks(plans: list[AttentionPlan]) -> list[list[AttentionPlan]]:
    """Layers of the same stack and kind of attention, in order."""
    found: dict[tuple[str, str], list[AttentionPlan]] = {}
    for plan in plans:
        found.setdefault((plan.config.type, plan.key.rpartition(".")[0]), []).append(plan)
    return list(found.values())


def is_causal(layer: nn.Module) -> bool:
    """Whether a layer's attention is causal, as its attention module says. Layers without one (recurrent ones) are."""
    return next((bool(module.is_causal) for module in layer.modules() if hasattr(module, "is_causal")), True)


def _declared_parts(plan: LayerPlan) -> Iterator[tuple[str, Any]]:
    for name, part in list_parts().items():
        if getattr(plan.parts, name) is not None:
            yield name, part


def crosses_layers(plan: LayerPlan) -> bool:
    """Whether something of this layer goes to later ones through the context's carry."""
    router = plan.parts.router
    parts = any(part.crosses_layers for _, part in _declared_parts(plan))
    return parts or (router is not None and get_router(router.type).crosses_layers)


def _stacks(plans: list[LayerPlan]) -> list[tuple[type[MoERouter], list[LayerPlan]]]:
    """Layers of the same stack and router type, in order."""
    found: dict[tuple[str, str], list[LayerPlan]] = {}
    for plan in plans:
        if plan.parts.router is not None:
            found.setdefault((plan.parts.router.type, plan.key.rpartition(".")[0]), []).append(plan)
    return [(get_router(name), members) for (name, _), members in found.items()]


def refuse_reentrant(model: nn.Module) -> None:
    """Raise `ValueError` where reentrant activation checkpointing is on: it loses gradients between layers."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        active = getattr(module, "gradient_checkpointing", False)
        if active and isinstance(function, functools.partial) and function.keywords.get("use_reentrant"):
            raise ValueError(REENTRANT)


def _plan_moe(
    key: str, order: int, layer: nn.Module, base: nn.Module, parts: LayerExtension, spec: MoeSpec, building: bool
) -> LayerPlan:
    config = base.config
    block = get_by_path(layer, spec.block)
    for name, module in (("layer", layer), ("router", get_by_path(block, spec.router))):
        if "forward" in vars(module):
            raise ValueError(
                f'the {name} of layer "{key}" carries hooks of accelerate. Extend the model before it is '
                "dispatched, or load the extended checkpoint with `from_pretrained(..., device_map=...)`."
            )
    experts = get_by_path(block, spec.experts)
    num_experts, top_k = stock_counts(spec, config, experts)
    wanted = parts.experts or ExpertsConfig()
    if wanted.num_experts not in (None, num_experts) and not building:
        raise ValueError(
            f'layer "{key}" has {num_experts} experts, `num_experts` asks for {wanted.num_experts}. '
            "`extend` keeps weights as they are; counts change by pruning or merging experts."
        )
    num_experts = wanted.num_experts or num_experts
    top_k = min(wanted.num_experts_per_tok or top_k, num_experts)
    hidden = int(config.hidden_size)
    zero = _zero_experts(parts, num_experts)
    rule = gate_rule(spec, config)
    if rule.bias == "arg" and not has_path(block, spec.block_bias or ""):
        rule = replace(rule, bias=None)  # the block hands its gate `None`
    site = RouterSite(key, order, num_experts, top_k, hidden, rule, zero, is_causal(layer))
    return LayerPlan(key, layer, parts, site, config, spec)


def _zero_experts(parts: LayerExtension, num_experts: int) -> Any:
    if parts.zero_experts is None and parts.router is not None:
        parts.zero_experts = get_router(parts.router.type).default_zero_experts(parts.router, num_experts)
    return parts.zero_experts


def _plan_dense(
    key: str, order: int, layer: nn.Module, config: Any, parts: LayerExtension, spec: DenseSpec, building: bool
) -> LayerPlan:
    experts = parts.experts
    assert experts is not None
    if not building:
        raise ValueError(
            f'layer "{key}" is dense, and `experts` would replace it by experts with random weights. Use '
            "`upcycle(model, ...)`, which fills them."
        )
    if experts.num_experts is None:
        raise ValueError("`experts.num_experts` is required on a dense model.")
    top_k = experts.num_experts_per_tok or min(2, experts.num_experts)
    hidden, _ = dense_sizes(layer, spec)
    zero = _zero_experts(parts, experts.num_experts)
    site = RouterSite(key, order, experts.num_experts, top_k, hidden, GateRule(), zero, is_causal(layer))
    return LayerPlan(key, layer, parts, site, config, dense=spec)


def _plan_attention(
    key: str,
    order: int,
    layer: nn.Module,
    base: nn.Module,
    config: AttentionConfig,
    family: Family,
    building: bool,
) -> AttentionPlan:
    spec = family.attention
    if spec is None or not has_path(layer, spec.site):
        what = f'layer "{key}" has none that it knows' if spec else f"that of {family.name} is not known to it"
        raise ValueError(f"this package cannot extend the attention here: {what}. Leave `attention` out there.")
    if "forward" in vars(layer):
        raise ValueError(
            f'layer "{key}" carries hooks of accelerate. Extend the model before it is dispatched, or load the '
            "extended checkpoint with `from_pretrained(..., device_map=...)`."
        )
    return AttentionPlan(key, order, layer, config, base.config, spec, is_causal(layer), building)


def apply_plans(model: nn.Module, family: Family, extension: ExtensionPlan) -> RoutingLink:
    """Carry out checked plans and connect everything by one new link, which is returned."""
    link = RoutingLink()
    model.moe_link = link
    for _, base in iter_bases(model, family):
        connect(base, link)
    gates: dict[str, nn.Module] = {}
    plans = extension.layers
    every: list[Any] = [*plans, *extension.attention, *extension.lora]
    layers: dict[str, nn.Module] = {plan.key: plan.layer for plan in every}
    crossing = {plan.key for plan in plans if crosses_layers(plan)}
    for attention in extension.attention:
        get_attention(attention.config.type).install(attention.config, attention, attention.attention, link)
    for lora in extension.lora:
        install_lora(lora, link)
    for plan in plans:
        router_class = None if plan.parts.router is None else get_router(plan.parts.router.type)
        if router_class is not None and plan.site.causal and not router_class.causal:
            link.non_causal = router_class.config_class.type
        if plan.dense is not None:
            block: nn.Module = _build_block(plan)
            set_by_path(plan.layer, plan.dense.site, block)
            for path in plan.dense.bypass:
                set_by_path(plan.layer, path, nn.Identity())
            gate, experts = block.gate, block.experts
        else:
            assert plan.moe is not None
            block = get_by_path(plan.layer, plan.moe.block)
            gate, experts = get_by_path(block, plan.moe.router), get_by_path(block, plan.moe.experts)
            resize(gate, experts, plan.site.num_experts, plan.site.top_k)
        if plan.parts.router is not None:
            attributes = {}
            if plan.moe is not None and plan.site.rule.bias == "arg":
                attributes["moe_block_bias"] = BlockBias(block, plan.moe.block_bias or "")
            install_router(gate, plan.parts.router, plan.site, link, **attributes)
        if plan.moe is not None and plan.moe.adapter is not None:
            if plan.parts.router is not None:
                install(block, get_adapter(plan.moe.adapter), moe_spec=plan.moe)
                block.setup(plan.config)
        else:
            mixes = router_class is not None and router_class.mixes_tokens
            order = plan.site.order if mixes else None
            install(
                experts,
                RoutedExperts,
                moe_num_experts=plan.site.num_experts,
                moe_link=link,
                moe_mixing_order=order,
                moe_min_slots=1 if plan.moe is None else plan.moe.min_slots,
            )
        for name, part in _declared_parts(plan):
            part.install(getattr(plan.parts, name), plan, block, gate, experts, link)
        gates[plan.key] = gate
    for key, layer in layers.items():
        gate = gates.get(key)
        works_ahead = isinstance(gate, MoERouter) and type(gate).before_layer is not MoERouter.before_layer
        ahead = Reference(gate) if gate is not None and works_ahead else None
        install(layer, RoutedLayer, moe_link=link, moe_crosses_layers=key in crossing, moe_ahead=ahead)
    bases = {prefix.rstrip("."): base for prefix, base in iter_bases(model, family)}
    for router_class, stack in _stacks(plans):
        router_class.setup_stack(bases[stack[0].key.rpartition(".")[0]], [gates[plan.key] for plan in stack])
    freeze_base(model)
    return link


def connect(base: nn.Module, link: RoutingLink) -> None:
    """Let every forward of a base model have a routing context."""
    base.moe_link = link
    base.register_forward_pre_hook(_open_context, with_kwargs=True)
    base.register_forward_hook(_close_context, with_kwargs=True, always_call=True)


def _build_block(plan: LayerPlan) -> MoeExtBlock:
    spec, experts, site = plan.dense, plan.parts.experts, plan.site
    assert spec is not None and experts is not None
    linears = dense_linears(plan.layer, spec)
    down = linears["down"]
    hidden, intermediate = dense_sizes(plan.layer, spec)
    dropout = None
    if spec.dropout is not None and has_path(plan.layer, spec.dropout):
        dropout = get_by_path(plan.layer, spec.dropout)
        dropout = nn.Dropout(dropout) if isinstance(dropout, float) else dropout
    placement = {"device": down.weight.device, "dtype": down.weight.dtype}
    fused = MoeExtExperts(
        plan.config,
        site.num_experts,
        hidden,
        experts.intermediate_size or intermediate,
        activation=get_by_path(plan.layer, spec.activation),
        has_gate="fused" in linears or "gate" in linears,
        has_bias=getattr(down, "bias", None) is not None,
        dropout=dropout if spec.dropout_at == "hidden" else None,
        **placement,
    )
    gate = MoeExtGate(site.num_experts, site.top_k, hidden, **placement)
    block = MoeExtBlock(gate, fused, experts.output_scale, dropout if spec.dropout_at == "output" else None)
    return block.train(plan.layer.training)


def _live_config(model: nn.Module, base: nn.Module) -> Any:
    """The config object that `set_experts_implementation` writes to. Encoder-decoder stacks hold copies of it."""
    nested = [getattr(model.config, name, None) for name in model.config.sub_configs]
    return base.config if any(base.config is config for config in nested) else model.config


_STOCK_TOP_K = "moe_stock_top_k"  # what `resize` found in a gate, for `remove_extension`


def resize(gate: nn.Module, experts: nn.Module, num_experts: int, top_k: int) -> None:
    """Give router and experts the declared counts; new tensors are empty and are filled by loading or by
    `initialize_weights`. A module names in `moe_not_per_expert` which of its tensors have no axis of experts."""
    old = int(getattr(experts, "num_experts", num_experts))
    if hasattr(gate, "top_k"):
        vars(gate).setdefault(_STOCK_TOP_K, gate.top_k)
        gate.top_k = top_k
    if old == num_experts:
        return
    for module in (*gate.modules(), *experts.modules()):
        if hasattr(module, "num_experts"):
            module.num_experts = num_experts
        vars(module).pop("_is_hf_initialized", None)
        others = getattr(module, "moe_not_per_expert", ())
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.shape[:1] == (old,) and name not in others:
                    empty = tensor.new_empty(num_experts, *tensor.shape[1:])
                    store[name] = nn.Parameter(empty, tensor.requires_grad) if store is module._parameters else empty


def given_cache(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of a forward: `cache` from transformers 5.24 on, `past_key_values` before."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def layer_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache among the arguments of a decoder layer; families differ in name and place."""
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)


def _open_context(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    link = module.moe_link
    slots = link.slots
    ids = kwargs.get("input_ids", args[0] if args else None)
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    positions = kwargs.get("position_ids")
    cache = given_cache(kwargs)
    embeddings = (kwargs.get(name) for name in ("inputs_embeds", "pixel_values"))
    first = next((tensor for tensor in (ids, *embeddings) if isinstance(tensor, torch.Tensor)), None)
    told = any(isinstance(tensor, torch.Tensor) and tensor.dim() == 2 for tensor in (mask, positions))
    if ids is None:  # a multimodal model has made embeddings of them
        ids = _ids_of(slots.input_ids, kwargs.get("inputs_embeds"))
    slots.context = RoutingContext(
        input_ids=ids if isinstance(ids, torch.Tensor) and not ids.is_floating_point() else None,
        attention_mask=mask,
        row_modes=link.row_modes,
        policies=link.policies,
        step=link.step,
        generator=link.generator,
        batch_size=None if first is None else first.shape[0],
        replayed=link.replayed,
        position_ids=positions,
        # Asked now, since the first layer adds the new tokens to the cache.
        past_length=0 if told or not hasattr(cache, "get_seq_length") else cache.get_seq_length(),
        task_ids=link.task_ids if slots.task_ids is None else slots.task_ids,
        sequences=remember_sequences(cache, given=True) if link.sequences else None,
    )
    if slots.collected is not None:
        slots.collected.append(slots.context)


def _ids_of(ids: Any, embeddings: Any) -> torch.Tensor | None:
    """The token ids that the outer model was given, where the embeddings can be theirs."""
    tensors = isinstance(ids, torch.Tensor) and isinstance(embeddings, torch.Tensor)
    return ids if tensors and ids.shape == embeddings.shape[:2] else None


def _close_context(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    slots = module.moe_link.slots
    context, slots.context = slots.context, None
    if slots.collected is None and context is not None and output is not None:  # the base was called by itself
        for observer in module.moe_link.observers:
            observer([context])


def remove_extension(model: nn.Module, family: Family) -> None:
    """Give every module its stock class back and drop what was added. For models without created experts."""
    for module in list(model.modules()):
        if _STOCK_TOP_K in vars(module):
            module.top_k = vars(module).pop(_STOCK_TOP_K)
        if is_installed(module) or "moe_added" in vars(module) or "moe_frozen" in vars(module):
            uninstall(module)
    for _, base in iter_bases(model, family):
        for hooks, function in ((base._forward_pre_hooks, _open_context), (base._forward_hooks, _close_context)):
            for handle in [handle for handle, hook in hooks.items() if hook is function]:
                for store in (
                    hooks,
                    base._forward_hooks_always_called,
                    base._forward_hooks_with_kwargs,
                    base._forward_pre_hooks_with_kwargs,
                ):
                    store.pop(handle, None)
        vars(base).pop("moe_link", None)
    vars(model).pop("moe_link", None)


def iter_routers(model: nn.Module) -> Iterator[MoERouter]:
    """The installed routers, in the order of computation."""
    found = [module for module in model.modules() if isinstance(module, MoERouter) and is_installed(module)]
    yield from found


def shared_of_routers(model: nn.Module, family: Family) -> list[PartModule]:
    """What the routers of a stack share, as `setup_stack` hung it on the base model."""
    bases = [base for _, base in iter_bases(model, family)]
    children = [base._modules.get(name) for base in bases for name in vars(base).get("moe_added", ())]
    return [child for child in children if isinstance(child, PartModule)]


def is_created(module: nn.Module) -> bool:
    """Whether a module has tensors of our making, which its `init_weights(std)` initialises."""
    if isinstance(module, MoERouter):
        return is_installed(module)
    return isinstance(module, (MoeExtExperts, MoeExtGate, PartModule))


def created_blocks(model: nn.Module) -> list[MoeExtBlock]:
    """Blocks that stand in place of a dense feed-forward block."""
    return [module for module in model.modules() if isinstance(module, MoeExtBlock)]


@contextlib.contextmanager
def trace_routing(model: nn.Module) -> Iterator[list[RoutingContext]]:
    """Collect the routing of every forward inside the `with` block: a list that receives one context per stack and
    forward, each with `records` by layer key. Records keep their graph; detach what you keep.

    Raises:
        ValueError: where the model carries no extension.
    """
    link = next((m.moe_link for m in model.modules() if isinstance(vars(m).get("moe_link"), RoutingLink)), None)
    if link is None:
        raise ValueError("this model carries no extension; call `extend(model, ...)` first.")
    contexts: list[RoutingContext] = []
    observer: Callable[[list[RoutingContext]], None] = contexts.extend
    link.observers.append(observer)
    try:
        yield contexts
    finally:
        link.observers.remove(observer)


@contextlib.contextmanager
def route_rows(
    model: nn.Module, modes: list[str], policies: Mapping[str, dict[str, Any] | RouterConfig] | None = None
) -> Iterator[None]:
    """Let the rows of a batch follow different routing policies, in one forward and with one cache.

    Args:
        model (`PreTrainedModel`):
            An extended model.
        modes (`list[str]`):
            Name of the policy of each row of the batch.
        policies (`dict`, *optional*):
            By name of a policy, the fields of the routers' configs that it changes, such as
            `{"weak": {"num_experts_per_tok": 1}}`, or the config of another router without parameters of its own,
            which chooses by the same logits. A name that is missing here follows the model's config; rows of
            different names draw their random numbers apart.

    Raises:
        ValueError: where the model carries no router of this package, or a policy does not fit its routers.

    Example:
        ```python
        >>> with route_rows(model, ["strong", "weak"], {"weak": {"num_experts_per_tok": 1, "first_rank": 2}}):
        ...     logits = model(input_ids.repeat(2, 1)).logits
        ```
    """
    routers = list(iter_routers(model))
    if not routers:
        raise ValueError("no layer of this model has a router of this package; call `extend(model, ...)` first.")
    if not modes:
        raise ValueError("`modes` is empty; name the policy of each row of the batch.")
    mixing = next((router.moe_config.type for router in routers if router.mixes_tokens), None)
    if mixing is not None:
        raise ValueError(f"the `{mixing}` router mixes the tokens of whole sequences; its rows follow one policy.")
    policies = policies or {}
    unused = [name for name in policies if name not in modes]
    if unused:
        raise ValueError(f"`policies` defines {unused}, but `modes` names {sorted(set(modes))}.")
    twins: dict[str, dict[str, Any]] = {}
    for name, policy in policies.items():
        twins[name] = {router.moe_site.key: _following(router, name, policy) for router in routers}
    link = routers[0].moe_link
    previous = link.row_modes, link.policies
    link.row_modes, link.policies = list(modes), twins
    try:
        yield
    finally:
        link.row_modes, link.policies = previous


def _following(router: MoERouter, name: str, policy: dict[str, Any] | RouterConfig) -> MoERouter:
    """A shallow copy of a router, with the same tensors, that follows another policy."""
    twin = copy.copy(router)
    kind = router.moe_config.type
    if isinstance(policy, RouterConfig):
        other = get_router(policy.type)
        if not other.stateless:
            raise ValueError(f"policy `{name}`: the router `{policy.type}` has parameters of its own.")
        if not other.own_logits and (router.own_logits or not router.stateless):
            raise ValueError(
                f"policy `{name}`: `{policy.type}` chooses by the logits of the stock gate, and `{kind}` does not; "
                f"change fields of `{kind}` for these rows instead."
            )
        other.check(policy, router.moe_site)
        put_in_place(twin, other)
        twin.moe_config = policy
        return twin
    try:
        twin.moe_config = replace(router.moe_config, **policy)
    except TypeError as error:
        raise ValueError(f"policy `{name}` does not fit the `{kind}` router: {error}") from None
    router.check(twin.moe_config, router.moe_site)
    return twin


def auxiliary_losses(contexts: list[RoutingContext]) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Auxiliary losses of one forward.

    Returns:
        The weighted sum to add to the loss (`None` where no router has a loss), and the unweighted losses by name;
        those of routers in attention begin with `attention_`, those of LoRA experts with `lora_`. All are means over
        the layers that have such a router, so coefficients do not depend on depth; layers that share one decision
        count as one.
    """
    total: torch.Tensor | None = None
    named: dict[str, list[torch.Tensor]] = {}
    for name in ("", "attention", "lora"):
        group = [context.inner[name] if name else context for context in contexts if not name or name in context.inner]
        prefix = f"{name}_" if name else ""
        count = sum(len(context.decisions()) for context in group)
        for context in group:
            for record in context.decisions():
                mask = context.token_mask(record.index.shape[0])
                coefs = record.config.loss_coefs if record.coefs is None else record.coefs
                for kind, loss in get_router(record.config.type).aux_losses(record, mask).items():
                    first = next(iter(named.values()))[0] if named else loss
                    loss = loss.to(first.device)
                    named.setdefault(f"{prefix}{kind}", []).append(loss)
                    weighted = coefs[kind] * loss / count
                    total = weighted if total is None else total + weighted
    for context in contexts:
        for name, (loss, coef) in context.losses.items():
            named.setdefault(name, []).append(loss)
            total = coef * loss if total is None else total + coef * loss
    return total, {name: torch.stack(losses).mean() for name, losses in named.items()}
