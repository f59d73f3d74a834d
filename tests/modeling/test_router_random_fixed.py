"""SMoE-Dropout: the frozen random router, its schedule, and the dense model it starts from."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from hf_moe_ext import MoeExtension, MoETrainer, extend, trace_routing, upcycle
from hf_moe_ext.modeling.configuration_moe_ext import ZeroExpertsConfig
from hf_moe_ext.modeling.moe_router import GateRule
from hf_moe_ext.modeling.moe_structure import iter_routers, route_rows
from hf_moe_ext.modeling.router_random_fixed import RandomFixedRouterConfig
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.patching import restore

from ..character_runs import character_llama, held_out_loss, train_characters
from ..trainers.common import NUM_EXPERTS, arguments, logged, rows, tiny_moe
from .test_routers import EXPERTS, HIDDEN, TOKENS, chosen, combine, make_gate, slow_scores


def config(start=2, end=5, **options) -> RandomFixedRouterConfig:
    return RandomFixedRouterConfig(start_experts_per_tok=start, end_experts_per_tok=end, **options)


def slow_route(hidden, weight, k, scale=1.0):
    """(T, E) weights and chosen experts, in float64 with gradients: softmax over the k best logits."""
    combined, sets = [], []
    for token in hidden:
        logits = weight @ token
        best = sorted(range(len(logits)), key=lambda i: -logits[i].item())[:k]  # noqa: B023
        row = [torch.zeros((), dtype=torch.float64)] * len(logits)
        for i, value in zip(best, slow_scores(torch.stack([logits[i] for i in best]), "softmax"), strict=True):
            row[i] = value * scale
        combined.append(torch.stack(row))
        sets.append(best)
    return torch.stack(combined), sets


@pytest.mark.parametrize("scale", ["none", "k"])
@pytest.mark.parametrize("k", [1, 3, EXPERTS])
@pytest.mark.parametrize("training", [True, False])
def test_it_follows_the_reference(training, k, scale):
    """Choice, weights, and the gradient of the input. In training k is that of the schedule, of up to 12 slots."""
    options = {"output_scale": scale, "experts_per_tok": 5 if training else k}
    gate = make_gate(config(1, EXPERTS, **options)).train(training)
    gate.moe_active.fill_(k if training else 7)
    hidden = torch.randn(TOKENS, HIDDEN)
    mine, theirs = (hidden.to(dtype, copy=True).requires_grad_() for dtype in (torch.float32, torch.float64))
    record = gate.decide(mine)
    expected, sets = slow_route(theirs, gate.moe_random_weight.double(), k, k if scale == "k" else 1.0)
    assert chosen(record) == sets
    assert record.index.shape[-1] == (EXPERTS if training else k)
    weights = combine(record)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(weights)
    (weights * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(record.scores, (hidden @ gate.moe_random_weight.T).softmax(-1))


def test_the_bias_of_the_authors_code_is_added():
    gate = make_gate(config(bias=True)).eval()
    hidden = torch.randn(TOKENS, HIDDEN)
    expected = hidden @ gate.moe_random_weight.T + gate.moe_random_bias
    torch.testing.assert_close(gate.decide(hidden).logits, expected)
    assert gate.moe_random_bias.abs().max() <= HIDDEN**-0.5 and gate.moe_random_bias.unique().numel() == EXPERTS


def test_automatic_casting_does_not_reach_the_router():
    """Rounded to bfloat16, the logits of experts that are close would tie."""
    gate, hidden = make_gate(config(bias=True)).eval(), torch.randn(TOKENS, HIDDEN)
    plain = gate.decide(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gate.decide(hidden)
    assert cast.logits.dtype == torch.float32
    assert torch.equal(cast.logits, plain.logits) and torch.equal(cast.weights, plain.weights)


def test_the_scale_of_the_family_is_applied():
    gate = make_gate(config(3, 3), rule=GateRule(scale=2.5))
    torch.testing.assert_close(combine(gate.decide(torch.randn(TOKENS, HIDDEN))).sum(-1), torch.full((TOKENS,), 2.5))


# --- what is random, and what is not ---


def routers_of(model):
    return {router.moe_site.key: router.moe_random_weight.clone() for router in iter_routers(model)}


def test_the_router_is_drawn_by_seed_and_layer():
    """Uniform within 1/sqrt(H), as PyTorch initialises a linear layer; another one for each layer and seed."""
    first, again = routers_of(tiny_moe(config(seed=3))), routers_of(tiny_moe(config(seed=3), seed=9))
    other = routers_of(tiny_moe(config(seed=4)))
    for key, weight in first.items():
        assert torch.equal(weight, again[key]) and not torch.equal(weight, other[key])
        bound = weight.shape[1] ** -0.5
        assert weight.abs().max() <= bound and weight.dtype == torch.float32
        # 192 uniform numbers: the mean of their squares is known to 6.5 %; five times that.
        assert weight.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.33)
    assert not torch.equal(first["0"], first["1"])


def test_the_router_never_changes(tmp_path):
    """Under weight decay, too: it is in no optimizer, and neither is the stock gate it stands in front of."""
    model = tiny_moe(config(1, 3))
    before, gates = routers_of(model), [layer.mlp.gate.weight.clone() for layer in model.model.layers]
    experts = model.model.layers[0].mlp.experts.down_proj.clone()
    trainer = train_on_rows(model, tmp_path, max_steps=5, weight_decay=0.5)
    after = routers_of(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(gate, layer.mlp.gate.weight) for gate, layer in zip(gates, model.model.layers, strict=True))
    assert not torch.equal(experts, model.model.layers[0].mlp.experts.down_proj)
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    frozen = [t for router in iter_routers(model) for t in (*router.parameters(), *router.buffers())]
    assert len(frozen) == 2 * 3 and not any(id(tensor) in trained for tensor in frozen)


def train_on_rows(model, folder, **options):
    trainer = MoETrainer(model=model, args=arguments(folder, **options), train_dataset=rows([9, 5, 7, 3] * 4))
    trainer.train()
    return trainer


def assignments(model, ids):
    with trace_routing(model) as contexts, torch.no_grad():
        model(ids)
    return [record.index for record in contexts[0].records.values()]


def test_assignments_move_only_with_the_hidden_states():
    model, ids = tiny_moe(config()).eval(), torch.randint(1, 64, (4, 9))
    first, again = assignments(model, ids), assignments(model, ids)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    before = routers_of(model)
    embeddings = model.get_input_embeddings().weight
    model.requires_grad_(False)
    embeddings.requires_grad_(True)
    optimizer = torch.optim.SGD([embeddings], lr=3.0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    moved = assignments(model, ids)
    assert any((one != two).any() for one, two in zip(first, moved, strict=True))
    assert all(torch.equal(before[key], weight) for key, weight in routers_of(model).items())


def test_it_survives_saving(tmp_path):
    """Another seed in the loading process's config would be another model: the tensors are saved."""
    model = tiny_moe(config(seed=5))
    for router in iter_routers(model):
        router.schedule(1, 2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for mine, theirs in zip(iter_routers(model), iter_routers(loaded), strict=True):
        assert torch.equal(mine.moe_random_weight, theirs.moe_random_weight)
        assert mine.moe_active == theirs.moe_active == 4
    changed = type(model.config).from_pretrained(tmp_path)
    changed.moe_ext["router"]["seed"] = 6
    again = type(model).from_pretrained(tmp_path, config=changed)
    assert all(torch.equal(weight, routers_of(model)[key]) for key, weight in routers_of(again).items())


# --- the schedule ---


def exact_linear(start: int, end: int, step: int, length: int) -> int:
    """Python rounds fractions exactly, halves to the even number."""
    return start + round(Fraction((end - start) * step, length))


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        # 8 + 8/4 and 8 + 8/2
        pytest.param("linear", 10, 12, id="linear"),
        # 16 - 8 cos(pi/8) = 16 - 7.39 and 16 - 8 cos(pi/4) = 16 - 5.66
        pytest.param("cosine", 9, 10, id="cosine"),
        # 16 - 8 * 0.99^75 = 16 - 3.76 and 16 - 8 * 0.99^150 = 16 - 1.77
        pytest.param("exponential", 12, 14, id="exponential"),
        # the stages 8, 16
        pytest.param("stages", 8, 16, id="stages"),
    ],
)
def test_schedule_table(shape, quarter, half):
    """From 8 to 16 of 16 experts in 400 steps, the setting of the paper, and the way back."""
    up, down = config(8, 16, k_shape=shape, steps=400), config(16, 8, k_shape=shape, steps=400)
    assert [up.experts_at(step, 999, 16) for step in (0, 100, 200, 400, 500)] == [8, quarter, half, 16, 16]
    steps = range(401)
    values = [up.experts_at(step, 999, 16) for step in steps]
    assert values == sorted(values)
    falling = [down.experts_at(step, 999, 16) for step in steps]
    assert falling[0] == 16 and falling[-1] == 8 and falling == sorted(falling, reverse=True)
    if shape != "stages":  # mirrored
        assert [24 - value for value in falling] == values


