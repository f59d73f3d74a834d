"""The whole layer in Triton, forward and backward, against loops in float64; in the interpreter without a GPU."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch


pytest.importorskip("triton")

from hf_moe_ext.kernels import experts as implementation  # noqa: E402
from hf_moe_ext.kernels import triton_experts  # noqa: E402

from .references import (  # noqa: E402
    DEVICE,
    ROUTING_CASES,
    experts_reference,
    in_float64,
    random_experts,
    random_hidden,
    routing_weights,
)
from .test_cpu_experts import assert_near, gradients, leaves  # noqa: E402


run = functools.partial(implementation.run, kernels=triton_experts)
NAMES = ("up", "down", "up_bias", "down_bias")


def compare(experts, index, tolerance=1e-5):
    index = index.to(DEVICE)
    hidden, factors = random_hidden(len(index)), routing_weights(index, experts.num_experts)
    upstream = torch.linspace(-1, 1, hidden.numel(), device=DEVICE).view_as(hidden)
    clean = routing_weights(index, experts.num_experts, poison_unused=False).double()
    mine, slow = leaves(experts), in_float64(experts, requires_grad=True)
    expected, wanted = gradients(
        lambda h, w: experts_reference(h, slow, index, w), hidden.double(), clean, slow, upstream
    )
    out, found = gradients(lambda h, w: run(h, index, w, mine), hidden, factors, mine, upstream)
    with torch.no_grad():
        inferred = run(hidden, index, factors, mine)
    assert_near(out, expected, "out", tolerance)
    assert_near(inferred, expected, "inferred", tolerance)
    for name, want in wanted.items():
        assert_near(found[name], torch.zeros_like(found[name]) if want is None else want, name, tolerance)
    return out, found


@pytest.mark.parametrize("case", ["unused", "all_unused", "no_tokens", "one_token", "empty_experts"])
@pytest.mark.parametrize("layout", ["stock", "gpt_oss"])
def test_layer(layout, case):
    index, num_experts = ROUTING_CASES[case]
    _, found = compare(random_experts(num_experts, layout=layout), index)
    assert (found["factors"][index.to(DEVICE) >= num_experts] == 0).all()


@pytest.mark.parametrize("layout", ["interleaved", "plain_transposed"])
def test_other_layouts(layout):
    index, num_experts = ROUTING_CASES["unused"]
    compare(random_experts(num_experts, layout=layout), index)


@pytest.mark.parametrize("layout", ["stock", "plain_bias"])
def test_an_activation_that_is_not_known(layout):
    """Rows past the end hold anything when the activation runs in PyTorch, and must not come back."""
    index, num_experts = ROUTING_CASES["unused"]
    compare(random_experts(num_experts, layout=layout, activation=None), index)


@pytest.mark.parametrize(("num_experts", "most"), [(5, 10), (40, 64)])  # slots
def test_many_slots_take_the_grouped_kernels_and_few_the_decoding_ones(monkeypatch, num_experts, most):
    calls = []
    for name in ("decode", "up_forward"):
        function = getattr(triton_experts, name)
        monkeypatch.setattr(
            triton_experts, name, lambda *args, n=name, f=function, **kw: calls.append(n) or f(*args, **kw)
        )
    experts = random_experts(num_experts)
    for tokens in (most // 2, most // 2 + 1):
        index = torch.arange(2 * tokens, device=DEVICE).view(-1, 2) % num_experts
        hidden, factors = random_hidden(tokens), torch.rand(tokens, 2, device=DEVICE)
        out = triton_experts.infer(hidden, index, factors, experts)
        assert_near(out, experts_reference(hidden, in_float64(experts), index, factors), "out")
    assert calls == ["decode", "up_forward"]


def test_two_runs_are_equal_bit_for_bit():
    index, num_experts = ROUTING_CASES["unused"]
    first, one = compare(random_experts(num_experts), index)
    second, two = compare(random_experts(num_experts), index)
    assert torch.equal(first, second) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("frozen", [("up", "down"), ("hidden",), ("factors",)])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen):
    index, num_experts = ROUTING_CASES["unused"]
    index = index.to(DEVICE)
    experts, factors, hidden = (
        leaves(random_experts(num_experts)),
        routing_weights(index, num_experts),
        random_hidden(24),
    )
    upstream = torch.linspace(-1, 1, hidden.numel(), device=DEVICE).view_as(hidden)
    _, everything = gradients(lambda h, w: run(h, index, w, experts), hidden, factors, experts, upstream)
    part = leaves(experts)
    for name in set(frozen) & set(NAMES):
        getattr(part, name).requires_grad_(False)

    def run_part(h, w):
        h, w = (h.detach() if "hidden" in frozen else h), (w.detach() if "factors" in frozen else w)
        return run(h, index, w, part)

    _, found = gradients(run_part, hidden, factors, part, upstream)
    for name, gradient in found.items():
        assert (gradient is None) if name in frozen else torch.equal(gradient, everything[name]), name


def test_half_precision_of_tokens_and_float32_of_weights():
    index, num_experts = ROUTING_CASES["plain"]
    index, experts = index.to(DEVICE), random_experts(num_experts)
    hidden, factors = random_hidden(24).half(), torch.rand(24, 2, device=DEVICE)
    out = run(hidden, index, factors, experts)
    assert out.dtype == torch.float16
    assert_near(out, experts_reference(hidden, in_float64(experts), index, factors), "out", 1e-3)


def test_what_the_kernels_refuse():
    experts = random_experts()
    assert triton_experts.refusal(experts) is None
    assert "torch.float64" in triton_experts.refusal(in_float64(experts))
    mixed = replace(experts, down=experts.down.half())
    assert triton_experts.refusal(mixed) == "the weights are in torch.float16, torch.float32"
