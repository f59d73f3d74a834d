"""The declaration: what differs between a stock model and ours, as JSON-safe dataclasses.

A `MoeExtension` is kept under the key `moe_ext` of a model's config. Its shortest useful form is
`{"router": {"type": "top_p"}}`.
"""

from __future__ import annotations

import difflib
import typing
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

from .configuration_parts import (
    CapacityConfig,
    ExpertLoraConfig,
    MomentumConfig,
    SharedExpertsConfig,
    ZeroExpertsConfig,
    check_types,
)


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
        localized_coef (`float`, *optional*, defaults to 0.0):
            Weight of the localized balancing loss: the experts are cut into `localized_groups` groups, one for each
            type of task, and within what a sequence asks for, all experts shall be used alike (LoRAMoE, 2312.09979,
            eq. 6). The types come with the batch, as `task_ids`; without them the loss balances all experts.
        localized_offset (`float`, *optional*, defaults to 0.1):
            How much more the experts of a sequence's own group count, in [0, 1] (delta).
        localized_groups (`int`, *optional*, defaults to 2):
            Groups of experts, which are types of tasks.
    """

    type: ClassVar[str] = ""

    balance_coef: float = 0.0
    z_coef: float = 0.0
    entropy_coef: float = 0.0
    information_coef: float = 0.0
    concentration_coef: float = 0.0
    localized_coef: float = 0.0
    localized_offset: float = 0.1
    localized_groups: int = 2

    def __post_init__(self) -> None:
        check_types(self)
        names = ("balance", "z", "entropy", "information", "concentration", "localized")
        for name in (f"{name}_coef" for name in names):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")
        if not 0 <= self.localized_offset <= 1:
            raise ValueError(f"`localized_offset` must be in [0, 1], got {self.localized_offset}.")
        if self.localized_groups < 1:
            raise ValueError(f"`localized_groups` must be at least 1, got {self.localized_groups}.")

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
class LoraAdapterConfig:
    """One adapter among LoRA experts: its name, and the rank and factor it has itself.

    Args:
        name (`str`):
            Letters, digits, `-`, `_` and `.`; the name of its folder when it is exported.
        r (`int`):
            Rank. Adapters of smaller rank than others are filled up with zeros, which changes nothing.
        lora_alpha (`float`):
            The product of its matrices is multiplied by `lora_alpha / r`.
        use_rslora (`bool`, *optional*, defaults to `False`):
            By `lora_alpha / sqrt(r)` instead.
        rank_pattern, alpha_pattern (`dict`, *optional*):
            Exceptions by the end of a module's path, such as `{"layers.0.self_attn.q_proj": 4}`.
    """

    name: str
    r: int = 8
    lora_alpha: float = 16.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        if not self.name or not self.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ValueError(f"the name of an adapter must be letters, digits, `-`, `_` and `.`, got {self.name!r}.")
        if self.name.startswith("."):
            raise ValueError(f"the name of an adapter must not begin with a dot, got {self.name!r}.")
        for rank in (self.r, *self.rank_pattern.values()):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(
                    f"the rank of the adapter `{self.name}` must be a whole number above 0, got {rank!r}."
                )

    def rank(self, path: str) -> int:
        """Its rank at the module of this path."""
        return _of_pattern(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        """The factor on `B @ A` at the module of this path."""
        return lora_scale(self.rank(path), _of_pattern(self.alpha_pattern, path, self.lora_alpha), self.use_rslora)


def lora_scale(rank: int, alpha: float, use_rslora: bool) -> float:
    """The factor on `B @ A`."""
    return alpha / (rank**0.5 if use_rslora else rank)


def _of_pattern(pattern: dict[str, Any], path: str, default: Any) -> Any:
    return next((value for end, value in pattern.items() if f".{path}".endswith(f".{end}")), default)


@dataclass
class LoraExpertsConfig:
    """Low-rank adapters as experts: a mixture of LoRAs on linear layers of a frozen model.

    `out = W x + sum_i g_i(x) s_i B_i A_i x`, with gates g from a router. B starts at zero, so the model starts as it
    was. The names of presets are `"mix_lora"` (2404.15159), `"lora_moe"` (2312.09979) and `"mola"` (2402.08562).

    > Parameters of the adapters

    Args:
        num_lora_experts (`int` or `list[int]`, *optional*, defaults to 8):
            Experts N. A list is cut along the layers: `[2, 4, 6, 8]` gives each quarter of the layers its number
            (MoLA). Its length must divide the number of layers.
        r (`int` or `list[int]`, *optional*, defaults to 8):
            Rank; a list as above.
        lora_alpha (`float`, *optional*, defaults to 16.0):
            `s = lora_alpha / r`.
        use_rslora (`bool`, *optional*, defaults to `False`):
            `s = lora_alpha / sqrt(r)`.
        lora_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on what the adapters see, in training.
        adapters (`list`, *optional*):
            Names, ranks and factors of the experts where these have their own, as imported ones do; then
            `num_lora_experts` is their number.

    > Parameters that say where they stand

    Args:
        target_modules (`list[str]` or `str`, *optional*, defaults to `"ffn"`):
            Linear layers with experts: ends of their paths (`"q_proj"`, `"mlp.up_proj"`), or `"ffn"` and
            `"attention"` for all projections of the block. In a layer with routed experts, `"ffn"` is its shared
            experts; adapters on routed experts are `expert_lora`.
        unrouted_modules (`list[str]` or `str`, *optional*):
            Linear layers with one ordinary LoRA and no router, named alike.
        share_base_ffn (`bool`, *optional*, defaults to `False`):
            The expert is the whole feed-forward block with its adapters on gate, up and down projection, and the
            outputs of the blocks are mixed (MixLoRA), not those of single projections. What the frozen projections
            compute of a token is computed once for all experts.

    > Parameters of the routing

    Args:
        num_experts_per_tok (`int`, *optional*):
            Experts of a token, whose gates are divided by their sum. `None` means all of them.
        router (`RouterConfig`, `dict` or `str`, *optional*):
            Router; `None` is softmax and top-k.
        route_per (`"linear"` or `"block"`, *optional*, defaults to `"linear"`):
            Whether each linear layer has a router of its own, which sees its input, or those of a feed-forward block,
            and those of an attention, follow one router that sees the input of the block.
        routing (`"token"`, `"sequence"` or `"task"`, *optional*, defaults to `"token"`):
            What a router looks at: the token; the mean of its sequence up to the token, so that no token sees later
            ones; or the number of the task, given with the batch as `task_ids` (B,).
        num_tasks (`int`, *optional*):
            Number of tasks, for `routing="task"`.
    """

    num_lora_experts: int | list[int] = 8
    r: int | list[int] = 8
    lora_alpha: float = 16.0
    use_rslora: bool = False
    lora_dropout: float = 0.0
    adapters: Any = None
    target_modules: str | list[str] = "ffn"
    unrouted_modules: str | list[str] | None = None
    share_base_ffn: bool = False
    num_experts_per_tok: int | None = None
    router: Any = None
    route_per: Literal["linear", "block"] = "linear"
    routing: Literal["token", "sequence", "task"] = "token"
    num_tasks: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        self.router = parse_router_field(self.router)
        if self.adapters is not None:
            self.adapters = _parse_adapters(self.adapters)
            self.num_lora_experts = len(self.adapters)
        for name in ("num_lora_experts", "r"):
            value = getattr(self, name)
            values = value if isinstance(value, list) else [value]
            if not values or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values):
                raise ValueError(f"`{name}` must be a whole number above 0 or a list of such, got {value!r}.")
        if self.lora_alpha <= 0:
            raise ValueError(f"`lora_alpha` must be positive, got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {self.lora_dropout}.")
        if self.num_experts_per_tok is not None and self.num_experts_per_tok < 1:
            raise ValueError(f"`num_experts_per_tok` must be at least 1, got {self.num_experts_per_tok}.")
        if (self.routing == "task") != (self.num_tasks is not None):
            raise ValueError(
                f'`routing="task"` and `num_tasks` go together, got {self.routing!r} and {self.num_tasks}.'
            )
        if self.num_tasks is not None and self.num_tasks < 1:
            raise ValueError(f"`num_tasks` must be at least 1, got {self.num_tasks}.")
        if self.share_base_ffn and self.route_per != "block":
            raise ValueError('`share_base_ffn` mixes the outputs of whole blocks; it needs `route_per="block"`.')
        for name in ("target_modules", "unrouted_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, [value])
            elif value is not None and not (value and all(isinstance(part, str) and part for part in value)):
                raise ValueError(f'`{name}` must be names of modules such as ["q_proj", "v_proj"], got {value!r}.')

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LoraExpertsConfig:
        """The setting of a paper, with changes.

        Args:
            name (`str`):
                `"mix_lora"`: 8 experts on the whole feed-forward block, 2 for a token, ordinary LoRA on attention.
                `"lora_moe"`: 8 experts on every projection of the feed-forward block, all of them used, with the
                localized balancing loss. `"mola"`: on all projections, 2 experts for a token, more of them in the
                upper layers (2, 4, 6, 8).
            changes:
                Fields of the config.

        Raises:
            ValueError: for an unknown preset or field.
        """
        if name not in _LORA_PRESETS:
            raise ValueError(_unknown("preset of LoRA experts", name, _LORA_PRESETS))
        return _from_dict(cls, {**_LORA_PRESETS[name], **changes}, f"`lora_experts` of preset `{name}`")

    @classmethod
    def from_dict(cls, data: Any) -> LoraExpertsConfig:
        """From the JSON form, which may name a `preset`.

        Raises:
            ValueError: for unknown keys or presets, or values out of range.
            TypeError: for values of the wrong type.
        """
        if isinstance(data, dict) and "preset" in data:
            data = dict(data)
            return cls.preset(data.pop("preset"), **data)
        return _from_dict(cls, data, "`lora_experts`")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; only what differs from the defaults."""
        values = _to_dict(self)
        if values.get("target_modules") == ["ffn"]:
            del values["target_modules"]
        if self.router is not None:
            values["router"] = self.router.to_dict()
        if self.adapters is not None:
            values["adapters"] = [{"name": adapter.name, **_to_dict(adapter)} for adapter in self.adapters]
            values.pop("num_lora_experts", None)
        return values


