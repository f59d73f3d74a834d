"""How far weak branches are from the strong one, before any decoding (figures 2 and 4 of 2405.14507)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..modeling.moe_structure import trace_routing
from .routing import RoutingMode, branches


@dataclass(frozen=True)
class BranchProfile:
    """One weak branch against the model's own routing, on the same text.

    Attributes:
        k: rank of the one expert that the weak branch uses, from 1.
        divergence: mean KL(strong || weak) of the next token, in nats.
        outside: share of the weak branch's experts that the strong branch does not use at the same place. For rank 1
            it is above 0 where the two branches see different states.
        agreement: share of positions where both find the same token most likely.
    """

    k: int
    divergence: float
    outside: float
    agreement: float


@torch.no_grad()
def contrast_profile(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    ranks: Iterable[int],
    *,
    attention_mask: torch.Tensor | None = None,
) -> list[BranchProfile]:
    """What each rank would contribute as the weak branch of self-contrast.

    Args:
        model: a MoE language model, stock or extended; it is as before afterwards.
        input_ids: (B, S) texts.
        ranks: of the experts to try, from 1.
        attention_mask: (B, S); padded positions do not count.

    Returns:
        A profile for each rank, in order.

    Raises:
        ValueError: a rank that no layer has, or a model without routers.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    real = mask.bool().flatten()
    found = []
    for k in ranks:
        modes = {"strong": None, "weak": RoutingMode("rank", k)}
        with branches(model, modes, len(input_ids)), trace_routing(model) as contexts:
            output = model(
                input_ids=input_ids.repeat(2, 1), attention_mask=mask.repeat(2, 1), position_ids=positions.repeat(2, 1)
            )
        strong, weak = output.logits.float().flatten(0, 1).log_softmax(dim=-1).chunk(2)
        divergence = (strong.exp() * (strong - weak)).sum(dim=-1)[real.to(strong.device)].mean()
        agreement = (strong.argmax(dim=-1) == weak.argmax(dim=-1))[real.to(strong.device)].float().mean()
        shares = []
        for context in contexts:
            for record in context.records.values():
                chosen, other = record.index.chunk(2)
                used = (other < record.num_experts) & real.to(other.device)[:, None]
                inside = (other[:, :, None] == chosen[:, None, :]).any(dim=-1)
                shares.append((~inside & used).sum() / used.sum())
        outside = float(torch.stack([share.cpu() for share in shares]).mean())
        found.append(BranchProfile(k, float(divergence), outside, float(agreement)))
    return found
