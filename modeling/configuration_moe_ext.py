"""The declaration: what differs between a stock model and ours, as JSON-safe dataclasses.

A `MoeExtension` is kept under the key `moe_ext` of a model's config. Its shortest useful form is
`{"router": {"type": "top_p"}}`.
"""

from __future__ import annotations

import difflib
import typing
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from .configuration_parts import CapacityConfig, MomentumConfig, SharedExpertsConfig, ZeroExpertsConfig, check_types


FORMAT_VERSION = 1

_ROUTER_CONFIGS: dict[str, type[RouterConfig]] = {}
_ATTENTION_CONFIGS: dict[str, type[AttentionConfig]] = {}
_Config = TypeVar("_Config")


def _unknown(kind: str, name: str, known: typing.Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return f"unknown {kind} `{name}`; known: {', '.join(known)}.{hint}"


def _from_dict(cls: type[_Config], data: Any, what: str) -> _Config:
    if not isinstance(data, dict):
        raise TypeError(f"{what} must be a JSON object, got {data!r}.")
    known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise ValueError(f"{what}: {_unknown('key', key, known)}")
    return cls(**data)


def _to_dict(config: Any) -> dict[str, Any]:
    """Only what differs from the defaults, so that checkpoints stay readable and defaults stay visible in code."""
    out = {}
    for item in fields(config):
        value = getattr(config, item.name)
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if value != default:
            out[item.name] = value
    return out


@dataclass
class RouterConfig:
    """Base of all router configs. A subclass sets `type` and is registered by `register_router`.

    > Parameters that control the auxiliary losses

    Args:
        balance_coef (`float`, *optional*, defaults to 0.0):
            Weight of the load-balancing loss.
        z_coef (`float`, *optional*, defaults to 0.0):
            Weight of the router z-loss (mean of the squared log-partition of the logits).
        entropy_coef (`float`, *optional*, defaults to 0.0):
            Weight of the mean entropy of the routing distribution, in nats per token.
        information_coef (`float`, *optional*, defaults to 0.0):
            Weight of minus the mutual information of tokens and experts, in nats: tokens choose surely, and all
            experts are chosen (ModuleFormer).
        concentration_coef (`float`, *optional*, defaults to 0.0):
            Weight of the entropy of the mean routing distribution, in nats: few experts are used at all, and the
            others can be pruned (ModuleFormer).
    """

    type: ClassVar[str] = ""

    balance_coef: float = 0.0
    z_coef: float = 0.0
    entropy_coef: float = 0.0
    information_coef: float = 0.0
    concentration_coef: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("balance_coef", "z_coef", "entropy_coef", "information_coef", "concentration_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")

    @property
    def loss_coefs(self) -> dict[str, float]:
        """Weight of every auxiliary loss of this router, by the name of the loss: the fields `<name>_coef`. A loss of
        weight 0 is not computed."""
        # An override must not ask `super().loss_coefs`: `torch.compile` cannot trace a property of a base class.
        return {name.removesuffix("_coef"): value for name, value in vars(self).items() if name.endswith("_coef")}

    @property
    def schedule_steps(self) -> int | None:
        """Optimizer steps until the last change of a scheduled setting; `None` where nothing is scheduled, or over the
        whole training."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, `type` first."""
        return {"type": self.type, **_to_dict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> RouterConfig:
        """The config class registered for `data["type"]`, filled in.

        Raises:
            ValueError: for an unknown type or key, or a value out of range.
            TypeError: for a value of the wrong type.
        """
        if not isinstance(data, dict) or not isinstance(data.get("type"), str):
            raise TypeError(f'`router` must be an object with a "type", such as {{"type": "top_p"}}, got {data!r}.')
        data = dict(data)
        name = data.pop("type")
        if name not in _ROUTER_CONFIGS:
            raise ValueError(
                _unknown("router type", name, _ROUTER_CONFIGS)
                + " A router defined outside this package has to be imported (so that it registers itself) first."
            )
        return _from_dict(_ROUTER_CONFIGS[name], data, f'router of type "{name}"')


@dataclass
class AttentionConfig:
    """Base of all configs of attention. A subclass sets `type` and is registered by `register_attention`."""

    type: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_types(self)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, `type` first."""
        values = _to_dict(self)
        values |= {name: value.to_dict() for name, value in values.items() if isinstance(value, RouterConfig)}
        return {"type": self.type, **values}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> AttentionConfig:
        """The config class registered for `data["type"]`, filled in.

        Raises:
            ValueError: for an unknown type or key, or a value out of range.
            TypeError: for a value of the wrong type.
        """
        if not isinstance(data, dict) or not isinstance(data.get("type"), str):
            raise TypeError(f'`attention` must be an object with a "type", got {data!r}.')
        data = dict(data)
        name = data.pop("type")
        if name not in _ATTENTION_CONFIGS:
            raise ValueError(_unknown("attention type", name, _ATTENTION_CONFIGS))
        return _from_dict(_ATTENTION_CONFIGS[name], data, f'attention of type "{name}"')


@dataclass
class ExpertsConfig:
    """Routed experts of a layer.

    On a dense model, the experts that stand in place of each feed-forward block. On a stock MoE, an override of the
    counts (layers whose experts were pruned or merged).

    Args:
        num_experts (`int`, *optional*):
            Number of routed experts. `None` keeps the count of a stock MoE; required on a dense model.
        num_experts_per_tok (`int`, *optional*):
            Experts per token. `None` keeps a stock MoE's number, and means 2 (or 1 for a single expert) on a dense
            model.
        intermediate_size (`int`, *optional*):
            Width of one expert. `None` means the width of the stock block.
        output_scale (`float`, *optional*, defaults to 1.0):
            Factor on the sum of the routed experts (dense hosts only).
    """

    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    intermediate_size: int | None = None
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("num_experts", "num_experts_per_tok", "intermediate_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.num_experts is not None and (self.num_experts_per_tok or 1) > self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` ({self.num_experts_per_tok}) must not exceed "
                f"`num_experts` ({self.num_experts})."
            )


# What a layer may have, by the name of its field, with the class of its config.
_PARTS: dict[str, Any] = {
    "router": RouterConfig,
    "experts": ExpertsConfig,
    "zero_experts": ZeroExpertsConfig,
    "shared_experts": SharedExpertsConfig,
    "momentum": MomentumConfig,
    "capacity": CapacityConfig,
    "attention": AttentionConfig,
}
# Those whose JSON form names its class under "type".
_TYPED: dict[str, Any] = {"router": RouterConfig, "attention": AttentionConfig}


@dataclass
class LayerExtension:
    """What one layer has instead of the model-wide parts. A field left `None` means the model-wide part."""

    router: RouterConfig | None = None
    experts: ExpertsConfig | None = None
    zero_experts: ZeroExpertsConfig | None = None
    shared_experts: SharedExpertsConfig | None = None
    momentum: MomentumConfig | None = None
    capacity: CapacityConfig | None = None
    attention: AttentionConfig | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is declared."""
        return all(getattr(self, name) is None for name in _PARTS)

    def __post_init__(self) -> None:
        _parse_parts(self)
        check_types(self)


@dataclass
class MoeExtension:
    """What differs between a stock model and the extended one.

    Args:
        router (`RouterConfig`, `dict` or `str`, *optional*):
            Router of every MoE layer; a name means its default config. `None` leaves the stock router.
        experts (`ExpertsConfig` or `dict`, *optional*):
            Experts of every layer; required for dense models.
        zero_experts (`ZeroExpertsConfig` or `dict`, *optional*):
            Zero-computation experts beside the real ones. Some routers bring them along.
        shared_experts (`SharedExpertsConfig` or `dict`, *optional*):
            A block beside the routed experts that every token passes.
        momentum (`MomentumConfig` or `dict`, *optional*):
            Momentum from one MoE layer to the next.
        capacity (`CapacityConfig` or `dict`, *optional*):
            The most tokens an expert takes in one forward.
        attention (`AttentionConfig`, `dict` or `str`, *optional*):
            What becomes of the attention of every layer: experts of its own, or a choice among its heads.
        layers (`dict`, *optional*):
            Exceptions by layer: keys are `"3"`, a half-open range `"4:8"`, or `"encoder.3"` in encoder-decoder models;
            values are a `LayerExtension` (or its dict), or `None` for a layer that stays as it is in the stock model.
        version (`int`, *optional*, defaults to 1):
            Version of this format.

    Example:
        ```python
        >>> MoeExtension(router=TopPRouterConfig(threshold=0.4), layers={"0": None}).to_dict()
        {'version': 1, 'router': {'type': 'top_p'}, 'layers': {'0': None}}
        ```
    """

    router: RouterConfig | None = None
    experts: ExpertsConfig | None = None
    zero_experts: ZeroExpertsConfig | None = None
    shared_experts: SharedExpertsConfig | None = None
    momentum: MomentumConfig | None = None
    capacity: CapacityConfig | None = None
    attention: AttentionConfig | None = None
    layers: dict[str, LayerExtension | None] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not isinstance(self.version, int) or self.version < 1:
            raise TypeError(f"`version` of `moe_ext` must be a positive integer, got {self.version!r}.")
        if self.version > FORMAT_VERSION:
            raise ValueError(
                f"`moe_ext` is in format version {self.version}, this hf-moe-ext reads up to {FORMAT_VERSION}. "
                "Upgrade with `pip install -U hf-moe-ext`."
            )
        _parse_parts(self)
        if not isinstance(self.layers, dict):
            raise TypeError(f"`layers` must map layer keys to their exceptions, got {self.layers!r}.")
        expanded: dict[str, LayerExtension | None] = {}
        for key, value in self.layers.items():
            if isinstance(value, dict):
                value = _from_dict(LayerExtension, value, f'layer "{key}"')
            if value is not None and not isinstance(value, LayerExtension):
                raise TypeError(f'`layers["{key}"]` must be an object or null, got {value!r}.')
            for single in _expand(str(key)):
                if single in expanded:
                    raise ValueError(f'layer "{single}" is named twice in `layers`.')
                expanded[single] = value
        self.layers = expanded
        check_types(self)

    @property
    def declares_block(self) -> bool:
        """Whether anything is declared, for any layer, of blocks with experts."""
        declared = (self, *(part for part in self.layers.values() if part is not None))
        return any(getattr(part, name) is not None for part in declared for name in _PARTS if name != "attention")

    def for_layer(self, key: str) -> LayerExtension | None:
        """The parts that apply to the layer with this key, or `None` for a layer that stays stock."""
        override = self.layers.get(key, LayerExtension())
        if override is None:
            return None
        return LayerExtension(**{name: getattr(override, name) or getattr(self, name) for name in _PARTS})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form kept in `config.json`; holds only what differs from the defaults."""
        out: dict[str, Any] = {"version": self.version, **_parts_to_dict(self)}
        if self.layers:
            out["layers"] = {key: None if part is None else _parts_to_dict(part) for key, part in self.layers.items()}
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MoeExtension:
        """Read and validate the JSON form.

        Raises:
            ValueError: for unknown keys or router types, values out of range, or a newer format version.
            TypeError: for values of the wrong type.
        """
        return _from_dict(cls, data, "`moe_ext`")


def _parse_parts(config: MoeExtension | LayerExtension) -> None:
    for name, part_class in _PARTS.items():
        value = getattr(config, name)
        if isinstance(value, str) and name in _TYPED:
            value = {"type": value}
        if isinstance(value, dict):
            typed = name in _TYPED
            setattr(config, name, part_class.from_dict(value) if typed else _from_dict(part_class, value, f"`{name}`"))


def _parts_to_dict(config: MoeExtension | LayerExtension) -> dict[str, Any]:
    parts = {name: getattr(config, name) for name in _PARTS}
    return {
        name: part.to_dict() if name in _TYPED else _to_dict(part) for name, part in parts.items() if part is not None
    }


def _expand(key: str) -> list[str]:
    prefix, _, last = key.rpartition(".")
    prefix = f"{prefix}." if prefix else ""
    first, colon, end = last.partition(":")
    if not first.isdigit() or (colon and not end.isdigit()):
        raise ValueError(f'`layers` has the key "{key}"; expected "3", "4:8" or, with two stacks, "encoder.3".')
    if colon and int(first) >= int(end):
        raise ValueError(f'`layers` has the key "{key}", which names no layer; the end of a range is exclusive.')
    return [f"{prefix}{i}" for i in range(int(first), int(end))] if colon else [key]
