"""The experts on a CPU against loops in float64: values, gradients, layouts, unused slots, memory."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hf_moe_ext.kernels import cpu_experts, cpu_matmul, operators
from hf_moe_ext.kernels import experts as implementation
from hf_moe_ext.kernels.expert_weights import Activation

from .references import (
    ACTIVATIONS,
    LAYOUTS,
    ROUTING_CASES,
    experts_reference,
    in_float64,
    random_experts,
    random_hidden,
    relative_error,
    routing_weights,
)


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shared references are on the GPU here")
run = functools.partial(implementation.run, kernels=cpu_experts)
NAMES = ("up", "down", "up_bias", "down_bias")


@pytest.fixture(autouse=True)
def poisoned_workspaces(monkeypatch):
    """What a workspace holds when it is handed out must not matter."""
    make = cpu_experts.workspace

    def poisoned(name, size, dtype):
        return make(name, size, dtype).fill_(torch.nan)

    monkeypatch.setattr(cpu_experts, "workspace", poisoned)


def leaves(experts, requires_grad=True):
    made = {n: getattr(experts, n) for n in NAMES}
    made = {n: None if t is None else t.detach().clone().requires_grad_(requires_grad) for n, t in made.items()}
    return replace(experts, **made)


def gradients(function, hidden, factors, experts, upstream):
    """Output, and gradients of hidden, factors and parameters."""
    hidden, factors = hidden.detach().clone().requires_grad_(), factors.detach().clone().requires_grad_()
    out = function(hidden, factors)
    if out.requires_grad:  # the reference of no used slot is a plain zero
        (out * upstream.to(out)).sum().backward()
    found = {"hidden": hidden.grad, "factors": factors.grad}
    for name in NAMES:
        tensor = getattr(experts, name)
        if tensor is not None:
            found[name] = tensor.grad
    return out.detach(), found


def assert_near(have, want, name, tolerance=1e-5):
    """Relative to the norm: single numbers near zero have the error of the large ones that they are made of."""
    assert have.shape == want.shape, name
    error = (have.double() - want.double()).norm()
    assert error <= tolerance * want.double().norm(), f"{name}: {error / want.double().norm()}"


def compare(experts, index, *, tolerance=1e-5):
    """Inference, training and gradients against the reference; returns what was found."""
    hidden = random_hidden(len(index), dtype=experts.down.dtype)
    factors = routing_weights(index, experts.num_experts)
    ids = index.long()
    upstream = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    mine, slow = leaves(experts), in_float64(experts, requires_grad=True)
    clean = routing_weights(index, experts.num_experts, poison_unused=False).double()
    expected, wanted = gradients(
        lambda h, w: experts_reference(h, slow, index, w), hidden.double(), clean, slow, upstream
    )
    out, found = gradients(lambda h, w: run(h, ids, w, mine), hidden, factors, mine, upstream)
    with torch.no_grad():
        inferred = run(hidden, ids, factors, mine)
    assert_near(out, expected, "out", tolerance)
    assert_near(inferred, expected, "inferred", tolerance)
    for name, want in wanted.items():
        # Routing weights, and so their gradients, are in float32 in any case.
        near = max(tolerance, 1e-6) if name == "factors" else tolerance
        assert_near(found[name], torch.zeros_like(found[name]) if want is None else want, name, near)
    return out, found


@pytest.mark.parametrize("case", ROUTING_CASES)
@pytest.mark.parametrize("layout", ["stock", "gpt_oss", "plain_bias"])
def test_routing(layout, case):
    index, num_experts = ROUTING_CASES[case]
    experts = random_experts(num_experts, layout=layout)
    out, found = compare(experts, index)
    unused = index >= num_experts
    assert (out[unused.all(-1)] == 0).all() and (found["factors"][unused] == 0).all()
    idle = sorted(set(range(num_experts)) - set(index.flatten().tolist()))
    for name in NAMES:
        if name in found:
            assert (found[name][idle] == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_activations(layout, activation):
    index, num_experts = ROUTING_CASES["unused"]
    compare(random_experts(num_experts, layout=layout, activation=activation), index)


@pytest.mark.parametrize("layout", ["stock", "plain"])
def test_an_activation_that_is_not_known(layout):
    index, num_experts = ROUTING_CASES["ragged"]
    compare(random_experts(num_experts, layout=layout, activation=None), index)


@pytest.mark.parametrize("case", ["unused", "one_token", "more_experts_than_slots"])
@pytest.mark.parametrize("layout", ["stock", "gpt_oss"])
def test_double_precision(layout, case):
    index, num_experts = ROUTING_CASES[case]
    compare(random_experts(num_experts, layout=layout, dtype=torch.float64), index, tolerance=1e-12)


@pytest.mark.parametrize("setting", list(cpu_matmul.PRODUCTS))
@pytest.mark.parametrize("layout", ["stock", "transposed"])
@pytest.mark.parametrize("case", ["unused", "one_token", "one_expert_takes_all"])
def test_every_product(case, layout, setting, monkeypatch):
    monkeypatch.setattr(cpu_matmul, "_chosen", {})
    monkeypatch.setenv("HF_MOE_EXT_CPU_MATMUL", setting)
    index, num_experts = ROUTING_CASES[case]
    compare(random_experts(num_experts, layout=layout), index)


@pytest.mark.parametrize("layout", ["stock", "gpt_oss", "plain_bias"])
@pytest.mark.parametrize("case", ["unused", "ragged", "empty_experts", "more_experts_than_slots"])
def test_the_grouped_form_equals_the_loop(case, layout):
    index, num_experts = ROUTING_CASES[case]
    experts, hidden = random_experts(num_experts, layout=layout), random_hidden(len(index))
    factors, slots = routing_weights(index, num_experts), cpu_experts.sort_slots(index.long(), num_experts)
    expected = experts_reference(hidden, in_float64(experts), index, factors)
    for form in (cpu_experts._grouped, lambda *args: cpu_experts._forward(*args, None)):
        assert_near(form(hidden, slots, factors, experts), expected, "out")


def test_forms_are_timed_only_for_few_rows_and_once(monkeypatch):
    timed = []
    monkeypatch.setattr(cpu_experts, "_grouped_is_faster", {})
    monkeypatch.delenv("HF_MOE_EXT_CPU_MATMUL", raising=False)
    monkeypatch.setattr(cpu_matmul, "fastest", lambda names, call, **_: timed.append(names) or names[-1])
    few, many = torch.arange(8).view(4, 2), torch.zeros(16, 1, dtype=torch.long)
    experts = random_experts(8)
    for index in (few, few, many):
        cpu_experts.infer(random_hidden(len(index)), index, torch.ones(index.shape), experts)
    forms = [names for names in timed if "grouped" in names]
    assert forms == [["loop", "grouped"]]


def stock_error(implementation, hidden, index, factors, experts, upstream):
    """Errors of output and gradients of a stock implementation in bfloat16, relative to float64."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=experts.num_experts,
        hidden_size=experts.hidden_size,
        moe_intermediate_size=experts.intermediate_size,
    )
    config._experts_implementation = implementation
    module = Qwen3MoeExperts(config).to(hidden.dtype)
    with torch.no_grad():
        module.gate_up_proj.copy_(experts.up), module.down_proj.copy_(experts.down)
    mine = replace(experts, up=module.gate_up_proj, down=module.down_proj)
    return gradients(lambda h, w: module(h, index, w), hidden, factors, mine, upstream)


