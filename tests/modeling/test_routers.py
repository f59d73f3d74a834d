"""The two built-in routers against slow references: one token at a time, in float64."""

from __future__ import annotations

import copy
import functools
import inspect
import math

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from transformers import MixtralForCausalLM

from hf_moe_ext import upcycle
from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension
from hf_moe_ext.modeling.moe_context import RouteRecord, RoutingLink
from hf_moe_ext.modeling.moe_experts import MoeExtGate
from hf_moe_ext.modeling.moe_losses import load_balancing_loss, router_entropy
from hf_moe_ext.modeling.moe_router import GateRule, MoERouter, RouterSite, get_router
from hf_moe_ext.modeling.moe_structure import install_router, iter_routers, trace_routing
from hf_moe_ext.modeling.router_top_k import TopKRouter, TopKRouterConfig
from hf_moe_ext.modeling.router_top_p import TopPRouter, TopPRouterConfig
from hf_moe_ext.patching import extend

from ..character_runs import character_llama, train_characters, training_rows


TOKENS, EXPERTS, HIDDEN, K = 23, 12, 9, 3

# The name of the cache among the arguments and outputs of a model; newer versions of Transformers have a shorter one.
CACHE = "cache" if "cache" in inspect.signature(MixtralForCausalLM.forward).parameters else "past_key_values"


def make_gate(
    config, *, num_experts=EXPERTS, top_k=K, hidden=HIDDEN, rule=None, bias=None, dtype=torch.float32
) -> MoERouter:
    """A router on a plain linear gate, without a model around it."""
    gate = MoeExtGate(num_experts, top_k, hidden, dtype=dtype)
    with torch.no_grad():
        gate.weight.normal_()
    if bias is not None:
        gate.register_buffer("correction", bias)
    site = RouterSite("0", 0, num_experts, top_k, hidden, rule or GateRule())
    get_router(config.type).check(config, site)
    install_router(gate, config, site, RoutingLink())
    gate.init_weights(0.02)
    return gate


def combine(record: RouteRecord) -> torch.Tensor:
    """(T, E): the weight of every expert for every token, 0 where it was not chosen."""
    dense = record.weights.new_zeros(len(record.index), record.num_experts + 1)
    return dense.scatter_add(1, record.index, record.weights)[:, :-1]


def chosen(record: RouteRecord) -> list[list[int]]:
    """The experts of every token, best first, without unused slots."""
    return [[i for i in row if i < record.num_experts] for row in record.index.tolist()]


def with_probabilities(probabilities: list[float], config) -> RouteRecord:
    """The decision for one token whose softmax is `probabilities`."""
    gate = make_gate(config, num_experts=len(probabilities), top_k=1, hidden=1)
    gate.weight.data[:, 0] = torch.tensor(probabilities).log()
    return gate.decide(torch.ones(1, 1))


# --- references ---


def slow_scores(logits: torch.Tensor, score: str) -> torch.Tensor:
    if score == "sigmoid":
        return torch.stack([1 / (1 + torch.exp(-z)) for z in logits])
    exponentials = [torch.exp(z - max(logits.tolist())) for z in logits]
    return torch.stack([e / sum(exponentials) for e in exponentials])


def slow_allowed(choice: list[float], groups: tuple[int, int, str] | None) -> list[int]:
    """Experts in the best groups."""
    if groups is None:
        return list(range(len(choice)))
    count, keep, how = groups
    size = len(choice) // count
    members = [list(range(g * size, (g + 1) * size)) for g in range(count)]
    best = {g: sorted((choice[i] for i in members[g]), reverse=True) for g in range(count)}
    value = {g: best[g][0] if how == "max" else sum(best[g][:2]) for g in range(count)}
    kept = sorted(value, key=value.__getitem__, reverse=True)[:keep]
    return [i for g in kept for i in members[g]]


