"""Scores, attribution and correlation of Monet's experts, against loops over pairs."""

from __future__ import annotations

import pytest
import torch

from hf_moe_ext import monet_knowledge
from hf_moe_ext.monet_knowledge import attribute_experts, collect_expert_scores, correlate_experts, top_experts

from .modeling.test_monet import make, tokens


def padded_batch():
    ids = tokens(3, 6)
    mask = torch.ones_like(ids)
    mask[0, :2], mask[2, :4] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def slow_scores(model, batch):
    """(groups, T, S * S) of the real tokens, pair by pair."""
    probs = model(**batch, output_router_probs=True).router_probs
    real = batch["attention_mask"].flatten() != 0
    out = []
    for g1, g2 in probs:
        g1, g2 = (g.flatten(0, 1)[real].double() for g in (g1, g2))
        pieces = g1.shape[-1]
        rows = [(g1[:, :, i] * g2[:, :, j]).sum(1) for i in range(pieces) for j in range(pieces)]
        out.append(torch.stack(rows, 1))
    return torch.stack(out)


class Letters:
    def __call__(self, text):
        return {"input_ids": [1 + ord(letter) % 60 for letter in text]}


@torch.no_grad()
def test_mean_scores():
    model, batch = make(), padded_batch()
    found = collect_expert_scores(model, {"a": [batch], "b": ["hello world", "more", ""]}, Letters(), batch_size=2)
    torch.testing.assert_close(found["a"], slow_scores(model, batch).mean(1), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found["b"].sum(1), torch.full((2,), 2.0, dtype=torch.float64))  # two heads
    rows = [Letters()(text)["input_ids"] for text in ("hello world", "more")]
    alone = torch.cat(
        [slow_scores(model, {"input_ids": torch.tensor([r]), "attention_mask": torch.ones(1, len(r))}) for r in rows],
        1,
    )
    torch.testing.assert_close(found["b"], alone.mean(1), rtol=1e-4, atol=1e-7)
    assert not model.training


def test_attribution():
    scores = {
        "a": torch.tensor([[1.0, 0.5, 0.0, 0.3, 0.2]]),
        "b": torch.tensor([[0.5, 0.26, 0.0, 0.9, 0.0]]),
        "c": torch.tensor([[0.1, 0.0, 0.0, 0.45, 0.0]]),
    }
    found = {name: groups[0].tolist() for name, groups in attribute_experts(scores).items()}
    assert found == {"a": [0, 4], "b": [3], "c": []}
    assert attribute_experts(scores, factor=3.0)["a"][0].tolist() == [4]


@torch.no_grad()
def test_correlation(monkeypatch):
    model, batch = make(), padded_batch()
    value = torch.randn(3, 6)
    scores = slow_scores(model, batch)
    told = value.flatten()[batch["attention_mask"].flatten() != 0].double()
    expected = torch.stack([torch.corrcoef(torch.cat([told[None], group.T]))[0, 1:] for group in scores])
    expected = expected.nan_to_num(0)  # experts that no token uses
    for chunk in (2**24, 40):
        monkeypatch.setattr(monet_knowledge, "_CHUNK", chunk)
        found = correlate_experts(model, [batch], [value])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    by_text = correlate_experts(model, [batch], [value[:, 0]])
    torch.testing.assert_close(by_text, correlate_experts(model, [batch], [value[:, :1].expand(3, 6)]))
    two = [{name: tensor[:1] for name, tensor in batch.items()}, {name: tensor[1:] for name, tensor in batch.items()}]
    torch.testing.assert_close(correlate_experts(model, two, [value[:1], value[1:]]), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_experts_of_a_token():
    model, ids = make(), tokens()
    found = top_experts(model, {"input_ids": ids}, k=4)
    assert found.experts.shape == (2, 2, 7, 4)
    scores = slow_scores(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).view(2, 2, 7, 36)
    best = scores.topk(4, dim=-1).values.float()
    torch.testing.assert_close(found.scores, best)
    torch.testing.assert_close(scores.gather(-1, found.experts).float(), best)


def test_removing_the_experts_of_a_language_hurts_that_language():
    """Two made-up languages; the experts of one, by the rule, are removed."""
    torch.manual_seed(0)

    def text(language, count, length=24):
        """Each language has its letters and its order of them."""
        start = torch.randint(0, 12, (count, 1))
        step = 5 if language == "a" else 7
        return 4 + (0 if language == "a" else 30) + (start + step * torch.arange(length)) % 12

    model = make(moe_experts=16, moe_topk=4, num_hidden_layers=2, moe_groups=2, router_aux_loss_coef=1e-3).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        ids = torch.cat([text("a", 8), text("b", 8)])
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    tests = {name: text(name, 16) for name in "ab"}

    def losses():
        with torch.no_grad():
            return {name: model(ids, labels=ids).loss.item() for name, ids in tests.items()}

    before = losses()
    scores = collect_expert_scores(model, {name: [{"input_ids": text(name, 16)}] for name in "ab"})
    found = attribute_experts(scores)
    assert all(len(found[name][0]) > 3 for name in "ab")
    model.set_expert_mask(0, found["a"][0])
    after = losses()
    rise = {name: after[name] - before[name] for name in "ab"}
    assert rise["a"] > 5 * max(rise["b"], 0.02), (before, after)
    model.clear_expert_masks()
    assert losses() == before


def test_bad_input():
    model = make()
    for call, error, text in (
        (lambda: collect_expert_scores(model, {}), ValueError, "`domains` is empty"),
        (lambda: collect_expert_scores(model, {"a": ["text"]}), ValueError, "need `tokenizer"),
        (lambda: collect_expert_scores(model, {"a": [""]}, Letters()), ValueError, "`a` has no tokens"),
        (lambda: collect_expert_scores(torch.nn.Linear(1, 1), {"a": ["b"]}), TypeError, "expected a Monet model"),
        (lambda: attribute_experts({"a": torch.ones(1, 4)}), ValueError, "at least two"),
        (lambda: attribute_experts({"a": torch.ones(1, 4), "b": torch.ones(1, 4)}, 1.0), ValueError, "above 1"),
        (lambda: top_experts(model, {"input_ids": tokens()}, k=99), ValueError, "in \\[1, 36\\]"),
        (lambda: correlate_experts(model, [padded_batch()], [torch.ones(2)]), ValueError, "`values` must be"),
    ):
        with pytest.raises(error, match=text):
            call()
