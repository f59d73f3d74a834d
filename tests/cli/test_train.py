"""`hf-moe train`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_moe_ext.cli import train
from tests.cli.conftest import change_config, tree


ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--length", "32", "--per_device_train_batch_size", "2", "--use_cpu", "--logging_steps", "1", "--disable_tqdm")
QUICK = (*QUICK, "--learning_rate", "1e-2")


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i} of many, all alike. " * 3}) + "\n" for i in range(20)))
    return path


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_train(hf_moe, saved, tmp_path, book, rows):
    model, run = saved("extended"), tmp_path / "run"
    result = hf_moe("train", model, run, "--data", book, rows, "--eval-data", rows, "--max_steps", "3", *QUICK)
    assert result.code == 0, result.err
    assert "train: book: 55 windows of 32 tokens" in result.out and "held out: rows: " in result.out
    for name in ("model", "checkpoint-3", "trainer_state.json"):
        assert f"wrote {run / name}" in result.out and (run / name).exists()
    before, after = result.out.rpartition("-\nrows ")[2].split()[:2]
    assert float(after) < float(before)
    assert AutoConfig.from_pretrained(run / "model").moe_ext["router"]["type"] == "top_p"
    assert AutoTokenizer.from_pretrained(run / "model").chat_template
    card = (run / "model" / "README.md").read_text()
    assert "rows" in card
    changed = [
        name for name, tensor in weights(model).items() if not torch.equal(tensor, weights(run / "model")[name])
    ]
    assert changed

    # The folder is what `report` and `export` take.
    pytest.importorskip("matplotlib")
    result = hf_moe("report", run)
    assert result.code == 0 and f"wrote {run / 'report' / 'report.html'}" in result.out
    assert hf_moe("generate", run / "model", "row", "--max_new_tokens", "3").code == 0


def test_a_stock_model_stays_stock(hf_moe, saved, tmp_path, book):
    stock = saved("stock")
    config = tmp_path / "run.yaml"
    config.write_text(f"data: [{book}]\nmax_steps: 2\nsave_strategy: 'no'\ntrain_only_moe: true\n")
    result = hf_moe("train", stock, tmp_path / "run", "--config", config, *QUICK)
    assert result.code == 0, result.err
    assert AutoConfig.from_pretrained(tmp_path / "run" / "model").model_type == "mixtral"
    assert not list((tmp_path / "run" / "model").glob("*.py"))
    old, new = weights(stock), weights(tmp_path / "run" / "model")
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert "model.embed_tokens.weight" in same and "model.layers.0.mlp.experts.down_proj" not in same


@pytest.mark.parametrize("options", [("--logging_steps", "10"), ("--logging_strategy", "no")])
def test_a_run_shorter_than_its_logging(hf_moe, saved, tmp_path, book, options):
    words = ("train", saved("extended"), tmp_path / "run", "--data", book, "--max_steps", "2")
    result = hf_moe(*words, *QUICK, *options)
    assert result.code == 0, result.err
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_a_stock_model_with_another_router(hf_moe, saved, tmp_path, book):
    options = ("--router", "top_p:threshold=0.3", "--max_steps", "1", "--freeze_router", "--train_experts", "0", "2")
    result = hf_moe("train", saved("stock"), tmp_path / "run", "--data", book, *options, *QUICK)
    assert result.code == 0, result.err
    assert AutoConfig.from_pretrained(tmp_path / "run" / "model").moe_ext["router"]["threshold"] == 0.3


def test_domains(hf_moe, saved, tmp_path):
    options = ("--data", "domain:prose", "--eval_data", "domain:prose", "--limit", "4", "--eval_limit", "2")
    result = hf_moe("train", saved("extended"), tmp_path / "run", *options, "--dry-run", *QUICK)
    assert result.code == 0, result.err
    assert "train: prose: 4 windows" in result.out and "held out: prose: 2 windows" in result.out


def test_dry_run(hf_moe, saved, tmp_path, book):
    saved("extended")
    before = tree(tmp_path)
    options = ("--data", book, "--num_train_epochs", "2", "--dry_run")
    result = hf_moe("train", tmp_path / "extended", tmp_path / "run", *options, *QUICK)
    assert result.code == 0, result.err
    assert "56 steps of 2 windows" in result.out and "dry run" in result.out
    assert tree(tmp_path) == before and not (tmp_path / "run").exists()


def test_resume(hf_moe, saved, tmp_path, book):
    """Four steps at once, and two and two, give the same model."""
    words = ("train", saved("extended"), tmp_path / "run", "--data", book, "--save_steps", "2", *QUICK)
    words = (*words, "--lr_scheduler_type", "constant")
    assert hf_moe(*words, "--max_steps", "4").code == 0
    whole = weights(tmp_path / "run" / "model")
    refused = hf_moe(*words, "--max_steps", "4")
    assert refused.code == 1 and "already holds a run (model)" in refused.err and "`--resume`" in refused.err

    assert hf_moe(*words, "--max_steps", "2", "--overwrite").code == 0
    assert not (tmp_path / "run" / "checkpoint-4").exists()
    result = hf_moe(*words, "--max_steps", "4", "--resume")
    assert result.code == 0, result.err
    resumed = weights(tmp_path / "run" / "model")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_data_files_of_one_name(tmp_path, saved):
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):
        (folder / "a.txt").write_text("some text " * 30)
    tokenizer = AutoTokenizer.from_pretrained(saved("dense"))
    sources = [train.find_source(str(folder / "a.txt")) for folder in (tmp_path, tmp_path / "other")]
    assert list(train.windows(sources, "train", tokenizer, 32, None)) == ["a", "a_2"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "missing: `--data`, such as"),
        (("--data", "nowhere.txt"), 1, "there is no data file nowhere.txt"),
        (("--data", "python"), 1, "Did you mean `domain:python`?"),
        (("--data", "domain:pyhton"), 1, "unknown domain `pyhton`"),
        (("--data", "."), 1, ". is a folder; name the files in it"),
        (("--data", "BOOK", "--eval_strategy", "steps"), 2, "`--eval_strategy` needs `--eval_data`"),
        (("--data", "BOOK", "--resume"), 1, "holds no checkpoint to resume from"),
        (("--data", "BOOK", "--resume", "--overwrite"), 2, "pass one of them"),
        (("--data", "BOOK", "--length", "1"), 2, "`--length` must be at least 2"),
        (("--data", "BOOK", "--length", "65"), 1, "the model takes at most 64 tokens"),
        (("--data", "BOOK", "--limit", "0"), 2, "`--limit` must be at least 1"),
        (("--data", "BOOK", "--push_to_hub"), 2, "hf-moe export"),
        (("--data", "BOOK", "--router", "top_p"), 1, "has declared routers already"),
        (("--data", "BOOK", "--train_experts", "99"), 1, "99"),
        (("--data", "BOOK", "--train_experts", "-1"), 2, "numbers from 0 on, got -1"),
        (("--data", "BOOK", "--routing_metrics_max_series", "1"), 2, "at least 32, got 1"),
        (("--data", "SHORT"), 1, "which do not fill one window of 64. Pass a smaller `--length`"),
        (("--data", "BYTES"), 1, "is no text in UTF-8"),
        (("--data", "ROWS"), 1, 'must be an object with "text"'),
        (("--data", "LINES"), 1, "line 2 of"),
    ],
)
def test_refusals(hf_moe, saved, tmp_path, book, options, code, message):
    files = {"BOOK": book, **{name: tmp_path / f"{name}.jsonl" for name in ("BYTES", "ROWS", "LINES")}}
    files["SHORT"] = tmp_path / "short.txt"
    files["SHORT"].write_text("few words")
    files["BYTES"].write_bytes(b"\xff\xfe\xfa")
    files["ROWS"].write_text('{"prompt": "x"}\n')
    files["LINES"].write_text('{"text": "x"}\n{"text": \n')
    saved("extended")
    before = tree(tmp_path)
    words = [files.get(word, word) for word in options]
    result = hf_moe("train", tmp_path / "extended", tmp_path / "run", "--use_cpu", *words)
    assert result.code == code and message in result.err
    assert tree(tmp_path) == before and not (tmp_path / "run").exists()


def test_no_output_folder(hf_moe, saved, book):
    result = hf_moe("train", saved("extended"), "--data", book)
    assert result.code == 2 and "missing: OUTPUT_DIR" in result.err


def test_a_model_folder_as_output(hf_moe, saved, book):
    folder = saved("extended")
    before = tree(folder)
    result = hf_moe("train", folder, folder, "--data", book, "--overwrite", *QUICK)
    assert result.code == 1 and "is a model folder itself" in result.err and tree(folder) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dense", "is a dense model (llama) without routers. `hf-moe upcycle"),
        ("bert", "is a dense model (bert)"),
        ("unsupported", "the architecture `distilbert` of"),
    ],
)
def test_models_without_experts(hf_moe, saved, tmp_path, book, name, message):
    result = hf_moe("train", saved(name), tmp_path / "run", "--data", book, *QUICK)
    assert result.code == 1 and message in result.err and not (tmp_path / "run").exists()


def test_no_tokenizer(hf_moe, saved, tmp_path, book):
    folder = saved("extended")
    for path in folder.glob("tok*"):
        path.unlink()
    result = hf_moe("train", folder, tmp_path / "run", "--data", book, *QUICK)
    assert result.code == 1 and "holds no tokenizer. `--tokenizer` takes" in result.err


def test_a_tokenizer_of_another_model(hf_moe, saved, tmp_path, book):
    folder = saved("extended")
    change_config(folder, vocab_size=100)
    result = hf_moe("train", folder, tmp_path / "run", "--data", book, *QUICK)
    assert result.code == 1 and "but the model knows 100. Pass the model's own with `--tokenizer`" in result.err


class _Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_ctrl_c_during_training(hf_moe, saved, tmp_path, book, monkeypatch):
    from hf_moe_ext.trainers import MoETrainer

    original = MoETrainer.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(_Interrupt())

    words = ("train", saved("extended"), tmp_path / "run", "--data", book, "--max_steps", "5", *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(MoETrainer, "__init__", patched)
        result = hf_moe(*words, "--save_steps", "2")
        assert result.code == 130 and "interrupted" in result.err
        assert f"with `--resume` goes on from {tmp_path / 'run' / 'checkpoint-2'}" in result.err
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2", "routing_history.jsonl"]
        assert hf_moe(*words, "--overwrite").code == 130
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["routing_history.jsonl"]
    assert hf_moe(*words, "--save_steps", "2").code == 0


def _failing_save(error):
    """Write half a file, then fail."""

    def save(tensors, filename, *args, **kwargs):
        Path(filename).write_bytes(b"half")
        raise error

    return save


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(KeyboardInterrupt(), 130, "interrupted"), (OSError(28, "No space left on device"), 1, "the disk is full")],
    ids=["ctrl-c", "full disk"],
)
@pytest.mark.parametrize("strategy", ["steps", "no"], ids=["checkpoint", "final model"])
def test_a_save_that_fails(hf_moe, saved, tmp_path, book, monkeypatch, error, code, message, strategy):
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", _failing_save(error))
    words = ("train", saved("extended"), tmp_path / "run", "--data", book, "--max_steps", "1", *QUICK)
    result = hf_moe(*words, "--save_strategy", strategy)
    assert result.code == code and message in result.err
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"routing_history.jsonl"} | ({"trainer_state.json"} if strategy == "no" else set())


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_real_ctrl_c(saved, tmp_path, book):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "hf_moe_ext.cli.main", "train", str(saved("extended")), str(run)]
    command += ["--data", str(book), "--max_steps", "100000", "--save_steps", "5", "--save_total_limit", "2", *QUICK]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoint-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "with `--resume` goes on from" in err
    names = {path.name.partition("-")[0] for path in run.iterdir()}
    assert names == {"checkpoint", "routing_history.jsonl"}
