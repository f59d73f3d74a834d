"""Experts: the module that stands in a dense model's place, the block around it, and the guard for unused slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation


if TYPE_CHECKING:
    from .moe_context import RoutingLink

DEFAULT_IMPLEMENTATION = "moe_ext"


def moe_ext_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The default experts function, in plain PyTorch: (T, H), (T, K), (T, K) -> (T, H).

    The package puts its kernels in front of it, under the same name.

    Slots are sorted by expert once, so each expert multiplies one contiguous batch; unused slots (index `E`) cost
    nothing. Off the CPU and while compiling, the work goes to the stock `grouped_mm`, which needs no host sync.
    """
    if hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
        index, weights = clamp_unused(top_k_index, top_k_weights, self.num_experts)
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, index, weights)

    up = self.gate_up_proj if self.has_gate else self.up_proj
    up_bias = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias) if self.has_bias else None
    # One unbind instead of E indexings: the backward of each indexing would fill a gradient of the whole stack.
    up_rows, down_rows = up.unbind(0), self.down_proj.unbind(0)

    def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
        rows = _linear(rows, up_rows[number], None if up_bias is None else up_bias[number], self.is_transposed)
        rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
        bias = self.down_proj_bias[number] if self.has_bias else None
        rows = _linear(rows, down_rows[number], bias, self.is_transposed)
        return self.post_expert_norm(rows) if getattr(self, "has_post_expert_norm", False) else rows

    return dispatch(hidden_states, top_k_index, top_k_weights, self.num_experts, expert)


def dispatch(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    num_experts: int,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
    *,
    weigh_input: bool = False,
) -> torch.Tensor:
    """`sum_k weights[t, k] * expert(index[t, k], hidden[t])`, each expert called once with all of its tokens.

    Args:
        hidden_states: (T, H).
        top_k_index: (T, K); ids of `num_experts` and above are skipped.
        top_k_weights: (T, K).
        num_experts: E.
        expert: `(number, (n, H)) -> (n, H)`.
        weigh_input: multiply the expert's input by the weight, not its output.
    """
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat.clamp(max=num_experts), minlength=num_experts + 1).tolist()[:-1]
    order = order[: sum(counts)]
    if order.numel() == 0:
        return hidden_states.nan_to_num(0.0, 0.0, 0.0) * 0  # in the graph, and zero for any token
    tokens = order // top_k_index.shape[-1]
    rows, weights = hidden_states[tokens], top_k_weights.reshape(-1)[order, None]
    if weigh_input:
        rows = rows * weights.to(rows.dtype)
    parts = [expert(number, part) for number, part in enumerate(rows.split(counts)) if part.shape[0]]
    result = torch.cat(parts)
    if not weigh_input:
        result = result * weights
    # Accumulating in the weights' precision (float32 for most gates) keeps bf16 sums exact to the last rounding.
    out = torch.zeros(hidden_states.shape, dtype=result.dtype, device=result.device)
    return out.index_add(0, tokens, result).to(hidden_states.dtype)


