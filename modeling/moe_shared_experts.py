"""Shared experts: a feed-forward block beside the routed ones that every token passes. DeepSeekMoE (2401.06066)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .configuration_parts import SharedExpertsConfig
from .moe_context import RoutingLink
from .moe_experts import MoeExtBlock
from .moe_families import get_by_path
from .moe_install import add_child, install
from .moe_parts import LayerPart, PartModule, register_part
from .moe_structure import LayerPlan, config_value


# Where experts that are no stacks of `use_experts_implementation` keep their activation, or their block does.
_ACTIVATIONS = ("act_fn", "activation_fn", "activation", "act")


class SharedExperts(PartModule):
    """One feed-forward block as wide as all shared experts together: (..., H) -> (..., H).

    Parameters: `gate_up_proj` (2I, H), in the layout of the family's experts, or `up_proj` (I, H) where these have no
    gate, and `down_proj` (H, I). Where it is mixed with the routed experts, also `mix` (2, H) and its bias.

    Args:
        hidden_size (`int`): H.
        intermediate_size (`int`): I.
        has_gate, has_bias (`bool`): its form.
        activation (`nn.Module`, *optional*): where the experts do not tell their gating.
        dropout (`nn.Module`, *optional*): of the block, applied to the output.
        mixed (`bool`): whether the token decides how much it counts beside the routed experts.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        has_gate: bool,
        has_bias: bool = False,
        activation: nn.Module | None = None,
        dropout: nn.Module | None = None,
        mixed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rows = 2 * intermediate_size if has_gate else intermediate_size
        place = {"bias": has_bias, "device": device, "dtype": dtype}
        self.up_name = "gate_up_proj" if has_gate else "up_proj"
        self.add_module(self.up_name, nn.Linear(hidden_size, rows, **place))
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **place)
        self.mix = nn.Linear(hidden_size, 2, device=device, dtype=dtype) if mixed else None
        self.activation, self.dropout = activation, dropout

    def init_weights(self, std: float) -> None:
        """A down projection of zeros: the block adds nothing at first. A mixture is even."""
        up = getattr(self, self.up_name)
        init.normal_(up.weight, mean=0.0, std=std)
        mixture = () if self.mix is None else (self.mix.weight, self.mix.bias)
        for tensor in (up.bias, self.down_proj.weight, self.down_proj.bias, *mixture):
            if tensor is not None:
                init.zeros_(tensor)

    def forward(self, hidden: torch.Tensor, experts: nn.Module) -> torch.Tensor:
        """`experts` are the routed ones, whose gating and activation it shares."""
        inner = getattr(self, self.up_name)(hidden.to(self.down_proj.weight.dtype))
        if self.activation is None:
            inner = experts._apply_gate(inner) if self.up_name == "gate_up_proj" else experts.act_fn(inner)
        else:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        out = self.down_proj(inner)
        return out if self.dropout is None else self.dropout(out)

    def combine(self, routed: torch.Tensor, shared: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Both outputs (..., H) as one, the type of `routed`."""
        shared = shared.reshape(routed.shape)
        if self.mix is None:
            return routed + shared.to(routed.dtype)
        weights = self.mix(hidden.to(self.mix.weight.dtype)).float().softmax(dim=-1).reshape(*routed.shape[:-1], 2)
        return (weights[..., :1] * routed.float() + weights[..., 1:] * shared.float()).to(routed.dtype)


class SharedExpertsBlock(nn.Module):
    """Installed in front of a MoE block: puts what the shared experts compute of its input beside its output."""

    moe_shared: SharedExperts
    moe_experts_path: str

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(hidden_states, *args, **kwargs)
        experts = get_by_path(self, self.moe_experts_path)
        shared = self.moe_shared(hidden_states, getattr(experts, "base_layer", experts))
        if isinstance(output, tuple):
            return (self.moe_shared.combine(output[0], shared, hidden_states), *output[1:])
        return self.moe_shared.combine(output, shared, hidden_states)


@register_part("shared_experts")
class SharedExpertsPart(LayerPart):
    """A block beside the routed experts that every token passes."""

    @classmethod
    def check(cls, config: SharedExpertsConfig, plan: LayerPlan) -> None:
        if plan.moe is not None and plan.moe.block == "":
            raise ValueError(
                f'`shared_experts` are added to the output of a block, and layer "{plan.key}" has none: router and '
                "experts stand on the layer itself."
            )
        if plan.moe is not None and config.init == "dense":
            raise ValueError(
                '`shared_experts` with `init="dense"` start as the dense block of a model that is upcycled; layer '
                f'"{plan.key}" has experts already. Use `init="zero"`.'
            )
        if plan.moe is not None:
            block = get_by_path(plan.layer, plan.moe.block)
            experts = get_by_path(block, plan.moe.experts)
            if not hasattr(experts, "_apply_gate") and _activation(experts, block) is None:
                raise ValueError(f'the activation of the experts of layer "{plan.key}" was not found.')

    @classmethod
    def install(
        cls,
        config: SharedExpertsConfig,
        plan: LayerPlan,
        block: nn.Module,
        gate: nn.Module,
        experts: nn.Module,
        link: RoutingLink,
    ) -> None:
        width, path = config.intermediate_size, "experts"
        if plan.moe is not None:
            path = plan.moe.experts
            width = width or config_value(plan.config, plan.moe.intermediate_size, None)
        first = next(experts.parameters())
        shared = SharedExperts(
            plan.site.hidden_size,
            int(width or experts.intermediate_dim),
            has_gate=getattr(experts, "has_gate", True),
            # Stock experts with biases (gpt_oss) get shared ones without.
            has_bias=plan.dense is not None and experts.has_bias,
            activation=None if hasattr(experts, "_apply_gate") else _activation(experts, block),
            dropout=block.dropout if isinstance(block, MoeExtBlock) else None,
            mixed=config.combine == "mix",
            device=first.device,
            dtype=first.dtype,
        )
        # Not "..._experts": in Transformers 5.24 conversions take "_experts.down_proj" for routed experts.
        add_child(block, "moe_shared", shared)
        install(block, SharedExpertsBlock, moe_experts_path=path)


def _activation(*owners: nn.Module) -> Any:
    """The activation of a block whose experts do not say how they are gated."""
    for owner in owners:
        for module in owner.modules():
            for name in _ACTIVATIONS:
                if callable(getattr(module, name, None)):
                    return getattr(module, name)
    return None
