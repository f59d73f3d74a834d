"""The experts layer for few tokens against loops in float64, and what has to hold bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.kernels.references import (
    ACTIVATIONS,
    DEVICE,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    LAYOUTS,
    ROUTING_CASES,
    experts_reference,
    random_experts,
    random_hidden,
    relative_error,
    routing_weights,
)


triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from hf_moe_ext.kernels import triton_decode  # noqa: E402
from hf_moe_ext.kernels.triton_decode import DecodeConfig, decode, default_decode_config  # noqa: E402
from hf_moe_ext.kernels.triton_routing import Launch  # noqa: E402


BLOCKS = DecodeConfig(up_rows=8, up_step=16, down_rows=16, down_step=16)
UNEVEN = DecodeConfig(up_rows=16, up_step=32, down_rows=32, down_step=64)  # divide neither 48 nor 80, nor 24


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    """Every `torch.empty` is filled with NaN, so that what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def case(name: str, tokens: int = 4):
    """(index (tokens, K), E, routing weights with NaN in unused slots)."""
    index, num_experts = ROUTING_CASES[name]
    index = index[:tokens].to(DEVICE)
    return index, num_experts, routing_weights(index, num_experts)


def check(weights, index, factors, *, config=BLOCKS, hidden=None, bound=1e-5):
    if hidden is None:
        hidden = random_hidden(len(index), weights.hidden_size, dtype=weights.up.dtype)
    found = decode(hidden, weights, index, factors, config=config)
    assert found.dtype == hidden.dtype
    assert relative_error(found, experts_reference(hidden, weights, index, factors)) < bound
    return found


