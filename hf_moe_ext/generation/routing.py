"""How a model routes while it generates: other numbers of experts, thresholds, and modes for the rows of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedModel

from ..modeling.configuration_moe_ext import RouterConfig
from ..modeling.moe_structure import iter_routers, route_rows
from ..modeling.router_stochastic import StochasticRouterConfig
from ..modeling.router_top_k import TopKRouterConfig
from ..modeling.router_top_p import TopPRouterConfig
from ..patching import extend, restore


Policy = dict[str, Any] | RouterConfig
KINDS = ("rank", "topk", "random", "threshold")


@dataclass(frozen=True)
class RoutingMode:
    """How one branch of self-contrast routes (2405.14507, section 3).

    Weights follow the family: where it divides those of the chosen experts by their sum, one expert has weight 1.
    So it has where a gate has a rule of its own (`phimoe`, `deepseek_v4` and four more); the logits rank experts then.

    Args:
        kind (`str`, *optional*, defaults to `"rank"`):
            `"rank"`: the expert with the `k`-th best score alone. `"topk"`: the `k` best. `"random"`: one expert drawn
            anew for each token and layer, with weight 1. `"threshold"`: the shortest prefix of the best experts whose
            probabilities sum to more than `threshold`, divided by their sum.
        k (`int`, *optional*, defaults to 2):
            Counted from 1.
        threshold (`float`, *optional*):
            In (0, 1], for that kind.

    Raises:
        ValueError: for another kind, a `k` below 1, or a threshold that is missing or out of place.
    """

    kind: Literal["rank", "topk", "random", "threshold"] = "rank"
    k: int = 2
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {KINDS}, got {self.kind!r}.")
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"`k` must be a number of 1 or above, got {self.k!r}.")
        if (self.kind == "threshold") != (self.threshold is not None):
            raise ValueError(f"`threshold` goes with the kind `threshold`, got {self.threshold!r} for `{self.kind}`.")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"`threshold` must be in (0, 1], got {self.threshold!r}.")

    @classmethod
    def read(cls, value: RoutingMode | Mapping[str, Any] | int | str) -> RoutingMode:
        """From a mode, its fields, a number of experts (`topk`), or a text such as `"rank-2"` or `"threshold-0.5"`.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(value, RoutingMode):
            return value
        if isinstance(value, Mapping):
            unknown = set(value) - {"kind", "k", "threshold"}
            if unknown:
                raise ValueError(f"a routing mode has `kind`, `k` and `threshold`, not {sorted(unknown)}.")
            return cls(**value)
        if isinstance(value, int) and not isinstance(value, bool):
            return cls("topk", value)
        if isinstance(value, str):
            kind, _, number = value.partition("-")
            fields: dict[str, Any] = {"kind": kind}
            with contextlib.suppress(ValueError):
                fields |= {"threshold": float(number)} if kind == "threshold" else {"k": int(number or 2)}
            if kind in KINDS and len(fields) == 2:
                return cls(**fields)
        raise ValueError(
            f"{value!r} is no routing mode; pass a `RoutingMode`, a number of experts, or a text such as 'rank-2', "
            "'topk-1', 'threshold-0.5' or 'random'."
        )

    def policy(self, model: PreTrainedModel) -> Policy:
        """For `route_rows`: what changes in the routers of an extended model, or another router in their place."""
        if self.kind == "random":
            return StochasticRouterConfig(inference_draw="token", seed=None, consistency_coef=0.0)
        routers = list(iter_routers(model))
        configs = [router.moe_config for router in routers]
        # Gates whose rule is neither softmax nor sigmoid: the chosen experts are weighed by a softmax then.
        custom = any(r.moe_site.rule.score == "custom" and getattr(r.moe_config, "score", "") is None for r in routers)
        score: dict[str, Any] = {"score": "softmax"} if custom else {}
        fields: dict[str, Any]
        if self.threshold is not None:
            fields = {"threshold": self.threshold, "renormalize": True, "balance_coef": 0.0, "entropy_coef": 0.0}
            return TopPRouterConfig(**fields, **score)
        count, first = (1, self.k) if self.kind == "rank" else (self.k, 1)
        wanted = {"num_experts_per_tok": count, "first_rank": first}
        if all(isinstance(config, TopKRouterConfig) for config in configs):
            return {**wanted, **score, **({"renormalize": True} if custom else {})}
        if first == 1 and all(hasattr(config, "num_experts_per_tok") for config in configs):
            return {"num_experts_per_tok": count}  # more routers have a number of experts than ranks
        return TopKRouterConfig(num_experts_per_tok=count, first_rank=first, **score)


