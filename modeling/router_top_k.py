"""Top-k routing, with the choices that published models make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import initialization as init

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import (
    GateRule,
    MoERouter,
    RouterSite,
    as_distribution,
    expert_scores,
    register_router,
)


# Kinds of stock logits that are products with the rows of one matrix, `weight`, one for each expert.
GATES_OF_ROWS = ("linear", "linear_fp32", "rows")
REMOVED_ROWS = "moe_removed_weight"


@dataclass
class TopKRouterConfig(RouterConfig):
    """Config of `TopKRouter`. A field left `None` means: as the stock family does.

    > Parameters that control the selection

    Args:
        num_experts_per_tok (`int`, *optional*):
            Experts per token (k).
        first_rank (`int`, *optional*, defaults to 1):
            Rank of the first expert that is taken. 2 leaves the best one out, as the weak mode of self-contrast does
            (2405.14507).
        score (`"softmax"` or `"sigmoid"`, *optional*):
            Map from logits to scores.
        score_order (`"score_topk"` or `"topk_score"`, *optional*):
            Scores over all experts first, or softmax over the k chosen logits.
        renormalize (`bool`, *optional*):
            Whether the k weights are divided by their sum.
        scale (`float`, *optional*):
            Factor on the weights.
        temperature (`float`, *optional*, defaults to 1.0):
            The logits are divided by it.
        logit_std (`float`, *optional*):
            The logits of each token are moved and scaled to mean 0 and this standard deviation over the experts
            (lambda of Skywork-MoE, 2406.06563, eq. 5), so that how sure the gate is does not depend on its size.
        jitter (`float`, *optional*, defaults to 0.0):
            In training, the router's input is multiplied by uniform noise from `[1 - jitter, 1 + jitter]` (Switch
            Transformers).
        correction_bias (`bool`, *optional*):
            Whether a bias, outside the gradient, is added to the scores for the selection only. `None` uses the
            family's where it has one; `True` adds a buffer `moe_correction_bias` where it has none.
        bias_update_rate (`float`, *optional*, defaults to 0.0):
            Step of the loss-free balancing update of that bias after each optimizer step (2408.15664): up for experts
            below the mean load, down for those above.
        num_groups, topk_groups (`int`, *optional*):
            Experts are split into `num_groups` equal groups; only the `topk_groups` best groups of a token count.
        sample_slots (`int`, *optional*, defaults to 0):
            In training, so many of the k experts are drawn, by their probability, from those that are not among the
            `k - sample_slots` best (ModuleFormer, 2306.04640).
        removed_experts (`int`, *optional*, defaults to 0):
            Experts that were pruned away and whose logits still count in the softmax, so that the weights of the
            others, where they are not renormalised, are what they were. Set by `prune_experts`.
    """

    num_experts_per_tok: int | None = None
    first_rank: int = 1
    score: Literal["softmax", "sigmoid"] | None = None
    score_order: Literal["score_topk", "topk_score"] | None = None
    renormalize: bool | None = None
    scale: float | None = None
    temperature: float = 1.0
    logit_std: float | None = None
    jitter: float = 0.0
    correction_bias: bool | None = None
    bias_update_rate: float = 0.0
    num_groups: int | None = None
    topk_groups: int | None = None
    sample_slots: int = 0
    removed_experts: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")
        if self.logit_std is not None and self.logit_std <= 0:
            raise ValueError(f"`logit_std` must be positive, got {self.logit_std}.")
        if self.logit_std is not None and self.temperature != 1.0:
            raise ValueError(f"`temperature` ({self.temperature}) has no effect under `logit_std`; set only that.")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"`jitter` must be in [0, 1), got {self.jitter}.")
        if self.num_experts_per_tok is not None and self.num_experts_per_tok < 1:
            raise ValueError(f"`num_experts_per_tok` must be at least 1, got {self.num_experts_per_tok}.")
        if self.bias_update_rate < 0:
            raise ValueError(f"`bias_update_rate` must be non-negative, got {self.bias_update_rate}.")
        if self.first_rank < 1:
            raise ValueError(f"`first_rank` must be at least 1, got {self.first_rank}.")
        if self.num_groups is None or self.topk_groups is None:
            if self.num_groups != self.topk_groups:
                raise ValueError("`num_groups` and `topk_groups` go together; set both or neither.")
        elif not 1 <= self.topk_groups <= self.num_groups:
            raise ValueError(f"`topk_groups` must be in [1, num_groups={self.num_groups}], got {self.topk_groups}.")
        for name in ("sample_slots", "removed_experts"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")
        if self.sample_slots and self.first_rank > 1:
            raise ValueError(
                f"`sample_slots` fills the last of k experts; it excludes `first_rank` {self.first_rank}."
            )
        if self.score_order == "topk_score" and self.score == "sigmoid":
            raise ValueError('`score_order="topk_score"` is a softmax over the chosen logits; it excludes sigmoid.')

    @property
    def is_stock(self) -> bool:
        """Whether the stock gate itself decides (every choice left to the family)."""
        choices = (self.num_experts_per_tok, self.score, self.score_order, self.renormalize, self.scale)
        extras = (self.correction_bias, self.num_groups, self.logit_std)
        numbers = (self.first_rank, self.temperature, self.jitter, self.sample_slots, self.removed_experts)
        plain = numbers == (1, 1.0, 0.0, 0, 0)
        return plain and all(choice is None for choice in choices + extras)


@register_router("top_k")
class TopKRouter(MoERouter):
    """The k best experts of each token.

    With every choice left `None` it is the stock gate itself, with records and masked auxiliary losses added.
    """

    config_class = TopKRouterConfig
    replays = True
    stateless = True
    paper = "Shazeer et al. 2017 (1701.06538)"
    expert_rows = ("moe_correction_bias",)
    moe_config: TopKRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> TopKRouterConfig:
        return TopKRouterConfig()

    @classmethod
    def extra_slots(cls, config: TopKRouterConfig, site: RouterSite) -> int:
        return max(cls.num_slots(config, site) - site.top_k, 0)

    @classmethod
    def check(cls, config: TopKRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        slots = cls.num_slots(config, site)
        k = slots + config.first_rank - 1
        if k > site.num_choices:
            what = f"the {site.num_experts} experts"
            if site.zero_experts is not None:
                what += f" and {site.zero_experts.total} zero-computation experts"
            value = f"`num_experts_per_tok` ({slots})"
            if config.first_rank > 1:
                value += f" from `first_rank` ({config.first_rank}) on"
            raise ValueError(f'{value} exceeds {what} of layer "{site.key}".')
        if config.sample_slots > slots:
            raise ValueError(f"`sample_slots` ({config.sample_slots}) exceeds the k={slots} experts of a token.")
        groups = _groups(config, site.rule)
        if groups is not None:
            count, keep, _ = groups
            if site.num_experts % count:
                raise ValueError(f"`num_groups` ({count}) must divide the {site.num_experts} experts.")
            free = site.num_choices - site.num_experts
            if k > site.num_experts // count * keep + free and not config.is_stock:
                raise ValueError(f"`topk_groups` ({keep}) groups hold fewer than k={k} experts.")
        if config.removed_experts and (site.rule.logits not in GATES_OF_ROWS or renormalizes(config, site.rule)):
            why = "its weights are renormalised, so that other experts do not count in them"
            if site.rule.logits not in GATES_OF_ROWS:
                why = "its logits are more than products with the rows of one matrix"
            raise ValueError(f'`removed_experts` has no meaning for the gate of layer "{site.key}": {why}.')
        if config.logit_std is not None and (site.zero_experts is not None or config.removed_experts):
            raise ValueError(
                f'`logit_std` ({config.logit_std}) takes mean and deviation over the experts of layer "{site.key}", '
                "which neither zero-computation experts nor removed ones are."
            )
        check_rule_known(config.score, site, not config.is_stock or site.zero_experts is not None)
        has_bias = config.correction_bias or (config.correction_bias is None and site.rule.bias is not None)
        if config.bias_update_rate and not has_bias:
            raise ValueError(
                f'`bias_update_rate` ({config.bias_update_rate}) has no bias to move at layer "{site.key}"; set '
                "`correction_bias=True`."
            )

    def setup(self) -> None:
        if self.moe_config.correction_bias and self.moe_site.rule.bias is None:
            device = next(self.parameters()).device
            bias = torch.zeros(self.moe_site.num_experts, dtype=torch.float32, device=device)
            self.register_buffer("moe_correction_bias", bias)
        if self.moe_config.removed_experts:
            rows = self.weight.new_empty(self.moe_config.removed_experts, *self.weight.shape[1:])
            self.register_buffer(REMOVED_ROWS, rows)

    def reset_parameters(self) -> None:
        if REMOVED_ROWS in self._buffers:
            init.normal_(self.moe_removed_weight, mean=0.0, std=0.02)
        if "moe_correction_bias" in self._buffers:
            init.zeros_(self.moe_correction_bias)

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, site, rule = self.moe_config, self.moe_site, self.moe_site.rule
        score = config.score or ("softmax" if rule.score == "custom" else rule.score)
        is_stock = config.is_stock and site.zero_experts is None and "W" in rule.returns and "I" in rule.returns
        if is_stock and self.recorded_choices is None:  # the stock gate chooses by itself
            out = self.stock_route(hidden, *args, **kwargs)
            logits = out["L"].flatten(0, -2) if "L" in out else out["P"].float().clamp_min(1e-38).log()
            scores = as_distribution(expert_scores(logits, score), score)
            index = out["I"].long()
            if logits.shape[-1] > site.num_experts:  # the gate has a class that skips the experts
                index = index.masked_fill(out["W"] == 0, site.num_experts)
            return RouteRecord(logits, scores, out["W"], index, config, stock=out)

        if config.jitter and self.training:
            noise = torch.empty_like(hidden).uniform_(1 - config.jitter, 1 + config.jitter)
            hidden = hidden * noise
        logits = self.router_logits(hidden, *args, **kwargs)
        logits = logits if config.temperature == 1.0 else logits / config.temperature
        if config.logit_std is not None:
            logits = normalize_logits(logits, config.logit_std)
        scores = expert_scores(logits, score)
        distribution = as_distribution(scores, score)
        if config.removed_experts:
            removed = self._logits_of_rows(hidden, self.moe_removed_weight) / config.temperature
            scores = expert_scores(torch.cat([logits, removed.to(logits)], dim=-1), score)[..., : logits.shape[-1]]
        choice = self.selection_scores(scores, self._bias(*args), _groups(config, rule))
        last = self.num_slots(config, site) + config.first_rank - 1
        index = choice.topk(last, dim=-1).indices[..., config.first_rank - 1 :]
        if config.sample_slots and self.training:
            best = index[..., : last - config.sample_slots]
            index = explore_slots(choice, best, config.sample_slots, context, site.order)
        renormalize = renormalizes(config, rule)
        weights = self.slot_weights(logits, scores, index, score=score, renormalize=renormalize)
        weights = self.final_weights(weights, index, config.scale)
        return RouteRecord(logits, distribution, weights, index, config)

    def _logits_of_rows(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(T, H), (R, ...) -> (T, R): what the gate's logits would be for other rows of its matrix."""
        how = self.moe_site.rule.logits
        if how == "rows":
            return self.logits(hidden, rows)
        return F.linear(hidden.float(), rows.float()) if how == "linear_fp32" else F.linear(hidden, rows)

    def _bias(self, *args: Any) -> torch.Tensor | None:
        if self.moe_config.correction_bias is False:
            return None
        if "moe_correction_bias" in self._buffers:
            return F.pad(self.moe_correction_bias, (0, self.moe_site.num_choices - self.moe_site.num_experts))
        return self.selection_bias(*args)

    @torch.no_grad()
    def after_optimizer_step(self, counts: torch.Tensor) -> None:
        rate = self.moe_config.bias_update_rate
        own = self._buffers.get("moe_correction_bias")
        bias = self.stored_bias() if own is None and self.moe_config.correction_bias is not False else own
        if not rate or bias is None:
            return
        if bias.dtype != torch.float32:  # a model cast to bfloat16, where small steps would vanish
            bias.data = bias.data.float()
        load = counts.to(bias.device, torch.float32)
        # A gate's "skip" class has no load of its own.
        bias.view(-1)[: len(load)].add_(torch.sign(load.mean() - load), alpha=rate)