_LORA_PRESETS: dict[str, dict[str, Any]] = {
    "mix_lora": {
        "num_lora_experts": 8,
        "r": 8,
        "lora_alpha": 16.0,
        "num_experts_per_tok": 2,
        "route_per": "block",
        "share_base_ffn": True,
        "unrouted_modules": ["attention"],
        "router": {"type": "top_k", "balance_coef": 0.01},
    },
    "lora_moe": {
        "num_lora_experts": 8,
        "r": 4,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
        "router": {"type": "top_k", "localized_coef": 0.1},
    },
    "mola": {
        "num_lora_experts": [2, 4, 6, 8],
        "r": 8,
        "lora_alpha": 16.0,
        "num_experts_per_tok": 2,
        "target_modules": ["attention", "ffn"],
    },
}


def parse_router_field(value: Any) -> RouterConfig | None:
    """A router given as config, dict or name.

    Raises:
        ValueError: for an unknown router.
        TypeError: for something else.
    """
    if isinstance(value, str):
        value = {"type": value}
    if isinstance(value, dict):
        value = RouterConfig.from_dict(value)
    if value is not None and not isinstance(value, RouterConfig):
        raise TypeError(f"`router` must be a RouterConfig or its dict, got {value!r}.")
    return value


def _parse_adapters(value: Any) -> list[LoraAdapterConfig]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"`adapters` must be a list with one entry for each expert, got {value!r}.")
    found = [
        entry if isinstance(entry, LoraAdapterConfig) else _from_dict(LoraAdapterConfig, entry, "`adapters`")
        for entry in value
    ]
    names = [adapter.name for adapter in found]
    if len(set(names)) < len(names):
        raise ValueError(f"the names of `adapters` must differ, got {names}.")
    return found


