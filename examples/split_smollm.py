"""One dense model cut into experts in four ways, at equal size and equal active size.

On a tiny random model, in less than a minute on a CPU:

    python examples/split_smollm.py --smoke --output_dir /tmp/split

On a real model (SmolLM2-135M, from a package) and real text, in about 20 minutes of one core:

    python examples/split_smollm.py --output_dir split

The feed-forward blocks are cut into experts at random, by k-means of their input weights, by co-activation and by
gradient. A token uses some of the experts, so the model has as many parameters as before and uses fewer. The table
shows held-out perplexity by domain right after the split, and after a short training with the same data for all. With
all experts in use the split is exact; the first row of each way shows that.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed

import hf_moe_ext as moe
from hf_moe_ext.data import byte_tokenizer, load_domain, pack
from hf_moe_ext.data.packages import SMOLLM2, package_file
from hf_moe_ext.evaluation import perplexity


DOMAINS = ("python", "maths", "prose")
WAYS = ("random", "kmeans", "coactivation", "gradient")


@dataclass
class Arguments:
    """How the model is cut and trained, and where the results go."""

    output_dir: str = field(default="split", metadata={"help": "Folder of results.json and table.md."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts of a token, of three."})
    steps: int = field(default=12, metadata={"help": "Optimizer steps of each training."})
    batch: int = field(default=2, metadata={"help": "Windows in a step."})
    length: int = field(default=256, metadata={"help": "Tokens in a window."})
    held_out: int = field(default=3, metadata={"help": "Held-out windows of each domain."})
    calibration: int = field(default=4, metadata={"help": "Windows of each domain for calibration."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Of AdamW."})
    seed: int = field(default=0, metadata={"help": "Of splits, gates and order."})
    smoke: bool = field(default=False, metadata={"help": "A tiny random model and a few steps."})


def tiny_model() -> tuple[Any, Any]:
    """A random model with a tokenizer of single bytes."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config), tokenizer


def train(model: Any, rows: list[dict[str, torch.Tensor]], args: Arguments, label: str) -> None:
    """AdamW with a linear decay over all domains in turns."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1)
    for step in tqdm(range(args.steps), desc=label, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 4) * (1 - step / args.steps)
        ids = torch.stack([rows[(step * args.batch + i) % len(rows)]["input_ids"] for i in range(args.batch)])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def main(args: Arguments) -> list[dict[str, Any]]:
    """Run everything; returns the rows of the table."""
    if args.smoke:
        args.steps, args.length, args.held_out, args.calibration, args.learning_rate = 6, 64, 4, 2, 3e-3
    set_seed(args.seed)
    dense, tokenizer = tiny_model() if args.smoke else moe.from_gguf(package_file(SMOLLM2))
    dense.eval()
    needed = args.steps * args.batch // len(DOMAINS) + 1 + args.calibration
    windows = {name: pack(load_domain(name), tokenizer, args.length, limit=needed) for name in DOMAINS}
    held_out = {name: pack(load_domain(name, "test"), tokenizer, args.length, limit=args.held_out) for name in DOMAINS}
    seen = {
        name: [{"input_ids": w[i]["input_ids"][None]} for i in range(min(args.calibration, len(w)))]
        for name, w in windows.items()
    }
    groups = zip(
        *([w[i] for i in range(min(args.calibration, len(w) - 1), len(w))] for w in windows.values()), strict=False
    )
    mixed = [row for group in groups for row in group]

    def scores(model: Any) -> dict[str, float]:
        return {name: perplexity(model, each).perplexity for name, each in held_out.items()}

    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        """Keep a row and write all there are: an interrupted run has its first ones."""
        rows.append(row)
        print(table([row], head=False), flush=True)
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"arguments": vars(args), "rows": rows}, indent=2))
        (folder / "table.md").write_text(f"{table(rows)}\n")

    add({"model": "dense", "used": "all", "before": scores(dense)})
    for way in WAYS:
        data: dict[str, Any] = {}
        if way == "coactivation":
            data = {"calibration": [batch for batches in seen.values() for batch in batches]}
        if way == "gradient":
            data = {"calibration": seen}
        for used in (len(DOMAINS), args.num_experts_per_tok):
            set_seed(args.seed)
            started = time.perf_counter()
            model = moe.upcycle(
                dense,
                method="split",
                split_by=way,
                num_experts=len(DOMAINS),
                num_experts_per_tok=used,
                gate_init="zeros" if used == len(DOMAINS) else "normal",
                seed=args.seed,
                check=False,
                **data,
            )
            row = {
                "model": way,
                "used": f"{used} of {len(DOMAINS)}",
                "active": moe.describe(model).active_parameters,
                "before": scores(model),
                "seconds": time.perf_counter() - started,
            }
            if used != len(DOMAINS):
                train(model, mixed, args, way)
                row["after"] = scores(model)
            add(row)
            del model
    print(f"\nHeld-out perplexity, before -> after a short training:\n\n{table(rows)}")
    return rows


def table(rows: list[dict[str, Any]], head: bool = True) -> str:
    """Perplexity by domain, before and after."""
    columns = ("split by", "experts used", "active", *DOMAINS)
    lines = ["| " + " | ".join(columns) + " |", "| --- | --- |" + " ---: |" * (len(columns) - 2)] if head else []
    for row in rows:
        cells = []
        for name in DOMAINS:
            after = row.get("after", {}).get(name)
            cells.append(f"{row['before'][name]:.4g}" + ("" if after is None else f" -> {after:.4g}"))
        active = f"{row['active'] / 1e6:.1f}M" if "active" in row else ""
        lines.append(f"| {row['model']} | {row['used']} | {active} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
