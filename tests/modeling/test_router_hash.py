"""Hash routing: tables, look-ups, and what it needs from a forward."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_inputs, tiny_model

from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_context import RoutingContext
from hf_moe_ext.modeling.moe_router import GateRule
from hf_moe_ext.modeling.moe_structure import iter_routers, route_rows, trace_routing
from hf_moe_ext.modeling.router_hash import HashRouter, HashRouterConfig, balanced_table, even_table, random_table
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.patching import extend

from .test_routers import EXPERTS, HIDDEN, chosen, combine, make_gate


def config(k=1, vocab_size=VOCAB_SIZE, **options) -> HashRouterConfig:
    return HashRouterConfig(vocab_size=vocab_size, num_experts_per_tok=k, **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def decide(gate, ids, hidden=None):
    """The decision for token ids, without a model."""
    hidden = torch.randn(ids.numel(), gate.moe_site.hidden_size) if hidden is None else hidden
    gate.moe_link.slots.layer_context = RoutingContext(input_ids=ids)
    try:
        return gate.decide(hidden)
    finally:
        gate.moe_link.slots.layer_context = None


# --- tables ---


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("make", [random_table, even_table])
def test_tables_hold_different_experts(make, k):
    table = make(1000, k, 5, generator())
    assert table.shape == (1000, k) and table.dtype == torch.int64
    assert table.min() == 0 and table.max() == 4
    assert all(len(set(row)) == k for row in table.tolist())


def test_random_table_is_uniform_over_sets():
    """All ordered pairs of 4 experts, equally often: 12 of them, 1000 expected each, standard deviation 30."""
    pairs = Counter(map(tuple, random_table(12_000, 2, 4, generator()).tolist()))
    assert len(pairs) == 12 and all(abs(count - 1000) < 150 for count in pairs.values())


@pytest.mark.parametrize(("size", "k", "experts"), [(1000, 1, 8), (1000, 3, 8), (1001, 2, 8), (7, 2, 3), (3, 1, 8)])
def test_even_table_is_even(size, k, experts):
    table = even_table(size, k, experts, generator())
    loads = torch.bincount(table.flatten(), minlength=experts)
    assert loads.max() - loads.min() <= k and loads.sum() == size * k
    if size == 1000 and k == 3:
        assert len(set(map(frozenset, table.tolist()))) > 40  # of 56: partners differ


def test_even_table_does_not_follow_the_ids():
    table = even_table(800, 1, 8, generator()).flatten()
    assert 0.05 < (table[1:] == (table[:-1] + 1) % 8).float().mean() < 0.2
    assert not torch.equal(table, even_table(800, 1, 8, generator(1)).flatten())


def slow_balanced(frequencies, num_experts, k):
    loads, table = [0.0] * num_experts, {}
    for token in sorted(range(len(frequencies)), key=lambda t: (-frequencies[t], t)):
        least = sorted(range(num_experts), key=lambda e: (loads[e], e))[:k]  # noqa: B023
        for expert in least:
            loads[expert] += frequencies[token]
        table[token] = least
    return [table[token] for token in range(len(frequencies))], loads


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balanced_table(k):
    """Frequencies as in texts (Zipf's law): loads are far more even than those of a random table."""
    frequencies = (10_000 / torch.arange(1, 501)).floor()[torch.randperm(500, generator=generator())]
    table = balanced_table(frequencies, 8, k)
    expected, loads = slow_balanced(frequencies.tolist(), 8, k)
    assert table.tolist() == expected
    share = torch.tensor(loads) / (frequencies.sum() * k)
    drawn = random_table(500, k, 8, generator())
    random_loads = torch.zeros(8).index_add(0, drawn.flatten(), frequencies.repeat_interleave(k))
    if k == 1:
        assert share.max() < 0.15 < (random_loads / random_loads.sum()).max()


def test_balanced_table_refuses():
    with pytest.raises(ValueError, match="non-negative"):
        balanced_table(torch.tensor([1.0, -1.0]), 2)
    with pytest.raises(ValueError, match=r"`k` must be in \[1, num_experts=2\], got 3"):
        balanced_table([1.0, 2.0], 2, k=3)


# --- the router ---


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_looks_up_the_table(k, scale):
    gate = make_gate(config(k), rule=GateRule(scale=scale))
    ids = torch.randint(VOCAB_SIZE, (3, 7))
    record = decide(gate, ids)
    for token, row, weights, scores in zip(
        ids.flatten().tolist(), chosen(record), record.weights.tolist(), record.scores.tolist(), strict=True
    ):
        experts = gate.moe_table[token].tolist()
        assert row == experts and weights == pytest.approx([scale / k] * k)
        assert scores == pytest.approx([1 / k if e in experts else 0.0 for e in range(EXPERTS)])
    assert torch.equal(record.logits, record.scores.clamp_min(1e-30).log()) and not record.weights.requires_grad


def test_hidden_states_do_not_matter():
    gate, ids = make_gate(config(2)), torch.randint(VOCAB_SIZE, (1, 20))
    assert torch.equal(decide(gate, ids).index, decide(gate, ids, torch.full((20, HIDDEN), 1e4)).index)


@pytest.mark.parametrize("table", ["random", "balanced"])
def test_tables_come_from_seed_and_layer(table):
    def tables(seed):
        router = config(2, table=table, seed=seed)
        model = extend(tiny_model("mixtral"), MoeExtension(router=router))
        return [gate.moe_table for gate in iter_routers(model)]

    torch.manual_seed(1)
    first = tables(0)
    torch.manual_seed(2)
    again, other = tables(0), tables(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])
    even = [VOCAB_SIZE * 2 // 8] * 8
    assert (torch.bincount(first[0].flatten(), minlength=8).tolist() == even) == (table == "balanced")


def test_set_table_and_save(tmp_path):
    model = extend(tiny_model("mixtral"), MoeExtension(router=config(1)))
    table = balanced_table(torch.arange(VOCAB_SIZE), 8)
    for gate in iter_routers(model):
        gate.set_table(table.flatten())
    inputs = tiny_inputs("mixtral")
    with torch.no_grad(), trace_routing(model) as contexts:
        expected = model(**inputs).logits
    for record in contexts[0].records.values():
        assert torch.equal(record.index, table[inputs["input_ids"].flatten()])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(gate.moe_table, table) for gate in iter_routers(again))
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, expected)


