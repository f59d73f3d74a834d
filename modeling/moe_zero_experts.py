"""Zero-computation experts: choices of the router beside the real experts that cost next to nothing.

MoE++ (2410.07348), section 3.1; null experts alone are those of AdaMoE (2406.13233). The router gives them columns of
its logits (`MoERouter.setup_zero_experts`); this part gives copies and constants their place in the routed sum. Null
experts need none: the router makes a slot that picks one an unused slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .configuration_moe_ext import RouterConfig
from .configuration_parts import ZeroExpertsConfig
from .moe_families import get_by_path, has_path
from .moe_install import add_child, install
from .moe_parts import LayerPart, PartModule, register_part
from .moe_router import RouterSite, get_router


class ConstantExperts(PartModule):
    """All constant experts of a layer: `a1 x + a2 v` with `[a1, a2] = softmax(W x)`, each with `W` and `v` of its own.

    Parameters: `mix` (n, 2, H) is W, `vector` (n, H) is v.
    """

    def __init__(self, count: int, hidden_size: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.empty(count, 2, hidden_size, device=device, dtype=dtype))
        self.vector = nn.Parameter(torch.empty(count, hidden_size, device=device, dtype=dtype))

    def init_weights(self, std: float) -> None:
        init.normal_(self.mix, mean=0.0, std=std)
        init.normal_(self.vector)

    def forward(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Their weighted sum: (T, H) and a weight for each of them (T, n), both in float32, to (T, H)."""
        with maybe_autocast(device_type=hidden.device.type, enabled=False):
            mix = F.linear(hidden, self.mix.float().flatten(0, 1)).unflatten(-1, (-1, 2)).softmax(dim=-1)
            parts = weights.unsqueeze(-1) * mix  # (T, n, 2)
            return parts[..., 0].sum(dim=-1, keepdim=True) * hidden + parts[..., 1] @ self.vector.float()


@dataclass(frozen=True)
class ZeroExpertIds:
    """Ids of copies and constants in the routing: `first` on, copies before constants.

    `input_factor` multiplies the input of every expert, the real ones included.
    """

    first: int
    copy: int
    constant: int
    input_factor: float


class _WithZeroExperts(nn.Module):
    moe_zero_ids: ZeroExpertIds

    def scale_input(self, hidden: torch.Tensor) -> torch.Tensor:
        factor = self.moe_zero_ids.input_factor
        return hidden if factor == 1 else hidden * factor

    def add_zero_experts(
        self, out: torch.Tensor, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The routed sum `out` of the real experts, plus copies and constants. No token moves: a copy is a factor on
        the input, whichever slot picked it."""
        ids = self.moe_zero_ids
        if ids.copy + ids.constant == 0:
            return out
        flat = hidden.reshape(-1, hidden.shape[-1]).float()
        index, weights = index.reshape(len(flat), -1), weights.reshape(len(flat), -1).float()
        is_copy = (index >= ids.first) & (index < ids.first + ids.copy)
        added = weights.masked_fill(~is_copy, 0).sum(dim=-1, keepdim=True) * flat
        if ids.constant:
            number = ids.first + ids.copy + torch.arange(ids.constant, device=index.device)
            each = weights.unsqueeze(-1).masked_fill(index.unsqueeze(-1) != number, 0).sum(dim=1)  # (T, n)
            added = added + self.moe_zero_experts(flat, each)
        return out + added.reshape(out.shape).to(out.dtype)


class ExpertsWithZeroExperts(_WithZeroExperts):
    """Installed in front of an experts module."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *args: Any
    ) -> torch.Tensor:
        hidden_states = self.scale_input(hidden_states)
        out = super().forward(hidden_states, top_k_index, top_k_weights, *args)
        return self.add_zero_experts(out, hidden_states, top_k_index, top_k_weights)


