"""Permutation local search: Sinkhorn, the assignment, and what it does between a gate and its experts."""

from __future__ import annotations

import copy
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCAB_SIZE, tiny_inputs, tiny_model

from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_context import RoutingContext
from hf_moe_ext.modeling.moe_permutation import (
    MIN_WEIGHT,
    PermutedRouterConfig,
    best_assignment,
    permutation_entropy,
    sinkhorn,
)
from hf_moe_ext.modeling.moe_router import GateRule
from hf_moe_ext.modeling.moe_structure import iter_routers, trace_routing
from hf_moe_ext.modeling.router_comet import CometRouter, CometRouterConfig
from hf_moe_ext.modeling.router_dselect_k import DSelectKRouterConfig
from hf_moe_ext.modeling.router_hash import HashRouterConfig
from hf_moe_ext.modeling.router_permuted_top_k import PermutedTopKRouter, PermutedTopKRouterConfig
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.patching import extend, restore
from hf_moe_ext.trainers import MoETrainer

from ..trainers.common import arguments, rows, tiny_moe
from .test_router_comet import own_parameters, slow_comet, spread
from .test_router_dselect_k import slow_dselect
from .test_routers import HIDDEN, TOKENS, combine, make_gate


def uniform(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Matrices as they are at the start."""
    return torch.rand(count, size, size, generator=torch.Generator().manual_seed(seed)) * 0.1 - 0.05


# --- Sinkhorn and assignment ---


def slow_sinkhorn(scores: torch.Tensor, temperature: float, rounds: int) -> torch.Tensor:
    """Rows and columns divided by their sums in turn, until they do not change; in float64, with logarithms."""
    logs = scores.double() / temperature
    for _ in range(rounds):
        logs = logs - logs.logsumexp(-1, keepdim=True)
        logs = logs - logs.logsumexp(-2, keepdim=True)
    return logs.exp()


@pytest.mark.parametrize("size", [2, 4, 8, 16, 64])
def test_sinkhorn_is_doubly_stochastic(size):
    """At the two ends of the default schedule, with the default number of rounds."""
    scores = uniform(30, size)
    for temperature, tolerance in ((1e-2, 1e-3), (1e-3, 2e-2)):
        found = sinkhorn(scores, torch.tensor(temperature), 100)
        assert (found >= 0).all()
        torch.testing.assert_close(found.sum(-2), torch.ones(30, size), rtol=0, atol=1e-4)
        torch.testing.assert_close(found.sum(-1), torch.ones(30, size), rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("temperature", [1e-1, 1e-2])
def test_sinkhorn_equals_reference(size, temperature):
    scores = uniform(10, size)
    expected = slow_sinkhorn(scores, temperature, 2000)
    torch.testing.assert_close(sinkhorn(scores, torch.tensor(temperature), 100).double(), expected, rtol=0, atol=5e-4)


def test_sinkhorn_gradient_equals_reference():
    mine, theirs = uniform(4, 5).requires_grad_(), uniform(4, 5).double().requires_grad_()
    upstream = torch.randn(4, 5, 5)
    (sinkhorn(mine, torch.tensor(2e-2), 200) * upstream).sum().backward()
    (slow_sinkhorn(theirs, 2e-2, 500) * upstream.double()).sum().backward()
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3)
    assert theirs.grad.abs().max() > 1


def test_falling_temperature_converges_where_plain_rounds_do_not():
    """The pitfall of the published schedule, and that ours is nearer."""
    scores = uniform(50, 4)
    best = [best_assignment(matrix) for matrix in scores.tolist()]

    def right(matrices: torch.Tensor) -> int:
        return sum(found == wanted for found, wanted in zip(matrices.argmax(-1).tolist(), best, strict=True))

    assert right(slow_sinkhorn(scores, 1e-7, 150)) < 40
    assert right(sinkhorn(scores, torch.tensor(1e-4), 100)) >= 49


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_assignment_is_the_best(size):
    """Against all permutations; with ties, negative and extreme numbers."""
    generator = torch.Generator().manual_seed(size)
    for trial in range(40):
        scores = torch.randn(size, size, generator=generator, dtype=torch.float64)
        if trial % 4 == 1:
            scores = scores.round()
        if trial % 4 == 2:
            scores = scores * 10.0 ** torch.randint(-6, 6, (size, size), generator=generator)
        found = best_assignment(scores.tolist())
        assert sorted(found) == list(range(size))
        best = max(
            sum(scores[a, b].item() for a, b in enumerate(order)) for order in itertools.permutations(range(size))
        )
        assert sum(scores[a, b].item() for a, b in enumerate(found)) == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", ["random", "product", "hidden"])
def test_assignment_of_256(kind):
    scores = uniform(1, 256)[0]
    if kind == "product":  # hard for the search: every row wants the same columns
        scores = torch.outer(torch.arange(256.0), torch.arange(256.0))
    wanted = torch.randperm(256)
    if kind == "hidden":
        scores[torch.arange(256), wanted] += 1.0
    found = best_assignment(scores.tolist())
    assert sorted(found) == list(range(256))
    if kind == "product":
        assert found == list(range(256))  # rearrangement inequality
    if kind == "hidden":
        assert found == wanted.tolist()


def test_entropy():
    uniform_matrix = torch.full((1, 4, 4), 0.25)
    torch.testing.assert_close(permutation_entropy(uniform_matrix), torch.tensor(8 * math.log(4)))
    hard = torch.eye(4)[torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])]
    assert permutation_entropy(hard) == 0
    torch.testing.assert_close(
        permutation_entropy(torch.cat([uniform_matrix, hard])), torch.tensor(8 * math.log(4) / 3)
    )
    skewed = torch.tensor([[[0.6, 0.1], [0.3, 0.8]]], dtype=torch.float64, requires_grad=True)
    slow = sum(-p * p.log() for p in skewed.flatten())
    slow = slow + sum(-p * p.log() for row in skewed[0] for p in row / row.sum())
    torch.testing.assert_close(permutation_entropy(skewed), slow)


# --- between gate and experts ---


STEPS = 6
GATES = {
    "comet": lambda **o: CometRouterConfig(num_experts_per_tok=2, **o),
    "comet_each": lambda **o: CometRouterConfig(num_experts_per_tok=2, permutation_per_selector=True, **o),
    "dselect_k": lambda **o: DSelectKRouterConfig(num_experts_per_tok=2, **o),
    "dselect_k_each": lambda **o: DSelectKRouterConfig(num_experts_per_tok=2, permutation_per_selector=True, **o),
    "hash": lambda **o: HashRouterConfig(vocab_size=VOCAB_SIZE, num_experts_per_tok=2, **o),
    "permuted_top_k": lambda **o: PermutedTopKRouterConfig(num_experts_per_tok=2, **o),
}


def gate_of(name: str, num_experts: int = 8, **options):
    options = {"permutation_steps": STEPS} | options
    return spread(make_gate(GATES[name](**options), num_experts=num_experts, top_k=2), 4.0)


def decide(gate, hidden, ids=None, generator=None):
    ids = torch.arange(len(hidden)) % VOCAB_SIZE if ids is None else ids
    gate.moe_link.slots.layer_context = RoutingContext(input_ids=ids[None], generator=generator)
    try:
        return gate.decide(hidden)
    finally:
        gate.moe_link.slots.layer_context = None


def plain_twin(gate):
    """The same gate without a permutation."""
    twin = copy.deepcopy(gate)
    del twin._buffers["moe_permutation"], twin._parameters["moe_permutation_scores"]
    return twin


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["comet", "comet_each", "dselect_k", "dselect_k_each"])
@pytest.mark.parametrize("fixed", [False, True], ids=["soft", "hard"])
def test_with_permutation_equals_reference(name, fixed, training):
    """`G = sum_i g_i P_i`: values, and gradients of all parameters but the permutation's."""
    gate = gate_of(name, num_experts=5, sinkhorn_temperature=2e-2).train(training)
    if fixed:
        gate.schedule(STEPS, 100)
    hidden = torch.randn(TOKENS, HIDDEN)
    matrices = gate.permutation(None)
    assert len(matrices) == (2 if name.endswith("_each") else 1)
    own = own_parameters(gate)
    slow = slow_comet if name.startswith("comet") else functools.partial(slow_dselect, num_experts=5)
    slots = None if training else 2
    expected = slow(hidden.double(), own, width=1.0, slots=slots, matrices=matrices.detach().double())[0]
    weights = combine(decide(gate, hidden))
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(weights)
    (weights * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    for key, parameter in own.items():
        if key != "permutation_scores":
            mine = gate.get_parameter(f"moe_{key}").grad
            torch.testing.assert_close(mine.double(), parameter.grad, rtol=1e-3, atol=1e-4)
    assert (gate.moe_permutation_scores.grad is None) == fixed


def test_gradient_of_the_permutation():
    """Through Sinkhorn to the learned matrix, against the slow reference."""
    gate = gate_of("permuted_top_k", sinkhorn_temperature=2e-2, sinkhorn_iterations=200).train()
    hidden, upstream = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, 8)
    (combine(decide(gate, hidden)) * upstream).sum().backward()
    theta = gate.moe_permutation_scores.detach().double().requires_grad_()
    dense = combine(decide(plain_twin(gate), hidden)).detach().double()
    expected = dense @ slow_sinkhorn(theta, 2e-2, 500)[0]
    expected = expected * (expected >= MIN_WEIGHT)
    (expected / expected.sum(-1, keepdim=True) * upstream.double()).sum().backward()
    torch.testing.assert_close(gate.moe_permutation_scores.grad.double(), theta.grad, rtol=2e-3, atol=2e-3)
    assert theta.grad.abs().max() > 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["comet", "dselect_k", "hash", "permuted_top_k"])
