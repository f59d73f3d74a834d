"""Held-out perplexity."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .modeling.moe_losses import experts_per_token
from .modeling.moe_structure import trace_routing


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
        return math.exp(self.nats)

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens per second of wall time."""
        return self.tokens / self.seconds


@torch.inference_mode()
def perplexity(
    model: Any, windows: Sequence[dict[str, torch.Tensor]] | Any, *, batch_size: int = 4, progress: str | None = None
) -> PerplexityResult:
    """Score windows, each alone, by the model's logits (its `loss` may hold auxiliary terms).

    Args:
        model (`PreTrainedModel`):
            A causal language model. Its train / eval state is restored.
        windows (dataset):
            Items with `input_ids` (S,), optionally `attention_mask` and `labels`; windows of one call share a length.
        batch_size (`int`, *optional*, defaults to 4):
            Windows per forward.
        progress (`str`, *optional*):
            Label of a progress bar; none without it.

    Raises:
        ValueError: where there is nothing to predict.
    """
    if len(windows) == 0:
        raise ValueError("`windows` is empty; there is nothing to score.")
    training = model.training
    model.eval()
    total, count, used, routed = 0.0, 0, 0.0, 0
    started = time.perf_counter()
    extended = hasattr(model, "moe_link")
    try:
        for first in tqdm(range(0, len(windows), batch_size), desc=progress, disable=progress is None, leave=False):
            items = [windows[i] for i in range(first, min(first + batch_size, len(windows)))]
            ids = torch.stack([item["input_ids"] for item in items]).to(model.device)
            mask = torch.stack([item.get("attention_mask", torch.ones_like(item["input_ids"])) for item in items])
            labels = torch.stack([item.get("labels", item["input_ids"]) for item in items])
            if extended:
                with trace_routing(model) as contexts:
                    logits = model(input_ids=ids, attention_mask=mask.to(model.device)).logits
                for record in contexts[0].records.values():
                    used += float(experts_per_token(record.index, record.num_experts, mask.reshape(-1) != 0))
                    routed += 1
            else:
                logits = model(input_ids=ids, attention_mask=mask.to(model.device)).logits
            labels = labels.masked_fill(mask == 0, -100)[:, 1:].to(model.device)
            for row, target in zip(logits[:, :-1], labels, strict=True):  # a row at a time bounds the float32 copy
                total += float(F.cross_entropy(row.float(), target, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    finally:
        model.train(training)
    if count == 0:
        raise ValueError("no token of `windows` can be predicted: everything is masked, or windows have length 1.")
    seconds = time.perf_counter() - started
    return PerplexityResult(total / count, count, seconds, used / routed if routed else None)
