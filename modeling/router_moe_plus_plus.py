"""MoE++: zero-computation experts beside the real ones, and gating residuals from layer to layer.

Paper: "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts" (2410.07348).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .configuration_moe_ext import RouterConfig
from .configuration_parts import ZeroExpertsConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_install import own_names, remember_added
from .moe_losses import mixed_balancing_loss
from .moe_router import MoERouter, RouterSite, as_distribution, expert_scores, register_router
from .moe_zero_experts import refuse_other_start
from .router_top_k import check_rule_known


CARRY = "moe_plus_plus_logits"


@dataclass
class MoEPlusPlusRouterConfig(RouterConfig):
    """Config of `MoEPlusPlusRouter`. Defaults are those of the paper (2410.07348) and its code, but for the capacity
    and the factor on the input.

    Zero-computation experts come with the router, in the numbers of the paper: one zero expert, one copy, and a
    quarter of the number of experts less two, at least two, constants. Declare `zero_experts` for others.

    > Parameters of the gate

    Args:
        router_hidden_mult (`int`, *optional*, defaults to 8):
            Width of the gate's hidden layer, as a multiple of the number of choices. 0 is a linear gate.
        gating_residual (`bool`, *optional*, defaults to `True`):
            Whether the logits of the previous MoE layer, mapped by a matrix, are added to those of a layer.
        additive (`bool`, *optional*, defaults to `False`):
            Whether all this is added to the logits of the stock gate and starts at zero, and the family's rule is
            followed. `False` replaces the stock gate, as in the paper; for training from scratch.
        logit_norm_std (`float`, *optional*):
            Standard deviation over the choices to which the logits of a token are scaled; `None` leaves them.

    > Parameters that control the selection

    Args:
        num_experts_per_tok (`int`, *optional*):
            Choices per token (K), `None` for the family's number.
        zero_weight_rule (`"renormalize"` or `"keep"`, *optional*, defaults to `"renormalize"`):
            Whether weights are divided by their sum without the zero experts that were picked, so that the others
            share all weight, or with them. The code has both.
        scale_input_by_top_k (`bool`, *optional*, defaults to `False`):
            Whether the input of the experts is multiplied by K, as by default in the code; the paper has no factor.
        capacity_factor (`float`, *optional*):
            In training, how many times its even share of the tokens an expert takes at the most (gamma; 1.1 in the
            paper). Further picks are dropped. `None` drops none.
        zero_init (`"random"` or `"identity"`, *optional*, defaults to `"random"`):
            Whether zero-computation experts take part from the start, or are held back so that a layer with
            `additive=True` starts as it was.
        zero_warmup_steps (`int`, *optional*):
            Optimizer steps until nothing is held back any more, with `zero_init="identity"`. `None` means the whole
            training.

    > Parameters that control the auxiliary losses

    Args:
        balance_coef (`float`, *optional*, defaults to 0.01):
            Weight of the balance loss (beta), which has no factor of the number of experts here, as in the paper.
        zero_balance_weight (`float`, *optional*, defaults to 0.75):
            Factor on the terms of zero-computation experts in that loss (tau). A smaller one sends more tokens there,
            and leaves real experts a smaller capacity. Takes the place of `balance_weight` of `zero_experts`.
    """

    router_hidden_mult: int = 8
    gating_residual: bool = True
    additive: bool = False
    logit_norm_std: float | None = None
    num_experts_per_tok: int | None = None
    zero_weight_rule: Literal["renormalize", "keep"] = "renormalize"
    scale_input_by_top_k: bool = False
    capacity_factor: float | None = None
    zero_init: Literal["random", "identity"] = "random"
    zero_warmup_steps: int | None = None
    balance_coef: float = 0.01
    zero_balance_weight: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_hidden_mult < 0:
            raise ValueError(f"`router_hidden_mult` must be non-negative, got {self.router_hidden_mult}.")
        for name in ("logit_norm_std", "capacity_factor", "zero_balance_weight"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        for name in ("num_experts_per_tok", "zero_warmup_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.zero_warmup_steps is not None and self.zero_init != "identity":
            raise ValueError(
                f'`zero_warmup_steps` ({self.zero_warmup_steps}) goes with `zero_init="identity"`; with '
                f'`zero_init="{self.zero_init}"` nothing is held back.'
            )


@register_router("moe_plus_plus")
class MoEPlusPlusRouter(MoERouter):
    """Top-k over real and zero-computation experts, of logits that remember those of the layer before.

    `G_j = W_j x + V_j G_{j-1}`, all before softmax and with the residual of their own; `W_j` is linear or has one
    hidden layer with tanh. The paper's sections 3.1 to 3.3.
    """

    config_class = MoEPlusPlusRouterConfig
    replays = True
    paper = "MoE++ (2410.07348)"
    needs = "zero-computation experts; the same number of choices in every layer"
    crosses_layers = True
    own_logits = True
    moe_config: MoEPlusPlusRouterConfig

    @classmethod
    def default_zero_experts(  # type: ignore[override]
        cls, config: MoEPlusPlusRouterConfig, num_experts: int
    ) -> ZeroExpertsConfig:
        constants = max(2, num_experts // 4 - 2)  # table 1 of the paper: 2, 2, 6 for 8, 16, 32 experts
        steps = config.zero_warmup_steps
        return ZeroExpertsConfig(zero=1, copy=1, constant=constants, init=config.zero_init, warmup_steps=steps)

    @classmethod
    def extra_slots(cls, config: MoEPlusPlusRouterConfig, site: RouterSite) -> int:
        return max(cls.num_slots(config, site) - site.top_k, 0)

    @classmethod
    def input_factor(cls, config: MoEPlusPlusRouterConfig, site: RouterSite) -> float:
        return float(cls.num_slots(config, site)) if config.scale_input_by_top_k else 1.0

    @classmethod
    def identity_config(cls, site: RouterSite) -> MoEPlusPlusRouterConfig:
        """Nothing is added to the stock logits at first, and zero-computation experts are held back."""
        if site.rule.score == "custom":
            raise NotImplementedError("this family's gate has a rule of its own, to which no choices can be added.")
        return MoEPlusPlusRouterConfig(additive=True, zero_init="identity", balance_coef=0.0)

    @classmethod
    def check(cls, config: MoEPlusPlusRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        slots = cls.num_slots(config, site)
        if slots > site.num_choices:
            raise ValueError(
                f'`num_experts_per_tok` ({slots}) exceeds the {site.num_choices} choices of layer "{site.key}".'
            )
        refuse_other_start(config, site, init="zero_init", warmup_steps="zero_warmup_steps")
        if config.additive:
            check_rule_known(None, site, True)

    @classmethod
    def check_stack(cls, members: list[tuple[RouterConfig, RouterSite]]) -> None:
        super().check_stack(members)
        first = members[0][1]
        for config, site in members:
            if site.num_choices != first.num_choices and getattr(config, "gating_residual", False):
                raise ValueError(
                    f'layer "{first.key}" has {first.num_choices} choices, layer "{site.key}" has {site.num_choices}: '
                    "the gating residual maps the logits of one layer to those of the next, so `moe_plus_plus` needs "
                    "the same number everywhere. Set `gating_residual=False`, or declare `zero_experts` by layer."
                )

    @classmethod
    def setup_stack(cls, base: nn.Module, routers: list[Any]) -> None:
        """The matrix on the previous logits, in every layer that has a previous one."""
        for router in routers[1:]:
            if router.moe_config.gating_residual:
                before, count = own_names(router), router.moe_site.num_choices
                router.moe_residual = router.new_matrix(count, count)
                remember_added(router, before)

    def new_matrix(self, *shape: int) -> nn.Parameter:
        """An empty parameter where the stock gate's are."""
        return nn.Parameter(torch.empty(shape, device=self.own_device, dtype=next(self.parameters()).dtype))

    def setup(self) -> None:
        count, width = self.moe_site.num_choices, self.moe_config.router_hidden_mult * self.moe_site.num_choices
        if width:
            self.moe_hidden = self.new_matrix(width, self.moe_site.hidden_size)
        self.moe_out = self.new_matrix(count, width or self.moe_site.hidden_size)
        if not self.moe_config.additive:
            self.freeze_stock()

    def reset_parameters(self) -> None:
        if "moe_hidden" in self._parameters:
            init.normal_(self.moe_hidden, mean=0.0, std=self.moe_site.hidden_size**-0.5)
        for name in ("moe_out", "moe_residual"):
            if name not in self._parameters:
                continue
            matrix = getattr(self, name)
            if self.moe_config.additive:
                init.zeros_(matrix)
            else:
                init.normal_(matrix, mean=0.0, std=matrix.shape[1] ** -0.5)

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, site, rule = self.moe_config, self.moe_site, self.moe_site.rule
        logits = self._own_logits(hidden)
        if config.additive:
            stock = self.stock_logits(hidden, *args, **kwargs).float()
            logits = logits + F.pad(stock, (0, site.num_choices - site.num_experts))
        logits = self._with_residual(logits, context)
        if config.logit_norm_std is not None:
            spread = logits.std(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            logits = logits * (config.logit_norm_std / spread)
        logits = self.hold_zero_experts(logits)

        score = rule.score if config.additive else "softmax"
        scores = expert_scores(logits, score)
        bias = self.selection_bias(*args) if config.additive else None
        choice = self.selection_scores(scores, bias, rule.groups if config.additive else None)
        index = choice.topk(self.num_slots(config, site), dim=-1).indices
        renormalize = not config.additive or rule.renormalize or (score == "softmax" and rule.order == "topk_score")
        if renormalize and config.zero_weight_rule == "keep":
            values = logits.softmax(dim=-1) if score == "softmax" else scores
            weights = as_distribution(values.gather(-1, index), "sum")
        else:
            weights = self.slot_weights(logits, scores, index, score=score, renormalize=renormalize)
        weights = self.final_weights(weights, index, None)
        record = RouteRecord(logits, as_distribution(scores, score), weights, index, config)
        if self.training and config.capacity_factor is not None:
            # The balance loss counts what was wanted. As wide as there are choices: rows whose policies differ in the
            # number of slots are put together.
            record.extras["picks"] = F.pad(index, (0, site.num_choices - index.shape[-1]), value=site.num_choices)
            self._drop_over_capacity(record, context)
        return record

    def _own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, C) in float32, also under autocast."""
        with maybe_autocast(device_type=hidden.device.type, enabled=False):
            hidden = hidden.float()
            if self.moe_config.router_hidden_mult:
                hidden = F.linear(hidden, self.moe_hidden.float()).tanh()
            return F.linear(hidden, self.moe_out.float())

    def _with_residual(self, logits: torch.Tensor, context: RoutingContext | None) -> torch.Tensor:
        if context is None:
            return logits
        order = self.moe_site.order
        previous = context.carry.get((order - 1, CARRY))
        if "moe_residual" in self._parameters and previous is not None:
            with maybe_autocast(device_type=logits.device.type, enabled=False):
                logits = logits + F.linear(previous.to(logits.device), self.moe_residual.float())
        # The first one stays: what recomputation under checkpointing makes has a graph of its own.
        context.carry.setdefault((order, CARRY), logits)
        return logits

    def _drop_over_capacity(self, record: RouteRecord, context: RoutingContext | None) -> None:
        """Empty the slots of tokens that come after an expert is full, in the order of the batch. Each rank (first
        choice, second choice, ...) is counted by itself, and weights stay as they are."""
        site = self.moe_site
        columns, index = site.num_choices, record.index
        mask = None if context is None else context.token_mask(len(index))
        counted = index if mask is None else index.masked_fill(~mask.to(index.device)[:, None], columns)
        tokens = len(index) if mask is None else mask.sum().to(index.device)
        limits = expert_capacities(tokens, site, self.moe_config, index.device)
        place = F.one_hot(counted, columns + 1).cumsum(dim=0).gather(-1, counted.unsqueeze(-1)).squeeze(-1)
        # A limit of 2.3 takes three tokens, so that no expert is shut however few tokens there are.
        dropped = (place - 1 >= F.pad(limits, (0, 1))[counted]) & (counted < columns)
        record.index = index.masked_fill(dropped, columns)
        record.weights = record.weights.masked_fill(dropped, 0)

    @staticmethod
    def aux_losses(record: RouteRecord, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        losses = MoERouter.aux_losses(record, mask)
        site, config = record.site, record.config
        if "balance" in losses and site is not None:
            picks = record.extras.get("picks", record.chosen)
            grouped = site.zero_experts is not None and site.zero_experts.balance == "grouped"
            loss = mixed_balancing_loss(
                record.scores,
                picks,
                site.num_experts,
                site.num_null,
                grouped=grouped,
                zero_weight=config.zero_balance_weight,  # type: ignore[attr-defined]
                mask=mask,
            )
            losses["balance"] = loss / site.num_choices  # the paper's loss has no factor C
        return losses


def expert_capacities(
    tokens: int | torch.Tensor, site: RouterSite, config: MoEPlusPlusRouterConfig, device: torch.device
) -> torch.Tensor:
    """(C,) float32: the most tokens that each choice takes, `gamma tau T / (tau E + Z)` for real experts and
    `gamma T / (tau E + Z)` for Z zero-computation experts; MoE++, eq. 8. They sum to `gamma T`."""
    real, zero, tau = site.num_experts, site.num_choices - site.num_experts, config.zero_balance_weight
    share = torch.tensor([tau] * real + [1.0] * zero, device=device) / (tau * real + zero)
    return (config.capacity_factor or 1.0) * tokens * share