def test_set_table_refuses():
    gate = make_gate(config(2))
    good = random_table(VOCAB_SIZE, 2, EXPERTS, generator())
    gate.set_table(good)
    for table, message in (
        (good[:-1], r"must have the shape \[96, 2\], got \[95, 2\]"),
        (good[:, 0], r"got \[96\]"),
        (good + EXPERTS, "must hold experts 0 to 11, got 12 to 23"),
        (good[:, :1].expand(-1, 2), "names an expert twice"),
    ):
        with pytest.raises(ValueError, match=message):
            gate.set_table(table)
    assert torch.equal(gate.moe_table, good)


def test_trains_experts_and_nothing_of_the_gate():
    model = extend(tiny_model("mixtral"), MoeExtension(router=config(2))).train()
    inputs = tiny_inputs("mixtral")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for gate in iter_routers(model):
        assert all(p.grad is None and not p.requires_grad for p in gate.parameters())
    assert model.model.layers[0].mlp.experts.down_proj.grad.abs().sum() > 0


def test_generation_uses_the_tokens_it_made():
    model = extend(tiny_model("mixtral"), MoeExtension(router=config(1)))
    ids = tiny_inputs("mixtral", batch=1)["input_ids"]
    with torch.no_grad(), trace_routing(model) as contexts:
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    gate = next(iter_routers(model))
    seen = torch.cat([context.records["0"].index for context in contexts])
    assert torch.equal(seen, gate.moe_table[out[0, :-1]])


def test_decoder_of_two_stacks():
    """Each stack looks up its own ids."""
    model = extend(tiny_model("switch_transformers"), MoeExtension(router=config(1))).eval()
    inputs = tiny_inputs("switch_transformers")
    with torch.no_grad(), trace_routing(model) as contexts:
        model(**inputs)
    gates = {gate.moe_site.key: gate for gate in iter_routers(model)}
    for context, ids in zip(contexts, (inputs["input_ids"], inputs["decoder_input_ids"]), strict=True):
        for key, record in context.records.items():
            assert torch.equal(record.scores.argmax(-1), gates[key].moe_table[ids.flatten(), 0])


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe"])
def test_multimodal_models_look_up_the_ids_of_the_outer_model(name):
    """Their language model is called with embeddings; ids also come by place, and one token at a time."""
    model, inputs = extend(tiny_model(name), MoeExtension(router=config(1))), tiny_inputs(name)
    gates = {gate.moe_site.key: gate for gate in iter_routers(model)}
    ids = inputs["input_ids"]
    with torch.no_grad(), trace_routing(model) as contexts:
        model(**inputs)
        model(ids)
    for context in contexts:
        for key, record in context.records.items():
            assert torch.equal(record.index[:, 0], gates[key].moe_table[ids.flatten(), 0])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, uncached = (model.generate(ids[:1], **options, use_cache=use).tolist() for use in (True, False))
    assert cached == uncached


