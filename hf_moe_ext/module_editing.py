"""Experts are added to the mixtures of a model, or taken out of them.

    insertion = insert_experts(model, 2)                 # two more in every mixture
    mask = train_new_experts(model, insertion)           # nothing else is trained
    usage = expert_usage(model, texts, tokenizer=tokenizer)
    prune_experts(model, usage, threshold=0.01)          # those that hardly anything goes to

Both work in place on stock and extended MoE models, on upcycled ones and on ModuleFormer, before an optimizer is made.
The config says the new numbers afterwards, so the model saves and loads. A stock model stays one as long as all of its
layers have as many experts; otherwise it becomes an extended one. ModuleFormer (2306.04640), section 4.

A mixture is named by its key, that of `describe`: `"3"`, or `"attention.3"` for attention experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from .mixtures import Mixture, check_counts, choose_mixtures, find_mixtures, prepare, set_counts
from .modeling.moe_context import RoutingContext, RoutingLink
from .modeling.moe_install import is_installed, own_names, remember_added
from .modeling.moe_router import MoERouter
from .modeling.moe_structure import gate_rule
from .modeling.router_top_k import GATES_OF_ROWS, REMOVED_ROWS, TopKRouter, TopKRouterConfig, renormalizes
from .trainers.freezing import ExpertMask, moe_parts, train_rows
from .upcycling.methods import derive_seed
from .usage import ExpertUsage


@dataclass(frozen=True)
class Insertion:
    """What `insert_experts` did.

    Attributes:
        new: numbers of the new experts, by the key of their mixture.
    """

    new: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pruning:
    """What `prune_experts` did.

    Attributes:
        removed: numbers that the removed experts had, by the key of their mixture.
        kept: numbers that the others had, in their new order.
        parameters_before, parameters_after: of the whole model.
    """

    removed: dict[str, tuple[int, ...]]
    kept: dict[str, tuple[int, ...]]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        count = sum(map(len, self.removed.values()))
        places = sum(1 for removed in self.removed.values() if removed)
        return (
            f"Removed {count} experts from {places} of {len(self.removed)} mixtures: {self.parameters_before:,} -> "
            f"{self.parameters_after:,} parameters."
        )


def insert_experts(
    model: PreTrainedModel,
    num_new: int,
    *,
    layers: Iterable[str] | None = None,
    init: Literal["random", "copy"] = "random",
    usage: Mapping[str, ExpertUsage] | None = None,
    noise: float = 0.01,
    gate_std: float = 0.02,
    seed: int = 0,
) -> Insertion:
    """Add experts to mixtures of a model, in place.

    The gate gets a row for each, normal with `gate_std`. Where its weights are not renormalised, those of the old
    experts shrink as tokens go to the new ones.

    Args:
        model (`PreTrainedModel`):
            A model with experts.
        num_new (`int`):
            New experts of every mixture.
        layers (`list[str]`, *optional*):
            Keys of the mixtures; all where it is not given.
        init (`"random"` or `"copy"`, *optional*, defaults to `"random"`):
            Normal weights with the standard deviation of the old experts of the mixture, and biases of 0; or copies of
            its most used expert, which need `usage`.
        usage (`dict`, *optional*):
            From [`expert_usage`].
        noise (`float`, *optional*, defaults to 0.01):
            Standard deviation of what is added to copies, relative to that of the tensor.
        gate_std (`float`, *optional*, defaults to 0.02):
            Standard deviation of the new rows of the gates.
        seed (`int`, *optional*, defaults to 0):
            Of everything random. A seed means the same numbers on every device.

    Returns:
        The numbers of the new experts, for [`train_new_experts`].

    Raises:
        ValueError: for a number or a key that does not fit, or a mixture that cannot be changed, with the reason. The
            model is then unchanged.
    """
    _require_positive("num_new", num_new)
    if init not in ("random", "copy"):
        raise ValueError(f'`init` must be "random" or "copy", got {init!r}.')
    for name, value in (("noise", noise), ("gate_std", gate_std)):
        if value < 0:
            raise ValueError(f"`{name}` must be non-negative, got {value}.")
    family, mixtures = find_mixtures(model)
    chosen = choose_mixtures(mixtures, layers)
    if init == "copy":
        _require_usage(usage, chosen, 'init="copy"')
    counts = {mixture.key: mixture.num_experts + num_new for mixture in chosen}
    check_counts(model, family, chosen, counts)
    new = {}
    model = prepare(model, family, mixtures, counts, {})
    for mixture in chosen:
        source = None if init == "random" or usage is None else int(usage[mixture.key].counts.argmax())
        for path, module, store, name, tensor in mixture.stacks():
            generator = torch.Generator().manual_seed(derive_seed(seed, mixture.key, path, name))
            if module in mixture.gate_modules():
                added = _gate_rows(tensor, num_new, gate_std, generator)
            else:
                added = _expert_rows(tensor, num_new, source, noise, generator, name.endswith("bias"))
            _replace(store, name, torch.cat([tensor.detach(), added]))
        new[mixture.key] = tuple(range(mixture.num_experts, counts[mixture.key]))
    set_counts(model, family, mixtures, counts)
    return Insertion(new)


def prune_experts(
    model: PreTrainedModel,
    usage: Mapping[str, ExpertUsage] | None = None,
    *,
    threshold: float | None = None,
    keep: int | None = None,
    experts: Mapping[str, Iterable[int]] | None = None,
    layers: Iterable[str] | None = None,
    keep_denominator: bool = False,
) -> Pruning:
    """Take experts out of mixtures of a model, in place: those that are used least, or those that are named.

    The other experts keep their order and are renumbered; top-k is then over them. A softmax over fewer experts gives
    each of them more weight. Where weights are renormalised after top-k, this takes nothing from tokens that did not
    choose a removed expert; where they are not, `keep_denominator` lets the removed experts count in the softmax as
    before, so that such tokens get what they got.

    Args:
        model (`PreTrainedModel`):
            A model with experts.
        usage (`dict`, *optional*):
            From [`expert_usage`] on data of the task.
        threshold (`float`, *optional*):
            Experts that a smaller share of the tokens chose are removed.
        keep (`int`, *optional*):
            So many experts of each mixture stay, those that were used most.
        experts (`dict`, *optional*):
            In place of `usage`: the numbers of the experts to remove, by the key of their mixture.
        layers (`list[str]`, *optional*):
            Keys of the mixtures that `usage` prunes; all that it knows where it is not given.
        keep_denominator (`bool`, *optional*, defaults to `False`):
            Keep the gate's rows of removed experts, for the softmax only. They are not trained. Needs a top-k router,
            and makes an extended model of a stock one.

    Returns:
        What was removed.

    Raises:
        ValueError: for arguments that do not fit, a mixture that would have fewer experts than a token uses, or one
            that cannot be changed, with the reason. The model is then unchanged.
    """
    family, mixtures = find_mixtures(model)
    removed = _to_remove(mixtures, usage, threshold, keep, experts, layers)
    chosen = [mixture for mixture in mixtures if removed.get(mixture.key)]
    counts = {mixture.key: mixture.num_experts - len(removed[mixture.key]) for mixture in chosen}
    check_counts(model, family, chosen, counts)
    rows = {m.key: len(removed[m.key]) for m in chosen if keep_denominator and _counts_others(m)}
    before = sum(parameter.numel() for parameter in model.parameters())
    kept = {
        mixture.key: tuple(i for i in range(mixture.num_experts) if i not in removed[mixture.key])
        for mixture in mixtures
        if mixture.key in removed
    }
    model = prepare(model, family, mixtures, counts, rows)
    for mixture in chosen:
        if mixture.key in rows:
            _keep_rows(mixture.gate, sorted(removed[mixture.key]))
        for _, _, store, name, tensor in mixture.stacks():
            _replace(store, name, tensor.detach()[list(kept[mixture.key])].clone())
    set_counts(model, family, mixtures, counts)
    after = sum(parameter.numel() for parameter in model.parameters())
    numbers = {mixture.key: tuple(sorted(removed[mixture.key])) for mixture in mixtures if mixture.key in removed}
    return Pruning(numbers, kept, before, after)


def train_new_experts(model: PreTrainedModel, insertion: Insertion, *, gate_penalty: float = 0.0) -> ExpertMask:
    """Train the new experts and their rows of the gates, and nothing else.

    Args:
        model (`PreTrainedModel`):
            The model they were inserted into, also after it was saved and loaded.
        insertion ([`Insertion`]):
            From [`insert_experts`].
        gate_penalty (`float`, *optional*, defaults to 0.0):
            Weight of the mean over mixtures of `||A_new||^2`, where `A_new` are the new rows, added to the loss in
            training, so that they do not take all tokens.

    Returns:
        `ExpertMask`: give it to the trainer (`trainer.expert_mask = mask`) or call `mask.attach(optimizer)` before the
        first step. `mask.remove()` lets everything train again.

    Raises:
        ValueError: for experts that the model does not have, or a penalty on a stock model, which adds none to its
            loss.

    Example:
        ```python
        >>> mask = train_new_experts(model, insert_experts(model, 2), gate_penalty=0.01)
        >>> trainer = MoETrainer(model=model, args=arguments, train_dataset=dataset)
        >>> trainer.expert_mask = mask
        ```
    """
    if gate_penalty < 0:
        raise ValueError(f"`gate_penalty` must be non-negative, got {gate_penalty}.")
    _, mixtures = find_mixtures(model)
    known = {mixture.key: mixture for mixture in mixtures}
    for key, numbers in insertion.new.items():
        if key not in known or not all(0 <= number < known[key].num_experts for number in numbers):
            has = f"experts 0 to {known[key].num_experts - 1}" if key in known else "no such mixture"
            raise ValueError(f"`insertion` names the experts {list(numbers)} of `{key}`; the model has {has}.")
    link = vars(model).get("moe_link")
    if gate_penalty and not isinstance(link, RoutingLink):
        raise ValueError(
            "`gate_penalty` goes into the loss of extended models. Extend this one first, which changes no result: "
            "`extend(model, TopKRouterConfig())`."
        )
    rows: dict[nn.Parameter, Iterable[int]] = {}
    gates: list[tuple[nn.Parameter, list[int]]] = []
    for key, numbers in insertion.new.items():
        for _, module, _, _, tensor in known[key].stacks():
            if isinstance(tensor, nn.Parameter):
                rows[tensor] = numbers
                if module in known[key].gate_modules() and tensor.dim() > 1 and tensor.requires_grad:
                    gates.append((tensor, list(numbers)))
    mask = train_rows(model, rows)
    mask.trained = {part.key: insertion.new.get(part.key, ()) for part in moe_parts(model)}
    if gate_penalty and isinstance(link, RoutingLink):
        mask.bind(_Penalty(link, gates, gate_penalty))
    return mask


class _Penalty:
    """Adds the squared norm of some rows to the losses of a forward, until it is removed."""

    def __init__(self, link: RoutingLink, rows: list[tuple[nn.Parameter, list[int]]], weight: float) -> None:
        self.link, self.rows, self.weight = link, rows, weight
        link.observers.append(self)

    def __call__(self, contexts: list[RoutingContext]) -> None:
        if contexts:
            norms = [tensor[numbers].float().square().sum() for tensor, numbers in self.rows]
            contexts[0].losses["new_gates"] = (torch.stack(norms).mean(), self.weight)

    def remove(self) -> None:
        """Add it no longer."""
        if self in self.link.observers:
            self.link.observers.remove(self)


def _to_remove(
    mixtures: list[Mixture],
    usage: Mapping[str, ExpertUsage] | None,
    threshold: float | None,
    keep: int | None,
    experts: Mapping[str, Iterable[int]] | None,
    layers: Iterable[str] | None,
) -> dict[str, set[int]]:
    """Numbers of the experts to remove by mixture."""
    given = [
        name for name, value in (("threshold", threshold), ("keep", keep), ("experts", experts)) if value is not None
    ]
    if len(given) != 1:
        raise ValueError(
            f"give exactly one of `threshold`, `keep` and `experts`, got {' and '.join(given) or 'none'}."
        )
    known = {mixture.key: mixture for mixture in mixtures}
    if experts is not None:
        if layers is not None:
            raise ValueError("`experts` names the mixtures itself; leave `layers` out.")
        found = {str(key): set(numbers) for key, numbers in experts.items()}
        for key, numbers in found.items():
            if key not in known:
                raise ValueError(f"`experts` names `{key}`; the mixtures of this model are {', '.join(known)}.")
            outside = sorted(n for n in numbers if not 0 <= n < known[key].num_experts)
            if outside:
                last = known[key].num_experts - 1
                raise ValueError(f"`experts` names {outside} of `{key}`, whose experts are 0 to {last}.")
        return found
    if usage is None:
        raise ValueError(f"`{given[0]}` needs `usage`; `expert_usage(model, data)` measures it.")
    chosen = choose_mixtures([m for m in mixtures if m.key in usage] if layers is None else mixtures, layers)
    _require_usage(usage, chosen, given[0])
    removed = {}
    for mixture in chosen:
        counts = usage[mixture.key].counts
        if threshold is not None:
            if not 0 <= threshold <= 1:
                raise ValueError(f"`threshold` must be in [0, 1], got {threshold}.")
            rare = usage[mixture.key].frequency < threshold
            removed[mixture.key] = set(rare.nonzero().flatten().tolist())
        else:
            _require_positive("keep", keep)
            order = counts.sort(descending=True, stable=True).indices.tolist()
            removed[mixture.key] = set(order[keep:])
    return removed


def _require_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def _require_usage(usage: Mapping[str, ExpertUsage] | None, chosen: list[Mixture], what: str) -> None:
    for mixture in chosen:
        if usage is None or mixture.key not in usage:
            raise ValueError(f"{what} needs the `usage` of `{mixture.key}`; `expert_usage(model, data)` measures it.")
        if len(usage[mixture.key].counts) != mixture.num_experts:
            raise ValueError(
                f"`usage` counts {len(usage[mixture.key].counts)} experts of `{mixture.key}`, which has "
                f"{mixture.num_experts}. Measure it anew."
            )


def _gate_rows(tensor: torch.Tensor, count: int, std: float, generator: torch.Generator) -> torch.Tensor:
    if tensor.dim() == 1:  # a bias: as that of the old experts on average
        return tensor.detach().mean(dtype=torch.float32).to(tensor.dtype).expand(count)
    return (std * torch.randn(count, *tensor.shape[1:], generator=generator)).to(tensor)


def _expert_rows(
    tensor: torch.Tensor, count: int, source: int | None, noise: float, generator: torch.Generator, is_bias: bool
) -> torch.Tensor:
    drawn = torch.randn(count, *tensor.shape[1:], generator=generator).to(tensor.device)
    scale = tensor.detach().float().std()
    if source is None:
        return (torch.zeros_like(drawn) if is_bias else scale * drawn).to(tensor.dtype)
    return (tensor.detach()[source].float() + noise * scale * drawn).to(tensor.dtype)


def _replace(store: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
    old = store[name]
    store[name] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor


def _counts_others(mixture: Mixture) -> bool:
    """Whether the weight of an expert depends on the logits of those that are not chosen.

    Raises:
        ValueError: where it does, and the rows of removed experts cannot be kept.
    """
    gate = mixture.gate
    router = gate if isinstance(gate, MoERouter) and is_installed(gate) else None
    if router is not None and not isinstance(router, TopKRouter):
        raise ValueError(
            f"`keep_denominator` is for the router `top_k`; `{mixture.key}` has `{router.moe_config.type}`."
        )
    if router is not None:
        config, rule = router.moe_config, router.moe_site.rule
    elif mixture.spec is not None:
        config, rule = TopKRouterConfig(), gate_rule(mixture.spec, mixture.config)
    else:
        return False  # the plain rule of upcycled layers
    if (config.score or rule.score) == "sigmoid" or renormalizes(config, rule):
        return False
    if rule.logits not in GATES_OF_ROWS or rule.score == "custom":
        raise ValueError(
            f"`keep_denominator` needs logits that are products with the rows of one matrix; those of `{mixture.key}` "
            "are not, as far as is known."
        )
    return True


def _keep_rows(gate: Any, removed: list[int]) -> None:
    """Let the rows of removed experts count in the softmax."""
    rows = gate.weight.detach()[removed].clone()
    if REMOVED_ROWS in gate._buffers:
        rows = torch.cat([gate._buffers[REMOVED_ROWS], rows])
    before = own_names(gate)
    gate.register_buffer(REMOVED_ROWS, rows)
    remember_added(gate, before)
    gate.moe_config = replace(gate.moe_config, removed_experts=len(rows))
