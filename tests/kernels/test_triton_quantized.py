"""The kernels on weights in few bits against loops in float64, and what has to hold bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_moe_ext.kernels.quantized_experts import infer_quantized
from hf_moe_ext.kernels.quantized_weights import PER_BYTE, quantize
from hf_moe_ext.kernels.tile_config import KernelConfig
from tests.kernels.references import (
    DEVICE,
    ROUTING_CASES,
    down_reference,
    experts_reference,
    group_slots_reference,
    in_float64,
    poisoned,
    random_experts,
    random_hidden,
    relative_error,
    routing_weights,
    up_reference,
)
from tests.kernels.test_quantized import (
    FORMATS,
    HIDDEN,
    INTERMEDIATE,
    LAYER_FORMATS,
    check_layer,
    normal,
    poison_experts,
    quantised,
    small,
)


pytest.importorskip("triton")

from hf_moe_ext.kernels import triton_quantized  # noqa: E402
from hf_moe_ext.kernels.triton_quantized import (  # noqa: E402
    dequantize_used,
    packed_config,
    packed_down,
    packed_up,
)
from hf_moe_ext.kernels.triton_routing import group_slots  # noqa: E402


pytestmark = pytest.mark.usefixtures("poison_memory")

CONFIGS = {
    "small": KernelConfig(16, 16, 16),
    "larger than the matrices": KernelConfig(32, 128, 32, GROUP_M=1),
}


def routed(case: str) -> tuple[Tensor, int]:
    index, num_experts = ROUTING_CASES[case]
    return index.to(DEVICE), num_experts


@pytest.fixture
def many_rows(monkeypatch):
    """Every batch is a large one."""
    monkeypatch.setattr(triton_quantized, "MANY_ROWS", -1)


# Each kernel --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layout", ["stock", "gpt_oss", "plain_bias"])
@pytest.mark.parametrize("name", LAYER_FORMATS)
def test_products(name, layout, config):
    index, num_experts = routed("unused")
    experts = quantised(
        name, small(num_experts, layout=layout, activation="gpt_oss" if layout == "gpt_oss" else "silu")
    )
    plain, groups = in_float64(experts.dequantize()), group_slots(index, num_experts)
    slow, hidden = group_slots_reference(index, num_experts), random_hidden(len(index), HIDDEN)
    expected, _ = up_reference(hidden, plain, slow)
    found = packed_up(hidden, experts, groups, config=CONFIGS[config])
    used = len(expected)
    assert found.shape == (index.numel(), INTERMEDIATE)
    assert relative_error(found[:used], expected) < 1e-5
    assert found[used:].isnan().all() and used < len(found)  # never written
    rows = poisoned(index.numel(), INTERMEDIATE)
    rows[:used] = expected.float()
    found = packed_down(rows, experts, groups, config=CONFIGS[config])
    assert relative_error(found[:used], down_reference(rows, plain, slow)) < 1e-5
    assert found[used:].isnan().all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantised_experts_are_those_of_the_stack(name, dtype):
    index, num_experts = routed("empty_experts")
    kind, settings = FORMATS[name]
    stack = quantize(normal(num_experts, 20, 256, dtype=dtype).to(DEVICE), kind, **settings)
    found = dequantize_used(stack, group_slots(index, num_experts))
    used = torch.zeros(num_experts, dtype=torch.bool)
    used[index[index < num_experts].long().cpu()] = True
    assert 0 < used.sum() < num_experts
    assert torch.equal(found[used], stack.dequantize()[used])
    assert found[~used].isnan().all()  # never written


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "ternary"])
def test_every_code_is_read_as_the_stack_reads_it(kind):
    """All bytes, also those of codes that `quantize` does not make."""
    length = 256 * PER_BYTE[kind]
    stack = quantize(torch.ones(1, 1, length, device=DEVICE), kind)
    every = torch.arange(256, device=DEVICE, dtype=torch.uint8).view(1, 1, 256)
    stack = replace(stack, packed=every.view(torch.int8) if kind == "int8" else every)
    index = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    assert torch.equal(dequantize_used(stack, group_slots(index, 1)), stack.dequantize())


@pytest.mark.parametrize("name", ["int8", "ternary"])
def test_odd_sizes(name):
    index, num_experts = routed("unused")
    sizes = (50, 33) if name == "int8" else (52, 36)
    experts = quantised(name, random_experts(num_experts, *sizes))
    check_layer(experts, index, triton_quantized)


@pytest.mark.parametrize("group", [64, 128])
def test_several_steps_of_a_group_and_several_groups(group):
    index, num_experts = routed("empty_experts")
    stack = {"group_size": group, "zero_points": True}
    experts = triton_quantized.QuantizedExperts(
        quantize(normal(num_experts, 32, 256).to(DEVICE) / 16, "int4", **stack),
        quantize(normal(num_experts, 256, 16).to(DEVICE), "int8"),
        None,
        None,
        True,
        True,
        random_experts().activation,
        random_experts().apply,
    )
    hidden, factors = normal(len(index), 256).to(DEVICE), routing_weights(index, num_experts)
    clean = routing_weights(index, num_experts, poison_unused=False)
    expected = experts_reference(hidden, in_float64(experts.dequantize()), index, clean)
    groups = group_slots(index, num_experts)
    for depth in (16, 64):
        rows = packed_up(hidden, experts, groups, config=KernelConfig(16, 16, depth))
        rows = packed_down(rows, experts, groups, config=KernelConfig(16, 32, 16))
        found = triton_quantized.combine(rows, groups, factors, len(hidden), out_dtype=hidden.dtype)
        assert relative_error(found, expected) < 1e-5


def test_hidden_states_in_any_layout():
    index, num_experts = routed("plain")
    experts, groups = quantised("int4", small(num_experts)), group_slots(index, num_experts)
    hidden = random_hidden(len(index), HIDDEN)
    wide = poisoned(len(index), 2 * HIDDEN)
    wide[:, ::2] = hidden
    expected = packed_up(hidden, experts, groups)
    assert torch.equal(packed_up(wide[:, ::2], experts, groups), expected)
    assert torch.equal(packed_up(hidden.T.contiguous().T, experts, groups), expected)


# The layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ROUTING_CASES)
def test_routing_of_few_rows(case):
    index, num_experts = routed(case)
    experts = quantised("int4_zeros", small(num_experts, layout="gpt_oss", activation="gpt_oss"))
    (found,) = check_layer(experts, index, triton_quantized, gradients=False)
    assert (found[(index >= num_experts).all(-1)] == 0).all()


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("case", ["unused", "all_unused", "empty_experts", "one_token", "no_tokens"])
@pytest.mark.parametrize("activation", ["gpt_oss", None])
def test_routing_of_many_rows_and_gradients(activation, case):
    index, num_experts = routed(case)
    experts = quantised("nf4", small(num_experts, layout="gpt_oss", activation=activation))
    check_layer(experts, index, triton_quantized)


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("name", LAYER_FORMATS)
@pytest.mark.parametrize("layout", ["stock", "plain_transposed"])
def test_gradients_of_all_formats(layout, name):
    index, num_experts = routed("unused")
    check_layer(quantised(name, small(num_experts, layout=layout)), index, triton_quantized)


def test_float16():
    index, num_experts = routed("unused")
    for name in ("int8", "nf4"):
        experts = quantised(name, small(num_experts, dtype=torch.float16))
        check_layer(experts, index, triton_quantized, tolerance=3e-3, gradients=False)


def test_float32_tokens_of_experts_in_half_precision():
    index, num_experts = routed("plain")
    experts = quantised("int4", small(num_experts, dtype=torch.float16))
    hidden, factors = random_hidden(len(index), HIDDEN), routing_weights(index, num_experts)
    found = infer_quantized(hidden, index, factors, experts, triton_quantized)
    assert found.dtype == torch.float32
    expected = experts_reference(hidden, in_float64(experts.dequantize()), index, factors)
    assert relative_error(found, expected) < 3e-3


def test_few_rows_stay_packed_and_many_do_not(monkeypatch):
    calls = []
    for name in ("packed_up", "dequantize_used"):
        function = getattr(triton_quantized, name)
        monkeypatch.setattr(triton_quantized, name, lambda *args, n=name, f=function: calls.append(n) or f(*args))
    monkeypatch.setattr(triton_quantized, "MANY_ROWS", 8)
    experts = quantised("int4", small())
    for tokens, expected in ((20, ["packed_up"]), (21, ["dequantize_used"] * 2)):
        index = torch.arange(2 * tokens, device=DEVICE).view(-1, 2) % 5
        check_layer(experts, index, triton_quantized, gradients=False)
        assert calls == expected
        calls.clear()
    check_layer(quantised("int4", small(activation=None)), index[:4], triton_quantized, gradients=False)
    assert calls == ["dequantize_used"] * 2


@pytest.mark.parametrize("many", [False, True])
def test_experts_that_are_not_used_are_not_read(many, monkeypatch):
    if many:
        monkeypatch.setattr(triton_quantized, "MANY_ROWS", -1)
    index, num_experts = routed("empty_experts")
    experts = quantised("int4", small(num_experts))
    idle = sorted(set(range(num_experts)) - set(index.flatten().tolist()))
    hidden, factors = random_hidden(len(index), HIDDEN), routing_weights(index, num_experts)
    expected = infer_quantized(hidden, index, factors, experts, triton_quantized)
    found = infer_quantized(hidden, index, factors, poison_experts(experts, idle), triton_quantized)
    assert torch.equal(found, expected)


def test_tokens_do_not_depend_on_each_other_bit_for_bit():
    index, num_experts = routed("unused")
    experts, config = quantised("int4_zeros", small(num_experts)), CONFIGS["small"]
    hidden, factors = random_hidden(len(index), HIDDEN), routing_weights(index, num_experts)

    def layer(hidden: Tensor, index: Tensor, factors: Tensor) -> Tensor:
        groups = group_slots(index, num_experts)
        rows = packed_down(packed_up(hidden, experts, groups, config=config), experts, groups, config=config)
        return triton_quantized.combine(rows, groups, factors, len(hidden), out_dtype=hidden.dtype)

    whole = layer(hidden, index, factors)
    assert torch.equal(layer(hidden, index, factors), whole)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(layer(hidden[order], index[order], factors[order]), whole[order])
    assert torch.equal(layer(hidden[:7], index[:7], factors[:7]), whole[:7])
    hidden[5] = math.nan
    spoiled = layer(hidden, index, factors)
    others = torch.arange(len(index), device=DEVICE) != 5
    assert spoiled[5].isnan().all() and torch.equal(spoiled[others], whole[others])


# Configs and refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_the_default_config_stay_within_a_group(name, dtype):
    kind, settings = FORMATS[name]
    stack = quantize(normal(1, 2, 256, dtype=dtype), kind, **settings)
    for rows in (0, 1, 20, 64, 256):
        config = packed_config(rows, 768, stack)
        assert config.BLOCK_K <= (stack.group_size or 128)
        assert 16 <= config.BLOCK_M <= 64 and (dtype == torch.float32 or config.BLOCK_N == 64)


def test_what_the_kernels_refuse():
    index, num_experts = routed("plain")
    experts, groups = quantised("int4", small(num_experts)), group_slots(index, num_experts)
    hidden = random_hidden(len(index), HIDDEN)
    with pytest.raises(ValueError, match="not known as a formula"):
        packed_up(hidden, replace(experts, activation=None), groups)
    with pytest.raises(ValueError, match="`BLOCK_K` must be at most the group of 32, got 64"):
        packed_up(hidden, experts, groups, config=KernelConfig(16, 16, 64))
    with pytest.raises(ValueError, match=rf"the input must be \(rows, {HIDDEN}\)"):
        packed_up(hidden[:, 1:], experts, groups)
    with pytest.raises(ValueError, match="the groups are of 48 slots and 5 experts, the input has 46 and 5"):
        packed_up(hidden[1:], experts, groups)
    with pytest.raises(TypeError, match="the input must be in torch.float32"):
        packed_down(poisoned(48, INTERMEDIATE, dtype=torch.float16), experts, groups)
