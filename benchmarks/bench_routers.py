"""What a router costs: each one against the stock top-k gate of the same shape, in one run.

    python benchmarks/bench_routers.py [--tokens 2048] [--experts 64] [--hidden 2048] [--repeats 9] [--only top_p rmoe]

Prints ratios of wall time (router / stock gate; below 1 is faster) for the forward in evaluation and for a training
forward with backward, and the ratios of arithmetic (floating-point operations of the matrix products of a forward, in
evaluation and in training). Both sides alternate, and the median of the ratios of neighbouring runs is taken, so slow
drifts cancel. `top_p`, `expert_choice` and `random_fixed` are bounded to the stock number of slots; without a bound
they sort all experts.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from hf_moe_ext import MoeExtension, RoutingContext, extend
from hf_moe_ext.modeling import modeling_moe_ext  # noqa: F401  (registers the routers)
from hf_moe_ext.modeling.moe_router import list_routers
from hf_moe_ext.modeling.moe_structure import iter_routers


VOCAB = 1024
# What a router needs beside its defaults.
NEEDED: dict[str, dict[str, Any]] = {
    "hash": {"vocab_size": VOCAB},
    "expert_choice": {"allow_non_causal": True, "max_slots": 8},
    "soft_moe": {"allow_non_causal": True},
    "random_fixed": {"start_experts_per_tok": 8, "end_experts_per_tok": 8},
    "top_p": {"max_slots": 8},
}


def build(hidden: int, experts: int, top_k: int) -> MixtralForCausalLM:
    """Two layers, whose experts are as small as can be."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
    )
    return MixtralForCausalLM(config)


class Router:
    """The router of the second layer; the first one has left for it what it hands on."""

    def __init__(self, model: MixtralForCausalLM, declaration: dict[str, Any], ids: torch.Tensor) -> None:
        model = extend(copy.deepcopy(model), MoeExtension.from_dict(declaration))
        self.first, self.second = iter_routers(model)
        self.ids = ids

    def __call__(self, hidden: torch.Tensor, training: bool) -> torch.Tensor:
        for gate in (self.first, self.second):
            gate.train(training)
        slots = self.second.moe_link.slots
        slots.layer_context = self.context
        try:
            _, weights, _ = self.second(hidden)
        finally:
            slots.layer_context = None
        return weights

    def prepare(self, hidden: torch.Tensor, training: bool) -> None:
        """Let the first layer route the tokens."""
        slots = self.first.moe_link.slots
        slots.layer_context = self.context = RoutingContext(input_ids=self.ids, batch_size=len(self.ids))
        with torch.no_grad():
            self.first.train(training)(hidden)
        slots.layer_context = None


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def ratio(ours: Callable[[], object], stock: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median ratio and the spread between its quartiles."""
    for function in (ours, stock, ours, stock):
        function()
    ratios = [seconds(ours) / seconds(stock) for _ in range(repeats)]
    quartiles = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), quartiles[2] - quartiles[0]


def flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"tokens": 2048, "experts": 64, "hidden": 2048, "top_k": 8, "repeats": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()} {where},")
    print(f"{torch.get_num_threads()} threads; T={args.tokens}, E={args.experts}, H={args.hidden}, k={args.top_k}")
    model = build(args.hidden, args.experts, args.top_k).to(device)
    stock = model.model.layers[1].mlp.gate
    hidden = torch.randn(args.tokens, args.hidden, device=device, requires_grad=True)
    ids = torch.randint(0, VOCAB, (1, args.tokens), device=device)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def forward(gate: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def call() -> None:
            with torch.inference_mode():
                gate(hidden)
            synchronize()

        return call

    def step(gate: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def call() -> None:
            weights = gate(hidden)
            if weights.requires_grad:
                weights.sum().backward()
            synchronize()

        return call

    def stock_gate(rows: torch.Tensor) -> torch.Tensor:
        return stock(rows)[1]

    print(f"{'router / stock gate':<18}{'forward':>16}{'with backward':>18}{'arithmetic: eval, training':>30}")
    for name in args.only or list_routers():
        declaration = {"router": {"type": name, **NEEDED.get(name, {})}}
        try:
            router = Router(model, declaration, ids)
        except (ValueError, NotImplementedError) as refusal:
            print(f"{name:<18}  refuses this shape: {refusal}")
            continue
        cells = []
        for training, task in ((False, forward), (True, step)):
            router.prepare(hidden.detach(), training)
            cells.append(ratio(task(partial(router, training=training)), task(stock_gate), args.repeats))
        work = "".join(
            f"{flops(partial(router, hidden, on)) / flops(partial(stock, hidden)):>8.2f}" for on in (False, True)
        )
        times = "".join(f"{median:>11.2f} ±{spread:>4.2f}" for median, spread in cells)
        print(f"{name:<18}{times}{work}", flush=True)


if __name__ == "__main__":
    main()
