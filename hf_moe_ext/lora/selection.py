"""Which adapters of a bank can do a task, by a few examples of it, and differ from each other.

"Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models" (2408.15915), section 3.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..evaluation import _evaluation_mode
from ..modeling.moe_lora import linear_sizes
from ..patching import require_family, restore
from .mixtures import Adapters, fill_adapters, layer_linears
from .peft_files import PeftAdapter, fit_paths, read_adapter


Metric = Callable[[str, Mapping[str, Any]], float]


@dataclass(frozen=True)
class AdapterScore:
    """What the examples say about one adapter.

    Attributes:
        accuracy: mean score of its greedy answers (A).
        perplexity: mean perplexity of the reasoned answers (R).
        rank_accuracy, rank_perplexity: its ranks over the bank, 1 the best; equal values share the mean of their
            ranks.
    """

    accuracy: float
    perplexity: float
    rank_accuracy: float
    rank_perplexity: float


@dataclass(frozen=True)
class ExpertSelection:
    """Result of `select_experts`.

    Attributes:
        chosen: names of the chosen adapters, in the order of the bank.
        candidates: those that came into question, the best first.
        scores: by name, for the whole bank.
        similarity: mean cosine similarity of two chosen adapters; its inverse is the group diversity of the paper.
        folders: where the chosen ones are, by name, as `mix_adapters` takes them.
    """

    chosen: tuple[str, ...]
    candidates: tuple[str, ...]
    scores: dict[str, AdapterScore]
    similarity: float
    folders: dict[str, Path]

    def __str__(self) -> str:
        rows = [f"{'adapter':<20} accuracy  perplexity  ranks"]
        for name, score in self.scores.items():
            mark = "*" if name in self.chosen else "+" if name in self.candidates else " "
            ranks = f"{score.rank_accuracy:g} + {score.rank_perplexity:g}"
            rows.append(f"{mark} {name:<18} {score.accuracy:8.3f}  {score.perplexity:10.3f}  {ranks}")
        return "\n".join([*rows, f"* chosen, + candidate; mean similarity of the chosen {self.similarity:.3f}"])


def select_experts(
    model: PreTrainedModel,
    adapters: Adapters,
    k_shot: Sequence[Mapping[str, Any]],
    k: int = 4,
    *,
    tokenizer: Any = None,
    metric: Metric | None = None,
    candidates: int = 8,
    similarity: Literal["update", "factors"] = "update",
    normalize_ranks: bool = False,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    progress: bool = False,
) -> ExpertSelection:
    """Choose k adapters for a task by a few examples of it.

    Adapters are ranked by the accuracy of their answers and by the perplexity of reasoned answers. Of the best
    `candidates`, the subset of k is taken whose ranks, plus the rank of its diversity among all subsets, have the
    smallest sum.

    Args:
        model (`PreTrainedModel`):
            The stock base model. It is the same afterwards.
        adapters (`list` or `dict`):
            The bank: folders of PEFT adapters, as for `mix_adapters`.
        k_shot (`list[dict]`):
            The examples: `{"prompt": ..., "answer": ..., "rationale": ...}` with a tokenizer, where `rationale` is the
            answer with its reasons (the answer itself if missing); or `{"input_ids": ..., "labels": ...}` with -100
            at the prompt.
        k (`int`, *optional*, defaults to 4):
            How many to choose (N).
        tokenizer (*optional*):
            For examples in text.
        metric (`Callable`, *optional*):
            `metric(text, example)` scores a generated answer. By default, an answer is right if the greedy
            continuation begins with it token by token, which takes one forward and no generation.
        candidates (`int`, *optional*, defaults to 8):
            How many come into question (M).
        similarity (`"update"` or `"factors"`, *optional*, defaults to `"update"`):
            Cosine of the updates `B A`, which does not depend on how they are factored; or, as the authors' code has
            it, the mean of the absolute cosines of A and of B, for which ranks have to be equal.
        normalize_ranks (`bool`, *optional*, defaults to `False`):
            Whether ranks are divided by how many are ranked. The paper sums them as they are: 1 to the size of the
            bank for adapters, 1 to the number of subsets for diversity.
        batch_size, max_new_tokens (`int`, *optional*, default to 8 and 64):
            Of the forwards, and of generation for a `metric`.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        [`ExpertSelection`].

    Raises:
        ValueError: where the bank is smaller than k, an adapter does not fit the model, or the examples are malformed.

    Example:
        ```python
        >>> found = select_experts(model, ["bank/code", "bank/maths", ...], examples, k=2, tokenizer=tokenizer)
        >>> model = mix_adapters(model, found.folders, num_experts_per_tok=2)
        ```
    """
    bank = _open_bank(model, adapters)
    if not 1 <= k <= len(bank):
        raise ValueError(f"`k` must be from 1 to the {len(bank)} adapters of the bank, got {k}.")
    if candidates < k:
        raise ValueError(f"`candidates` ({candidates}) must be at least `k` ({k}).")
    if similarity not in ("update", "factors"):
        raise ValueError(f'`similarity` must be "update" or "factors", got {similarity!r}.')
    if metric is not None and tokenizer is None:
        raise ValueError("a `metric` looks at generated text; it needs the `tokenizer`.")
    rows = _Examples.of(k_shot, tokenizer)
    accuracy: dict[str, float] = {}
    perplexities: dict[str, float] = {}
    for name, (adapter, _) in tqdm(bank.items(), desc="Scoring adapters", disable=not progress):
        with applied(model, adapter):
            perplexities[name] = mean_perplexity(model, rows.reasoned, batch_size)
            if metric is None:
                accuracy[name] = greedy_accuracy(model, rows.answers, batch_size)
            else:
                accuracy[name] = _generated_accuracy(model, k_shot, tokenizer, metric, max_new_tokens)
    best_first = average_ranks([-value for value in accuracy.values()])
    ranks_accuracy = dict(zip(accuracy, best_first, strict=True))
    ranks_perplexity = dict(zip(perplexities, average_ranks(list(perplexities.values())), strict=True))
    cost = {name: ranks_accuracy[name] + ranks_perplexity[name] for name in bank}
    kept = sorted(bank, key=lambda name: cost[name])[:candidates]  # stable: the order of the bank decides ties
    kept_in_order = [name for name in bank if name in kept]
    pairs = {
        (a, b): adapter_similarity(bank[a][0], bank[b][0], similarity)
        for a, b in itertools.combinations(kept_in_order, 2)
    }
    chosen = best_subset(kept_in_order, cost, pairs, k, len(bank) if normalize_ranks else None)
    scores = {
        name: AdapterScore(accuracy[name], perplexities[name], ranks_accuracy[name], ranks_perplexity[name])
        for name in bank
    }
    folders = {name: bank[name][1] for name in chosen}
    return ExpertSelection(chosen, tuple(kept), scores, _mean_similarity(chosen, pairs), folders)


def best_subset(
    names: Sequence[str],
    cost: Mapping[str, float],
    pairs: Mapping[tuple[str, str], float],
    k: int,
    bank_size: int | None = None,
) -> tuple[str, ...]:
    """The subset of k with the smallest `sum of costs + rank of its diversity`; the first one among equals.

    Args:
        names: the candidates, in order.
        cost: sum of the two ranks, by name.
        pairs: similarity of two candidates, by their names in order.
        k: size of the subset.
        bank_size: divides the costs, and the number of subsets the ranks of diversity; `None` for neither.
    """
    subsets = list(itertools.combinations(names, k))
    # By mean similarity, ascending: the order of its inverse where that is positive, and defined where it is not.
    diversity = average_ranks([_mean_similarity(subset, pairs) for subset in subsets])
    by_cost, by_rank = (1, 1) if bank_size is None else (bank_size, len(subsets))
    totals = [
        sum(cost[name] for name in subset) / by_cost + rank / by_rank
        for subset, rank in zip(subsets, diversity, strict=True)
    ]
    return subsets[totals.index(min(totals))]


def _mean_similarity(subset: Sequence[str], pairs: Mapping[tuple[str, str], float]) -> float:
    found = [pairs[pair] for pair in itertools.combinations(subset, 2)]
    return sum(found) / len(found) if found else 1.0


def average_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, the smallest value first; values that agree to nine digits share the mean of their ranks."""
    keys = [float(f"{value:.9g}") for value in values]
    ordered = sorted(keys)
    first = {key: ordered.index(key) for key in set(keys)}
    count = {key: ordered.count(key) for key in set(keys)}
    return [first[key] + (count[key] + 1) / 2 for key in keys]


