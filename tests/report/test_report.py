"""The pictures of a run: what they are made of, what they say, and what happens when files are missing."""

import base64
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import hf_moe_ext
from hf_moe_ext import _imports
from hf_moe_ext.reporting import report
from hf_moe_ext.reporting.reading import Domain, read_run


ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def layer(load, entropy=1.0, mean_k=1.5, **more):
    return {"load": load, "entropy": entropy, "mean_k": mean_k, **more}


def write_run(folder, *, steps=(10, 20, 30), layers=3, experts=4):
    folder.mkdir(parents=True, exist_ok=True)
    history = [{"loss": 3.0 - step / 30, "step": step, "learning_rate": 1e-4} for step in steps]
    history += [{"eval_loss": 2.9, "step": steps[0]}, {"eval_python_loss": 2.5, "step": steps[-1]}]
    (folder / "trainer_state.json").write_text(
        json.dumps({"log_history": [*history, {"train_loss": 2.5, "step": 30}]})
    )
    even = [1 / experts] * experts
    skewed = [0.0, 2 / experts, *even[2:]]
    lines = [
        {"step": step, "layers": {str(i): layer(skewed if i == 1 else even, 1.2 - step / 60) for i in range(layers)}}
        for step in steps
    ]
    (folder / "routing_history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_domains(folder, name="evaluation.json"):
    domains = [
        {"name": "prose", "dense": 30.0, "upcycled": 30.0, "trained": 25.0, "mean_k": 1.8},
        {"name": "maths <b>", "dense": 12.0, "trained": 12.5},
    ]
    (folder / name).write_text(json.dumps({"domains": domains}))


class Page(HTMLParser):
    """What a browser and a screen reader would find."""

    def __init__(self, text):
        super().__init__()
        self.images, self.tags, self.references = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.references += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)


def test_a_report_has_pictures_and_one_page(tmp_path):
    run = write_run(tmp_path / "run")
    write_domains(run)
    paths = report(run)

    names = ["perplexity.png", "loss.png", "routing_load.png", "routing_depth.png", "routing_over_training.png"]
    assert [path.name for path in paths] == [*names, "report.html"]
    assert {path.parent for path in paths} == {run / "report"} and sorted(os.listdir(run / "report")) == sorted(
        path.name for path in paths
    )
    assert all(path.read_bytes().startswith(PNG) for path in paths[:-1])

    text = paths[-1].read_text()
    page = Page(text)
    assert len(page.images) == 5 and page.references == [image["src"] for image in page.images]
    for image, path in zip(page.images, paths[:-1], strict=True):
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == path.read_bytes()
        assert len(image["alt"]) > 40
    assert "prefers-color-scheme: dark" in text and '<html lang="en">' in text
    assert not re.search(r"https?://", re.sub(r"base64,[^\"]*", "", text))
    assert page.tags.count("table") == 2 and "maths &lt;b&gt;" in text and "<b>" not in text
    assert "3 experts without any token" not in text and "1 experts without any token" in text


def test_the_page_says_what_the_pictures_show(tmp_path):
    run = write_run(tmp_path / "run")
    text = report(run)[-1].read_text()

    assert "Heat map of 3 layers by up to 4 experts at step 30" in text
    assert "The fullest expert gets 2.00 times an even share; 1 experts get no token." in text
    assert "training loss from 2.667 to 2.000" in text and "held-out, python loss from 2.500 to 2.500" in text
    assert "From step 10 to 30: experts per token from 1.50 to 1.50" in text
    assert "<td>1.50</td><td>0.700</td><td>2.00</td><td>1</td>" in text