def slow_top_k(
    hidden,
    weight,
    *,
    k=K,
    score="softmax",
    order="score_topk",
    renormalize=True,
    scale=1.0,
    temperature=1.0,
    bias=None,
    groups=None,
):
    """(T, E) weights and the chosen experts, in float64 with gradients."""
    rows, sets = [], []
    for token in hidden:
        logits = weight @ token / temperature
        scores = slow_scores(logits, score)
        choice = [s + (0.0 if bias is None else bias[i]) for i, s in enumerate(scores.tolist())]
        allowed = slow_allowed(choice, groups)
        best = sorted(allowed, key=lambda i: -choice[i])[:k]  # noqa: B023
        row = [torch.zeros((), dtype=torch.float64)] * len(logits)
        if order == "topk_score":
            values = slow_scores(torch.stack([logits[i] for i in best]), "softmax")
        else:
            values = torch.stack([scores[i] for i in best])
            if renormalize:
                values = values / sum(values)
        for i, value in zip(best, values, strict=True):
            row[i] = value * scale
        rows.append(torch.stack(row))
        sets.append(best)
    return torch.stack(rows), sets


def slow_top_p(
    hidden,
    weight,
    *,
    threshold,
    max_slots=None,
    min_experts=1,
    score="softmax",
    renormalize=False,
    scale=1.0,
    bias=None,
    groups=None,
):
    """The rule of the paper: add experts, best first, until their probabilities sum to more than the threshold."""
    rows, sets = [], []
    for token in hidden:
        raw = slow_scores(weight @ token, score)
        probs = raw / sum(raw)
        choice = [s + (0.0 if bias is None else bias[i]) for i, s in enumerate(raw.tolist())]
        allowed = sorted(slow_allowed(choice, groups), key=lambda i: -choice[i])  # noqa: B023
        kept: list[int] = []
        for i in allowed[: max_slots or len(allowed)]:
            total = sum(probs[j].item() for j in kept)
            if threshold < 1 and total > threshold and len(kept) >= min_experts:
                break
            kept.append(i)
        row = [torch.zeros((), dtype=torch.float64)] * len(probs)
        total = sum(probs[j] for j in kept) if renormalize else 1.0
        for i in kept:
            row[i] = probs[i] / total * scale
        rows.append(torch.stack(row))
        sets.append(kept)
    return torch.stack(rows), sets


