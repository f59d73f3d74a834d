"""`hf-moe demo` on a tiny model and a few sentences; the real one runs as `make demo`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from hf_moe_ext import data
from hf_moe_ext.cli import demo


TEXTS = {
    "python": "def add(first, second):\n    return first + second\n\n",
    "maths": "Question: What is 3 + 4?\nAnswer: 7\n\n",
    "prose": "The ship sailed on, and the sea was calm that night. ",
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(data, "load_domain", lambda name, split="train": [TEXTS.get(name, "words ") * 40] * 4)
    monkeypatch.setattr(demo, "FAST", replace(demo.FAST, length=48, learning_rate=1e-2))


def test_demo(hf_moe, saved, tmp_path, small, unverified):
    pytest.importorskip("matplotlib")
    out = tmp_path / "demo"
    result = hf_moe("demo", out, "--fast", "--model", saved("dense"))
    assert result.code == 0, result.out + result.err
    for title in ("Upcycle", "Train routers", "Ask it something", "Export", "Pictures", "Held-out perplexity"):
        assert f"== {title}" in result.out
    for name in ("model", "training", "report/report.html"):
        assert f"wrote {out / name}" in result.out and (out / name).exists()
    assert result.out.count("\n  hf-moe ") == 3
    assert "Not compared: the dense model trained on the same tokens" in result.out
    assert type(AutoModelForCausalLM.from_pretrained(out / "model")).__name__ == "MoeExtLlamaForCausalLM"
    assert hf_moe("report", out / "training").code == 0


def test_a_training_that_does_not_improve_is_an_error(hf_moe, saved, tmp_path, small, unverified, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "FAST", replace(demo.FAST, steps=2, learning_rate=0.0))
    result = hf_moe("demo", tmp_path / "demo", "--fast", "--model", saved("dense"))
    # On which domains is a matter of rounding: the two are equal.
    assert result.code == 1 and "The trained model is not better than the dense one on: " in result.out


def test_prepare_writes_nothing(hf_moe, saved, tmp_path, small):
    result = hf_moe("demo", tmp_path / "demo", "--prepare", "--model", saved("dense"))
    assert result.code == 0 and not (tmp_path / "demo").exists()


def test_one_expert_is_refused(hf_moe, tmp_path):
    result = hf_moe("demo", tmp_path / "demo", "--num_experts", "1")
    assert result.code == 2 and "`--num_experts` must be at least 2, got 1" in result.err
