"""MoE++ (2410.07348) against a loop over tokens in float64: gate, residual from layer to layer, losses, capacity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from hf_moe_ext.modeling.configuration_moe_ext import LayerExtension, MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_context import RoutingContext
from hf_moe_ext.modeling.moe_families import get_family
from hf_moe_ext.modeling.moe_losses import experts_per_token
from hf_moe_ext.modeling.moe_router import GateRule, RouterSite, get_router
from hf_moe_ext.modeling.moe_structure import (
    auxiliary_losses,
    iter_routers,
    plan_extension,
    route_rows,
    trace_routing,
)
from hf_moe_ext.modeling.router_moe_plus_plus import CARRY, MoEPlusPlusRouterConfig, expert_capacities
from hf_moe_ext.patching import extend, restore

from .test_zero_experts import (
    EXPERTS,
    FAMILIES,
    HIDDEN,
    ROUNDING,
    blocks_of,
    make_gate,
    needs_switch,
    slow_mixed,
    slow_sum,
)


def parameters_of(experts, router):
    return {
        "up": experts.gate_up_proj,
        "down": experts.down_proj,
        **{name: parameter for name, parameter in experts.moe_zero_experts.named_parameters()},
        **{name: p for name, p in router.named_parameters() if name.startswith("moe_") and name != "moe_residual"},
    }


def slow_gate(x, p):
    """W x, linear or with one hidden layer of tanh."""
    return p["moe_out"] @ (torch.tanh(p["moe_hidden"] @ x) if "moe_hidden" in p else x)


def slow_block(hidden, p, config, k):
    """The first layer, token by token: eight experts, one zero, one copy, two constants."""
    rows = []
    for x in hidden:
        logits = slow_gate(x, p)
        if config.logit_norm_std is not None:
            mean = logits.sum() / len(logits)
            spread = (((logits - mean) ** 2).sum() / (len(logits) - 1)).sqrt()
            logits = logits / (spread / config.logit_norm_std)
        probabilities = logits.exp() / logits.exp().sum()
        picked = sorted(range(12), key=lambda i: -probabilities[i].item())[:k]  # noqa: B023
        weights = torch.stack([probabilities[i] for i in picked])
        is_zero = torch.tensor([i == 8 for i in picked])
        if config.zero_weight_rule == "renormalize":
            weights = weights.masked_fill(is_zero, 0)
            weights = weights / weights.sum() if weights.sum() > 0 else weights
        else:
            weights = (weights / weights.sum()).masked_fill(is_zero, 0)
        # Id 8 is nobody: the same number as the column of the only zero expert; copy and constants follow.
        x = x * k if config.scale_input_by_top_k else x
        rows.append(slow_sum(x, torch.tensor(picked), weights, p, {"copy": 1}))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router_hidden_mult": 0},
        {"num_experts_per_tok": 3, "zero_weight_rule": "keep"},
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 5, "logit_norm_std": 0.7, "router_hidden_mult": 2},
        {"scale_input_by_top_k": True},
    ],
    ids=str,
)
def test_block_and_gradients_equal_reference(options):
    config = MoEPlusPlusRouterConfig(**options)
    model = extend(tiny_model("mixtral"), config)
    block, experts, router = next(blocks_of(model))
    mine = parameters_of(experts, router)
    with torch.no_grad():
        router.moe_out.mul_(3)
    theirs = {name: tensor.detach().double().requires_grad_() for name, tensor in mine.items()}
    hidden = torch.randn(40, 32, requires_grad=True)
    before = hidden.detach().clone()
    double = hidden.detach().double().requires_grad_()
    out = block(hidden[None])[0]
    expected = slow_block(double, theirs, config, config.num_experts_per_tok or 2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert set(router.decide(hidden).chosen.unique().tolist()) >= {8, 9, 10, 11}
    upstream = torch.randn_like(out)
    (out * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), double.grad, rtol=1e-4, atol=1e-5)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor.grad.double(), theirs[name].grad, rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(hidden.detach(), before)  # the factor on the input is not in place
    assert not router.weight.requires_grad  # the stock gate has no part


@pytest.mark.parametrize("name", ["dbrx", "jetmoe", "llama4"])
@torch.no_grad()
def test_factor_on_the_input_in_blocks_with_an_adapter(name):
    """Their experts get K times the input as well, copies and constants included."""
    model = extend(tiny_model(name), MoEPlusPlusRouterConfig(scale_input_by_top_k=True))
    block, _, router = next(blocks_of(model))
    hidden = torch.randn(30, 32)
    record = router.decide(hidden)
    k = record.index.shape[1] if record.index.shape[1] > 1 else 3
    block.moe_zero_ids = replace(block.moe_zero_ids, input_factor=float(k))
    found = block.run(hidden, record.index, record.weights)
    block.moe_zero_ids = replace(block.moe_zero_ids, input_factor=1.0)
    torch.testing.assert_close(found, block.run(k * hidden, record.index, record.weights))
    assert (found - block.run(hidden, record.index, record.weights)).abs().max() > 1e-3


def with_logits(logits, **options):
    """The block's output and input for one token whose logits are given: 8 experts, zero, copy, two constants."""
    model = extend(tiny_model("mixtral"), MoEPlusPlusRouterConfig(router_hidden_mult=0, **options))
    block, experts, router = next(blocks_of(model))
    x = torch.randn(1, 32)
    with torch.no_grad():
        router.moe_out.copy_(torch.tensor(logits)[:, None] * x / x.square().sum())
        return block(x[None])[0], x, experts