@pytest.mark.parametrize("tokens", [1, 2, 64])
def test_bfloat16_is_as_exact_as_stock(tokens):
    index = torch.rand(tokens, 16, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :4]
    experts = leaves(random_experts(16, 256, 96, dtype=torch.bfloat16))
    experts = replace(experts, up_bias=None, down_bias=None)
    hidden = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    factors, upstream = routing_weights(index, 16), torch.randn(tokens, 256).bfloat16()
    slow = in_float64(experts, requires_grad=True)
    expected, wanted = gradients(
        lambda h, w: experts_reference(h, slow, index, w), hidden.double(), factors.double(), slow, upstream.double()
    )
    out, found = gradients(lambda h, w: run(h, index, w, experts), hidden, factors, experts, upstream)
    stock, stock_found = stock_error("grouped_mm", hidden, index, factors, experts, upstream)

    def error(have, want):
        return ((have.double() - want).norm() / want.norm()).item()

    # A token alone has too few numbers for a comparison of norms within a tenth.
    slack = 1.1 if tokens == 64 else 1.3
    assert error(out, expected) < slack * error(stock, expected) and error(out, expected) < 7e-3
    assert out.dtype == torch.bfloat16
    for name in ("hidden", "factors", "up", "down"):
        assert found[name].dtype == (torch.float32 if name == "factors" else torch.bfloat16)
        assert error(found[name], wanted[name]) < max(slack * error(stock_found[name], wanted[name]), 6e-3), name


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_what_is_kept_is_the_projection(activation):
    """In half precision the routing weight is multiplied in place; an identity hands on its input."""
    index, num_experts = ROUTING_CASES["plain"]
    experts = random_experts(num_experts, layout="plain", activation=activation, dtype=torch.bfloat16)
    hidden, factors = random_hidden(len(index), dtype=torch.bfloat16), routing_weights(index, num_experts)
    _, kept = cpu_experts.forward(hidden, index.long(), factors, experts)
    slots = cpu_experts.sort_slots(index.long(), num_experts)
    for number, first, last in slots.experts:
        expected = hidden[slots.tokens[first:last]].double() @ experts.up[number].double().T
        assert_near(kept[first:last], expected, "kept", 3e-3)


