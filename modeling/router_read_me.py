"""Read-ME: a small causal transformer in front of the model chooses every token's experts, for all layers at once."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_install import Reference, add_child
from .moe_parts import PartModule
from .moe_router import MoERouter, RouterSite, register_router


PRE_ROUTER_NAME = "moe_read_me"
# Key in a context's carry of the logits (B, S, N) of all layers.
_LOGITS = (-1, "read_me_logits")


@dataclass
class ReadMeRouterConfig(RouterConfig):
    """Config of `ReadMeRouter`. The sizes are those of the paper (2410.19123), 18.0M parameters with 32,000 tokens.

    > Parameters of the pre-router

    Args:
        dim (`int`, *optional*, defaults to 512):
            Width of the pre-router.
        num_layers (`int`, *optional*, defaults to 1):
            Its transformer blocks.
        num_heads (`int`, *optional*, defaults to 4):
            Heads of its attention; they divide `dim` into even parts.
        intermediate_size (`int`, *optional*):
            Width of its feed-forward blocks, `None` for `dim`.
        vocab_size (`int`, *optional*):
            Token ids that it knows, `None` for those of the model.
        rope_theta (`float`, *optional*, defaults to 10000.0):
            Base of its rotary position embeddings.
        scale_attention (`bool`, *optional*, defaults to `True`):
            Whether attention logits are divided by the root of a head's width. The authors' code does not.
        norm_eps (`float`, *optional*, defaults to 1e-6):
            Added to the mean square inside its norms.
        embedding (`"backbone"` or `"random"`, *optional*, defaults to `"backbone"`):
            How its token embedding starts: with the first columns of the model's, or at random.
        init_std (`float`, *optional*, defaults to 0.02):
            Standard deviation of random initial weights. Biases start at zero.
        dense_width (`int`, *optional*):
            Width of the dense blocks that the experts are slices of. The pre-router then remembers which neurons each
            expert has, for its distillation. Set by the upcycling method `read_me`.

    > Parameters that control the selection

    Args:
        num_experts_per_tok (`int`, *optional*):
            Experts per token (k), `None` for the site's number.
        weights (`"one"`, `"gate"` or `"renormalized"`, *optional*, defaults to `"one"`):
            Weight of a chosen expert: 1, as in the authors' code; its probability, as in the paper's formula; or its
            probability divided by those of all chosen experts. With 1, the language-modelling loss gives the router
            no gradient.
    """

    dim: int = 512
    num_layers: int = 1
    num_heads: int = 4
    intermediate_size: int | None = None
    vocab_size: int | None = None
    rope_theta: float = 10000.0
    scale_attention: bool = True
    norm_eps: float = 1e-6
    embedding: Literal["backbone", "random"] = "backbone"
    init_std: float = 0.02
    dense_width: int | None = None
    num_experts_per_tok: int | None = None
    weights: Literal["one", "gate", "renormalized"] = "one"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "dim",
            "num_layers",
            "num_heads",
            "intermediate_size",
            "vocab_size",
            "dense_width",
            "num_experts_per_tok",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"`num_heads` ({self.num_heads}) must divide `dim` ({self.dim}) into heads of an even width, which "
                "rotary position embeddings turn in pairs."
            )


class RouterStates(DynamicLayer):
    """Keys and values of one block of the pre-router: one more layer in the model's own cache, so that whatever is
    done to the cache (reordered, cropped, repeated, selected from) is done to it."""


class StaticRouterStates(StaticLayer):
    """The same in a cache of fixed length."""


class _Norm(nn.Module):
    """RMSNorm in float32."""

    def __init__(self, dim: int, eps: float, **place: Any) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim, **place)), eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        return (self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps))).to(hidden.dtype)


class _Block(nn.Module):
    """One transformer block: causal attention and a feed-forward block with one projection up, both with biases."""

    def __init__(self, config: ReadMeRouterConfig, **place: Any) -> None:
        super().__init__()
        dim, inner = config.dim, config.intermediate_size or config.dim
        self.num_heads = config.num_heads
        self.scale = (dim // config.num_heads) ** -0.5 if config.scale_attention else 1.0
        self.attention_norm, self.feed_forward_norm = (_Norm(dim, config.norm_eps, **place) for _ in range(2))
        self.query_key_value, self.output = nn.Linear(dim, 3 * dim, **place), nn.Linear(dim, dim, **place)
        self.up, self.down = nn.Linear(dim, inner, **place), nn.Linear(inner, dim, **place)

    def forward(
        self, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor, states: Any
    ) -> torch.Tensor:
        parts = self.query_key_value(self.attention_norm(hidden)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        if states is not None:
            key, value = states.update(key, value)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        hidden = hidden + self.output(mixed.transpose(1, 2).flatten(-2))
        return hidden + self.down(F.silu(self.up(self.feed_forward_norm(hidden))))


class PreRouter(PartModule):
    """The router itself: token ids -> logits of the experts. It hangs once on the base model.

    Args:
        config (`ReadMeRouterConfig`): of all its layers.
        num_choices (`int`): N, the number of experts.
        base (`nn.Module`): the base model, whose embedding it starts with.
        keys (`list[str]`): the layers that it decides for.
        device, dtype: of the parameters.

    Buffers: `neurons` (layers, N, dense width), true where an expert has a neuron of the dense block, if the config
    tells the dense width.
    """

    neurons: torch.Tensor

    def __init__(
        self, config: ReadMeRouterConfig, num_choices: int, base: nn.Module, keys: list[str], **place: Any
    ) -> None:
        super().__init__()
        self.config, self.keys, self.base = config, keys, Reference(base)
        self.embed = nn.Embedding(config.vocab_size or len(_embedding(base)), config.dim, **place)
        self.blocks = nn.ModuleList(_Block(config, **place) for _ in range(config.num_layers))
        self.norm = _Norm(config.dim, config.norm_eps, **place)
        self.head = nn.Linear(config.dim, num_choices, bias=False, **place)
        if config.dense_width is not None:
            shape = len(keys), num_choices, config.dense_width
            self.register_buffer("neurons", torch.empty(*shape, dtype=torch.bool, device=place.get("device")))

    def init_weights(self, std: float) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                init.zeros_(parameter)
            elif "norm" in name:
                init.ones_(parameter)
            elif name == "embed.weight":
                init.copy_(parameter, self._first_embedding())
            else:
                init.normal_(parameter, mean=0.0, std=self.config.init_std)
        if "neurons" in self._buffers:
            init.zeros_(self.neurons)

    def _first_embedding(self) -> torch.Tensor:
        """(V, dim): the first columns of the backbone's embedding, and random numbers where it has no more."""
        own = self.embed.weight
        values = torch.empty_like(own).normal_(std=self.config.init_std)
        if self.config.embedding == "random":
            return values
        source = _embedding(self.base.module).detach()
        if source.is_meta and not own.is_meta:
            raise ValueError(
                "the `read_me` router starts with the embedding of the model, which is not in memory here. Load the "
                'model and use `upcycle`, or set `embedding="random"`.'
            )
        rows, columns = min(len(source), len(own)), min(source.shape[1], own.shape[1])
        values[:rows, :columns] = source[:rows, :columns].to(values)
        return values

    @torch.no_grad()
    def resize_vocabulary(self, size: int) -> None:
        """Follow the model's embedding, unless the config says how many ids there are. New rows start as others do."""
        if self.config.vocab_size is not None or size == len(self.embed.weight):
            return
        old = self.embed
        self.embed = nn.Embedding(size, self.config.dim, device=old.weight.device, dtype=old.weight.dtype)
        self.embed.weight.copy_(self._first_embedding())
        self.embed.weight[: len(old.weight)] = old.weight[:size]
        self.embed.weight.requires_grad_(old.weight.requires_grad)

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, states: list[Any] | None = None
    ) -> torch.Tensor:
        """Logits (B, S, N) in float32.

        Args:
            ids: (B, S) token ids.
            positions: (B, S) their places in their sequences.
            mask: (B, 1, S, past + S), true where a token may look.
            states: keys and values of earlier tokens, one layer of a cache for each block; those of these tokens are
                added.
        """
        hidden = self.embed(ids)
        width = self.config.dim // self.config.num_heads
        rates = self.config.rope_theta ** -(torch.arange(0, width, 2, device=ids.device).float() / width)
        angles = (positions[:, None, :, None] * rates).repeat(1, 1, 1, 2)  # (B, 1, S, width)
        rotation = angles.cos(), angles.sin()
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, rotation, mask, None if states is None else states[number])
        return self.head(self.norm(hidden)).float()

    def decide(self, context: RoutingContext, cache: Cache | None) -> torch.Tensor:
        """Logits (B, S, N) of the tokens of a forward, from its context and the model's cache.

        Raises:
            ValueError: without token ids, or with a cache or a mask that does not go with them.
        """
        ids = context.input_ids
        if ids is None or ids.dim() != 2:
            raise ValueError(
                "the `read_me` router reads token ids; call the model with `input_ids` (not `inputs_embeds`, images "
                "or sound alone)."
            )
        ids = ids.to(self.embed.weight.device)
        last = len(self.embed.weight) - 1
        if not torch.compiler.is_compiling() and ids.device.type == "cpu" and ids.numel():
            if ids.min() < 0 or ids.max() > last:
                raise ValueError(
                    f"the `read_me` router knows the token ids 0 to {last}, `input_ids` has {ids.min()} to "
                    f"{ids.max()}."
                )
        states: list[Any] | None = None
        past: Any = 0
        backbone = self.base.module.config.num_hidden_layers if cache is not None else 0
        if cache is not None:
            states = _states(cache, len(self.blocks), backbone)
            past = states[0].get_seq_length()
            past = past.clone() if isinstance(past, torch.Tensor) else past  # a static cache counts on in place
        total = getattr(states[0], "max_cache_len", None) if states else None
        windowed = cache is not None and all(
            getattr(layer, "is_sliding", False) for layer in _layers(cache)[:backbone]
        )
        mask = visible_tokens(context, ids, past, past + ids.shape[1] if total is None else total, windowed)
        return self(ids, context.positions(ids.numel(), ids.device), mask, states)