@pytest.mark.parametrize("config", [BLOCKS, UNEVEN], ids=["blocks", "uneven"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, config):
    index, num_experts, factors = case("unused")
    width = 24 if config is UNEVEN else INTERMEDIATE
    check(random_experts(num_experts, HIDDEN, width, layout=layout), index, factors, config=config)


@pytest.mark.parametrize("layout", ["stock", "gpt_oss", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, layout):
    index, num_experts, factors = case("plain", 3)
    check(random_experts(num_experts, layout=layout, activation=activation), index, factors)


@pytest.mark.parametrize("name", ROUTING_CASES)
def test_routing_cases(name):
    index, num_experts, factors = case(name, 8)
    check(random_experts(num_experts, 32, 16, layout="bias"), index, factors)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_numbers_of_tokens(tokens):
    index, num_experts, factors = case("ragged", tokens)
    check(random_experts(num_experts, 32, 16), index.long(), factors)


def test_more_slots_than_are_ordered():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(EXPERTS + 1, (23, 3), generator=generator).to(DEVICE)
    assert index.numel() > triton_decode.FEW_SLOTS
    check(random_experts(EXPERTS, 16, 16), index, routing_weights(index, EXPERTS))


@pytest.mark.parametrize("layout", ["stock", "gpt_oss"])
def test_default_sizes(layout):
    index, num_experts, factors = case("ragged", 2)
    weights = random_experts(num_experts, 80, 96, layout=layout)
    check(weights, index, factors, config=None)
    config = default_decode_config(weights)
    assert config == default_decode_config(weights) and config.up_step <= 128


def test_half_precision():
    index, num_experts, factors = case("unused")
    weights = random_experts(num_experts, layout="gpt_oss", dtype=torch.float16)
    exact = check(weights, index, factors, bound=1e-3)
    rounded = check(weights, index, factors, config=replace(BLOCKS, activated_in_float32=False), bound=1e-3)
    assert not torch.equal(exact, rounded)  # the option does something


def test_views_of_larger_tensors():
    index, num_experts, factors = case("plain")
    weights = random_experts(num_experts, layout="bias")
    hidden = random_hidden(len(index))

    def strided(tensor, *, swap=False):
        """The same values with gaps of NaN between them, in the last axis, too."""
        shape = [2 * size for size in tensor.shape]
        wide = torch.full(shape[::-1] if swap else shape, math.nan, dtype=tensor.dtype, device=tensor.device)
        view = (wide.permute(*reversed(range(wide.ndim))) if swap else wide)[(slice(None, None, 2),) * tensor.ndim]
        view.copy_(tensor)
        return view

    expected = decode(hidden, weights, index, factors, config=BLOCKS)
    moved = replace(
        weights,
        up=strided(weights.up),
        down=strided(weights.down, swap=True),
        up_bias=strided(weights.up_bias),
        down_bias=strided(weights.down_bias, swap=True),
    )
    found = decode(
        strided(hidden, swap=True), moved, strided(index.double()).int(), strided(factors, swap=True), config=BLOCKS
    )
    assert relative_error(found, expected) < 1e-6  # other loads, so other fused additions


def test_offsets_beyond_int32():
    torch.use_deterministic_algorithms(False)  # only the pages that are used must be touched
    stride, size = 2**30 + 64, 16  # twice that is too much, though the stride itself is an int32
    try:
        storage = torch.empty(2 * stride + 4 * size * size, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no memory for it")
    small = random_experts(3, size, size, dtype=torch.float16)
    weights = replace(
        small,
        up=storage.as_strided((3, 2 * size, size), (stride, size, 1)),
        down=storage.as_strided((3, size, size), (stride, size, 1), 2 * size * size),
    )
    weights.up.copy_(small.up)
    weights.down.copy_(small.down)
    index = torch.tensor([[2, 0]], dtype=torch.int32, device=DEVICE)
    hidden, factors = random_hidden(1, size, dtype=torch.float16), torch.ones(1, 2, device=DEVICE)
    found = decode(hidden, weights, index, factors, config=BLOCKS)
    assert torch.equal(found, decode(hidden, small, index, factors, config=BLOCKS))


# Exact properties ---------------------------------------------------------------------------------------------------


def test_weights_of_experts_without_a_slot_are_not_read():
    index, num_experts, factors = case("empty_experts")
    weights = random_experts(num_experts, layout="bias")
    expected = check(weights, index, factors)
    unused = [expert for expert in range(num_experts) if not (index == expert).any()]
    assert unused
    for tensor in (weights.up, weights.down, weights.up_bias, weights.down_bias):
        tensor[unused] = math.nan
    hidden = random_hidden(len(index))
    assert torch.equal(decode(hidden, weights, index, factors, config=BLOCKS), expected)


def test_tokens_without_an_expert_get_zero():
    index, num_experts, factors = case("all_unused")
    hidden = torch.full((len(index), HIDDEN), math.nan, device=DEVICE)
    found = decode(hidden, random_experts(num_experts, layout="bias"), index, factors, config=BLOCKS)
    assert torch.equal(found, torch.zeros_like(found))


def test_no_tokens_and_no_slots():
    weights = random_experts()
    empty = torch.empty(0, 2, dtype=torch.int32, device=DEVICE)
    assert decode(random_hidden(0), weights, empty, empty.float()).shape == (0, HIDDEN)
    none = torch.empty(3, 0, dtype=torch.int32, device=DEVICE)
    assert torch.equal(decode(random_hidden(3), weights, none, none.float()), torch.zeros(3, HIDDEN, device=DEVICE))


def test_a_token_does_not_depend_on_the_others():
    index, num_experts, factors = case("unused", 8)
    weights = random_experts(num_experts, layout="gpt_oss")
    hidden = random_hidden(len(index))
    config = default_decode_config(weights)
    together = decode(hidden, weights, index, factors, config=config)
    assert torch.equal(together, decode(hidden, weights, index, factors, config=config))
    alone = torch.cat(
        [decode(hidden[t : t + 1], weights, index[t : t + 1], factors[t : t + 1]) for t in range(len(index))]
    )
    assert torch.equal(together, alone)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4], device=DEVICE)
    assert torch.equal(decode(hidden[order], weights, index[order], factors[order]), together[order])


def test_numbering_of_experts_does_not_matter():
    index, num_experts, factors = case("ragged")
    weights, hidden = random_experts(num_experts, layout="bias"), random_hidden(len(index))
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2], device=DEVICE)  # new expert e is the old order[e]
    moved = replace(
        weights,
        up=weights.up[order],
        down=weights.down[order],
        up_bias=weights.up_bias[order],
        down_bias=weights.down_bias[order],
    )
    found = decode(hidden, moved, order.argsort()[index.long()], factors, config=BLOCKS)
    assert torch.equal(found, decode(hidden, weights, index, factors, config=BLOCKS))