@pytest.mark.parametrize(
    "frozen", [("up", "down", "up_bias", "down_bias"), ("hidden",), ("factors",), ("down",), ("up",)]
)
@pytest.mark.parametrize("layout", ["gpt_oss", "bias"])
def test_frozen_inputs_get_no_gradient_and_change_no_other(layout, frozen):
    index, num_experts = ROUTING_CASES["unused"]
    experts, factors = leaves(random_experts(num_experts, layout=layout)), routing_weights(index, num_experts)
    hidden, upstream = random_hidden(len(index)), torch.linspace(-1, 1, len(index) * 48).view(-1, 48)
    _, everything = gradients(lambda h, w: run(h, index.long(), w, experts), hidden, factors, experts, upstream)
    part = leaves(experts)
    for name in frozen:
        if name in NAMES:
            getattr(part, name).requires_grad_(False)

    def run_part(h, w):
        h, w = (h.detach() if "hidden" in frozen else h), (w.detach() if "factors" in frozen else w)
        return run(h, index.long(), w, part)

    _, found = gradients(run_part, hidden, factors, part, upstream)
    for name, gradient in found.items():
        if name in frozen:
            assert gradient is None, name
        else:
            torch.testing.assert_close(gradient, everything[name], rtol=1e-5, atol=1e-6)


def test_broken_numbers_stay_with_their_token():
    index, num_experts = ROUTING_CASES["ragged"]
    experts, hidden, factors = (
        random_experts(num_experts),
        random_hidden(len(index)),
        routing_weights(index, num_experts),
    )
    clean = cpu_experts.infer(hidden, index.long(), factors, experts)
    hidden[5] = torch.nan
    broken = cpu_experts.infer(hidden, index.long(), factors, experts)
    assert broken[5].isnan().all()
    rest = [t for t in range(len(index)) if t != 5]
    torch.testing.assert_close(broken[rest], clean[rest], rtol=1e-6, atol=1e-6)


def test_one_expert_is_a_dense_block():
    experts, hidden = random_experts(1), random_hidden(9)
    gate, up = F.linear(hidden, experts.up[0]).chunk(2, -1)
    dense = F.linear(F.silu(gate) * up, experts.down[0])
    found = cpu_experts.infer(hidden, torch.zeros(9, 1, dtype=torch.long), torch.ones(9, 1), experts)
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-6)


def test_many_tokens_are_done_in_parts(monkeypatch):
    index, num_experts = ROUTING_CASES["unused"]
    experts, hidden, factors = (
        random_experts(num_experts),
        random_hidden(len(index)),
        routing_weights(index, num_experts),
    )
    whole = cpu_experts.infer(hidden, index.long(), factors, experts)
    seen, sort = [], cpu_experts.sort_slots
    monkeypatch.setattr(cpu_experts, "sort_slots", lambda i, e: seen.append(len(i)) or sort(i, e))
    monkeypatch.setattr(cpu_experts, "_WORKSPACE_BYTES", 7 * 3 * 48 * 4)
    assert relative_error(cpu_experts.infer(hidden, index.long(), factors, experts), whole) < 1e-6
    assert seen == [7, 7, 7, 3]


