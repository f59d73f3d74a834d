"""The experts layer against the implementations of Transformers, in one run.

    python benchmarks/bench_experts.py [--device cpu] [--shapes qwen3 olmoe] [--dtypes float32 bfloat16]
                                       [--tasks decode prefill training accumulation] [--tokens 1 64 ...]
                                       [--peers eager batched_mm grouped_mm] [--repeats 7]

One layer of stock experts with fresh random weights; every implementation gets the same tokens and routing. A cell is
the time of a peer divided by ours (above 1: ours is faster), the median over neighbouring runs, so that slow drifts
cancel.
`best` is the smallest of a row's cells, that is against the best peer; `dense` divides the time of the same arithmetic
without routing (two matrix products over all slots) by ours. `saved` is what autograd keeps for backward, ours by the
best peer's. A peer that would gather more than the memory limit is left out ("-"), and so is one
that takes over 20 times as long as ours in two calls (">20").
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import hf_moe_ext  # noqa: F401  (registers the implementation)


@dataclass(frozen=True)
class Shape:
    """Experts, slots a token, hidden size, width of an expert."""

    experts: int
    top_k: int
    hidden: int
    width: int


SHAPES = {
    "qwen3": Shape(128, 8, 2048, 768),  # Qwen3-30B-A3B
    "olmoe": Shape(64, 8, 2048, 1024),  # OLMoE-1B-7B
    "mixtral": Shape(8, 2, 4096, 14336),  # Mixtral-8x7B
    "granular": Shape(128, 8, 1536, 256),
}
TASKS = {"decode": (1, 2, 4), "prefill": (64, 512, 2048), "training": (512, 2048), "accumulation": (512, 2048)}
PEERS = ("eager", "batched_mm", "grouped_mm")
GATHERED_LIMIT = 6e9  # bytes of weights that batched_mm may gather


def build(shape: Shape, dtype: torch.dtype, device: str) -> nn.Module:
    """Stock experts with random weights."""
    config = Qwen3MoeConfig(
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
    )
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config).to(dtype)
    experts = experts.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)
    return experts


def routing(shape: Shape, tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts for each token, weights that sum to 1."""
    generator = torch.Generator(device).manual_seed(tokens)
    logits = torch.randn(tokens, shape.experts, device=device, generator=generator)
    weights, index = logits.softmax(-1).topk(shape.top_k, dim=-1)
    return index, weights / weights.sum(-1, keepdim=True)


