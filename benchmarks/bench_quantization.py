"""What few bits cost and save on a real model: perplexity by format, and memory and time of training adapters.

    python benchmarks/bench_quantization.py [--windows 4] [--experts 8] [--steps 3] [--length 128]

SmolLM2-135M. Perplexity: upcycled to four copies in every layer, so that the unquantised mixture is the dense model,
on held-out windows of two domains. Training: upcycled to `--experts` experts, adapters of rank 8 on attention and
experts, one window a step, AdamW, each form in a process of its own. Memory is the peak of what is not backed by a
file, above that of the process before it loads the model; Linux only.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.data import load_domain, pack
from hf_moe_ext.data.packages import SMOLLM2, package_file
from hf_moe_ext.evaluation import perplexity
from hf_moe_ext.gguf import from_gguf
from hf_moe_ext.quantization import quantized_size


FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"experts": "int8"},
    "int4, groups of 64": {"experts": "int4"},
    "int4, groups of 32, zero points": {"experts": "int4", "group_size": 32, "zero_points": True},
    "nf4, groups of 64": {"experts": "nf4"},
    "nf4, and linear layers nf4": {"experts": "nf4", "linear": "nf4"},
    "ternary": {"experts": "ternary"},
}
DOMAINS = ("prose", "python")
TRAINED: dict[str, tuple[torch.dtype, dict[str, Any] | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16, experts int8": (torch.bfloat16, {"experts": "int8"}),
    "bfloat16, experts nf4": (torch.bfloat16, {"experts": "nf4"}),
    "bfloat16, all nf4": (torch.bfloat16, {"experts": "nf4", "linear": "nf4"}),
}


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def measure_perplexity(windows: int) -> None:
    dense, tokenizer = from_gguf(package_file(SMOLLM2))
    texts = {name: pack(load_domain(name, "test"), tokenizer, 512, limit=windows) for name in DOMAINS}

    def score(name: str, model: Any) -> None:
        found = [perplexity(model, texts[domain]) for domain in DOMAINS]
        sizes = quantized_size(model)
        columns = (f"{value.perplexity if hasattr(value, 'perplexity') else value:.3f}" for value in found)
        print(f"| {name} | {sizes['total'] / 1e6:.0f} | {' | '.join(columns)} |", flush=True)

    print(f"| format | MB | {' | '.join(DOMAINS)} |\n| --- | --- | {' | '.join(['---'] * len(DOMAINS))} |")
    for name, options in {"float32": None, **FORMATS}.items():
        model = moe.upcycle(dense, num_experts=4, check=False).eval()
        if options is not None:
            moe.quantize(model, moe.MoeQuantizationConfig(**options))
        score(name, model)


def train(folder: str, name: str, steps: int, length: int) -> None:
    """One form, in this process; prints a line of JSON."""
    from peft import LoraConfig, get_peft_model

    from hf_moe_ext.kernels.lora import keep_factors

    dtype, quantized = TRAINED[name]
    options: dict[str, Any] = {"dtype": dtype, "experts_implementation": "moe_ext"}
    if quantized is not None:
        options["quantization_config"] = moe.MoeQuantizationConfig(**quantized)
    before, peak, stop = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, anonymous())

    threading.Thread(target=watch, daemon=True).start()
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    size, loaded = quantized_size(model)["total"], peak - before
    lora = LoraConfig(
        r=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    adapted: Any = get_peft_model(model, lora)
    keep_factors(adapted)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    ids = torch.randint(1000, 40000, (1, length), generator=torch.Generator().manual_seed(0))
    losses, seconds = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
    stop.set()
    found = {"model": size, "loading": loaded, "peak": peak - before, "seconds": min(seconds), "losses": losses}
    print(json.dumps(found))


def measure_training(experts: int, steps: int, length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dense, _ = from_gguf(package_file(SMOLLM2))
        moe.upcycle(dense.to(torch.bfloat16), num_experts=experts, check=False).save_pretrained(folder)
        del dense
        print("| base | MB of the model | MB at most, loading | MB at most, training | s a step | loss |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name in TRAINED:
            command = [sys.executable, __file__, "--train", folder, name, str(steps), str(length)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                print(f"| {name} | {done.stderr.strip().splitlines()[-1]} |")
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            sizes = " | ".join(f"{found[key] / 1e6:,.0f}" for key in ("model", "loading", "peak"))
            losses = f"{found['losses'][0]:.3f} to {found['losses'][-1]:.3f}"
            print(f"| {name} | {sizes} | {found['seconds']:.1f} | {losses} |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        folder, name, steps, length = sys.argv[2:]
        train(folder, name, int(steps), int(length))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("windows", 4), ("experts", 8), ("steps", 3), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        raise SystemExit("the memory is read from /proc, which this system does not have.")
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.processor()}")
    print(f"{torch.get_num_threads()} threads\n")
    measure_perplexity(args.windows)
    print()
    measure_training(args.experts, args.steps, args.length)


if __name__ == "__main__":
    main()
