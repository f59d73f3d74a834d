"""Students with fewer layers than their teacher: Mixture-of-Students, DeepSpeed-MoE (2201.05596), section 4.2.

    student = make_student(teacher)                          # every 8th layer is left out
    MoETrainer(model=student, teacher=teacher, args=MoETrainingArguments("out", distill_fraction=0.7), ...).train()

A student has the width and the experts of its teacher in every layer that it keeps, and starts from its weights. Stock
and extended models of all families with one stack of layers can be teachers, dense ones too. What a config says layer
by layer follows; that every kept layer is built as it was is checked before anything is copied.
"""

from __future__ import annotations

import copy
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import logging

from .files import check_target, staged_folder
from .modeling import modeling_moe_ext
from .modeling.configuration_moe_ext import MoeExtension
from .modeling.moe_families import Family, get_family, iter_layers
from .patching import require_family
from .upcycling.checkpoint import _local, check_space, write_companions
from .upcycling.safetensors_io import SafetensorsFolder, SafetensorsWriter, TensorInfo, parse_size


logger = logging.get_logger(__name__)

_DROP_EVERY = 8  # one of 24 layers in 8, as in the paper
# Keys of configs that name layers by number, or count those in front or at the end that differ from the others.
_NUMBERS = ("mlp_only_layers", "moe_layers", "ple_layer_ids")
_COUNTS_IN_FRONT = ("first_k_dense_replace", "num_dense_layers")
_COUNTS_AT_THE_END = ("num_kv_shared_layers",)
# What tells where a layer stands, and not how it is built.
_PLACE = ("layer_id", "layer_idx", "layer_number", "layer_index", "order", "training", "gradient_checkpointing")


@dataclass(frozen=True)
class StudentReport:
    """What `make_student_checkpoint` did.

    Attributes:
        kept, removed: numbers that the layers have in the teacher.
        parameters_before, parameters_after: of the teacher and the student.
    """

    kept: tuple[int, ...]
    removed: tuple[int, ...]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        total, left = len(self.kept) + len(self.removed), ", ".join(map(str, self.removed))
        return (
            f"Kept {len(self.kept)} of {total} layers (without {left}): {self.parameters_before:,} -> "
            f"{self.parameters_after:,} parameters."
        )


def make_student(
    model: PreTrainedModel,
    keep_layers: Iterable[int] | None = None,
    *,
    init: Literal["teacher", "random"] = "teacher",
    seed: int = 0,
) -> PreTrainedModel:
    """A model with some of the layers of another one.

    Args:
        model (`PreTrainedModel`):
            The teacher, stock or extended. It is left as it is, and shares nothing with the student.
        keep_layers (`list[int]`, *optional*):
            Numbers of the layers that are kept, in order. `None` leaves every 8th out, as the paper does.
        init (`"teacher"` or `"random"`, *optional*, defaults to `"teacher"`):
            Start from the teacher's weights, or anew.
        seed (`int`, *optional*, defaults to 0):
            For `init="random"`.

    Returns:
        An instance of the same class.

    Raises:
        TypeError, ValueError: for an architecture or layers that do not fit, or a config that cannot say which layers
            are built how once some are gone.

    Example:
        ```python
        >>> student = make_student(teacher, keep_layers=[0, 1, 2, 4, 5, 7])
        ```
    """
    if init not in ("teacher", "random"):
        raise ValueError(f'`init` must be "teacher" or "random", got {init!r}.')
    family = require_family(model)
    kept = _kept_layers(_stack(model, family), keep_layers)
    config = _student_config(model.config, kept)
    _build_empty(model, config, family, kept)
    state = torch.random.get_rng_state()
    try:
        set_seed(seed)
        student: PreTrainedModel = type(model)._from_config(copy.deepcopy(config), dtype=model.dtype)
    finally:
        torch.random.set_rng_state(state)
    if init == "teacher":
        place = {old: new for new, old in enumerate(kept)}
        prefix = _layers_name(model, family)
        found = ((_moved(n, _layer_of(n, prefix), place), tensor) for n, tensor in model.state_dict().items())
        weights = {name: tensor.detach().clone() for name, tensor in found if name is not None}
        student.load_state_dict(weights, assign=True)
        student.tie_weights()
    student.to(model.device)
    if getattr(model, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.train(model.training)


def make_student_checkpoint(
    source: str | Path,
    destination: str | Path,
    keep_layers: Iterable[int] | None = None,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> StudentReport:
    """The checkpoint of a student, from folder to folder, one tensor in memory at a time.

    The destination appears when it is complete; whatever goes wrong before leaves nothing behind.

    Args:
        source (`str`):
            Folder of the teacher with safetensors, or a name on the Hub.
        destination (`str`):
            Folder to write. It holds the tensors that `make_student` gives.
        keep_layers (`list[int]`, *optional*):
            As in `make_student`.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`):
            Size of one file.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a model that is already at `destination` is replaced.

    Returns:
        What was done.

    Raises:
        TypeError, ValueError, FileNotFoundError, FileExistsError: before anything is written.
        OSError: where the disk is full. Nothing is left behind then.

    Example:
        ```python
        >>> print(make_student_checkpoint("teacher", "student"))
        ```
    """
    shard_size = parse_size(max_shard_size)
    place = check_target(destination, overwrite=overwrite)
    folder = _local(source)
    if folder.resolve() == place:
        raise ValueError(f"`destination` is the source folder {folder}; choose another one.")
    checkpoint = SafetensorsFolder(folder)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        teacher = _model_class(config, folder)._from_config(config, dtype=checkpoint.main_dtype).eval()
    family = require_family(teacher)
    count = _stack(teacher, family)
    kept = _kept_layers(count, keep_layers)
    student = _build_empty(teacher, _student_config(teacher.config, kept), family, kept)
    names = _stored_names(checkpoint, teacher, _layers_name(teacher, family), kept, count)
    infos: dict[str, TensorInfo] = {new: checkpoint.infos[old] for new, old in names.items()}
    check_space(place, sum(info.num_bytes for info in infos.values()))
    try:
        with staged_folder(place, overwrite=overwrite) as staging:
            write_companions(folder, staging, student)
            writer = SafetensorsWriter(staging, infos, shard_size)
            for new, old in tqdm(names.items(), desc="Student", unit="tensor"):
                writer.write(new, checkpoint.read(old))
            writer.close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno, f"the disk of {place} is full; nothing was left behind. Free some space"
            ) from error
        raise
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (teacher, student)]
    report = StudentReport(tuple(kept), tuple(i for i in range(count) if i not in kept), *sizes)
    logger.info(str(report))
    return report