def test_unused_slots_change_nothing():
    index, num_experts, factors = case("plain")
    weights, hidden = random_experts(num_experts), random_hidden(len(index))
    expected = decode(hidden, weights, index, factors, config=BLOCKS)
    wider = torch.stack([index, torch.full_like(index, 2**31 - 1)], dim=-1).flatten(1)
    poisoned = torch.stack([factors, torch.full_like(factors, math.nan)], dim=-1).flatten(1)
    assert torch.equal(decode(hidden, weights, wider, poisoned, config=BLOCKS), expected)
    assert torch.equal(
        decode(hidden, weights, torch.where(wider >= num_experts, -1, wider), poisoned, config=BLOCKS), expected
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_token(activation):
    index = torch.tensor([[0, 1], [1, 0], [0, 1]], device=DEVICE)
    factors = torch.full((3, 2), 0.5, device=DEVICE)
    weights, hidden = random_experts(2, 16, 16, activation=activation), random_hidden(3, 16)
    expected = decode(hidden, weights, index, factors, config=BLOCKS)
    hidden[1, 2] = math.nan
    found = decode(hidden, weights, index, factors, config=BLOCKS)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("row", ["gate", "up", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_lost_in_an_activation(activation, row):
    """Also where only one factor of the activated value is NaN, and whatever a limit compares it with."""
    weights = random_experts(1, 16, 16, activation=activation, layout="plain" if row == "plain" else "stock")
    weights.up[0, 16 + 5 if row == "up" else 5] = math.nan
    index, factors = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    assert decode(random_hidden(1, 16), weights, index, factors, config=BLOCKS).isnan().all()


def test_one_expert_is_a_dense_block():
    weights, hidden = random_experts(1), random_hidden(3)
    index = torch.zeros(3, 1, dtype=torch.int32, device=DEVICE)
    found = decode(hidden, weights, index, torch.ones(3, 1, device=DEVICE), config=BLOCKS)
    gate, up = (hidden.double() @ weights.up[0].double().T).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up) @ weights.down[0].double().T
    assert relative_error(found, expected) < 1e-5


# Launches -----------------------------------------------------------------------------------------------------------


@triton.jit
def _order(index, out, num_slots, num_experts, BLOCK: tl.constexpr):
    position = tl.program_id(0)
    tl.store(out + position, triton_decode._slot_in_order(index, position, num_slots, num_experts, BLOCK))


@pytest.mark.parametrize("name", ["ragged", "unused", "the_same_expert_twice", "one_token"])
def test_programs_are_in_the_order_of_experts(name):
    index, num_experts, _ = case(name, 8)
    flat = index.reshape(-1)
    out = torch.full_like(flat, -1)
    block = 1 << (len(flat) - 1).bit_length()
    _order[(len(flat),)](index, out, len(flat), num_experts, BLOCK=block)
    assert torch.equal(out.long(), flat.clamp(max=num_experts).argsort(stable=True))


def test_two_launches(monkeypatch):
    index, num_experts, factors = case("plain")
    kernels, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, like: (kernels.append(self.kernel), run(self, like)))
    decode(random_hidden(len(index)), random_experts(num_experts), index, factors)
    assert kernels == [triton_decode.decode_up, triton_decode.decode_down]


def test_refusals():
    index, num_experts, factors = case("plain")
    weights, hidden = random_experts(num_experts), random_hidden(len(index))
    with pytest.raises(ValueError, match="activation is known"):
        decode(hidden, replace(weights, activation=None), index, factors)
    with pytest.raises(ValueError, match="norm of their own"):
        decode(hidden, replace(weights, post_norm=torch.nn.Identity()), index, factors)
    with pytest.raises(ValueError, match=r"`hidden` must be \(T, 48\)"):
        decode(hidden[:, :-1], weights, index, factors)
    with pytest.raises(ValueError, match="`index` and `routing_weights`"):
        decode(hidden, weights, index, factors[:, :1])
    with pytest.raises(ValueError, match="`up_rows` must be a power of 2, got 12"):
        DecodeConfig(up_rows=12)
    with pytest.raises(RuntimeError, match="no backward"):
        decode(hidden.requires_grad_(), weights, index, factors)
    with torch.no_grad():
        decode(hidden, weights, index, factors)