class BlockWithZeroExperts(_WithZeroExperts):
    """Installed in front of a block adapter, whose experts know nothing of ids and weights."""

    def run(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The routed sum."""
        hidden = self.scale_input(hidden)
        return self.add_zero_experts(super().run(hidden, index, weights), hidden, index, weights)


@register_part("zero_experts")
class ZeroExpertsPart(LayerPart):
    """Copies and constants in the routed sum. Layers with null experts alone get nothing installed."""

    @classmethod
    def check(cls, config: ZeroExpertsConfig, plan: Any) -> None:
        site, router = plan.site, get_router(plan.parts.router.type)
        if plan.moe is not None:
            block = get_by_path(plan.layer, plan.moe.block)
            gate, bias = get_by_path(block, plan.moe.router), site.rule.bias
            if bias not in (None, "arg") and has_path(gate, bias):
                classes = get_by_path(gate, bias).numel()
                if classes != site.num_experts:
                    raise ValueError(
                        f'the stock gate of layer "{site.key}" has {classes} classes for {site.num_experts} experts: '
                        "it can skip experts by itself, and takes no `zero_experts`."
                    )
        if site.rule.score == "custom" and not router.own_logits and getattr(plan.parts.router, "score", None) is None:
            raise ValueError(
                f'the stock gate of layer "{site.key}" has a rule of its own that knows nothing of `zero_experts`; '
                'use a router with a rule you name, such as `TopKRouterConfig(score="softmax")`.'
            )
        if config.init == "copy" and (router.own_logits or site.rule.logits not in ("linear", "linear_fp32")):
            what = f"the `{plan.parts.router.type}` router" if router.own_logits else "the stock gate"
            raise ValueError(
                f'`zero_experts` with `init="copy"` copy rows of a linear stock gate; {what} of layer "{site.key}" '
                'makes its logits otherwise. Use `init="random"` or `init="identity"`.'
            )
        if config.init == "identity" and not router.holds_zero_experts:
            raise ValueError(
                '`zero_experts` with `init="identity"` are held back at first by their logits, and the '
                f'`{plan.parts.router.type}` router has none. Use `init="random"`.'
            )
        extra = router.extra_slots(plan.parts.router, site)
        if config.init == "identity" and extra > config.zero:
            raise ValueError(
                f'`init="identity"` fills the {extra} slots that layer "{site.key}" has beyond its stock '
                f"{site.top_k} with null experts; `zero` is {config.zero}."
            )

    @classmethod
    def install(
        cls, config: ZeroExpertsConfig, plan: Any, block: nn.Module, gate: nn.Module, experts: nn.Module, link: Any
    ) -> None:
        factor = get_router(plan.parts.router.type).input_factor(plan.parts.router, plan.site)
        if config.copy + config.constant == 0 and factor == 1:
            return
        adapted = plan.moe is not None and plan.moe.adapter is not None
        owner = block if adapted else experts
        ids = ZeroExpertIds(plan.site.num_experts + 1, config.copy, config.constant, factor)
        install(owner, BlockWithZeroExperts if adapted else ExpertsWithZeroExperts, moe_zero_ids=ids)
        if config.constant:
            like = next(experts.parameters())
            width = getattr(experts, "hidden_dim", plan.site.hidden_size)  # muse_spark's experts work in another one
            child = ConstantExperts(config.constant, width, like.device, _float_dtype(experts, gate))
            add_child(owner, "moe_zero_experts", child)


def refuse_other_start(config: RouterConfig, site: RouterSite, **names: str) -> None:
    """Raise `ValueError` where a router is told how its zero-computation experts start, and the declared ones, which
    take their place, start otherwise.

    Args:
        config: of the router.
        site: where it stands.
        names: from a field of `ZeroExpertsConfig` to that of the router.
    """
    for field, own in names.items():
        asked, declared = getattr(config, own), getattr(site.zero_experts, field, None)
        if site.zero_experts is not None and asked not in (getattr(type(config), own), declared):
            raise ValueError(
                f'`{own}` ({asked!r}) and `{field}` ({declared!r}) of the `zero_experts` of layer "{site.key}" '
                f"contradict each other; leave `{own}` out."
            )


def _float_dtype(*modules: nn.Module) -> torch.dtype:
    """The dtype of the first parameter that is not quantised."""
    parameters = (parameter for module in modules for parameter in module.parameters())
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.get_default_dtype())
