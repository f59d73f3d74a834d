"""LoRA adapters as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`, read as data."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging

from ..files import staged_folder
from ..modeling.configuration_moe_ext import LoraAdapterConfig, lora_scale


logger = logging.get_logger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
# What makes more of an adapter than `W + s B A`, with the value that it must not have.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "megatron_config",
    "trainable_token_indices",
)


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter on linear layers.

    Attributes:
        name: of its folder, unless another was given.
        pairs: A (r, in) and B (out, r) by the path of the linear layer in the model.
        scales: the factor on `B A`, by path.
        config: what `adapter_config.json` holds.
    """

    name: str
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scales: dict[str, float]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The model it says it was trained on."""
        return str(self.config.get("base_model_name_or_path") or "")

    def delta(self, path: str) -> torch.Tensor:
        """`s B A` in float32, (out, in)."""
        a, b = self.pairs[path]
        return self.scales[path] * (b.float() @ a.float())

    def declare(self) -> LoraAdapterConfig:
        """Its name, ranks and factors as an entry of `LoraExpertsConfig.adapters`."""
        ranks = {path: a.shape[0] for path, (a, _) in self.pairs.items()}
        usual = int(self.config["r"])
        rslora, alpha = bool(self.config.get("use_rslora")), float(self.config["lora_alpha"])
        alphas = {path: self.scales[path] * (rank**0.5 if rslora else rank) for path, rank in ranks.items()}
        return LoraAdapterConfig(
            self.name,
            usual,
            alpha,
            rslora,
            {path: rank for path, rank in ranks.items() if rank != usual},
            {path: value for path, value in alphas.items() if abs(value - alpha) > 1e-9 * alpha},
        )


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The `adapter_config.json` of a LoRA adapter.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is damaged, or no LoRA.
    """
    path = Path(folder).expanduser() / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"`{folder}` is no adapter of PEFT: it has no {CONFIG}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is not valid JSON ({error}).") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"`{path}` describes a {kind!r} adapter; LoRA (`LORA`) is what can be read.")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"`{path}`: `{name}` must be a positive number, got {value!r}.")
    return config


