"""Union of Experts in attention: each head, or group of heads, works on the tokens that chose it.

"Union of Experts" (2503.02495), selective multi-head attention. A head that a token did not choose gives it nothing
and does not see its key; a head's output for a token is attention among the tokens that chose the head. With all heads
chosen it is the dense attention. Here the choice is a mask on the stock attention, which is exactly the gathered
computation, but saves no time.

Whether a key was chosen is kept with the key, as one more number at its end. So the cache of any kind keeps it through
reordering, cropping and selection, and nothing else has to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache

from .attention_heads import HeadLayout, HeadOutput, RoutedHeads
from .configuration_moe_ext import AttentionConfig, RouterConfig
from .moe_attention import (
    AttentionPart,
    AttentionPlan,
    add_attention_router,
    check_attention_router,
    register_attention,
)
from .moe_context import RoutingLink
from .moe_families import get_by_path
from .moe_install import install
from .moe_router import RouterSite
from .router_union import UnionRouterConfig


@dataclass
class UnionAttentionConfig(AttentionConfig):
    """Config of `UnionAttention`.

    Args:
        num_experts (`int`, *optional*):
            Parts of the attention, each as many heads of keys with their queries; must divide their number. `None` is
            one for each head of keys.
        router (`RouterConfig`, `dict` or `str`, *optional*):
            Router of the parts. `None` is `union` with half of them at the end of training.
    """

    num_experts: int | None = None
    router: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts is not None and self.num_experts < 1:
            raise ValueError(f"`num_experts` must be at least 1, got {self.num_experts}.")
        if isinstance(self.router, str):
            self.router = {"type": self.router}
        if isinstance(self.router, dict):
            self.router = RouterConfig.from_dict(self.router)
        if self.router is not None and not isinstance(self.router, RouterConfig):
            raise TypeError(f"`router` must be a RouterConfig or its dict, got {self.router!r}.")


class SelectingCache:
    """Stands for a cache during the forward of one attention: keys are stored with the choice behind them.

    Args:
        cache: the cache itself.
        chosen: (B, key heads, S) bool, for the new tokens.
        hide: called with (B, key heads, T) bool, the keys that must not be seen.
    """

    def __init__(self, cache: Any, chosen: torch.Tensor, hide: Callable[[torch.Tensor], None]) -> None:
        self.cache, self.chosen, self.hide = cache, chosen, hide

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As in Transformers: all keys and values."""
        marked = torch.cat([key, self.chosen[..., None].to(key.dtype)], dim=-1)
        marked, value = self.cache.update(marked, value, *args, **kwargs)
        self.hide(marked[..., -1] < 0.5)
        return marked[..., :-1], value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


