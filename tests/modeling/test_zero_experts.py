"""Zero-computation experts with any router: the routed sum, starts that change nothing, losses, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import MOE_NAMES, tiny_inputs, tiny_model

from hf_moe_ext import upcycle, upcycle_checkpoint
from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.modeling_moe_ext import extended_class, extended_config_class
from hf_moe_ext.modeling.moe_context import RoutingLink
from hf_moe_ext.modeling.moe_experts import MoeExtGate
from hf_moe_ext.modeling.moe_families import get_by_path, get_family
from hf_moe_ext.modeling.moe_losses import load_balancing_loss, mixed_balancing_loss
from hf_moe_ext.modeling.moe_router import GateRule, MoERouter, RouterSite, get_router
from hf_moe_ext.modeling.moe_structure import (
    auxiliary_losses,
    install_router,
    iter_routers,
    route_rows,
    trace_routing,
)
from hf_moe_ext.modeling.moe_zero_experts import ConstantExperts
from hf_moe_ext.modeling.router_soft_moe import SoftMoERouterConfig
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.modeling.router_top_p import TopPRouterConfig
from hf_moe_ext.patching import describe, extend, restore

from ..trainers.common import rows, train


TOKENS, EXPERTS, HIDDEN = 23, 6, 9
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}  # as in the matrix: float32 sums in another order
MIXED = {"zero": 1, "copy": 2, "constant": 2}
needs_switch = pytest.mark.skipif("switch_transformers" not in MOE_NAMES, reason="needs a newer transformers")


def make_gate(
    config, zero: ZeroExpertsConfig | None = None, *, experts=EXPERTS, top_k=2, rule=None, bias=None, order=0
) -> MoERouter:
    """A router on a linear gate, without a model around it. Where none are given, zero-computation experts are those
    that the router brings."""
    gate = MoeExtGate(experts, top_k, HIDDEN)
    with torch.no_grad():
        gate.weight.normal_()
    if bias is not None:
        gate.register_buffer("correction", bias)
    router_class = get_router(config.type)
    zero = zero or router_class.default_zero_experts(config, experts)
    site = RouterSite(str(order), order, experts, top_k, HIDDEN, rule or GateRule(), zero)
    router_class.check(config, site)
    install_router(gate, config, site, RoutingLink())
    gate.init_weights(0.02)
    return gate


def set_logits(gate: MoERouter, logits: list[float]) -> torch.Tensor:
    """Make the gate give these logits, over all columns, for the returned token (1, H)."""
    token = F.one_hot(torch.tensor([0]), HIDDEN).float()
    with torch.no_grad():
        gate.weight[:, 0] = torch.tensor(logits[:EXPERTS])
        gate.moe_zero_weight[:, 0] = torch.tensor(logits[EXPERTS:])
    return token


def extended(name: str, zero, router=None, **options):
    router = router or TopKRouterConfig(num_experts_per_tok=3)
    model = tiny_model(name, **options)
    return extend(model, MoeExtension(router=router, zero_experts=ZeroExpertsConfig(**zero)))


def blocks_of(model):
    """(block, experts, router) of every extended layer."""
    spec = get_family(model.config.model_type.removeprefix("moe_ext_")).moe
    for router in iter_routers(model):
        for module in model.modules():
            if any(child is router for child in module.children()):
                yield module, get_by_path(module, spec.experts), router


# --- the routed sum ---


def slow_constant(x, mix, vector):
    a = torch.stack([mix[0] @ x, mix[1] @ x])
    a = a.exp() / a.exp().sum()
    return a[0] * x + a[1] * vector


def slow_expert(x, up, down):
    gate, value = (up @ x).chunk(2)
    return down @ (gate / (1 + torch.exp(-gate)) * value)


def slow_sum(x, index, weights, experts, zero):
    """One token: (H), (K), (K)."""
    real, out = len(experts["down"]), torch.zeros_like(x)
    for number, weight in zip(index.tolist(), weights, strict=True):
        if number < real:
            out = out + weight * slow_expert(x, experts["up"][number], experts["down"][number])
        elif real < number <= real + zero["copy"]:
            out = out + weight * x
        elif number > real:
            which = number - real - 1 - zero["copy"]
            out = out + weight * slow_constant(x, experts["mix"][which], experts["vector"][which])
    return out


@pytest.mark.parametrize("implementation", ["moe_ext", "eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("zero", [MIXED, {"constant": 3}, {"copy": 1}, {"zero": 2, "copy": 3}], ids=str)
def test_routed_sum_and_gradients_equal_reference(zero, implementation):
    zero = {"zero": 0, "copy": 0, "constant": 0} | zero
    model = extended("mixtral", zero)
    model.set_experts_implementation(implementation)
    _, experts, _ = next(blocks_of(model))
    choices = 8 + 1 + zero["copy"] + zero["constant"]
    index = torch.stack([torch.randperm(choices)[:4] for _ in range(40)])
    assert set(index.unique().tolist()) == set(range(choices))
    hidden, weights = torch.randn(40, 32), torch.rand(40, 4).masked_fill(index == 8, 0)
    tensors = {"hidden": hidden, "weights": weights, "up": experts.gate_up_proj, "down": experts.down_proj}
    if zero["constant"]:
        tensors |= {"mix": experts.moe_zero_experts.mix, "vector": experts.moe_zero_experts.vector}
    double = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    hidden.requires_grad_()
    weights.requires_grad_()
    out = experts(hidden, index, weights)
    expected = torch.stack(
        [slow_sum(double["hidden"][t], index[t], double["weights"][t], double, zero) for t in range(40)]
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(out)
    (out * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad.double(), double[name].grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "name",
    [pytest.param("switch_transformers", marks=needs_switch), "dbrx", "llama4", "jetmoe", "deepseek_v3", "muse_spark"],
)
def test_zero_experts_add_to_the_sum_of_real_ones(name):
    """Blocks of every form: the difference to the same routing without them is the sum of a loop."""
    model = extended(name, MIXED, TopKRouterConfig(num_experts_per_tok=3, score="softmax"))
    block, experts, router = next(blocks_of(model))
    owner = block if hasattr(block, "moe_zero_experts") else experts
    run = owner.run if owner is block else owner
    with torch.no_grad():
        router.moe_zero_weight.normal_(std=0.5)
    hidden = torch.randn(30, 32)
    record = router.decide(hidden)
    if name == "muse_spark":  # its experts work in another width than its gate
        hidden = torch.randn(30, experts.hidden_dim)
    free = record.index > record.num_experts
    assert free.any(dim=-1).sum() > 5
    with torch.no_grad():
        out = run(hidden, record.index, record.weights)
        without = run(hidden, record.index.masked_fill(free, record.num_experts), record.weights.masked_fill(free, 0))
    parts = {name: p.detach().double() for name, p in owner.moe_zero_experts.named_parameters()}
    parts["down"] = [None] * record.num_experts
    index = record.index.masked_fill(~free, record.num_experts)
    rows = zip(hidden.double(), index, record.weights.detach().double(), strict=True)
    expected = torch.stack([slow_sum(x, i, w, parts, MIXED) for x, i, w in rows])
    torch.testing.assert_close((out - without).double(), expected, rtol=1e-4, atol=1e-5)


def test_constant_without_mixing_is_halfway():
    """W = 0: 0.5 x + 0.5 v; and the gradient of v is half of what its tokens send back."""
    constant = ConstantExperts(2, HIDDEN, torch.device("cpu"), torch.float32)
    constant.init_weights(0.02)
    constant.mix.data.zero_()
    hidden, weights, upstream = torch.randn(5, HIDDEN), torch.rand(5, 2), torch.randn(5, HIDDEN)
    weights[3:, 0] = 0
    out = constant(hidden, weights)
    each = 0.5 * hidden[:, None] + 0.5 * constant.vector
    torch.testing.assert_close(out, (weights[..., None] * each).sum(dim=1))
    out.backward(upstream)
    torch.testing.assert_close(constant.vector.grad, 0.5 * weights.T @ upstream)


def test_null_experts_install_nothing_on_the_experts():
    stock = tiny_model("mixtral")
    names = list(stock.model.layers[0].mlp.experts.state_dict())
    _, experts, router = next(blocks_of(extended("mixtral", {"zero": 3})))
    assert not hasattr(experts, "moe_zero_ids") and list(experts.state_dict()) == names
    index, weights = torch.full((4, 2), 8), torch.zeros(4, 2)
    assert (experts(torch.randn(4, 32), index, weights) == 0).all()
    assert router.moe_zero_weight.shape == (3, 32)


@needs_switch
def test_switch_capacity_does_not_drop_copies():
    model = extended("switch_transformers", {"copy": 1}, TopKRouterConfig())
    block, _, router = next(blocks_of(model))
    router.expert_capacity = 1
    index = torch.tensor([[9], [3], [3], [9], [8], [9]])
    kept, weights = block.limit(index, torch.ones(6, 1), torch.Size([1, 6, 32]))
    assert kept.flatten().tolist() == [9, 3, 8, 9, 8, 9]
    assert weights.flatten().tolist() == [1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("router", [TopKRouterConfig(num_experts_per_tok=3), TopPRouterConfig(0.7, renormalize=True)])
def test_columns_ids_and_weights(router):
    """Columns are real, zero, copy, constant; ids say "nobody" for zero experts, which have no part in the weights."""
    gate = make_gate(router, ZeroExpertsConfig(zero=2, copy=1, constant=1, init="random"))
    with torch.no_grad():
        gate.moe_zero_weight.normal_()
    record = gate.decide(torch.randn(TOKENS, HIDDEN))
    assert record.logits.shape == record.scores.shape == (TOKENS, 10)
    seen = set()
    for columns, ids, weights, scores in zip(
        record.chosen.tolist(), record.index.tolist(), record.weights, record.scores, strict=True
    ):
        meant = {8: EXPERTS + 1, 9: EXPERTS + 2}
        assert ids == [c if c < EXPERTS else meant.get(c, EXPERTS) for c in columns]
        counts = [c for c in columns if c < EXPERTS or c in meant]
        seen |= set(columns)
        total = sum(scores[c] for c in counts)
        for slot, column in enumerate(columns):
            expected = scores[column] / total if column in counts else torch.tensor(0.0)
            torch.testing.assert_close(weights[slot], expected)
    assert {6, 7, 8, 9} <= seen


def test_sure_null_expert_does_not_underflow_the_others():
    """Dividing probabilities by their sum would lose them beside a null expert with a logit of 60."""
    gate = make_gate(TopKRouterConfig(num_experts_per_tok=3), ZeroExpertsConfig(zero=1))
    record = gate.decide(set_logits(gate, [1.0, 0.0, -9.0, -9.0, -9.0, -9.0, 60.0]))
    assert record.index.tolist() == [[EXPERTS, 0, 1]]
    torch.testing.assert_close(record.weights[0], torch.tensor([0.0, 0.7310586, 0.2689414]))


@pytest.mark.parametrize("router", [{"type": "top_k"}, {"type": "moe_plus_plus"}], ids=str)
def test_autocast_leaves_the_decision_in_float32(router):
    """Copied rows tie in bfloat16, and small differences between choices are lost."""
    model = extend(tiny_model("mixtral"), {"router": router, "zero_experts": MIXED})
    block, experts, gate = next(blocks_of(model))
    hidden = torch.randn(30, 32)
    with torch.no_grad():
        plain = gate.decide(hidden).logits[:, 8:]
        weights = torch.rand(30, 2)
        constants = experts.moe_zero_experts(hidden, weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(gate.decide(hidden).logits[:, 8:], plain)
            assert torch.equal(experts.moe_zero_experts(hidden, weights), constants)
            assert block(hidden[None]).isfinite().all()


# --- starts that change nothing ---


_STRUCTURES = (
    "mixtral",
    "deepseek_v3",  # sigmoid, correction bias, groups
    "deepseek_v2",  # groups, not renormalised
    "olmoe",
    "gemma4",  # a factor per expert
    "gpt_oss",  # softmax over the chosen
    "longcat_flash",  # identity experts of its own
    "switch_transformers",
    "dbrx",
    "llama4",  # sigmoid on the input
    "jetmoe",
)
FAMILIES = tuple(name for name in _STRUCTURES if name in MOE_NAMES)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_identity_start_equals_stock(name, extra):
    """Also with one slot more, which a null expert fills; and restoring is exact."""
    model, inputs = tiny_model(name), tiny_inputs(name)
    with torch.no_grad():
        expected = model(**inputs)[0]
        top_k = max(layer.num_experts_per_tok for layer in describe(model).layers)
        zero = ZeroExpertsConfig(zero=2, copy=1, constant=2, init="identity")
        extend(model, MoeExtension(router=TopKRouterConfig(num_experts_per_tok=top_k + extra), zero_experts=zero))
        with trace_routing(model) as contexts:
            out = model(**inputs)[0]
        torch.testing.assert_close(out, expected, **ROUNDING)
        for context in contexts:
            for record in context.records.values():
                assert ((record.chosen >= record.num_experts).sum(dim=-1) == extra).all()
        restore(model)
        assert torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize("groups", [None, (2, 1, "top2_sum")], ids=["no_groups", "groups"])
def test_held_experts_under_a_negative_correction_bias(groups):
    """Scores plus a negative bias lie below the score 0 of a held expert; it must not be chosen all the same."""
    rule = GateRule(score="sigmoid", bias="correction", groups=groups)
    bias = torch.full((EXPERTS,), -5.0)
    zero = ZeroExpertsConfig(zero=2, copy=1, init="identity")
    gate = make_gate(TopKRouterConfig(num_experts_per_tok=3), zero, rule=rule, bias=bias)
    plain = make_gate(TopKRouterConfig(num_experts_per_tok=2), None, rule=rule, bias=bias)
    plain.weight = gate.weight
    hidden = torch.randn(TOKENS, HIDDEN)
    found, expected = gate.decide(hidden), plain.decide(hidden)
    assert (found.chosen[:, 0] == EXPERTS).all()
    assert torch.equal(found.index[:, 1:], expected.index)
    torch.testing.assert_close(found.weights[:, 1:], expected.weights)


def test_odds_grow_linearly_and_end_free():
    zero = ZeroExpertsConfig(zero=1, copy=1, init="identity", warmup_steps=10)
    gate = make_gate(TopKRouterConfig(num_experts_per_tok=2), zero)
    free = make_gate(TopKRouterConfig(num_experts_per_tok=2), ZeroExpertsConfig(zero=1, copy=1))
    with torch.no_grad():
        gate.moe_zero_weight.normal_()
    free.weight, free.moe_zero_weight = gate.weight, gate.moe_zero_weight
    hidden = torch.randn(200, HIDDEN)
    end, picks = free.decide(hidden), []
    for step in range(0, 11):
        gate.schedule(step, 20)
        record = gate.decide(hidden)
        odds = record.scores[:, EXPERTS:] / record.scores[:, :1]
        torch.testing.assert_close(odds, step / 10 * end.scores[:, EXPERTS:] / end.scores[:, :1], rtol=1e-5, atol=1e-5)
        picks.append(int((record.chosen >= EXPERTS).sum()))
    assert picks[0] == 0 and picks == sorted(picks) and picks[5] > 10  # by and by, not at the end
    assert torch.equal(record.index, end.index) and torch.equal(record.weights, end.weights)
    gate.schedule(20, 20)
    assert torch.equal(gate.decide(hidden).weights, end.weights)


def test_filled_slot_becomes_free():
    """The null expert of an extra slot is chosen by all at first, and competes at the end."""
    zero = ZeroExpertsConfig(zero=1, init="identity", warmup_steps=10)
    gate = make_gate(TopKRouterConfig(num_experts_per_tok=3), zero)
    hidden, shares = torch.randn(300, HIDDEN), []
    for step in (0, 5, 9, 10):
        gate.schedule(step, 10)
        shares.append(float((gate.decide(hidden).chosen == EXPERTS).any(dim=-1).float().mean()))
    assert shares[0] == 1 and shares[-1] < 0.9 and shares == sorted(shares, reverse=True)


def test_identity_start_learns_to_use_them():
    """Training through a warm-up gives their rows gradients and, in the end, tokens."""
    model = extended("mixtral", {"copy": 1, "constant": 1, "init": "identity", "warmup_steps": 4}, TopKRouterConfig())
    inputs = tiny_inputs("mixtral")
    model.train()
    sizes = []
    for step in (0, 3):
        for router in iter_routers(model):
            router.schedule(step, 8)
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        sizes.append(sum(router.moe_zero_weight.grad.abs().sum().item() for router in iter_routers(model)))
    assert sizes[0] == 0 and sizes[1] > 0
    assert all(router.schedule_steps == 4 for router in iter_routers(model))


@pytest.mark.parametrize("kind", ["live", "scratch", "loaded", "saved"])
def test_copied_rows(kind, tmp_path):
    """In turn, of the stock gate's rows, however the model comes about."""
    extension = MoeExtension(router=TopKRouterConfig(), zero_experts=ZeroExpertsConfig(zero=11, init="copy"))
    stock = tiny_model("mixtral")
    if kind in ("scratch", "loaded"):
        config = copy.deepcopy(stock.config)
        config.__class__ = extended_config_class(type(config))
        config.moe_ext = extension.to_dict()
        cls = extended_class(type(stock))
        if kind == "scratch":
            model = cls._from_config(config)
        else:
            stock.save_pretrained(tmp_path)
            model = cls.from_pretrained(tmp_path, config=config)
            assert torch.equal(model.model.layers[1].mlp.gate.weight, stock.model.layers[1].mlp.gate.weight)
    else:
        model = extend(stock, extension)
    for router in iter_routers(model):
        expected = torch.stack([router.weight[i % 8] for i in range(11)])
        assert torch.equal(router.moe_zero_weight, expected) and expected.std() > 0.05
    if kind == "saved":
        for router in iter_routers(model):
            router.moe_zero_weight.data.normal_()
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        for one, two in zip(iter_routers(model), iter_routers(again), strict=True):
            assert torch.equal(one.moe_zero_weight, two.moe_zero_weight)  # not copied anew


