"""A folder in which the code of the documentation runs: tiny random models under the names that the pages use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.data import Windows
from hf_moe_ext.modeling import configuration_moe_ext, moe_families, moe_router
from hf_moe_ext.upcycling import gate_inits, methods
from tests.hub.models import byte_tokenizer


# Names that pages give to models of a hub or to folders.
DENSE_NAMES = ("HuggingFaceTB/SmolLM2-135M-Instruct", "dense", "dense-7b")
STOCK_MOE_NAMES = ("mistralai/Mixtral-8x7B-v0.1", "moe")

_SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def dense_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**_SIZES)).eval()


def stock_moe_model() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=8, num_experts_per_tok=2)).eval()


def extended_model():
    router = moe.TopPRouterConfig(threshold=0.4, max_slots=2, renormalize=True)
    return moe.upcycle(dense_model(), num_experts=4, router=router, check=False)


def windows() -> Windows:
    return Windows(torch.randint(4, 260, (24, 32), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, a published one, and the output folder of a training."""
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
    """The current folder of a page, with a copy of the template."""
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
