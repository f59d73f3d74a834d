"""Gradients added in place: the same as added by autograd, and only where nobody sees the difference."""

from __future__ import annotations

import functools
import gc
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_moe_ext.kernels import accumulation, cpu_experts, dispatch
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


# Memory that is taken again -----------------------------------------------------------------------------------------


@pytest.fixture
def big(monkeypatch):
    """Experts whose gradients are worth keeping, on a CPU."""
    if DEVICE != "cpu":
        pytest.skip("memory is kept on CPUs")
    monkeypatch.setattr(accumulation, "_LEAST_BYTES", 1)
    experts = random_experts()
    return replace(experts, **{name: nn.Parameter(getattr(experts, name)) for name in ("up", "down")})


def train_once(experts, seed=4, **kwargs):
    forward(functools.partial(implementation.run, kernels=cpu_experts), experts, seed).backward(**kwargs)
    return experts.up.grad, experts.down.grad


def expected(experts, seed):
    """The same gradients of parameters that nothing is kept for."""
    fresh = replace(experts, up=experts.up.detach().clone().requires_grad_())
    fresh = replace(fresh, down=experts.down.detach().clone().requires_grad_())
    return train_once(fresh, seed)


def test_memory_of_a_dropped_gradient_is_taken_again(big):
    places = []
    for seed in (4, 5, 6):
        for parameter in (big.up, big.down):
            parameter.grad = None
        found = train_once(big, seed)
        places.append([gradient.data_ptr() for gradient in found])
        assert all(torch.equal(one, other) for one, other in zip(found, expected(big, seed), strict=True))
        del found
    assert places[0] == places[1] == places[2]


def test_an_expert_without_tokens_gets_zeros_on_old_memory(big):
    train_once(big)
    for parameter in (big.up, big.down):
        parameter.grad.fill_(7.0)
        parameter.grad = None
    hidden = random_hidden(3, seed=4)
    index = torch.zeros(3, 1, dtype=torch.int64)
    implementation.run(hidden, index, torch.ones(3, 1), big, kernels=cpu_experts).sum().backward()
    assert big.up.grad[0].any() and not big.up.grad[1:].any() and not big.down.grad[1:].any()


@pytest.mark.parametrize("hold", [lambda grad: grad, lambda grad: grad[1:], lambda grad: grad.numpy()])
def test_a_gradient_that_someone_holds_is_left_alone(big, hold):
    held = hold(train_once(big)[0])
    copy = torch.as_tensor(held).clone()
    big.up.grad = big.down.grad = None
    train_once(big, seed=5)
    assert torch.equal(torch.as_tensor(held), copy)


def test_returned_gradients_are_left_alone(big):
    run = functools.partial(implementation.run, kernels=cpu_experts)
    first = torch.autograd.grad(forward(run, big, 4), [big.up, big.down])
    second = torch.autograd.grad(forward(run, big, 5), [big.up, big.down])
    for found, seed in ((first, 4), (second, 5)):
        assert all(torch.equal(one, other) for one, other in zip(found, expected(big, seed), strict=True))


def test_parameters_that_change_get_memory_that_fits(big):
    train_once(big)
    big.up.grad = big.down.grad = None
    with torch.no_grad():
        big.up.data, big.down.data = big.up.double(), big.down.double()
    assert train_once(big)[0].dtype == torch.float64


def test_memory_goes_with_a_pass_without_gradients_and_with_the_parameter(big):
    train_once(big)
    assert big.up in accumulation._kept and big.down in accumulation._kept
    with torch.no_grad():
        forward(functools.partial(implementation.run, kernels=cpu_experts), big)
    assert big.up not in accumulation._kept and big.down not in accumulation._kept
    other = replace(big, up=nn.Parameter(big.up.detach().clone()), down=nn.Parameter(big.down.detach().clone()))
    train_once(other)
    assert len(accumulation._kept) == 2
    del other
    gc.collect()
    assert len(accumulation._kept) == 0


def test_small_parameters_and_processes_keep_nothing(big, monkeypatch):
    monkeypatch.setattr(accumulation, "_is_distributed", lambda: True)
    train_once(big)
    assert big.up not in accumulation._kept
    monkeypatch.undo()
    train_once(big)
    assert big.up.nbytes < accumulation._LEAST_BYTES and big.up not in accumulation._kept
