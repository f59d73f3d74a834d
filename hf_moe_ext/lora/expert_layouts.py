"""Adapters on stacked experts in the layouts that exist, and between them.

For experts E of rank r, a projection with `in` inputs and `out` outputs, and update `s B_e A_e`:

    "peft"          PEFT from 0.19: lora_A (r*E, in), the rows of an expert together; lora_B (out, r*E), in whose
                    columns the expert counts fastest
    "peft_0.18"     before, on (E, out, in) tensors: lora_A (r*E, out) and lora_B (in, r*E), the update transposed
    "expert_major"  as "peft", but the columns of an expert of lora_B stand together
    "per_expert"    a pair of its own for each expert and projection, as engines that serve adapters read them

Shapes do not tell them apart: the first and the third never, the first two not where `in` is `out`. So a file says
what it is, in its metadata; a file that does not say is refused unless the caller does.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from packaging.version import InvalidVersion, Version
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ..files import staged_folder
from ..modeling.configuration_moe_ext import MoeExtension
from ..modeling.configuration_parts import ExpertLoraConfig
from ..modeling.moe_expert_lora import ExpertLora, expert_sizes
from ..modeling.moe_families import get_by_path, iter_layers
from ..modeling.moe_lora import STACK
from ..modeling.moe_structure import find_moe_spec
from ..patching import extend, require_family
from .peft_files import CONFIG, WEIGHTS, read_config, read_weights


Layout = Literal["peft", "peft_0.18", "expert_major", "per_expert"]

LAYOUT_KEY = "moe_lora_layout"  # in the metadata of the safetensors file


@dataclass(frozen=True)
class ExpertPair:
    """A (E, r, in) and B (E, out, r) of one projection."""

    a: torch.Tensor
    b: torch.Tensor


def pack_experts(pair: ExpertPair, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A, lora_B) of all experts in one of the stacked layouts.

    Raises:
        ValueError: for another layout.
    """
    if layout == "peft_0.18":
        return pack_experts(ExpertPair(pair.b.transpose(1, 2), pair.a.transpose(1, 2)), "peft")
    if layout == "peft":
        return pair.a.flatten(0, 1).contiguous(), pair.b.permute(1, 2, 0).flatten(1).contiguous()
    if layout == "expert_major":
        return pair.a.flatten(0, 1).contiguous(), pair.b.permute(1, 0, 2).flatten(1).contiguous()
    raise ValueError(f'a stacked layout is "peft", "peft_0.18" or "expert_major", got {layout!r}.')


def unpack_experts(lora_a: torch.Tensor, lora_b: torch.Tensor, num_experts: int, layout: Layout) -> ExpertPair:
    """The inverse of `pack_experts`.

    Raises:
        ValueError: for another layout, or a number of experts that does not divide the ranks.
    """
    if lora_a.shape[0] % num_experts or lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            f"matrices of the shapes {list(lora_a.shape)} and {list(lora_b.shape)} hold no equal ranks of "
            f"{num_experts} experts."
        )
    if layout == "peft_0.18":
        pair = unpack_experts(lora_a, lora_b, num_experts, "peft")
        return ExpertPair(pair.b.transpose(1, 2), pair.a.transpose(1, 2))
    a = lora_a.unflatten(0, (num_experts, -1))
    if layout == "peft":
        return ExpertPair(a, lora_b.unflatten(1, (-1, num_experts)).permute(2, 0, 1))
    if layout == "expert_major":
        return ExpertPair(a, lora_b.unflatten(1, (num_experts, -1)).permute(1, 0, 2))
    raise ValueError(f'a stacked layout is "peft", "peft_0.18" or "expert_major", got {layout!r}.')


