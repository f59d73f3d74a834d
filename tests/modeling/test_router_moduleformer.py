"""The router of ModuleFormer against a loop over tokens in float64; its draws, its losses, its place in attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_inputs, tiny_model

import hf_moe_ext as moe
from hf_moe_ext.modeling.attention_routed import RoutedAttentionConfig
from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_context import RoutingContext
from hf_moe_ext.modeling.moe_router import GateRule
from hf_moe_ext.modeling.moe_structure import iter_routers, trace_routing
from hf_moe_ext.modeling.router_moduleformer import ModuleFormerRouterConfig
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig

from .test_routers import EXPERTS, HIDDEN, TOKENS, combine, make_gate, slow_scores


def own(gate):
    return [parameter for name, parameter in gate.named_parameters() if name.startswith("moe_")]


def make(seed=0, **settings):
    """With weights that tell: the router's own start is nearly flat."""
    gate = make_gate(ModuleFormerRouterConfig(**({"hidden_size": 5} | settings)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in own(gate):
            parameter.normal_()
    return gate


def slow_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def slow_route(hidden, tensors, kind, *, k, renormalize, scale=1.0):
    rows = []
    for token in hidden:
        if kind == "linear":
            (weight,) = tensors
            logits = [row @ token for row in weight]
        else:
            inner = torch.stack([row @ token for row in tensors[0]])
            if kind == "mlp":
                inner = slow_gelu(inner + tensors[2])
                logits = [row @ inner for row in tensors[1]]
            else:
                factor = torch.exp(tensors[2][0])
                logits = [factor * (row @ inner) / row.norm() / inner.norm() for row in tensors[1]]
        scores = slow_scores(torch.stack(logits), "softmax")
        best = sorted(range(len(scores)), key=lambda i: -scores[i].item())[:k]  # noqa: B023
        total = sum(scores[i] for i in best) if renormalize else 1.0
        zero = torch.zeros((), dtype=torch.float64)
        rows.append(torch.stack([scores[i] / total * scale if i in best else zero for i in range(len(scores))]))
    return torch.stack(rows)


SETTINGS = {
    "mlp": {"num_experts_per_tok": 2},
    "mlp_share": {"num_experts_per_tok": 3, "renormalize": True, "scale": 1.5},
    "cosine": {"kind": "cosine", "num_experts_per_tok": 2},
    "linear": {"kind": "linear", "num_experts_per_tok": 2},
    "all": {"num_experts_per_tok": EXPERTS},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equals_reference(settings):
    """Weights, and the gradients of the input and of every parameter."""
    gate = make(**settings)
    kind = settings.get("kind", "mlp")
    hidden = torch.randn(TOKENS, HIDDEN)
    tensors = [gate.weight] if kind == "linear" else own(gate)
    assert len(tensors) == (1 if kind == "linear" else 3)
    theirs = [tensor.detach().double().requires_grad_() for tensor in (hidden, *tensors)]
    hidden.requires_grad_()
    weights = combine(gate.decide(hidden))
    k, scale = settings["num_experts_per_tok"], settings.get("scale", 1.0)
    renormalize = settings.get("renormalize", False)
    expected = slow_route(theirs[0], theirs[1:], kind, k=k, renormalize=renormalize, scale=scale)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(weights)
    (weights * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    for mine, reference in zip((hidden, *tensors), theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


def test_its_activation_is_gelu_itself():
    """Not the approximation by a tanh, which differs in the fourth digit, and not ReLU."""
    gate = make()
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    weight, output, bias = (parameter.double() for parameter in own(gate))
    exact = F.gelu(hidden @ weight.T + bias) @ output.T
    near = F.gelu(hidden @ weight.T + bias, approximate="tanh") @ output.T
    found = gate.decide(hidden.float()).logits.double()
    assert (found - exact).abs().max() < 0.1 * (near - exact).abs().max()


def test_exploration():
    """The best stay; the others are drawn by their probability, anew in every forward, the same when recomputed."""
    gate = make(num_experts_per_tok=3, sample_slots=1).train()
    hidden = torch.randn(1, HIDDEN).expand(6000, -1)
    context = RoutingContext(generator=torch.Generator().manual_seed(0))
    record = gate.route(hidden, context)
    best = record.scores[0].topk(2).indices
    assert torch.equal(record.index[:, :2], best.expand(6000, -1))
    rest = record.scores[0].detach().clone()
    rest[best] = 0
    found = torch.bincount(record.index[:, 2], minlength=EXPERTS) / 6000
    torch.testing.assert_close(found, rest / rest.sum(), atol=4 * math.sqrt(0.25 / 6000), rtol=0)
    torch.testing.assert_close(record.weights, record.scores.gather(1, record.index))
    assert torch.equal(gate.route(hidden, context).index, record.index)
    other = RoutingContext(generator=torch.Generator().manual_seed(1))
    assert not torch.equal(gate.route(hidden, other).index, record.index)
    assert torch.equal(gate.eval().route(hidden, context).index[0], record.scores[0].topk(3).indices)


def test_information_is_its_loss():
    gate = make(information_coef=0.1)
    record = gate.decide(torch.randn(TOKENS, HIDDEN))
    (loss,) = gate.aux_losses(record, None).values()
    p = record.scores
    joint = p / TOKENS
    information = (joint * (joint / (joint.sum(0) * joint.sum(1, keepdim=True))).log()).sum()
    torch.testing.assert_close(loss, -information)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in own(gate))


def test_family_rule_where_asked():
    gate = make_gate(ModuleFormerRouterConfig(renormalize=None), rule=GateRule(renormalize=True, scale=2.0))
    torch.testing.assert_close(gate.decide(torch.randn(TOKENS, HIDDEN)).weights.sum(-1), torch.full((TOKENS,), 2.0))


def test_the_stock_gate_rests_but_for_linear():
    model, inputs = tiny_model("mixtral"), tiny_inputs("mixtral")
    with torch.no_grad():
        expected = model(**inputs).logits
    moe.extend(model, ModuleFormerRouterConfig(hidden_size=8))
    assert not any(router.weight.requires_grad for router in iter_routers(model))
    first = model(**inputs).logits
    next(iter_routers(model)).weight.data.normal_().mul_(0)
    assert torch.equal(model(**inputs).logits, first)
    moe.restore(model)
    model = tiny_model("mixtral")
    moe.extend(model, ModuleFormerRouterConfig(kind="linear", renormalize=None))
    assert all(router.weight.requires_grad and not own(router) for router in iter_routers(model))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("how", ["random", "identity"])
@pytest.mark.parametrize("kind", ["mlp", "cosine"])
def test_zero_experts(kind, how):
    """They have rows like the real ones, and can be held back."""
    config = ModuleFormerRouterConfig(kind=kind, num_experts_per_tok=4)
    declared = MoeExtension(router=config, zero_experts=ZeroExpertsConfig(zero=3, init=how))
    model = moe.extend(tiny_model("mixtral"), declared)
    with trace_routing(model) as contexts, torch.no_grad():
        assert model(**tiny_inputs("mixtral")).logits.isfinite().all()
    for record, router in zip(contexts[0].records.values(), iter_routers(model), strict=True):
        assert router.moe_output_weight.shape == (11, 256) and "moe_zero_weight" not in router._parameters
        null = record.choices >= 8
        assert null.any() == (how == "random")
        assert (record.index[null] == 8).all() and (record.weights[null] == 0).all()


def test_in_attention():
    """Among the attention experts that JetMoE and ModuleFormer have."""
    router = ModuleFormerRouterConfig(hidden_size=8, information_coef=0.1, sample_slots=1)
    stock, inputs = tiny_model("jetmoe"), tiny_inputs("jetmoe")
    model = moe.extend(stock, MoeExtension(router=router, attention=RoutedAttentionConfig(router=router))).train()
    out = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    assert len(out.attn_router_logits) == len(out.router_logits) == model.config.num_hidden_layers
    out.loss.backward()
    routers = list(iter_routers(model))
    assert sum(router.moe_site.attention for router in routers) == len(routers) // 2
    assert all(parameter.grad.abs().sum() > 0 for router in routers for parameter in own(router))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts_per_tok": 0}, "`num_experts_per_tok` must be at least 1, got 0"),
        ({"num_experts_per_tok": 13}, "exceeds the 12 experts"),
        ({"sample_slots": -1}, "`sample_slots` must be non-negative, got -1"),
        ({"num_experts_per_tok": 2, "sample_slots": 3}, r"`sample_slots` \(3\) exceeds the k=2 experts"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
        ({"kind": "cosine", "hidden_size": 1}, "`hidden_size` must be at least 2, got 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_gate(ModuleFormerRouterConfig(**settings))


def test_linear_has_no_rows_for_zero_experts():
    model, before = tiny_model("mixtral"), tiny_model("mixtral").state_dict().keys()
    declared = MoeExtension(router=ModuleFormerRouterConfig(kind="linear"), zero_experts=ZeroExpertsConfig(zero=1))
    with pytest.raises(ValueError, match="takes the logits of the stock gate"):
        moe.extend(model, declared)
    assert model.state_dict().keys() == before
    moe.extend(model, TopKRouterConfig())
