"""Upcycling a checkpoint while it loads, so that device maps and low memory work as for any model."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils import logging

from ..modeling.configuration_moe_ext import LayerExtension, RouterConfig
from .layer_jobs import LayerJob
from .live import dense_class, finish_report, iter_added, make_report, seeded_reset
from .methods import option_names
from .plan import UpcycleOptions, UpcyclePlan, make_plan


logger = logging.get_logger(__name__)

# Conversions are registered by class name, and there is no way to unregister them.
_REGISTRATION = threading.Lock()


class UpcycleLayer(ConversionOps):
    """Conversion of one layer: dense tensors in, experts and gate out."""

    supports_many_to_many = True

    def __init__(self, plan: UpcyclePlan, job: LayerJob, roles: dict[str, str]) -> None:
        self.plan, self.job, self.roles = plan, job, roles

    def __deepcopy__(self, memo: dict[int, Any]) -> UpcycleLayer:
        return self  # transformers copies every converter; the plan holds the gates' tensors

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """The new tensors by full name, in the precision that `model` keeps them in."""
        tensors = {}
        for pattern, tensor in input_dict.items():
            tensors[self.roles[pattern]] = tensor[0] if isinstance(tensor, list) else tensor
        made = self.plan.convert(self.job, tensors)
        return {name: tensor.to(model.get_parameter(name).dtype) for name, tensor in made.items()}


def load_upcycled(
    source: str | Path,
    method: str = "sparse",
    *,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    router: RouterConfig | dict[str, Any] | str | None = None,
    parts: LayerExtension | dict[str, Any] | None = None,
    layers: str | Sequence[int | str] = "all",
    target: Literal["auto", "stock", "ext"] = "auto",
    gate_init: str | dict[str, torch.Tensor] = "normal",
    gate_noise: float = 0.0,
    seed: int = 0,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a dense checkpoint as a Mixture-of-Experts: `from_pretrained` that converts layer by layer.

    The dense model is never whole in memory, and no file is written. The difference to the dense model is not
    measured, for the same reason; `upcycle_checkpoint` measures it block by block.

    Args:
        source (`str`):
            Folder or name on the Hub of a dense model.
        method, num_experts, num_experts_per_tok, router, parts, layers, target, gate_init, gate_noise, seed:
            As in `upcycle`, and with the same result. Initialisations that run the dense model are not possible here.
        kwargs:
            Options of the method; all others go to `from_pretrained`: `device_map`, `dtype` (defaults to that of the
            checkpoint), `max_memory`, `attn_implementation`, ...

    Returns:
        The MoE model, with an `UpcycleReport` as its attribute `upcycle_report`.

    Example:
        ```python
        >>> model = load_upcycled("dense-7b", num_experts=8, device_map="auto")
        ```
    """
    method_options = {name: kwargs.pop(name) for name in option_names(method) if name in kwargs}
    options = UpcycleOptions(
        method,
        num_experts,
        num_experts_per_tok,
        router,
        layers,
        target,
        gate_init,
        gate_noise=gate_noise,
        seed=seed,
        method_options=method_options,
        parts=parts,
    )
    options.check()
    options.check_single_source()
    if kwargs.get("quantization_config") is not None:
        raise ValueError("`load_upcycled` loads unquantized; upcycle and save first, then load that quantized.")
    place = {name: kwargs[name] for name in ("revision", "token") if name in kwargs}
    config = AutoConfig.from_pretrained(source, **place)
    with torch.device("meta"):
        dense = dense_class(config, source)(config)
        plan = make_plan(dense, options)
        model_class, model_config = plan.result_class(dense), plan.result_config(dense)
        skeleton = model_class(model_config)
    plan.make_gates(None)
    report = make_report(plan, dense)
    report.source = str(source)
    usual = get_model_conversion_mapping(skeleton, add_legacy=False)
    converters = [_converter(plan, job, skeleton.base_model_prefix) for job in plan.jobs]
    del dense, skeleton

    # A class of its own name, so that no other load of the real class sees these conversions.
    name = f"{model_class.__name__}FromDense"
    loading_class: Any = type(name, (model_class,), {"__module__": model_class.__module__})
    with _REGISTRATION:
        register_checkpoint_conversion_mapping(name, [*converters, *usual], overwrite=True)
        try:
            model = loading_class.from_pretrained(source, config=model_config, **{"dtype": "auto", **kwargs})
        finally:
            register_checkpoint_conversion_mapping(name, [], overwrite=True)
    model.__class__ = model_class
    # Saving would apply what was used for loading, reversed. Without this, it applies the usual conversions.
    vars(model).pop("_weight_conversions", None)
    for path, module in iter_added(model):
        if not any(tensor.is_meta for tensor in module.state_dict().values()):
            seeded_reset(module, path, options.seed)
    finish_report(report, model)
    model.upcycle_report = report
    logger.info(str(report))
    return model


def _converter(plan: UpcyclePlan, job: LayerJob, prefix: str) -> WeightConverter:
    roles = {_pattern(name, prefix): role for role, name in job.sources.items()}
    # One announced target is all that older versions allow for several sources. The operation returns more, by their
    # full names.
    return WeightConverter(list(roles), [job.up], [UpcycleLayer(plan, job, roles)])


def _pattern(name: str, prefix: str) -> str:
    """Matches a parameter with or without the prefix of the base model, and nothing else."""
    bare = name.removeprefix(f"{prefix}.")
    optional = rf"(?:{re.escape(prefix)}\.)?" if prefix else ""
    return f"^{optional}{re.escape(bare)}$"
