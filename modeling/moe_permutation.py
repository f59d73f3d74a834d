"""Permutation local search: which expert stands behind which output of a sparse gate is learned, too.

"COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search" (2306.02824). A sparse gate
may be stuck with a bad assignment of tokens to experts: an expert that a token does not use has no gradient from it.
During the first steps of training a doubly stochastic matrix stands between the gate and the experts, so that every
expert is tried; it sharpens, and is then replaced by a permutation for good.

A router takes this in by deriving from `PermutedRouter`, and its config from `PermutedRouterConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_losses import _masked_mean
from .moe_router import MoERouter
from .moe_schedules import ramp, schedule_fraction


# Smaller weights leave their slot unused, as in the code of the paper.
MIN_WEIGHT = 1e-5
INIT_RANGE = 0.05


@dataclass
class PermutedRouterConfig(RouterConfig):
    """What routers with permutation local search have in common (2306.02824).

    > Parameters that control the permutation of experts

    Args:
        permutation_steps (`int`, *optional*, defaults to 0):
            Optimizer steps during which a permutation of the experts is learned; 0 learns none. In these steps every
            expert computes every token. Then the permutation is fixed.
        permutation_per_selector (`bool`, *optional*, defaults to `False`):
            Whether each of the k trees or selectors has a permutation of its own.
        permutation_noise (`float`, *optional*, defaults to 0.0):
            Factor on the Gumbel noise that is added to the learned matrix in training.
        permutation_diagonal (`float`, *optional*, defaults to 0.0):
            Head start of the assignment that is there. 0 begins near a random permutation. Where experts are trained
            already take about 0.2: that starts as the identity, and still learns. At 1 the identity stays.
        sinkhorn_temperature, sinkhorn_temperature_end (`float`, *optional*, defaults to 1e-2 and 1e-3):
            The learned matrix is divided by a temperature (tau) that goes from one to the other, exponentially.
        sinkhorn_iterations (`int`, *optional*, defaults to 100):
            Normalisations of rows and columns.

    > Parameters that control the auxiliary losses

    Args:
        permutation_coef (`float`, *optional*, defaults to 1e-4):
            Weight of the entropy of the doubly stochastic matrix (zeta).
    """

    permutation_steps: int = 0
    permutation_per_selector: bool = False
    permutation_noise: float = 0.0
    permutation_diagonal: float = 0.0
    sinkhorn_temperature: float = 1e-2
    sinkhorn_temperature_end: float = 1e-3
    sinkhorn_iterations: int = 100
    permutation_coef: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("permutation_steps", "permutation_noise", "permutation_diagonal", "permutation_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")
        for name in ("sinkhorn_temperature", "sinkhorn_temperature_end"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.sinkhorn_iterations < 1:
            raise ValueError(f"`sinkhorn_iterations` must be at least 1, got {self.sinkhorn_iterations}.")

    @property
    def schedule_steps(self) -> int | None:
        steps = [steps for steps in (super().schedule_steps, self.permutation_steps) if steps]
        return max(steps, default=None)


class PermutedRouter(MoERouter):
    """Base of routers between whose outputs and the experts stands a learned permutation.

    The matrix `moe_permutation_scores` (Theta, one or k of C x C) is trained. The buffer `moe_permutation` (int64, the
    expert of every output) holds -1 until `schedule` fixes it: by the best assignment on Theta, not on the last
    doubly stochastic matrix, which need not have converged. Both are saved.

    A subclass calls `setup_permutation` in `setup`, `reset_permutation` in `reset_parameters`, and in `route` either
    `permute` (a mixture) or `permute_slots`. Without `permutation_steps` they change nothing.
    """

    moe_config: Any
    moe_attributes: tuple[str, ...]
    moe_permutation: torch.Tensor
    moe_permutation_fixed: bool

    def setup_permutation(self, selectors: int = 1) -> None:
        """Create what is learned, for a gate that is a sum of so many selectors."""
        config, size = self.moe_config, self.moe_site.num_choices
        if not config.permutation_steps:
            return
        count = selectors if config.permutation_per_selector else 1
        first = next(self.parameters())
        scores = torch.empty(count, size, size, device=first.device, dtype=first.dtype)
        self.moe_permutation_scores = nn.Parameter(scores)
        self.register_buffer("moe_permutation", torch.empty(count, size, dtype=torch.int64, device=first.device))
        self.use_progress()
        self.moe_permutation_fixed = False
        self.moe_attributes = (*self.moe_attributes, "moe_permutation_fixed")

    def reset_permutation(self) -> None:
        """Initialise it; called again after loading."""
        if "moe_permutation" in self._buffers:
            init.uniform_(self.moe_permutation_scores, -INIT_RANGE, INIT_RANGE)
            init.constant_(self.moe_permutation, -1)
            self._note_permutation()

    def _note_permutation(self) -> None:
        """Whether the permutation is fixed, as a plain attribute: shapes depend on it, so a graph must know it. Where
        it is not known (a buffer that is offloaded) `False` is right as well, and costs more."""
        known = self.moe_permutation
        self.moe_permutation_fixed = known.device.type != "meta" and bool((known >= 0).all())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if "moe_permutation" in self._buffers:
            self._note_permutation()

    def schedule(self, step: int, total_steps: int) -> None:
        super().schedule(step, total_steps)
        if "moe_permutation" not in self._buffers or step < self.moe_config.permutation_steps:
            return
        if not self.moe_permutation_fixed:
            self._note_permutation()
        if not self.moe_permutation_fixed:
            best = [best_assignment(scores) for scores in self._scores().detach().double().cpu().tolist()]
            self.moe_permutation.copy_(torch.tensor(best))
            self.moe_permutation_fixed = True

    def _scores(self) -> torch.Tensor:
        scores = self.moe_permutation_scores.float()
        return scores + self.moe_config.permutation_diagonal * torch.eye(scores.shape[-1], device=scores.device)

    def permutation(self, context: RoutingContext | None) -> torch.Tensor | None:
        """(1 or k, C, C) float32, rows outputs and columns experts: doubly stochastic, then a permutation. `None`
        where none is learned."""
        if "moe_permutation" not in self._buffers:
            return None
        config, fixed = self.moe_config, self.moe_permutation
        size = fixed.shape[-1]
        hard = (fixed.unsqueeze(-1) == torch.arange(size, device=fixed.device)).float()
        if self.moe_permutation_fixed:
            return hard
        scores = self._scores()
        if config.permutation_noise and self.training:

            def gumbel(generator: torch.Generator | None) -> torch.Tensor:
                return -torch.empty_like(scores).exponential_(generator=generator).log()

            draw = gumbel(None) if context is None else context.draw(self.moe_site.order, "permutation", gumbel)
            scores = scores + config.permutation_noise * draw
        fraction = schedule_fraction(self.moe_progress, config.permutation_steps)
        start, end = config.sinkhorn_temperature, config.sinkhorn_temperature_end
        soft = sinkhorn(scores, ramp(fraction, start, end, "exponential"), config.sinkhorn_iterations)
        return torch.where((fixed >= 0).unsqueeze(-1), hard, soft)

    def permutation_extras(self, matrices: torch.Tensor | None, num_tokens: int) -> dict[str, torch.Tensor]:
        """What the auxiliary loss needs, for the record's `extras`."""
        if matrices is None:
            return {}
        if self.moe_permutation_fixed:
            entropy = self.moe_permutation_scores.sum() * 0  # so that no parameter is ever outside the graph
        else:
            entropy = permutation_entropy(matrices)
        return {"permutation": entropy.expand(num_tokens)}

    def permute_slots(
        self, weights: torch.Tensor, index: torch.Tensor, matrices: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the slots (T, K) of a gate to experts; columns of C are unused.

        Until the permutation is fixed, training gives C slots, and evaluation keeps the K largest weights.
        """
        slots, size = index.shape[-1], self.moe_site.num_choices
        if matrices is None:
            return weights, index
        if self.moe_permutation_fixed:
            table = torch.cat([self.moe_permutation[0], self.moe_permutation.new_full((1,), size)])
            return weights, table[index]
        mixture = weights.new_zeros(len(index), size + 1).scatter(-1, index, weights)[:, :-1]
        return self.largest(permute(mixture.unsqueeze(1), matrices), size if self.training else slots)

    def largest(self, mixture: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `slots` largest weights of (T, C), scaled so that they sum to what all did, and their columns. Slots
        with next to no weight are unused; null experts do not count."""
        index = mixture.topk(slots, dim=-1).indices
        keep = mixture.gather(-1, index) >= MIN_WEIGHT
        # "sigmoid" names the way to renormalise: divide by the sum.
        weights = self.slot_weights(mixture, mixture, index, score="sigmoid", renormalize=True, keep=keep)
        return weights * mixture.sum(dim=-1, keepdim=True), index.masked_fill(~keep, self.moe_site.num_choices)


def permute(mixture: torch.Tensor, matrices: torch.Tensor | None) -> torch.Tensor:
    """Hand the outputs of a gate's selectors to experts, and add them up: (T, S, C) and (1 or S, C, C) to (T, C)."""
    if matrices is None:
        return mixture.sum(dim=1)
    if len(matrices) == 1:
        mixture = mixture.sum(dim=1, keepdim=True)
    # Under autocast a permutation would round the weights.
    with maybe_autocast(mixture.device.type, enabled=False):
        return torch.einsum("tsa,sab->tb", mixture.float(), matrices)


def refuse_z_loss(config: Any) -> None:
    """Raise `ValueError` for a z-loss where the logits are the logarithms of a distribution: it is always 0."""
    if config.z_coef:
        raise ValueError(
            f"`z_coef` must be 0 for the `{config.type}` router, got {config.z_coef}: its logits are the "
            "logarithms of a distribution, so a z-loss is always 0."
        )


def to_distribution(mixture: torch.Tensor) -> torch.Tensor:
    """(T, C) weights divided by their sum; even ones where nothing is left of a token, as may be where the doubly
    stochastic matrix is far from converged."""
    total = mixture.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, mixture / total.clamp_min(1e-30), 1 / mixture.shape[-1])


