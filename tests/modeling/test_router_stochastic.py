"""THOR's random experts: what shares a draw, what is independent, and what evaluation may depend on."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from hf_moe_ext import MoeExtension, extend, trace_routing, upcycle
from hf_moe_ext.modeling.configuration_moe_ext import ZeroExpertsConfig
from hf_moe_ext.modeling.moe_context import RoutingContext
from hf_moe_ext.modeling.moe_router import GateRule
from hf_moe_ext.modeling.moe_structure import iter_routers, route_rows
from hf_moe_ext.modeling.router_stochastic import StochasticRouterConfig, mix

from ..trainers.common import NUM_EXPERTS, stock_mixtral
from .test_routers import CACHE, EXPERTS, HIDDEN, TOKENS, make_gate


# 99.9 % quantiles of chi-square, by degrees of freedom.
CHI_SQUARE = {5: 20.52, 7: 24.32, 11: 31.26, 25: 52.62}


def model_with(name="mixtral", **options):
    return extend(tiny_model(name), MoeExtension(router=StochasticRouterConfig(**options)))


@torch.no_grad()
def routes(model, **inputs) -> list[torch.Tensor]:
    """(B, S, K) of every layer."""
    with trace_routing(model) as contexts:
        model(**inputs)
    batch = next(iter(inputs.values())).shape[0]
    return [record.index.unflatten(0, (batch, -1)) for context in contexts for record in context.records.values()]


def chi_square(drawn: torch.Tensor, choices: int) -> float:
    counts = torch.bincount(drawn.reshape(-1), minlength=choices).double()
    expected = drawn.numel() / choices
    return float(((counts - expected).square() / expected).sum())


# --- equal experts are the dense model ---

DRAWS = {
    "train_batch": {"train_draw": "batch"},
    "train_sequence": {"train_draw": "sequence"},
    "train_token": {"train_draw": "token"},
    "token": {"inference_draw": "token"},
    "token_unseeded": {"inference_draw": "token", "seed": None},
    "sequence": {"inference_draw": "sequence"},
    "sequence_unseeded": {"inference_draw": "sequence", "seed": None},
    "ensemble": {"inference_draw": "ensemble"},
    "fixed": {"inference_draw": "fixed", "expert": 3},
}


@pytest.mark.parametrize("draw", DRAWS)
def test_copies_are_the_dense_model(draw):
    dense, inputs = tiny_model("llama"), tiny_inputs("llama")
    model = upcycle(dense, num_experts=4, router=StochasticRouterConfig(**DRAWS[draw]), check=False)
    model.train(draw.startswith("train"))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draw", DRAWS)
def test_the_output_is_that_of_the_drawn_expert(draw):
    """Weight 1, or the mean of all, by a loop over tokens."""
    model = model_with(**DRAWS[draw]).train(draw.startswith("train"))
    ids = tiny_inputs("mixtral")["input_ids"]
    blocks = []
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: blocks.append((args[0], out)))
    index = routes(model, input_ids=ids)[1]
    experts, (hidden, out) = model.model.layers[1].mlp.experts, blocks[0]
    expected = torch.zeros_like(out, dtype=torch.float64)
    for row in range(ids.shape[0]):
        for position in range(ids.shape[1]):
            drawn = index[row, position].tolist()
            for i in drawn:
                gate, up = (experts.gate_up_proj[i].double() @ hidden[row, position].double()).chunk(2)
                inner = gate * torch.sigmoid(gate) * up
                expected[row, position] += experts.down_proj[i].double() @ inner / len(drawn)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert index.shape[-1] == (8 if draw == "ensemble" else 1)


# --- training draws ---


def test_a_batch_shares_one_expert_per_layer_drawn_evenly_and_independently():
    model, ids = (
        extend(stock_mixtral(), MoeExtension(router=StochasticRouterConfig())).train(),
        torch.ones(2, 3).long(),
    )
    draws = []
    for _ in range(600):
        layers = routes(model, input_ids=ids)
        assert all(len(layer.unique()) == 1 for layer in layers)
        draws.append([int(layer[0, 0, 0]) for layer in layers])
    first, second = torch.tensor(draws).unbind(-1)
    assert chi_square(first, NUM_EXPERTS) < CHI_SQUARE[5] and chi_square(second, NUM_EXPERTS) < CHI_SQUARE[5]
    # Independence of the two layers: the pairs against the product of even marginals.
    pairs = torch.bincount(first * NUM_EXPERTS + second, minlength=36).double().view(6, 6)
    expected = pairs.sum(0, keepdim=True) * pairs.sum(1, keepdim=True) / pairs.sum()
    assert float(((pairs - expected).square() / expected).sum()) < CHI_SQUARE[25]


def test_sequences_and_tokens_draw_for_themselves():
    ids = torch.randint(4, 79, (64, 5))
    sequence = routes(model_with(train_draw="sequence").train(), input_ids=ids)[0]
    assert (sequence == sequence[:, :1]).all() and chi_square(sequence[:, 0], 8) < CHI_SQUARE[7]
    token = routes(model_with(train_draw="token").train(), input_ids=ids)[0]
    assert not (token == token[:, :1]).all() and chi_square(token, 8) < CHI_SQUARE[7]


@pytest.mark.parametrize("draw", ["batch", "sequence", "token"])
def test_draws_come_from_the_generator_of_the_model(draw):
    """Where it has one: whatever the state of PyTorch's own."""
    model, ids, found = model_with(train_draw=draw).train(), torch.randint(4, 79, (16, 5)), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model.moe_link.generator = torch.Generator().manual_seed(5)
        found.append([layer for _ in range(4) for layer in routes(model, input_ids=ids)])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("draw", ["token", "ensemble"])