def test_linear_schedule_rounds_halves_to_the_even_number():
    grow = config(8, 16, steps=16)
    assert [grow.experts_at(step, 0, 16) for step in range(7)] == [8, 8, 9, 10, 10, 10, 11]  # 8.5 -> 8, 9.5 -> 10
    for start, end, length in ((8, 16, 400), (1, 7, 12), (7, 1, 12), (2, 5, 7)):
        told = config(start, end, steps=length)
        for step in range(length + 1):
            assert told.experts_at(step, 0, 16) == exact_linear(start, end, step, length)


def test_stages_double():
    up, down = (config(*ends, k_shape="stages", steps=100) for ends in ((1, 16), (16, 1)))
    assert [up.experts_at(step, 0, 16) for step in (0, 19, 20, 40, 60, 79, 80, 99)] == [1, 1, 2, 4, 8, 8, 16, 16]
    assert [down.experts_at(step, 0, 16) for step in (0, 20, 40, 60, 80)] == [16, 8, 4, 2, 1]
    assert config(3, 10, k_shape="stages", steps=3).experts_at(1, 0, 16) == 6


def test_lengths_that_the_authors_formula_cannot_have():
    """Fewer than 300 steps: their exponent divides by zero."""
    values = [config(1, 16, k_shape="exponential", steps=30).experts_at(step, 0, 16) for step in range(31)]
    expected = [16 + round(-15 * math.pow(0.99, 10 * step)) for step in range(30)]
    assert values == [*expected, 16]