def compare(gate: MoERouter, slow, **options) -> RouteRecord:
    """Choice, weights and the gradients of input and gate weight, against a reference."""
    hidden = torch.randn(TOKENS, gate.moe_site.hidden_size)
    mine, theirs = (
        (hidden.to(dtype, copy=True).requires_grad_(), gate.weight.detach().to(dtype, copy=True).requires_grad_())
        for dtype in (torch.float32, torch.float64)
    )
    gate.weight = torch.nn.Parameter(mine[1])
    record = gate.decide(mine[0])
    expected, sets = slow(*theirs, **options)
    assert chosen(record) == sets
    weights = combine(record)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(weights)
    (weights * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    torch.testing.assert_close(mine[0].grad.double(), theirs[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gate.weight.grad.double(), theirs[1].grad, rtol=1e-4, atol=1e-5)
    return record


# --- top-k ---


TOP_K = {
    "plain": {"num_experts_per_tok": 3},
    "k1": {"num_experts_per_tok": 1},
    "all": {"num_experts_per_tok": EXPERTS},
    "raw": {"renormalize": False},
    "scale": {"scale": 2.5},
    "topk_score": {"score_order": "topk_score"},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid_raw": {"score": "sigmoid", "renormalize": False, "scale": 0.5},
    "temperature": {"temperature": 3.0, "renormalize": False},
    "temperature_topk_score": {"temperature": 0.5, "score_order": "topk_score"},
    "groups": {"num_groups": 4, "topk_groups": 2},
    "groups_sigmoid": {"num_groups": 3, "topk_groups": 1, "score": "sigmoid", "num_experts_per_tok": 4},
    "all_options": {
        "num_experts_per_tok": 2,
        "score": "sigmoid",
        "renormalize": True,
        "scale": 1.7,
        "temperature": 1.3,
        "num_groups": 6,
        "topk_groups": 3,
    },
}


def top_k_options(settings: dict) -> dict:
    names = {"num_experts_per_tok": "k", "score_order": "order"}
    options = {names.get(key, key): value for key, value in settings.items() if "groups" not in key}
    if "num_groups" in settings:
        options["groups"] = (settings["num_groups"], settings["topk_groups"], "top2_sum")
    return options


@pytest.mark.parametrize("settings", TOP_K.values(), ids=TOP_K)
def test_top_k_equals_reference(settings):
    compare(make_gate(TopKRouterConfig(**settings)), slow_top_k, **top_k_options(settings))


@pytest.mark.parametrize("settings", TOP_K.values(), ids=TOP_K)
def test_top_k_with_added_bias_equals_reference(settings):
    """A bias that we add moves the choice, has no gradient and does not enter the weights."""
    gate = make_gate(TopKRouterConfig(**settings, correction_bias=True))
    assert (gate.moe_correction_bias == 0).all()
    gate.moe_correction_bias.normal_(std=0.3)
    compare(gate, slow_top_k, **top_k_options(settings), bias=gate.moe_correction_bias.tolist())
    assert not gate.moe_correction_bias.requires_grad and "moe_correction_bias" in gate.state_dict()


RULES = {
    "sigmoid_scaled": GateRule(score="sigmoid", scale=2.5),
    "raw": GateRule(renormalize=False),
    "topk_score": GateRule(order="topk_score"),
    "bias_and_groups": GateRule(score="sigmoid", bias="correction", groups=(4, 2, "top2_sum")),
    "best_of_group": GateRule(renormalize=False, groups=(3, 2, "max")),
}


def rule_options(rule: GateRule) -> dict:
    return {"score": rule.score, "scale": rule.scale, "groups": rule.groups}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_top_k_follows_the_family(rule):
    """What the config leaves open is as in the family."""
    bias = torch.randn(EXPERTS) * 0.3 if rule.bias else None
    gate = make_gate(TopKRouterConfig(num_experts_per_tok=K), rule=rule, bias=bias)
    options = rule_options(rule) | {"order": rule.order, "renormalize": rule.renormalize}
    compare(gate, slow_top_k, **options, bias=None if bias is None else bias.tolist())


def test_correction_bias_can_be_switched_off():
    rule = GateRule(score="sigmoid", bias="correction")
    gate = make_gate(TopKRouterConfig(correction_bias=False), rule=rule, bias=torch.randn(EXPERTS) * 5)
    compare(gate, slow_top_k, score="sigmoid")


def test_factor_per_expert():
    rule = GateRule(expert_scale="factor")
    gate = make_gate(TopKRouterConfig(num_experts_per_tok=K), rule=rule)
    gate.factor = torch.rand(EXPERTS) + 0.5
    record = gate.decide(torch.randn(TOKENS, HIDDEN))
    sums = (record.weights / gate.factor[record.index]).sum(-1)
    torch.testing.assert_close(sums, torch.ones(TOKENS))


@pytest.mark.parametrize("where", ["added", "family"])
def test_bias_update(where):
    """Loss-free balancing (2408.15664): the sign of the error, up for experts below the mean load."""
    rule = GateRule(score="sigmoid", bias="correction" if where == "family" else None)
    bias = torch.zeros(EXPERTS) if where == "family" else None
    config = TopKRouterConfig(correction_bias=True, bias_update_rate=0.01, score="sigmoid")
    gate = make_gate(config, rule=rule, bias=bias)
    assert ("moe_correction_bias" in gate.state_dict()) == (where == "added")
    hidden = torch.randn(400, HIDDEN) + torch.randn(HIDDEN)

    def load():
        return torch.bincount(gate.decide(hidden).index.reshape(-1), minlength=EXPERTS)

    before = load()
    gate.after_optimizer_step(before)
    found = gate.moe_correction_bias if where == "added" else gate.correction
    mean = sum(before.tolist()) / EXPERTS
    expected = [0.01 if count < mean else -0.01 if count > mean else 0.0 for count in before.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected))
    for _ in range(150):
        gate.after_optimizer_step(load())
    assert load().float().std() < 0.35 * before.float().std()


def test_no_bias_update_at_rate_zero():
    gate = make_gate(TopKRouterConfig(correction_bias=True))
    gate.after_optimizer_step(torch.arange(EXPERTS))
    assert (gate.moe_correction_bias == 0).all()


def test_jitter_statistics():
    """Uniform in [1 - jitter, 1 + jitter] on the router's input, in training only."""
    gate = make_gate(TopKRouterConfig(jitter=0.2, renormalize=False), num_experts=4, top_k=2, hidden=1)
    gate.weight.data = torch.tensor([[1.0], [2.0], [3.0], [-1.0]])
    hidden = torch.ones(20_000, 1)
    gate.train()
    noise = gate.decide(hidden).logits[:, 0]
    assert 0.8 <= noise.min() < 0.801 and 1.199 < noise.max() <= 1.2
    assert abs(noise.mean() - 1) < 0.005 and abs(noise.std() - 0.4 / math.sqrt(12)) < 0.005
    gate.eval()
    assert (gate.decide(hidden).logits[:, 0] == 1).all()


def test_all_left_open_is_the_stock_gate():
    gate = make_gate(TopKRouterConfig())
    hidden = torch.randn(TOKENS, HIDDEN)
    logits, weights, index = MoeExtGate.forward(gate, hidden)
    outputs = gate(hidden)
    assert all(torch.equal(a, b) for a, b in zip(outputs, (logits, weights, index), strict=True))


BAD_TOP_K = {
    "k_above_experts": ({"num_experts_per_tok": 13}, None, "exceeds the 12 experts"),
    "groups_do_not_divide": ({"num_groups": 5, "topk_groups": 2}, None, "must divide the 12 experts"),
    "groups_too_small": (
        {"num_groups": 6, "topk_groups": 2, "num_experts_per_tok": 5},
        None,
        "hold fewer than k=5",
    ),
    "family_groups_too_small": ({"num_experts_per_tok": 5}, GateRule(groups=(6, 2, "max")), "hold fewer than k=5"),
    "unknown_rule": ({"scale": 2.0}, GateRule(score="custom"), "a rule of its own"),
}


@pytest.mark.parametrize(("settings", "rule", "message"), BAD_TOP_K.values(), ids=BAD_TOP_K)
def test_top_k_refuses(settings, rule, message):
    with pytest.raises(ValueError, match=message):
        make_gate(TopKRouterConfig(**settings), rule=rule)


# --- top-p ---


TOP_P = {
    "paper": {"threshold": 0.4},
    "near_zero": {"threshold": 1e-9},
    "high": {"threshold": 0.97},
    "one": {"threshold": 1.0},
    "max_slots": {"threshold": 0.9, "max_slots": 2},
    "one_slot": {"threshold": 0.9, "max_slots": 1},
    "min_experts": {"threshold": 0.1, "min_experts": 3},
    "min_and_max": {"threshold": 0.8, "min_experts": 2, "max_slots": 4},
    "renormalize": {"threshold": 0.6, "renormalize": True},
    "scale": {"threshold": 0.6, "scale": 2.5},
    "sigmoid": {"threshold": 0.3, "score": "sigmoid"},
    "sigmoid_renormalize": {"threshold": 0.3, "score": "sigmoid", "renormalize": True, "max_slots": 7},
}


@pytest.mark.parametrize("settings", TOP_P.values(), ids=TOP_P)
def test_top_p_equals_reference(settings):
    record = compare(make_gate(TopPRouterConfig(**settings)), slow_top_p, **settings)
    assert record.index.shape == (TOKENS, settings.get("max_slots") or EXPERTS)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_top_p_in_the_family(rule):
    """The family keeps its score, its scale, its bias and its groups; the paper's rule stands inside."""
    bias = torch.randn(EXPERTS) * 0.3 if rule.bias else None
    gate = make_gate(TopPRouterConfig(threshold=0.6), rule=rule, bias=bias)
    compare(gate, slow_top_p, threshold=0.6, **rule_options(rule), bias=None if bias is None else bias.tolist())


def test_threshold_near_zero_is_one_expert():
    gate = make_gate(TopPRouterConfig(threshold=1e-9))
    record = gate.decide(torch.randn(TOKENS, HIDDEN))
    assert [len(row) for row in chosen(record)] == [1] * TOKENS
    torch.testing.assert_close(record.weights.sum(-1), record.scores.amax(-1))


def test_threshold_one_is_the_dense_mixture():
    gate = make_gate(TopPRouterConfig(threshold=1.0))
    record = gate.decide(torch.randn(TOKENS, HIDDEN))
    assert (record.index < EXPERTS).all()
    torch.testing.assert_close(combine(record), record.scores)


@pytest.mark.parametrize(("threshold", "count"), [(0.4, 1), (0.5, 2), (0.6, 2), (0.85, 3), (0.97, 4)])
def test_hand_case(threshold, count):
    """At 0.5 the first expert has exactly the threshold, which it must exceed."""
    record = with_probabilities([0.5, 0.3, 0.15, 0.05], TopPRouterConfig(threshold=threshold))
    assert chosen(record) == [[0, 1, 2, 3][:count]]
    expected = torch.tensor([0.5, 0.3, 0.15, 0.05])
    expected[count:] = 0
    torch.testing.assert_close(record.weights[0], expected)
    assert (record.index[0, count:] == 4).all()


def test_uniform_router():
    record = with_probabilities([1 / 16] * 16, TopPRouterConfig(threshold=0.4))
    assert [len(row) for row in chosen(record)] == [7]


def test_monotone_and_nested():
    gate = make_gate(TopPRouterConfig())
    hidden = torch.randn(200, HIDDEN) * 0.5
    before = [set()] * 200
    for threshold in [1e-9, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95, 0.999, 1.0]:
        gate.moe_config = TopPRouterConfig(threshold=threshold)
        record = gate.decide(hidden)
        sets = [set(row) for row in chosen(record)]
        assert all(small <= large for small, large in zip(before, sets, strict=True))
        if threshold < 1:
            alone = record.scores.amax(-1) > threshold
            assert [len(s) == 1 for s in sets] == alone.tolist()
        before = sets


def test_bfloat16_logits_do_not_misplace_the_cut():
    """64 experts with nearly equal probabilities: a bfloat16 cumulative sum stops growing long before the cut."""
    gate = make_gate(TopPRouterConfig(threshold=0.75), num_experts=64, top_k=2, dtype=torch.bfloat16)
    gate.weight.data *= 0.05
    hidden = torch.randn(100, HIDDEN, dtype=torch.bfloat16)
    record = gate.decide(hidden)
    assert record.logits.dtype == torch.bfloat16 and record.scores.dtype == torch.float32
    for row, logits in zip(chosen(record), record.logits.double(), strict=True):
        probs = logits.softmax(-1).sort(descending=True).values
        count = int((probs.cumsum(-1) - probs <= 0.75).sum())
        assert len(row) == count and 40 < count < 50


def test_entropy_gradient():
    """dL/dz_i = -P_i (log P_i + H), as the dynamic loss sees the logits."""
    gate = make_gate(TopPRouterConfig())
    logits = []
    gate.router_logits = lambda hidden: logits[0]
    logits.append(torch.randn(1, EXPERTS, requires_grad=True))
    record = gate.decide(torch.randn(1, HIDDEN))
    router_entropy(record.scores).backward()
    probs = logits[0].detach().double().softmax(-1)
    entropy = -(probs * probs.log()).sum()
    torch.testing.assert_close(logits[0].grad.double(), -probs * (probs.log() + entropy), rtol=1e-4, atol=1e-6)


def test_balance_gradient_reaches_experts_that_were_not_chosen():
    gate = make_gate(TopPRouterConfig(threshold=1e-9))
    record = gate.decide(torch.randn(4, HIDDEN))
    load_balancing_loss(record.scores, record.index).backward()
    assert (gate.weight.grad.abs().sum(-1) > 0).all()


def test_nobody_is_chosen_where_the_gate_has_a_skip_class():
    """A gate with one class more than experts: that class becomes an unused slot."""
    config = TopPRouterConfig(threshold=0.9)
    gate = make_gate(config, num_experts=EXPERTS)
    gate.moe_site = RouterSite("0", 0, EXPERTS - 1, K, HIDDEN, GateRule())
    record = gate.decide(torch.randn(TOKENS, HIDDEN))
    assert record.num_experts == EXPERTS - 1 and record.index.max() == EXPERTS - 1
    assert (record.weights[record.index == EXPERTS - 1] == 0).all()


BAD_TOP_P = {
    "max_slots": ({"max_slots": 13}, None, "`max_slots` .13. exceeds the 12 experts"),
    "min_experts": ({"min_experts": 13}, None, "`min_experts` .13. exceeds the 12 experts"),
    "unknown_rule": ({}, GateRule(score="custom"), "a rule of its own"),
}


@pytest.mark.parametrize(("settings", "rule", "message"), BAD_TOP_P.values(), ids=BAD_TOP_P)
def test_top_p_refuses(settings, rule, message):
    with pytest.raises(ValueError, match=message):
        make_gate(TopPRouterConfig(**settings), rule=rule)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"threshold": 0}, r"`threshold` is a probability in \(0, 1\], got 0", id="threshold_zero"),
        pytest.param({"threshold": 40}, r"`threshold` is a probability in \(0, 1\], got 40", id="threshold_percent"),
        pytest.param({"min_experts": 0}, "`min_experts` must be at least 1, got 0", id="min_experts"),
        pytest.param(
            {"min_experts": 3, "max_slots": 2}, r"`max_slots` \(2\) must not be below `min_experts` \(3\)", id="slots"
        ),
    ],
)
def test_top_p_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TopPRouterConfig(**settings)


