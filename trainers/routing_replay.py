"""Recorded routing as a column of the training data. R3 (https://arxiv.org/abs/2510.11370)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..modeling.moe_replay import replay_routing


COLUMN = "routed_experts"


class RoutingReplayCollator:
    """Puts the column `routed_experts` of a batch together, and leaves the others to another collator.

    Args:
        collator: makes a batch of the other columns, with `input_ids`.
        padding_side: where it pads texts, "right" or "left".

    An example's `routed_experts` is (S, L, K), for each of its S tokens, or all but the last, what the L routed layers
    chose; -1 for an unused slot. The batch gets (B, S, L, K) with -1 for padding, which chooses by itself.

    Raises:
        ValueError: for another side; in a call where an example has more recorded tokens than tokens, where numbers of
            layers differ, or where some examples have the column and others do not.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        *,
        padding_side: Literal["right", "left"] = "right",
    ) -> None:
        if padding_side not in ("right", "left"):
            raise ValueError(f'`padding_side` must be "right" or "left", got {padding_side!r}.')
        self.collator, self.padding_side = collator, padding_side

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator([{k: v for k, v in example.items() if k != COLUMN} for example in examples])
        have = [COLUMN in example for example in examples]
        if not any(have):
            return batch
        if not all(have):
            raise ValueError(f"{sum(have)} of {len(have)} examples have `{COLUMN}`; all or none can.")
        recorded = [torch.as_tensor(example[COLUMN]) for example in examples]
        if len({index.shape[1:2] for index in recorded}) > 1 or any(index.dim() != 3 for index in recorded):
            shapes = sorted({tuple(index.shape) for index in recorded})
            raise ValueError(f"`{COLUMN}` must be (tokens, layers, slots), of as many layers each, got {shapes}.")
        length, slots = batch["input_ids"].shape[1], max(index.shape[2] for index in recorded)
        rows = []
        for index, example in zip(recorded, examples, strict=True):
            tokens = len(example["input_ids"])
            if len(index) > tokens:
                raise ValueError(f"an example of {tokens} tokens has `{COLUMN}` for {len(index)}.")
            # Negative where tokens were cut off, which `pad` does too.
            before = length - tokens if self.padding_side == "left" else 0
            after = length - before - len(index)
            rows.append(F.pad(index, (0, slots - index.shape[2], 0, 0, before, after), value=-1))
        batch[COLUMN] = torch.stack(rows)
        return batch


@contextlib.contextmanager
def replayed(model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs without `routed_experts`, whose choices hold inside; as they are where there is none."""
    if COLUMN not in inputs:
        yield inputs
        return
    with replay_routing(model, inputs[COLUMN]):
        yield {name: value for name, value in inputs.items() if name != COLUMN}
