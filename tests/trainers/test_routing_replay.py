"""Recorded routing in the training data: what the forward follows, and how a batch of it is made."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithPadding, default_data_collator

import hf_moe_ext as moe
from hf_moe_ext import MoETrainer, MoETrainingArguments, RoutingReplayCollator, TopKRouterConfig
from hf_moe_ext.data import byte_tokenizer

from .common import NUM_EXPERTS, NUM_LAYERS, rows, tiny_moe


def recorded_examples(lengths, *, left=False, slots=2):
    """Examples with experts drawn by lot."""
    examples, generator = rows(lengths, left=left), torch.Generator().manual_seed(9)
    for example in examples:
        draws = torch.rand(len(example["input_ids"]), NUM_LAYERS, NUM_EXPERTS, generator=generator)
        example["routed_experts"] = draws.argsort(dim=-1)[..., :slots]
    return examples


def trainer_of(model, examples, tmp_path, **changes):
    args = MoETrainingArguments(
        tmp_path, report_to="none", max_steps=1, per_device_train_batch_size=2, use_cpu=True, **changes
    )
    return MoETrainer(model=model, args=args, train_dataset=examples, eval_dataset=examples)


def seen_by(model, run):
    with moe.trace_routing(model) as contexts:
        run()
    return [torch.stack([r.chosen[:, :2] for r in c.records.values()], dim=1) for c in contexts]


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}])
def test_training_and_evaluation_follow_the_column(tmp_path, changes):
    model = tiny_moe(TopKRouterConfig(balance_coef=0.01))
    examples = recorded_examples([6, 6, 6, 6])
    trainer = trainer_of(model, examples, tmp_path, **changes)
    known = {tuple(e["routed_experts"].flatten().tolist()) for e in examples}
    for run in (trainer.train, trainer.evaluate, lambda: trainer.predict(examples)):
        found = seen_by(model, run)
        assert found
        for batch in found:
            assert {tuple(row.flatten().tolist()) for row in batch.split(6)} <= known


def test_a_step_is_that_of_a_replayed_forward(tmp_path):
    examples = recorded_examples([6, 6])
    model = tiny_moe(TopKRouterConfig())
    batch = default_data_collator(examples)
    routed = batch.pop("routed_experts")
    with moe.replay_routing(model.train(), routed):
        model(**batch).loss.backward()
    expected = {name: p - 0.5 * p.grad for name, p in model.named_parameters() if p.grad is not None}
    other = tiny_moe(TopKRouterConfig())
    trainer_of(
        other,
        examples,
        tmp_path,
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        data_seed=0,
    ).train()
    for name, parameter in other.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("side", ["right", "left"])
def test_examples_of_different_length(side):
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = side
    collator = RoutingReplayCollator(DataCollatorWithPadding(tokenizer), padding_side=side)
    first = {"input_ids": [1, 2, 3], "routed_experts": torch.arange(12).view(3, 2, 2)}
    second = {"input_ids": [4, 5, 6, 7, 8], "routed_experts": torch.arange(24).view(4, 2, 3).tolist()}  # generated
    found = collator([first, second])["routed_experts"]
    assert found.shape == (2, 5, 2, 3)
    place = slice(2, 5) if side == "left" else slice(0, 3)
    assert torch.equal(found[0, place, :, :2], first["routed_experts"])
    assert torch.equal(found[1, :4], torch.tensor(second["routed_experts"]))
    rest = found.clone()
    rest[0, place, :, :2], rest[1, :4] = -1, -1
    assert (rest == -1).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_that_a_collator_cuts(side):
    part = slice(0, 3) if side == "right" else slice(2, 5)

    def cut(examples):
        return {"input_ids": torch.stack([torch.tensor(e["input_ids"])[part] for e in examples])}

    routed = torch.arange(20).view(5, 2, 2)
    example = {"input_ids": [1, 2, 3, 4, 5], "routed_experts": routed}
    found = RoutingReplayCollator(cut, padding_side=side)([example])["routed_experts"]
    assert torch.equal(found[0], routed[part])


def test_what_does_not_fit():
    collator = RoutingReplayCollator(default_data_collator)
    routed = torch.zeros(3, 2, 2, dtype=torch.int64)
    example = {"input_ids": [1, 2, 3], "routed_experts": routed}
    assert "routed_experts" not in collator([{"input_ids": [1, 2, 3]}])
    with pytest.raises(ValueError, match="1 of 2 examples have `routed_experts`"):
        collator([example, {"input_ids": [1, 2, 3]}])
    with pytest.raises(ValueError, match=r"of as many layers each, got \[\(3, 2, 2\), \(3, 3, 2\)\]"):
        collator([example, {**example, "routed_experts": torch.zeros(3, 3, 2)}])
    with pytest.raises(ValueError, match="an example of 2 tokens has `routed_experts` for 3"):
        RoutingReplayCollator(lambda examples: {"input_ids": torch.zeros(1, 2)})([{**example, "input_ids": [1, 2]}])
    with pytest.raises(ValueError, match="`padding_side` must be"):
        RoutingReplayCollator(default_data_collator, padding_side="up")
