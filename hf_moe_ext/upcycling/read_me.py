"""Read-ME: experts are the slices of a dense block that matter most on one domain each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from ..modeling.configuration_moe_ext import RouterConfig
from ..modeling.router_read_me import PreRouter, ReadMeRouterConfig
from .methods import ExpertStack, FeedForward, UpcyclingMethod, register_upcycling_method


# Grouped matrix products take rows of whole 16 bytes, so routed experts get widths of a multiple of 8.
_ALIGNED = 8


@register_upcycling_method("read_me")
@dataclass
class ReadMeUpcycling(UpcyclingMethod):
    """One expert for each domain of the calibration data: the neurons with the largest mean magnitude there.

    "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design" (2410.19123).
    Expert i has the neurons of domain i in every layer, so one choice is a path through the whole model, and the
    router is `read_me` unless another is given. A token uses one expert with weight one. The result is smaller for a
    token than the dense model, and needs tuning; with experts as wide as the dense block it is the dense model.

    Args:
        layout (`"fused"` or `"shared"`, *optional*, defaults to `"fused"`):
            What becomes of neurons that all experts of a layer have: each expert gets a copy of its own; or they
            become a shared expert, and the routed ones are narrower, by another number in each layer. Both compute
            the same at first.
        slice_width (`int`, *optional*):
            Neurons of one expert, those that it shares included. `None` is half of the dense block.
    """

    layout: Literal["fused", "shared"] = "fused"
    slice_width: int | None = None
    sizes_from_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slice_width is not None and self.slice_width < 1:
            raise ValueError(f"`slice_width` must be at least 1, got {self.slice_width}.")

    @classmethod
    def counts(cls, num_experts: int | None, num_experts_per_tok: int | None, calibration: Any) -> tuple[int, int]:
        """As many experts as domains, one for a token."""
        domains = len(calibration) if _has_domains(calibration) else 1
        chosen = 1 if num_experts_per_tok is None else num_experts_per_tok
        return domains if num_experts is None else num_experts, chosen

    @property
    def default_router(self) -> RouterConfig:
        return ReadMeRouterConfig()

    def fit_router(self, router: RouterConfig, num_experts_per_tok: int, dense_widths: list[int]) -> RouterConfig:
        if not isinstance(router, ReadMeRouterConfig):
            return router
        slots = router.num_experts_per_tok or num_experts_per_tok
        if slots > 1 and self.layout == "fused" and router.weights != "renormalized":
            raise ValueError(
                f'with `layout="fused"`, {slots} experts per token and `weights="{router.weights}"`, neurons that all '
                'experts have would count several times. Use `layout="shared"`, or a `ReadMeRouterConfig` with '
                '`weights="renormalized"`.'
            )
        return replace(router, dense_width=max(dense_widths))

    def expert_width(self, intermediate_size: int, num_copies: int = 1) -> int:
        width = max(1, intermediate_size // 2) if self.slice_width is None else self.slice_width
        if width > intermediate_size:
            raise ValueError(f"`slice_width` ({width}) exceeds the width of the dense block, {intermediate_size}.")
        return width

    def collectors(self, num_experts: int) -> dict[str, Any]:
        from ..calibration import NeuronMagnitude  # which needs this package

        return {"magnitude": NeuronMagnitude()}

    def check_calibration(self, data: Any, num_experts: int) -> None:
        if not _has_domains(data) or len(data) != num_experts:
            found = f"{len(data)} domains" if _has_domains(data) else "no domains"
            raise ValueError(
                f"`calibration` must be a dict with the texts of one domain for each of the {num_experts} experts, "
                f"got {found}."
            )

    def statistics(self, collected: dict[str, Any], key: str) -> dict[str, torch.Tensor]:
        means = collected["magnitude"].means
        return {"magnitude": torch.stack([means[domain][key] for domain in means])}

    @property
    def makes_shared(self) -> bool:
        return self.layout == "shared"

    def widths(self, intermediate_size: int, num_copies: int, statistics: dict[str, torch.Tensor]) -> tuple[int, int]:
        width = self.expert_width(intermediate_size)
        if self.layout == "fused":
            return width, 0
        common, own = permanent_neurons(strongest_neurons(statistics["magnitude"], width), _ALIGNED)
        return own.shape[1], max(len(common), 1)

    def convert(self, dense: FeedForward, num_copies: int, seed: int) -> ExpertStack:
        width = self.expert_width(dense.intermediate_size)
        chosen = strongest_neurons(dense.statistics["magnitude"], width).to(dense.down.device)
        if self.layout == "fused":
            return _slices(dense, chosen)
        common, own = permanent_neurons(chosen, _ALIGNED)
        stack = _slices(dense, own)
        stack.shared = _slice(dense, common)
        if stack.down_bias is not None:  # the shared expert carries it, once
            stack.down_bias = torch.zeros_like(stack.down_bias)
        return stack

    def finish(self, model: Any, statistics: dict[str, dict[str, torch.Tensor]]) -> None:
        """Let the pre-router remember which neurons its experts have."""
        for module in model.modules():
            if isinstance(module, PreRouter):
                for place, key in enumerate(module.keys):
                    magnitude = statistics[key]["magnitude"]
                    chosen = strongest_neurons(magnitude, self.expert_width(magnitude.shape[1]))
                    module.neurons[place].scatter_(1, chosen.to(module.neurons.device), True)


def strongest_neurons(magnitude: torch.Tensor, width: int) -> torch.Tensor:
    """(N, width) int64, ascending: the neurons of each expert, those with the largest magnitude on its domain.

    Exactly `width` of them; of equal ones, the first. `magnitude` is (N, D).
    """
    order = magnitude.argsort(dim=1, descending=True, stable=True)
    return order[:, :width].sort(dim=1).values


def permanent_neurons(chosen: torch.Tensor, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The neurons that all experts have (R,), and the others of each expert (N, width - R).

    Args:
        chosen: (N, width).
        multiple: some of the first are counted among the others, so that these are a multiple of it, if there are
            enough; and one if there are no others, since a routed expert has at least one.
    """
    count, width = chosen.shape
    times = torch.bincount(chosen.flatten())
    common = (times == count).nonzero().flatten()
    own = max(width - len(common), 1)
    rounded = -(-own // multiple) * multiple
    common = common[: width - (rounded if rounded <= width else own)]
    keep = ~torch.isin(chosen, common)
    return common, chosen[keep].view(count, -1)


def _slices(dense: FeedForward, chosen: torch.Tensor) -> ExpertStack:
    """Experts with these neurons (N, d) of a dense block."""
    up = dense.up[:, chosen].transpose(0, 1).contiguous()  # (N, P, d, H)
    down = dense.down[:, chosen].transpose(0, 1).contiguous()  # (N, H, d)
    if dense.up_bias is None or dense.down_bias is None:
        return ExpertStack(up, down)
    up_bias = dense.up_bias[:, chosen].transpose(0, 1).contiguous()
    return ExpertStack(up, down, up_bias, dense.down_bias.expand(len(chosen), -1).clone())


def _slice(dense: FeedForward, chosen: torch.Tensor) -> FeedForward:
    """A block with these neurons (d,) of a dense block; one of zeros where there are none, since no width is 0."""
    if len(chosen):
        up_bias = None if dense.up_bias is None else dense.up_bias[:, chosen]
        return replace(dense, up=dense.up[:, chosen], down=dense.down[:, chosen], up_bias=up_bias)
    parts, _, hidden = dense.up.shape
    up, down = dense.up.new_zeros(parts, 1, hidden), dense.down.new_zeros(hidden, 1)
    return replace(
        dense, up=up, down=down, up_bias=None if dense.up_bias is None else dense.up_bias.new_zeros(parts, 1)
    )


def _has_domains(data: Any) -> bool:
    return isinstance(data, Mapping) and "input_ids" not in data
