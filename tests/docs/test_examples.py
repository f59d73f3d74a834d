"""The examples run as their docstrings say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(example: str, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / example), "--smoke", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
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