# --- layers ---


def _stack(model: PreTrainedModel, family: Family) -> int:
    """How many layers a model has.

    Raises:
        ValueError: where they stand in several stacks, or the config counts others.
    """
    keys = [key for key, _, _ in iter_layers(model, family)]
    if not keys or not all(key.isdigit() for key in keys):
        raise ValueError(f"{type(model).__name__} has no single stack of layers; students of it are not supported.")
    counted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if counted != len(keys):
        raise ValueError(
            f"the config of {type(model).__name__} says `num_hidden_layers={counted}`, and there are {len(keys)} "
            "layers; students of this architecture are not supported."
        )
    return len(keys)


def _kept_layers(count: int, keep_layers: Iterable[int] | None) -> list[int]:
    """Numbers of the kept layers.

    Raises:
        TypeError, ValueError: where they are no layers in order, or all of them.
    """
    if keep_layers is None:
        kept = [i for i in range(count) if (i + 1) % _DROP_EVERY]
        if len(kept) == count:
            raise ValueError(
                f"every {_DROP_EVERY}th layer is left out if `keep_layers` is not given, and this model has {count}. "
                "Say which ones stay."
            )
        return kept
    kept = list(keep_layers)
    if not all(type(number) is int for number in kept):
        raise TypeError(f"`keep_layers` must be a list of layer numbers such as [0, 1, 3], got {kept!r}.")
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise ValueError(
            f"`keep_layers` must be different layers from 0 to {count - 1} in their order, at least one, got {kept}."
        )
    if len(kept) == count:
        raise ValueError(f"`keep_layers` names all {count} layers; a student has fewer than its teacher.")
    return kept


def _layers_name(model: PreTrainedModel, family: Family) -> str:
    """Name of the list of layers, such as `model.layers`."""
    first = next(layer for _, layer, _ in iter_layers(model, family))
    name = next(name for name, module in model.named_modules() if module is first)
    return name.rpartition(".")[0]


def _layer_of(name: str, prefix: str) -> int | None:
    """The number of the layer that a tensor of the model belongs to."""
    number = name.removeprefix(f"{prefix}.").partition(".")[0]
    return int(number) if name.startswith(f"{prefix}.") and number.isdigit() else None


def _moved(name: str, number: int | None, place: dict[int, int]) -> str | None:
    """The name of a tensor of layer `number` in the student; `None` for one of a layer that it does not have."""
    if number is None:
        return name
    if number not in place:
        return None
    parts = name.split(".")
    if str(number) not in parts:
        raise ValueError(
            f"`{name}` is stored without the number of its layer; load the model, and use `make_student`."
        )
    parts[parts.index(str(number))] = str(place[number])
    return ".".join(parts)


