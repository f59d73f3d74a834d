"""Mixtures of LoRA experts on a live model: made of adapters, grown, narrowed, merged, saved."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.configuration_moe_ext import LoraAdapterConfig, LoraExpertsConfig, MoeExtension
from ..modeling.moe_context import RoutingLink
from ..modeling.moe_expert_lora import ExpertLora
from ..modeling.moe_families import iter_layers
from ..modeling.moe_lora import GATE, STACK, UNROUTED, AdapterModule, LoraStack, is_linear, linear_sizes
from ..modeling.moe_router import MoERouter
from ..patching import extend, require_family, restore
from ..trainers.freezing import base_model
from .peft_files import PeftAdapter, check_base, fit_paths, read_adapter


Adapters = Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike]


def mix_adapters(
    model: PreTrainedModel, adapters: Adapters, *, init_router: Literal["normal", "zeros"] = "normal", **options: Any
) -> PreTrainedModel:
    """Make a mixture of LoRA experts of existing PEFT adapters, in place.

    Each adapter keeps its rank and its factor. A layer that one adapter has and another has not gets zeros for the
    other, which changes nothing and stays so in training.

    Args:
        model (`PreTrainedModel`):
            The stock model that the adapters were trained on.
        adapters (`list` or `dict`):
            Folders as `PeftModel.save_pretrained` writes them; a `dict` gives them other names than their folders'.
        init_router (`"normal"` or `"zeros"`, *optional*, defaults to `"normal"`):
            Gates of the routers. With zeros all adapters weigh alike at first, where all are used.
        options:
            Further fields of `LoraExpertsConfig`: `num_experts_per_tok`, `router`, `route_per`, `share_base_ffn`, ...

    Returns:
        The same object, with the mixture declared in its config.

    Raises:
        FileNotFoundError, ValueError: where an adapter cannot be read or does not fit. The model is then unchanged.

    Example:
        ```python
        >>> model = mix_adapters(model, ["adapters/code", "adapters/maths"], num_experts_per_tok=1)
        ```
    """
    if init_router not in ("normal", "zeros"):
        raise ValueError(f'`init_router` must be "normal" or "zeros", got {init_router!r}.')
    family = require_family(model)
    linears = layer_linears(model, family)
    found = [fit_paths(adapter, linears, linear_sizes) for adapter in _read_all(adapters)]
    for adapter in found:
        check_base(adapter, model)
    fill_adapters(model, found, **options)
    if init_router == "zeros":
        for gate in _gates(model).values():
            nn.init.zeros_(gate.weight)
    return model


def fill_adapters(model: PreTrainedModel, adapters: list[PeftAdapter], **options: Any) -> None:
    """Extend a stock model by LoRA experts with the tensors of adapters that fit it."""
    family = require_family(model)
    targets = sorted({path.rpartition(".")[2] for adapter in adapters for path in adapter.pairs})
    entries = [_entry(adapter, model, family) for adapter in adapters]
    config = LoraExpertsConfig(**{"target_modules": targets, **options, "adapters": entries})
    extend(model, MoeExtension(lora_experts=config))
    _fill(model, adapters)


def _read_all(adapters: Adapters) -> list[PeftAdapter]:
    if isinstance(adapters, (str, os.PathLike)):
        raise TypeError(f"`adapters` must be several folders, got one: {adapters!r}. Pass a list.")
    pairs = adapters.items() if isinstance(adapters, Mapping) else [(None, folder) for folder in adapters]
    found = [read_adapter(folder, name) for name, folder in pairs]
    if not found:
        raise ValueError("`adapters` is empty; name at least one folder.")
    names = [adapter.name for adapter in found]
    if len(set(names)) < len(names):
        raise ValueError(f"the adapters are called {names}; give them different names: {{name: folder, ...}}.")
    return found


def layer_linears(model: nn.Module, family: Any) -> dict[str, nn.Module]:
    """Linear layers of the decoder layers by their path in the model."""
    inside = {
        id(module) for _, layer, _ in iter_layers(model, family) for module in layer.modules() if is_linear(module)
    }
    return {path: module for path, module in model.named_modules() if id(module) in inside}


def _entry(adapter: PeftAdapter, model: nn.Module, family: Any) -> LoraAdapterConfig:
    """Its declaration, with exceptions by paths that begin at the layers, as `moe_lora` has them."""
    entry, paths = adapter.declare(), {id(module): path for path, module in model.named_modules()}
    for key, layer, _ in iter_layers(model, family):
        prefix, _, number = key.rpartition(".")
        old, new = f"{paths[id(layer)]}.", f"{prefix}.{family.layers}.{number}.".lstrip(".")
        patterns: list[dict[str, Any]] = [entry.rank_pattern, entry.alpha_pattern]
        for pattern in patterns:
            for path in [path for path in pattern if path.startswith(old)]:
                pattern[new + path.removeprefix(old)] = pattern.pop(path)
    return entry


@torch.no_grad()
def _fill(model: nn.Module, adapters: list[PeftAdapter]) -> None:
    for path, stack in stacks_of(model).items():
        for adapter in adapters:
            expert = stack.names.index(adapter.name)
            stack.A[expert].zero_()
            stack.B[expert].zero_()
            if path in adapter.pairs:
                a, b = adapter.pairs[path]
                stack.A[expert, : a.shape[0]] = a.to(stack.A)
                stack.B[expert, : a.shape[0]] = b.T.to(stack.B)


def stacks_of(model: nn.Module) -> dict[str, LoraStack]:
    """The stacks of adapters of a model by the path of their linear layer."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, LoraStack))
    return {name.removesuffix(f".{STACK}"): module for name, module in found}


