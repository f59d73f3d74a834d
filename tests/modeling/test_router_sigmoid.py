"""The sigmoid gate of BASE layers against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_router import GateRule, RouterSite
from hf_moe_ext.modeling.moe_structure import trace_routing
from hf_moe_ext.modeling.router_sigmoid import SigmoidRouter, SigmoidRouterConfig
from hf_moe_ext.patching import extend

from .test_routers import EXPERTS, HIDDEN, TOKENS, K, chosen, compare, make_gate, slow_allowed


def slow_sigmoid(hidden, weight, *, k=1, scale=1.0, bias=None, groups=None):
    rows, sets = [], []
    for token in hidden:
        logits = weight @ token
        scores = [1 / (1 + torch.exp(-z)) for z in logits]
        choice = [s.item() + (0.0 if bias is None else bias[i]) for i, s in enumerate(scores)]
        best = sorted(slow_allowed(choice, groups), key=lambda i: -choice[i])[:k]  # noqa: B023
        zero = torch.zeros((), dtype=torch.float64)
        rows.append(torch.stack([scores[i] * scale if i in best else zero for i in range(len(logits))]))
        sets.append(best)
    return torch.stack(rows), sets


@pytest.mark.parametrize("k", [1, 2, EXPERTS])
@pytest.mark.parametrize("rule", [GateRule(), GateRule(score="sigmoid", scale=2.5)], ids=["softmax", "scaled"])
def test_equals_reference(k, rule):
    """The rule is the method's own, whatever the family's; only the output scale is the family's."""
    record = compare(
        make_gate(SigmoidRouterConfig(num_experts_per_tok=k), rule=rule), slow_sigmoid, k=k, scale=rule.scale
    )
    assert record.index.shape == (TOKENS, k)


def test_weights_are_sigmoids_of_the_raw_logits():
    gate = make_gate(SigmoidRouterConfig(num_experts_per_tok=3))
    record = gate.decide(torch.randn(TOKENS, HIDDEN))
    torch.testing.assert_close(record.weights, record.logits.gather(-1, record.index).sigmoid())
    assert (record.weights.sum(-1) - 1).abs().max() > 0.1  # they are not a distribution
    torch.testing.assert_close(record.scores.sum(-1), torch.ones(TOKENS))


def test_one_expert_per_token_unless_said_otherwise():
    assert make_gate(SigmoidRouterConfig()).decide(torch.randn(4, HIDDEN)).index.shape == (4, 1)
    config = SigmoidRouterConfig(num_experts_per_tok=None)
    assert make_gate(config).decide(torch.randn(4, HIDDEN)).index.shape == (4, K)


def test_saturated_scores_are_still_in_order():
    """Sigmoids of 30 and 40 are both 1 in float32; the logits decide."""
    gate = make_gate(SigmoidRouterConfig(), num_experts=4, top_k=1, hidden=1)
    gate.weight.data[:, 0] = torch.tensor([30.0, 35.0, 40.0, -1.0])
    assert chosen(gate.decide(torch.ones(1, 1))) == [[2]]


@pytest.mark.parametrize("groups", [None, (4, 2, "top2_sum"), (3, 2, "max")])
def test_bias_and_groups_of_the_family(groups):
    rule, bias = GateRule(score="sigmoid", bias="correction", groups=groups), torch.randn(EXPERTS) * 0.3
    gate = make_gate(SigmoidRouterConfig(num_experts_per_tok=2), rule=rule, bias=bias)
    compare(gate, slow_sigmoid, k=2, bias=bias.tolist(), groups=groups)


def test_identity_where_the_family_has_this_rule():
    site = RouterSite("0", 0, EXPERTS, K, HIDDEN, GateRule(score="sigmoid", renormalize=False))
    assert SigmoidRouter.identity_config(site) == SigmoidRouterConfig(num_experts_per_tok=K)
    for rule in (GateRule(), GateRule(score="sigmoid"), GateRule(order="topk_score", renormalize=False)):
        with pytest.raises(NotImplementedError, match="not the sigmoids"):
            SigmoidRouter.identity_config(RouterSite("0", 0, EXPERTS, K, HIDDEN, rule))


def test_zero_experts():
    extension = MoeExtension(router=SigmoidRouterConfig(num_experts_per_tok=4), zero_experts=ZeroExpertsConfig(zero=2))
    model = extend(tiny_model("mixtral"), extension)
    with trace_routing(model) as contexts, torch.no_grad():
        assert model(**tiny_inputs("mixtral")).logits.isfinite().all()
    for record in contexts[0].records.values():
        null = record.choices >= 8
        assert null.any() and (record.index[null] == 8).all() and (record.weights[null] == 0).all()
        torch.testing.assert_close(record.weights[~null], record.logits.gather(-1, record.choices).sigmoid()[~null])


@pytest.mark.parametrize(
    ("settings", "rule", "message"),
    [
        ({"num_experts_per_tok": 0}, None, "at least 1, got 0"),
        ({"num_experts_per_tok": 13}, None, "exceeds the 12 experts"),
        ({"num_experts_per_tok": 3}, GateRule(groups=(6, 1, "max")), "hold fewer than k=3"),
    ],
)
def test_bad_settings(settings, rule, message):
    with pytest.raises(ValueError, match=message):
        make_gate(SigmoidRouterConfig(**settings), rule=rule)
