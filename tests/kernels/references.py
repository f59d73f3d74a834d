"""What the tests of all kernels share: slow references in float64, layouts, activations and routing cases.

The references are loops over tokens, slots and experts in plain PyTorch. They call no kernel and nothing of the
package but its dataclasses, and autograd runs through them, so they give gradients too.

T tokens, K slots of a token, S = T*K slots, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe_ext.kernels.expert_weights import Activation, ExpertWeights


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, SLOTS, EXPERTS, HIDDEN, INTERMEDIATE = 24, 2, 5, 48, 32


@dataclass(frozen=True)
class Groups:
    """The fields of `SlotGroups`, made by a loop."""

    offsets: Tensor
    row_of_slot: Tensor
    slot_of_row: Tensor
    num_experts: int
    slots_per_token: int


def group_slots_reference(index: Tensor, num_experts: int) -> Groups:
    """Slots sorted by expert, in the order of the slots within one; ids of `num_experts` and above get no row.

    Args:
        index: (T, K), any integer type.
        num_experts: E.
    """
    flat = index.reshape(-1).tolist()
    row_of_slot, slot_of_row, offsets = [-1] * len(flat), [], [0]
    for expert in range(num_experts):
        for slot, chosen in enumerate(flat):
            if chosen == expert:
                row_of_slot[slot] = len(slot_of_row)
                slot_of_row.append(slot)
        offsets.append(len(slot_of_row))
    slot_of_row += [0] * (len(flat) - len(slot_of_row))
    as_int32 = [
        torch.tensor(values, dtype=torch.int32, device=index.device).reshape(-1)
        for values in (offsets, row_of_slot, slot_of_row)
    ]
    return Groups(*as_int32, num_experts=num_experts, slots_per_token=index.shape[1])


# Routing cases ------------------------------------------------------------------------------------------------------


def _distinct(tokens: int, slots: int, experts: int, seed: int = 0) -> Tensor:
    """(T, K): K different experts for each token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :slots].int()


def _with_unused(index: Tensor, experts: int, seed: int = 1) -> Tensor:
    """A third of the slots unused, told by several values; one token without any expert."""
    generator = torch.Generator().manual_seed(seed)
    unused = torch.rand(index.shape, generator=generator) < 1 / 3
    values = torch.tensor([experts, experts + 3, 2**31 - 1], dtype=torch.int32)
    values = values[torch.randint(3, index.shape, generator=generator)]
    index = torch.where(unused, values, index)
    index[len(index) // 2] = experts
    return index


# Name -> (index (T, K) int32, E). E is mostly no power of two and S mostly no multiple of a block.
ROUTING_CASES: dict[str, tuple[Tensor, int]] = {
    "plain": (_distinct(TOKENS, SLOTS, EXPERTS), EXPERTS),
    "ragged": (_distinct(23, 3, 7), 7),
    "unused": (_with_unused(_distinct(TOKENS, 3, EXPERTS), EXPERTS), EXPERTS),
    "all_unused": (torch.full((7, 2), EXPERTS, dtype=torch.int32), EXPERTS),
    "one_expert_takes_all": (torch.full((TOKENS, 1), 3, dtype=torch.int32), EXPERTS),
    "empty_experts": (torch.tensor([[1, 4], [4, 1], [4, 5], [1, 6]], dtype=torch.int32).repeat(5, 1), 6),
    "the_same_expert_twice": (torch.tensor([[2, 2], [0, 0], [2, 0]], dtype=torch.int32).repeat(4, 1), 3),
    "one_expert": (torch.zeros(TOKENS, 1, dtype=torch.int32), 1),
    "one_token": (torch.tensor([[4, 0, 2]], dtype=torch.int32), EXPERTS),
    "no_tokens": (torch.zeros(0, 2, dtype=torch.int32), EXPERTS),
    "more_experts_than_slots": (_distinct(4, 2, 37), 37),
}


def routing_weights(index: Tensor, num_experts: int, *, poison_unused: bool = True, seed: int = 2) -> Tensor:
    """(T, K) float32, positive, NaN in unused slots unless told otherwise."""
    weights = torch.rand(index.shape, generator=torch.Generator().manual_seed(seed)) + 0.1
    return weights.masked_fill((index >= num_experts).cpu(), math.nan if poison_unused else 0.0).to(index.device)


# Experts ------------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation("silu"),
    "gelu": Activation("gelu"),
    "gelu_tanh": Activation("gelu_tanh"),
    "relu": Activation("relu"),
    "relu2": Activation("relu2"),
    "identity": Activation("identity"),
    "gpt_oss": Activation("silu", alpha=1.702, limit=1.5, shift=1.0),  # a limit that the values of the tests reach
    "silu_limit": Activation("silu", limit=0.75),
    "gelu_limit_shift": Activation("gelu", limit=1.0, shift=0.5),
}