def adapter_similarity(one: PeftAdapter, other: PeftAdapter, kind: str = "update") -> float:
    """Cosine similarity of two adapters, the mean over the linear layers that either has.

    Args:
        one, other: of the same model.
        kind: `"update"`: of `B A`, by traces of r x r matrices, without making it. `"factors"`: mean of the absolute
            cosines of A and of B.

    Raises:
        ValueError: for factors of different ranks.
    """
    found = []
    for path in sorted({*one.pairs, *other.pairs}):
        if path not in one.pairs or path not in other.pairs:
            found.append(0.0)
            continue
        (a1, b1), (a2, b2) = (tuple(t.double() for t in adapter.pairs[path]) for adapter in (one, other))
        if kind == "update":
            cross, own, theirs = (
                (x.T @ y) * (u @ v.T) for x, y, u, v in ((b1, b2, a1, a2), (b1, b1, a1, a1), (b2, b2, a2, a2))
            )
            size = math.sqrt(max(float(own.sum()) * float(theirs.sum()), 0.0))
            found.append(float(cross.sum()) / size if size > 0 else 0.0)
            continue
        if a1.shape != a2.shape:
            raise ValueError(
                f"the adapters `{one.name}` and `{other.name}` have different ranks at `{path}`; their factors cannot "
                'be compared. Use `similarity="update"`.'
            )
        cosines = (F.cosine_similarity(x.flatten(), y.flatten(), dim=0) for x, y in ((a1, a2), (b1, b2)))
        found.append(sum(abs(float(cosine)) for cosine in cosines) / 2)
    return sum(found) / len(found)