def test_trainer_drives_the_warmup(tmp_path):
    zero = {"zero": 2, "copy": 1, "init": "identity", "warmup_steps": 3}
    data = rows([9, 6, 8, 7])
    with pytest.raises(ValueError, match="takes 3 optimizer steps, this training has 2"):
        train(extended("mixtral", zero), data, tmp_path, max_steps=2)
    model = extended("mixtral", zero)
    train(model, data, tmp_path, max_steps=5)
    for router in iter_routers(model):
        assert router.moe_progress.tolist() == [5, 5]
        assert torch.equal(router.hold_zero_experts(torch.zeros(1, 11)), torch.zeros(1, 11))


# --- saving, loading, upcycling, describing ---


@pytest.mark.parametrize("name", ["mixtral", pytest.param("switch_transformers", marks=needs_switch)])
def test_save_load_and_stock_checkpoint(name, tmp_path, poison_memory):
    model, inputs = extended(name, MIXED), tiny_inputs(name)
    with torch.no_grad():
        expected = model(**inputs)[0]
    model.save_pretrained(tmp_path / "ours")
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs)[0], expected)

    stock = tiny_model(name)
    stock.save_pretrained(tmp_path / "stock")
    config = copy.deepcopy(stock.config)
    config.__class__, config.moe_ext = type(model.config), model.config.moe_ext
    fresh = type(model).from_pretrained(tmp_path / "stock", config=config)
    added = {key: tensor for key, tensor in fresh.named_parameters() if "moe_zero" in key}
    assert any("vector" in key for key in added)
    for key, tensor in added.items():
        assert tensor.isfinite().all() and tensor.abs().max() < 6, key
        if key.endswith("vector"):
            assert 0.7 < tensor.std() < 1.3  # standard normal


