"""Traces of routing: of real models, and made up."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import token_batches
from ..modeling.moe_structure import trace_routing
from ..upcycling.report import evaluating
from ..usage import traced


def routing_traces(
    model: PreTrainedModel, data: Any, *, tokenizer: Any = None, max_length: int = 512, batch_size: int = 4
) -> dict[str, list[tuple[int, ...]]]:
    """The experts that every token of some data chose, by the key of the layer, text after text; padding left out.

    Arguments as in [`expert_usage`]. The model is left as it was.

    Raises:
        TypeError, ValueError: for a model without experts, or data that is empty or of another form.
    """
    found: dict[str, list[tuple[int, ...]]] = {}
    with traced(model), evaluating(model), torch.no_grad():
        for batch in tqdm(token_batches(data, tokenizer, max_length, batch_size), desc="Routing", unit="batch"):
            inputs = {"input_ids": batch["input_ids"].to(model.device)}
            if batch.get("attention_mask") is not None:
                inputs["attention_mask"] = batch["attention_mask"].to(model.device)
            if getattr(model.config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = inputs["input_ids"]
            with trace_routing(model) as contexts:
                model(**inputs)
            for context in contexts:
                for key, record in context.all_records().items():
                    index, mask = record.index, context.token_mask(len(record.index))
                    rows = (index if mask is None else index[mask.to(index.device)]).tolist()
                    found.setdefault(key, []).extend(
                        tuple(sorted({expert for expert in row if expert < record.num_experts})) for row in rows
                    )
    if not found:
        raise ValueError("the data is empty; there is nothing to trace.")
    return found


def repeated_share(trace: Sequence[tuple[int, ...]]) -> float:
    """Share of the tokens that use the same experts as the token before."""
    same = sum(set(one) == set(other) for one, other in zip(trace, trace[1:], strict=False))
    return same / max(len(trace) - 1, 1)


def sticky_trace(length: int, num_experts: int, stay: float, seed: int = 0) -> list[int]:
    """A made-up trace of one expert a step: with the probability `stay` that of the step before, otherwise any.

    Raises:
        ValueError: for a probability outside [0, 1].
    """
    if not 0 <= stay <= 1:
        raise ValueError(f"`stay` must be in [0, 1], got {stay}.")
    generator = random.Random(seed)
    trace = [generator.randrange(num_experts)] if length else []
    while len(trace) < length:
        trace.append(trace[-1] if generator.random() < stay else generator.randrange(num_experts))
    return trace
