"""Adapters on experts in few bits, on a CPU: against loops in float64 over the numbers that the few bits stand for."""

from __future__ import annotations

import pytest
import torch

from hf_moe_ext.kernels import cpu_lora, lora_dispatch
from hf_moe_ext.kernels.quantized_lora import run_quantized_lora
from hf_moe_ext.kernels.quantized_weights import quantize_experts

from .references import ROUTING_CASES, random_experts, random_hidden, routing_weights
from .test_lora import NAMES, compare, cpu, random_lora


@pytest.fixture(autouse=True)
def in_few_bits(monkeypatch):
    """`compare` hands on as "kernels" what the reference got as plain numbers."""

    def run(hidden, index, weights, experts, lora, quantized):
        return run_quantized_lora(hidden, index, weights, quantized, lora, cpu_lora)

    monkeypatch.setattr(lora_dispatch, "run", run)


def check(kind, case, *, layout="stock", parts=("up", "down"), frozen=(), **settings):
    index, num_experts = ROUTING_CASES[case]
    quantized = quantize_experts(random_experts(num_experts, layout=layout, **settings), kind)
    numbers = quantized.dequantize()
    return compare(quantized, numbers, random_lora(numbers, parts=parts), index, frozen=frozen)


@cpu
@pytest.mark.parametrize("case", ROUTING_CASES)
def test_routing(case):
    index, num_experts = ROUTING_CASES[case]
    out, found = check("int8", case, layout="gpt_oss")
    unused = index >= num_experts
    assert (out[unused.all(-1)] == 0).all() and (found["factors"][unused] == 0).all()
    idle = sorted(set(range(num_experts)) - set(index.flatten().tolist()))
    assert all((found[name][idle] == 0).all() for name in NAMES)


@cpu
@pytest.mark.parametrize("kind", ["int8", "ternary"])
@pytest.mark.parametrize("layout", ["stock", "bias", "transposed", "interleaved", "plain", "plain_transposed"])
def test_layouts(layout, kind):
    check(kind, "unused", layout=layout)


@cpu
@pytest.mark.parametrize("part", ["up", "down"])
def test_one_projection(part):
    check("int8", "unused", parts=(part,))


@cpu
@pytest.mark.parametrize("frozen", [("hidden",), ("factors",), ("up_a", "down_b"), NAMES])
def test_frozen_inputs_get_no_gradient(frozen):
    check("int8", "unused", frozen=frozen)


@cpu
def test_nothing_of_the_experts_is_kept_but_their_bits():
    index, num_experts = ROUTING_CASES["plain"]
    quantized = quantize_experts(random_experts(num_experts, hidden=256, intermediate=256), "int8")
    lora = random_lora(quantized.dequantize(), rank=1)
    kept = []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    hidden = random_hidden(len(index), 256).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_quantized_lora(hidden, index.long(), routing_weights(index, num_experts), quantized, lora, cpu_lora)
    assert sum(kept) < quantized.down.dequantize().nbytes / 2  # tokens and projections, far below one projection
