"""The tree gate of COMET against a recursion over single tokens, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_permutation import MIN_WEIGHT
from hf_moe_ext.modeling.moe_router import GateRule
from hf_moe_ext.modeling.moe_structure import auxiliary_losses, iter_routers, route_rows, trace_routing
from hf_moe_ext.modeling.router_comet import CometRouter, CometRouterConfig, leaf_probabilities, smooth_step
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.patching import extend, restore

from .test_routers import EXPERTS, HIDDEN, TOKENS, chosen, combine, make_gate


# --- references ---


def slow_step(value: torch.Tensor, width: float) -> torch.Tensor:
    if value <= -width / 2:
        return value * 0
    if value >= width / 2:
        return value * 0 + 1
    return -2 * value**3 / width**3 + 3 * value / (2 * width) + 0.5


def slow_leaves(left, node: int = 0) -> list:
    """Products along the paths of a heap-numbered tree, leaves from left to right."""
    if node >= len(left):
        return [1.0]
    share = left[node]
    lower = [share * p for p in slow_leaves(left, 2 * node + 1)]
    return lower + [(1 - share) * p for p in slow_leaves(left, 2 * node + 2)]


def slow_mixture(token, own, width):
    """Per tree, the weight of every leaf, and the probabilities to reach them."""
    trees, reached = len(own["leaf_weight"]), []
    for i in range(trees):
        bias = own.get("split_bias")
        splits = [
            slow_step(row @ token + (0 if bias is None else bias[i][q]), width)
            for q, row in enumerate(own["split_weight"][i])
        ]
        reached.append(slow_leaves(splits))
    odds = [
        [v * torch.exp(own["leaf_weight"][i][j] @ token + own["leaf_bias"][i][j]) for j, v in enumerate(reached[i])]
        for i in range(trees)
    ]
    total = sum(sum(row) for row in odds)
    return [[odd / total for odd in row] for row in odds], reached


def slow_comet(hidden, own, *, width=1.0, slots=None, matrices=None):
    """(T, E) weights, in float64 with gradients, and the entropy of the trees of each token."""
    rows, entropies = [], []
    for token in hidden:
        mixture, reached = slow_mixture(token, own, width)
        experts = [torch.zeros((), dtype=torch.float64) for _ in mixture[0]]
        for i, tree in enumerate(mixture):
            for a, weight in enumerate(tree):
                if matrices is None:
                    experts[a] = experts[a] + weight
                    continue
                for b in range(len(experts)):
                    experts[b] = experts[b] + weight * matrices[i % len(matrices)][a][b]
        total = sum(experts)
        experts = [weight / total for weight in experts]
        best = sorted(range(len(experts)), key=lambda j: -experts[j].item())[: slots or len(experts)]  # noqa: B023
        best = [j for j in best if experts[j] >= MIN_WEIGHT]
        kept = sum(experts[j] for j in best)
        zero = torch.zeros((), dtype=torch.float64)
        rows.append(torch.stack([experts[j] / kept if j in best else zero for j in range(len(experts))]))
        entropies.append(sum(-v * torch.log(v) for tree in reached for v in tree if v > 0))
    return torch.stack(rows), torch.stack(entropies)


def own_parameters(gate, dtype=torch.float64) -> dict[str, torch.Tensor]:
    own = {name.removeprefix("moe_"): p for name, p in gate.named_parameters() if name.startswith("moe_")}
    return {name: p.detach().to(dtype, copy=True).requires_grad_() for name, p in own.items()}


def spread(gate, factor: float = 20.0):
    """Splits of a fresh tree are near one half; make them differ."""
    with torch.no_grad():
        for name, parameter in gate.named_parameters():
            if "split" in name or "code" in name:
                parameter.mul_(factor)
            elif "leaf" in name or "selector" in name:
                parameter.normal_(std=0.5)
    return gate


def trees(num_experts=EXPERTS, k=3, factor=3.0, **options):
    return spread(make_gate(CometRouterConfig(num_experts_per_tok=k, **options), num_experts=num_experts), factor)


# --- the tree ---


@pytest.mark.parametrize("leaves", [2, 3, 4, 5, 6, 7, 8, 9, 16, 33])
def test_leaf_probabilities_equal_recursion(leaves):
    left = torch.rand(5, leaves - 1, dtype=torch.float64, requires_grad=True)
    found = leaf_probabilities(left)
    expected = torch.stack([torch.stack(slow_leaves(row)) for row in left])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.sum(-1), torch.ones(5, dtype=torch.float64))
    upstream = torch.randn_like(found)
    mine = torch.autograd.grad(found, left, upstream)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(expected, left, upstream)[0])


def test_leaves_of_an_uneven_tree():
    """Five leaves by hand: node 1 is split again, node 3 too; nodes 4, 7, 8 and 5, 6 are the leaves, left to right."""
    left = torch.tensor([0.6, 0.3, 0.9, 0.2])  # nodes 0, 1, 2, 3
    expected = torch.tensor([0.6 * 0.3 * 0.2, 0.6 * 0.3 * 0.8, 0.6 * 0.7, 0.4 * 0.9, 0.4 * 0.1])
    torch.testing.assert_close(leaf_probabilities(left), expected)


@pytest.mark.parametrize("width", [0.01, 1.0, 10.0])
def test_smooth_step(width):
    value = torch.linspace(-width, width, 401, dtype=torch.float64, requires_grad=True)
    step = smooth_step(value, width)
    torch.testing.assert_close(step, torch.stack([slow_step(v, width) for v in value]))
    torch.testing.assert_close(step + step.flip(0), torch.ones_like(step))  # S(-t) = 1 - S(t)
    assert (step[value <= -width / 2] == 0).all() and (step[value >= width / 2] == 1).all()
    slope = torch.autograd.grad(step.sum(), value)[0]
    inside = value.abs() < width / 2
    exact = torch.where(inside, -6 * value**2 / width**3 + 1.5 / width, torch.zeros_like(value))
    torch.testing.assert_close(slope, exact)  # continuous: the formula is 0 at both ends
    assert slope[[100, 300]].abs().max() < 1e-9 / width
    single = smooth_step(torch.linspace(-0.5, 0.5, 100_001) * width, width)
    assert single.min() == 0 and single.max() == 1  # rounding makes no negative probability


# --- the router ---


@pytest.mark.parametrize("num_experts", [2, 4, 5, 6, 8, 16])
def test_weights_are_a_distribution(num_experts):
    gate = trees(num_experts, k=2).train()
    record = gate.decide(torch.randn(200, HIDDEN))
    assert record.weights.shape == (200, num_experts) and (record.weights >= 0).all()
    torch.testing.assert_close(record.weights.sum(-1), torch.ones(200))
    torch.testing.assert_close(record.scores.sum(-1), torch.ones(200))
    torch.testing.assert_close(combine(record), record.scores, rtol=0, atol=num_experts * MIN_WEIGHT)


CASES = {
    "paper": {},
    "no_bias": {"split_bias": False},
    "one_tree": {"k": 1},
    "wide": {"smooth_step_width": 10.0},
    "narrow": {"smooth_step_width": 0.1},
    "uneven": {"num_experts": 5},
    "power_of_two": {"num_experts": 8, "k": 4},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_reference(case, training):
    """Weights, the entropy loss, and the gradients of input and all parameters."""
    gate = trees(**case).train(training)
    k, width = gate.moe_config.num_experts_per_tok, gate.moe_config.smooth_step_width
    hidden = torch.randn(TOKENS, HIDDEN)
    slow_hidden, slow_own = hidden.double().requires_grad_(), own_parameters(gate)
    hidden.requires_grad_()
    record = gate.decide(hidden)
    expected, entropies = slow_comet(slow_hidden, slow_own, width=width, slots=None if training else k)
    weights = combine(record)
    assert record.index.shape == (TOKENS, gate.moe_site.num_experts if training else k)
    assert [set(row) for row in chosen(record)] == [set(row.nonzero().flatten().tolist()) for row in expected]
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(record.logits, record.scores.clamp_min(1e-30).log())
    mask = torch.arange(TOKENS) % 3 != 0
    loss = CometRouter.aux_losses(record, mask)["tree_entropy"]
    slow_loss = sum(value for value, counts in zip(entropies, mask, strict=True) if counts) / mask.sum()
    torch.testing.assert_close(loss.double(), slow_loss, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(weights)
    ((weights * upstream).sum() + 3 * loss).backward()
    ((expected * upstream.double()).sum() + 3 * slow_loss).backward()
    torch.testing.assert_close(hidden.grad.double(), slow_hidden.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in slow_own.items():
        mine = gate.get_parameter(f"moe_{name}").grad
        torch.testing.assert_close(mine.double(), parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_experts", [4, 5, 6, 8, 16])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_sharp_splits_leave_k_experts(num_experts, k):
    gate = trees(num_experts, k=k, factor=1e4).train()
    hidden = torch.randn(300, HIDDEN)
    splits = torch.einsum("th,iqh->tiq", hidden, gate.moe_split_weight) + gate.moe_split_bias
    sharp = (splits.abs() >= 0.5).flatten(1).all(-1)
    assert sharp.float().mean() > 0.9
    record = gate.decide(hidden)
    used = (record.scores > 0).sum(-1)[sharp]
    assert used.max() <= k and (k == 1 or used.min() < k)  # trees may pick the same expert
    assert torch.equal((record.index < num_experts).sum(-1)[sharp], used)
    with torch.no_grad():
        gate.moe_split_weight.mul_(1e-7)
        gate.moe_split_bias.mul_(1e-7)
        gate.moe_leaf_weight.mul_(1e-3)
    soft = gate.decide(hidden)
    assert (soft.index < num_experts).all() and (soft.scores > 0).all()


def test_training_and_evaluation_agree_once_splits_are_sharp():
    gate = trees(k=3, factor=1e5)
    hidden = torch.randn(300, HIDDEN)
    evaluated, trained = gate.eval().decide(hidden), gate.train().decide(hidden)
    sharp = (trained.scores > 0).sum(-1) <= 3
    assert sharp.float().mean() > 0.9
    assert evaluated.index.shape == (300, 3) and trained.index.shape == (300, EXPERTS)
    torch.testing.assert_close(combine(evaluated)[sharp], combine(trained)[sharp])


def test_gradient_only_inside_the_soft_range():
    """A split has a gradient from exactly those tokens that it does not decide outright."""
    gate = trees(num_experts=2, k=1, smooth_step_width=1.0).train()
    with torch.no_grad():
        gate.moe_split_weight.normal_(std=0.15)
    values = []
    for token in torch.randn(50, 1, HIDDEN):
        gate.zero_grad()
        split = (gate.moe_split_weight @ token[0] + gate.moe_split_bias).item()
        record = gate.decide(token)
        (combine(record)[0, 0] + CometRouter.aux_losses(record, None)["tree_entropy"]).backward()
        slope = gate.moe_split_weight.grad.abs().sum()
        assert (slope == 0) == (abs(split) >= 0.5)
        assert slope.isfinite()
        values.append(abs(split) < 0.5)
    assert 5 < sum(values) < 45


def test_extreme_inputs_stay_finite():
    gate = trees(k=2, factor=100.0).train()
    for size in (1e-6, 1e3, 1e6):
        hidden = (torch.randn(100, HIDDEN) * size).requires_grad_()
        record = gate.decide(hidden)
        (record.weights.square().sum() + CometRouter.aux_losses(record, None)["tree_entropy"]).backward()
        assert record.scores.isfinite().all() and hidden.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for n, p in gate.named_parameters() if n.startswith("moe_"))


def test_no_loss_of_weight_zero():
    gate = trees(tree_entropy_coef=0.0)
    record = gate.decide(torch.randn(TOKENS, HIDDEN))
    assert record.extras == {} and CometRouter.aux_losses(record, None) == {}


def test_scale_of_the_family():
    hidden = torch.randn(TOKENS, HIDDEN)
    gate = make_gate(CometRouterConfig(), rule=GateRule(scale=2.5))
    torch.testing.assert_close(gate.decide(hidden).weights.sum(-1), torch.full((TOKENS,), 2.5))
    assert gate.moe_leaf_weight.shape[0] == 3  # as many trees as the family has experts per token


@pytest.mark.parametrize("hidden_size", [32, 768, 4096])
def test_dead_splits_at_the_start(hidden_size):
    """With inputs of unit RMS few splits are decided from the start, at every width."""
    gate = make_gate(CometRouterConfig(smooth_step_width=0.3), num_experts=33, hidden=hidden_size)
    hidden = torch.nn.functional.rms_norm(torch.randn(500, hidden_size), (hidden_size,))
    splits = torch.einsum("th,iqh->tiq", hidden, gate.moe_split_weight) + gate.moe_split_bias
    share = (splits.abs() >= 0.15).float().mean()
    # A normal variable of standard deviation 0.16 g passes g/2 in 0.18% of all cases.
    assert 0.0005 < share < 0.005
    bound = 0.003 * math.sqrt(768 / hidden_size)
    assert 0.9 * bound < gate.moe_split_weight.abs().max() <= bound
    assert gate.moe_leaf_weight.abs().max() <= 0.05 and (gate.moe_leaf_bias == 0).all()


def test_stock_gate_is_frozen_until_restored():
    model = tiny_model("mixtral")
    extend(model, MoeExtension(router=CometRouterConfig()))
    gates = [gate.weight for gate in iter_routers(model)]
    assert gates and not any(weight.requires_grad for weight in gates)
    restore(model)
    assert all(weight.requires_grad for weight in gates)


def test_zero_computation_experts():
    """Null experts take a share of the tokens, and none of the weight."""
    zero = ZeroExpertsConfig(zero=2, copy=1)
    model = extend(tiny_model("mixtral"), MoeExtension(router=CometRouterConfig(), zero_experts=zero)).train()
    for gate in iter_routers(model):
        spread(gate, 5.0)
    inputs = tiny_inputs("mixtral")
    with trace_routing(model) as contexts:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for record in contexts[0].records.values():
        assert record.scores.shape[-1] == 11 and record.index.shape[-1] == 11
        assert (record.chosen >= 8).any() and set(record.index[record.index > 8].tolist()) == {9}
        torch.testing.assert_close(record.weights.sum(-1), torch.ones(len(record.weights)))


def test_row_policies():
    """Fewer experts for some rows, in evaluation; the trees are the same."""
    model = extend(tiny_model("mixtral"), MoeExtension(router=CometRouterConfig(num_experts_per_tok=3))).eval()
    inputs = tiny_inputs("mixtral")
    with (
        torch.no_grad(),
        trace_routing(model) as contexts,
        route_rows(model, ["a", "b"], {"b": {"num_experts_per_tok": 1}}),
    ):
        model(**inputs)
    for record in contexts[0].records.values():
        used = (record.index < 8).sum(-1).view(2, -1)
        assert (used[0] == 3).all() and (used[1] == 1).all()


def test_padding_does_not_change_the_losses():
    config = CometRouterConfig(permutation_steps=5, balance_coef=0.1, entropy_coef=0.1)
    model = extend(tiny_model("mixtral"), MoeExtension(router=config)).train()
    ids = torch.randint(4, 70, (1, 9))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    for inputs in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask, "position_ids": positions}):
        with trace_routing(model) as contexts:
            model(**inputs)
        found.append(auxiliary_losses(contexts)[1])
    assert set(found[0]) == {"balance", "entropy", "tree_entropy", "permutation"}
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


BAD = {
    "z": ({"z_coef": 0.1}, "`z_coef` must be 0 for the `comet` router, got 0.1"),
    "k": ({"num_experts_per_tok": 0}, "`num_experts_per_tok` must be at least 1, got 0"),
    "width": ({"smooth_step_width": 0.0}, "`smooth_step_width` must be positive, got 0.0"),
    "coef": ({"tree_entropy_coef": -1.0}, "`tree_entropy_coef` must be non-negative"),
    "range": ({"leaf_init_range": -0.1}, "`leaf_init_range` must be non-negative"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CometRouterConfig(**settings)


def test_refuses_sites():
    with pytest.raises(ValueError, match=r"`num_experts_per_tok` \(5\) exceeds the 4 experts of layer \"0\""):
        make_gate(CometRouterConfig(num_experts_per_tok=5), num_experts=4)
    with pytest.raises(ValueError, match="has one expert"):
        make_gate(CometRouterConfig(), num_experts=1, top_k=1)


def test_no_identity():
    gate = make_gate(TopKRouterConfig())
    with pytest.raises(NotImplementedError, match="linear gate"):
        CometRouter.identity_config(gate.moe_site)


def _trained_sparsity(coef: float) -> float:
    """Experts per token after a training against a task that wants all experts evenly."""
    torch.manual_seed(0)
    gate = trees(num_experts=8, k=2, factor=1.0, tree_entropy_coef=coef).train()
    hidden = torch.randn(256, HIDDEN)
    optimizer = torch.optim.Adam([p for p in gate.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(300):
        record = gate.decide(hidden)
        loss = (combine(record) - 1 / 8).square().sum(-1).mean()
        loss = loss + sum(coef * value for value in CometRouter.aux_losses(record, None).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (gate.decide(hidden).index < 8).sum(-1).float().mean().item()


def test_entropy_loss_makes_the_gate_sparse():
    assert _trained_sparsity(0.0) == 8.0
    assert _trained_sparsity(0.5) < 3.0


def test_copies_are_independent():
    gate = trees()
    twin = copy.deepcopy(gate)
    with torch.no_grad():
        twin.moe_leaf_bias.add_(1)
    assert not torch.equal(twin.moe_leaf_bias, gate.moe_leaf_bias)
