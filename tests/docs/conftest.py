"""A folder in which the code of the documentation runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hf_moe_ext as moe
from hf_moe_ext.modeling import configuration_moe_ext, moe_families, moe_router
from hf_moe_ext.upcycling import gate_inits, methods
from tests.docs.pages import DENSE_NAMES, STOCK_MOE_NAMES, dense_model, extended_model, stock_moe_model, windows
from tests.hub.models import byte_tokenizer


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models under the names that pages use, a published one, and the output folder of a training."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("docs")
    for make, names in ((dense_model, DENSE_NAMES), (stock_moe_model, STOCK_MOE_NAMES)):
        model = make()
        for name in names:
            model.save_pretrained(folder / name)
            byte_tokenizer().save_pretrained(folder / name)
    model = extended_model()
    moe.export(model, folder / "me" / "my-moe", tokenizer=byte_tokenizer(), verify=False)
    output = folder / "output"
    arguments = moe.MoETrainingArguments(str(output), max_steps=2, logging_steps=1, save_steps=2, report_to=[])
    trainer = moe.MoETrainer(model=model, args=arguments, train_dataset=windows())
    trainer.train()
    trainer.save_state()
    rows = [{"name": "prose", "dense": 33.1, "upcycled": 33.1, "trained": 29.7, "mean_k": 1.93}]
    (output / "evaluation.json").write_text(json.dumps({"domains": rows}))
    return folder


@pytest.fixture
def workplace(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a page: a copy of the template."""
    folder = tmp_path / "work"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def registries() -> Iterator[None]:
    """What a page registers is gone when its test ends."""
    kept = (
        moe_router._ROUTERS,
        configuration_moe_ext._ROUTER_CONFIGS,
        methods._METHODS,
        gate_inits._GATE_INITS,
        moe_families._BY_NAME,
    )
    before = [dict(registry) for registry in kept]
    yield
    for registry, entries in zip(kept, before, strict=True):
        registry.clear()
        registry.update(entries)
