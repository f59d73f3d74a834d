"""Noisy top-k against loops over tokens and experts in float64; its two losses; the gate of GShard."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_context import RoutingContext
from hf_moe_ext.modeling.moe_router import GateRule
from hf_moe_ext.modeling.moe_structure import auxiliary_losses, iter_routers, route_rows, trace_routing
from hf_moe_ext.modeling.router_noisy_top_k import NoisyTopKRouterConfig, chance_in_top, squared_variation
from hf_moe_ext.patching import extend

from .test_routers import (
    EXPERTS,
    HIDDEN,
    RULES,
    TOKENS,
    K,
    chosen,
    combine,
    compare,
    make_gate,
    rule_options,
    slow_top_k,
)


GSHARD = {"noise": False, "load_coef": 0.0, "second_expert": "random", "num_experts_per_tok": 2}


def noisy_gate(config=None, **options):
    """In training, with noise that differs between tokens and experts."""
    gate = make_gate(config or NoisyTopKRouterConfig(), **options).train()
    gate.moe_noise_weight.data.normal_()
    return gate


def seeded(mask=None):
    return RoutingContext(attention_mask=mask, generator=torch.Generator().manual_seed(5))


def same_noise(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).double()


def slow_noisy(hidden, weight, noise_weight, draws, k):
    """(T, E) weights and loads of the paper, appendix A, one token and one expert at a time."""
    weights, loads = [], []
    for token, draw in zip(hidden, draws, strict=True):
        clean, deviation = weight @ token, torch.log1p(torch.exp(noise_weight @ token))
        noisy = clean + draw * deviation
        kept = sorted(range(len(noisy)), key=lambda i: -noisy[i].item())[:k]  # noqa: B023
        total = sum(torch.exp(noisy[i]) for i in kept)
        zero = torch.zeros((), dtype=torch.float64)
        weights.append(torch.stack([torch.exp(noisy[i]) / total if i in kept else zero for i in range(len(noisy))]))
        chances = []
        for i in range(len(noisy)):
            others = sorted((noisy[j] for j in range(len(noisy)) if j != i), key=lambda value: -value.item())
            z = (clean[i] - others[k - 1]) / deviation[i]
            chances.append((1 + torch.erf(z / math.sqrt(2))) / 2)
        loads.append(torch.stack(chances))
    return torch.stack(weights), torch.stack(loads)


# --- weights, choice, load ---


@pytest.mark.parametrize("k", [1, K, EXPERTS - 1])
def test_training_equals_the_paper(k):
    """Weights, loads, and the gradients of both for input, gate and noise weights."""
    gate = noisy_gate(NoisyTopKRouterConfig(num_experts_per_tok=k))
    hidden = torch.randn(TOKENS, HIDDEN)
    mine = [hidden.clone(), gate.weight.detach().clone(), gate.moe_noise_weight.detach().clone()]
    theirs = [tensor.double().requires_grad_() for tensor in mine]
    mine = [tensor.requires_grad_() for tensor in mine]
    gate.weight, gate.moe_noise_weight = nn.Parameter(mine[1]), nn.Parameter(mine[2])
    record = gate.route(mine[0], seeded())
    expected, loads = slow_noisy(*theirs, same_noise((TOKENS, EXPERTS)), k)
    torch.testing.assert_close(combine(record).double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(record.extras["gates"].double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(record.extras["load"].double(), loads, rtol=1e-4, atol=1e-6)
    for out, reference in ((combine(record), expected), (record.extras["load"], loads)):
        upstream = torch.randn_like(out)
        got = torch.autograd.grad(
            (out * upstream).sum(), [mine[0], gate.weight, gate.moe_noise_weight], retain_graph=True
        )
        wanted = torch.autograd.grad((reference * upstream.double()).sum(), theirs, retain_graph=True)
        for found, right in zip(got, wanted, strict=True):
            torch.testing.assert_close(found.double(), right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_evaluation_follows_the_family(rule):
    """No noise there, whatever was learned; what the config leaves open is as in the family."""
    bias = torch.randn(EXPERTS) * 0.3 if rule.bias else None
    gate = noisy_gate(NoisyTopKRouterConfig(), rule=rule, bias=bias).eval()
    options = rule_options(rule) | {"order": rule.order, "renormalize": rule.renormalize}
    compare(gate, slow_top_k, **options, bias=None if bias is None else bias.tolist())


def test_explicit_rule_of_the_paper_on_another_family():
    """A softmax over the kept logits, on a family with raw sigmoid weights."""
    rule = GateRule(score="sigmoid", renormalize=False)
    gate = noisy_gate(NoisyTopKRouterConfig(score="softmax", renormalize=True), rule=rule).eval()
    compare(gate, slow_top_k, order="topk_score")


@pytest.mark.parametrize("learned", [False, True])
def test_size_of_the_noise(learned):
    """Normal, with the deviation softplus(W_noise x): log 2 where nothing is learned yet. Never in evaluation."""
    gate = make_gate(NoisyTopKRouterConfig(), num_experts=4, top_k=2, hidden=1).train()
    assert (gate.moe_noise_weight == 0).all() and gate.moe_noise_weight.requires_grad
    if learned:
        gate.moe_noise_weight.data = torch.tensor([[-3.0], [-1.0], [0.0], [2.0]])
    noise = gate.decide(torch.ones(40_000, 1)).logits - gate.weight[:, 0]
    expected = torch.log1p(torch.exp(gate.moe_noise_weight[:, 0]))
    assert (noise.mean(0).abs() < 5 * expected / 200).all()  # five standard errors
    torch.testing.assert_close(noise.std(0), expected, rtol=0.02, atol=0)
    kurtosis = (noise / expected).pow(4).mean(0)
    torch.testing.assert_close(kurtosis, torch.full((4,), 3.0), rtol=0.1, atol=0)
    gate.eval()
    assert (gate.decide(torch.ones(7, 1)).logits == gate.weight[:, 0]).all()


def test_load_is_the_frequency_under_new_noise():
    """The probability that an expert is among the k best when its own noise is drawn anew, and the others' are not."""
    clean, deviation = torch.randn(1, 6), torch.rand(1, 6) + 0.3
    noisy = clean + torch.randn(1, 6) * deviation
    draws, k = 40_000, 2
    for i in range(6):
        again = noisy.repeat(draws, 1)
        again[:, i] = clean[0, i] + torch.randn(draws) * deviation[0, i]
        chance = chance_in_top(clean, noisy, deviation, k)[0, i].item()
        frequency = (again.topk(k).indices == i).any(-1).float().mean().item()
        assert abs(frequency - chance) < 5 * math.sqrt(chance * (1 - chance) / draws) + 1e-4
    assert (chance_in_top(clean, noisy, deviation, 6) == 1).all()


