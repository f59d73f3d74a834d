"""The experts layer on a GPU: against what the device can do, Transformers, Liger and SonicMoE, in one run.

    python benchmarks/bench_gpu.py [--shapes qwen3 olmoe mixtral granular] [--tasks kernels prefill training decode]
                                   [--tokens 8192 32768] [--peers grouped_mm batched_mm eager liger sonic]
                                   [--dtype bfloat16] [--repeats 15]

Weights, tokens and routing are random. First come the two ceilings of the device, a pass over memory and a
large product. A floor is the time in which they would allow a piece of work: for each kernel, the larger of its
operations over the one and its bytes over the other, where each tensor is read or written once. `of floor` divides it
by the time measured.

A peer's cell is its time divided by ours (above 1: ours is faster). Graphs are replayed where a call can be captured,
so that the time Python takes to launch does not count; "e" marks a call that could not be. `dense` is the time of the
same arithmetic as two matrix products over all slots, divided by ours. `error` is ours and grouped_mm's, against
float32. `saved` is what autograd keeps for backward, ours divided by grouped_mm's.

Liger chooses among about 200 kernels for each pair of H and I, which are compiled side by side first. SonicMoE runs
with the configuration that it has without tuning.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import triton
from bench_experts import SHAPES, Layer, Shape

import hf_moe_ext  # noqa: F401  (registers the implementation)
from hf_moe_ext.kernels.triton_forward import combine
from hf_moe_ext.kernels.triton_routing import compile_only, group_slots, tile_list
from hf_moe_ext.kernels.triton_tune import LayerShape, problems
from hf_moe_ext.kernels.triton_tune import time_on_gpu as microseconds_of
from hf_moe_ext.kernels.tuning import lookup


DEVICE = "cuda"
WAITS = ("eager", "liger", "sonic")  # for the device or for a compiler, so a graph cannot have them
DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64)
GATHERED_LIMIT = 20e9  # bytes of weights that batched_mm may gather
Run = Callable[[], Any]


class Ceilings:
    """What the device does at best: bytes a second read and written in one pass, operations a second of a product."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        source = torch.randn(2**29, device=DEVICE, dtype=dtype)
        target = torch.empty_like(source)
        seconds = 1e-6 * microseconds_of([lambda: torch.neg(source, out=target)] * 2, repeats=9)
        self.bytes = 2 * source.nbytes / seconds
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=dtype) for _ in range(2))
        self.operations = 2 * 8192**3 / (1e-6 * microseconds_of([lambda: torch.mm(a, b)] * 2, repeats=9))

    def floor(self, operations: float, bytes: float) -> float:
        """Microseconds."""
        return 1e6 * max(operations / self.operations, bytes / self.bytes)


def work(shape: Shape, tokens: int, itemsize: int) -> dict[str, tuple[float, float]]:
    """Operations and bytes of each kernel, with all experts in use. Gathered rows count once for each token."""
    s, e, h, i, t = tokens * shape.top_k, shape.experts, shape.hidden, shape.width, tokens
    bytes = {
        "up": t * h + 2 * e * i * h + s * i,
        "up, kept": t * h + 2 * e * i * h + 3 * s * i,
        "down": s * i + e * h * i + s * h,
        "combine": s * h + t * h,
        "down_backward": t * h + e * h * i + 2 * s * i + 2 * s * i + s * i,
        "gradient of down": t * h + s * i + e * h * i,
        "gradient of up": t * h + 2 * s * i + 2 * e * i * h,
        "input_gradient": 2 * s * i + 2 * e * i * h + s * h,
    }
    product = 2 * s * h * i
    times = {"up": 2, "up, kept": 2, "down": 1, "combine": 0, "down_backward": 1}
    times |= {"gradient of down": 1, "gradient of up": 2, "input_gradient": 2}
    return {name: (times[name] * product, itemsize * number) for name, number in bytes.items()}


def floors(ceilings: Ceilings, shape: Shape, tokens: int) -> dict[str, float]:
    """Microseconds of the kernels, of a forward without gradients and of forward and backward."""
    found = {name: ceilings.floor(*each) for name, each in work(shape, tokens, ceilings.dtype.itemsize).items()}
    found["prefill"] = found["up"] + found["down"] + found["combine"]
    backward = ("down_backward", "gradient of down", "gradient of up", "input_gradient", "combine")
    found["training"] = found["up, kept"] + found["down"] + found["combine"] + sum(found[name] for name in backward)
    distinct = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)
    found["decode"] = ceilings.floor(0, distinct * 3 * shape.hidden * shape.width * ceilings.dtype.itemsize)
    return found


# Time ---------------------------------------------------------------------------------------------------------------


def time_of(calls: Sequence[Run], repeats: int, *, captured: bool = True) -> tuple[float, str]:
    """Microseconds of one call, by a graph, or else one after the other, which "e" marks."""
    if captured:
        return microseconds_of(calls, repeats=repeats), ""
    for call in calls:
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(calls))
    return statistics.median(times), "e"