def test_refuses_embeddings():
    model = extend(tiny_model("mixtral"), MoeExtension(router=config(1)))
    embeddings = model.get_input_embeddings()(tiny_inputs("mixtral")["input_ids"])
    with pytest.raises(ValueError, match='`hash` router of layer "0" looks up token ids; call the model with `input_'):
        model(inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="looks up token ids"):
        make_gate(config(1)).decide(torch.randn(3, HIDDEN))


def test_refuses_ids_that_do_not_fit():
    gate = make_gate(config(1))
    with pytest.raises(ValueError, match="5 hidden states for 4 `input_ids`"):
        decide(gate, torch.zeros(1, 4, dtype=torch.long), torch.randn(5, HIDDEN))
    for bad in (VOCAB_SIZE, -100):
        with pytest.raises(ValueError, match=r"ids 0 to 95 \(`vocab_size`\), `input_ids` has"):
            decide(gate, torch.tensor([[3, bad]]))


def test_row_policies():
    """Rows apart look up their own ids."""
    model = extend(tiny_model("mixtral"), MoeExtension(router=config(2))).eval()
    inputs = tiny_inputs("mixtral")
    with torch.no_grad(), trace_routing(model) as contexts:
        expected = model(**inputs).logits
        with route_rows(model, ["a", "b"]):
            found = model(**inputs).logits
    torch.testing.assert_close(found, expected)
    assert torch.equal(contexts[0].records["1"].index, contexts[1].records["1"].index)


def test_permutation_hands_tokens_to_other_experts():
    gate = make_gate(config(2, permutation_steps=3, balance_coef=0.1))
    ids = torch.randint(VOCAB_SIZE, (1, 50))
    gate.train()
    soft = decide(gate, ids)
    assert soft.index.shape == (50, EXPERTS) and soft.weights.requires_grad
    losses = HashRouter.aux_losses(soft, None)
    assert set(losses) == {"balance", "permutation"}
    sum(losses.values()).backward()
    assert gate.moe_permutation_scores.grad.abs().sum() > 0
    gate.schedule(3, 10)
    hard = decide(gate, ids)
    assert torch.equal(hard.index, gate.moe_permutation[0][gate.moe_table[ids[0]]])
    assert torch.equal(combine(hard) > 0, hard.scores > 0)


BAD = {
    "z": ({"vocab_size": 96, "z_coef": 0.1}, "`z_coef` must be 0 for the `hash` router, got 0.1"),
    "no_vocab": ({}, "`vocab_size` of the `hash` router must be the number of token ids, got None; take `model.con"),
    "vocab": ({"vocab_size": 0}, "got 0"),
    "k": ({"vocab_size": 9, "num_experts_per_tok": 0}, "`num_experts_per_tok` must be at least 1, got 0"),
    "loss": ({"vocab_size": 9, "balance_coef": 0.1}, "`balance_coef` must be 0 without `permutation_steps`, got 0.1"),
    "selectors": ({"vocab_size": 9, "permutation_per_selector": True}, "a table is one"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        HashRouterConfig(**settings)


def test_refuses_sites():
    with pytest.raises(ValueError, match=r"`num_experts_per_tok` \(13\) exceeds the 12 experts"):
        make_gate(config(13))
    model = tiny_model("mixtral")
    before = copy.deepcopy(model.config)
    with pytest.raises(ValueError, match="remove `zero_experts`"):
        extend(model, MoeExtension(router=config(1), zero_experts=ZeroExpertsConfig(zero=1)))
    assert type(model.config) is type(before)


def test_no_identity():
    with pytest.raises(NotImplementedError, match="token ids"):
        HashRouter.identity_config(make_gate(TopKRouterConfig()).moe_site)
