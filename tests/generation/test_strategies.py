"""Contrastive decoding, DoLa, contrastive search, other routing at inference and voting, against plain loops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model

import hf_moe_ext as moe
from hf_moe_ext.generation import (
    contrastive_decoding,
    contrastive_search,
    dola,
    majority_vote,
    num_experts_per_tok,
    routed_by,
    self_contrast,
)
from hf_moe_ext.generation.voting import last_number
from hf_moe_ext.modeling.moe_structure import iter_routers, route_rows
from tests.generation.references import contrast_reference, decode, last_logits, weak_mixtral
from tests.generation.test_self_contrast import GREEDY, Collected, assert_same, random_ids, snapshot


@pytest.fixture
def model():
    return tiny_model("mixtral")


def run(model, ids, strategy, steps=6, **kwargs):
    return model.generate(ids, custom_generate=strategy, max_new_tokens=steps, **{**GREEDY, **kwargs})


def padded(ids):
    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask


# A second model -----------------------------------------------------------------------------------------------------


@pytest.fixture
def amateur():
    torch.manual_seed(7)
    model = tiny_model("qwen3_moe")
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    return model


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_contrastive_decoding(model, amateur, beta):
    ids, mask = padded(random_ids(3))
    expected = decode(model, amateur, ids, 6, beta=beta, alpha=0.1, mask=mask)
    before = snapshot(amateur)
    assert torch.equal(
        run(model, ids, contrastive_decoding, amateur=amateur, beta=beta, attention_mask=mask), expected
    )
    without = run(model, ids, contrastive_decoding, amateur=amateur, beta=beta, attention_mask=mask, use_cache=False)
    assert torch.equal(without, expected)
    assert_same(snapshot(amateur), before)
    assert not torch.equal(expected, model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY))


@pytest.mark.parametrize(
    ("amateur", "message"),
    [
        (None, "needs a weaker model as `amateur`, got NoneType"),
        (lambda: tiny_model("mixtral", vocab_size=90), "vocabulary of 90, the model one of 96"),
        (lambda: tiny_model("switch_transformers"), "decoder-only"),
    ],
)
def test_other_amateurs_are_refused(model, amateur, message):
    with pytest.raises(ValueError, match=message):
        run(model, random_ids(1), contrastive_decoding, amateur=amateur and amateur())


# Layers -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dola_reference(model, ids, steps, layers, alpha=0.1):
    for _ in range(steps):
        states = model(ids, output_hidden_states=True, use_cache=False)
        last = states.logits[:, -1].double().softmax(-1)
        token = []
        for row in range(len(ids)):
            best, furthest = None, -1.0
            for layer in layers:
                state = model.model.norm(states.hidden_states[layer][row, -1])
                other = model.lm_head(state).double().softmax(-1)
                middle = (other + last[row]) / 2
                distance = 0.5 * sum(float((p * (p / middle).log()).sum()) for p in (other, last[row]))
                if distance > furthest:
                    best, furthest = other, distance
            scores = (last[row] / best).log()
            scores[last[row] < alpha * last[row].max()] = float("-inf")
            token.append(int(scores.argmax()))
        ids = torch.cat([ids, torch.tensor(token)[:, None]], dim=-1)
    return ids


@pytest.mark.parametrize(("layers", "numbers"), [("low", [0]), ("high", [2]), ([0, 1, 2], [0, 1, 2])])
def test_dola(model, layers, numbers):
    ids = random_ids(3)
    model(ids, output_hidden_states=True)  # transformers prepares a model once, and leaves it so
    before = snapshot(model)
    assert torch.equal(run(model, ids, dola, layers=layers), dola_reference(model, ids, 6, numbers))
    assert_same(snapshot(model), before)


def test_dola_of_a_dense_model_and_with_padding():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4, initializer_range=0.3)).eval()
    ids, mask = padded(random_ids(2))
    out = run(model, ids, dola, attention_mask=mask)
    assert torch.equal(out[1, 3:], run(model, ids[1:, 3:], dola)[0])
    assert torch.equal(out[:1], dola_reference(model, ids[:1], 6, [2]))


def test_dola_refuses_what_it_cannot_read(model):
    with pytest.raises(ValueError, match="numbers from 0 to 2, got 'middle'"):
        run(model, random_ids(1), dola, layers="middle")
    with pytest.raises(ValueError, match=r"got \[3\]"):
        run(model, random_ids(1), dola, layers=[3])
    capped = tiny_model("granitemoe", logits_scaling=7.0)
    with pytest.raises(ValueError, match="not its head applied"):
        run(capped, random_ids(1), dola)
    assert not capped._forward_hooks and not capped._forward_pre_hooks


# Contrastive search -------------------------------------------------------------------------------------------------


@torch.no_grad()
def search_reference(model, ids, steps, penalty, candidates):
    """One row, no cache: every candidate is a text of its own."""
    for _ in range(steps):
        states = model(ids, output_hidden_states=True, use_cache=False)
        probabilities = states.logits[0, -1].double().softmax(-1)
        context = states.hidden_states[-1][0].double()
        scores = {}
        for token in probabilities.topk(candidates).indices.tolist():
            text = torch.cat([ids, torch.tensor([[token]])], dim=-1)
            state = model(text, output_hidden_states=True, use_cache=False).hidden_states[-1][0, -1].double()
            similar = F.cosine_similarity(state[None], context).max()
            scores[token] = float((1 - penalty) * probabilities[token] - penalty * similar)
        ids = torch.cat([ids, torch.tensor([[max(scores, key=scores.get)]])], dim=-1)
    return ids


@pytest.mark.parametrize(("penalty", "candidates"), [(0.6, 5), (0.3, 3), (1.0, 4)])
def test_contrastive_search(model, penalty, candidates):
    ids = random_ids(3)
    found = run(model, ids, contrastive_search, penalty_alpha=penalty, candidates=candidates)
    for row, text in zip(found, ids, strict=True):
        assert torch.equal(row, search_reference(model, text[None], 6, penalty, candidates)[0])


@pytest.mark.parametrize("settings", [{"penalty_alpha": 0.0}, {"candidates": 1}])
def test_contrastive_search_that_is_greedy(model, settings):
    ids = random_ids(2)
    assert torch.equal(
        run(model, ids, contrastive_search, **settings), model.generate(ids, max_new_tokens=6, **GREEDY)
    )


def test_what_is_masked_is_not_repeated(model):
    """In front of each text stands what it would go on with; masked, it is no text that could be repeated."""
    ids = random_ids(8)
    settings = {"penalty_alpha": 0.9, "candidates": 8}
    alone = run(model, ids, contrastive_search, **settings)[:, 7:]
    front = torch.cat([alone[:, :5], ids], dim=-1)
    mask = torch.cat([torch.zeros_like(alone[:, :5]), torch.ones_like(ids)], dim=-1)
    assert torch.equal(run(model, front, contrastive_search, attention_mask=mask, **settings)[:, 12:], alone)
    assert not torch.equal(run(model, front, contrastive_search, **settings)[:, 12:], alone)


def test_contrastive_search_with_padding_end_and_streamer(model):
    ids, mask = padded(random_ids(2))
    free = run(model, ids, contrastive_search, attention_mask=mask)
    assert torch.equal(free[1, 3:], run(model, ids[1:, 3:], contrastive_search)[0])
    eos = free[0, 8].item()
    out = run(model, ids, contrastive_search, attention_mask=mask, eos_token_id=eos)
    first = free[0, 7:].tolist().index(eos)
    assert torch.equal(out[0, : 8 + first], free[0, : 8 + first]) and (out[0, 8 + first :] == 0).all()
    streamer = Collected()
    moe.generation.generate(
        model, ids[:1], strategy="contrastive_search", streamer=streamer, max_new_tokens=3, **GREEDY
    )
    assert streamer.ended and len(torch.cat([part.flatten() for part in streamer.parts])) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty_alpha": 2}, r"must be in \[0, 1\], got 2"),
        ({"candidates": 0}, "`candidates`"),
        ({"do_sample": True}, "does not sample"),
        ({"return_dict_in_generate": True}, "returns ids"),
        ({"cache_implementation": "static"}, "`DynamicCache`, got"),
        ({"use_cache": False}, "`DynamicCache`, got NoneType"),
    ],
)
def test_contrastive_search_refuses(model, settings, message):
    with pytest.raises(ValueError, match=message):
        run(model, random_ids(1), contrastive_search, **settings)


# Routing at inference -----------------------------------------------------------------------------------------------


def test_other_numbers_of_experts(model):
    ids = random_ids(2)
    before = snapshot(model)
    with torch.no_grad(), num_experts_per_tok(model, 4):
        found = model(ids).logits[:, -1]
    torch.testing.assert_close(found.double(), last_logits(weak_mixtral(model, top_k=4), ids), rtol=1e-4, atol=1e-4)
    assert_same(snapshot(model), before)
    moe.extend(model, moe.TopKRouterConfig())
    before = snapshot(model)
    with torch.no_grad(), num_experts_per_tok(model, 4):
        assert torch.allclose(model(ids).logits[:, -1], found, atol=1e-4)
    assert_same(snapshot(model), before)


def test_a_threshold_on_a_stock_model(model):
    """The shortest prefix above the threshold, counted for each token by hand."""
    ids = random_ids(2)
    before = snapshot(model)
    with torch.no_grad(), routed_by(model, moe.TopPRouterConfig(threshold=0.5)), moe.trace_routing(model) as contexts:
        model(ids)
    for record in contexts[0].records.values():
        for logits, index in zip(record.logits, record.index, strict=True):
            order = logits.double().softmax(-1).sort(descending=True)
            total, wanted = 0.0, []
            for p, expert in zip(*order, strict=True):
                if total > 0.5:
                    break
                wanted.append(int(expert))
                total += float(p)
            assert [int(i) for i in index if i < 8] == wanted
    assert_same(snapshot(model), before)


def test_routing_that_does_not_fit_is_refused(model):
    for k, message in ((0, "got 0"), (9, "9"), (True, "got True")):
        with pytest.raises(ValueError, match=message), num_experts_per_tok(model, k):
            pass
    extended = moe.extend(tiny_model("mixtral"), moe.TopPRouterConfig())
    with pytest.raises(ValueError, match="extended already"), routed_by(extended, moe.TopKRouterConfig()):
        pass
    with pytest.raises(ValueError, match="does not fit the `top_p` router"), num_experts_per_tok(extended, 2):
        pass


@pytest.mark.parametrize("router", ["rmoe", "stochastic"])
def test_rows_cannot_follow_a_router_without_its_logits(router):
    model = moe.extend(tiny_model("mixtral"), {"router": {"type": router}})
    with (
        pytest.raises(ValueError, match=f"and `{router}` does not"),
        route_rows(model, ["a"], {"a": moe.TopKRouterConfig()}),
    ):
        pass
    stock = moe.extend(tiny_model("mixtral"), moe.TopKRouterConfig())
    with (
        pytest.raises(ValueError, match="has parameters of its own"),
        route_rows(stock, ["a"], {"a": moe.RMoERouterConfig()}),
    ):
        pass


def test_fewer_experts_of_a_router_with_parameters():
    """`rmoe` has a number of experts, but no ranks."""
    model, ids = moe.extend(tiny_model("mixtral"), moe.RMoERouterConfig()), random_ids(2)
    weak = copy.deepcopy(model)
    for router in iter_routers(weak):
        router.moe_config.num_experts_per_tok = 1
    found = run(model, ids, self_contrast, weak="topk-1", beta=2.0)
    assert torch.equal(found, decode(model, weak, ids, 6, beta=2.0, alpha=0.1))
    with pytest.raises(ValueError, match="and `rmoe` does not"):
        run(model, ids, self_contrast)


# Voting -------------------------------------------------------------------------------------------------------------


def test_majority_vote():
    texts = ["so 3 + 4 = 7", "it is 8.", "the answer is 7.", "I do not know", "= 1,200", "1200"]
    vote = majority_vote(texts)
    assert vote.answer == "7" and vote.share == 2 / 6 and vote.counts == {"7": 2, "1200": 2, "8": 1}
    assert majority_vote(["a", "b", "b"], str.upper).answer == "B"
    assert majority_vote(["none"]).answer is None
    with pytest.raises(ValueError, match="no texts"):
        majority_vote([])


@pytest.mark.parametrize(
    ("text", "number"), [("-3.5 apples", "-3.5"), ("1,234,567.", "1234567"), ("", None), ("x=2, y=10", "10")]
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_contrast_reference_is_the_formula():
    """By hand: p = (0.9, 0.05, 0.05); with alpha 0.1 the others are below 0.09."""
    strong, weak = torch.tensor([[0.9, 0.05, 0.05]]).log(), torch.zeros(1, 3)
    assert contrast_reference(strong, weak, 1.0, 0.1).isfinite().tolist() == [[True, False, False]]
    assert contrast_reference(strong, weak, 1.0, 0.05).isfinite().all()