@dataclass(frozen=True)
class Layout:
    """The flags of an experts module."""

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True


LAYOUTS: dict[str, Layout] = {
    "stock": Layout(),
    "bias": Layout(has_bias=True),
    "transposed": Layout(is_transposed=True),
    "interleaved": Layout(is_concatenated=False),
    "gpt_oss": Layout(has_bias=True, is_transposed=True, is_concatenated=False),
    "plain": Layout(has_gate=False),
    "plain_bias": Layout(has_gate=False, has_bias=True),
    "plain_transposed": Layout(has_gate=False, has_bias=True, is_transposed=True),
}


def random_experts(
    num_experts: int = EXPERTS,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    *,
    layout: Layout | str = "stock",
    activation: Activation | str | None = "silu",
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
) -> ExpertWeights:
    """Random experts in a layout, on `DEVICE`; the values are those of the layout "stock" wherever a test swaps it.

    With `activation=None` the experts compute silu, but say that the formula is not known.
    """
    layout = LAYOUTS[layout] if isinstance(layout, str) else layout
    known = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).to(DEVICE)

    parts = 2 if layout.has_gate else 1
    up = normal(num_experts, parts, intermediate, hidden, scale=hidden**-0.5)
    down = normal(num_experts, hidden, intermediate, scale=intermediate**-0.5)
    up_bias, down_bias = normal(num_experts, parts, intermediate, scale=0.3), normal(num_experts, hidden, scale=0.3)
    if not layout.is_concatenated:
        up, up_bias = up.transpose(1, 2), up_bias.transpose(1, 2)
    up, up_bias = up.reshape(num_experts, -1, hidden), up_bias.reshape(num_experts, -1)
    if layout.is_transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    formula = known or Activation()

    def apply(x: Tensor) -> Tensor:
        if not layout.has_gate:
            return formula.act(x)
        gate, value = x.chunk(2, dim=-1) if layout.is_concatenated else (x[..., ::2], x[..., 1::2])
        return formula.glu(gate, value)

    return ExpertWeights(
        up=up,
        down=down,
        up_bias=up_bias if layout.has_bias else None,
        down_bias=down_bias if layout.has_bias else None,
        has_gate=layout.has_gate,
        is_transposed=layout.is_transposed,
        is_concatenated=layout.is_concatenated,
        activation=known,
        apply=apply,
        post_norm=None,
    )


