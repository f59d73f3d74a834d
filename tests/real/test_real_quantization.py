"""Few bits on real weights: an upcycled SmolLM2-135M, by what its texts become less likely."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_moe_ext as moe
from hf_moe_ext.data import load_domain, pack
from hf_moe_ext.evaluation import perplexity
from tests.real.test_real_routers import smollm2  # noqa: F401


pytestmark = [pytest.mark.real_data, pytest.mark.slow]

# Nats that a token may lose; docs/quantization.md has what was measured.
LOSSES = {"int8": 0.01, "int4": 0.5, "nf4": 0.3}


@pytest.fixture(scope="module")
def scored(smollm2):  # noqa: F811
    dense, tokenizer = smollm2
    windows = pack(load_domain("prose", "test"), tokenizer, 256, limit=2)
    model = moe.upcycle(dense, num_experts=2, layers="every:2", check=False).eval()
    return model, windows, perplexity(model, windows).nats


@pytest.mark.parametrize("kind", LOSSES)
def test_texts_become_little_less_likely(scored, kind):
    model, windows, nats = scored
    few = moe.quantize(copy.deepcopy(model), moe.MoeQuantizationConfig(kind))
    assert -0.02 < perplexity(few, windows).nats - nats < LOSSES[kind]


def test_saved_and_loaded_it_says_the_same(scored, tmp_path):
    from transformers import AutoModelForCausalLM

    model, windows, _ = scored
    few = moe.quantize(copy.deepcopy(model), moe.MoeQuantizationConfig("nf4", "nf4"))
    few.save_pretrained(tmp_path, max_shard_size="50MB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.as_tensor(windows[0]["input_ids"])[None, :64]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, few(ids).logits)
