"""What self-contrast is made of: a contrast among the logits processors, and a forward of more rows than its caller
knows of. It needs torch and transformers alone, and travels with exported models.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import LogitsProcessor
from transformers.utils import ModelOutput


# Arguments of a forward with a row for each row of the batch.
_BY_ROW = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
# Arguments that have nothing to do with rows, or grow with what is computed.
_WITHOUT_ROWS = ("cache", "past_key_values", "cache_position", "logits_to_keep", "num_logits_to_keep")


def contrast(strong: torch.Tensor, weak: torch.Tensor, beta: float, alpha: float) -> torch.Tensor:
    """`(1 + beta) * strong - beta * weak` where the strong distribution finds a token plausible, else -inf.

    Contrastive decoding (2210.15097) in the form of SCMoE (2405.14507, eq. 5 to 7): a token is plausible if its
    probability is at least `alpha` times the highest. A constant added to a row of either changes no choice.

    Args:
        strong, weak: (B, V) logits.
        beta: strength; 0 leaves the strong distribution as it is, but for the mask.
        alpha: in [0, 1]; 0 has no mask, 1 leaves the most likely token.

    Returns:
        (B, V) float32.
    """
    strong, weak = strong.float(), weak.float()
    amplified = (1 + beta) * strong - beta * weak
    if alpha == 0:
        return amplified
    plausible = strong >= strong.amax(dim=-1, keepdim=True) + math.log(alpha)
    return amplified.masked_fill(~plausible, float("-inf"))


def check_strengths(beta: float, alpha: float) -> None:
    """Raise `ValueError` for a negative or infinite `beta`, or an `alpha` outside [0, 1]."""
    if not 0 <= beta < float("inf"):
        raise ValueError(f"`beta` must be a number of 0 or above, got {beta!r}.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be in [0, 1], got {alpha!r}.")


def refuse_beams(generation_config: GenerationConfig, strategy: str) -> None:
    """Raise `ValueError` for a beam search."""
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"`{strategy}` chooses one token at a time, so it is undefined for beams; leave out "
            f"`num_beams={generation_config.num_beams}`, or use `num_return_sequences` with `do_sample=True`."
        )


def refuse_filled_cache(model_kwargs: dict[str, Any], strategy: str) -> None:
    """Raise `ValueError` where `generate` was given a cache that holds tokens."""
    cache = given_cache(model_kwargs)
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"`{strategy}` fills its own cache from the start of the text; pass the whole text and no cache (this one "
            f"holds {cache.get_seq_length()} tokens)."
        )


class _Contrast(LogitsProcessor):
    def __init__(self, weak: Callable[[torch.Tensor], torch.Tensor], beta: float, alpha: float) -> None:
        self.weak, self.beta, self.alpha = weak, beta, alpha

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return contrast(scores, self.weak(input_ids), self.beta, self.alpha)


class _Then(LogitsProcessor):
    """The other processors. Where these leave no plausible token, they are applied to the strong distribution."""

    def __init__(self, first: _Contrast, others: LogitsProcessorList) -> None:
        self.first, self.others = first, others

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        strong = scores.clone()
        out = self.others(input_ids, self.first(input_ids, scores))
        none = (out == float("-inf")).all(dim=-1, keepdim=True)
        return torch.where(none, self.others(input_ids, strong), out) if bool(none.any()) else out


def with_contrast(
    processors: LogitsProcessorList, weak: Callable[[torch.Tensor], torch.Tensor], beta: float, alpha: float
) -> LogitsProcessorList:
    """The contrast, then the processors of the caller.

    Args:
        processors: of the caller; they see float32 scores, -inf outside the plausible tokens.
        weak: (B, S) ids so far -> (B, V) logits.
        beta, alpha: see `contrast`.
    """
    first = _Contrast(weak, beta, alpha)
    return LogitsProcessorList([_Then(first, processors) if len(processors) else first])


def sample(model: Any, input_ids: torch.Tensor, **settings: Any) -> Any:
    """The decoding loop of transformers."""
    return type(model)._sample(model, input_ids, **settings)


def given_cache(kwargs: Any) -> Any:
    """The cache in an output or among arguments: `cache` from transformers 5.24 on, `past_key_values` before."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


@contextlib.contextmanager
def repeated_rows(
    model: nn.Module, times: int, keep: Callable[[tuple[torch.Tensor, ...]], torch.Tensor]
) -> Iterator[None]:
    """Inside, `model(...)` computes `times` copies of the rows it is given and returns one.

    The copies have entries of their own in the cache, so it has to be empty, or filled inside. Routers' logits and
    what `trace_routing` sees are those of all copies, one copy after the other.

    Args:
        model: whose forward is called with arguments by name.
        times: copies.
        keep: is given the logits of each copy, (B, S, V), and returns those to hand on.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = next(kwargs[name].shape[0] for name in _BY_ROW[:2] if kwargs.get(name) is not None)
        return args, {name: _repeat(name, value, rows, times) for name, value in kwargs.items()}

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: ModelOutput) -> ModelOutput:
        output["logits"] = keep(output.logits.chunk(times))
        for name in ("hidden_states", "attentions"):
            if output.get(name) is not None:
                output[name] = tuple(part.chunk(times)[0] for part in output[name])
        return output

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _repeat(name: str, value: Any, rows: int, times: int) -> Any:
    if isinstance(value, dict) and name == "attention_mask":  # by kind of layer
        return {kind: _repeat(name, mask, rows, times) for kind, mask in value.items()}
    if not isinstance(value, torch.Tensor) or name in _WITHOUT_ROWS:
        return value
    if name == "position_ids" and value.dim() == 3:  # for each axis of an image
        return value.repeat(1, times, 1)
    if name not in _BY_ROW or value.shape[0] not in (1, rows):
        raise ValueError(
            f"the rows of this forward are repeated, but it is not known how `{name}` {tuple(value.shape)} would be; "
            "this strategy takes text alone."
        )
    return value if value.shape[0] != rows else value.repeat(times, *[1] * (value.dim() - 1))


def contrast_halves(
    model: Any,
    input_ids: torch.Tensor,
    routing: contextlib.AbstractContextManager[None],
    *,
    beta: float,
    alpha: float,
    logits_processor: LogitsProcessorList,
    **settings: Any,
) -> Any:
    """Decode with the first half of the rows of every forward against the second, which are the same texts.

    Args:
        model, input_ids, logits_processor: as `generate` hands them to a strategy.
        routing: entered for the time of decoding; routes the second half, `len(input_ids)` rows, weakly.
        beta, alpha: see `contrast`.
        settings: the other arguments of the decoding loop, and those of the model.
    """
    last: list[torch.Tensor] = []

    def keep(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        last[:] = [parts[1][:, -1]]
        return parts[0]

    processors = with_contrast(logits_processor, lambda ids: last[0].to(ids.device), beta, alpha)
    with routing, repeated_rows(model, 2, keep):
        return sample(model, input_ids, logits_processor=processors, **settings)