def test_half_to_all_over_the_whole_training_is_the_default():
    default = RandomFixedRouterConfig()
    assert [default.experts_at(step, 10, 16) for step in (0, 5, 10)] == [8, 12, 16]
    assert default.experts_at(0, 0, 16) == default.experts_at(5, 0, 16) == 8  # no training
    assert default.experts_at(0, 10, 1) == 1
    assert default.schedule_steps is None and config(steps=7).schedule_steps == 7


def test_mean_number_of_experts_in_training_is_that_of_the_schedule(tmp_path):
    steps, end = 10, NUM_EXPERTS
    trainer = train_on_rows(tiny_moe(config(1, end)), tmp_path, max_steps=steps, logging_steps=1)
    table = [exact_linear(1, end, step, steps) for step in range(steps)]
    assert logged(trainer, "moe/mean_k") == pytest.approx(table, rel=1e-6)
    # A linear growth is (start + end) / 2 in the mean: 12 for 8 to 16. The last value belongs to no step.
    paper = [config(8, 16, steps=400).experts_at(step, 0, 16) for step in range(400)]
    assert sum(paper) / 400 == pytest.approx(12 - 8 / 800, abs=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_the_number_reached_is_used_where_none_is_asked_for(training):
    gate = make_gate(config(2, 5)).train(training)
    for step, k in ((0, 2), (1, 3), (2, 4), (3, 5), (9, 5)):
        gate.schedule(step, 3)
        assert [len(experts) for experts in chosen(gate.decide(torch.randn(TOKENS, HIDDEN)))] == [k] * TOKENS


def test_a_falling_number_has_slots_for_its_start():
    gate = make_gate(config(5, 2)).train()
    for step, k in ((0, 5), (1, 4), (3, 2)):
        gate.schedule(step, 3)
        assert [len(experts) for experts in chosen(gate.decide(torch.randn(TOKENS, HIDDEN)))] == [k] * TOKENS


def test_any_number_in_evaluation():
    """One model, any number of experts: set once for all layers, for a part of a batch, or when loading."""
    model, ids = tiny_moe(config(1, 2)).eval(), torch.randint(1, 64, (2, 9))
    for k in range(1, NUM_EXPERTS + 1):
        for router in iter_routers(model):
            router.moe_config.experts_per_tok = k
        assert all(index.shape[-1] == k and (index < NUM_EXPERTS).all() for index in assignments(model, ids))
    with route_rows(model, ["all", "one"], {"one": {"experts_per_tok": 1}}):
        used = [(index < NUM_EXPERTS).sum(-1).view(2, -1) for index in assignments(model, ids)]
    assert all((u == torch.tensor([[NUM_EXPERTS], [1]])).all() for u in used)


# --- the dense model ---


def split(dense, pieces, scale, router, **options):
    options = {"num_experts": 1, "num_experts_per_tok": 1, "granularity": pieces, "router": router, **options}
    return upcycle(dense, "granular", scale=scale, **options)


@pytest.mark.parametrize(
    ("name", "output_scale", "factor"),
    [
        pytest.param("llama", "k", 1.0, id="slices_times_k"),
        pytest.param("llama", "none", None, id="scaled_slices"),
        pytest.param("opt", "none", None, id="scaled_slices_with_bias"),
    ],
)
def test_all_slices_of_a_dense_block_are_that_block(name, output_scale, factor):
    """With all experts and a router of zeros, either factor makes up for weights that sum to one."""
    dense, inputs = tiny_model(name), tiny_inputs(name)
    model = split(dense, 8, factor, RandomFixedRouterConfig(experts_per_tok=8, output_scale=output_scale)).eval()
    with torch.no_grad():
        expected = dense(**inputs).logits
        random_weights = model(**inputs).logits
        for router in iter_routers(model):
            router.moe_random_weight.zero_()
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(random_weights, expected, atol=1e-3)
    if name == "llama":  # every slice has a whole output bias, where there is one
        trained = (p.numel() for p in model.parameters() if p.requires_grad)
        assert sum(trained) == sum(p.numel() for p in dense.parameters())


def test_all_experts_are_a_weighted_sum_in_any_order():
    """At k = N the choice is nothing: permuted experts give the same sum, which a loop over all of them gives, too."""
    model, ids = tiny_moe(config(1, 2, experts_per_tok=NUM_EXPERTS)).eval(), torch.randint(1, 64, (2, 9))
    block = model.model.layers[0].mlp
    hidden = torch.randn(1, 5, 32)
    with torch.no_grad():
        whole, out = model(ids).logits, block(hidden)
        logits = hidden[0].double() @ block.gate.moe_random_weight.double().T
        expected = torch.zeros(5, 32, dtype=torch.float64)
        for t, token in enumerate(hidden[0].double()):
            for i, weight in enumerate(slow_scores(logits[t], "softmax")):
                gate, up = (block.experts.gate_up_proj[i].double() @ token).chunk(2)
                expected[t] += weight * (block.experts.down_proj[i].double() @ (gate * torch.sigmoid(gate) * up))
        torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-6)
        order = torch.randperm(NUM_EXPERTS)
        for layer in model.model.layers:
            for tensor in (
                layer.mlp.gate.moe_random_weight,
                layer.mlp.experts.gate_up_proj,
                layer.mlp.experts.down_proj,
            ):
                tensor.copy_(tensor[order].clone())
        torch.testing.assert_close(model(ids).logits, whole, rtol=1e-5, atol=1e-5)


