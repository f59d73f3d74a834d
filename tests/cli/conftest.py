"""Tiny models in folders, and the command line run in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, DistilBertConfig, DistilBertForMaskedLM

from hf_moe_ext import hub
from hf_moe_ext.cli.main import main
from tests.hub.models import byte_tokenizer, llama, mixtral, stock_llama, stock_mixtral


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def _bert():
    config = BertConfig(**SMALL, intermediate_size=24, architectures=["BertForSequenceClassification"])
    return BertForSequenceClassification(config)


def _distilbert():
    return DistilBertForMaskedLM(DistilBertConfig(vocab_size=64, dim=16, hidden_dim=24, n_layers=1, n_heads=2))


MAKERS = {
    "dense": stock_llama,
    "stock": stock_mixtral,
    "extended": mixtral,
    "made_from_dense": llama,
    "bert": _bert,
    "unsupported": _distilbert,
}


@dataclass
class Result:
    """What one run of the command line gave."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def _saved(tmp_path_factory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("models")

    def save(name: str) -> Path:
        if not (home / name).exists():
            torch.manual_seed(0)
            MAKERS[name]().save_pretrained(home / name)
            byte_tokenizer().save_pretrained(home / name)
        return home / name

    return save


@pytest.fixture
def saved(_saved, tmp_path) -> Callable[[str], Path]:
    """`saved("dense")`: a folder with a tiny model and a tokenizer, of this test's own."""

    def copy(name: str) -> Path:
        target = tmp_path / name
        shutil.copytree(_saved(name), target)
        return target

    return copy


@pytest.fixture
def hf_moe(capsys) -> Callable[..., Result]:
    """Run the command line; no message may be a traceback."""

    def run(*argv: object) -> Result:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        if "--verbose" not in argv:
            assert "Traceback" not in out + err
        return Result(code, out, err)

    return run


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch):
    def refuse(*args):
        raise AssertionError("the command line asked a question")

    monkeypatch.setattr("builtins.input", refuse)


@pytest.fixture
def unverified(monkeypatch):
    """Exports without the clean process, which has tests of its own."""
    monkeypatch.setattr(hub, "verify_folder", lambda *args, **kwargs: None)


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 30)
    return path


def tree(folder: Path) -> dict[str, int]:
    """All files below a folder with their sizes."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def change_config(folder: Path, **values) -> None:
    """Replace values of a config.json; `None` removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
