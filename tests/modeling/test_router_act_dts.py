"""The activation dense-to-sparse gate: a slow reference, and the facts about its parameters that the paper shows."""

from __future__ import annotations

import copy
import functools
import logging
import math

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from transformers import Trainer, TrainingArguments

from hf_moe_ext import MoETrainer, MoETrainingArguments
from hf_moe_ext.modeling import router_act_dts
from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_losses import load_balancing_loss
from hf_moe_ext.modeling.moe_router import GateRule, RouterSite
from hf_moe_ext.modeling.moe_structure import iter_routers, route_rows, trace_routing
from hf_moe_ext.modeling.router_act_dts import ActDTSRouter, ActDTSRouterConfig, activated_scores
from hf_moe_ext.patching import describe, extend, restore

from .test_routers import EXPERTS, HIDDEN, TOKENS, K, chosen, combine, make_gate, slow_allowed, slow_scores


SMOOTH = ("sigmoid", "tanh", "gelu", "silu")
SLOW = {
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "tanh": math.tanh,
    "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
    "silu": lambda z: z / (1 + math.exp(-z)),
    "identity": lambda z: z,
}


def fixed(temperature: float = 0.3, **settings) -> ActDTSRouterConfig:
    return ActDTSRouterConfig(temperature=temperature, **({"temperature_mode": "fixed"} | settings))


# --- the router against one token at a time, in float64 ---


def slow_activation(name: str, z: torch.Tensor) -> torch.Tensor:
    """By the formula, with the derivative by a central difference."""
    step = 1e-6
    value, slope = SLOW[name](z.item()), (SLOW[name](z.item() + step) - SLOW[name](z.item() - step)) / (2 * step)
    return value + slope * (z - z.detach())


def slow_route(hidden, weight, bias, temperature, config, rule, correction=None, mix=1.0):
    """(T, E) weights and chosen experts."""
    scale = config.homotopy_scale if config.homotopy else 1.0
    rows, sets = [], []
    for token in hidden:
        logits = []
        for i in range(len(weight)):
            z = (weight[i] * token).sum()
            u = (1 - mix) * z + mix * scale * slow_activation(config.activation, z / scale)
            logits.append((u + (0.0 if bias is None else bias[i])) / temperature)
        kind = config.score or rule.score
        scores = slow_scores(torch.stack(logits), kind)
        total = scores.sum().item() if kind == "sigmoid" else 1.0
        choice = [s + (0.0 if correction is None else correction[i]) for i, s in enumerate(scores.tolist())]
        groups = None if config.select == "dense" else rule.groups
        order = sorted(slow_allowed(choice, groups), key=lambda i: -choice[i])  # noqa: B023
        if config.select == "top_k":
            order = order[: config.num_experts_per_tok or K]
        if config.select == "threshold":
            order = order[: config.num_experts_per_tok or len(order)]
            order = [i for rank, i in enumerate(order) if rank == 0 or scores[i].item() / total > config.threshold]
        divide = config.select == "threshold" or rule.renormalize or rule.order == "topk_score"
        row = [torch.zeros((), dtype=torch.float64)] * len(weight)
        for i in order:
            row[i] = scores[i] / (sum(scores[j] for j in order) if divide else 1.0) * rule.scale
        rows.append(torch.stack(row))
        sets.append(order)
    return torch.stack(rows), sets