# --- beside other things ---


def test_zero_computation_experts_are_drawn_like_others():
    extension = MoeExtension(router=config(3, 3), zero_experts=ZeroExpertsConfig(zero=2, copy=1))
    model = extend(tiny_model("mixtral"), extension)
    with trace_routing(model) as contexts:
        model(**tiny_inputs("mixtral"))
    records = list(contexts[0].records.values())
    assert all(record.logits.shape[-1] == 11 for record in records)
    columns, index = (torch.cat([getattr(record, name) for record in records]) for name in ("choices", "index"))
    assert (columns < 11).all() and ((columns == 8) | (columns == 9)).any() and (columns == 10).any()
    assert torch.equal((columns == 8) | (columns == 9), index == 8)
    weights = torch.cat([record.weights for record in records])
    assert (weights[index == 8] == 0).all()
    some = (index != 8).any(-1)
    torch.testing.assert_close(weights.sum(-1)[some], torch.ones(int(some.sum())))


def test_zero_computation_experts_are_held_back_at_first():
    """Nothing of their odds at first, half after half of the warm-up, which goes beside the schedule of k."""
    extension = MoeExtension(router=config(2, 4), zero_experts=ZeroExpertsConfig(copy=2, init="identity"))
    gate = next(iter_routers(extend(tiny_model("mixtral"), extension)))
    hidden, odds = torch.randn(TOKENS, 32), {}
    for step in (0, 5, 10):
        gate.schedule(step, 10)
        record = gate.route(hidden, None)
        odds[step] = record.scores[:, 8:] / record.scores[:, :8].sum(-1, keepdim=True)
        assert ((record.index < 10).sum(-1) == 2 + step // 5).all()
        if step == 0:
            assert (record.index[record.index < 10] < 8).all()
    assert (odds[0] == 0).all() and (odds[10] > 0).all()
    torch.testing.assert_close(odds[5], odds[10] / 2)


def test_restore_unfreezes_the_stock_gate():
    model = tiny_moe(config())
    assert not any(layer.mlp.gate.weight.requires_grad for layer in model.model.layers)
    restore(model)
    assert all(layer.mlp.gate.weight.requires_grad for layer in model.model.layers)
    assert not [name for name in model.state_dict() if "moe_" in name]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        pytest.param({"balance_coef": 0.01}, "`balance_coef` must be 0.*frozen router.*hidden states", id="balance"),
        pytest.param({"z_coef": 0.01}, "`z_coef` must be 0", id="z"),
        pytest.param({"entropy_coef": 0.01}, "`entropy_coef` must be 0", id="entropy"),
        pytest.param({"start_experts_per_tok": 0}, "`start_experts_per_tok` must be at least 1, got 0", id="start"),
        pytest.param({"end_experts_per_tok": 0}, "`end_experts_per_tok` must be at least 1, got 0", id="end"),
        pytest.param({"experts_per_tok": -1}, "`experts_per_tok` must be at least 1, got -1", id="evaluation"),
        pytest.param({"steps": 0}, "`steps` must be at least 1, got 0", id="steps"),
    ],
)
def test_bad_values_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        RandomFixedRouterConfig(**options)


