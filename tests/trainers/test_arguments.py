"""Arguments and wrong input: parsed from everywhere, refused with cause and cure."""

from __future__ import annotations

import json

import pytest
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_moe_ext import MoETrainer, MoETrainingArguments, TopKRouterConfig

from ..tiny_models import tiny_model
from .common import arguments, rows, stock_mixtral, tiny_moe


def test_parses_from_the_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --freeze_router --train_experts 3 0 --routing_metrics_max_series 64 --use_cpu"
    (args,) = HfArgumentParser(MoETrainingArguments).parse_args_into_dataclasses(line.split())

    assert args.freeze_router and args.train_experts == [0, 3] and args.routing_metrics_max_series == 64
    assert args.routing_metrics and not args.train_only_moe and args.learning_rate == 5e-5


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_parses_from_a_file(tmp_path, kind):
    values = {"output_dir": str(tmp_path), "train_experts": [1], "routing_metrics_per_expert": True, "use_cpu": True}
    file = tmp_path / f"args.{kind}"
    file.write_text(json.dumps(values))  # JSON is YAML
    parser = HfArgumentParser(MoETrainingArguments)
    (args,) = parser.parse_yaml_file(file) if kind == "yaml" else parser.parse_json_file(file)

    assert args.train_experts == [1] and args.routing_metrics_per_expert


def test_survives_a_round_trip(tmp_path):
    args = arguments(tmp_path, train_experts=[2, 1], train_only_moe=True)
    again = json.loads(args.to_json_string())

    assert again["train_experts"] == [1, 2] and again["train_only_moe"] is True


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"train_experts": "0,1"}, TypeError, r"list of expert numbers"),
        ({"train_experts": [0, "1"]}, TypeError, r"list of expert numbers"),
        ({"train_experts": [True]}, TypeError, r"list of expert numbers"),
        ({"train_experts": []}, ValueError, r"is empty"),
        ({"train_experts": [-1]}, ValueError, r"from 0 on, got -1"),
        ({"routing_metrics_max_series": 3}, ValueError, r"at least 32, got 3"),
        ({"routing_metrics": False, "routing_metrics_per_expert": True}, ValueError, r"needs `routing_metrics`"),
        ({"freeze_router": "yes"}, TypeError, r"true or false, got 'yes'"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, ValueError, r"wrong gradients"),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_kwargs` is deprecated")
def test_wrong_values_are_refused(tmp_path, values, error, message):
    with pytest.raises(error, match=message):
        arguments(tmp_path, **values)


def test_unknown_expert_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"names \[6, 9\], but the experts of this model are 0 to 5"):
        MoETrainer(model=tiny_moe(), args=arguments(tmp_path, train_experts=[0, 6, 9]))


def test_dense_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"upcycle\(model, ...\).*stock `Trainer`"):
        MoETrainer(model=tiny_model("llama"), args=arguments(tmp_path, freeze_router=True))


def test_stock_moe_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"extend\(model, MoeExtension\(router=TopKRouterConfig\(\)\)\)"):
        MoETrainer(model=stock_mixtral(), args=arguments(tmp_path))


def test_the_suggested_extension_changes_no_result(tmp_path):
    """What the message for stock models recommends: the losses are those of the stock trainer."""
    data = rows([9, 7, 5, 9])
    options = {"max_steps": 3, "learning_rate": 1e-3}
    stock = Trainer(model=stock_mixtral(), args=arguments(tmp_path, **options), train_dataset=data)
    stock.train()
    ours = MoETrainer(model=tiny_moe(TopKRouterConfig()), args=arguments(tmp_path, **options), train_dataset=data)
    ours.train()

    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (stock, ours)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_stock_arguments_are_refused(tmp_path):
    with pytest.raises(TypeError, match="MoETrainingArguments, got TrainingArguments"):
        MoETrainer(model=tiny_moe(), args=TrainingArguments(str(tmp_path), use_cpu=True))


def test_reentrant_checkpointing_of_the_model_is_refused(tmp_path):
    model = tiny_moe()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="wrong gradients"):
        MoETrainer(model=model, args=arguments(tmp_path))


def test_model_init_is_adopted_too(tmp_path):
    data = rows([9, 7])
    trainer = MoETrainer(
        model_init=lambda: tiny_moe(), args=arguments(tmp_path, train_experts=[0]), train_dataset=data
    )
    trainer.train()

    assert trainer.parameter_report().experts == {"0": (0,), "1": (0,)}
    assert "moe/mean_k" in trainer.state.log_history[0]
    with pytest.raises(ValueError, match="dense model"):
        MoETrainer(model_init=lambda: tiny_model("llama"), args=arguments(tmp_path))