def normalize_logits(logits: torch.Tensor, std: float) -> torch.Tensor:
    """(T, E) logits with mean 0 and deviation `std` over the experts, in float32; zeros where all are alike."""
    centred = logits.float() - logits.float().mean(dim=-1, keepdim=True)
    # A hair that keeps the gradient of equal logits finite.
    return std * centred * (centred.square().mean(dim=-1, keepdim=True) + 1e-12).rsqrt()


def explore_slots(
    choice: torch.Tensor, best: torch.Tensor, slots: int, context: RoutingContext | None, order: int
) -> torch.Tensor:
    """The best experts of each token, and others drawn without replacement by their probability. ModuleFormer
    (2306.04640), as in the authors' code.

    Args:
        choice: (T, C) what experts are chosen by; -inf where one must not be.
        best: (T, k - slots) the experts that stay.
        slots: how many are drawn.
        context: of this forward.
        order: of the router.

    Returns:
        (T, k).
    """

    def make(generator: torch.Generator | None) -> torch.Tensor:
        return torch.rand(choice.shape, generator=generator, device=choice.device)

    uniform = make(None) if context is None else context.draw(order, "exploration", make)
    # The largest of `log p + Gumbel noise` are a draw without replacement.
    noise = -(-uniform.clamp(1e-20, 1 - 1e-7).log()).log()
    keys = choice.float().clamp_min(1e-38).log() + noise
    keys = keys.masked_fill(~choice.isfinite(), float("-inf")).scatter(-1, best, float("-inf"))
    return torch.cat([best, keys.topk(slots, dim=-1).indices], dim=-1)


def renormalizes(config: TopKRouterConfig, rule: GateRule) -> bool:
    """Whether the weights of a token sum to one (before a scale)."""
    score = config.score or rule.score
    renormalize = rule.renormalize if config.renormalize is None else config.renormalize
    return renormalize or (score in ("softmax", "custom") and (config.score_order or rule.order) == "topk_score")


def _groups(config: TopKRouterConfig, rule: GateRule) -> tuple[int, int, str] | None:
    if config.num_groups is not None and config.topk_groups is not None:
        return config.num_groups, config.topk_groups, "top2_sum"
    return rule.groups


def check_rule_known(score: str | None, site: RouterSite, needed: bool) -> None:
    """Refuse to reinterpret a stock gate whose rule cannot be written as score, top-k, renormalise, scale."""
    if needed and score is None and site.rule.score == "custom":
        raise ValueError(
            f'the stock gate of layer "{site.key}" has a rule of its own that cannot be combined with these settings; '
            'name the rule you want with `score="softmax"` or `score="sigmoid"`.'
        )