def test_progress_is_saved(tmp_path):
    """A trained model is not held back again after loading."""
    model = extended("mixtral", {"copy": 2, "init": "identity"}, TopKRouterConfig())
    inputs = tiny_inputs("mixtral")
    for router in iter_routers(model):
        router.schedule(7, 7)
    with torch.no_grad():
        expected = model(**inputs)[0]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**inputs)[0], expected)


@pytest.mark.parametrize(
    "router",
    [
        {"type": "moe_plus_plus", "router_hidden_mult": 2},
        {"type": "moe_plus_plus", "additive": True, "zero_init": "identity"},
        {"type": "adamoe"},
    ],
    ids=str,
)
def test_upcycling_with_a_router_that_brings_them(router, tmp_path):
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    options = {"num_experts": 4, "router": router, "target": "ext"}
    live = upcycle(dense, **options)
    assert all(tensor.isfinite().all() for tensor in live.state_dict().values())
    if router.get("additive"):
        assert live.upcycle_report.preserves_function
    upcycle_checkpoint(str(tmp_path / "dense"), str(tmp_path / "moe"), **options)
    streamed = type(live).from_pretrained(tmp_path / "moe")
    assert streamed.config.moe_ext == live.config.moe_ext
    one, two = live.state_dict(), streamed.state_dict()
    assert one.keys() == two.keys() and any("moe_" in key for key in one)
    for key, tensor in one.items():
        assert torch.equal(two[key], tensor), key


