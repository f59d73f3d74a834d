"""Which parameters of a model are quantised, and in which format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import get_keys_to_not_convert

from ..kernels.quantized_tensor import QuantizedTensor
from ..kernels.quantized_weights import PER_BYTE, quantize
from ..modeling.moe_families import get_by_path, has_path, iter_layers, list_families
from ..modeling.moe_router import MoERouter
from .config import MoeQuantizationConfig


@dataclass(frozen=True)
class Target:
    """How one parameter is quantised.

    Attributes:
        kind: the format.
        settings: group size and zero points, as `quantize` takes them.
        is_transposed: whether a product sums over the axis before the last.
    """

    kind: str
    settings: dict[str, Any]
    is_transposed: bool = False

    def refusal(self, shape: torch.Size) -> str | None:
        """Why a parameter of this shape cannot be quantised, or `None`."""
        length = shape[-2] if self.is_transposed else shape[-1]
        step = self.settings.get("group_size") or PER_BYTE[self.kind]
        if length % step == 0:
            return None
        return f"it sums over {length} numbers, which is no multiple of {step}"

    def apply(self, weight: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
        """The quantised parameter, whose numbers will be made in `dtype`."""
        matrices = weight.detach().transpose(-1, -2) if self.is_transposed else weight.detach()
        stack = quantize(matrices if matrices.dim() == 3 else matrices[None], self.kind, **self.settings)
        tensor = QuantizedTensor.from_stack(stack, dims=matrices.dim(), is_transposed=self.is_transposed)
        return nn.Parameter(tensor.to(dtype), requires_grad=False)


def plan(model: Any, config: MoeQuantizationConfig) -> dict[str, Target]:
    """Parameters to quantise, by name.

    Raises:
        ValueError: the model has nothing of what is asked for, a name to leave out that nothing has, or a parameter
            whose size does not fit the format.
    """
    skipped = _left_out(model, config)
    found: dict[str, Target] = {}
    experts, routers = _experts_and_routers(model)
    if config.experts is not None:
        for prefix, module in experts.items():
            is_transposed = bool(vars(module).get("is_transposed", False))
            for name, parameter in module.named_parameters(prefix=prefix):
                if parameter.dim() == 3 and not _matches(name, skipped):
                    found[name] = Target(config.experts, config.settings(config.experts), is_transposed)
        if not found:
            raise ValueError(
                f"`experts={config.experts!r}`: this {type(model).__name__} has no experts in stacks of matrices"
                + (" beside those left out" if experts else "")
                + ". Experts that are linear layers, and dense models, are quantized by `linear=`."
            )
    if config.linear is not None:
        skipped = skipped | set(get_keys_to_not_convert(model))
        inside = tuple(f"{name}." for name in (*routers, *_embeddings(model)))
        conversions = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightConverter)]
        for prefix, module in model.named_modules():
            # A single output is a gate of something.
            plain = isinstance(module, nn.Linear) and module.out_features > 1
            if not plain or f"{prefix}.".startswith(inside) or _matches(prefix, skipped):
                continue
            if not _is_rearranged(f"{prefix}.weight", conversions):
                found.setdefault(f"{prefix}.weight", Target(config.linear, config.settings(config.linear)))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, target in found.items():
        problem = target.refusal(shapes[name])
        if problem is not None:
            raise ValueError(
                f"`{name}` {tuple(shapes[name])} cannot be stored as {target.kind}: {problem}. Choose a smaller "
                f'`group_size`, "int8", or leave it out: `modules_to_not_convert=["{name.rpartition(".")[0]}"]`.'
            )
    return found


def _left_out(model: nn.Module, config: MoeQuantizationConfig) -> set[str]:
    names = [name for name, _ in model.named_modules()]
    for pattern in config.modules_to_not_convert or ():
        if not any(_matches(name, {pattern}) for name in names):
            raise ValueError(f"`modules_to_not_convert` names {pattern!r}, which no module of this model has.")
    return set(config.modules_to_not_convert or ())


def _matches(name: str, patterns: set[str]) -> bool:
    """Whether one of the patterns is the name, or a part of it between dots."""
    return any(f".{pattern}." in f".{name}." for pattern in patterns)


def _experts_and_routers(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """Modules that hold a matrix for each expert, by name, and names of routers."""
    experts: dict[str, nn.Module] = {}
    routers: list[str] = []
    for name, module in model.named_modules():
        if "has_gate" in vars(module) and "is_transposed" in vars(module):  # `use_experts_implementation`
            experts[name] = module
        if isinstance(module, MoERouter):
            routers.append(name)
    names = {id(module): name for name, module in model.named_modules()}
    for family in list_families():
        in_attention = None if family.attention is None else family.attention.experts
        specs = [spec for spec in (family.moe, in_attention) if spec is not None]
        for layer, spec in ((layer, spec) for _, layer, _ in iter_layers(model, family) for spec in specs):
            if not has_path(layer, spec.block):
                continue
            block = get_by_path(layer, spec.block)
            for path in (spec.experts, *spec.stacks):
                if has_path(block, path):
                    module = get_by_path(block, path)
                    experts.setdefault(names[id(module)], module)
            if has_path(block, spec.router):
                routers.append(names[id(get_by_path(block, spec.router))])
    return experts, routers


def _is_rearranged(name: str, conversions: list[Any]) -> bool:
    """Whether Transformers would take the stored parts of a weight apart when it saves the model."""
    stored = part_name(name, "packed")
    return any(item.reverse_transform().rename_source_key(stored)[1] is not None for item in conversions)


def part_name(name: str, part: str) -> str:
    """`...experts.gate_up_proj`, `packed` -> `...experts.packed_gate_up_proj`.

    Beside the place of the weight: at the end of its name, patterns of Transformers before 5.21 would take the part
    for the weight itself.
    """
    prefix, _, last = name.rpartition(".")
    return f"{prefix}.{part}_{last}" if prefix else f"{part}_{last}"


def _embeddings(model: Any) -> list[str]:
    wanted = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module}
    return [name for name, module in model.named_modules() if id(module) in wanted]
