"""Contrastive decoding: a model against a weaker one (2210.15097, in the form of 2309.09117)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from .decoding import check_strengths, given_cache, refuse_beams, refuse_filled_cache, sample, with_contrast


def contrastive_decoding(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    amateur: PreTrainedModel | None = None,
    beta: float = 0.5,
    alpha: float = 0.1,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode with `(1 + beta) * model - beta * amateur`, for `generate(..., custom_generate=contrastive_decoding)`.

    Args:
        amateur (`PreTrainedModel`):
            A weaker model with the same tokens. It has a cache of its own, and is only read.
        beta (`float`, *optional*, defaults to 0.5):
            Strength; 0 is the model alone.
        alpha (`float`, *optional*, defaults to 0.1):
            Tokens below `alpha` times the highest probability of the model are not considered.

    Raises:
        ValueError: `amateur` is missing or has another vocabulary, beams, an encoder-decoder model, or settings out
            of range.
    """
    check_strengths(beta, alpha)
    refuse_beams(generation_config, "contrastive_decoding")
    if not isinstance(amateur, PreTrainedModel):
        raise ValueError(f"`contrastive_decoding` needs a weaker model as `amateur`, got {type(amateur).__name__}.")
    if model.config.is_encoder_decoder or amateur.config.is_encoder_decoder:
        raise ValueError("`contrastive_decoding` is for decoder-only models.")
    refuse_filled_cache(model_kwargs, "contrastive_decoding")
    sizes = [each.config.get_text_config().vocab_size for each in (model, amateur)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`amateur` has a vocabulary of {sizes[1]}, the model one of {sizes[0]}; they must be the same."
        )
    weak = _Follower(amateur, model_kwargs.get("attention_mask"), model_kwargs.get("use_cache", True))
    return sample(
        model,
        input_ids,
        logits_processor=with_contrast(logits_processor, weak, beta, alpha),
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        streamer=streamer,
        **model_kwargs,
    )


class _Follower:
    """Logits of a second model for the texts that the first one writes."""

    def __init__(self, model: PreTrainedModel, mask: torch.Tensor | None, use_cache: bool) -> None:
        self.model, self.mask, self.use_cache, self.seen = model, mask, use_cache, 0
        self.cache: Any = None
        self.parameters = inspect.signature(model.forward).parameters

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        device = self.model.device
        new = input_ids[:, self.seen :] if self.use_cache else input_ids
        inputs: dict[str, Any] = {"input_ids": new.to(device), "use_cache": self.use_cache}
        if self.mask is not None:
            mask = F.pad(self.mask, (0, input_ids.shape[1] - self.mask.shape[1]), value=1).to(device)
            positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
            inputs["attention_mask"] = mask
            if "position_ids" in self.parameters:
                inputs["position_ids"] = positions[:, -new.shape[1] :]
        if self.cache is not None:
            inputs["cache" if "cache" in self.parameters else "past_key_values"] = self.cache
        output: Any = self.model(**inputs, return_dict=True)
        if self.use_cache:
            self.cache, self.seen = given_cache(output), input_ids.shape[1]
        return output.logits[:, -1].float().to(input_ids.device)
