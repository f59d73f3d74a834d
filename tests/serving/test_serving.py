"""Caches against brute force, batches against their rules, the simulator against closed forms."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections import Counter

import pytest
import torch
from tiny_models import tiny_model

import hf_moe_ext as moe
from hf_moe_ext.serving import (
    ExpertAwareBatcher,
    FifoBatcher,
    RoutedTokens,
    ServingCosts,
    cache_hit_rates,
    list_cache_policies,
    register_cache_policy,
    repeated_share,
    routing_traces,
    simulate_cache,
    simulate_serving,
    sticky_trace,
)


POLICIES = ["belady", "fifo", "lfu", "lru", "random"]


def random_trace(length, experts, seed):
    return [random.Random(f"{seed}/{i}").randrange(experts) for i in range(length)]


# --- caches ---


def most_hits(trace, capacity):
    """By trying everything: the most hits of any policy that loads what is missing."""

    @functools.cache
    def best(step, resident):
        if step == len(trace):
            return 0
        expert = trace[step]
        if expert in resident:
            return 1 + best(step + 1, resident)
        if len(resident) < capacity:
            return best(step + 1, resident | {expert})
        return max(best(step + 1, (resident - {out}) | {expert}) for out in resident)

    return best(0, frozenset())


def slow_cache(trace, capacity, policy):
    """Least recently used, first in, least often used: from the list of past requests alone."""
    resident, loaded, hits = [], {}, 0
    for step, expert in enumerate(trace):
        past = trace[:step]
        if expert in resident:
            hits += 1
            continue
        if len(resident) == capacity:
            recent = {e: max(i for i, other in enumerate(past) if other == e) for e in resident}
            if policy == "lru":
                out = min(resident, key=recent.get)
            elif policy == "fifo":
                out = min(resident, key=loaded.get)
            else:
                out = min(resident, key=lambda e: (past.count(e), recent[e]))
            resident.remove(out)
        resident.append(expert)
        loaded[expert] = step
    return hits


@pytest.mark.parametrize("seed", range(12))
def test_belady_is_the_best_there_is(seed):
    trace = random_trace(14, 5, seed)
    for capacity in (1, 2, 3, 4):
        found = simulate_cache(trace, capacity, "belady")
        assert found.hits == most_hits(tuple(trace), capacity)
        for policy in POLICIES:
            assert simulate_cache(trace, capacity, policy, seed=seed).hits <= found.hits


@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu"])
@pytest.mark.parametrize("seed", range(8))
def test_policies_follow_their_rules(policy, seed):
    trace = random_trace(60, 7, seed)
    for capacity in (1, 2, 4, 6):
        assert simulate_cache(trace, capacity, policy).hits == slow_cache(trace, capacity, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_with_room_for_all_only_first_uses_miss(policy):
    trace = random_trace(200, 6, 1)
    for capacity in (6, 9):
        found = simulate_cache(trace, capacity, policy)
        assert found.accesses - found.hits == 6 == sum(found.loads)


@pytest.mark.parametrize("policy", POLICIES)
def test_experts_of_one_step_make_no_room_for_each_other(policy):
    """(0, 1) fills the cache; 2 goes beside one of them; a step of three leaves one out."""
    found = simulate_cache([(0, 1), (0, 1), (1, 2), (2, 1)], 2, policy)
    assert found.loads == (2, 0, 1, 0) and found.hits == 5
    crowded = simulate_cache([(0, 1, 2), (0, 1, 2), (0, 1)], 2, policy)
    assert crowded.loads == (3, 1, 0) and crowded.accesses == 8


def test_random_is_seeded_and_even():
    trace = random_trace(300, 8, 2)
    runs = [simulate_cache(trace, 3, "random", seed=seed).loads for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_what_is_not_queued_is_not_known():
    """Without any lookahead, Belady's rule is that of the least recently used; with more, it is never worse here."""
    trace = sticky_trace(4000, 7, 0.5, seed=3)
    rates = [simulate_cache(trace, 3, "belady", lookahead=n).hits for n in (0, 2, 5, 20, 10_000)]
    assert rates[0] == simulate_cache(trace, 3, "lru").hits
    assert rates == sorted(rates) and rates[-1] == simulate_cache(trace, 3, "belady").hits > rates[0]


def test_the_order_of_the_papers_policies():
    """Seven experts and room for 2 to 5, as in its table: Belady's rule is ahead of both others at every size."""
    trace = sticky_trace(20_000, 7, 0.3)
    rates = cache_hit_rates(trace, [2, 3, 4, 5])
    assert set(rates) == {"random", "lru", "belady"}
    for size in (2, 3, 4, 5):
        assert rates["belady"][size] > max(rates["lru"][size], rates["random"][size]) + 0.03
    assert list(rates["lru"].values()) == sorted(rates["lru"].values())


