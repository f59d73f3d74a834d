"""What the experts of a Monet model know: their scores by domain, experts of one domain, the experts of a token.

Monet (2412.04139), section 5. An expert is the pair (i, j) of a piece of each side, with the number `i * S + j`; there
are `S ** 2` of them for each group of layers. Its score for a token is `sum_h g1_hi g2_hj`.

    scores = collect_expert_scores(model, {"python": [...], "law": [...]}, tokenizer)
    found = attribute_experts(scores)                       # {"python": [experts of group 0, ...], "law": ...}
    for group, experts in enumerate(found["python"]):
        model.set_expert_mask(group, experts)               # the model forgets Python
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from .calibration import token_batches
from .modeling.modeling_monet import MonetPreTrainedModel
from .upcycling.report import evaluating


# Scores of all pairs that exist at once, in numbers.
_CHUNK = 2**24

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TopExperts:
    """The experts with the largest scores, best first.

    Attributes:
        experts: (groups, B, S, k) numbers `i * pieces + j`.
        scores: (groups, B, S, k).
    """

    experts: torch.Tensor
    scores: torch.Tensor


@torch.no_grad()
def collect_expert_scores(
    model: MonetPreTrainedModel,
    domains: Mapping[str, Sequence[str] | Iterable[Batch]],
    tokenizer: Any = None,
    *,
    max_length: int = 512,
    batch_size: int = 8,
) -> dict[str, torch.Tensor]:
    """The mean score of every expert on the text of each domain.

    Args:
        model (`MonetForCausalLM` or `MonetModel`):
            The model; it is not changed. Removed experts count as if they were there.
        domains (`dict`):
            By name, texts, or batches with `input_ids` and, where some are padded, `attention_mask`.
        tokenizer (*optional*):
            For texts.
        max_length (`int`, *optional*, defaults to 512):
            Tokens of a text at the most.
        batch_size (`int`, *optional*, defaults to 8):
            Texts at once.

    Returns:
        By domain, (groups, S * S) in float64; a row sums to the number of router heads.

    Raises:
        ValueError: for a domain without a token, or texts without a tokenizer.
        TypeError: for a model that is no Monet.
    """
    _require_monet(model)
    if not domains:
        raise ValueError("`domains` is empty; give texts by the name of their domain.")
    found = {}
    for name, data in domains.items():
        total: torch.Tensor | None = None
        count = 0
        for batch in tqdm(token_batches(data, tokenizer, max_length, batch_size), desc=name, unit="batch"):
            sums = []
            for g1, g2 in _scores(model, batch):
                # Summed over tokens and heads at once: a product of (S, T * H) and (T * H, S).
                sums.append(g1.flatten(0, 1).double().T @ g2.flatten(0, 1).double())
            stacked = torch.stack(sums).flatten(1)
            total = stacked if total is None else total + stacked
            count += _num_tokens(batch)
        if total is None or count == 0:
            raise ValueError(f"the domain `{name}` has no tokens.")
        found[name] = total.cpu() / count
    return found


def attribute_experts(scores: Mapping[str, torch.Tensor], factor: float = 2.0) -> dict[str, list[torch.Tensor]]:
    """The experts of each domain: those whose score there is at least `factor` times that in any other.

    Args:
        scores (`dict`):
            By domain, (groups, S * S), from `collect_expert_scores`.
        factor (`float`, *optional*, defaults to 2.0):
            How many times, above 1.

    Returns:
        By domain and group, the numbers of the experts. An expert belongs to one domain at the most.

    Raises:
        ValueError: for fewer than two domains, or a factor that lets an expert belong to several.
    """
    if len(scores) < 2:
        raise ValueError(f"experts are told apart between domains, got {len(scores)}; give at least two.")
    if factor <= 1:
        raise ValueError(f"`factor` must be above 1, got {factor}.")
    stacked = torch.stack(list(scores.values()))  # (D, groups, S * S)
    best, second = stacked.topk(2, dim=0).values
    owner = stacked.argmax(dim=0).masked_fill((best < factor * second) | (best <= 0), -1)
    return {
        name: [(owner[group] == number).nonzero().flatten() for group in range(owner.shape[0])]
        for number, name in enumerate(scores)
    }


@torch.no_grad()
def correlate_experts(
    model: MonetPreTrainedModel, batches: Iterable[Batch], values: Iterable[torch.Tensor]
) -> torch.Tensor:
    """Pearson's correlation of each expert's score with a number for each token, such as its toxicity.

    Args:
        model (`MonetForCausalLM` or `MonetModel`):
            The model.
        batches:
            With `input_ids` (B, S) and, where some are padded, `attention_mask`.
        values:
            For each batch, a number for each token, (B, S), or for each text, (B,).

    Returns:
        (groups, S * S) in float64; 0 for an expert whose score never changes.

    Raises:
        ValueError: for values of another shape, or fewer than two tokens.
    """
    _require_monet(model)
    sums: torch.Tensor | None = None
    totals = torch.zeros(3, dtype=torch.float64)  # tokens, values, squared values
    for batch, value in zip(batches, values, strict=True):
        ids = batch["input_ids"]
        if value.shape not in (ids.shape, ids.shape[:1]):
            raise ValueError(
                f"`values` must be {tuple(ids.shape)} or {tuple(ids.shape[:1])}, got {tuple(value.shape)}."
            )
        whole = value if value.dim() == 2 else value[:, None].expand(ids.shape)
        told = whole.double().flatten()[_real(batch)]
        totals += torch.tensor([len(told), told.sum(), told.square().sum()], dtype=torch.float64)
        parts = []
        for g1, g2 in _scores(model, batch):
            part = g1.new_zeros(3, g1.shape[2] * g2.shape[2], dtype=torch.float64)  # scores, squares, times values
            for pairs, here in _pairs(g1, g2, told.to(g1.device)):
                part += torch.stack([pairs.sum(0), pairs.square().sum(0), here @ pairs])
            parts.append(part)
        stacked = torch.stack(parts)
        sums = stacked if sums is None else sums + stacked
    if sums is None or totals[0] < 2:
        raise ValueError("a correlation needs at least two tokens.")
    count, first, second = totals.to(sums.device)
    covariance = sums[:, 2] - sums[:, 0] * first / count
    spread = (sums[:, 1] - sums[:, 0].square() / count).clamp(min=0) * (second - first.square() / count)
    # What rounding leaves of a constant is no spread.
    constant = spread <= 1e-24 * (sums[:, 1] * second).clamp(min=1e-300)
    return (covariance / spread.clamp(min=1e-300).sqrt()).masked_fill(constant, 0).cpu()


@torch.no_grad()
def top_experts(model: MonetPreTrainedModel, batch: Batch, k: int = 10) -> TopExperts:
    """The k experts with the largest scores for each token, in each group of layers.

    Raises:
        ValueError: where there are fewer than k experts.
    """
    _require_monet(model)
    pieces = model.config.moe_experts
    if not 1 <= k <= pieces**2:
        raise ValueError(f"`k` must be in [1, {pieces**2}], got {k}.")
    experts, scores = [], []
    for g1, g2 in _scores(model, batch, all_tokens=True):
        found = [pairs.topk(k, dim=-1) for pairs, _ in _pairs(g1, g2, None)]
        shape = (*batch["input_ids"].shape, k)
        experts.append(torch.cat([each.indices for each in found]).view(shape))
        scores.append(torch.cat([each.values for each in found]).float().view(shape))
    return TopExperts(torch.stack(experts), torch.stack(scores))


def _pairs(
    g1: torch.Tensor, g2: torch.Tensor, values: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Scores of all pairs (n, S * S) in float64, some tokens at a time, with the tokens' values."""
    rows = max(1, _CHUNK // (g1.shape[2] * g2.shape[2]))
    told = torch.zeros(len(g1), dtype=torch.float64, device=g1.device) if values is None else values
    for a, b, here in zip(g1.split(rows), g2.split(rows), told.split(rows), strict=True):
        yield (a.double().transpose(1, 2) @ b.double()).flatten(1), here


def _scores(
    model: MonetPreTrainedModel, batch: Batch, all_tokens: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scores (T, H, S) of both sides for each group, of the tokens that are no padding."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask") if name in batch}
    with evaluating(model):
        out = model(**inputs, use_cache=False, output_router_probs=True)
    real = _real(batch).to(model.device)
    if all_tokens:
        real = torch.ones_like(real)
    return [(g1.flatten(0, 1)[real], g2.flatten(0, 1)[real]) for g1, g2 in out.router_probs]


def _real(batch: Batch) -> torch.Tensor:
    """(T,) bool: the tokens that are no padding."""
    mask = batch.get("attention_mask")
    return torch.ones(batch["input_ids"].numel(), dtype=torch.bool) if mask is None else mask.flatten() != 0


def _num_tokens(batch: Batch) -> int:
    return int(_real(batch).sum())


def _require_monet(model: Any) -> None:
    if not isinstance(model, MonetPreTrainedModel):
        raise TypeError(f"expected a Monet model, got {type(model).__name__}.")
