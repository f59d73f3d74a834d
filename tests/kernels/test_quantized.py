"""Formats of few bits against loops and closed forms, and the layer on a CPU against loops in float64."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_moe_ext.kernels import cpu_experts, cpu_quantized, quantized_weights
from hf_moe_ext.kernels.expert_weights import ExpertWeights
from hf_moe_ext.kernels.quantized_experts import infer_quantized, quantized_kernels_of, run_quantized
from hf_moe_ext.kernels.quantized_weights import (
    NF4,
    PER_BYTE,
    QuantizedExperts,
    QuantizedStack,
    pack,
    quantize,
    quantize_experts,
)

from .references import (
    EXPERTS,
    LAYOUTS,
    ROUTING_CASES,
    experts_reference,
    in_float64,
    random_experts,
    random_hidden,
    relative_error,
    routing_weights,
)


# Name -> (kind, settings).
FORMATS: dict[str, tuple[str, dict]] = {
    "int8": ("int8", {}),
    "int4": ("int4", {"group_size": 32}),
    "int4_128": ("int4", {"group_size": 128}),
    "int4_zeros": ("int4", {"group_size": 32, "zero_points": True}),
    "int4_float32": ("int4", {"scale_dtype": torch.float32}),
    "nf4": ("nf4", {"group_size": 32}),
    "nf4_float16": ("nf4", {"group_size": 128, "scale_dtype": torch.float16}),
    "ternary": ("ternary", {}),
    "ternary_expert": ("ternary", {"scale_of_expert": True}),
}
# Of the layer, whose contractions are too short for groups of 128.
LAYER_FORMATS = ["int8", "int4", "int4_zeros", "nf4", "ternary", "ternary_expert"]
HIDDEN, INTERMEDIATE = 64, 32


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes_reference(stack: QuantizedStack) -> Tensor:
    """(E, N, K) the codes, read bit by bit."""
    per_byte = PER_BYTE[stack.kind]
    bits = 8 // per_byte
    out = torch.empty(stack.shape, dtype=torch.int64)
    for e, rows in enumerate(stack.packed.tolist()):
        for n, row in enumerate(rows):
            for k in range(stack.shape[2]):
                byte = row[k // per_byte]
                out[e, n, k] = byte if per_byte == 1 else byte // 2 ** (bits * (k % per_byte)) % 2**bits
    return out


def groups_of(stack: QuantizedStack, tensor: Tensor) -> Tensor:
    """(E, N, K) -> (E, N, G, numbers of a group)."""
    return tensor.view(*stack.shape[:2], stack.num_groups, -1)


def scales_of(stack: QuantizedStack) -> Tensor:
    return stack.scales.double().expand(*stack.shape[:2], stack.num_groups)[..., None]


def values_of_codes(stack: QuantizedStack, codes: Tensor) -> Tensor:
    """Codes (E, N, G, n) -> float64: what the table in the module says."""
    if stack.kind == "nf4":
        units = torch.tensor(NF4, dtype=torch.float64)[codes]
    else:
        offset = {"int8": 0, "int4": 8, "ternary": 1}[stack.kind]
        units = codes.double() - (offset if stack.zeros is None else stack.zeros.double()[..., None])
    return units * scales_of(stack)


def made(name: str, stack: Tensor) -> QuantizedStack:
    kind, settings = FORMATS[name]
    return quantize(stack, kind, **settings)


# Formats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_byte", [2, 4])
def test_packing_is_that_of_a_loop(per_byte):
    bits = 8 // per_byte
    codes = torch.randint(2**bits, (3, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[0] = 2**bits - 1
    expected = [
        [sum(int(row[k + i]) << bits * i for i in range(per_byte)) for k in range(0, 8, per_byte)] for row in codes
    ]
    assert pack(codes, per_byte).tolist() == expected


@pytest.mark.parametrize("name", FORMATS)
def test_dequantised_numbers_are_those_of_the_codes(name):
    stack = made(name, normal(2, 3, 128))
    expected = values_of_codes(stack, groups_of(stack, codes_reference(stack))).view(stack.shape)
    assert torch.equal(stack.dequantize(), expected.float())  # products of two float32, rounded once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_half_precision_is_rounded_once(name, dtype):
    stack = made(name, normal(2, 3, 128, dtype=dtype))
    found = stack.dequantize()
    assert found.dtype == dtype
    assert torch.equal(found, replace(stack, dtype=torch.float32).dequantize().to(dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_no_other_code_is_nearer(name):
    original = normal(2, 3, 128)
    original[0, 0] += 0.5  # for zero points that are not in the middle
    stack = made(name, original)
    exact = groups_of(stack, original.double())
    error = (values_of_codes(stack, groups_of(stack, codes_reference(stack))) - exact).abs()
    codes = {"int8": range(-127, 128), "int4": range(16), "nf4": range(16), "ternary": range(3)}[stack.kind]
    for code in codes:
        other = (values_of_codes(stack, torch.full_like(exact, code, dtype=torch.int64)) - exact).abs()
        assert (error <= other * (1 + 1e-12)).all(), code


@pytest.mark.parametrize("name", [name for name in FORMATS if "ternary" not in name])
def test_errors_are_within_the_closed_form(name):
    original = normal(3, 4, 256, seed=1)
    original[0, :, 64:] += 1.5
    original[1] *= 1e-6
    stack = made(name, original)
    exact = groups_of(stack, original.double())
    error = groups_of(stack, stack.dequantize().double() - original.double()).abs()
    scales = scales_of(stack)[..., 0]
    if stack.kind == "nf4":
        step = 1 - 0.6961928009986877  # the largest gap of the table
        best = exact.abs().amax(-1)
    elif stack.zeros is not None:
        step, best = 1.0, (exact.amax(-1).clamp(min=0) - exact.amin(-1).clamp(max=0)) / 15
    else:
        step, best = 1.0, exact.abs().amax(-1) / (127 if stack.kind == "int8" else 7)
    # A unit of the last place; of float16 one of 1e-6, which is among its subnormal numbers.
    rounding = {torch.float32: 2**-15, torch.bfloat16: 2**-7, torch.float16: 2**-3}[stack.scales.dtype]
    assert (scales >= best).all() and (scales <= best * (1 + rounding)).all()
    assert (error.amax(-1) <= scales * step / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["ternary", "ternary_expert"])
def test_no_other_ternary_scale_has_a_smaller_error(name):
    original = normal(2, 3, 32, seed=2)
    original[0, 0, 3] = 30
    stack = made(name, original)
    rows = original.double().reshape(-1, 32 if name == "ternary" else 96)
    found = (stack.dequantize().double() - original.double()).square().view_as(rows).sum(-1)
    for row, error in zip(rows, found.tolist(), strict=True):
        for scale in torch.linspace(0, 31, 3101, dtype=torch.float64).tolist():
            nearest = torch.minimum(row.square(), (row.abs() - scale).square()).sum().item()
            assert error <= nearest * (1 + 1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_what_can_be_represented_comes_back_exactly(name):
    kind, settings = FORMATS[name]
    group = settings.get("group_size", 64) if kind in ("int4", "nf4") else 128
    generator = torch.Generator().manual_seed(5)
    low, high = {"int8": (-127, 128), "int4": (1, 16), "nf4": (0, 16), "ternary": (0, 3)}[kind]
    codes = torch.randint(low, high, (2, 3, 128 // group, group), generator=generator)
    codes[..., 0], codes[..., 1] = low, high - 1  # the scale is that of the largest
    if "zero_points" in settings:
        codes[..., 0] = 0
    scales = (torch.rand(2, 3, 128 // group, generator=generator) + 0.5).bfloat16()
    if "scale_of_expert" in settings:
        scales = scales[:, :1].expand_as(scales)
    zeros = torch.randint(16, scales.shape, generator=generator)
    if kind == "nf4":
        units = torch.tensor(NF4)[codes]
    else:
        units = codes - (zeros[..., None] if "zero_points" in settings else {"int8": 0, "int4": 8, "ternary": 1}[kind])
    original = (units * scales.float()[..., None]).view(2, 3, 128)
    stack = quantize(original, kind, **settings)
    assert torch.equal(codes_reference(stack), codes.view(2, 3, 128))
    assert torch.equal(stack.dequantize(), original)


@pytest.mark.parametrize("name", FORMATS)
def test_quantising_again_changes_nothing(name):
    if name == "int4_zeros":
        pytest.skip("a group need not use all of its codes, and then has a smaller scale the second time")
    first = made(name, normal(2, 3, 128, seed=7) * 0.013)
    second = made(name, first.dequantize())
    assert torch.equal(first.packed, second.packed) and torch.equal(first.scales, second.scales)


@pytest.mark.parametrize("name", FORMATS)
def test_groups_of_zeros_stay_zero(name):
    original = normal(2, 3, 256)
    original[0, :, :128] = 0
    original[1] = 0
    stack = made(name, original)
    found = stack.dequantize()
    assert (found[1] == 0).all() and (stack.scales[1] == 0).all()
    assert (found[0, :, :128] == 0).all() and (found[0, :, 128:] != 0).any()


@pytest.mark.parametrize("name", FORMATS)
def test_an_outlier_spoils_its_own_group_only(name):
    original = normal(2, 3, 256)
    spoiled = original.clone()
    spoiled[0, 1, 7] = 1e4
    before, after = made(name, original).dequantize(), made(name, spoiled).dequantize()
    kind, settings = FORMATS[name]
    touched = torch.zeros(2, 3, 256, dtype=torch.bool)
    if "scale_of_expert" in settings:
        touched[0] = True
    else:
        touched[0, 1, : settings.get("group_size", 64) if kind in ("int4", "nf4") else 256] = True
    assert torch.equal(before[~touched], after[~touched])
    assert after[0, 1, 7] == pytest.approx(1e4, rel=1e-2) and not torch.equal(before, after)


def test_the_smallest_numbers_are_not_lost_beyond_half_a_step():
    for name in ("int8", "int4_float32", "nf4"):
        original = normal(1, 2, 128) * 1e-41
        stack = made(name, original)
        found = stack.dequantize()
        assert found.isfinite().all()
        error = groups_of(stack, (found.double() - original.double()).abs())
        assert (error <= scales_of(stack) / 2).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "int3"}, "`kind` must be one of int8, int4, nf4, ternary, got 'int3'"),
        ({"group_size": 48}, r"`group_size` of int4 must be one of \(32, 64, 128\), got 48"),
        ({"group_size": 128}, "multiple of 128, got 96"),
        ({"stack": normal(2, 3, 50)}, "multiple of 64, got 50"),
        ({"kind": "ternary", "stack": normal(2, 3, 50)}, "multiple of 4, got 50"),
        ({"kind": "int8", "group_size": 32}, "int8 has no groups"),
        ({"kind": "nf4", "zero_points": True, "group_size": 32}, "zero points are for int4"),
        ({"scale_of_expert": True, "group_size": 32}, "for ternary, got int4"),
        ({"scale_dtype": torch.int8, "group_size": 32}, "`scale_dtype` must be one of"),
        ({"stack": normal(2, 64)}, r"a stack must be \(E, N, K\)"),
        ({"stack": normal(0, 3, 64)}, "none of them 0"),
        ({"stack": normal(2, 3, 64).double()}, "`dtype` must be one of"),
        ({"stack": normal(2, 3, 64).index_fill(0, torch.tensor(1), math.nan)}, "expert 1 are not all finite"),
        ({"stack": normal(2, 3, 64).index_fill(2, torch.tensor(1), math.inf)}, "expert 0 are not all finite"),
        ({"kind": "nf4", "stack": normal(2, 3, 64) * 1e6, "scale_dtype": torch.float16}, "too large for scales"),
    ],
)
def test_what_cannot_be_quantised(change, words):
    arguments = {"stack": normal(2, 3, 96), "kind": "int4", **change}
    with pytest.raises(ValueError, match=words):
        quantize(arguments.pop("stack"), arguments.pop("kind"), **arguments)


@pytest.mark.parametrize("name", FORMATS)
def test_files_hold_a_stack_exactly(name, tmp_path):
    stack = made(name, normal(2, 3, 128, dtype=torch.bfloat16))
    save_file(stack.to_tensors(), tmp_path / "stack.safetensors")
    description = json.loads(json.dumps(stack.description))
    back = QuantizedStack.from_tensors(description, load_file(tmp_path / "stack.safetensors"))
    assert back.description == stack.description and back.dtype == torch.bfloat16
    assert back.to_tensors().keys() == stack.to_tensors().keys()
    for tensor, again in zip(stack.to_tensors().values(), back.to_tensors().values(), strict=True):
        assert tensor.dtype == again.dtype and torch.equal(tensor, again)
    assert torch.equal(back.dequantize(), stack.dequantize())


@pytest.mark.parametrize(
    ("change", "drop", "words"),
    [
        ({"format": 2}, None, "`format` must be 1, got 2"),
        ({"more": 1}, None, "the description must have"),
        ({"kind": "int5"}, None, "`kind` must be"),
        ({"dtype": "int8"}, None, "`dtype` must be one of"),
        ({"dtype": "nothing"}, None, "`dtype` must be one of"),
        ({"shape": [2, 3, 64]}, None, "`packed` must be of shape"),
        ({"group_size": 32}, None, "`scales` must be of shape"),
        ({}, "packed", "the tensors must be packed, scales"),
        ({}, "zeros", None),
    ],
)
def test_files_that_do_not_fit(change, drop, words):
    stack = quantize(normal(2, 3, 128), "int4", zero_points=True)
    tensors = {name: tensor for name, tensor in stack.to_tensors().items() if name != drop}
    description = {**stack.description, **change}
    if words is None:  # without zero points it is another stack, but a valid one
        assert QuantizedStack.from_tensors(description, tensors).zeros is None
        return
    with pytest.raises(ValueError, match=words):
        QuantizedStack.from_tensors(description, tensors)


def test_some_experts_sizes_and_devices():
    stack = quantize(normal(4, 6, 128), "int4", zero_points=True)
    everything = stack.dequantize()
    assert torch.equal(stack.dequantize([3, 0, 3]), everything[[3, 0, 3]])
    assert stack.dequantize([]).shape == (0, 6, 128)
    for number in (4, -1):
        with pytest.raises(IndexError, match=f"experts 0 to 3, got {number}"):
            stack.dequantize([number])
    assert stack.nbytes == 4 * 6 * (128 // 2 + 2 * 2 + 2)
    assert stack.to("meta").packed.device.type == stack.to("meta").zeros.device.type == "meta"


# The layer on a CPU -------------------------------------------------------------------------------------------------

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the shared references are on the GPU here")


@pytest.fixture
def poisoned_workspaces(monkeypatch):
    """What a workspace holds when it is handed out must not matter."""
    make = cpu_experts.workspace

    def poisoned(name, size, dtype):
        buffer = make(name, size, dtype)
        return buffer.fill_(torch.nan if dtype.is_floating_point else -1)

    monkeypatch.setattr(cpu_experts, "workspace", poisoned)


def quantised(name: str, weights: ExpertWeights) -> QuantizedExperts:
    kind, settings = FORMATS[name]
    return quantize_experts(weights, kind, **settings)


def small(num_experts: int = EXPERTS, **settings) -> ExpertWeights:
    return random_experts(num_experts, HIDDEN, INTERMEDIATE, **settings)


def check_layer(experts: QuantizedExperts, index: Tensor, kernels=None, tolerance: float = 1e-5, gradients=True):
    """Inference, training and gradients against the reference on dequantised weights; returns what was found."""
    num_experts, device = experts.num_experts, experts.down.packed.device
    index = index.to(device)
    plain = in_float64(experts.dequantize())
    hidden = random_hidden(len(index), experts.hidden_size, dtype=experts.down.dtype)
    factors = routing_weights(index, num_experts)
    exact, clean = hidden.double(), routing_weights(index, num_experts, poison_unused=False).double()
    expected = experts_reference(exact.requires_grad_(), plain, index, clean.requires_grad_())
    inferred = infer_quantized(hidden, index, factors, experts, kernels)
    assert relative_error(inferred, expected.detach()) < tolerance
    if not gradients:
        return [inferred]
    upstream = torch.linspace(-1, 1, hidden.numel(), device=device).view_as(hidden)
    hidden.requires_grad_(), factors.requires_grad_()
    out = run_quantized(hidden, index, factors, experts, kernels)
    (out * upstream.to(out)).sum().backward()
    if expected.requires_grad:
        (expected * upstream.double()).sum().backward()
    for found, want in ((out, expected), (hidden.grad, exact.grad), (factors.grad, clean.grad)):
        want = torch.zeros_like(found) if want is None else want
        assert relative_error(found.detach(), want.detach()) < tolerance
    assert (factors.grad[index >= num_experts] == 0).all()
    return [inferred, out.detach(), hidden.grad, factors.grad]


@on_cpu
@pytest.mark.usefixtures("poisoned_workspaces")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYER_FORMATS)
def test_formats_and_layouts(name, layout):
    index, num_experts = ROUTING_CASES["unused"]
    check_layer(quantised(name, small(num_experts, layout=layout)), index)


@on_cpu
@pytest.mark.usefixtures("poisoned_workspaces")
@pytest.mark.parametrize("case", ROUTING_CASES)
@pytest.mark.parametrize("activation", ["gpt_oss", None])
def test_routing(activation, case):
    index, num_experts = ROUTING_CASES[case]
    found = check_layer(quantised("int4_zeros", small(num_experts, layout="gpt_oss", activation=activation)), index)
    assert (found[0][(index >= num_experts).all(-1)] == 0).all()


@on_cpu
@pytest.mark.parametrize("name", ["int8", "ternary"])
def test_odd_sizes(name):
    index, num_experts = ROUTING_CASES["unused"]
    sizes = (50, 33) if name == "int8" else (52, 36)
    check_layer(quantised(name, random_experts(num_experts, *sizes)), index)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    index, num_experts = ROUTING_CASES["unused"]
    check_layer(quantised("nf4", small(num_experts, dtype=dtype)), index, tolerance=2e-2)


@on_cpu
def test_experts_that_are_not_used_are_not_read():
    index, num_experts = ROUTING_CASES["empty_experts"]
    experts = quantised("int8", small(num_experts))
    idle = sorted(set(range(num_experts)) - set(index.flatten().tolist()))
    assert idle
    poisoned = poison_experts(experts, idle)
    hidden, factors = random_hidden(len(index), HIDDEN), routing_weights(index, num_experts)
    expected = infer_quantized(hidden, index, factors, experts)
    assert torch.equal(infer_quantized(hidden, index, factors, poisoned), expected)


def poison_experts(experts: QuantizedExperts, numbers: list[int]) -> QuantizedExperts:
    """The same, but with scales of NaN in some experts."""

    def poison(stack: QuantizedStack) -> QuantizedStack:
        scales = stack.scales.clone()
        scales[numbers] = math.nan
        return replace(stack, scales=scales)

    return replace(experts, up=poison(experts.up), down=poison(experts.down))


@on_cpu
def test_training_keeps_no_plain_weights():
    experts = quantised("int4", small())
    hidden, index = random_hidden(24, HIDDEN).requires_grad_(), ROUTING_CASES["plain"][0]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        run_quantized(hidden, index, routing_weights(index, EXPERTS), experts)
    slots = index.numel()
    assert sum(kept) == hidden.numel() + 2 * slots + slots * 2 * INTERMEDIATE


@on_cpu
@pytest.mark.parametrize("wanted", ["hidden", "factors"])
def test_only_what_is_asked_for_gets_a_gradient(wanted):
    experts, (index, _) = quantised("int4", small()), ROUTING_CASES["unused"]
    full = check_layer(experts, index)
    tensors = {"hidden": random_hidden(24, HIDDEN), "factors": routing_weights(index, EXPERTS)}
    tensors[wanted].requires_grad_()
    out = run_quantized(tensors["hidden"], index, tensors["factors"], experts)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert torch.equal(tensors[wanted].grad, full[2 if wanted == "hidden" else 3])
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != wanted)


def test_what_the_layer_refuses():
    weights = small(layout="bias")
    experts = quantised("int4", weights)
    with pytest.raises(ValueError, match="normalised"):
        quantize_experts(replace(weights, post_norm=torch.nn.Identity()), "int8")
    with pytest.raises(ValueError, match="`up` must be"):
        replace(experts, has_gate=False)
    with pytest.raises(ValueError, match="`up` must be"):
        replace(experts, up=replace(experts.up, dtype=torch.float16))
    experts.up_bias.requires_grad_()
    index = ROUTING_CASES["plain"][0]
    with pytest.raises(ValueError, match="a bias requires a gradient"):
        run_quantized(random_hidden(24, HIDDEN), index, routing_weights(index, EXPERTS), experts)
    with pytest.raises(NotImplementedError, match="not on mps"):
        quantized_kernels_of("mps")
    assert quantized_kernels_of("cpu") is cpu_quantized


def test_the_table_is_the_one_of_its_derivation():
    """Quantiles of the normal distribution, 8 from each side, as section 3 of QLoRA has them."""
    offset = 0.9677083
    normal_cdf = torch.distributions.Normal(0.0, 1.0)
    positive = normal_cdf.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal_cdf.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    table = torch.cat([negative, torch.zeros(1), positive.flip(0)])
    assert torch.allclose(table / table.max(), torch.tensor(quantized_weights.NF4), atol=1e-4)
