"""The trainer with checkpointing, bf16, PEFT, loggers and several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from hf_moe_ext import MoETrainer, TopKRouterConfig, TopPRouterConfig

from .common import arguments, logged, rows, sgd, snapshot, tiny_moe, train


DATA = rows([9, 7, 9, 5])
ROUTER = TopPRouterConfig(threshold=0.5, balance_coef=0.2, entropy_coef=0.1)
CHECKPOINTING = (
    "gradient_checkpointing" if Version(transformers.__version__) < Version("5.23") else "activation_checkpointing"
)


# PEFT itself reads names that transformers 5.23 renamed.
PEFT_WARNING = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")


def test_checkpointing_gives_the_same_step(tmp_path):
    plain, saving = tiny_moe(ROUTER), tiny_moe(ROUTER)
    first = train(plain, DATA, tmp_path / "a", **sgd())
    second = train(saving, DATA, tmp_path / "b", **sgd(), **{CHECKPOINTING: True})

    after = snapshot(saving)
    for name, tensor in snapshot(plain).items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    for key in ("loss", "moe/loss_balance", "moe/entropy", "moe/layer_01/load_max"):
        assert logged(second, key) == pytest.approx(logged(first, key), rel=1e-6)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16(tmp_path, how):
    model = tiny_moe(ROUTER)
    if how == "weights":
        model = model.bfloat16()
    trainer = train(model, DATA, tmp_path, max_steps=3, bf16=how == "autocast")

    loss, entropy = logged(trainer, "loss"), logged(trainer, "moe/entropy")
    assert loss[-1] < loss[0] and all(0 < value < 1.8 for value in entropy)


@PEFT_WARNING
def test_peft_model(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny_moe(ROUTER), config)
    before = snapshot(model)
    trainer = train(model, DATA, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)

    for name, tensor in snapshot(model).items():
        assert torch.equal(before[name], tensor) == ("lora_" not in name), name
    line = trainer.state.log_history[0]
    assert line["moe/mean_k"] > 1 and line["moe/loss_balance"] > 0
    assert line["loss"] == pytest.approx(line["moe/lm_loss"] + line["moe/aux_loss"])
    assert trainer.parameter_report().routers == ()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()


@PEFT_WARNING
def test_peft_model_with_a_trained_router(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"], r=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_moe(ROUTER), config)
    before = snapshot(model)
    trainer = train(model, DATA, tmp_path, max_steps=1)

    changed = {name for name, tensor in snapshot(model).items() if not torch.equal(before[name], tensor)}
    assert any("gate.modules_to_save" in name for name in changed)
    assert not any("original_module" in name for name in changed)
    assert logged(trainer, "moe/mean_k")


def test_tensorboard_holds_our_series(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(tiny_moe(ROUTER), DATA, tmp_path, max_steps=2, report_to="tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()

    for name in ("moe/mean_k", "moe/loss_balance", "moe/lm_loss", "moe/layer_01/dead_experts"):
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx(logged(trainer, name), rel=1e-6)


def test_trackio_gets_our_series(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    received: list[dict] = []
    monkeypatch.setattr(trackio, "init", lambda **kwargs: None)
    monkeypatch.setattr(trackio, "config", {}, raising=False)
    monkeypatch.setattr(trackio, "log", received.append)
    monkeypatch.setattr(trackio, "finish", lambda: None)
    trainer = MoETrainer(model=tiny_moe(ROUTER), args=arguments(tmp_path, report_to="trackio"), train_dataset=DATA)
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TrackioCallback":
            callback._initialized = True
    trainer.train()

    assert received[0]["train/moe/mean_k"] == logged(trainer, "moe/mean_k")[0]


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from tests.trainers.common import rows, tiny_moe, train, sgd
from hf_moe_ext import TopKRouterConfig

folder, size = Path(sys.argv[1]), int(sys.argv[2])
router = TopKRouterConfig(z_coef=0.1, entropy_coef=0.1, correction_bias=True, bias_update_rate=0.1)
model = tiny_moe(router)
options = sgd(max_steps=2, learning_rate=0.1, save_strategy="steps", save_steps=2)
trainer = train(model, rows([9] * 8), folder, per_device_train_batch_size=size, **options)
if trainer.is_world_process_zero():
    torch.save(model.state_dict(), folder / "weights.pt")
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
"""


@pytest.mark.multi_process
def test_two_processes_equal_one(tmp_path):
    """Losses, metrics, weights and router biases of two processes are those of one with the same batch."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, command in (
        ("one", [str(script), str(tmp_path / "one"), "4"]),
        ("two", [*launch, str(script), str(tmp_path / "two"), "2"]),
    ):
        process = subprocess.run(
            [sys.executable, *command], env=environment, cwd=root, capture_output=True, text=True, timeout=240
        )
        assert process.returncode == 0, f"{name}: {process.stderr[-3000:]}"

    logs = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        for key in one:
            if key == "loss" or (
                key.startswith("moe/") and "step_time" not in key and "per_second" not in key and "tflops" not in key
            ):
                assert two[key] == pytest.approx(one[key], rel=1e-5), key
    weights = [torch.load(tmp_path / name / "weights.pt") for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], atol=1e-5, rtol=1e-5, msg=name)
    history = [(tmp_path / name / "routing_history.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(history[0]) == len(history[1]) == 2
    assert [path.name for path in (tmp_path / "two").glob("*checkpoint*")] == ["checkpoint-2"]


def test_lazy_import():
    """The package of trainers is imported without the stock trainer."""
    code = "import sys, hf_moe_ext.trainers as t; print('MoETrainer' in dir(t), 'transformers.trainer' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)

    assert done.stdout.strip() == "True False", done.stderr


def test_router_without_losses_and_metrics_of_top_k(tmp_path):
    trainer = train(tiny_moe(TopKRouterConfig()), DATA, tmp_path)
    line = trainer.state.log_history[0]

    assert line["moe/mean_k"] == 2.0 and "moe/aux_loss" not in line and line["moe/lm_loss"] == line["loss"]
