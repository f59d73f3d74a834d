"""Self-contrast decoding against a plain loop over two models, and everything that `generate` promises around it."""

from __future__ import annotations

import functools
import inspect
import threading

import pytest
import torch
from tiny_models import MOE_NAMES, tiny_model
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

import hf_moe_ext as moe
from hf_moe_ext.generation import RoutingMode, generate, self_contrast
from hf_moe_ext.generation.decoding import contrast
from tests.generation.references import contrast_reference, decode, last_logits, weak_mixtral


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model():
    return tiny_model("mixtral")


def random_ids(batch):
    return torch.randint(4, 80, (batch, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ids():
    return random_ids(3)


def run(model, ids, steps=8, **kwargs):
    return model.generate(ids, custom_generate=self_contrast, max_new_tokens=steps, **{**GREEDY, **kwargs})


def snapshot(model):
    return (
        type(model),
        type(model.config),
        model.config.to_dict(),
        model.config._experts_implementation,
        [(name, type(module)) for name, module in model.named_modules()],
        [sorted(vars(module)) for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


def assert_same(one, other):
    assert one[:-1] == other[:-1]
    assert one[-1].keys() == other[-1].keys()
    assert all(torch.equal(tensor, other[-1][name]) for name, tensor in one[-1].items())


# The method ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_contrast(beta, alpha):
    generator = torch.Generator().manual_seed(0)
    strong, weak = (torch.randn(4, 30, generator=generator) * 3 for _ in range(2))
    expected = contrast_reference(strong.double(), weak.double(), beta, alpha)
    found = contrast(strong, weak, beta, alpha)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    assert (found[torch.arange(4), strong.argmax(-1)] > float("-inf")).all()  # the best of the strong one stays
    probabilities = strong.softmax(-1)
    chosen = found.argmax(-1, keepdim=True)
    assert (probabilities.gather(-1, chosen) >= alpha * probabilities.amax(-1, keepdim=True) * (1 - 1e-6)).all()
    moved = contrast(strong + 5, weak - torch.arange(4.0)[:, None], beta, alpha)
    assert torch.equal(moved.argmax(-1), found.argmax(-1))  # a constant changes no choice


@pytest.mark.parametrize("weak", ["rank-1", "rank-2", "rank-3", "topk-1", "topk-3"])
@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_tokens_of_a_plain_loop(model, ids, weak, beta):
    kind, number = weak.split("-")
    other = weak_mixtral(model, rank=int(number)) if kind == "rank" else weak_mixtral(model, top_k=int(number))
    expected = decode(model, other, ids, 8, beta=beta, alpha=0.1)
    assert torch.equal(run(model, ids, weak=weak, beta=beta), expected)


def test_the_loop_sees_the_weak_branch(model, ids):
    """What the test above compares differs from greedy decoding, and between weak branches."""
    outputs = [run(model, ids, beta=b, weak=w) for b, w in ((0.0, "rank-2"), (3.0, "rank-2"), (3.0, "topk-1"))]
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


def test_without_a_cache(model, ids):
    assert torch.equal(run(model, ids, beta=3.0, use_cache=False), run(model, ids, beta=3.0))


def test_static_cache(model, ids):
    assert torch.equal(run(model, ids, beta=3.0, cache_implementation="static"), run(model, ids, beta=3.0))


def test_rows_with_padding_are_as_alone(model, ids):
    short = ids[1:2, 4:]
    padded = ids.clone()
    padded[1, :4] = 0
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    together = run(model, padded, beta=3.0, attention_mask=mask)
    assert torch.equal(together[1:2, ids.shape[1] :], run(model, short, beta=3.0)[:, short.shape[1] :])
    assert torch.equal(together[:1], run(model, ids[:1], beta=3.0))
    assert torch.equal(together, decode(model, weak_mixtral(model, rank=2), padded, 8, beta=3.0, alpha=0.1, mask=mask))


def test_a_better_strong_branch(model, ids):
    expected = decode(weak_mixtral(model, top_k=4), weak_mixtral(model, rank=2), ids, 8, beta=1.0, alpha=0.1)
    for strong in (4, "topk-4", {"kind": "topk", "k": 4}, RoutingMode("topk", 4)):
        assert torch.equal(run(model, ids, strong=strong, beta=1.0), expected)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"alpha": 1.0, "beta": 9.0}, {"weak": "topk-2", "beta": 9.0}])
def test_where_it_is_greedy_decoding(model, ids, settings):
    assert torch.equal(run(model, ids, **settings), model.generate(ids, max_new_tokens=8, **GREEDY))


def test_random_experts_are_uniform_and_new_in_each_forward(model, ids):
    moe.extend(model, moe.TopKRouterConfig())
    with moe.trace_routing(model) as contexts:
        torch.manual_seed(0)
        first = run(model, ids, 40, weak="random", beta=0.5)
    chosen = torch.cat(
        [record.index.unflatten(0, (6, -1))[3:, :, 0].flatten() for c in contexts for record in c.records.values()]
    )
    counts = chosen.bincount(minlength=8).double()
    expected = counts.sum() / 8
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3  # chi squared, 7 degrees: 1 in 1000
    torch.manual_seed(0)
    assert torch.equal(run(model, ids, 40, weak="random", beta=0.5), first)


def test_threshold_as_the_weak_branch(model, ids):
    """A threshold of 1 takes all experts."""
    expected = decode(model, weak_mixtral(model, top_k=8), ids, 8, beta=2.0, alpha=0.1)
    assert torch.equal(run(model, ids, weak="threshold-1.0", beta=2.0), expected)


@pytest.mark.parametrize("beta", [1.0])
@pytest.mark.parametrize(
    "name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "llama4", "jetmoe", "granitemoe", "zaya"]
)
def test_families(name, beta):
    """Against two passes of an extended model, each with its own router in all rows."""
    model = tiny_model(name)
    ids = random_ids(2)
    before = snapshot(model)
    found = run(model, ids, 6, beta=beta)
    assert_same(snapshot(model), before)
    strong = moe.extend(tiny_model(name), moe.TopKRouterConfig())
    custom = {"score": "softmax", "renormalize": True} if name == "zaya" else {}
    weak = moe.extend(tiny_model(name), moe.TopKRouterConfig(num_experts_per_tok=1, first_rank=2, **custom))
    assert torch.equal(found, decode(strong, weak, ids, 6, beta=beta, alpha=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("name", MOE_NAMES)
def test_every_family_that_generates(name):
    model = tiny_model(name)
    if not model.can_generate() or model.config.is_encoder_decoder:
        pytest.skip(f"{name} has no text to continue")
    ids = random_ids(2)
    before = snapshot(model)
    assert torch.equal(run(model, ids, 4, beta=0.0), model.generate(ids, max_new_tokens=4, **GREEDY))
    run(model, ids, 4, beta=0.5)
    assert_same(snapshot(model), before)


def test_an_extended_model_with_another_router(ids):
    model = moe.extend(tiny_model("mixtral"), moe.TopPRouterConfig(threshold=0.6, renormalize=True))
    weak = moe.extend(tiny_model("mixtral"), moe.TopKRouterConfig(num_experts_per_tok=1, first_rank=2))
    assert torch.equal(run(model, ids, beta=2.0), decode(model, weak, ids, 8, beta=2.0, alpha=0.1))
    assert isinstance(next(iter(moe.modeling.moe_structure.iter_routers(model))).moe_config, moe.TopPRouterConfig)


# What `generate` promises -------------------------------------------------------------------------------------------


def test_sampling_is_that_of_the_contrast(model, ids):
    weak = weak_mixtral(model, rank=2)
    texts, torch_state = ids, torch.manual_seed(3)
    for _ in range(5):
        scores = contrast_reference(last_logits(model, texts), last_logits(weak, texts), 0.5, 0.1)
        texts = torch.cat([texts, torch.multinomial(scores.float().softmax(-1), 1)], dim=-1)
    torch.manual_seed(3)
    del torch_state
    assert torch.equal(run(model, ids, 5, do_sample=True, top_k=0, top_p=1.0), texts)


def test_num_return_sequences(model, ids):
    torch.manual_seed(0)
    many = run(model, ids[:1], 6, do_sample=True, num_return_sequences=4, top_k=0)
    assert many.shape == (4, ids.shape[1] + 6)
    assert len({tuple(row.tolist()) for row in many}) > 1
    torch.manual_seed(0)
    assert torch.equal(many, run(model, ids[:1].repeat(4, 1), 6, do_sample=True, top_k=0))


def test_processors_come_after_the_contrast(model, ids):
    penalty = RepetitionPenaltyLogitsProcessor(5.0)
    weak, texts = weak_mixtral(model, rank=2), ids
    for _ in range(6):
        scores = contrast_reference(last_logits(model, texts), last_logits(weak, texts), 1.0, 0.1)
        texts = torch.cat([texts, penalty(texts, scores).argmax(-1, keepdim=True)], dim=-1)
    assert torch.equal(run(model, ids, 6, beta=1.0, logits_processor=LogitsProcessorList([penalty])), texts)


def test_processors_that_leave_nothing_plausible(model, ids):
    """alpha=1 leaves the best token; where that is forbidden, the next best of the strong branch is taken."""
    best = last_logits(model, ids).topk(2, dim=-1).indices
    forbidden = MinLengthLogitsProcessor(100, best[0, 0].item())
    out = run(model, ids[:1], 1, alpha=1.0, logits_processor=LogitsProcessorList([forbidden]))
    assert out[0, -1] == best[0, 1]


def test_the_end_of_a_row(model, ids):
    free = run(model, ids, 8, beta=2.0)
    eos = free[0, ids.shape[1] + 2].item()
    out = run(model, ids, 8, beta=2.0, eos_token_id=eos, pad_token_id=0)
    for row, expected in zip(out, free, strict=True):
        found = expected[ids.shape[1] :].tolist()
        length = ids.shape[1] + (found.index(eos) + 1 if eos in found else 8)
        assert torch.equal(row[:length], expected[:length])
        assert (row[length:] == 0).all()


def test_stopping_criteria_and_dicts(model, ids):
    stop = StoppingCriteriaList([MaxLengthCriteria(ids.shape[1] + 3)])
    out = run(
        model, ids, 8, stopping_criteria=stop, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert out.sequences.shape == (3, ids.shape[1] + 3) and len(out.scores) == 3
    expected = contrast_reference(last_logits(model, ids), last_logits(weak_mixtral(model, rank=2), ids), 0.5, 0.1)
    torch.testing.assert_close(out.scores[0].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.logits[0].double(), last_logits(model, ids), rtol=1e-4, atol=1e-4)


class Collected(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended = True


def test_streamers(model, ids):
    streamer = Collected()
    out = generate(model, ids[:1], strategy="self_contrast", streamer=streamer, max_new_tokens=5, **GREEDY)
    assert streamer.ended and torch.equal(torch.cat([part.flatten() for part in streamer.parts]), out[0])
    partial = functools.partial(self_contrast, streamer=(other := Collected()))
    model.generate(ids[:1], custom_generate=partial, max_new_tokens=5, **GREEDY)
    assert other.ended and len(other.parts) == 5


def test_a_streamer_that_is_iterated(model, ids, word_tokenizer):
    streamer = TextIteratorStreamer(word_tokenizer, timeout=60, skip_prompt=True)
    arguments = {"strategy": self_contrast, "streamer": streamer, "max_new_tokens": 5, **GREEDY}
    thread = threading.Thread(target=generate, args=(model, ids[:1]), kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == word_tokenizer.decode(run(model, ids[:1], 5)[0, ids.shape[1] :]).split()


def test_an_iterated_streamer_ends_after_an_error(model, ids, word_tokenizer):
    streamer = TextIteratorStreamer(word_tokenizer, timeout=60, skip_prompt=True)
    with pytest.raises(ValueError, match="beta"):
        generate(model, ids[:1], strategy=self_contrast, streamer=streamer, beta=-1.0, max_new_tokens=5, **GREEDY)
    assert list(streamer) is not None


def test_stop_strings(model, ids, word_tokenizer):
    free = run(model, ids[:1], 8, beta=2.0)[0, ids.shape[1] :]
    word = word_tokenizer.decode(free[3:4])
    out = generate(
        model,
        ids[:1],
        strategy="self_contrast",
        beta=2.0,
        stop_strings=[word],
        tokenizer=word_tokenizer,
        max_new_tokens=8,
        **GREEDY,
    )
    first = free.tolist().index(free[3].item())
    assert out.shape[1] == ids.shape[1] + first + 1


def test_pipeline(model, word_tokenizer):
    from transformers import pipeline

    text = "w5 w6 w7 w8"
    pipe = pipeline("text-generation", model=model, tokenizer=word_tokenizer)
    out = pipe(text, custom_generate=self_contrast, beta=2.0, max_new_tokens=5, return_full_text=False, **GREEDY)
    ids = word_tokenizer(text, return_tensors="pt")["input_ids"]
    expected = word_tokenizer.decode(run(model, ids, 5, beta=2.0)[0, ids.shape[1] :])
    assert out[0]["generated_text"].split() == expected.split()


# The model is as before ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_nothing_stays_behind(model, ids, training):
    model.train(training)
    before = snapshot(model)
    run(model, ids)
    assert_same(snapshot(model), before)
    assert model.training is training


class Interrupted(BaseException):
    pass


def test_nothing_stays_behind_after_an_exception(model, ids):
    before = snapshot(model)

    def stop(input_ids, scores, **kwargs):
        raise Interrupted

    with pytest.raises(Interrupted):
        run(model, ids, stopping_criteria=StoppingCriteriaList([stop]))
    assert_same(snapshot(model), before)
    with pytest.raises(ValueError, match="rank|first_rank|experts"):
        run(model, ids, weak="rank-9")
    assert_same(snapshot(model), before)


def test_nothing_stays_behind_in_an_extended_model(ids):
    model = moe.extend(tiny_model("mixtral"), moe.TopPRouterConfig(threshold=0.5))
    before = snapshot(model)
    run(model, ids)
    assert_same(snapshot(model), before)


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -0.1}, "`beta` must be a number of 0 or above, got -0.1"),
        ({"beta": float("nan")}, "`beta`"),
        ({"alpha": 1.5}, r"`alpha` must be in \[0, 1\], got 1.5"),
        ({"num_beams": 2}, "undefined for beams"),
        ({"weak": "best"}, "'best' is no routing mode"),
        ({"weak": 0}, "`k` must be a number of 1 or above, got 0"),
        ({"weak": {"kind": "rank", "rank": 2}}, r"not \['rank'\]"),
        ({"strong": "threshold-2"}, r"`threshold` must be in \(0, 1\], got 2.0"),
        ({"strong": {"kind": "threshold"}}, "goes with the kind"),
    ],
)
def test_what_is_refused(model, ids, settings, message):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        run(model, ids, **settings)
    assert_same(snapshot(model), before)


def test_other_models_are_refused(ids):
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match="dense model without routers|no layer of this model"):
        run(dense, ids)
    with pytest.raises(ValueError, match="decoder-only"):
        model = tiny_model("switch_transformers")
        model.generate(ids, custom_generate=self_contrast, max_new_tokens=2, do_sample=False)


def test_a_filled_cache_is_refused(model, ids):
    cache = DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    model(ids[:, :4], **{name: cache})
    with pytest.raises(ValueError, match="holds 4 tokens"):
        run(model, ids, **{name: cache})


def test_unknown_strategies_are_refused(model, ids):
    with pytest.raises(ValueError, match="`strategy` must be one of"):
        generate(model, ids, strategy="selfcontrast")
    with pytest.raises(ValueError, match="needs the `tokenizer`"):
        generate(model, ids, strategy="dola", stop_strings="x")
