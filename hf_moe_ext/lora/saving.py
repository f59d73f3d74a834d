"""Adapters as files: one PEFT adapter for each expert, or all of them with their routers, without the base model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..files import staged_folder
from ..modeling.configuration_moe_ext import MoeExtension
from ..modeling.moe_lora import UNROUTED
from ..patching import extend, restore
from ..trainers.freezing import base_model
from .mixtures import adapter_state, expert_names, require_adapters, stacks_of
from .peft_files import PeftAdapter, write_adapter


DECLARATION, TENSORS = "moe_adapters.json", "moe_adapters.safetensors"
_PARTS = ("lora_experts", "expert_lora")


def export_adapters(
    model: PreTrainedModel, folder: str | os.PathLike, *, names: Sequence[str] | None = None, overwrite: bool = False
) -> list[Path]:
    """Write each LoRA expert as a PEFT adapter of its own, `folder/<name>`. Routers are not part of that.

    Adapters without a router (those on attention of MixLoRA) go into each. A written adapter in PEFT computes what the
    model does after `set_adapter(model, name)`.

    Args:
        model (`PreTrainedModel`):
            A model with LoRA experts.
        folder (`str` or `PathLike`):
            Where the folders of the adapters go.
        names (`list[str]`, *optional*):
            Of the experts; all by default.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether adapters that are there may be replaced.

    Returns:
        The folders.

    Raises:
        ValueError: for a model without LoRA experts, or an unknown name.
        FileExistsError: where a folder would be replaced.
    """
    require_adapters(model)
    known = expert_names(model)
    wanted = known if names is None else list(names)
    unknown = sorted(set(wanted) - set(known))
    if unknown or not wanted:
        raise ValueError(f"this model has no LoRA experts {unknown}; it has {known}.")
    written = []
    for name in wanted:
        adapter = expert_as_adapter(model, name)
        write_adapter(adapter, Path(folder) / name, overwrite=overwrite)
        written.append(Path(folder) / name)
    return written


def expert_as_adapter(model: PreTrainedModel, name: str) -> PeftAdapter:
    """One LoRA expert as an adapter of PEFT. Layers where it is zero altogether are left out."""
    pairs, scales, ranks = {}, {}, []
    for path, stack in stacks_of(model).items():
        key = name if name in stack.names else UNROUTED
        if key not in stack.names:
            continue
        expert = stack.names.index(key)
        rank = stack.ranks[expert]
        a, b = stack.A[expert, :rank].detach(), stack.B[expert, :rank].detach().T
        if a.any() or b.any():
            pairs[path], scales[path] = (a.clone(), b.clone()), stack.scales[expert]
            ranks.append(rank)
    config = MoeExtension.from_dict(model.config.moe_ext).lora_experts
    entry = next((e for e in (config.adapters or []) if e.name == name), None) if config is not None else None
    usual = max(set(ranks), key=ranks.count) if entry is None else entry.r
    rslora = (config is not None and config.use_rslora) if entry is None else entry.use_rslora
    alpha = config.lora_alpha if entry is None and config is not None else entry.lora_alpha if entry else usual
    transposed = any(not isinstance(model.get_submodule(path), nn.Linear) for path in pairs)
    base = str(getattr(model.config, "_name_or_path", "") or "")
    peft = {"r": usual, "lora_alpha": alpha, "use_rslora": rslora, "base_model_name_or_path": base}
    peft |= {"fan_in_fan_out": transposed, "task_type": "CAUSAL_LM" if model.can_generate() else None}
    return PeftAdapter(name, pairs, scales, peft)


def save_adapters(model: PreTrainedModel, folder: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Write adapters and their routers without the base model: a small folder for `load_adapters`.

    Args:
        model (`PreTrainedModel`):
            A model with LoRA experts, or with adapters on routed experts.
        folder (`str` or `PathLike`):
            The target.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether one that holds adapters already may be replaced.

    Returns:
        The folder.

    Raises:
        ValueError: for a model without adapters.
        FileExistsError: where something would be lost.
    """
    require_adapters(model)
    model = cast(PreTrainedModel, base_model(model))
    declaration = {
        "version": 1,
        "base_model": str(getattr(model.config, "_name_or_path", "") or ""),
        "model_type": model.config.model_type.removeprefix("moe_ext_"),
        "moe_ext": _only_adapters(model.config.moe_ext),
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_state(model).items()}
    with staged_folder(folder, overwrite=overwrite) as staging:
        (staging / DECLARATION).write_text(json.dumps(declaration, indent=2), encoding="utf-8")
        save_file(tensors, staging / TENSORS, metadata={"format": "pt"})
    return Path(folder)


def _only_adapters(declared: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in declared.items() if name in (*_PARTS, "version")}
    layers = declared.get("layers", {})
    layers = {
        key: part if part is None else {n: v for n, v in part.items() if n in _PARTS} for key, part in layers.items()
    }
    return {**kept, "layers": layers} if layers else kept


def load_adapters(model: PreTrainedModel, folder: str | os.PathLike) -> PreTrainedModel:
    """Give a stock model the adapters that `save_adapters` wrote, in place.

    Args:
        model (`PreTrainedModel`):
            The base model.
        folder (`str` or `PathLike`):
            What `save_adapters` wrote.

    Returns:
        The same object.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: where a file is damaged or is for another architecture. The model is then unchanged.
    """
    path = Path(folder).expanduser()
    for name in (DECLARATION, TENSORS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"`{folder}` has no {name}; `save_adapters` writes one.")
    try:
        declared = json.loads((path / DECLARATION).read_text(encoding="utf-8"))
        tensors = load_file(path / TENSORS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"`{folder}` is damaged ({error}).") from None
    if not isinstance(declared, dict) or declared.get("version") != 1 or "moe_ext" not in declared:
        raise ValueError(f"`{path / DECLARATION}` is not in the format that this version reads.")
    if declared.get("model_type") != model.config.model_type:
        raise ValueError(
            f"the adapters in `{folder}` are for a {declared.get('model_type')} model, this is a "
            f"{model.config.model_type} model."
        )
    extend(model, MoeExtension.from_dict(declared["moe_ext"]))
    wanted = {name: tensor.shape for name, tensor in adapter_state(model).items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wanted != found:
        restore(model)
        wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        raise ValueError(f"the adapters in `{folder}` do not fit this model; the first that does not is `{wrong[0]}`.")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in tensors:
                tensor.copy_(tensors[name])
    return model
