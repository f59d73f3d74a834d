"""EvoMoE's Dense-to-Sparse gate: noisy routing from all experts to one, as a temperature falls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import MoERouter, RouterSite, balance_loss, expert_scores, register_router
from .moe_schedules import ramp, schedule_fraction


@dataclass
class DTSRouterConfig(RouterConfig):
    """Config of `DTSRouter`. Defaults are those of the authors' released runs (2112.14397).

    > Parameters that control the selection

    Args:
        temperature (`float`, *optional*, defaults to 2.0):
            Temperature of the noisy softmax when training starts (tau in the paper).
        temperature_end (`float`, *optional*, defaults to 0.5):
            Temperature when the schedule is over.
        temperature_shape (`"linear"` or `"exponential"`, *optional*, defaults to `"linear"`):
            How it falls.
        steps (`int`, *optional*):
            Optimizer steps of the fall. `None` means the whole training.
        threshold (`float`, *optional*, defaults to 1e-3):
            An expert is used where its noisy probability is above (c).
        hard_after (`int`, *optional*):
            Optimizer steps after which a token uses only the expert with the highest noisy probability. `None` means
            never; at the usual temperatures several experts are left then.
        gumbel_weights (`bool`, *optional*, defaults to `False`):
            Whether the weights are the noisy probabilities; otherwise they are those without noise and temperature.
        renormalize (`bool`, *optional*, defaults to `False`):
            Whether the weights of the used experts are divided by their sum.
        eval_mode (`"top1"` or `"dense"`, *optional*, defaults to `"top1"`):
            In evaluation: the best expert, or all of them. There is no noise then.

    > Parameters that control the auxiliary losses

    Args:
        balance_coef (`float`, *optional*, defaults to 0.0):
            Weight of the balance loss `E * sum_i f_i W_i`: `f_i` is the share of tokens that used expert i, `W_i` its
            mean weight.
    """

    temperature: float = 2.0
    temperature_end: float = 0.5
    temperature_shape: Literal["linear", "exponential"] = "linear"
    steps: int | None = None
    threshold: float = 1e-3
    hard_after: int | None = None
    gumbel_weights: bool = False
    renormalize: bool = False
    eval_mode: Literal["top1", "dense"] = "top1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature_end <= 0:
            raise ValueError(f"`temperature_end` must be positive, got {self.temperature_end}.")
        if self.temperature < self.temperature_end:
            raise ValueError(
                f"`temperature` ({self.temperature}) must not be below `temperature_end` ({self.temperature_end})."
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}.")
        if self.hard_after is not None and self.hard_after < 0:
            raise ValueError(f"`hard_after` must be non-negative, got {self.hard_after}.")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"`threshold` must be in [0, 1), got {self.threshold}.")

    @property
    def schedule_steps(self) -> int | None:
        return max((steps for steps in (self.steps, self.hard_after) if steps is not None), default=None)

    def temperature_at(self, progress: torch.Tensor) -> torch.Tensor:
        """The temperature (scalar) at a training progress `[step, total_steps]`."""
        fraction = schedule_fraction(progress, self.steps)
        return ramp(fraction, self.temperature, self.temperature_end, self.temperature_shape)


@register_router("dts")
class DTSRouter(MoERouter):
    """In training, every expert whose noisy probability exceeds a threshold; in evaluation, the best one.

    "EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate" (2112.14397). The noisy
    probability is `softmax((logits + Gumbel noise) / temperature)`: nearly even at first, so that all experts learn,
    and peaked at the end. Step and temperature are kept per model, in a buffer.
    """

    config_class = DTSRouterConfig
    replays = True
    paper = "EvoMoE (2112.14397)"
    needs = "training with a schedule"
    moe_config: DTSRouterConfig
    moe_progress: torch.Tensor

    @classmethod
    def identity_config(cls, site: RouterSite) -> RouterConfig:
        raise NotImplementedError("it trains with all experts at first and evaluates with one; a stock gate takes k.")

    @classmethod
    def num_slots(cls, config: DTSRouterConfig, site: RouterSite) -> int:
        """In evaluation; training may use all."""
        return 1 if config.eval_mode == "top1" else site.num_choices

    def setup(self) -> None:
        self.use_progress()

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, site = self.moe_config, self.moe_site
        logits = self.router_logits(hidden, *args, **kwargs)
        scores = expert_scores(logits, "softmax")
        values_from, values = logits, scores
        index = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
        keep = torch.ones_like(index, dtype=torch.bool)
        if self.training:
            noisy = (logits.float() + self._noise(logits, context)) / config.temperature_at(self.moe_progress)
            noisy_scores = noisy.softmax(dim=-1)
            best = F.one_hot(noisy_scores.argmax(dim=-1), logits.shape[-1]) == 1
            keep = best | (noisy_scores > config.threshold)
            if config.hard_after is not None:
                keep = torch.where(self.moe_progress[0] >= config.hard_after, best, keep)
            if config.gumbel_weights:
                values_from, values = noisy, noisy_scores
        elif config.eval_mode == "top1":
            index = scores.argmax(dim=-1, keepdim=True)
            keep = keep[:, :1]
        keep = keep & (index < site.num_choices)  # a gate's "skip" class is nobody
        weights = self.slot_weights(
            values_from, values, index, score="softmax", renormalize=config.renormalize, keep=keep
        )
        gates = torch.zeros_like(scores).scatter(-1, index, weights)
        weights = self.final_weights(weights, index, None)
        index = index.masked_fill(~keep, site.num_choices)
        return RouteRecord(logits, scores, weights, index, config, extras={"gates": gates})

    def _noise(self, logits: torch.Tensor, context: RoutingContext | None) -> torch.Tensor:
        """Gumbel noise (T, C) in float32."""

        def make(generator: torch.Generator | None) -> torch.Tensor:
            return torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float32)

        uniform = make(None) if context is None else context.draw(self.moe_site.order, "dts_noise", make)
        tiny = torch.finfo(torch.float32).tiny
        return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()

    @staticmethod
    def aux_losses(record: RouteRecord, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        losses = MoERouter.aux_losses(record, mask)
        if "balance" in losses:
            losses["balance"] = balance_loss(replace(record, scores=record.extras["gates"]), mask)
        return losses
