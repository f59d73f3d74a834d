"""Extend a live model, take the extension back, and say what stands where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .modeling.attention_heads import RoutedHeads
from .modeling.configuration_moe_ext import MoeExtension, RouterConfig
from .modeling.modeling_moe_ext import extended_class, extended_config_class
from .modeling.moe_context import RoutingLink
from .modeling.moe_experts import DEFAULT_IMPLEMENTATION, MoeExtGate
from .modeling.moe_families import Family, get_by_path, get_family, has_path, iter_layers
from .modeling.moe_models import OWN_MODELS
from .modeling.moe_routed_model import OwnExperts, RoutedModel
from .modeling.moe_router import MoERouter
from .modeling.moe_structure import (
    apply_plans,
    config_value,
    created_blocks,
    find_moe_spec,
    is_created,
    is_installed,
    plan_extension,
    remove_extension,
    stock_counts,
)
from .quantization.config import quantization_of


def require_family(model: PreTrainedModel) -> Family:
    """The family record of a model.

    Raises:
        TypeError: for something that is no transformers model.
        ValueError: for an unsupported architecture.
    """
    if not isinstance(model, PreTrainedModel):
        hint = " Pass the base model, before adapters are added." if hasattr(model, "peft_config") else ""
        raise TypeError(f"expected a transformers model, got {type(model).__name__}.{hint}")
    family = get_family(model.config.model_type)
    if family is None:
        raise ValueError(
            f"the architecture `{model.config.model_type}` is not supported. `hf-moe list families` shows those that "
            "are; CONTRIBUTING.md tells how to add one."
        )
    return family


def extend(model: PreTrainedModel, extension: MoeExtension | RouterConfig | dict[str, Any]) -> PreTrainedModel:
    """Give the routers of a live stock MoE model what `extension` declares, in place.

    The model becomes an instance of the registered class (`MixtralForCausalLM` -> `MoeExtMixtralForCausalLM`), so it
    saves, loads and pushes as what it is. Weights are untouched; `restore` takes the extension back.

    Args:
        model (`PreTrainedModel`):
            A model of a supported MoE family (`hf-moe list families`).
        extension (`MoeExtension`, `RouterConfig` or `dict`):
            What differs from the stock model. A router's config alone means that router in every MoE layer.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: where the declaration is malformed or does not fit. The model is then unchanged.

    Example:
        ```python
        >>> extend(model, MoeExtension(router=TopPRouterConfig(threshold=0.4)))
        ```
    """
    family = require_family(model)
    if family.name in OWN_MODELS:
        raise ValueError(
            f"{type(model).__name__} declares its routers in its own config; set `moe_ext` there before it is built."
        )
    if isinstance(extension, dict):
        extension = MoeExtension.from_dict(extension)
    if isinstance(extension, RouterConfig):
        extension = MoeExtension(router=extension)
    if not isinstance(extension, MoeExtension):
        raise TypeError(f"expected a MoeExtension or its dict, got {type(extension).__name__}.")
    if "moe_link" in vars(model):
        raise ValueError("this model is extended already; call `restore(model)` before extending it anew.")
    if family.moe is None and extension.declares_block:
        raise ValueError(
            f"{type(model).__name__} is a dense model without routers. `upcycle(model, ...)` makes a "
            "Mixture-of-Experts of it."
        )
    return install(model, family, extension, building=False)


def install(model: PreTrainedModel, family: Family, extension: MoeExtension, *, building: bool) -> PreTrainedModel:
    """Check, then apply an extension to a live model and make it an instance of the registered class."""
    plans = plan_extension(model, family, extension, building=building)
    stock_model: Any = type(model)
    stock_config: Any = type(model.config)
    model_class, config_class = extended_class(stock_model), extended_config_class(stock_config)
    try:
        link = apply_plans(model, family, plans)
    except BaseException:
        if not building:
            remove_extension(model, family)
        raise
    link.previous_implementation = model.config._experts_implementation
    model.__class__ = model_class
    model.config.__class__ = config_class
    model.config.moe_ext = extension.to_dict()
    if model.config._experts_implementation in (None, "grouped_mm", "eager"):
        model.config._experts_implementation = DEFAULT_IMPLEMENTATION
    std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    for module in model.modules():
        if is_created(module) and not any(tensor.is_meta for tensor in module.parameters()):
            if isinstance(module, MoERouter) and module.moe_site.group and isinstance(module, MoeExtGate):
                MoeExtGate.init_weights(module, std)  # a gate of our making, whose router has weights of its own
            module.init_weights(std)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Take an extension made by `extend` back: stock classes, `state_dict` keys and logits are as before.

    Raises:
        ValueError: for a model that is not extended, whose dense blocks were replaced by experts, or whose layers have
            different numbers of experts.
    """
    family = require_family(model)
    if "moe_link" not in vars(model):
        raise ValueError(f"this {type(model).__name__} is not extended; there is nothing to restore.")
    if family.name in OWN_MODELS:
        raise ValueError(f"{type(model).__name__} is no stock model that was extended; there is nothing to restore.")
    if created_blocks(model):
        raise ValueError("the experts of this model were made from a dense model; its dense blocks no longer exist.")
    _refuse_other_counts(model, family)
    link: RoutingLink = model.moe_link
    remove_extension(model, family)
    config = model.config
    config.__class__ = type(config).__mro__[2]
    for name in ("moe_ext", "auto_map"):
        vars(config).pop(name, None)
    if link.previous_implementation is not None:
        config._experts_implementation = link.previous_implementation
    return model