def test_equal_data_gives_equal_files(tmp_path):
    first, second = (report(write_run(tmp_path / name / "run")) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_chosen_folder_and_a_trainer(tmp_path):
    run = write_run(tmp_path / "run")
    trainer = type("Trainer", (), {"args": type("Arguments", (), {"output_dir": str(run)})})
    paths = report(trainer, tmp_path / "elsewhere" / "pictures")

    assert {path.parent for path in paths} == {tmp_path / "elsewhere" / "pictures"}
    assert "report" not in os.listdir(run)
    assert report(run, tmp_path / "elsewhere" / "pictures") == paths


@pytest.mark.parametrize(
    ("steps", "layers", "experts"),
    [((5,), 1, 2), ((1, 2), 48, 8), (tuple(range(1, 90)), 2, 128), ((1, 2), 3, 1)],
    ids=["one", "deep", "wide", "single_expert"],
)
def test_small_and_large_runs(tmp_path, steps, layers, experts):
    paths = report(write_run(tmp_path / "run", steps=steps, layers=layers, experts=experts))
    assert ("routing_over_training.png" in {path.name for path in paths}) == (len(steps) > 1)
    assert max(path.stat().st_size for path in paths[:-1]) < 600_000


def test_layers_may_have_different_experts(tmp_path):
    run = write_run(tmp_path / "run")
    layers = {"encoder.0": layer([0.5, 0.5]), "encoder.1": layer([0.1] * 10), "decoder.0": layer([1.0, 0, 0])}
    (run / "routing_history.jsonl").write_text(json.dumps({"step": 1, "layers": layers}))

    loaded = read_run(run).routing[0].layers
    assert [entry.dead for entry in loaded.values()] == [0, 0, 2]
    assert loaded["decoder.0"].relative_load == (3.0, 0.0, 0.0)
    assert "up to 10 experts" in report(run)[-1].read_text()


def test_a_resumed_run_counts_its_later_lines(tmp_path):
    run = write_run(tmp_path / "run", steps=(10, 20))
    with (run / "routing_history.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "layers": {"0": layer([1.0], mean_k=9)}}) + "\n")
    routing = read_run(run).routing
    assert [entry.step for entry in routing] == [10, 20] and routing[1].layers["0"].mean_k == 9


def test_an_unfinished_last_line_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", steps=(10, 20))
    path = run / "routing_history.jsonl"
    path.write_text(path.read_text()[:-30])
    assert [entry.step for entry in read_run(run).routing] == [10]


def test_losses_of_the_newest_checkpoint(tmp_path):
    run = write_run(tmp_path / "run")
    for step in (5, 10):
        state = {"log_history": [{"loss": 1.0, "step": i} for i in range(step)]}
        (run / f"checkpoint-{step}").mkdir()
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (run / "trainer_state.json").unlink()
    assert len(read_run(run).losses["loss"]) == 10


def test_losses_that_are_no_numbers_are_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    history = [{"loss": math.nan, "step": 1}, {"loss": 2.0, "step": 2}, {"train_loss": 2.0, "step": 2}]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert read_run(run).losses == {"loss": [(2, 2.0)]}


def test_the_loss_without_auxiliary_losses_is_shown_where_it_differs(tmp_path):
    run = write_run(tmp_path / "run")
    for lm_loss, keys in ((3.0, {"loss"}), (2.9, {"loss", "moe/lm_loss"})):
        history = [{"loss": 3.0, "moe/lm_loss": lm_loss, "step": 1}]
        (run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        assert set(read_run(run).losses) == keys
    assert "training without auxiliary loss from 2.900 to 2.900" in report(run)[-1].read_text()


@pytest.mark.parametrize("name", ["evaluation.json", "demo.json"])
def test_domains(tmp_path, name):
    run = write_run(tmp_path / "run")
    write_domains(run, name)
    assert read_run(run).domains == [
        Domain("prose", 30.0, 30.0, 25.0, 1.8),
        Domain("maths <b>", 12.0, None, 12.5, None),
    ]


STATE, ROUTING = "trainer_state.json", "routing_history.jsonl"


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        (
            STATE,
            None,
            FileNotFoundError,
            r"trainer_state.json` does not exist. It is written by `trainer.save_state\(\)`",
        ),
        (STATE, "", ValueError, "trainer_state.json` is empty"),
        (STATE, "{", ValueError, "trainer_state.json` is damaged, it is not JSON"),
        (STATE, "{}", ValueError, "has no 'log_history'"),
        (STATE, '{"log_history": 1}', ValueError, "`log_history` must be a list"),
        (STATE, '{"log_history": []}', ValueError, "logs no loss. Train at least one logging step"),
        (ROUTING, None, FileNotFoundError, "routing_history.jsonl` does not exist. It is written by `MoETrainer`"),
        (ROUTING, " \n", ValueError, "is empty: the run ended before its first logging step"),
        (ROUTING, "junk\n{}\n", ValueError, "routing_history.jsonl`, line 1, is damaged, it is not JSON"),
        (ROUTING, "junk", ValueError, "line 1, is damaged"),
        (ROUTING, '{"step": 1}', ValueError, "line 1, has no 'layers'"),
        (ROUTING, '{"step": 1, "layers": {}}', ValueError, "line 1, .*`layers` is empty"),
        (ROUTING, '{"step": 1, "layers": {"0": {"load": []}}}', ValueError, "one non-negative share per expert"),
        (ROUTING, '{"step": 1, "layers": {"0": {"load": [1]}}}', ValueError, "line 1, has no 'entropy'"),
        (ROUTING, '{"step": 1, "layers": [1]}', ValueError, "line 1, holds something unexpected"),
        ("evaluation.json", "[]", ValueError, "evaluation.json` holds something unexpected"),
        ("evaluation.json", '{"domains": [{}]}', ValueError, "evaluation.json` has no 'name'"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_missing_and_damaged_files_are_named(tmp_path, name, content, error, message):
    run = write_run(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    if content is not None:
        (run / name).write_text(content)
    with pytest.raises(error, match=message):
        report(run)
    assert "report" not in os.listdir(run)


def test_what_is_no_training_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder; a report is made from the output folder"):
        report(tmp_path / "nothing")
    with pytest.raises(TypeError, match="a training output folder or a trainer, got int"):
        report(7)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="a file of that name exists"):
        report(write_run(tmp_path / "run"), tmp_path / "file")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(_imports, "_installed_version", lambda name: None)
    with pytest.raises(ImportError, match=r"Drawing a report needs `matplotlib.*pip install \"hf-moe-ext\[plot\]\""):
        report(write_run(tmp_path / "run"))


def test_the_public_name_is_the_function():
    assert hf_moe_ext.report is report


def test_matplotlib_is_imported_late():
    code = "import sys, hf_moe_ext.reporting, hf_moe_ext.hub; print('matplotlib' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "False"
