"""How often each expert of a model is used on some data.

usage = expert_usage(model, ["def f(x):", "import os"], tokenizer=tokenizer)
usage["3"].frequency      # of every expert of layer 3, its share of the tokens
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .calibration import token_batches
from .modeling.configuration_moe_ext import MoeExtension
from .modeling.moe_losses import expert_counts
from .modeling.moe_structure import iter_routers, trace_routing
from .patching import extend, require_family, restore
from .upcycling.report import evaluating


@dataclass(frozen=True)
class ExpertUsage:
    """The use of the experts of one mixture.

    Attributes:
        counts: (E,) int64, tokens that chose each expert.
        tokens: tokens that were looked at, without padding.
        scores: (E,) float64, mean of the routing distribution.
    """

    counts: torch.Tensor
    tokens: int
    scores: torch.Tensor

    @property
    def frequency(self) -> torch.Tensor:
        """(E,) float64, share of the tokens that chose each expert. Sums to the mean number of experts per token."""
        return self.counts.double() / max(self.tokens, 1)

    def num_covering(self, share: float = 0.95) -> int:
        """The fewest experts that take `share` of all choices."""
        if not 0 < share <= 1:
            raise ValueError(f"`share` must be in (0, 1], got {share}.")
        taken = self.counts.double().sort(descending=True).values.cumsum(0)
        if not self.counts.any():
            return 0
        # Sums of integers are exact, the product is not.
        return int((taken < share * taken[-1] - 1e-9).sum()) + 1


def expert_usage(
    model: PreTrainedModel, data: Any, *, tokenizer: Any = None, max_length: int = 512, batch_size: int = 4
) -> dict[str, ExpertUsage]:
    """Run a model over data and count which experts it uses. The model is left as it was.

    Args:
        model (`PreTrainedModel`):
            A stock or extended MoE model, or one of the architectures of this package.
        data:
            Texts, batches with `input_ids` (and `attention_mask`), or a `datasets.Dataset` with a column `text` or
            `input_ids`.
        tokenizer (*optional*):
            For texts.
        max_length (`int`, *optional*, defaults to 512):
            Tokens of a text at the most.
        batch_size (`int`, *optional*, defaults to 4):
            Texts at once.

    Returns:
        The use of every mixture by its key: that of the layer, with `attention.` in front for attention experts.
        Layers that an extension leaves stock are not among them.

    Raises:
        TypeError, ValueError: for a model without experts, or data that is empty or of another form.
    """
    found: dict[str, ExpertUsage] = {}
    with traced(model), evaluating(model), torch.no_grad():
        for batch in tqdm(token_batches(data, tokenizer, max_length, batch_size), desc="Counting", unit="batch"):
            ids = batch["input_ids"].to(model.device)
            mask = batch.get("attention_mask")
            inputs = {"input_ids": ids}
            if mask is not None:
                inputs["attention_mask"] = mask.to(model.device)
            if getattr(model.config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = ids
            with trace_routing(model) as contexts:
                model(**inputs)
            for context in contexts:
                for key, record in context.all_records().items():
                    _add(found, key, record, context.token_mask(record.index.shape[0]))
    if not found:
        raise ValueError("the data is empty; there is nothing to count.")
    return found


def _add(found: dict[str, ExpertUsage], key: str, record: Any, mask: torch.Tensor | None) -> None:
    real = record.num_experts
    counts = expert_counts(record.index, real, mask).cpu()
    scores = record.scores[:, :real].double()
    if mask is not None:
        scores = scores[mask.to(scores.device)]
    tokens, total = scores.shape[0], scores.sum(0).cpu()
    if key in found:
        old = found[key]
        total = total + old.scores * old.tokens
        counts, tokens = counts + old.counts, tokens + old.tokens
    found[key] = ExpertUsage(counts, tokens, total / max(tokens, 1))


@contextlib.contextmanager
def traced(model: PreTrainedModel) -> Iterator[None]:
    """A stock model is extended inside the block, which changes no result, and restored."""
    family = require_family(model)
    if "moe_link" in vars(model):
        if next(iter_routers(model), None) is None:
            raise ValueError(
                f"no layer of this {type(model).__name__} has a router of this package, which would leave records."
            )
        yield
        return
    attention = "routed" if family.attention is not None and family.attention.experts is not None else None
    extend(model, MoeExtension(router="top_k", attention=attention))  # type: ignore[arg-type]
    try:
        yield
    finally:
        restore(model)
