"""The Dense-to-Sparse gate of EvoMoE against a slow reference, and what its temperature does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from hf_moe_ext import MoeExtension, MoETrainer, extend, trace_routing, upcycle
from hf_moe_ext.modeling.configuration_moe_ext import ZeroExpertsConfig
from hf_moe_ext.modeling.moe_context import RoutingContext
from hf_moe_ext.modeling.moe_router import GateRule, RouterSite
from hf_moe_ext.modeling.moe_structure import route_rows
from hf_moe_ext.modeling.router_dts import DTSRouter, DTSRouterConfig
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig

from ..character_runs import character_llama, held_out_loss, train_characters
from ..trainers.common import NUM_EXPERTS, arguments, rows, tiny_moe
from .test_routers import EXPERTS, HIDDEN, TOKENS, chosen, combine, make_gate, slow_scores


def at_temperature(gate, temperature: float, hard: bool = False):
    """The gate in training, with a constant temperature."""
    gate.moe_config.temperature = gate.moe_config.temperature_end = temperature
    gate.moe_config.hard_after = 0 if hard else None
    return gate.train()


def with_noise(gate, hidden, uniform):
    """The decision where the uniform numbers behind the noise are given."""
    context = RoutingContext(generator=torch.Generator(), draws={(0, "dts_noise"): uniform})
    gate.moe_link.slots.layer_context = context
    try:
        return gate.decide(hidden)
    finally:
        gate.moe_link.slots.layer_context = None


def slow_dts(hidden, weight, uniform, temperature, threshold, *, gumbel=False, renormalize=False, hard=False):
    """(T, E) weights and the used experts, token by token in float64."""
    combined, sets = [], []
    for token, numbers in zip(hidden, uniform, strict=True):
        logits = weight @ token
        noisy = [(z - math.log(-math.log(u))) / temperature for z, u in zip(logits, numbers.tolist(), strict=True)]
        q = slow_scores(torch.stack(noisy), "softmax")
        used = [i for i, value in enumerate(q.tolist()) if value > threshold]
        if hard:
            used = [max(range(len(q)), key=lambda i: q[i].item())]  # noqa: B023
        values = q if gumbel else slow_scores(logits, "softmax")
        total = sum(values[i] for i in used) if renormalize else 1.0
        row = [values[i] / total if i in used else torch.zeros((), dtype=torch.float64) for i in range(len(q))]
        combined.append(torch.stack(row))
        sets.append(used)
    return torch.stack(combined), sets


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("renormalize", [False, True], ids=["raw", "renormalized"])
@pytest.mark.parametrize("gumbel", [False, True], ids=["softmax", "gumbel"])
@pytest.mark.parametrize("temperature", [2.0, 0.3])
def test_training_follows_the_reference(temperature, gumbel, renormalize, hard):
    """Choice, weights, and gradients of input and gate."""
    options = {"gumbel": gumbel, "renormalize": renormalize, "hard": hard}
    config = DTSRouterConfig(gumbel_weights=gumbel, renormalize=renormalize, threshold=0.02)
    gate = at_temperature(make_gate(config), temperature, hard)
    hidden, uniform = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, EXPERTS)
    mine, theirs = (
        (hidden.to(dtype, copy=True).requires_grad_(), gate.weight.detach().to(dtype, copy=True).requires_grad_())
        for dtype in (torch.float32, torch.float64)
    )
    gate.weight = torch.nn.Parameter(mine[1])
    record = with_noise(gate, mine[0], uniform)
    expected, sets = slow_dts(*theirs, uniform.double(), temperature, 0.02, **options)
    assert chosen(record) == sets
    assert record.index.shape == (TOKENS, EXPERTS)
    weights = combine(record)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(weights)
    (weights * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    torch.testing.assert_close(mine[0].grad.double(), theirs[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gate.weight.grad.double(), theirs[1].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["top1", "dense"])
def test_evaluation_is_without_noise(mode):
    gate = make_gate(DTSRouterConfig(eval_mode=mode)).eval()
    hidden = torch.randn(TOKENS, HIDDEN)
    scores = (hidden @ gate.weight.T).softmax(-1)
    records = [gate.decide(hidden) for _ in range(2)]
    assert torch.equal(records[0].weights, records[1].weights) and torch.equal(records[0].index, records[1].index)
    expected = scores if mode == "dense" else scores * (scores == scores.amax(-1, keepdim=True))
    torch.testing.assert_close(combine(records[0]), expected)
    assert records[0].index.shape[-1] == (EXPERTS if mode == "dense" else 1)


def test_the_best_expert_is_used_where_none_passes_the_threshold():
    gate = at_temperature(make_gate(DTSRouterConfig(threshold=0.9)), 2.0)
    hidden, uniform = torch.randn(TOKENS, HIDDEN) * 0.1, torch.rand(TOKENS, EXPERTS)
    record = with_noise(gate, hidden, uniform)
    noisy = record.logits - (-uniform.log()).log()
    assert (noisy / 2).softmax(-1).max() < 0.9
    assert chosen(record) == [[best] for best in noisy.argmax(-1).tolist()]


def test_two_evaluations_of_a_model_are_equal():
    router = DTSRouterConfig(temperature=0.5, temperature_end=0.5)
    model, inputs = extend(tiny_model("mixtral"), MoeExtension(router=router)), tiny_inputs("mixtral")
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


# --- the dense start ---


@pytest.mark.parametrize(
    ("gumbel", "renormalize", "threshold"),
    [
        pytest.param(False, False, 0.0, id="softmax_weights"),
        pytest.param(True, False, 0.0, id="gumbel_weights"),
        pytest.param(False, True, 0.001, id="renormalized"),
    ],
)
def test_copies_start_as_the_dense_model(gumbel, renormalize, threshold):
    """Spawned without masks: weights of all experts sum to one, so training begins at the dense function."""
    dense, inputs = tiny_model("llama"), tiny_inputs("llama")
    router = DTSRouterConfig(threshold=threshold, gumbel_weights=gumbel, renormalize=renormalize)
    model = upcycle(dense, "masked", keep=1.0, num_experts=4, router=router, check=False).train()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_a_strict_subset_weighs_less_than_one():
    gate = at_temperature(make_gate(DTSRouterConfig(threshold=0.02)), 0.3)
    weights = combine(gate.decide(torch.randn(TOKENS, HIDDEN)))
    assert (weights.sum(-1) < 1 - 1e-4).any() and (weights.sum(-1) <= 1 + 1e-5).all()


# --- temperature and phases ---


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        pytest.param("linear", [2.0, 1.25, 0.5, 0.5], id="linear"),
        pytest.param("exponential", [2.0, 1.0, 0.5, 0.5], id="exponential"),
    ],
)
@pytest.mark.parametrize("steps", [8, None], ids=["own_length", "whole_training"])
def test_temperature_table(shape, values, steps):
    """At 0, D/2, D and later; 2 -> 0.5 halves once by half of an exponential fall."""
    config, total = DTSRouterConfig(temperature_shape=shape, steps=steps), 100 if steps else 8
    found = [config.temperature_at(torch.tensor([step, total])).item() for step in (0, 4, 8, 11)]
    assert found == pytest.approx(values, rel=1e-6)


def test_last_change_of_the_schedule():
    assert DTSRouterConfig().schedule_steps is None
    assert DTSRouterConfig(steps=5).schedule_steps == 5
    assert DTSRouterConfig(hard_after=7).schedule_steps == 7
    assert (
        DTSRouterConfig(steps=5, hard_after=7).schedule_steps == DTSRouterConfig(steps=7, hard_after=5).schedule_steps
    )


def test_the_hard_phase_begins_at_its_step():
    gate = make_gate(DTSRouterConfig(hard_after=3)).train()
    used = []
    for step in range(5):
        gate.schedule(step, 10)
        used.append(max(len(experts) for experts in chosen(gate.decide(torch.randn(TOKENS, HIDDEN)))))
    assert used[:3] == [EXPERTS] * 3 and used[3:] == [1, 1]


def test_never_hard_by_default():
    """The authors' code turns hard at the first step where its option is left at -1."""
    gate = make_gate(DTSRouterConfig()).train()
    gate.schedule(0, 10)
    assert min(len(experts) for experts in chosen(gate.decide(torch.randn(TOKENS, HIDDEN)))) > 1


