"""The quantizer: Transformers calls it while a model loads, parameter by parameter, and when it is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..kernels.experts import NAME
from ..kernels.quantized_tensor import QuantizedTensor
from ..kernels.quantized_weights import PER_BYTE
from .config import METHOD, MoeQuantizationConfig
from .plan import Target, part_name, plan


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARTS = ("packed", "scales", "zeros")

# A process that does not know `moe_ext` would drop the few bits and go on with random experts. It refuses an
# implementation that it does not know, and this text is what the user reads then.
NEEDS_PACKAGE = "hf-moe-ext (these experts are quantized: `pip install hf-moe-ext`, then `import hf_moe_ext` first)"


class _Quantize(ConversionOps):
    """One parameter to few bits, when it has been put together."""

    def __init__(self, quantizer: MoeQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        out = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            dtype = kwargs["model"].get_parameter(name).dtype
            out[name] = self.quantizer.targets[name].apply(weight, dtype)
        return out

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("rounding has no inverse")


class _Deserialize(ConversionOps):
    """The parts of one parameter to a parameter."""

    def __init__(self, quantizer: MoeQuantizer) -> None:
        self.hf_quantizer = quantizer  # by this name Transformers leaves the dtypes of the parts as they are

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        name, model = kwargs["full_layer_name"], kwargs["model"]
        target: Target = self.hf_quantizer.targets[name]
        parts = {}
        for pattern, value in input_dict.items():
            part = next(part for part in _PARTS if f"{part}_" in pattern)
            parts[part] = value[0] if isinstance(value, list) else value
        return {name: assemble(parts, target, model.get_parameter(name))}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("the parts are saved as they are")


def assemble(parts: dict[str, torch.Tensor], target: Target, like: torch.Tensor) -> nn.Parameter:
    """The parameter that was stored as `parts`, of the shape and dtype of `like`.

    Raises:
        ValueError: parts that are missing or do not fit.
    """
    if "packed" not in parts or "scales" not in parts:
        raise ValueError(f"of a quantized parameter only {sorted(parts)} are there; the checkpoint is incomplete.")
    tensor = QuantizedTensor(
        parts["packed"],
        parts["scales"],
        parts.get("zeros"),
        target.kind,
        target.settings.get("group_size"),
        like.dtype,
        target.is_transposed,
    )
    tensor.stack()  # checks the sizes of all parts
    if tensor.shape != like.shape or (tensor.zeros is not None) != target.settings.get("zero_points", False):
        raise ValueError(f"the stored parts make {tuple(tensor.shape)}, the model has {tuple(like.shape)} there.")
    return nn.Parameter(tensor, requires_grad=False)


@register_quantizer(METHOD)
class MoeQuantizer(HfQuantizer):
    """Loads and saves models with experts in few bits; see `MoeQuantizationConfig`.

    Attributes:
        targets: the parameters to quantise, by name; known once there is a model.
    """

    quantization_config: MoeQuantizationConfig
    targets: dict[str, Target]
    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.targets = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot work before anything is loaded."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "`device_map` puts modules on disk, from where quantized weights cannot be read layer by layer. Use "
                'devices and "cpu".'
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.targets = plan(model, self.quantization_config)
        use_kernels(model)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.targets

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes of a number, scales left out."""
        target = self.targets.get(param_name)
        return float(param.dtype.itemsize) if target is None else 1 / PER_BYTE[target.kind]

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        if not self.pre_quantized:
            return []
        names = sorted({name.rpartition(".")[2] for name in self.targets})
        return [WeightConverter([f"{part}_{name}" for part in _PARTS], name, [_Deserialize(self)]) for name in names]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        lost = [name for name in self.targets if not isinstance(model.get_parameter(name), QuantizedTensor)]
        if lost:  # Transformers only reports this, and goes on with random weights
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise ValueError(
                f"`{lost[0]}`{more} could not be read: the checkpoint is incomplete or damaged, or was quantized with "
                "other settings than its config.json says (the report above names the tensors). Get it anew."
            )
        finish(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parts of quantised parameters under names of their own, as plain tensors."""
        found: dict[str, Any] = {}
        for name, value in model.state_dict().items():
            if isinstance(value, QuantizedTensor):
                found |= {part_name(name, part): tensor.contiguous() for part, tensor in value.parts().items()}
            else:
                found[name] = value
        return found, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if isinstance(parameter, QuantizedTensor):
                    weight = parameter.dequantize().contiguous()
                    module._parameters[name] = nn.Parameter(weight.to(dtype or weight.dtype))
        return model

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Take away every mark of quantisation, so that the model saves and trains as any other."""
        config: Any = model.config
        vars(model).pop("_weight_conversions", None)
        for holder, name in ((model, "hf_quantizer"), (model, "quantization_method"), (config, "quantization_config")):
            vars(holder).pop(name, None)
        model.is_quantized = False
        for module in model.modules():
            inner: Any = getattr(module, "config", None)
            if getattr(inner, "_is_quantized", False):
                inner._is_quantized = False
        release(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on the frozen weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def use_kernels(model: Any) -> None:
    """Choose the experts implementation that computes with few bits, where the model can choose one."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation(NAME)


def finish(model: Any) -> None:
    """Make sure that a quantised model saves its parts as they are, and says in its config what it needs."""
    known = vars(model).get("_weight_conversions")
    if known is not None:
        model._weight_conversions = [
            conversion
            for conversion in known
            if not any(isinstance(step, _Deserialize) for step in getattr(conversion, "operations", ()))
        ]
    model.config.experts_implementation = NEEDS_PACKAGE


def release(model: Any) -> None:
    """Take back what `finish` wrote into the config."""
    vars(model.config).pop("experts_implementation", None)


# With this package the text is the name of an implementation, without it the reason of a refusal.
ALL_EXPERTS_FUNCTIONS.register(NEEDS_PACKAGE, ALL_EXPERTS_FUNCTIONS[NAME])
