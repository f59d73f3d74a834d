"""Strategies of decoding against greedy decoding with stock `generate`, on the same model and prompt, in one run.

    python benchmarks/bench_decoding.py [--device cpu] [--model FOLDER] [--layers 24] [--prompt 32] [--new 64]
                                        [--repeats 5]

A cell is the time for a token divided by that of greedy decoding, strategies in turn; the median of the repeats, with
half the distance of the quartiles. Prefill counts. Without a folder: on a CPU SmolLM2-135M of the demo, upcycled to
four experts in every layer, two of them for a token; on a GPU a random model with the layers of Qwen3-30B-A3B, in
bfloat16.

`two passes` is self-contrast as a loop that runs both branches one after the other, as the authors' code does.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, Qwen3MoeConfig

import hf_moe_ext as moe
from hf_moe_ext.data.packages import SMOLLM2, package_file
from hf_moe_ext.generation import contrastive_search, dola, num_experts_per_tok, self_contrast
from hf_moe_ext.generation.decoding import contrast, given_cache
from hf_moe_ext.generation.routing import RoutingMode, branches
from hf_moe_ext.gguf import from_gguf


Run = Callable[[PreTrainedModel, torch.Tensor, int], Any]


def settings(new: int) -> dict[str, Any]:
    """Greedy, and always as many tokens."""
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}


def greedy(model: PreTrainedModel, ids: torch.Tensor, new: int) -> Any:
    return model.generate(ids, **settings(new))


def with_strategy(strategy: Any, **options: Any) -> Run:
    return lambda model, ids, new: model.generate(ids, custom_generate=strategy, **options, **settings(new))


def ours(model: PreTrainedModel, ids: torch.Tensor, new: int) -> Any:
    before = model.config._experts_implementation
    model.set_experts_implementation("moe_ext")
    try:
        return greedy(model, ids, new)
    finally:
        model.set_experts_implementation(before)


def ensemble(model: PreTrainedModel, ids: torch.Tensor, new: int) -> Any:
    with num_experts_per_tok(model, 3):
        return greedy(model, ids, new)


@torch.no_grad()
def two_passes(model: PreTrainedModel, ids: torch.Tensor, new: int) -> Any:
    """Both branches, each with a cache of its own."""
    caches: list[Any] = [DynamicCache(config=model.config) for _ in range(2)]
    name = "cache" if hasattr(model(ids[:, :1], use_cache=True), "cache") else "past_key_values"
    text, step = ids, ids
    modes: tuple[Any, ...] = (None, RoutingMode("rank", 2))
    for _ in range(new):
        logits = []
        for branch, mode in enumerate(modes):
            with branches(model, {"branch": mode}, len(ids)):
                output = model(step, **{name: caches[branch]}, use_cache=True, logits_to_keep=1)
            caches[branch] = given_cache(output)
            logits.append(output.logits[:, -1])
        step = contrast(*logits, 0.5, 0.1).argmax(dim=-1, keepdim=True)
        text = torch.cat([text, step], dim=-1)
    return text


RUNS: dict[str, Run] = {
    "greedy, `moe_ext`": ours,
    "self-contrast": with_strategy(self_contrast),
    "self-contrast, two passes": two_passes,
    "ensemble routing, 3 experts": ensemble,
    "contrastive search, 5 candidates": with_strategy(contrastive_search),
    "DoLa, high": with_strategy(dola),
}


def seconds(run: Run, model: PreTrainedModel, ids: torch.Tensor, new: int) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    run(model, ids, new)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def load(args: argparse.Namespace) -> PreTrainedModel:
    if args.model is not None:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(args.device)
    if args.device == "cpu":
        dense, _ = from_gguf(package_file(SMOLLM2))
        options: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
        return moe.upcycle(dense, "sparse", target="stock", layers="all", **options)
    config = Qwen3MoeConfig(
        hidden_size=2048,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        vocab_size=151936,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="folder or Hub id")
    parser.add_argument("--layers", type=int, default=24, help="of the random model")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model = load(args).eval()
    torch.manual_seed(0)
    ids = torch.randint(1000, 20000, (1, args.prompt), device=args.device)
    device = torch.cuda.get_device_name() if args.device != "cpu" else platform.processor() or platform.machine()
    print(
        f"{device}, torch {torch.__version__}, transformers {transformers.__version__}; {type(model).__name__}, "
        f"{model.num_parameters() / 1e9:.2f} billion parameters, {model.dtype}\n"
    )
    for run in (greedy, *RUNS.values()):
        run(model, ids, 3)
    ratios: dict[str, list[float]] = {name: [] for name in RUNS}
    base = []
    for _ in range(args.repeats):
        for name, run in RUNS.items():
            base.append(seconds(greedy, model, ids, args.new))
            ratios[name].append(seconds(run, model, ids, args.new) / base[-1])
    print(f"greedy, stock `generate`: {1e3 * statistics.median(base) / args.new:.1f} ms a token\n")
    print("| strategy | time, ratio to greedy |\n| --- | --- |")
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        print(f"| {name} | {middle:.2f} ± {(high - low) / 2:.2f} |")


if __name__ == "__main__":
    main()
