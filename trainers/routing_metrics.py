"""What routers did since the last log: running sums on the device, read once per log.

All series are under `moe/`; these exist over layers and per layer (`moe/layer_03/mean_k`; with two stacks,
`moe/encoder/layer_03/mean_k`):

    mean_k          mean number of real experts per token                           over layers: mean
    entropy         mean entropy of the routing distribution, in nats               over layers: mean
    load_max        share of the busiest expert (1/E when balanced)                 over layers: mean
    max_violation   `load_max * E - 1`: how far the busiest expert is above ideal   over layers: mean
    dead_experts    experts without a token                                         over layers: sum
    drop_rate       share of the choices that were dropped; only with a capacity    over layers: mean

Where attention has experts, the same stand under `moe/attention/`, and those of LoRA experts under `moe/lora/`.

    layer_03/expert_007/load    share of one expert (only when asked for)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..modeling.moe_capacity import CAPACITY
from ..modeling.moe_context import RoutingContext
from ..modeling.moe_losses import expert_counts


# Series that are no layer's: means over layers, the losses, throughput.
_RESERVED_SERIES = 20

Reduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LayerStatistics:
    """Routing of one layer over some tokens.

    Attributes:
        counts: tokens of each real expert.
        tokens: how many were looked at.
        entropy: mean over them, in nats.
        assigned: choices of real experts before a capacity dropped some; `None` without one.
    """

    counts: tuple[int, ...]
    tokens: int
    entropy: float
    assigned: int | None = None

    @property
    def load(self) -> tuple[float, ...]:
        """Share of each expert in all token-expert pairs."""
        total = max(sum(self.counts), 1)
        return tuple(count / total for count in self.counts)

    @property
    def mean_k(self) -> float:
        """Mean number of real experts per token."""
        return sum(self.counts) / max(self.tokens, 1)

    @property
    def load_max(self) -> float:
        """Share of the busiest expert."""
        return max(self.load)

    @property
    def max_violation(self) -> float:
        """How far the busiest expert is above the balanced load, relative to it."""
        return self.load_max * len(self.counts) - 1 if any(self.counts) else 0.0

    @property
    def dead_experts(self) -> int:
        """Experts without a token."""
        return sum(count == 0 for count in self.counts)

    @property
    def drop_rate(self) -> float | None:
        """Share of the choices that a capacity dropped; `None` without one."""
        return None if self.assigned is None else 1 - sum(self.counts) / max(self.assigned, 1)

    def to_dict(self) -> dict[str, Any]:
        """The form of the history file."""
        load = [_short(share) for share in self.load]
        known = {
            "load": load,
            "entropy": _short(self.entropy),
            "mean_k": _short(self.mean_k),
            "dead": self.dead_experts,
        }
        return known if self.drop_rate is None else {**known, "dropped": _short(self.drop_rate)}


_SUMMARY = {
    "mean_k": lambda values: sum(values) / len(values),
    "entropy": lambda values: sum(values) / len(values),
    "load_max": lambda values: sum(values) / len(values),
    "max_violation": lambda values: sum(values) / len(values),
    "dead_experts": sum,
    "drop_rate": lambda values: sum(values) / len(values),
}


def layer_means(statistics: dict[str, LayerStatistics], prefix: str) -> dict[str, float]:
    """The series over layers, by name under `prefix`; none where there is no layer."""
    series = {}
    for name, summarize in _SUMMARY.items():
        values = [value for layer in statistics.values() if (value := getattr(layer, name)) is not None]
        if values:
            series[f"{prefix}/{name}"] = summarize(values)
    return series


class RoutingMetrics:
    """Running sums over the training tokens since the last `read`. Nothing here waits for the device but `read`."""

    def __init__(self) -> None:
        self._counts: dict[str, torch.Tensor] = {}
        self._step_counts: dict[str, torch.Tensor] = {}
        self._moments: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def update(self, contexts: Iterable[RoutingContext], rows: torch.Tensor | None = None) -> None:
        """Add the records of one forward.

        Args:
            contexts: of the forward.
            rows: (B,) bool, which rows of the batch count; all if not given.
        """
        for context in contexts:
            for key, record in context.all_records().items():
                tokens = record.index.shape[0]
                mask = context.token_mask(tokens)
                if rows is not None:
                    members = rows.repeat_interleave(tokens // len(rows))
                    mask = members if mask is None else members & mask.to(members.device)
                counts = expert_counts(record.index, record.num_experts, mask)
                entropy = torch.special.entr(record.scores).sum(dim=-1)
                if mask is not None:
                    mask = mask.to(entropy.device)
                    entropy = entropy.masked_fill(~mask, 0)
                exact = _exact_dtype(counts.device)
                seen = torch.full((), tokens, device=counts.device) if mask is None else mask.sum()
                # Without a capacity there is nothing to compare with; -1 makes the sum negative.
                assigned = counts.new_full((), -1)
                if CAPACITY in record.extras:
                    assigned = expert_counts(record.chosen, record.num_experts, mask).sum()
                moments = torch.stack([seen.to(exact), entropy.sum(dtype=exact), assigned.to(exact)])
                _add(self._step_counts, key, counts)
                _add(self._moments, key, moments)

    def end_step(self) -> dict[str, torch.Tensor]:
        """The (E,) token counts of the optimizer step that ends, by layer key."""
        counts, self._step_counts = self._step_counts, {}
        for key, value in counts.items():
            _add(self._counts, key, value)
        return counts

    def read(self, reduce: Reduce | None = None) -> dict[str, LayerStatistics]:
        """Statistics by layer key since the last call, and start anew.

        Args:
            reduce: sums a tensor over the processes of a distributed run. Every process must call it.
        """
        self.end_step()
        counts, moments = self._counts, self._moments
        self._counts, self._moments = {}, {}
        if not counts:
            return {}
        device = next(iter(counts.values())).device
        exact = _exact_dtype(device)
        packed = torch.cat([t.to(device, exact) for key in counts for t in (counts[key], moments[key])])
        values = (packed if reduce is None else reduce(packed)).tolist()
        found, start = {}, 0
        for key, count in counts.items():
            end = start + count.shape[0]
            seen, entropy, assigned = values[end : end + 3]
            layer = LayerStatistics(tuple(map(int, values[start:end])), int(seen), entropy / max(seen, 1))
            found[key] = layer if assigned < 0 else replace(layer, assigned=int(assigned))
            start = end + 3
        return found

    def state_dict(self, reduce: Reduce | None = None) -> dict[str, torch.Tensor]:
        """The sums since the last `read`, on the CPU and over all processes, without resetting them."""
        self.end_step()
        state = {f"counts.{key}": value for key, value in self._counts.items()}
        state |= {f"moments.{key}": value for key, value in self._moments.items()}
        return {name: (value if reduce is None else reduce(value.clone())).cpu() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state`; an empty one resets. In a distributed run, only one process gets the sums."""
        self._step_counts = {}
        self._counts = _with_prefix(state, "counts.")
        self._moments = _with_prefix(state, "moments.")


