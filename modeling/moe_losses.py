"""Auxiliary losses and statistics of routing: pure functions of what a router decided and a token mask.

Axes: T tokens, E experts, K slots. `mask` is (T,) bool, true for tokens that count; padding never does.
"""

from __future__ import annotations

import torch


def _masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the first axis of the rows that count; 0 where no row does."""
    if mask is None:
        return values.sum(dim=0) / max(len(values), 1)
    mask = mask.to(device=values.device).view(-1, *([1] * (values.dim() - 1)))
    return values.masked_fill(~mask, 0).sum(dim=0) / mask.sum().clamp(min=1)


def expert_counts(index: torch.Tensor, num_experts: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How many of the tokens that count chose each expert: (T, K) ids -> (E,) int64. Ids of `num_experts` and above
    (nobody, zero-computation experts) are left out."""
    if mask is not None:
        index = index.masked_fill(~mask.to(index.device)[:, None], num_experts)
    counts = index.new_zeros(num_experts + 1)
    flat = index.reshape(-1).clamp(max=num_experts)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


def experts_per_token(index: torch.Tensor, num_experts: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean number of real experts that a token uses (scalar, float32)."""
    return _masked_mean((index < num_experts).sum(dim=-1).float(), mask)


def load_balancing_loss(scores: torch.Tensor, index: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """`E * sum_i f_i Q_i`: `f_i` the share of tokens that chose expert i, `Q_i` its mean score.

    With uniform routing it equals the mean number of experts per token; it is smallest there. `f` has no gradient.
    Switch Transformers (2101.03961) eq. 4, with dynamic expert sets as in "Harder Tasks Need More Experts"
    (2403.07652).

    Args:
        scores: (T, E) routing distribution, rows summing to 1.
        index: (T, K) chosen experts.
        mask: (T,) tokens that count.
    """
    num_experts = scores.shape[-1]
    total = max(len(scores), 1) if mask is None else mask.sum().clamp(min=1)
    share = expert_counts(index, num_experts, mask).to(scores.dtype) / total
    return num_experts * (share * _masked_mean(scores, mask)).sum()


def mixed_balancing_loss(
    scores: torch.Tensor,
    index: torch.Tensor,
    num_experts: int,
    num_null: int,
    *,
    grouped: bool = False,
    zero_weight: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`C * sum_j eta_j F_j Q_j` over real and zero-computation experts; `load_balancing_loss` but for `grouped` and
    `zero_weight`.

    AdaMoE (2406.13233), section 3.3, and MoE++ (2410.07348), eq. 7 (which has no factor C).

    Args:
        scores: (T, C) routing distribution; columns are real experts, null experts, other zero-computation experts.
        index: (T, K) chosen columns; C for an unused slot.
        num_experts: E, the number of real experts.
        num_null: zero-computation experts that return nothing.
        grouped: whether `F` of a null expert is the mean over all of them, so that only their sum is balanced.
        zero_weight: `eta` of zero-computation experts; 1 for real ones.
        mask: (T,) tokens that count.
    """
    columns = scores.shape[-1]
    total = max(len(scores), 1) if mask is None else mask.sum().clamp(min=1)
    share = expert_counts(index, columns, mask).to(scores.dtype) / total
    if grouped and num_null:
        real, null, others = share.split([num_experts, num_null, columns - num_experts - num_null])
        share = torch.cat([real, null.mean().expand(num_null), others])
    is_real = torch.arange(columns, device=scores.device) < num_experts
    share = torch.where(is_real, share, zero_weight * share)
    return columns * (share * _masked_mean(scores, mask)).sum()


def localized_balancing_loss(
    scores: torch.Tensor,
    rows: torch.Tensor,
    tasks: torch.Tensor | None = None,
    *,
    groups: int = 2,
    offset: float = 0.1,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`var(Z) / mean(Z)^2` over experts n and sequences m: `Z_nm` is the mean score of expert n in sequence m, times
    `1 + offset` where n is of the group of m's task, and `1 - offset` where it is not. 0 where all are equal.

    LoRAMoE (2312.09979), eq. 6 to 8. Like the authors' code it divides by the squared mean, which the paper does not.
    Unlike there, sequences count by the mean of their tokens, not by the sum: padded ones are no lighter.

    Args:
        scores: (T, E) routing distribution.
        rows: (T,) which sequence a token is of, from 0.
        tasks: (T,) the task of a token's sequence, from 0; `None` leaves the factors out.
        groups: types of tasks. Experts are cut into as many groups, as equal as may be.
        offset: delta.
        mask: (T,) tokens that count.

    Raises:
        ValueError: for a task that has no group.
    """
    batch, num_experts = int(rows[-1]) + 1 if len(rows) else 0, scores.shape[-1]
    counted = torch.ones(len(rows), device=scores.device) if mask is None else mask.to(scores.device).float()
    sums = scores.new_zeros(batch, num_experts).index_add(0, rows, scores * counted.to(scores)[:, None])
    tokens = counted.new_zeros(batch).index_add(0, rows, counted)
    means = sums[tokens > 0] / tokens[tokens > 0, None].to(scores)
    if tasks is not None:
        of_row = tasks.new_zeros(batch).index_copy(0, rows, tasks)[tokens > 0]
        if of_row.numel() and not (0 <= int(of_row.min()) and int(of_row.max()) < groups):
            raise ValueError(
                f"`task_ids` must be from 0 to {groups - 1}, the groups of experts; got {of_row.tolist()}."
            )
        group = torch.arange(num_experts, device=scores.device) * groups // num_experts
        means = means * torch.where(group == of_row[:, None], 1 + offset, 1 - offset).to(means)
    if means.numel() < 2:
        return scores.sum() * 0
    return means.var() / means.mean().square().clamp_min(torch.finfo(means.dtype).tiny)


def router_z_loss(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of `logsumexp(logits)^2` (ST-MoE, 2202.08906, eq. 5). `logits` is (T, E)."""
    return _masked_mean(torch.logsumexp(logits.float(), dim=-1).square(), mask)


def router_concentration(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Entropy of the mean routing distribution, in nats: 0 where all tokens choose one expert, `log E` where all
    experts are chosen alike. `scores` is (T, E).

    As a loss, it lets a task use few experts. ModuleFormer (2306.04640), load concentration.
    """
    return router_entropy(_masked_mean(scores, mask)[None])


def router_information(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Minus the mutual information of tokens and experts, in nats: from `-log E`, where each token chooses one expert
    and all are chosen alike, to 0, where the choice tells nothing of the token. `scores` is (T, E).

    ModuleFormer (2306.04640), section 3.
    """
    return router_entropy(scores, mask) - router_concentration(scores, mask)


def router_entropy(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of `-sum_i P_i log P_i`, in nats: 0 for one-hot rows, `log E` for uniform ones.

    As a loss, the "dynamic loss" of 2403.07652: minimising it sharpens the router. `scores` is (T, E).
    """
    # Not `torch.special.entr`: its gradient is infinite at 0, which a softmax reaches by underflow, and NaN before it.
    tiny = torch.finfo(scores.dtype).tiny
    return _masked_mean(-(scores * scores.clamp_min(tiny).log()).sum(dim=-1), mask)