def visible_tokens(
    context: RoutingContext, ids: torch.Tensor, past: Any, total: int, windowed: bool = False
) -> torch.Tensor:
    """(B, 1, S, total) bool, true where a token of this forward may look: at itself and at what came before in its
    sequence, without padding.

    Args:
        context: with the model's attention mask: (B, past + S), or (B, 1, S, total) as a static cache has it.
        ids: (B, S).
        past: tokens in the cache.
        total: tokens that the cache has room for; without a limit, those that it has after this forward.
        windowed: whether the model's own mask, where it has four dimensions, leaves out what is outside of a window.

    Raises:
        ValueError: for a mask of another form.
    """
    (batch, length), device = ids.shape, ids.device
    place, keys = past + torch.arange(length, device=device), torch.arange(total, device=device)
    seen, own = keys <= place[:, None], keys == place[:, None]  # (S, total)
    mask = context.attention_mask
    if isinstance(mask, dict):  # by kind of layer
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        positions = context.position_ids
        if isinstance(past, int) and past == 0 and isinstance(positions, torch.Tensor) and total == length:
            if positions.shape[-1] == length and positions.dim() == 2:  # sequences packed one after another
                steps = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0)).cumsum(dim=-1).to(device)
                return (seen & (steps[:, None, :, None] == steps[:, None, None, :])).expand(batch, -1, -1, -1)
        return seen.expand(batch, 1, length, total)
    mask = mask.to(device) if isinstance(mask, torch.Tensor) else mask
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        if isinstance(past, int) and mask.shape[1] != past + length and total == past + length:
            raise ValueError(
                f"the attention mask has {mask.shape[1]} columns, but the `read_me` router has seen {past} tokens "
                f"before these {length}. A cache has to come from this model, and the mask has to cover all tokens."
            )
        real = F.pad(mask[:, :total] != 0, (0, max(total - mask.shape[1], 0)))
        return seen & real[:, None, None, :] | own
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[-2:] == (length, total):
        allowed = mask if mask.dtype == torch.bool else mask >= 0
        if windowed:  # what anyone sees is no padding
            allowed = allowed.any(dim=-2, keepdim=True)
        return (seen & allowed[:, :1] | own).expand(batch, -1, -1, -1)
    found = f"one of the shape {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
    raise ValueError(
        f"the `read_me` router needs an attention mask of the shape [batch, tokens] or [batch, 1, {length}, {total}], "
        f"got {found}."
    )


