"""Record which experts one pass uses, and use the same in another: routing replay.

What an inference engine or an earlier policy chose is kept, and a later pass, such as a training step, goes through
the same experts. The weights are those of the later pass, so gradients reach its router (Rollout Routing Replay, R3,
https://arxiv.org/abs/2510.11370).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from .moe_context import RoutingContext, RoutingLink
from .moe_router import MoERouter
from .moe_structure import iter_routers


class RecordedRouting:
    """What `record_routing` collects: for each layer the choices of all forwards inside, one after the other."""

    def __init__(self, keys: list[str], unused: list[int]) -> None:
        self.keys = keys
        self._unused = unused  # per layer, what stands for an unused slot
        self._steps: list[list[torch.Tensor]] = []

    def _add(self, contexts: list[RoutingContext]) -> None:
        for context in contexts:
            batch = context.batch_size or 1
            records = [context.records[key] for key in self.keys]
            self._steps.append([record.chosen.detach().unflatten(0, (batch, -1)) for record in records])

    def routed_experts(self) -> torch.Tensor:
        """(B, S, L, K) int32: what each of the S tokens of a row chose in each of the L routed layers, in the order of
        computation; -1 for an unused slot. K is the largest number of slots. In a model with zero-computation experts
        these follow the real experts, as columns of the router's logits.

        Raises:
            ValueError: there was no forward, or the batch changed between two.
        """
        if not self._steps:
            raise ValueError("no forward has run inside `record_routing`.")
        batches = sorted({step[0].shape[0] for step in self._steps})
        if len(batches) > 1:
            raise ValueError(f"the forwards inside `record_routing` had batches of {batches} rows; record one batch.")
        slots = max(index.shape[-1] for step in self._steps for index in step)
        layers = []
        for number, unused in enumerate(self._unused):
            steps = [_widen(step[number], slots, unused) for step in self._steps]
            index = torch.cat(steps, dim=1)
            layers.append(index.masked_fill(index >= unused, -1).to(torch.int32))
        return torch.stack([layer.to(layers[0].device) for layer in layers], dim=2)


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[RecordedRouting]:
    """Record the experts that the tokens of a batch choose, in one forward or in the steps of `generate`.

    Args:
        model (`PreTrainedModel`):
            An extended model with one stack of layers. Routers in attention are not recorded.

    Raises:
        ValueError: where no layer has a router of this package, layers belong to several stacks, or a router's choices
            cannot be replayed.

    Example:
        ```python
        >>> with record_routing(model) as recorded:
        ...     text = model.generate(ids, max_new_tokens=20)
        >>> routed = recorded.routed_experts()  # of all tokens but the last, which no forward saw
        ```
    """
    routers = _replayable(model)
    found = RecordedRouting(
        [router.moe_site.key for router in routers], [router.moe_site.num_choices for router in routers]
    )
    link: RoutingLink = routers[0].moe_link
    link.observers.append(found._add)
    try:
        yield found
    finally:
        link.observers.remove(found._add)


@contextlib.contextmanager
def replay_routing(model: nn.Module, routed_experts: torch.Tensor) -> Iterator[None]:
    """Let the forwards inside use recorded experts. Weights are those of the running pass, with gradients.

    Args:
        model (`PreTrainedModel`):
            An extended model.
        routed_experts (`torch.Tensor`):
            (B, S, L, K) integers, as `RecordedRouting.routed_experts` gives them and inference engines export them;
            -1 for an unused slot. A token whose slots are all -1 in a layer chooses there by itself: padding, or a
            token that was not recorded. A batch of S - 1 recorded tokens, from `generate`, may be given for S tokens:
            the last one then chooses by itself.

    Raises:
        ValueError: for a shape or an expert that the model does not have; where no layer has a router of this package,
            layers belong to several stacks, or a router's choices cannot be replayed. In the forward: for a batch of
            another size, and inside `route_rows`.
    """
    routers = _replayable(model)
    if routed_experts.dim() != 4 or routed_experts.is_floating_point() or routed_experts.shape[2] != len(routers):
        raise ValueError(
            f"`routed_experts` must be integers of shape (B, S, {len(routers)}, K), one for each routed layer, got "
            f"{tuple(routed_experts.shape)} of {routed_experts.dtype}."
        )
    replayed: dict[str, torch.Tensor] = {}
    for number, router in enumerate(routers):
        index, site = routed_experts[:, :, number].long(), router.moe_site
        if index.numel() and (int(index.max()) >= site.num_choices or int(index.min()) < -1):
            raise ValueError(
                f'`routed_experts` has {int(index.min())} to {int(index.max())} in layer "{site.key}", whose experts '
                f"are 0 to {site.num_choices - 1}; -1 stands for an unused slot."
            )
        missing = index < 0
        unknown = missing.all(dim=-1, keepdim=True)
        replayed[site.key] = torch.where(missing & ~unknown, site.num_choices, index)
    link: RoutingLink = routers[0].moe_link
    previous, link.replayed = link.replayed, replayed
    try:
        yield
    finally:
        link.replayed = previous


def _replayable(model: nn.Module) -> list[MoERouter]:
    routers = [router for router in iter_routers(model) if not router.moe_site.group]
    if not routers:
        raise ValueError("no layer of this model has a router of this package; call `extend(model, ...)` first.")
    stacks = sorted({router.moe_site.key.rpartition(".")[0] for router in routers})
    if len(stacks) > 1:
        raise ValueError(f"the routed layers belong to the stacks {stacks}, which see different tokens; one can do.")
    refused = sorted({router.moe_config.type for router in routers if not router.replays})
    if refused:
        raise ValueError(f"the choices of {refused} cannot be replayed: their weights do not follow from them alone.")
    unknown = [r.moe_site.key for r in routers if getattr(r.moe_config, "score", None) is None and _is_custom(r)]
    if unknown:
        raise ValueError(f"the stock gates of the layers {unknown} have a rule of their own; declare a `score`.")
    return routers


def _is_custom(router: MoERouter) -> bool:
    return router.moe_site.rule.score == "custom"


def _widen(index: torch.Tensor, slots: int, unused: int) -> torch.Tensor:
    return nn.functional.pad(index, (0, slots - index.shape[-1]), value=unused)
