"""Experts on a CPU: slots sorted once, one batch of rows per expert, buffers that stay.

What costs time on a CPU beside the products is fresh memory: a page fault for every 4 KiB, each call. So rows are
gathered into small buffers that stay in the caches, outputs go to a workspace that is kept, and one weighted look-up
(`embedding_bag`) sums the slots of each token. Backward keeps the tokens and the projections before the activation,
nothing else.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import cpu_matmul
from .accumulation import gradient_memory
from .cpu_matmul import product
from .expert_weights import Activation, ExpertWeights


_WORKSPACE_BYTES = 256 * 2**20  # of the outputs of all slots; more tokens than that are done in parts
_kept = threading.local()


def workspace(name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(size,) elements of memory that stays with the thread. What it holds is lost at the next call with the name."""
    buffers: dict[tuple[str, torch.dtype], torch.Tensor] = _kept.__dict__.setdefault("buffers", {})
    buffer = buffers.get((name, dtype))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # usable in and out of inference mode
            buffers[name, dtype] = buffer = torch.empty(size, dtype=dtype)
    return buffer[:size]


@dataclass(frozen=True)
class SortedSlots:
    """Used slots in order of their experts.

    Args:
        experts: (expert, first row, last row + 1) of each expert that has any.
        tokens: (R,) the token of each row.
        order: (R,) the slot of each row.
        row_of_slot: (T, K) the row of each slot; R where the slot is unused.
    """

    experts: list[tuple[int, int, int]]
    tokens: torch.Tensor
    order: torch.Tensor
    row_of_slot: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]


