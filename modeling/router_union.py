"""The router of Union of Experts: which of the parts of one dense block a token uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import MoERouter, RouterSite, register_router
from .moe_schedules import ramp, schedule_fraction


@dataclass
class UnionRouterConfig(RouterConfig):
    """Config of `UnionRouter`.

    > Parameters that control the selection

    Args:
        num_experts_per_tok (`int`, *optional*):
            Experts per token at the end of the schedule (k), `None` for the site's number.
        weights (`"one"`, `"soft"` or `"none"`, *optional*, defaults to `"one"`):
            Weight of a chosen expert: 1 with the gradient of its probability; its probability times the number of
            experts; or 1 without a gradient, as in the authors' language model, whose router does not learn.
        anneal (`bool`, *optional*, defaults to `True`):
            Whether training starts with all experts, which is the dense block, and goes down to k.
        steps (`int`, *optional*):
            Optimizer steps until k is reached. `None` means the whole training.
        patch_size (`int`, *optional*, defaults to 1):
            Tokens one after another that choose together, by their mean. Patches are counted from the end of a row,
            so that a class token in front of an image stands alone where the image comes out even. `None` is a whole
            row. Only where attention is not causal: a patch's choice depends on all of its tokens.

    > Parameters that change over training

    A model that was never trained uses all experts where `anneal` is set.
    """

    num_experts_per_tok: int | None = None
    weights: Literal["one", "soft", "none"] = "one"
    anneal: bool = True
    steps: int | None = None
    patch_size: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_experts_per_tok", "steps", "patch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.steps is not None and not self.anneal:
            raise ValueError(f"`steps` ({self.steps}) goes with `anneal=True`; otherwise k is constant.")

    @property
    def schedule_steps(self) -> int | None:
        return self.steps


@register_router("union")
class UnionRouter(MoERouter):
    """The k best of a softmax, each with weight one: experts are parts of a block, whose sum is the block.

    "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer" (2503.02495). Tokens,
    patches or rows choose for themselves; the authors' code normalises over the batch, and its map from a whole row
    to a choice knows rows of one length. Nothing is renormalised: leaving parts out lowers the sum, as switching them
    off in the dense block does.
    """

    config_class = UnionRouterConfig
    paper = "Union of Experts (2503.02495)"
    needs = "experts that are parts of a dense block"
    expert_rows = ()
    moe_config: UnionRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> RouterConfig:
        raise NotImplementedError("its experts have weight one each, which no gate of a stock family gives them.")

    @classmethod
    def check(cls, config: UnionRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        k = config.num_experts_per_tok or site.top_k
        if k > site.num_experts:
            raise ValueError(f'`num_experts_per_tok` ({k}) exceeds the {site.num_experts} experts of "{site.key}".')
        if site.zero_experts is not None:
            raise ValueError("the `union` router chooses parts of a block; zero-computation experts are none.")
        if config.patch_size != 1 and site.causal:
            raise ValueError(
                f"`patch_size` ({config.patch_size}) lets tokens choose by what comes after them, and the model is "
                "causal; use 1."
            )

    @classmethod
    def num_slots(cls, config: Any, site: RouterSite) -> int:
        k: int = config.num_experts_per_tok or site.top_k
        return site.num_experts if config.anneal else k

    def setup(self) -> None:
        if self.moe_config.anneal:
            self.use_progress()

    def active(self) -> Any:
        """Experts of a token now."""
        site, config = self.moe_site, self.moe_config
        k = config.num_experts_per_tok or site.top_k
        if not config.anneal:
            return k
        return ramp(schedule_fraction(self.moe_progress, config.steps), site.num_experts, k).round()

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        site, config = self.moe_site, self.moe_config
        if config.patch_size == 1:
            logits = self.router_logits(hidden, *args, **kwargs)
        else:
            means, patch = self._patches(hidden, context)
            logits = self.router_logits(means, *args, **kwargs)[patch]
        scores = logits.float().softmax(dim=-1)
        chosen, index = scores.topk(self.num_slots(config, site), dim=-1)
        weights = torch.ones_like(chosen)
        if config.weights == "one":
            weights = 1 + (chosen - chosen.detach())
        elif config.weights == "soft":
            weights = site.num_experts * chosen
        unused = (torch.arange(index.shape[-1], device=index.device) >= self.active()).expand_as(index)
        weights = weights.masked_fill(unused, 0)
        return RouteRecord(logits, scores, weights, index.masked_fill(unused, site.num_choices), config)

    def _patches(self, hidden: torch.Tensor, context: RoutingContext | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Means (P, H) of the patches of all rows, and the patch of each token (T,). Padding does not count."""
        if context is None or not context.batch_size:
            raise ValueError("patches need a forward of the whole model, which tells how many rows there are.")
        batch, length = context.batch_size, len(hidden) // context.batch_size
        size = self.moe_config.patch_size or max(length, 1)
        patches = -(-length // size)
        back = torch.arange(length - 1, -1, -1, device=hidden.device)
        rows = torch.arange(batch, device=hidden.device)[:, None]
        patch = (rows * patches + patches - 1 - back // size).flatten()
        mask = context.token_mask(len(hidden))
        real = torch.ones_like(patch) if mask is None else mask.to(patch)
        sums = hidden.new_zeros(batch * patches, hidden.shape[-1], dtype=torch.float32)
        sums = sums.index_add(0, patch, hidden.float() * real[:, None])
        counts = torch.zeros(len(sums), device=hidden.device).index_add(0, patch, real.float())
        return (sums / counts.clamp(min=1)[:, None]).to(hidden.dtype), patch