def _embedding(base: nn.Module) -> torch.Tensor:
    """The token embedding (V, H) of a base model."""
    weight = getattr(base.get_input_embeddings(), "weight", None) if isinstance(base, PreTrainedModel) else None
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise ValueError(f"the `read_me` router reads token ids, and {type(base).__name__} has no embedding of them.")
    return weight


def _rotate(states: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary position embedding of (B, heads, S, width), halves against each other."""
    cos, sin = rotation
    first, second = states.float().chunk(2, dim=-1)
    return (states.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(states.dtype)


def _layers(cache: Any) -> list[Any]:
    """The layers of a decoder's self-attention."""
    return getattr(cache, "self_attention_cache", cache).layers


def _states(cache: Any, count: int, backbone: int) -> list[Any]:
    """The pre-router's layers of the model's cache, behind those of the model; made when there are none yet."""
    layers = _layers(cache)
    found = [layer for layer in layers if isinstance(layer, (RouterStates, StaticRouterStates))]
    if found:
        return found
    replicated = getattr(cache, "layer_class_to_replicate", None)
    while replicated is not None and len(layers) < backbone:  # a cache that would grow into the place
        layers.append(replicated())
    if layers and all(type(layer) is StaticLayer for layer in layers):
        layers.extend(StaticRouterStates(layers[0].max_cache_len) for _ in range(count))
    else:
        layers.extend(RouterStates() for _ in range(count))
    return layers[-count:]


def _counts_its_own_way(base: nn.Module) -> bool:
    """Whether the architecture comes with a cache that is not as long as its list of layers."""
    modules = [vars(sys.modules[cls.__module__]) for cls in type(base).__mro__ if cls.__module__ in sys.modules]
    kinds = {kind for module in modules for kind in module.values() if isinstance(kind, type)}
    own = kinds - {Cache, EncoderDecoderCache}
    return any(issubclass(kind, Cache) and "__len__" in vars(kind) for kind in own)


@register_router("read_me")
class ReadMeRouter(MoERouter):
    """One decision for all layers, made from the token ids before the first of them.

    "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design" (2410.19123). A causal
    transformer of one block reads the tokens so far and gives the logits of the experts; every layer takes the k best.
    So a serving system knows which experts a token needs before it computes. The pre-router hangs on the base model
    under `moe_read_me`; its keys and values are in the model's cache. The stock gates are not used.
    """

    config_class = ReadMeRouterConfig
    paper = "Read-ME (2410.19123)"
    needs = "token ids, and a pre-router shared by all layers"
    crosses_layers = True
    own_logits = True
    moe_config: ReadMeRouterConfig
    moe_base: Reference

    @classmethod
    def identity_config(cls, site: RouterSite) -> RouterConfig:
        raise NotImplementedError("a router of token ids does not look at hidden states, as a stock gate does.")

    @classmethod
    def check(cls, config: ReadMeRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        if (config.num_experts_per_tok or 1) > site.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` ({config.num_experts_per_tok}) exceeds the {site.num_experts} experts of "
                f'layer "{site.key}".'
            )
        if site.attention:
            raise ValueError("the `read_me` router decides before attention runs, and only for feed-forward experts.")
        if site.zero_experts is not None:
            raise ValueError(
                "the `read_me` router chooses among slices of a dense block, one path through all layers; remove "
                "`zero_experts`."
            )

    @classmethod
    def check_stack(cls, members: list[tuple[Any, RouterSite]]) -> None:
        """One decision is carried out by all layers, wherever they stand, so they must agree."""
        (first, site), *others = members
        for config, other in others:
            if config != first:
                raise ValueError(
                    f'layers "{site.key}" and "{other.key}" share one `read_me` router, so their configs must be '
                    f"equal, got {first} and {config}."
                )
            if other.num_experts != site.num_experts:
                raise ValueError(
                    f'layers "{site.key}" and "{other.key}" share one `read_me` router, so they must have as many '
                    f"experts, got {site.num_experts} and {other.num_experts}."
                )

    @classmethod
    def setup_stack(cls, base: nn.Module, routers: list[Any]) -> None:
        if _counts_its_own_way(base):
            raise ValueError(
                f"the cache of {type(base).__name__} counts its layers in a way of its own, so the keys and values of "
                "the `read_me` router cannot be among them."
            )
        first, keys = routers[0], [router.moe_site.key for router in routers]
        weight = next(first.parameters())
        place = {"device": weight.device, "dtype": weight.dtype}
        add_child(base, PRE_ROUTER_NAME, PreRouter(first.moe_config, first.moe_site.num_experts, base, keys, **place))
        for router in routers:
            router.moe_base = Reference(base)
            router.moe_attributes = (*router.moe_attributes, "moe_base")

    def setup(self) -> None:
        self.freeze_stock()

    @property
    def pre_router(self) -> PreRouter:
        """The module that decides, shared by all layers of the stack."""
        return getattr(self.moe_base.module, PRE_ROUTER_NAME)

    def before_layer(self, context: RoutingContext, cache: Any) -> None:
        if _LOGITS not in context.carry:  # the first of the layers decides for all
            context.carry[_LOGITS] = self.pre_router.decide(context, cache)

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        decided = None if context is None else context.carry.get(_LOGITS)
        if decided is None or decided.shape[:2].numel() != len(hidden):
            found = "alone" if decided is None else f"with {decided.shape[:2].numel()} ids for {len(hidden)} states"
            raise ValueError(
                f'the `read_me` router of layer "{self.moe_site.key}" decides from the token ids before the first '
                f"layer runs, and this layer was called {found}; call the model with `input_ids`."
            )
        config = self.moe_config
        logits = decided.flatten(0, 1).to(hidden.device)  # (T, N)
        scores = logits.softmax(dim=-1)
        weights, index = scores.topk(self.num_slots(config, self.moe_site), dim=-1)
        if config.weights == "one":
            weights = torch.ones_like(weights)
        elif config.weights == "renormalized":
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = self.final_weights(weights, index, None)
        return RouteRecord(logits, scores, weights, index, config, decision="read_me")