@contextlib.contextmanager
def extended(model: PreTrainedModel, router: RouterConfig | None = None) -> Iterator[None]:
    """A stock model as an extended one inside; as it was afterwards, also after an exception.

    Args:
        model: of a supported family. An extended model is left as it is, unless `router` is given.
        router: for all layers; the stock gates themselves decide where it is not given.

    Raises:
        ValueError: an unsupported family or, with a `router`, a model that is extended already.
    """
    if "moe_link" in vars(model):
        if router is not None:
            raise ValueError("this model is extended already; change its routers with `restore` and `extend`.")
        yield
        return
    keys = set(vars(model.config))
    extend(model, router or TopKRouterConfig())
    try:
        yield
    finally:
        restore(model)
        for name in set(vars(model.config)) - keys:
            delattr(model.config, name)


@contextlib.contextmanager
def routed_by(model: PreTrainedModel, router: RouterConfig | Mapping[str, Any]) -> Iterator[PreTrainedModel]:
    """Another router inside the `with` block: fewer or more experts, a threshold, whatever needs no training.

    A stock model is a stock model again afterwards. In an extended model all rows of a batch follow the fields that
    are changed, and `router` is a mapping of these.

    Args:
        model (`PreTrainedModel`):
            A stock MoE model of a supported family, or an extended one.
        router (`RouterConfig` or mapping):
            The router, or for an extended model what changes in the configs of its routers.

    Raises:
        ValueError: where it does not fit the model.

    Example:
        ```python
        >>> with routed_by(model, TopPRouterConfig(threshold=0.5)):
        ...     model.generate(**inputs)
        ```
    """
    if "moe_link" not in vars(model):
        config = router if isinstance(router, RouterConfig) else RouterConfig.from_dict(dict(router))
        with extended(model, config):
            yield model
        return
    if isinstance(router, RouterConfig):
        raise ValueError(
            f"this model is extended already; pass the fields to change, not a `{type(router).__name__}`, or "
            "`restore` it first."
        )
    with _changed(model, dict(router)):
        yield model


@contextlib.contextmanager
def num_experts_per_tok(model: PreTrainedModel, k: int) -> Iterator[PreTrainedModel]:
    """`k` experts for each token inside the `with` block ("ensemble routing" of 2405.14507): more than the model was
    trained with may help, fewer are faster.

    Raises:
        ValueError: `k` is not between 1 and the number of experts, or the model's routers have no such number.

    Example:
        ```python
        >>> with num_experts_per_tok(model, 4):
        ...     model.generate(**inputs)
        ```
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"`k` must be a number of 1 or above, got {k!r}.")
    change: Any = {"num_experts_per_tok": k} if "moe_link" in vars(model) else TopKRouterConfig(num_experts_per_tok=k)
    with routed_by(model, change):
        yield model


@contextlib.contextmanager
def _changed(model: PreTrainedModel, changes: dict[str, Any]) -> Iterator[None]:
    """Other configs in the routers of an extended model."""
    routers = list(iter_routers(model))
    before = [router.moe_config for router in routers]
    after = []
    for router in routers:
        try:
            after.append(replace(router.moe_config, **changes))
        except TypeError as error:
            raise ValueError(
                f"{sorted(changes)} does not fit the `{router.moe_config.type}` router: {error}"
            ) from None
        router.check(after[-1], router.moe_site)
    try:
        for router, config in zip(routers, after, strict=True):
            router.moe_config = config
        yield
    finally:
        for router, config in zip(routers, before, strict=True):
            router.moe_config = config


@contextlib.contextmanager
def branches(model: PreTrainedModel, modes: Mapping[str, RoutingMode | None], rows: int) -> Iterator[None]:
    """Each mode routes `rows` rows of the batch, one mode after the other; `None` is the model's own routing."""
    names = [name for name in modes for _ in range(rows)]
    with extended(model):
        policies = {name: mode.policy(model) for name, mode in modes.items() if mode is not None}
        with route_rows(model, names, policies):
            yield
