"""What an extension costs: an extended model against the same stock model, in one run.

    python benchmarks/bench_extension.py [--repeats 7] [--layers 8] [--hidden 256]

Prints ratios of wall time (extended / stock; below 1 is faster) for prefill, one training step and cached decoding.
Both sides alternate, and the median of the ratios of neighbouring runs is taken, so slow drifts cancel.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

from hf_moe_ext import MoeExtension, TopKRouterConfig, TopPRouterConfig, extend


def build(hidden: int, layers: int) -> MixtralForCausalLM:
    """A random Mixtral of a laptop's size."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.1,
    )
    return MixtralForCausalLM(config)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def ratio(ours: Callable[[], object], stock: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median ratio and the spread between its quartiles."""
    ours(), stock()
    ratios = [seconds(ours) / seconds(stock) for _ in range(repeats)]
    quartiles = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), quartiles[2] - quartiles[0]


def tasks(model: MixtralForCausalLM, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The three things that are timed."""

    def prefill() -> None:
        with torch.inference_mode():
            model.eval()(input_ids=ids)

    def step() -> None:
        model.train()(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    def decode() -> None:
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        model.eval().generate(ids[:1, :16], min_new_tokens=32, max_new_tokens=32, **options)

    return {"prefill": prefill, "training step": step, "decode": decode}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads,")
    print(f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}")
    stock = build(args.hidden, args.layers)
    ids = torch.randint(0, 1024, (4, 128))
    rows = {
        "top_k, stock experts": (TopKRouterConfig(), "grouped_mm"),
        "top_k, moe_ext experts": (TopKRouterConfig(), "moe_ext"),
        "top_k explicit, moe_ext": (TopKRouterConfig(num_experts_per_tok=2), "moe_ext"),
        "top_p 0.4, moe_ext": (TopPRouterConfig(threshold=0.4), "moe_ext"),
    }
    stock_tasks = tasks(stock, ids)
    print(f"{'extended / stock (grouped_mm)':<30}" + "".join(f"{name:>22}" for name in stock_tasks))
    for name, (router, implementation) in rows.items():
        model = extend(copy.deepcopy(stock), MoeExtension(router=router))
        model.set_experts_implementation(implementation)
        cells = [ratio(task, stock_tasks[key], args.repeats) for key, task in tasks(model, ids).items()]
        print(f"{name:<30}" + "".join(f"{median:>15.2f} ±{spread:>5.2f}" for median, spread in cells), flush=True)


if __name__ == "__main__":
    main()
