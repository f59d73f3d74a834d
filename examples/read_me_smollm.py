"""A dense model becomes a smaller Mixture-of-Experts with one router in front: Read-ME, by domain.

On a tiny random model, in less than a minute on a CPU:

    python examples/read_me_smollm.py --smoke --output_dir /tmp/read_me

On a real model (SmolLM2-135M, from a package) and real text, in less than 30 minutes on two cores:

    python examples/read_me_smollm.py --output_dir read_me

Each domain's expert is the half of every feed-forward block that is active on it. The router learns from the dense
model which expert a token needs, then the experts are tuned, in rounds. The same model cut to one half of its neurons,
chosen on all domains and tuned as long, is the dense alternative. The first table shows held-out perplexity by domain;
the second, which share of a domain's tokens its own expert gets; the third, how often an expert would be in a cache on
these routes.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed

import hf_moe_ext as moe
from hf_moe_ext.data import byte_tokenizer, load_domain, pack
from hf_moe_ext.data.packages import SMOLLM2, package_file
from hf_moe_ext.evaluation import perplexity
from hf_moe_ext.serving import cache_hit_rates, repeated_share, routing_traces


DOMAINS = ("python", "maths", "prose")
POLICIES = ("random", "lru", "belady")


@dataclass
class Arguments:
    """How the model is cut and tuned, and where the results go."""

    output_dir: str = field(default="read_me", metadata={"help": "Folder of results.json and table.md."})
    rounds: int = field(default=2, metadata={"help": "Rounds of tuning: the router, then the experts."})
    router_steps: int = field(default=30, metadata={"help": "Optimizer steps of the router in a round."})
    expert_steps: int = field(default=15, metadata={"help": "Optimizer steps of the experts in a round."})
    batch: int = field(default=2, metadata={"help": "Windows in a step."})
    length: int = field(default=256, metadata={"help": "Tokens in a window."})
    held_out: int = field(default=6, metadata={"help": "Held-out windows of each domain."})
    calibration: int = field(default=8, metadata={"help": "Windows of each domain for calibration."})
    dim: int = field(default=128, metadata={"help": "Width of the router; the paper's is 512."})
    router_learning_rate: float = field(default=2e-3, metadata={"help": "Of AdamW, in the first round."})
    expert_learning_rate: float = field(default=2e-4, metadata={"help": "Of AdamW, in the first round."})
    temperature: float = field(default=8.0, metadata={"help": "Of the router's targets, which are counts of neurons."})
    seed: int = field(default=0, metadata={"help": "Of the router and of the order."})
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


def tuning(args: Arguments, **changes: Any) -> moe.ReadMeTuningArguments:
    """The settings of both trainers."""
    values: dict[str, Any] = {
        "output_dir": args.output_dir,
        "rounds": args.rounds,
        "router_steps": args.router_steps,
        "router_batch_size": args.batch,
        "router_learning_rate": args.router_learning_rate,
        "temperature": args.temperature,
        "expert_steps": args.expert_steps,
        "expert_batch_size": args.batch,
        "expert_learning_rate": args.expert_learning_rate,
        "seed": args.seed,
        "options": {"use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"},
    }
    return moe.ReadMeTuningArguments(**(values | changes))


def main(args: Arguments) -> dict[str, Any]:
    """Run everything; returns the results."""
    if args.smoke:
        args.router_steps, args.expert_steps, args.length, args.held_out, args.calibration = 4, 3, 64, 3, 2
        args.dim, args.expert_learning_rate = 16, 3e-3
    set_seed(args.seed)
    dense, tokenizer = tiny_model() if args.smoke else moe.from_gguf(package_file(SMOLLM2))
    dense.eval()
    needed = args.rounds * (args.router_steps + args.expert_steps) * args.batch // len(DOMAINS) + 1 + args.calibration
    windows = {name: pack(load_domain(name), tokenizer, args.length, limit=needed) for name in DOMAINS}
    held_out = {name: pack(load_domain(name, "test"), tokenizer, args.length, limit=args.held_out) for name in DOMAINS}
    seen = {
        name: [{"input_ids": each[i]["input_ids"][None]} for i in range(min(args.calibration, len(each) - 1))]
        for name, each in windows.items()
    }
    fresh = zip(
        *([each[i] for i in range(len(seen[name]), len(each))] for name, each in windows.items()), strict=False
    )
    rows = [row for group in fresh for row in group]  # the domains in turns
    lines: list[dict[str, Any]] = []

    def measure(name: str, model: Any) -> None:
        active = moe.describe(model).active_parameters if "moe_ext" in vars(model.config) else model.num_parameters()
        scores = {domain: perplexity(model, each).perplexity for domain, each in held_out.items()}
        lines.append({"model": name, "active": active, "perplexity": scores})
        print(perplexity_table(lines[-1:], head=False), flush=True)

    def routes(model: Any) -> dict[str, Any]:
        traces = {
            name: next(iter(routing_traces(model, [{"input_ids": w["input_ids"][None]} for w in each]).values()))
            for name, each in held_out.items()
        }
        together = [step for trace in traces.values() for step in trace]
        return {
            "own": {name: traces[name].count((place,)) / len(traces[name]) for place, name in enumerate(DOMAINS)},
            "repeated": repeated_share(together),
            "cache": cache_hit_rates(together, range(1, len(DOMAINS)), POLICIES, seed=args.seed),
        }

    def cut(calibration: Any) -> Any:
        router = moe.ReadMeRouterConfig(dim=args.dim)
        return moe.upcycle(
            dense, method="read_me", calibration=calibration, router=router, seed=args.seed, check=False
        )

    started = time.perf_counter()
    measure("dense", dense)
    half = cut({"all": [batch for batches in seen.values() for batch in batches]})
    measure("one half of it", half)
    moe.tune_read_me(half, dense, rows, tuning(args, router_steps=0))
    measure("one half of it, tuned", half)
    del half
    model = cut(seen)
    measure("Read-ME, router at random", model)
    first = moe.tune_read_me(model, dense, rows, tuning(args, rounds=1, expert_steps=0))
    measure("Read-ME, router distilled", model)
    routing = {"router distilled": routes(model)}
    history = moe.tune_read_me(model, dense, rows, tuning(args))
    measure("Read-ME, tuned", model)
    routing["tuned"] = routes(model)
    results = {
        "arguments": vars(args),
        "rows": lines,
        "history": [*first, *history],
        "routing": routing,
        "seconds": time.perf_counter() - started,
    }
    text = "\n\n".join([perplexity_table(lines), routing_table(routing), cache_table(routing["tuned"])])
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    (folder / "table.md").write_text(f"{text}\n")
    print(f"\nHeld-out perplexity, share of tokens with the domain's expert, cache hits:\n\n{text}")
    return results


def _table(columns: list[str], rows: list[list[str]], head: bool = True) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]] if head else []
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [*lines, *rows])


def perplexity_table(lines: list[dict[str, Any]], head: bool = True) -> str:
    """Perplexity by domain."""
    rows = [
        [line["model"], f"{line['active'] / 1e6:.1f}M", *(f"{line['perplexity'][name]:.4g}" for name in DOMAINS)]
        for line in lines
    ]
    return _table(["model", "active", *DOMAINS], rows, head)


def routing_table(routing: dict[str, Any]) -> str:
    """Share of a domain's tokens that its own expert gets, and of all tokens that use the expert of the one before."""
    rows = [
        [name, *(f"{found['own'][domain]:.2f}" for domain in DOMAINS), f"{found['repeated']:.2f}"]
        for name, found in routing.items()
    ]
    return _table(["router", *DOMAINS, "as the token before"], rows)


def cache_table(found: dict[str, Any]) -> str:
    """Hit rates by policy and number of experts in the cache."""
    capacities = sorted(next(iter(found["cache"].values())))
    rows = [[policy, *(f"{found['cache'][policy][size]:.3f}" for size in capacities)] for policy in POLICIES]
    return _table(["policy", *(f"{size} in the cache" for size in capacities)], rows)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