def _refuse_other_counts(model: PreTrainedModel, family: Family) -> None:
    declared = MoeExtension.from_dict(model.config.moe_ext or {})
    for key, _, base in iter_layers(model, family):
        parts = declared.for_layer(key)
        count = None if parts is None or parts.experts is None else parts.experts.num_experts
        usual = config_value(base.config, family.moe.num_experts, count) if family.moe is not None else count
        if count not in (None, usual):
            raise ValueError(
                f'layer "{key}" has {count} experts, and the others have {usual}; a stock {family.name} model has '
                "as many in every layer, so there is nothing to restore."
            )


@dataclass(frozen=True)
class LayerDescription:
    """One layer: its key, `"dense"` or `"moe"`, the names of router and experts, and the counts."""

    key: str
    kind: str
    router: str = ""
    num_experts: int = 0
    num_experts_per_tok: int = 0
    parameters: int = 0
    active_parameters: int = 0


@dataclass(frozen=True)
class ModelDescription:
    """What stands where. `active_parameters` counts what one token uses; with dynamic routing, at the most.

    `attention` are the layers whose attention has experts; they are in `layers` too, with what is not their experts'.
    `quantization` says what is stored in which format of this package, and is empty where nothing is.
    """

    model: str
    family: str
    layers: tuple[LayerDescription, ...]
    parameters: int
    active_parameters: int
    attention: tuple[LayerDescription, ...] = ()
    quantization: str = ""

    def __str__(self) -> str:
        rows = [("layer", "kind", "router", "experts", "per token", "parameters", "active")]
        for layer in (*self.layers, *self.attention):
            counts = (str(layer.num_experts), str(layer.num_experts_per_tok)) if layer.num_experts else ("", "")
            sizes = (f"{layer.parameters:,}", f"{layer.active_parameters:,}")
            rows.append((layer.key, layer.kind, layer.router, *counts, *sizes))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
        lines = ["  ".join(cells).rstrip() for cells in padded]
        head = f"{self.model} ({self.family}): {self.parameters:,} parameters, {self.active_parameters:,} per token"
        return "\n".join([head, *([f"quantized: {self.quantization}"] if self.quantization else []), *lines])