def find_layout(folder: str | os.PathLike) -> Layout | None:
    """The layout that an adapter says it has: by its metadata, or by the version of PEFT that wrote it. `None` where
    neither tells, and where Unsloth trained it, whose order of columns PEFT's version does not tell.

    Raises:
        ValueError: for metadata that name no layout.
    """
    config = read_config(folder)
    with safe_open(Path(folder).expanduser() / WEIGHTS, "pt") as file:
        named = (file.metadata() or {}).get(LAYOUT_KEY)
    if named is not None:
        if named not in get_args(Layout):
            raise ValueError(f"`{folder}` names the unknown layout {named!r}; known: {', '.join(get_args(Layout))}.")
        return cast(Layout, named)
    if (config.get("auto_mapping") or {}).get("unsloth_fixed"):
        return None
    try:
        version = Version(str(config["peft_version"]).partition("@")[0])
    except (KeyError, InvalidVersion):
        return None
    return "peft" if version >= Version("0.19.dev0") else "peft_0.18"


@dataclass(frozen=True)
class _Site:
    """Experts of one layer: their path in the model and the module."""

    path: str
    experts: Any

    @property
    def names(self) -> dict[str, str]:
        """The parameter of each projection."""
        return {"up": "gate_up_proj" if self.experts.has_gate else "up_proj", "down": "down_proj"}

    @property
    def single(self) -> dict[str, tuple[str, ...]]:
        """The projections that one expert has in checkpoints of single experts."""
        return {"up": ("gate_proj", "up_proj") if self.experts.has_gate else ("up_proj",), "down": ("down_proj",)}


def _sites(model: PreTrainedModel) -> list[_Site]:
    family = require_family(model)
    paths = {id(module): path for path, module in model.named_modules()}
    found = []
    for _, layer, _ in iter_layers(model, family):
        spec = find_moe_spec(layer, family)
        if spec is not None:
            experts = get_by_path(get_by_path(layer, spec.block), spec.experts)
            if hasattr(experts, "has_gate") and hasattr(experts, "down_proj"):
                found.append(_Site(paths[id(experts)], experts))
    if not found:
        raise ValueError(f"{type(model).__name__} has no routed experts in stacked tensors.")
    return found


def load_expert_lora(
    model: PreTrainedModel, folder: str | os.PathLike, *, layout: Layout | None = None
) -> PreTrainedModel:
    """Give a stock MoE model the adapter on its routed experts that PEFT (`target_parameters`), Unsloth or this
    package saved, in place.

    Args:
        model (`PreTrainedModel`):
            A stock model.
        folder (`str` or `PathLike`):
            Of the adapter.
        layout (`str`, *optional*):
            `"peft"`, `"peft_0.18"`, `"expert_major"` or `"per_expert"`, where the adapter does not say it itself.
            Where it does, and says another, that is an error.

    Returns:
        The same object, with `expert_lora` in its declaration.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: where the layout is not known, or the adapter does not fit. The model is then unchanged.
    """
    config, tensors, said = read_config(folder), read_weights(folder), find_layout(folder)
    if layout is not None and layout not in get_args(Layout):
        raise ValueError(f"`layout` must be one of {', '.join(get_args(Layout))}, got {layout!r}.")
    if said is not None and layout is not None and said != layout:
        raise ValueError(f"`{folder}` says that its layout is `{said}`, and `layout` is `{layout}`.")
    layout = said or layout
    if layout is None:
        raise ValueError(
            f"`{folder}` does not say how the matrices of its experts are stacked, and their shapes do not tell. Pass "
            '`layout`: "peft" for PEFT from 0.19 on, "peft_0.18" for PEFT 0.18, "expert_major" for Unsloth.'
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name) and layout != "per_expert":
            raise ValueError(f"`{folder}` uses `{name}`, which is not read for stacked experts.")
    sites = _sites(model)
    found: dict[str, dict[str, ExpertPair]] = {}
    used: set[str] = set()
    for site in sites:
        read = _read_single if layout == "per_expert" else _read_stacked
        found[site.path] = read(site, tensors, layout, used, str(folder))
    rest = sorted(set(tensors) - used)
    if rest:
        raise ValueError(
            f"`{folder}` has matrices beside those of the experts, such as `{rest[0]}`; only experts can be read."
        )
    kinds = {tuple(sorted(pairs)) for pairs in found.values()}
    ranks = {pair.a.shape[1] for pairs in found.values() for pair in pairs.values()}
    if len(kinds) != 1 or () in kinds or len(ranks) != 1:
        raise ValueError(f"`{folder}` must have matrices of one rank for the same projections of all layers.")
    rank = ranks.pop()
    rslora = bool(config.get("use_rslora"))
    # The factor is that of the rank it was trained with, whatever ranks were put together for one projection.
    usual = int(config["r"])
    alpha = float(config["lora_alpha"]) * ((rank / usual) ** (0.5 if rslora else 1.0))
    declared = ExpertLoraConfig(rank, alpha, rslora, target_parameters=sorted(kinds.pop(), reverse=True))
    extend(model, MoeExtension(expert_lora=declared))
    with torch.no_grad():
        for site in sites:
            lora = getattr(site.experts, STACK)
            for name, pair in found[site.path].items():
                getattr(lora, f"{name}_A").copy_(pair.a)
                getattr(lora, f"{name}_B").copy_(pair.b)
    return model


