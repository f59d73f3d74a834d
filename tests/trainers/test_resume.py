"""Checkpoints: training goes on bit for bit, and none is ever half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from hf_moe_ext import MoETrainer, TopKRouterConfig
from hf_moe_ext.trainers import read_history
from hf_moe_ext.trainers.checkpoints import checkpoint_problem, last_complete_checkpoint

from .common import arguments, rows, snapshot, tiny_moe


DATA = rows([9, 5, 7, 3, 9, 9, 2, 8, 6, 9])
ROUTER = TopKRouterConfig(balance_coef=0.1, z_coef=0.1, jitter=0.2, correction_bias=True, bias_update_rate=0.01)
CLOCK = ("moe/step_time", "moe/tokens_per_second", "moe/model_tflops")


def make(folder: Path, seed: int = 0, **overrides) -> MoETrainer:
    options = {
        "max_steps": 6,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
        "weight_decay": 0.1,
    }
    model = tiny_moe(ROUTER, seed, attention_dropout=0.1)
    args = arguments(folder, **(options | overrides))
    return MoETrainer(model=model, args=args, train_dataset=DATA, eval_dataset=DATA)


def comparable(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in history if "loss" in line]


def assert_same_state(first: MoETrainer, second: MoETrainer) -> None:
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    one, other = first.optimizer.state_dict(), second.optimizer.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for number, state in one["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["state"][number][name])


@pytest.mark.parametrize(
    "options",
    [{}, {"train_experts": [0, 3]}, {"adaptive_balance": 0.2}],
    ids=["all", "some_experts", "adaptive_balance"],
)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same_folder", "new_folder"])
def test_resuming_is_bit_exact(tmp_path, elsewhere, options):
    """Dropout, jitter, router buffers, a checkpoint between two logs, and a crash after it."""
    whole = make(tmp_path / "a", **options)
    whole.train()

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    target = tmp_path / ("c" if elsewhere else "b")
    resumed = make(target, seed=7, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))

    assert_same_state(whole, resumed)
    assert comparable(whole.state.log_history) == comparable(resumed.state.log_history)
    assert len(comparable(whole.state.log_history)) == 3
    assert read_history(tmp_path / "a") == read_history(target)
    assert [line["step"] for line in read_history(target)] == [2, 4, 6]


def test_weights_are_those_of_the_checkpoint(tmp_path):
    """The model that resumes started from other weights, routers and experts included."""
    trainer = make(tmp_path, max_steps=3)
    trainer.train()
    resumed = make(tmp_path, seed=7, max_steps=3)
    resumed.train(resume_from_checkpoint=True)

    assert_same_state(trainer, resumed)


def test_checkpoint_loads_as_a_model(tmp_path):
    trainer = make(tmp_path, max_steps=3)
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")

    assert type(loaded) is type(trainer.model)
    for name, tensor in snapshot(trainer.model).items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_published_format_is_refused(tmp_path):
    """Resuming reads tensors by their names; a model saved for publishing has others for its experts."""
    trainer = make(tmp_path, max_steps=3)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "checkpoint-3")

    with pytest.raises(ValueError, match="lacks .* tensors of routers and experts"):
        make(tmp_path).train(resume_from_checkpoint=True)


class Failing(MoETrainer):
    """Fails late in the second checkpoint, when most of it is written."""

    error: BaseException

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step > 2:
            assert Path(output_dir, "model.safetensors").is_file()
            raise self.error
        super()._save_rng_state(output_dir)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full_disk", "ctrl_c"]
)
def test_failing_save_leaves_the_last_good_checkpoint(tmp_path, error):
    trainer = make(tmp_path, save_steps=2)
    trainer.__class__, trainer.error = Failing, error
    with pytest.raises(type(error)):
        trainer.train()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "routing_history.jsonl"]
    resumed = make(tmp_path, save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    whole = make(tmp_path / "whole", save_steps=2)
    whole.train()
    assert_same_state(whole, resumed)


def test_what_a_killed_save_leaves_is_never_taken_and_goes_away(tmp_path):
    trainer = make(tmp_path, max_steps=3)
    trainer.train()
    left = tmp_path / ".checkpoint_in_progress" / "checkpoint-6"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")

    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3")
    make(tmp_path).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-3", "checkpoint-6"]


KILLED = """
import os, signal, sys
from pathlib import Path

import torch
import transformers.modeling_utils as models

import hf_moe_ext.trainers.checkpoints as module
from hf_moe_ext import MoETrainer
from tests.trainers.test_resume import make

folder, last, owner, name = Path(sys.argv[1]), sys.argv[3], *sys.argv[2].split(".")
target = {"MoETrainer": MoETrainer, "os": os, "module": module, "torch": torch, "models": models}[owner]
original = getattr(target, name)


def until_then(*args, **kwargs):
    if (folder / f"checkpoint-{last}").is_dir():
        if owner in ("torch", "models"):  # half of a file is written
            original(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)


