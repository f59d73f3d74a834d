"""Which kernels a device gets."""

from __future__ import annotations

import importlib.util

import pytest

from hf_moe_ext.kernels import cpu_experts, cpu_lora, dispatch, lora_dispatch


@pytest.fixture(autouse=True)
def unread_setting():
    dispatch.uses_triton.cache_clear()
    yield
    dispatch.uses_triton.cache_clear()


def test_a_cpu_needs_no_setting():
    assert dispatch.kernels_of("cpu") is cpu_experts and lora_dispatch.lora_kernels_of("cpu") is cpu_lora
    assert dispatch.kernels_of("mps") is None and lora_dispatch.lora_kernels_of("mps") is None


@pytest.mark.parametrize("setting", [None, "0"])
def test_triton_has_to_be_asked_for(setting, monkeypatch):
    monkeypatch.delenv("HF_MOE_EXT_TRITON", raising=False)
    if setting is not None:
        monkeypatch.setenv("HF_MOE_EXT_TRITON", setting)
    assert dispatch.kernels_of("cuda") is None and lora_dispatch.lora_kernels_of("cuda") is None


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
