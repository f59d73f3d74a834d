"""Serving models whose routing is known before it is computed: caches of experts, batches by expert, a simulator.

Read-ME (2410.19123), section 4.
"""

from .batching import Batcher, ExpertAwareBatcher, FifoBatcher, RoutedTokens
from .caching import (
    CachePolicy,
    CacheResult,
    cache_hit_rates,
    list_cache_policies,
    register_cache_policy,
    simulate_cache,
)
from .simulator import ServingCosts, ServingResult, simulate_serving
from .traces import repeated_share, routing_traces, sticky_trace


__all__ = [
    "Batcher",
    "CachePolicy",
    "CacheResult",
    "ExpertAwareBatcher",
    "FifoBatcher",
    "RoutedTokens",
    "ServingCosts",
    "ServingResult",
    "cache_hit_rates",
    "list_cache_policies",
    "register_cache_policy",
    "repeated_share",
    "routing_traces",
    "simulate_cache",
    "simulate_serving",
    "sticky_trace",
]
