"""The router of ModuleFormer: a gate of two layers, weights that are plain probabilities, exploration in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_router import MoERouter, RouterSite, register_router
from .router_top_k import explore_slots


@dataclass
class ModuleFormerRouterConfig(RouterConfig):
    """Config of `ModuleFormerRouter`. Defaults are those of the authors' code.

    > Parameters that control the selection

    Args:
        kind (`"mlp"`, `"cosine"` or `"linear"`, *optional*, defaults to `"mlp"`):
            Logits: `A gelu(B x + b)`; cosines of `B x` and the rows of A times a learned factor; or those of the stock
            gate.
        hidden_size (`int`, *optional*, defaults to 256):
            Rows of B. Without meaning for `kind="linear"`.
        num_experts_per_tok (`int`, *optional*):
            Experts per token (k), `None` for the family's number.
        renormalize (`bool`, *optional*, defaults to `False`):
            Whether the k weights are divided by their sum; `None` does as the stock family. The paper does not; an
            upcycled dense model needs it to start as the dense model.
        scale (`float`, *optional*):
            Factor on the weights, `None` for the family's.
        sample_slots (`int`, *optional*, defaults to 0):
            In training, so many of the k experts are drawn, by their probability, from those that are not among the
            `k - sample_slots` best.
    """

    kind: Literal["mlp", "cosine", "linear"] = "mlp"
    hidden_size: int = 256
    num_experts_per_tok: int | None = None
    renormalize: bool | None = False
    scale: float | None = None
    sample_slots: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts_per_tok is not None and self.num_experts_per_tok < 1:
            raise ValueError(f"`num_experts_per_tok` must be at least 1, got {self.num_experts_per_tok}.")
        if self.sample_slots < 0:
            raise ValueError(f"`sample_slots` must be non-negative, got {self.sample_slots}.")
        least = 2 if self.kind == "cosine" else 1
        if self.hidden_size < least:
            why = "; in one dimension every cosine is 1 or -1" if self.kind == "cosine" else ""
            raise ValueError(f"`hidden_size` must be at least {least}, got {self.hidden_size}{why}.")


@register_router("moduleformer")
class ModuleFormerRouter(MoERouter):
    """Top-k of a softmax over the logits of a small network, each expert weighted by its probability as it is.

    "ModuleFormer: Modularity Emerges from Mixture-of-Experts" (2306.04640), section 3. With `kind="mlp"` and
    `"cosine"` the stock gate is not used and is excluded from training. The paper's loss is `information_coef`, and
    `concentration_coef` for fine-tuning before pruning.

    The factor of cosines is kept as its logarithm. `norm` at the end of the parameter's name keeps it out of the
    weight decay of the Transformers trainer, which would pull it towards 1.
    """

    config_class = ModuleFormerRouterConfig
    replays = True
    paper = "ModuleFormer (2306.04640)"
    needs = "own gate, trained anew, but for `linear`"
    own_logits = True
    expert_rows = ("moe_output_weight",)
    moe_config: ModuleFormerRouterConfig

    @classmethod
    def identity_config(cls, site: RouterSite) -> ModuleFormerRouterConfig:
        """The stock gate, where it is a softmax and plain top-k."""
        rule = site.rule
        if rule.score != "softmax" or rule.bias is not None or rule.groups is not None:
            raise NotImplementedError("the stock gate is no plain top-k of softmax logits.")
        return ModuleFormerRouterConfig(kind="linear", renormalize=None)

    @classmethod
    def check(cls, config: ModuleFormerRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        k = cls.num_slots(config, site)
        if k > site.num_choices:
            raise ValueError(f'`num_experts_per_tok` ({k}) exceeds the {site.num_choices} experts of "{site.key}".')
        if config.sample_slots > k:
            raise ValueError(f"`sample_slots` ({config.sample_slots}) exceeds the k={k} experts of a token.")
        if config.kind == "linear" and site.zero_experts is not None:
            raise ValueError(
                '`kind="linear"` takes the logits of the stock gate, which has no rows for zero-computation experts. '
                "Use the router `top_k` with them, or another `kind`."
            )

    def setup(self) -> None:
        config, site = self.moe_config, self.moe_site
        if config.kind == "linear":
            return
        place = {"device": self.own_device, "dtype": next(self.parameters()).dtype}
        self.freeze_stock()
        self.moe_hidden_weight = nn.Parameter(torch.empty(config.hidden_size, site.hidden_size, **place))
        self.moe_output_weight = nn.Parameter(torch.empty(site.num_choices, config.hidden_size, **place))
        if config.kind == "mlp":
            self.moe_hidden_bias = nn.Parameter(torch.empty(config.hidden_size, **place))
        else:
            self.moe_log_scale_norm = nn.Parameter(torch.empty(1, **place))

    def reset_parameters(self) -> None:
        if self.moe_config.kind == "linear":
            return
        init.normal_(self.moe_hidden_weight, mean=0.0, std=0.02)
        init.normal_(self.moe_output_weight, mean=0.0, std=0.02)
        init.zeros_(self.moe_hidden_bias if self.moe_config.kind == "mlp" else self.moe_log_scale_norm)

    def _logits(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(T, H) -> (T, C); in float32 where they are the router's own."""
        if self.moe_config.kind == "linear":
            return self.router_logits(hidden, *args, **kwargs)
        with maybe_autocast(device_type=hidden.device.type, enabled=False):
            inner = F.linear(hidden.float(), self.moe_hidden_weight.float())
            if self.moe_config.kind == "mlp":
                inner = F.gelu(inner + self.moe_hidden_bias.float())
                logits = F.linear(inner, self.moe_output_weight.float())
            else:
                experts = F.normalize(self.moe_output_weight.float(), dim=-1)
                logits = F.linear(F.normalize(inner, dim=-1), experts) * self.moe_log_scale_norm.float().exp()
        return self.hold_zero_experts(logits)

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, rule = self.moe_config, self.moe_site.rule
        logits = self._logits(hidden, *args, **kwargs)
        scores = logits.float().softmax(dim=-1)
        choice = self.selection_scores(scores, None, None)
        index = choice.topk(self.num_slots(config, self.moe_site), dim=-1).indices
        if config.sample_slots and self.training:
            best = index[..., : index.shape[-1] - config.sample_slots]
            index = explore_slots(choice, best, config.sample_slots, context, self.moe_site.order)
        renormalize = config.renormalize
        if renormalize is None:
            renormalize = rule.renormalize or rule.order == "topk_score"
        weights = self.slot_weights(logits, scores, index, score="softmax", renormalize=renormalize)
        weights = self.final_weights(weights, index, config.scale)
        return RouteRecord(logits, scores, weights, index, config)