class Layer:
    """One experts module, run with any implementation."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.experts = build(shape, dtype, device)

    def prepare(self, tokens: int) -> None:
        """Inputs of the next runs."""
        generator = torch.Generator(self.device).manual_seed(1)
        size = (tokens, self.shape.hidden)
        self.hidden = torch.randn(size, device=self.device, generator=generator).to(self.dtype)
        self.upstream = torch.randn(size, device=self.device, generator=generator).to(self.dtype)
        index, self.weights = routing(self.shape, tokens, self.device)
        # As in a model, where layer follows layer: a call does not find the experts of the last one in the caches.
        shifts = torch.arange(0, self.shape.experts, self.shape.top_k).tolist()
        self.turns = itertools.cycle([(index + shift) % self.shape.experts for shift in shifts])
        self.index = index
        slots = tokens * self.shape.top_k
        self.rows = torch.randn(slots, self.shape.hidden, device=self.device, generator=generator).to(self.dtype)
        self.middle = torch.randn(slots, self.shape.width, device=self.device, generator=generator).to(self.dtype)

    def infer(self, name: str) -> None:
        self.experts.config._experts_implementation = name
        with torch.inference_mode():
            self.experts(self.hidden, self.index, self.weights)

    def turn(self) -> None:
        """Let the next call use other experts."""
        self.index = next(self.turns)

    def train(self, name: str) -> None:
        """Forward and backward of the first batch of a step, whose gradients are new."""
        self.experts.zero_grad()
        self.accumulate(name)

    def accumulate(self, name: str) -> None:
        """Forward and backward of a further batch, whose gradients are added to what is there."""
        self.experts.config._experts_implementation = name
        hidden, weights = self.hidden.detach().requires_grad_(), self.weights.detach().requires_grad_()
        self.experts(hidden, self.index, weights).backward(self.upstream)

    def dense(self) -> None:
        """The arithmetic of the forward without routing, one matrix for all rows."""
        with torch.inference_mode():
            F.linear(self.rows, self.experts.gate_up_proj[0])
            F.linear(self.middle, self.experts.down_proj[0])

    def saved_bytes(self, name: str) -> int:
        """What autograd keeps between forward and backward, without parameters and inputs."""
        known = {tensor.data_ptr() for tensor in (*self.experts.parameters(), self.hidden)}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.experts.config._experts_implementation = name
        hidden, weights = self.hidden.detach().requires_grad_(), self.weights.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = self.experts(hidden, self.index, weights)
        del out
        return sum(kept.values())


def seconds(function: Callable[[], Any], device: str) -> float:
    """Wall time of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(layer: Layer, task: str, tokens: int, names: list[str], repeats: int) -> dict[str, str]:
    """The cells of one row."""
    layer.prepare(tokens)
    run = {"training": layer.train, "accumulation": layer.accumulate}.get(task, layer.infer)
    trains = run != layer.infer
    shape, itemsize = layer.shape, layer.dtype.itemsize
    gathered = 3 * tokens * shape.top_k * shape.hidden * shape.width * itemsize
    row: dict[str, str] = {}
    run("moe_ext")
    ours = min(seconds(lambda: run("moe_ext"), layer.device) for _ in range(2))
    peers: dict[str, Callable[[], Any]] = {}
    for name in names:
        if name == "batched_mm" and gathered > GATHERED_LIMIT:
            row[name] = "-"
            continue
        first = seconds(lambda name=name: run(name), layer.device)  # type: ignore[misc]
        if first > 20 * ours:
            first = seconds(lambda name=name: run(name), layer.device)  # type: ignore[misc]
        if first > 20 * ours:
            row[name] = ">20"
        else:
            peers[name] = lambda name=name: run(name)  # type: ignore[misc]
    if not trains:
        layer.dense()
        peers["dense"] = layer.dense
    ratios: dict[str, list[float]] = {name: [] for name in peers}
    times = []
    for _ in range(repeats):
        for name, peer in peers.items():
            layer.turn()
            theirs = seconds(peer, layer.device)
            layer.turn()
            times.append(seconds(lambda: run("moe_ext"), layer.device))
            ratios[name].append(theirs / times[-1])
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    row |= {name: f"{value:.2f}" for name, value in medians.items()}
    row["best"] = f"{min(value for name, value in medians.items() if name != 'dense'):.2f}"
    row["ms"] = f"{1e3 * statistics.median(times):.2f}"
    if trains:
        best = min((name for name in medians), key=lambda name: medians[name])
        row["saved"] = f"{layer.saved_bytes('moe_ext') / layer.saved_bytes(best):.2f}"
        layer.experts.zero_grad()
    return row


def device_name(device: str) -> str:
    """For the caption."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--tokens", nargs="+", type=int, help="only these numbers of tokens")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    print(
        f"{device_name(args.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n"
    )
    assert "moe_ext" in ALL_EXPERTS_FUNCTIONS
    columns = (*PEERS, "best", "dense", "saved", "ms")
    print("| shape | dtype | task | T | " + " | ".join(columns) + " |")
    print("| --- | --- | --- | ---: |" + " ---: |" * len(columns))
    for name in args.shapes:
        for dtype in args.dtypes:
            layer = Layer(SHAPES[name], getattr(torch, dtype), args.device)
            for task in args.tasks:
                for tokens in TASKS[task]:
                    if args.tokens and tokens not in args.tokens:
                        continue
                    row = compare(layer, task, tokens, args.peers, args.repeats)
                    cells = " | ".join(row.get(column, "") for column in columns)
                    print(f"| {name} | {dtype} | {task} | {tokens} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
