"""Heads of attention in groups, each multiplied by a gate in front of the output projection.

That is how the outputs of several attentions are mixed, and how parts of one attention are switched off: the output
projection is linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .moe_context import RouteRecord, RoutingLink
from .moe_families import get_by_path
from .moe_install import install
from .moe_router import MoERouter, RouterSite


@dataclass(frozen=True)
class HeadLayout:
    """How the heads of N experts stand side by side.

    Attributes:
        num_experts: N.
        heads: query heads of one expert.
        key_heads: heads of keys and values of one expert.
        shared: whether all experts have the same keys and values.
    """

    num_experts: int
    heads: int
    key_heads: int
    shared: bool

    @property
    def group(self) -> int:
        """Query heads of one expert for each head of keys."""
        return self.heads // self.key_heads

    def merge_queries(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Rows by query heads, (heads * d, ...) of each expert, to those of all: in the order [expert, head], or
        [key head, expert, query in group] where keys are shared, so that grouped attention gives each query its keys.
        """
        if not self.shared:
            return torch.cat(parts)
        rows = torch.stack([part.unflatten(0, (self.key_heads, -1)) for part in parts], dim=1)
        return rows.flatten(0, 2)

    def weigh(self, heads: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Multiply the heads' outputs (..., N * heads * d) by the gates (..., N) of their experts."""
        gates = gates.to(heads.dtype)
        if not self.shared:
            return (heads.unflatten(-1, (self.num_experts, -1)) * gates[..., None]).flatten(-2)
        rows = heads.unflatten(-1, (self.key_heads, self.num_experts, -1))
        return (rows * gates[..., None, :, None]).flatten(-3)


class RoutedHeads(nn.Module):
    """Base of what is installed in front of a stock attention whose heads have gates."""

    moe_gate: MoERouter
    moe_link: RoutingLink
    moe_order: int
    moe_output: str

    def route_heads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RouteRecord:
        """Ask the router for the gates of the tokens, and leave them for the output projection."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        context = self.moe_link.slots.layer_context
        if context is None:
            raise ValueError("attention experts run only inside a forward of their model.")
        site = self.moe_gate.moe_site
        record = self.moe_gate.decide(hidden.reshape(-1, hidden.shape[-1]))
        gates = record.weights.new_zeros(len(record.index), site.num_experts + 1)
        gates = gates.scatter_add(1, record.index.clamp(max=site.num_experts), record.weights)[:, :-1]
        context.at(site).carry[self.moe_order, "gates"] = gates.view(*hidden.shape[:-1], -1)
        output = get_by_path(self, self.moe_output)
        if not isinstance(output, HeadWeighing):
            install(output, HeadWrapper, **{name: getattr(output.base_layer, name) for name in HeadWeighing.shared})
        return record


class HeadWeighing(nn.Module):
    """What applies the gates in front of an output projection: once, in the outermost module of it."""

    shared: ClassVar[tuple[str, ...]] = ("moe_link", "moe_order", "moe_site", "moe_layout", "moe_width")

    moe_link: RoutingLink
    moe_order: int
    moe_site: RouterSite
    moe_layout: HeadLayout
    moe_width: int

    def weigh(self, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads times the gates, and the gates."""
        context = self.moe_link.slots.layer_context
        assert context is not None
        carry = context.at(self.moe_site).carry
        if (self.moe_order, "weighed") in carry:
            return heads, carry.pop((self.moe_order, "weighed"))
        if heads.shape[-1] != self.moe_width:
            raise ValueError(
                f"the heads of all attention experts together are {self.moe_width} wide, and {heads.shape[-1]} "
                "arrived. Tensor parallelism would divide them without regard to experts; load the model without "
                "`tp_plan`."
            )
        gates = carry.pop((self.moe_order, "gates"))
        return self.moe_layout.weigh(heads, gates), gates


class HeadWrapper(HeadWeighing):
    """Installed in front of what stands around an output projection, such as LoRA, which has to see the weighed heads
    as the projection does."""

    def forward(self, heads: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        heads, gates = self.weigh(heads)
        context = self.moe_link.slots.layer_context
        assert context is not None
        context.at(self.moe_site).carry[self.moe_order, "weighed"] = gates
        out: torch.Tensor = super().forward(heads, *args, **kwargs)
        return out


class HeadOutput(HeadWeighing):
    """Installed in front of the output projection of a stock attention: applies the gates.

    Where the projection has a bias, each expert has its own, `moe_bias` (N, H), mixed by the gates as well.
    """

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        heads, gates = self.weigh(heads)
        out = super().forward(heads)
        if "moe_bias" in self._parameters:
            out = out + gates.to(out.dtype) @ self.moe_bias
        return out
