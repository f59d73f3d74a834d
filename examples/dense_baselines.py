"""One small dense model made into a Mixture-of-Experts in several ways, and trained on with the same data.

In less than a minute, to see that it runs:

    python examples/dense_baselines.py --smoke --output_dir /tmp/baselines

In full, in about 10 minutes of one core:

    python examples/dense_baselines.py --output_dir baselines

A byte-level Llama of two layers is trained on a novel. Then its feed-forward blocks become copies, slices of copies,
copies with half of the neurons drawn anew, copies of which nothing is left, or shares of the block. The table shows
the held-out loss right after the conversion and after training, and how alike the experts are (the cosine of their
weights; neurons keep their places here, so that it means something).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed

import hf_moe_ext as moe
from hf_moe_ext.data import load_domain
from hf_moe_ext.evaluation import expert_similarity


LENGTH, BATCH = 64, 16
SHARED = {"num_experts": 4, "num_experts_per_tok": 2, "router": {"type": "top_k", "balance_coef": 0.01}}
# By the name in the table: the method and its options.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "copies": ("sparse", {}),
    "slices of copies": ("granular", {"granularity": 2}),
    "half redrawn": ("drop", {"drop_ratio": 0.5, "permute": False}),
    "all redrawn": ("drop", {"drop_ratio": 1.0, "permute": False}),
    "2 of 4 shares": ("split", {}),
}


@dataclass
class Arguments:
    """How long is trained, and where the results go."""

    output_dir: str = field(default="baselines", metadata={"help": "Folder of results.json and table.md."})
    dense_steps: int = field(default=1000, metadata={"help": "Optimizer steps of the dense model."})
    steps: int = field(default=1500, metadata={"help": "Optimizer steps after the conversion."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Of AdamW, at the peak; the same for all."})
    seed: int = field(default=0, metadata={"help": "Of weights, conversions and batches."})
    smoke: bool = field(default=False, metadata={"help": "A few steps."})


def byte_rows(split: Any) -> torch.Tensor:
    """(N, LENGTH) bytes of a novel."""
    data = torch.tensor(list("\n".join(load_domain("prose", split)).encode()))
    return data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)


@torch.no_grad()
def held_out_loss(model: Any, rows: torch.Tensor) -> float:
    """Mean loss per byte."""
    return float(model.eval()(input_ids=rows, labels=rows).loss)


def train(model: Any, rows: torch.Tensor, steps: int, args: Arguments, label: str, watch: Any = None) -> None:
    """AdamW with warm-up and linear decay; batches in an order that the seed gives. `watch` is called ten times."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1)
    generator = torch.Generator().manual_seed(args.seed)
    for step in tqdm(range(steps), desc=label, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 50) * (1 - step / steps)
        ids = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None and (step + 1) % max(steps // 10, 1) == 0:
            watch(step + 1)


def main(args: Arguments) -> list[dict[str, Any]]:
    """Run everything; returns the rows of the table."""
    if args.smoke:
        args.dense_steps, args.steps = 60, 20
    set_seed(args.seed)
    rows, held_out = byte_rows("train"), byte_rows("test")[:128]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **sizes))
    train(dense, rows, args.dense_steps, args, "dense")
    results: list[dict[str, Any]] = []

    def add(name: str, model: Any) -> None:
        """Train a model on and keep its row."""
        result: dict[str, Any] = {"model": name, "before": held_out_loss(model, held_out)}
        if name != "dense":
            result |= {"active": moe.describe(model).active_parameters, "similarity": similarity(model)}
        course: list[dict[str, float]] = []

        def watch(step: int) -> None:
            seen = {} if name == "dense" else {"similarity": similarity(model)}
            course.append({"step": step, "loss": held_out_loss(model, held_out), **seen})

        train(model, rows, args.steps, args, name, watch)
        results.append(result | {"after": course[-1]["loss"], "course": course})
        print(table(results[-1:], head=False), flush=True)

    for name, (method, options) in WAYS.items():
        set_seed(args.seed)
        add(name, moe.upcycle(dense, method, seed=args.seed, check=False, target="ext", **SHARED, **options))
    add("dense", dense)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"arguments": vars(args), "rows": results}, indent=2))
    (folder / "table.md").write_text(f"{table(results)}\n")
    print(f"\nHeld-out loss in nats per byte:\n\n{table(results)}")
    return results


def similarity(model: Any) -> float:
    """Mean over the layers."""
    values = expert_similarity(model).values()
    return sum(values) / len(values)


def table(results: list[dict[str, Any]], head: bool = True) -> str:
    """Losses and similarities of experts, before and after."""
    lines = (
        ["| model | step 0 | trained on | experts alike, step 0 | after |", "| --- |" + " ---: |" * 4] if head else []
    )
    for row in results:
        alike = [""] * 2
        if "similarity" in row:
            alike = [f"{row['similarity']:.2f}", f"{row['course'][-1]['similarity']:.2f}"]
        lines.append(f"| {row['model']} | {row['before']:.3f} | {row['after']:.3f} | {alike[0]} | {alike[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
