"""AdaMoE (2406.13233) against a loop over tokens in float64, its balance loss, and what it is for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_inputs, tiny_model

from hf_moe_ext.kernels import cpu_experts
from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_families import get_family
from hf_moe_ext.modeling.moe_losses import experts_per_token, load_balancing_loss, mixed_balancing_loss
from hf_moe_ext.modeling.moe_router import GateRule, balance_loss, get_router
from hf_moe_ext.modeling.moe_structure import auxiliary_losses, iter_routers, plan_extension, trace_routing
from hf_moe_ext.modeling.router_adamoe import AdaMoERouterConfig
from hf_moe_ext.patching import describe, extend, restore

from .test_zero_experts import EXPERTS, FAMILIES, HIDDEN, ROUNDING, TOKENS, blocks_of, make_gate, set_logits


def slow_adamoe(hidden, weight, null_weight, null_bias, k):
    """(T, n) weights of the true experts, and the picked columns: section 3.2 of the paper, option 2."""
    n, rows, sets = len(weight), [], []
    for x in hidden:
        logits = torch.cat([weight @ x, null_weight @ x + null_bias])
        picked = sorted(range(len(logits)), key=lambda i: -logits[i].item())[:k]  # noqa: B023
        true = [i for i in picked if i < n]
        total = sum(torch.exp(logits[i]) for i in true)
        row = [torch.exp(logits[i]) / total if i in true else torch.zeros((), dtype=torch.float64) for i in range(n)]
        rows.append(torch.stack(row))
        sets.append(picked)
    return torch.stack(rows), sets


def spread(gate):
    """Null rows as wide as the true ones, so that tokens differ in how many they pick."""
    with torch.no_grad():
        gate.moe_zero_weight.normal_()
        gate.moe_zero_bias.normal_()
    return gate


@pytest.mark.parametrize(("null", "k"), [(6, 3), (3, 1), (9, 5), (1, 2), (2, 8)])
def test_routing_and_gradients_equal_reference(null, k):
    gate = spread(make_gate(AdaMoERouterConfig(num_experts_per_tok=k, null_experts=null, null_init="random")))
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    mine = [hidden, gate.weight, gate.moe_zero_weight, gate.moe_zero_bias]
    theirs = [tensor.detach().double().requires_grad_() for tensor in mine]
    record = gate.decide(hidden)
    expected, sets = slow_adamoe(*theirs, k)
    assert record.chosen.tolist() == sets
    dense = record.weights.new_zeros(TOKENS, EXPERTS + 1).scatter_add(1, record.index, record.weights)[:, :-1]
    torch.testing.assert_close(dense.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(dense)
    (dense * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad.double(), two.grad, rtol=1e-4, atol=1e-5)


# --- starts ---


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe"])
def test_without_null_experts_it_is_the_stock_gate(name):
    model, inputs = tiny_model(name), tiny_inputs(name)
    with torch.no_grad():
        expected = model(**inputs).logits
        extend(model, AdaMoERouterConfig(null_experts=0))
        torch.testing.assert_close(model(**inputs).logits, expected, **ROUNDING)
    assert all("moe_zero_weight" not in router._parameters for router in iter_routers(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_identity_config_equals_stock(name):
    """Families that do not renormalise, too: a held null expert has no probability."""
    model, inputs = tiny_model(name), tiny_inputs(name)
    plans = plan_extension(model, get_family(name), MoeExtension(router="top_k"), building=False).layers
    config = get_router("adamoe").identity_config(plans[0].site)
    with torch.no_grad():
        expected = model(**inputs)[0]
        extend(model, config)
        with trace_routing(model) as contexts:
            torch.testing.assert_close(model(**inputs)[0], expected, **ROUNDING)
        for context in contexts:
            for record in context.records.values():
                assert record.index.shape[1] == plans[0].site.top_k + 1
                assert ((record.index == record.num_experts).sum(dim=-1) == 1).all()
        restore(model)
        assert torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_identity_start_generates_the_same(name):
    model, inputs = tiny_model(name), tiny_inputs(name)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    extend(model, AdaMoERouterConfig(null_experts=3, null_init="identity"))
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_copied_rows_are_the_start_of_the_paper():
    gate = make_gate(AdaMoERouterConfig(null_experts=9))
    assert torch.equal(gate.moe_zero_weight, gate.weight[torch.arange(9) % EXPERTS])
    assert gate.num_slots(gate.moe_config, gate.moe_site) == 3


# --- tokens without a true expert, weights ---


def test_token_with_null_experts_alone_gets_nothing():
    """The block gives exactly 0, and a loss through it has finite gradients."""
    model = extend(tiny_model("mixtral"), AdaMoERouterConfig(null_experts=4, num_experts_per_tok=2))
    block, _, router = next(blocks_of(model))
    with torch.no_grad():
        router.moe_zero_bias.fill_(100.0)
    hidden = torch.randn(1, 64, 32)
    assert (block(hidden) == 0).all()
    with torch.no_grad():
        router.moe_zero_weight.normal_()
        router.moe_zero_bias.fill_(1.0)
    record = router.decide(hidden[0])
    used = (record.index < 8).sum(dim=-1)
    assert used.min() == 0 and used.max() > 0
    model.train()
    inputs = tiny_inputs("mixtral")
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_weights_sum_to_one_and_do_not_see_null_logits():
    gate = spread(make_gate(AdaMoERouterConfig(null_experts=4, num_experts_per_tok=3, null_init="random")))
    hidden = torch.randn(200, HIDDEN)
    record = gate.decide(hidden)
    used = (record.index < EXPERTS).any(dim=-1)
    assert 0 < used.sum() < 200
    torch.testing.assert_close(record.weights.sum(dim=-1), used.float())
    # The null logit moves as far as the set allows: below the second true one it would not be picked first.
    gate.moe_zero_bias.data.zero_()
    for null in (1.1, 2.5, 40.0):
        found = gate.decide(set_logits(gate, [3.0, 2.0, 1.0, 0.0, 0.0, 0.0, null, -1.0, -2.0, -1.0]))
        weights = dict(zip(found.index[0].tolist(), found.weights[0].tolist(), strict=True))
        assert weights == pytest.approx({0: 0.7310586, 1: 0.2689414, EXPERTS: 0.0}, abs=1e-6)


def test_families_keep_their_rule_on_true_picks():
    """Without renormalisation, a weight stays the probability over all columns; with a sigmoid, the score."""
    for rule in (GateRule(renormalize=False, scale=2.0), GateRule(score="sigmoid", renormalize=True)):
        config = AdaMoERouterConfig(null_experts=4, num_experts_per_tok=3, null_init="random")
        gate = spread(make_gate(config, rule=rule))
        record = gate.decide(torch.randn(TOKENS, HIDDEN))
        for t in range(TOKENS):
            scores = record.logits[t].softmax(-1) if rule.score == "softmax" else record.logits[t].sigmoid()
            true = [i for i in record.chosen[t].tolist() if i < EXPERTS]
            total = 1.0 if rule.score == "softmax" else sum(scores[i] for i in true)
            expected = [rule.scale * scores[i] / total if i < EXPERTS else 0 * scores[i] for i in record.chosen[t]]
            torch.testing.assert_close(record.weights[t], torch.stack(expected))


# --- the balance loss ---


def test_grouped_and_plain_loss():
    """One null expert: the same. More: they differ, unless the loads of the null experts are equal."""
    scores = torch.randn(50, 9).softmax(-1)
    index = scores.topk(3).indices
    plain = load_balancing_loss(scores, index)
    torch.testing.assert_close(mixed_balancing_loss(scores, index, 8, 1, grouped=True), plain)
    assert (mixed_balancing_loss(scores, index, 5, 4, grouped=True) - plain).abs() > 1e-3
    even = torch.stack([torch.tensor([t % 5, 5 + t % 4, 5 + (t + 1) % 4]) for t in range(20)])
    torch.testing.assert_close(
        mixed_balancing_loss(scores[:20], even, 5, 4, grouped=True), load_balancing_loss(scores[:20], even)
    )


def test_loss_at_perfect_balance_is_k():
    uniform = torch.full((8, 8), 1 / 8)
    index = torch.stack([(torch.arange(3) + t) % 8 for t in range(8)])
    torch.testing.assert_close(mixed_balancing_loss(uniform, index, 5, 3, grouped=True), torch.tensor(3.0))


def optimise_balance(config, zero, tokens=4000, steps=400):
    """Train a gate by its balance loss alone; the loads of all columns after it."""
    gate = make_gate(config, zero)
    with torch.no_grad():
        gate.moe_zero_bias.normal_()
        gate.moe_zero_weight.normal_()
    hidden = torch.randn(tokens, HIDDEN)
    parameters = [gate.weight, gate.moe_zero_weight, gate.moe_zero_bias]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / steps)
        optimizer.zero_grad()
        balance_loss(gate.decide(hidden), None).backward()
        optimizer.step()
    record = gate.decide(hidden)
    loads = torch.stack(
        [(record.chosen == column).any(dim=-1).float().mean() for column in range(EXPERTS + zero.zero)]
    )
    return loads, float(experts_per_token(record.index, EXPERTS))


def test_loss_alone_sets_the_load():
    """n = 6, m = 6, k = 3: 3 * 6 / 12 = 1.5 true experts per token. The plain loss also evens out the null experts."""
    config = AdaMoERouterConfig(num_experts_per_tok=3)
    spreads = {}
    for balance in ("grouped", "individual"):
        loads, used = optimise_balance(config, ZeroExpertsConfig(zero=EXPERTS, balance=balance))
        assert used == pytest.approx(1.5, rel=0.01)
        assert float(loads[EXPERTS:].mean()) == pytest.approx(0.25, rel=0.02)
        spreads[balance] = float(loads[EXPERTS:].std())
        print(balance, used, loads.tolist())
    assert spreads["individual"] < 0.02 and spreads["grouped"] > 0.05


def test_balance_weight_over_training():
    gate = make_gate(AdaMoERouterConfig(balance_coef=0.02, balance_coef_end=1e-4))

    def found(step, total=10):
        gate.schedule(step, total)
        return round(float(gate.decide(torch.randn(3, HIDDEN)).coefs["balance"]), 6)

    assert [found(step) for step in (0, 4, 5, 10)] == [0.02, 0.02, 1e-4, 1e-4]
    gate.moe_config = AdaMoERouterConfig(balance_steps=3)
    assert [found(step) for step in (2, 3, 10)] == [0.02, 1e-4, 1e-4]
    gate.moe_config = AdaMoERouterConfig(balance_schedule="linear", balance_coef=1.0, balance_coef_end=0.0)
    assert [found(step) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]
    assert AdaMoERouterConfig(balance_coef=0.0, balance_coef_end=0.5).loss_coefs["balance"] == 0.5
    assert gate.schedule_steps is None
    gate.moe_config = AdaMoERouterConfig(balance_steps=30, null_init="identity", null_warmup_steps=20)
    assert gate.schedule_steps == 30


def test_scheduled_weight_reaches_the_total():
    model, inputs = extend(tiny_model("mixtral"), AdaMoERouterConfig(null_experts=4)), tiny_inputs("mixtral")
    for step, weight in ((0, 0.02), (9, 1e-4)):
        for router in iter_routers(model):
            router.schedule(step, 10)
        with trace_routing(model) as contexts:
            model(**inputs)
        total, losses = auxiliary_losses(contexts)
        torch.testing.assert_close(total, weight * losses["balance"])
        mask = contexts[0].token_mask(14)
        expected = [
            mixed_balancing_loss(record.scores, record.chosen, 8, 4, grouped=True, mask=mask)
            for record in contexts[0].records.values()
        ]
        torch.testing.assert_close(losses["balance"], torch.stack(expected).mean())


# --- compute, implementations ---


def test_compute_is_that_of_the_true_picks(monkeypatch):
    """The experts multiply one row for each pick of a true expert, and no other."""
    model, inputs = extend(tiny_model("mixtral"), AdaMoERouterConfig(null_experts=8)), tiny_inputs("mixtral")
    rows, activate = [], cpu_experts._activate
    monkeypatch.setattr(
        cpu_experts, "_activate", lambda x, *args, **kw: rows.append(len(x)) or activate(x, *args, **kw)
    )
    with trace_routing(model) as contexts, torch.no_grad():
        model(**inputs)
    records = contexts[0].records.values()
    picks = sum(int((record.index != record.num_experts).sum()) for record in records)
    used = sum(float(experts_per_token(record.index, 8)) * len(record.index) for record in records)
    assert sum(rows) == picks == round(used) < sum(record.index.numel() for record in records)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_implementations_agree(implementation):
    model, inputs = extend(tiny_model("mixtral"), AdaMoERouterConfig(null_experts=8)), tiny_inputs("mixtral")
    results = []
    for name in ("moe_ext", implementation):
        model.set_experts_implementation(name)
        model.zero_grad()
        out = model(**inputs, labels=inputs["input_ids"])
        out.loss.backward()
        results.append((out.logits.detach(), {key: p.grad.clone() for key, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], **ROUNDING)
    for key, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], gradient, rtol=1e-4, atol=1e-5, msg=key)


def test_hard_tokens_use_more_experts():
    """Two kinds of tokens: the output for one should be 0, for the other a sum of two functions out of four."""
    for seed in (0, 1):
        model = extend(tiny_model("mixtral"), AdaMoERouterConfig(null_experts=8, num_experts_per_tok=3))
        torch.manual_seed(seed)
        block, _, router = next(blocks_of(model))
        hidden, hard = torch.randn(512, 32), torch.arange(512) < 256
        hidden[:, 0] = torch.where(hard, 2.0, -2.0)
        parts = [(2 * hidden @ torch.randn(32, 32) / 4).sin() for _ in range(4)]
        target = torch.where(hidden[:, 1:2] > 0, parts[0], parts[1])
        target = target + torch.where(hidden[:, 2:3] > 0, parts[2], parts[3])
        target = target.masked_fill(~hard[:, None], 0)
        optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
        more = []  # true picks of a hard token beyond those of an easy one, before and after
        for step in range(201):
            router.schedule(step, 200)
            record = router.decide(hidden)
            if step in (0, 200):
                used = (record.index < 8).sum(dim=-1).float()
                more.append(float(used[hard].mean() - used[~hard].mean()))
            optimizer.zero_grad()
            loss = F.mse_loss(block(hidden[None])[0], target)
            (loss + record.coefs["balance"] * balance_loss(record, None)).backward()
            optimizer.step()
        print(f"hard tokens use {more[0]:+.3f} experts more at the start, {more[1]:+.3f} at the end; loss {loss:.4f}")
        assert more[1] > more[0] + 0.15


# --- declaration ---


def test_bad_input_is_named():
    for options, match in (
        ({"null_experts": -1}, "`null_experts` must be non-negative, got -1"),
        ({"balance_coef_end": -1.0}, "`balance_coef_end` must be non-negative"),
        ({"balance_steps": 0}, "`balance_steps` must be at least 1, got 0"),
        ({"null_warmup_steps": 3}, 'goes with `null_init="identity"`'),
    ):
        with pytest.raises(ValueError, match=match):
            AdaMoERouterConfig(**options)
    model = tiny_model("mixtral")
    declared = MoeExtension(router=AdaMoERouterConfig(null_experts=3), zero_experts=ZeroExpertsConfig(zero=2))
    with pytest.raises(ValueError, match="contradict each other"):
        extend(model, declared)
    for settings, declared in (
        ({"null_init": "identity"}, {"init": "copy"}),
        ({"null_init": "identity", "null_warmup_steps": 3}, {"init": "identity", "warmup_steps": 4}),
    ):
        declared = MoeExtension(
            router=AdaMoERouterConfig(**settings), zero_experts=ZeroExpertsConfig(zero=2, **declared)
        )
        with pytest.raises(ValueError, match=f"`{list(settings)[-1]}`.*contradict each other"):
            extend(model, declared)
    with pytest.raises(ValueError, match="a rule of its own"):
        extend(tiny_model("phimoe"), AdaMoERouterConfig(null_init="random"))
    with pytest.raises(ValueError, match="exceeds the 8 experts and 2 zero"):
        extend(model, AdaMoERouterConfig(null_experts=2, num_experts_per_tok=11))
    with pytest.raises(ValueError, match="fills the 2 slots"):
        extend(model, AdaMoERouterConfig(null_experts=1, num_experts_per_tok=4, null_init="identity"))
    with pytest.raises(NotImplementedError, match="a rule of its own"):
        plan = plan_extension(
            tiny_model("phimoe"), get_family("phimoe"), MoeExtension(router="top_k"), building=False
        ).layers[0]
        get_router("adamoe").identity_config(plan.site)


def test_declared_zero_experts_take_the_place_of_the_default():
    """Copies in place of null experts: the variant that the paper names and does not try."""
    model = tiny_model("mixtral")
    extend(model, MoeExtension(router=AdaMoERouterConfig(), zero_experts=ZeroExpertsConfig(copy=4)))
    with trace_routing(model) as contexts:
        model(**tiny_inputs("mixtral"))
    record = next(iter(contexts[0].records.values()))
    assert record.index.shape[1] == 3 and (record.index > 8).any()
    assert describe(model).layers[0].num_experts_per_tok == 3


def test_copy_of_a_model_is_its_own():
    model = extend(tiny_model("mixtral"), AdaMoERouterConfig())
    twin = copy.deepcopy(model)
    for router in iter_routers(model):
        router.moe_zero_weight.data.zero_()
    assert all((router.moe_zero_weight != 0).any() for router in iter_routers(twin))
