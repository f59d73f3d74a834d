"""The mixtures of a model, as what can have more or fewer experts.

Where their tensors are, whether the number can change, and how the config says so; for `module_editing.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .kernels.quantized_tensor import QuantizedTensor
from .modeling.attention_routed import RoutedAttentionConfig
from .modeling.configuration_moe_ext import ExpertsConfig, LayerExtension, MoeExtension
from .modeling.moe_families import Family, MoeSpec, get_by_path, has_path, iter_layers
from .modeling.moe_install import is_installed
from .modeling.moe_models import OWN_MODELS
from .modeling.moe_router import MoERouter
from .modeling.moe_structure import config_value, created_blocks, find_moe_spec, gate_rule, stock_counts
from .patching import install, require_family


@dataclass(frozen=True)
class Mixture:
    """One mixture of experts of a model.

    Attributes:
        key: that of `describe`, `"3"` or `"attention.3"`.
        layer: key of its layer.
        gate, experts: the modules.
        num_experts: E.
        top_k: the fewest experts that it can work with.
        config: of the base model.
        spec: where its parts are; `None` where it stands in place of a dense block.
        attention: whether its experts are those of attention.
    """

    key: str
    layer: str
    gate: Any
    experts: nn.Module
    num_experts: int
    top_k: int
    config: Any
    spec: MoeSpec | None
    attention: bool = False

    def gate_modules(self) -> list[nn.Module]:
        """The gate and what hangs on it."""
        return list(self.gate.modules())

    def stacks(self) -> Iterator[tuple[str, nn.Module, dict[str, Any], str, torch.Tensor]]:
        """(path, module, its dict, name, tensor) of every tensor with a row for each expert: what `resize` finds when
        the model is loaded, and what the router says of its own."""
        for root, part in (("gate", self.gate), ("experts", self.experts)):
            for path, module in part.named_modules(prefix=root):
                others = getattr(module, "moe_not_per_expert", ())
                own = getattr(module, "expert_rows", None) or ()
                for store in (module._parameters, module._buffers):
                    for name, tensor in list(store.items()):
                        if tensor is None or tensor.shape[:1] != (self.num_experts,) or name in others:
                            continue
                        if not name.startswith("moe_") or name in own:
                            yield path, module, store, name, tensor


def find_mixtures(model: PreTrainedModel) -> tuple[Family, list[Mixture]]:
    """The family record of a model and its mixtures, in the order of its layers.

    Raises:
        TypeError, ValueError: for an unsupported model, or one without experts.
    """
    family = require_family(model)
    found = []
    inner = None if family.attention is None else family.attention.experts
    for key, layer, base in iter_layers(model, family):
        spec = find_moe_spec(layer, family)
        block = next(iter(created_blocks(layer)), None)
        if spec is not None:
            found.append(_mixture(key, key, layer, base.config, spec, False))
        elif block is not None:
            gate: Any = block.gate
            least = _fewest(gate, gate.top_k)
            found.append(Mixture(key, key, gate, block.experts, gate.num_experts, least, base.config, None))
        if inner is not None and has_path(layer, inner.block):
            found.append(_mixture(f"attention.{key}", key, layer, base.config, inner, True))
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts.")
    return family, found


def _mixture(key: str, layer_key: str, layer: Any, config: Any, spec: MoeSpec, attention: bool) -> Mixture:
    block = get_by_path(layer, spec.block)
    gate, experts = get_by_path(block, spec.router), get_by_path(block, spec.experts)
    count, top_k = stock_counts(spec, config, experts)
    count = int(getattr(experts, "num_experts", count))
    return Mixture(key, layer_key, gate, experts, count, _fewest(gate, top_k), config, spec, attention)


def _fewest(gate: Any, top_k: int) -> int:
    """The fewest experts that a gate can choose from. `top_k` is that of a stock one."""
    if not (isinstance(gate, MoERouter) and is_installed(gate)):
        return top_k
    if hasattr(gate.moe_config, "max_slots"):
        return gate.moe_config.max_slots or 1
    return gate.num_slots(gate.moe_config, gate.moe_site)


def choose_mixtures(mixtures: list[Mixture], layers: Iterable[str] | None) -> list[Mixture]:
    """Those whose keys are named, or all.

    Raises:
        ValueError: for a key that no mixture has.
    """
    if layers is None:
        return mixtures
    wanted = [str(key) for key in ([layers] if isinstance(layers, str) else layers)]
    known = [mixture.key for mixture in mixtures]
    unknown = [key for key in wanted if key not in known]
    if unknown or not wanted:
        raise ValueError(f"`layers` is {wanted}; the mixtures of this model are {', '.join(known)}.")
    return [mixture for mixture in mixtures if mixture.key in wanted]


def check_counts(model: PreTrainedModel, family: Family, chosen: list[Mixture], counts: dict[str, int]) -> None:
    """Raise `ValueError` where the number of experts cannot become that in `counts`, with the reason."""
    declared = MoeExtension.from_dict(getattr(model.config, "moe_ext", None) or {})
    for mixture in chosen:
        count, router = counts[mixture.key], mixture.gate if isinstance(mixture.gate, MoERouter) else None
        if count < mixture.top_k:
            raise ValueError(
                f"`{mixture.key}` would have {count} experts, and a token uses {mixture.top_k}. Remove fewer."
            )
        reason = _obstacle(mixture, router)
        if mixture.layer in declared.layers and declared.layers[mixture.layer] is None:
            reason = "the extension leaves its layer stock"
        if reason is not None:
            raise ValueError(f"the experts of `{mixture.key}` cannot be changed: {reason}.")
        if router is not None:
            router.check(router.moe_config, replace(router.moe_site, num_experts=count))


def _obstacle(mixture: Mixture, router: MoERouter | None) -> str | None:
    """Why the number of experts cannot change, or `None`."""
    spec, experts = mixture.spec, mixture.experts
    if spec is not None and (spec.adapter is not None or "+" in spec.num_experts):
        return "this architecture has one number of experts, in every layer and every tensor of a block"
    if spec is not None and spec.bias == "arg":
        return "its selection bias stands outside of the gate"
    rule = None if spec is None else gate_rule(spec, mixture.config)
    if rule is not None and rule.groups is not None and rule.groups[0] > 1:
        return f"its experts are in {rule.groups[0]} groups of equal size"
    if router is not None and (router.expert_rows is None or router.crosses_layers):
        return f"the router `{router.moe_config.type}` has more than a row for each of them"
    if router is not None and router.moe_site.zero_experts is not None:
        return "its router chooses among zero-computation experts, too"
    if "forward" in vars(mixture.gate) or "forward" in vars(experts):
        return "the model is dispatched by accelerate. Change it before"
    if getattr(experts, "moe_exchange", None) is not None or getattr(experts, "_is_expert_parallel", False):
        return "they are spread over processes"
    if hasattr(experts, "base_layer") or hasattr(mixture.gate, "base_layer"):
        return "they carry adapters. Merge these before"
    tensors = {id(tensor) for *_, tensor in mixture.stacks()}
    own = [p for p in experts.parameters() if p.dim() > 1]
    if not own or any(id(p) not in tensors for p in own) or getattr(mixture.gate, "weight", None) is None:
        return f"it is not known how {type(experts).__name__} stores them"
    stored = tuple(experts.parameters())
    if any(p.is_meta or not p.is_floating_point() or isinstance(p, QuantizedTensor) for p in stored):
        return "their weights are quantized, or not in memory"
    return None


def prepare(
    model: PreTrainedModel,
    family: Family,
    mixtures: list[Mixture],
    counts: dict[str, int],
    rows: dict[str, int],
) -> PreTrainedModel:
    """The model as one whose config can say the new numbers: a stock model whose layers would differ, or whose gates
    keep rows, is extended."""
    if "moe_link" in vars(model):
        missing = [m.key for m in mixtures if m.key in rows and not isinstance(m.gate, MoERouter)]
        if missing:
            raise ValueError(f"`keep_denominator` needs a router `top_k`, and `{missing[0]}` has the stock one.")
        return model
    after = {counts.get(mixture.key, mixture.num_experts) for mixture in mixtures}
    if len(after) == 1 and not rows:
        return model
    layers = {m.layer: {"experts": {"num_experts": m.num_experts}} for m in mixtures if m.key in counts}
    # With a router, which asks the stock gate, the model leaves records of its routing.
    extension = MoeExtension.from_dict({"router": {"type": "top_k"}, "layers": layers})
    return install(model, family, extension, building=False)


def set_counts(model: PreTrainedModel, family: Family, mixtures: list[Mixture], counts: dict[str, int]) -> None:
    """Tell modules and config the new numbers."""
    for mixture in mixtures:
        if mixture.key not in counts:
            continue
        count = counts[mixture.key]
        for module in (*mixture.gate.modules(), *mixture.experts.modules()):
            if "num_experts" in vars(module):
                module.num_experts = count
            if "moe_num_experts" in vars(module):
                module.moe_num_experts = count
        if isinstance(mixture.gate, MoERouter) and is_installed(mixture.gate):
            site = mixture.gate.moe_site
            mixture.gate.moe_site = replace(site, num_experts=count, top_k=min(site.top_k, count))
    extension = MoeExtension.from_dict(getattr(model.config, "moe_ext", None) or {})
    for attention in (False, True):
        group = [mixture for mixture in mixtures if mixture.attention == attention]
        new = {mixture.key: counts.get(mixture.key, mixture.num_experts) for mixture in group}
        if group:
            _declare(extension, group, new)
    _declare_routers(extension, [mixture for mixture in mixtures if mixture.key in counts])
    if "moe_link" not in vars(model):
        return
    if extension == MoeExtension() and family.name in OWN_MODELS:
        model.config.moe_ext = None
        return
    if extension == MoeExtension():  # an extended model declares something, if only what is so anyway
        first = mixtures[0]
        count = counts.get(first.key, first.num_experts)
        extension.layers[first.layer] = LayerExtension(experts=ExpertsConfig(num_experts=count))
    model.config.moe_ext = extension.to_dict()


def _declare(extension: MoeExtension, group: list[Mixture], new: dict[str, int]) -> None:
    """Write the numbers of one kind of mixtures: where the config has that of all layers, and by layer where they are
    others."""
    part, kind = ("attention", RoutedAttentionConfig) if group[0].attention else ("experts", ExpertsConfig)
    spec, config = group[0].spec, group[0].config
    common = new[group[0].key] if len(set(new.values())) == 1 else None
    if spec is None and extension.experts is not None:
        extension.experts = replace(extension.experts, num_experts=common or extension.experts.num_experts)
        usual = extension.experts.num_experts
    elif spec is None:
        usual = None
    else:
        if common is not None:
            _set_value(config, spec.num_experts, common)
        usual = config_value(config, spec.num_experts, None)
    for mixture in group:
        layer = extension.layers.get(mixture.layer, LayerExtension())
        if layer is None:  # left stock
            continue
        old, count = getattr(layer, part), new[mixture.key]
        if count != usual or (old is not None and spec is None):
            base = old or getattr(extension, part) or kind()
            setattr(layer, part, replace(base, num_experts=count))
        elif old is not None and old.num_experts is not None:
            old = replace(old, num_experts=None)
            setattr(layer, part, None if old == kind() else old)
        if layer.is_empty:
            extension.layers.pop(mixture.layer, None)
        else:
            extension.layers[mixture.layer] = layer


def _declare_routers(extension: MoeExtension, changed: list[Mixture]) -> None:
    """Write the routers whose gates keep rows of removed experts."""
    for mixture in changed:
        router = mixture.gate.moe_config if isinstance(mixture.gate, MoERouter) else None
        if not getattr(router, "removed_experts", 0):
            continue
        layer = extension.layers.setdefault(mixture.layer, LayerExtension())
        assert layer is not None and router is not None
        if mixture.attention:
            attention: Any = layer.attention or extension.attention or RoutedAttentionConfig()
            layer.attention = replace(attention, router=router)
        else:
            layer.router = router


def _set_value(config: Any, key: str, value: int) -> None:
    path, _, name = key.rpartition(".")
    target = get_by_path(config, path)
    setattr(target, name, value)
