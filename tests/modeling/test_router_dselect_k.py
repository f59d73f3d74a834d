"""DSelect-k against a loop over tokens, selectors, numbers and digits, in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_permutation import MIN_WEIGHT
from hf_moe_ext.modeling.moe_router import GateRule
from hf_moe_ext.modeling.moe_structure import iter_routers, route_rows, trace_routing
from hf_moe_ext.modeling.router_dselect_k import DSelectKRouter, DSelectKRouterConfig, code_probabilities
from hf_moe_ext.patching import extend

from .test_router_comet import own_parameters, slow_step, spread
from .test_routers import EXPERTS, HIDDEN, TOKENS, chosen, combine, make_gate


def slow_selectors(token, own, width, num_experts):
    """r: for every selector, the probability of each number below `num_experts`."""
    found = []
    for weight, bias in zip(own["code_weight"], own["code_bias"], strict=True):
        digits = [slow_step(row @ token + offset, width) for row, offset in zip(weight, bias, strict=True)]
        numbers = []
        for number in range(num_experts):
            product = torch.ones((), dtype=torch.float64)
            for place, digit in enumerate(digits):
                product = product * (digit if number >> place & 1 else 1 - digit)
            numbers.append(product)
        found.append(numbers)
    return found


def slow_dselect(hidden, own, *, width, num_experts, slots=None, matrices=None):
    """(T, E) weights with gradients, and the unweighted losses of each token."""
    rows, entropies, leaks = [], [], []
    for token in hidden:
        selectors = slow_selectors(token, own, width, num_experts)
        odds = [torch.exp(w @ token + b) for w, b in zip(own["selector_weight"], own["selector_bias"], strict=True)]
        experts = [torch.zeros((), dtype=torch.float64)] * num_experts
        for i, numbers in enumerate(selectors):
            for a, probability in enumerate(numbers):
                for b in range(num_experts):
                    there = float(a == b) if matrices is None else matrices[i % len(matrices)][a][b]
                    experts[b] = experts[b] + odds[i] / sum(odds) * probability * there
        best = sorted(range(num_experts), key=lambda j: -experts[j].item())[: slots or num_experts]  # noqa: B023
        best = [j for j in best if experts[j] >= MIN_WEIGHT]
        zero, all_of_it = torch.zeros((), dtype=torch.float64), sum(experts)
        kept = sum(experts[j] for j in best)
        row = [experts[j] * all_of_it / kept if j in best else zero for j in range(num_experts)]
        rows.append(torch.stack(row))
        entropies.append(sum(-r * torch.log(r) for numbers in selectors for r in numbers if r > 0) + zero)
        leaks.append(sum(1 / (1e-6 + sum(numbers)) for numbers in selectors))
    return torch.stack(rows), torch.stack(entropies), torch.stack(leaks)


def selectors(num_experts=EXPERTS, k=3, factor=2.0, **options):
    return spread(make_gate(DSelectKRouterConfig(num_experts_per_tok=k, **options), num_experts=num_experts), factor)


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_numbers_from_digits(digits):
    given = torch.rand(6, digits, dtype=torch.float64)
    found = code_probabilities(given)
    assert found.shape == (6, 2**digits)
    torch.testing.assert_close(found.sum(-1), torch.ones(6, dtype=torch.float64))
    for number in range(2**digits):
        product = torch.ones(6, dtype=torch.float64)
        for place in range(digits):
            product = product * (given[:, place] if number >> place & 1 else 1 - given[:, place])
        torch.testing.assert_close(found[:, number], product)


CASES = {
    "paper": {},
    "one_selector": {"k": 1},
    "wide": {"smooth_step_width": 10.0},
    "narrow": {"smooth_step_width": 0.1},
    "two": {"num_experts": 2, "k": 1},
    "uneven": {"num_experts": 5},
    "power_of_two": {"num_experts": 8, "k": 4},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_reference(case, training):
    """Weights, both losses, and the gradients of input and all parameters."""
    gate = selectors(**case).train(training)
    config, size = gate.moe_config, gate.moe_site.num_experts
    hidden = torch.randn(TOKENS, HIDDEN)
    slow_hidden, slow_own = hidden.double().requires_grad_(), own_parameters(gate)
    hidden.requires_grad_()
    record = gate.decide(hidden)
    expected, entropies, leaks = slow_dselect(
        slow_hidden,
        slow_own,
        width=config.smooth_step_width,
        num_experts=size,
        slots=None if training else config.num_experts_per_tok,
    )
    weights = combine(record)
    assert [set(row) for row in chosen(record)] == [set(row.nonzero().flatten().tolist()) for row in expected]
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(record.logits, record.scores.clamp_min(1e-30).log())
    mask = torch.arange(TOKENS) % 3 != 0
    losses = DSelectKRouter.aux_losses(record, mask)
    slow_losses = {"code_entropy": entropies[mask].mean()}
    if size not in (2, 8):
        slow_losses["leak"] = leaks[mask].mean()
    assert losses.keys() == slow_losses.keys()
    for name, loss in slow_losses.items():
        torch.testing.assert_close(losses[name].double(), loss, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(weights)
    ((weights * upstream).sum() + sum(losses.values())).backward()
    ((expected * upstream.double()).sum() + sum(slow_losses.values())).backward()
    torch.testing.assert_close(hidden.grad.double(), slow_hidden.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in slow_own.items():
        mine = gate.get_parameter(f"moe_{name}").grad
        torch.testing.assert_close(mine.double(), parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_experts", [2, 4, 8, 16])
def test_nothing_leaks_with_a_power_of_two(num_experts):
    gate = selectors(num_experts, k=2).train()
    record = gate.decide(torch.randn(200, HIDDEN))
    torch.testing.assert_close(record.weights.sum(-1), torch.ones(200))
    assert "leak" not in record.extras


@pytest.mark.parametrize("num_experts", [3, 5, 6, 12])
def test_leak_term_without_a_leak(num_experts):
    """Selectors that are sure of numbers below n: the sum over k selectors and T tokens is k T."""
    gate = selectors(num_experts, k=3)
    with torch.no_grad():
        gate.moe_code_weight.zero_()
        number = torch.tensor([0, 1, num_experts - 1])
        digits = number[:, None] >> torch.arange(gate.moe_code_bias.shape[-1]) & 1
        gate.moe_code_bias.copy_(digits * 2.0 - 1)
    record = gate.decide(torch.randn(TOKENS, HIDDEN))
    leak = DSelectKRouter.aux_losses(record, None)["leak"]
    torch.testing.assert_close(leak.double() * TOKENS, torch.tensor(3.0 * TOKENS).double(), rtol=2e-6, atol=0)
    torch.testing.assert_close(record.weights.sum(-1), torch.ones(TOKENS))
    assert {i for row in chosen(record) for i in row} == set(number.tolist())


def test_all_leaked():
    """A token whose selectors all name a number without an expert gets nothing, and no NaN."""
    gate = selectors(5, k=2).train()
    with torch.no_grad():
        gate.moe_code_weight.zero_()
        gate.moe_code_bias.fill_(1.0)  # seven
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    record = gate.decide(hidden)
    assert (record.weights == 0).all() and (record.index == 5).all()
    torch.testing.assert_close(record.scores, torch.full((TOKENS, 5), 0.2))
    loss = record.weights.sum() + sum(DSelectKRouter.aux_losses(record, None).values())
    loss.backward()
    assert loss > 1e6 and hidden.grad.isfinite().all()


def test_leak_loss_pulls_selectors_back():
    torch.manual_seed(0)
    gate = selectors(5, k=2, factor=1.0, code_entropy_coef=0.0).train()
    with torch.no_grad():
        gate.moe_code_bias.fill_(0.2)
    hidden = torch.randn(256, HIDDEN)
    before = gate.decide(hidden).weights.sum(-1).mean()
    optimizer = torch.optim.Adam([p for p in gate.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        DSelectKRouter.aux_losses(gate.decide(hidden), None)["leak"].backward()
        optimizer.step()
    assert before < 0.4 and gate.decide(hidden).weights.sum(-1).mean() > 0.8


@pytest.mark.parametrize("k", [1, 2, 4])
def test_sharp_digits_leave_k_experts(k):
    gate = selectors(8, k=k, factor=1e5).train()
    hidden = torch.randn(300, HIDDEN)
    digits = torch.einsum("th,ibh->tib", hidden, gate.moe_code_weight) + gate.moe_code_bias
    sharp = (digits.abs() >= 0.5).flatten(1).all(-1)
    used = (gate.decide(hidden).scores > 1e-15).sum(-1)[sharp]
    assert sharp.float().mean() > 0.9 and used.max() <= k


def test_start():
    gate = make_gate(DSelectKRouterConfig(smooth_step_width=0.5), num_experts=12, hidden=3072)
    assert gate.moe_code_weight.shape == (3, 4, 3072)
    assert 0.0024 < gate.moe_code_weight.abs().max() <= 0.0025  # a hundredth of the width, halved
    assert gate.moe_code_bias.abs().max() <= 0.005 and gate.moe_code_bias.abs().sum() > 0
    assert 0.049 < gate.moe_selector_weight.abs().max() <= 0.05 and gate.moe_selector_bias.abs().max() <= 0.05
    assert gate.moe_selector_bias.abs().sum() > 0
    assert not gate.weight.requires_grad  # the stock gate is not used, and must not decay
    record = gate.train().decide(torch.randn(TOKENS, 3072))
    assert (record.index < 12).all()  # every expert has a weight at first


def test_scale_of_the_family():
    gate = make_gate(DSelectKRouterConfig(), num_experts=8, rule=GateRule(scale=2.5))
    torch.testing.assert_close(gate.decide(torch.randn(TOKENS, HIDDEN)).weights.sum(-1), torch.full((TOKENS,), 2.5))


def test_zero_computation_experts():
    zero = ZeroExpertsConfig(zero=2)
    model = extend(tiny_model("mixtral"), MoeExtension(router=DSelectKRouterConfig(), zero_experts=zero)).train()
    inputs = tiny_inputs("mixtral")
    with trace_routing(model) as contexts:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for record in contexts[0].records.values():
        assert record.scores.shape[-1] == 10 and (record.chosen >= 8).any() and record.index.max() == 8
        assert "leak" in record.extras  # ten choices


def test_row_policies():
    config = DSelectKRouterConfig(num_experts_per_tok=3)
    model = extend(tiny_model("mixtral"), MoeExtension(router=config)).eval()
    policies = {"b": {"num_experts_per_tok": 1}}
    with torch.no_grad(), trace_routing(model) as contexts, route_rows(model, ["a", "b"], policies):
        model(**tiny_inputs("mixtral"))
    for record in contexts[0].records.values():
        used = (record.index < 8).sum(-1).view(2, -1)
        assert (used[0] == 3).all() and (used[1] == 1).all()


BAD = {
    "z": ({"z_coef": 0.1}, "`z_coef` must be 0 for the `dselect_k` router, got 0.1"),
    "k": ({"num_experts_per_tok": 0}, "`num_experts_per_tok` must be at least 1, got 0"),
    "width": ({"smooth_step_width": -1.0}, "`smooth_step_width` must be positive, got -1.0"),
    "entropy": ({"code_entropy_coef": -1.0}, "`code_entropy_coef` must be non-negative"),
    "leak": ({"leak_coef": -1.0}, "`leak_coef` must be non-negative"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DSelectKRouterConfig(**settings)


def test_refuses_sites():
    with pytest.raises(ValueError, match="exceeds the 4 experts"):
        make_gate(DSelectKRouterConfig(num_experts_per_tok=5), num_experts=4)


def test_no_identity():
    gate = selectors()
    with pytest.raises(NotImplementedError, match="binary digits"):
        type(gate).identity_config(gate.moe_site)
    assert {g.moe_config.type for g in iter_routers(gate)} == {"dselect_k"}
