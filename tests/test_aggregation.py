"""Aggregation of experts: copies of one model are that model; what is averaged, what is put side by side."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.aggregation import aggregate_experts
from hf_moe_ext.mixtures import find_mixtures

from .test_module_editing import ids, logits, stock


NAMES = ("mixtral", "qwen2_moe", "olmoe", "upcycled")


def other_seed(model, seed=1):
    """The same architecture with other weights."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return twin


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_copies_of_one_model_are_that_model(name, copies, tmp_path):
    """Weights renormalised or not: each copy has its share of the probability, and all are chosen."""
    model = stock(name)
    before = logits(model)
    many = aggregate_experts([copy.deepcopy(model) for _ in range(copies)], num_experts_per_tok=2 * copies)
    torch.testing.assert_close(logits(many), before, rtol=1e-5, atol=1e-5)
    many.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(many)
    assert torch.equal(logits(again), logits(many))
    assert torch.equal(logits(model), before)  # the sources are left alone


@pytest.mark.parametrize("name", NAMES)
def test_experts_stand_side_by_side_and_the_rest_is_averaged(name):
    one = stock(name)
    other = other_seed(one)
    result = aggregate_experts([one, other])
    stacks = set()
    for parts in zip(*(find_mixtures(model)[1] for model in (one, other, result)), strict=True):
        assert parts[2].num_experts == 2 * parts[0].num_experts
        for a, b, c in zip(*(mixture.stacks() for mixture in parts), strict=True):
            assert torch.equal(c[-1], torch.cat([a[-1], b[-1]]))
            stacks.add(id(c[-1]))
    first, second = dict(one.named_parameters()), dict(other.named_parameters())
    others = [(name, tensor) for name, tensor in result.named_parameters() if id(tensor) not in stacks]
    assert len(others) > 10
    for key, tensor in others:
        torch.testing.assert_close(tensor, (first[key] + second[key]) / 2)


def test_an_extended_top_k_gets_more_experts_per_token(tmp_path):
    model = moe.extend(stock("mixtral"), moe.TopKRouterConfig(num_experts_per_tok=2))
    before = logits(model)
    many = aggregate_experts([model, model], num_experts_per_tok=4)
    torch.testing.assert_close(logits(many), before, rtol=1e-5, atol=1e-5)
    assert many.config.moe_ext["router"]["num_experts_per_tok"] == 4
    assert model.config.moe_ext["router"]["num_experts_per_tok"] == 2
    many.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(many))


def test_weights_that_are_not_renormalised_shrink_and_a_warning_says_so(caplog):
    """Identical copies and the same k: each of the chosen ones has half of its weight."""
    logging.getLogger("transformers").propagate = True
    logging.getLogger("hf_moe_ext").propagate = True
    model = stock("olmoe")
    with caplog.at_level(logging.WARNING):
        aggregate_experts([model, model])
    assert "count less at first" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        aggregate_experts([stock("mixtral"), stock("mixtral")])
        aggregate_experts([model, model], num_experts_per_tok=4)
    assert "count less" not in caplog.text


def test_the_result_trains():
    model = aggregate_experts([stock("mixtral"), other_seed(stock("mixtral"))])
    model.train()(input_ids=ids(), labels=ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("models", "options", "error", "message"),
    [
        (lambda: [stock("mixtral")], {}, ValueError, "`models` must be two or more, got 1"),
        (
            lambda: [stock("mixtral"), stock("olmoe")],
            {},
            TypeError,
            "model 2 is a OlmoeForCausalLM, the first a Mixtral",
        ),
        (
            lambda: [stock("mixtral"), tiny_model("mixtral", num_hidden_layers=2)],
            {},
            ValueError,
            "model 2 has num_hidden_layers=2, the first 3",
        ),
        (lambda: [tiny_model("llama"), tiny_model("llama")], {}, ValueError, "LlamaForCausalLM has no experts"),
        (
            lambda: [stock("mixtral"), stock("mixtral")],
            {"num_experts_per_tok": 17},
            ValueError,
            r"`num_experts_per_tok` \(17\) must be from 1 to the 16 experts",
        ),
        (
            lambda: [moe.extend(stock("mixtral"), moe.TopPRouterConfig()) for _ in range(2)],
            {"num_experts_per_tok": 4},
            ValueError,
            "is for stock routers and `top_k`; `0` has `top_p`",
        ),
        (lambda: [tiny_model("jetmoe"), tiny_model("jetmoe")], {}, ValueError, "cannot be changed: this architecture"),
    ],
)
def test_bad_input_is_refused(models, options, error, message):
    with pytest.raises(error, match=message):
        aggregate_experts(models(), **options)