# What a layer may have, by the name of its field, with the class of its config.
_PARTS: dict[str, Any] = {
    "router": RouterConfig,
    "experts": ExpertsConfig,
    "zero_experts": ZeroExpertsConfig,
    "shared_experts": SharedExpertsConfig,
    "momentum": MomentumConfig,
    "capacity": CapacityConfig,
    "attention": AttentionConfig,
    "lora_experts": LoraExpertsConfig,
    "expert_lora": ExpertLoraConfig,
}
# Those of which nothing stands in blocks with experts.
_OUTSIDE_BLOCKS = ("attention", "lora_experts")
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
    lora_experts: LoraExpertsConfig | None = None
    expert_lora: ExpertLoraConfig | None = None

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
        lora_experts (`LoraExpertsConfig`, `dict` or `str`, *optional*):
            Low-rank adapters as experts, on linear layers of a dense or MoE model; a name is a preset.
        expert_lora (`ExpertLoraConfig` or `dict`, *optional*):
            One low-rank adapter on each routed expert.
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
    lora_experts: LoraExpertsConfig | None = None
    expert_lora: ExpertLoraConfig | None = None
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
        return any(
            getattr(part, name) is not None for part in declared for name in _PARTS if name not in _OUTSIDE_BLOCKS
        )

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
        if isinstance(value, str) and name == "lora_experts":
            value = {"preset": value}
        if isinstance(value, dict):
            reads = hasattr(part_class, "from_dict")
            setattr(config, name, part_class.from_dict(value) if reads else _from_dict(part_class, value, f"`{name}`"))


def _parts_to_dict(config: MoeExtension | LayerExtension) -> dict[str, Any]:
    parts = {name: getattr(config, name) for name in _PARTS}
    return {
        name: part.to_dict() if hasattr(part, "to_dict") else _to_dict(part)
        for name, part in parts.items()
        if part is not None
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
