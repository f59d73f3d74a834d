"""What routers do with the tokens of each domain of the data.

    moe/domain/NAME/mean_k, entropy, load_max, max_violation, dead_experts, drop_rate    as over all tokens
    moe/domain_divergence    how differently the domains use the experts: in nats, 0 where they use them alike, and
                             log(D) where no two of the D domains share an expert; mean over layers

The divergence of a layer is the Jensen-Shannon divergence of the domains' loads, all with the same weight: the mutual
information between expert and domain, had every domain as many token-expert pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from ..modeling.moe_context import RoutingContext
from .routing_metrics import LayerStatistics, Reduce, RoutingMetrics, layer_means


COLUMN = "domain"

Domains = dict[str, dict[str, LayerStatistics]]


class DomainMetrics:
    """Running sums for each domain. Every domain is measured in every forward, so that all processes of a distributed
    run have the same sums to add, whatever their batches hold.

    Args:
        names: of the domains; the column `domain` of the data has their positions.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.sums = {name: RoutingMetrics() for name in names}

    def update(self, contexts: list[RoutingContext], domain: torch.Tensor) -> None:
        """Add the records of one forward, whose rows are of the domains (B,)."""
        for number, metrics in enumerate(self.sums.values()):
            metrics.update(contexts, rows=domain == number)

    def read(self, reduce: Reduce | None = None) -> Domains:
        """Statistics by domain and layer key since the last call. Every process must call it."""
        return {name: metrics.read(reduce) for name, metrics in self.sums.items()}

    def check(self, found: Domains, layers: dict[str, LayerStatistics]) -> None:
        """Raise `ValueError` where there are tokens of no domain that has a name.

        Args:
            found: what `read` gave.
            layers: statistics over all tokens.
        """
        for key, layer in layers.items():
            rest = layer.tokens - sum(domain[key].tokens for domain in found.values() if key in domain)
            if rest:
                raise ValueError(
                    f"{rest} of {layer.tokens} tokens have a `{COLUMN}` that is none of 0 to {len(self.sums) - 1}, "
                    f"the positions of {list(self.sums)} in `routing_domains`."
                )

    def state_dict(self, reduce: Reduce | None = None) -> dict[str, Any]:
        """See `RoutingMetrics.state_dict`."""
        return {name: metrics.state_dict(reduce) for name, metrics in self.sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `RoutingMetrics.load_state_dict`; domains that `state` does not have start anew."""
        for name, metrics in self.sums.items():
            metrics.load_state_dict(state.get(name, {}))


def domain_series(found: Domains) -> dict[str, float]:
    """The values to log, by name. A domain without a token has none."""
    series: dict[str, float] = {}
    seen = {name: layers for name, layers in found.items() if any(layer.tokens for layer in layers.values())}
    for name, layers in seen.items():
        series |= layer_means(layers, f"moe/{COLUMN}/{name}")
    if len(seen) > 1:
        keys = set.intersection(*(set(layers) for layers in seen.values()))
        values = [load_divergence([layers[key].load for layers in seen.values()]) for key in sorted(keys)]
        if values:
            series["moe/domain_divergence"] = sum(values) / len(values)
    return series


def load_divergence(loads: list[tuple[float, ...]]) -> float:
    """Jensen-Shannon divergence of distributions over experts, in nats, each with the same weight."""

    def entropy(load: Iterable[float]) -> float:
        return -sum(share * math.log(share) for share in load if share > 0)

    mixture = [sum(shares) / len(loads) for shares in zip(*loads, strict=True)]
    return max(entropy(mixture) - sum(entropy(load) for load in loads) / len(loads), 0.0)
