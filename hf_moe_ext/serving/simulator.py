"""Serving in simulation: arrivals, batches, a cache of experts, and the time that all takes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from .batching import Batcher, RoutedTokens
from .caching import simulate_cache


@dataclass(frozen=True)
class ServingCosts:
    """How long things take, in any one unit of time.

    Attributes:
        per_token: computing one token.
        per_expert: starting one expert in a batch, beside its tokens.
        per_load: bringing one expert, with its slices of all layers, into fast memory.
        num_layers: layers, each of which takes its share of all that.
        prefetch: whether the slices of a layer load while the layer before is computed, since the experts are known;
            otherwise each load is waited for.
    """

    per_token: float = 1.0
    per_expert: float = 0.0
    per_load: float = 0.0
    num_layers: int = 32
    prefetch: bool = True

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"`num_layers` must be at least 1, got {self.num_layers}.")
        for name in ("per_token", "per_expert", "per_load"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")

    def duration(self, compute: float, load: float) -> float:
        """The time of a batch that takes `compute` and `load` alone. With prefetching, every layer but the first loads
        behind the computation of the one before."""
        if not self.prefetch:
            return compute + load
        return (compute + load + (self.num_layers - 1) * max(compute, load)) / self.num_layers


@dataclass(frozen=True)
class ServingResult:
    """What a simulation found.

    Attributes:
        batches: how many there were.
        experts_per_batch: mean number of different experts of a batch.
        hit_rate: of the cache.
        mean_latency, p95_latency: of requests, from arrival to their last token.
        tokens_per_time: tokens over the time from the first arrival to the last token.
    """

    batches: int
    experts_per_batch: float
    hit_rate: float
    mean_latency: float
    p95_latency: float
    tokens_per_time: float


def simulate_serving(
    arrivals: Sequence[tuple[float, RoutedTokens]],
    batcher: Batcher,
    *,
    capacity: int,
    policy: str = "lru",
    costs: ServingCosts | None = None,
    seed: int = 0,
) -> ServingResult:
    """Serve pieces of requests batch by batch, each batch as soon as the one before is done and something waits.

    Batches are formed by the arrivals and what computing them takes; loads delay them, but do not change them. So the
    policy `"belady"` sees the batches to come, and policies are compared on the same batches.

    Args:
        arrivals (list of `(time, RoutedTokens)`):
            When each piece comes, in any order.
        batcher ([`Batcher`]):
            Empty.
        capacity (`int`):
            Experts that have room in fast memory.
        policy (`str`, *optional*, defaults to `"lru"`):
            Of the cache.
        costs ([`ServingCosts`], *optional*):
            One unit a token, and nothing else, where not given.
        seed (`int`, *optional*, defaults to 0):
            Of the policy.

    Raises:
        ValueError: without arrivals, or for a batcher that is not empty.
    """
    costs = costs or ServingCosts()
    if not arrivals:
        raise ValueError("`arrivals` is empty; there is nothing to serve.")
    if len(batcher):
        raise ValueError(f"`batcher` must be empty, and {len(batcher)} pieces wait in it.")
    coming = sorted(arrivals, key=lambda item: item[0])
    batches, starts, work = _form(coming, batcher, costs)
    needed = [tuple(dict.fromkeys(piece.expert for piece in batch)) for batch in batches]
    cache = simulate_cache(needed, capacity, policy, seed=seed)
    ends, done = [], float("-inf")
    for start, compute, loads in zip(starts, work, cache.loads, strict=True):
        done = max(start, done) + costs.duration(compute, loads * costs.per_load)
        ends.append(done)
    first: dict[Hashable, float] = {}
    last: dict[Hashable, float] = {}
    for time, piece in coming:
        first.setdefault(piece.request, time)
    for end, batch in zip(ends, batches, strict=True):
        for piece in batch:
            last[piece.request] = max(end, last.get(piece.request, end))
    latencies = sorted(last[request] - first[request] for request in first)
    tokens = sum(piece.tokens for _, piece in coming)
    return ServingResult(
        batches=len(batches),
        experts_per_batch=sum(map(len, needed)) / len(needed),
        hit_rate=cache.hit_rate,
        mean_latency=sum(latencies) / len(latencies),
        p95_latency=latencies[math.ceil(0.95 * len(latencies)) - 1],
        tokens_per_time=tokens / max(ends[-1] - coming[0][0], 1e-30),
    )


def _form(
    coming: list[tuple[float, RoutedTokens]], batcher: Batcher, costs: ServingCosts
) -> tuple[list[list[RoutedTokens]], list[float], list[float]]:
    """The batches, the earliest start of each (what it holds must be there), and how long it is computed."""
    batches: list[list[RoutedTokens]] = []
    starts, work = [], []
    clock, place = coming[0][0], 0
    while place < len(coming) or len(batcher):
        if not len(batcher):
            clock = max(clock, coming[place][0])
        while place < len(coming) and coming[place][0] <= clock:
            batcher.add(coming[place][1])
            place += 1
        batch = batcher.next_batch()
        experts = len({piece.expert for piece in batch})
        batches.append(batch)
        starts.append(clock)
        work.append(sum(piece.tokens for piece in batch) * costs.per_token + experts * costs.per_expert)
        clock += work[-1]
    return batches, starts, work