def test_scale_of_the_family(draw):
    gate = make_gate(StochasticRouterConfig(inference_draw=draw), rule=GateRule(scale=2.5)).eval()
    record = gate.decide(torch.zeros(TOKENS, HIDDEN))
    torch.testing.assert_close(record.weights.sum(-1), torch.full((TOKENS,), 2.5))
    slots = EXPERTS if draw == "ensemble" else 1
    assert record.weights.shape == (TOKENS, slots) and gate.num_slots(gate.moe_config, gate.moe_site) == slots


def test_a_seeded_sequence_has_one_expert_per_layer():
    """The same for all sequences, and in another forward; layers differ."""
    model = model_with(inference_draw="sequence")
    layers = [routes(model, input_ids=torch.randint(4, 79, (3, length))) for length in (5, 12)]
    for short, long in zip(*layers, strict=True):
        assert len(torch.cat([short.flatten(), long.flatten()]).unique()) == 1
    drawn = [
        int(layer[0, 0, 0])
        for seed in range(8)
        for layer in routes(model_with(inference_draw="sequence", seed=seed), input_ids=torch.ones(1, 2).long())
    ]
    assert len(set(drawn)) > 4


def test_the_seed_is_of_evaluation_alone():
    model, inputs = model_with(train_draw="token", seed=0).train(), tiny_inputs("mixtral")
    assert not torch.equal(routes(model, **inputs)[0], routes(model, **inputs)[0])


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("draw", ["batch", "sequence", "token"])
def test_recomputation_draws_the_same(draw, own_generator):
    """Gradients under activation checkpointing are the plain ones, whichever generator is drawn from."""
    model, inputs = model_with(train_draw=draw).train(), tiny_inputs("mixtral")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)  # the name since 5.23
            kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
            model.gradient_checkpointing_enable(**kwargs) if enable is None else enable()
        torch.manual_seed(3)
        model.moe_link.generator = torch.Generator().manual_seed(3) if own_generator else None
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert sum(float(g.abs().sum()) for name, g in gradients[0].items() if "experts" in name) > 0


# --- evaluation ---


