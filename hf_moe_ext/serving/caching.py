"""Which experts stay in fast memory, where not all have room."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from ..modeling.configuration_moe_ext import _unknown


# What is requested at one time: an expert, or several that are needed together.
Step = int | Iterable[int]
NEVER = float("inf")

_POLICIES: dict[str, type[CachePolicy]] = {}
_Policy = TypeVar("_Policy", bound="type[CachePolicy]")


class CachePolicy:
    """Base of the policies. One object serves one trace.

    Args:
        seed: of everything random.
        future: for policies that know it: all steps of the trace.
        lookahead: how many steps ahead they know it; `None` is to the end.
    """

    name: ClassVar[str] = ""
    needs_future: ClassVar[bool] = False

    def __init__(
        self, *, seed: int = 0, future: Sequence[tuple[int, ...]] | None = None, lookahead: int | None = None
    ) -> None:
        self.order: OrderedDict[int, None] = OrderedDict()  # by last use, the oldest first

    def used(self, expert: int, step: int) -> None:
        """An expert was requested, whether it was there or not."""
        self.order[expert] = None
        self.order.move_to_end(expert)

    def victim(self, candidates: Sequence[int], step: int) -> int:
        """Which of the resident experts makes room at a step."""
        raise NotImplementedError

    def oldest(self, candidates: Iterable[int]) -> int:
        """Of these experts, the one whose last use is longest ago."""
        allowed = set(candidates)
        return next(expert for expert in self.order if expert in allowed)


def register_cache_policy(name: str) -> Callable[[_Policy], _Policy]:
    """Class decorator that makes a policy known by a name.

    Raises:
        ValueError: for a name that is taken.
    """
    if name in _POLICIES:
        raise ValueError(f"a cache policy named `{name}` is registered already.")

    def decorate(policy: _Policy) -> _Policy:
        policy.name = name
        _POLICIES[name] = policy
        return policy

    return decorate


def list_cache_policies() -> list[str]:
    """The names of all policies, sorted."""
    return sorted(_POLICIES)


@register_cache_policy("lru")
class LruPolicy(CachePolicy):
    """The one that was used longest ago goes."""

    def victim(self, candidates: Sequence[int], step: int) -> int:
        return self.oldest(candidates)


@register_cache_policy("fifo")
class FifoPolicy(CachePolicy):
    """The one that was loaded first goes."""

    def __init__(
        self, *, seed: int = 0, future: Sequence[tuple[int, ...]] | None = None, lookahead: int | None = None
    ) -> None:
        super().__init__()
        self.loaded: OrderedDict[int, None] = OrderedDict()

    def used(self, expert: int, step: int) -> None:
        self.loaded.setdefault(expert, None)

    def victim(self, candidates: Sequence[int], step: int) -> int:
        allowed = set(candidates)
        found = next(expert for expert in self.loaded if expert in allowed)
        del self.loaded[found]
        return found


@register_cache_policy("lfu")
class LfuPolicy(CachePolicy):
    """The one that was used least often goes; of several, the one used longest ago."""

    def __init__(
        self, *, seed: int = 0, future: Sequence[tuple[int, ...]] | None = None, lookahead: int | None = None
    ) -> None:
        super().__init__()
        self.counts: dict[int, int] = {}

    def used(self, expert: int, step: int) -> None:
        super().used(expert, step)
        self.counts[expert] = self.counts.get(expert, 0) + 1

    def victim(self, candidates: Sequence[int], step: int) -> int:
        least = min(self.counts[expert] for expert in candidates)
        return self.oldest(expert for expert in candidates if self.counts[expert] == least)


@register_cache_policy("random")
class RandomPolicy(CachePolicy):
    """Any of them goes."""

    def __init__(
        self, *, seed: int = 0, future: Sequence[tuple[int, ...]] | None = None, lookahead: int | None = None
    ) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def victim(self, candidates: Sequence[int], step: int) -> int:
        return self.random.choice(candidates)


@register_cache_policy("belady")
class BeladyPolicy(CachePolicy):
    """The one that is needed again last goes, as far as the queue tells; of those that it does not name, the one used
    longest ago.

    L. Belady, "A study of replacement algorithms for a virtual-storage computer" (1966): where the whole future is
    known, no policy that loads on demand has more hits. Read-ME (2410.19123) knows it for tokens that are routed and
    queued; what will be generated it does not know.
    """

    needs_future = True

    def __init__(
        self, *, seed: int = 0, future: Sequence[tuple[int, ...]] | None = None, lookahead: int | None = None
    ) -> None:
        super().__init__()
        if future is None:
            raise ValueError("the policy `belady` needs the `future`: the steps that are routed and queued.")
        self.lookahead = NEVER if lookahead is None else lookahead
        self.uses: dict[int, list[int]] = {}
        for step, experts in enumerate(future):
            for expert in experts:
                self.uses.setdefault(expert, []).append(step)
        self.place: dict[int, int] = dict.fromkeys(self.uses, 0)

    def next_use(self, expert: int, step: int) -> float:
        """The next step that requests an expert after `step`; infinity where none does that is known."""
        uses, place = self.uses.get(expert, []), self.place.get(expert, 0)
        while place < len(uses) and uses[place] <= step:
            place += 1
        self.place[expert] = place
        found = uses[place] if place < len(uses) else NEVER
        return found if found - step <= self.lookahead else NEVER

    def victim(self, candidates: Sequence[int], step: int) -> int:
        nexts = {expert: self.next_use(expert, step) for expert in candidates}
        last = max(nexts.values())
        return self.oldest(expert for expert in candidates if nexts[expert] == last)


@dataclass(frozen=True)
class CacheResult:
    """What a cache did over a trace.

    Attributes:
        hits, accesses: requests for single experts, and how many found theirs.
        loads: by step, how many experts had to be loaded.
    """

    hits: int
    accesses: int
    loads: tuple[int, ...]

    @property
    def hit_rate(self) -> float:
        """Share of hits; 0 for an empty trace."""
        return self.hits / max(self.accesses, 1)


def simulate_cache(
    trace: Sequence[Step], capacity: int, policy: str = "lru", *, seed: int = 0, lookahead: int | None = None
) -> CacheResult:
    """Run a trace of requests through a cache that is empty at first.

    Args:
        trace (list of `int`, or of lists of `int`):
            The expert, or the experts, that each step needs. Those of one step are needed together: none of them makes
            room for another. Where a step needs more than there is room for, the rest is loaded and not kept.
        capacity (`int`):
            Experts that have room.
        policy (`str`, *optional*, defaults to `"lru"`):
            One of [`list_cache_policies`].
        seed (`int`, *optional*, defaults to 0):
            Of `"random"`.
        lookahead (`int`, *optional*):
            Steps ahead that `"belady"` knows; all of them where it is not given.

    Raises:
        ValueError: for an unknown policy, or numbers out of range.
    """
    if policy not in _POLICIES:
        raise ValueError(_unknown("cache policy", policy, _POLICIES))
    if capacity < 1:
        raise ValueError(f"`capacity` must be at least 1, got {capacity}.")
    if lookahead is not None and lookahead < 0:
        raise ValueError(f"`lookahead` must be non-negative, got {lookahead}.")
    steps = [(step,) if isinstance(step, int) else tuple(dict.fromkeys(step)) for step in trace]
    kind = _POLICIES[policy]
    rule = kind(seed=seed, future=steps if kind.needs_future else None, lookahead=lookahead)
    resident: dict[int, None] = {}
    hits = accesses = 0
    loads = []
    for number, experts in enumerate(steps):
        missing = [expert for expert in experts if expert not in resident]
        hits += len(experts) - len(missing)
        accesses += len(experts)
        loads.append(len(missing))
        for expert in experts:
            if expert in resident:
                rule.used(expert, number)
        for expert in missing:
            if len(resident) == capacity:
                free = [other for other in resident if other not in experts]
                if not free:
                    break
                del resident[rule.victim(free, number)]
            resident[expert] = None
            rule.used(expert, number)
    return CacheResult(hits, accesses, tuple(loads))


def cache_hit_rates(
    trace: Sequence[Step],
    capacities: Iterable[int],
    policies: Iterable[str] = ("random", "lru", "belady"),
    seed: int = 0,
) -> dict[str, dict[int, float]]:
    """Hit rates of policies and capacities on one trace: `{policy: {capacity: rate}}`. Arguments as in
    [`simulate_cache`]."""
    sizes = list(capacities)
    return {
        policy: {size: simulate_cache(trace, size, policy, seed=seed).hit_rate for size in sizes}
        for policy in policies
    }
