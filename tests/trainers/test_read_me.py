"""Tuning of Read-ME models: targets and losses by hand, what is trained when, and what a tiny model gains."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.evaluation import perplexity
from hf_moe_ext.modeling.moe_structure import iter_routers
from hf_moe_ext.trainers.read_me import (
    RouterDistillation,
    authors_loss,
    nested_scores,
    overlap_loss,
    overlap_scores,
)

from .common import snapshot


OPTIONS = {"use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
VOCAB, DOMAINS = 48, 3


def llama(seed: int = 0, **changes):
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**values)).eval()


def text(domain: int, count: int, seed: int, length: int = 32) -> torch.Tensor:
    """Each domain is a Markov chain over 15 letters of its own."""
    generator = torch.Generator().manual_seed(1000 * domain + 7)
    following = torch.stack([torch.randperm(15, generator=generator)[:3] for _ in range(15)])
    generator = torch.Generator().manual_seed(seed)
    state = torch.randint(15, (count,), generator=generator)
    out = [state]
    for _ in range(length - 1):
        step = torch.randint(3, (count,), generator=generator)
        state = following[state, step]
        out.append(state)
    return torch.stack(out, 1) + 1 + 15 * domain


def rows(count: int, seed: int):
    each = [text(domain, count, seed + domain) for domain in range(DOMAINS)]
    return [{"input_ids": one[i], "labels": one[i]} for i in range(count) for one in each]


def calibration(count: int = 8):
    return {f"domain {domain}": [{"input_ids": text(domain, count, 99)}] for domain in range(DOMAINS)}


def made(dense, data=None, **options):
    router = {"type": "read_me", "dim": 16, "num_heads": 2}
    data = calibration() if data is None else data
    return moe.upcycle(dense, method="read_me", calibration=data, router=router, check=False, **options)


@functools.cache
def trained_dense():
    dense = llama().train()
    data, optimizer = rows(120, 0), torch.optim.AdamW(dense.parameters(), lr=4e-3)
    for step in range(90):
        ids = torch.stack([data[(12 * step + i) % len(data)]["input_ids"] for i in range(12)])
        dense(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dense.eval()


def arguments(folder, **changes):
    values = {
        "rounds": 2,
        "router_steps": 2,
        "router_batch_size": 4,
        "expert_steps": 2,
        "expert_batch_size": 4,
        "per_device_batch_size": 2,
        "options": OPTIONS,
    }
    return moe.ReadMeTuningArguments(str(folder), **(values | changes))


# --- targets and losses ---


def test_overlap_scores_count_neurons():
    """Against sets, token by token."""
    torch.manual_seed(0)
    magnitude, neurons = torch.rand(7, 20), torch.rand(3, 20) < 0.5
    for share, count in ((0.5, 10), (0.25, 5), (0.01, 1), (1.0, 20)):
        found = overlap_scores(magnitude, neurons, share)
        for token in range(7):
            best = set(sorted(range(20), key=lambda i: -magnitude[token, i].item())[:count])  # noqa: B023
            for expert in range(3):
                assert found[token, expert] == len(best & set(neurons[expert].nonzero().flatten().tolist()))


def test_nested_scores_are_those_of_five_sets():
    torch.manual_seed(0)
    magnitude = torch.rand(7, 40)
    neurons = torch.zeros(3, 40, dtype=torch.bool)
    neurons[:, :8] = True  # all have these
    for expert in range(3):
        neurons[expert, 8 + torch.randperm(32)[:13]] = True
    special = [set(row.nonzero().flatten().tolist()) - set(range(8)) for row in neurons]
    everywhere = set.intersection(*special)
    special = [one - everywhere for one in special]
    size = len(special[0])
    found = nested_scores(magnitude, neurons)
    for token in range(7):
        order = sorted(range(40), key=lambda i: -magnitude[token, i].item())  # noqa: B023
        for expert in range(3):
            value = sum(len(set(order[: k * size // 5]) & special[expert]) for k in (5, 4, 3, 2, 1)) / (3 * size)
            assert found[token, expert].item() == pytest.approx(value, abs=1e-6)
    assert (nested_scores(magnitude, neurons[:1].expand(3, -1)) == 0).all()  # experts that are alike


def test_losses_by_hand():
    torch.manual_seed(0)
    logits, scores = torch.randn(5, 3, dtype=torch.float64), torch.rand(2, 5, 3, dtype=torch.float64)
    kl = hard = soft = 0.0
    for layer in range(2):
        for token in range(5):
            p = [math.exp(x) for x in logits[token].tolist()]
            p = [x / sum(p) for x in p]
            q = [math.exp(x / 0.5) for x in scores[layer, token].tolist()]
            q = [x / sum(q) for x in q]
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 10
            q = [math.exp(10 * x) for x in scores[layer, token].tolist()]
            q = [x / sum(q) for x in q]
            soft -= sum(b * math.log(a) for a, b in zip(p, q, strict=True)) / 5
            best = scores[layer, token].argmax().item()
            target = [0.5 * (i == best) + 0.5 / 3 for i in range(3)]
            hard -= sum(b * math.log(a) for a, b in zip(p, target, strict=True)) / 5
    assert overlap_loss(logits, scores, 0.5).item() == pytest.approx(kl, rel=1e-5)
    assert authors_loss(logits, scores).item() == pytest.approx(0.75 * hard + 0.25 * soft, rel=1e-5)
    same = scores[:1]
    assert overlap_loss(2 * same[0], same, 0.5).item() == pytest.approx(0.0, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("loss", ["overlap", "authors"])
def test_scores_are_those_of_the_dense_model_and_padding_does_not_count(loss):
    dense = llama()
    model = made(dense)
    distillation = RouterDistillation(model, dense, loss)
    ids = text(1, 2, 5, length=10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    magnitudes = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: magnitudes.append(args[0].abs()))
        for layer in dense.model.layers
    ]
    dense(ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    real = mask.flatten() == 1
    found = distillation.scores(ids, mask)
    function = overlap_scores if loss == "overlap" else nested_scores
    for place, magnitude in enumerate(magnitudes):
        expected = function(magnitude.flatten(0, 1)[real], model.model.moe_read_me.neurons[place])
        torch.testing.assert_close(found[place], expected)
    one = distillation(ids, mask)
    changed = ids.clone()
    changed[0, :4] = 9
    other = distillation(changed, mask)
    torch.testing.assert_close(one["loss"], other["loss"], rtol=1e-5, atol=1e-6)
    alone = [distillation(ids[:1, 4:])["loss"] * 6, distillation(ids[1:])["loss"] * 10]
    torch.testing.assert_close(one["loss"], sum(alone) / 16, rtol=1e-4, atol=1e-6)


def test_accuracy_is_the_share_of_right_choices():
    dense = llama()
    distillation = RouterDistillation(made(dense), dense)
    ids = text(0, 4, 1)
    with torch.no_grad():
        logits = distillation(ids)["logits"].flatten(0, 1)
        right = logits.argmax(-1) == distillation.scores(ids).argmax(-1)
    assert distillation.accuracy == pytest.approx(right.float().mean().item())
    distillation.reset_accuracy()
    assert distillation.accuracy == 0.0


# --- phases ---


def test_each_phase_trains_its_own(tmp_path):
    dense = llama()
    model = made(dense)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before, teacher = snapshot(model), snapshot(dense)
    history = moe.tune_read_me(model, dense, rows(20, 0), arguments(tmp_path, rounds=1, expert_steps=0))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all("moe_read_me" in name for name in moved)
    assert [(row["round"], row["phase"]) for row in history] == [(0, "router")]
    before = snapshot(model)
    history = moe.tune_read_me(model, dense, rows(20, 0), arguments(tmp_path, rounds=1, router_steps=0))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any("moe_read_me" in name or ".gate.weight" in name for name in moved)
    assert {name for name in before if "experts" in name or "self_attn" in name} <= moved
    assert [(row["round"], row["phase"]) for row in history] == [(0, "experts")]
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in dense.state_dict().items())
    assert all(p.requires_grad for p in dense.parameters())


def test_rates_rounds_and_rows(tmp_path, monkeypatch):
    """0.8 for each round, a cosine inside, one step of it for an optimizer step; rows go on where they ended."""
    from hf_moe_ext.trainers import read_me

    seen = []

    def spied(stock):
        class Spy(stock):
            def train(self):
                result = super().train()
                ids = [self.train_dataset[i]["input_ids"][0].item() for i in range(len(self.train_dataset))]
                rate = self.lr_scheduler.lr_lambdas[0](self.args.max_steps // 2)
                seen.append((stock.__name__, self.args.learning_rate, rate, self.state.global_step, ids, self.args))
                return result

        return Spy

    monkeypatch.setattr(read_me, "Trainer", spied(read_me.Trainer))
    monkeypatch.setattr(read_me, "MoETrainer", spied(read_me.MoETrainer))
    data = [{"input_ids": torch.full((6,), i), "labels": torch.full((6,), i)} for i in range(1, 31)]
    dense = llama()
    args = arguments(tmp_path, router_batch_size=6, weight_decay=0.03)
    history = moe.tune_read_me(made(dense), dense, data, args)
    names = ["Trainer", "MoETrainer"] * 2
    assert [one[0] for one in seen] == names
    assert [one[1] for one in seen] == pytest.approx([5e-4, 5e-5, 4e-4, 4e-5])
    assert all(one[2] == pytest.approx(0.5) and one[3] == 2 for one in seen)
    assert [one[4] for one in seen[:2]] == [list(range(1, 13)), list(range(13, 21))]
    assert seen[2][4] == [*range(21, 31), 1, 2]
    for name, _, _, _, _, given in seen:
        steps = 3 if name == "Trainer" else 2
        assert (given.gradient_accumulation_steps, given.per_device_train_batch_size) == (steps, 2)
        assert (given.weight_decay, given.max_grad_norm) == (0.03, 0.0)
    assert [row["phase"] for row in history] == ["router", "experts"] * 2


def test_defaults_are_those_of_the_paper(tmp_path):
    args = moe.ReadMeTuningArguments(str(tmp_path))
    assert (args.rounds, args.router_steps, args.expert_steps) == (8, 100, 200)
    assert (args.router_batch_size, args.expert_batch_size) == (64, 128)
    assert (args.router_learning_rate, args.expert_learning_rate) == (5e-4, 5e-5)
    assert (args.learning_rate_decay, args.weight_decay) == (0.8, 0.01)
    # 26M and 105M tokens a round at 4,096 tokens a row, 1.04B in all.
    tokens = [4096 * args.router_steps * args.router_batch_size, 4096 * args.expert_steps * args.expert_batch_size]
    assert [round(count / 1e6) for count in tokens] == [26, 105]
    assert args.rounds * sum(tokens) / 1e9 == pytest.approx(1.04, abs=0.01)


# --- what it gains ---


@pytest.mark.parametrize("loss", ["overlap", "authors"])
def test_distilled_choices_are_better_than_chance(loss, tmp_path):
    """Of three domains, above 1/3, and above what the router had at first."""
    dense = trained_dense()
    model = made(dense)
    held_out = torch.cat([text(domain, 8, 777) for domain in range(DOMAINS)])
    kind = RouterDistillation(copy.deepcopy(model), copy.deepcopy(dense), loss)
    with torch.no_grad():
        kind(held_out)
    first = kind.accuracy
    options = {"loss": loss, "temperature": 4.0, "router_learning_rate": 1e-2, "rounds": 1}
    args = arguments(tmp_path, router_steps=40, router_batch_size=12, expert_steps=0, **options)
    history = moe.tune_read_me(model, dense, rows(100, 3), args)
    after = RouterDistillation(model, copy.deepcopy(dense), loss)
    with torch.no_grad():
        after(held_out)
    assert after.accuracy > max(0.5, first + 0.1)
    assert history[0]["accuracy"] > 1 / 3


def test_experts_of_domains_beat_one_slice_of_their_width(tmp_path):
    """At equal width and equal tuning: the direction of the paper's comparison, where width is what is short.

    Each domain has a table of its own from two letters to the next, which has to stand in the feed-forward blocks.
    """
    letters = 12

    def sentences(domain: int, count: int, seed: int) -> torch.Tensor:
        table = torch.randint(letters, (letters, letters), generator=torch.Generator().manual_seed(domain))
        generator = torch.Generator().manual_seed(1000 * domain + seed)
        out = [torch.randint(letters, (count,), generator=generator) for _ in range(2)]
        for _ in range(30):
            random = torch.randint(letters, (count,), generator=generator)
            out.append(torch.where(torch.rand(count, generator=generator) < 0.1, random, table[out[-2], out[-1]]))
        return torch.stack(out, 1) + 1 + letters * domain

    def mixed(count: int, seed: int) -> torch.Tensor:
        return torch.stack([sentences(domain, count, seed) for domain in range(DOMAINS)], 1).flatten(0, 1)

    dense, data = llama().train(), mixed(1000, 0)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=4e-3)
    for step in range(500):
        ids = data[24 * step % len(data) :][:24]
        dense(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dense.eval()
    domains = {str(domain): [{"input_ids": sentences(domain, 8, 1)}] for domain in range(DOMAINS)}
    train, held_out = (
        [{"input_ids": ids, "labels": ids} for ids in mixed(100, 2)],
        [{"input_ids": ids} for ids in mixed(8, 3)],
    )
    nats = {}
    for name, looked_at in (("slice", {"all": [{"input_ids": mixed(8, 1)}]}), ("experts", domains)):
        model = made(dense, looked_at, slice_width=16)
        args = arguments(
            tmp_path,
            router_steps=30,
            router_batch_size=12,
            per_device_batch_size=12,
            router_learning_rate=1e-2,
            temperature=4.0,
            expert_steps=30,
            expert_batch_size=12,
            expert_learning_rate=1e-3,
        )
        moe.tune_read_me(model, dense, train, args)
        nats[name] = perplexity(model.eval(), held_out).nats
    assert perplexity(dense, held_out).nats < nats["experts"] < nats["slice"] - 0.02


# --- bad input ---


def test_bad_arguments(tmp_path):
    for values, text_ in (
        ({"rounds": 0}, "`rounds` must be at least 1"),
        (
            {"router_batch_size": 3},
            "`router_batch_size` \\(3\\) must be a multiple of `per_device_batch_size` \\(2\\)",
        ),
        ({"router_steps": 0, "expert_steps": 0}, "both 0"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"activation_share": 1.5}, "`activation_share` must be in"),
        ({"weight_decay": -1.0}, "`weight_decay` must be non-negative"),
    ):
        with pytest.raises(ValueError, match=text_):
            arguments(tmp_path, **values)
    with pytest.raises(TypeError, match="`loss` of ReadMeTuningArguments must be one of"):
        arguments(tmp_path, loss="kl")


def test_models_that_do_not_go_together(tmp_path):
    dense = llama()
    model, args = made(dense), arguments(tmp_path)
    before = snapshot(model)
    split = moe.upcycle(dense, method="split", num_experts=4, target="ext", check=False)
    for one, teacher, error, text_ in (
        (split, dense, ValueError, "has no pre-router that knows which neurons"),
        (model, llama(intermediate_size=48), ValueError, "dense blocks of `teacher` have 48 neurons"),
        (model, made(dense), ValueError, "`teacher` must be the dense model"),
        (model, llama(vocab_size=50), ValueError, "the teacher has a vocabulary of 50"),
        (model, model, ValueError, "it has to be another one"),
    ):
        with pytest.raises(error, match=text_):
            moe.tune_read_me(one, teacher, rows(2, 0), args)
    with pytest.raises(TypeError, match="rows that can be indexed"):
        moe.tune_read_me(model, dense, iter(rows(2, 0)), args)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in dense.parameters()) and list(iter_routers(model))
