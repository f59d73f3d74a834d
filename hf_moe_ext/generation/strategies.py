"""The strategies by name, and `generate` with what does not reach a function given as `custom_generate`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.generation import StopStringCriteria

from .contrastive import contrastive_decoding
from .contrastive_search import contrastive_search
from .dola import dola
from .self_contrast import self_contrast


STRATEGIES: dict[str, Callable[..., Any]] = {
    "self_contrast": self_contrast,
    "contrastive_decoding": contrastive_decoding,
    "contrastive_search": contrastive_search,
    "dola": dola,
}


def generate(
    model: PreTrainedModel,
    inputs: torch.Tensor | None = None,
    *,
    strategy: str | Callable[..., Any],
    streamer: Any = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> Any:
    """`model.generate` with a strategy, and with a streamer and stop strings, which transformers does not hand to one.

    Args:
        model (`PreTrainedModel`):
            A model that generates.
        inputs (`torch.Tensor`, *optional*):
            (B, S) ids; or pass `input_ids` and `attention_mask` by name.
        strategy (`str` or function):
            A name from `STRATEGIES`, or a function such as `self_contrast`.
        streamer (*optional*):
            As in `generate`; also one that is iterated over in another thread.
        stop_strings (`str` or list, *optional*), tokenizer (*optional*):
            Texts that end a row, and the tokenizer that knows them.
        kwargs:
            Settings of the strategy, and everything that `generate` takes.

    Returns:
        What `generate` returns.

    Raises:
        ValueError: for an unknown strategy, or stop strings without a tokenizer.

    Example:
        ```python
        >>> generate(model, **inputs, strategy="self_contrast", beta=0.3, streamer=TextStreamer(tokenizer))
        ```
    """
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be one of {sorted(STRATEGIES)}, got {strategy!r}.")
        strategy = STRATEGIES[strategy]
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("`stop_strings` needs the `tokenizer` that turns ids into text.")
        criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
        kwargs["stopping_criteria"] = criteria
    if streamer is None:
        return model.generate(inputs, custom_generate=strategy, **kwargs)
    if "streamer" not in inspect.signature(strategy).parameters:
        raise ValueError(f"{strategy} has no argument `streamer`.")
    return model.generate(inputs, custom_generate=_streaming(strategy, streamer), **kwargs)


def _streaming(strategy: Callable[..., Any], streamer: Any) -> Callable[..., Any]:
    @functools.wraps(strategy)
    def run(model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        streamer.put(input_ids.cpu())
        try:
            return strategy(model, input_ids, *args, streamer=streamer, **kwargs)
        except BaseException:
            streamer.end()  # or who reads from it would wait for ever
            raise

    return run