def _stored_names(
    checkpoint: SafetensorsFolder, teacher: PreTrainedModel, prefix: str, kept: Sequence[int], count: int
) -> dict[str, str]:
    """Key in the teacher's checkpoint by key in the student's. Old names and missing prefixes are allowed.

    Raises:
        ValueError: where layers are missing, or stored in a way that does not tell them.
    """
    expected = teacher.state_dict()
    transforms = get_model_conversion_mapping(teacher)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    place = {old: new for new, old in enumerate(kept)}
    found: dict[str, str] = {}
    seen = set()
    for key in checkpoint.infos:
        name = key
        if key not in expected:
            name, _ = rename_source_key(key, renamings, converters, teacher.base_model_prefix, expected)
        number = _layer_of(name, prefix)
        seen.add(number)
        new = _moved(key, number, place)
        if new is not None:
            found[new] = key
    missing = sorted(set(range(count)) - seen)
    if missing:
        raise ValueError(
            f"the checkpoint lacks the layers {missing} of `{prefix}`. It is incomplete, or has other names than the "
            "model: load it, and use `make_student`."
        )
    return found


# --- config ---


def _student_config(teacher: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """The config of a teacher for the layers that are kept."""
    config = copy.deepcopy(teacher)
    text = config.get_text_config()
    count = text.num_hidden_layers
    place = {old: new for new, old in enumerate(kept)}
    values: dict[str, Any] = {"num_hidden_layers": len(kept)}
    step = getattr(text, "decoder_sparse_step", None)
    for name, value in vars(text).items():
        if name in _NUMBERS and isinstance(value, (list, tuple)):
            values[name] = [place[number] for number in value if number in place]
        elif name in _COUNTS_IN_FRONT and isinstance(value, int):
            values[name] = sum(number < value for number in kept)
        elif name in _COUNTS_AT_THE_END and isinstance(value, int):
            values[name] = sum(number >= count - value for number in kept)
        elif _is_per_layer(name, value, count):
            values[name] = [value[number] for number in kept]
    if isinstance(step, int) and "mlp_only_layers" in values and step > 1:
        values["decoder_sparse_step"] = 1
        dense = {number for number in kept if (number + 1) % step or number in text.mlp_only_layers}
        values["mlp_only_layers"] = [place[number] for number in sorted(dense)]
    for name, value in values.items():
        setattr(text, name, value)
    if getattr(config, "moe_ext", None):
        extension = MoeExtension.from_dict(config.moe_ext)
        extension.layers = {str(place[int(k)]): part for k, part in extension.layers.items() if int(k) in place}
        config.moe_ext = extension.to_dict()
    return config


def _is_per_layer(name: str, value: Any, count: int) -> bool:
    told = "layer" in name or name == "indexer_types"
    return told and isinstance(value, (list, tuple)) and len(value) == count and not name.startswith("mtp_")


def _model_class(config: PreTrainedConfig, folder: Path) -> Any:
    name = next(iter(config.architectures or ()), "")
    owner: Any = modeling_moe_ext if name.startswith(modeling_moe_ext.PREFIX) else transformers
    found = getattr(owner, name, None) if name else None
    if found is None or get_family(config.model_type) is None:
        raise ValueError(
            f"the config of {folder} names no class whose layers are known (`architectures` is "
            f"{config.architectures}). Load the model, and use `make_student`."
        )
    return found


def _build_empty(
    teacher: PreTrainedModel, config: PreTrainedConfig, family: Family, kept: Sequence[int]
) -> PreTrainedModel:
    """The student without weights.

    Raises:
        ValueError: where a layer of it is built otherwise than in the teacher.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        student: PreTrainedModel = type(teacher)._from_config(config, dtype=teacher.dtype)
    layers = [layer for _, layer, _ in iter_layers(teacher, family)]
    for new, (_, layer, _) in enumerate(iter_layers(student, family)):
        wanted, found = _built(layers[kept[new]]), _built(layer)
        if wanted != found:
            changed = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
            raise ValueError(
                f"layer {kept[new]} of the teacher cannot be layer {new} of a student: the config of "
                f"{type(teacher).__name__} would build it otherwise (`{changed[0]}` would be "
                f"{found.get(changed[0])} in place of {wanted.get(changed[0])}). Keep layers that leave the pattern "
                "of layers as it is."
            )
    return student


def _built(layer: nn.Module) -> dict[str, Any]:
    """How a layer is built: classes and plain attributes of its modules, shapes of its tensors."""
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        found[f"{path}:"] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, type(None))) and not name.startswith("_"):
                if not name.startswith(_PLACE):
                    found[f"{path}.{name}"] = value
    found |= {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    return found