def _read_stacked(
    site: _Site, tensors: dict[str, torch.Tensor], layout: Layout, used: set[str], folder: str
) -> dict[str, ExpertPair]:
    """PEFT nests its wrappers: the outer one is of the last parameter, and each inner one adds `base_layer`."""
    prefix = f"base_model.model.{site.path}"
    pairs, sizes, count = {}, expert_sizes(site.experts), int(site.experts.num_experts)
    levels = []
    for level in ("", ".base_layer"):
        keys = [f"{prefix}{level}.lora_{factor}.weight" for factor in "AB"]
        if all(key in tensors for key in keys):
            used.update(keys)
            levels.append(tuple(tensors[key] for key in keys))
    for lora_a, lora_b in levels:
        fits = []
        for name, (rows, columns) in sizes.items():
            wanted = (rows, columns) if layout == "peft_0.18" else (columns, rows)
            if (lora_a.shape[1], lora_b.shape[0]) == wanted and name not in pairs:
                fits.append(name)
        if len(levels) == 2:  # the outer wrapper is that of `down_proj`, which comes last
            wanted_name = "down" if lora_a is levels[0][0] else "up"
            fits = [name for name in fits if name == wanted_name]
        if len(fits) != 1:
            why = "fits both projections" if fits else f"does not fit its layout `{layout}`, or is of another model"
            raise ValueError(
                f"`{folder}`: the pair of shapes {list(lora_a.shape)}, {list(lora_b.shape)} at `{site.path}` {why}."
            )
        pairs[fits[0]] = unpack_experts(lora_a, lora_b, count, layout)
    return pairs


def _read_single(
    site: _Site, tensors: dict[str, torch.Tensor], layout: Layout, used: set[str], folder: str
) -> dict[str, ExpertPair]:
    pairs = {}
    for name, projections in site.single.items():
        experts = []
        for expert in range(int(site.experts.num_experts)):
            parts = []
            for projection in projections:
                keys = [f"base_model.model.{site.path}.{expert}.{projection}.lora_{factor}.weight" for factor in "AB"]
                if all(key in tensors for key in keys):
                    used.update(keys)
                    parts.append(tuple(tensors[key] for key in keys))
            if parts and len(parts) != len(projections):
                raise ValueError(
                    f"`{folder}`: expert {expert} of `{site.path}` has one of {projections} and not the other."
                )
            if parts:
                experts.append(_join(parts))
        if experts and len(experts) != int(site.experts.num_experts):
            raise ValueError(f"`{folder}`: some experts of `{site.path}` have no matrices for {projections}.")
        if experts:
            rank = max(a.shape[0] for a, _ in experts)
            pad = nn.functional.pad
            stacked_a = torch.stack([pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in experts])
            stacked_b = torch.stack([pad(b, (0, rank - b.shape[1])) for _, b in experts])
            pairs[name] = ExpertPair(stacked_a, stacked_b)
    sizes = expert_sizes(site.experts)
    for name, pair in pairs.items():
        if (pair.b.shape[1], pair.a.shape[2]) != sizes[name]:
            raise ValueError(f"`{folder}`: the matrices of `{site.path}` are of another model.")
    return pairs