def test_hard_permutation_renames_experts(name, training):
    """`G' = G P`: what output a had, expert P[a] has."""
    gate = gate_of(name).train(training)
    gate.schedule(STEPS, 100)
    order = gate.moe_permutation[0]
    assert order.tolist() != list(range(8)) and sorted(order.tolist()) == list(range(8))
    hidden = torch.randn(TOKENS, HIDDEN)
    found, plain = decide(gate, hidden), decide(plain_twin(gate), hidden)
    assert found.index.shape == plain.index.shape
    torch.testing.assert_close(combine(found)[:, order], combine(plain))
    torch.testing.assert_close(found.scores[:, order], plain.scores)
    torch.testing.assert_close(found.logits[:, order], plain.logits)


@pytest.mark.parametrize("name", GATES)
def test_hard_permutation_that_is_not_known_to_be_hard(name):
    """Where the flag is not set (an offloaded buffer) the result is the same, and slower."""
    gate = gate_of(name).eval()
    gate.schedule(STEPS, 100)
    hidden = torch.randn(TOKENS, HIDDEN)
    expected = decide(gate, hidden)
    gate.moe_permutation_fixed = False
    found = decide(gate, hidden)
    torch.testing.assert_close(combine(found), combine(expected))
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("name", ["comet", "permuted_top_k"])
def test_baking_it_into_the_experts(name):
    """A model whose experts are put in the order of the outputs needs no permutation."""
    model = extend(tiny_model("mixtral"), MoeExtension(router=GATES[name](permutation_steps=STEPS))).eval()
    inputs = tiny_inputs("mixtral")
    for gate in iter_routers(model):
        spread(gate, 4.0).schedule(STEPS, 100)
    with torch.no_grad():
        expected = model(**inputs).logits
        for layer in model.model.layers:
            order = layer.mlp.gate.moe_permutation[0]
            assert order.tolist() != list(range(8))
            for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                stack.copy_(stack[order])
        different = model(**inputs).logits
        for layer in model.model.layers:
            layer.mlp.gate.moe_permutation.copy_(torch.arange(8))
        baked = model(**inputs).logits
    torch.testing.assert_close(baked, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(different, expected, atol=1e-2)


@pytest.mark.parametrize("name", GATES)
def test_every_expert_is_live_until_the_permutation_is_fixed(name):
    gate = gate_of(name, sinkhorn_temperature=1.0).train()
    hidden = torch.randn(TOKENS, HIDDEN)
    soft = decide(gate, hidden)
    assert soft.index.shape == (TOKENS, 8) and (soft.index < 8).all()
    total = combine(decide(plain_twin(gate), hidden)).sum(-1)
    torch.testing.assert_close(soft.weights.sum(-1), total, rtol=1e-3, atol=1e-4)
    assert decide(gate.eval(), hidden).index.shape == (TOKENS, 2)
    gate.train().schedule(STEPS, 100)
    slots = 8 if "comet" in name or "dselect" in name else 2  # their own softness is left
    assert decide(gate, hidden).index.shape == (TOKENS, slots)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", GATES)
def test_scores_are_a_distribution_where_sinkhorn_has_not_converged(name, training):
    """One round at a low temperature: rows of the matrix do not sum to 1, those of the scores do."""
    gate = gate_of(name, sinkhorn_temperature=1e-3, sinkhorn_iterations=1).train(training)
    assert (gate.permutation(None).sum(-1) - 1).abs().max() > 0.2
    record = decide(gate, torch.randn(TOKENS, HIDDEN))
    torch.testing.assert_close(record.scores.sum(-1), torch.ones(TOKENS))


@pytest.mark.parametrize("fixed", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("name", [name for name in GATES if name != "permuted_top_k"])
def test_autocast_rounds_nothing(name, fixed):
    """Splits have to meet 0 and 1 exactly, and a permutation must not round weights."""
    gate = gate_of(name).train()
    if fixed:
        gate.schedule(STEPS, 100)
    hidden = torch.randn(TOKENS, HIDDEN)
    expected = decide(gate, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decide(gate, hidden)
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.weights, expected.weights) and torch.equal(found.scores, expected.scores)


def test_identity_start():
    """A diagonal far above the temperature: a soft permutation that changes nothing."""
    gate = gate_of("permuted_top_k", permutation_diagonal=1.0).train()
    hidden = torch.randn(TOKENS, HIDDEN)
    found, plain = decide(gate, hidden), decide(plain_twin(gate), hidden)
    assert ((found.index < 8).sum(-1) == 2).all()
    torch.testing.assert_close(combine(found), combine(plain))
    gate.schedule(STEPS, 100)
    assert gate.moe_permutation.tolist() == [list(range(8))]
    config = PermutedTopKRouter.identity_config(gate.moe_site)
    again = make_gate(config, num_experts=8, top_k=2)
    again.schedule(config.permutation_steps, 100)
    assert again.moe_permutation.tolist() == [list(range(8))] and config.permutation_coef == 0


def test_temperature_follows_the_schedule():
    gate = gate_of("comet", sinkhorn_temperature=0.1, sinkhorn_temperature_end=1e-3).eval()
    found = []
    for step in (0, 3, 5):
        gate.schedule(step, 1000)
        temperature = 0.1 * 0.01 ** (step / STEPS)
        expected = sinkhorn(gate.moe_permutation_scores, torch.tensor(temperature), 100)
        torch.testing.assert_close(gate.permutation(None), expected, rtol=1e-3, atol=1e-4)
        found.append(gate.permutation(None).amax().item())
    assert found == sorted(found)


@pytest.mark.parametrize("name", GATES)
def test_fixed_once_by_the_best_assignment(name):
    gate = gate_of(name)
    for step in range(STEPS):
        gate.schedule(step, 100)
        assert (gate.moe_permutation == -1).all() and not gate.moe_permutation_fixed
    gate.schedule(STEPS, 100)
    expected = [best_assignment(matrix) for matrix in gate.moe_permutation_scores.tolist()]
    assert gate.moe_permutation.tolist() == expected and gate.moe_permutation_fixed
    matrices = gate.permutation(None)
    assert (
        (matrices.sum(-1) == 1).all() and (matrices.sum(-2) == 1).all() and ((matrices == 0) | (matrices == 1)).all()
    )
    with torch.no_grad():
        gate.moe_permutation_scores.neg_()
    for step in (STEPS, STEPS + 1, 0):  # 0: another training of a finished model
        gate.schedule(step, 100)
        assert gate.moe_permutation.tolist() == expected


def test_loss_and_its_weight():
    gate = gate_of("comet", permutation_coef=0.3).train()
    record = decide(gate, torch.randn(TOKENS, HIDDEN))
    losses = CometRouter.aux_losses(record, torch.arange(TOKENS) < 4)
    torch.testing.assert_close(losses["permutation"], permutation_entropy(gate.permutation(None)))
    assert record.config.loss_coefs["permutation"] == 0.3 and losses["permutation"] > 0.1
    losses["permutation"].backward()
    assert gate.moe_permutation_scores.grad.abs().sum() > 0
    gate.zero_grad()
    gate.schedule(STEPS, 100)
    loss = CometRouter.aux_losses(decide(gate, torch.randn(TOKENS, HIDDEN)), None)["permutation"]
    assert loss == 0
    loss.backward()  # the parameter stays in the graph, with no gradient
    assert (gate.moe_permutation_scores.grad == 0).all()
    without = make_gate(CometRouterConfig(), num_experts=8)
    assert "permutation" not in CometRouter.aux_losses(without.decide(torch.randn(TOKENS, HIDDEN)), None)


LOGGED = {
    "comet": {"balance", "tree_entropy", "permutation"},
    "dselect_k": {"balance", "code_entropy", "leak", "permutation"},
    "hash": {"balance", "permutation"},
    "permuted_top_k": {"balance", "permutation"},
}


@pytest.mark.parametrize("name", LOGGED)
def test_losses_are_logged_by_name_and_padding_does_not_count(name, tmp_path):
    """Six experts, so that codes leak. Wider padding changes no loss."""
    lines = []
    for longest in (0, 4):
        model = tiny_moe(GATES[name](permutation_steps=2, balance_coef=0.01))
        data = [
            {key: F.pad(value, (0, longest), value=-100 if key == "labels" else 0) for key, value in row.items()}
            for row in rows([6, 4, 5, 3])
        ]
        torch.manual_seed(0)
        options = {"max_steps": 2, "per_device_train_batch_size": 4, "num_train_epochs": 2}
        trainer = MoETrainer(model, arguments(tmp_path / str(longest), **options), train_dataset=data)
        trainer.train()
        lines.append(trainer.state.log_history[0])
    found = {key.removeprefix("moe/loss_") for key in lines[0] if key.startswith("moe/loss_")}
    assert found == LOGGED[name]
    for key in ("loss", "moe/aux_loss", *(f"moe/loss_{loss}" for loss in found)):
        assert lines[1][key] == pytest.approx(lines[0][key], rel=1e-5), key
    coefs = next(iter_routers(model)).moe_config.loss_coefs
    total = sum(coefs[loss] * lines[0][f"moe/loss_{loss}"] for loss in found)
    assert lines[0]["moe/aux_loss"] == pytest.approx(total, rel=1e-5)


def test_noise():
    """Gumbel noise in training only, from the context's generator, and the same when a layer is recomputed."""
    gate = gate_of("hash", permutation_noise=0.05)
    ids = torch.arange(TOKENS)

    def weights(context):
        gate.moe_link.slots.layer_context = context
        record = gate.decide(torch.zeros(TOKENS, HIDDEN))
        gate.moe_link.slots.layer_context = None
        return combine(record)

    gate.train()
    contexts = [RoutingContext(input_ids=ids, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    first = weights(contexts[0])
    assert torch.equal(weights(contexts[0]), first) and not torch.allclose(weights(contexts[1]), first)
    gate.eval()
    assert torch.equal(weights(contexts[0]), weights(contexts[1]))
    gate.moe_config.permutation_noise = 0.0
    assert torch.equal(gate.train().permutation(None), gate.eval().permutation(None))


def test_noise_is_gumbel():
    gate = gate_of("hash", num_experts=128, permutation_noise=1.0).train()
    with torch.no_grad():
        gate.moe_permutation_scores.zero_()
    drawn = {}

    class Keep(RoutingContext):
        def draw(self, order, name, make):
            drawn[name] = make(None)
            return drawn[name]

    gate.permutation(Keep())
    noise = drawn["permutation"]
    assert noise.shape == (1, 128, 128)
    assert abs(noise.mean() - 0.5772) < 0.05 and abs(noise.var() - math.pi**2 / 6) < 0.1


# --- kept ---


def test_state_survives_copies_and_state_dicts():
    hidden = torch.randn(TOKENS, HIDDEN)
    soft = gate_of("permuted_top_k").eval()
    hard = copy.deepcopy(soft)
    hard.schedule(STEPS, 100)
    expected = {gate: decide(gate, hidden) for gate in (soft, hard)}
    twin = copy.deepcopy(hard)
    assert twin.moe_permutation_fixed
    twin.load_state_dict(soft.state_dict())  # such as the best checkpoint, from before
    assert not twin.moe_permutation_fixed
    torch.testing.assert_close(combine(decide(twin, hidden)), combine(expected[soft]))
    twin.load_state_dict(hard.state_dict())
    assert twin.moe_permutation_fixed
    assert torch.equal(decide(twin, hidden).index, expected[hard].index)


@pytest.mark.parametrize("fixed", [False, True], ids=["soft", "hard"])
def test_save_and_load(fixed, tmp_path):
    model = extend(tiny_model("mixtral"), MoeExtension(router=GATES["comet_each"](permutation_steps=STEPS)))
    for gate in iter_routers(model):
        gate.schedule(STEPS if fixed else 2, 100)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for mine, theirs in zip(iter_routers(model), iter_routers(again), strict=True):
        assert theirs.moe_permutation_fixed == fixed
        assert torch.equal(mine.moe_permutation, theirs.moe_permutation)
        assert torch.equal(mine.moe_progress, theirs.moe_progress)
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs("mixtral")).logits, model(**tiny_inputs("mixtral")).logits)
    bare = restore(again)
    assert not any("moe_" in name for module in bare.modules() for name in vars(module) if "gate" in name)


@pytest.mark.parametrize("name", ["comet", "permuted_top_k"])
def test_resume_is_exact(name, tmp_path):
    """Across the step at which the permutation is fixed, and after it."""
    config, data = GATES[name](permutation_steps=3, permutation_coef=0.01), rows([6, 5, 7, 4, 6, 7] * 2)
    options = {"max_steps": 6, "save_steps": 1, "save_strategy": "steps"}
    whole = MoETrainer(tiny_moe(config), arguments(tmp_path / "whole", **options), train_dataset=data)
    whole.train()
    expected = whole.model.state_dict()
    for step in (2, 4):
        again = MoETrainer(tiny_moe(config), arguments(tmp_path / f"again{step}", **options), train_dataset=data)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        found = again.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert all(gate.moe_permutation_fixed for gate in iter_routers(again.model))
    assert all((gate.moe_permutation >= 0).all() for gate in iter_routers(whole.model))


def test_training_must_be_as_long_as_the_search(tmp_path):
    config = GATES["comet"](permutation_steps=9)
    trainer = MoETrainer(tiny_moe(config), arguments(tmp_path, max_steps=8), train_dataset=rows([5, 6]))
    with pytest.raises(ValueError, match="takes 9 optimizer steps, this training has 8"):
        trainer.train()


def test_compiled_after_it_was_fixed():
    """The graph is made anew when the number of slots changes."""
    model = extend(
        tiny_model("mixtral", num_hidden_layers=1),
        MoeExtension(router=GATES["permuted_top_k"](permutation_steps=STEPS, sinkhorn_iterations=5)),
    ).train()
    inputs = tiny_inputs("mixtral")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for step in (0, STEPS):
        for gate in iter_routers(model):
            gate.schedule(step, 100)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


# --- refusals ---


BAD = {
    "steps": ({"permutation_steps": -1}, "`permutation_steps` must be non-negative, got -1"),
    "noise": ({"permutation_noise": -1.0}, "`permutation_noise` must be non-negative"),
    "coef": ({"permutation_coef": -1.0}, "`permutation_coef` must be non-negative"),
    "diagonal": ({"permutation_diagonal": -1.0}, "`permutation_diagonal` must be non-negative"),
    "start": ({"sinkhorn_temperature": 0.0}, "`sinkhorn_temperature` must be positive, got 0.0"),
    "end": ({"sinkhorn_temperature_end": -1.0}, "`sinkhorn_temperature_end` must be positive"),
    "iterations": ({"sinkhorn_iterations": 0}, "`sinkhorn_iterations` must be at least 1, got 0"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PermutedRouterConfig(**settings)


def test_top_k_refuses():
    with pytest.raises(ValueError, match="top-k is one"):
        PermutedTopKRouterConfig(permutation_per_selector=True)
    with pytest.raises(ValueError, match="does not go with a factor for each expert"):
        make_gate(PermutedTopKRouterConfig(), rule=GateRule(expert_scale="factor"))
    with pytest.raises(ValueError, match="does not go with a selection bias that the trainer moves"):
        make_gate(PermutedTopKRouterConfig(correction_bias=True, bias_update_rate=0.1))
    with pytest.raises(ValueError, match="does not go with zero-computation experts"):
        zero = ZeroExpertsConfig(zero=1)
        extend(tiny_model("mixtral"), MoeExtension(router=PermutedTopKRouterConfig(), zero_experts=zero))
    with pytest.raises(ValueError, match="exceeds the 12 experts"):
        make_gate(PermutedTopKRouterConfig(num_experts_per_tok=13))


def test_without_steps_it_is_plain_top_k():
    gate = make_gate(PermutedTopKRouterConfig())
    plain = make_gate(TopKRouterConfig())
    plain.weight = gate.weight
    hidden = torch.randn(TOKENS, HIDDEN)
    found, expected = gate.decide(hidden), plain.decide(hidden)
    assert torch.equal(found.index, expected.index) and torch.equal(found.weights, expected.weights)
    assert not any(name.startswith("moe_") for name in gate.state_dict())
    assert PermutedTopKRouter.aux_losses(found, None) == {}


def test_what_top_k_adds_is_initialised_too():
    gate = make_gate(PermutedTopKRouterConfig(correction_bias=True, permutation_steps=STEPS))
    with torch.no_grad():
        gate.moe_correction_bias.fill_(3.0)
        gate.moe_permutation_scores.fill_(3.0)
    gate.init_weights(0.02)
    assert (gate.moe_correction_bias == 0).all()
    assert gate.moe_permutation_scores.abs().max() <= 0.05


def test_zero_computation_experts_are_permuted_too():
    config = CometRouterConfig(permutation_steps=STEPS)
    model = extend(tiny_model("mixtral"), MoeExtension(router=config, zero_experts=ZeroExpertsConfig(zero=2))).train()
    for gate in iter_routers(model):
        gate.schedule(STEPS, 100)
        assert sorted(gate.moe_permutation[0].tolist()) == list(range(10))
    with trace_routing(model) as contexts:
        model(**tiny_inputs("mixtral"))
    assert all(record.index.max() <= 8 for record in contexts[0].records.values())


# --- does it help? ---


def clusters(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points of `count` clusters, the cluster of each, and the linear map that is right for each cluster."""
    generator = torch.Generator().manual_seed(3)
    label = torch.arange(32 * count) % count
    centre = torch.eye(HIDDEN)[:count] * 4
    points = centre[label] + 0.3 * torch.randn(len(label), HIDDEN, generator=generator)
    maps = torch.randn(count, HIDDEN, generator=generator)
    return points, label, maps


def regression_loss(name: str, count: int, search: bool) -> tuple[float, float]:
    """Loss before and after training a gate whose experts, fixed, are in the wrong order."""
    torch.manual_seed(0)
    points, label, maps = clusters(count)
    experts = maps.roll(1, dims=0)  # expert c is right for cluster c + 1
    options = {"permutation_steps": 150 if search else 0, "permutation_diagonal": 0.02}
    if name == "hash":
        config = HashRouterConfig(vocab_size=count, **options)
    else:
        config = PermutedTopKRouterConfig(num_experts_per_tok=1, **options)
    gate = make_gate(config, num_experts=count, top_k=1).train()
    with torch.no_grad():
        if name == "hash":
            gate.set_table(torch.arange(count))
        else:
            gate.weight.copy_(torch.eye(HIDDEN)[:count])  # cluster c goes to expert c
    target = (points * maps[label]).sum(-1)
    outputs = points @ experts.T  # (T, E)

    def loss():
        return (combine(decide(gate, points, label)) * outputs).sum(-1).sub(target).square().mean()

    before = loss().item()
    optimizer = torch.optim.Adam([p for p in gate.parameters() if p.requires_grad], lr=2e-3) if search else None
    if name != "hash" and not search:
        optimizer = torch.optim.Adam([gate.weight], lr=2e-3)
    for step in range(200):
        gate.schedule(step, 200)
        value = loss()
        if optimizer is None or not value.requires_grad:
            break
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    gate.schedule(200, 200)
    return before, loss().item()


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("name", ["hash", "top_k"])
def test_local_search_finds_the_right_experts(name, count):
    """Regression on clusters with experts in a wrong order: the gate alone stays wrong, the permutation is found."""
    before, alone = regression_loss(name, count, search=False)
    _, searched = regression_loss(name, count, search=True)
    assert before > 5 and alone > 0.9 * before
    assert searched < 0.02 * before
