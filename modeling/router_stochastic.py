"""THOR: experts are drawn at random, in training and in evaluation."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import MoERouter, RouterSite, register_router


@dataclass
class StochasticRouterConfig(RouterConfig):
    """Config of `StochasticRouter`. Defaults are those of the paper (2110.04260).

    > Parameters that control the selection

    Args:
        train_draw (`"batch"`, `"sequence"` or `"token"`, *optional*, defaults to `"batch"`):
            What gets one expert per layer in training: all tokens of a forward, as in the paper, each sequence, or
            each token.
        inference_draw (`"token"`, `"sequence"`, `"ensemble"` or `"fixed"`, *optional*, defaults to `"token"`):
            In evaluation: one expert for each token, one for each sequence, the mean of all experts, or always the
            one with the number `expert`.
        expert (`int`, *optional*, defaults to 0):
            For `inference_draw="fixed"`.
        seed (`int`, *optional*, defaults to 0):
            Of the draws in evaluation, which depend on it, the layer and the position of a token in its sequence,
            and on nothing else: not on the other rows of a batch, nor on a cache. `None` draws anew in every forward.
            Draws in training always come from PyTorch's generator.

    > Parameters that control the training

    Args:
        consistency_coef (`float`, *optional*, defaults to 1.0):
            Weight of the consistency loss between two passes with independent draws (alpha in the paper), which
            `MoETrainer` makes. 0 trains with one pass.
    """

    train_draw: Literal["batch", "sequence", "token"] = "batch"
    inference_draw: Literal["token", "sequence", "ensemble", "fixed"] = "token"
    expert: int = 0
    seed: int | None = 0
    consistency_coef: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert < 0:
            raise ValueError(f"`expert` must be non-negative, got {self.expert}.")
        if self.consistency_coef < 0:
            raise ValueError(f"`consistency_coef` must be non-negative, got {self.consistency_coef}.")
        for name in ("balance_coef", "z_coef", "entropy_coef"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` must be 0 for a router without logits, got {getattr(self, name)}: draws are even on "
                    "average and have no gradient."
                )


@register_router("stochastic")
class StochasticRouter(MoERouter):
    """One expert drawn at random, with weight 1.

    "Taming Sparsely Activated Transformer with Stochastic Experts" (2110.04260), section 3. Layers draw independently.
    """

    config_class = StochasticRouterConfig
    paper = "THOR (2110.04260)"
    needs = "MoETrainer for its consistency loss"
    learned = False
    stateless = True
    own_logits = True
    holds_zero_experts = False
    moe_config: StochasticRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> RouterConfig:
        raise NotImplementedError("its experts are drawn at random, whatever the token.")

    @classmethod
    def check(cls, config: StochasticRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        if config.expert >= site.num_experts:
            raise ValueError(
                f'`expert` ({config.expert}) exceeds the last one of layer "{site.key}", {site.num_experts - 1}.'
            )

    @classmethod
    def num_slots(cls, config: StochasticRouterConfig, site: RouterSite) -> int:
        return site.num_choices if config.inference_draw == "ensemble" else 1

    def setup(self) -> None:
        self.freeze_stock()

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, choices, tokens = self.moe_config, self.moe_site.num_choices, hidden.shape[0]
        mode = config.train_draw if self.training else config.inference_draw
        if mode == "ensemble":
            index = torch.arange(choices, device=hidden.device).repeat(tokens, 1)
        elif mode == "fixed":
            index = torch.full((tokens, 1), config.expert, device=hidden.device)
        elif self.training or config.seed is None:
            index = self._random(mode, hidden, context)[:, None]
        else:
            index = self._seeded(config.seed, mode, hidden, context)[:, None]
        even = torch.full((tokens, choices), 1 / choices, dtype=torch.float32, device=hidden.device)
        weights = even if mode == "ensemble" else torch.ones_like(index, dtype=torch.float32)
        weights = self.final_weights(weights, index, None)
        return RouteRecord(torch.zeros_like(even), even, weights, index, config)

    def _random(self, mode: str, hidden: torch.Tensor, context: RoutingContext | None) -> torch.Tensor:
        """(T,) experts, drawn once per forward and layer."""
        tokens = hidden.shape[0]
        draws = tokens if mode == "token" else 1
        if mode == "sequence":
            draws = len(_positions(context, hidden))

        def make(generator: torch.Generator | None) -> torch.Tensor:
            return torch.randint(self.moe_site.num_choices, (draws,), generator=generator, device=hidden.device)

        drawn = make(None) if context is None else context.draw(self.moe_site.order, "stochastic_expert", make)
        return drawn.repeat_interleave(tokens // draws)

    def _seeded(self, seed: int, mode: str, hidden: torch.Tensor, context: RoutingContext | None) -> torch.Tensor:
        """(T,) experts: a hash of seed, layer and position. Sequences have no number of their own that would be the
        same in another batch and in every step of cached generation, so all follow the same draws."""
        start = zlib.crc32(f"{seed}/{self.moe_site.key}".encode())
        positions = _positions(context, hidden).reshape(-1)
        if mode == "sequence":
            positions = torch.zeros_like(positions)
        return mix(positions + start) % self.moe_site.num_choices


def _positions(context: RoutingContext | None, hidden: torch.Tensor) -> torch.Tensor:
    if context is None:
        return torch.arange(hidden.shape[0], device=hidden.device)[None]
    return context.positions(hidden.shape[0], hidden.device)


def mix(numbers: torch.Tensor) -> torch.Tensor:
    """A 32-bit hash of each int64 number, in which every bit of the input moves half of the bits of the output."""
    numbers = numbers & 0xFFFFFFFF
    for _ in range(2):  # products stay below 2**63
        numbers = ((numbers ^ (numbers >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return numbers ^ (numbers >> 16)