def test_describe_counts_real_experts():
    plain = describe(extended("mixtral", {"zero": 2}, TopKRouterConfig(num_experts_per_tok=8)))
    more = describe(extended("mixtral", {"zero": 2, "constant": 1}, TopKRouterConfig(num_experts_per_tok=10)))
    for layer, other in zip(plain.layers, more.layers, strict=True):
        assert (layer.num_experts, layer.num_experts_per_tok) == (8, 8)
        assert other.num_experts_per_tok == 8 and other.active_parameters == other.parameters
        rows = 32 + 1  # of one more choice, and a constant expert
        assert other.parameters == layer.parameters + rows + 3 * 32


# --- policies, losses, padding ---


def test_row_policies():
    """Each row routed by its policy gives what it gives alone."""
    model, inputs = extended("mixtral", MIXED), tiny_inputs("mixtral")
    inputs["attention_mask"][:] = 1
    with torch.no_grad(), route_rows(model, ["a", "b"], {"b": {"num_experts_per_tok": 1}}):
        both = model(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(both[:1], model(**{k: v[:1] for k, v in inputs.items()}).logits, **ROUNDING)
        with route_rows(model, ["b"], {"b": {"num_experts_per_tok": 1}}):
            alone = model(**{k: v[1:] for k, v in inputs.items()}).logits
    torch.testing.assert_close(both[1:], alone, **ROUNDING)


def slow_mixed(scores, index, real, null, *, grouped, zero_weight, mask):
    rows = [t for t in range(len(scores)) if mask is None or mask[t]]
    columns = scores.shape[1]
    share = [sum(i in index[t].tolist() for t in rows) / len(rows) for i in range(columns)]
    if grouped:
        mean = sum(share[real : real + null]) / max(null, 1)
        share[real : real + null] = [mean] * null
    total = 0.0
    for i in range(columns):
        probability = sum(scores[t, i] for t in rows) / len(rows)
        total = total + (1.0 if i < real else zero_weight) * share[i] * probability
    return columns * total


@pytest.mark.parametrize("masked", [False, True], ids=["all_tokens", "masked"])
@pytest.mark.parametrize(("grouped", "zero_weight"), [(False, 0.3), (True, 1.0), (True, 0.75)])
@pytest.mark.parametrize("null", [0, 1, 3])
def test_mixed_balance_equals_reference(null, grouped, zero_weight, masked):
    columns = EXPERTS + null + 2
    logits = torch.randn(TOKENS, columns, requires_grad=True)
    index = torch.stack([torch.randperm(columns + 1)[:3] for _ in range(TOKENS)])
    mask = torch.rand(TOKENS) < 0.6 if masked else None
    double = logits.detach().double().requires_grad_()
    options = {"grouped": grouped, "zero_weight": zero_weight, "mask": mask}
    found = mixed_balancing_loss(logits.softmax(-1), index, EXPERTS, null, **options)
    expected = slow_mixed(double.softmax(-1), index, EXPERTS, null, **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.double(), double.grad, rtol=1e-4, atol=1e-6)


def test_mixed_balance_without_options_is_the_plain_one():
    scores = torch.randn(TOKENS, 9).softmax(-1)
    index = torch.stack([torch.randperm(10)[:3] for _ in range(TOKENS)])
    torch.testing.assert_close(mixed_balancing_loss(scores, index, 6, 2), load_balancing_loss(scores, index))


def test_declared_balance_reaches_the_loss():
    inputs, found = tiny_inputs("mixtral"), []
    router = TopKRouterConfig(num_experts_per_tok=3, balance_coef=1.0)
    for options in ({}, {"balance": "grouped"}, {"balance_weight": 0.0}):
        model = extended("mixtral", {"zero": 3, **options}, router)
        for gate in iter_routers(model):
            with torch.no_grad():
                gate.moe_zero_weight.copy_(gate.weight[:3] * 1.1)
        with trace_routing(model) as contexts:
            model(**inputs)
        total, losses = auxiliary_losses(contexts)
        mask = contexts[0].token_mask(14)
        settings = {"grouped": "balance" in options, "zero_weight": options.get("balance_weight", 1.0), "mask": mask}
        expected = [
            slow_mixed(record.scores.double(), record.chosen, 8, 3, **settings)
            for record in contexts[0].records.values()
        ]
        torch.testing.assert_close(losses["balance"].double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total, losses["balance"])
        found.append(float(total.detach()))
    assert len({round(value, 4) for value in found}) == 3


@pytest.mark.parametrize(
    "router", [{"type": "adamoe"}, {"type": "moe_plus_plus", "capacity_factor": 1.1}, {"type": "top_k"}], ids=str
)
def test_padding_does_not_change_losses(router):
    router = {**router, "balance_coef": 1.0, "z_coef": 1.0, "entropy_coef": 1.0}
    model = extend(tiny_model("mixtral"), {"router": router, "zero_experts": MIXED | {"zero": 8}})
    model.train()
    inputs, found = tiny_inputs("mixtral"), []
    for token in (0, 50):
        ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, token)
        with trace_routing(model) as contexts:
            model(input_ids=ids, attention_mask=inputs["attention_mask"])
        found.append(auxiliary_losses(contexts)[1])
    for name, loss in found[0].items():
        torch.testing.assert_close(found[1][name], loss, msg=name)
    assert set(found[0]) == {"balance", "z", "entropy"}


