"""AdaMoE: null experts, so that every token uses as many real experts as it needs.

Paper: "AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models" (2406.13233).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from .configuration_parts import ZeroExpertsConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import RouterSite, register_router
from .moe_schedules import ramp, schedule_fraction
from .moe_zero_experts import refuse_other_start
from .router_top_k import TopKRouter, TopKRouterConfig


@dataclass
class AdaMoERouterConfig(TopKRouterConfig):
    """Config of `AdaMoERouter`: that of `TopKRouter`, with null experts. Defaults are those of the paper (2406.13233),
    section 4.1.

    > Parameters that control the selection

    Args:
        num_experts_per_tok (`int`, *optional*):
            Choices per token (k in the paper), null experts included. `None` means one more than the stock gate takes.
        null_experts (`int`, *optional*):
            Number of null experts (m). `None` means as many as there are real ones; 0 is plain top-k.
        null_init (`"copy"`, `"identity"` or `"random"`, *optional*, defaults to `"copy"`):
            Rows of the gate for them: copies of the real experts' rows, as in the paper; held back, so that the layer
            starts as it was; or normal.
        null_warmup_steps (`int`, *optional*):
            Optimizer steps until nothing is held back any more, with `null_init="identity"`. `None` means the whole
            training.

    > Parameters that control the auxiliary losses

    Args:
        balance_coef (`float`, *optional*, defaults to 0.02):
            Weight of the balance loss at first (alpha). Null experts are balanced as a group.
        balance_coef_end (`float`, *optional*, defaults to 1e-4):
            Its weight at the end.
        balance_schedule (`"step"` or `"linear"`, *optional*, defaults to `"step"`):
            How it gets there.
        balance_steps (`int`, *optional*):
            Optimizer steps until the weight is that of the end. `None` means half of the training for `"step"` (the
            first of the paper's two epochs), and all of it for `"linear"`.
    """

    null_experts: int | None = None
    null_init: Literal["copy", "identity", "random"] = "copy"
    null_warmup_steps: int | None = None
    balance_coef: float = 0.02
    balance_coef_end: float = 1e-4
    balance_schedule: Literal["step", "linear"] = "step"
    balance_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.null_experts is not None and self.null_experts < 0:
            raise ValueError(f"`null_experts` must be non-negative, got {self.null_experts}.")
        if self.balance_coef_end < 0:
            raise ValueError(f"`balance_coef_end` must be non-negative, got {self.balance_coef_end}.")
        for name in ("null_warmup_steps", "balance_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.null_warmup_steps is not None and self.null_init != "identity":
            raise ValueError(
                f'`null_warmup_steps` ({self.null_warmup_steps}) goes with `null_init="identity"`; with '
                f'`null_init="{self.null_init}"` nothing is held back.'
            )

    @property
    def is_stock(self) -> bool:
        """Never: k is not the stock one, or is given."""
        return False

    @property
    def loss_coefs(self) -> dict[str, float]:
        balance = max(self.balance_coef, self.balance_coef_end)
        return {"balance": balance, "z": self.z_coef, "entropy": self.entropy_coef}

    @property
    def schedule_steps(self) -> int | None:
        return self.balance_steps


@register_router("adamoe")
class AdaMoERouter(TopKRouter):
    """Top-k over real and null experts. A slot that picks a null expert is unused, so a token uses 0 to k experts.

    The weights of a token's real experts follow the family's rule. Where that renormalises, as in the paper, they are
    a softmax over the real experts that were picked (option 2 of the paper); a token without one gets zeros.
    """

    config_class = AdaMoERouterConfig
    paper = "AdaMoE (2406.13233)"
    moe_config: AdaMoERouterConfig

    @classmethod
    def default_zero_experts(  # type: ignore[override]
        cls, config: AdaMoERouterConfig, num_experts: int
    ) -> ZeroExpertsConfig | None:
        count = num_experts if config.null_experts is None else config.null_experts
        if count == 0:
            return None
        steps = config.null_warmup_steps
        return ZeroExpertsConfig(zero=count, init=config.null_init, warmup_steps=steps, balance="grouped")

    @classmethod
    def num_slots(cls, config: AdaMoERouterConfig, site: RouterSite) -> int:
        return config.num_experts_per_tok or site.top_k + (site.zero_experts is not None)

    @classmethod
    def identity_config(cls, site: RouterSite) -> AdaMoERouterConfig:
        """One null expert, which every token has in its extra slot at first."""
        if site.rule.score == "custom":
            raise NotImplementedError("this family's gate has a rule of its own, which knows nothing of null experts.")
        return AdaMoERouterConfig(null_experts=1, null_init="identity", balance_coef=0.0, balance_coef_end=0.0)

    @classmethod
    def check(cls, config: AdaMoERouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        if config.null_experts is not None and config.null_experts != site.num_null:
            raise ValueError(
                f"`null_experts` ({config.null_experts}) and `zero_experts` ({site.num_null} that return nothing) of "
                f'layer "{site.key}" contradict each other; leave `null_experts` out.'
            )
        refuse_other_start(config, site, init="null_init", warmup_steps="null_warmup_steps")
        super().check(config, site)

    def setup(self) -> None:
        super().setup()
        self.use_progress()

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        record = super().route(hidden, context, *args, **kwargs)
        record.coefs = {**self.moe_config.loss_coefs, "balance": self._balance_coef()}
        return record

    def _balance_coef(self) -> torch.Tensor:
        config: AdaMoERouterConfig = self.moe_config
        over = schedule_fraction(self.moe_progress, config.balance_steps)
        if config.balance_schedule == "linear":
            return ramp(over, config.balance_coef, config.balance_coef_end)
        last = 0.5 if config.balance_steps is None else 1.0
        first, second = (over.new_tensor(value) for value in (config.balance_coef, config.balance_coef_end))
        return torch.where(over < last, first, second)
