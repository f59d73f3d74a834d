"""What adapters on routed experts cost: `expert_lora` against PEFT's `target_parameters` and against the base model.

    python benchmarks/bench_lora_experts.py [--repeats 7] [--layers 4] [--hidden 256] [--experts 32] [--rank 8]

Prints ratios of wall time for cached decoding, prefill and one training step. PEFT runs on the stock model with the
experts implementation that Transformers chooses. All sides alternate, and the median of the ratios of neighbouring
runs is taken, so slow drifts cancel. Before anything is timed, the logits of both are compared.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from hf_moe_ext import load_expert_lora
from hf_moe_ext.kernels.lora import keep_factors


def build(args: argparse.Namespace) -> MixtralForCausalLM:
    """A random Mixtral with many small experts."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=args.experts,
        num_experts_per_tok=2,
        initializer_range=0.1,
    )
    return MixtralForCausalLM(config)


def adapted(base: MixtralForCausalLM, rank: int) -> Any:
    """The same model with an adapter of PEFT on its experts, all of whose values count."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=targets)
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def tasks(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The three things that are timed."""

    def decode() -> None:
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        model.eval().generate(input_ids=ids[:1, :16], min_new_tokens=16, max_new_tokens=16, **options)

    def prefill() -> None:
        with torch.inference_mode():
            model.eval()(input_ids=ids)

    def step() -> None:
        model.train()(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return {"decode": decode, "prefill": prefill, "training step": step}


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def ratio(peer: Callable[[], object], ours: Callable[[], object], repeats: int) -> str:
    """Median of peer / ours, and half the distance of the quartiles."""
    peer(), ours()
    ratios = [seconds(peer) / seconds(ours) for _ in range(repeats)]
    quartiles = statistics.quantiles(ratios, n=4)
    return f"{statistics.median(ratios):.2f} ± {(quartiles[2] - quartiles[0]) / 2:.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("repeats", 7), ("layers", 4), ("hidden", 256), ("experts", 32), ("rank", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__},")
    print(f"{torch.get_num_threads()} threads, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}")
    base = build(args)
    theirs = adapted(base, args.rank)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_expert_lora(copy.deepcopy(base), folder)
    kept = copy.deepcopy(theirs)
    keep_factors(kept)
    kept.base_model.model.set_experts_implementation("moe_ext")
    same = copy.deepcopy(base)
    same.set_experts_implementation("moe_ext")
    ids = torch.randint(0, 1024, (4, 128))
    with torch.no_grad():
        difference = (ours.eval()(ids).logits - theirs.eval()(ids).logits).abs().max()
    print(f"largest difference of the logits of `expert_lora` and PEFT: {difference:.1e}")
    mine = tasks(ours, ids)
    print(f"{'time of the peer / time of expert_lora':<42}" + "".join(f"{name:>18}" for name in mine))
    peers = {
        "PEFT, stock experts": theirs,
        "PEFT with keep_factors, moe_ext": kept,
        "base model, stock experts": base,
        "base model, moe_ext": same,
    }
    for name, model in peers.items():
        theirs_tasks = tasks(model, ids)
        if model in (base, same):  # a step of the base trains the experts themselves, which is another task
            del theirs_tasks["training step"]
        cells = [ratio(task, mine[key], args.repeats) for key, task in theirs_tasks.items()]
        print(f"{name:<42}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
