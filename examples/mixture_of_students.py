"""Mixture-of-Students on a small scale: does a teacher help, and until when?

A byte-level Mixture-of-Experts is trained on text. Students without its last layers of eight then train on the same
text for a while: without a teacher, with one for the first part (staged), or to the end (full). DeepSpeed-MoE
(2201.05596), section 4.2, reports that staged ends best for its models.

    python examples/mixture_of_students.py --output_dir /tmp/students
    python examples/mixture_of_students.py --smoke --output_dir /tmp/students   # seconds

Every student sees the same batches in the same order. What is measured is the loss on held-out text, in nats per byte,
of one run each for every seed: differences of a few thousandths mean nothing.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, MixtralConfig, MixtralForCausalLM, set_seed

import hf_moe_ext as moe
from hf_moe_ext.data import Windows, byte_tokenizer, load_domain, pack
from hf_moe_ext.files import write_file
from hf_moe_ext.students import make_student


@dataclass
class Arguments:
    """Sizes and lengths."""

    output_dir: str = field(metadata={"help": "Folder for the trainings and `results.json`."})
    text: str = field(default="prose", metadata={"help": "Domain to train on (`hf-moe list domains`)."})
    layers: int = field(default=8, metadata={"help": "Layers of the teacher; every 8th goes."})
    hidden_size: int = field(default=96, metadata={"help": "Width of teacher and students."})
    length: int = field(default=128, metadata={"help": "Bytes in a window."})
    teacher_steps: int = field(default=1200, metadata={"help": "Optimizer steps of the teacher."})
    student_steps: int = field(default=300, metadata={"help": "Optimizer steps of a student."})
    fraction: float = field(default=0.7, metadata={"help": "Part of a staged training with the teacher."})
    coef: float = field(default=1.0, metadata={"help": "Weight of the distillation loss."})
    seeds: int = field(default=2, metadata={"help": "Students of every kind."})
    smoke: bool = field(default=False, metadata={"help": "A few steps."})


KINDS: dict[str, dict[str, Any]] = {"none": {"distill_coef": 0.0}, "staged": {}, "full": {}}


def teacher_model(args: Arguments, vocab_size: int) -> Any:
    """A Mixtral with 4 experts in each layer, one for each token."""
    config = MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=1,
        max_position_embeddings=args.length,
        pad_token_id=0,
    )
    router = moe.TopKRouterConfig(balance_coef=0.01, renormalize=False)
    return moe.extend(MixtralForCausalLM(config), router)


def train(model: Any, data: Windows, folder: Path, steps: int, seed: int, **options: Any) -> moe.MoETrainer:
    """Train with the settings that all trainings share."""
    teacher = options.pop("teacher", None)
    arguments = moe.MoETrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, steps // 10),
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = moe.MoETrainer(model=model, args=arguments, train_dataset=data, teacher=teacher)
    trainer.train()
    return trainer


def main(args: Arguments) -> dict[str, Any]:
    """Train the teacher and all students; returns what was measured."""
    if args.smoke:
        args.hidden_size, args.length, args.teacher_steps, args.student_steps, args.seeds = 16, 32, 12, 6, 1
    output = Path(args.output_dir)
    tokenizer = byte_tokenizer()
    data = pack(load_domain(args.text), tokenizer, args.length)
    held_out = pack(load_domain(args.text, "test"), tokenizer, args.length, limit=16 if args.smoke else 256)

    def score(trainer: moe.MoETrainer) -> float:
        return float(trainer.evaluate(held_out)["eval_loss"])

    set_seed(0)
    teacher = teacher_model(args, len(tokenizer))
    results: dict[str, Any] = {"teacher": score(train(teacher, data, output / "teacher", args.teacher_steps, 0))}
    untaught = moe.MoETrainer(
        model=make_student(teacher),
        args=moe.MoETrainingArguments(str(output / "start"), report_to="none", use_cpu=True),
    )
    results["student at the start"] = score(untaught)
    rows = []
    for start in ("teacher", "random"):
        for kind, options in KINDS.items():
            fraction = {"distill_fraction": args.fraction} if kind == "staged" else {}
            losses = []
            for seed in range(1, args.seeds + 1):
                student = make_student(teacher, init="teacher" if start == "teacher" else "random", seed=seed)
                settings = {"distill_coef": args.coef, **options, **fraction, "teacher": teacher}
                folder = output / f"{start}-{kind}-{seed}"
                losses.append(score(train(student, data, folder, args.student_steps, seed, **settings)))
            spread = max(losses) - min(losses)
            rows.append({"start": start, "distillation": kind, "loss": statistics.mean(losses), "spread": spread})
            print(f"| {start} | {kind} | {rows[-1]['loss']:.4f} | {spread:.4f} |", flush=True)
    results["students"] = rows
    write_file(output / "results.json", json.dumps(results, indent=2) + "\n")
    for name in ("teacher", "student at the start"):
        print(f"{name}: {results[name]:.4f} nats per byte")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
