"""Adapters on experts that are never multiplied out, on a CPU: against loops in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_moe_ext.kernels import cpu_experts, cpu_lora, lora_dispatch
from hf_moe_ext.kernels.lora import ExpertLora, LowRank

from .references import (
    DEVICE,
    ROUTING_CASES,
    experts_reference,
    in_float64,
    random_experts,
    random_hidden,
    routing_weights,
)
from .test_cpu_experts import assert_near


NAMES = ("up_a", "up_b", "down_a", "down_b")
# In half precision a projection is rounded twice: without and with the adapter. Twice the variance at most, since
# `W + scale * B @ A` is rounded too where it is made.
MORE = 2**0.5


@pytest.fixture(autouse=True)
def poisoned_workspaces(monkeypatch):
    """What a workspace holds when it is handed out must not matter."""
    make = cpu_experts.workspace

    def poisoned(name, size, dtype):
        return make(name, size, dtype).fill_(torch.nan)

    monkeypatch.setattr(cpu_experts, "workspace", poisoned)
    monkeypatch.setattr(cpu_lora, "workspace", poisoned)


def random_lora(experts, rank=4, parts=("up", "down"), seed=5):
    """Adapters that change the projections as much as they are large, with the strides of PEFT's."""
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate = experts.hidden_size, experts.intermediate_size
    width = (2 if experts.has_gate else 1) * intermediate
    made = {"up": None, "down": None}
    for name, length, out in (("up", hidden, width), ("down", intermediate, hidden)):
        if name in parts:
            a = torch.randn(experts.num_experts, rank, length, generator=generator, dtype=torch.float64)
            b = torch.randn(out, rank, experts.num_experts, generator=generator, dtype=torch.float64)
            a, b = ((t * size**-0.5).to(experts.down).requires_grad_() for t, size in ((a, length), (b, rank)))
            made[name] = LowRank(a, b.permute(2, 0, 1).detach().requires_grad_(), 0.75)
    return ExpertLora(**made)


def slow_leaves(adapters):
    """In float64."""
    tensors = [None if t is None else t.detach().double().requires_grad_() for t in adapters.tensors]
    return adapters.with_tensors(tensors)


def merged(experts, adapters):
    """Float64 experts with `W + scale * B @ A`, made by loops over experts."""

    def add(weight, adapter):
        if adapter is None:
            return weight
        deltas = [adapter.scale * (b @ a) for a, b in zip(adapter.a, adapter.b, strict=True)]
        return weight + torch.stack([delta.T if experts.is_transposed else delta for delta in deltas])

    return replace(experts, up=add(experts.up, adapters.up), down=add(experts.down, adapters.down))


def compare(kernels, experts, adapters, index, *, tolerance=1e-5, frozen=()):
    """Inference, training and all gradients against float64; returns what was found."""
    index = index.to(DEVICE)
    hidden = random_hidden(len(index), dtype=experts.down.dtype)
    factors = routing_weights(index, experts.num_experts)
    clean = routing_weights(index, experts.num_experts, poison_unused=False).double().requires_grad_()
    upstream = torch.linspace(-1, 1, hidden.numel(), device=DEVICE).view_as(hidden)
    slow, slow_hidden = slow_leaves(adapters), hidden.double().requires_grad_()
    expected = experts_reference(slow_hidden, merged(in_float64(experts), slow), index, clean)
    if expected.requires_grad:
        (expected * upstream).sum().backward()
    wanted = dict(zip(NAMES, [t if t is None else t.grad for t in slow.tensors], strict=True))
    wanted |= {"hidden": slow_hidden.grad, "factors": clean.grad}

    inputs = {"hidden": hidden.detach().clone(), "factors": factors.detach().clone()}
    inputs |= {n: None if t is None else t.detach() for n, t in zip(NAMES, adapters.tensors, strict=True)}
    for name, tensor in inputs.items():
        if tensor is not None:
            inputs[name] = tensor.requires_grad_(name not in frozen)
    mine = adapters.with_tensors([inputs[name] for name in NAMES])
    arguments = (inputs["hidden"], index.long(), inputs["factors"], experts, mine, kernels)
    out = lora_dispatch.run(*arguments)
    (out * upstream.to(out)).sum().backward()
    with torch.no_grad():
        inferred = lora_dispatch.run(*arguments)
    assert_near(out.detach(), expected.detach(), "out", tolerance)
    assert_near(inferred, expected.detach(), "inferred", tolerance)
    found = {}
    for name, tensor in inputs.items():
        if tensor is None or name in frozen:
            assert tensor is None or tensor.grad is None
            continue
        found[name] = tensor.grad
        want = torch.zeros_like(tensor) if wanted[name] is None else wanted[name]
        assert_near(found[name], want, name, tolerance)
    return out.detach(), found


cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the shared references are on the GPU here")


@cpu
@pytest.mark.parametrize("case", ROUTING_CASES)
@pytest.mark.parametrize("layout", ["stock", "gpt_oss", "plain_bias"])
def test_routing(layout, case):
    index, num_experts = ROUTING_CASES[case]
    experts = random_experts(num_experts, layout=layout)
    out, found = compare(cpu_lora, experts, random_lora(experts), index)
    unused = index >= num_experts
    assert (out[unused.all(-1)] == 0).all() and (found["factors"][unused] == 0).all()
    idle = sorted(set(range(num_experts)) - set(index.flatten().tolist()))
    assert all((found[name][idle] == 0).all() for name in NAMES)


