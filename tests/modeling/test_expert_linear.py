"""One matrix for each expert, against a loop over rows: both forms, unused slots, gradients."""

from __future__ import annotations

import pytest
import torch

from hf_moe_ext.modeling import moe_expert_linear
from hf_moe_ext.modeling.moe_expert_linear import expert_linear


INDEX = {
    "plain": [0, 2, 1, 2, 2, 0, 3],
    "unused": [4, 2, 5, 2, 4, 0, 3],
    "all_unused": [4, 4, 6],
    "one_expert": [1, 1],
    "none": [],
}


def slow(rows, index, weight):
    out = torch.zeros(len(rows), weight.shape[1], dtype=rows.dtype)
    for row, number in enumerate(index.tolist()):
        if number < len(weight):
            out[row] = weight[number] @ rows[row]
    return out


@pytest.fixture(params=["loop", "grouped", "rows"])
def form(request, monkeypatch):
    """The loop of a CPU, the grouped product of a GPU or a compiled graph, and the one without it."""
    if request.param != "loop":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return request.param


@pytest.mark.parametrize("case", INDEX)
def test_values_and_gradients(case, form):
    size = 8 if form == "grouped" else 6  # grouped products want rows of 16 bytes
    index = torch.tensor(INDEX[case], dtype=torch.long)
    rows = torch.randn(len(index), size)
    weight = torch.randn(4, 12, size)
    rows[index >= 4] = torch.nan  # what stands in an unused slot does not matter
    mine = [rows.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [rows.nan_to_num(0.0).double().requires_grad_(), weight.double().requires_grad_()]
    out, expected = expert_linear(mine[0], index, mine[1]), slow(theirs[0], index, theirs[1])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    if not out.requires_grad:  # nobody uses an expert
        assert not (index < 4).any()
        return
    upstream = torch.randn(out.shape)
    (out * upstream).sum().backward()
    if expected.requires_grad:
        (expected * upstream).sum().backward()
    used = index < 4
    assert (mine[0].grad[~used] == 0).all()
    if used.any():
        torch.testing.assert_close(mine[0].grad[used].double(), theirs[0].grad[used], rtol=1e-5, atol=1e-5)
    wanted = torch.zeros_like(weight).double() if theirs[1].grad is None else theirs[1].grad
    torch.testing.assert_close(mine[1].grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_grouped_form_is_taken(monkeypatch):
    calls = []
    grouped = moe_expert_linear.stock._grouped_mm
    monkeypatch.setattr(moe_expert_linear.stock, "_grouped_mm", lambda *args: calls.append(1) or grouped(*args))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    expert_linear(torch.randn(5, 8), torch.tensor([0, 1, 1, 0, 2]), torch.randn(3, 4, 8))
    assert calls


def test_compiles_without_a_break():
    weight, index = torch.randn(4, 12, 8), torch.tensor([3, 0, 4, 1, 1, 2])
    rows = torch.randn(6, 8)
    compiled = torch.compile(expert_linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(rows, index, weight), expert_linear(rows, index, weight))