moe_ext_experts_forward.handles_unused_slots = True  # type: ignore[attr-defined]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    x = x.to(weight.dtype)
    if not transposed:
        return F.linear(x, weight, bias)
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def clamp_unused(
    top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make unused slots (ids `num_experts` and above) safe for stock experts functions: a valid id with weight 0.

    Exact in value and gradient: the weight is replaced, so nothing flows back through it.
    """
    unused = top_k_index >= num_experts
    return top_k_index.clamp(max=num_experts - 1), top_k_weights.masked_fill(unused, 0)


def skips_unused_slots(experts: Any) -> bool:
    """Whether the experts function that the config names says `handles_unused_slots`."""
    name = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    function = ALL_EXPERTS_FUNCTIONS.get(name, None) if name not in (None, "eager") else None
    return getattr(function, "handles_unused_slots", False)


class RoutedExperts(nn.Module):
    """Installed in front of a stock experts class, like a router in front of its gate.

    It is the one place where unused slots are made safe: functions that say `handles_unused_slots` get them as they
    are, all others get a valid id with weight 0.

    Where the router mixes tokens (`MoERouter.mixes_tokens`), it is also the place where experts get mixtures: each
    sequence becomes its slots, equally many for each expert, and the outputs of the slots become tokens again.

    Under expert parallelism the module holds some of the experts only. `moe_exchange` then takes the place of
    `run_local`: it gets ids of the whole layer, and calls `run_local` with those of the experts that are here.
    """

    moe_num_experts: int
    moe_link: RoutingLink
    moe_mixing_order: int | None
    moe_min_slots: int = 1
    moe_exchange: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *args: Any
    ) -> torch.Tensor:
        if self.moe_exchange is None and getattr(self, "_is_expert_parallel", False):
            self._refuse_local_ids()
        if self.moe_mixing_order is None:
            return self._run(hidden_states, top_k_index, top_k_weights, *args)
        context = self.moe_link.slots.layer_context
        if context is None:
            raise ValueError("experts that work on mixtures of tokens run only inside a forward of their model.")
        dispatch, combine = (context.carry.pop((self.moe_mixing_order, name)) for name in ("dispatch", "combine"))
        batch, _, slots = dispatch.shape
        tokens = hidden_states.reshape(batch, -1, hidden_states.shape[-1])
        mixed = (dispatch.to(tokens).transpose(1, 2) @ tokens).flatten(0, 1)  # (B*slots, H)
        expert = torch.arange(self.moe_num_experts, device=mixed.device)
        index = expert.repeat_interleave(slots // self.moe_num_experts).repeat(batch)[:, None]
        out = self._run(mixed, index, top_k_weights.new_ones(index.shape), *args)
        out = combine.to(out) @ out.unflatten(0, (batch, slots))
        return out.reshape(hidden_states.shape)

    def _run(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *args: Any
    ) -> torch.Tensor:
        if self.moe_exchange is not None:
            return self.moe_exchange(hidden_states, top_k_index, top_k_weights)
        return self.run_local(hidden_states, top_k_index, top_k_weights, *args)

    def _refuse_local_ids(self) -> None:
        """Raise where ids of this rank's experts would give wrong sums: the stock implementations of expert
        parallelism translate ids before anything here sees them."""
        ids = getattr(self, "moe_zero_ids", None)
        if self.moe_mixing_order is not None or (ids is not None and ids.copy + ids.constant > 0):
            what = "copies or constants" if self.moe_mixing_order is None else "mixtures of tokens"
            raise ValueError(
                f"experts with {what} need the ids of the whole layer, and this implementation of expert parallelism "
                'has none for them. Use `DistributedConfig(ep_implementation="moe_ext")`, after `import hf_moe_ext`.'
            )

    def run_local(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *args: Any
    ) -> torch.Tensor:
        """The stock experts. Under expert parallelism, ids count the experts of this process, and their number stands
        for none of them; stock functions skip it there."""
        if not skips_unused_slots(self):
            top_k_index, top_k_weights = clamp_unused(top_k_index, top_k_weights, self.moe_num_experts)
        missing = self.moe_min_slots - top_k_index.shape[-1]
        if missing > 0:  # any expert, with weight 0
            top_k_index, top_k_weights = F.pad(top_k_index, (0, missing)), F.pad(top_k_weights, (0, missing))
        return super().forward(hidden_states, top_k_index, top_k_weights, *args)


@use_experts_implementation
class _FusedExperts(nn.Module):
    """Stacked feed-forward weights, in the layout of the stock families."""

    def __init__(self, config: Any, num_experts: int, hidden_size: int, intermediate_size: int, **kwargs: Any) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim = hidden_size
        self.intermediate_dim = intermediate_size

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return moe_ext_experts_forward(self, hidden_states, top_k_index, top_k_weights)


class MoeExtExperts(_FusedExperts):
    """Experts in place of a dense feed-forward block.

    Parameters: `gate_up_proj` (E, 2I, H) (or `up_proj` (E, I, H) without a gate), `down_proj` (E, H, I), and biases
    `<name>_bias` (E, out) where the dense block has them.

    Args:
        config: the model's config, read at call time for the experts implementation.
        num_experts (`int`): E.
        hidden_size (`int`): H.
        intermediate_size (`int`): I, the width of one expert.
        activation (`nn.Module`): taken over from the dense block.
        has_gate, has_bias (`bool`): form of the dense block.
        dropout (`nn.Module`, *optional*): applied between activation and down projection.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        config: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Any,
        has_gate: bool = True,
        has_bias: bool = False,
        dropout: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, num_experts, hidden_size, intermediate_size)
        self.has_gate, self.has_bias = has_gate, has_bias
        self.act_fn = activation
        self.hidden_dropout = dropout

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        name, rows = ("gate_up_proj", 2 * intermediate_size) if has_gate else ("up_proj", intermediate_size)
        self.register_parameter(name, parameter(rows, hidden_size))
        self.down_proj = parameter(hidden_size, intermediate_size)
        if has_bias:
            self.register_parameter(f"{name}_bias", parameter(rows))
            self.down_proj_bias = parameter(hidden_size)
        if dropout is not None and not has_gate:
            self.act_fn = nn.Sequential(activation, dropout)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = self.act_fn(gate) * up
        return hidden if self.hidden_dropout is None else self.hidden_dropout(hidden)

    def init_weights(self, std: float) -> None:
        """Normal weights, zero biases; tensors that a checkpoint filled are skipped."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)


class MoeExtGate(nn.Module):
    """Linear gate of an upcycled layer, with the plain rule: softmax, top-k, renormalise. Returns `(L, W, I)`."""

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight)
        weights, index = logits.float().softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits, weights / weights.sum(dim=-1, keepdim=True), index

    def init_weights(self, std: float) -> None:
        """Normal weights; tensors that a checkpoint filled are skipped."""
        init.normal_(self.weight, mean=0.0, std=std)


class MoeExtBlock(nn.Module):
    """Router and experts in place of a dense feed-forward block: (..., H) -> (..., H)."""

    def __init__(
        self, gate: MoeExtGate, experts: MoeExtExperts, output_scale: float = 1.0, dropout: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts
        self.output_scale = output_scale
        self.dropout = dropout

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])
        _, weights, index = self.gate(hidden_states)
        out = self.experts(hidden_states, index, weights).reshape(shape)
        if self.output_scale != 1.0:
            out = out * self.output_scale
        return out if self.dropout is None else self.dropout(out)


# Where the whole package is installed its kernels stand under the name, also for models with files of their own.
if DEFAULT_IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
    ALL_EXPERTS_FUNCTIONS.register(DEFAULT_IMPLEMENTATION, moe_ext_experts_forward)