def _gates(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == GATE}


def require_adapters(model: nn.Module) -> RoutingLink:
    link = next(
        (vars(m)["moe_link"] for m in model.modules() if isinstance(vars(m).get("moe_link"), RoutingLink)), None
    )
    if link is None or not any(isinstance(module, AdapterModule) for module in model.modules()):
        raise ValueError(
            f"this {type(base_model(model)).__name__} has no adapters of this package. Declare some with "
            "`extend(model, MoeExtension(lora_experts=...))`, or make them of PEFT's with `mix_adapters`."
        )
    return link


def expert_names(model: nn.Module) -> list[str]:
    """Names of the experts, in order."""
    names = (name for stack in stacks_of(model).values() for name in stack.names if name != UNROUTED)
    return list(dict.fromkeys(names))


# --- which adapters are active ---


def set_adapter(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Choose the LoRA experts that are used. One alone has the weight 1 everywhere; among several, the routers choose
    as they do among all. Adapters without a router stay.

    Args:
        model (`nn.Module`):
            A model with LoRA experts.
        names (`str`, `list[str]` or `None`):
            Of the experts: those of the adapters they were made of, or `"0"`, `"1"`, ...; `None` means all.

    Raises:
        ValueError: for a model without adapters, or a name it does not have.
    """
    link = require_adapters(model)
    wanted = None if names is None else (names,) if isinstance(names, str) else tuple(names)
    known = expert_names(model)
    unknown = sorted(set(wanted or ()) - set(known))
    if unknown or wanted == ():
        raise ValueError(f"this model has no adapters {unknown}; it has {known}. `None` means all.")
    link.active_adapters = wanted


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the LoRA experts in use; none while they are disabled.

    Raises:
        ValueError: for a model without adapters.
    """
    link = require_adapters(model)
    if not link.adapters_enabled:
        return []
    return [name for name in expert_names(model) if link.active_adapters is None or name in link.active_adapters]


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, the model computes what it does without adapters.

    Raises:
        ValueError: for a model without adapters.
    """
    link = require_adapters(model)
    previous, link.adapters_enabled = link.adapters_enabled, False
    try:
        yield
    finally:
        link.adapters_enabled = previous


@contextlib.contextmanager
def route_tasks(model: nn.Module, task_ids: torch.Tensor | Sequence[int]) -> Iterator[None]:
    """Inside the `with` block, the rows of a batch are of these tasks. For `generate`, which takes no `task_ids`.

    Args:
        model (`nn.Module`):
            A model with LoRA experts.
        task_ids (`torch.Tensor` or `list[int]`):
            The task of each row (B,); with beams, of each prompt.

    Raises:
        ValueError: for a model without adapters.
    """
    link = require_adapters(model)
    previous, link.task_ids = link.task_ids, torch.as_tensor(task_ids)
    try:
        yield
    finally:
        link.task_ids = previous


# --- more adapters ---


def add_adapter(
    model: PreTrainedModel,
    adapter: str | os.PathLike | None = None,
    name: str | None = None,
    *,
    r: int = 8,
    lora_alpha: float = 16.0,
) -> PreTrainedModel:
    """Add a LoRA expert to a mixture; on a model without one, begin it. The others and their gates stay as they are.

    Args:
        model (`PreTrainedModel`):
            A stock model, or one with LoRA experts.
        adapter (`str` or `PathLike`, *optional*):
            Folder of a PEFT adapter. `None` adds a new one, with B = 0, on the layers that the mixture has.
        name (`str`, *optional*):
            Its name; required without a folder, whose name it is otherwise.
        r, lora_alpha (*optional*, default to 8 and 16.0):
            Of a new one.

    Returns:
        The same object. Trainers and optimizers made for it before do not know the new tensors.

    Raises:
        ValueError: where it does not fit, a name is taken, the experts' numbers differ by layer, or a router has
            tensors for each expert that it does not name. The model is then unchanged.
    """
    if "moe_link" not in vars(model):
        if adapter is None:
            raise ValueError("a mixture begins with an adapter from a folder, or with `extend`; `adapter` is missing.")
        return mix_adapters(model, [adapter] if name is None else {name: adapter})
    require_adapters(model)
    extension = MoeExtension.from_dict(model.config.moe_ext)
    config = _uniform(extension)
    family = require_family(model)
    new = None if adapter is None else read_adapter(adapter, name)
    if new is None:
        if name is None:
            raise ValueError("a new adapter needs a `name`.")
        entry = LoraAdapterConfig(name, r, lora_alpha)
    else:
        new = fit_paths(new, layer_linears(model, family), linear_sizes)
        check_base(new, model)
        entry = _entry(new, model, family)
        outside = sorted({path for path in new.pairs if path not in stacks_of(model)})
        if outside:
            raise ValueError(
                f"the adapter `{new.name}` has matrices for {outside[:3]}, where the mixture has no experts."
            )
    known = config.adapters or [_numbered(config, stack) for stack in expert_names(model)]
    if entry.name in [other.name for other in known]:
        raise ValueError(f"the mixture has an adapter `{entry.name}` already; pass another `name`.")
    for gate in _gates(model).values():
        if isinstance(gate, MoERouter) and gate.expert_rows is None:
            raise ValueError(f"the `{gate.moe_config.type}` router cannot get a row for one more expert.")
    grown = replace(extension, lora_experts=replace(config, adapters=[*known, entry]))
    state = adapter_state(model)
    reextend(model, grown)
    _copy_rows(model, state)
    if new is not None:
        _fill(model, [new])
    return model


def _uniform(extension: MoeExtension) -> LoraExpertsConfig:
    config = extension.lora_experts
    others = [part for part in extension.layers.values() if part is not None and part.lora_experts is not None]
    if config is None or others or isinstance(config.num_lora_experts, list) or isinstance(config.r, list):
        raise ValueError("experts can be added where all layers have the same ones; these differ by layer.")
    return config


def _numbered(config: LoraExpertsConfig, name: str) -> LoraAdapterConfig:
    assert isinstance(config.r, int)
    return LoraAdapterConfig(name, config.r, config.lora_alpha, config.use_rslora)


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, AdapterModule) or name.rpartition(".")[2] == GATE
        for key, tensor in module.state_dict().items()
    }


@torch.no_grad()
def _copy_rows(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put tensors of fewer experts, or smaller ranks, back into their place."""
    for name, tensor in model.state_dict().items():
        if name in state:
            old = state[name]
            where = tuple(slice(0, size) for size in old.shape)
            if old.shape != tensor.shape and f".{STACK}." in name:
                tensor[: old.shape[0]] = 0  # what is beyond their rank
            tensor[where] = old


def reextend(model: PreTrainedModel, extension: MoeExtension | None) -> None:
    """Take the extension of a live model back and apply another, with what both have added."""
    added = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    active, training = vars(model)["moe_link"].active_adapters, model.training
    restore(model)
    if extension is None:
        return
    extend(model, extension)
    vars(model)["moe_link"].active_adapters = active
    model.train(training)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in added and added[name].shape == tensor.shape:
                tensor.copy_(added[name])


def without_adapters(extension: MoeExtension) -> MoeExtension | None:
    """The rest of a declaration; `None` where there is none."""
    rest = copy.deepcopy(extension)
    rest.lora_experts = rest.expert_lora = None
    for key, part in rest.layers.items():
        if part is not None:
            rest.layers[key] = replace(part, lora_experts=None, expert_lora=None)
    empty = all(part is None or part.is_empty for part in rest.layers.values())
    return None if empty and not rest.declares_block and rest.attention is None else rest


def experts_lora_of(model: nn.Module) -> dict[str, ExpertLora]:
    """The adapters on routed experts by the path of the experts."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, ExpertLora))
    return {name.removesuffix(f".{STACK}"): module for name, module in found}
