"""The layerwise recurrent router against a loop over layers and tokens in float64, and what sharing a cell entails."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers import MixtralForCausalLM

from hf_moe_ext import upcycle, upcycle_checkpoint
from hf_moe_ext.modeling.configuration_moe_ext import LayerExtension, MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_context import RoutingContext, RoutingLink
from hf_moe_ext.modeling.moe_experts import MoeExtGate
from hf_moe_ext.modeling.moe_losses import load_balancing_loss
from hf_moe_ext.modeling.moe_router import GateRule, RouterSite
from hf_moe_ext.modeling.moe_structure import install_router, iter_routers, route_rows, trace_routing
from hf_moe_ext.modeling.router_rmoe import RecurrentCell, RMoERouter, RMoERouterConfig
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.patching import extend, restore
from hf_moe_ext.upcycling.loading import load_upcycled

from .test_routers import chosen, combine, slow_allowed, slow_scores


TOKENS, EXPERTS, HIDDEN, STATE, K, LAYERS = 11, 8, 9, 5, 3, 3
TORCH_CELLS = {"gru": nn.GRUCell, "rnn": nn.RNNCell, "lstm": nn.LSTMCell}
VARIANTS = ("full", "no_recurrence", "detach", "residual")
SMALL = {"state_size": STATE, "init_std": 0.8}
# The name of the cache among the arguments and outputs of a model; newer versions of Transformers have a shorter one.
CACHE = "cache" if "cache" in inspect.signature(MixtralForCausalLM.forward).parameters else "past_key_values"


def make_stack(config: RMoERouterConfig, rule: GateRule | None = None, layers: int = LAYERS) -> list[RMoERouter]:
    """Routers of consecutive layers on plain gates, with a random cell and random recurrent logits."""
    gates, members = [], []
    for order in range(layers):
        gate = MoeExtGate(EXPERTS, K, HIDDEN)
        gate.weight.data.normal_()
        if rule is not None and rule.bias is not None:
            gate.register_buffer(rule.bias, torch.randn(EXPERTS) * 0.3)
        site = RouterSite(str(order), order, EXPERTS, K, HIDDEN, rule or GateRule())
        RMoERouter.check(config, site)
        members.append((config, site))
        install_router(gate, config, site, RoutingLink())
        gates.append(gate)
    RMoERouter.check_stack(members)
    base = nn.Module()
    RMoERouter.setup_stack(base, gates)
    for module in (*gates, base.moe_rmoe_cell):
        module.init_weights(0.02)
    for gate in gates:
        gate.moe_output_weight.data.normal_()
    for bias in (base.moe_rmoe_cell.bias_ih, base.moe_rmoe_cell.bias_hh):
        bias.data.normal_()
    return gates


def route_stack(gates, inputs):
    """The records of all layers for one forward whose gate inputs are given."""
    context = RoutingContext()
    return [gate.route(hidden, context) for gate, hidden in zip(gates, inputs, strict=True)]


def parameters_of(gates) -> dict[str, torch.Tensor]:
    """Everything that is trained, by name, each once."""
    found = {f"cell.{name}": p for name, p in gates[0].moe_base.module.moe_rmoe_cell.named_parameters()}
    for order, gate in enumerate(gates):
        found |= {f"{order}.{name}": p for name, p in gate.named_parameters()}
    return found


# --- references: one token, one layer at a time ---


def slow_cell(kind, x, h, c, p):
    """The equations of 2408.06793 (GRU) and of the two cells that it compares with."""
    n = len(h)
    a = [p["cell.weight_ih"][i * n : (i + 1) * n] @ x + p["cell.bias_ih"][i * n : (i + 1) * n] for i in range(4)]
    b = [p["cell.weight_hh"][i * n : (i + 1) * n] @ h + p["cell.bias_hh"][i * n : (i + 1) * n] for i in range(4)]
    if kind == "rnn":
        return torch.tanh(a[0] + b[0]), c
    if kind == "gru":
        reset, update = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
        new = torch.tanh(a[2] + reset * b[2])
        return (1 - update) * new + update * h, c
    take, forget, out = (torch.sigmoid(a[i] + b[i]) for i in (0, 1, 3))
    c = forget * c + take * torch.tanh(a[2] + b[2])
    return out * torch.tanh(c), c


def slow_stack(config, rule, inputs, p, biases):
    """(T, E) weights and chosen experts of every layer."""
    dense, sets = [[] for _ in inputs], [[] for _ in inputs]
    for token in range(TOKENS):
        h = c = torch.zeros(STATE, dtype=torch.float64)
        before = None
        for order, hidden in enumerate(inputs):
            if config.variant == "no_recurrence":
                h, c = torch.zeros_like(h), torch.zeros_like(c)
            if config.variant == "detach":
                h, c = h.detach(), c.detach()
            x = hidden[token]
            h, c = slow_cell(config.cell, p[f"{order}.moe_input_weight"] @ x, h, c, p)
            logits = p[f"{order}.moe_output_weight"] @ h
            if config.additive:
                logits = logits + p[f"{order}.weight"] @ x
            scores = own = slow_scores(logits, rule.score)
            if config.variant == "residual" and before is not None:
                scores = own + config.residual_coef * before
            before = own
            choice = [s + (0.0 if biases is None else biases[order][i].item()) for i, s in enumerate(scores.tolist())]
            best = sorted(slow_allowed(choice, rule.groups), key=lambda i: -choice[i])[:K]  # noqa: B023
            total = sum(scores[i] for i in best) if rule.renormalize or rule.order == "topk_score" else 1.0
            row = [torch.zeros((), dtype=torch.float64)] * EXPERTS
            for i in best:
                row[i] = scores[i] / total * rule.scale
            dense[order].append(torch.stack(row))
            sets[order].append(best)
    return [torch.stack(rows) for rows in dense], sets


RULES = {
    "plain": GateRule(),
    "raw": GateRule(renormalize=False),
    "late": GateRule(order="topk_score", renormalize=False),
    "sigmoid": GateRule(score="sigmoid", scale=2.5, bias="correction", groups=(4, 2, "top2_sum")),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("additive", [True, False], ids=["additive", "alone"])
@pytest.mark.parametrize("cell", TORCH_CELLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_reference(variant, cell, additive, rule):
    """Choices, weights, and the gradients of inputs, cell and matrices, over three layers."""
    config = RMoERouterConfig(**SMALL, cell=cell, variant=variant, additive=additive, residual_coef=0.6)
    gates = make_stack(config, rule)
    inputs = [torch.randn(TOKENS, HIDDEN, requires_grad=True) for _ in gates]
    records = route_stack(gates, inputs)

    mine = parameters_of(gates)
    theirs = {name: p.detach().double().requires_grad_() for name, p in mine.items()}
    their_inputs = [hidden.detach().double().requires_grad_() for hidden in inputs]
    biases = None if rule.bias is None else [gate.correction for gate in gates]
    expected, sets = slow_stack(config, rule, their_inputs, theirs, biases)
    total = expected_total = 0.0
    for record, dense, best in zip(records, expected, sets, strict=True):
        assert chosen(record) == best
        torch.testing.assert_close(combine(record).double(), dense, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(record.scores.sum(-1), torch.ones(TOKENS))
        upstream = torch.randn(TOKENS, EXPERTS)
        total = total + (combine(record) * upstream).sum()
        expected_total = expected_total + (dense * upstream.double()).sum()
    total.backward()
    expected_total.backward()
    for a, b in zip(inputs, their_inputs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in mine.items():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wanted = torch.zeros_like(theirs[name]) if theirs[name].grad is None else theirs[name].grad
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", TORCH_CELLS)
def test_cell_equals_torch(kind):
    """The modules of PyTorch, with copied weights, over several steps."""
    cell = RecurrentCell(RMoERouterConfig(cell=kind, state_size=STATE), torch.device("cpu"), torch.float32)
    theirs = TORCH_CELLS[kind](STATE, STATE)
    cell.load_state_dict(theirs.state_dict())
    states = (torch.zeros(TOKENS, STATE),) * (2 if kind == "lstm" else 1)
    expected = states
    for _ in range(4):
        x = torch.randn(TOKENS, STATE)
        states = cell(x, states)
        expected = theirs(x, expected if kind == "lstm" else expected[0])
        expected = expected if kind == "lstm" else (expected,)
        for a, b in zip(states, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_path(variant):
    """Whether a layer's routing depends on the router input of the layer before."""
    gates = make_stack(RMoERouterConfig(**SMALL, variant=variant, additive=False))
    inputs = [torch.randn(TOKENS, HIDDEN) for _ in gates]
    changed = [torch.randn(TOKENS, HIDDEN), *inputs[1:]]
    first, second = (route_stack(gates, given)[1] for given in (inputs, changed))
    assert torch.equal(first.logits, second.logits) == (variant == "no_recurrence")
    assert torch.equal(first.scores, second.scores) == (variant == "no_recurrence")


