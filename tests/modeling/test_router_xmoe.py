"""Cosine routing against a loop over tokens in float64; its invariances; the temperature."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_router import GateRule
from hf_moe_ext.modeling.moe_structure import iter_routers, trace_routing
from hf_moe_ext.modeling.router_xmoe import XMoERouterConfig
from hf_moe_ext.patching import extend, restore

from .test_routers import EXPERTS, HIDDEN, TOKENS, K, combine, make_gate, slow_scores


OWN = ("moe_projection", "moe_expert_embeddings", "moe_log_temperature_norm")


def slow_cosine(hidden, projection, embeddings, log_temperature, *, k, score, renormalize, scale=1.0):
    rows = []
    for token in hidden:
        low = [sum(a * b for a, b in zip(row, token, strict=True)) for row in projection]
        length = torch.sqrt(sum(value**2 for value in low))
        cosines = []
        for embedding in embeddings:
            product = sum(a * b for a, b in zip(embedding, low, strict=True))
            cosines.append(product / length / torch.sqrt(sum(value**2 for value in embedding)))
        scores = slow_scores(torch.stack(cosines) / torch.exp(log_temperature[0]), score)
        best = sorted(range(len(scores)), key=lambda i: -scores[i].item())[:k]  # noqa: B023
        total = sum(scores[i] for i in best) if renormalize else 1.0
        zero = torch.zeros((), dtype=torch.float64)
        rows.append(torch.stack([scores[i] / total * scale if i in best else zero for i in range(len(scores))]))
    return torch.stack(rows)


SETTINGS = {
    "top1": {"num_experts_per_tok": 1},
    "top3": {"num_experts_per_tok": 3, "renormalize": True},
    "sigmoid": {"num_experts_per_tok": 2, "score": "sigmoid", "temperature": 0.5},
    "sigmoid_share": {"num_experts_per_tok": 2, "score": "sigmoid", "renormalize": True, "scale": 1.5},
    "narrow": {"num_experts_per_tok": 2, "projection_size": 3, "temperature": 0.3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equals_reference(settings):
    """Weights, and the gradients of input, projection, embeddings and temperature."""
    gate = make_gate(XMoERouterConfig(**settings))
    hidden = torch.randn(TOKENS, HIDDEN)
    own = [getattr(gate, name) for name in OWN]
    theirs = [tensor.detach().double().requires_grad_() for tensor in (hidden, *own)]
    hidden.requires_grad_()
    weights = combine(gate.decide(hidden))
    options = {"score": "softmax", "renormalize": False} | settings
    k = options.pop("num_experts_per_tok")
    kept = {name: options[name] for name in ("score", "renormalize", "scale") if name in options}
    expected = slow_cosine(*theirs, k=k, **kept)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-6)
    upstream = torch.randn_like(weights)
    (weights * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    for mine, reference in zip((hidden, *own), theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-3, atol=1e-4)


def test_logits_ignore_the_length_of_token_and_embedding():
    gate = make_gate(XMoERouterConfig())
    hidden = torch.randn(TOKENS, HIDDEN)
    before = gate.decide(hidden).logits
    torch.testing.assert_close(gate.decide(hidden * torch.logspace(-2, 2, TOKENS)[:, None]).logits, before)
    gate.moe_expert_embeddings.data *= torch.logspace(-2, 2, EXPERTS)[:, None]
    torch.testing.assert_close(gate.decide(hidden).logits, before)
    gate.moe_projection.data *= 7
    torch.testing.assert_close(gate.decide(hidden).logits, before)
    # The one bound is the temperature.
    assert before.abs().max() <= 1 / 0.07 * (1 + 1e-5)
    torch.testing.assert_close(gate.moe_log_temperature_norm.exp(), torch.tensor([0.07]))


def test_a_zero_token_is_finite():
    gate = make_gate(XMoERouterConfig())
    hidden = torch.zeros(2, HIDDEN, requires_grad=True)
    record = gate.decide(hidden)
    record.weights.sum().backward()
    assert (record.logits == 0).all() and gate.moe_projection.grad.isfinite().all() and hidden.grad.isfinite().all()


@pytest.mark.parametrize(("experts", "size"), [(12, 6), (7, 3), (2, 2), (64, HIDDEN)])
def test_size_of_the_projection(experts, size):
    """Half the number of experts; at least two, and no more than the hidden size."""
    gate = make_gate(XMoERouterConfig(), num_experts=experts, top_k=1)
    assert gate.moe_projection.shape == (size, HIDDEN) and gate.moe_expert_embeddings.shape == (experts, size)


def test_family_rule_where_asked():
    gate = make_gate(XMoERouterConfig(renormalize=None), rule=GateRule(renormalize=True, scale=2.0))
    torch.testing.assert_close(gate.decide(torch.randn(TOKENS, HIDDEN)).weights.sum(-1), torch.full((TOKENS,), 2.0))
    gate = make_gate(XMoERouterConfig(renormalize=None), rule=GateRule(renormalize=False))
    record = gate.decide(torch.randn(TOKENS, HIDDEN))
    torch.testing.assert_close(record.weights, record.scores.topk(K).values)


def test_the_temperature_does_not_decay(tmp_path):
    """The Transformers trainer takes it out of weight decay by its name, and moves it by its gradient only."""
    model = extend(tiny_model("mixtral"), XMoERouterConfig())
    trainer = Trainer(model, TrainingArguments(tmp_path, weight_decay=0.5, report_to=[]))
    decayed = trainer.get_decay_parameter_names(model)
    assert not any("temperature" in name for name in decayed)
    assert sum("moe_projection" in name or "moe_expert_embeddings" in name for name in decayed) == 6
    optimizer = trainer.create_optimizer()
    router = next(iter_routers(model))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = router.moe_projection.clone()
    optimizer.step()
    assert (router.moe_log_temperature_norm == math.log(0.07)).all()
    assert (router.moe_projection.abs() <= before.abs()).all() and not torch.equal(router.moe_projection, before)


def test_the_stock_gate_rests():
    """It is not trained, and does not matter."""
    model, inputs = tiny_model("mixtral"), tiny_inputs("mixtral")
    stock = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = model(**inputs).logits
    extend(model, XMoERouterConfig(num_experts_per_tok=2, balance_coef=0.1)).train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for router in iter_routers(model):
        assert router.weight.grad is None and not router.weight.requires_grad
        assert all(getattr(router, name).grad.abs().sum() > 0 for name in OWN)
    first = model.eval()(**inputs).logits
    next(iter_routers(model)).weight.data.normal_()
    assert torch.equal(model(**inputs).logits, first)
    next(iter_routers(model)).weight.data.copy_(stock["model.layers.0.mlp.gate.weight"])
    restore(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


def test_temperature_survives_saving(tmp_path):
    """What was learned is loaded; the config's value is only where it starts."""
    model = extend(tiny_model("mixtral"), XMoERouterConfig(temperature=0.2))
    for router in iter_routers(model):
        router.moe_log_temperature_norm.data.fill_(math.log(0.5))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for router in iter_routers(again):
        torch.testing.assert_close(router.moe_log_temperature_norm.exp(), torch.tensor([0.5]))


