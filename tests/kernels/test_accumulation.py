"""Gradients added in place: the same as added by autograd, and only where nobody sees the difference."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_moe_ext.kernels import cpu_experts, dispatch
from hf_moe_ext.kernels import experts as implementation

from .references import DEVICE, EXPERTS, ROUTING_CASES, experts_reference, in_float64, random_experts, random_hidden
from .references import routing_weights as make_weights
from .test_cpu_experts import assert_near, leaves


INDEX = ROUTING_CASES["unused"][0].to(DEVICE)


def kernels(name):
    if name == "cpu":
        return cpu_experts
    pytest.importorskip("triton")
    from hf_moe_ext.kernels import triton_experts

    return triton_experts


@pytest.fixture(params=["cpu", "triton"])
def run(request):
    if request.param == "cpu" and DEVICE != "cpu":
        pytest.skip("the shared references are on the GPU here")
    return functools.partial(implementation.run, kernels=kernels(request.param))


@pytest.fixture
def in_place(monkeypatch):
    """The gradients that were handed to the kernels, one list for each backward."""
    calls = []
    ask = dispatch.gradient_in_place

    def recorded(*args):
        calls.append(ask(*args))
        return calls[-1]

    monkeypatch.setattr(dispatch, "gradient_in_place", recorded)
    return calls


def forward(run, experts, seed=4):
    hidden = random_hidden(len(INDEX), seed=seed, dtype=experts.down.dtype)
    return run(hidden, INDEX, make_weights(INDEX, EXPERTS), experts).square().sum()


@pytest.mark.parametrize("layout", ["stock", "gpt_oss", "plain_transposed"])
def test_three_batches_accumulate_as_the_reference(run, layout, in_place):
    experts = leaves(random_experts(layout=layout))
    slow = in_float64(experts, requires_grad=True)
    kept = None
    for seed in (4, 5, 6):
        forward(run, experts, seed).backward()
        hidden = random_hidden(len(INDEX), seed=seed).double()
        clean = make_weights(INDEX, EXPERTS, poison_unused=False).double()
        experts_reference(hidden, slow, INDEX, clean).square().sum().backward()
        for name in ("up", "down", "up_bias", "down_bias"):
            if getattr(experts, name) is not None:
                assert_near(getattr(experts, name).grad, getattr(slow, name).grad, name)
        assert kept is None or (experts.up.grad is kept[0] and experts.down.grad is kept[1])
        kept = experts.up.grad, experts.down.grad
    assert [grad is not None for grad in in_place] == [False, False, True, True, True, True]


def test_half_precision(run):
    experts = leaves(random_experts(dtype=torch.float16))
    slow = in_float64(experts, requires_grad=True)
    for seed in (4, 5):
        hidden = random_hidden(len(INDEX), seed=seed, dtype=torch.float16)
        (1e-3 * run(hidden, INDEX, make_weights(INDEX, EXPERTS), experts)).sum().backward()
        hidden = random_hidden(len(INDEX), seed=seed, dtype=torch.float16).double()
        clean = make_weights(INDEX, EXPERTS, poison_unused=False).double()
        (1e-3 * experts_reference(hidden, slow, INDEX, clean)).sum().backward()
    # The product, the gradient of the activation, the sum: a rounding each.
    assert_near(experts.up.grad, slow.up.grad, "up", 3 * 2**-11)
    assert_near(experts.down.grad, slow.down.grad, "down", 3 * 2**-11)


def test_one_parameter_in_two_layers(run):
    experts = leaves(random_experts())
    forward(run, experts).backward()
    single = experts.up.grad.clone()
    (forward(run, experts) + forward(run, experts)).backward()
    assert_near(experts.up.grad, 3 * single, "up")


def test_frozen_experts_keep_their_gradient(run, in_place):
    """One projection trains, the other does not but has an old gradient."""
    experts = leaves(random_experts())
    forward(run, experts).backward()
    old = experts.up.grad.clone()
    experts.up.requires_grad_(False)
    single = experts.down.grad.clone()
    in_place.clear()
    forward(run, experts).backward()
    assert torch.equal(experts.up.grad, old)
    assert_near(experts.down.grad, 2 * single, "down")
    assert [grad is not None for grad in in_place] == [True]


def returned(run, experts):
    """`torch.autograd.grad` gives the gradients back, and adds to none."""
    up, down = torch.autograd.grad(forward(run, experts), [experts.up, experts.down])
    return {"up": up, "down": down}


def of_others(run, experts):
    """`backward(inputs=...)` of something else adds to none of these."""
    hidden = random_hidden(len(INDEX)).requires_grad_()
    weights = make_weights(INDEX, EXPERTS)
    run(hidden, INDEX, weights, experts).square().sum().backward(inputs=[hidden])
    assert hidden.grad.norm() > 0
    return {}


@pytest.mark.parametrize("action", [returned, of_others])
def test_gradients_of_others_are_let_be(run, action):
    experts = leaves(random_experts())
    forward(run, experts).backward()
    expected = {name: getattr(experts, name).grad.clone() for name in ("up", "down")}
    for name, found in action(run, experts).items():
        assert_near(found, expected[name], name)
    for name, want in expected.items():
        assert torch.equal(getattr(experts, name).grad, want)


def test_some_inputs_of_backward(run):
    experts = leaves(random_experts())
    forward(run, experts).backward()
    up, down = experts.up.grad.clone(), experts.down.grad.clone()
    forward(run, experts).backward(inputs=[experts.up])
    assert_near(experts.up.grad, 2 * up, "up")
    assert torch.equal(experts.down.grad, down)


def hook(experts):
    experts.up.register_hook(lambda grad: 3 * grad)
    return 3


def post_hook(experts):
    """Sees the sum; it has to run after the gradient is complete."""

    def scale(parameter):
        parameter.grad.mul_(10)

    experts.up.register_post_accumulate_grad_hook(scale)
    return None


def graph(experts):
    experts.up.grad = experts.up.grad.clone().requires_grad_()
    return 1


def strided(experts):
    experts.up.grad = experts.up.grad.transpose(1, 2).contiguous().transpose(1, 2)
    return 1


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize("change", [hook, post_hook, graph, strided])
def test_where_it_would_be_seen(run, change, in_place):
    experts = leaves(random_experts())
    forward(run, experts).backward()
    single = experts.up.grad.detach().clone()
    factor = change(experts)
    in_place.clear()
    forward(run, experts).backward()
    wanted = 20 * single if factor is None else (1 + factor) * single
    assert_near(experts.up.grad.detach(), wanted, "up")
    assert in_place[0] is None and in_place[1] is not None


def test_weights_that_are_computed(run, in_place):
    """What the function sees is not where the gradient ends up."""
    experts = leaves(random_experts())
    slow = in_float64(experts, requires_grad=True)
    for _ in range(2):
        forward(run, replace(experts, up=3 * experts.up, down=experts.down / 2)).backward()
        hidden, clean = random_hidden(len(INDEX)).double(), make_weights(INDEX, EXPERTS, poison_unused=False).double()
        changed = replace(slow, up=3 * slow.up, down=slow.down / 2)
        experts_reference(hidden, changed, INDEX, clean).square().sum().backward()
    assert in_place == [None] * 4
    assert_near(experts.up.grad, slow.up.grad, "up")
    assert_near(experts.down.grad, slow.down.grad, "down")


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_graph_of_the_gradients_is_refused_and_nothing_is_added(run, in_place):
    """`create_graph=True` keeps the gradients of the first batch as they were seen."""
    experts = leaves(random_experts())
    forward(run, experts).backward()
    in_place.clear()
    seen = experts.up.grad
    before = seen.clone()
    forward(run, experts).backward(create_graph=True)
    assert in_place == []
    assert torch.equal(seen, before) and seen is not experts.up.grad
    with pytest.raises(RuntimeError, match="once_differentiable"):
        experts.up.grad.sum().backward()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo with a file store")
def test_processes_reduce_their_own_gradients(run, in_place, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        experts = leaves(random_experts())
        forward(run, experts).backward()
        single = experts.up.grad.clone()
        forward(run, experts).backward()
    finally:
        dist.destroy_process_group()
    assert in_place == [None] * 4
    assert_near(experts.up.grad, 2 * single, "up")


def test_checkpointing_and_the_optimizer(run):
    """As a training step has it: recomputation, clipping, `zero_grad` that keeps the tensors."""
    from torch.utils.checkpoint import checkpoint

    experts = leaves(random_experts())
    parameters = [nn.Parameter(experts.up), nn.Parameter(experts.down)]
    live = replace(experts, up=parameters[0], down=parameters[1])
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    checkpoint(lambda: forward(run, live), use_reentrant=False).backward()
    single = parameters[0].grad.clone()
    optimizer.zero_grad(set_to_none=False)
    kept = parameters[0].grad
    for _ in range(2):
        checkpoint(lambda: forward(run, live), use_reentrant=False).backward()
    assert parameters[0].grad is kept
    assert_near(kept, 2 * single, "up")
