"""Checkpoints of models whose tensors are split over processes by `from_pretrained(distributed_config=...)`.

The stock trainer trains such models and does not resume them. Here the processes write their parts of the optimizer's
state side by side, under the names of the parameters, so that any number of processes can read them: the pieces that a
process needs are read from wherever they stand. Everything is safetensors and JSON; nothing is unpickled.

    checkpoint-100/model*.safetensors       whole tensors, as `save_pretrained` gathers them
    checkpoint-100/optimizer_shards/        what belongs to parameters, one file for each process; settings of groups
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard


OPTIMIZER_FOLDER = "optimizer_shards"
_SETTINGS_NAME = "settings.json"
# By the names of parameters: how the groups of an optimizer are made depends on how the model is split.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: str | Path) -> None:
    """Write the state of an optimizer into a checkpoint. Every process must call it."""
    folder = Path(checkpoint) / OPTIMIZER_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    state = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    tensors = {name: _contiguous(value) for name, value in state.items() if isinstance(value, torch.Tensor)}
    if tensors:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    if not dist.is_initialized() or dist.get_rank() == 0:
        settings = {name: value for name, value in state.items() if name not in tensors and _is_plain(value)}
        (folder / _SETTINGS_NAME).write_text(json.dumps(settings), encoding="utf-8")


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: str | Path) -> None:
    """Fill an optimizer with what `save_optimizer` wrote, however many processes wrote it. Every process must call it.

    Raises:
        ValueError: the checkpoint has no state for some parameters that are trained.
    """
    folder = Path(checkpoint) / OPTIMIZER_FOLDER
    state = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    missing = _read(tensors, folder)
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(tensors)} tensors of this optimizer, such as `{missing[0]}`: the "
            "checkpoint is from a training of other parameters, or with another optimizer."
        )
    settings = json.loads((folder / _SETTINGS_NAME).read_text(encoding="utf-8"))
    for name, value in settings.items():
        if name in state:
            state[name] = tuple(value) if isinstance(state[name], tuple) else value
    set_optimizer_state_dict(model, optimizer, state | tensors, options=_FLAT)


def load_weights(model: nn.Module, checkpoint: str | Path) -> list[str]:
    """Fill a split model with the whole tensors of a checkpoint. Every process must call it.

    Returns:
        The names of tensors that the checkpoint does not have, without those that are tied to others.
    """
    state = get_model_state_dict(model)
    missing = _read(state, Path(checkpoint))
    for name in missing:
        del state[name]
    set_model_state_dict(model, state, options=StateDictOptions(strict=False))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return [name for name in missing if name not in tied]


def _read(tensors: dict[str, Any], folder: Path) -> list[str]:
    """Fill the tensors, in place in the dictionary, from the safetensors of a folder. Returns the names it lacks."""
    stored = _stored_names(folder)
    missing = [name for name in tensors if name not in stored]
    wanted = {name: _contiguous(value) for name, value in tensors.items() if name in stored}
    if wanted:
        reader = HuggingFaceStorageReader(str(folder))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            dcp.load(wanted, storage_reader=reader, planner=DefaultLoadPlanner())
    for name, value in wanted.items():
        original = tensors[name]
        if isinstance(original, DTensor) and value.placements != original.placements:
            value = value.redistribute(placements=original.placements)
        tensors[name] = value
    return missing


def _stored_names(folder: Path) -> set[str]:
    if not any(folder.glob("*.safetensors")):
        return set()
    return set(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def _contiguous(value: Any) -> Any:
    """A tensor whose parts are single blocks of the whole, which is what a file can say about them. Experts that are
    split twice, over their owners and then by FSDP, are not: their parts are strided."""
    if not isinstance(value, DTensor):
        return value
    placements = tuple(Shard(p.dim) if p.is_shard() or hasattr(p, "split_factor") else p for p in value.placements)
    return value if placements == value.placements else value.redistribute(placements=placements)


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, (list, tuple)) else [value]
    return all(item is None or isinstance(item, (bool, int, float, str)) for item in items)