def test_huge_negative_noise_is_finite():
    gate = noisy_gate()
    gate.moe_noise_weight.data.fill_(-500.0)
    record = gate.route(torch.rand(TOKENS, HIDDEN), None)
    (record.extras["load"].sum() + record.weights.sum()).backward()
    assert record.extras["load"].isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in (gate.weight, gate.moe_noise_weight))


def test_bfloat16_decides_in_float32():
    gate = noisy_gate(dtype=torch.bfloat16)
    record = gate.route(torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16), seeded())
    assert record.logits.dtype == record.scores.dtype == record.extras["load"].dtype == torch.float32


# --- losses ---


def losses_of(gate, hidden, mask=None):
    context = seeded(mask)
    record = gate.route(hidden, context)
    return gate.aux_losses(record, context.token_mask(len(hidden))), record


def test_losses_equal_the_paper():
    """CV^2 of the importance and of the load: variance over squared mean."""
    losses, record = losses_of(noisy_gate(), torch.randn(TOKENS, HIDDEN))
    assert set(losses) == {"importance", "load"}
    for name, values in (("importance", combine(record)), ("load", record.extras["load"])):
        sums = values.double().sum(0).tolist()
        mean = sum(sums) / EXPERTS
        expected = sum((s - mean) ** 2 for s in sums) / EXPERTS / mean**2
        assert losses[name].item() == pytest.approx(expected, rel=1e-5)


def test_variation_of_known_sums():
    assert squared_variation(torch.ones(3, 5), None) == 0
    one_hot = torch.eye(4)[:1]
    assert squared_variation(one_hot, None).item() == pytest.approx(3.0)  # E - 1 where one expert has it all


def test_padding_does_not_count():
    gate, hidden = noisy_gate(), torch.randn(2, 6, HIDDEN)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    losses, record = losses_of(gate, hidden.flatten(0, 1), mask)
    real = mask.flatten().bool()
    for name, extra in (("importance", "gates"), ("load", "load")):
        torch.testing.assert_close(losses[name], squared_variation(record.extras[extra][real], None))
        assert losses[name] != squared_variation(record.extras[extra], None)


