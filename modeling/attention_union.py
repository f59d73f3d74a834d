"""Union of Experts in attention: each head, or group of heads, works on the tokens that chose it.

"Union of Experts" (2503.02495), selective multi-head attention. A head that a token did not choose gives it nothing
and does not see its key; a head's output for a token is attention among the tokens that chose the head. With all heads
chosen it is the dense attention. With `attn_implementation="sdpa"` or `"eager"` the choice is a mask on the stock
attention, which is exactly the gathered computation, but saves no time. With `"union_gather"`, registered here, the
tokens of each head are gathered: with half of the heads for each token, a quarter of the products of queries and keys.

Whether a key was chosen is kept with the key, as one more number at its end. So the cache of any kind keeps it through
reordering, cropping and selection, and nothing else has to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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


GATHER = "union_gather"


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
        if args:  # by name, since the mask may be replaced
            kwargs |= dict(zip(inspect.signature(super().forward).parameters, args, strict=False))
        hidden = kwargs["hidden_states"]
        implementation = self.config._attn_implementation
        if implementation not in (None, "eager", "sdpa", GATHER):
            raise ValueError(
                f'the choice of heads is a mask for each head, which attn_implementation="{implementation}" cannot '
                f'take; load the model with "sdpa", "eager" or "{GATHER}".'
            )
        site, (heads, key_heads) = self.moe_gate.moe_site, self.moe_heads
        record = self.route_heads((), kwargs)
        (batch, length), experts = hidden.shape[:2], site.num_experts
        index = record.index.clamp(max=experts)
        used = torch.zeros(len(index), experts + 1, dtype=torch.bool, device=index.device).scatter(1, index, True)
        chosen = used[:, :-1].view(batch, length, -1).transpose(1, 2).repeat_interleave(key_heads // experts, dim=1)
        name = next((name for name, value in kwargs.items() if isinstance(value, Cache)), None)
        if implementation == GATHER:
            carry = self._carry()
            carry[self.moe_order, "queries"] = carry[self.moe_order, "keys"] = chosen

            def remember(keys: torch.Tensor) -> None:
                carry[self.moe_order, "keys"] = ~keys

            if name is not None:
                kwargs[name] = SelectingCache(kwargs[name], chosen, remember)
            return super().forward(**kwargs)
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
        return super().forward(**kwargs)

    def _carry(self) -> dict[tuple[int, str], torch.Tensor]:
        context = self.moe_link.slots.layer_context
        assert context is not None
        return context.at(self.moe_gate.moe_site).carry

    def take_choice(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which queries (B, key heads, S) and keys (B, key heads, T) chose each head, in this forward."""
        carry = self._carry()
        return carry.pop((self.moe_order, "queries")), carry.pop((self.moe_order, "keys"))


def gathered_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention interface of Transformers, with each head among the tokens that chose it.

    The tokens of a head are gathered in their order and padded to the largest number of any head, m: m * m products in
    place of S * S. Single new tokens have nothing to gain and are masked. In a layer whose heads are not chosen, this
    is PyTorch's attention.

    Args:
        module: the attention module.
        query: (B, h, S, d).
        key, value: (B, h_kv, T, d).
        attention_mask: (B or 1, h or 1, S, T), boolean (true: is seen) or added to the logits. `None` means that all
            keys are seen, or where the attention is causal those that are not later, the first query being the first
            token, as PyTorch has it.
        scaling: factor on the logits; `None` means `d ** -0.5`.
        dropout: probability of leaving a weight out.

    Returns:
        (B, S, h, d), of use where a token chose the head; and `None`.

    Raises:
        ValueError: for what PyTorch's attention does not have.
    """
    if not isinstance(module, UnionAttentionModule):
        stock: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found: tuple[torch.Tensor, None] = stock(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return found
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f'attn_implementation="{GATHER}" has no `{unknown[0]}`, which this model uses; use "eager".')
    (batch, heads, length, size), (key_heads, total) = query.shape, key.shape[1:3]
    group = heads // key_heads
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    # (B, h_kv, group, ...) from here on.
    query, key, value = query.unflatten(1, (key_heads, group)), key[:, :, None], value[:, :, None]
    mask = None
    if attention_mask is not None:
        mask = attention_mask[..., :total]
        mask = mask.unflatten(1, (key_heads, group)) if mask.shape[1] == heads > 1 else mask[:, None]
    queries, keys = module.take_choice()
    if length == 1:
        out = _attend(query, key, value, _both(mask, keys[:, :, None, None]), False, options)
    else:
        rows, real = _places(queries)
        columns, real = (rows, real) if keys is queries else _places(keys)
        picked = torch.take_along_dim(query, rows[:, :, None, :, None], dim=3)
        key, value = (torch.take_along_dim(x, columns[:, :, None, :, None], dim=3) for x in (key, value))
        if mask is not None:
            mask = mask.expand(-1, key_heads, -1, length, -1) if mask.shape[1] == 1 else mask
            mask = torch.take_along_dim(mask.expand(batch, *mask.shape[1:]), rows[:, :, None, :, None], dim=3)
            mask = torch.take_along_dim(mask, columns[:, :, None, None], dim=4)
        # Gathered in order, what is causal among all tokens is causal among these; padding stands behind.
        if mask is not None or not module.moe_causal:
            mask = _both(mask, real[:, :, None, None])
        gathered = _attend(picked, key, value, mask, mask is None, options)
        # Places of padding are those of tokens that did not choose the head, each once; nothing takes them.
        out = torch.zeros(*gathered.shape[:3], length, size, dtype=gathered.dtype, device=gathered.device)
        out = out.scatter(3, rows[:, :, None, :, None].expand_as(gathered), gathered)
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None


def _places(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places (B, h_kv, m) of the tokens that chose a head, in order, then others up to the largest number m; and which
    of them are real. `chosen` is (B, h_kv, S)."""
    counts = chosen.sum(-1, keepdim=True)
    largest = max(int(counts.max()), 1)
    order = (~chosen).to(torch.int8).argsort(dim=-1, stable=True)[..., :largest]
    return order, torch.arange(largest, device=chosen.device) < counts


def _both(mask: torch.Tensor | None, seen: torch.Tensor) -> torch.Tensor:
    """A mask, boolean or added, that hides what `seen` says besides."""
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    options: dict[str, Any],
) -> torch.Tensor:
    """PyTorch's attention over (B, h_kv, group, S, d), with keys and values of one group."""
    if mask is not None and mask.dtype == torch.bool:
        mask = mask | ~mask.any(dim=-1, keepdim=True)  # a row without a key, whose output nothing takes, is no NaN
    shape = query.shape
    query, key, value = (x.expand(*shape[:3], *x.shape[3:]).flatten(0, 1) for x in (query, key, value))
    if mask is not None:
        mask = mask.expand(*shape[:3], shape[3], mask.shape[-1]).flatten(0, 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, **options)
    return out.unflatten(0, shape[:2])


ALL_ATTENTION_FUNCTIONS.register(GATHER, gathered_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(GATHER, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


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
