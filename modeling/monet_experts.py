"""Experts of Monet: `S ** 2` of them, composed of two sets of S pieces and computed without ever building one.

Monet (2412.04139), section 3. Axes: T tokens, H router heads, S pieces on each side, m width of an expert, d hidden.
The experts of a layer are the pairs (i, j) with the number `i * S + j`.

The scores of a head sum to 1 on each side, so what depends on one side only needs a single sum. Where experts are
removed, the first pieces that lost one have the scores of their pairs made and masked; the others are as before.
Nothing is subtracted, so nothing of a removed expert stays behind as rounding, in no precision.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.activations import ACT2FN


# Scores of pairs that exist at once where experts are removed.
_CHUNK = 2**24


class MonetBatchNorm(nn.Module):
    """Batch normalisation of router logits (T, H, S) by head, without weights: over all tokens that count and all S.

    Statistics are in float32 whatever the model's precision, and are taken over all processes in training. The running
    ones are updated by `update`, outside of what activation checkpointing computes twice. The result only chooses
    pieces, so it has no gradient.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(self, heads: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(heads))
        self.register_buffer("running_var", torch.ones(heads))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves, and never casts: running statistics lose too much in half precision."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        module = super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return module

    @torch.no_grad()
    def forward(self, logits: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normalised logits, and in training the statistics for `update`: (3, H) mean, biased variance, count."""
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return (logits - mean[:, None]) * torch.rsqrt(var[:, None] + self.eps), None
        weight = logits.new_ones(len(logits)) if mask is None else mask.to(logits.dtype)
        weight = weight[:, None, None]
        count = weight.sum() * logits.shape[2]
        sums = torch.cat([(logits * weight).sum(dim=(0, 2)), count[None]])
        sums = _sum_over_processes(sums)
        count = sums[-1].clamp(min=1)
        mean = sums[:-1] / count
        centred = logits - mean[:, None]
        var = _sum_over_processes((centred.square() * weight).sum(dim=(0, 2))) / count
        statistics = torch.stack([mean, var, count.expand_as(mean)])
        return centred * torch.rsqrt(var[:, None] + self.eps), statistics

    @torch.no_grad()
    def update(self, statistics: torch.Tensor) -> None:
        """Move the running statistics towards those of a batch."""
        mean, var, count = statistics
        unbiased = var * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        self.num_batches_tracked += 1


def _sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place, where training is distributed."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class MonetRouter(nn.Module):
    """Scores of the pieces of both sides, shared by a group of layers.

    A head keeps the pieces whose normalised logit is above the quantile `1 - k/S` of a normal distribution, or its
    best one, and its scores are the softmax of the raw logits of those.
    """

    removed_experts: torch.Tensor

    def __init__(self, config: Any, group: int) -> None:
        super().__init__()
        self.heads, self.pieces = config.moe_heads, config.moe_experts
        self.threshold = NormalDist().inv_cdf(1 - config.moe_topk / config.moe_experts)
        self.w1 = nn.Linear(config.hidden_size, self.heads * self.pieces, bias=False)
        self.w2 = nn.Linear(config.hidden_size, self.heads * self.pieces, bias=False)
        self.norm1, self.norm2 = MonetBatchNorm(self.heads), MonetBatchNorm(self.heads)
        removed = config.num_removed_experts
        count = 0 if removed is None else removed[group]
        self.remove(torch.zeros(count, dtype=torch.int64))

    def remove(self, experts: torch.Tensor) -> None:
        """Keep the numbers of the removed experts, (P,); they are saved with the weights where there are any."""
        self.register_buffer("removed_experts", experts, persistent=experts.numel() > 0)

    def mask_problem(self) -> str | None:
        """What is wrong with the numbers of the removed experts, or `None`."""
        experts, total = self.removed_experts, self.pieces**2
        if experts.numel() == 0 or experts.device.type == "meta":
            return None
        if int(experts.min()) < 0 or int(experts.max()) >= total:
            return f"experts are 0 to {total - 1}, got {int(experts.min())} to {int(experts.max())}"
        if experts.unique().numel() < experts.numel():
            return "some are named twice"
        return None

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Scores (T, H, S) of both sides in float32, and in training the statistics of both norms (2, 3, H)."""
        scores, statistics = [], []
        for linear, norm in ((self.w1, self.norm1), (self.w2, self.norm2)):
            logits = linear(hidden).float().unflatten(-1, (self.heads, self.pieces))
            normed, found = norm(logits, mask)
            best = normed.amax(dim=-1, keepdim=True)
            kept = normed >= best.clamp(max=self.threshold)
            scores.append(logits.masked_fill(~kept, float("-inf")).softmax(dim=-1))
            statistics.append(found)
        told = None if statistics[0] is None or statistics[1] is None else torch.stack(statistics)
        return scores[0], scores[1], told


class MonetExperts(nn.Module):
    """Base of the two decompositions: (T, d), scores of both sides (T, H, S) -> (T, d)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.pieces, self.act_fn = config.moe_experts, ACT2FN[config.hidden_act]

    def forward(
        self, hidden: torch.Tensor, g1: torch.Tensor, g2: torch.Tensor, removed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`removed` are the numbers of experts whose scores are set to 0; nothing is renormalised."""
        g1, g2 = g1.to(hidden.dtype), g2.to(hidden.dtype)
        if removed is None or removed.numel() == 0:
            return self.compute(hidden, _Pairs(g1, g2))
        rows, kept = _masked_rows(removed, self.pieces)
        chunk = max(1, _CHUNK // kept.numel())
        parts = zip(hidden.split(chunk), g1.split(chunk), g2.split(chunk), strict=True)
        return torch.cat([self.compute(x, _MaskedPairs(a, b, rows, kept)) for x, a, b in parts])

    def compute(self, hidden: torch.Tensor, pairs: _Pairs) -> torch.Tensor:
        """The sum over all experts, with the scores of `pairs`."""
        raise NotImplementedError


class _Pairs:
    """Sums over pairs of pieces with the scores `G_ij = sum_h g1_hi g2_hj`, without making G."""

    def __init__(self, g1: torch.Tensor, g2: torch.Tensor) -> None:
        self.g1, self.g2 = g1, g2

    def mix_first(self, values: torch.Tensor) -> torch.Tensor:
        """`out_j = sum_i G_ij values_i`: (T, S, w) -> (T, S, w), by way of the heads: H times S times w operations for
        a token in place of S times S times w."""
        return self.g2.transpose(1, 2) @ (self.g1 @ values)

    def mix_second(self, values: torch.Tensor) -> torch.Tensor:
        """`out_i = sum_j G_ij values_j`."""
        return self.g1.transpose(1, 2) @ (self.g2 @ values)

    def total_first(self) -> torch.Tensor:
        """`sum_j G_ij`, (T, S): a single sum, since the scores of a head sum to 1."""
        return self.g1.sum(1)

    def total_second(self) -> torch.Tensor:
        """`sum_i G_ij`."""
        return self.g2.sum(1)


def _masked_rows(removed: torch.Tensor, pieces: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first pieces with a removed expert, (R,), and which of their experts are kept, (R, S).

    R is `min(P, S)`, so that shapes do not depend on values; where fewer pieces have one, whole ones fill up.
    """
    kept = torch.ones(pieces * pieces, dtype=torch.bool, device=removed.device).index_fill(0, removed, False)
    kept = kept.view(pieces, pieces)
    rows = kept.all(dim=1).int().argsort(stable=True)[: min(removed.numel(), pieces)]
    return rows, kept[rows]


class _MaskedPairs(_Pairs):
    """As `_Pairs`, with scores of 0 for removed experts: G is made for the rows that have one."""

    def __init__(self, g1: torch.Tensor, g2: torch.Tensor, rows: torch.Tensor, kept: torch.Tensor) -> None:
        super().__init__(g1.index_fill(2, rows, 0), g2)  # the other rows, whole
        self.rows = rows
        self.scores = (g1[:, :, rows].transpose(1, 2) @ g2).masked_fill_(~kept, 0)  # (T, R, S)

    def mix_first(self, values: torch.Tensor) -> torch.Tensor:
        return super().mix_first(values) + self.scores.transpose(1, 2) @ values[:, self.rows]

    def mix_second(self, values: torch.Tensor) -> torch.Tensor:
        return super().mix_second(values).index_copy(1, self.rows, self.scores @ values)

    def total_first(self) -> torch.Tensor:
        return super().total_first().index_copy(1, self.rows, self.scores.sum(2))

    def total_second(self) -> torch.Tensor:
        return (self.g1.sum(2, keepdim=True) * self.g2).sum(1) + self.scores.sum(1)


class HorizontalExperts(MonetExperts):
    """`E_ij(x) = V_j act(U_i x + b1_i) + b2_j`. Parameters `u`, `v` and `b` (S, d)."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size = config.moe_experts * config.moe_dim
        self.u = nn.Linear(config.hidden_size, size)
        self.v = nn.Linear(size, config.hidden_size, bias=False)
        self.b = nn.Parameter(torch.zeros(config.moe_experts, config.hidden_size))

    def compute(self, hidden: torch.Tensor, pairs: _Pairs) -> torch.Tensor:
        inner = self.act_fn(self.u(hidden)).unflatten(-1, (self.pieces, -1))
        return self.v(pairs.mix_first(inner).flatten(1)) + pairs.total_second() @ self.b


class VerticalExperts(MonetExperts):
    """Halves of both layers from both sides: with `a1_i = act(U1_i x + .)` and `a2_j = act(U2_j x + .)`,
    `E_ij(x) = [V11_i a1_i + V12_i a2_j + b1_i; V21_j a1_i + V22_j a2_j + b2_j]`. Parameters `u1`, `u2`, `v11` to
    `v22`, and `b1`, `b2` (S, d/2)."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size, half = config.moe_experts * (config.moe_dim // 2), config.hidden_size // 2
        self.u1, self.u2 = nn.Linear(config.hidden_size, size), nn.Linear(config.hidden_size, size)
        self.v11, self.v12 = nn.Linear(size, half, bias=False), nn.Linear(size, half, bias=False)
        self.v21, self.v22 = nn.Linear(size, half, bias=False), nn.Linear(size, half, bias=False)
        self.b1 = nn.Parameter(torch.zeros(config.moe_experts, half))
        self.b2 = nn.Parameter(torch.zeros(config.moe_experts, half))

    def compute(self, hidden: torch.Tensor, pairs: _Pairs) -> torch.Tensor:
        a1 = self.act_fn(self.u1(hidden)).unflatten(-1, (self.pieces, -1))
        a2 = self.act_fn(self.u2(hidden)).unflatten(-1, (self.pieces, -1))
        first, second = pairs.total_first(), pairs.total_second()
        own_first, own_second = a1 * first[..., None], a2 * second[..., None]
        top = self.v11(own_first.flatten(1)) + self.v12(pairs.mix_second(a2).flatten(1)) + first @ self.b1
        bottom = self.v21(pairs.mix_first(a1).flatten(1)) + self.v22(own_second.flatten(1)) + second @ self.b2
        return torch.cat([top, bottom], dim=-1)


EXPERTS: dict[str, type[MonetExperts]] = {"horizontal": HorizontalExperts, "vertical": VerticalExperts}


def uniformity_loss(g1: torch.Tensor, g2: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How unevenly the pieces are used: minus the mean over heads and pieces of the logarithm of the mean score;
    `log S` at the least, where all have the same.

    Args:
        g1, g2: (T, H, S) scores.
        mask: (T,) tokens that count.
    """
    losses = [-(_mean(scores, mask) + 1e-10).log().mean() for scores in (g1, g2)]
    return (losses[0] + losses[1]) / 2


def ambiguity_loss(g1: torch.Tensor, g2: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How undecided the heads are: the mean of 1 minus the largest score; 0 for one piece, `1 - 1/S` for all alike."""
    losses = [_mean(1 - scores.amax(dim=-1), mask).mean() for scores in (g1, g2)]
    return (losses[0] + losses[1]) / 2


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens that count."""
    if mask is None:
        return values.mean(0)
    mask = mask.to(values.device)
    shape = [-1] + [1] * (values.dim() - 1)
    return values.masked_fill(~mask.view(shape), 0).sum(0) / mask.sum().clamp(min=1)