@pytest.mark.parametrize("how", ["random", "identity"])
def test_zero_experts(how):
    """They have embeddings like the real ones."""
    config = XMoERouterConfig(num_experts_per_tok=4)
    model = extend(
        tiny_model("mixtral"), MoeExtension(router=config, zero_experts=ZeroExpertsConfig(zero=2, init=how))
    )
    with trace_routing(model) as contexts, torch.no_grad():
        assert model(**tiny_inputs("mixtral")).logits.isfinite().all()
    for record, router in zip(contexts[0].records.values(), iter_routers(model), strict=True):
        assert router.moe_expert_embeddings.shape == (10, 5) and "moe_zero_weight" not in router._parameters
        null = record.choices >= 8
        assert null.any() == (how == "random")
        assert (record.index[null] == 8).all() and (record.weights[null] == 0).all()


def test_training_finds_clusters():
    """Direction: tokens of four directions, each with its own expert, are told apart by the cosine gate alone."""
    gate = make_gate(XMoERouterConfig(num_experts_per_tok=1, projection_size=4), num_experts=4, top_k=1)
    centres = nn.functional.normalize(torch.randn(4, HIDDEN), dim=-1)
    kind = torch.arange(200) % 4
    hidden = (centres[kind] + 0.1 * torch.randn(200, HIDDEN)) * (torch.rand(200, 1) * 5 + 0.1)
    optimizer = torch.optim.Adam([getattr(gate, name) for name in OWN], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(gate.decide(hidden).logits, kind).backward()
        optimizer.step()
    assert (gate.decide(hidden).index[:, 0] == kind).float().mean() > 0.98


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projection_size": 1}, "`projection_size` must be at least 2, got 1"),
        ({"projection_size": 10}, r"`projection_size` \(10\) exceeds the hidden size \(9\)"),
        ({"temperature": 0.0}, "`temperature` must be positive, got 0.0"),
        ({"num_experts_per_tok": 0}, "at least 1, got 0"),
        ({"num_experts_per_tok": 13}, "exceeds the 12 experts"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_gate(XMoERouterConfig(**settings))
