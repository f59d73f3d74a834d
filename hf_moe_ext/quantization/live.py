"""Quantising a model that is in memory, and counting what one takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..kernels.quantized_tensor import QuantizedTensor
from .config import MoeQuantizationConfig
from .plan import plan
from .quantizer import MoeQuantizer, finish, use_kernels


@torch.no_grad()
def quantize(model: PreTrainedModel, config: MoeQuantizationConfig | None = None) -> PreTrainedModel:
    """Store the experts of a model in few bits, in place: what `from_pretrained(quantization_config=)` does.

    Parameters are replaced one by one, so no more than one of them is there twice. Quantised parameters are frozen.

    Args:
        model (`PreTrainedModel`):
            A stock model, an extended one, or one that was upcycled.
        config (`MoeQuantizationConfig`, *optional*):
            What becomes what; NF4 experts where it is not given.

    Returns:
        The same model. It saves with `save_pretrained`; `model.dequantize()` makes it a plain one again.

    Raises:
        TypeError: no model of Transformers, or one with adapters.
        ValueError: it is quantised already, or holds nothing that the config asks for. Nothing was changed then.

    Example:
        ```python
        >>> model = quantize(upcycle(dense, num_experts=8), MoeQuantizationConfig(experts="int4"))
        ```
    """
    if config is None:
        config = MoeQuantizationConfig()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a model of Transformers, got {type(model).__name__}. Adapters come after quantizing."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise TypeError("this model carries adapters; quantize first, then add them.")
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        method = getattr(getattr(model.config, "quantization_config", None), "quant_method", "another method")
        raise ValueError(
            f"this {type(model).__name__} is quantized already (by {method}). To change the format, load the full "
            "weights again; `model.dequantize()` gives what is left of them."
        )
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise ValueError(f"`{meta[0]}` is on the meta device or offloaded; quantize while loading instead.")
    targets = plan(model, config)
    modules: dict[str, Any] = dict(model.named_modules())
    for name in logging.tqdm(targets, desc="Quantizing"):
        path, _, last = name.rpartition(".")
        parameter = modules[path]._parameters[last]
        modules[path]._parameters[last] = targets[name].apply(parameter, parameter.dtype)
    quantizer = MoeQuantizer(config, pre_quantized=False)
    quantizer.targets = targets
    use_kernels(model)
    holder: Any = model
    holder.hf_quantizer, holder.quantization_method, holder.is_quantized = quantizer, config.quant_method, True
    quantizer.postprocess_model(model)
    finish(model)
    return model


def quantized_size(model: nn.Module) -> dict[str, int]:
    """Bytes that the parameters and buffers of a model take, measured on their tensors.

    Returns:
        `"total"`, and `"quantized"`, which is the share of those in few bits, their scales included.
    """
    total = quantized = 0
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, QuantizedTensor):
            size = sum(part.nbytes for part in tensor.parts().values())
            quantized += size
        else:
            size = tensor.nbytes
        total += size
    return {"total": total, "quantized": quantized}
