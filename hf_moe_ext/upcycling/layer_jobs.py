"""One layer's conversion: which dense tensors it takes, which tensors of the result it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..modeling.configuration_moe_ext import _unknown
from .methods import FeedForward


@dataclass(frozen=True)
class LayerJob:
    """One layer: the dense tensors it takes and the MoE tensors it makes, by their names in the two models.

    Attributes:
        key: layer key.
        sources: dense parameter names by role: `up.weight`, `down.bias`, `gate.weight`, `fused.weight`, ...
        up, down, gate: names of the expert tensors and the gate's weight. Biases are `<name>_bias`.
        zeros: further tensors of the target and their shapes: what has to be zero to change nothing.
        randoms: further tensors of the target and their shapes, drawn from N(0, 0.02).
        shared: name of the module of shared experts that the conversion fills, if any.
    """

    key: str
    sources: dict[str, str]
    up: str
    down: str
    gate: str
    hidden_size: int
    intermediate_size: int
    transposed: bool
    activation: nn.Module
    zeros: dict[str, tuple[int, ...]] = field(default_factory=dict)
    randoms: dict[str, tuple[int, ...]] = field(default_factory=dict)
    shared: str | None = None

    def read(self, tensors: dict[str, torch.Tensor]) -> FeedForward:
        """The dense block of this layer from its tensors by role."""

        def weight(role: str) -> torch.Tensor:
            tensor = tensors[f"{role}.weight"]
            return tensor.t() if self.transposed else tensor

        down, down_bias = weight("down"), tensors.get("down.bias")
        if "fused.weight" in tensors:
            roles = ["fused"]
            up = weight("fused").unflatten(0, (2, self.intermediate_size))
        else:
            roles = ["gate", "up"] if "gate.weight" in tensors else ["up"]
            up = torch.stack([weight(role) for role in roles]) if len(roles) == 2 else weight("up")[None]
        up_bias = None
        if down_bias is not None:
            none = up.new_zeros(up.shape[:2])
            biases = [tensors.get(f"{role}.bias") for role in roles]
            rows = torch.cat([part if b is None else b for part, b in zip(none, biases, strict=False)])
            up_bias = rows.view(up.shape[:2])
        degree = 2 if type(self.activation).__name__ == "ReLUSquaredActivation" else 1
        return FeedForward(up, down, up_bias, down_bias, degree)

    def name_shared(self, block: FeedForward) -> dict[str, torch.Tensor]:
        """Copies of the tensors of a block by their names in the module of shared experts."""
        parts = {
            self.up.rpartition(".")[2]: (block.up.flatten(0, 1), block.up_bias),
            "down_proj": (block.down, block.down_bias),
        }
        out = {f"{self.shared}.{name}.weight": weight.clone() for name, (weight, _) in parts.items()}
        biases = {name: bias for name, (_, bias) in parts.items() if bias is not None}
        return out | {f"{self.shared}.{name}.bias": bias.flatten().clone() for name, bias in biases.items()}


def select_layers(layers: str | Sequence[int | str], keys: list[str]) -> list[str]:
    """The layer keys that `layers` names, in the model's order.

    Args:
        layers: `"all"`, `"every:n"`, `"every:n:offset"`, or a list of indices (negative ones count from the end) or
            keys.
        keys: of all layers.

    Raises:
        ValueError: for an unknown form, index or key, or an empty selection.
    """
    forms = '"all", "every:2", "every:2:1", or a list of indices or layer keys'
    if layers == "all":
        return keys
    if isinstance(layers, str):
        word, *numbers = layers.split(":")
        if word != "every" or not 1 <= len(numbers) <= 2 or not all(n.isdigit() for n in numbers) or numbers[0] == "0":
            raise ValueError(f"`layers` must be {forms}, got {layers!r}.")
        step, offset = int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0
        chosen = [key for key in keys if int(key.rpartition(".")[2]) % step == offset]
        if not chosen:
            raise ValueError(f"`layers={layers!r}` selects none of the layers {keys[0]} to {keys[-1]}.")
        return chosen
    if not isinstance(layers, Sequence) or not layers:
        raise ValueError(f"`layers` must be {forms}, got {layers!r}.")
    wanted = set()
    for item in layers:
        if isinstance(item, bool) or not isinstance(item, (int, str)):
            raise ValueError(f"`layers` must be {forms}, got the entry {item!r}.")
        key = str(item + len(keys) if isinstance(item, int) and item < 0 else item)
        if key not in keys:
            raise ValueError(_unknown("layer", key, keys))
        wanted.add(key)
    return [key for key in keys if key in wanted]
