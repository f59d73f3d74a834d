"""The choice among matrix products: all of them right, the fastest taken, once."""

from __future__ import annotations

import time

import pytest
import torch

from hf_moe_ext.kernels import cpu_matmul


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(cpu_matmul, "_chosen", {})


@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(cpu_matmul.PRODUCTS))
def test_every_product_equals_float64(name, dtype, transposed, rows, row_major, monkeypatch):
    if name not in cpu_matmul.candidates(dtype, rows):
        pytest.skip("no such product for this data type and number of rows")
    monkeypatch.setenv("HF_MOE_EXT_CPU_MATMUL", name)
    torch.manual_seed(0)
    stack, x = torch.randn(3, 24, 16).to(dtype), torch.randn(rows, 16).to(dtype)
    if transposed:
        stack = stack.transpose(1, 2).contiguous().transpose(1, 2)
    buffer = torch.full((rows * 24,), torch.nan, dtype=dtype)
    found = cpu_matmul.product(x, stack, 2, buffer, row_major)
    assert list(cpu_matmul._chosen.values()) == [cpu_matmul.PRODUCTS[name]]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.double(), x.double() @ stack[2].double().T, rtol=tolerance, atol=tolerance)
    if row_major:
        assert found.data_ptr() == buffer.data_ptr() and found.is_contiguous()
        assert torch.equal(found, buffer.view(rows, 24))


@pytest.mark.parametrize("quick", list(cpu_matmul.PRODUCTS)[:3])
def test_the_fastest_product_is_taken_and_timed_once(quick, monkeypatch):
    calls = []

    def make(name):
        def product(x, weight, buffer):
            calls.append(name)
            time.sleep(0.0 if name == quick else 0.002)
            return x @ weight.T

        return product

    made = {name: make(name) for name in ("rows", "columns", "mkldnn")}
    monkeypatch.setattr(cpu_matmul, "candidates", lambda dtype, rows: made)
    monkeypatch.delenv("HF_MOE_EXT_CPU_MATMUL", raising=False)
    stack, x = torch.randn(2, 3, 4), torch.randn(5, 4)
    for _ in range(2):
        torch.testing.assert_close(cpu_matmul.product(x, stack, 1, torch.empty(15)), x @ stack[1].T)
    assert calls.count(quick) == 1 + 5 + 2  # warm-up, timed, used twice
    assert all(calls.count(name) == 1 + 5 for name in made if name != quick)
    cpu_matmul.product(torch.randn(4, 4), stack, 0, torch.empty(12))  # 4 rows are of the same size as 5
    assert len(calls) == 3 * 6 + 3
    cpu_matmul.product(torch.randn(9, 4), stack, 0, torch.empty(27))
    assert len(calls) == 2 * 3 * 6 + 4


def test_timing_turns_through_the_matrices(monkeypatch):
    seen = []
    product = cpu_matmul.PRODUCTS["rows"]
    monkeypatch.setattr(
        cpu_matmul,
        "candidates",
        lambda dtype, rows: {"rows": lambda x, w, b: seen.append(w.data_ptr()) or product(x, w, b)},
    )
    monkeypatch.delenv("HF_MOE_EXT_CPU_MATMUL", raising=False)
    stack = torch.randn(4, 3, 2)
    cpu_matmul.product(torch.randn(5, 2), stack, 3, torch.empty(15))
    places = [(pointer - stack.data_ptr()) // (4 * 6) for pointer in seen]
    assert places == [3, 0, 1, 2, 3, 0, 3]  # warm-up, five timings, the result


def test_a_setting_that_names_no_product_is_refused(monkeypatch):
    monkeypatch.setenv("HF_MOE_EXT_CPU_MATMUL", "fast")
    with pytest.raises(ValueError, match="must be one of rows, columns, mkldnn, vector, got 'fast'"):
        cpu_matmul.product(torch.randn(2, 3), torch.randn(1, 4, 3), 0, torch.empty(8))