def read_weights(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of an adapter.

    Raises:
        FileNotFoundError: where there are none in the form of safetensors.
        ValueError: where the file is damaged.
    """
    path = Path(folder).expanduser() / WEIGHTS
    if not path.is_file():
        other = path.with_name("adapter_model.bin")
        hint = f" `{other.name}` is a pickle, which is not read: a pickle runs code." if other.exists() else ""
        raise FileNotFoundError(f"`{folder}` has no {WEIGHTS}.{hint}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`{path}` is damaged ({error}).") from None


def read_adapter(folder: str | os.PathLike, name: str | None = None) -> PeftAdapter:
    """A LoRA adapter on linear layers.

    Args:
        folder (`str` or `PathLike`):
            As `PeftModel.save_pretrained` writes it.
        name (`str`, *optional*):
            Its name; that of the folder by default.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: where a file is damaged, or the adapter has more than two matrices for each layer (DoRA, biases,
            trained modules).
    """
    config, tensors = read_config(folder), read_weights(folder)
    where = f"the adapter `{folder}`"
    extra = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        extra.append("bias")
    if extra:
        raise ValueError(f"{where} uses {extra}, which a mixture of `B A` cannot hold.")
    if config.get("target_parameters"):
        raise ValueError(
            f"{where} is on stacked experts (`target_parameters`), not on linear layers. Load it with "
            "`load_expert_lora`."
        )
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{where} has the tensor `{key}`, which is no `lora_A` or `lora_B` of a linear layer.")
        factors.setdefault(match["path"], {})[match["factor"]] = tensor
    if not factors:
        raise ValueError(f"{where} is empty.")
    pairs, scales = {}, {}
    for path, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{where} has `lora_{next(iter(pair))}` of `{path}` and not the other matrix.")
        a, b = pair["A"], pair["B"]
        rank = int(_pattern(config.get("rank_pattern"), path, config["r"], where))
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(
                f"{where}: `{path}` has matrices of the shapes {list(a.shape)} and {list(b.shape)}, its config says "
                f"rank {rank}."
            )
        alpha = float(_pattern(config.get("alpha_pattern"), path, config["lora_alpha"], where))
        pairs[path], scales[path] = (a, b), lora_scale(rank, alpha, bool(config.get("use_rslora")))
    return PeftAdapter(name or Path(folder).expanduser().resolve().name, pairs, scales, config)


def _pattern(patterns: Any, path: str, default: Any, where: str) -> Any:
    """The value of the first pattern that the end of a path matches, as in PEFT. Names are taken as they are: regular
    expressions of strangers are not run."""
    for pattern, value in (patterns or {}).items():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.\-]+", plain):
            raise ValueError(
                f"{where}: the pattern {pattern!r} is a regular expression; names of modules can be read."
            )
        if path == plain or (not pattern.startswith("^") and path.endswith(f".{plain}")):
            return value
    return default


def write_adapter(adapter: PeftAdapter, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write an adapter as PEFT reads it. The folder appears in one piece.

    Raises:
        FileExistsError, NotADirectoryError: as `check_target` says.
    """
    entry = adapter.declare()
    modules = sorted({path.rpartition(".")[2] for path in adapter.pairs})
    config = {
        "peft_type": "LORA",
        "task_type": adapter.config.get("task_type"),
        "base_model_name_or_path": adapter.base or None,
        "r": entry.r,
        "lora_alpha": entry.lora_alpha,
        "use_rslora": entry.use_rslora,
        "rank_pattern": entry.rank_pattern,
        "alpha_pattern": entry.alpha_pattern,
        "target_modules": adapter.config.get("target_modules") or modules,
        "lora_dropout": adapter.config.get("lora_dropout", 0.0),
        "fan_in_fan_out": bool(adapter.config.get("fan_in_fan_out")),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for path, (a, b) in adapter.pairs.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.detach().cpu().contiguous()
    with staged_folder(folder, overwrite=overwrite) as staging:
        (staging / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})


def check_base(adapter: PeftAdapter, model: Any) -> None:
    """Warn where an adapter says that it was trained on another model."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if adapter.base and name and adapter.base.rstrip("/") != name.rstrip("/"):
        logger.warning(
            f"the adapter `{adapter.name}` was trained on `{adapter.base}`, and this model is `{name}`. Its shapes "
            "fit; whether the weights do is not known."
        )


def fit_paths(adapter: PeftAdapter, linears: dict[str, nn.Module], sizes: Any) -> PeftAdapter:
    """The adapter with the paths of this model, whose head may stand around the base the adapter was made for.

    Args:
        adapter: as it was read.
        linears: linear layers of the model by path.
        sizes: gives (in, out) of one.

    Raises:
        ValueError: for a layer that the model does not have, or matrices of other sizes.
    """
    found: dict[str, str] = {}
    for path, (a, b) in adapter.pairs.items():
        names = [name for name in linears if name == path or name.endswith(f".{path}") or path.endswith(f".{name}")]
        if len(names) != 1:
            raise ValueError(
                f"the adapter `{adapter.name}` has matrices for `{path}`, and this model has no such linear layer in "
                "its decoder layers."
            )
        wanted = sizes(linears[names[0]])
        if (a.shape[1], b.shape[0]) != wanted:
            raise ValueError(
                f"the adapter `{adapter.name}` is for another model: its matrices of `{path}` go from {a.shape[1]} to "
                f"{b.shape[0]}, and the layer goes from {wanted[0]} to {wanted[1]}."
            )
        found[path] = names[0]
    pairs = {found[path]: pair for path, pair in adapter.pairs.items()}
    return PeftAdapter(adapter.name, pairs, {found[p]: s for p, s in adapter.scales.items()}, adapter.config)
