"""Stick-breaking attention: the nearest key takes its share of a stick, the next one its share of the rest.

ModuleFormer (2306.04640), section 3.1, and "Stick-breaking Attention" (2410.17980). Importing this file registers it
as `attn_implementation="stick_breaking"`, for every model of Transformers that computes its attention by the attention
interface. Positions of a model (RoPE) stay what they are; the method itself needs none, since it prefers near keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


# Attention logits that exist at once, in float32: 64 MiB for each of the four tensors of that size.
_BLOCK = 2**24


def stick_breaking_weights(logits: torch.Tensor) -> torch.Tensor:
    """`a_ij = b_ij * prod_{j < m} (1 - b_im)` with `b = sigmoid(logits)`, over the last axis.

    Rows sum to `1 - prod_j (1 - b_ij)`, at most 1: what is left of the stick attends to nothing.

    Args:
        logits: (..., S, T) in float32 or more, the nearest key last. A key that must not be seen has the most negative
            number: its share is 0, and it takes nothing from the stick.
    """
    left = F.logsigmoid(-logits).flip(-1).cumsum(-1)
    # Exclusive, and not by subtraction: beside a large term, the small sum before it would be lost.
    left = F.pad(left[..., :-1], (1, 0)).flip(-1)
    return (F.logsigmoid(logits) + left).exp()


def stick_breaking_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention interface of Transformers with stick-breaking in place of softmax.

    Queries are done in blocks, so that the logits of long inputs do not exist all at once. Weights are returned where
    they are asked for (`output_attentions`).

    Args:
        module: the attention module; says `num_key_value_groups` and whether it is causal (`is_causal`).
        query: (B, h, S, d).
        key, value: (B, h_kv, T, d).
        attention_mask: (B or 1, h or 1, S, T), added to the logits, or boolean (true: is seen). `None` means causal,
            the queries being the last S of T positions.
        scaling: factor on the logits; `None` means `d ** -0.5`.
        dropout: probability of leaving a weight out in training.

    Returns:
        (B, S, h, d), and the weights (B, h, S, T) or `None`.

    Raises:
        ValueError: for a module that is not causal: the method orders keys by their distance before the query.
    """
    if not getattr(module, "is_causal", True):
        raise ValueError("stick-breaking attention looks back from each query; this attention is not causal.")
    unknown = [name for name in ("softcap", "s_aux", "sliding_window") if kwargs.get(name) is not None]
    if [name for name in unknown if name != "sliding_window"]:  # a window is in the mask already
        raise ValueError(f"stick-breaking attention has no `{unknown[0]}`, which this model uses.")
    groups = query.shape[1] // key.shape[1]
    key, value = (x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    (batch, heads, length, _), total = query.shape, key.shape[2]
    wants_weights = bool(kwargs.get("output_attentions"))
    rows = max(1, _BLOCK // (batch * heads * max(total, 1)))
    outs, found = [], []
    for start in range(0, length, rows):
        block = query[:, :, start : start + rows]
        logits = block @ key.transpose(2, 3)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scaling
        lowest = torch.finfo(torch.float32).min
        if attention_mask is None:
            places = torch.arange(start, start + block.shape[2], device=query.device) + total - length
            seen = torch.arange(total, device=query.device) <= places[:, None]
            logits = logits.masked_fill(~seen, lowest)
        else:
            mask = attention_mask if attention_mask.shape[2] == 1 else attention_mask[:, :, start : start + rows]
            mask = mask[..., :total]
            hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
            bias = 0.0 if mask.dtype == torch.bool else mask.float().masked_fill(hidden, 0.0)
            logits = (logits + bias).masked_fill(hidden, lowest)
        weights = stick_breaking_weights(logits).to(query.dtype)
        if wants_weights:
            found.append(weights)
        outs.append(F.dropout(weights, p=dropout, training=module.training) @ value)
    out = torch.cat(outs, dim=2).transpose(1, 2).contiguous()
    return out, torch.cat(found, dim=2) if wants_weights else None


ALL_ATTENTION_FUNCTIONS.register("stick_breaking", stick_breaking_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register("stick_breaking", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
