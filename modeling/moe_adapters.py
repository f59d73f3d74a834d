"""Blocks that do not call `experts(hidden, top_k_index, top_k_weights)`: one adapter each.

An adapter is installed in front of the stock block class where a router of ours stands. Its `forward` asks the router
for a record and runs the stock experts with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .moe_experts import clamp_unused, dispatch
from .moe_families import MoeSpec, get_by_path


_ADAPTERS: dict[str, type[RoutedBlock]] = {}


class RoutedBlock(nn.Module):
    """Base of the adapters. `run` maps tokens (T, H) and a routing (T, K) to (T, H)."""

    moe_spec: MoeSpec

    def run(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The routed sum."""
        raise NotImplementedError

    def limit(self, index: torch.Tensor, weights: torch.Tensor, shape: torch.Size) -> tuple[Any, Any]:
        """Drop slots the stock block would drop. Default: none."""
        return index, weights

    def finish(self, out: torch.Tensor, hidden: torch.Tensor, logits: torch.Tensor) -> Any:
        """What the stock block returns, from the routed sum in the shape of `hidden`."""
        return out

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        record = get_by_path(self, self.moe_spec.router).decide(flat)
        record.index, record.weights = self.limit(record.index, record.weights, hidden_states.shape)
        out = self.run(flat, record.index, record.weights).reshape(hidden_states.shape)
        return self.finish(out, hidden_states, record.logits)


def adapter(name: str) -> Callable[[type[RoutedBlock]], type[RoutedBlock]]:
    """Register an adapter under the name that family records use."""

    def decorate(cls: type[RoutedBlock]) -> type[RoutedBlock]:
        _ADAPTERS[name] = cls
        return cls

    return decorate


def get_adapter(name: str) -> type[RoutedBlock]:
    """The adapter a family record names."""
    return _ADAPTERS[name]


@adapter("dbrx")
class DbrxBlock(RoutedBlock):
    """Experts take the stock arguments but index their flat weights with every id they are given."""

    def run(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        index, weights = clamp_unused(index, weights, self.experts.num_experts)
        return self.experts(hidden, index, weights.to(hidden.dtype)).reshape(hidden.shape)


@adapter("jetmoe")
class JetMoeBlock(RoutedBlock):
    """Two stacks of matrices and one bias on the block."""

    def run(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        up, down = self.input_linear.weight.unbind(0), self.output_linear.weight.unbind(0)

        def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
            gate, value = F.linear(rows, up[number]).chunk(2, dim=-1)
            return F.linear(self.activation(gate) * value, down[number])

        return dispatch(hidden, index, weights, self.input_linear.num_experts, expert) + self.bias


@adapter("llama4")
class Llama4Block(RoutedBlock):
    """The weight multiplies the expert's input; a shared expert is added; the logits are returned too."""

    def run(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        up, down = self.experts.gate_up_proj.unbind(0), self.experts.down_proj.unbind(0)

        def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
            gate, value = (rows @ up[number]).chunk(2, dim=-1)
            return (value * self.experts.act_fn(gate)) @ down[number]

        return dispatch(hidden, index, weights, self.experts.num_experts, expert, weigh_input=True)

    def finish(self, out: torch.Tensor, hidden: torch.Tensor, logits: torch.Tensor) -> Any:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return self.shared_expert(flat) + out.reshape(flat.shape), logits


@adapter("switch")
class SwitchBlock(RoutedBlock):
    """Experts in a `ModuleDict`; each takes at most `expert_capacity` tokens of a sequence, the first ones."""

    def limit(self, index: torch.Tensor, weights: torch.Tensor, shape: torch.Size) -> tuple[Any, Any]:
        num_experts = self.experts.num_experts
        rows = index.reshape(shape[0], -1)  # (B, S*K), in the order of the sequence
        chosen = F.one_hot(rows.clamp(max=num_experts), num_experts + 1)
        place = chosen.cumsum(dim=1).gather(-1, rows.clamp(max=num_experts).unsqueeze(-1)).reshape(index.shape)
        dropped = (place > self.router.expert_capacity) & (index < num_experts)
        return index.masked_fill(dropped, num_experts), weights.masked_fill(dropped, 0)

    def run(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
            return self.experts[f"expert_{number}"](rows)

        return dispatch(hidden, index, weights, self.experts.num_experts, expert)
