"""Softmax with a temperature over an activated linear score: the activation dense-to-sparse gate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import MoERouter, RouterSite, as_distribution, expert_scores, register_router
from .moe_schedules import ramp, schedule_fraction
from .router_top_k import TopKRouter, TopKRouterConfig, check_rule_known


logger = logging.get_logger(__name__)

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": lambda linear: linear,
}

# Largest minus least value of the activations that are bounded.
_RANGES = {"sigmoid": 1.0, "tanh": 2.0}
_SHARP = 0.9


@dataclass
class ActDTSRouterConfig(RouterConfig):
    """Config of `ActDTSRouter` (2401.13875). The paper is a theory of estimation; the defaults are ours.

    > Parameters of the gate

    Args:
        activation (`"sigmoid"`, `"tanh"`, `"gelu"`, `"silu"` or `"identity"`, *optional*, defaults to `"sigmoid"`):
            Applied to the linear score of each expert (sigma in the paper). `"identity"` is the plain dense-to-sparse
            gate, whose temperature cannot be told from the size of its weights.
        gate_bias (`bool`, *optional*, defaults to `True`):
            Whether each expert has a bias, added after the activation (the intercept of the paper). Starts at zero.
        temperature (`float`, *optional*, defaults to 1.0):
            The activated scores are divided by it (tau); where it is learned or scheduled, by it at first.
        temperature_mode (`"learned"`, `"fixed"` or `"schedule"`, *optional*, defaults to `"learned"`):
            Learned with the weights, kept, or moved to `temperature_end` during training.
        temperature_min (`float`, *optional*, defaults to 0.01):
            Below any learned temperature.
        temperature_end (`float`, *optional*, defaults to 0.3):
            Where the schedule ends.
        temperature_shape (`"linear"`, `"exponential"` or `"cosine"`, *optional*, defaults to `"linear"`):
            Form of the schedule.
        steps (`int`, *optional*):
            Optimizer steps of the schedule and of the homotopy, `None` for the whole training.
        homotopy (`bool`, *optional*, defaults to `False`):
            Whether the activation is faded in, from the plain linear score, so that the router begins as the stock
            gate: `(1 - a) z + a s act(z / s)`, where a goes from 0 to 1.
        homotopy_scale (`float`, *optional*, defaults to 1.0):
            s in that formula. It also widens the range of a bounded activation; tanh then stays near the linear score
            for longer, sigmoid keeps its slope of 1/4.

    > Parameters that control the selection

    Args:
        select (`"top_k"`, `"threshold"` or `"dense"`, *optional*, defaults to `"top_k"`):
            The best experts; those above `threshold`, with weights that sum to 1; or all.
        threshold (`float`, *optional*, defaults to 0.1):
            Probability that an expert must exceed with `select="threshold"`. The best expert is always used.
        num_experts_per_tok (`int`, *optional*):
            Experts per token (k), `None` for the family's. With `select="threshold"` the most that a token may use,
            `None` for all.
        score (`"softmax"` or `"sigmoid"`, *optional*):
            Map from logits to scores, `None` for the family's.
    """

    activation: Literal["sigmoid", "tanh", "gelu", "silu", "identity"] = "sigmoid"
    gate_bias: bool = True
    temperature: float = 1.0
    temperature_mode: Literal["learned", "fixed", "schedule"] = "learned"
    temperature_min: float = 0.01
    temperature_end: float = 0.3
    temperature_shape: Literal["linear", "exponential", "cosine"] = "linear"
    steps: int | None = None
    homotopy: bool = False
    homotopy_scale: float = 1.0
    select: Literal["top_k", "threshold", "dense"] = "top_k"
    threshold: float = 0.1
    num_experts_per_tok: int | None = None
    score: Literal["softmax", "sigmoid"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "temperature_min", "temperature_end", "homotopy_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.temperature_mode == "learned" and self.temperature <= self.temperature_min:
            raise ValueError(
                f"`temperature` ({self.temperature}) must be above `temperature_min` ({self.temperature_min}), which "
                "no learned temperature reaches."
            )
        if not 0 <= self.threshold < 1:
            raise ValueError(f"`threshold` must be in [0, 1), got {self.threshold}.")
        for name in ("steps", "num_experts_per_tok"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.steps is not None and not self.is_scheduled:
            raise ValueError(
                f"`steps` ({self.steps}) is the length of a schedule, and nothing is scheduled; it goes with "
                '`temperature_mode="schedule"` or `homotopy=True`.'
            )
        if self.select == "dense" and self.num_experts_per_tok is not None:
            raise ValueError(
                f'`select="dense"` uses all experts, `num_experts_per_tok` asks for {self.num_experts_per_tok}; '
                "drop one."
            )

    @property
    def is_scheduled(self) -> bool:
        """Whether something changes with the progress of training."""
        return self.homotopy or self.temperature_mode == "schedule"

    @property
    def schedule_steps(self) -> int | None:
        return self.steps if self.is_scheduled else None

    def best_probability(self, num_choices: int) -> float:
        """The largest softmax probability that token-dependent scores can give one of `num_choices` experts, at the
        lowest temperature."""
        if self.activation not in _RANGES:
            return 1.0
        modes = {"fixed": self.temperature, "learned": self.temperature_min, "schedule": self.temperature_end}
        width = _RANGES[self.activation] * (self.homotopy_scale if self.homotopy else 1.0)
        return 1 / (1 + (num_choices - 1) * math.exp(-width / modes[self.temperature_mode]))


def activated_scores(
    linear: torch.Tensor, activation: str, mix: torch.Tensor | float = 1.0, scale: float = 1.0
) -> torch.Tensor:
    """`(1 - mix) * linear + mix * scale * act(linear / scale)`, elementwise: the linear score at `mix` 0, the
    activated one at 1."""
    act = _ACTIVATIONS[activation]
    activated = act(linear) if scale == 1.0 else scale * act(linear / scale)
    return activated if isinstance(mix, float) and mix == 1.0 else (1 - mix) * linear + mix * activated


@register_router("act_dts")
class ActDTSRouter(MoERouter):
    """Logits `(act(W x) + b) / temperature`, then the family's rule, a threshold, or all experts.

    "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?" (2401.13875). In a plain gate the
    temperature and the size of W and b are one and the same direction, and estimating them is slower than any
    polynomial rate. An activation that is not positively homogeneous (sigmoid, tanh, GELU, SiLU) takes the redundancy
    away. W is the stock gate's.

    The tests fit models with the right number of experts; the slower rate that the paper proves for experts too many
    is not repeated there, its constants need far larger samples.
    """

    config_class = ActDTSRouterConfig
    replays = True
    paper = "Is Temperature Sample Efficient (2401.13875)"
    moe_config: ActDTSRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> ActDTSRouterConfig:
        """The homotopy before its first step, at temperature 1."""
        if site.rule.score == "custom":
            raise NotImplementedError(
                "this family's gate has a rule of its own, which score and top-k cannot express."
            )
        return ActDTSRouterConfig(homotopy=True, temperature=1.0, temperature_mode="fixed")

    @classmethod
    def num_slots(cls, config: ActDTSRouterConfig, site: RouterSite) -> int:
        return config.num_experts_per_tok or (site.top_k if config.select == "top_k" else site.num_choices)

    @classmethod
    def check(cls, config: ActDTSRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        if config.select == "top_k":
            k = config.num_experts_per_tok or site.top_k
            TopKRouter.check(TopKRouterConfig(num_experts_per_tok=k, score=config.score), site)
        else:
            check_rule_known(config.score, site, True)
        if (config.num_experts_per_tok or 1) > site.num_choices:
            raise ValueError(
                f"`num_experts_per_tok` ({config.num_experts_per_tok}) exceeds the {site.num_choices} experts of "
                f'layer "{site.key}".'
            )
        best = config.best_probability(site.num_choices)
        if (config.score or site.rule.score) == "softmax" and best < _SHARP:
            width = _RANGES[config.activation] * (config.homotopy_scale if config.homotopy else 1.0)
            needed = width / math.log(_SHARP / (1 - _SHARP) * (site.num_choices - 1))
            logger.warning_once(
                f'activation="{config.activation}" is bounded: with {site.num_choices} experts no probability exceeds '
                f"{best:.2f} at this temperature. For {_SHARP} the temperature must be able to fall to {needed:.3f}; "
                'or choose activation="gelu" or "silu".'
            )

    def setup(self) -> None:
        config = self.moe_config
        place = {"device": self.own_device, "dtype": next(self.parameters()).dtype}
        if config.gate_bias:
            self.moe_gate_bias = nn.Parameter(torch.empty(self.moe_site.num_choices, **place))
        if config.temperature_mode == "learned":
            # Weight decay would pull it to a scale of its own liking. Trainers exempt names with `bias`.
            self.moe_temperature_bias = nn.Parameter(torch.empty(1, **place))
        if config.is_scheduled:
            self.use_progress()

    def reset_parameters(self) -> None:
        if "moe_gate_bias" in self._parameters:
            init.zeros_(self.moe_gate_bias)
        if "moe_temperature_bias" in self._parameters:
            above = self.moe_config.temperature - self.moe_config.temperature_min
            init.constant_(self.moe_temperature_bias, above + math.log(-math.expm1(-above)))  # inverse of softplus

    def hold_zero_experts(self, logits: torch.Tensor) -> torch.Tensor:
        """The activation would undo it for the linear scores; `route` does it with the final logits."""
        return logits

    def temperature(self) -> torch.Tensor | float:
        """The temperature at this point of training."""
        config = self.moe_config
        if config.temperature_mode == "learned":
            return F.softplus(self.moe_temperature_bias.float()) + config.temperature_min
        if config.temperature_mode == "schedule":
            fraction = schedule_fraction(self.moe_progress, config.steps)
            return ramp(fraction, config.temperature, config.temperature_end, config.temperature_shape)
        return config.temperature

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, site, rule = self.moe_config, self.moe_site, self.moe_site.rule
        score = config.score or rule.score
        # In float32: bounded activations near their bounds differ by less than bfloat16 can tell.
        linear = self.router_logits(hidden, *args, **kwargs).float()
        mix = schedule_fraction(self.moe_progress, config.steps) if config.homotopy else 1.0
        activated = activated_scores(linear, config.activation, mix, config.homotopy_scale if config.homotopy else 1.0)
        if config.gate_bias:
            activated = activated + self.moe_gate_bias.float()
        logits = super().hold_zero_experts(activated / self.temperature())
        raw = expert_scores(logits, score)
        scores = as_distribution(raw, score)

        dense = config.select == "dense"
        choice = self.selection_scores(raw, self.selection_bias(*args), None if dense else rule.groups)
        index = choice.topk(self.num_slots(config, site), dim=-1).indices
        keep, renormalize = None, rule.renormalize or rule.order == "topk_score"
        if config.select == "threshold":
            keep = scores.gather(-1, index) > config.threshold
            keep = keep | (torch.arange(index.shape[-1], device=index.device) == 0)
            keep = keep & choice.gather(-1, index).isfinite()
            renormalize = True
        weights = self.slot_weights(logits, raw, index, score=score, renormalize=renormalize, keep=keep)
        weights = self.final_weights(weights, index, None)
        if keep is not None:
            index = index.masked_fill(~keep, site.num_choices)
        return RouteRecord(logits, scores, weights, index, config)