CASES = {
    "sigmoid": fixed(),
    "tanh": fixed(activation="tanh"),
    "gelu": fixed(activation="gelu", temperature=1.3),
    "silu": fixed(activation="silu"),
    "identity": fixed(activation="identity", temperature=2.0),
    "no_bias": fixed(gate_bias=False),
    "k1": fixed(num_experts_per_tok=1),
    "own_softmax": fixed(score="softmax"),
    "own_sigmoid": fixed(score="sigmoid"),
    "threshold": fixed(select="threshold", threshold=0.1),
    "threshold_slots": fixed(select="threshold", threshold=0.02, num_experts_per_tok=4),
    "high_threshold": fixed(select="threshold", threshold=0.95, temperature=1.0),
    "dense": fixed(select="dense"),
    "learned": ActDTSRouterConfig(temperature=0.3),
    "homotopy": fixed(homotopy=True, homotopy_scale=1.7),
}
RULES = {
    "plain": GateRule(),
    "raw": GateRule(renormalize=False),
    "late": GateRule(order="topk_score", renormalize=False),
    "sigmoid": GateRule(score="sigmoid", scale=2.5, bias="correction", groups=(4, 2, "top2_sum")),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_equals_reference(config, rule):
    """Choice, weights, and the gradients of input, W, bias and temperature."""
    correction = torch.randn(EXPERTS) * 0.3 if rule.bias else None
    gate = make_gate(config, rule=rule, bias=correction)
    mix = 1.0
    if config.homotopy:
        gate.schedule(3, 10)
        mix = 0.3
    if config.gate_bias:
        gate.moe_gate_bias.data.normal_(std=0.3)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    record = gate.decide(hidden)
    slots = config.num_experts_per_tok or (K if config.select == "top_k" else EXPERTS)
    assert record.index.shape == (TOKENS, slots)

    names = [name for name, _ in gate.named_parameters()]
    theirs = {name: p.detach().double().requires_grad_() for name, p in gate.named_parameters()}
    their_hidden = hidden.detach().double().requires_grad_()
    temperature = config.temperature
    if config.temperature_mode == "learned":
        temperature = (1 + theirs["moe_temperature_bias"].exp()).log()[0] + config.temperature_min
    bias = theirs.get("moe_gate_bias")
    added = None if correction is None else correction.tolist()
    expected, sets = slow_route(their_hidden, theirs["weight"], bias, temperature, config, rule, added, mix)
    assert chosen(record) == sets
    dense = combine(record)
    torch.testing.assert_close(dense.double(), expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(dense)
    (dense * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), their_hidden.grad, rtol=1e-3, atol=1e-4)
    for name in names:
        found = dict(gate.named_parameters())[name].grad
        torch.testing.assert_close(
            found.double(), theirs[name].grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m
        )


def test_reported_logits_are_divided_by_the_temperature():
    gate = make_gate(fixed(activation="tanh", temperature=0.25))
    hidden = torch.randn(TOKENS, HIDDEN)
    record = gate.decide(hidden)
    torch.testing.assert_close(record.logits, (hidden @ gate.weight.T).tanh() / 0.25)
    torch.testing.assert_close(record.scores, record.logits.softmax(-1))


# --- scale redundancy ---


def probabilities(hidden, weight, bias, temperature, activation) -> torch.Tensor:
    """The gate in the precision of its arguments, of the function that the router uses."""
    return ((activated_scores(hidden @ weight.T, activation) + bias) / temperature).softmax(-1)


def problem(seed: int = 0, tokens: int = 40):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, HIDDEN), (EXPERTS, HIDDEN), (EXPERTS,))
    hidden, weight, bias = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return hidden, weight, bias, torch.tensor(0.7, dtype=torch.float64)


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("activation", ["identity", "relu", *SMOOTH])
def test_scale_redundancy(activation, factor, monkeypatch):
    """Weights, bias and temperature times a constant: no other gate where the activation is homogeneous."""
    monkeypatch.setitem(router_act_dts._ACTIVATIONS, "relu", torch.relu)  # not offered, for this very reason
    hidden, weight, bias, temperature = problem()
    before = probabilities(hidden, weight, bias, temperature, activation)
    after = probabilities(hidden, factor * weight, factor * bias, factor * temperature, activation)
    if activation in ("identity", "relu"):
        torch.testing.assert_close(after, before)
    else:
        assert (after - before).abs().max() > 0.01


