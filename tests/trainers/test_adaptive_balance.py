"""The weight of the balance loss that follows the load, against a loop over tokens; logits of one size."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_model

from hf_moe_ext import CapacityConfig, MoeExtension, TopKRouterConfig, extend, trace_routing
from hf_moe_ext.modeling.moe_structure import auxiliary_losses, iter_routers
from hf_moe_ext.modeling.router_top_k import normalize_logits
from hf_moe_ext.trainers.adaptive_balance import AdaptiveBalance

from .common import NUM_EXPERTS, NUM_LAYERS, arguments, logged, rows, stock_mixtral, tiny_moe, train


DATA = rows([9, 5, 7, 3, 9, 9, 2, 8])
ROUTER = TopKRouterConfig(balance_coef=0.1)


def slow_drop_rate(records, factor):
    """Of one step: pair by pair, what finds its expert full. `records` are (index, mask) of each forward."""
    dropped = assigned = 0.0
    for index, mask in records:
        pairs = [expert for row, real in zip(index.tolist(), mask.tolist(), strict=True) if real for expert in row]
        places = {expert: factor * len(pairs) / NUM_EXPERTS for expert in range(NUM_EXPERTS)}
        for expert in pairs:
            taken = min(places[expert], 1.0)  # the last place may be a part of one
            places[expert] -= taken
            dropped += 1 - taken
        assigned += len(pairs)
    return dropped / assigned


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_weights_follow_the_recursion(tmp_path, factor):
    """Two forwards a step, padding left out, layer by layer; the first step has the weight of the config."""
    seen, used = [], []
    original, step = AdaptiveBalance.update, AdaptiveBalance.step

    def spy(self, contexts):
        used.append(self.coefs)
        for context in contexts:
            for key, record in context.records.items():
                seen.append((key, record.index.clone(), context.token_mask(len(record.index)).clone()))
        original(self, contexts)

    weights, expected = [], {str(layer): 0.01 for layer in range(NUM_LAYERS)}

    def spy_step(self, reduce):
        step(self, reduce)
        for key in expected:
            rate = slow_drop_rate([(index, mask) for k, index, mask in seen if k == key], factor)
            assert rate > 0
            expected[key] = 0.99 * expected[key] + 0.01 * min(0.02 * rate, 0.01)
        seen.clear()
        weights.append((self.coefs, dict(expected)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptiveBalance, "update", spy)
        patch.setattr(AdaptiveBalance, "step", spy_step)
        options = {"adaptive_balance": 0.02, "adaptive_balance_capacity": factor}
        model = tiny_moe(TopKRouterConfig(balance_coef=0.01))
        trainer = train(model, DATA, tmp_path, max_steps=3, gradient_accumulation_steps=2, **options)
    assert len(weights) == 3 and used[0] == used[1] == {key: pytest.approx(0.01) for key in expected}
    for found, wanted in weights:
        assert found == {key: pytest.approx(value, rel=1e-5) for key, value in wanted.items()}
    assert used[2] == weights[0][0] and used[0] != used[2]
    assert len({round(value, 9) for value in weights[-1][0].values()}) == NUM_LAYERS  # each layer has its own
    means = [sum(found.values()) / NUM_LAYERS for found, _ in weights]
    assert logged(trainer, "moe/balance_coef") == pytest.approx(means)
    assert all(router.moe_coefs is None for router in iter_routers(model))  # the config counts again


def test_the_loss_has_the_weights_of_its_layers():
    model = tiny_moe(ROUTER).train()
    ids = DATA[0]["input_ids"][None]
    balance = AdaptiveBalance(iter_routers(model), 0.2, 1.0)
    balance.begin({"0": 0.5, "1": 0.03})
    with trace_routing(model) as contexts:
        model(input_ids=ids, labels=ids)
    total, named = auxiliary_losses(contexts)
    single = []
    for key, value in (("0", 0.5), ("1", 0.03)):
        record = contexts[0].records[key]
        single.append(value * type(next(iter_routers(model))).aux_losses(record, contexts[0].token_mask(9))["balance"])
    torch.testing.assert_close(total, sum(single) / 2)
    assert total.dtype == torch.float32
    balance.end()
    with trace_routing(model) as contexts:
        model(input_ids=ids, labels=ids)
    total, named = auxiliary_losses(contexts)
    torch.testing.assert_close(total, 0.1 * named["balance"])


def test_limits():
    """Nothing above capacity: the weight decays. All on one expert: the rate is 1 - 1/E, and its effect is bounded."""
    model = tiny_moe(TopKRouterConfig(num_experts_per_tok=1, balance_coef=0.1)).train()
    ids = DATA[0]["input_ids"][None]
    for factor, rate, wanted in (
        (NUM_EXPERTS, 5.0, 0.0),
        (1.0, 0.001, 0.001 * (1 - 1 / NUM_EXPERTS)),
        (1.0, 9.0, 0.01),
    ):
        for router in iter_routers(model):  # logits 0, 1, 2, ... for every token, whatever it is
            router.router_logits = lambda hidden: torch.arange(float(NUM_EXPERTS)).expand(len(hidden), -1)
        balance = AdaptiveBalance(iter_routers(model), rate, factor)
        balance.begin({})
        with trace_routing(model) as contexts:
            model(input_ids=ids)
        balance.update(contexts)
        balance.step(lambda tensor: tensor)
        for value in balance.coefs.values():
            assert value == pytest.approx(0.99 * 0.1 + 0.01 * wanted, rel=1e-5)
        balance.step(lambda tensor: tensor)  # a step without tokens
        for value in balance.coefs.values():
            assert value == pytest.approx(0.99 * (0.99 * 0.1 + 0.01 * wanted), rel=1e-5)


def test_a_capacity_that_drops_is_the_one_that_counts():
    model = extend(
        stock_mixtral(), MoeExtension(router=ROUTER, capacity=CapacityConfig(factor=0.5, minimum=0))
    ).train()
    ids = DATA[0]["input_ids"][None]
    balance = AdaptiveBalance(iter_routers(model), 0.001, 1e9)
    balance.begin({})
    with trace_routing(model) as contexts:
        model(input_ids=ids)
    balance.update(contexts)
    balance.step(lambda tensor: tensor)
    for key, record in contexts[0].records.items():
        rate = float((record.index == NUM_EXPERTS).float().mean())
        assert rate > 0.3 and balance.coefs[key] == pytest.approx(0.099 + 0.01 * 0.001 * rate, rel=1e-6)


def test_bad_input(tmp_path):
    for options, text in (
        ({"adaptive_balance": 0.0}, "`adaptive_balance` must be positive, got 0.0"),
        ({"adaptive_balance": 0.1, "adaptive_balance_capacity": -1.0}, "`adaptive_balance_capacity` must be positive"),
    ):
        with pytest.raises(ValueError, match=text):
            arguments(tmp_path, **options)
    with pytest.raises(ValueError, match="no router of this model has one; declare `balance_coef`"):
        train(tiny_moe(TopKRouterConfig()), DATA, tmp_path, adaptive_balance=0.2)


# --- logits of one size ---


def test_normalized_logits_against_a_loop():
    logits, upstream = torch.randn(7, 5) * 3 + 2, torch.randn(7, 5)
    mine, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    rows = []
    for row in theirs:
        mean = sum(row) / 5
        deviation = (sum((value - mean) ** 2 for value in row) / 5) ** 0.5
        rows.append(torch.stack([1.7 * (value - mean) / deviation for value in row]))
    expected, found = torch.stack(rows), normalize_logits(mine, 1.7)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


def test_the_gate_is_as_sure_as_declared_whatever_its_size():
    """Skywork: deviation lambda for each token; the same for shifted and scaled logits; zeros for equal ones."""
    logits = torch.randn(9, 6)
    torch.testing.assert_close(normalize_logits(logits, 0.5).std(dim=1, correction=0), torch.full((9,), 0.5))
    for other in (logits + 40, 1e-3 * logits, 200 * logits, 7 * logits - torch.arange(9.0)[:, None]):
        torch.testing.assert_close(normalize_logits(other, 0.5), normalize_logits(logits, 0.5), rtol=1e-4, atol=1e-5)
    flat = torch.full((2, 6), 3.0, requires_grad=True)
    normalize_logits(flat, 1.0).sum().backward()
    assert (normalize_logits(flat, 1.0) == 0).all() and flat.grad.isfinite().all()
    assert normalize_logits(logits.bfloat16(), 1.0).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_routing_by_normalized_logits(name):
    """Weights of the family's rule on them, on a gate of any size."""
    model = extend(copy.deepcopy(tiny_model(name)), MoeExtension(router=TopKRouterConfig(logit_std=1.0)))
    ids = torch.randint(4, 60, (2, 6))
    before = model(ids).logits
    router = next(iter_routers(model))
    hidden = torch.randn(5, 32)
    record = router.decide(hidden)
    logits = hidden.double() @ router.weight.double().T
    logits = (logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(record.logits.double(), logits, rtol=1e-4, atol=1e-5)
    if name == "mixtral":
        best = logits.softmax(1).topk(2)
        assert torch.equal(record.index, best.indices)
        weights = best.values / best.values.sum(1, keepdim=True)
        torch.testing.assert_close(record.weights.double(), weights, rtol=1e-4, atol=1e-5)
    for each in iter_routers(model):
        each.weight.mul_(30)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)


def test_normalized_logits_refuse():
    for options, text in (
        ({"logit_std": 0.0}, "`logit_std` must be positive, got 0.0"),
        ({"logit_std": 1.0, "temperature": 2.0}, r"`temperature` \(2.0\) has no effect under `logit_std`"),
    ):
        with pytest.raises(ValueError, match=text):
            TopKRouterConfig(**options)
    for parts in ({"zero_experts": {"zero": 1}}, {}):
        router = TopKRouterConfig(logit_std=1.0, removed_experts=0 if parts else 2, score="softmax", renormalize=False)
        with pytest.raises(ValueError, match="takes mean and deviation over the experts"):
            extend(stock_mixtral(), MoeExtension.from_dict({"router": router.to_dict(), **parts}))
