"""Noisy top-k: the first sparse gate, with trainable noise, and the gate of GShard as a special case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import MoERouter, RouterSite, as_distribution, expert_scores, register_router
from .router_top_k import check_rule_known
from .tanh_gate import TanhGateRouter


@dataclass
class NoisyTopKRouterConfig(RouterConfig):
    """Config of `NoisyTopKRouter`. A field left `None` means: as the stock family does.

    > Parameters that control the selection

    Args:
        num_experts_per_tok (`int`, *optional*):
            Experts per token (k).
        gate (`"linear"` or `"mlp"`, *optional*, defaults to `"linear"`):
            Logits: those of the stock gate, `W x`; or `A tanh(W x)`, with a square matrix A, as in LLaMA-MoE
            (2406.16554).
        noise (`bool`, *optional*, defaults to `True`):
            Whether normal noise is added to the logits in training. How much of it is learned, for each token and
            expert.
        noise_floor (`float`, *optional*, defaults to 0.0):
            Added to the learned deviation of the noise. 0.01 in LLaMA-MoE.
        second_expert (`"top"` or `"random"`, *optional*, defaults to `"top"`):
            `"random"` keeps the second expert of a token with a probability of twice its share of the two weights, in
            training, as GShard does (2006.16668); for k = 2.
        score (`"softmax"` or `"sigmoid"`, *optional*):
            Map from logits to scores. The paper has softmax.
        renormalize (`bool`, *optional*):
            Whether the k weights are divided by their sum. The paper does: a softmax over the k kept logits.
        scale (`float`, *optional*):
            Factor on the weights.

    > Parameters that control the auxiliary losses

    Args:
        importance_coef (`float`, *optional*, defaults to 0.1):
            Weight of the squared coefficient of variation of the experts' importance, their summed weights
            (w_importance).
        load_coef (`float`, *optional*, defaults to 0.1):
            Weight of the squared coefficient of variation of the experts' load, the expected number of tokens under
            the noise (w_load). Needs `noise`.
    """

    num_experts_per_tok: int | None = None
    gate: Literal["linear", "mlp"] = "linear"
    noise: bool = True
    noise_floor: float = 0.0
    second_expert: Literal["top", "random"] = "top"
    score: Literal["softmax", "sigmoid"] | None = None
    renormalize: bool | None = None
    scale: float | None = None
    importance_coef: float = 0.1
    load_coef: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts_per_tok is not None and self.num_experts_per_tok < 1:
            raise ValueError(f"`num_experts_per_tok` must be at least 1, got {self.num_experts_per_tok}.")
        for name in ("importance_coef", "load_coef", "noise_floor"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")
        if self.noise_floor and not self.noise:
            raise ValueError(f"`noise_floor` ({self.noise_floor}) goes with `noise=True`; set it to 0.")
        if self.load_coef and not self.noise:
            raise ValueError(
                f"`load_coef` ({self.load_coef}) needs `noise=True`: the load is an expectation over the noise. Set "
                "it to 0."
            )


@register_router("noisy_top_k")
class NoisyTopKRouter(TanhGateRouter):
    """The k best experts after noise of a learned size has been added to the logits.

    "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer" (1701.06538), sections 2.1 and 4,
    appendix A. Without noise and with `second_expert="random"` it is the gate of GShard (2006.16668), algorithm 2,
    less its capacity limit. With `gate="mlp"` and `noise_floor=0.01` it is that of LLaMA-MoE (2406.16554).
    """

    config_class = NoisyTopKRouterConfig
    replays = True
    paper = "Sparsely-Gated MoE (1701.06538), GShard (2006.16668), LLaMA-MoE (2406.16554)"
    moe_config: NoisyTopKRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> NoisyTopKRouterConfig:
        """Without noise, the stock top-k. With noise it is so in evaluation only."""
        if site.rule.score == "custom":
            raise NotImplementedError("this family's gate has a rule of its own, to which noise cannot be added.")
        return NoisyTopKRouterConfig(noise=False, importance_coef=0.0, load_coef=0.0)

    @classmethod
    def check(cls, config: NoisyTopKRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        k = config.num_experts_per_tok or site.top_k
        if k > site.num_choices:
            raise ValueError(f'`num_experts_per_tok` ({k}) exceeds the {site.num_choices} experts of "{site.key}".')
        if config.second_expert == "random" and k != 2:
            raise ValueError(
                f'`second_expert="random"` needs two experts per token, layer "{site.key}" has {k}; set '
                "`num_experts_per_tok=2`."
            )
        if site.rule.groups is not None and site.rule.groups[0] > 1:
            count, keep, _ = site.rule.groups
            if k > site.num_experts // count * keep:
                raise ValueError(f"the {keep} expert groups that a token may use hold fewer than k={k} experts.")
        check_rule_known(config.score, site, True)
        if config.gate == "mlp":
            cls.check_second_layer(site)

    def setup(self) -> None:
        if self.moe_config.gate == "mlp":
            self.add_second_layer()
        if self.moe_config.noise:
            place = {"device": self.own_device, "dtype": next(self.parameters()).dtype}
            self.moe_noise_weight = nn.Parameter(
                torch.empty(self.moe_site.num_choices, self.moe_site.hidden_size, **place)
            )

    def reset_parameters(self) -> None:
        if self.moe_config.gate == "mlp":  # as a linear layer of PyTorch
            bound = self.moe_site.num_experts**-0.5
            init.uniform_(self.moe_mix_weight, -bound, bound)
        if self.moe_config.noise:
            init.zeros_(self.moe_noise_weight)

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, site, rule = self.moe_config, self.moe_site, self.moe_site.rule
        score, k = config.score or rule.score, config.num_experts_per_tok or site.top_k
        clean = self.router_logits(hidden, *args, **kwargs).float()
        logits, load = clean, None
        if config.noise and self.training:
            raw = F.linear(hidden.to(self.moe_noise_weight.dtype), self.moe_noise_weight)
            # Far below zero softplus underflows, and the load divides by it.
            deviation = F.softplus(raw.float()).clamp_min(torch.finfo(torch.float32).eps) + config.noise_floor
            logits = clean + deviation * self._draw(context, "noise", torch.randn, clean.shape, clean.device)
            load = chance_in_top(clean, logits, deviation, k)

        scores = expert_scores(logits, score)
        choice = self.selection_scores(scores, self.selection_bias(*args), rule.groups)
        index = choice.topk(k, dim=-1).indices
        renormalize = rule.renormalize if config.renormalize is None else config.renormalize
        renormalize = renormalize or (score == "softmax" and config.renormalize is None and rule.order == "topk_score")
        weights = self.slot_weights(logits, scores, index, score=score, renormalize=renormalize)
        weights = self.final_weights(weights, index, config.scale)

        shares = scores.gather(-1, index)
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        extras = {"gates": torch.zeros_like(scores).scatter(-1, index, shares)}
        extras["load"] = (extras["gates"] > 0).to(scores.dtype) if load is None else load
        if config.second_expert == "random" and self.training:
            chance = 2 * shares.detach()[:, 1]
            drop = chance <= self._draw(context, "second_expert", torch.rand, chance.shape, chance.device)
            drop = torch.stack([torch.zeros_like(drop), drop], dim=-1)
            weights, index = weights.masked_fill(drop, 0), index.masked_fill(drop, site.num_choices)
        return RouteRecord(logits, as_distribution(scores, score), weights, index, config, extras=extras)

    def _draw(
        self, context: RoutingContext | None, name: str, how: Any, shape: torch.Size, device: torch.device
    ) -> torch.Tensor:
        def make(generator: torch.Generator | None) -> torch.Tensor:
            return how(shape, generator=generator, device=device)

        return make(None) if context is None else context.draw(self.moe_site.order, name, make)

    @staticmethod
    def aux_losses(record: RouteRecord, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        coefs = record.config.loss_coefs
        losses = MoERouter.aux_losses(record, mask)
        for name, extra in (("importance", "gates"), ("load", "load")):
            if coefs.get(name):
                losses[name] = squared_variation(record.extras[extra], mask)
        return losses


def chance_in_top(clean: torch.Tensor, noisy: torch.Tensor, deviation: torch.Tensor, k: int) -> torch.Tensor:
    """(T, E): the probability that an expert is among the k best if its own noise is drawn anew (appendix A).

    Args:
        clean, noisy: (T, E) logits without and with noise.
        deviation: (T, E) standard deviation of the noise.
    """
    if k >= clean.shape[-1]:
        return torch.ones_like(clean)
    best = noisy.topk(k + 1, dim=-1).values
    last_in, first_out = best[:, k - 1 : k], best[:, k:]
    # The k-th best of the others: for one of the k best that is the one after them.
    threshold = torch.where(noisy > first_out, first_out, last_in)
    return torch.special.ndtr((clean - threshold) / deviation)


def squared_variation(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Squared coefficient of variation over the experts of the sums over tokens that count; (T, E) to a scalar."""
    if mask is not None:
        values = values.masked_fill(~mask.to(values.device)[:, None], 0)
    sums = values.sum(dim=0)
    return sums.var(unbiased=False) / (sums.mean().square() + 1e-10)