@pytest.mark.parametrize("activation", ["identity", *SMOOTH])
def test_differential_equation_of_the_plain_gate(activation):
    """`d pi / d tau = -(W . d pi / d W + b . d pi / d b) / tau`: the interaction that makes estimation slow."""
    hidden, weight, bias, temperature = problem()
    names = [tensor.clone().requires_grad_() for tensor in (weight, bias, temperature)]
    pi = probabilities(hidden, *names, activation)
    worst = 0.0
    for token in range(5):
        for expert in range(EXPERTS):
            d_weight, d_bias, d_temperature = torch.autograd.grad(pi[token, expert], names, retain_graph=True)
            residual = d_temperature + ((weight * d_weight).sum() + (bias * d_bias).sum()) / temperature
            worst = max(worst, residual.abs().item())
    assert worst < 1e-12 if activation == "identity" else worst > 1e-2


# --- Fisher information, and estimation ---


def log_density(parameters, x, y, activation, experts):
    """Log-likelihood of (n,) responses under a mixture of two linear experts; the second one's gate is pinned to 0.

    `parameters` is (d + 2,): gate weight, gate bias, temperature. Without the pin, shifting both scores is a direction
    that no activation can tell.
    """
    weight, bias, temperature = parameters[:-2], parameters[-2], parameters[-1]
    linear = torch.stack([x @ weight, torch.zeros(len(x), dtype=x.dtype)], dim=-1)
    scores = activated_scores(linear, activation) + torch.stack([bias, torch.zeros_like(bias)])
    slopes, noise = experts
    log_normal = -0.5 * ((y[:, None] - x @ slopes.T) / noise) ** 2 - math.log(noise * math.sqrt(2 * math.pi))
    return ((scores / temperature).log_softmax(-1) + log_normal).logsumexp(-1)


def sample(parameters, activation, count, seed, experts):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, len(parameters) - 2, dtype=torch.float64, generator=generator)
    linear = torch.stack([x @ parameters[:-2], torch.zeros(count, dtype=x.dtype)], dim=-1)
    pinned = torch.stack([parameters[-2], torch.zeros_like(parameters[-2])])
    gate = ((activated_scores(linear, activation) + pinned) / parameters[-1]).softmax(-1)
    first = torch.rand(count, dtype=x.dtype, generator=generator) < gate[:, 0]
    slopes, noise = experts
    mean = torch.where(first, x @ slopes[0], x @ slopes[1])
    return x, mean + noise * torch.randn(count, dtype=x.dtype, generator=generator)


FISHER = {"identity": False, "relu": False, "sigmoid": True, "tanh": True, "gelu": True, "silu": True}


@pytest.mark.parametrize(("activation", "regular"), FISHER.items(), ids=FISHER)
def test_fisher_information(activation, regular, monkeypatch):
    """Of gate weight, bias and temperature: singular for homogeneous activations, regular for the others."""
    monkeypatch.setitem(router_act_dts._ACTIVATIONS, "relu", torch.relu)
    truth = torch.tensor([1.0, -0.7, 0.4, 0.5], dtype=torch.float64)
    experts = torch.tensor([[1.5, 0.5], [-1.0, 1.0]], dtype=torch.float64), 0.5
    x, y = sample(truth, activation, 4000, 0, experts)
    scores = torch.func.jacfwd(lambda p: log_density(p, x, y, activation, experts))(truth)
    smallest, largest = torch.linalg.eigvalsh(scores.T @ scores / len(x))[[0, -1]].tolist()
    print(f"{activation}: smallest eigenvalue {smallest:.1e}, largest {largest:.1e}")
    assert smallest > 1e-4 if regular else abs(smallest) < 1e-12 * largest


