"""Floating-point operations that a training step needs, from the parameters that its tokens really use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..modeling.attention_heads import RoutedHeads
from ..modeling.moe_routed_model import RoutedModel
from .freezing import attention_parts, base_model, moe_parts
from .routing_metrics import LayerStatistics


# Dense peak of one device in 16 bits, in TFLOP/s, by a part of its name; from the vendors' data sheets.
_PEAKS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "V100": 125.0,
    "MI300X": 1307.0,
    "MI250": 362.0,
}


class ModelFlops:
    """What one token costs, forward and backward, without what is computed again under activation checkpointing.

    A matrix of P parameters costs a token 2 P forward, 2 P for the gradient of its input and, if it is trained, 2 P
    for its own: 6 P. Routed experts count by the number that a token uses. Attention costs 12 times layers, width of
    the heads and tokens of the row, as in PaLM (2204.02311, appendix B), which does not halve it for the causal mask.
    Embeddings cost nothing, but where the head that gives the logits is one of them.

    Args:
        model: a model as `MoETrainer` takes it.

    Attributes:
        fixed: operations of a token outside of the routed experts and the attention's products.
        experts: operations of a token in one expert, by layer key.
        pair: operations of the attention for each pair of tokens of a row.
    """

    def __init__(self, model: nn.Module) -> None:
        inner: Any = base_model(model)
        seen: dict[int, float] = {}
        for name, parameter in model.named_parameters():
            # Biases of experts have an axis of experts, so their form does not tell them from matrices.
            seen[id(parameter)] = 0.0 if parameter.dim() < 2 or name.endswith("bias") else _cost(parameter)
        head = getattr(inner.get_output_embeddings(), "weight", None)
        for module in inner.modules():
            if isinstance(module, nn.Embedding) and module.weight is not head:
                seen[id(module.weight)] = 0.0
        self.experts: dict[str, float] = {}
        # An architecture whose experts are computed whatever is chosen has all of them in `fixed`.
        whole = isinstance(inner, RoutedModel) and bool(inner.own_experts())
        parts = [] if whole else [(part.key, part) for part in moe_parts(model)]
        parts += [
            (f"attention.{part.key}", part)
            for part in attention_parts(model)
            if not isinstance(part.experts, RoutedHeads)
        ]
        for key, part in parts:
            modules = (part.experts, *(part.shared if key.startswith("attention.") else ()))
            routed = [p for module in modules for n, p in module.named_parameters() if not n.startswith("moe_")]
            self.experts[key] = sum(seen.pop(id(p), 0.0) for p in routed) / max(part.num_experts, 1)
        self.fixed = sum(seen.values())
        self.pair = _attention(inner.config)

    def total(self, tokens: float, pairs: float, layers: Mapping[str, LayerStatistics]) -> float:
        """Operations for so many tokens.

        Args:
            tokens: without padding.
            pairs: sum of the squared lengths of their rows.
            layers: what the routers did with them, by layer key; a layer that is not here costs nothing.
        """
        each = self.fixed + sum(cost * layers[key].mean_k for key, cost in self.experts.items() if key in layers)
        return tokens * each + pairs * self.pair


def _cost(parameter: torch.Tensor) -> float:
    return (6.0 if parameter.requires_grad else 4.0) * parameter.numel()


def _attention(config: Any) -> float:
    """12 times layers and heads' width; 0 where the config does not tell."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not isinstance(layers, int) or not isinstance(heads, int):
        return 0.0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 12.0 * layers * heads * width


def device_peak(device: torch.device) -> float | None:
    """Dense peak of a device in 16 bits, in TFLOP/s; `None` where it is not known."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