def extra_losses(record: RouteRecord, mask: torch.Tensor | None, *names: str) -> dict[str, torch.Tensor]:
    """Losses that are means over tokens of what stands in the record's `extras` under the same name."""
    coefs = record.config.loss_coefs
    return {n: _masked_mean(record.extras[n], mask) for n in names if coefs.get(n) and n in record.extras}


def sinkhorn(scores: torch.Tensor, temperature: torch.Tensor, iterations: int) -> torch.Tensor:
    """The doubly stochastic matrix `exp((scores - row - column) / temperature)`, (..., N, N).

    Rows and columns are normalised in turn, with logarithms. At a low temperature that takes thousands of rounds, so
    most rounds are made at temperatures that fall from the spread of the scores to the wanted one: with 100 rounds
    at 1e-3, and scores drawn from [-0.05, 0.05], rows sum to 1 within about 1e-2 rather than 3e-2, and at 1e-4
    most matrices are right that were not at all. Columns sum to 1 exactly.
    """
    spread = (scores.amax(dim=(-2, -1), keepdim=True) - scores.amin(dim=(-2, -1), keepdim=True)).detach() / 5
    ratio = (spread / temperature).clamp(min=1)
    row, column = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[..., :1, :])
    for i in range(iterations):
        heat = temperature * ratio ** max(0.0, 1 - i / (0.6 * iterations))
        row = heat * ((scores - column) / heat).logsumexp(dim=-1, keepdim=True)
        column = heat * ((scores - row) / heat).logsumexp(dim=-2, keepdim=True)
    return ((scores - row - column) / temperature).exp()


