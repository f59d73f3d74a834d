"""Frozen experts on a GPU: with adapters, and in few bits, in one run.

    python benchmarks/bench_gpu_frozen.py [--shapes qwen3] [--tasks lora quantized] [--tokens 8192] [--rank 16]
                                          [--repeats 15]

Weights, tokens and routing are random bfloat16. Cells are a time divided by that of the frozen bfloat16 experts alone,
with `moe_ext`, in the same task: 1 means that what was added costs nothing, and below 1 it saves time. "training" is
forward and backward, with gradients of tokens, routing weights and adapters; the experts get none.

`lora`: the adapters apart from the weights, as the kernels have them, and folded into the weights of all experts in
each forward, as PEFT does with `target_parameters`, with the kernels and with `grouped_mm`.
`quantized`: weights in 8, 4 (integers and NF4, groups of 64) and 2 bits (ternary), and the bytes they take.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformers
from bench_experts import SHAPES, Shape
from bench_gpu import DEVICE, Peers, table
from torch.nn.utils.parametrize import register_parametrization

import hf_moe_ext  # noqa: F401  (registers the implementation)
from hf_moe_ext.kernels import lora_dispatch, triton_lora
from hf_moe_ext.kernels.expert_weights import read_experts
from hf_moe_ext.kernels.lora import ExpertLora, LowRank
from hf_moe_ext.kernels.quantized_experts import run_quantized
from hf_moe_ext.kernels.quantized_weights import quantize_experts
from hf_moe_ext.kernels.triton_tune import time_on_gpu


DTYPE = torch.bfloat16
DECODE_TOKENS = (1, 4, 16, 64)
KINDS = {"int8": {}, "int4": {"group_size": 64}, "nf4": {"group_size": 64}, "ternary": {}}
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Folded(torch.nn.Module):
    """W + scale * B A, formed whenever the weight is read."""

    def __init__(self, factors: LowRank) -> None:
        super().__init__()
        self.a, self.b, self.scale = torch.nn.Parameter(factors.a), torch.nn.Parameter(factors.b), factors.scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(weight, self.b, self.a, alpha=self.scale)


def factors(shape: Shape, rank: int) -> ExpertLora:
    """Random adapters on both projections."""

    def low_rank(columns: int, rows: int) -> LowRank:
        a = torch.randn(shape.experts, rank, columns, device=DEVICE, dtype=DTYPE) * columns**-0.5
        b = torch.randn(shape.experts, rows, rank, device=DEVICE, dtype=DTYPE) * 0.01
        return LowRank(a.requires_grad_(), b.requires_grad_(), 2.0)

    return ExpertLora(low_rank(shape.hidden, 2 * shape.width), low_rank(shape.width, shape.hidden))


def time_of(layer: Peers, forward: Forward, task: str, trained: tuple[torch.Tensor, ...], repeats: int) -> float:
    """Microseconds of one call, from a graph of several that use different experts."""

    def call() -> Callable[[], Any]:
        index = next(layer.turns)
        if task != "training":

            def infer() -> torch.Tensor:
                with torch.no_grad():
                    return forward(layer.hidden, index, layer.weights)

            return infer
        hidden, weights = layer.hidden.detach().requires_grad_(), layer.weights.detach().requires_grad_()
        return lambda: torch.autograd.grad(
            forward(hidden, index, weights), (hidden, weights, *trained), layer.upstream
        )

    return time_on_gpu([call() for _ in range(16 if task == "decode" else 2)], repeats=repeats)


def stock(layer: Peers, name: str) -> Forward:
    """The experts module with an implementation of that name."""

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        layer.experts.config._experts_implementation = name
        return layer.experts(hidden, index, weights)

    return forward


def lora_table(shape: str, sizes: list[tuple[str, int]], rank: int, repeats: int) -> None:
    row = table(("shape", "task", "T", "experts alone, us", "adapters apart", "folded", "folded, grouped_mm"))
    layer = Peers(SHAPES[shape], DTYPE, DEVICE)
    layer.experts.requires_grad_(False)
    experts, lora = read_experts(layer.experts), factors(SHAPES[shape], rank)
    trained = tuple(tensor for tensor in lora.tensors if tensor is not None)

    def apart(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return lora_dispatch.run(hidden, index, weights, experts, lora, triton_lora)

    found = []
    for task, tokens in sizes:
        layer.prepare(tokens)
        base = time_of(layer, stock(layer, "moe_ext"), task, (), repeats)
        found.append((task, tokens, base, time_of(layer, apart, task, trained, repeats)))
    modules = {}
    for name, low_rank in (("gate_up_proj", lora.up), ("down_proj", lora.down)):
        assert low_rank is not None
        modules[name] = Folded(low_rank)
        register_parametrization(layer.experts, name, modules[name])
    trained = tuple(tensor for module in modules.values() for tensor in (module.a, module.b))
    for task, tokens, base, ours in found:
        layer.prepare(tokens)
        cells = [
            f"{time_of(layer, stock(layer, name), task, trained, repeats) / base:.2f}"
            for name in ("moe_ext", "grouped_mm")
        ]
        row(shape, task, tokens, f"{base:.0f}", f"{ours / base:.2f}", *cells)


def quantized_table(shape: str, sizes: list[tuple[str, int]], repeats: int) -> None:
    row = table(("shape", "task", "T", "bfloat16, us", *KINDS))
    layer = Peers(SHAPES[shape], DTYPE, DEVICE)
    layer.experts.requires_grad_(False)
    experts = read_experts(layer.experts)
    stacks = {kind: quantize_experts(experts, kind, **settings) for kind, settings in KINDS.items()}
    full = experts.up.nbytes + experts.down.nbytes
    row(shape, "bytes", "", "1", *(f"{(each.up.nbytes + each.down.nbytes) / full:.2f}" for each in stacks.values()))
    for task, tokens in sizes:
        layer.prepare(tokens)
        base = time_of(layer, stock(layer, "moe_ext"), task, (), repeats)
        cells = []
        for each in stacks.values():

            def forward(h: torch.Tensor, i: torch.Tensor, w: torch.Tensor, each: Any = each) -> torch.Tensor:
                return run_quantized(h, i, w, each)

            cells.append(f"{time_of(layer, forward, task, (), repeats) / base:.2f}")
        row(shape, task, tokens, f"{base:.0f}", *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen3"], choices=list(SHAPES))
    parser.add_argument("--tasks", nargs="+", default=["lora", "quantized"], choices=["lora", "quantized"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192], help="of prefill and training")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    import triton

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, transformers "
        f"{transformers.__version__}, rank {args.rank}"
    )
    sizes = [("decode", tokens) for tokens in DECODE_TOKENS]
    sizes += [(task, tokens) for task in ("prefill", "training") for tokens in args.tokens]
    for shape in args.shapes:
        if "lora" in args.tasks:
            lora_table(shape, sizes, args.rank, args.repeats)
        if "quantized" in args.tasks:
            quantized_table(shape, sizes, args.repeats)


if __name__ == "__main__":
    main()