def test_two_models_have_their_own_temperature():
    first, second = (make_gate(DTSRouterConfig()) for _ in range(2))
    first.schedule(9, 10)
    assert first.moe_progress.tolist() == [9, 10] and second.moe_progress.tolist() == [0, 0]


# --- the distribution ---

# 99.9 % quantile of chi-square with 4 degrees of freedom.
CHI_SQUARE_4 = 18.47


@pytest.mark.parametrize("temperature", [2.0, 0.5, 0.05])
def test_the_hard_choice_follows_the_softmax_at_any_temperature(temperature):
    """The Gumbel-max trick: the best of z + G is distributed as softmax(z)."""
    gate = at_temperature(make_gate(DTSRouterConfig(), num_experts=5, top_k=1, hidden=1), temperature, hard=True)
    probabilities, draws = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]), 20_000
    gate.weight.data[:, 0] = probabilities.log()
    record = gate.decide(torch.ones(draws, 1))
    counts = torch.bincount(torch.tensor([experts[0] for experts in chosen(record)]), minlength=5)
    expected = probabilities * draws
    assert float(((counts - expected).square() / expected).sum()) < CHI_SQUARE_4


def test_fewer_experts_are_used_as_the_temperature_falls():
    """16 experts alike, threshold 0.001: how many are used. The numbers were worked out with NumPy, by
    `(softmax(gumbel(size=(200000, 16)) / t) > 0.001).sum(-1).mean()`."""
    gate = make_gate(DTSRouterConfig(), num_experts=16, top_k=1, hidden=1)
    gate.weight.data.zero_()
    means = []
    for temperature in (2.0, 1.0, 0.5, 0.3, 0.05):
        record = at_temperature(gate, temperature).decide(torch.ones(20_000, 1))
        means.append(float((record.index < 16).sum(-1).float().mean()))
    assert means == sorted(means, reverse=True)
    # Standard errors of 20000 draws are below 0.02.
    assert means == pytest.approx([16.0, 15.7, 10.1, 5.2, 1.4], abs=0.1)


