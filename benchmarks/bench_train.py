"""A training step with `MoETrainer` and our experts against the stock `Trainer` on the same model, in one run.

    python benchmarks/bench_train.py [--rounds 5] [--steps 3] [--batch 4] [--length 256] [--device cuda]
    python benchmarks/bench_train.py --profile

SmolLM2-135M, upcycled to four experts in every layer; the peer is the stock Mixtral that the same upcycling exports,
with the experts that Transformers chooses, and with others that it has. AdamW, float32 on a CPU, bfloat16 on a GPU.
Rounds of a few steps alternate; what is printed is the median over rounds of the ratio of step times (ours / stock;
below 1 is faster) ± half the range, and what the routing metrics add. On a CPU both the time on the clock and that of
the processor are compared: where other programs run, the second one varies less.

`--profile` (on a CPU) prints where the processor's time of a step goes in both models, and how fast the products of
the experts are beside the fastest products of their sizes. That bounds what kernels can give.
"""

from __future__ import annotations

import argparse
import copy
import functools
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_moe_ext as moe
from hf_moe_ext.data import load_domain, pack
from hf_moe_ext.data.packages import SMOLLM2, package_file
from hf_moe_ext.gguf import from_gguf
from hf_moe_ext.kernels.cpu_matmul import candidates
from hf_moe_ext.trainers.moe_trainer import find_link
from hf_moe_ext.trainers.routing_metrics import RoutingMetrics


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step but the first, which pays for what is done once: on the clock, and of the
    processor."""

    def __init__(self, device: str) -> None:
        self.seconds: list[tuple[float, float]] = []
        self.device = device

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 1:
            clock, processor = self.now()
            self.seconds.append((clock - self.begin[0], processor - self.begin[1]))

    def now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    @property
    def medians(self) -> tuple[float, float]:
        clock, processor = zip(*self.seconds, strict=True)
        return statistics.median(clock), statistics.median(processor)


def step_time(
    kind: type[Trainer], model: Any, data: Any, args: argparse.Namespace, **options: Any
) -> tuple[float, float]:
    """Median seconds of a step over one short training: on the clock, and of the processor."""
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
    return times.medians


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


class Parts:
    """Processor seconds of modules, forward and backward, and of everything else in a step."""

    def __init__(self, model: Any) -> None:
        self.seconds: dict[str, float] = {}
        self._begun: dict[tuple[Any, str], float] = {}
        self._handles: list[Any] = []
        projections = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "projections of attention")
        named = {"experts": "experts", "gate": "routers", "lm_head": "head", **projections}
        for name, module in model.named_modules():
            part = named.get(name.rpartition(".")[2])
            if part is not None:
                self._watch(module, part)

    def _watch(self, module: Any, part: str) -> None:
        def begin(way: str) -> Any:
            return lambda *_: self._begun.__setitem__((module, way), time.process_time())

        def end(way: str) -> Any:
            return lambda *_: self.add(part, time.process_time() - self._begun[module, way])

        self._handles += [
            module.register_forward_pre_hook(begin("forward")),
            module.register_forward_hook(end("forward")),
            module.register_full_backward_pre_hook(begin("backward")),
            module.register_full_backward_hook(end("backward")),
        ]

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def profile(stock: Any, ours: Any, data: Any, args: argparse.Namespace) -> Iterator[str]:
    """The share of each part in a step of both models, and the speed of products; medians over the rounds."""
    batch = {
        key: torch.stack([torch.as_tensor(data[i][key]) for i in range(args.batch)]) for key in ("input_ids", "labels")
    }
    optimizers = {
        name: torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=True)
        for name, model in (("stock", stock), ("ours", ours))
    }
    link = find_link(ours)
    assert link is not None
    found: dict[str, list[dict[str, float]]] = {"stock": [], "ours": []}
    for turn in range(args.rounds + 1):
        for name, model in (("stock", stock), ("ours", ours)):
            parts, contexts = Parts(model), []
            link.observers[:] = [contexts.extend]
            start = time.process_time()
            loss = model(**batch).loss
            middle = time.process_time()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            clipped = time.process_time()
            optimizers[name].step()
            model.zero_grad()
            parts.add("AdamW", time.process_time() - clipped)
            total = time.process_time() - start
            if name == "ours":
                metrics, begun = RoutingMetrics(), time.process_time()
                metrics.update(contexts)
                metrics.end_step()
                parts.add("metrics", time.process_time() - begun)
                total += parts.seconds["metrics"]
            parts.add("everything else", total - sum(parts.seconds.values()))
            parts.remove()
            link.observers.clear()
            if turn:
                found[name].append({**parts.seconds, "step": total, "forward": middle - start})
    names = [
        "step",
        "forward",
        "experts",
        "projections of attention",
        "routers",
        "head",
        "AdamW",
        "metrics",
        "everything else",
    ]
    yield f"{'processor seconds of a step':<32}{'stock':>10}{'':>8}{'ours':>10}{'':>8}"
    for part in names:
        cells = ""
        for rounds in found.values():
            seconds = statistics.median(one.get(part, 0.0) for one in rounds)
            share = seconds / statistics.median(one["step"] for one in rounds)
            cells += f"{seconds:>10.3f}{share:>8.1%}"
        yield f"{part:<32}{cells}"
    tokens, config = args.batch * args.length, stock.config
    products = 3 * 2 * tokens * config.num_experts_per_tok * 3 * config.hidden_size * config.intermediate_size
    best = fastest_products(tokens * config.num_experts_per_tok // config.num_local_experts, config)
    experts = {name: statistics.median(one["experts"] for one in rounds) for name, rounds in found.items()}
    speeds = {name: products * config.num_hidden_layers / seconds / 1e9 for name, seconds in experts.items()}
    yield f"experts, GFLOP/s: stock {speeds['stock']:.0f}, ours {speeds['ours']:.0f}, products alone {best:.0f}"
    step = statistics.median(one["step"] for one in found["stock"])
    bound = 1 - experts["stock"] / step * (1 - speeds["stock"] / best)
    yield f"a step is at least {bound:.2f} of the stock one's, with experts that were nothing but such products"


def fastest_products(rows: int, config: Any) -> float:
    """GFLOP/s of the six products of an expert, forward and backward, each by the fastest call there is for it."""
    hidden, wide, narrow = config.hidden_size, 2 * config.intermediate_size, config.intermediate_size
    seconds, operations = 0.0, 0
    for inputs, outputs in ((hidden, wide), (narrow, hidden)):
        x, d = torch.randn(rows, inputs), torch.randn(rows, outputs)
        weights = [torch.randn(outputs, inputs) for _ in range(4)]
        transposed = [weight.t() for weight in weights]
        for left, rights in ((x, weights), (d, transposed)):
            seconds += fastest_call(candidates(left.dtype, rows).values(), left, rights)
        gradient = torch.empty(outputs, inputs)
        seconds += shortest([functools.partial(torch.mm, d.t(), x, out=gradient)])
        operations += 3 * 2 * rows * inputs * outputs
    return operations / seconds / 1e9


def fastest_call(calls: Iterable[Any], left: torch.Tensor, rights: list[torch.Tensor]) -> float:
    buffer = torch.empty(len(left) * len(rights[0]))
    return min(shortest([functools.partial(call, left, right, buffer) for right in rights]) for call in calls)


def shortest(calls: list[Any], repeats: int = 20) -> float:
    """The least processor seconds of a call; they take turns, so that weights come from memory."""
    best = float("inf")
    for turn in range(repeats):
        begun = time.process_time()
        calls[turn % len(calls)]()
        best = min(best, time.process_time() - begun)
    return best


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
    parser.add_argument("--profile", action="store_true", help="Where the time of a step on a CPU goes.")
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
    if args.profile:
        for line in profile(stock, ours, data, args):
            print(line, flush=True)
        return
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in (*peers, "metrics")}
    for _ in range(args.rounds):
        mine = step_time(moe.MoETrainer, ours, data, args)
        without = step_time(moe.MoETrainer, ours, data, args, routing_metrics=False)
        ratios["metrics"].append((mine[0] / without[0], mine[1] / without[1]))
        for name, implementation in peers.items():
            stock.set_experts_implementation(implementation)
            peer = step_time(Trainer, stock, data, args)
            ratios[name].append((mine[0] / peer[0], mine[1] / peer[1]))
    rows = {f"MoETrainer, moe_ext / Trainer, {name} ({peers[name]})": ratios[name] for name in peers}
    rows["with routing metrics / without"] = ratios["metrics"]
    print(f"{'':<60}{'clock':>14}{'' if args.device == 'cuda' else 'processor':>14}")
    for name, found in rows.items():
        columns = list(zip(*found, strict=True))[: 1 if args.device == "cuda" else 2]
        cells = [f"{statistics.median(values):>7.2f} ±{(max(values) - min(values)) / 2:>5.2f}" for values in columns]
        print(f"{name:<60}{''.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