@pytest.mark.parametrize("name", ["start_experts_per_tok", "end_experts_per_tok", "experts_per_tok"])
def test_more_experts_than_there_are_is_refused(name):
    with pytest.raises(ValueError, match=f'`{name}` \\(13\\) exceeds the 12 experts of layer "0"'):
        make_gate(RandomFixedRouterConfig(**{name: 13}))


# --- the claim of the paper ---


@pytest.mark.slow
def test_more_experts_help_at_every_number(tmp_path):
    """The paper's figure 3, small: trained with a growing number of random experts, the loss falls with every expert
    that is switched on; a learned router that always took 2 is best near 2 and worse with all 16."""
    numbers, steps = (1, 2, 4, 8, 16), 1500
    grown = split(character_llama(), 16, 1.0, config(8, 16, experts_per_tok=16), check=False)
    train_characters(grown, tmp_path / "grown", steps)
    losses = {}
    for k in numbers:
        for router in iter_routers(grown):
            router.moe_config.experts_per_tok = k
        losses[k] = held_out_loss(grown)

    plain = TopKRouterConfig(balance_coef=0.01)
    learned = split(character_llama(), 16, 1.0, plain, check=False)
    for router in iter_routers(learned):
        router.moe_config.num_experts_per_tok = 2
        torch.nn.init.normal_(router.weight, std=0.02)
    train_characters(learned, tmp_path / "learned", steps)
    fixed = {}
    for k in numbers:
        for router in iter_routers(learned):
            router.moe_config.num_experts_per_tok = k
        fixed[k] = held_out_loss(copy.deepcopy(learned))
    print("SMoE-Dropout", losses, "learned top-2", fixed)
    values = [losses[k] for k in numbers]
    assert values == sorted(values, reverse=True)
    assert min(fixed, key=fixed.__getitem__) in (2, 4) and fixed[16] > fixed[2]
