"""Routing by domain: against counting by hand, through accumulation, checkpoints and evaluation."""

from __future__ import annotations

import json
import math

import pytest
import torch

import hf_moe_ext as moe
from hf_moe_ext import MoETrainer, MoETrainingArguments, TopKRouterConfig
from hf_moe_ext.trainers import read_history
from hf_moe_ext.trainers.domain_metrics import load_divergence
from hf_moe_ext.trainers.routing_metrics import SeriesPlan

from .common import NUM_EXPERTS, NUM_LAYERS, rows, stock_mixtral, tiny_moe


def examples_of(domains, lengths=None):
    """Padded rows, each with a domain."""
    examples = rows(lengths or [6, 3, 5, 6, 2, 6, 4, 6][: len(domains)])
    for example, domain in zip(examples, domains, strict=True):
        example["domain"] = domain
    return examples


def trainer_of(model, examples, folder, **changes):
    settings = {"max_steps": 2, "logging_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 2, **changes}
    args = MoETrainingArguments(folder, report_to="none", use_cpu=True, routing_domains=["code", "prose"], **settings)
    return MoETrainer(model=model, args=args, train_dataset=examples, eval_dataset=examples)


def counted(model, examples):
    """Tokens of each expert by domain and layer key: one example at a time, without padding."""
    found = {}
    for example in examples:
        length = int(example["attention_mask"].sum())
        with moe.trace_routing(model) as contexts, torch.no_grad():
            model(example["input_ids"][None, :length])
        for key, record in contexts[0].records.items():
            counts = found.setdefault((example["domain"], key), [0] * NUM_EXPERTS)
            for expert in record.index.flatten().tolist():
                counts[expert] += 1
    return found


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_each_domain_by_itself(tmp_path, batch, accumulation):
    """One step over all examples, however it is cut."""
    model = tiny_moe(TopKRouterConfig())
    examples = examples_of([0, 1, 1, 0])
    cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = trainer_of(model, examples, tmp_path, max_steps=1, **cut)
    trainer.train()
    wanted = counted(model.eval(), examples)
    (line,), names = read_history(tmp_path), ["code", "prose"]
    for (domain, key), counts in wanted.items():
        load = line["domains"][names[domain]][key]["load"]
        assert load == pytest.approx([count / sum(counts) for count in counts], rel=1e-5)
    log = next(log for log in trainer.state.log_history if "moe/mean_k" in log)
    loads = {place: tuple(count / sum(counts) for count in counts) for place, counts in wanted.items()}
    divergence = sum(load_divergence([loads[0, key], loads[1, key]]) for key in line["layers"])
    assert log["moe/domain_divergence"] == pytest.approx(divergence / NUM_LAYERS, rel=1e-5) and divergence > 0
    dead = sum(count == 0 for (domain, _), counts in wanted.items() if domain == 0 for count in counts)
    assert log["moe/domain/code/dead_experts"] == dead
    assert log["moe/domain/prose/mean_k"] == 2


def test_a_domain_without_a_token_has_no_series(tmp_path):
    trainer = trainer_of(tiny_moe(TopKRouterConfig()), examples_of([1, 1, 1, 1]), tmp_path)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "moe/mean_k" in log)
    assert "moe/domain/prose/entropy" in log and log["moe/domain/prose/entropy"] == log["moe/entropy"]
    assert not any(name.startswith("moe/domain/code") or name == "moe/domain_divergence" for name in log)


def test_resuming_goes_on_with_the_sums(tmp_path):
    examples = examples_of([0, 1, 0, 1, 1, 0, 0, 1])
    settings = {"logging_steps": 4, "max_steps": 4, "save_steps": 3, "learning_rate": 0.05}
    whole = trainer_of(tiny_moe(TopKRouterConfig()), examples, tmp_path / "whole", **settings)
    whole.train()
    expected = [json.dumps(line) for line in read_history(tmp_path / "whole")]
    again = trainer_of(tiny_moe(TopKRouterConfig()), examples, tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert [json.dumps(line) for line in read_history(tmp_path / "again")] == expected
    assert "domains" in expected[0]


def test_evaluation_needs_no_column_and_takes_one(tmp_path):
    examples = examples_of([0, 1, 0, 1])
    trainer = trainer_of(tiny_moe(TopKRouterConfig()), examples, tmp_path)
    with_column = trainer.evaluate()["eval_loss"]
    without = trainer.evaluate([{k: v for k, v in e.items() if k != "domain"} for e in examples])["eval_loss"]
    assert with_column == without
    with pytest.raises(ValueError, match="the data have no column `domain`"):
        trainer.train_dataset = [{k: v for k, v in e.items() if k != "domain"} for e in examples]
        trainer.train()


def test_a_teacher_does_not_see_the_column(tmp_path):
    model, teacher = tiny_moe(TopKRouterConfig()), stock_mixtral(1)
    examples = examples_of([0, 1, 0, 1])
    args = MoETrainingArguments(
        tmp_path, report_to="none", use_cpu=True, routing_domains=["code", "prose"], max_steps=1, distill_coef=1.0
    )
    MoETrainer(model=model, args=args, train_dataset=examples, teacher=teacher).train()


def test_an_unknown_domain_is_told(tmp_path):
    trainer = trainer_of(tiny_moe(TopKRouterConfig()), examples_of([0, 2, 0, 2]), tmp_path)
    with pytest.raises(ValueError, match=r"tokens have a `domain` that is none of 0 to 1, the positions of \['code'"):
        trainer.train()


def test_divergence_between_its_limits():
    assert load_divergence([(0.5, 0.5, 0.0), (0.5, 0.5, 0.0)]) == 0
    apart = [(1.0, 0.0, 0.0), (0.0, 0.5, 0.5)]
    assert load_divergence(apart) == pytest.approx(math.log(2))
    assert load_divergence([*apart, (0.0, 0.0, 1.0)]) < math.log(3)


def test_series_stay_bounded():
    layers = {str(number): 8 for number in range(40)}
    few, many = (SeriesPlan.make(layers, 128, False, domains=count) for count in (0, 10))
    assert len(few.layers) > len(many.layers) > 0
    with pytest.raises(ValueError, match="40 `routing_domains` need `routing_metrics_max_series` of 260, it is 128"):
        SeriesPlan.make(layers, 128, False, domains=40)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("code", TypeError, "must be a list of names"),
        ([1], TypeError, "must be a list of names"),
        ([], ValueError, "must be different names"),
        (["a", "a"], ValueError, "must be different names"),
        (["a/b"], ValueError, "must be different names"),
    ],
)
def test_names(tmp_path, names, error, message):
    with pytest.raises(error, match=message):
        MoETrainingArguments(tmp_path, routing_domains=names, use_cpu=True)
    with pytest.raises(ValueError, match="`routing_domains` needs `routing_metrics`"):
        MoETrainingArguments(tmp_path, routing_domains=["a"], routing_metrics=False, use_cpu=True)