# --- what is refused ---


def refuse(match, name, zero, router=None):
    model = tiny_model(name)
    before = type(model), list(model.state_dict())
    with pytest.raises(ValueError, match=match):
        extend(model, MoeExtension(router=router, zero_experts=ZeroExpertsConfig(**zero)))
    assert (type(model), list(model.state_dict())) == before


def test_bad_input_is_named():
    top_k = TopKRouterConfig()
    refuse("it can skip experts by itself", "zaya", {"zero": 1}, TopKRouterConfig(score="softmax"))
    refuse("a rule of its own", "phimoe", {"zero": 1}, top_k)
    refuse('`init="copy"` copy rows of a linear stock gate', "gpt_oss", {"zero": 1, "init": "copy"}, top_k)
    refuse("the `moe_plus_plus` router", "mixtral", {"zero": 1, "init": "copy"}, {"type": "moe_plus_plus"})
    three = TopKRouterConfig(num_experts_per_tok=3)
    refuse("fills the 1 slots", "mixtral", {"copy": 2, "init": "identity"}, three)
    refuse("exceeds the 8 experts and 1 zero", "mixtral", {"copy": 1}, TopKRouterConfig(num_experts_per_tok=10))
    refuse("choices of a router of this package", "mixtral", {"zero": 1})
    refuse("does not go with `zero_experts`", "mixtral", {"zero": 1}, SoftMoERouterConfig(allow_non_causal=True))
    for options, match in (
        ({}, "has none"),
        ({"zero": -1}, "`zero` must be non-negative, got -1"),
        ({"zero": 1, "balance_weight": -0.5}, "`balance_weight` must be non-negative"),
        ({"zero": 1, "init": "identity", "warmup_steps": 0}, "`warmup_steps` must be at least 1, got 0"),
        ({"zero": 1, "warmup_steps": 5}, 'goes with `init="identity"`'),
    ):
        with pytest.raises(ValueError, match=match):
            ZeroExpertsConfig(**options)
    with pytest.raises(TypeError, match="`init` of ZeroExpertsConfig"):
        ZeroExpertsConfig(zero=1, init="zeros")


def test_declaration_round_trip():
    zero = ZeroExpertsConfig(zero=1, copy=2, init="identity", warmup_steps=5, balance="grouped", balance_weight=0.5)
    extension = MoeExtension(router=TopKRouterConfig(), zero_experts=zero)
    assert MoeExtension.from_dict(extension.to_dict()) == extension


def test_part_travels_to_the_hub():
    """Files of `modeling/` import torch, transformers and siblings alone."""
    import hf_moe_ext.modeling.moe_zero_experts as module

    lines = Path(module.__file__).read_text().splitlines()
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported <= {"__future__", "dataclasses", "typing", "torch", "transformers", ""}