def test_seeded_draws_are_even_and_differ_between_layers_positions_and_seeds():
    gates = [make_gate(StochasticRouterConfig(seed=seed)).eval() for seed in (0, 1)]
    hidden = torch.zeros(6000, HIDDEN)
    first, second = (gate.decide(hidden).index[:, 0] for gate in gates)
    assert torch.equal(first, gates[0].decide(hidden).index[:, 0])
    assert chi_square(first, EXPERTS) < CHI_SQUARE[11] and chi_square(second, EXPERTS) < CHI_SQUARE[11]
    # 1/12 of 6000 positions agree by chance; the standard deviation of the share is 0.0036.
    for other in (second, first.roll(1)):
        assert float((first == other).float().mean()) == pytest.approx(1 / EXPERTS, abs=0.018)
    layers = routes(model_with(), input_ids=torch.randint(4, 79, (1, 48)))
    assert not torch.equal(layers[0], layers[1])


def test_the_hash_spreads_every_bit():
    numbers = torch.arange(4096)
    flips = [(mix(numbers) ^ mix(numbers ^ (1 << bit))) for bit in range(20)]
    moved = torch.tensor([[float(((flip >> out) & 1).float().mean()) for out in range(32)] for flip in flips])
    assert moved.min() > 0.3 and moved.max() < 0.7
    assert len(mix(torch.arange(100_000)).unique()) == 100_000  # one to one
    assert mix(torch.tensor([2**40 + 5])).equal(mix(torch.tensor([5]))) and int(mix(numbers).max()) < 2**32


