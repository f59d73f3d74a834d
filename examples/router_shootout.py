"""Every router on the same small model, data and steps, in one run; the table says which published direction shows.

In about two minutes, to see that it runs:

    python examples/router_shootout.py --smoke --output_dir /tmp/shootout

In full, three seeds each (under 40 minutes on two cores; it goes on where it was interrupted):

    python examples/router_shootout.py --output_dir shootout

A byte-level Mixtral of four layers with eight experts each is trained from scratch on three kinds of text (Python
code, mathematics, English prose) and evaluated on held-out text of each. All runs have the same experts, initial
weights of the stock parts, batches in the same order, and optimizer. A router is compared with top-k of the same seed:
with top-2, or with top-1 where it uses one expert.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser, MixtralConfig, MixtralForCausalLM, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

import hf_moe_ext as moe
from hf_moe_ext.data import load_domain


EXPERTS, PER_TOKEN, WIDTH, VOCAB = 8, 2, 128, 256
DOMAINS = ("python", "maths", "prose")
BALANCE = 0.01


@dataclass
class Arguments:
    """What is run, and where the results go."""

    output_dir: str = field(default="router_shootout", metadata={"help": "Folder of results.jsonl, table and plot."})
    seeds: int = field(default=3, metadata={"help": "Runs of each router."})
    steps: int = field(default=200, metadata={"help": "Optimizer steps of a run."})
    only: list[str] = field(default_factory=list, metadata={"help": "Names of the entries to run; all if not given."})
    jobs: int = field(default=2, metadata={"help": "Runs at the same time, one thread each."})
    smoke: bool = field(default=False, metadata={"help": "One seed and a few steps."})


@dataclass(frozen=True)
class Entry:
    """A router in the shoot-out.

    Attributes:
        extension: what is declared on the stock model.
        claim: what its paper reports against plain top-k with a balance loss, in a few words.
        lower_loss: whether that claim is a lower loss after the same number of steps. `None` where the paper claims
            something that this table does not show.
        experts: other counts than the stock model's, with the same number of parameters.
        reference: the entry it is compared with.
    """

    extension: dict[str, Any]
    claim: str
    lower_loss: bool | None = True
    experts: dict[str, int] = field(default_factory=dict)
    reference: str = "top_k"


def entries(steps: int) -> dict[str, Entry]:
    """All entries by name. Settings are those of the papers, where a model of this size and a run of `steps` steps
    can use them. `expert_choice` and `soft_moe` are missing: they look at later tokens, which a language model must
    not do."""

    def router(name: str, **options: Any) -> dict[str, Any]:
        return {"router": {"type": name, **options}}

    top_k = router("top_k", balance_coef=BALANCE)
    # The larger capacity of fine-grained and shared experts is taken from the routed ones: 14 + 2 halves.
    halves = {"num_local_experts": 2 * EXPERTS - 2, "intermediate_size": WIDTH // 2}
    return {
        "top_k": Entry(top_k, "the reference: top-2 with a balance loss", None),
        "top_1": Entry(
            router("top_k", num_experts_per_tok=1, renormalize=False, balance_coef=BALANCE),
            "one expert (Switch)",
            None,
        ),
        "top_k without a balance loss": Entry(router("top_k"), "worse balance", None),
        "top_k with a loss-free bias": Entry(
            router("top_k", correction_bias=True, bias_update_rate=0.001), "lower loss, better balance"
        ),
        "top_k with momentum": Entry({**top_k, "momentum": {"decay": 0.7}}, "lower loss"),
        "top_k with null experts": Entry({**top_k, "zero_experts": {"zero": 4}}, "fewer experts", None),
        "top_k with a shared expert": Entry(
            {**top_k, "shared_experts": {"intermediate_size": WIDTH}}, "", None, halves
        ),
        "deepseek_moe": Entry(
            {**router("deepseek_moe"), "shared_experts": {"intermediate_size": WIDTH}}, "lower loss", True, halves
        ),
        "top_p": Entry(router("top_p", threshold=0.4, max_slots=4), "lower loss at fewer experts"),
        "noisy_top_k": Entry(router("noisy_top_k"), "better balance than without noise", None),
        "sigmoid": Entry(router("sigmoid", num_experts_per_tok=2, balance_coef=BALANCE), "another gate", None),
        "xmoe": Entry(router("xmoe", renormalize=True, balance_coef=BALANCE), "lower loss"),
        "act_dts": Entry(
            router("act_dts", activation="gelu", balance_coef=BALANCE), "faster estimation (theory)", None
        ),
        "rmoe": Entry(router("rmoe", state_size=64, additive=False), "lower loss"),
        "pre_gated": Entry(router("pre_gated", balance_coef=BALANCE), "about the same loss", None),
        "adamoe": Entry(router("adamoe"), "fewer experts at the same quality", None),
        "moe_plus_plus": Entry(router("moe_plus_plus"), "lower loss at fewer experts"),
        "dts": Entry(
            router("dts", temperature_end=0.3, hard_after=3 * steps // 4), "lower loss than top-1", reference="top_1"
        ),
        "random_fixed": Entry(
            router("random_fixed", start_experts_per_tok=2, end_experts_per_tok=EXPERTS), "runs with any number", None
        ),
        "stochastic": Entry(router("stochastic"), "lower loss than top-1", reference="top_1"),
        "hash": Entry(router("hash", vocab_size=VOCAB), "lower loss than top-1", reference="top_1"),
        "comet": Entry(router("comet", tree_entropy_coef=0.05), "better than top-k (other tasks)"),
        "comet with local search": Entry(
            router("comet", tree_entropy_coef=0.05, permutation_steps=steps // 4), "better than top-k (other tasks)"
        ),
        "dselect_k": Entry(router("dselect_k", code_entropy_coef=0.05), "better than top-k (other tasks)"),
        "permuted_top_k": Entry(
            router("permuted_top_k", permutation_steps=steps // 4, balance_coef=BALANCE), "fewer tuning runs", None
        ),
    }


# --- one run ---


class Bytes(Dataset):
    """Windows of raw bytes, drawn from the domains in turn."""

    def __init__(self, texts: dict[str, torch.Tensor], length: int, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for number in range(count):
            text = texts[DOMAINS[number % len(DOMAINS)]]
            start = int(torch.randint(0, len(text) - length, (1,), generator=generator))
            self.rows.append(text[start : start + length])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.rows[index].long()
        return {"input_ids": ids, "labels": ids}


@functools.cache
def read_bytes(split: Any, limit: int) -> dict[str, torch.Tensor]:
    """The text of each domain as bytes."""
    found = {}
    for name in DOMAINS:
        data = "\n\n".join(load_domain(name, split)).encode()[:limit]
        found[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return found


def build(entry: Entry, seed: int) -> Any:
    """The model of one run. The stock parts start the same for every router."""
    set_seed(seed)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        num_experts_per_tok=PER_TOKEN,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=None,
        **{"num_local_experts": EXPERTS, "intermediate_size": WIDTH, **entry.experts},
    )
    return moe.extend(MixtralForCausalLM(config), moe.MoeExtension.from_dict(entry.extension))


@torch.no_grad()
def evaluate(model: Any, texts: dict[str, torch.Tensor], windows: int, length: int) -> dict[str, Any]:
    """Held-out loss by domain, mean number of experts, and how far the busiest expert is above its share."""
    model.eval()
    losses, tokens, used = {}, 0, 0.0
    counts: dict[str, torch.Tensor] = {}
    for name in DOMAINS:
        rows = texts[name][: windows * length].view(windows, length).long()
        total = 0.0
        for batch in rows.split(16):
            with moe.trace_routing(model) as contexts:
                total += float(model(input_ids=batch, labels=batch).loss) * len(batch)
            for key, record in contexts[0].records.items():
                real = record.index[record.index < record.num_experts]
                counts[key] = counts.get(key, 0) + torch.bincount(real.flatten(), minlength=record.num_experts)
                tokens += len(record.index)
                used += real.numel()
        losses[name] = total / windows
    violation = statistics.mean(float(c.max() / c.sum().clamp(min=1)) * len(c) - 1 for c in counts.values())
    loss = statistics.mean(losses.values())
    return {"loss": loss, "losses": losses, "mean_k": used / tokens, "max_violation": violation}


def run(job: tuple[str, Entry, int, int, bool, str]) -> dict[str, Any]:
    """Train and evaluate one router with one seed."""
    name, entry, seed, steps, smoke, folder = job
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    logging.getLogger("hf_moe_ext").setLevel(logging.ERROR)
    batch, length = (8, 64) if smoke else (16, 128)
    train, held_out = read_bytes("train", 2_000_000), read_bytes("test", 64 * length)
    model = build(entry, seed)
    arguments = moe.MoETrainingArguments(
        output_dir=os.path.join(folder, "runs", f"{name}-{seed}".replace(" ", "_")),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.01,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
        routing_metrics=False,
    )
    data = Bytes(train, length, steps * batch, seed)
    trainer = moe.MoETrainer(model=model, args=arguments, train_dataset=data)
    for callback in [c for c in trainer.callback_handler.callbacks if isinstance(c, PrinterCallback)]:
        trainer.remove_callback(callback)
    started = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - started) / steps
    result = evaluate(model, held_out, 4 if smoke else 64, length)
    extra = sum(p.numel() for n, p in model.named_parameters() if "moe_" in n and p.requires_grad)
    return {"name": name, "seed": seed, "steps": steps, "seconds": seconds, "added_parameters": extra, **result}


# --- the table ---


def verdict(entry: Entry, mean: float, error: float) -> str:
    """Whether the published direction shows in the difference from top-k: beyond two standard errors, or not."""
    if entry.lower_loss is None:
        return ""
    if math.isnan(error) or abs(mean) < 2 * error:
        return "not resolved"
    return "yes" if (mean < 0) == entry.lower_loss else "no"


def table(results: Iterable[dict[str, Any]], known: dict[str, Entry]) -> str:
    """Markdown: one row a router, sorted by loss."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_name.setdefault(result["name"], {})[result["seed"]] = result
    rows = []
    for name, runs in by_name.items():
        entry = known.get(name)
        if entry is None:
            continue
        reference = by_name.get(entry.reference, {})
        losses = [run["loss"] for run in runs.values()]
        shared = [seed for seed in runs if seed in reference]
        gaps = [runs[seed]["loss"] - reference[seed]["loss"] for seed in shared]
        times = [runs[seed]["seconds"] / reference[seed]["seconds"] for seed in shared]
        mean = statistics.mean(gaps) if gaps else math.nan
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
        cells = (
            name,
            f"{statistics.mean(losses):.3f} ± {spread:.3f}",
            "" if name == entry.reference else f"{mean:+.3f} ± {error:.3f} ({entry.reference})",
            f"{statistics.mean(run['mean_k'] for run in runs.values()):.2f}",
            f"{statistics.mean(run['max_violation'] for run in runs.values()):.2f}",
            f"{statistics.median(times):.2f}" if times else "",
            entry.claim,
            "" if name == entry.reference else verdict(entry, mean, error),
        )
        rows.append((statistics.mean(losses), cells))
    head = (
        "router",
        "held-out loss",
        "difference",
        "experts per token",
        "busiest expert",
        "time per step",
        "published",
        "seen here",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for _, cells in sorted(rows)])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss against experts per token; small marks are single runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({result["name"] for result in results})
    means = {n: statistics.mean(r["loss"] for r in results if r["name"] == n) for n in names}
    names.sort(key=lambda name: means[name])
    figure, axes = pyplot.subplots(figsize=(7, 0.28 * len(names) + 1.2), layout="constrained")
    for place, name in enumerate(names):
        losses = [result["loss"] for result in results if result["name"] == name]
        axes.plot(losses, [place] * len(losses), "o", color="#9bb7d4", markersize=4)
        axes.plot([means[name]], [place], "D", color="#1f4e79" if name != "top_k" else "#c0392b", markersize=6)
    if "top_k" in means:
        axes.axvline(means["top_k"], color="#c0392b", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss in nats per byte (diamond: mean over seeds)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(args: Arguments) -> list[dict[str, Any]]:
    """Run what is missing, then write the table and the plot."""
    if args.smoke:
        args.seeds, args.steps = 1, 2
    known = entries(args.steps)
    unknown = [name for name in args.only if name not in known]
    if unknown:
        raise ValueError(f"`--only` names {unknown}; known: {', '.join(known)}.")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    results = [result for result in results if result["steps"] == args.steps]
    done = {(result["name"], result["seed"]) for result in results}
    chosen = [name for name in known if not args.only or name in args.only]
    jobs = [
        (name, known[name], seed, args.steps, args.smoke, args.output_dir)
        for seed in range(args.seeds)
        for name in chosen
        if (name, seed) not in done
    ]
    with multiprocessing.get_context("spawn").Pool(max(1, min(args.jobs, len(jobs)))) as pool:
        for result in tqdm(pool.imap_unordered(run, jobs), total=len(jobs), desc="runs"):
            results.append(result)
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
    text = table(results, known)
    (folder / "table.md").write_text(text + "\n")
    plot(results, folder / "router_shootout.png")
    print(text)
    return results


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
