"""One matrix for each expert, applied to the slots that chose it: the linear maps of attention experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.integrations import moe as stock


def expert_linear(rows: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`out[n] = weight[index[n]] @ rows[n]`.

    Rows are sorted by expert once, so that each expert multiplies one batch. On a CPU experts that nobody chose cost
    nothing; elsewhere, and while compiling, one grouped product does the work and the host waits for nothing.

    Args:
        rows: (N, I).
        index: (N,) expert of each row. Ids of E and above are unused slots; their result is 0.
        weight: (E, O, I).

    Returns:
        (N, O).
    """
    num_experts = weight.shape[0]
    order = torch.argsort(index, stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    arranged = rows[order].to(weight.dtype)
    unused = (index >= num_experts)[:, None]
    if arranged.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = torch.bincount(index.clamp(max=num_experts), minlength=num_experts + 1).tolist()
        # One unbind instead of E indexings: the backward of each indexing would fill a gradient of the whole stack.
        matrices = weight.unbind(0)
        parts = [
            F.linear(part, matrices[number])
            for number, part in enumerate(arranged.split(counts)[:-1])
            if part.shape[0] > 0
        ]
        parts.append(arranged.new_zeros(counts[-1], weight.shape[1]))
        return torch.cat(parts)[back].to(rows.dtype)
    # Unused slots go along with the last expert as zeros, and are taken out again.
    sorted_ids = index[order]
    arranged = arranged.masked_fill((sorted_ids >= num_experts)[:, None], 0)
    sorted_ids = sorted_ids.clamp(max=num_experts - 1)
    ends = torch.searchsorted(sorted_ids, torch.arange(num_experts, device=index.device), right=True)
    out = _grouped(arranged, weight.transpose(1, 2), ends.to(torch.int32), sorted_ids)
    return out[back].masked_fill(unused, 0).to(rows.dtype)


def _grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(N, I), (E, I, O) -> (N, O): the grouped product that Transformers chooses for its experts, which also compiles,
    or a product for each row where it takes only rows of 16 bytes."""
    grouped = getattr(stock, "_grouped_mm", None)
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    if grouped is not None and aligned:
        out: torch.Tensor = grouped(rows, weight, ends)
        return out
    return torch.bmm(rows[:, None], weight[ids])[:, 0]