setattr(target, name, until_then)
make(folder, save_steps=2).train()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
@pytest.mark.parametrize(
    ("point", "last"),
    [
        ("models.safe_save_file", 2),  # half of the weights is written
        ("MoETrainer._save_optimizer_and_scheduler", 2),
        ("torch.save", 2),  # half of the optimizer's state
        ("MoETrainer._save_rng_state", 2),
        ("MoETrainer._state_dict", 2),
        ("os.rename", 2),  # all is written
        ("module.rotate_checkpoints", 4),  # and in its place
    ],
)
def test_a_process_that_is_killed_while_it_saves(point, last, tmp_path):
    """By a signal that it cannot see. What it had finished is resumed, and ends as a run that went through."""
    root = Path(__file__).resolve().parents[2]
    folder = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), point, str(last)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert get_last_checkpoint(str(folder)) == str(folder / f"checkpoint-{last}")
    resumed = make(folder, save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    whole = make(tmp_path / "whole", save_steps=2)
    whole.train()
    assert_same_state(whole, resumed)
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_rotation_and_best_model(tmp_path):
    options = {
        "save_steps": 1,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # the first checkpoint is the best one: the loss goes down
        "metric_for_best_model": "loss",
    }
    trainer = make(tmp_path, **options)
    trainer.train()

    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    best = tmp_path / f"checkpoint-{1 + losses.index(max(losses))}"
    assert trainer.state.best_model_checkpoint == str(best)
    written = json.loads((best / "trainer_state.json").read_text())
    assert written["best_model_checkpoint"] == str(best)
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == sorted({best.name, "checkpoint-6"})
    loaded = AutoModelForCausalLM.from_pretrained(best)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name


def test_the_same_step_can_be_saved_again(tmp_path):
    make(tmp_path, max_steps=3).train()
    (tmp_path / "checkpoint-3" / "old").touch()
    make(tmp_path, max_steps=3).train()

    assert not (tmp_path / "checkpoint-3" / "old").exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-3"]


def two_checkpoints(folder: Path, **options) -> MoETrainer:
    trainer = make(folder, save_steps=3, **options)
    trainer.train()
    return trainer


def cut_in_half(name: str):
    return lambda checkpoint: os.truncate(checkpoint / name, (checkpoint / name).stat().st_size // 2)


def only(name: str):
    def keep(checkpoint: Path) -> None:
        for path in checkpoint.iterdir():
            if path.name != name:
                path.unlink()

    return keep


DAMAGES = {
    "nothing_but_weights": (only("model.safetensors"), "trainer_state.json is missing"),
    "empty": (only(""), "trainer_state.json is missing"),
    "no_weights": (lambda checkpoint: (checkpoint / "model.safetensors").unlink(), "it has no weights"),
    "weights": (cut_in_half("model.safetensors"), "model.safetensors is cut off"),
    "header_of_weights": (lambda c: os.truncate(c / "model.safetensors", 5), "model.safetensors is cut off"),
    "zeros": (lambda c: (c / "model.safetensors").write_bytes(bytes(1000)), "model.safetensors is cut off"),
    "optimizer": (cut_in_half("optimizer.pt"), "optimizer.pt is cut off"),
    "random_state": (lambda checkpoint: os.truncate(checkpoint / "rng_state.pth", 0), "rng_state.pth is cut off"),
    "state": (cut_in_half("trainer_state.json"), "trainer_state.json is cut off"),
    "shard": (
        lambda checkpoint: (checkpoint / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}})
        ),
        "model-00002-of-00002.safetensors is missing",
    ),
    "index": (
        lambda checkpoint: (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"a"'),
        "model.safetensors.index.json is cut off",
    ),
    "sharded_optimizer": (
        lambda checkpoint: (checkpoint / "optimizer_shards").mkdir(),
        "optimizer_shards/settings.json is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, damage, caplog):
    """What the stock trainer leaves when it is killed: the folder with the highest number, half of it there."""
    whole = two_checkpoints(tmp_path)
    damaged = tmp_path / "checkpoint-6"
    assert checkpoint_problem(damaged) is None
    break_it, problem = DAMAGES[damage]
    break_it(damaged)

    assert get_last_checkpoint(str(tmp_path)) == str(damaged)
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level("WARNING"):
            assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    finally:
        transformers.utils.logging.disable_propagation()
    assert f"{damaged} is passed over, since it is not whole: {problem}" in caplog.text
    resumed = make(tmp_path, seed=7, save_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(whole, resumed)
    assert checkpoint_problem(damaged) is None  # written anew


def test_no_checkpoint_is_whole(tmp_path):
    two_checkpoints(tmp_path, max_steps=3)
    (tmp_path / "checkpoint-3" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* is whole.*checkpoint-3: it has no weights"):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_without_checkpoints_the_stock_trainer_answers(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None and last_complete_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_steps_are_compared_as_numbers(tmp_path):
    two_checkpoints(tmp_path, max_steps=3)
    os.rename(tmp_path / "checkpoint-3", tmp_path / "checkpoint-10")
    shutil.copytree(tmp_path / "checkpoint-10", tmp_path / "checkpoint-9")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_checkpoints_of_other_trainers_are_whole(tmp_path):
    """Adapters, one file of FSDP, folders of FSDP with their table of contents."""
    for number, name in enumerate(("adapter_model.safetensors", "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0")):
        checkpoint = tmp_path / f"checkpoint-{number}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text("{}")
        assert checkpoint_problem(checkpoint) == "it has no weights"
        if name.endswith("safetensors"):
            save_file({"a": torch.ones(3)}, checkpoint / name)
        elif name.endswith("bin"):
            torch.save({"a": torch.ones(3)}, checkpoint / name)
        else:
            (checkpoint / name).mkdir()
            (checkpoint / name / "__0_0.distcp").write_bytes(b"x")
            assert checkpoint_problem(checkpoint) == "pytorch_model_fsdp_0/.metadata is missing"
            (checkpoint / name / ".metadata").write_bytes(b"x")
        assert checkpoint_problem(checkpoint) is None
