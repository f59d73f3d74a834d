"""Self-contrast: the model against itself with a deliberately poor routing.

"Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast" (2405.14507).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from .decoding import check_strengths, contrast_halves, refuse_beams, refuse_filled_cache
from .routing import RoutingMode, branches


Mode = RoutingMode | Mapping[str, Any] | int | str


def self_contrast(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
    strong: Mode | None = None,
    weak: Mode = "rank-2",
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode with `(1 + beta) * strong - beta * weak`, for `model.generate(..., custom_generate=self_contrast)`.

    Both branches run in one forward, on twice the rows and with one cache, in which each has its own entries. The
    model needs no preparation: a stock model of any supported family is extended while it generates, and is what it
    was afterwards. One thread at a time may generate with a model. Everything else, from sampling to stopping, is that
    of `generate`; its logits processors come after the contrast.

    Args:
        beta (`float`, *optional*, defaults to 0.5):
            Strength. The paper's best are 0.5 for mathematics and 0.1 for MBPP. 0 is the strong branch alone.
        alpha (`float`, *optional*, defaults to 0.1):
            Tokens below `alpha` times the highest probability of the strong branch are not considered.
        strong (`RoutingMode`, mapping, `int` or `str`, *optional*):
            Routing of the strong branch: the model's own, or such as `4`, `"topk-4"` or `"threshold-0.5"`.
        weak (`RoutingMode`, mapping, `int` or `str`, *optional*, defaults to `"rank-2"`):
            Routing of the weak branch: the second best expert alone, or such as `1` for the best alone.

    `streamer` does not reach a function given to `generate`: use `functools.partial(self_contrast, streamer=...)`, or
    `hf_moe_ext.generation.generate`.

    Raises:
        ValueError: for beams, a filled cache, an encoder-decoder model, an unsupported family, or settings out of
            range.

    Example:
        ```python
        >>> model.generate(**inputs, max_new_tokens=64, custom_generate=self_contrast, beta=0.5)
        ```
    """
    check_strengths(beta, alpha)
    refuse_beams(generation_config, "self_contrast")
    if model.config.is_encoder_decoder:
        raise ValueError("`self_contrast` is for decoder-only models: the encoder has run before it is asked.")
    refuse_filled_cache(model_kwargs, "self_contrast")
    modes = {"strong": None if strong is None else RoutingMode.read(strong), "weak": RoutingMode.read(weak)}
    return contrast_halves(
        model,
        input_ids,
        branches(model, modes, len(input_ids)),
        beta=beta,
        alpha=alpha,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        streamer=streamer,
        **model_kwargs,
    )
