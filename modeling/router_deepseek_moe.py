"""Top-k routing with the losses of DeepSeekMoE, and the bias of loss-free balancing with an end.

The other two ideas of the paper are not the router's: fine-grained experts are made by granular upcycling (the tests
split stock experts, too), shared experts by the part `shared_experts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .moe_context import RouteRecord, RoutingContext
from .moe_losses import expert_counts
from .moe_router import RouterSite, balance_loss, register_router
from .router_top_k import TopKRouter, TopKRouterConfig


@dataclass
class DeepSeekMoERouterConfig(TopKRouterConfig):
    """Config of `DeepSeekMoERouter`. Fields not listed here are those of `TopKRouterConfig`.

    > Parameters that control the selection

    Args:
        bias_update_until (`int`, *optional*):
            Optimizer step after which the selection bias stays as it is; `None` moves it throughout the training.

    > Parameters that control the auxiliary losses

    Args:
        expert_balance_coef (`float`, *optional*, defaults to 0.01):
            Weight of the expert-level balance loss (alpha_1 in the paper), which is 1 at perfect balance. It is
            `balance_coef`'s divided by the number of slots.
        device_balance_coef (`float`, *optional*, defaults to 0.0):
            Weight of the balance loss over groups of experts (alpha_2), which is 1 at perfect balance, too.
        num_devices (`int`, *optional*):
            Number of those groups (D): equal runs of experts that follow each other.
        sequence_balance_coef (`float`, *optional*, defaults to 0.0):
            Weight of the expert-level loss of single sequences, averaged (alpha in DeepSeek-V3, there 1e-4).
    """

    bias_update_until: int | None = None
    expert_balance_coef: float = 0.01
    device_balance_coef: float = 0.0
    num_devices: int | None = None
    sequence_balance_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("expert_balance_coef", "device_balance_coef", "sequence_balance_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")
        if self.num_devices is not None and self.num_devices < 1:
            raise ValueError(f"`num_devices` must be at least 1, got {self.num_devices}.")
        if self.device_balance_coef and self.num_devices is None:
            raise ValueError("`device_balance_coef` needs `num_devices`, the number of groups of experts.")
        if self.bias_update_until is not None:
            if self.bias_update_until < 1:
                raise ValueError(f"`bias_update_until` must be at least 1, got {self.bias_update_until}.")
            if not self.bias_update_rate:
                raise ValueError("`bias_update_until` ends the update of the bias; set a `bias_update_rate`.")

    @property
    def schedule_steps(self) -> int | None:
        return self.bias_update_until


@register_router("deepseek_moe")
class DeepSeekMoERouter(TopKRouter):
    """The rule of the family, or of `top_k`, with the balance losses of DeepSeekMoE (2401.06066) and DeepSeek-V3
    (2412.19437), and loss-free balancing (2408.15664) that may end before the training does."""

    config_class = DeepSeekMoERouterConfig
    paper = "DeepSeekMoE (2401.06066)"
    moe_config: DeepSeekMoERouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> DeepSeekMoERouterConfig:
        return DeepSeekMoERouterConfig(expert_balance_coef=0.0)

    @classmethod
    def check(cls, config: DeepSeekMoERouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        super().check(config, site)
        if config.num_devices is not None and site.num_experts % config.num_devices:
            raise ValueError(
                f"`num_devices` ({config.num_devices}) must divide the {site.num_experts} experts of layer "
                f'"{site.key}".'
            )

    def setup(self) -> None:
        super().setup()
        if self.moe_config.bias_update_until is not None:
            self.use_progress()

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        record = super().route(hidden, context, *args, **kwargs)
        if self.moe_config.sequence_balance_coef:
            tokens = len(record.scores)
            batch = 1 if context is None else context.batch_size
            if batch and tokens % batch == 0:
                # Marks, not numbers of rows: they stay right where rows of several policies are put together.
                place = torch.arange(tokens, device=record.scores.device)
                start = place % (tokens // batch) == 0
                positions = None if context is None or context.attention_mask is not None else context.position_ids
                if isinstance(positions, torch.Tensor) and positions.numel() == tokens:  # packed: they begin anew
                    start = start | (positions.flatten().to(start.device) == 0)
                record.extras["sequence_start"] = start
        return record

    @staticmethod
    def aux_losses(record: RouteRecord, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        config: Any = record.config
        losses = TopKRouter.aux_losses(record, mask)
        scores, chosen = record.scores, record.chosen
        if config.expert_balance_coef:
            losses["expert_balance"] = balance_loss(record, mask) / chosen.shape[-1]
        if config.device_balance_coef:
            losses["device_balance"] = device_balance_loss(
                scores, chosen, config.num_devices, record.num_experts, mask
            )
        if config.sequence_balance_coef:
            if "sequence_start" not in record.extras:
                raise ValueError(
                    f"`sequence_balance_coef`: it is not known to which sequences the tokens of layer "
                    f'"{record.key}" belong. Set it to 0 for this model.'
                )
            losses["sequence_balance"] = sequence_balance_loss(scores, chosen, record.extras["sequence_start"], mask)
        return losses

    def after_optimizer_step(self, counts: torch.Tensor) -> None:
        until = self.moe_config.bias_update_until
        # The progress is that before this step.
        if until is None or int(self.moe_progress[0]) < until:
            super().after_optimizer_step(counts)


def device_balance_loss(
    scores: torch.Tensor, index: torch.Tensor, num_devices: int, num_experts: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`sum_d f'_d P'_d`: f' the mean, over the experts of a group, of their share of the choices times the number of
    columns; P' the sum of their mean scores. DeepSeekMoE (2401.06066), equations 15 to 17.

    Args:
        scores: (T, C) routing distribution.
        index: (T, K) chosen columns.
        num_devices: D.
        num_experts: E. Zero-computation experts, the columns behind, stand on no device.
        mask: (T,) tokens that count.
    """
    weight = torch.ones(len(scores), device=scores.device) if mask is None else mask.to(scores.device).float()
    total = weight.sum().clamp(min=1)
    share = expert_counts(index, num_experts, mask).float() * scores.shape[-1] / (total * index.shape[-1])
    probability = (scores * weight[:, None]).sum(dim=0)[:num_experts] / total
    return (share.view(num_devices, -1).mean(dim=-1) * probability.view(num_devices, -1).sum(dim=-1)).sum()


def sequence_balance_loss(
    scores: torch.Tensor, index: torch.Tensor, start: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The expert-level balance loss of each sequence, 1 at perfect balance; mean over sequences with a token that
    counts. DeepSeek-V3 (2412.19437), equations 17 to 20.

    Args:
        scores: (T, C) routing distribution.
        index: (T, K) chosen columns.
        start: (T,) bool, true for the first token of each sequence.
        mask: (T,) tokens that count.
    """
    tokens, columns = scores.shape
    weight = torch.ones(tokens, device=scores.device) if mask is None else mask.to(scores.device).float()
    row = start.long().cumsum(dim=0) - 1  # there are at most T sequences: the shape does not depend on the data
    chosen = torch.zeros(tokens, columns + 1, device=scores.device)
    chosen = chosen.scatter_add(1, index.clamp(max=columns), weight[:, None].expand(index.shape))[:, :columns]
    length = torch.zeros(tokens, device=scores.device).index_add(0, row, weight)
    counts = torch.zeros_like(scores).index_add(0, row, chosen)
    probability = torch.zeros_like(scores).index_add(0, row, scores * weight[:, None])
    losses = columns / index.shape[-1] * (counts * probability).sum(dim=-1) / length.clamp(min=1).square()
    return losses.sum() / (length > 0).sum().clamp(min=1)
