"""What travels through one forward pass: the context, the record each router leaves, the link between modules."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from .configuration_moe_ext import RouterConfig
    from .moe_router import RouterSite


@dataclass
class RouteRecord:
    """What the router of one layer decided, with gradients.

    Axes: T tokens of the batch (B*S, row-major), E real experts, K slots per token.

    Attributes:
        logits: raw router logits (T, E).
        scores: routing distribution (T, E) in float32; rows sum to 1.
        weights: combine weights (T, K), 0 in unused slots.
        index: (T, K) int64; `0..E-1` an expert, `E` nobody, above `E` zero-computation experts in declared order.
        config: the config of the router that made it.
        key: key of the layer, such as `"3"` or `"encoder.3"`.
        order: position of the layer among the routed layers of its stack.
        num_experts: E, the number of real experts. Where a gate has more classes than experts (a "skip" class, or
            zero-computation experts), `logits` and `scores` have those columns too.
        stock: what the stock gate returned, by letter, where it was asked.
        choices: (T, K) chosen columns of `scores`, with the number of columns for an unused slot. The same as `index`
            unless the layer has zero-computation experts. Losses count these.
        extras: further tensors, with gradients, that the router's own losses need.
        coefs: weights of the auxiliary losses at this step, where they change over training; `None` means those of the
            config.
        site: where the router stands; losses find the kinds of the columns there.
        decision: name of the decision that several layers carry out, where it is made once for all of them; it counts
            once in losses and in the routers' logits of an output.
    """

    logits: torch.Tensor
    scores: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor
    config: RouterConfig
    key: str = ""
    order: int = 0
    num_experts: int = 0
    stock: dict[str, torch.Tensor] | None = None
    choices: torch.Tensor | None = None
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    coefs: dict[str, Any] | None = None
    site: RouterSite | None = None
    decision: str = ""

    def __post_init__(self) -> None:
        self.num_experts = self.num_experts or self.logits.shape[-1]

    @property
    def chosen(self) -> torch.Tensor:
        """(T, K) chosen columns of `scores`."""
        return self.index if self.choices is None else self.choices


@dataclass(eq=False)
class RoutingContext:
    """Everything routers share during one forward of a base model. Made afresh for every forward.

    Attributes:
        input_ids: (B, S), where the caller gave ids.
        attention_mask: the mask the caller gave, if any.
        row_modes: name of the policy of each row of the batch, or `None` where all rows follow the model's config.
        policies: what a policy changes in the config of the routers, by name (see `route_rows`).
        step: optimizer step, as far as a trainer tells it.
        generator: source of randomness for routers that sample.
        records: the record of every routed layer, by key.
        carry: what a layer leaves for later ones, keyed by `(order, name)`. Keeps gradients.
        draws: random numbers of this forward, keyed by `(order, name)`.
        batch_size: B, where the inputs tell.
        position_ids: (B, S) or (1, S), where the caller gave them.
        past_length: tokens of every row that a cache holds, where neither mask nor position ids tell.
        inner: the contexts of routers that stand elsewhere than in front of experts, by the group of their sites
            (`"attention"`, `"lora"`), with records and carry of their own. Made when the first of a group runs.
        task_ids: (B,) the task of each row, where the caller gave them.
        sequences: the cache, where routers keep in it what they have seen of the sequences.
        replayed: recorded choices that the routers use in place of their own, (B, S, K) by key (see `replay_routing`).
        losses: auxiliary losses that an architecture computes itself, by name, with their weights.
    """

    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    row_modes: list[str] | None = None
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    step: int | None = None
    generator: torch.Generator | None = None
    records: dict[str, RouteRecord] = field(default_factory=dict)
    carry: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    draws: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    batch_size: int | None = None
    position_ids: torch.Tensor | None = None
    past_length: Any = 0
    inner: dict[str, RoutingContext] = field(default_factory=dict)
    task_ids: torch.Tensor | None = None
    sequences: Any = None
    replayed: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict)
    _parts: dict[str, RoutingContext] = field(default_factory=dict)

    def add(self, record: RouteRecord) -> None:
        """Keep the record of a layer. The first one wins: recomputation under checkpointing must not replace it."""
        self.records.setdefault(record.key, record)

    def at(self, site: RouterSite) -> RoutingContext:
        """The context of the router at `site`: this one, or that of the routers in attention or of adapters."""
        if not site.group:
            return self
        if site.group not in self.inner:
            self.inner[site.group] = RoutingContext(
                input_ids=self.input_ids,
                attention_mask=self.attention_mask,
                row_modes=self.row_modes,
                policies=self.policies,
                step=self.step,
                generator=self.generator,
                batch_size=self.batch_size,
                position_ids=self.position_ids,
                past_length=self.past_length,
                task_ids=self.task_ids,
                sequences=self.sequences,
            )
        return self.inner[site.group]

    @property
    def attention(self) -> RoutingContext | None:
        """The context of the routers in attention, if one has run."""
        return self.inner.get("attention")

    def decisions(self) -> list[RouteRecord]:
        """One record of each decision: those of all layers, less the repeated ones of layers that share theirs."""
        found: dict[str, RouteRecord] = {}
        for key, record in self.records.items():
            found.setdefault(record.decision or f"layer {key}", record)
        return list(found.values())

    def all_records(self) -> dict[str, RouteRecord]:
        """The records of all routers by key, those in attention and of adapters last."""
        found = self.records
        for context in self.inner.values():
            found = found | context.records
        return found

    def draw(self, order: int, name: str, make: Callable[[torch.Generator | None], torch.Tensor]) -> torch.Tensor:
        """Random numbers of a layer, made by `make(generator)`; the same when the layer is recomputed.

        The global generator is set back by activation checkpointing itself, and has to advance then as it did at
        first, or dropout after it would differ. Draws from a generator of one's own are kept.
        """
        if self.generator is None:
            return make(None)
        key = (order, name)
        if key not in self.draws:
            self.draws[key] = make(self.generator)
        return self.draws[key]

    def part(self, mode: str, rows: list[int]) -> RoutingContext:
        """The context of the rows that follow one policy. Made once, so that its carry goes from layer to layer."""
        if mode not in self._parts:
            batch = len(self.row_modes or ())

            def pick(tensor: Any) -> Any:
                fits = isinstance(tensor, torch.Tensor) and tensor.dim() > 0 and tensor.shape[0] == batch
                return tensor[rows] if fits else tensor

            self._parts[mode] = RoutingContext(
                input_ids=pick(self.input_ids),
                attention_mask=pick(self.attention_mask),
                step=self.step,
                generator=self.generator,
                batch_size=len(rows),
                position_ids=pick(self.position_ids),
                past_length=self.past_length,
                task_ids=pick(self.task_ids),
                # Made when the first layer is routed, so this is what was there before the layers.
                carry={key: pick(value) for key, value in self.carry.items()},
            )
        return self._parts[mode]

    def positions(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """(B, S) int64: the place of each token of this forward in its sequence, counted without padding; the same
        with a cache and without."""
        batch = self.batch_size
        if not batch or num_tokens % batch:
            raise ValueError(f"it is not known to which sequences the {num_tokens} tokens of this forward belong.")
        length, mask, given = num_tokens // batch, self.attention_mask, self.position_ids
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
            counted = (mask != 0).long().cumsum(dim=-1)[:, mask.shape[1] - length :]
            return (counted - 1).clamp(min=0).to(device)
        if isinstance(given, torch.Tensor) and given.dim() == 2 and given.shape[1] == length:
            return given.expand(batch, -1).to(device)
        return (torch.arange(length, device=device) + self.past_length).expand(batch, -1)

    def token_mask(self, num_tokens: int) -> torch.Tensor | None:
        """(T,) bool, true for real tokens, or `None` where nothing is padded or the mask is not two-dimensional."""
        mask = self.attention_mask
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return None
        batch = mask.shape[0]
        length = num_tokens // batch
        if length * batch != num_tokens or mask.shape[1] < length:
            return None
        # With a cache the mask also covers the past; the tokens of this forward are its last columns.
        return mask[:, mask.shape[1] - length :].reshape(-1) != 0


class _Slots:
    """State of one thread's forward pass."""

    def __init__(self) -> None:
        self.context: RoutingContext | None = None
        self.layer_context: RoutingContext | None = None
        self.collected: list[RoutingContext] | None = None
        self.input_ids: torch.Tensor | None = None  # of the outer model's forward
        self.task_ids: torch.Tensor | None = None  # likewise
        self.replayed: torch.Tensor | None = None  # (T, K), while a router is running