@cpu
@pytest.mark.parametrize("layout", ["bias", "transposed", "interleaved", "plain", "plain_transposed"])
def test_layouts(layout):
    index, num_experts = ROUTING_CASES["unused"]
    experts = random_experts(num_experts, layout=layout)
    compare(cpu_lora, experts, random_lora(experts), index)


@cpu
@pytest.mark.parametrize("activation", ["gpt_oss", "relu2", "identity", None])
@pytest.mark.parametrize("layout", ["stock", "plain"])
def test_activations(layout, activation):
    index, num_experts = ROUTING_CASES["unused"]
    experts = random_experts(num_experts, layout=layout, activation=activation)
    compare(cpu_lora, experts, random_lora(experts), index)


@cpu
@pytest.mark.parametrize("rank", [1, 3, 64])
@pytest.mark.parametrize("part", ["up", "down"])
def test_one_projection_and_any_rank(part, rank):
    index, num_experts = ROUTING_CASES["unused"]
    experts = random_experts(num_experts)
    compare(cpu_lora, experts, random_lora(experts, rank, (part,)), index)


@cpu
@pytest.mark.parametrize("frozen", [("hidden",), ("factors",), ("up_a", "down_b"), ("up_b", "down_a"), NAMES])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen):
    index, num_experts = ROUTING_CASES["unused"]
    experts = random_experts(num_experts, layout="gpt_oss")
    adapters = random_lora(experts)
    _, everything = compare(cpu_lora, experts, adapters, index)
    _, found = compare(cpu_lora, experts, adapters, index, frozen=frozen)
    assert found.keys() == everything.keys() - set(frozen)
    for name, gradient in found.items():
        assert_near(gradient, everything[name], name, 1e-6)


def as_peft_does(hidden, experts, adapters, index, factors):
    """The layer in the dtype of its weights, with `W + scale * B @ A` rounded to it, by autograd."""
    joined, dtype = merged(experts, adapters), experts.down.dtype
    out = torch.zeros(hidden.shape)
    for expert in range(experts.num_experts):
        token, slot = (index == expert).nonzero(as_tuple=True)
        up, down = joined.up[expert].to(dtype), joined.down[expert].to(dtype)
        pre = hidden[token] @ (up if experts.is_transposed else up.T)
        pre = pre if experts.up_bias is None else pre + experts.up_bias[expert]
        rows = experts.apply(pre) @ (down if experts.is_transposed else down.T)
        rows = rows if experts.down_bias is None else rows + experts.down_bias[expert]
        out = out.index_add(0, token, rows.float() * factors[token, slot, None])
    return out.to(dtype)


@cpu
@pytest.mark.parametrize("layout", ["stock", "gpt_oss", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_weights_with_the_adapters_in_them(dtype, layout):
    index, num_experts = ROUTING_CASES["plain"]
    activation = "identity" if layout == "plain" else "silu"  # the one that hands its input through
    experts = random_experts(num_experts, layout=layout, dtype=dtype, activation=activation)
    adapters, hidden = random_lora(experts), random_hidden(len(index), dtype=dtype)
    factors = routing_weights(index, num_experts)
    upstream = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)

    def run(function, kind, experts):
        tensors = {n: t.detach().to(kind).requires_grad_() for n, t in zip(NAMES, adapters.tensors, strict=True)}
        tensors["hidden"] = hidden.detach().to(kind).requires_grad_()
        tensors["factors"] = factors.clone().requires_grad_()
        mine = adapters.with_tensors([tensors[name] for name in NAMES])
        out = function(tensors["hidden"], experts, mine, index.long(), tensors["factors"])
        (out * upstream.to(out)).sum().backward()
        return {"out": out.detach()} | {name: tensor.grad for name, tensor in tensors.items()}

    exact = run(lambda h, e, a, i, w: experts_reference(h, merged(e, a), i, w), torch.float64, in_float64(experts))
    eager = run(as_peft_does, dtype, experts)
    found = run(lambda h, e, a, i, w: lora_dispatch.run(h, i, w, e, a, cpu_lora), dtype, experts)
    mine, theirs = (torch.stack([(f[n] - e).norm() / e.norm() for n, e in exact.items()]) for f in (found, eager))
    # The output, and all gradients together: of one of them alone, a few roundings decide.
    assert mine[0] <= MORE * theirs[0] and mine[1:].norm() <= MORE * theirs[1:].norm(), (mine, theirs)


@cpu
@torch.no_grad()
def test_parts_of_many_tokens_give_the_same(monkeypatch):
    index, num_experts = ROUTING_CASES["unused"]
    experts = random_experts(num_experts)
    arguments = (random_hidden(len(index)), index.long(), routing_weights(index, num_experts), experts)
    expected = cpu_lora.infer(*arguments, random_lora(experts))
    monkeypatch.setattr(cpu_lora, "_WORKSPACE_BYTES", 7 * 3 * 48 * 4)
    assert_near(cpu_lora.infer(*arguments, random_lora(experts)), expected, "out", 1e-6)


@cpu
@torch.no_grad()
def test_a_token_that_is_nan_stays_alone():
    index, num_experts = ROUTING_CASES["unused"]
    experts, hidden = random_experts(num_experts), random_hidden(len(index))
    arguments = (index.long(), routing_weights(index, num_experts), experts, random_lora(experts))
    expected = cpu_lora.infer(hidden, *arguments)
    hidden[3] = torch.nan
    found = cpu_lora.infer(hidden, *arguments)
    rest = torch.arange(len(index)) != 3
    assert torch.equal(found[rest], expected[rest]) and found[3].isnan().all()