def in_float64(weights: ExpertWeights, *, requires_grad: bool = False) -> ExpertWeights:
    """The same experts with detached leaves in float64."""

    def convert(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().requires_grad_(requires_grad)

    up, down = convert(weights.up), convert(weights.down)
    assert up is not None and down is not None
    return replace(weights, up=up, down=down, up_bias=convert(weights.up_bias), down_bias=convert(weights.down_bias))


def random_hidden(tokens: int, hidden: int = HIDDEN, *, dtype: torch.dtype = torch.float32, seed: int = 4) -> Tensor:
    """(T, H), normal, but for one outlier channel, as models have them, and one that is tiny."""
    values = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[:, 3] *= 30  # more would leave no activation between its two tails
    values[:, 5] *= 1e-4
    return values.to(dtype).to(DEVICE)


def activate_reference(pre: Tensor, weights: ExpertWeights) -> Tensor:
    """(n, 2I) or (n, I) in the module's column order -> (n, I), by the formula written out."""
    formula = weights.activation or Activation()

    def act(x: Tensor) -> Tensor:
        if formula.kind == "silu":
            return x / (1 + torch.exp(-formula.alpha * x))
        if formula.kind == "gelu":
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        if formula.kind == "gelu_tanh":
            return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        if formula.kind in ("relu", "relu2"):
            return F.relu(x) ** (1 if formula.kind == "relu" else 2)
        assert formula.kind == "identity"
        return x

    if not weights.has_gate:
        return act(pre)
    width = pre.shape[-1] // 2
    gate, up = (pre[..., :width], pre[..., width:]) if weights.is_concatenated else (pre[..., ::2], pre[..., 1::2])
    if formula.limit is not None:
        gate, up = gate.clamp(max=formula.limit), up.clamp(-formula.limit, formula.limit)
    return act(gate) * (up + formula.shift)


def up_token_reference(token: Tensor, weights: ExpertWeights, expert: int) -> Tensor:
    """(H,) -> (2I,) or (I,): the up projection of one expert, in the module's column order."""
    matrix = weights.up[expert].double()
    out = (matrix.T if weights.is_transposed else matrix) @ token.double()
    return out if weights.up_bias is None else out + weights.up_bias[expert].double()


def down_token_reference(activated: Tensor, weights: ExpertWeights, expert: int) -> Tensor:
    """(I,) -> (H,): the down projection of one expert."""
    matrix = weights.down[expert].double()
    out = (matrix.T if weights.is_transposed else matrix) @ activated.double()
    return out if weights.down_bias is None else out + weights.down_bias[expert].double()


def _experts_of_rows(groups: Groups) -> list[int]:
    offsets = groups.offsets.tolist()
    return [e for e in range(groups.num_experts) for _ in range(offsets[e], offsets[e + 1])]


def up_reference(hidden: Tensor, weights: ExpertWeights, groups: Groups) -> tuple[Tensor, Tensor]:
    """(T, H) -> activated (n, I) and pre (n, 2I) or (n, I), float64, for the n = offsets[E] rows that exist."""
    slots, width = groups.slot_of_row.tolist(), weights.up.shape[2 if weights.is_transposed else 1]
    rows = [
        up_token_reference(hidden[slots[row] // groups.slots_per_token], weights, expert)
        for row, expert in enumerate(_experts_of_rows(groups))
    ]
    pre = torch.stack(rows) if rows else hidden.new_zeros(0, width, dtype=torch.float64)
    return activate_reference(pre, weights), pre


def down_reference(activated: Tensor, weights: ExpertWeights, groups: Groups) -> Tensor:
    """(n or more, I) -> (n, H), float64, for the n = offsets[E] rows that exist."""
    rows = [
        down_token_reference(activated[row], weights, expert) for row, expert in enumerate(_experts_of_rows(groups))
    ]
    return torch.stack(rows) if rows else activated.new_zeros(0, weights.hidden_size, dtype=torch.float64)


def combine_reference(
    rows: Tensor,
    groups: Groups,
    weights: Tensor | None,
    num_tokens: int,
    *,
    add: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """(n or more, H) -> (T, H), float64: `scale * sum_k weights[t, k] * rows[row_of_slot[t, k]] + add[t]`."""
    slots, where = groups.slots_per_token, groups.row_of_slot.tolist()
    out = []
    for token in range(num_tokens):
        total = rows.new_zeros(rows.shape[1], dtype=torch.float64)
        for k in range(slots):
            row = where[token * slots + k]
            if row >= 0:
                total = total + rows[row].double() * (1.0 if weights is None else weights[token, k].double())
        total = total * scale
        out.append(total if add is None else total + add[token].double())
    return torch.stack(out) if out else rows.new_zeros(0, rows.shape[1], dtype=torch.float64)


def experts_reference(hidden: Tensor, weights: ExpertWeights, index: Tensor, factors: Tensor) -> Tensor:
    """(T, H), experts, (T, K), (T, K) -> (T, H) float64: the whole layer, one token and one slot at a time."""
    out = []
    for token, chosen in enumerate(index.tolist()):
        total = hidden.new_zeros(hidden.shape[1], dtype=torch.float64)
        for k, expert in enumerate(chosen):
            if expert < weights.num_experts:
                pre = up_token_reference(hidden[token], weights, expert)
                row = down_token_reference(activate_reference(pre, weights), weights, expert)
                total = total + factors[token, k].double() * row
        out.append(total)
    return torch.stack(out) if out else hidden.new_zeros(0, hidden.shape[1], dtype=torch.float64)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the reference; 0 where both are empty. NaN is never hidden."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if found.numel() == 0:
        return 0.0
    difference, norm = (found.double() - expected.double()).norm().item(), expected.double().norm().item()
    return difference / norm if norm else difference


def rows_agree(found: Tensor, expected: Tensor) -> bool:
    """Whether rows that stand in other places of a tile came out alike: bit for bit on a device.

    The interpreter multiplies a tile by numpy, whose BLAS rounds a row by its place in the tile on some processors.
    """
    return torch.equal(found, expected) if DEVICE == "cuda" else relative_error(found, expected) < 1e-6


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of NaN on `DEVICE`, to be written to."""
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)