def test_a_permuted_batch_permutes_the_output():
    model, inputs = model_with(), tiny_inputs("mixtral", batch=4)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        whole = model(**inputs).logits
        permuted = model(**{name: value[order] for name, value in inputs.items()}).logits
        alone = model(**{name: value[1:2] for name, value in inputs.items()}).logits
    torch.testing.assert_close(permuted, whole[order], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("draw", ["token", "sequence", "ensemble", "fixed"])
@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_a_cache_changes_nothing(name, draw):
    """Token by token, with no mask and no positions that would tell how long the past is."""
    model, inputs = model_with(name, inference_draw=draw), tiny_inputs(name, batch=2)
    key = "decoder_input_ids" if name == "switch_transformers" else "input_ids"
    ids, other = inputs[key], {}
    if name == "switch_transformers":
        with torch.no_grad():
            other = {"encoder_outputs": model.get_encoder()(inputs["input_ids"])}
    with torch.no_grad(), trace_routing(model) as contexts:
        whole = model(**other, **{key: ids}).logits
        records = {k: r.index.unflatten(0, (2, -1)) for c in contexts for k, r in c.records.items()}
        past, steps = None, []
        for position in range(ids.shape[1]):
            out = model(**other, **{key: ids[:, position : position + 1], CACHE: past}, use_cache=True)
            past = out[CACHE]
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
    last = {k: r.index.unflatten(0, (2, -1)) for k, r in contexts[-1].records.items()}
    assert last and all(torch.equal(index[:, -1], records[k][:, -1]) for k, index in last.items())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_left_padding_is_that_of_the_rows_alone(cache):
    model, ids = model_with(), tiny_inputs("mixtral", batch=2, length=6)["input_ids"]
    ids[1, :2] = 0
    mask = (ids != 0).long()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(
        ids, attention_mask=mask, cache_implementation=None if cache == "dynamic" else cache, **options
    )
    for row, start in enumerate((0, 2)):
        single = model.generate(ids[row : row + 1, start:], use_cache=False, **options)
        assert together[row, start:].tolist() == single[0].tolist()


def test_without_a_seed_every_forward_draws_anew():
    inputs = {"input_ids": torch.randint(4, 79, (8, 6))}
    model = model_with(seed=None)
    assert not torch.equal(routes(model, **inputs)[0], routes(model, **inputs)[0])
    sequence = routes(model_with(seed=None, inference_draw="sequence"), **inputs)[0]
    assert (sequence == sequence[:, :1]).all() and len(sequence[:, 0].unique()) > 1


def test_rows_draw_apart():
    """Two passes in one forward, and rows that follow seeds of their own."""
    ids = torch.randint(4, 79, (1, 6)).repeat(2, 1)
    model = model_with().train()
    pairs = []
    for _ in range(200):
        with route_rows(model, ["a", "b"]):
            index = routes(model, input_ids=ids)[0][..., 0]
        assert (index == index[:, :1]).all()
        pairs.append(index[:, 0])
    first, second = torch.stack(pairs).unbind(-1)
    # They coincide as often as independent draws: 1/8 of 200, with a standard deviation of 4.7.
    assert int((first == second).sum()) == pytest.approx(25, abs=24) and (first != second).any()
    model.eval()
    with route_rows(model, ["a", "b"], {"a": {"seed": 1}, "b": {"seed": 2}}):
        both = routes(model, input_ids=ids)[0]
    for row, seed in enumerate((1, 2)):
        alone = copy.deepcopy(model)
        for router in iter_routers(alone):
            router.moe_config.seed = seed
        assert torch.equal(routes(alone, input_ids=ids)[0][row], both[row])


# --- beside other things ---


def test_the_stock_gate_is_left_alone():
    """It would decay under weight decay without ever being used."""
    model, inputs = model_with().train(), tiny_inputs("mixtral")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    assert all(gate.grad is None and not gate.requires_grad for gate in gates)


def test_null_experts_are_drawn_like_others():
    router = StochasticRouterConfig(train_draw="token")
    model = extend(tiny_model("mixtral"), MoeExtension(router=router, zero_experts=ZeroExpertsConfig(zero=4, copy=4)))
    with trace_routing(model) as contexts, torch.no_grad():
        model.train()(input_ids=torch.randint(4, 79, (40, 12)))
    for record in contexts[0].records.values():
        assert chi_square(record.choices, 16) < 37.7  # 99.9 % for 15 degrees of freedom
        null = (record.choices >= 8) & (record.choices < 12)
        assert torch.equal(null, record.index == 8) and torch.equal(record.weights == 0, null)
        assert torch.equal(record.scores, torch.full_like(record.scores, 1 / 16))


@pytest.mark.parametrize("name", ["vit", "gpt_oss"])
def test_sequences_are_known_on_other_inputs(name):
    """Pixels; gates that get (B, S, H)."""
    if name == "vit":
        model = upcycle(
            tiny_model(name), num_experts=4, router=StochasticRouterConfig(train_draw="sequence"), check=False
        )
    else:
        model = model_with(name, train_draw="sequence")
    index = routes(model.train(), **tiny_inputs(name, batch=6))[0]
    assert index.shape[0] == 6 and (index == index[:, :1]).all() and len(index.unique()) > 1


def test_unknown_sequences_are_an_error():
    gate = make_gate(StochasticRouterConfig(train_draw="sequence")).train()
    assert gate.decide(torch.zeros(TOKENS, HIDDEN)).index.unique().numel() == 1  # one sequence, without a model
    gate.moe_link.slots.layer_context = RoutingContext()
    with pytest.raises(ValueError, match="not known to which sequences the 23 tokens"):
        gate.decide(torch.zeros(TOKENS, HIDDEN))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        pytest.param({"expert": -1}, "`expert` must be non-negative, got -1", id="expert"),
        pytest.param({"consistency_coef": -1.0}, "`consistency_coef` must be non-negative, got -1.0", id="coef"),
        pytest.param({"balance_coef": 0.01}, "`balance_coef` must be 0 for a router without logits", id="balance"),
    ],
)
def test_bad_values_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        StochasticRouterConfig(**options)


def test_what_does_not_fit_a_layer_is_refused():
    with pytest.raises(ValueError, match=r'`expert` \(12\) exceeds the last one of layer "0", 11'):
        make_gate(StochasticRouterConfig(inference_draw="fixed", expert=12))
    zero = ZeroExpertsConfig(zero=1, init="identity")
    with pytest.raises(ValueError, match="held back at first by their logits"):
        extend(tiny_model("mixtral"), MoeExtension(router=StochasticRouterConfig(), zero_experts=zero))