def sort_slots(index: torch.Tensor, num_experts: int) -> SortedSlots:
    """Sort (T, K) expert ids; those of `num_experts` and above are unused."""
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat.clamp(max=num_experts), minlength=num_experts + 1).tolist()[:num_experts]
    experts, first = [], 0
    for number, count in enumerate(counts):
        if count:
            experts.append((number, first, first + count))
            first += count
    order = order[:first]
    row_of_slot = torch.full_like(flat, first)
    row_of_slot[order] = torch.arange(first, dtype=flat.dtype)
    return SortedSlots(experts, order // index.shape[-1], order, row_of_slot.view_as(index))


def refusal(experts: ExpertWeights) -> str | None:
    """Why the CPU cannot run these experts, or `None`: it runs all."""
    return None


def infer(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights) -> torch.Tensor:
    """(T, H), (T, K), (T, K) -> (T, H), without gradients."""
    tokens, slots = index.shape
    if tokens == 1:
        return _one_token(hidden, index, weights, experts)
    part = max(1, _WORKSPACE_BYTES // (slots * hidden.shape[-1] * experts.down.element_size()))
    if tokens > part:
        split = zip(hidden.split(part), index.split(part), weights.split(part), strict=True)
        return torch.cat([infer(rows, ids, scales, experts) for rows, ids, scales in split])
    sorted_slots = sort_slots(index, experts.num_experts)
    if _prefers_grouped(hidden, sorted_slots, weights, experts):
        return _grouped(hidden, sorted_slots, weights, experts)
    return _forward(hidden, sorted_slots, weights, experts, None)


_grouped_is_faster: dict[tuple, bool] = {}


def _prefers_grouped(hidden: torch.Tensor, slots: SortedSlots, weights: torch.Tensor, experts: ExpertWeights) -> bool:
    """Whether `F.grouped_mm`, one call for all experts, beats the loop: timed once, for few rows of each expert.

    The loop chooses among more products, the grouped one saves calls.
    """
    few = slots.num_rows < 8 * len(slots.experts)
    known = hasattr(F, "grouped_mm") and experts.down.dtype in (torch.float32, torch.bfloat16, torch.float16)
    # It takes rows of whole 16 bytes alone.
    sizes = (*experts.up.shape[1:], *experts.down.shape[1:])
    aligned = all(size * experts.down.element_size() % 16 == 0 for size in sizes)
    if not few or not known or not aligned or cpu_matmul.is_pinned():
        return False
    key = (experts.down.dtype, experts.up.shape, experts.is_transposed, slots.num_rows.bit_length())
    if key not in _grouped_is_faster:
        forms: dict[str, Callable[..., torch.Tensor]] = {"loop": functools.partial(_forward, kept=None)}
        forms["grouped"] = _grouped
        best = cpu_matmul.fastest(list(forms), lambda name, _: forms[name](hidden, slots, weights, experts))
        _grouped_is_faster[key] = best == "grouped"
    return _grouped_is_faster[key]


def _grouped(hidden: torch.Tensor, slots: SortedSlots, weights: torch.Tensor, experts: ExpertWeights) -> torch.Tensor:
    (up, down), dtype = _matrices(experts), experts.down.dtype
    counts = [0] * experts.num_experts
    for number, first, last in slots.experts:
        counts[number] = last - first
    ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32)
    early = dtype != torch.float32 and experts.down_bias is None
    numbers = None
    if experts.up_bias is not None:
        numbers = torch.repeat_interleave(torch.arange(experts.num_experts), torch.tensor(counts))
    rows = F.grouped_mm(hidden.to(dtype)[slots.tokens], up.transpose(1, 2), offs=ends)
    if numbers is not None:
        rows += experts.up_bias[numbers]  # type: ignore[index]
    rows = _activate(rows, experts)
    if early:
        rows = rows.mul_(weights.reshape(-1)[slots.order, None])
    out = workspace("out", (slots.num_rows + 1) * down.shape[1], dtype).view(-1, down.shape[1])
    out[:-1] = F.grouped_mm(rows, down.transpose(1, 2), offs=ends)
    if numbers is not None:
        out[:-1] += experts.down_bias[numbers]  # type: ignore[index]
    return _sum_slots(out, slots, None if early else weights.to(dtype)).to(hidden.dtype)


def _one_token(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights
) -> torch.Tensor:
    """The form for decoding: no sorting, no gathering."""
    dtype, (up, down) = experts.down.dtype, _matrices(experts)
    x, ids = hidden.to(dtype), index[0].tolist()
    used = [slot for slot, number in enumerate(ids) if number < experts.num_experts]
    if not used:
        return torch.zeros_like(hidden)
    buffer = workspace("up", up.shape[1], dtype)
    rows = workspace("out", len(used) * down.shape[1], dtype).view(len(used), 1, down.shape[1])
    for row, slot in zip(rows, used, strict=True):
        number = ids[slot]
        middle = product(x, up, number, buffer)
        if experts.up_bias is not None:
            middle = middle + experts.up_bias[number]
        product(_activate(middle, experts), down, number, row.view(-1), row_major=True)
        if experts.down_bias is not None:
            row += experts.down_bias[number]
    # In float32 at least: sums of a few products, once per token.
    scale = weights[:, used].to(torch.promote_types(dtype, torch.float32))
    return (scale @ rows[:, 0].to(scale.dtype)).to(hidden.dtype)


def _matrices(experts: ExpertWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """`up` (E, out, H) and `down` (E, H, I), whatever the layout."""
    if experts.is_transposed:
        return experts.up.transpose(1, 2), experts.down.transpose(1, 2)
    return experts.up, experts.down


def _is_swiglu(experts: ExpertWeights) -> bool:
    return experts.has_gate and experts.is_concatenated and experts.activation == Activation("silu")


def _activate(pre: torch.Tensor, experts: ExpertWeights, keep: bool = False) -> torch.Tensor:
    """(n, 2I) or (n, I) -> (n, I); overwrites its input unless `keep`."""
    if _is_swiglu(experts):
        gate, up = pre.chunk(2, dim=-1)
        return F.silu(gate, inplace=not keep).mul_(up)
    out = experts.apply(pre)
    # An identity hands its input on, and what is kept must not be scaled later.
    return out.clone() if keep and out.data_ptr() == pre.data_ptr() else out


def _forward(
    hidden: torch.Tensor,
    slots: SortedSlots,
    weights: torch.Tensor,
    experts: ExpertWeights,
    kept: torch.Tensor | None,
) -> torch.Tensor:
    """`kept` (R, 2I): where to leave the projections for backward."""
    dtype, (up, down) = experts.down.dtype, _matrices(experts)
    if slots.num_rows == 0:
        return torch.zeros_like(hidden)
    # In half precision the routing weight is applied in float32 and rounded once, with the activation. A bias of the
    # output has to be weighted too, so then it comes later.
    early = dtype != torch.float32 and experts.down_bias is None
    scale = weights.reshape(-1)[slots.order, None] if early else None
    source = hidden.to(dtype)
    # One row more: embedding_bag wants a row to skip.
    out = workspace("out", (slots.num_rows + 1) * down.shape[1], dtype).view(-1, down.shape[1])
    for number, first, last in slots.experts:
        x = _gather(source, slots.tokens[first:last], "hidden")
        if kept is not None:
            pre = product(x, up, number, kept[first:last].view(-1), row_major=True)
        else:
            pre = product(x, up, number, workspace("up", x.shape[0] * up.shape[1], dtype))
        if experts.up_bias is not None:
            pre = pre.add_(experts.up_bias[number])
        y = _activate(pre, experts, keep=kept is not None)
        if scale is not None:
            y = y.mul_(scale[first:last])
        product(y, down, number, out[first:last].view(-1), row_major=True)
        if experts.down_bias is not None:
            out[first:last] += experts.down_bias[number]
    return _sum_slots(out, slots, None if early else weights.to(dtype)).to(hidden.dtype)


def _gather(source: torch.Tensor, rows: torch.Tensor, name: str) -> torch.Tensor:
    out = workspace(name, rows.shape[0] * source.shape[1], source.dtype).view(-1, source.shape[1])
    return torch.index_select(source, 0, rows, out=out)


def _sum_slots(rows: torch.Tensor, slots: SortedSlots, weights: torch.Tensor | None) -> torch.Tensor:
    """(R + 1, H) -> (T, H), weighted; the last row is never read."""
    return F.embedding_bag(slots.row_of_slot, rows, per_sample_weights=weights, mode="sum", padding_idx=slots.num_rows)


def forward(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H), (T, K), (T, K) -> (T, H), and what `backward` wants beside the inputs.

    Args:
        kept: (S, 2I), filled for as many rows as there are used slots, and zero from there on; a tensor of just these
            rows is made where it is not given.
    """
    slots = sort_slots(index, experts.num_experts)
    if kept is None:
        kept = torch.empty(slots.num_rows, _matrices(experts)[0].shape[1], dtype=experts.down.dtype)
    kept[slots.num_rows :] = 0
    return _forward(hidden, slots, weights, experts, kept), kept


def backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    kept: torch.Tensor,
    needs: list[bool],
    into: Sequence[torch.Tensor | None] = (None, None),
) -> list[torch.Tensor | None]:
    """Gradients of hidden, weights, up, down, up_bias and down_bias, each where `needs` says so.

    Those of up and down are added to the tensors of `into` where these are given; `None` is returned in their place.

    That of a routing weight needs no output of an expert: with d the gradient of the token, it is
    `<d @ W_down, activated>`.
    """
    dtype, (up, down) = experts.down.dtype, _matrices(experts)
    wants_hidden, wants_weights, wants_up, wants_down, wants_up_bias, wants_down_bias = needs
    slots = sort_slots(index, experts.num_experts)
    d_up, d_down = _stack(experts.up, slots, wants_up, into[0]), _stack(experts.down, slots, wants_down, into[1])
    d_up_bias = _stack(experts.up_bias, slots, wants_up_bias)
    d_down_bias = _stack(experts.down_bias, slots, wants_down_bias)
    row_weights = weights.reshape(-1)[slots.order, None]
    exact = torch.promote_types(weights.dtype, torch.float32)
    d_weights = torch.zeros_like(weights, dtype=exact) if wants_weights else None
    d_rows = workspace("out", (slots.num_rows + 1) * hidden.shape[1], dtype).view(-1, hidden.shape[1])
    grad, source = grad.to(dtype), hidden.to(dtype)
    wants_pre = wants_hidden or wants_up or wants_up_bias
    for number, first, last in slots.experts:
        rows = slots.tokens[first:last]
        d_out, scale = _gather(grad, rows, "grad"), row_weights[first:last]
        d_middle = product(d_out, down.transpose(1, 2), number, workspace("up", (last - first) * down.shape[2], dtype))
        activated, backward = _activation_gradient(kept[first:last], experts)
        if d_weights is not None:
            part = (d_middle * activated).sum(-1, dtype=d_weights.dtype)
            if experts.down_bias is not None:
                part += d_out.to(d_weights.dtype) @ experts.down_bias[number].to(d_weights.dtype)
            d_weights.view(-1)[slots.order[first:last]] = part
        if wants_down:
            _outer(d_out, (activated * scale).to(dtype), d_down, number, experts.is_transposed, into[1])
        if d_down_bias is not None:
            d_down_bias[number] = (d_out * scale).sum(0, dtype=torch.promote_types(dtype, torch.float32))
        if not wants_pre:
            continue
        d_pre = backward((d_middle * scale).to(dtype))
        if wants_up:
            _outer(d_pre, _gather(source, rows, "hidden"), d_up, number, experts.is_transposed, into[0])
        if d_up_bias is not None:
            d_up_bias[number] = d_pre.sum(0, dtype=torch.promote_types(dtype, torch.float32))
        if wants_hidden:
            product(d_pre, up.transpose(1, 2), number, d_rows[first:last].view(-1), row_major=True)
    d_hidden = _sum_slots(d_rows, slots, None).to(hidden.dtype) if wants_hidden else None
    d_weights = None if d_weights is None else d_weights.to(weights.dtype)
    d_up, d_down = (made if given is None else None for made, given in zip((d_up, d_down), into, strict=True))
    return [d_hidden, d_weights, d_up, d_down, d_up_bias, d_down_bias]


def _stack(
    parameter: torch.Tensor | None, slots: SortedSlots, wanted: bool, given: torch.Tensor | None = None
) -> torch.Tensor | None:
    """A gradient to fill, already zero where an expert has no row; or the one given, to add to."""
    if parameter is None or not wanted:
        return None
    if given is not None:
        return given
    gradient = gradient_memory(parameter)
    used = {number for number, _, _ in slots.experts}
    for number in range(parameter.shape[0]):
        if number not in used:
            gradient[number].zero_()
    return gradient


def _outer(
    left: torch.Tensor,
    right: torch.Tensor,
    stack: torch.Tensor | None,
    number: int,
    transposed: bool,
    given: torch.Tensor | None,
) -> None:
    """`left.T @ right` (or its transpose) into one matrix of the stack, or added to it where it was given."""
    if stack is None:
        return
    if transposed:
        left, right = right, left
    if given is None:
        torch.mm(left.t(), right, out=stack[number])
    else:
        stack[number].addmm_(left.t(), right)


def _activation_gradient(
    pre: torch.Tensor, experts: ExpertWeights
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The activated rows, and the map from their gradient to that of `pre`."""
    if _is_swiglu(experts):
        gate, up = pre.chunk(2, dim=-1)
        silu = F.silu(gate)

        def swiglu_backward(d: torch.Tensor) -> torch.Tensor:
            out = workspace("pre", pre.numel(), pre.dtype).view(pre.shape)
            d_gate, d_up = out.chunk(2, dim=-1)
            torch.mul(d, silu, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d.mul_(up), gate, grad_input=d_gate)
            return out

        return silu * up, swiglu_backward
    with torch.enable_grad():
        leaf = pre.detach().requires_grad_()
        activated = experts.apply(leaf)
    return activated.detach(), lambda d: torch.autograd.grad(activated, leaf, d)[0]