# --- the bank, one adapter after the other ---


def _open_bank(model: PreTrainedModel, adapters: Adapters) -> dict[str, tuple[PeftAdapter, Path]]:
    if isinstance(adapters, (str, os.PathLike)):
        raise TypeError(f"`adapters` must be several folders, got one: {adapters!r}. Pass a list.")
    linears = layer_linears(model, require_family(model))
    named = adapters.items() if isinstance(adapters, Mapping) else [(None, folder) for folder in adapters]
    found: dict[str, tuple[PeftAdapter, Path]] = {}
    for name, folder in named:
        adapter = fit_paths(read_adapter(folder, name), linears, linear_sizes)
        if adapter.name in found:
            raise ValueError(f"two adapters are called `{adapter.name}`; give them names: {{name: folder, ...}}.")
        found[adapter.name] = (adapter, Path(folder))
    return found


@contextmanager
def applied(model: PreTrainedModel, adapter: PeftAdapter) -> Iterator[None]:
    """Inside the `with` block, a stock model has this one adapter."""
    requires = [parameter.requires_grad for parameter in model.parameters()]
    fill_adapters(model, [adapter])
    try:
        yield
    finally:
        restore(model)
        for parameter, wanted in zip(model.parameters(), requires, strict=True):
            parameter.requires_grad_(wanted)


# --- what the examples say ---