def describe(model: PreTrainedModel) -> ModelDescription:
    """What stands where in a stock or extended model, with total and active parameters per token."""
    own = model.own_experts() if isinstance(model, RoutedModel) else []
    if own:
        return _describe_own(model, own)
    family = require_family(model)
    layers = []
    attention = []
    inactive_total = 0
    for key, layer, base in iter_layers(model, family):
        size = sum(p.numel() for p in layer.parameters())
        found = _describe_attention(key, layer, family, base.config)
        if found is not None:
            attention.append(found)
            size -= found.parameters
            inactive_total += found.parameters - found.active_parameters
        block = next(iter(created_blocks(layer)), None)
        spec = find_moe_spec(layer, family) if block is None else None
        if block is None and spec is None:
            layers.append(LayerDescription(key, "dense", parameters=size, active_parameters=size))
            continue
        if block is not None:
            gate, experts, top_k, count = block.gate, block.experts, block.gate.top_k, block.gate.num_experts
            stacks = []
        else:
            assert spec is not None
            stock_block = get_by_path(layer, spec.block)
            gate, experts = get_by_path(stock_block, spec.router), get_by_path(stock_block, spec.experts)
            count, top_k = stock_counts(spec, base.config, experts)
            stacks = [get_by_path(stock_block, path) for path in spec.stacks]
        router, count, top_k = _router_counts(gate, count, top_k)
        routed = sum(
            p.numel()
            for module in (experts, *stacks)
            for name, p in module.named_parameters()
            if not name.startswith("moe_")
        )
        inactive = routed * (count - top_k) // count
        inactive_total += inactive
        layers.append(LayerDescription(key, "moe", router, count, top_k, size, size - inactive))
    total = sum(p.numel() for p in model.parameters())
    sizes = (total, total - inactive_total)
    quantized = quantization_of(model.config)
    formats = "" if quantized is None else str(quantized)
    return ModelDescription(type(model).__name__, family.name, tuple(layers), *sizes, tuple(attention), formats)


def _router_counts(gate: Any, count: int, top_k: int) -> tuple[str, int, int]:
    """Name of a gate's router, experts that it chooses from, and experts of a token at the most."""
    if not (isinstance(gate, MoERouter) and is_installed(gate)):
        return type(gate).__name__, count, top_k
    site = gate.moe_site
    # Further slots hold zero-computation experts.
    return gate.moe_config.type, site.num_experts, min(gate.num_slots(gate.moe_config, site), site.num_experts)


def _describe_own(model: PreTrainedModel, own: list[OwnExperts]) -> ModelDescription:
    """That of an architecture whose routers choose parts of experts, so that no expert can be said to be unused."""
    layers = []
    for part in own:
        size = sum(p.numel() for p in part.layer.parameters())
        layers.append(
            LayerDescription(
                part.key, "moe", type(part.router).__name__, part.num_experts, part.num_experts, size, size
            )
        )
    total = sum(p.numel() for p in model.parameters())
    return ModelDescription(type(model).__name__, model.config.model_type, tuple(layers), total, total)


def _describe_attention(key: str, layer: Any, family: Family, config: Any) -> LayerDescription | None:
    """The attention experts of a layer; `None` where it has none."""
    if family.attention is None:
        return None
    attention, spec = get_by_path(layer, family.attention.site), family.attention.experts
    if isinstance(attention, RoutedHeads):  # all are computed, whatever the router chooses
        site = attention.moe_gate.moe_site
        router, count, top_k = _router_counts(attention.moe_gate, site.num_experts, site.top_k)
        size = sum(p.numel() for p in attention.parameters())
        return LayerDescription(f"attention.{key}", "moe", router, count, top_k, size, size)
    if spec is None or not has_path(layer, spec.block):
        return None
    block = get_by_path(layer, spec.block)
    gate, experts = get_by_path(block, spec.router), get_by_path(block, spec.experts)
    router, count, top_k = _router_counts(gate, *stock_counts(spec, config, experts))
    parts = [experts, *(get_by_path(block, path) for path in spec.stacks)]
    size = sum(p.numel() for part in parts for p in part.parameters())
    return LayerDescription(f"attention.{key}", "moe", router, count, top_k, size, size * top_k // count)
