"""The Python code of every page runs, block after block in one namespace, on tiny random models.

A block that cannot run is preceded by `<!-- not run: reason -->`.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import hf_moe_ext.hub as hub
import hf_moe_ext.upcycling.checkpoint as checkpoint
from hf_moe_ext import MoETrainingArguments
from hf_moe_ext.files import check_target, staged_folder
from hf_moe_ext.modeling import moe_families
from hf_moe_ext.verification import Verification
from tests.docs.pages import PAGES, blocks, dense_model, extended_model, page_id, python_source, windows
from tests.hub.models import byte_tokenizer


# Pages that a newcomer types from top to bottom; the others start from a model and a tokenizer.
SELF_CONTAINED = ("README.md", "CONTRIBUTING.md", "docs/quickstart.md", "docs/routers.md")
# Where an exported folder is really loaded in a clean process. (The process takes seconds to start.)
VERIFIED = ("README.md",)

MAX_STEPS = 3


def pages_with_code() -> list[Path]:
    return [path for path in PAGES if any(block.language == "python" for block in blocks(path))]


def given(name: str) -> dict[str, Any]:
    """What the text around a block says is at hand."""
    if name in SELF_CONTAINED:
        return {}
    data = windows()
    return {
        "model": extended_model(),
        "dense": dense_model(),
        "tokenizer": byte_tokenizer(),
        "dataset": data,
        "train_dataset": data,
        "eval_dataset": data,
    }


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of a few steps, without loggers that start a server."""
    original = MoETrainingArguments.__post_init__

    def post_init(self: MoETrainingArguments) -> None:
        self.max_steps = min(self.max_steps, MAX_STEPS) if self.max_steps > 0 else MAX_STEPS
        self.logging_steps = 1
        self.report_to = []
        original(self)

    monkeypatch.setattr(MoETrainingArguments, "__post_init__", post_init)


@pytest.fixture
def lenient_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages write to the same folder more than once, where a reader would take one of the ways."""

    def overwriting(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(directory: Any, *, overwrite: bool = False) -> Any:
            return function(directory, overwrite=True)

        return call

    for module in (hub, checkpoint):
        monkeypatch.setattr(module, "check_target", overwriting(check_target))
        monkeypatch.setattr(module, "staged_folder", overwriting(staged_folder))


class FakeHub:
    """Stands in for `HfApi`: nothing leaves the machine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def create_repo(self, repo_id: str, **kwargs: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, folder_path: Any, **kwargs: Any) -> str:
        assert (Path(folder_path) / "config.json").is_file()
        return "https://huggingface.co/me/my-moe/commit/0"


def append_records(names: dict[str, Any]) -> None:
    """A family record that a page makes is appended to the table, as the page tells the reader to do."""
    for value in names.values():
        if isinstance(value, moe_families.Family):
            moe_families._BY_NAME.setdefault(value.name, value)


# PEFT and TRL ask for what transformers deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("path", pages_with_code(), ids=page_id)
def test_code_runs(path, workplace, registries, short, lenient_folders, monkeypatch):
    name = page_id(path)
    if name == "docs/trl.md":
        pytest.importorskip("trl")
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    if name not in VERIFIED:
        monkeypatch.setattr(hub, "verify_folder", lambda *_, **__: Verification(0.0, 1.0, True, "cpu", True, 0.0))
    # A real module: dataclasses and `get_type_hints` look it up by name.
    page = types.ModuleType("docs_page")
    monkeypatch.setitem(sys.modules, page.__name__, page)
    vars(page).update(given(name))
    for block in blocks(path):
        if block.language != "python" or block.skipped:
            continue
        code = compile("\n" * (block.line - 1) + python_source(block), str(path), "exec")
        try:
            exec(code, vars(page))
        except Exception as error:
            raise AssertionError(f"{name}, block at line {block.line}: {type(error).__name__}: {error}") from error
        append_records(vars(page))


def test_few_blocks_are_left_out():
    every = [block for path in PAGES for block in blocks(path) if block.language == "python"]
    assert sum(block.skipped for block in every) <= max(2, len(every) // 10)