@dataclass(frozen=True)
class _Examples:
    """Token rows (ids, labels) of the plain and of the reasoned answers."""

    answers: list[tuple[torch.Tensor, torch.Tensor]]
    reasoned: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, k_shot: Sequence[Mapping[str, Any]], tokenizer: Any) -> _Examples:
        if not k_shot:
            raise ValueError("`k_shot` is empty; give some examples of the task.")
        answers, reasoned = [], []
        for number, example in enumerate(k_shot):
            if "input_ids" in example:
                row = _token_row(example, number)
                answers.append(row)
                reasoned.append(row)
                continue
            if not isinstance(example.get("prompt"), str) or not isinstance(example.get("answer"), str):
                raise ValueError(
                    f"example {number} of `k_shot` must have `prompt` and `answer`, or `input_ids` and `labels`; it "
                    f"has {sorted(example)}."
                )
            if tokenizer is None:
                raise ValueError("examples in text need the `tokenizer` of the model.")
            prompt = tokenizer(example["prompt"], add_special_tokens=False)["input_ids"]
            reason = example.get("rationale") or example["answer"]
            for rows, text, end in ((answers, example["answer"], []), (reasoned, reason, [tokenizer.eos_token_id])):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [i for i in end if i is not None]
                if not ids or not prompt:
                    raise ValueError(f"prompt and answer of example {number} of `k_shot` must have tokens.")
                rows.append((torch.tensor(prompt + ids), torch.tensor([-100] * len(prompt) + ids)))
        return cls(answers, reasoned)


def _token_row(example: Mapping[str, Any], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, labels = torch.as_tensor(example["input_ids"]), torch.as_tensor(example.get("labels", example["input_ids"]))
    if ids.dim() != 1 or ids.shape != labels.shape:
        raise ValueError(f"`input_ids` and `labels` of example {number} of `k_shot` must be rows of one length.")
    if "attention_mask" in example:  # padding on either side is taken off
        real = torch.as_tensor(example["attention_mask"]) != 0
        ids, labels = ids[real], labels[real]
    if not (labels[1:] != -100).any():
        raise ValueError(f"example {number} of `k_shot` has no token to predict.")
    return ids, labels


def _batches(
    model: Any, rows: list[tuple[torch.Tensor, torch.Tensor]], batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits (B, S - 1, V) and the labels they predict (B, S - 1), filled up at the end."""
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        length = max(len(ids) for ids, _ in part)
        ids = torch.stack([F.pad(row, (0, length - len(row))) for row, _ in part]).to(model.device)
        labels = torch.stack([F.pad(row, (0, length - len(row)), value=-100) for _, row in part]).to(model.device)
        mask = torch.stack([(torch.arange(length) < len(row)).long() for row, _ in part]).to(model.device)
        with _evaluation_mode(model), torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        yield logits[:, :-1].float(), labels[:, 1:]


def mean_perplexity(model: Any, rows: list[tuple[torch.Tensor, torch.Tensor]], batch_size: int = 8) -> float:
    """Mean over rows of `exp(mean negative log-likelihood of the labelled tokens)`.

    The paper prints the sum of the log-likelihoods; with the mean, as in the authors' code, long answers are no worse
    for being long.

    Args:
        model: a causal language model.
        rows: (ids, labels), with -100 where nothing is predicted.
        batch_size: rows of a forward.
    """
    found: list[float] = []
    for logits, labels in _batches(model, rows, batch_size):
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        found += (losses.sum(-1) / (labels != -100).sum(-1)).exp().tolist()
    return sum(found) / len(found)


def greedy_accuracy(model: Any, rows: list[tuple[torch.Tensor, torch.Tensor]], batch_size: int = 8) -> float:
    """Share of the rows whose greedy continuation begins with the labels: every labelled token is the most likely one
    after those before it.

    Args:
        model, rows, batch_size: as for `mean_perplexity`.
    """
    right = 0
    for logits, labels in _batches(model, rows, batch_size):
        right += int(((logits.argmax(-1) == labels) | (labels == -100)).all(-1).sum())
    return right / len(rows)


def _generated_accuracy(
    model: Any, k_shot: Sequence[Mapping[str, Any]], tokenizer: Any, metric: Metric, max_new_tokens: int
) -> float:
    total = 0.0
    for example in k_shot:
        if "prompt" not in example:
            raise ValueError("a `metric` needs examples with a `prompt` in text.")
        inputs = tokenizer(example["prompt"], add_special_tokens=False, return_tensors="pt").to(model.device)
        with _evaluation_mode(model), torch.no_grad():
            out = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        total += float(metric(text, example))
    return total / len(k_shot)