# --- gradients ---


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_gumbel_weights_pass_gradients_to_all_used_experts(hard):
    gate = at_temperature(make_gate(DTSRouterConfig(gumbel_weights=True)), 1.0, hard)
    record = gate.decide(torch.randn(TOKENS, HIDDEN))
    record.logits.retain_grad()
    used = record.index < EXPERTS
    upstream = torch.randn_like(record.weights)
    (record.weights * upstream).sum().backward()
    assert (record.logits.grad[used] != 0).all()
    assert used.sum(-1).max() == (1 if hard else EXPERTS)


def test_the_hard_phase_has_gradients_through_the_chosen_weight_alone():
    gate = at_temperature(make_gate(DTSRouterConfig()), 1.0, hard=True)
    hidden = torch.randn(TOKENS, HIDDEN)
    record = gate.decide(hidden)
    experts = torch.tensor([only for (only,) in chosen(record)])
    (combine(record) * torch.arange(1.0, EXPERTS + 1)).sum().backward()
    weight = gate.weight.detach().clone().requires_grad_()
    scores = (hidden @ weight.T).softmax(-1)
    (scores[torch.arange(TOKENS), experts] * (experts + 1)).sum().backward()
    torch.testing.assert_close(gate.weight.grad, weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", ["moe_ext", "eager", "grouped_mm", "batched_mm"])
def test_unused_slots_cost_nothing_and_change_nothing(implementation):
    """Output and gradients are those of a masked sum over all experts, with every experts function."""
    model = tiny_moe(DTSRouterConfig(threshold=0.05, temperature=0.3, temperature_end=0.3)).train()
    model.set_experts_implementation(implementation)
    block, hidden = model.model.layers[0].mlp, torch.randn(1, 9, 32, requires_grad=True)
    torch.manual_seed(1)
    with trace_routing(model):
        out = block(hidden)
    out.square().sum().backward()
    gradients = [hidden.grad.clone(), *(p.grad.clone() for p in block.parameters())]
    hidden.grad = None
    block.zero_grad()

    torch.manual_seed(1)
    record = block.gate.decide(hidden[0])
    assert 0 < int((record.index == NUM_EXPERTS).sum()) < record.index.numel()
    dense, total = combine(record), torch.zeros(9, 32)
    for expert in range(NUM_EXPERTS):
        gate, up = (hidden[0] @ block.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        total = total + dense[:, expert, None] * (inner @ block.experts.down_proj[expert].T)
    torch.testing.assert_close(out[0], total, rtol=1e-4, atol=1e-6)
    total.square().sum().backward()
    for mine, theirs in zip(gradients, [hidden.grad, *(p.grad for p in block.parameters())], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


# --- losses ---


def test_balance_loss_follows_the_reference():
    """E * sum of (share of tokens that use i) * (mean weight of i), in value and gradient, without padding."""
    gate = at_temperature(make_gate(DTSRouterConfig(threshold=0.05, balance_coef=1.0)), 0.5)
    hidden = torch.randn(TOKENS, HIDDEN)
    record = gate.decide(hidden)
    mask = torch.rand(TOKENS) > 0.3
    loss = gate.aux_losses(record, mask)["balance"]
    weight = gate.weight.detach().double().requires_grad_()
    tokens = [t for t in range(TOKENS) if mask[t]]
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(EXPERTS):
        users = [t for t in tokens if i in chosen(record)[t]]
        weights = [slow_scores(weight @ hidden[t].double(), "softmax")[i] for t in users]
        expected = expected + EXPERTS * len(users) / len(tokens) * (sum(weights, start=torch.zeros(())) / len(tokens))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(gate.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)
    changed = with_padding_changed(record, mask)
    assert torch.equal(gate.aux_losses(changed, mask)["balance"], loss)


def test_balance_loss_does_not_know_the_scale_of_the_family():
    gate = at_temperature(make_gate(DTSRouterConfig(balance_coef=1.0), rule=GateRule(scale=2.5)), 0.5)
    record = gate.decide(torch.randn(TOKENS, HIDDEN))
    torch.testing.assert_close(record.extras["gates"], combine(record) / 2.5)


def with_padding_changed(record, mask):
    twin = copy.copy(record)
    twin.extras = {"gates": record.extras["gates"].masked_fill(~mask[:, None], 7.0)}
    twin.index = record.index.masked_fill(~mask[:, None], 0)
    return twin


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_balance_loss_weighs_zero_computation_experts(weight):
    """The terms of experts that copy the input get the factor that `zero_experts` has for them."""
    zero = ZeroExpertsConfig(copy=2, balance_weight=weight)
    model = extend(tiny_model("mixtral"), MoeExtension(router=DTSRouterConfig(balance_coef=1.0), zero_experts=zero))
    with trace_routing(model) as contexts:
        model.train()(**tiny_inputs("mixtral"))
    for record in contexts[0].records.values():
        tokens, choices = len(record.choices), record.choices
        share = torch.stack([(choices == column).any(-1).double().mean() for column in range(10)])
        mean = torch.zeros(10, dtype=torch.float64)
        for column, value in zip(choices.flatten().tolist(), record.weights.flatten().tolist(), strict=True):
            if column < 10:
                mean[column] += value / tokens
        factors = torch.tensor([1.0] * 8 + [weight] * 2).double()
        loss = DTSRouter.aux_losses(record, None)["balance"]
        torch.testing.assert_close(loss.double(), 10 * (factors * share * mean).sum(), rtol=1e-5, atol=1e-6)


# --- beside other things ---


@pytest.mark.parametrize("training", [True, False])
def test_zero_computation_experts(training):
    extension = MoeExtension(router=DTSRouterConfig(balance_coef=1.0), zero_experts=ZeroExpertsConfig(zero=2, copy=1))
    model = extend(tiny_model("mixtral"), extension).train(training)
    with trace_routing(model) as contexts:
        loss = model(**tiny_inputs("mixtral"), labels=tiny_inputs("mixtral")["input_ids"]).loss
    assert loss.isfinite()
    for record in contexts[0].records.values():
        columns = record.choices
        assert record.scores.shape[-1] == 11 and (columns < 11).any(-1).all()
        null = (columns >= 8) & (columns < 10) | (columns == 11)
        assert torch.equal(null, record.index == 8) and (record.weights[null] == 0).all()
        if training:  # all choices are used at first, and null experts return nothing
            assert null[:, 8:10].all() and (record.index[:, 10] == 9).all()


@pytest.mark.parametrize("training", [True, False])
def test_a_skip_class_of_the_gate_is_nobody(training):
    """A gate with one class more than experts: its weight is lost, and no expert gets it."""
    gate = make_gate(DTSRouterConfig(threshold=0.0, eval_mode="dense")).train(training)
    gate.moe_site = RouterSite("0", 0, EXPERTS - 1, 1, HIDDEN, GateRule())
    record = gate.decide(torch.randn(TOKENS, HIDDEN))
    skipped = record.index == EXPERTS - 1
    assert skipped.any() and record.index.max() == EXPERTS - 1 and (record.weights[skipped] == 0).all()


def test_rows_draw_their_own_noise():
    model = extend(tiny_model("mixtral"), MoeExtension(router=DTSRouterConfig(temperature=0.5, temperature_end=0.5)))
    ids = tiny_inputs("mixtral")["input_ids"][:1].repeat(2, 1)
    model.train()
    with route_rows(model, ["a", "b"]), trace_routing(model) as contexts, torch.no_grad():
        model(ids)
    first, second = contexts[0].records["0"].index.view(2, ids.shape[1], -1)
    assert not torch.equal(first, second)


def test_sigmoid_gates_are_read_by_a_softmax():
    model = extend(tiny_model("deepseek_v3"), MoeExtension(router=DTSRouterConfig()))
    with trace_routing(model) as contexts, torch.no_grad():
        model(**tiny_inputs("deepseek_v3"))
    for record in contexts[0].records.values():
        scores = record.logits.float().softmax(-1)
        torch.testing.assert_close(record.scores, scores)
        torch.testing.assert_close(record.weights, 1.5 * scores.amax(-1, keepdim=True))  # the family's scale


@pytest.mark.parametrize(
    ("options", "match"),
    [
        pytest.param({"temperature_end": 0.0}, "`temperature_end` must be positive, got 0.0", id="zero"),
        pytest.param({"temperature": 0.1}, r"`temperature` \(0.1\) must not be below `temperature_end`", id="rising"),
        pytest.param({"steps": 0}, "`steps` must be at least 1, got 0", id="steps"),
        pytest.param({"hard_after": -1}, "`hard_after` must be non-negative, got -1", id="hard"),
        pytest.param({"threshold": 1.0}, r"`threshold` must be in \[0, 1\), got 1.0", id="threshold"),
    ],
)
def test_bad_values_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        DTSRouterConfig(**options)


def test_a_schedule_longer_than_the_training_is_refused(tmp_path):
    model = tiny_moe(DTSRouterConfig(hard_after=3))
    trainer = MoETrainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=rows([5, 5]))
    with pytest.raises(ValueError, match="schedule of the `dts` router takes 3 optimizer steps, this training has 2"):
        trainer.train()


# --- the claim of the paper ---


@pytest.mark.slow
def test_evolving_beats_switch_from_scratch(tmp_path):
    """Equal steps: a dense start, then spawned experts and a gate that goes from dense to sparse, against a top-1
    gate trained from nothing. Both end with one expert per token."""
    steps, spawn = 1200, 300
    switch = TopKRouterConfig(num_experts_per_tok=1, renormalize=False, balance_coef=0.01)
    scratch = upcycle(character_llama(), "sparse", num_experts=8, num_experts_per_tok=1, router=switch, check=False)
    for layer in scratch.model.layers:
        for parameter in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            torch.nn.init.normal_(parameter, std=0.02)
    train_characters(scratch, tmp_path / "switch", steps)

    warm = upcycle(character_llama(), "sparse", num_experts=1, num_experts_per_tok=1, router="top_k", check=False)
    train_characters(warm, tmp_path / "dense", spawn, lr_scheduler_type="constant")
    router = DTSRouterConfig(temperature=2.0, temperature_end=0.5, steps=500, hard_after=600, balance_coef=0.01)
    evolved = upcycle(as_dense(warm), "masked", num_experts=8, num_experts_per_tok=1, router=router, check=False)
    train_characters(evolved, tmp_path / "dts", steps - spawn)
    losses = held_out_loss(scratch), held_out_loss(evolved)
    print("Switch from scratch, EvoMoE:", losses)
    assert losses[1] < losses[0]


def as_dense(model):
    """The dense model of a Mixture-of-Experts with one expert."""
    dense = character_llama()
    dense.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for layer, source in zip(dense.model.layers, model.model.layers, strict=True):
            gate, up = source.mlp.experts.gate_up_proj[0].chunk(2)
            layer.mlp.gate_proj.weight.copy_(gate)
            layer.mlp.up_proj.weight.copy_(up)
            layer.mlp.down_proj.weight.copy_(source.mlp.experts.down_proj[0])
    return dense
