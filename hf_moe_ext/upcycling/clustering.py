"""Clusters of equal size: which neurons go to which expert.

Assignment to clusters with a fixed number of places is a transport problem. It is solved from a good start by moving
members along cycles of clusters as long as that lowers the cost; where no cycle does, no assignment is better.
"""

from __future__ import annotations

import torch


def balanced_assignment(cost: torch.Tensor) -> torch.Tensor:
    """Assign N items to E clusters of N/E places each, at the lowest total cost.

    Args:
        cost: (N, E) float; E must divide N.

    Returns:
        (N,) the cluster of each item.
    """
    items, clusters = cost.shape
    cost = cost.double()
    # Who loses most by missing the best cluster chooses first.
    two = cost.topk(min(2, clusters), dim=1, largest=False).values
    order = (two[:, -1] - two[:, 0]).argsort(descending=True, stable=True).tolist()
    preferences = cost.argsort(dim=1, stable=True).tolist()
    free, start = [items // clusters] * clusters, [0] * items
    for item in order:
        start[item] = next(cluster for cluster in preferences[item] if free[cluster])
        free[start[item]] -= 1
    owner = torch.tensor(start)
    while any([_exchange(cost, owner, a, b) for a in range(clusters) for b in range(a + 1, clusters)]):
        pass
    _cancel_cycles(cost, owner)
    return owner


def _exchange(cost: torch.Tensor, owner: torch.Tensor, a: int, b: int) -> bool:
    """Swap members of two clusters, the best pairs first, while that lowers the cost; whether any was swapped."""
    in_a, in_b = (owner == a).nonzero().flatten(), (owner == b).nonzero().flatten()
    gain_a, order_a = (cost[in_a, a] - cost[in_a, b]).sort(descending=True, stable=True)
    gain_b, order_b = (cost[in_b, b] - cost[in_b, a]).sort(descending=True, stable=True)
    swaps = int((gain_a + gain_b > _noise(cost)).sum())
    if swaps == 0:
        return False
    owner[in_a[order_a[:swaps]]], owner[in_b[order_b[:swaps]]] = b, a
    return True


def _cancel_cycles(cost: torch.Tensor, owner: torch.Tensor) -> None:
    """Move one member along each edge of a cycle of clusters, as long as there is a cycle that lowers the cost."""
    clusters = cost.shape[1]
    price = torch.full((clusters, clusters), float("inf"), dtype=torch.float64)  # of the cheapest move from a to b
    mover = torch.zeros(clusters, clusters, dtype=torch.int64)
    changed = list(range(clusters))
    while changed:
        for a in changed:
            members = (owner == a).nonzero().flatten()
            price[a], best = (cost[members] - cost[members, a, None]).min(dim=0)
            mover[a] = members[best]
            price[a, a] = float("inf")
        changed = _negative_cycle(price, _noise(cost))
        moves = [(int(mover[a, b]), b) for a, b in zip(changed, changed[1:] + changed[:1], strict=True)]
        for item, b in moves:
            owner[item] = b


def _negative_cycle(price: torch.Tensor, noise: float) -> list[int]:
    """Clusters along a cycle whose moves cost less than nothing in sum, by Bellman and Ford; empty for none."""
    clusters = price.shape[0]
    distance = torch.zeros(clusters, dtype=torch.float64)
    before = torch.full((clusters,), -1)
    last = -1
    for _ in range(clusters):
        shorter, source = (distance[:, None] + price).min(dim=0)
        better = shorter < distance - noise
        if not better.any():
            return []
        distance, before = torch.where(better, shorter, distance), torch.where(better, source, before)
        last = int(better.nonzero()[0])
    for _ in range(clusters):  # certainly inside the cycle then
        last = int(before[last])
    cycle, node = [last], int(before[last])
    while node != last:
        cycle.append(node)
        node = int(before[node])
    return cycle[::-1]


def _noise(cost: torch.Tensor) -> float:
    """What counts as rounding."""
    return 1e-12 * float(cost.abs().max())


def _first_centres(points: torch.Tensor, clusters: int, seed: int) -> torch.Tensor:
    """(E, D) points that are far from each other (k-means++)."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < clusters:
        distance = torch.cdist(points, centres).square().amin(1)
        if float(distance.sum()) == 0:
            distance = torch.ones_like(distance)
        centres = torch.cat([centres, points[torch.multinomial(distance, 1, generator=generator)]])
    return centres


def kmeans(points: torch.Tensor, clusters: int, seed: int, rounds: int = 50) -> torch.Tensor:
    """k-means (Lloyd), with clusters of any size.

    Args:
        points: (N, D), at least as many as `clusters`.
        clusters: E.
        seed: of the first centres (k-means++).
        rounds: of assignment and update at the most.

    Returns:
        (E, D) the centres. One that loses all its points stays where it was.
    """
    points = points.float()
    centres = _first_centres(points, clusters, seed)
    owner = torch.full((len(points),), -1)
    for _ in range(rounds):
        found = torch.cdist(points, centres).argmin(1)
        if torch.equal(found, owner):
            break
        owner = found
        counts = torch.bincount(owner, minlength=clusters)
        means = torch.zeros_like(centres).index_add_(0, owner, points) / counts.clamp(min=1)[:, None]
        centres = torch.where(counts[:, None] > 0, means, centres)
    return centres


def balanced_kmeans(points: torch.Tensor, clusters: int, seed: int, rounds: int = 20) -> torch.Tensor:
    """k-means with clusters of equal size.

    Args:
        points: (N, D); `clusters` must divide N.
        clusters: E.
        seed: of the first centres (k-means++).
        rounds: of assignment and update at the most.

    Returns:
        (N,) the cluster of each point.
    """
    points = points.float()
    centres = _first_centres(points, clusters, seed)
    owner = torch.full((len(points),), -1)
    for _ in range(rounds):
        found = balanced_assignment(torch.cdist(points, centres).square())
        if torch.equal(found, owner):
            break
        owner = found
        centres = torch.stack([points[owner == cluster].mean(0) for cluster in range(clusters)])
    return owner