def permutation_entropy(matrices: torch.Tensor) -> torch.Tensor:
    """`H(P) + H(P with normalised rows)` in nats, summed over entries, mean over the matrices (S, N, N): 0 for
    permutations."""
    rows = matrices / matrices.sum(dim=-1, keepdim=True).clamp_min(1e-20)

    def entropy(probabilities: torch.Tensor) -> torch.Tensor:
        return -(probabilities * probabilities.clamp_min(1e-30).log()).sum(dim=(-2, -1))

    return (entropy(matrices) + entropy(rows)).mean()


def best_assignment(scores: list[list[float]]) -> list[int]:
    """The permutation `p` that maximises `sum_a scores[a][p[a]]`: Hungarian method by shortest augmenting paths.

    A search from each row in turn: `row_price` and `column_price` keep every reduced cost non-negative, and 0 on the
    pairs that are matched. O(n^3) at worst.
    """
    size = len(scores)
    free = size  # stands for "no row" and, as a column, for the row that looks for a partner
    row_price, column_price = [0.0] * size, [0.0] * (size + 1)
    row_of = [free] * (size + 1)
    for start in range(size):
        row_of[free] = start
        column, open_columns = free, list(range(size))
        distance, previous = [float("inf")] * size, [free] * size
        visited = []
        while row_of[column] != free:
            visited.append(column)
            row = row_of[column]
            costs, price = scores[row], row_price[row]
            nearest, shortest = -1, float("inf")
            for other in open_columns:
                reduced = -costs[other] - price - column_price[other]
                if reduced < distance[other]:
                    distance[other], previous[other] = reduced, column
                if distance[other] < shortest:
                    nearest, shortest = other, distance[other]
            for seen in visited:
                row_price[row_of[seen]] += shortest
                column_price[seen] -= shortest
            for other in open_columns:
                distance[other] -= shortest
            open_columns.remove(nearest)
            column = nearest
        while column != free:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    best = [0] * size
    for column, row in enumerate(row_of[:size]):
        best[row] = column
    return best