class RoutingLink:
    """Connects the outer model, its base models, their layers and their routers.

    It holds nothing between two forwards but the settings a trainer gives (`step`, `observers`). Each thread has its
    own slots, so replicas and concurrent requests do not meet; compiled graphs use one plain set, since thread-local
    storage cannot be traced.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.generator: torch.Generator | None = None
        self.row_modes: list[str] | None = None
        self.policies: dict[str, dict[str, Any]] = {}
        self.replayed: dict[str, torch.Tensor] = {}
        self.previous_implementation: str | None = None
        self.task_ids: torch.Tensor | None = None  # of all forwards that are given none
        self.sequences = False  # whether a router looks at sequences, so that caches have to remember them
        self.adapters_enabled = True
        self.active_adapters: tuple[str, ...] | None = None  # `None` for all
        self.non_causal = ""  # name of a router in a causal layer that looks at later tokens
        self.observers: list[Callable[[list[RoutingContext]], None]] = []
        self._compiled = _Slots()
        self._local = threading.local()

    @property
    def slots(self) -> _Slots:
        """The state of the running forward pass of this thread."""
        if torch.compiler.is_compiling():
            return self._compiled
        slots = getattr(self._local, "slots", None)
        if slots is None:
            slots = self._local.slots = _Slots()
        return slots

    def separate(self) -> RoutingLink:
        """A link for a copy of the model: no observers, nothing shared."""
        twin = RoutingLink()
        twin.step, twin.previous_implementation = self.step, self.previous_implementation
        twin.non_causal, twin.sequences = self.non_causal, self.sequences
        twin.adapters_enabled, twin.active_adapters = self.adapters_enabled, self.active_adapters
        return twin

    # A part that is copied alone (PEFT's `modules_to_save`) stays connected to the model it came from; a copy of the
    # whole model brings a link of its own.
    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingLink:
        return self

    def __reduce__(self) -> tuple[type[RoutingLink], tuple[()], dict[str, Any]]:
        names = ("previous_implementation", "non_causal", "sequences", "adapters_enabled", "active_adapters")
        kept = {name: getattr(self, name) for name in names}
        return RoutingLink, (), kept
