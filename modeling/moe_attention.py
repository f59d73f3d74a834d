"""What a declaration makes of the attention of a stock layer: experts of its own, or a choice among its heads.

A kind of attention is one file, one config (with a `type`) and one registration. It is installed in front of the stock
attention module, whose projections, positions, cache and attention function keep doing the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import nn

from .configuration_moe_ext import _ATTENTION_CONFIGS, AttentionConfig, RouterConfig, _unknown
from .moe_context import RoutingLink
from .moe_experts import MoeExtGate
from .moe_families import AttentionSpec, get_by_path
from .moe_install import add_child, install, own_names, remember_added
from .moe_router import GateRule, MoERouter, RouterSite, get_router


_ATTENTION: dict[str, type[AttentionPart]] = {}
_Part = TypeVar("_Part", bound="type[AttentionPart]")


@dataclass(frozen=True)
class AttentionPlan:
    """What will be done to the attention of one layer.

    Attributes:
        key: key of the layer.
        order: position of the layer among those whose attention is extended.
        layer: the decoder layer.
        config: the declaration.
        model_config: config of the base model.
        spec: where the parts of the attention stand.
        causal: whether the attention is causal.
        building: whether weights come later, so that projections may be resized.
    """

    key: str
    order: int
    layer: nn.Module
    config: AttentionConfig
    model_config: Any
    spec: AttentionSpec
    causal: bool
    building: bool

    @property
    def attention(self) -> nn.Module:
        """The stock attention module."""
        return get_by_path(self.layer, self.spec.site)

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.model_config.hidden_size)

    def router_site(self, num_experts: int, top_k: int, rule: GateRule | None = None) -> RouterSite:
        """The site of a router that chooses among `num_experts` parts of this attention. `rule` is that of a gate that
        the architecture has; `None` is softmax, top-k, renormalised."""
        key, rule = f"attention.{self.key}", rule or GateRule()
        return RouterSite(
            key, self.order, num_experts, top_k, self.hidden_size, rule, None, self.causal, attention=True
        )


class AttentionPart:
    """Base of the kinds of attention. Stateless: all work is done by what it installs.

    Attributes:
        paper: where the method was published, as `hf-moe list` shows it.
        of_models: whether its tensors are made of those of several models, and not of one.
    """

    config_class: ClassVar[type[AttentionConfig]]
    paper: ClassVar[str] = ""
    of_models: ClassVar[bool] = False

    @classmethod
    def check(cls, config: Any, plan: AttentionPlan) -> None:
        """Raise `ValueError` where `config` cannot work at this layer. Called before anything is changed."""

    @classmethod
    def check_stack(cls, plans: list[AttentionPlan]) -> None:
        """Raise `ValueError` where the layers of one stack that have this kind do not go together."""

    @classmethod
    def install(cls, config: Any, plan: AttentionPlan, attention: nn.Module, link: RoutingLink) -> None:
        """Put it in place. Tensors that it makes or resizes are empty; loading or `init_weights` fills them."""
        raise NotImplementedError


def register_attention(name: str, *, exist_ok: bool = False) -> Callable[[_Part], _Part]:
    """Class decorator that makes a kind of attention known under `name` in configs.

    Raises:
        ValueError: for a name in another form than lower case with underscores, or one that is taken.
        TypeError: where the class has no `config_class` derived from `AttentionConfig`.
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"the name of an attention must be lower-case letters, digits and underscores, got {name!r}.")
    if name in _ATTENTION and not exist_ok:
        raise ValueError(f"an attention named `{name}` is registered already ({_ATTENTION[name].__qualname__}).")

    def decorate(part: _Part) -> _Part:
        config_class = getattr(part, "config_class", None)
        if not (isinstance(config_class, type) and issubclass(config_class, AttentionConfig)):
            raise TypeError(
                f"{part.__name__} needs a `config_class` derived from AttentionConfig, got {config_class!r}."
            )
        config_class.type = name
        _ATTENTION[name] = part
        _ATTENTION_CONFIGS[name] = config_class
        return part

    return decorate


def get_attention(name: str) -> type[AttentionPart]:
    """The kind of attention registered under `name`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _ATTENTION:
        raise ValueError(_unknown("attention type", name, _ATTENTION))
    return _ATTENTION[name]


def list_attention() -> dict[str, type[AttentionPart]]:
    """All registered kinds of attention by name, sorted."""
    return dict(sorted(_ATTENTION.items()))


def check_attention_router(config: RouterConfig, site: RouterSite) -> None:
    """Raise `ValueError` where a router cannot choose among the parts of an attention."""
    router = get_router(config.type)
    if router.mixes_tokens:
        raise ValueError(
            f"the `{config.type}` router gives experts mixtures of tokens; attention needs a choice for every token."
        )
    if router.crosses_layers:
        raise ValueError(
            f"the `{config.type}` router hands something from block to block of experts; it has no place in attention."
        )
    router.check(config, site)


def install_router(
    gate: nn.Module, config: RouterConfig, site: RouterSite, link: RoutingLink, **attributes: Any
) -> None:
    """Put the router that `config` declares in front of a gate, and create what it needs."""
    router_class = get_router(config.type)
    name = f"{router_class.__name__}On{type(gate).__name__}"
    install(gate, router_class, name, moe_config=config, moe_site=site, moe_link=link, **attributes)
    assert isinstance(gate, MoERouter)
    before = own_names(gate)
    try:
        if site.zero_experts is not None:
            gate.setup_zero_experts()
        gate.setup()
    finally:  # what a failing router has added can be taken back
        remember_added(gate, before)
    for module in gate.modules():
        module.train(gate.training)


def add_attention_router(
    attention: nn.Module, config: RouterConfig, site: RouterSite, link: RoutingLink, **placement: Any
) -> None:
    """Hang a gate with a router on an attention module, as its child `moe_gate`.

    Args:
        placement: device and dtype of the gate.
    """
    add_child(attention, "moe_gate", MoeExtGate(site.num_experts, site.top_k, site.hidden_size, **placement))
    install_router(attention.moe_gate, config, site, link)