def _join(parts: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up, each with a pair, as one pair: the same A once, or both with B in blocks."""
    if len(parts) == 1 or torch.equal(parts[0][0], parts[1][0]):
        return parts[0][0], torch.cat([b for _, b in parts])
    return torch.cat([a for a, _ in parts]), torch.block_diag(*(b for _, b in parts))


def export_expert_lora(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    layout: Layout = "peft",
    overwrite: bool = False,
) -> Path:
    """Write the adapters on routed experts for PEFT, Unsloth, or an engine that serves them.

    Args:
        model (`PreTrainedModel`):
            A model with `expert_lora`.
        folder (`str` or `PathLike`):
            The target.
        layout (`str`, *optional*, defaults to `"peft"`):
            See `load_expert_lora`. It is noted in the metadata of the file.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether an adapter that is there may be replaced.

    Returns:
        The folder.

    Raises:
        ValueError: for a model without such adapters, or a layout that cannot hold them.
        FileExistsError: where something would be lost.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"`layout` must be one of {', '.join(get_args(Layout))}, got {layout!r}.")
    sites = [site for site in _sites(model) if isinstance(getattr(site.experts, STACK, None), ExpertLora)]
    if not sites:
        raise ValueError(f"{type(model).__name__} has no `expert_lora`.")
    tensors: dict[str, torch.Tensor] = {}
    for site in sites:
        if layout == "peft_0.18" and site.experts.is_transposed:
            raise ValueError('experts of the form (E, in, out) were never stored as "peft_0.18"; use "peft".')
        pairs = expert_pairs(getattr(site.experts, STACK))
        prefix = f"base_model.model.{site.path}"
        if layout == "per_expert":
            tensors |= _single_tensors(site, pairs, prefix)
            continue
        for name, pair in pairs.items():
            level = ".base_layer" if name == "up" and len(pairs) == 2 else ""
            lora_a, lora_b = pack_experts(pair, layout)
            tensors |= {f"{prefix}{level}.lora_A.weight": lora_a, f"{prefix}{level}.lora_B.weight": lora_b}
    first = getattr(sites[0].experts, STACK)
    rank = max(first.ranks)
    parameters = [sites[0].names[name] for name in expert_pairs(first)]
    end = re.sub(r".*\.\d+\.", "", sites[0].path)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.can_generate() else None,
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": first.config.lora_alpha if first.scale is not None else float(rank),
        "use_rslora": first.config.use_rslora and first.scale is not None,
        "target_modules": [],
        "target_parameters": [f"{end}.{name}" for name in parameters],
        "lora_dropout": 0.0,  # PEFT has none there
        "bias": "none",
        "inference_mode": True,
    }
    if layout == "peft":
        config["peft_version"] = "0.19.0"
    with staged_folder(folder, overwrite=overwrite) as staging:
        (staging / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt", LAYOUT_KEY: layout})
    return Path(folder)


def expert_pairs(lora: ExpertLora) -> dict[str, ExpertPair]:
    """The pairs of each projection. Where factors differ between experts, B carries them relative to 1."""
    found = {}
    for name in ("up", "down"):
        pair = lora.pair(name, next(lora.parameters()).dtype)
        if pair is not None:
            found[name] = ExpertPair(pair[0].detach(), pair[1].detach())
    return found


def _single_tensors(site: _Site, pairs: dict[str, ExpertPair], prefix: str) -> dict[str, torch.Tensor]:
    if site.experts.has_gate and not getattr(site.experts, "is_concatenated", True) and "up" in pairs:
        raise ValueError("the rows of gate and up alternate in these experts; they have no projections of their own.")
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in pairs.items():
        projections = site.single[name]
        for expert, (a, b) in enumerate(zip(pair.a, pair.b, strict=True)):
            for projection, rows in zip(projections, b.chunk(len(projections)), strict=True):
                key = f"{prefix}.{expert}.{projection}"
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": rows}
    return tensors
