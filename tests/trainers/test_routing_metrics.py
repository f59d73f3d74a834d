"""Routing metrics against counting in plain Python, the bound on series, and the history file."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hf_moe_ext import MoeExtension, MoETrainer, TopKRouterConfig, TopPRouterConfig, extend, trace_routing
from hf_moe_ext.trainers import read_history
from hf_moe_ext.trainers.routing_history import HISTORY_NAME, append_history, rewind_history
from hf_moe_ext.trainers.routing_metrics import RoutingMetrics, SeriesPlan

from .common import NUM_EXPERTS, NUM_LAYERS, arguments, logged, rows, stock_mixtral, tiny_moe, train


DATA = rows([9, 5, 7, 3, 9, 9, 2, 8])


def slow_metrics(contexts, masks, key: str) -> dict[str, float]:
    """Statistics of one layer over several forwards, token by token."""
    counts, tokens, entropy = [0] * NUM_EXPERTS, 0, 0.0
    for context, mask in zip(contexts, masks, strict=True):
        record = context.records[key]
        for token, real in enumerate(mask.reshape(-1).tolist()):
            if not real:
                continue
            tokens += 1
            entropy -= sum(p * math.log(p) for p in record.scores[token].tolist() if p > 0)
            for expert in record.index[token].tolist():
                if expert < NUM_EXPERTS:
                    counts[expert] += 1
    load = [count / sum(counts) for count in counts]
    return {
        "load": load,
        "mean_k": sum(counts) / tokens,
        "entropy": entropy / tokens,
        "load_max": max(load),
        "max_violation": max(counts) / (sum(counts) / NUM_EXPERTS) - 1,
        "dead_experts": counts.count(0),
    }


@pytest.mark.parametrize("router", [TopKRouterConfig(), TopPRouterConfig(threshold=0.4)], ids=["top_k", "top_p"])
def test_metrics_equal_slow_counting(tmp_path, router):
    """Two logs of two steps of two micro-batches each, padding left out."""
    with trace_routing(model := tiny_moe(router)) as contexts:
        options = {"max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": 2}
        trainer = train(model, DATA, tmp_path, routing_metrics_per_expert=True, **options)

    masks = [torch.stack([row["attention_mask"] for row in DATA[i : i + 2]]) for i in (0, 2, 4, 6)]
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line, part in zip(lines, (contexts[:4], contexts[4:]), strict=True):
        slow = [slow_metrics(part, masks, str(layer)) for layer in range(NUM_LAYERS)]
        for layer, expected in enumerate(slow):
            for name in ("mean_k", "entropy", "load_max", "max_violation", "dead_experts"):
                assert line[f"moe/layer_{layer:02d}/{name}"] == pytest.approx(expected[name], rel=1e-6)
            loads = [line[f"moe/layer_{layer:02d}/expert_{e:03d}/load"] for e in range(NUM_EXPERTS)]
            assert loads == pytest.approx(expected["load"])
        for name in ("mean_k", "entropy", "load_max", "max_violation"):
            assert line[f"moe/{name}"] == pytest.approx(sum(layer[name] for layer in slow) / NUM_LAYERS, rel=1e-6)
        assert line["moe/dead_experts"] == sum(layer["dead_experts"] for layer in slow)


def test_drop_rate_is_the_share_of_lost_choices(tmp_path):
    extension = MoeExtension(router=TopKRouterConfig(), capacity={"factor": 0.7, "minimum": 1})
    with trace_routing(model := extend(stock_mixtral(), extension)) as contexts:
        trainer = train(model, DATA, tmp_path, max_steps=2, logging_steps=2, per_device_train_batch_size=2)
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    masks = [torch.stack([row["attention_mask"] for row in DATA[i : i + 2]]) for i in (0, 2)]
    rates = []
    for layer in range(NUM_LAYERS):
        lost = total = 0
        for context, mask in zip(contexts, masks, strict=True):
            record, real = context.records[str(layer)], mask.flatten().bool()
            total += 2 * int(real.sum())
            lost += int((record.index[real] == NUM_EXPERTS).sum())
        rates.append(lost / total)
        assert line[f"moe/layer_{layer:02d}/drop_rate"] == pytest.approx(rates[-1])
        assert line[f"moe/layer_{layer:02d}/mean_k"] == pytest.approx(2 * (1 - rates[-1]))
    assert line["moe/drop_rate"] == pytest.approx(sum(rates) / NUM_LAYERS) and min(rates) > 0
    assert [entry["dropped"] for entry in read_history(tmp_path)[-1]["layers"].values()] == pytest.approx(rates)


def test_history_holds_every_layer_and_expert(tmp_path):
    with trace_routing(model := tiny_moe()) as contexts:
        train(model, DATA, tmp_path, max_steps=4, logging_steps=2, per_device_train_batch_size=4)

    masks = [torch.stack([row["attention_mask"] for row in DATA[i : i + 4]]) for i in (0, 4)]
    history = read_history(tmp_path)
    assert [line["step"] for line in history] == [2, 4]
    for line, part in zip(history, (contexts[:2], contexts[2:]), strict=True):
        assert set(line) == {"step", "layers"} and set(line["layers"]) == {"0", "1"}
        for key, layer in line["layers"].items():
            slow = slow_metrics(part, masks, key)
            assert set(layer) == {"load", "entropy", "mean_k", "dead"}
            assert layer["load"] == pytest.approx(slow["load"], rel=1e-5)
            assert layer["entropy"] == pytest.approx(slow["entropy"], rel=1e-5)
            assert layer["mean_k"] == pytest.approx(slow["mean_k"], rel=1e-5)
            assert layer["dead"] == slow["dead_experts"]


def test_dead_experts_are_counted(tmp_path):
    model = tiny_moe(TopKRouterConfig())
    with torch.no_grad():  # equal logits: top-k takes the same two experts for every token
        model.model.layers[0].mlp.gate.weight.zero_()
    trainer = train(model, DATA, tmp_path, learning_rate=0.0)

    line = trainer.state.log_history[0]
    assert line["moe/layer_00/dead_experts"] == NUM_EXPERTS - 2
    assert line["moe/layer_00/load_max"] == 0.5
    assert line["moe/layer_00/entropy"] == pytest.approx(math.log(NUM_EXPERTS), rel=1e-6)


def test_tokens_per_second_counts_real_tokens(tmp_path):
    trainer = train(tiny_moe(), DATA, tmp_path, per_device_train_batch_size=8)
    line = trainer.state.log_history[0]

    assert line["moe/tokens_per_second"] * line["moe/step_time"] == pytest.approx(9 + 5 + 7 + 3 + 9 + 9 + 2 + 8)


def test_metrics_can_be_switched_off(tmp_path):
    trainer = train(tiny_moe(), DATA, tmp_path, routing_metrics=False)

    assert logged(trainer, "moe/lm_loss") and not logged(trainer, "moe/mean_k")
    assert not (tmp_path / HISTORY_NAME).exists()


@pytest.mark.parametrize("per_expert", [False, True], ids=["layers", "experts"])
@pytest.mark.parametrize(("layers", "experts"), [(2, 6), (61, 256), (200, 8), (1, 5000)])
@pytest.mark.parametrize("limit", [32, 256])
def test_number_of_series_is_bounded(layers, experts, limit, per_expert):
    counts = {str(layer): experts for layer in range(layers)}
    plan = SeriesPlan.make(counts, limit, per_expert)
    metrics = RoutingMetrics()
    metrics.load_state_dict(
        {f"counts.{key}": torch.ones(experts, dtype=torch.int64) for key in counts}
        | {f"moments.{key}": torch.ones(3, dtype=torch.float64) for key in counts}
    )
    losses_and_speed = 14

    series = plan.series(metrics.read())
    assert len(series) + losses_and_speed <= limit
    assert plan.layers[0] == "0" and (len(plan.layers) < 2 or plan.layers[-1] == str(layers - 1))
    if per_expert:
        assert len(plan.experts["0"]) == min(experts, limit - 20 - 6)
    if 6 * layers + (layers * experts if per_expert else 0) <= limit - 16:
        assert len(plan.layers) == layers and all(len(ids) == experts for ids in plan.experts.values())


def test_reading_starts_anew():
    metrics = RoutingMetrics()
    with trace_routing(model := tiny_moe()) as contexts, torch.no_grad():
        model(DATA[0]["input_ids"][None])
    metrics.update(contexts)
    state = metrics.state_dict()

    first = metrics.read()
    assert first and metrics.read() == {}
    metrics.load_state_dict(state)
    assert metrics.read() == first


def test_a_line_that_was_cut_off_is_ignored_and_removed(tmp_path):
    for step in (1, 2, 3):
        append_history(tmp_path, {"step": step, "layers": {}})
    file = tmp_path / HISTORY_NAME
    file.write_text(file.read_text()[:-5])

    assert [line["step"] for line in read_history(tmp_path)] == [1, 2]
    rewind_history(tmp_path, 2)
    append_history(tmp_path, {"step": 3, "layers": {}})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_a_new_run_starts_a_new_history(tmp_path):
    train(tiny_moe(), DATA, tmp_path, max_steps=3)
    train(tiny_moe(), DATA, tmp_path, max_steps=2)

    assert [line["step"] for line in read_history(tmp_path)] == [1, 2]


def test_console_shows_no_single_layers(tmp_path, capsys):
    trainer = train(tiny_moe(), DATA, tmp_path)

    printed = capsys.readouterr().out
    assert "moe/mean_k" in printed and "layer_00" not in printed
    assert logged(trainer, "moe/layer_00/mean_k")


def test_nothing_is_left_on_the_model(tmp_path):
    model = tiny_moe()
    MoETrainer(model=model, args=arguments(tmp_path), train_dataset=DATA).train()

    assert model.moe_link.observers == [] and model.moe_link.step is None