class Peers(Layer):
    """One layer, run with any implementation, that of Liger too."""

    def call(self, name: str, task: str) -> Run:
        """A call that can be captured. Each one that is made uses other experts."""
        index = next(self.turns)
        forward = {"liger": self._liger, "sonic": self._sonic}.get(name, self._stock)

        def infer() -> torch.Tensor:
            self.experts.config._experts_implementation = name
            with torch.inference_mode():
                return forward(self.hidden, index, self.weights)

        hidden, weights = self.hidden.detach().requires_grad_(), self.weights.detach().requires_grad_()
        leaves = (hidden, weights, *self.experts.parameters())

        def train() -> tuple[torch.Tensor, ...]:
            self.experts.config._experts_implementation = name
            return torch.autograd.grad(forward(hidden, index, weights), leaves, self.upstream)

        return train if task == "training" else infer

    def _stock(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.experts(hidden, index, weights)

    def _liger(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        compile_candidates_at_once()
        up, down = self.experts.gate_up_proj, self.experts.down_proj
        return LigerFusedMoEFunction.apply(hidden, up, down, index.int(), weights)

    def _sonic(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        import quack.gemm_interface as gemms
        import sonicmoe

        for name in ("gemm_tuned", "gemm_act_tuned", "gemm_dact_tuned", "gemm_gated_tuned", "gemm_dgated_tuned"):
            tuned = getattr(gemms, name)
            if not isinstance(tuned, functools.partial):
                setattr(gemms, name, functools.partial(tuned.fn, config=None))
        tokens = torch.arange(len(hidden), device=DEVICE, dtype=torch.int32).repeat_interleave(index.shape[1])
        up, down = (weight.permute(1, 2, 0) for weight in (self.experts.gate_up_proj, self.experts.down_proj))
        out, _ = sonicmoe.moe_general_routing_inputs(
            hidden,
            weights.reshape(-1).float(),
            tokens,
            index.reshape(-1).int(),
            up,
            None,
            down,
            None,
            self.shape.experts,
            torch.cuda.current_stream().cuda_stream,
            sonicmoe.enums.ActivationType.SWIGLU,
            not torch.is_grad_enabled(),
            True,  # gate rows before up rows
        )
        return out

    def dense_call(self) -> Run:
        """The arithmetic of the forward, one matrix for all rows."""

        def run() -> None:
            with torch.inference_mode():
                F.linear(self.rows, self.experts.gate_up_proj[0])
                F.linear(self.middle, self.experts.down_proj[0])

        return run


@functools.cache
def compile_candidates_at_once() -> None:
    """Make Triton's tuner compile what it chooses among side by side: one by one takes a quarter of an hour."""
    from triton.runtime.autotuner import Autotuner

    run, seen = Autotuner.run, set()

    def compile_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        key = (id(self), *(kwargs.get(name) for name in self.keys))
        if len(self.configs) > 1 and key not in seen:
            seen.add(key)
            options = {name: value for name, value in kwargs.items() if name not in ("grid", "warmup")}
            with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
                for config in self.configs:
                    self.fn.warmup(*args, grid=(1,), **options, **config.all_kwargs())
        return run(self, *args, **kwargs)

    Autotuner.run = compile_first


@torch.no_grad()
def errors(layer: Peers) -> str:
    """Ours and grouped_mm's: error of the forward for some tokens, against float32, relative to its norm."""
    index, hidden, weights = next(layer.turns)[:256], layer.hidden[:256], layer.weights[:256]
    up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    exact = torch.zeros(hidden.shape, device=DEVICE)
    for expert in range(layer.shape.experts):
        token, slot = torch.where(index == expert)
        gate, value = (hidden[token].float() @ up[expert].float().T).chunk(2, dim=-1)
        out = (F.silu(gate) * value) @ down[expert].float().T
        exact.index_add_(0, token, out * weights[token, slot, None])
    found = []
    for name in ("moe_ext", "grouped_mm"):
        layer.experts.config._experts_implementation = name
        with torch.inference_mode():
            out = layer.experts(hidden, index, weights)
        found.append(float((out.float() - exact).norm() / exact.norm()))
    return f"{found[0]:.1e} / {found[1]:.1e}"


# Tables -------------------------------------------------------------------------------------------------------------


def table(columns: Sequence[str]) -> Callable[..., None]:
    """Print the head of a table; the result prints a row."""
    print("\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns), flush=True)
    return lambda *cells: print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def kernels_table(names: Sequence[str], tokens: Sequence[int], ceilings: Ceilings, repeats: int) -> None:
    """Each kernel by itself, with the config that it would be given."""
    row = table(("shape", "T", "kernel", "us", "TFLOP/s", "of floor", "config"))
    for name, number in itertools.product(names, tokens):
        shape = SHAPES[name]
        floor, amount = floors(ceilings, shape, number), work(shape, number, ceilings.dtype.itemsize)
        for kernel, us, config in (
            *_products(shape, ceilings.dtype, number, repeats),
            *_others(shape, ceilings.dtype, number, repeats),
        ):
            operations, _ = amount.get(kernel, (0, 0))
            rate = f"{1e-6 * operations / us:.0f}" if operations else ""
            row(name, number, kernel, f"{us:.1f}", rate, _of(floor[kernel], us) if kernel in floor else "", config)
        torch.cuda.empty_cache()


def _products(shape: Shape, dtype: torch.dtype, tokens: int, repeats: int) -> Iterator[tuple[str, float, str]]:
    sizes = LayerShape(shape.hidden, shape.width, shape.experts, shape.top_k)
    names = ("up", "up, kept", "down", "input_gradient", "down_backward", "gradient of up", "gradient of down")
    found = [*problems(sizes, dtype, tokens * shape.top_k // shape.experts, torch.device(DEVICE))][: len(names)]
    configs: list[Any] = [lookup(problem.key) or problem.default for problem in found]
    with compile_only():
        for problem, config in zip(found, configs, strict=True):
            problem.make(0, config)()
    for name, problem, config in zip(names, found, configs, strict=True):
        calls = [problem.make(number, config) for number in range(problem.num_buffers)]
        size = "x".join(str(getattr(config, f"BLOCK_{axis}")) for axis in "MNK")
        how = f"{size}, {config.num_warps} warps, {config.num_stages} stages, group {config.GROUP_M}"
        how += ", persistent" * config.persistent + ", tma" * config.tma
        yield name, microseconds_of(calls, repeats=repeats), how


def _others(shape: Shape, dtype: torch.dtype, tokens: int, repeats: int) -> Iterator[tuple[str, float, str]]:
    layer = Peers(shape, dtype, DEVICE)
    layer.prepare(tokens)
    index = next(layer.turns).int()
    groups = group_slots(index, shape.experts)
    calls: dict[str, Run] = {
        "group_slots": lambda: group_slots(index, shape.experts),
        "tile_list": lambda: tile_list(replace(groups, tiles={}), 128),
        "combine": lambda: combine(layer.rows, groups, layer.weights, tokens, out_dtype=dtype),
    }
    for name, call in calls.items():
        yield name, microseconds_of([call] * 16, repeats=repeats), ""  # many: a graph takes microseconds to start


def layers_table(
    names: Sequence[str], task: str, tokens: Sequence[int], peers: Sequence[str], ceilings: Ceilings, repeats: int
) -> None:
    """The whole layer."""
    decode = task == "decode"
    last = ("dense", "error") if task == "prefill" else ("saved",) if task == "training" else ()
    row = table(("shape", "task", "T", "us", "TFLOP/s", "of floor", *peers, *last))
    for name in names:
        shape = SHAPES[name]
        layer = Peers(shape, ceilings.dtype, DEVICE)
        for number in tokens:
            layer.prepare(number)
            calls = 16 if decode else 2
            floor = floors(ceilings, shape, number)[task]
            ours, mark = time_of([layer.call("moe_ext", task) for _ in range(calls)], repeats)
            operations = 2 * number * shape.top_k * shape.hidden * shape.width * (9 if task == "training" else 3)
            cells = [name, task, number, f"{ours:.0f}{mark}", f"{1e-6 * operations / ours:.0f}", _of(floor, ours)]
            for peer in peers:
                gathered = 3 * number * shape.top_k * shape.hidden * shape.width * ceilings.dtype.itemsize
                if (peer == "batched_mm" and gathered > GATHERED_LIMIT) or (peer == "eager" and task == "training"):
                    cells.append("-")
                    continue
                try:
                    theirs, mark = time_of(
                        [layer.call(peer, task) for _ in range(calls)], repeats, captured=peer not in WAITS
                    )
                except (RuntimeError, ImportError) as error:  # told in the table: the rest is worth the time
                    cells.append(f"({type(error).__name__})")
                    continue
                cells.append(f"{theirs / ours:.2f}{mark}")
            if task == "prefill":
                dense, _ = time_of([layer.dense_call()], repeats)
                cells += [f"{dense / ours:.2f}", errors(layer)]
            if task == "training":
                layer.index = next(layer.turns)
                cells.append(f"{layer.saved_bytes('moe_ext') / layer.saved_bytes('grouped_mm'):.2f}")
            row(*cells)
            torch.cuda.empty_cache()
        del layer
        torch.cuda.empty_cache()


def _of(floor: float, us: float) -> str:
    return f"{floor / us:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    tasks = ("kernels", "prefill", "training", "decode")
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=tasks)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768], help="of everything but decoding")
    parser.add_argument("--peers", nargs="+", default=["grouped_mm", "batched_mm", "eager", "liger", "sonic"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    ceilings = Ceilings(getattr(torch, args.dtype))
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, transformers "
        f"{transformers.__version__}, {args.dtype}; memory {1e-12 * ceilings.bytes:.2f} TB/s, product "
        f"{1e-12 * ceilings.operations:.0f} TFLOP/s"
    )
    for task in args.tasks:
        if task == "kernels":
            kernels_table(args.shapes, args.tokens, ceilings, args.repeats)
        else:
            tokens = DECODE_TOKENS if task == "decode" else args.tokens
            layers_table(args.shapes, task, tokens, args.peers, ceilings, args.repeats)


if __name__ == "__main__":
    main()