@dataclass(frozen=True)
class SeriesPlan:
    """Which layers, and which of their experts, are logged as series of their own."""

    layers: tuple[str, ...]
    experts: dict[str, tuple[int, ...]]

    @classmethod
    def make(cls, num_experts: dict[str, int], limit: int, per_expert: bool, domains: int = 0) -> SeriesPlan:
        """Evenly spaced layers, and experts of them, so that there are at most `limit` series.

        Args:
            num_experts: experts by layer key.
            limit: most series, those over all layers included.
            per_expert: whether single experts are wanted.
            domains: how many domains have series of their own.

        Raises:
            ValueError: the domains alone have more series.
        """
        budget = limit - _RESERVED_SERIES - domains * len(_SUMMARY)
        if budget < 0:
            needed = limit - budget
            raise ValueError(
                f"{domains} `routing_domains` need `routing_metrics_max_series` of {needed}, it is {limit}."
            )
        if not per_expert:
            return cls(_evenly(list(num_experts), budget // len(_SUMMARY)), {})
        most = max(num_experts.values(), default=1)
        layers = _evenly(list(num_experts), max(budget // (len(_SUMMARY) + most), 1))
        room = budget // max(len(layers), 1) - len(_SUMMARY)
        return cls(layers, {key: _evenly(list(range(num_experts[key])), room) for key in layers})

    def series(self, statistics: dict[str, LayerStatistics]) -> dict[str, float]:
        """The values to log, by name."""
        if not statistics:
            return {}
        series: dict[str, float] = {}
        groups = {"attention": "moe/attention", "lora": "moe/lora"}
        for first, prefix in {"": "moe", **groups}.items():
            keys = [key for key in statistics if key.partition(".")[0] == first]
            if not first:
                keys = [key for key in statistics if key.partition(".")[0] not in groups]
            series |= layer_means({key: statistics[key] for key in keys}, prefix)
        for key in self.layers:
            if key not in statistics:
                continue
            layer, prefix = statistics[key], f"moe/{_layer_name(key)}"
            found = {f"{prefix}/{name}": getattr(layer, name) for name in _SUMMARY}
            series |= {name: value for name, value in found.items() if value is not None}
            load = layer.load
            series |= {f"{prefix}/expert_{i:03d}/load": load[i] for i in self.experts.get(key, ())}
        return series


def _evenly(items: list[Any], most: int) -> tuple[Any, ...]:
    """At most `most` of the items, evenly spaced, the first and the last included where two fit."""
    if len(items) <= most:
        return tuple(items)
    if most <= 1:
        return tuple(items[:most])
    return tuple(items[round(i * (len(items) - 1) / (most - 1))] for i in range(most))


def _layer_name(key: str) -> str:
    stack, _, number = key.rpartition(".")
    name = f"layer_{int(number):02d}" if number.isdigit() else f"layer_{number}"
    return f"{stack.replace('.', '/')}/{name}" if stack else name


def _with_prefix(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _add(sums: dict[str, torch.Tensor], key: str, value: torch.Tensor) -> None:
    old = sums.get(key)
    sums[key] = value if old is None else old.to(value.device) + value


def _exact_dtype(device: torch.device) -> torch.dtype:
    """Sums of counts and of many small terms need float64; MPS has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _short(value: float) -> float:
    return float(f"{value:.6g}")
