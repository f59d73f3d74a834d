"""Small trainings on characters of a novel, for the direction that a paper claims."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_moe_ext.data
from hf_moe_ext import MoETrainer, MoETrainingArguments


LENGTH, VOCAB_SIZE = 48, 96


@functools.cache
def _windows() -> torch.Tensor:
    """(N, LENGTH) characters in a fixed random order."""
    text = (Path(hf_moe_ext.data.__file__).parent / "texts" / "moby_dick.txt").read_text(encoding="utf-8")
    ids = torch.tensor([min(max(ord(letter) - 31, 0), VOCAB_SIZE - 1) for letter in text])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def training_rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in _windows()[256:]]


def character_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A dense model of characters, with random weights."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": LENGTH,
    }
    return LlamaForCausalLM(LlamaConfig(**(values | overrides)))


def train_characters(model: PreTrainedModel, folder: Path, steps: int, **overrides: Any) -> MoETrainer:
    """A trainer that has trained `steps` steps of 16 rows."""
    values = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "weight_decay": 0.0,
        "lr_scheduler_type": "cosine",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": steps,
        "routing_metrics": False,
    }
    trainer = MoETrainer(model, MoETrainingArguments(**(values | overrides)), train_dataset=training_rows())
    trainer.train()
    model.eval()
    return trainer


@torch.no_grad()
def held_out_loss(model: PreTrainedModel) -> float:
    """Mean loss per character on text that is not trained on."""
    rows = _windows()[:256]
    return float(model.eval()(input_ids=rows, labels=rows).loss)
