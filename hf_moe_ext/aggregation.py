"""Aggregation of experts: several trained models of one shape become one with the experts of all.

    model = aggregate_experts([one, other], num_experts_per_tok=4)

Z-code M3 (2109.10465), section 3.3.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .mixtures import Mixture, check_counts, find_mixtures, prepare, set_counts
from .modeling.configuration_moe_ext import MoeExtension
from .modeling.moe_families import get_by_path
from .modeling.moe_install import is_installed
from .modeling.moe_router import MoERouter
from .modeling.moe_structure import gate_rule
from .modeling.router_top_k import TopKRouter, TopKRouterConfig, renormalizes


logger = logging.get_logger(__name__)

# Of a config: what tells where it came from, and not what the model is.
_ORIGIN = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


def aggregate_experts(models: Sequence[PreTrainedModel], *, num_experts_per_tok: int | None = None) -> PreTrainedModel:
    """One model with the experts of several, which are left as they are.

    Experts and the rows of the gates stand one after the other, in the order of the models; everything else is their
    mean. Training goes on from there.

    Args:
        models (list of `PreTrainedModel`):
            Two or more with experts, of one config: trained from one start, or checkpoints of one training.
        num_experts_per_tok (`int`, *optional*):
            Experts per token of the result; as before where it is not given. For stock routers and `top_k`. With n
            models and n times as many, copies of one model have that model's function.

    Returns:
        The new model, in evaluation mode.

    Raises:
        TypeError, ValueError: for fewer than two models, models of other configs, or mixtures whose experts cannot
            become more, with the reason.
    """
    models = list(models)
    if len(models) < 2:
        raise ValueError(f"`models` must be two or more, got {len(models)}.")
    found = [find_mixtures(model) for model in models]
    _require_alike(models)
    family, mixtures = found[0]
    counts = {mixture.key: mixture.num_experts * len(models) for mixture in mixtures}
    check_counts(models[0], family, mixtures, counts)
    if num_experts_per_tok is not None:
        _check_top_k(mixtures, counts, num_experts_per_tok)
    elif any(not _sums_to_one(mixture) for mixture in mixtures):
        logger.warning(
            "The weights of a token are not divided by their sum in this model. With as many experts per token as "
            f"before, out of {len(models)} times as many, its experts count less at first; "
            f"`num_experts_per_tok` times {len(models)} avoids that."
        )
    model = copy.deepcopy(models[0]).eval()
    family, mixtures = find_mixtures(model)
    model = prepare(model, family, mixtures, counts, {})
    stacked = [{(m.key, path, name): t for m in others for path, _, _, name, t in m.stacks()} for _, others in found]
    with torch.no_grad():
        ours = {id(tensor) for mixture in mixtures for *_, tensor in mixture.stacks()}
        _average(model, models, ours)
        for mixture in mixtures:
            for path, _, store, name, tensor in mixture.stacks():
                rows = torch.cat([tensors[mixture.key, path, name].detach().to(tensor.device) for tensors in stacked])
                is_parameter = isinstance(tensor, nn.Parameter)
                store[name] = nn.Parameter(rows, tensor.requires_grad) if is_parameter else rows
    set_counts(model, family, mixtures, counts)
    if num_experts_per_tok is not None:
        _set_top_k(model, mixtures, num_experts_per_tok)
    return model


def _require_alike(models: list[PreTrainedModel]) -> None:
    first = models[0]

    def described(model: PreTrainedModel) -> dict[str, Any]:
        return {name: value for name, value in model.config.to_dict().items() if name not in _ORIGIN}

    for number, model in enumerate(models[1:], start=2):
        if type(model) is not type(first):
            raise TypeError(
                f"model {number} is a {type(model).__name__}, the first a {type(first).__name__}; they must be alike."
            )
        one, other = described(first), described(model)
        for name in one.keys() | other.keys():
            if one.get(name) != other.get(name):
                raise ValueError(
                    f"model {number} has {name}={other.get(name)!r}, the first {one.get(name)!r}; their configs must "
                    "be the same."
                )
        shapes = {name: tensor.shape for name, tensor in first.state_dict().items()}
        for name, tensor in model.state_dict().items():
            if shapes.get(name) != tensor.shape:
                raise ValueError(f"`{name}` of model {number} has the shape {list(tensor.shape)}, the first another.")


def _average(model: PreTrainedModel, models: list[PreTrainedModel], left_out: set[int]) -> None:
    """The mean, in float32 or more, of every tensor of floating point numbers; of others, that of the first model."""
    sources = [dict(_tensors(other)) for other in models]
    for name, tensor in _tensors(model):
        if id(tensor) in left_out or not tensor.is_floating_point():
            continue
        exact = torch.promote_types(tensor.dtype, torch.float32)
        total = sum(source[name].detach().to(tensor.device, exact) for source in sources)
        tensor.copy_(total / len(models))


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _router(mixture: Mixture) -> MoERouter | None:
    return mixture.gate if isinstance(mixture.gate, MoERouter) and is_installed(mixture.gate) else None


def _sums_to_one(mixture: Mixture) -> bool:
    """Whether the weights of a token are divided by their sum; true where it is not known otherwise."""
    router = _router(mixture)
    if router is not None and isinstance(router, TopKRouter):
        return renormalizes(router.moe_config, router.moe_site.rule)
    if router is not None:
        return bool(getattr(router.moe_config, "renormalize", True))
    return mixture.spec is None or renormalizes(TopKRouterConfig(), gate_rule(mixture.spec, mixture.config))


def _check_top_k(mixtures: list[Mixture], counts: dict[str, int], top_k: int) -> None:
    for mixture in mixtures:
        if not 1 <= top_k <= counts[mixture.key]:
            raise ValueError(
                f"`num_experts_per_tok` ({top_k}) must be from 1 to the {counts[mixture.key]} experts of "
                f"`{mixture.key}`."
            )
        router = _router(mixture)
        if router is not None and not isinstance(router, TopKRouter):
            raise ValueError(
                f"`num_experts_per_tok` is for stock routers and `top_k`; `{mixture.key}` has "
                f"`{router.moe_config.type}`."
            )
        if mixture.spec is not None and not mixture.spec.top_k:
            raise ValueError(f"the number of experts per token of `{mixture.key}` cannot be set.")


def _set_top_k(model: PreTrainedModel, mixtures: list[Mixture], top_k: int) -> None:
    """Tell gates and config the experts per token."""
    extension = MoeExtension.from_dict(getattr(model.config, "moe_ext", None) or {})
    for mixture in mixtures:
        for module in mixture.gate.modules():
            if "top_k" in vars(module):
                module.top_k = top_k
        router = _router(mixture)
        if router is not None:
            router.moe_config.num_experts_per_tok = top_k
        if mixture.spec is not None and mixture.spec.top_k:
            path, _, name = mixture.spec.top_k.rpartition(".")
            setattr(get_by_path(mixture.config, path), name, top_k)
    declared: list[Any] = [extension, *(part for part in extension.layers.values() if part is not None)]
    for part in declared:
        if part.experts is not None and part.experts.num_experts is not None:
            part.experts.num_experts_per_tok = top_k
        if isinstance(part.router, TopKRouterConfig):
            part.router.num_experts_per_tok = top_k
    if "moe_link" in vars(model):
        model.config.moe_ext = extension.to_dict()