def test_long_traces_are_quick_enough():
    """A Belady that looks through the future at each miss would take minutes."""
    assert simulate_cache(sticky_trace(60_000, 64, 0.2), 16, "belady").accesses == 60_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "`capacity` must be at least 1, got 0"),
        ({"capacity": 2, "policy": "lrv"}, "unknown cache policy `lrv`.*Did you mean `lru`"),
        ({"capacity": 2, "policy": "belady", "lookahead": -1}, "`lookahead` must be non-negative, got -1"),
    ],
)
def test_bad_caches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        simulate_cache([0, 1], **options)


def test_names_of_policies():
    assert list_cache_policies() == POLICIES
    with pytest.raises(ValueError, match="a cache policy named `lru` is registered already"):
        register_cache_policy("lru")


# --- batches ---


def arrivals(seed, count=200, experts=7, most=5):
    generator = random.Random(seed)
    return [RoutedTokens(i, generator.randrange(experts), generator.randint(1, most)) for i in range(count)]


def drain(batcher, pieces, at_once=20):
    """Batches while pieces come in, some at a time."""
    batches, coming = [], list(pieces)
    while coming or len(batcher):
        for piece in coming[:at_once]:
            batcher.add(piece)
        del coming[:at_once]
        batches.append(batcher.next_batch())
    return batches


@pytest.mark.parametrize("make", [FifoBatcher, ExpertAwareBatcher, functools.partial(ExpertAwareBatcher, max_wait=3)])
@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_or_doubled_and_batches_fit(make, seed):
    pieces = arrivals(seed)
    batches = drain(make(16), pieces)
    assert Counter(piece for batch in batches for piece in batch) == Counter(pieces)
    assert all(0 < sum(piece.tokens for piece in batch) <= 16 for batch in batches)


def test_the_longest_queue_goes_first_and_the_part_that_fits():
    batcher = ExpertAwareBatcher(10)
    pieces = [RoutedTokens(i, expert) for i, expert in enumerate([0] * 3 + [1] * 6 + [2] * 4)]
    for piece in pieces:
        batcher.add(piece)
    assert [piece.expert for piece in batcher.next_batch()] == [1] * 6 + [2] * 4
    assert [piece.expert for piece in batcher.next_batch()] == [0] * 3 and not batcher.next_batch()
    for piece in pieces:
        batcher.add(piece)
    batcher.token_budget = 8
    first = batcher.next_batch()
    assert [piece.expert for piece in first] == [1] * 6 + [2] * 2  # and no other queue after a part
    assert [piece.request for piece in first[6:]] == [9, 10]


@pytest.mark.parametrize("seed", range(10))
def test_fewer_experts_in_a_batch_than_first_come_first_served(seed):
    pieces = arrivals(seed, count=400, most=1)

    def mean(batcher):
        batches = drain(batcher, pieces, at_once=24)
        return sum(len({piece.expert for piece in batch}) for batch in batches) / len(batches)

    assert mean(ExpertAwareBatcher(16)) < mean(FifoBatcher(16))


@pytest.mark.parametrize("max_wait", [None, 4])
def test_a_rare_expert_waits_as_long_as_it_is_let(max_wait):
    batcher = ExpertAwareBatcher(4, max_wait)
    batcher.add(RoutedTokens("rare", 1))
    for number in range(40):
        for i in range(6):
            batcher.add(RoutedTokens((number, i), 0))
        if any(piece.request == "rare" for piece in batcher.next_batch()):
            break
    assert number == (39 if max_wait is None else 4)


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="`token_budget` must be at least 1, got 0"):
        FifoBatcher(0)
    with pytest.raises(ValueError, match="`max_wait` must be at least 1, got 0"):
        ExpertAwareBatcher(4, 0)
    with pytest.raises(ValueError, match="a piece of 5 tokens does not fit a batch of 4"):
        ExpertAwareBatcher(4).add(RoutedTokens(0, 0, 5))


# --- the simulator ---


def test_one_request_takes_its_load_and_its_tokens():
    costs = ServingCosts(per_token=2.0, per_expert=3.0, per_load=7.0, num_layers=1)
    found = simulate_serving([(5.0, RoutedTokens("a", 0, 4))], FifoBatcher(8), capacity=1, costs=costs)
    assert found.mean_latency == found.p95_latency == 2 * 4 + 3 + 7
    assert found.tokens_per_time == pytest.approx(4 / 18) and found.batches == 1 and found.hit_rate == 0


