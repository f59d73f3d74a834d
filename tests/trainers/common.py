"""Tiny models, data and trainers for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from hf_moe_ext import MoeExtension, MoETrainer, MoETrainingArguments, TopPRouterConfig, extend


NUM_EXPERTS, NUM_LAYERS, VOCAB_SIZE = 6, 2, 64


def stock_mixtral(seed: int = 0, **overrides: Any) -> MixtralForCausalLM:
    """A stock Mixtral whose routers prefer some experts clearly."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "pad_token_id": 0,
    }
    model = MixtralForCausalLM(MixtralConfig(**(values | overrides)))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=0.4)
    return model


def tiny_moe(router: Any = None, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """`stock_mixtral`, extended; top-p without auxiliary losses unless `router` says otherwise."""
    if router is None:
        router = TopPRouterConfig(threshold=0.5, balance_coef=0.0, entropy_coef=0.0)
    return extend(stock_mixtral(seed, **overrides), MoeExtension(router=router))


def rows(
    lengths: list[int], prompts: list[int] | None = None, left: bool = False, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """One example per length, padded to the longest; the first tokens of a prompt have no label."""
    generator = torch.Generator().manual_seed(seed)
    longest, out = max(lengths), []
    for i, length in enumerate(lengths):
        ids = torch.zeros(longest, dtype=torch.int64)
        place = slice(longest - length, longest) if left else slice(0, length)
        ids[place] = torch.randint(1, VOCAB_SIZE, (length,), generator=generator)
        mask = (ids != 0).long()
        labels = ids.masked_fill(mask == 0, -100)
        if prompts is not None:
            labels[place.start : place.start + prompts[i]] = -100
        out.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return out


def arguments(folder: Path, **overrides: Any) -> MoETrainingArguments:
    values = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }
    return MoETrainingArguments(**(values | overrides))


def sgd(**overrides: Any) -> dict[str, Any]:
    """Arguments under which one step moves every weight by minus its gradient."""
    return {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, **overrides}


def train(model: PreTrainedModel, data: Any, folder: Path, **overrides: Any) -> MoETrainer:
    """A trainer that has trained."""
    trainer = MoETrainer(model=model, args=arguments(folder, **overrides), train_dataset=data)
    trainer.train()
    return trainer


def logged(trainer: MoETrainer, key: str) -> list[float]:
    """The values logged under `key`, in order."""
    return [line[key] for line in trainer.state.log_history if key in line]


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything in the model's state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