def test_picks_worked_out_by_hand():
    low = [-5.0] * 8
    out, x, experts = with_logits([*low, 3.0, 0.0, 0.0, 0.0], num_experts_per_tok=1)
    assert (out == 0).all()  # zero alone: 0 / 0 is 0
    out, x, experts = with_logits([*low[:7], 2.0, 3.0, 0.0, 0.0, 0.0])
    with torch.no_grad():
        whole = experts(x, torch.tensor([[7, 8]]), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(out, whole)  # zero and an expert: the expert with all weight
    out, x, experts = with_logits([*low, 3.0, 2.0, 0.0, 0.0])
    torch.testing.assert_close(out, x)  # zero and a copy
    out, x, experts = with_logits([*low, 3.0, 2.0, 0.0, 0.0], zero_weight_rule="keep")
    torch.testing.assert_close(out, x * 0.26894143)  # softmax of 3 and 2


@pytest.mark.parametrize("rule", [GateRule(renormalize=False), GateRule(score="sigmoid")], ids=["raw", "sigmoid"])
def test_rule_of_the_paper_whatever_the_family(rule):
    """Alone, the gate is a softmax and its weights are divided by their sum; `additive` follows the family."""
    hidden = torch.randn(200, HIDDEN)
    record = make_gate(MoEPlusPlusRouterConfig(router_hidden_mult=0), rule=rule).decide(hidden)
    used = (record.chosen != EXPERTS).any(dim=-1)
    torch.testing.assert_close(record.weights.sum(dim=-1), used.float())
    torch.testing.assert_close(record.scores, record.logits.softmax(dim=-1))
    gate = make_gate(MoEPlusPlusRouterConfig(router_hidden_mult=0, additive=True), rule=rule)
    record = gate.decide(hidden)
    plain = record.logits.softmax(dim=-1) if rule.score == "softmax" else record.logits.sigmoid()
    weights = plain.gather(-1, record.chosen).masked_fill(record.chosen == EXPERTS, 0)
    if rule.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(record.weights, weights)


def test_numbers_of_the_paper():
    """Table 1, and what we take between its rows."""
    router = get_router("moe_plus_plus")
    counts = {}
    for experts in (4, 8, 16, 24, 32, 64):
        zero = router.default_zero_experts(MoEPlusPlusRouterConfig(), experts)
        counts[experts] = (zero.zero, zero.copy, zero.constant)
    assert [counts[n] for n in (8, 16, 32)] == [(1, 1, 2), (1, 1, 2), (1, 1, 6)]
    assert [counts[n] for n in (4, 24, 64)] == [(1, 1, 2), (1, 1, 4), (1, 1, 14)]


# --- gating residuals ---


def traced(model, inputs):
    """The records of one forward and the input of every gate."""
    seen, handles = {}, []
    for router in iter_routers(model):
        keep = lambda module, args: seen.__setitem__(module.moe_site.order, args[0].reshape(-1, 32))  # noqa: E731
        handles.append(router.register_forward_pre_hook(keep))
    with trace_routing(model) as contexts:
        model(**inputs)
    for handle in handles:
        handle.remove()
    return list(contexts[0].records.values()), seen


@pytest.mark.parametrize("mult", [0, 8])
def test_residual_unrolls_over_layers(mult):
    """G_3 = W_3 x_3 + V_3 (W_2 x_2 + V_2 W_1 x_1), all before softmax."""
    model = extend(tiny_model("mixtral"), MoEPlusPlusRouterConfig(router_hidden_mult=mult))
    records, seen = traced(model, tiny_inputs("mixtral"))
    routers = list(iter_routers(model))
    assert ["moe_residual" in router._parameters for router in routers] == [False, True, True]
    p = [{name: t.detach().double() for name, t in router.named_parameters()} for router in routers]
    x = [seen[order].detach().double() for order in range(3)]
    expected = []
    for t in range(14):
        first, second, third = (slow_gate(x[layer][t], p[layer]) for layer in range(3))
        middle = second + p[1]["moe_residual"] @ first
        expected.append((first, middle, third + p[2]["moe_residual"] @ middle))
    for layer, record in enumerate(records):
        found = torch.stack([row[layer] for row in expected])
        torch.testing.assert_close(record.logits.double(), found, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_residual():
    """One gate behind another: d G_2 / d G_1 = V_2."""
    gates = [make_gate(MoEPlusPlusRouterConfig(router_hidden_mult=0), order=order) for order in (0, 1)]
    get_router("moe_plus_plus").setup_stack(gates[0], gates)
    gates[1].reset_parameters()
    context = RoutingContext()
    hidden = torch.randn(7, HIDDEN)
    first = gates[0].route(hidden, context)
    assert torch.equal(context.carry[0, CARRY], first.logits)
    second = gates[1].route(hidden, context)
    upstream = torch.randn_like(second.logits)
    second.logits.backward(upstream)
    torch.testing.assert_close(gates[0].moe_out.grad, (upstream @ gates[1].moe_residual).T @ hidden)
    torch.testing.assert_close(gates[1].moe_residual.grad, upstream.T @ first.logits.detach())


def test_residual_of_zero_and_of_one():
    """V = 0: layers route by themselves. V = 1 and W = 0: as the layer before."""
    inputs = tiny_inputs("mixtral")
    model = extend(tiny_model("mixtral"), MoEPlusPlusRouterConfig())
    first, second, _ = iter_routers(model)
    with torch.no_grad():
        second.moe_residual.zero_()
    records, seen = traced(model, inputs)
    with torch.no_grad():
        alone = second.decide(seen[1])  # outside a forward, there is no layer before
        torch.testing.assert_close(records[1].logits, alone.logits)
        assert torch.equal(records[1].index, alone.index)
        second.moe_residual.copy_(torch.eye(12))
        second.moe_out.zero_()
    records, _ = traced(model, inputs)
    assert torch.equal(records[1].index, records[0].index)
    torch.testing.assert_close(records[1].weights, records[0].weights)
    model = extend(tiny_model("mixtral"), MoEPlusPlusRouterConfig(gating_residual=False))
    assert not any("moe_residual" in router._parameters for router in iter_routers(model))


def test_normalised_logits_are_not_carried():
    """The next layer gets the logits before the normalisation, as in the authors' code."""
    gate = make_gate(MoEPlusPlusRouterConfig(router_hidden_mult=0, logit_norm_std=0.5))
    context, hidden = RoutingContext(), torch.randn(7, HIDDEN)
    record = gate.route(hidden, context)
    torch.testing.assert_close(record.logits.std(dim=-1), torch.full((7,), 0.5))
    torch.testing.assert_close(context.carry[0, CARRY], hidden @ gate.moe_out.T)


def test_rows_of_different_policies_carry_their_own():
    model, inputs = extend(tiny_model("mixtral"), MoEPlusPlusRouterConfig()), tiny_inputs("mixtral")
    inputs["attention_mask"][:] = 1
    policies = {"one": {"num_experts_per_tok": 1}}
    with torch.no_grad():
        with route_rows(model, ["all", "one"], policies):
            both = model(**inputs).logits
        rows = [{key: value[row : row + 1] for key, value in inputs.items()} for row in (0, 1)]
        torch.testing.assert_close(both[:1], model(**rows[0]).logits, **ROUNDING)
        with route_rows(model, ["one"], policies):
            torch.testing.assert_close(both[1:], model(**rows[1]).logits, **ROUNDING)


# --- starts ---


@pytest.mark.parametrize("name", FAMILIES)
def test_identity_config_equals_stock(name):
    model, inputs = tiny_model(name), tiny_inputs(name)
    plans = plan_extension(model, get_family(name), MoeExtension(router="top_k"), building=False).layers
    with torch.no_grad():
        expected = model(**inputs)[0]
        extend(model, get_router("moe_plus_plus").identity_config(plans[0].site))
        torch.testing.assert_close(model(**inputs)[0], expected, **ROUNDING)
        restore(model)
        assert torch.equal(model(**inputs)[0], expected)


def test_identity_start_generates_the_same_and_learns():
    model, inputs = tiny_model("qwen3_moe"), tiny_inputs("qwen3_moe")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    extend(model, MoEPlusPlusRouterConfig(additive=True, zero_init="identity", zero_warmup_steps=4))
    assert torch.equal(model.generate(**inputs, **options), expected)
    model.train()
    for router in iter_routers(model):
        router.schedule(2, 8)
        assert router.schedule_steps == 4
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for router in iter_routers(model):
        assert router.weight.grad.abs().sum() > 0  # additive: the stock gate is trained on
        assert (router.moe_out.grad.abs().sum(dim=-1) > 0).all()
        if router.moe_site.order:
            assert router.moe_residual.grad.abs().sum() > 0


# --- the balance loss ---


@pytest.mark.parametrize("masked", [False, True], ids=["all_tokens", "masked"])
def test_balance_loss_has_no_factor_of_the_count(masked):
    config = MoEPlusPlusRouterConfig(zero_balance_weight=0.4)
    gate = make_gate(config)
    record = gate.decide(torch.randn(30, HIDDEN))
    mask = torch.rand(30) < 0.6 if masked else None
    found = gate.aux_losses(record, mask)["balance"]
    options = {"grouped": False, "zero_weight": 0.4, "mask": mask}
    slow = slow_mixed(record.scores.double(), record.chosen, EXPERTS, 1, **options)
    torch.testing.assert_close(found.double(), slow / 10, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("tau", "expected"), [(1.0, 1.333), (0.5, 1.0), (0.25, 0.667)])
def test_loss_alone_sets_the_load(tau, expected):
    """8 experts and 4 free ones, K = 2: K tau E / (tau E + Z) experts per token."""
    assert 2 * tau * 8 / (tau * 8 + 4) == pytest.approx(expected, abs=1e-3)
    config = MoEPlusPlusRouterConfig(zero_balance_weight=tau, router_hidden_mult=0, balance_coef=1.0)
    gate = make_gate(config, experts=8)
    hidden = torch.randn(3000, HIDDEN)
    hidden[:, 0] = 1  # in place of a bias
    optimizer = torch.optim.Adam([gate.moe_out], lr=0.02)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
        optimizer.zero_grad()
        gate.aux_losses(gate.decide(hidden), None)["balance"].backward()
        optimizer.step()
    used = float(experts_per_token(gate.decide(hidden).index, 8))
    print(f"tau {tau}: {used:.4f} experts per token")
    assert used == pytest.approx(2 * tau * 8 / (tau * 8 + 4), rel=0.01)


# --- capacity ---


def site_of(experts=8, zero=4):
    return RouterSite("0", 0, experts, 2, HIDDEN, GateRule(), ZeroExpertsConfig(zero=1, constant=zero - 1))


def test_capacities_sum_to_the_tokens():
    for tau in (0.25, 0.75, 1.0):
        config = MoEPlusPlusRouterConfig(capacity_factor=1.1, zero_balance_weight=tau)
        limits = expert_capacities(600, site_of(), config, torch.device("cpu"))
        assert limits.shape == (12,) and float(limits.sum()) == pytest.approx(1.1 * 600, rel=1e-6)
        assert float(limits[0] / limits[-1]) == pytest.approx(tau, rel=1e-6)
        assert float(limits[0]) == pytest.approx(1.1 * tau * 600 / (tau * 8 + 4), rel=1e-6)


def slow_capacity(picks, mask, limit):
    """Kept slots: rank by rank, the first tokens in the order of the batch."""
    kept = [[True] * len(row) for row in picks]
    for rank in range(len(picks[0])):
        taken = {}
        for t, row in enumerate(picks):
            if mask is not None and not mask[t]:
                continue
            taken[row[rank]] = taken.get(row[rank], 0) + 1
            kept[t][rank] = taken[row[rank]] <= limit(row[rank])
    return kept


@pytest.mark.parametrize("masked", [False, True], ids=["all_tokens", "masked"])
def test_capacity_drops_late_tokens(masked):
    config = MoEPlusPlusRouterConfig(capacity_factor=1.1, zero_balance_weight=0.5)
    gate = make_gate(config)
    hidden = torch.randn(40, HIDDEN)
    mask = torch.ones(2, 20, dtype=torch.long)
    if masked:
        mask[1, :7] = 0
    context = RoutingContext(attention_mask=mask)
    flat = mask.flatten().bool()
    gate.eval()
    free = gate.route(hidden, context)
    assert not free.extras
    gate.train()
    record = gate.route(hidden, context)
    tokens = int(flat.sum())
    # ceil: every expert takes at least one token.
    limit = lambda column: -((-1.1 * tokens * (0.5 if column < EXPERTS else 1)) // (0.5 * EXPERTS + 4))  # noqa: E731
    kept = torch.tensor(slow_capacity(free.index.tolist(), flat, limit))
    assert 0 < (~kept).sum() < kept.numel() / 2
    assert torch.equal(record.index, free.index.masked_fill(~kept, 10))
    assert torch.equal(record.weights, free.weights.masked_fill(~kept, 0))  # what remains keeps its weight
    picks = record.extras["picks"]  # (T, C), so that rows with other numbers of slots go beside
    assert torch.equal(picks[:, :2], free.index) and (picks[:, 2:] == 10).all()
    # The loss counts what was wanted.
    record.site = free.site = gate.moe_site
    balance = [gate.aux_losses(r, flat).get("balance") for r in (record, free)]
    torch.testing.assert_close(balance[0], balance[1])


def test_capacity_of_rows_of_different_policies():
    """Rows with fewer slots than others: every group has its own capacity, and the loss counts what each wanted."""
    model, inputs = extend(tiny_model("mixtral"), MoEPlusPlusRouterConfig(capacity_factor=0.5)), tiny_inputs("mixtral")
    inputs["attention_mask"][:] = 1
    model.train()
    with route_rows(model, ["all", "one"], {"one": {"num_experts_per_tok": 1}}), trace_routing(model) as contexts:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    model.eval()
    with route_rows(model, ["all", "one"], {"one": {"num_experts_per_tok": 1}}), trace_routing(model) as free:
        model(**inputs)
    record, wanted = contexts[0].records["0"], free[0].records["0"]
    assert (record.index != wanted.index).any()
    options = {"grouped": False, "zero_weight": 0.75, "mask": None}
    expected = slow_mixed(wanted.scores.double(), wanted.chosen, 8, 1, **options) / 12
    found = get_router("moe_plus_plus").aux_losses(record, None)["balance"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_capacity_is_for_training_only():
    model, inputs = extend(tiny_model("mixtral"), MoEPlusPlusRouterConfig(capacity_factor=0.3)), tiny_inputs("mixtral")
    used = []
    for training in (False, True):
        records, _ = traced(model.train(training), inputs)
        used.append(sum(int((record.weights > 0).sum()) for record in records))
    assert used[1] < used[0]
    with trace_routing(model) as contexts:
        model(**inputs)
    assert auxiliary_losses(contexts)[1]["balance"].isfinite()


# --- declaration ---


def test_bad_input_is_named():
    for options, match in (
        ({"router_hidden_mult": -1}, "`router_hidden_mult` must be non-negative, got -1"),
        ({"logit_norm_std": 0.0}, "`logit_norm_std` must be positive, got 0.0"),
        ({"capacity_factor": -1.0}, "`capacity_factor` must be positive"),
        ({"zero_balance_weight": 0.0}, "`zero_balance_weight` must be positive"),
        ({"num_experts_per_tok": 0}, "`num_experts_per_tok` must be at least 1"),
        ({"zero_warmup_steps": 3}, 'goes with `zero_init="identity"`'),
    ):
        with pytest.raises(ValueError, match=match):
            MoEPlusPlusRouterConfig(**options)
    model = tiny_model("mixtral")
    for settings, declared in (
        ({"zero_init": "identity"}, {}),
        ({"zero_init": "identity", "zero_warmup_steps": 3}, {"init": "identity", "warmup_steps": 4}),
    ):
        zero = ZeroExpertsConfig(zero=1, copy=1, **declared)
        with pytest.raises(ValueError, match=f"`{list(settings)[-1]}`.*contradict each other"):
            extend(model, MoeExtension(router=MoEPlusPlusRouterConfig(**settings), zero_experts=zero))
    router = MoEPlusPlusRouterConfig()
    layers = {"2": LayerExtension(zero_experts=ZeroExpertsConfig(copy=1))}
    with pytest.raises(ValueError, match='12 choices, layer "2" has 9'):
        extend(model, MoeExtension(router=router, layers=layers))
    with pytest.raises(ValueError, match="must follow each other"):
        extend(model, MoeExtension(router=router, layers={"1": {"router": {"type": "top_k"}}}))
    with pytest.raises(ValueError, match="exceeds the 12 choices"):
        extend(model, MoEPlusPlusRouterConfig(num_experts_per_tok=13))
    with pytest.raises(ValueError, match="a rule of its own"):
        extend(tiny_model("phimoe"), MoEPlusPlusRouterConfig(additive=True))
    extend(tiny_model("phimoe"), MoEPlusPlusRouterConfig())  # does not ask the stock gate
    unlinked = MoEPlusPlusRouterConfig(gating_residual=False)
    extend(model, MoeExtension(router=unlinked, layers=layers))


@needs_switch
def test_stacks_of_an_encoder_decoder_are_apart():
    """The first layer of the decoder has none before it, though it is not the first routed layer of the model."""
    model = extend(tiny_model("switch_transformers", num_sparse_encoder_layers=1), MoEPlusPlusRouterConfig())
    routers = list(iter_routers(model))
    first = {}
    for router in routers:
        first.setdefault(router.moe_site.key.partition(".")[0], router)
    assert len(first) == 2 < len(routers) + 1
    for router in routers:
        assert ("moe_residual" in router._parameters) == (router not in first.values())
    assert model(**tiny_inputs("switch_transformers")).logits.isfinite().all()
