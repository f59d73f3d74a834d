"""What a router kernel computes, as values: the rule from logits to weights and ids, and the size of a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .tile_config import next_power_of_2


@dataclass(frozen=True)
class RouteRule:
    """How a row of logits becomes weights and ids. The default is that of Mixtral.

    Args:
        score: from logits to scores: `softmax` over the columns, elementwise `sigmoid`, or elementwise `sqrt_softplus`
            (the square root of softplus, as DeepSeek-V4).
        divide: what the weights of a token are divided by: their own sum (`chosen`), the sum of all scores (`all`), or
            nothing (`none`). A softmax over the chosen logits is `chosen`.
        scale: factor on the weights.
        num_groups, topk_groups: columns are `num_groups` equal groups, of which the `topk_groups` best remain. 1 group
            is no limit.
        group_score: a group is worth its best column (`max`) or the sum of its two best (`top2_sum`).
        keep: which of the K best columns are kept. `all`; `top_p`: those where the better ones sum to `threshold` at
            most; `threshold`: those above it; `count`: the number given for the row. Both thresholds look at the
            distribution, that is, scores divided by their sum, and always keep the first column.
        threshold: a probability; `top_p` with 1 keeps all.
        min_kept: slots that `top_p` keeps in any case.
        first_rank: rank of the first column that is taken, from 1.
        num_choices: columns from here on are nobody, `None` for none (a gate's class that skips the experts).
        null_start, null_end: columns that may be chosen, but have weight 0 and do not count in the sum.

    Raises:
        ValueError: for values that are unknown or do not go together.
    """

    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    divide: Literal["chosen", "all", "none"] = "chosen"
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    keep: Literal["all", "top_p", "threshold", "count"] = "all"
    threshold: float = 1.0
    min_kept: int = 1
    first_rank: int = 1
    num_choices: int | None = None
    null_start: int = 0
    null_end: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "score": ("softmax", "sigmoid", "sqrt_softplus"),
            "divide": ("chosen", "all", "none"),
            "group_score": ("max", "top2_sum"),
            "keep": ("all", "top_p", "threshold", "count"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {values}, got {getattr(self, name)!r}.")
        for name in ("num_groups", "topk_groups", "min_kept", "first_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.topk_groups > self.num_groups:
            raise ValueError(f"`topk_groups` ({self.topk_groups}) exceeds `num_groups` ({self.num_groups}).")
        if self.first_rank > 1 and self.keep in ("top_p", "threshold"):
            raise ValueError(f'`first_rank` ({self.first_rank}) does not go with `keep="{self.keep}"`.')
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` must be in [0, 1], got {self.threshold}.")
        if not 0 <= self.null_start <= self.null_end:
            raise ValueError(f"`null_start` ({self.null_start}) and `null_end` ({self.null_end}) are no range.")


@dataclass(frozen=True)
class RouteConfig:
    """Size of a program. It must not depend on T where a row has to give the same bits in any batch.

    Args:
        rows: rows of one program, a power of 2.
        num_warps: warps of one program.

    Raises:
        ValueError: for numbers that are no powers of 2.
    """

    rows: int = 4
    num_warps: int = 4

    def __post_init__(self) -> None:
        for name in ("rows", "num_warps"):
            number = getattr(self, name)
            if number < 1 or number & (number - 1):
                raise ValueError(f"`{name}` must be a power of 2, got {number}.")


def default_route_config(columns: int) -> RouteConfig:
    """Sizes by rule, where no measured ones are known: a warp has its rows to itself, so that it finds the largest
    number of a row without waiting for others. Only very wide rows are shared.

    Args:
        columns: C.
    """
    width = next_power_of_2(columns)
    if width > 256:
        return RouteConfig(rows=1, num_warps=1 if width <= 1024 else 4)
    return RouteConfig(rows=max(4, 512 // width), num_warps=4)
