"""What the architectures of this package need and the supported versions of Transformers spell differently."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast


_MASK_PARAMETERS = inspect.signature(create_causal_mask).parameters

# The cache is the argument and output `cache` from Transformers 5.24 on, `past_key_values` before.
CACHE = "cache" if "cache" in {item.name for item in fields(BaseModelOutputWithPast)} else "past_key_values"


def causal_mask(
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor,
) -> Any:
    """The mask that the attention implementation of `config` wants."""
    known = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "input_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "cache": cache,
        "past_key_values": cache,
        "position_ids": position_ids,
        "cache_position": position_ids[0],
    }
    return create_causal_mask(**{name: value for name, value in known.items() if name in _MASK_PARAMETERS})
