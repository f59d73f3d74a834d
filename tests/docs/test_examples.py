"""The examples run as their docstrings say."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import yaml

from tests.docs.pages import ROOT


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(example: str, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / example), "--smoke", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_extend_mixtral():
    output = run("extend_mixtral.py")
    rows = {name: float(k) for name, k in re.findall(r"^(\S.*?\S)\s{2,}([\d.]+)\s", output, re.M)}
    assert rows["stock gate"] == 2 and rows["one expert"] == 1
    assert rows["top-p 0.2"] < rows["top-p 0.4"] < rows["top-p 0.6"]
    assert "bit for bit" in output


def test_upcycle_and_train(tmp_path):
    output = run("upcycle_and_train.py", "--output_dir", str(tmp_path / "out"))
    scores = {name: float(value) for name, value in re.findall(r"(dense|upcycled|trained) ([\d.]+)", output)}
    assert scores["upcycled"] == pytest.approx(scores["dense"], rel=1e-3)
    assert scores["trained"] < scores["dense"]
    assert "preserves the dense function" in output
    for name in ("config.json", "model.safetensors", "modeling_moe_ext.py", "README.md"):
        assert (tmp_path / "out" / "model" / name).is_file()


def test_train_moe(tmp_path):
    output = run("train_moe.py", "--output_dir", str(tmp_path), "--report_to", "none")
    before, after = map(float, re.search(r"prose: held-out perplexity ([\d.]+) -> ([\d.]+)", output).groups())
    assert after < before / 2
    for name in ("evaluation.json", "trainer_state.json", "routing_history.jsonl", "model/modeling_moe_ext.py"):
        assert (tmp_path / name).is_file()
    if importlib.util.find_spec("matplotlib"):
        assert "loss.png" in {path.name for path in (tmp_path / "report").iterdir()}


def test_train_moe_from_a_file_in_two_processes(tmp_path):
    """Text and router of one's own; the command line wins over the file."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {number} of a text that is easy to learn.\n" for number in range(300)))
    config = {
        "domains": [],
        "text_files": [str(text)],
        "router": {"type": "top_p", "threshold": 0.6},
        "length": 32,
        "held_out": 4,
        "max_steps": 9,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    script = str(ROOT / "examples" / "train_moe.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command = [*launch, str(file), "--max_steps", "3", "--router", '{"type": "top_p", "threshold": 0.7}']
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("text.txt: held-out perplexity") == 1
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    extension = json.loads((tmp_path / "out" / "model" / "config.json").read_text())["moe_ext"]
    assert extension["router"] == {"type": "top_p", "threshold": 0.7}
    file.write_text(yaml.safe_dump({"learningrate": 1.0}))
    done = subprocess.run([sys.executable, script, str(file)], capture_output=True, text=True, env=environment)
    assert done.returncode and "`learningrate` is no option of this script" in done.stderr


def test_train_moe_knows_what_it_is_given(tmp_path, monkeypatch):
    """Its own file; and a dense model, a stock Mixture-of-Experts and an extended one."""
    from tiny_models import tiny_model

    from hf_moe_ext.data import byte_tokenizer

    script = runpy.run_path(str(ROOT / "examples" / "train_moe.py"))
    monkeypatch.chdir(tmp_path)
    args, training = script["parse"]([str(ROOT / "examples" / "train_moe.yaml"), "--max_steps", "7", "--use_cpu"])
    assert args.domains == ["python", "prose"] and args.router["z_coef"] == 0.001
    assert training.max_steps == 7 and training.learning_rate == 2e-4
    found = {}
    for name, source in (("dense", tiny_model("llama")), ("stock", tiny_model("mixtral")), ("extended", None)):
        folder = tmp_path / name
        source = found["stock"] if source is None else source
        source.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        options = ["--model", str(folder), "--router", "top_p", "--method", "split", "--layers", "all"]
        options += ["--method_options", '{"split_by": "kmeans"}', "--output_dir", str(tmp_path), "--use_cpu"]
        found[name], _ = script["make_model"](script["parse"](options)[0], 0)
    assert found["dense"].upcycle_report.to_dict()["method"] == "split"
    assert [found[name].config.moe_ext["router"] for name in found] == [{"type": "top_p"}] * 3
    assert found["extended"].config.model_type == "moe_ext_mixtral"


def test_mixture_of_students(tmp_path):
    output = run("mixture_of_students.py", "--output_dir", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    kinds = [(row["start"], row["distillation"]) for row in results["students"]]
    assert kinds == [(start, kind) for start in ("teacher", "random") for kind in ("none", "staged", "full")]
    losses = [row["loss"] for row in results["students"]]
    assert len(set(losses)) == 6 and max(losses) < 5.6  # below log(256)
    assert all(f"| {start} | {kind} |" in output for start, kind in kinds)


def test_router_shootout(tmp_path):
    output = run("router_shootout.py", "--output_dir", str(tmp_path))
    rows = re.findall(r"^\| ([\w -]+) \| ([\d.]+) ± ", output, re.M)
    losses = {name: float(loss) for name, loss in rows}
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(losses) == len(results) > 20
    assert all(losses[result["name"]] == pytest.approx(result["loss"], abs=1e-3) for result in results)
    assert max(losses.values()) < 5.6  # below log(256): even two steps learn something
    assert (tmp_path / "router_shootout.png").stat().st_size > 1000
    again = run("router_shootout.py", "--output_dir", str(tmp_path))  # nothing is left to do
    assert re.findall(r"^\| ([\w -]+) \| ([\d.]+) ± ", again, re.M) == rows


def test_bam_specialists(tmp_path):
    output = run("bam_specialists.py", "--output_dir", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())["rows"]
    after = {row["model"]: row["after"] for row in results if "after" in row}
    assert list(after) == [
        "dense seed",
        "dense mean",
        "sparse upcycling",
        "BTX",
        "BAM, shared keys",
        "BAM, own keys",
        "BAM, the paper's routing",
    ]
    for row in results:
        if "after" in row:  # training helps on every domain
            assert all(row["after"][name] < row["before"][name] for name in row["before"])
    sparse = next(row for row in results if row["model"] == "sparse upcycling")
    seed = next(row for row in results if row["model"] == "seed")
    for name, value in seed["before"].items():  # copies keep the function
        assert sparse["before"][name] == pytest.approx(value, rel=1e-3)
    assert "| BAM, own keys | " in output and (tmp_path / "table.md").is_file()


def test_read_me_smollm(tmp_path):
    output = run("read_me_smollm.py", "--output_dir", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    scores = {row["model"]: row["perplexity"] for row in results["rows"]}
    assert len(scores) == 6 and all(f"| {name} | " in output for name in scores)
    active = {row["model"]: row["active"] for row in results["rows"]}
    assert active["Read-ME, tuned"] < active["dense"] * 1.3
    for name in ("one half of it", "Read-ME"):
        after = "one half of it, tuned" if name.startswith("one") else "Read-ME, tuned"
        before = name if name.startswith("one") else "Read-ME, router distilled"
        assert all(scores[after][domain] < scores[before][domain] for domain in ("python", "maths", "prose"))
    assert [row["phase"] for row in results["history"]] == ["router", *["router", "experts"] * 2]
    rates = results["routing"]["tuned"]["cache"]
    assert all(rates["belady"][size] >= max(rates["lru"][size], rates["random"][size]) for size in ("1", "2"))


def test_dense_baselines(tmp_path):
    """Step 0 in the order of the methods: copies and slices are the dense model, shares and new neurons are not."""
    run("dense_baselines.py", "--output_dir", str(tmp_path))
    rows = {row["model"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    start = {name: row["before"] for name, row in rows.items()}
    assert start["copies"] == pytest.approx(start["dense"], rel=1e-4)
    assert start["slices of copies"] == pytest.approx(start["dense"], rel=1e-4)
    assert start["dense"] < start["2 of 4 shares"] < start["all redrawn"]
    assert start["dense"] < start["half redrawn"] < start["all redrawn"]
    assert all(row["after"] < row["before"] for row in rows.values())
    assert rows["copies"]["similarity"] == pytest.approx(1) and rows["copies"]["course"][-1]["similarity"] < 1
    assert rows["half redrawn"]["similarity"] < 0.5 and abs(rows["all redrawn"]["similarity"]) < 0.05


def test_split_smollm(tmp_path):
    run("split_smollm.py", "--output_dir", str(tmp_path))
    dense, *rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows[::2]] == ["random", "kmeans", "coactivation", "gradient"]
    for exact, cut in zip(rows[::2], rows[1::2], strict=True):
        assert exact["active"] > cut["active"]
        for name, value in dense["before"].items():
            assert exact["before"][name] == pytest.approx(value, rel=1e-4)  # all experts: the dense function
            assert cut["after"][name] < cut["before"][name]


def test_open_knowledge(tmp_path):
    pytest.importorskip("peft")
    output = run("open_knowledge.py", "--output_dir", str(tmp_path))
    base, *rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["mixture"] for row in rows][:2] == ["chosen", "best single"] and rows[-1]["mixture"] == "whole bank"
    assert len(rows[0]["adapters"].split(", ")) == 2
    assert all(row["before"] < base["before"] and row["after"] < base["before"] for row in rows)
    assert "Adapters trained" in output and (tmp_path / "bank" / "prose" / "adapter_model.safetensors").is_file()


def test_monet_small(tmp_path):
    output = run("monet_small.py", "--output_dir", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(loss < 5.5 for loss in results["loss"].values())  # below log(256): something was learned
    assert all(len(counts) == 2 for counts in results["experts"].values())
    for name, counts in results["experts"].items():  # removing nothing changes nothing
        assert sum(counts) > 0 or all(rise == 0 for rise in results["rise"][name].values())
    assert "| those of prose | " in output and (tmp_path / "experts.png").stat().st_size > 1000


def test_moduleformer_modules(tmp_path):
    """What the paper claims of its modules, at the smallest size: each direction, with room."""
    run("moduleformer_modules.py", "--output_dir", str(tmp_path))
    (found,) = json.loads((tmp_path / "results.json").read_text())
    assert all(loss < 1.3 for name in ("no loss", "information") for loss in list(found[name]["loss"].values())[:2])
    assert found["information"]["information"] > 1.5 * found["no loss"]["information"]
    assert found["concentrated"]["covering"] < found["tuned"]["covering"] - 1
    assert found["concentrated"]["removed"] > found["tuned"]["removed"]
    assert found["concentrated"]["pruned"] == pytest.approx(found["concentrated"]["loss"], abs=0.005)
    before, everything, new = (found[name]["loss"] for name in ("information", "all parameters", "new experts"))
    for old in "ab":
        assert new[old] - before[old] < 0.9 * (everything[old] - before[old])
    assert new["c"] < before["c"] - 3 and (tmp_path / "table.md").is_file()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_docstring_says_how_to_run(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert f"python examples/{path.name} --smoke" in text
    assert f"test_{path.stem}" in globals()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_public_names_only(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    attributes = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert [name for name in names + attributes if name.startswith("_")] == []
