"""Three specialists of one model, mixed with equal data: mean, sparse upcycling, BTX, and BAM in three forms.

On a tiny random model, in less than a minute on a CPU:

    python examples/bam_specialists.py --smoke --output_dir /tmp/specialists

On a real model (SmolLM2-135M, from a package) and real text, in about half an hour of one core:

    python examples/bam_specialists.py --output_dir specialists

Copies of the seed are trained on Python, mathematics and prose. Then every mixture is trained on all three, the same
windows in the same order, and so is the dense seed. The table shows held-out perplexity by domain, before and after
that training. The paper of BAM (2408.08274) reports BAM with keys of its own <= BAM with shared keys < BTX, at sizes
and amounts of data that are far from these.

A token uses two feed-forward experts, whose weights sum to 1, in all mixtures but the last, so that BTX and BAM differ
in nothing but their attention. The last is that of the paper: one expert, times its probability. With four experts and
new routers this is about a quarter of what a feed-forward block put out before, which takes long to train away.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset, Subset
from tqdm.auto import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed

import hf_moe_ext as moe
from hf_moe_ext.data import byte_tokenizer, load_domain, pack
from hf_moe_ext.data.packages import SMOLLM2, package_file
from hf_moe_ext.evaluation import perplexity


DOMAINS = ("python", "maths", "prose")
# The routing of BTX: two experts of a token, whose weights sum to 1.
TOP_2: dict[str, Any] = {
    "router": {"type": "top_k", "renormalize": True, "balance_coef": 1e-2, "z_coef": 1e-3},
    "num_experts_per_tok": 2,
}


@dataclass
class Arguments:
    """How much is trained, and where the results go."""

    output_dir: str = field(default="specialists", metadata={"help": "Folder of results.json and table.md."})
    specialist_steps: int = field(default=8, metadata={"help": "Optimizer steps of each specialist."})
    mixture_steps: int = field(default=6, metadata={"help": "Optimizer steps of each mixture."})
    batch: int = field(default=2, metadata={"help": "Windows in a step."})
    length: int = field(default=256, metadata={"help": "Tokens in a window."})
    held_out: int = field(default=3, metadata={"help": "Held-out windows of each domain."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Of AdamW."})
    seed: int = field(default=0, metadata={"help": "Of weights and order."})
    smoke: bool = field(default=False, metadata={"help": "A tiny random model and a few steps."})


def tiny_model() -> tuple[Any, Any]:
    """A random model with a tokenizer of single bytes."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config), tokenizer


def train(model: Any, data: Dataset, args: Arguments, steps: int, label: str) -> float:
    """AdamW with a linear warm-up and decay; returns the CPU seconds of a step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1)
    warm_up = max(1, steps // 10)
    started = time.process_time()
    for step in tqdm(range(steps), desc=label, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
        rows = [data[(step * args.batch + i) % len(data)] for i in range(args.batch)]  # type: ignore[arg-type]
        ids = torch.stack([row["input_ids"] for row in rows])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return (time.process_time() - started) / max(steps, 1)


def mean_of(specialists: list[Any]) -> Any:
    """The dense mean of the specialists."""
    mean = copy.deepcopy(specialists[0])
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_(torch.stack([s.get_parameter(name).double() for s in specialists]).mean(0))
    return mean


def main(args: Arguments) -> list[dict[str, Any]]:
    """Run everything; returns the rows of the table."""
    if args.smoke:
        args.specialist_steps, args.mixture_steps, args.length, args.held_out = 8, 8, 64, 4
        args.learning_rate = 3e-3
    set_seed(args.seed)
    seed, tokenizer = tiny_model() if args.smoke else moe.from_gguf(package_file(SMOLLM2))
    seed.eval()
    needed = args.batch * max(args.specialist_steps, args.mixture_steps)
    training = {name: pack(load_domain(name), tokenizer, args.length, limit=2 * needed) for name in DOMAINS}
    held_out = {name: pack(load_domain(name, "test"), tokenizer, args.length, limit=args.held_out) for name in DOMAINS}

    def scores(model: Any) -> dict[str, float]:
        return {name: perplexity(model, windows).perplexity for name, windows in held_out.items()}

    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        """Keep a row and write all there are: an interrupted run has its first ones."""
        rows.append(row)
        print(table([row], head=False), flush=True)
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"arguments": vars(args), "rows": rows}, indent=2))
        (folder / "table.md").write_text(f"{table(rows)}\n")

    add({"model": "seed", "before": scores(seed)})
    specialists = []
    for name in DOMAINS:
        specialist = copy.deepcopy(seed)
        windows = Subset(training[name], range(min(needed, len(training[name]))))
        seconds = train(specialist, windows, args, args.specialist_steps, f"specialist {name}")
        add({"model": f"specialist: {name}", "before": scores(specialist), "seconds": seconds})
        specialists.append(specialist)

    # The domains in turns, and not the windows that a specialist has seen where there are enough.
    fresh = [[training[name][i % len(training[name])] for i in range(needed, 2 * needed)] for name in DOMAINS]
    mixed: Any = ConcatDataset([[row] for group in zip(*fresh, strict=True) for row in group])
    several, domains = [seed, *specialists], ["seed", *DOMAINS]
    ways: dict[str, Callable[[], Any]] = {
        "dense seed": lambda: copy.deepcopy(seed),
        "dense mean": lambda: mean_of(specialists),
        "sparse upcycling": lambda: moe.upcycle(seed, num_experts=4, target="ext", **TOP_2),
        "BTX": lambda: moe.upcycle(several, method="btx", domains=domains, target="ext", **TOP_2),
        "BAM, shared keys": lambda: moe.upcycle(several, "bam", attention_kv="shared", domains=domains, **TOP_2),
        "BAM, own keys": lambda: moe.upcycle(several, "bam", attention_kv="expert", domains=domains, **TOP_2),
        "BAM, the paper's routing": lambda: moe.upcycle(several, "bam", attention_kv="expert", domains=domains),
    }
    for name, make in ways.items():
        set_seed(args.seed)
        model = make()
        row: dict[str, Any] = {"model": name, "parameters": model.num_parameters(), "before": scores(model)}
        row["seconds"] = train(model, mixed, args, args.mixture_steps, name)
        row["after"] = scores(model)
        add(row)
        del model
    print(f"\nHeld-out perplexity, before -> after training on all domains:\n\n{table(rows)}")
    return rows


def table(rows: list[dict[str, Any]], head: bool = True) -> str:
    """Perplexity by domain, before and after."""
    columns = ("model", *DOMAINS, "mean", "parameters", "CPU seconds a step")
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)] if head else []
    for row in rows:
        pairs = [(row["before"][name], row.get("after", {}).get(name)) for name in DOMAINS]
        known = [after for _, after in pairs if after is not None]
        pairs.append((statistics.mean(b for b, _ in pairs), statistics.mean(known) if known else None))
        cells = [f"{before:.2f}" if after is None else f"{before:.2f} -> {after:.2f}" for before, after in pairs]
        size = f"{row['parameters'] / 1e6:.1f}M" if "parameters" in row else ""
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
        lines.append(f"| {row['model']} | " + " | ".join([*cells, size, seconds]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
