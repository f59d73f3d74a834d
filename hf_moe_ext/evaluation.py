"""Held-out perplexity, and how alike the experts of a model are."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .modeling.moe_losses import experts_per_token
from .modeling.moe_structure import RoutingLink, trace_routing
from .trainers.freezing import moe_parts


# Logits that are turned into float32 at a time: 64 MiB.
_SLICE = 1 << 24


@dataclass(frozen=True)
class PerplexityResult:
    """Result of `perplexity`.

    Attributes:
        nats: mean negative log-likelihood per predicted token.
        tokens: predicted tokens.
        seconds: wall time.
        mean_k: mean number of experts per token and layer, for extended models.
    """

    nats: float
    tokens: int
    seconds: float
    mean_k: float | None = None

    @property
    def perplexity(self) -> float:
        """`exp(nats)`."""
        return math.exp(self.nats) if self.nats < 700 else self.nats * math.inf

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens per second of wall time."""
        return self.tokens / self.seconds


def perplexity(
    model: Any,
    windows: Sequence[Mapping[str, Any]] | torch.Tensor | Any,
    *,
    batch_size: int = 4,
    progress: str | bool | None = None,
) -> PerplexityResult:
    """Score windows, each alone, by the model's logits (its `loss` may hold auxiliary terms).

    Args:
        model (`PreTrainedModel`):
            A causal language model. Every module's train / eval state is restored.
        windows (dataset or tensor):
            Items with `input_ids` (S,), optionally `attention_mask` and `labels`, as tensors or lists; S may differ.
            Nothing is predicted at or from a position whose `attention_mask` is 0, nor where `labels` is -100. Or the
            ids as one tensor (N, S).
        batch_size (`int`, *optional*, defaults to 4):
            Windows per forward. It changes speed and memory, and the result by rounding only.
        progress (`str` or `bool`, *optional*):
            Label of a progress bar, or `True`; none without it.

    Raises:
        ValueError: where there is nothing to predict.
        TypeError: where the model gives no logits for every token.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if len(windows) == 0:
        raise ValueError("`windows` is empty; there is nothing to score.")
    label = progress if isinstance(progress, str) else "perplexity"
    total, count, used, routed = 0.0, 0, 0.0, 0
    started = time.perf_counter()
    # Not inference mode: a tensor that a module keeps from this call would break the next training step.
    with _evaluation_mode(model), torch.no_grad():
        for first in tqdm(range(0, len(windows), batch_size), desc=label, disable=not progress, leave=False):
            rows = [windows[i] for i in range(first, min(first + batch_size, len(windows)))]
            ids, mask, targets = (tensor.to(model.device) for tensor in _collate(rows))
            logits, slots, tokens = _forward(model, ids, mask)
            nats, predicted = _score(logits, targets)
            total, count = total + nats, count + predicted
            used, routed = used + slots, routed + tokens
    if count == 0:
        raise ValueError("no token of `windows` can be predicted: everything is masked, or windows have length 1.")
    seconds = time.perf_counter() - started
    return PerplexityResult(total / count, count, seconds, used / routed if routed else None)


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _collate(rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and targets (B, S), filled up at the end. Target -100 where nothing is predicted."""
    items = [row if isinstance(row, Mapping) else {"input_ids": row} for row in rows]
    ids = torch.zeros(len(items), max(len(item["input_ids"]) for item in items), dtype=torch.long)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, item in enumerate(items):
        size = len(item["input_ids"])
        ids[i, :size] = torch.as_tensor(item["input_ids"])
        mask[i, :size] = torch.as_tensor(item.get("attention_mask", 1))
        targets[i, :size] = torch.as_tensor(item.get("labels", item["input_ids"]))
    targets[mask == 0] = -100
    targets[:, 1:][mask[:, :-1] == 0] = -100  # the first token after padding on the left
    return ids, mask, targets


def _forward(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, float, int]:
    """Logits (B, S, V), and for extended models the experts used and the tokens routed, summed over layers."""
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    used, routed = 0.0, 0
    if any(isinstance(vars(module).get("moe_link"), RoutingLink) for module in model.modules()):
        with trace_routing(model) as contexts:
            logits = getattr(model(**inputs), "logits", None)
        tokens = int(mask.sum())
        for context in contexts:
            for record in context.records.values():
                real = (mask.reshape(-1) != 0).to(record.index.device)
                used += float(experts_per_token(record.index, record.num_experts, real)) * tokens
                routed += tokens
    else:
        logits = getattr(model(**inputs), "logits", None)
    if logits is None or logits.shape[:2] != ids.shape:
        raise TypeError(f"{type(model).__name__} gives no logits for every token; expected a causal language model.")
    return logits, used, routed


def _score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
    """Summed nats and number of the predicted tokens. Slices bound the float32 copy of the logits."""
    flat = logits.flatten(0, 1)  # (T, V)
    wanted = F.pad(targets[:, 1:], (0, 1), value=-100).flatten().to(logits.device)
    size = max(_SLICE // flat.shape[-1], 1)
    parts = zip(flat.split(size), wanted.split(size), strict=True)
    nats = sum(float(F.cross_entropy(part.float(), goal, ignore_index=-100, reduction="sum")) for part, goal in parts)
    return nats, int((wanted != -100).sum())


@torch.no_grad()
def expert_similarity(model: nn.Module) -> dict[str, float]:
    """Mean cosine similarity of the weights of two experts, by layer: 1 for copies, about 0 for experts that have
    nothing in common. In upcycled models it should fall in training (Skywork-MoE, 2406.06563, section 4.3).

    Neurons are compared place by place, so experts whose neurons are in another order (`method="drop"` with `permute`)
    count as different.

    Args:
        model (`nn.Module`):
            A stock or extended MoE model.

    Returns:
        The mean over all pairs of experts, by layer key.

    Raises:
        ValueError: where no layer has at least two experts in one tensor.
    """
    found = {}
    for part in moe_parts(model):
        count = part.num_experts
        stacks = [p.flatten(1) for p in part.experts.parameters() if p.dim() > 1 and p.shape[0] == count]
        if count < 2 or not stacks:
            continue
        rows = F.normalize(torch.cat(stacks, dim=1).float(), dim=1)
        total = rows.sum(0).square().sum() - rows.square().sum()  # of all ordered pairs
        found[part.key] = float(total) / (count * (count - 1))
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer with two or more experts in one tensor.")
    return found