def test_non_contiguous_tokens_and_other_data_types():
    index, num_experts = ROUTING_CASES["plain"]
    experts, factors = random_experts(num_experts), routing_weights(index, num_experts)
    wide = torch.randn(len(index), 96, dtype=torch.float64)
    hidden = wide[:, ::2]
    found = cpu_experts.infer(hidden, index, factors.half(), experts)
    assert found.dtype == torch.float64
    expected = experts_reference(hidden, in_float64(experts), index, factors.half())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_saved_for_backward():
    """The tokens, the routing and 2I numbers a slot: half of what the best stock implementation keeps, at most."""
    experts, index = leaves(random_experts(8, 256, 96)), torch.rand(64, 8).argsort(-1)[:, :4].contiguous()
    known = {t.data_ptr() for t in (experts.up, experts.down)}
    hidden, factors = torch.randn(64, 256, requires_grad=True), torch.rand(64, 4, requires_grad=True)
    sizes = {}

    def pack(tensor):
        if tensor.data_ptr() not in known:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(hidden, index, factors, experts)
    out.sum().backward()
    slots = 64 * 4
    assert sum(sizes.values()) == 4 * (64 * 256 + slots * 2 * 96 + slots) + 8 * slots


def test_a_second_derivative_is_refused():
    experts, index = random_experts(5), ROUTING_CASES["plain"][0].long()
    hidden = random_hidden(24).requires_grad_()
    out = run(hidden, index, torch.rand(24, 2), experts)
    (gradient,) = torch.autograd.grad(out, hidden, torch.ones_like(out, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_workspaces_serve_inference_mode_and_training_in_turn():
    experts, index = leaves(random_experts(5)), ROUTING_CASES["plain"][0].long()
    hidden, factors = random_hidden(24), torch.rand(24, 2)
    results = []
    cpu_experts._kept.__dict__.clear()
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            results.append(run(hidden, index, factors, experts).detach().clone())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


def test_threads_do_not_share_workspaces():
    experts, index = random_experts(5), ROUTING_CASES["plain"][0].long()
    inputs = [(random_hidden(24, seed=s), torch.rand(24, 2)) for s in range(6)]
    expected = [cpu_experts.infer(h, index, w, experts) for h, w in inputs]
    broken: list[int] = []

    def work(number):
        for _ in range(30):
            found = cpu_experts.infer(inputs[number][0], index, inputs[number][1], experts)
            if not torch.allclose(found, expected[number], rtol=1e-5, atol=1e-5):
                broken.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken


# --- as an operator ---


def operator_arguments(layout, case, activation="silu", keep=True):
    index, num_experts = ROUTING_CASES[case]
    experts = leaves(random_experts(num_experts, layout=layout, activation=activation))
    hidden, factors = random_hidden(len(index)).requires_grad_(), torch.rand(index.shape).requires_grad_()
    tensors = (hidden, index.long(), factors, experts.up, experts.down, experts.up_bias, experts.down_bias)
    return experts, (*tensors, *experts.layout, keep)


@pytest.mark.parametrize("case", ["unused", "no_tokens", "all_unused"])
@pytest.mark.parametrize("layout", ["stock", "gpt_oss", "plain_transposed"])
def test_operator_is_well_formed(layout, case):
    _, arguments = operator_arguments(layout, case)
    torch.library.opcheck(torch.ops.moe_ext.experts.default, arguments)
    _, arguments = operator_arguments(layout, case, keep=False)
    torch.library.opcheck(
        torch.ops.moe_ext.experts.default, [a.detach() if torch.is_tensor(a) else a for a in arguments]
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["stock", "gpt_oss", "plain"])
def test_operator_equals_the_function(layout, activation):
    experts, arguments = operator_arguments(layout, "unused", activation)
    hidden, index, factors = arguments[:3]
    upstream = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    out, found = gradients(lambda h, w: run(h, index, w, experts), hidden, factors, experts, upstream)
    again = leaves(experts)
    tensors = (again.up, again.down, again.up_bias, again.down_bias)
    same, other = gradients(
        lambda h, w: torch.ops.moe_ext.experts(h, index, w, *tensors, *experts.layout, True)[0],
        hidden,
        factors,
        again,
        upstream,
    )
    torch.testing.assert_close(same, out, rtol=1e-6, atol=1e-6)
    for name, gradient in found.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_layouts_survive_the_operator():
    for layout in LAYOUTS:
        experts = random_experts(layout=layout, activation="gpt_oss")
        again = operators.ExpertWeights.from_layout(
            experts.layout, experts.up, experts.down, experts.up_bias, experts.down_bias
        )
        assert replace(again, apply=experts.apply) == experts
        rows = torch.randn(3, experts.up.shape[2 if experts.is_transposed else 1])
        assert torch.equal(again.apply(rows), experts.apply(rows))
    assert random_experts(activation=None).layout is None
    assert replace(random_experts(), post_norm=torch.nn.Identity()).layout is None
    assert Activation() == Activation("silu", 1.0, None, 0.0)