@pytest.mark.parametrize(("load", "expected"), [(0.0, 8.0), (4.0, 8 + 4 / 4), (8.0, 8 + 8 / 4), (20.0, 20 + 8 / 4)])
def test_prefetching_hides_all_loads_but_the_first_layers(load, expected):
    """Four layers; what is longer, computing or loading, sets the pace."""
    costs = ServingCosts(per_token=1.0, per_load=load, num_layers=4)
    run = functools.partial(simulate_serving, [(0.0, RoutedTokens(0, 0, 8))], FifoBatcher(8), capacity=1)
    assert run(costs=costs).mean_latency == pytest.approx(expected)
    waited = ServingCosts(per_token=1.0, per_load=load, num_layers=4, prefetch=False)
    assert simulate_serving([(0.0, RoutedTokens(0, 0, 8))], FifoBatcher(8), capacity=1, costs=waited).mean_latency == (
        8 + load
    )


def test_a_queue_is_served_in_turn():
    """Three requests at once, one a batch: they wait 1, 2 and 3 units."""
    waiting = [(0.0, RoutedTokens(i, 0)) for i in range(3)]
    found = simulate_serving(waiting, FifoBatcher(1), capacity=1)
    assert found.mean_latency == 2 and found.p95_latency == 3 and found.hit_rate == pytest.approx(2 / 3)


def test_idle_time_is_no_latency():
    found = simulate_serving([(0.0, RoutedTokens(0, 0)), (100.0, RoutedTokens(1, 0))], FifoBatcher(4), capacity=1)
    assert found.mean_latency == 1 and found.batches == 2


def test_better_policies_and_batches_are_faster():
    generator = random.Random(0)
    coming, clock = [], 0.0
    for piece in arrivals(0, count=600, most=3):
        clock += generator.expovariate(0.4)
        coming.append((clock, piece))
    costs = ServingCosts(per_token=1.0, per_expert=0.5, per_load=4.0, prefetch=False)
    found = {
        (kind.__name__, policy): simulate_serving(coming, kind(16), capacity=3, policy=policy, costs=costs)
        for kind in (FifoBatcher, ExpertAwareBatcher)
        for policy in ("lru", "belady")
    }
    for kind in ("FifoBatcher", "ExpertAwareBatcher"):
        assert found[kind, "belady"].hit_rate > found[kind, "lru"].hit_rate
        assert found[kind, "belady"].mean_latency < found[kind, "lru"].mean_latency
    for policy in ("lru", "belady"):
        assert found["ExpertAwareBatcher", policy].experts_per_batch < found["FifoBatcher", policy].experts_per_batch


def test_bad_simulations_are_refused():
    with pytest.raises(ValueError, match="`arrivals` is empty"):
        simulate_serving([], FifoBatcher(4), capacity=1)
    full = FifoBatcher(4)
    full.add(RoutedTokens(0, 0))
    with pytest.raises(ValueError, match="must be empty, and 1 pieces wait"):
        simulate_serving([(0.0, RoutedTokens(1, 0))], full, capacity=1)
    with pytest.raises(ValueError, match="`per_load` must be non-negative"):
        ServingCosts(per_load=-1)
    with pytest.raises(ValueError, match="`num_layers` must be at least 1"):
        ServingCosts(num_layers=0)


# --- traces ---


def test_traces_of_a_stock_model_are_its_choices():
    model = copy.deepcopy(tiny_model("mixtral"))
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    found = routing_traces(model, [{"input_ids": ids, "attention_mask": mask}])
    assert type(model).__name__ == "MixtralForCausalLM"
    moe.extend(model, moe.TopKRouterConfig())
    with moe.trace_routing(model) as contexts, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    assert set(found) == set(contexts[0].records)
    for key, record in contexts[0].records.items():
        rows = record.index[mask.flatten().bool()].sort(1).values.tolist()
        assert found[key] == [tuple(row) for row in rows] and len(rows) == 14
    assert 0 < simulate_cache(found["0"], 4).hit_rate < 1


def test_locality_of_traces():
    assert repeated_share([(0,), (0,), (1,), (1,), (1,)]) == 3 / 4
    stay, experts = 0.6, 5
    trace = [(expert,) for expert in sticky_trace(50_000, experts, stay)]
    assert repeated_share(trace) == pytest.approx(stay + (1 - stay) / experts, abs=0.01)
    assert math.isclose(repeated_share([(0,)]), 0)
    with pytest.raises(ValueError, match=r"`stay` must be in \[0, 1\], got 2"):
        sticky_trace(5, 3, 2)
