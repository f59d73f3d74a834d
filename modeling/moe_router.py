"""The router contract: what every router implements, how it is registered, and the selection rules they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_moe_ext import _ROUTER_CONFIGS, RouterConfig, _unknown
from .moe_context import RouteRecord, RoutingContext, RoutingLink
from .moe_families import get_by_path
from .moe_losses import load_balancing_loss, router_entropy, router_z_loss


_ROUTERS: dict[str, type[MoERouter]] = {}
_Router = TypeVar("_Router", bound="MoERouter")


@dataclass(frozen=True)
class GateRule:
    """The rule of a stock gate, with config keys resolved to values. Fields as in `MoeSpec`."""

    score: str = "softmax"
    order: str = "score_topk"
    renormalize: bool = True
    scale: float = 1.0
    bias: str | None = None
    expert_scale: str | None = None
    groups: tuple[int, int, str] | None = None
    logits: str = "linear"
    returns: str = "LWI"
    input_3d: bool = False


@dataclass(frozen=True)
class RouterSite:
    """Where a router stands: layer key, position among the routed layers, counts, and the stock rule there."""

    key: str
    order: int
    num_experts: int
    top_k: int
    hidden_size: int
    rule: GateRule


class MoERouter(nn.Module):
    """Base of all routers.

    A router is installed by giving the stock gate the class `(Router, StockGate)`: the gate keeps its parameters,
    hooks, checkpoint keys and `isinstance` relations, and gains what the router adds. `restore` gives the old class
    back. So a router has no `__init__`; it makes its own parameters in `setup`.

    A subclass sets `config_class`, implements `route`, and is registered by `register_router`.

    Attributes (set at installation):
        moe_config: the router's config.
        moe_site: the `RouterSite` it stands at.
        moe_link: the `RoutingLink` of the model.
    """

    config_class: ClassVar[type[RouterConfig]]
    moe_config: Any
    moe_site: RouterSite
    moe_link: RoutingLink

    def setup(self) -> None:
        """Create the router's own parameters and buffers (on `self.weight`'s device or meta). Default: none.

        Names must start with `moe_`, so that they never meet a stock name.
        """

    def reset_parameters(self) -> None:
        """Initialise what `setup` created, with the functions of `transformers.initialization`. Default: nothing."""

    @classmethod
    def check(cls, config: RouterConfig, site: RouterSite) -> None:
        """Raise `ValueError` where `config` cannot work at `site`. Called before anything is changed."""

    @classmethod
    def identity_config(cls, site: RouterSite) -> RouterConfig:
        """The config with which a freshly installed router reproduces the stock gate exactly.

        Raises:
            NotImplementedError: where the method has no such point; the message says why.
        """
        raise NotImplementedError(f"{cls.__name__} has no setting that reproduces a stock gate.")

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        """Decide. `hidden` is (T, H); further arguments are what the family's block hands its gate, and go to
        `stock_route`, `router_logits` and `selection_bias`."""
        raise NotImplementedError

    @staticmethod
    def aux_losses(record: RouteRecord, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Unweighted auxiliary losses of one layer by name; only those with a non-zero weight in the config."""
        coefs = record.config.loss_coefs
        losses = {}
        if coefs.get("balance"):
            losses["balance"] = load_balancing_loss(record.scores, record.index, mask)
        if coefs.get("z"):
            losses["z"] = router_z_loss(record.logits, mask)
        if coefs.get("entropy"):
            losses["entropy"] = router_entropy(record.scores, mask)
        return losses

    def schedule(self, step: int, total_steps: int) -> None:
        """Called by the trainer before each optimizer step, for routers whose settings change over training."""

    def after_optimizer_step(self, counts: torch.Tensor) -> None:
        """Called by the trainer after each optimizer step with the (E,) token counts of that step."""

    # --- what subclasses build on ---

    def stock_route(
        self, hidden: torch.Tensor, *args: Any, input_shape: torch.Size | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Run the stock gate; its outputs by letter (`L`, `W`, `I`, ... as in `MoeSpec.returns`)."""
        if input_shape is not None:
            hidden = hidden.reshape(input_shape)
        outputs = super().forward(hidden, *args, **kwargs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return dict(zip(self.moe_site.rule.returns, outputs, strict=False))

    def router_logits(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raw logits (T, E), bit-equal to those of the stock gate."""
        how = self.moe_site.rule.logits
        if how == "linear":
            return F.linear(hidden, self.weight)
        if how == "linear_fp32":
            return F.linear(hidden.float(), self.weight.float())
        outputs = self.stock_route(hidden, *args, **kwargs)
        if "L" in outputs:
            return outputs["L"].flatten(0, -2)
        return outputs["P"].float().clamp_min(torch.finfo(torch.float32).tiny).log()

    def selection_bias(self, *args: Any) -> torch.Tensor | None:
        """The stock correction bias (E,), which moves the selection but not the weights, or `None`."""
        where = self.moe_site.rule.bias
        if where is None:
            return None
        bias = args[0] if where == "arg" else get_by_path(self, where)
        return None if bias is None else bias.reshape(-1)

    def final_weights(self, weights: torch.Tensor, index: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Weights (T, K) times `scale` (`None`: the family's) and, where the family has one, a factor per expert."""
        rule = self.moe_site.rule
        weights = weights * (rule.scale if scale is None else scale)
        if rule.expert_scale is not None:
            weights = weights * get_by_path(self, rule.expert_scale)[index]
        return weights

    def decide(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> RouteRecord:
        """`route` for the tokens `hidden` (T, H), and keep the record in the context of the running forward."""
        context = self.moe_link.slots.layer_context
        record = self.route(hidden, context, *args, **kwargs)
        site = self.moe_site
        record.key, record.order, record.num_experts = site.key, site.order, site.num_experts
        if context is not None:
            context.add(record)
        return record

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """The stock protocol: returns what the stock gate returns, in its order."""
        if self.moe_site.rule.input_3d:
            kwargs["input_shape"] = hidden_states.shape
        record = self.decide(hidden_states.reshape(-1, hidden_states.shape[-1]), *args, **kwargs)
        letters = {"L": record.logits, "P": record.scores, "W": record.weights, "I": record.index}
        returns = self.moe_site.rule.returns
        if not set(returns) <= set(letters):
            stock = record.stock or self.stock_route(hidden_states, *args, **kwargs)
            letters = {**stock, **letters}
        return tuple(letters[letter] for letter in returns)


def register_router(name: str, *, exist_ok: bool = False) -> Callable[[type[_Router]], type[_Router]]:
    """Class decorator that makes a router known under `name` in configs and in `hf-moe list routers`.

    Args:
        name (`str`):
            Lower-case name with underscores.
        exist_ok (`bool`, *optional*, defaults to `False`):
            Whether an existing router of that name may be replaced.

    Raises:
        ValueError: for a name in another form, or one that is taken.
        TypeError: where the class has no `config_class` derived from `RouterConfig`.
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"a router's name must be lower-case letters, digits and underscores, got {name!r}.")
    if name in _ROUTERS and not exist_ok:
        raise ValueError(f"a router named `{name}` is registered already ({_ROUTERS[name].__qualname__}).")

    def decorate(router: type[_Router]) -> type[_Router]:
        config_class = getattr(router, "config_class", None)
        if not (isinstance(config_class, type) and issubclass(config_class, RouterConfig)):
            raise TypeError(
                f"{router.__name__} needs a `config_class` derived from RouterConfig, got {config_class!r}."
            )
        config_class.type = name
        _ROUTERS[name] = router
        _ROUTER_CONFIGS[name] = config_class
        return router

    return decorate


def get_router(name: str) -> type[MoERouter]:
    """The router class registered under `name`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _ROUTERS:
        raise ValueError(_unknown("router type", name, _ROUTERS))
    return _ROUTERS[name]


def list_routers() -> dict[str, type[MoERouter]]:
    """All registered routers by name, sorted."""
    return dict(sorted(_ROUTERS.items()))


def expert_scores(logits: torch.Tensor, score: str) -> torch.Tensor:
    """(T, E) logits to float32 scores, `"softmax"` over the experts or elementwise `"sigmoid"`."""
    return logits.float().softmax(dim=-1) if score == "softmax" else logits.float().sigmoid()


def as_distribution(scores: torch.Tensor, score: str) -> torch.Tensor:
    """Scores with rows that sum to 1, for losses and thresholds (sigmoid scores are divided by their sum)."""
    return scores if score == "softmax" else scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)


def limit_groups(choice: torch.Tensor, groups: tuple[int, int, str] | None) -> torch.Tensor:
    """Set the selection scores of experts outside a token's best groups to -inf.

    DeepSeek-V2/V3 (2405.04434, 2412.19437): experts are split into `groups[0]` equal groups, a group scores the sum of
    its two best experts (`"top2_sum"`) or its best one (`"max"`), and the `groups[1]` best groups remain.
    """
    if groups is None or groups[0] <= 1:
        return choice
    num_groups, keep, how = groups
    grouped = choice.unflatten(-1, (num_groups, -1))
    size = grouped.shape[-1]
    best = grouped.topk(min(2, size), dim=-1).values.sum(-1) if how == "top2_sum" else grouped.amax(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(keep, dim=-1).indices, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
