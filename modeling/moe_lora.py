"""Low-rank adapters as experts on the linear layers of a frozen model: `W x + sum_i g_i s_i B_i A_i x`.

MixLoRA (2404.15159), LoRAMoE (2312.09979), MoLA (2402.08562) and mixtures of given adapters (2408.15915) are settings
of it. The adapters of a linear layer are stacked in a child `moe_lora`; routers are those of the zoo, on a gate
`moe_lora_gate` of the linear layer or of its block. All that is computed stays on the side of the activations: B A is
never made, and all experts of a layer are two products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from .configuration_moe_ext import LoraExpertsConfig, RouterConfig, lora_scale
from .moe_attention import install_router
from .moe_context import RoutingContext, RoutingLink
from .moe_experts import MoeExtGate
from .moe_families import DenseSpec, Family, MoeSpec, get_by_path, has_path
from .moe_install import _installed_class, add_child, freeze, install
from .moe_parts import PartModule
from .moe_router import GateRule, MoERouter, RouterSite, get_router
from .router_top_k import TopKRouterConfig


STACK, GATE = "moe_lora", "moe_lora_gate"
UNROUTED = ""  # name of the one adapter of a layer without a router


class AdapterModule(PartModule):
    """What is trained where a model carries adapters."""


class LoraStack(AdapterModule):
    """The adapters of one linear layer.

    Parameters: `A` (N, r, in) and `B` (N, r, out), with r the largest rank; smaller ones are filled up with zeros,
    whose gradients are zero.

    Args:
        names (`tuple[str, ...]`): of the experts; `("",)` for one adapter without a router.
        ranks (`tuple[int, ...]`): of the experts.
        scales (`tuple[float, ...]`): factors on `B A`.
        in_features, out_features (`int`): of the linear layer.
        dropout (`float`): on the input, in training.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        ranks: tuple[int, ...],
        scales: tuple[float, ...],
        in_features: int,
        out_features: int,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.names, self.ranks, self.scales, self.dropout = names, ranks, scales, dropout
        self.in_features, self.out_features = in_features, out_features
        sizes = (len(names), max(ranks))
        self.A = nn.Parameter(torch.empty(*sizes, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(*sizes, out_features, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"experts={len(self.names)}, ranks={self.ranks}, {self.in_features} -> {self.out_features}"

    def init_weights(self, std: float) -> None:
        """As in PEFT: A uniform within `1 / sqrt(in)`, B zero."""
        bound = self.in_features**-0.5
        used = torch.arange(max(self.ranks), device=self.A.device) < torch.tensor(
            self.ranks, device=self.A.device
        ).unsqueeze(1)
        if not getattr(self.A, "_is_hf_initialized", False):
            init.copy_(self.A, torch.empty_like(self.A).uniform_(-bound, bound) * used[:, :, None])
        init.zeros_(self.B)

    def low(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., N, r): what all A give."""
        x = F.dropout(x.to(self.A.dtype), self.dropout, self.training)
        return F.linear(x, self.A.flatten(0, 1)).unflatten(-1, self.A.shape[:2])

    def high(self, low: torch.Tensor) -> torch.Tensor:
        """(..., N, r) -> (..., out): what all B give, times the factors, summed over the experts."""
        if len(set(self.scales)) == 1:
            low = low * self.scales[0]
        else:
            low = low * torch.tensor(self.scales, device=low.device, dtype=low.dtype)[:, None]
        return low.flatten(-2) @ self.B.flatten(0, 1)

    def forward(self, x: torch.Tensor, gates: torch.Tensor | None = None) -> torch.Tensor:
        """`sum_i g_i s_i B_i A_i x`: (..., in) -> (..., out), with gates (..., N); `None` for one expert of gate 1."""
        low = self.low(x)
        return self.high(low if gates is None else low * gates.to(low.dtype)[..., None])

    def delta(self, expert: int) -> torch.Tensor:
        """`s B A` of one expert in float32, (out, in)."""
        return self.scales[expert] * (self.B[expert].float().T @ self.A[expert].float())


# --- routing ---


def context_of(link: RoutingLink, site: RouterSite) -> RoutingContext:
    """The context of a router of adapters in the running forward.

    Raises:
        ValueError: outside of a forward of the model.
    """
    context = link.slots.layer_context
    if context is None:
        raise ValueError("routed adapters run only inside a forward of their model.")
    return context.at(site)


def expert_gates(owner: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask the router of `owner` for the weights (T, K) and the ids (T, K) of the experts of the tokens `hidden`.

    Where only some adapters are active, the router's scores are restricted to them; one alone has the weight 1.
    """
    names, active = owner.moe_names, owner.moe_link.active_adapters
    tokens, count = hidden.reshape(-1, hidden.shape[-1]), len(names)
    chosen = [i for i, name in enumerate(names) if active is None or name in active]
    if len(chosen) < 2 and active is not None:
        weights = torch.full((len(tokens), 1), float(len(chosen)), device=hidden.device)
        index = torch.full((len(tokens), 1), chosen[0] if chosen else count, device=hidden.device)
        return weights, index
    gate: Any = owner.moe_lora_gate
    seen = router_input(owner.moe_routing, tokens, gate.moe_site, owner.moe_link)
    record = gate.decide(seen.to(next(gate.parameters()).dtype))
    if active is None:
        return record.weights, record.index
    scores = record.scores[:, chosen]
    slots = min(record.index.shape[-1], len(chosen))
    weights, index = scores.topk(slots, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return weights, torch.tensor(chosen, device=index.device)[index]


def dense_gates(weights: torch.Tensor, index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(T, K) weights and ids to (T, N) gates; ids of N and above are nobody."""
    gates = weights.new_zeros(len(index), num_experts + 1)
    return gates.scatter_add(1, index.clamp(max=num_experts), weights)[:, :-1]


def router_input(routing: str, tokens: torch.Tensor, site: RouterSite, link: RoutingLink) -> torch.Tensor:
    """What the router looks at, (T, C): the tokens, the means of their sequences so far, or the task as one-hot.

    Raises:
        ValueError: where it is not known of which sequence or task the tokens are.
    """
    if routing == "token":
        return tokens
    context = context_of(link, site)
    batch = context.batch_size or 1
    if len(tokens) % batch:
        raise ValueError(f"it is not known to which of {batch} sequences the {len(tokens)} tokens of a layer belong.")
    if routing == "sequence":
        return sequence_means(tokens, context, batch, site.key)
    tasks = context.task_ids
    if tasks is None:
        raise ValueError(
            'adapters with `routing="task"` need the task of each row: pass `task_ids` (B,) to the forward, or run '
            "it inside `route_tasks(model, task_ids)`."
        )
    tasks = torch.as_tensor(tasks, device=tokens.device).long()
    if tasks.dim() == 0 or len(tasks) != batch:
        if tasks.numel() == 0 or batch % tasks.numel():
            raise ValueError(f"`task_ids` names the tasks of {tasks.numel()} rows, but this forward has {batch}.")
        tasks = tasks.reshape(-1).repeat_interleave(batch // tasks.numel())  # beams of a row follow each other
    if not torch.compiler.is_compiling() and not (0 <= int(tasks.min()) and int(tasks.max()) < site.hidden_size):
        raise ValueError(f"`task_ids` must be from 0 to {site.hidden_size - 1}, got {tasks.tolist()}.")
    return F.one_hot(tasks, site.hidden_size).to(tokens).repeat_interleave(len(tokens) // batch, dim=0)


def sequence_means(tokens: torch.Tensor, context: RoutingContext, batch: int, key: str) -> torch.Tensor:
    """Mean of the real tokens of a sequence up to each token: (T, C) -> (T, C). What a cache has seen counts."""
    rows = tokens.float().unflatten(0, (batch, -1))
    mask = context.token_mask(len(tokens))
    real = rows.new_ones(rows.shape[:2]) if mask is None else mask.to(rows.device).view(batch, -1).float()
    sums, counts = (rows * real[..., None]).cumsum(dim=1), real.cumsum(dim=1)
    cache = context.sequences
    if cache is not None:
        if key in cache.moe_sequences:
            before, count = cache.moe_sequences[key]
            sums, counts = sums + before[:, None], counts + count[:, None]
        cache.moe_sequences[key] = sums[:, -1].detach(), counts[:, -1].detach()
    return (sums / counts.clamp_min(1)[..., None]).flatten(0, 1).to(tokens)


class RememberingCache:
    """Installed in front of a cache class: keeps what routers have seen of the sequences, (B, C) and (B,) by key."""

    moe_sequences: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def _moe_select(self, rows: Any) -> None:
        self.moe_sequences = {
            key: (sums[rows.to(sums.device)], counts[rows.to(counts.device)])
            for key, (sums, counts) in self.moe_sequences.items()
        }

    def reorder_cache(self, beam_idx: torch.Tensor) -> Any:
        """As in Transformers."""
        self._moe_select(beam_idx)
        return super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_select_indices(self, indices: torch.Tensor) -> Any:
        """As in Transformers."""
        self._moe_select(indices)
        return super().batch_select_indices(indices)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> Any:
        """As in Transformers."""
        self.moe_sequences = {
            key: (sums.repeat_interleave(repeats, 0), counts.repeat_interleave(repeats, 0))
            for key, (sums, counts) in self.moe_sequences.items()
        }
        return super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def reset(self) -> Any:
        """As in Transformers."""
        self.moe_sequences = {}
        return super().reset()  # type: ignore[misc]

    def crop(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: a mean cannot be taken back.

        Raises:
            ValueError: always.
        """
        raise ValueError('a cache of adapters with `routing="sequence"` cannot be cropped, as assisted decoding does.')


def remember_sequences(cache: Any, *, given: bool = False) -> Any:
    """Let a cache remember what routers have seen; `None` stays `None`.

    Args:
        given: whether the caller of the model brought it.

    Raises:
        ValueError: for one that was filled when no router looked.
    """
    if cache is not None and not isinstance(cache, RememberingCache):
        if given and cache.get_seq_length():
            raise ValueError(
                'adapters with `routing="sequence"` keep the mean of a sequence with its cache, and this cache was '
                "filled without them. Start with an empty one."
            )
        stock: Any = type(cache)
        cache.__class__ = _installed_class(RememberingCache, stock, stock.__name__)
        cache.moe_sequences = {}
    return cache


# --- what stands in front of stock modules ---


class LoraLinear(nn.Module):
    """Installed in front of a linear layer: adds what its adapters give.

    `moe_gated` is `"own"` (a router of its own), `"block"` (gates that the block left), or `"none"` (one adapter).
    """

    moe_lora: LoraStack
    moe_link: RoutingLink
    moe_gated: str
    moe_site: RouterSite | None
    moe_names: tuple[str, ...]
    moe_routing: str

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = super().forward(x, *args, **kwargs)
        if not self.moe_link.adapters_enabled:
            return out
        stack = self.moe_lora
        if self.moe_gated == "none":
            active = self.moe_link.active_adapters
            if active is not None and stack.names != (UNROUTED,) and stack.names[0] not in active:
                return out
            return out + stack(x).to(out.dtype)
        if self.moe_gated == "own":
            gates = dense_gates(*expert_gates(self, x), len(stack.names))
        else:
            assert self.moe_site is not None
            gates = context_of(self.moe_link, self.moe_site).carry[self.moe_site.order, "gates"]
        return out + stack(x, gates.view(*x.shape[:-1], -1)).to(out.dtype)


class LoraBlock(nn.Module):
    """Installed in front of a feed-forward block or an attention: one router for the linear layers in it."""

    moe_lora_gate: MoERouter
    moe_link: RoutingLink
    moe_names: tuple[str, ...]
    moe_routing: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.moe_link.adapters_enabled:
            hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            site = self.moe_lora_gate.moe_site
            gates = dense_gates(*expert_gates(self, hidden), len(self.moe_names))
            context_of(self.moe_link, site).carry[site.order, "gates"] = gates
        return super().forward(*args, **kwargs)


class SharedBaseFfn(nn.Module):
    """Installed in front of a dense feed-forward block whose experts are the block with adapters (MixLoRA).

    The frozen projections in front of the activation are computed once for a token, and the one behind it once for the
    weighted sum of the experts, which is the same since it is linear.
    """

    moe_lora_gate: MoERouter
    moe_link: RoutingLink
    moe_names: tuple[str, ...]
    moe_routing: str
    moe_roles: dict[str, str]
    moe_activation: str
    moe_dropouts: tuple[str | None, str | None]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.moe_link.adapters_enabled:
            out: torch.Tensor = super().forward(hidden_states, *args, **kwargs)
            return out
        weights, index = expert_gates(self, hidden_states)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.mix(flat, weights, index).reshape(*hidden_states.shape[:-1], -1)

    def mix(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """(T, H), (T, K), (T, K) -> (T, H): the weighted sum of the experts' outputs."""
        linears = {role: get_by_path(self, path) for role, path in self.moe_roles.items()}
        chosen = F.one_hot(index, len(self.moe_names) + 1)[..., :-1]  # (T, K, N)
        inner = {role: self._project(linears[role], x, chosen) for role in linears if role != "down"}
        middle = _activated(inner, get_by_path(self, self.moe_activation))  # (T, K, I)
        middle = _dropped(self, self.moe_dropouts[0], middle)
        weights = weights.to(middle.dtype)
        down = linears["down"]
        out: torch.Tensor = down((weights[..., None] * middle).sum(dim=1))
        bias = getattr(down, "bias", None)
        if bias is not None:
            out = out + (weights.sum(dim=1, keepdim=True) - 1) * bias
        stack = getattr(down, STACK, None)
        if stack is not None:
            low = stack.low(middle) * (weights[..., None] * chosen)[..., None].to(stack.A.dtype)
            out = out + stack.high(low.sum(dim=1)).to(out.dtype)
        return _dropped(self, self.moe_dropouts[1], out)

    def _project(self, linear: nn.Module, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """(T, H) -> (T, K, out): the frozen projection, once, and what the adapters of each slot add."""
        out: torch.Tensor = linear(x)[:, None]
        stack = getattr(linear, STACK, None)
        if stack is None:
            return out.expand(-1, chosen.shape[1], -1)
        low = stack.low(x)[:, None] * chosen[..., None].to(stack.A.dtype)
        return out + stack.high(low).to(out.dtype)


def _activated(inner: dict[str, torch.Tensor], activation: Any) -> torch.Tensor:
    if "fused" in inner:
        gate, up = inner["fused"].chunk(2, dim=-1)
        return up * activation(gate)
    return activation(inner["gate"]) * inner["up"] if "gate" in inner else activation(inner["up"])


def _dropped(block: nn.Module, path: str | None, x: torch.Tensor) -> torch.Tensor:
    if path is None or not has_path(block, path):
        return x
    dropout = get_by_path(block, path)
    return F.dropout(x, dropout, block.training) if isinstance(dropout, float) else dropout(x)


# --- plans ---


@dataclass(frozen=True)
class LoraTarget:
    """A linear layer that gets adapters.

    Attributes:
        path: on the decoder layer.
        block: path of the block whose router it follows, `""` for a router of its own.
        routed: whether it has experts, or one adapter.
        stack: arguments of its `LoraStack`.
        site: where its router stands, if it has one of its own or follows one.
    """

    path: str
    block: str
    routed: bool
    stack: dict[str, Any]
    site: RouterSite | None


@dataclass(frozen=True)
class LoraPlan:
    """What will be done to the linear layers of one decoder layer.

    Attributes:
        key: key of the layer.
        layer: the decoder layer.
        config: the declaration.
        names: of its experts.
        targets: its linear layers.
        blocks: the sites of routers of whole blocks, by path.
        shared: record of the dense block where that is the experts' shared base.
        missing: names of modules that the layer does not have.
    """

    key: str
    layer: nn.Module
    config: LoraExpertsConfig
    names: tuple[str, ...]
    targets: tuple[LoraTarget, ...]
    blocks: dict[str, RouterSite]
    shared: DenseSpec | None
    missing: frozenset[str]

    @property
    def router(self) -> RouterConfig:
        """The declared router, or softmax and top-k."""
        return self.config.router or TopKRouterConfig()


def is_linear(module: Any) -> bool:
    """Whether adapters can stand on a module."""
    return isinstance(module, (nn.Linear, Conv1D))


def linear_sizes(module: Any) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


def _of_layer(value: int | list[int], name: str, position: int, num_layers: int) -> int:
    if not isinstance(value, list):
        return value
    if num_layers % len(value):
        raise ValueError(
            f"`{name}` has {len(value)} entries, which do not divide the {num_layers} layers evenly: {value}."
        )
    return value[position * len(value) // num_layers]


def _resolve(
    names: list[str] | None, layer: nn.Module, family: Family, moe: MoeSpec | None, replaced: str | None
) -> tuple[list[str], set[str]]:
    """Paths of the linear layers that `names` mean, in the order of the layer, and the names that mean none."""
    every = {path: module for path, module in layer.named_modules() if is_linear(module)}
    if replaced is not None:
        every = {path: module for path, module in every.items() if not f"{path}.".startswith(f"{replaced}.")}
    found: set[str] = set()
    missing = set()
    for name in names or []:
        if name == "ffn":
            hits = _ffn_paths(layer, family, moe, every)
        elif name == "attention":
            site = _attention_site(layer, family)
            hits = [path for path in every if site and path.startswith(f"{site}.")]
        else:
            hits = [path for path in every if f".{path}".endswith(f".{name}")]
        hits = [path for path in hits if path in every]
        found.update(hits)
        if not hits:
            missing.add(name)
    return [path for path in every if path in found], missing


def _attention_site(layer: nn.Module, family: Family) -> str:
    """Path of the attention on its layer, `""` where there is none. Families without a record of theirs name its
    class so."""
    if family.attention is not None:
        return family.attention.site if has_path(layer, family.attention.site) else ""
    return next((name for name, child in layer.named_children() if "Attention" in type(child).__name__), "")


def _ffn_paths(layer: nn.Module, family: Family, moe: MoeSpec | None, every: dict[str, Any]) -> list[str]:
    if moe is not None:
        inside = [f"{moe.block}.{path}" if moe.block else path for path in moe.shared]
        return [path for path in every if any(path.startswith(f"{place}.") for place in inside)]
    if family.dense is None:  # the dense layers of a MoE family
        block = "" if family.moe is None else family.moe.block
        return [path for path in every if block and path.startswith(f"{block}.")]
    spec = family.dense
    return [path for path in (spec.gate, spec.fused, spec.up, spec.down) if path is not None]


def plan_lora(
    key: str,
    layer: nn.Module,
    base: nn.Module,
    config: LoraExpertsConfig,
    family: Family,
    moe: MoeSpec | None,
    causal: bool,
    replaced: str | None,
) -> LoraPlan:
    """Resolve the declaration for one layer.

    Args:
        moe: record of the layer's routed experts, if it has some.
        causal: whether the layer's attention is.
        replaced: path of a dense block that is about to be replaced by experts.

    Raises:
        ValueError: where it does not fit the layer.
    """
    if "forward" in vars(layer):
        raise ValueError(
            f'layer "{key}" carries hooks of accelerate. Extend the model before it is dispatched, or load the '
            "extended checkpoint with `from_pretrained(..., device_map=...)`."
        )
    prefix, _, number = key.rpartition(".")
    position, num_layers = int(number), len(get_by_path(base, family.layers))
    count = _of_layer(config.num_lora_experts, "num_lora_experts", position, num_layers)
    rank = _of_layer(config.r, "r", position, num_layers)
    routed, missing = _resolve(config.target_modules, layer, family, moe, replaced)  # type: ignore[arg-type]
    plain, unknown = _resolve(config.unrouted_modules, layer, family, moe, replaced)  # type: ignore[arg-type]
    twice = sorted(set(routed) & set(plain))
    if twice:
        raise ValueError(f'{twice} of layer "{key}" are both in `target_modules` and in `unrouted_modules`.')
    adapters = config.adapters
    names = tuple(str(i) for i in range(count)) if adapters is None else tuple(entry.name for entry in adapters)
    top_k = min(config.num_experts_per_tok or count, count)
    ffn = "" if family.dense is None else family.dense.site
    if moe is not None or family.dense is None:
        ffn = "" if family.moe is None else family.moe.block
    places = {"lora": ffn, "lora.attention": _attention_site(layer, family)}
    blocks: dict[str, RouterSite] = {}
    targets = []

    def site(name: str, size: int, order: int) -> RouterSite:
        size = config.num_tasks if config.num_tasks is not None else size
        return RouterSite(
            f"{name}.{key}", 1000 * position + order, count, top_k, size, GateRule(), None, causal, lora=True
        )

    for order, path in enumerate((*routed, *plain)):
        linear = get_by_path(layer, path)
        full = f"{prefix}.{family.layers}.{number}.{path}".lstrip(".")
        sizes = dict(zip(("in_features", "out_features"), linear_sizes(linear), strict=True))
        if path in plain:
            scale = lora_scale(rank, config.lora_alpha, config.use_rslora)
            stack: dict[str, Any] = {"names": (UNROUTED,), "ranks": (rank,), "scales": (scale,)}
        elif adapters is not None:
            ranks = tuple(adapter.rank(full) for adapter in adapters)
            stack = {"names": names, "ranks": ranks, "scales": tuple(adapter.scale(full) for adapter in adapters)}
        else:
            scale = lora_scale(rank, config.lora_alpha, config.use_rslora)
            stack = {"names": names, "ranks": (rank,) * count, "scales": (scale,) * count}
        stack |= {**sizes, "dropout": config.lora_dropout}
        own, block = None, ""
        if path in routed and count > 1 and config.route_per == "linear":
            own = site(f"lora.{path}", sizes["in_features"], order)
        elif path in routed and count > 1:
            # Parts of a feed-forward block may stand outside of it (BERT).
            inside = {name: place for name, place in places.items() if place and path.startswith(f"{place}.")}
            dense = family.dense is not None and moe is None and path in _ffn_paths(layer, family, moe, {})
            name = next(iter(inside), "lora" if dense else "")
            if not name or not has_path(layer, places[name]):
                raise ValueError(
                    f'`route_per="block"` knows the feed-forward block and the attention; `{path}` of layer "{key}" '
                    'is in neither. Use `route_per="linear"`.'
                )
            block = places[name]
            own = blocks.setdefault(block, site(name, int(base.config.hidden_size), 900 + len(blocks)))
        targets.append(LoraTarget(path, block, path in routed, stack, own))
    shared = None
    if config.share_base_ffn and any(target.routed for target in targets):
        shared = _shared_base(key, layer, family, moe, targets)
    return LoraPlan(key, layer, config, names, tuple(targets), blocks, shared, frozenset(missing | unknown))


def _shared_base(
    key: str, layer: nn.Module, family: Family, moe: MoeSpec | None, targets: list[LoraTarget]
) -> DenseSpec:
    spec = family.dense
    if moe is not None or spec is None:
        raise ValueError(
            f'`share_base_ffn` makes experts of a dense feed-forward block, and layer "{key}" has routed experts '
            "already, or a block that is not known. Leave it out, or exclude the layer in `layers`."
        )
    if spec.bypass or not has_path(layer, spec.site):
        raise ValueError(f'`share_base_ffn` needs a feed-forward block that is one module; layer "{key}" has none.')
    outside = [t.path for t in targets if t.routed and not t.path.startswith(f"{spec.site}.")]
    if outside:
        raise ValueError(
            f'`share_base_ffn` has its experts in the feed-forward block; {outside} of layer "{key}" are outside. '
            "Put them into `unrouted_modules`."
        )
    return spec


def check_lora_plans(model: nn.Module, plans: list[LoraPlan]) -> None:
    """Raise `ValueError` where a declaration does not fit the layers together. Nothing has been changed then."""
    by_config: dict[int, list[LoraPlan]] = {}
    for plan in plans:
        by_config.setdefault(id(plan.config), []).append(plan)
    for members in by_config.values():
        unknown = frozenset.intersection(*(plan.missing for plan in members))
        empty = not any(target.routed for plan in members for target in plan.targets)
        if unknown or empty:
            layer = members[0].layer
            have = sorted({path.rpartition(".")[2] for path, m in layer.named_modules() if is_linear(m)})
            what = f"{sorted(unknown)} name no linear layer" if unknown else "no linear layer was named"
            raise ValueError(
                f"`lora_experts`: {what} of this model. A layer has {have}. Routed experts are stacked tensors; "
                "adapters on them are `expert_lora`."
            )
    for plan in plans:
        if not any(target.site for target in plan.targets):
            continue
        router = get_router(plan.router.type)
        if router.mixes_tokens:
            raise ValueError(
                f"the `{plan.router.type}` router gives experts mixtures of tokens; adapters take tokens."
            )
        if router.crosses_layers or router.setup_stack.__func__ is not MoERouter.setup_stack.__func__:  # type: ignore[attr-defined]
            raise ValueError(
                f"the `{plan.router.type}` router hands something from block to block of experts; it has no place "
                "in front of adapters."
            )
        if router.before_layer is not MoERouter.before_layer:
            raise ValueError(f"the `{plan.router.type}` router decides ahead of a layer; adapters cannot follow it.")
        for target in plan.targets:
            if target.site is not None:
                router.check(plan.router, target.site)
                if router.default_zero_experts(plan.router, target.site.num_experts) is not None:
                    raise ValueError(
                        f"the `{plan.router.type}` router brings zero-computation experts along, which adapters do "
                        "not have."
                    )
        if plan.shared is not None:
            _check_formula(plan)


def _check_formula(plan: LoraPlan) -> None:
    """Whether gate, up, activation and down are all that a dense block computes: some architectures add to it."""
    assert plan.shared is not None
    block = get_by_path(plan.layer, plan.shared.site)
    first = next(block.parameters())
    if first.is_meta or not first.is_floating_point():
        return
    roles, activation, _ = _inside(plan.layer, plan.shared)
    linears = {role: get_by_path(block, path) for role, path in roles.items()}
    was_training = block.training
    block.eval()
    with torch.no_grad():
        x = torch.linspace(-1, 1, 2 * linear_sizes(next(iter(linears.values())))[0], device=first.device)
        x = x.view(2, -1).to(first.dtype)
        inner = {role: linear(x) for role, linear in linears.items() if role != "down"}
        found = linears["down"](_activated(inner, get_by_path(block, activation)))
        same = torch.allclose(found.float(), block(x).float(), rtol=1e-2, atol=1e-4)
    block.train(was_training)
    if not same:
        raise ValueError(
            f'`share_base_ffn`: the feed-forward block of layer "{plan.key}" computes more than gate, up, activation '
            'and down. Use `share_base_ffn=False` with `route_per="linear"`.'
        )


def _inside(layer: nn.Module, spec: DenseSpec) -> tuple[dict[str, str], str, tuple[str | None, str | None]]:
    """Paths below the block: projections by role, activation, and dropout behind it and behind `down`."""

    def below(path: str) -> str:
        return path.removeprefix(f"{spec.site}.")

    roles = {"gate": spec.gate, "fused": spec.fused, "up": None if spec.fused else spec.up, "down": spec.down}
    found = {role: below(path) for role, path in roles.items() if path and has_path(layer, path)}
    dropout = None if spec.dropout is None else below(spec.dropout)
    hidden = spec.dropout_at == "hidden"
    return found, below(spec.activation), (dropout if hidden else None, None if hidden else dropout)


def install_lora(plan: LoraPlan, link: RoutingLink) -> None:
    """Carry out a checked plan. Tensors that it makes are empty; loading or `init_weights` fills them."""
    shared: dict[str, Any] = {"moe_link": link, "moe_names": plan.names, "moe_routing": plan.config.routing}
    link.sequences = link.sequences or plan.config.routing == "sequence"
    if any(t.site for t in plan.targets) and not get_router(plan.router.type).causal:
        causal = next(t.site.causal for t in plan.targets if t.site is not None)
        link.non_causal = plan.router.type if causal else link.non_causal
    for target in plan.targets:
        linear = get_by_path(plan.layer, target.path)
        place = _placement(linear)
        add_child(linear, STACK, LoraStack(**target.stack, **place))
        if plan.shared is not None and target.routed and target.block:
            continue  # the block uses its adapters
        gated = "none" if target.site is None else "block" if target.block else "own"
        if gated == "own":
            assert target.site is not None
            _add_gate(linear, plan.router, target.site, link, place)
        install(linear, LoraLinear, moe_gated=gated, moe_site=target.site, **shared)
    for path, site in plan.blocks.items():
        block = get_by_path(plan.layer, path)
        first = next(target for target in plan.targets if target.block == path)
        _add_gate(block, plan.router, site, link, _placement(get_by_path(plan.layer, first.path)))
        if plan.shared is not None and path == plan.shared.site:
            roles, activation, dropouts = _inside(plan.layer, plan.shared)
            where: dict[str, Any] = {"moe_roles": roles, "moe_activation": activation, "moe_dropouts": dropouts}
            install(block, SharedBaseFfn, **where, **shared)
        else:
            install(block, LoraBlock, **shared)


def _placement(linear: Any) -> dict[str, Any]:
    """Device and precision of what is trained beside a linear layer: float32 beside weights in few bits."""
    weight = linear.weight
    dtype = weight.dtype if weight.is_floating_point() and weight.dtype.itemsize > 1 else torch.float32
    return {"device": weight.device, "dtype": dtype}


def _add_gate(
    owner: nn.Module, config: RouterConfig, site: RouterSite, link: RoutingLink, place: dict[str, Any]
) -> None:
    add_child(owner, GATE, MoeExtGate(site.num_experts, site.top_k, site.hidden_size, **place))
    install_router(owner.moe_lora_gate, config, site, link)


# --- what is trained ---


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the parameters of adapters and of their routers; empty for a model without adapters."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, AdapterModule) or name.rpartition(".")[2] == GATE:
            found |= {f"{name}.{key}" for key, _ in module.named_parameters()}
    return found


def freeze_base(model: nn.Module) -> None:
    """Exclude all but adapters and their routers from training, until the extension is taken back. A model without
    adapters stays as it is."""
    names = adapter_names(model)
    if names:
        freeze(model, [name for name, _ in model.named_parameters() if name not in names])
