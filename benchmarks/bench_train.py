"""A training step with `MoETrainer` and our experts against the stock `Trainer` on the same model, in one run.

    python benchmarks/bench_train.py [--rounds 5] [--steps 3] [--batch 4] [--length 256] [--device cuda]

SmolLM2-135M, upcycled to four experts in every layer; the peer is the stock Mixtral that the same upcycling exports,
with the experts that Transformers chooses, and with others that it has. AdamW, float32 on a CPU, bfloat16 on a GPU.
Rounds of a few steps alternate; what is printed is the median over rounds of the ratio of step times (ours / stock;
below 1 is faster) ± half the range, and what the routing metrics add.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
import time
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_moe_ext as moe
from hf_moe_ext.data import load_domain, pack
from hf_moe_ext.data.packages import SMOLLM2, package_file
from hf_moe_ext.gguf import from_gguf


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step but the first, which pays for what is done once."""

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self.device = device

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 1:
            self.seconds.append(self.now() - self.begin)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def step_time(kind: type[Trainer], model: Any, data: Any, args: argparse.Namespace, **options: Any) -> float:
    """Median seconds of a step over one short training."""
    arguments = moe.MoETrainingArguments if kind is moe.MoETrainer else TrainingArguments
    times = StepTimes(args.device)
    with tempfile.TemporaryDirectory() as folder:
        training = arguments(
            folder,
            max_steps=args.steps + 1,
            per_device_train_batch_size=args.batch,
            logging_steps=args.steps + 1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=args.device == "cpu",
            bf16=args.device == "cuda",
            dataloader_pin_memory=args.device == "cuda",
            learning_rate=1e-5,
            **options,
        )
        trainer = kind(model=model, args=training, train_dataset=data, callbacks=[times])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return statistics.median(times.seconds)


def models(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The same Mixture-of-Experts as a stock and as an extended model, and windows of text."""
    if args.smoke:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        dense: Any = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
        ids = torch.randint(0, 256, (args.batch * 4, args.length))
        data: Any = [{"input_ids": row, "labels": row} for row in ids]
    else:
        dense, tokenizer = from_gguf(package_file(SMOLLM2))
        data = pack(load_domain("prose"), tokenizer, args.length, limit=256)
    options: dict[str, Any] = {"num_experts": args.experts, "seed": 0, "check": False}
    stock = moe.upcycle(dense, "sparse", target="stock", layers="all", **options)
    ours = moe.extend(copy.deepcopy(stock), moe.MoeExtension(router=moe.TopKRouterConfig()))
    ours.set_experts_implementation("moe_ext")
    return stock, ours, data


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    # `batched_mm` copies a whole expert for every token that uses it: more memory than most machines have.
    parser.add_argument("--peers", nargs="*", default=["eager"], help="Further experts implementations of the peer.")
    parser.add_argument("--smoke", action="store_true", help="A tiny random model, to see that it runs.")
    args = parser.parse_args()
    torch.manual_seed(0)
    stock, ours, data = models(args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads,")
    print(f"{platform.machine()} {device}; {args.batch} x {args.length} tokens")
    peers = {
        "default": stock.config._experts_implementation,
        **{name: name for name in args.peers},
    }
    ratios: dict[str, list[float]] = {name: [] for name in (*peers, "metrics")}
    for _ in range(args.rounds):
        mine = step_time(moe.MoETrainer, ours, data, args)
        ratios["metrics"].append(mine / step_time(moe.MoETrainer, ours, data, args, routing_metrics=False))
        for name, implementation in peers.items():
            stock.set_experts_implementation(implementation)
            ratios[name].append(mine / step_time(Trainer, stock, data, args))
    rows = {f"MoETrainer, moe_ext / Trainer, {name} ({peers[name]})": ratios[name] for name in peers}
    rows["with routing metrics / without"] = ratios["metrics"]
    for name, found in rows.items():
        spread = (max(found) - min(found)) / 2
        print(f"{name:<60}{statistics.median(found):>7.2f} ±{spread:>5.2f}", flush=True)


if __name__ == "__main__":
    main()
