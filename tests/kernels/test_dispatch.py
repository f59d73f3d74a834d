"""Which kernels a device gets."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from hf_moe_ext.kernels import cpu_experts, cpu_lora, dispatch, lora_dispatch


@pytest.fixture(autouse=True)
def unread_setting():
    dispatch.uses_triton.cache_clear()
    yield
    dispatch.uses_triton.cache_clear()


def test_a_cpu_needs_no_setting():
    assert dispatch.kernels_of("cpu") is cpu_experts and lora_dispatch.lora_kernels_of("cpu") is cpu_lora
    assert dispatch.kernels_of("mps") is None and lora_dispatch.lora_kernels_of("mps") is None


@pytest.mark.parametrize(
    ("setting", "capability", "hip", "runs"),
    [
        (None, (9, 0), None, True),  # H100
        (None, (8, 0), None, False),
        (None, (10, 0), None, False),
        (None, None, None, False),  # no GPU
        (None, (9, 0), "7.0", False),  # MI200
        ("0", (9, 0), None, False),
        ("1", (8, 0), None, True),
    ],
)
def test_where_triton_runs(setting, capability, hip, runs, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("HF_MOE_EXT_TRITON", raising=False)
    if setting is not None:
        monkeypatch.setenv("HF_MOE_EXT_TRITON", setting)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert (dispatch.kernels_of("cuda") is not None) == runs == (lora_dispatch.lora_kernels_of("cuda") is not None)


def test_without_triton_pytorch_does_the_work(monkeypatch):
    monkeypatch.delenv("HF_MOE_EXT_TRITON", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(dispatch, "_is_hopper", lambda: True)
    assert dispatch.kernels_of("cuda") is None


def test_triton_on_request(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("HF_MOE_EXT_TRITON", "1")
    found = {dispatch.kernels_of("cuda").__name__, lora_dispatch.lora_kernels_of("cuda").__name__}
    assert found == {"hf_moe_ext.kernels.triton_experts", "hf_moe_ext.kernels.triton_lora"}


def test_a_request_that_cannot_be_met_is_an_error(monkeypatch):
    monkeypatch.setenv("HF_MOE_EXT_TRITON", "yes")
    with pytest.raises(ValueError, match="`HF_MOE_EXT_TRITON` must be 0 or 1, got 'yes'"):
        dispatch.kernels_of("cuda")
    monkeypatch.setenv("HF_MOE_EXT_TRITON", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs Triton: pip install triton"):
        dispatch.kernels_of("cuda")
