"""The declaration: what differs between a stock model and ours, as JSON-safe dataclasses.

A `MoeExtension` is kept under the key `moe_ext` of a model's config. Its shortest useful form is
`{"router": {"type": "top_p"}}`.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar


FORMAT_VERSION = 1

_ROUTER_CONFIGS: dict[str, type[RouterConfig]] = {}
_ATTENTION_CONFIGS: dict[str, type[AttentionConfig]] = {}
_Config = TypeVar("_Config")


def _unknown(kind: str, name: str, known: typing.Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return f"unknown {kind} `{name}`; known: {', '.join(known)}.{hint}"


def _matches(value: Any, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or annotation)


def _describe_type(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_describe_type(option) for option in typing.get_args(annotation))
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def check_types(config: Any) -> None:
    """Raise `TypeError` naming the first field of a config dataclass whose value does not fit its annotation, or
    `ValueError` where it is infinite or NaN."""
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        value, annotation = getattr(config, item.name), hints[item.name]
        if not _matches(value, annotation):
            raise TypeError(
                f"`{item.name}` of {type(config).__name__} must be {_describe_type(annotation)}, got {value!r}."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{item.name}` of {type(config).__name__} must be finite, got {value}.")


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


@dataclass
class ZeroExpertsConfig:
    """Zero-computation experts: choices of the router beside the real experts that cost next to nothing.

    They go with every router that chooses by logits. Columns of the logits stand in the order: real experts, `zero`,
    `copy`, `constant`. MoE++ (2410.07348), section 3.1; the zero experts alone are the null experts of AdaMoE
    (2406.13233).

    Args:
        zero (`int`, *optional*, defaults to 0):
            Experts that return nothing; a slot that picks one is unused. Where weights are renormalised, they do not
            count.
        copy (`int`, *optional*, defaults to 0):
            Experts that return the block's input.
        constant (`int`, *optional*, defaults to 0):
            Experts that return a mixture of the block's input and a learned vector.
        init (`"random"`, `"copy"` or `"identity"`, *optional*, defaults to `"random"`):
            Rows of the gate for them: normal; the rows of the real experts in turn; or normal rows that are held back,
            so that the layer computes at first what it did before. In training their odds then grow linearly from 0.
        warmup_steps (`int`, *optional*):
            Optimizer steps until nothing is held back any more, with `init="identity"`. `None` means the whole
            training.
        balance (`"individual"` or `"grouped"`, *optional*, defaults to `"individual"`):
            Whether the load-balancing loss evens out the `zero` experts one by one, or only their mean load (AdaMoE).
        balance_weight (`float`, *optional*, defaults to 1.0):
            Factor on the terms of zero-computation experts in that loss (tau in MoE++). Below 1, they are picked more
            often than real experts.
    """

    zero: int = 0
    copy: int = 0
    constant: int = 0
    init: Literal["random", "copy", "identity"] = "random"
    warmup_steps: int | None = None
    balance: Literal["individual", "grouped"] = "individual"
    balance_weight: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("zero", "copy", "constant", "balance_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")
        if self.total == 0:
            raise ValueError("`zero_experts` has none: set `zero`, `copy` or `constant`, or leave it out.")
        if self.warmup_steps is not None and self.warmup_steps < 1:
            raise ValueError(f"`warmup_steps` must be at least 1, got {self.warmup_steps}.")
        if self.warmup_steps is not None and self.init != "identity":
            raise ValueError(
                f'`warmup_steps` ({self.warmup_steps}) goes with `init="identity"`; with `init="{self.init}"` '
                "nothing is held back."
            )

    @property
    def total(self) -> int:
        """Number of zero-computation experts of a layer."""
        return self.zero + self.copy + self.constant


@dataclass
class SharedExpertsConfig:
    """A feed-forward block that every token passes, added to the output of the block of routed experts.

    DeepSeekMoE (2401.06066), section 3.2. Activation and gating are those of the family's experts. Shared experts that
    a family has already stay as they are.

    Args:
        intermediate_size (`int`, *optional*):
            Its width: the number of shared experts times the width of one. `None` means the width of one routed
            expert, or of the dense block where `init="dense"`.
        init (`"zero"` or `"dense"`, *optional*, defaults to `"zero"`):
            How it starts: with an output projection of zeros, so that it changes nothing at first; or, when a dense
            model is upcycled, as the dense block, while the output projections of the routed experts start at zero.
            Both keep the function.
    """

    intermediate_size: int | None = None
    init: Literal["zero", "dense"] = "zero"

    def __post_init__(self) -> None:
        check_types(self)
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ValueError(f"`intermediate_size` must be at least 1, got {self.intermediate_size}.")


@dataclass
class MomentumConfig:
    """Momentum from MoE layer to MoE layer, applied to the output of the block. MomentumSMoE (2410.14574).

    Args:
        kind (`"heavy_ball"`, `"adam"` or `"robust"`, *optional*, defaults to `"heavy_ball"`):
            Which optimizer the stack of layers imitates. `"adam"` is Adam in the first `adam_layers` MoE layers and
            heavy ball after them.
        scope (`"block"` or `"routed"`, *optional*, defaults to `"block"`):
            What is taken for the gradient: the output of the whole block, or that of its routed experts.

    > Heavy ball, and the layers after Adam

    Args:
        decay (`float`, *optional*, defaults to 0.7):
            Share of the velocity that the next layer keeps (mu in the paper), in [0, 1). 0 is the stock model.
        step_size (`float`, *optional*, defaults to 1.0):
            Factor on the velocity before the residual connection adds it (gamma). With `kind="adam"` it is that of the
            Adam layers, and 1 in the others, as in the authors' code.
        warmup_steps (`int`, *optional*, defaults to 0):
            Optimizer steps in which the decay grows from 0, for training on from pretrained weights. For heavy ball.

    > Adam

    Args:
        adam_layers (`int`, *optional*, defaults to 1):
            MoE layers of each stack, from the first, that imitate Adam.
        beta1, beta2 (`float`, *optional*, default to 0.9 and 0.999):
            Decays of the mean of the outputs and of their squares, in [0, 1).
        eps (`float`, *optional*, defaults to 1e-8):
            Added to the mean square inside the root.
        skip_coef (`float`, *optional*, defaults to 0.0):
            What is taken from the residual stream (kappa), as AdamW's weight decay. In the authors' code it is 1: the
            stream starts anew after an Adam layer.

    > Robust momentum (1710.04753)

    Args:
        smoothness (`float`, *optional*, defaults to 1.0):
            L, the largest curvature that the layers are taken to have.
        condition (`float`, *optional*, defaults to 10.0):
            Largest over smallest curvature, above 1.
        rate (`float`, *optional*):
            Rate of convergence (rho), from `1 - 1/sqrt(condition)`, the fastest, to `1 - 1/condition`, the most robust
            and the same as gradient descent. `None` is the fastest.
    """

    kind: Literal["heavy_ball", "adam", "robust"] = "heavy_ball"
    scope: Literal["block", "routed"] = "block"
    decay: float = 0.7
    step_size: float = 1.0
    warmup_steps: int = 0
    adam_layers: int = 1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    skip_coef: float = 0.0
    smoothness: float = 1.0
    condition: float = 10.0
    rate: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        for name in ("step_size", "eps", "smoothness"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("warmup_steps", "skip_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")
        if self.adam_layers < 1:
            raise ValueError(f"`adam_layers` must be at least 1, got {self.adam_layers}.")
        if self.condition <= 1:
            raise ValueError(f"`condition` must be above 1, got {self.condition}.")
        low, high = 1 - self.condition**-0.5, 1 - 1 / self.condition
        if self.rate is not None and not low - 1e-9 <= self.rate <= high + 1e-9:
            raise ValueError(
                f"`rate` must be in [{low:.6g}, {high:.6g}] where `condition` is {self.condition}, got {self.rate}."
            )
        if self.warmup_steps and self.kind != "heavy_ball":
            raise ValueError(
                f'`warmup_steps` is for `kind="heavy_ball"`; `kind="{self.kind}"` differs from the stock model at '
                "every decay."
            )
        if self.kind == "robust" and self.scope == "routed":
            raise ValueError('`kind="robust"` moves the input of the whole block; it needs `scope="block"`.')

    @property
    def needs_stream(self) -> bool:
        """Whether it reads the residual stream in front of the block, or moves it."""
        return self.kind == "robust" or (self.kind == "adam" and self.skip_coef > 0)


# What a layer may have, by the name of its field, with the class of its config.
_PARTS: dict[str, Any] = {
    "router": RouterConfig,
    "experts": ExpertsConfig,
    "zero_experts": ZeroExpertsConfig,
    "shared_experts": SharedExpertsConfig,
    "momentum": MomentumConfig,
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
