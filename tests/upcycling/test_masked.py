"""Masked copies: what is zero, how much of it, and that nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_moe_ext import upcycle, upcycle_checkpoint
from hf_moe_ext.upcycling import MaskedUpcycling, load_upcycled

from ..tiny_models import DENSE_NAMES, tiny_model
from .references import random_block
from .test_methods import COPIES, FORMS


def matrices(stack, block):
    return [(stack.up, block.up), (stack.down, block.down)]


@pytest.mark.parametrize(("gated", "bias"), FORMS)
@pytest.mark.parametrize("rescale", [False, True])
def test_masked_entries_are_zero_and_the_others_are_kept(gated, bias, rescale):
    block = random_block(gated, bias, width=40)
    stack = MaskedUpcycling(0.8, rescale=rescale).convert(block, COPIES, seed=0)
    for copies, dense in matrices(stack, block):
        expected = dense / 0.8 if rescale else dense
        for expert in copies:
            assert ((expert == 0) | (expert == expected)).all()
            assert 0 < int((expert == 0).sum()) < expert.numel()
    if bias:
        assert all(torch.equal(expert, block.up_bias) for expert in stack.up_bias)
        assert all(torch.equal(expert, block.down_bias) for expert in stack.down_bias)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_the_share_of_kept_weights_is_binomial(keep):
    """24000 weights in each matrix; five standard deviations."""
    block = random_block(width=400, hidden=60)
    stack = MaskedUpcycling(keep).convert(block, COPIES, seed=0)
    for copies in (stack.up, stack.down):
        for part in copies.flatten(0, -3):
            bound = 5 * math.sqrt(keep * (1 - keep) / part.numel())
            assert float((part != 0).float().mean()) == pytest.approx(keep, abs=bound)


def test_masks_are_independent():
    """Between experts, projections and seeds two masks agree as often as chance has it, 0.5 at keep 0.5."""
    block = random_block(width=400, hidden=60)
    stack, other = (MaskedUpcycling(0.5).convert(block, 2, seed=seed) for seed in (0, 1))
    masks = [stack.up[0, 0] != 0, stack.up[0, 1] != 0, stack.up[1, 0] != 0, stack.down[0].T != 0, other.up[0, 0] != 0]
    bound = 5 * 0.5 / math.sqrt(masks[0].numel())
    for i, one in enumerate(masks):
        for two in masks[:i]:
            assert float((one == two).float().mean()) == pytest.approx(0.5, abs=bound)


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_keeping_everything_keeps_the_function(name):
    model = upcycle(tiny_model(name), "masked", keep=1.0, num_experts=3, target="ext")
    assert model.upcycle_report.preserves_function
    masked = upcycle(tiny_model(name), "masked", num_experts=3, target="ext")
    assert not masked.upcycle_report.preserves_function


def test_streaming_gives_the_same_tensors(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    options = {"num_experts": 3, "keep": 0.7, "seed": 5, "target": "ext"}
    live = upcycle(tmp_path / "dense", "masked", **options).state_dict()
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "streamed", "masked", **options)
    loaded = load_upcycled(tmp_path / "dense", "masked", **options).state_dict()
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed").state_dict()
    assert live.keys() == loaded.keys() == streamed.keys()
    assert all(torch.equal(tensor, loaded[key]) and torch.equal(tensor, streamed[key]) for key, tensor in live.items())


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1])
def test_bad_shares_are_named(keep):
    with pytest.raises(ValueError, match=rf"`keep` must be in \(0, 1\], got {keep}"):
        MaskedUpcycling(keep)