@pytest.mark.parametrize("additive", [True, False], ids=["additive", "alone"])
@pytest.mark.parametrize("cell", TORCH_CELLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_path(variant, cell, additive):
    """Whether the routing of a layer teaches the reduction matrix of the layer before."""
    gates = make_stack(RMoERouterConfig(**SMALL, variant=variant, cell=cell, additive=additive))
    inputs = [torch.randn(TOKENS, HIDDEN) for _ in gates]
    (route_stack(gates, inputs)[1].logits * torch.randn(TOKENS, EXPERTS)).sum().backward()
    gradient = gates[0].moe_input_weight.grad
    if variant in ("full", "residual"):
        assert gradient.abs().max() > 1e-3
    else:
        assert gradient is None or (gradient == 0).all()
    assert gates[1].moe_input_weight.grad.abs().max() > 1e-3


def test_own_score_and_number_of_experts():
    gates = make_stack(RMoERouterConfig(**SMALL, score="sigmoid", num_experts_per_tok=2), GateRule(renormalize=False))
    for record in route_stack(gates, [torch.randn(TOKENS, HIDDEN) for _ in gates]):
        torch.testing.assert_close(record.weights, record.logits.sigmoid().topk(2).values)


def test_balance_is_on_by_default_and_off_in_an_identity_start():
    assert RMoERouterConfig().balance_coef == 0.01
    assert RMoERouter.identity_config(RouterSite("0", 0, 8, 2, 4, GateRule())) == RMoERouterConfig(balance_coef=0.0)


def test_first_residual_layer_has_nothing_to_add():
    config = RMoERouterConfig(**SMALL, variant="residual", residual_coef=0.5)
    gates = make_stack(config)
    records = route_stack(gates, [torch.randn(TOKENS, HIDDEN) for _ in gates])
    own = [record.logits.softmax(-1) for record in records]
    torch.testing.assert_close(records[0].scores, own[0])
    torch.testing.assert_close(records[2].scores, (own[2] + 0.5 * own[1]) / 1.5)


def test_without_a_context_every_layer_is_the_first():
    gates = make_stack(RMoERouterConfig(**SMALL, additive=False))
    hidden = torch.randn(TOKENS, HIDDEN)
    alone = gates[1].route(hidden, None)
    torch.testing.assert_close(alone.logits, gates[1].route(hidden, RoutingContext()).logits)


# --- in a model ---


def config_for_model(**changes) -> RMoERouterConfig:
    return RMoERouterConfig(**({"state_size": 8, "init_std": 0.5, "additive": False} | changes))


@functools.cache
def _stock(name: str):
    return tiny_model(name)


def made(name: str = "mixtral", zero: ZeroExpertsConfig | None = None, layers=None, **changes):
    torch.manual_seed(1)
    extension = MoeExtension(router=config_for_model(**changes), zero_experts=zero, layers=layers or {})
    return extend(copy.deepcopy(_stock(name)), extension)


@torch.no_grad()
def logits(model, inputs=None):
    return model(**(inputs or tiny_inputs("mixtral"))).logits


def cells(model) -> list[RecurrentCell]:
    return [module for module in model.modules() if isinstance(module, RecurrentCell)]


GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_additive_start_generates_as_the_stock_model(name):
    stock, inputs = copy.deepcopy(_stock(name)), tiny_inputs(name)
    expected, tokens = logits(stock, inputs), stock.generate(**inputs, **GENERATE)
    model = made(name, additive=True)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(model.generate(**inputs, **GENERATE), tokens)


def test_additive_start_learns():
    """The first step moves the zero matrix alone; from then on, cell and reductions learn too."""
    model = made(additive=True, balance_coef=0.0).train()
    batch = tiny_inputs("mixtral")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(2):
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients = [cells(model)[0].weight_ih.grad, *(gate.moe_input_weight.grad for gate in iter_routers(model))]
        for gradient in gradients:
            assert (gradient.abs().sum() > 0) == (step == 1)
        assert all(gate.moe_output_weight.grad.abs().sum() > 0 for gate in iter_routers(model))
        optimizer.step()


@pytest.mark.parametrize("changes", [{}, {"cell": "lstm", "variant": "residual"}], ids=["paper", "lstm_residual"])
def test_cached_forward_equals_full(changes):
    """The state runs over depth; no cache over positions is needed."""
    model, ids = made(**changes), tiny_inputs("mixtral", batch=1)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        past, parts = None, []
        for position in range(ids.shape[1]):
            out = model(input_ids=ids[:, position : position + 1], use_cache=True, **{CACHE: past})
            past, parts = out[CACHE], [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


def checkpoint(model, use_reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def gradients_of(model, batch):
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", [{}, {"cell": "lstm", "variant": "residual"}], ids=["paper", "lstm_residual"])
def test_gradient_checkpointing_keeps_gradients_between_layers(changes):
    model, batch = made(**changes).train(), tiny_inputs("mixtral")
    plain = gradients_of(model, batch)
    assert plain["model.moe_rmoe_cell.weight_hh"].abs().max() > 1e-5
    checkpoint(model, use_reentrant=False)
    recomputed = gradients_of(model, batch)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    # Two forwards before one backward: each is recomputed with the state of its own forward.
    other = {key: value.flip(-1) for key, value in batch.items()}
    second = gradients_of(model, other)
    model.zero_grad()
    sum(model(**each, labels=each["input_ids"]).loss for each in (batch, other)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain[name] + second[name], rtol=1e-4, atol=1e-5)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="reentrant"):
        checkpoint(made(), use_reentrant=True)


def test_state_dict_holds_one_cell(tmp_path):
    model = made()
    keys = [key for key in model.state_dict() if "rmoe_cell" in key]
    assert keys == [f"model.moe_rmoe_cell.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    assert len(cells(model)) == 1 and len(list(iter_routers(model))) == 3
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert torch.equal(logits(again.eval()), logits(model))


def test_the_cell_is_shared_by_all_layers():
    model = made()
    before = logits(model)
    with trace_routing(model) as contexts:
        logits(model)
        cells(model)[0].weight_ih.data.mul_(2)
        logits(model)
    for key, record in contexts[0].records.items():
        assert not torch.equal(record.logits, contexts[1].records[key].logits)
    assert not torch.equal(logits(model), before)


def test_a_copy_has_a_cell_of_its_own():
    model = made()
    expected = logits(model)
    for twin, inner in ((copy.deepcopy(model), "model"), (copy.deepcopy(model.model), "")):
        base = twin.get_submodule(inner) if inner else twin
        assert all(gate.moe_base.module is base for gate in iter_routers(twin))
        assert base.moe_rmoe_cell is not model.model.moe_rmoe_cell
        base.moe_rmoe_cell.weight_ih.data.zero_()
    assert torch.equal(logits(model), expected)


def test_a_gate_copied_alone_keeps_the_cell():
    """As PEFT does with `modules_to_save`: the cell is trained for all layers, or for none."""
    model = made()
    gate = next(iter_routers(model))
    assert copy.deepcopy(gate).moe_base.module is model.model


def test_a_replaced_cell_is_used():
    """PEFT puts a wrapper in the cell's place."""
    model = made()
    expected, cell = logits(model), model.model.moe_rmoe_cell

    class Wrapper(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.inner = cell

        def forward(self, *args):
            self.calls += 1
            return self.inner(*args)

    model.model.moe_rmoe_cell = Wrapper()
    assert torch.equal(logits(model), expected) and model.model.moe_rmoe_cell.calls == 3


def test_restore_takes_the_cell_away():
    stock = copy.deepcopy(_stock("mixtral"))
    expected, keys = logits(stock), list(stock.state_dict())
    trained = {name: p.requires_grad for name, p in stock.named_parameters()}
    model = extend(stock, MoeExtension(router=config_for_model()))
    assert not model.model.layers[0].mlp.gate.weight.requires_grad  # replaced by the recurrent logits
    restore(model)
    assert list(model.state_dict()) == keys and not cells(model)
    assert not any(hasattr(layer.mlp.gate, "moe_base") for layer in model.model.layers)
    assert torch.equal(logits(model), expected)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained


def test_live_extension_initialises_everything(poison_memory):
    model = made(init_std=0.3, state_size=64)
    cell = cells(model)[0]
    assert (cell.bias_ih == 0).all() and (cell.bias_hh == 0).all()
    assert cell.weight_hh.std().item() == pytest.approx(0.3, rel=0.05)
    for gate in iter_routers(model):
        assert gate.moe_input_weight.std().item() == pytest.approx(0.3, rel=0.1)
        assert gate.moe_output_weight.std().item() == pytest.approx(0.3, rel=0.2)
    assert all((gate.moe_output_weight == 0).all() for gate in iter_routers(made(additive=True)))


def test_dense_and_stock_layers_hand_the_state_on():
    """A DeepSeek model begins with a dense layer; a layer that is left stock stands between."""
    assert [gate.moe_site.key for gate in iter_routers(made("deepseek_v3"))] == ["1", "2"]
    model = made(layers={"1": None})
    with trace_routing(model) as contexts:
        logits(model)
        next(iter_routers(model)).moe_input_weight.data.mul_(2)
        logits(model)
    assert list(contexts[0].records) == ["0", "2"]
    assert contexts[0].carry[1, "rmoe_state"].shape == (14, 8)
    assert not torch.equal(contexts[0].records["2"].logits, contexts[1].records["2"].logits)


# --- upcycling ---


UPCYCLE = {"num_experts": 4, "num_experts_per_tok": 2, "seed": 3}


@pytest.mark.parametrize("additive", [True, False], ids=["additive", "alone"])
def test_upcycling_fills_the_cell_alike_on_three_ways(tmp_path, additive, poison_memory):
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    router = config_for_model(additive=additive)
    live = upcycle(dense, router=router, target="ext", **UPCYCLE)
    if additive:
        assert live.upcycle_report.preserves_function
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", router=router, target="ext", **UPCYCLE)
    stored = type(live).from_pretrained(tmp_path / "moe")
    loaded = load_upcycled(tmp_path / "dense", router=router, target="ext", **UPCYCLE)
    state = live.state_dict()
    assert state["model.moe_rmoe_cell.weight_hh"].std() > 0.3
    for other in (stored, loaded):
        assert len(cells(other)) == 1 and other.state_dict().keys() == state.keys()
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        assert torch.equal(logits(other.eval()), logits(live.eval()))


def test_each_stack_has_a_cell(tmp_path):
    model = upcycle(tiny_model("t5"), router=config_for_model(), target="ext", **UPCYCLE)
    assert [name for name, module in model.named_modules() if isinstance(module, RecurrentCell)] == [
        "encoder.moe_rmoe_cell",
        "decoder.moe_rmoe_cell",
    ]
    inputs = tiny_inputs("t5")
    expected = logits(model, inputs)
    model.encoder.moe_rmoe_cell.weight_ih.data.zero_()
    with trace_routing(model) as contexts:
        assert not torch.equal(logits(model, inputs), expected)
    orders = [sorted({order for order, _ in context.carry}) for context in contexts]
    assert len(orders) == 2 and not set(orders[0]) & set(orders[1])


# --- precision, zero-computation experts, rows, padding ---


def test_bfloat16_computes_the_recurrence_in_float32():
    """Weights in bfloat16, and automatic casting: the same as the float32 cell of the rounded weights."""
    cell = RecurrentCell(RMoERouterConfig(state_size=64), torch.device("cpu"), torch.float32)
    nn.init.normal_(cell.weight_ih, std=0.3)
    nn.init.normal_(cell.weight_hh, std=0.3)
    for bias in (cell.bias_ih, cell.bias_hh):
        nn.init.zeros_(bias)
    cell.to(torch.bfloat16)
    x, h = torch.randn(50, 64), torch.randn(50, 64)
    expected = copy.deepcopy(cell).float()(x, (h,))[0]
    found = cell(x, (h,))[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast = cell(x, (h,))[0]
    assert found.dtype == cast.dtype == torch.float32
    assert torch.equal(found, expected) and torch.equal(cast, expected)


def test_automatic_casting_does_not_reach_the_router():
    gates = make_stack(RMoERouterConfig(**SMALL, additive=False))
    inputs = [torch.randn(TOKENS, HIDDEN) for _ in gates]
    plain = route_stack(gates, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = route_stack(gates, inputs)
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(plain, cast, strict=True))


ZERO = {"null": ZeroExpertsConfig(zero=2), "all": ZeroExpertsConfig(zero=1, copy=1, constant=1)}


@pytest.mark.parametrize("additive", [True, False], ids=["additive", "alone"])
@pytest.mark.parametrize("zero", ZERO.values(), ids=ZERO)
def test_zero_computation_experts(zero, additive):
    """They are columns of the recurrent logits like any other; a slot that picks a null expert is unused."""
    try:
        model = made(zero=zero, additive=additive, variant="residual")
    except (ValueError, NotImplementedError) as reason:
        pytest.skip(str(reason))
    for gate in iter_routers(model):
        gate.moe_output_weight.data.normal_()
    with trace_routing(model) as contexts:
        model.train()(**tiny_inputs("mixtral"), labels=tiny_inputs("mixtral")["input_ids"]).loss.backward()
    null = 0
    for record in contexts[0].records.values():
        assert record.scores.shape[-1] == 8 + zero.total and record.num_experts == 8
        torch.testing.assert_close(record.scores.sum(-1), torch.ones(len(record.scores)))
        is_null = (record.choices >= 8) & (record.choices < 8 + zero.zero)
        assert (record.index[is_null] == 8).all() and (record.weights[is_null] == 0).all()
        torch.testing.assert_close(record.index[record.choices < 8], record.choices[record.choices < 8])
        null += int(is_null.sum())
    assert null > 0
    for gate in iter_routers(model):
        assert gate.moe_output_weight.grad[8:].abs().sum() > 0
        assert gate.moe_zero_weight.requires_grad == additive


@pytest.mark.parametrize("additive", [True, False], ids=["additive", "alone"])
def test_zero_computation_experts_are_held_back_at_first(additive):
    """Nothing of their odds at first, half after half of the warm-up."""
    model = made(zero=ZeroExpertsConfig(copy=2, init="identity"), additive=additive)
    gate, hidden, odds = next(iter_routers(model)), torch.randn(TOKENS, 32), {}
    for step in (0, 5, 10):
        gate.schedule(step, 10)
        scores = gate.route(hidden, None).scores
        odds[step] = scores[:, 8:] / scores[:, :8].sum(-1, keepdim=True)
    assert (odds[0] == 0).all() and (odds[10] > 0).all()
    torch.testing.assert_close(odds[5], odds[10] / 2)


def test_rows_with_policies_keep_their_own_state():
    """Half of the rows without recurrence: each row is routed as in a model of its kind."""
    model, ids = made(), tiny_inputs("mixtral", batch=4)["input_ids"]

    def routed(**options):
        with trace_routing(model) as contexts:
            logits(model, {"input_ids": ids, **options})
        return torch.stack([record.logits for record in contexts[0].records.values()]).unflatten(1, (4, -1))

    plain = routed()
    with route_rows(model, ["full", "cut", "full", "cut"], {"cut": {"variant": "no_recurrence"}}):
        mixed = routed()
    with route_rows(model, ["cut"] * 4, {"cut": {"variant": "no_recurrence"}}):
        cut = routed()
    # Rows of a policy are multiplied as a batch of their own, which is rounded by its size on some machines.
    torch.testing.assert_close(mixed[:, [0, 2]], plain[:, [0, 2]], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[:, [1, 3]], cut[:, [1, 3]], rtol=0, atol=1e-5)
    assert (plain[1] - cut[1]).abs().max() > 1e-2


def test_padding_does_not_count():
    """The balance loss of the real tokens alone."""
    model, batch = made(balance_coef=1.0).train(), tiny_inputs("mixtral")
    with trace_routing(model) as contexts:
        model(**batch, labels=batch["input_ids"])
    mask = batch["attention_mask"].reshape(-1).bool()
    assert not mask.all()
    for record in contexts[0].records.values():
        found = RMoERouter.aux_losses(record, contexts[0].token_mask(len(mask)))
        expected = load_balancing_loss(record.scores[mask], record.index[mask])
        torch.testing.assert_close(found, {"balance": expected})


# --- what is refused ---


BAD = {
    "state_size": ({"state_size": 0}, "`state_size` must be at least 1, got 0"),
    "coef": ({"residual_coef": -1.0}, "`residual_coef` must be non-negative, got -1.0"),
    "std": ({"init_std": 0.0}, "`init_std` must be positive, got 0.0"),
    "k": ({"num_experts_per_tok": 0}, "`num_experts_per_tok` must be at least 1, got 0"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        RMoERouterConfig(**settings)


@pytest.mark.parametrize("name", ["cell", "variant"])
def test_config_refuses_unknown_names(name):
    with pytest.raises(TypeError, match=f"`{name}` of RMoERouterConfig must be one of"):
        RMoERouterConfig(**{name: "other"})


REFUSED = {
    "k_above_experts": (config_for_model(num_experts_per_tok=9), {}, "exceeds the 8 experts"),
    "other_size": (config_for_model(), {"1": config_for_model(state_size=4)}, "`state_size` must be equal"),
    "other_cell": (config_for_model(), {"2": config_for_model(cell="rnn")}, "`cell` must be equal"),
    "other_std": (config_for_model(), {"2": config_for_model(init_std=0.1)}, "`init_std` must be equal"),
    "gap": (config_for_model(), {"1": TopKRouterConfig()}, "must follow each other"),
}


@pytest.mark.parametrize(("router", "others", "message"), REFUSED.values(), ids=REFUSED)
def test_model_refuses_and_stays_unchanged(router, others, message):
    stock = copy.deepcopy(_stock("mixtral"))
    expected, keys = logits(stock), list(stock.state_dict())
    layers = {key: LayerExtension(router=other) for key, other in others.items()}
    with pytest.raises(ValueError, match=message):
        extend(stock, MoeExtension(router=router, layers=layers))
    assert list(stock.state_dict()) == keys and torch.equal(logits(stock), expected)


def test_residual_needs_as_many_choices_in_every_layer():
    extension = MoeExtension(
        router=config_for_model(variant="residual"),
        layers={"1": LayerExtension(zero_experts=ZeroExpertsConfig(zero=2))},
    )
    with pytest.raises(ValueError, match='has 8 experts to choose from and layer "1" has 10'):
        extend(copy.deepcopy(_stock("mixtral")), extension)


def test_a_rule_that_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="a rule of its own"):
        make_stack(RMoERouterConfig(**SMALL), GateRule(score="custom"))
    with pytest.raises(NotImplementedError, match="a rule of its own"):
        RMoERouter.identity_config(RouterSite("0", 0, 8, 2, 4, GateRule(score="custom")))
