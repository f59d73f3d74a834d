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
from transformers.integrations.moe import use_experts_implementation

from .moe_expert_linear import expert_linear
from .moe_experts import clamp_unused, dispatch, moe_ext_experts_forward, skips_unused_slots
from .moe_families import MoeSpec, get_by_path
from .moe_install import add_child, install


_ADAPTERS: dict[str, type[RoutedBlock]] = {}


class RoutedBlock(nn.Module):
    """Base of the adapters. `run` maps tokens (T, H) and a routing (T, K) to (T, H)."""

    moe_spec: MoeSpec

    def setup(self, config: Any) -> None:
        """Create what the adapter needs on the block, by `add_child`. `config` is the model's. Default: nothing."""

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


class _Owner:
    """Leads from a module to the block around it, without being its child."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block


class JetMoeStack(nn.Module):
    """Installed in front of a stack of matrices of JetMoE, one for each expert.

    It is always called, and its weight never read from outside, so that what may be wrapped around it (adapters) takes
    part.
    """

    def forward(self, rows: torch.Tensor | None, index: torch.Tensor | None = None) -> torch.Tensor:
        """Each row times the matrix of its expert, (N, I), (N,) -> (N, O); without `index`, all matrices (E, O, I)."""
        weight: torch.Tensor = self.weight
        return weight if rows is None or index is None else expert_linear(rows, index, weight)


def _install_stacks(block: nn.Module) -> None:
    for stack in (block.input_linear, block.output_linear):
        install(stack, JetMoeStack)


@use_experts_implementation
class JetMoeExperts(nn.Module):
    """The two stacks of a JetMoE block under the names that experts functions know, without parameters of its own, so
    that every experts implementation runs them."""

    def __init__(self, config: Any, block: nn.Module) -> None:
        super().__init__()
        self.config, self.owner = config, _Owner(block)
        self.act_fn = block.activation

    @property
    def gate_up_proj(self) -> torch.Tensor:
        """(E, 2I, H), the gate's rows first."""
        return self.owner.block.input_linear(None)

    @property
    def down_proj(self) -> torch.Tensor:
        """(E, H, I)."""
        return self.owner.block.output_linear(None)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.owner.block.input_linear.num_experts

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, value = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * value

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return moe_ext_experts_forward(self, hidden, index, weights)


@adapter("jetmoe")
class JetMoeBlock(RoutedBlock):
    """Two stacks of matrices and one bias on the block."""

    def setup(self, config: Any) -> None:
        _install_stacks(self)
        add_child(self, "moe_experts", JetMoeExperts(config, self))

    def run(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if not skips_unused_slots(self.moe_experts):
            index, weights = clamp_unused(index, weights, self.moe_experts.num_experts)
        return self.moe_experts(hidden, index, weights) + self.bias


@adapter("jetmoe_attention")
class JetMoeAttentionExperts(RoutedBlock):
    """Attention experts of JetMoE: `map` makes the queries of each slot, `reduce` the weighted sum of the outputs.

    In place of the stock loop over sorted experts, which needs the counts on the host.
    """

    def setup(self, config: Any) -> None:
        _install_stacks(self)

    def map(self, layer_input: torch.Tensor) -> tuple[Any, ...]:
        """(B, S, H) -> (B, S, K, A), the logits, and what `reduce` wants."""
        rows = layer_input.flatten(0, 1)
        record = get_by_path(self, self.moe_spec.router).decide(rows)
        repeated = rows.repeat_interleave(record.index.shape[1], dim=0)
        queries = self.input_linear(repeated, record.index.flatten())
        return queries.view(*layer_input.shape[:2], record.index.shape[1], -1), record.logits, record

    def reduce(self, layer_input: torch.Tensor, record: Any) -> torch.Tensor:
        """(B, S, K, A) -> (B, S, H)."""
        rows = layer_input.flatten(0, 2)
        out = self.output_linear(rows, record.index.flatten())
        out = out.unflatten(0, record.index.shape)
        out = (out * record.weights[..., None].to(torch.promote_types(out.dtype, record.weights.dtype))).sum(1)
        return out.to(layer_input.dtype).view(*layer_input.shape[:2], -1) + self.bias


class JetMoeRoutedAttention(nn.Module):
    """Installed in front of the attention of JetMoE: as many slots as the router has."""

    moe_slots: int

    @property
    def top_k(self) -> int:
        """Slots of a token; keys and values are repeated so often. Policies of rows may change them."""
        gate = self.experts.router
        context = gate.moe_link.slots.layer_context
        record = None if context is None else context.at(gate.moe_site).records.get(gate.moe_site.key)
        return self.moe_slots if record is None else record.index.shape[1]


class Llama4Experts(nn.Module):
    """Installed in front of the experts of Llama 4, which take the inputs of all experts side by side.

    They are always called, and their matrices never read from outside, so that adapters around them take part.
    """

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Tokens (T, H) and a routing (T, K) -> (T, H); the weight multiplies the expert's input."""
        up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)

        def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
            gate, value = (rows @ up[number]).chunk(2, dim=-1)
            return (value * self.act_fn(gate)) @ down[number]

        return dispatch(hidden, index, weights, self.num_experts, expert, weigh_input=True)


@adapter("llama4")
class Llama4Block(RoutedBlock):
    """The weight multiplies the expert's input; a shared expert is added; the logits are returned too."""

    def setup(self, config: Any) -> None:
        install(self.experts, Llama4Experts)

    def run(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.experts(hidden, index, weights)
        return out

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
