"""Dense model -> Mixture-of-Experts -> training on text -> a folder for the Hub.

On a tiny random model, in less than a minute on a CPU:

    python examples/upcycle_and_train.py --smoke --output_dir /tmp/tiny-moe

On a real model and real text:

    python examples/upcycle_and_train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir smol-moe \
        --max_steps 200 --learning_rate 2e-4

On several GPUs: `accelerate launch examples/upcycle_and_train.py ...`. Every option of `MoETrainingArguments` works.
What is compared: held-out perplexity of the dense model, of the MoE as upcycled (equal, up to rounding), and as
trained. What is not: the dense model, trained on the same text.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

import hf_moe_ext as moe
from hf_moe_ext.data import byte_tokenizer, load_domain, pack
from hf_moe_ext.evaluation import perplexity


@dataclass
class Arguments:
    """Which model, what becomes of it, which text."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a dense model."})
    num_experts: int = field(default=4, metadata={"help": "Experts in each converted layer."})
    layers: str = field(default="every:3", metadata={"help": 'Layers to convert: "all", "every:3", ...'})
    text: str = field(default="prose", metadata={"help": "Domain to train on (`hf-moe list domains`)."})
    length: int = field(default=256, metadata={"help": "Tokens in a window."})
    smoke: bool = field(default=False, metadata={"help": "A tiny random model and a few steps."})


def tiny_model() -> tuple[Any, Any]:
    """A random model with a tokenizer of single bytes."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def main(args: Arguments, training: moe.MoETrainingArguments) -> dict[str, float]:
    """Run all steps; returns the perplexities."""
    if args.smoke:
        args.length, training.max_steps, training.learning_rate = 64, 30, 3e-3
        training.logging_steps = 5
    set_seed(training.seed)
    dense: Any
    if args.smoke or args.model is None:
        dense, tokenizer = tiny_model()
    else:
        dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = pack(load_domain(args.text), tokenizer, args.length)
    held_out = pack(load_domain(args.text, "test"), tokenizer, args.length, limit=16)
    scores = {"dense": perplexity(dense, held_out).perplexity}

    model = moe.upcycle(
        dense,
        num_experts=args.num_experts,
        layers=args.layers,
        router=moe.TopPRouterConfig(threshold=0.4, max_slots=2, renormalize=True),
        seed=training.seed,
    )
    del dense
    print(model.upcycle_report)
    print(moe.describe(model))
    scores["upcycled"] = perplexity(model, held_out).perplexity

    trainer = moe.MoETrainer(model=model, args=training, train_dataset=train)
    trainer.train()
    trainer.save_state()
    result = perplexity(model, held_out)
    scores["trained"] = result.perplexity

    if trainer.is_world_process_zero():
        print(", ".join(f"{name} {value:.2f}" for name, value in scores.items()) + " (held-out perplexity)")
        print(f"{result.mean_k:.2f} experts per token")
        folder = os.path.join(training.output_dir, "model")
        moe.export(model, folder, tokenizer=tokenizer, report=training.output_dir, overwrite=True)
        print(f"wrote {folder}; it loads with trust_remote_code=True where this package is not installed")
    return scores


if __name__ == "__main__":
    main(*HfArgumentParser((Arguments, moe.MoETrainingArguments)).parse_args_into_dataclasses())
