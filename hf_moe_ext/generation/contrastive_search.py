"""Contrastive search: a likely token that does not repeat what was said (2202.06417)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from .decoding import given_cache, refuse_beams, refuse_filled_cache


def contrastive_search(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    penalty_alpha: float = 0.6,
    candidates: int = 5,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode by contrastive search, for `model.generate(..., custom_generate=contrastive_search)`.

    Of the `candidates` most likely tokens v the one is taken for which
    `(1 - penalty_alpha) * p(v) - penalty_alpha * max_j cos(h_v, h_j)` is largest, where h are the last hidden states
    of the text so far (2202.06417, eq. 5). One forward looks ahead with all candidates of a row side by side.

    Args:
        penalty_alpha (`float`, *optional*, defaults to 0.6):
            In [0, 1]; 0 is greedy decoding.
        candidates (`int`, *optional*, defaults to 5):
            How many tokens are tried; 1 is greedy decoding.

    Returns:
        (B, S) ids.

    Raises:
        ValueError: for sampling, beams, an encoder-decoder model, a cache that is no `DynamicCache`, no cache, a dict
            as a result, or settings out of range.
    """
    if not 0 <= penalty_alpha <= 1:
        raise ValueError(f"`penalty_alpha` must be in [0, 1], got {penalty_alpha!r}.")
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
        raise ValueError(f"`candidates` must be a number of 1 or above, got {candidates!r}.")
    refuse_beams(generation_config, "contrastive_search")
    refuse_filled_cache(model_kwargs, "contrastive_search")
    if generation_config.do_sample:
        raise ValueError("`contrastive_search` does not sample; leave out `do_sample=True`.")
    if generation_config.return_dict_in_generate:
        raise ValueError("`contrastive_search` returns ids; leave out `return_dict_in_generate=True`.")
    if model.config.is_encoder_decoder:
        raise ValueError("`contrastive_search` is for decoder-only models.")
    cache = given_cache(model_kwargs)
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"`contrastive_search` copies rows of a `DynamicCache`, got {type(cache).__name__}.")
    return _search(
        model,
        input_ids,
        (logits_processor, stopping_criteria, generation_config),
        (penalty_alpha, candidates),
        streamer,
        model_kwargs,
    )


def _search(
    model: Any,
    input_ids: torch.Tensor,
    settings: tuple[LogitsProcessorList, StoppingCriteriaList, GenerationConfig],
    strength: tuple[float, int],
    streamer: Any,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    processors, criteria, config = settings
    penalty, candidates = strength
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    pads = any(hasattr(each, "eos_token_id") for each in criteria)
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
    inputs.pop("logits_to_keep", None)
    output = model(**inputs, return_dict=True, output_hidden_states=True)
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    context = F.normalize(output.hidden_states[-1].float(), dim=-1)  # (B, S, H)
    logits = output.logits[:, -1].float()
    while True:
        scores = processors(input_ids, logits.to(input_ids.device))
        probabilities, tokens = scores.softmax(dim=-1).topk(min(candidates, scores.shape[-1]), dim=-1)  # (B, k)
        rows, width = tokens.shape
        kwargs = model._update_model_kwargs_for_generation(output, kwargs)
        given_cache(kwargs).batch_repeat_interleave(width)
        tried = torch.cat([input_ids.repeat_interleave(width, dim=0), tokens.reshape(-1, 1)], dim=-1)
        wide = {
            name: value.repeat_interleave(width, dim=0)
            if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows and name != "cache_position"
            else value
            for name, value in kwargs.items()
        }
        inputs = model.prepare_inputs_for_generation(tried, next_sequence_length=1, **wide)
        output = model(**inputs, return_dict=True, output_hidden_states=True)
        state = F.normalize(output.hidden_states[-1][:, -1].float(), dim=-1).unflatten(0, (rows, width))
        similar = torch.einsum("bkh,bsh->bks", state, context).masked_fill(mask[:, None] == 0, float("-inf"))
        value = (1 - penalty) * probabilities.to(similar.device) - penalty * similar.amax(dim=-1)
        value = value.masked_fill(probabilities.to(value.device) == 0, float("-inf"))
        best = value.argmax(dim=-1)  # (B,)
        picked = torch.arange(rows, device=best.device) * width + best
        given_cache(output).batch_select_indices(picked)
        logits = output.logits[:, -1].float()[picked]
        context = torch.cat([context, state[torch.arange(rows), best][:, None]], dim=1)
        mask = F.pad(mask, (0, 1), value=1)
        token = tokens.gather(-1, best.to(tokens.device)[:, None]).squeeze(-1)
        if pads:
            token = token * unfinished + config._pad_token_tensor.to(token.device) * (1 - unfinished)
        input_ids = torch.cat([input_ids, token[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(token.cpu())
        unfinished = unfinished & ~criteria(input_ids, scores)
        if unfinished.max() == 0:
            break
    if streamer is not None:
        streamer.end()
    return input_ids