def test_in_evaluation_the_load_counts():
    losses, record = losses_of(noisy_gate().eval(), torch.randn(TOKENS, HIDDEN))
    counts = torch.tensor([sum(i in row for row in chosen(record)) for i in range(EXPERTS)]).float()
    torch.testing.assert_close(losses["load"], counts.var(unbiased=False) / counts.mean() ** 2)


@pytest.mark.parametrize("coefs", [(1.0, 0.0), (0.0, 1.0)], ids=["importance", "load"])
def test_each_loss_balances(coefs):
    """Direction: gradient descent on one loss alone brings an uneven gate near balance."""
    config = NoisyTopKRouterConfig(importance_coef=coefs[0], load_coef=coefs[1])
    gate = noisy_gate(config)
    hidden = torch.randn(256, HIDDEN) + 2 * torch.randn(HIDDEN)
    optimizer = torch.optim.Adam([gate.weight, gate.moe_noise_weight], lr=0.02)
    name = "importance" if coefs[0] else "load"

    def variation():
        return squared_variation(gate.route(hidden, seeded()).extras["gates"], None).item()

    before = variation()
    for _ in range(150):
        optimizer.zero_grad()
        record = gate.route(hidden, None)
        gate.aux_losses(record, None)[name].backward()
        optimizer.step()
    assert variation() < 0.1 * before, (before, variation())


# --- GShard ---


def test_second_expert_is_kept_at_random():
    """With the probability min(1, 2 g_2); the first expert and the weights of what stays are as without."""
    config = NoisyTopKRouterConfig(**GSHARD)
    gate = make_gate(config, num_experts=3, top_k=2, hidden=1).train()
    shares = torch.tensor([0.8, 0.2])
    gate.weight.data[:, 0] = torch.tensor([0.8, 0.2, 0.05]).log()
    record = gate.decide(torch.ones(40_000, 1))
    kept = record.index[:, 1] != 3
    assert abs(kept.float().mean() - 0.4) < 0.0125  # five standard errors
    assert (record.index[:, 0] == 0).all() and (record.index[kept, 1] == 1).all()
    torch.testing.assert_close(record.weights[:, 0], torch.full((40_000,), shares[0].item()))
    torch.testing.assert_close(record.weights[:, 1], torch.where(kept, shares[1], 0.0))
    gate.eval()
    assert (gate.decide(torch.ones(100, 1)).index == torch.tensor([0, 1])).all()


def test_an_even_second_expert_always_stays():
    gate = make_gate(NoisyTopKRouterConfig(**GSHARD), num_experts=2, top_k=2, hidden=1).train()
    gate.weight.data.fill_(1.0)
    assert (gate.decide(torch.ones(5000, 1)).index < 2).all()


# --- in a model ---


