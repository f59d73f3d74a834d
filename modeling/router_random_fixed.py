"""SMoE-Dropout: a random router that is never trained, and a number of experts that grows over training."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import MoERouter, RouterSite, expert_scores, register_router


@dataclass
class RandomFixedRouterConfig(RouterConfig):
    """Config of `RandomFixedRouter`. Defaults are those of the paper (2303.01610): from half of the experts to all of
    them, linearly, over the whole training.

    > Parameters that control the selection

    Args:
        start_experts_per_tok (`int`, *optional*):
            Experts per token when training starts (k_min in the paper). `None` means half of them.
        end_experts_per_tok (`int`, *optional*):
            Experts per token when the schedule is over (k_max). `None` means all. May be below the start.
        steps (`int`, *optional*):
            Optimizer steps of the schedule. `None` means the whole training.
        k_shape (`"linear"`, `"cosine"`, `"exponential"` or `"stages"`, *optional*, defaults to `"linear"`):
            How the number changes; `"stages"` doubles (or halves) it in stages of equal length.
        experts_per_tok (`int`, *optional*):
            Experts per token in evaluation, any number. `None` means the number that the schedule has reached.
        output_scale (`"none"` or `"k"`, *optional*, defaults to `"none"`):
            Factor on the weights, which sum to one: none, as in the paper, or the number of experts in use, which
            makes slices of a dense block add up to that block.
        bias (`bool`, *optional*, defaults to `False`):
            Whether the random router has a random bias, as in the authors' code. It favours some experts for every
            token, so the default leaves it out.
        seed (`int`, *optional*, defaults to 0):
            Of the random router; every layer draws its own. The router is saved with the model.
    """

    start_experts_per_tok: int | None = None
    end_experts_per_tok: int | None = None
    steps: int | None = None
    k_shape: Literal["linear", "cosine", "exponential", "stages"] = "linear"
    experts_per_tok: int | None = None
    output_scale: Literal["none", "k"] = "none"
    bias: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start_experts_per_tok", "end_experts_per_tok", "steps", "experts_per_tok"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("balance_coef", "z_coef", "entropy_coef"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` must be 0 for a router that is never trained, got {getattr(self, name)}: the gradient "
                    "of this loss would pass the frozen router and change the hidden states instead."
                )

    @property
    def schedule_steps(self) -> int | None:
        return self.steps

    def bounds(self, num_choices: int) -> tuple[int, int]:
        """Experts per token at the start and at the end of the schedule."""
        return self.start_experts_per_tok or max(num_choices // 2, 1), self.end_experts_per_tok or num_choices

    def experts_at(self, step: int, total_steps: int, num_choices: int) -> int:
        """Experts per token after `step` optimizer steps. Halves are rounded to the even number."""
        start, end = self.bounds(num_choices)
        length = self.steps or total_steps
        if step <= 0 or length <= 0:
            return start
        if step >= length:  # also where the exponential shape has not quite arrived
            return end
        if self.k_shape == "linear":
            return start + round((end - start) * step / length)
        if self.k_shape == "cosine":
            return end + round((start - end) * math.cos(math.pi * step / (2 * length)))
        if self.k_shape == "exponential":
            # The authors divide by `length // 300`, which fails for schedules of fewer than 300 steps.
            return end + round((start - end) * 0.99 ** (300 * step // length))
        stages = [min(start, end)]
        while stages[-1] < max(start, end):
            stages.append(min(2 * stages[-1], max(start, end)))
        return (stages if start <= end else stages[::-1])[step * len(stages) // length]


@register_router("random_fixed")
class RandomFixedRouter(MoERouter):
    """A random linear router that is never trained; the k best of its logits, weighted by their softmax.

    "Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers" (2303.01610), section 3. The same
    hidden state always goes to the same experts. k grows over training, and is free in evaluation.
    """

    config_class = RandomFixedRouterConfig
    paper = "SMoE-Dropout (2303.01610)"
    needs = "training with a schedule"
    learned = False
    own_logits = True
    moe_config: RandomFixedRouterConfig
    moe_random_weight: torch.Tensor
    moe_random_bias: torch.Tensor
    moe_active: torch.Tensor

    @classmethod
    def identity_config(cls, site: RouterSite) -> RouterConfig:
        raise NotImplementedError("its router is random, so it never is the stock gate.")

    @classmethod
    def check(cls, config: RandomFixedRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        for name in ("start_experts_per_tok", "end_experts_per_tok", "experts_per_tok"):
            value = getattr(config, name)
            if value is not None and value > site.num_choices:
                raise ValueError(f'`{name}` ({value}) exceeds the {site.num_choices} experts of layer "{site.key}".')

    @classmethod
    def num_slots(cls, config: RandomFixedRouterConfig, site: RouterSite) -> int:
        """In evaluation, when the schedule is over."""
        return config.experts_per_tok or config.bounds(site.num_choices)[1]

    def setup(self) -> None:
        self.freeze_stock()
        site, device = self.moe_site, self.own_device
        # Buffers: in no optimizer, target of no adapter, and saved.
        shape = (site.num_choices, site.hidden_size)
        self.register_buffer("moe_random_weight", torch.empty(shape, dtype=torch.float32, device=device))
        if self.moe_config.bias:
            self.register_buffer("moe_random_bias", torch.empty(shape[:1], dtype=torch.float32, device=device))
        self.register_buffer("moe_active", torch.zeros((), dtype=torch.int64, device=device))

    def reset_parameters(self) -> None:
        # Drawn on the CPU, so that a seed means the same router on every device.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.moe_config.seed}/{self.moe_site.key}".encode()))
        bound = self.moe_site.hidden_size**-0.5
        for name in ("moe_random_weight", "moe_random_bias"):
            if name in self._buffers:
                buffer = self._buffers[name]
                init.copy_(buffer, (2 * torch.rand(buffer.shape, generator=generator) - 1) * bound)
        init.constant_(self.moe_active, self.moe_config.experts_at(0, 0, self.moe_site.num_choices))

    def schedule(self, step: int, total_steps: int) -> None:
        super().schedule(step, total_steps)
        self.moe_active.fill_(self.moe_config.experts_at(step, total_steps, self.moe_site.num_choices))

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, site = self.moe_config, self.moe_site
        bias = self.moe_random_bias.float() if config.bias else None
        # In float32, also under automatic casting: a router that is never trained cannot undo ties of rounding.
        with maybe_autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.float(), self.moe_random_weight.float(), bias)
        logits = self.hold_zero_experts(logits)
        active: Any = self.moe_active
        slots = max(config.bounds(site.num_choices))
        if not self.training and config.experts_per_tok is not None:
            active = slots = config.experts_per_tok
        index = logits.topk(slots, dim=-1).indices
        keep = (torch.arange(slots, device=logits.device) < active).expand_as(index)
        weights = self.slot_weights(logits, logits, index, score="softmax", renormalize=True, keep=keep)
        if config.output_scale == "k":
            weights = weights * active
        weights = self.final_weights(weights, index, None)
        return RouteRecord(
            logits, expert_scores(logits, "softmax"), weights, index.masked_fill(~keep, site.num_choices), config
        )
