"""Choosing adapters and data: each signal against its definition, the choice against brute force, and a trial."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe_ext.lora.data_selection import embed_texts, select_data
from hf_moe_ext.lora.mixtures import mix_adapters
from hf_moe_ext.lora.peft_files import PeftAdapter, read_adapter
from hf_moe_ext.lora.selection import (
    adapter_similarity,
    average_ranks,
    best_subset,
    greedy_accuracy,
    mean_perplexity,
    select_experts,
)
from hf_moe_ext.trainers.freezing import train_only_adapter_routers
from tests.hub.models import byte_tokenizer

from .helpers import logits, peft_model, randomize_peft, saved_adapter


ROWS = [([5, 6, 7, 8], [-100, -100, 7, 8]), ([9, 10, 11], [-100, 10, 11]), ([12, 13, 14, 15, 16], [-100] * 4 + [16])]
EXAMPLES = [{"input_ids": ids, "labels": labels} for ids, labels in ROWS]
TENSORS = [(torch.tensor(ids), torch.tensor(labels)) for ids, labels in ROWS]


def bank(tmp_path, count=5, **options):
    for seed in range(count):
        saved_adapter(tmp_path / f"a{seed}", seed, **options)
    return [tmp_path / f"a{seed}" for seed in range(count)]


# --- the signals ---


def test_perplexity_is_that_of_the_loss():
    model = peft_model()
    wanted = [math.exp(model(ids[None], labels=labels[None]).loss.item()) for ids, labels in TENSORS]
    for batch_size in (1, 2, 8):
        assert mean_perplexity(model, TENSORS, batch_size) == pytest.approx(sum(wanted) / 3, rel=1e-5)


def test_accuracy_is_that_of_greedy_generation():
    model = peft_model()
    rows = []
    for ids, _ in TENSORS:
        out = model.generate(ids[None, :2], max_new_tokens=2, min_new_tokens=2, do_sample=False)[0]
        rows.append((out, torch.cat([torch.tensor([-100, -100]), out[2:]])))
    assert greedy_accuracy(model, rows) == 1.0
    wrong = (rows[0][0], rows[0][1].clone())
    wrong[1][-1] = (wrong[1][-1] + 1) % 90
    assert greedy_accuracy(model, [*rows, wrong], batch_size=3) == 0.75


def test_padding_counts_on_neither_side(tmp_path):
    folders = bank(tmp_path, 2)
    padded = [
        {"input_ids": [0, 0, *ids], "labels": [7, 7, *labels], "attention_mask": [0, 0, *[1] * len(ids)]}
        for ids, labels in ROWS[:1]
    ]
    padded += [
        {"input_ids": [*ids, 0], "labels": [*labels, 3], "attention_mask": [*[1] * len(ids), 0]}
        for ids, labels in ROWS[1:]
    ]
    one, other = (select_experts(tiny_model("llama"), folders, rows, 1) for rows in (EXAMPLES, padded))
    assert one.scores == other.scores


def test_ranks_share_ties():
    assert average_ranks([3.0, 1.0, 2.0, 1.0]) == [4.0, 1.5, 3.0, 1.5]
    assert average_ranks([0.1 + 0.2, 0.3]) == [1.5, 1.5]


def test_similarity_is_that_of_the_updates(tmp_path):
    one, other = (read_adapter(folder) for folder in bank(tmp_path, 2, r=3))
    cosines = []
    for path in one.pairs:
        d1, d2 = one.delta(path).double().flatten(), other.delta(path).double().flatten()
        cosines.append(float(d1 @ d2 / (d1.norm() * d2.norm())))
    assert adapter_similarity(one, other) == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    assert adapter_similarity(one, one) == pytest.approx(1.0)
    mixing = torch.randn(3, 3)  # another factoring of the same update
    turned = {path: (mixing @ a, b @ torch.linalg.inv(mixing)) for path, (a, b) in one.pairs.items()}
    same = PeftAdapter("same", turned, one.scales)
    assert adapter_similarity(one, same) == pytest.approx(1.0, abs=1e-4)
    assert adapter_similarity(one, same, "factors") < 0.95
    assert adapter_similarity(one, one, "factors") == pytest.approx(1.0)
    half = PeftAdapter("half", dict(list(one.pairs.items())[:3]), one.scales)
    assert adapter_similarity(one, half) == pytest.approx(0.5)
    saved_adapter(tmp_path / "wide", 9, r=5)
    with pytest.raises(ValueError, match="different ranks"):
        adapter_similarity(one, read_adapter(tmp_path / "wide"), "factors")


# --- the choice ---


@pytest.mark.parametrize("normalize", [False, True])
def test_the_choice_is_that_of_brute_force(normalize, tmp_path):
    folders = bank(tmp_path, 6)
    model = tiny_model("llama")
    found = select_experts(model, folders, EXAMPLES, 3, candidates=6, normalize_ranks=normalize)
    loaded = {folder.name: read_adapter(folder) for folder in folders}
    best, least = None, float("inf")
    subsets = list(itertools.combinations(loaded, 3))
    means = [
        sum(adapter_similarity(loaded[a], loaded[b]) for a, b in itertools.combinations(s, 2)) / 3 for s in subsets
    ]
    for subset, mean in zip(subsets, means, strict=True):
        rank = sum(other < mean for other in means) + 1
        cost = sum(found.scores[n].rank_accuracy + found.scores[n].rank_perplexity for n in subset)
        total = cost / 6 + rank / 20 if normalize else cost + rank
        if total < least:
            best, least = subset, total
    assert found.chosen == best
    assert set(found.folders) == set(best) and found.similarity == pytest.approx(means[subsets.index(best)])
    assert all(name in str(found) for name in loaded)


def test_the_model_is_as_it_was(tmp_path):
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    before, keys = logits(model), list(model.state_dict())
    select_experts(model, bank(tmp_path, 2), EXAMPLES, 1)
    assert type(model).__name__ == "LlamaForCausalLM" and list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_copies_have_equal_ranks_and_are_not_chosen_together(tmp_path):
    folders = bank(tmp_path, 3)
    names = {"a": folders[0], "copy": folders[0], "b": folders[1], "c": folders[2]}
    found = select_experts(tiny_model("llama"), names, EXAMPLES, 2, candidates=4)
    assert found.scores["a"] == found.scores["copy"]
    cost = dict.fromkeys(["a", "copy", "b"], 4.0)
    pairs = {("a", "copy"): 1.0, ("a", "b"): 0.3, ("copy", "b"): 0.3}
    assert best_subset(["a", "copy", "b"], cost, pairs, 2) == ("a", "b")
    opposite = {("a", "copy"): -0.9, ("a", "b"): 0.1, ("copy", "b"): 0.1}  # a mean below zero has no inverse to rank
    assert best_subset(["a", "copy", "b"], cost, opposite, 2) == ("a", "copy")


def test_text_and_a_metric(tmp_path):
    tokenizer = byte_tokenizer()
    folders = bank(tmp_path, 2)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    folders = []
    for seed in range(2):
        made = randomize_peft(get_peft_model(tiny_model("llama", vocab_size=len(tokenizer)), LoraConfig(r=2)), seed)
        made.save_pretrained(tmp_path / f"t{seed}")
        folders.append(tmp_path / f"t{seed}")
    shots = [{"prompt": "one and one is", "answer": " two", "rationale": " two, since one more than one is two"}]
    seen = []

    def metric(text, example):
        seen.append((text, example["answer"]))
        return float(len(seen) > 1)

    found = select_experts(model, folders, shots, 1, tokenizer=tokenizer, metric=metric, max_new_tokens=3)
    assert len(seen) == 2 and found.scores["t1"].accuracy == 1.0 and found.scores["t0"].accuracy == 0.0
    plain = select_experts(model, folders, [{**shots[0], "rationale": None}], 1, tokenizer=tokenizer)
    assert plain.scores["t0"].perplexity != found.scores["t0"].perplexity


BAD = {
    "k": ({"k": 3}, ValueError, "`k` must be from 1 to the 2 adapters"),
    "candidates": ({"k": 2, "candidates": 1}, ValueError, "must be at least `k`"),
    "similarity": ({"similarity": "cosine"}, ValueError, '"update" or "factors"'),
    "metric": ({"metric": lambda *_: 1.0}, ValueError, "needs the `tokenizer`"),
    "empty": ({"k_shot": []}, ValueError, "`k_shot` is empty"),
    "keys": ({"k_shot": [{"question": "?"}]}, ValueError, "must have `prompt` and `answer`"),
    "text": ({"k_shot": [{"prompt": "a", "answer": "b"}]}, ValueError, "need the `tokenizer`"),
    "labels": ({"k_shot": [{"input_ids": [1, 2], "labels": [1]}]}, ValueError, "rows of one length"),
    "nothing": ({"k_shot": [{"input_ids": [1, 2], "labels": [-100, -100]}]}, ValueError, "no token to predict"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(options, error, message, tmp_path):
    options = {"k_shot": EXAMPLES, "k": 1, **options}
    with pytest.raises(error, match=message):
        select_experts(tiny_model("llama"), bank(tmp_path, 2), **options)
    with pytest.raises(TypeError, match="several folders"):
        select_experts(tiny_model("llama"), str(tmp_path / "a0"), EXAMPLES, 1)


# --- data ---


@pytest.fixture
def clouds():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 6, generator=generator)
    pool = (centres[:, None] + 0.15 * torch.randn(12, 10, 6, generator=generator)).flatten(0, 1)
    return torch.randn(4, 6, generator=generator), torch.cat([pool, pool[:3]])


def test_selected_data_by_definition(clouds):
    shots, pool = clouds
    found = select_data(shots, pool, count=60, threshold=0.9)
    unit = torch.nn.functional.normalize(pool.double(), dim=-1)
    near = (unit @ torch.nn.functional.normalize(shots.double(), dim=-1).T).amax(-1)
    top = set(near.argsort(descending=True)[:60].tolist())
    assert set(found.index) | set(found.dropped) == top and not set(found.index) & set(found.dropped)
    kept = unit[list(found.index)] @ unit[list(found.index)].T
    assert kept.fill_diagonal_(0).max() <= 0.9 and 5 < len(found.index) < 50
    for gone, instead in found.dropped.items():
        assert instead in found.index and unit[gone] @ unit[instead] > 0.9 and near[instead] >= near[gone] - 1e-9
    assert list(found.similarity) == sorted(found.similarity, reverse=True)
    assert len(select_data(shots, pool, count=60, threshold=None).index) == 60


def test_selected_data_do_not_depend_on_the_order(clouds):
    shots, pool = clouds
    wanted = pool[list(select_data(shots, pool, count=50).index)]
    for seed in range(3):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        found = select_data(shots, pool[order], count=50)
        assert torch.equal(pool[order][list(found.index)], wanted)


def test_embeddings():
    tokenizer, texts = byte_tokenizer(), ["a", "some longer text", "a"]
    model = tiny_model("bert", vocab_size=len(tokenizer))
    for pooling in ("cls", "mean"):
        found = embed_texts(texts, model, tokenizer, pooling=pooling, batch_size=2)
        assert found.shape == (3, 32) and torch.allclose(found.norm(dim=-1), torch.ones(3))
        torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-5)
        ids = tokenizer(texts[1], return_tensors="pt")["input_ids"]
        states = model(ids, output_hidden_states=True).hidden_states[-1][0].detach()
        wanted = states[0] if pooling == "cls" else states.mean(0)
        torch.testing.assert_close(found[1], wanted / wanted.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "`count`"),
        ({"threshold": 2.0}, "is a cosine"),
        ({"pool": torch.ones(3, 5)}, "must be embeddings"),
    ],
)
def test_bad_data_options(options, message, clouds):
    shots, pool = clouds
    with pytest.raises(ValueError, match=message):
        select_data(shots, **{"pool": pool, **options})
    with pytest.raises(ValueError, match="`pooling`"):
        embed_texts(["a"], None, None, pooling="max")
    with pytest.raises(ValueError, match="a list of texts"):
        embed_texts("a", None, None)


# --- a trial: eight skills, a task of three of them ---

SYMBOLS, SKILLS = 12, 8


def skill_rows(skill, symbols):
    """`[x, skill] -> y`: a permutation of the symbols for each skill."""
    generator = torch.Generator().manual_seed(100 + skill)
    permutation = torch.randperm(SYMBOLS, generator=generator)
    return torch.tensor([[4 + x, 4 + SYMBOLS + skill, 4 + int(permutation[x])] for x in symbols])


def train(model, rows, steps, rate=1e-2):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    labels = rows.clone()
    labels[:, :2] = -100
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(rows, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def as_examples(rows):
    return [{"input_ids": row.tolist(), "labels": [-100, -100, int(row[2])]} for row in rows]


def score(model, rows):
    return greedy_accuracy(
        model, [(torch.tensor(e["input_ids"]), torch.tensor(e["labels"])) for e in as_examples(rows)], 64
    )


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, initializer_range=0.3, num_key_value_heads=4)).eval()


@pytest.fixture(scope="module")
def skills(tmp_path_factory):
    import warnings

    folder = tmp_path_factory.mktemp("bank")
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for skill in range(SKILLS):
            torch.manual_seed(skill)
            model = get_peft_model(base(), LoraConfig(r=8, lora_alpha=16, target_modules=targets))
            train(model, skill_rows(skill, range(SYMBOLS)), 60).save_pretrained(folder / f"skill{skill}")
    return [folder / f"skill{skill}" for skill in range(SKILLS)]


TASK = (1, 4, 6)


def test_a_task_of_three_skills(skills):
    shown, held_out = range(0, SYMBOLS, 2), range(1, SYMBOLS, 2)
    shots = torch.cat([skill_rows(skill, shown) for skill in TASK])
    test = torch.cat([skill_rows(skill, held_out) for skill in TASK])
    found = select_experts(base(), skills, as_examples(shots), 4)
    assert {f"skill{skill}" for skill in TASK} <= set(found.chosen)
    accuracy, perplexity = (
        torch.tensor([getattr(s, name) for s in found.scores.values()]).double() for name in ("accuracy", "perplexity")
    )
    assert torch.corrcoef(torch.stack([accuracy, perplexity.log()]))[0, 1] < -0.5

    def tuned(folders):
        """Routers alone learn from the examples; a single adapter has none, and is trained itself."""
        torch.manual_seed(0)
        model = mix_adapters(base(), folders, num_experts_per_tok=2)
        if len(folders) > 1:
            train_only_adapter_routers(model)
        return score(train(model, shots, 100, 2e-2), test)

    best = max(found.chosen, key=lambda name: found.scores[name].accuracy)
    mixture, single = tuned(found.folders), tuned([found.folders[best]])
    other, copies = (
        tuned([skills[i] for i in (0, 2, 3, 5)]),
        tuned({f"copy{i}": found.folders[best] for i in range(4)}),
    )
    assert mixture > max(single, other, copies) + 0.1, (mixture, single, other, copies)
