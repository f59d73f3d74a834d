"""`route`, from logits to weights and ids by Triton kernels, with gradients and inside `torch.compile`.

Axes: T tokens, C columns of the logits (the experts, and what a router may choose beside them), K slots of a token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .namespace import NAMESPACE
from .route_rule import RouteConfig, RouteRule, default_route_config
from .tile_config import next_power_of_2
from .triton_route_kernels import route_backward_kernel, route_kernel
from .triton_routing import Launch


__all__ = ["RouteConfig", "RouteRule", "compile_cases", "default_route_config", "route"]

MAX_COLUMNS = 4096
_PASSES = 16  # at most; more choices are sorted

# Launches -----------------------------------------------------------------------------------------------------------


def _route_launch(
    logits: Tensor,
    k: int,
    bias: Tensor | None,
    counts: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor],
    rule: RouteRule,
    config: RouteConfig,
) -> Launch:
    (tokens, columns), (weights, index, lse) = logits.shape, outputs
    size, last = columns // rule.num_groups, k + rule.first_rank - 1
    groups_width, size_width = next_power_of_2(rule.num_groups), next_power_of_2(size)
    width, sort = groups_width * size_width, last > _PASSES
    arguments = {
        "logits": logits,
        "bias": bias,
        "counts": counts,
        "weights": weights,
        "index": index,
        "lse": lse,
        "num_rows": tokens,
        "row_stride": logits.stride(0),
        "column_stride": logits.stride(1),
        "bias_stride": 0 if bias is None else bias.stride(0),
        "num_choices": columns if rule.num_choices is None else rule.num_choices,
        "null_start": rule.null_start,
        "null_end": rule.null_end,
        "scale": rule.scale,
        "threshold": rule.threshold,
        "min_kept": rule.min_kept,
        "K": k,
        "SKIP": rule.first_rank - 1,
        "SLOTS": width if sort else next_power_of_2(last),
        "GROUPS": rule.num_groups,
        "GROUP_SIZE": size,
        "GROUPS_WIDTH": groups_width,
        "SIZE_WIDTH": size_width,
        "TOPK_GROUPS": rule.topk_groups,
        "TOP2": rule.group_score == "top2_sum" and size > 1,
        "SCORE": rule.score,
        "DIVIDE": rule.divide,
        # A sum of probabilities may be rounded to above 1.
        "KEEP": "all" if rule.keep == "top_p" and rule.threshold == 1 else rule.keep,
        "HAS_BIAS": bias is not None,
        "SORT": sort,
        "WITH_LSE": lse.numel() > 0,
        "ROWS": config.rows,
    }
    return Launch(route_kernel, (triton.cdiv(tokens, config.rows),), arguments, num_warps=config.num_warps)


def _route_backward_launch(
    logits: Tensor,
    index: Tensor,
    grad_weights: Tensor,
    grad_lse: Tensor | None,
    grad_logits: Tensor,
    rule: RouteRule,
    config: RouteConfig,
) -> Launch:
    (tokens, columns), k = logits.shape, index.shape[1]
    width = next_power_of_2(columns)
    arguments = {
        "logits": logits,
        "index": index,
        "grad_weights": grad_weights,
        "grad_lse": grad_lse,
        "grad_logits": grad_logits,
        "num_rows": tokens,
        "num_columns": columns,
        "row_stride": logits.stride(0),
        "column_stride": logits.stride(1),
        "num_choices": columns if rule.num_choices is None else rule.num_choices,
        "null_start": rule.null_start,
        "null_end": rule.null_end,
        "scale": rule.scale,
        "K": k,
        "SLOTS": next_power_of_2(k),
        "WIDTH": width,
        "SCORE": rule.score,
        "DIVIDE": rule.divide,
        "WITH_LSE": grad_lse is not None,
        "ROWS": config.rows,
    }
    return Launch(route_backward_kernel, (triton.cdiv(tokens, config.rows),), arguments, num_warps=config.num_warps)


def compile_cases() -> dict[str, Launch]:
    """Launches at the size of real models, on tensors without data."""
    deepseek = RouteRule("sigmoid", scale=2.5, num_groups=8, topk_groups=4, group_score="top2_sum")
    top_p = RouteRule(divide="none", keep="top_p", threshold=0.4)
    cases = {}
    for name, rule, columns, k in (
        ("softmax", RouteRule(), 128, 8),
        ("deepseek", deepseek, 256, 8),
        ("sqrt_softplus", RouteRule("sqrt_softplus"), 384, 6),
        ("top_p", top_p, 60, 8),
        ("top_p_sorted", top_p, 257, 257),
    ):
        logits = torch.empty(4096, columns, dtype=torch.bfloat16, device="meta")
        bias = logits.new_empty(columns, dtype=torch.float32) if name == "deepseek" else None
        outputs = _route_outputs(logits, k, with_lse=True)
        cases[f"route-{name}"] = _route_launch(logits, k, bias, None, outputs, rule, default_route_config(columns))
        weights, index, lse = outputs
        cases[f"route_backward-{name}"] = _route_backward_launch(
            logits, index, weights, lse, torch.empty_like(logits), rule, default_route_config(columns)
        )
    return cases


# Operators ----------------------------------------------------------------------------------------------------------

# The schema of an operator knows no dataclasses: rule and config travel as their fields, in order.


@torch.library.custom_op(f"{NAMESPACE}::route", mutates_args=())
def _route(
    logits: Tensor,
    k: int,
    bias: Tensor | None,
    counts: Tensor | None,
    with_lse: bool,
    score: str,
    divide: str,
    scale: float,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    keep: str,
    threshold: float,
    min_kept: int,
    first_rank: int,
    num_choices: int | None,
    null_start: int,
    null_end: int,
    rows: int,
    num_warps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _route_outputs(logits, k, with_lse)
    fields: dict[str, Any] = {
        "score": score,
        "divide": divide,
        "scale": scale,
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "group_score": group_score,
        "keep": keep,
        "threshold": threshold,
        "min_kept": min_kept,
        "first_rank": first_rank,
        "num_choices": num_choices,
        "null_start": null_start,
        "null_end": null_end,
    }
    rule = RouteRule(**fields)
    _route_launch(logits, k, bias, counts, outputs, rule, RouteConfig(rows, num_warps)).run(logits)
    return outputs


def _route_outputs(logits: Tensor, k: int, with_lse: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens = logits.shape[0]
    weights = logits.new_empty(tokens, k, dtype=torch.float32)
    return weights, logits.new_empty(tokens, k, dtype=torch.int32), weights.new_empty(tokens if with_lse else 0)


@_route.register_fake
def _(
    logits: Tensor, k: int, bias: Tensor | None, counts: Tensor | None, with_lse: bool, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _route_outputs(logits, k, with_lse)


@torch.library.custom_op(f"{NAMESPACE}::route_backward", mutates_args=())
def _route_backward(
    logits: Tensor,
    index: Tensor,
    grad_weights: Tensor,
    grad_lse: Tensor | None,
    score: str,
    divide: str,
    scale: float,
    num_choices: int | None,
    null_start: int,
    null_end: int,
    rows: int,
    num_warps: int,
) -> Tensor:
    grad = logits.new_empty(logits.shape)
    fields: dict[str, Any] = {"score": score, "divide": divide, "scale": scale}
    rule = RouteRule(**fields, num_choices=num_choices, null_start=null_start, null_end=null_end)
    inputs = (logits, index, grad_weights.contiguous(), None if grad_lse is None else grad_lse.contiguous())
    _route_backward_launch(*inputs, grad, rule, RouteConfig(rows, num_warps)).run(logits)
    return grad


@_route_backward.register_fake
def _(logits: Tensor, *settings: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, _, _, ctx.with_lse, *settings = inputs
    score, divide, scale = settings[:3]
    ctx.settings = (score, divide, scale, *settings[-5:])  # the choice itself has no gradient
    ctx.save_for_backward(logits, output[1])


def _backward(ctx: Any, grad_weights: Tensor, _: Any, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    logits, index = ctx.saved_tensors
    grad = _route_backward(logits, index, grad_weights, grad_lse if ctx.with_lse else None, *ctx.settings)
    return grad, *(None,) * 19


_route.register_autograd(_backward, setup_context=_keep_for_backward)


def route(
    logits: Tensor,
    k: int,
    *,
    rule: RouteRule | None = None,
    bias: Tensor | None = None,
    counts: Tensor | None = None,
    return_lse: bool = False,
    config: RouteConfig | None = None,
) -> tuple[Tensor, ...]:
    """Choose K columns for each row and weigh them, as `rule` says.

    The slots of a row are in the order of the choice, best first. Slots that are not used have the id C (or
    `rule.num_choices`) and weight 0; so have those for which groups leave no column. Gradients flow to `logits`.

    Args:
        logits: (T, C) float32, bfloat16 or float16, any strides.
        k: K, from 1 to C.
        rule: the default `RouteRule()` is softmax, top-k, divided by the sum.
        bias: (C,), added to the scores for the choice alone. Without it and without groups the logits decide, so
            scores that saturate are still told apart.
        counts: (T,) integers, with `keep="count"`: slots that the row uses, 0 to K.
        return_lse: whether to return the log of the sum of the exponentials of each row, too.
        config: size of a program, `default_route_config(C)` if not given.

    Returns:
        weights (T, K) float32, index (T, K) int32, and lse (T,) float32 if asked for.

    Raises:
        ValueError: for shapes, dtypes and numbers that do not go together.
    """
    rule = rule or RouteRule()
    if logits.ndim != 2 or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"`logits` must be (T, C) in float32, bfloat16 or float16, got {tuple(logits.shape)} in {logits.dtype}."
        )
    columns = logits.shape[1]
    if not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"`logits` must have 1 to {MAX_COLUMNS} columns, got {columns}.")
    if k < 1 or k + rule.first_rank - 1 > columns:
        raise ValueError(f"`k` ({k}) from rank {rule.first_rank} on must be within the {columns} columns.")
    if columns % rule.num_groups:
        raise ValueError(f"`num_groups` ({rule.num_groups}) must divide the {columns} columns.")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"`bias` must have the shape ({columns},), got {tuple(bias.shape)}.")
    if (counts is not None) != (rule.keep == "count"):
        raise ValueError(f'`counts` goes with `keep="count"`, got `keep="{rule.keep}"`.')
    if counts is not None and counts.shape != logits.shape[:1]:
        raise ValueError(f"`counts` must have the shape ({logits.shape[0]},), got {tuple(counts.shape)}.")
    config = config or default_route_config(columns)
    counts = None if counts is None else counts.contiguous()
    bias = None if bias is None else bias.detach()
    # By name and not by `astuple`, which the compiler does not follow.
    settings = (
        (rule.score, rule.divide, rule.scale, rule.num_groups, rule.topk_groups, rule.group_score)
        + (rule.keep, rule.threshold, rule.min_kept, rule.first_rank, rule.num_choices, rule.null_start)
        + (rule.null_end, config.rows, config.num_warps)
    )
    weights, index, lse = _route(logits, k, bias, counts, return_lse, *settings)
    return (weights, index, lse) if return_lse else (weights, index)
