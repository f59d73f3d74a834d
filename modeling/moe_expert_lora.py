"""One low-rank adapter on each routed expert, beside its frozen weights: `W_e x + s_e B_e A_e x` for both products.

It computes what PEFT's `target_parameters` does, without a tensor of the size of the experts, and has what PEFT
refuses there: dropout, and a rank for each expert. The package's kernels run it where they can; the loop of this file,
in plain PyTorch, runs it everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .configuration_parts import ExpertLoraConfig
from .moe_context import RoutingLink
from .moe_experts import DEFAULT_IMPLEMENTATION, RoutedExperts, _linear, dispatch
from .moe_families import get_by_path
from .moe_install import add_child, install
from .moe_lora import STACK, AdapterModule
from .moe_parts import LayerPart, register_part
from .moe_structure import LayerPlan


class ExpertLora(AdapterModule):
    """The adapters of the routed experts of one layer.

    Parameters: `up_A` (E, r, H), `up_B` (E, 2I, r) with rows in the order of the experts' own, `down_A` (E, r, I),
    `down_B` (E, H, r); r is the largest rank, and smaller ones are filled up with zeros, whose gradients are zero.

    Args:
        config (`ExpertLoraConfig`): the declaration.
        sizes (`dict`): (out, in) of the projections that have adapters, by `"up"` and `"down"`.
        num_experts (`int`): E.
        device, dtype: of the parameters.
    """

    def __init__(
        self, config: ExpertLoraConfig, sizes: dict[str, tuple[int, int]], num_experts: int, **place: Any
    ) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.ranks, self.scales = config.ranks(num_experts), config.scales(num_experts)
        rank = max(self.ranks)
        for name, (rows, columns) in sizes.items():
            self.register_parameter(f"{name}_A", nn.Parameter(torch.empty(num_experts, rank, columns, **place)))
            self.register_parameter(f"{name}_B", nn.Parameter(torch.empty(num_experts, rows, rank, **place)))

    def init_weights(self, std: float) -> None:
        """As in PEFT: A uniform within `1 / sqrt(in)`, B zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("_B"):
                init.zeros_(parameter)
            elif not getattr(parameter, "_is_hf_initialized", False):
                bound = parameter.shape[-1] ** -0.5
                ranks = torch.tensor(self.ranks, device=parameter.device)
                used = torch.arange(parameter.shape[1], device=parameter.device) < ranks[:, None]
                init.copy_(parameter, torch.empty_like(parameter).uniform_(-bound, bound) * used[..., None])

    def pair(self, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (E, r, in) and B (E, out, r) of `"up"` or `"down"`; `None` where it has none. B carries the factors where
        they differ."""
        if f"{name}_A" not in self._parameters:
            return None
        a, b = getattr(self, f"{name}_A").to(dtype), getattr(self, f"{name}_B").to(dtype)
        if self.scale is None:
            b = b * torch.tensor(self.scales, device=b.device, dtype=dtype)[:, None, None]
        return a, b

    @property
    def scale(self) -> float | None:
        """The factor on `B A`, `None` where it differs between the experts."""
        return self.scales[0] if len(set(self.scales)) == 1 else None

    @property
    def drops(self) -> bool:
        """Whether there is dropout in the running mode."""
        return self.training and self.config.lora_dropout > 0

    def delta(self, name: str) -> torch.Tensor:
        """`s B A` of all experts in float32, (E, out, in)."""
        found = self.pair(name, torch.float32)
        assert found is not None
        a, b = found
        return (self.scale or 1.0) * (b @ a)


def lora_experts_forward(
    experts: Any, lora: ExpertLora, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The experts with their adapters, in plain PyTorch: (T, H), (T, K), (T, K) -> (T, H).

    Args:
        experts: a module made with `use_experts_implementation`.
        lora: its adapters.
        hidden, index, weights: as for experts functions; ids from E on are nobody.
    """
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    up_bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    pairs = {which: lora.pair(which, up.dtype) for which in ("up", "down")}
    # One unbind instead of E indexings: the backward of each indexing would fill a gradient of the whole stack.
    rows_of = {which: None if pair is None else [t.unbind(0) for t in pair] for which, pair in pairs.items()}
    up_rows, down_rows, scale = up.unbind(0), experts.down_proj.unbind(0), lora.scale or 1.0

    def add(out: torch.Tensor, x: torch.Tensor, which: str, number: int) -> torch.Tensor:
        factors = rows_of[which]
        if factors is None:
            return out
        a, b = (stack[number] for stack in factors)
        x = F.dropout(x.to(a.dtype), lora.config.lora_dropout, lora.training)
        return out + scale * F.linear(F.linear(x, a), b)

    def expert(number: int, x: torch.Tensor) -> torch.Tensor:
        bias = None if up_bias is None else up_bias[number]
        rows = add(_linear(x, up_rows[number], bias, experts.is_transposed), x, "up", number)
        rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
        bias = experts.down_proj_bias[number] if experts.has_bias else None
        out = add(_linear(rows, down_rows[number], bias, experts.is_transposed), rows, "down", number)
        return experts.post_expert_norm(out) if getattr(experts, "has_post_expert_norm", False) else out

    out = dispatch(hidden, index, weights, experts.num_experts, expert)
    if torch.is_grad_enabled() and bool((index >= experts.num_experts).all()):  # zero gradients, not none
        out = out + (sum(parameter.sum() for parameter in lora.parameters()) * 0).to(out.dtype)
    return out


class LoraRoutedExperts(nn.Module):
    """Installed in front of routed experts (`RoutedExperts`): runs them with their adapters."""

    moe_lora: ExpertLora
    moe_link: RoutingLink
    moe_exchange: Any

    def run_local(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *args: Any) -> torch.Tensor:
        """The experts with their adapters, whatever the experts implementation: no stock one knows adapters."""
        if not self.moe_link.adapters_enabled:
            return super().run_local(hidden, index, weights, *args)
        if self.moe_exchange is not None or getattr(self, "_is_expert_parallel", False):
            raise ValueError("adapters on routed experts do not run under expert parallelism yet.")
        lora = self.moe_lora
        # The package's kernels stand beside its experts function; where it is not installed, there are none.
        kernels: Callable[..., torch.Tensor | None] | None = getattr(
            ALL_EXPERTS_FUNCTIONS.get(DEFAULT_IMPLEMENTATION, None), "run_lora", None
        )
        if kernels is not None and not lora.drops:
            dtype = self.down_proj.dtype
            out = kernels(
                self, hidden, index, weights, lora.pair("up", dtype), lora.pair("down", dtype), lora.scale or 1.0
            )
            if out is not None:
                return out
        return lora_experts_forward(self, lora, hidden, index, weights)


@register_part("expert_lora")
class ExpertLoraPart(LayerPart):
    """One low-rank adapter on each routed expert."""

    @classmethod
    def check(cls, config: ExpertLoraConfig, plan: LayerPlan) -> None:
        count = plan.site.num_experts
        if isinstance(config.r, list) and len(config.r) != count:
            raise ValueError(
                f'`expert_lora`: `r` has {len(config.r)} ranks, and layer "{plan.key}" has {count} experts.'
            )
        if plan.moe is None:
            return
        experts = get_by_path(get_by_path(plan.layer, plan.moe.block), plan.moe.experts)
        if plan.moe.adapter is not None or not hasattr(experts, "has_gate") or not hasattr(experts, "down_proj"):
            raise ValueError(
                f'`expert_lora` needs experts in stacked tensors that one call computes; those of layer "{plan.key}" '
                f"({type(experts).__name__}) are not."
            )

    @classmethod
    def install(
        cls,
        config: ExpertLoraConfig,
        plan: LayerPlan,
        block: nn.Module,
        gate: nn.Module,
        experts: nn.Module,
        link: RoutingLink,
    ) -> None:
        assert isinstance(experts, RoutedExperts)
        targets = config.target_parameters or ["up", "down"]
        place = {"device": experts.down_proj.device, "dtype": experts.down_proj.dtype}
        sizes = {name: sizes for name, sizes in expert_sizes(experts).items() if name in targets}
        add_child(experts, STACK, ExpertLora(config, sizes, plan.site.num_experts, **place))
        install(experts, LoraRoutedExperts)


def expert_sizes(experts: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of the two projections of experts in stacked tensors."""
    tensors = {"up": experts.gate_up_proj if experts.has_gate else experts.up_proj, "down": experts.down_proj}
    return {
        name: (t.shape[2], t.shape[1]) if experts.is_transposed else (t.shape[1], t.shape[2])
        for name, t in tensors.items()
    }