def estimate(activation, truth, count, seed, experts, start):
    """The maximum-likelihood estimate of (gate weight, bias, log temperature) from `start`, by Newton's method with a
    damped Hessian."""
    x, y = sample(truth, activation, count, seed, experts)

    def loss(p):
        return -log_density(torch.cat([p[:-1], p[-1:].exp()]), x, y, activation, experts).mean()

    p = torch.cat([start[:-1], start[-1:].log()])
    gradient, hessian = torch.func.grad(loss), torch.func.hessian(loss)
    for _ in range(60):
        g, h = gradient(p), hessian(p)
        if g.norm() < 1e-10:
            break
        values, vectors = torch.linalg.eigh(h)
        direction = vectors @ ((vectors.T @ g) / values.abs().clamp(min=1e-8))
        step = 1.0
        while step > 1e-8 and loss(p - step * direction) > loss(p) - 1e-4 * step * (g @ direction):
            step /= 2
        p = p - step * direction
    return torch.cat([p[:-1], p[-1:].exp()])


@pytest.mark.slow
def test_estimation_rates():
    """Errors of the maximum-likelihood estimate while the sample grows: with an activation they fall as n^(-1/2); in
    the plain gate the estimate stays on the ray where it began, at any n. (With one expert too many the paper has
    n^(-1/4); that is not repeated, its constants need far larger samples.)"""
    experts = torch.tensor([[2.0, 1.0], [-2.0, 0.5]], dtype=torch.float64), 0.3
    truth = torch.tensor([1.0, -0.7, 0.4, 0.5], dtype=torch.float64)
    sizes, seeds = (1_000, 4_000, 16_000, 64_000), range(8)
    slopes = {}
    for activation in ("sigmoid", "tanh", "identity"):
        errors = []
        for count in sizes:
            found = [
                (estimate(activation, truth, count, seed, experts, truth * 1.5) - truth).norm().item()
                for seed in seeds
            ]
            errors.append(sorted(found)[len(found) // 2])
        x = torch.tensor(sizes, dtype=torch.float64).log()
        y = torch.tensor(errors, dtype=torch.float64).log()
        slopes[activation] = (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
        print(activation, [f"{error:.4f}" for error in errors], f"slope {slopes[activation]:.2f}")
    assert -0.75 < slopes["sigmoid"] < -0.3 and -0.75 < slopes["tanh"] < -0.3
    assert slopes["identity"] > -0.1  # it does not fall


# --- limits, temperature ---


@pytest.mark.parametrize("activation", ["identity", *SMOOTH])
def test_limits_of_the_temperature(activation):
    hidden = torch.randn(TOKENS, HIDDEN)
    gate = make_gate(fixed(activation=activation, temperature=1e6, select="dense"))
    record = gate.decide(hidden)
    torch.testing.assert_close(combine(record), torch.full((TOKENS, EXPERTS), 1 / EXPERTS), rtol=0, atol=1e-4)
    cold = make_gate(fixed(activation=activation, temperature=1e-7, select="dense"))
    cold.weight.data.copy_(gate.weight)
    best = (record.logits * 1e6).argmax(-1)
    torch.testing.assert_close(combine(cold.decide(hidden)).argmax(-1), best)
    assert combine(cold.decide(hidden)).max(-1).values.median() > 0.999


def test_identity_activation_is_the_stock_router():
    gate = make_gate(fixed(activation="identity", temperature=1.0))
    hidden = torch.randn(TOKENS, HIDDEN)
    record, stock = gate.decide(hidden), gate.stock_route(hidden)
    assert torch.equal(record.logits, stock["L"]) and torch.equal(record.index, stock["I"])
    torch.testing.assert_close(record.weights, stock["W"])


@pytest.mark.parametrize("start", [0.011, 0.3, 1.0, 40.0])
def test_learned_temperature_starts_where_it_is_told(start):
    gate = make_gate(ActDTSRouterConfig(temperature=start))
    torch.testing.assert_close(gate.temperature(), torch.tensor([start]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("push", [1e-3, 1.0, 1e6])
def test_learned_temperature_stays_above_its_least_value(push):
    """Under a step of any size, and with a finite gradient there."""
    gate = make_gate(ActDTSRouterConfig(temperature=0.02, temperature_min=0.01))
    optimizer = torch.optim.SGD([gate.moe_temperature_bias], lr=push)
    for _ in range(3):
        optimizer.zero_grad()
        gate.temperature().sum().backward()
        optimizer.step()
        gate.weight.grad = None
        record = gate.decide(torch.randn(TOKENS, HIDDEN))
        assert gate.temperature() >= 0.01 and record.logits.isfinite().all()
        optimizer.zero_grad()
        (combine(record) * torch.randn(TOKENS, EXPERTS)).sum().backward()
        assert gate.moe_temperature_bias.grad.isfinite().all() and gate.weight.grad.isfinite().all()


SHAPES = {
    "linear": 2.0 - 1.7 * 0.25,
    "exponential": 2.0 * (0.3 / 2.0) ** 0.25,
    "cosine": 0.3 + 1.7 * math.cos(math.pi / 8),
}


@pytest.mark.parametrize(("shape", "expected"), SHAPES.items(), ids=SHAPES)
def test_scheduled_temperature(shape, expected):
    config = ActDTSRouterConfig(
        temperature=2.0, temperature_mode="schedule", temperature_end=0.3, temperature_shape=shape, steps=40
    )
    assert config.schedule_steps == 40
    gate = make_gate(config)
    found = []
    for step in (0, 10, 40, 90):
        gate.schedule(step, 100)
        found.append(float(gate.temperature()))
    assert found == pytest.approx([2.0, expected, 0.3, 0.3])
    assert "moe_progress" in gate.state_dict() and "moe_temperature_bias" not in gate.state_dict()


def test_homotopy_goes_from_the_stock_gate_to_the_activated_one():
    gate = make_gate(ActDTSRouter.identity_config(RouterSite("0", 0, EXPERTS, K, HIDDEN, GateRule())))
    hidden = torch.randn(TOKENS, HIDDEN)
    linear = hidden @ gate.weight.T
    torch.testing.assert_close(gate.decide(hidden).logits, linear)
    gate.schedule(5, 10)
    torch.testing.assert_close(gate.decide(hidden).logits, (linear + linear.sigmoid()) / 2)
    gate.schedule(10, 10)
    torch.testing.assert_close(gate.decide(hidden).logits, linear.sigmoid())


def test_homotopy_has_a_length_of_its_own():
    gate = make_gate(fixed(1.0, homotopy=True, steps=4))
    hidden = torch.randn(TOKENS, HIDDEN)
    linear = hidden @ gate.weight.T
    gate.schedule(1, 10)
    torch.testing.assert_close(gate.decide(hidden).logits, 0.75 * linear + 0.25 * linear.sigmoid())
    gate.schedule(4, 10)
    torch.testing.assert_close(gate.decide(hidden).logits, linear.sigmoid())


# --- in a model ---


@functools.cache
def _stock():
    return tiny_model("mixtral")


def made(config: ActDTSRouterConfig, zero: ZeroExpertsConfig | None = None):
    return extend(copy.deepcopy(_stock()), MoeExtension(router=config, zero_experts=zero))


@torch.no_grad()
def logits(model):
    return model(**tiny_inputs("mixtral")).logits


SLOTS = {
    "top_k": (fixed(), 2),
    "k": (fixed(num_experts_per_tok=3), 3),
    "threshold": (fixed(select="threshold"), 8),
    "threshold_k": (fixed(select="threshold", num_experts_per_tok=4), 4),
    "dense": (fixed(select="dense"), 8),
}


@pytest.mark.parametrize(("config", "slots"), SLOTS.values(), ids=SLOTS)
def test_the_description_counts_the_experts_that_a_token_may_use(config, slots):
    assert [layer.num_experts_per_tok for layer in describe(made(config)).layers] == [slots] * 3


TRAINERS = {"stock": (Trainer, TrainingArguments), "ours": (MoETrainer, MoETrainingArguments)}


@pytest.mark.parametrize(("trainer", "arguments"), TRAINERS.values(), ids=TRAINERS)
def test_weight_decay_leaves_temperature_and_bias_alone(trainer, arguments, tmp_path):
    """One step with decay and no gradient: W shrinks, the others stay bit for bit."""
    model = made(ActDTSRouterConfig())
    for gate in iter_routers(model):
        gate.moe_gate_bias.data.normal_()
    args = arguments(str(tmp_path), use_cpu=True, weight_decay=0.5, learning_rate=0.1, report_to="none")
    optimizer = trainer(model=model, args=args).create_optimizer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = {
        name.rpartition(".")[2] for name, p in model.named_parameters() if ".gate." in name and p.equal(before[name])
    }
    assert kept == {"moe_temperature_bias", "moe_gate_bias"}


def test_everything_is_initialised(poison_memory, tmp_path):
    model = made(ActDTSRouterConfig(temperature=0.5, homotopy=True))
    for gate in iter_routers(model):
        assert (gate.moe_gate_bias == 0).all() and (gate.moe_progress == 0).all()
        torch.testing.assert_close(gate.temperature(), torch.tensor([0.5]))
    keys = set(_stock().state_dict())
    added = {name.rpartition(".")[2] for name in model.state_dict() if name not in keys}
    assert added == {"moe_gate_bias", "moe_temperature_bias", "moe_progress"}
    expected = logits(copy.deepcopy(_stock()))
    restore(model)
    assert set(model.state_dict()) == keys and torch.equal(logits(model), expected)


def test_schedule_is_saved_with_the_model(tmp_path):
    model = made(fixed(homotopy=True, activation="gelu"))
    before = logits(model)
    for gate in iter_routers(model):
        gate.schedule(10, 10)
    after = logits(model)
    assert (after - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), after)


def test_what_is_learned_is_saved_with_the_model(tmp_path):
    model = made(ActDTSRouterConfig(temperature=0.5))
    first = logits(model)
    for gate in iter_routers(model):
        gate.moe_gate_bias.data.normal_()
        gate.moe_temperature_bias.data.add_(1.0)
    expected = logits(model)
    assert (expected - first).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded.eval()), expected)


def test_computed_in_float32():
    """Near saturation bfloat16 cannot tell the sigmoids of two experts apart."""
    gate = make_gate(fixed(temperature=0.01, gate_bias=False), num_experts=2, top_k=1, hidden=1, dtype=torch.bfloat16)
    gate.weight.data = torch.tensor([[7.0], [8.0]], dtype=torch.bfloat16)
    record = gate.decide(torch.ones(1, 1, dtype=torch.bfloat16))
    assert torch.tensor([7.0, 8.0], dtype=torch.bfloat16).sigmoid().diff() == 0
    torch.testing.assert_close(record.logits[0], torch.tensor([7.0, 8.0]).sigmoid() / 0.01)
    assert record.index.item() == 1 and record.scores[0, 1] > 0.5


SELECT = {"top_k": {}, "threshold": {"threshold": 0.12}, "dense": {}}


@pytest.mark.parametrize("select", SELECT)
def test_zero_computation_experts(select):
    zero = ZeroExpertsConfig(zero=2, copy=1)
    model = made(ActDTSRouterConfig(temperature=0.3, select=select, z_coef=0.1, **SELECT[select]), zero).train()
    for gate in iter_routers(model):
        gate.moe_zero_weight.data.normal_(std=0.5)
    batch = tiny_inputs("mixtral")
    with trace_routing(model) as contexts:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    records = list(contexts[0].records.values())
    for record in records:
        assert record.scores.shape == (14, 11) and record.num_experts == 8
        torch.testing.assert_close(record.scores.sum(-1), torch.ones(14))
        nobody = ((record.choices >= 8) & (record.choices < 10)) | (record.choices == 11)
        assert (record.index[nobody] == 8).all() and (record.weights[nobody] == 0).all()
        assert (record.index[record.choices == 10] == 9).all()
        used = record.weights.sum(-1)
        torch.testing.assert_close(used[used > 0], torch.ones(int((used > 0).sum())))
    assert sum(int(((record.choices >= 8) & (record.choices < 10)).sum()) for record in records) > 0
    assert all(gate.moe_zero_weight.grad.abs().sum() > 0 for gate in iter_routers(model))
    assert all(gate.moe_gate_bias.grad.shape == (11,) for gate in iter_routers(model))


def test_zero_computation_experts_that_are_held_back():
    """At first the model computes what it does without them, whatever the activation does to the linear scores."""
    config = ActDTSRouterConfig(temperature=0.3)
    plain = made(config)
    held = made(config, ZeroExpertsConfig(copy=2, init="identity"))
    torch.testing.assert_close(logits(held), logits(plain), rtol=1e-5, atol=2e-5)
    for gate in iter_routers(held):
        gate.schedule(10, 10)
    assert (logits(held) - logits(plain)).abs().max() > 1e-3


@pytest.mark.parametrize("activation", ["sigmoid", "gelu"])
def test_held_experts_have_their_share_of_the_odds(activation):
    """Nothing at first, half of their odds after half of the warm-up: activation and temperature do not matter."""
    model = made(fixed(0.5, activation=activation), ZeroExpertsConfig(copy=2, init="identity"))
    gate, hidden, odds = next(iter_routers(model)), torch.randn(TOKENS, 32), {}
    gate.moe_zero_weight.data.normal_(std=0.5)
    for step in (0, 5, 10):
        gate.schedule(step, 10)
        scores = gate.route(hidden, None).scores
        odds[step] = scores[:, 8:] / scores[:, :8].sum(-1, keepdim=True)
    assert (odds[0] == 0).all() and (odds[10] > 0).all()
    torch.testing.assert_close(odds[5], odds[10] / 2)


def test_rows_follow_their_own_temperature():
    model, ids = made(fixed(0.3)), tiny_inputs("mixtral", batch=4)["input_ids"]

    @torch.no_grad()
    def run(model):
        return model(input_ids=ids).logits

    warm = run(made(fixed(3.0)))
    cold = run(model)
    with route_rows(model, ["a", "warm", "a", "warm"], {"warm": {"temperature": 3.0}}):
        mixed = run(model)
    torch.testing.assert_close(mixed[[0, 2]], cold[[0, 2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[[1, 3]], warm[[1, 3]], rtol=1e-5, atol=1e-5)
    assert (warm - cold).abs().max() > 1e-2


def test_padding_does_not_count():
    model, batch = made(ActDTSRouterConfig(balance_coef=1.0)).train(), tiny_inputs("mixtral")
    with trace_routing(model) as contexts:
        model(**batch, labels=batch["input_ids"])
    mask = batch["attention_mask"].reshape(-1).bool()
    for record in contexts[0].records.values():
        found = ActDTSRouter.aux_losses(record, contexts[0].token_mask(len(mask)))
        torch.testing.assert_close(found, {"balance": load_balancing_loss(record.scores[mask], record.index[mask])})


# --- what is refused, and warned of ---


BAD = {
    "temperature": ({"temperature": 0.0}, "`temperature` must be positive, got 0.0"),
    "end": ({"temperature_end": -1.0}, "`temperature_end` must be positive, got -1.0"),
    "below_min": ({"temperature": 0.01}, r"`temperature` \(0.01\) must be above `temperature_min` \(0.01\)"),
    "threshold": ({"threshold": 1.0}, r"`threshold` must be in \[0, 1\), got 1.0"),
    "steps": ({"steps": 0}, "`steps` must be at least 1, got 0"),
    "steps_of_nothing": ({"steps": 5}, r"`steps` \(5\) is the length of a schedule, and nothing is scheduled"),
    "min": ({"temperature_min": 0.0}, "`temperature_min` must be positive, got 0.0"),
    "negative_threshold": ({"threshold": -0.1}, r"`threshold` must be in \[0, 1\), got -0.1"),
    "k": ({"num_experts_per_tok": 0}, "`num_experts_per_tok` must be at least 1, got 0"),
    "scale": ({"homotopy_scale": 0.0}, "`homotopy_scale` must be positive, got 0.0"),
    "dense_k": ({"select": "dense", "num_experts_per_tok": 2}, "uses all experts, `num_experts_per_tok` asks for 2"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        ActDTSRouterConfig(**settings)


REFUSED = {
    "k_above_experts": (fixed(num_experts_per_tok=13), None, "exceeds the 12 experts"),
    "slots_above_experts": (fixed(select="threshold", num_experts_per_tok=13), None, "exceeds the 12 experts"),
    "unknown_rule": (fixed(), GateRule(score="custom"), "a rule of its own"),
    "unknown_rule_dense": (fixed(select="dense"), GateRule(score="custom"), "a rule of its own"),
}


@pytest.mark.parametrize(("config", "rule", "message"), REFUSED.values(), ids=REFUSED)
def test_site_refuses(config, rule, message):
    with pytest.raises(ValueError, match=message):
        make_gate(config, rule=rule)


@pytest.fixture
def warned(monkeypatch):
    """What is logged at check time, once for each message."""
    messages: list[str] = []
    monkeypatch.setattr(router_act_dts.logger, "warning_once", messages.append)
    return messages


WARNINGS = {
    "sigmoid_8": (fixed(0.3), 8, "0.80 at this temperature. For 0.9 the temperature must be able to fall to 0.241"),
    "sigmoid_64": (fixed(0.2), 64, "fall to 0.158"),
    "tanh_8": (fixed(0.5, activation="tanh"), 8, "fall to 0.483"),
    "schedule": (fixed(2.0, temperature_mode="schedule", temperature_end=0.25), 8, "fall to 0.241"),
    "learned": (fixed(2.0, temperature_mode="learned", temperature_min=0.25), 8, "fall to 0.241"),
    "homotopy": (fixed(1.0, homotopy=True, homotopy_scale=3.0), 8, "fall to 0.724"),
}
SILENT = {
    "sigmoid_8": (fixed(0.24), 8),
    "sigmoid_64": (fixed(0.157), 64),
    "tanh_8": (fixed(0.48, activation="tanh"), 8),
    "gelu": (fixed(5.0, activation="gelu"), 64),
    "schedule": (fixed(2.0, temperature_mode="schedule", temperature_end=0.24), 8),
    "learned": (fixed(2.0, temperature_mode="learned"), 64),
    "homotopy": (fixed(0.72, homotopy=True, homotopy_scale=3.0), 8),
    "default": (ActDTSRouterConfig(), 256),
}


@pytest.mark.parametrize(("config", "experts", "message"), WARNINGS.values(), ids=WARNINGS)
def test_a_temperature_that_cannot_be_sharp_is_warned_of(config, experts, message, warned):
    ActDTSRouter.check(config, RouterSite("0", 0, experts, 2, 4, GateRule()))
    assert len(warned) == 1 and message in warned[0]


@pytest.mark.parametrize(("config", "experts"), SILENT.values(), ids=SILENT)
def test_a_temperature_that_can_be_sharp_is_not(config, experts, warned):
    ActDTSRouter.check(config, RouterSite("0", 0, experts, 2, 4, GateRule()))
    assert warned == []


def test_the_warning_comes_once(caplog):
    router_act_dts.logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=router_act_dts.logger.name):
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            made(fixed(7.0))
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
    assert sum("is bounded: with 8 experts" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("tau", [0.1, 0.3, 2.0])
def test_the_stated_bound_is_reached_and_not_passed(tau):
    """The best expert at the upper end of the sigmoid, all others at the lower."""
    config = fixed(tau, gate_bias=False, select="dense")
    gate = make_gate(config, num_experts=8, top_k=2, hidden=1)
    gate.weight.data = torch.tensor([[60.0]] + [[-60.0]] * 7)
    found = gate.decide(torch.ones(1, 1)).scores.max().item()
    assert found == pytest.approx(config.best_probability(8), rel=1e-5)
    assert found == pytest.approx(math.exp(1 / tau) / (math.exp(1 / tau) + 7), rel=1e-5)
