"""Which key of a checkpoint holds which tensor of a model."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import logging

from .safetensors_io import SafetensorsFolder


logger = logging.get_logger(__name__)


def stored_names(dense: PreTrainedModel, checkpoint: SafetensorsFolder) -> dict[str, str]:
    """Key in the checkpoint by name in the model, in the model's order. Old names and missing prefixes are allowed."""
    expected = dense.state_dict()
    transforms = get_model_conversion_mapping(dense)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    found: dict[str, str] = {}
    unknown = []
    for key in checkpoint.infos:
        name, pattern = rename_source_key(key, renamings, converters, dense.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, pattern = key, None
        if name not in expected:
            unknown.append(key)
        elif pattern is not None:
            raise ValueError(f"`{key}` has to be recomputed while loading; load the model and use `upcycle`.")
        elif (wanted := tuple(expected[name].shape)) != (shape := checkpoint.infos[key].shape):
            raise ValueError(f"`{key}` has the shape {shape}, but its config asks for {wanted}.")
        else:
            found[name] = key
    if unknown:
        logger.warning(f"{len(unknown)} tensors that the model does not have are left out, such as `{unknown[0]}`.")
    return {name: found[name] for name in expected if name in found}


def missing_names(dense: PreTrainedModel, found: dict[str, str]) -> list[str]:
    """Parameters that are not in the checkpoint, nor tied to one that is."""
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    present = {id(parameters[name]) for name in found if name in parameters}
    return [name for name, parameter in parameters.items() if name not in found and id(parameter) not in present]