class UnionAttentionModule(RoutedHeads):
    """Installed in front of a stock attention: routes, masks, and wraps the cache."""

    moe_heads: tuple[int, int]
    moe_causal: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        implementation = self.config._attn_implementation
        if implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                f'the choice of heads is a mask for each head, which attn_implementation="{implementation}" cannot '
                'take; load the model with "sdpa" or "eager".'
            )
        site, (heads, key_heads) = self.moe_gate.moe_site, self.moe_heads
        record = self.route_heads(args, kwargs)
        (batch, length), experts = hidden.shape[:2], site.num_experts
        index = record.index.clamp(max=experts)
        used = torch.zeros(len(index), experts + 1, dtype=torch.bool, device=index.device).scatter(1, index, True)
        chosen = used[:, :-1].view(batch, length, -1).transpose(1, 2).repeat_interleave(key_heads // experts, dim=1)
        name = next((name for name, value in kwargs.items() if isinstance(value, Cache)), None)
        mask = kwargs.get("attention_mask")
        if mask is None:
            keys, first = (
                (length, 0) if name is None else key_places(kwargs[name], length, self.layer_idx, hidden.device)
            )
            mask = _plain_mask(hidden, keys, first, causal=self.moe_causal)
        elif mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(~mask, _lowest(hidden))
        mask = mask.expand(batch, heads, *mask.shape[2:]).clone()

        def hide(keys: torch.Tensor) -> None:
            rows = keys.repeat_interleave(heads // key_heads, dim=1)[:, :, None]
            mask[..., : rows.shape[-1]].masked_fill_(rows, _lowest(hidden))

        if name is None:
            hide(~chosen)
        else:
            kwargs[name] = SelectingCache(kwargs[name], chosen, hide)
        kwargs["attention_mask"] = mask
        return super().forward(*args, **kwargs)


def _lowest(like: torch.Tensor) -> float:
    """Finite, also where a softmax is taken in float32: a row without a key, whose output nothing takes, is no NaN."""
    return max(torch.finfo(like.dtype).min, torch.finfo(torch.float32).min)


def key_places(cache: Cache, length: int, layer: int, device: torch.device) -> tuple[int, int]:
    """(number of keys, place of the first new one among them) that attention over a cache and `length` new tokens
    sees. A static cache has places that are not filled yet."""
    past = int(cache.get_seq_length(layer))
    sizes: Any = cache.get_mask_sizes
    if "query_length" in inspect.signature(sizes).parameters:
        keys, offset = sizes(length, layer)
    else:  # older versions want the positions
        keys, offset = sizes(torch.arange(past, past + length, device=device), layer)
    return int(keys), past - int(offset)


def _plain_mask(hidden: torch.Tensor, keys: int, first: int, *, causal: bool) -> torch.Tensor:
    """(1, 1, S, T), added to the logits, where Transformers needs none: every key is seen, or every one that is not
    later. `first` is the place of the first new token."""
    length = hidden.shape[1]
    mask = torch.zeros(length, keys, dtype=hidden.dtype, device=hidden.device)
    if causal:
        own = torch.arange(first, first + length, device=hidden.device)
        mask = mask.masked_fill(torch.arange(keys, device=hidden.device) > own[:, None], _lowest(hidden))
    return mask[None, None]


@register_attention("union")
class UnionAttention(AttentionPart):
    """The heads of a stock attention as experts, of which each token uses some."""

    config_class = UnionAttentionConfig
    paper = "Union of Experts (2503.02495)"

    @classmethod
    def _heads(cls, plan: AttentionPlan) -> tuple[int, int]:
        heads = int(plan.model_config.num_attention_heads)
        return heads, int(getattr(plan.model_config, "num_key_value_heads", None) or heads)

    @classmethod
    def router(cls, config: UnionAttentionConfig) -> RouterConfig:
        """The declared router, or the default."""
        return config.router or UnionRouterConfig()

    @classmethod
    def _site(cls, config: UnionAttentionConfig, plan: AttentionPlan) -> RouterSite:
        count = config.num_experts or cls._heads(plan)[1]
        return plan.router_site(count, max(1, count // 2))

    @classmethod
    def check(cls, config: UnionAttentionConfig, plan: AttentionPlan) -> None:
        site, (heads, key_heads) = cls._site(config, plan), cls._heads(plan)
        if key_heads % site.num_experts:
            raise ValueError(
                f'`num_experts` ({site.num_experts}) must divide the {key_heads} heads of keys of layer "{plan.key}".'
            )
        reason = None
        output = get_by_path(plan.attention, plan.spec.output)
        if plan.spec.experts is not None:
            reason = "it has attention experts already"
        elif not isinstance(output, nn.Linear) or hasattr(output, "base_layer"):
            reason = f"its `{plan.spec.output}` is no plain linear layer"
        elif output.in_features % heads:
            reason = f"its {heads} heads are not what its `{plan.spec.output}` takes"
        if reason is not None:
            raise ValueError(f'the heads of layer "{plan.key}" cannot be chosen: {reason}.')
        check_attention_router(cls.router(config), site)

    @classmethod
    def install(
        cls, config: UnionAttentionConfig, plan: AttentionPlan, attention: nn.Module, link: RoutingLink
    ) -> None:
        site, heads = cls._site(config, plan), cls._heads(plan)
        output = get_by_path(attention, plan.spec.output)
        add_attention_router(
            attention, cls.router(config), site, link, device=output.weight.device, dtype=output.weight.dtype
        )
        place: dict[str, Any] = {"moe_link": link, "moe_order": plan.order}
        install(
            attention,
            UnionAttentionModule,
            moe_heads=heads,
            moe_causal=plan.causal,
            moe_output=plan.spec.output,
            **place,
        )
        query_heads, key_heads = (count // site.num_experts for count in heads)
        layout = HeadLayout(site.num_experts, query_heads, key_heads, shared=False)
        install(output, HeadOutput, moe_site=site, moe_layout=layout, moe_width=output.in_features, **place)