def test_losses_enter_the_models_loss():
    model = extend(tiny_model("mixtral"), NoisyTopKRouterConfig(importance_coef=0.5, load_coef=0.25)).train()
    inputs = tiny_inputs("mixtral")
    torch.manual_seed(1)
    with trace_routing(model) as contexts:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    total, named = auxiliary_losses(contexts)
    torch.testing.assert_close(total, 0.5 * named["importance"] + 0.25 * named["load"])
    torch.manual_seed(1)
    for router in iter_routers(model):
        router.moe_config.importance_coef = router.moe_config.load_coef = 0.0
    plain = model(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(loss - plain, total)


def test_zero_experts():
    """The columns of zero-computation experts are chosen and balanced like the others."""
    extension = MoeExtension(router=NoisyTopKRouterConfig(), zero_experts=ZeroExpertsConfig(zero=2))
    model = extend(tiny_model("mixtral"), extension).train()
    inputs = tiny_inputs("mixtral")
    with trace_routing(model) as contexts:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for record, router in zip(contexts[0].records.values(), iter_routers(model), strict=True):
        assert router.moe_noise_weight.shape == (10, 32) and router.moe_noise_weight.grad.abs().sum() > 0
        assert record.extras["gates"].shape == record.extras["load"].shape == (14, 10)
        torch.testing.assert_close(record.extras["gates"].sum(-1), torch.ones(14))
        null = (record.choices >= 8) & (record.choices < 10)
        assert null.any() and (record.index[null] == 8).all() and (record.weights[null] == 0).all()


def test_rows_of_one_policy_draw_apart():
    model = extend(tiny_model("mixtral"), NoisyTopKRouterConfig()).train()
    ids = tiny_inputs("mixtral")["input_ids"]
    with route_rows(model, ["sure", "noisy"], {"sure": {"num_experts_per_tok": 1}}), trace_routing(model) as contexts:
        model(ids)
    for record in contexts[0].records.values():
        used = (record.index < 8).sum(-1).view(2, -1)
        assert (used[0] == 1).all() and (used[1] == 2).all()
        assert record.extras["load"].shape == (14, 8)


# --- messages ---


BAD = [
    ({"num_experts_per_tok": 0}, "`num_experts_per_tok` must be at least 1, got 0"),
    ({"importance_coef": -1.0}, "`importance_coef` must be non-negative"),
    ({"noise": False}, r"`load_coef` \(0.1\) needs `noise=True`"),
    ({"num_experts_per_tok": 13}, "exceeds the 12 experts"),
    ({"second_expert": "random"}, 'needs two experts per token, layer "0" has 3'),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_gate(NoisyTopKRouterConfig(**settings))


@pytest.mark.parametrize(
    ("rule", "message"),
    [(GateRule(groups=(6, 1, "max")), "hold fewer than k=3"), (GateRule(score="custom"), "a rule of its own")],
)
def test_bad_sites(rule, message):
    with pytest.raises(ValueError, match=message):
        make_gate(NoisyTopKRouterConfig(), rule=rule)


# --- the gate of LLaMA-MoE ---


LLAMA_MOE = {"gate": "mlp", "noise_floor": 0.01, "importance_coef": 0.01, "load_coef": 0.01}


def test_the_gate_of_llama_moe():
    """Two layers without biases, and 0.01 on top of the learned deviation; against the slow reference."""
    gate = noisy_gate(NoisyTopKRouterConfig(**LLAMA_MOE))
    bound = EXPERTS**-0.5
    assert gate.moe_mix_weight.shape == (EXPERTS, EXPERTS) and gate.moe_mix_weight.abs().max() <= bound
    hidden = torch.randn(TOKENS, HIDDEN)
    record = gate.route(hidden, seeded())
    clean = torch.stack(
        [gate.moe_mix_weight.double() @ torch.tanh(gate.weight.double() @ token.double()) for token in hidden]
    )
    deviation = torch.log1p(torch.exp(hidden.double() @ gate.moe_noise_weight.double().T)) + 0.01
    noisy = clean + same_noise(clean.shape) * deviation
    torch.testing.assert_close(record.logits.double(), noisy, rtol=1e-4, atol=1e-4)
    best = noisy.topk(K)
    torch.testing.assert_close(record.index, best.indices)
    torch.testing.assert_close(record.weights.double(), best.values.softmax(1), rtol=1e-4, atol=1e-4)
    loads = torch.empty(TOKENS, EXPERTS, dtype=torch.float64)
    for t in range(TOKENS):
        for i in range(EXPERTS):
            others = torch.cat([noisy[t, :i], noisy[t, i + 1 :]]).topk(K).values
            loads[t, i] = torch.special.ndtr((clean[t, i] - others[-1]) / deviation[t, i]).item()
    torch.testing.assert_close(record.extras["load"].double(), loads, rtol=1e-3, atol=1e-4)
    gate.aux_losses(record, None)["load"].backward()
    assert all(p.grad.abs().sum() > 0 for p in (gate.weight, gate.moe_mix_weight, gate.moe_noise_weight))
    gate.eval()
    torch.testing.assert_close(gate.route(hidden, seeded()).logits.double(), clean, rtol=1e-4, atol=1e-4)


def test_the_gate_of_llama_moe_refuses():
    with pytest.raises(ValueError, match=r"`noise_floor` \(0.01\) goes with `noise=True`"):
        NoisyTopKRouterConfig(noise=False, load_coef=0.0, noise_floor=0.01)
    with pytest.raises(ValueError, match="`noise_floor` must be non-negative"):
        NoisyTopKRouterConfig(noise_floor=-0.1)
    with pytest.raises(TypeError, match="`gate` of NoisyTopKRouterConfig must be one of 'linear', 'mlp'"):
        NoisyTopKRouterConfig(gate="deep")
    with pytest.raises(ValueError, match="more than one matrix with a row for each expert"):
        extend(tiny_model("zaya"), MoeExtension(router=NoisyTopKRouterConfig(gate="mlp", score="softmax")))
