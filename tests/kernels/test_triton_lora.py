"""Experts with adapters in Triton, against loops in float64; in the interpreter without a GPU."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch


pytest.importorskip("triton")

from hf_moe_ext.kernels import cpu_lora, lora_dispatch, triton_lora  # noqa: E402
from hf_moe_ext.kernels.expert_weights import ExpertWeights  # noqa: E402
from hf_moe_ext.kernels.tile_config import KernelConfig  # noqa: E402
from hf_moe_ext.kernels.triton_low_rank import add_low_rank  # noqa: E402
from hf_moe_ext.kernels.triton_routing import group_slots  # noqa: E402

from .references import (  # noqa: E402
    DEVICE,
    ROUTING_CASES,
    activate_reference,
    poisoned,
    random_experts,
    random_hidden,
    relative_error,
    routing_weights,
    rows_agree,
)
from .test_cpu_experts import assert_near  # noqa: E402
from .test_lora import MORE, NAMES, compare, random_lora  # noqa: E402
from .test_lora_peft import adapted, assert_same, choose, loss_and_gradients  # noqa: E402


pytestmark = pytest.mark.usefixtures("poison_memory")
compare = functools.partial(compare, triton_lora)


@pytest.mark.parametrize("case", ["unused", "all_unused", "no_tokens", "one_token", "empty_experts"])
@pytest.mark.parametrize("layout", ["stock", "gpt_oss"])
def test_layer(layout, case):
    index, num_experts = ROUTING_CASES[case]
    experts = random_experts(num_experts, layout=layout)
    out, found = compare(experts, random_lora(experts), index)
    unused = (index >= num_experts).to(DEVICE)
    assert (out[unused.all(-1)] == 0).all() and (found["factors"][unused] == 0).all()
    idle = sorted(set(range(num_experts)) - set(index.flatten().tolist()))
    assert all((found[name][idle] == 0).all() for name in NAMES)


@pytest.mark.parametrize("layout", ["bias", "transposed", "interleaved", "plain_transposed"])
def test_other_layouts(layout):
    index, num_experts = ROUTING_CASES["ragged"]
    experts = random_experts(num_experts, layout=layout)
    compare(experts, random_lora(experts), index)


@pytest.mark.parametrize(
    ("layout", "activation"), [("gpt_oss", "gpt_oss"), ("stock", "silu_limit"), ("plain", "relu2")]
)
def test_activations(layout, activation):
    index, num_experts = ROUTING_CASES["unused"]
    experts = random_experts(num_experts, layout=layout, activation=activation)
    compare(experts, random_lora(experts), index)


@pytest.mark.parametrize(("part", "rank"), [("up", 1), ("down", 3), ("up", 80), ("down", 64)])
def test_one_projection_and_any_rank(part, rank):
    """Ranks that fill a step of the contraction, that do not, and that need two."""
    index, num_experts = ROUTING_CASES["empty_experts"]
    experts = random_experts(num_experts)
    compare(experts, random_lora(experts, rank, (part,)), index)


def test_sizes_that_fill_no_block():
    index, num_experts = ROUTING_CASES["unused"]
    experts = random_experts(num_experts, hidden=44, intermediate=19, layout="gpt_oss")
    compare_sizes(experts, index)


def compare_sizes(experts, index):
    """Against the CPU, which was compared with the loops: the hidden size of those is fixed."""
    index, adapters = index.to(DEVICE), random_lora(experts, 5)
    hidden = random_hidden(len(index), experts.hidden_size)
    factors = routing_weights(index, experts.num_experts)
    found = {}
    for kernels in (triton_lora, cpu_lora):
        device = DEVICE if kernels is triton_lora else "cpu"
        leaves = [t.detach().clone().to(device).requires_grad_() for t in (hidden, factors, *adapters.tensors)]
        parameters = (getattr(experts, name) for name in ("up", "down", "up_bias", "down_bias"))
        there = ExpertWeights.from_layout(experts.layout, *(t if t is None else t.to(device) for t in parameters))
        out = lora_dispatch.run(
            leaves[0], index.to(device).long(), leaves[1], there, adapters.with_tensors(leaves[2:]), kernels
        )
        (out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum().backward()
        found[kernels] = [t.to(DEVICE) for t in (out.detach(), *(leaf.grad for leaf in leaves))]
    for name, have, want in zip(("out", "hidden", "factors", *NAMES), *found.values(), strict=True):
        assert_near(have, want, name)


@pytest.mark.parametrize("frozen", [("hidden", "factors"), ("up_a", "down_b"), NAMES])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen):
    index, num_experts = ROUTING_CASES["unused"]
    experts = random_experts(num_experts, layout="bias")
    adapters = random_lora(experts)
    _, everything = compare(experts, adapters, index)
    _, found = compare(experts, adapters, index, frozen=frozen)
    assert found.keys() == everything.keys() - set(frozen)
    assert all(torch.equal(gradient, everything[name]) for name, gradient in found.items())


def test_unused_slots_and_the_order_of_tokens_change_nothing():
    index, num_experts = ROUTING_CASES["plain"]
    experts, index = random_experts(num_experts), index.to(DEVICE)
    adapters, hidden, factors = random_lora(experts), random_hidden(len(index)), routing_weights(index, num_experts)
    with torch.no_grad():
        expected = triton_lora.infer(hidden, index, factors, experts, adapters)
        wider = torch.cat([index, torch.full_like(index, num_experts + 1)], 1)
        more = torch.cat([factors, torch.full_like(factors, torch.nan)], 1)
        # The number of slots may choose other tiles, which cut the sums elsewhere.
        assert relative_error(triton_lora.infer(hidden, wider, more, experts, adapters), expected) < 1e-6
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        found = triton_lora.infer(hidden[order], index[order], factors[order], experts, adapters)
        assert rows_agree(found, expected[order])
        assert torch.equal(triton_lora.infer(hidden, index, factors, experts, adapters), expected)


def test_a_token_that_is_nan_stays_alone():
    index, num_experts = ROUTING_CASES["unused"]
    experts, index = random_experts(num_experts), index.to(DEVICE)
    adapters, hidden, factors = random_lora(experts), random_hidden(len(index)), routing_weights(index, num_experts)
    with torch.no_grad():
        expected = triton_lora.infer(hidden, index, factors, experts, adapters)
        hidden[3] = torch.nan
        found = triton_lora.infer(hidden, index, factors, experts, adapters)
    rest = torch.arange(len(index), device=DEVICE) != 3
    assert torch.equal(found[rest], expected[rest]) and found[3].isnan().all()


def test_adapters_of_zero_change_nothing_bit_for_bit():
    from hf_moe_ext.kernels import triton_experts

    index, num_experts = ROUTING_CASES["unused"]
    experts, index = random_experts(num_experts, layout="gpt_oss"), index.to(DEVICE)
    adapters, hidden, factors = random_lora(experts), random_hidden(len(index)), routing_weights(index, num_experts)
    a_up, b_up, a_down, b_down = (tensor.detach() for tensor in adapters.tensors)
    adapters = adapters.with_tensors((a_up, torch.zeros_like(b_up), a_down, torch.zeros_like(b_down)))
    expected, pre = triton_experts.forward(hidden, index, factors, experts)
    found, kept = triton_lora.forward(hidden, index, factors, experts, adapters)
    used = int((index < num_experts).sum())
    assert torch.equal(found, expected) and torch.equal(kept[:used], pre[:used])


def test_rows_past_the_end_are_neither_read_nor_written():
    index, num_experts = ROUTING_CASES["unused"]
    groups = group_slots(index.to(DEVICE), num_experts)
    used, experts = int(groups.offsets[-1]), random_experts(num_experts)
    generator = torch.Generator().manual_seed(0)
    low, rows = poisoned(index.numel(), 4), poisoned(index.numel(), 64)
    low[:used], rows[:used] = (torch.randn(used, n, generator=generator).to(DEVICE) for n in (4, 64))
    matrices = torch.randn(num_experts, 64, 4, generator=generator).to(DEVICE)
    number = torch.repeat_interleave(torch.arange(num_experts, device=DEVICE), groups.offsets.diff())
    expected = rows[:used].double() + 0.5 * torch.einsum("sr,snr->sn", low[:used].double(), matrices.double()[number])
    config = KernelConfig(16, 32, 16)
    activated = add_low_rank(rows, low, matrices, 0.5, groups, experts=experts, config=config)
    assert_near(rows[:used], expected, "rows")
    assert_near(activated[:used], activate_reference(expected, experts), "activated")
    assert rows[used:].isnan().all() and activated[used:].isnan().all() and used < index.numel()


def test_float16():
    """The bound of gradients in bfloat16, three bits finer, and for two roundings of a projection in place of one."""
    index, num_experts = ROUTING_CASES["plain"]
    experts = random_experts(num_experts, dtype=torch.float16)
    compare(experts, random_lora(experts), index, tolerance=MORE * 8e-3 / 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the models of these tests are on a CPU")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_model_with_adapters_of_peft(name, monkeypatch):
    wanted = loss_and_gradients(choose(adapted(name, keep=False), "eager"), name)
    monkeypatch.setattr(lora_dispatch, "lora_kernels_of", lambda device_type: triton_lora)
    calls, run = [], lora_dispatch.run
    monkeypatch.setattr(lora_dispatch, "run", lambda *args: calls.append(args[-1]) or run(*args))
    model = choose(adapted(name), "moe_ext")
    assert_same(loss_and_gradients(model, name), wanted)
    assert calls == [triton_lora] * model.config.num_hidden_layers


def test_what_is_refused():
    experts = random_experts()
    adapters = random_lora(experts)
    assert triton_lora.refusal(experts, adapters) is None
    assert "formula" in triton_lora.refusal(replace(experts, activation=None), adapters)
    halves = adapters.with_tensors([tensor.half() for tensor in adapters.tensors])
    assert triton_lora.refusal(experts, halves) == "experts and adapters differ in their dtype"
    groups = group_slots(torch.zeros(4, 2, dtype=torch.int32, device=DEVICE), 5)
    with pytest.raises(ValueError, match=r"\(S, N\), \(S, r\) and \(E, N, r\)"):
        add_low_rank(poisoned(8, 64), poisoned(8, 4), poisoned(5, 32, 4), 1.0, groups)
    with pytest.raises(ValueError, match="must be contiguous"):
        add_low_rank(poisoned(64, 8).T, poisoned(8, 4), poisoned(5, 64, 4), 1.0, groups)
