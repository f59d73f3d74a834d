"""Self-contrast decoding for one exported model (2405.14507), as the `custom_generate/generate.py` of its folder.

`from_pretrained(folder, trust_remote_code=True)` makes it the `generate` of the model, and a model of the same
architecture takes it as `generate(..., custom_generate=folder, trust_remote_code=True)`. It needs torch and
transformers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteriaList
from transformers.generation import StopStringCriteria

from .decoding import check_strengths, contrast_halves, refuse_beams, refuse_filled_cache


# Written by the export: the gates of the model and the rule by which they choose, and the defaults of `generate`.
ROUTING: dict[str, Any] = {}


def generate(
    inputs: torch.Tensor | None = None,
    *,
    model: Any,
    beta: float | None = None,
    alpha: float | None = None,
    weak: str | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    stop_strings: Any = None,
    **kwargs: Any,
) -> Any:
    """Generate with `(1 + beta) * strong - beta * weak`; the other arguments are those of `generate`.

    Args:
        inputs: (B, S) ids, or `input_ids` and `attention_mask` by name.
        model: what generates.
        beta: strength; 0 is the model's own decoding.
        alpha: tokens below `alpha` times the highest probability are not considered.
        weak: routing of the weak branch: `"rank-K"`, the expert with the K-th best score, or `"topk-K"`, the K best.
        streamer, tokenizer, stop_strings: as in `generate`.

    Raises:
        ValueError: for settings out of range, beams, or a model with other gates than the exported one.
    """
    settings = {
        name: ROUTING[name] if value is None else value
        for name, value in (("beta", beta), ("alpha", alpha), ("weak", weak))
    }
    given = {name: value for name, value in kwargs.items() if value is not None and name != "custom_generate"}
    given.pop("trust_remote_code", None)
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("`stop_strings` needs the `tokenizer` that turns ids into text.")
        criteria = [*given.get("stopping_criteria", ()), StopStringCriteria(tokenizer, stop_strings)]
        given["stopping_criteria"] = StoppingCriteriaList(criteria)
    loop = functools.partial(_decode, settings=settings, streamer=streamer)
    # Not `model.generate`, which may be this function.
    return type(model).generate(model, inputs, custom_generate=loop, **given)


def _decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    settings: dict[str, Any],
    streamer: Any,
    **model_kwargs: Any,
) -> Any:
    beta, alpha = settings["beta"], settings["alpha"]
    check_strengths(beta, alpha)
    refuse_beams(generation_config, "self-contrast")
    refuse_filled_cache(model_kwargs, "self-contrast")
    first, count = _weak(settings["weak"])
    if streamer is not None:
        streamer.put(input_ids.cpu())
    try:
        return contrast_halves(
            model,
            input_ids,
            _weak_half(model, len(input_ids), first, count),
            beta=beta,
            alpha=alpha,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            streamer=streamer,
            **model_kwargs,
        )
    except BaseException:
        if streamer is not None:
            streamer.end()  # or who reads from it would wait for ever
        raise


def _weak(text: str) -> tuple[int, int]:
    """The first rank, from 1, and the number of experts of the weak branch."""
    kind, _, number = str(text).partition("-")
    if kind not in ("rank", "topk") or not number.isdigit() or int(number) < 1:
        raise ValueError(f"`weak` must be such as 'rank-2' or 'topk-1', got {text!r}.")
    return (int(number), 1) if kind == "rank" else (1, int(number))


@contextlib.contextmanager
def _weak_half(model: Any, rows: int, first: int, count: int) -> Iterator[None]:
    """Inside, the second half of the rows of a forward is routed weakly."""
    if "moe_link" in vars(model):  # routers of its own, which route rows by policies
        home = next(kind.__module__ for kind in type(model).__mro__ if kind.__module__.endswith("modeling_moe_ext"))
        structure = importlib.import_module(f"{home.rpartition('.')[0]}.moe_structure")
        policy = {"num_experts_per_tok": count, "first_rank": first}
        with structure.route_rows(model, ["strong"] * rows + ["weak"] * rows, {"weak": policy}):
            yield
        return
    gates = dict(model.named_modules())
    missing = [name for name in ROUTING["gates"] if name not in gates]
    if missing:
        raise ValueError(f"this {type(model).__name__} has no `{missing[0]}`; it is not the exported architecture.")
    handles = []
    try:
        for name in ROUTING["gates"]:
            hook = functools.partial(_route_weakly, first=first, count=count)
            handles.append(gates[name].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _route_weakly(
    gate: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...], *, first: int, count: int
) -> tuple[torch.Tensor, ...]:
    """Another choice for the second half of the tokens, by the rule of the gate."""
    parts = dict(zip(ROUTING["returns"], output, strict=False))
    logits, weights, index = parts["L"].flatten(0, -2), parts["W"], parts["I"]
    half = len(logits) // 2
    chosen, factors = _choose(gate, logits[half:].float(), first, count)
    slots = max(index.shape[-1], count)

    def widen(tensor: torch.Tensor, value: Any) -> torch.Tensor:
        return nn.functional.pad(tensor, (0, slots - tensor.shape[-1]), value=value)

    # A slot that is not used has weight 0 and an id that every implementation of experts knows.
    parts["I"] = torch.cat([widen(index[:half], 0), widen(chosen, 0).to(index)])
    parts["W"] = torch.cat([widen(weights[:half], 0.0), widen(factors, 0.0).to(weights)])
    return tuple(parts[letter] for letter in ROUTING["returns"])


def _choose(gate: Any, logits: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.softmax(dim=-1) if ROUTING["score"] == "softmax" else logits.sigmoid()
    last = first + count - 1
    if last > scores.shape[-1]:
        raise ValueError(f"there are {scores.shape[-1]} experts, so none has rank {last}.")
    choice = scores
    if ROUTING["bias"] is not None:
        choice = choice + functools.reduce(getattr, ROUTING["bias"].split("."), gate).reshape(-1)
    if ROUTING["groups"] is not None:
        choice = _limit_groups(choice, *ROUTING["groups"])
    chosen = choice.topk(last, dim=-1).indices[..., first - 1 :]
    weights = scores.gather(-1, chosen)
    if ROUTING["renormalize"]:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return chosen, weights * ROUTING["scale"]


def _limit_groups(choice: torch.Tensor, groups: int, keep: int, how: str) -> torch.Tensor:
    """-inf outside the best groups of experts (DeepSeek-V2 and V3)."""
    grouped = choice.unflatten(-1, (groups, -1))
    best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1) if how == "top2_sum" else grouped.amax(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(keep, dim=-1).indices, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