def test_top_p_renormalises_where_the_family_scores_the_chosen_alone():
    rule = GateRule(order="topk_score", renormalize=False)
    gate = make_gate(TopPRouterConfig(threshold=0.5, renormalize=None), rule=rule)
    compare(gate, slow_top_p, threshold=0.5, renormalize=True)


def test_identity_configs():
    site = RouterSite("0", 0, EXPERTS, K, HIDDEN, GateRule())
    assert TopKRouter.identity_config(site) == TopKRouterConfig()
    assert TopPRouter.identity_config(site).max_slots == K
    with pytest.raises(NotImplementedError, match="rule of its own"):
        TopPRouter.identity_config(RouterSite("0", 0, EXPERTS, K, HIDDEN, GateRule(score="custom")))
    with pytest.raises(NotImplementedError, match="MoERouter"):
        MoERouter.identity_config(site)


# --- in a model ---


@functools.cache
def _stock(name: str):
    return tiny_model(name)


def stock(name: str):
    return copy.deepcopy(_stock(name))


def top_p_model(name: str, **settings):
    return extend(stock(name), MoeExtension(router=TopPRouterConfig(**settings)))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_all_slots_renormalised_equal_stock(name):
    model, inputs = stock(name), tiny_inputs(name)
    with torch.no_grad():
        expected = model(**inputs).logits
        extend(model, MoeExtension(router=TopPRouterConfig(threshold=1.0, max_slots=2, renormalize=True)))
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=2e-5)
        # a lower threshold only removes experts, which does change the model
        model.model.layers[1].mlp.gate.moe_config.threshold = 0.1
        assert (model(**inputs).logits - expected).abs().max() > 1e-2


IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "moe_ext")


def _value_and_gradients(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    model.zero_grad()
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients | {"inputs": embeds.grad}


@functools.cache
def _eager(name: str):
    model = top_p_model(name, threshold=0.5)
    model.set_experts_implementation("eager")
    return _value_and_gradients(model, tiny_inputs(name))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_implementations_agree(name, implementation):
    """With most slots unused, over stock functions that know nothing of unused slots."""
    model = top_p_model(name, threshold=0.5)
    model.set_experts_implementation(implementation)
    with trace_routing(model) as contexts:
        logits, gradients = _value_and_gradients(model, tiny_inputs(name))
    unused = [(r.index == r.num_experts).float().mean() for r in contexts[0].records.values()]
    assert min(unused) > 0.3
    expected, expected_gradients = _eager(name)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in gradients.items():
        scale = expected_gradients[key].abs().max()
        assert (gradient - expected_gradients[key]).abs().max() <= 2e-6 * scale + 1e-7, key


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_cache_equals_full_forward(name):
    model = top_p_model(name, threshold=0.4, score="softmax" if name == "mixtral" else None)
    ids = tiny_inputs(name, batch=1, length=9)["input_ids"]
    with torch.no_grad(), trace_routing(model) as contexts:
        full = model(ids).logits
        cache, steps = None, []
        for position in range(ids.shape[1]):
            out = model(ids[:, position : position + 1], use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-5, atol=1e-5)
    whole, *single = contexts
    for key, record in whole.records.items():
        assert chosen(record) == [chosen(context.records[key])[0] for context in single]


def _mean_experts_after_training(entropy_coef: float) -> tuple[float, float]:
    config = TopPRouterConfig(threshold=0.5, entropy_coef=entropy_coef, balance_coef=0.0)
    model = extend(tiny_model("mixtral", num_local_experts=8, num_hidden_layers=2), MoeExtension(router=config))
    with torch.no_grad():
        for gate in iter_routers(model):
            gate.weight *= 0.3
    ids = torch.randint(4, 79, (8, 12), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def mean_experts():
        with torch.no_grad(), trace_routing(model) as contexts:
            model(ids)
        records = contexts[0].records.values()
        return sum((r.index < r.num_experts).sum(-1).float().mean().item() for r in records) / len(records)

    before = mean_experts()
    model.train()
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, mean_experts()


@pytest.mark.slow
def test_fewer_experts_as_training_goes_on(tmp_path):
    """On text with the settings of the paper the mean number of experts falls; a larger weight of the dynamic loss
    ends with fewer than none. At the paper's weight of 1e-4 some hundred steps show no difference."""
    text = torch.stack([row["input_ids"] for row in training_rows()[-64:]])

    def mean_experts(model):
        with torch.no_grad(), trace_routing(model) as contexts:
            model.eval()(text)
        used = [(r.index < 8).sum(-1).float().mean().item() for r in contexts[0].records.values()]
        return sum(used) / len(used)

    before, after = {}, {}
    for coef in (1e-4, 0.0, 1e-2):
        router = TopPRouterConfig(threshold=0.4, balance_coef=1e-2, entropy_coef=coef)
        model = upcycle(character_llama(), "drop", num_experts=8, drop_ratio=1.0, router=router, check=False)
        before[coef] = mean_experts(model)
        train_characters(model, tmp_path / str(coef), 300)
        after[coef] = mean_experts(model)
    print("mean experts before and after training:", before, after)
    assert after[1e-4] < before[1e-4] - 0.2
    assert after[1e-2] < after[0.0] - 0.25


def test_entropy_loss_makes_routing_sparser():
    before, with_loss = _mean_experts_after_training(0.3)
    _, without = _mean_experts_after_training(0.0)
    assert with_loss < before - 0.5 and with_loss < without - 0.5, (before, with_loss, without)
