"""Each method on the tensors of one layer, against slow references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_moe_ext.upcycling import (
    DropUpcycling,
    GranularUpcycling,
    SparseUpcycling,
    UpcyclingMethod,
    list_methods,
    register_upcycling_method,
)
from hf_moe_ext.upcycling.methods import derive_seed, make_method
from tests.upcycling.references import dense_token, expert_of, moe_token, random_block, silu, squared_relu


COPIES, PER_TOKEN, TOKENS = 4, 2, 5
FORMS = [
    pytest.param(True, False, id="gated"),
    pytest.param(False, False, id="plain"),
    pytest.param(True, True, id="gated_bias"),
    pytest.param(False, True, id="plain_bias"),
]


def relative_error(method, block, activation, top_k=None, gate_std=1.0):
    """Largest error of the experts against the dense block, over random tokens and a random gate."""
    stack = method.convert(block, COPIES, seed=3)
    gate = gate_std * torch.randn(COPIES, block.down.shape[0], dtype=torch.float64)
    gate = gate.repeat_interleave(method.experts_per_copy, dim=0)
    top_k = (top_k or PER_TOKEN) * method.experts_per_copy
    worst = 0.0
    for token in torch.randn(TOKENS, block.down.shape[0], dtype=torch.float64):
        out, _ = moe_token(stack, gate, token, activation, top_k)
        dense = dense_token(block, token, activation)
        worst = max(worst, float((out - dense).norm() / dense.norm()))
    return worst


@pytest.mark.parametrize(("gated", "bias"), FORMS)
@pytest.mark.parametrize("top_k", [1, 2, COPIES])
def test_copies_compute_the_dense_function(gated, bias, top_k):
    assert relative_error(SparseUpcycling(), random_block(gated, bias), silu, top_k) < 1e-12


@pytest.mark.parametrize(("gated", "bias"), FORMS)
@pytest.mark.parametrize("granularity", [1, 2, 3, 12])
def test_slices_compute_the_dense_function(gated, bias, granularity):
    assert relative_error(GranularUpcycling(granularity), random_block(gated, bias), silu) < 1e-12


def test_slices_are_chosen_as_whole_copies():
    block, method = random_block(), GranularUpcycling(3)
    stack = method.convert(block, COPIES, seed=0)
    gate = torch.randn(COPIES, 5, dtype=torch.float64).repeat_interleave(3, dim=0)
    for token in torch.randn(TOKENS, 5, dtype=torch.float64):
        _, chosen = moe_token(stack, gate, token, silu, PER_TOKEN * 3)
        copies = {expert // 3 for expert in chosen}
        assert len(copies) == PER_TOKEN and chosen == {3 * copy + part for copy in copies for part in range(3)}


def test_slices_partition_the_neurons():
    block, method = random_block(), GranularUpcycling(4)
    stack = method.convert(block, COPIES, seed=0)
    for copy in range(COPIES):
        rows = torch.cat([stack.up[4 * copy + part, 0] for part in range(4)])
        columns = torch.cat([stack.down[4 * copy + part] for part in range(4)], dim=1)
        assert torch.equal(rows, block.up[0]) and torch.equal(columns, 4 * block.down)


@pytest.mark.parametrize(
    ("gated", "activation", "degree", "exact"),
    [
        pytest.param(False, torch.relu, 1, True, id="relu"),
        pytest.param(False, squared_relu, 2, True, id="squared_relu"),
        pytest.param(True, torch.relu, 1, True, id="gated_relu"),
        pytest.param(True, silu, 1, False, id="swiglu"),
        pytest.param(False, torch.nn.functional.gelu, 1, False, id="gelu"),
    ],
)
def test_a_spread_scale_is_exact_for_homogeneous_activations_only(gated, activation, degree, exact):
    block = replace(random_block(gated), activation_degree=degree)
    error = relative_error(GranularUpcycling(2, scale_mode="spread"), block, activation)
    assert (error < 1e-12) if exact else (error > 1e-3)


def test_a_scale_for_softmax_first_is_exact_in_the_limit_of_small_gates():
    """Weights that are not divided by their sum are about 1 / (E G) each; E G / k makes up for it, to first order."""
    block, granularity = random_block(), 3
    method = GranularUpcycling(granularity, scale=COPIES * granularity / PER_TOKEN)
    stack = method.convert(block, COPIES, seed=0)
    gate, tokens = torch.randn(COPIES, 5, dtype=torch.float64), torch.randn(TOKENS, 5, dtype=torch.float64)
    errors = []
    for size in (1.0, 1e-2, 1e-4):
        logits = (size * tokens @ gate.T).repeat_interleave(granularity, dim=1)
        best = logits.softmax(dim=1).topk(PER_TOKEN * granularity)
        for token, weights, index in zip(tokens, *best, strict=True):
            parts = [dense_token(expert_of(stack, int(expert)), token, silu) for expert in index]
            out = sum(weight * part for weight, part in zip(weights, parts, strict=True))
            dense = dense_token(block, token, silu)
            errors.append(float((out - dense).norm() / dense.norm()))
    worst = [max(errors[i : i + TOKENS]) for i in range(0, len(errors), TOKENS)]
    assert worst[0] > 0.1 and worst[1] < 0.05 and worst[2] < 0.05 * worst[1]


@pytest.mark.parametrize(("degree", "activation"), [(1, torch.relu), (2, squared_relu)])
def test_a_spread_scale_counts_biases(degree, activation):
    block = replace(random_block(gated=False, bias=True), activation_degree=degree)
    assert relative_error(GranularUpcycling(2, scale_mode="spread"), block, activation) < 1e-12


def test_another_scale_scales_the_output():
    block = random_block()
    error = relative_error(GranularUpcycling(2, scale=1.0), block, silu)
    assert error == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(("gated", "bias"), FORMS)
def test_dropping_nothing_permutes_and_keeps_the_function(gated, bias):
    block, method = random_block(gated, bias), DropUpcycling(drop_ratio=0.0)
    assert relative_error(method, block, silu) < 1e-12
    stack = method.convert(block, COPIES, seed=0)
    assert all(not torch.equal(stack.up[expert], block.up) for expert in range(COPIES))
    rows = {tuple(row.tolist()) for row in block.up[0]}
    assert all({tuple(row.tolist()) for row in stack.up[expert, 0]} == rows for expert in range(COPIES))


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.99, 1.0])
def test_the_share_of_redrawn_neurons_is_as_asked(ratio):
    block = random_block(bias=True, width=30)
    stack = DropUpcycling(ratio, permute=False).convert(block, COPIES, seed=0)
    for expert in range(COPIES):
        part = expert_of(stack, expert)
        changed = [
            (part.up[0] != block.up[0]).all(dim=1),
            (part.up[1] != block.up[1]).all(dim=1),
            (part.down != block.down).all(dim=0),
            part.up_bias[0] != block.up_bias[0],
        ]
        assert all(int(c.sum()) == int(ratio * 30) for c in changed)
        assert all(torch.equal(c, changed[0]) for c in changed), "shared indices"
        assert torch.equal(part.down_bias, block.down_bias)


def test_indices_of_each_matrix_differ_when_not_shared():
    block = random_block(width=30)
    part = expert_of(DropUpcycling(0.5, shared_indices=False, permute=False).convert(block, 1, seed=0), 0)
    gate, up = ((part.up[i] != block.up[i]).all(dim=1) for i in (0, 1))
    down = (part.down != block.down).all(dim=0)
    assert int(gate.sum()) == int(up.sum()) == int(down.sum()) == 15
    assert not torch.equal(gate, up) and not torch.equal(up, down) and not torch.equal(gate, down)


def test_redrawn_entries_have_the_statistics_of_those_they_replace():
    block = random_block(width=400, hidden=60)
    block.up[0] = 3 + 0.5 * block.up[0]
    block.down[:] = -1 + 0.1 * block.down
    part = expert_of(DropUpcycling(1.0).convert(block, 1, seed=0), 0)
    for new, old in ((part.up[0], block.up[0]), (part.up[1], block.up[1]), (part.down, block.down)):
        # 24000 entries: the mean is known to 0.65 % of the deviation, the deviation to 0.46 %; five times that.
        assert float((new.mean() - old.mean()).abs()) < 0.033 * float(old.std())
        assert float(new.std() / old.std()) == pytest.approx(1.0, abs=0.023)


def test_noise_is_added_to_the_replaced_entries_only():
    block = random_block(width=400, hidden=60)
    stack = DropUpcycling(0.5, reinit="noise", noise_std=0.1, permute=False).convert(block, 1, seed=0)
    difference = stack.up[0, 0] - block.up[0]
    touched = (difference != 0).all(dim=1)
    assert int(touched.sum()) == 200 and not difference[~touched].any()
    assert float(difference[touched].std()) == pytest.approx(0.1, rel=0.05)


def test_dropped_experts_differ_pairwise():
    stack = DropUpcycling(0.5).convert(random_block(), COPIES, seed=0)
    pairs = [(i, j) for i in range(COPIES) for j in range(i)]
    assert all(not torch.equal(stack.up[i], stack.up[j]) for i, j in pairs)
    assert all(not torch.equal(stack.down[i], stack.down[j]) for i, j in pairs)


def with_magnitudes(block, domains):
    """As after a calibration pass, for methods that need one."""
    return replace(block, statistics={"magnitude": torch.rand(domains, block.intermediate_size)})


@pytest.mark.parametrize("name", list_methods())
def test_seeds_reproduce_tensors_and_no_tensor_is_shared_with_the_source(name):
    block = with_magnitudes(random_block(bias=True), COPIES)
    before = [tensor.clone() for tensor in (block.up, block.down)]
    first, again, other = (make_method(name, {}).convert(block, COPIES, seed) for seed in (1, 1, 2))
    assert torch.equal(first.up, again.up) and torch.equal(first.down, again.down)
    assert torch.equal(first.up, other.up) == (name not in ("drop", "masked", "split", "moefication"))
    for tensor in (first.up, first.down, first.up_bias, first.down_bias):
        tensor.zero_()
    assert torch.equal(block.up, before[0]) and torch.equal(block.down, before[1]), "the dense block was written to"
    assert again.up.abs().sum() > 0


@pytest.mark.parametrize("name", list_methods())
def test_every_element_is_written(name, poison_memory):
    block = with_magnitudes(random_block(bias=True), 1)
    block = replace(block, **{k: v.float() for k, v in vars(block).items() if isinstance(v, torch.Tensor)})
    stack = make_method(name, {}).convert(block, 1, seed=0)
    for tensor in (stack.up, stack.down, stack.up_bias, stack.down_bias):
        assert tensor.isfinite().all() and tensor.dtype == torch.float32


def test_seeds_of_layers_and_purposes_differ():
    seeds = {derive_seed(seed, key, purpose) for seed in (0, 1) for key in ("0", "1") for purpose in ("gate", "drop")}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)


def test_options_that_differ_are_told():
    assert GranularUpcycling(4).to_dict() == {"granularity": 4}
    assert DropUpcycling().to_dict() == {}


@pytest.mark.parametrize(
    ("name", "options", "error", "match"),
    [
        pytest.param("spars", {}, ValueError, "unknown upcycling method `spars`.*Did you mean `sparse`", id="method"),
        pytest.param("sparse", {"x": 1}, TypeError, "unknown option `x`.*no options", id="option"),
        pytest.param("drop", {"drop_rate": 1}, TypeError, "Did you mean `drop_ratio`", id="close"),
        pytest.param("drop", {"device_map": 1}, TypeError, "`load_upcycled` takes", id="loading"),
        pytest.param("drop", {"drop_ratio": 1.5}, ValueError, r"\[0, 1\], got 1.5", id="ratio"),
        pytest.param("drop", {"drop_ratio": "half"}, TypeError, "must be float, got 'half'", id="type"),
        pytest.param("drop", {"noise_std": -1.0}, ValueError, "non-negative, got -1", id="noise"),
        pytest.param("drop", {"reinit": "zero"}, TypeError, "'statistics', 'noise'", id="reinit"),
        pytest.param("granular", {"granularity": 0}, ValueError, "at least 1, got 0", id="granularity"),
        pytest.param("granular", {"scale": 0.0}, ValueError, "positive, got 0", id="scale"),
    ],
)
def test_bad_options_are_named(name, options, error, match):
    with pytest.raises(error, match=match):
        make_method(name, options)


def test_a_granularity_that_does_not_divide_names_those_that_do():
    with pytest.raises(ValueError, match=r"`granularity` \(5\) must divide.*\(12\).*1, 2, 3, 4, 6, 12"):
        GranularUpcycling(5).expert_width(12)


def test_registered_names_are_checked():
    with pytest.raises(ValueError, match="lower-case"):
        register_upcycling_method("Sparse")
    with pytest.raises(ValueError, match="registered already"):
        register_upcycling_method("sparse")(UpcyclingMethod)
