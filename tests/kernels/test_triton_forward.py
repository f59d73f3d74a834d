"""The forward kernels against loops in float64, and what has to hold bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe_ext.kernels.expert_weights import ExpertWeights
from hf_moe_ext.kernels.tile_config import KernelConfig, default_config
from tests.kernels.references import (
    ACTIVATIONS,
    DEVICE,
    LAYOUTS,
    ROUTING_CASES,
    Layout,
    combine_reference,
    down_reference,
    experts_reference,
    group_slots_reference,
    poisoned,
    random_experts,
    random_hidden,
    relative_error,
    routing_weights,
    rows_agree,
    up_reference,
)


pytest.importorskip("triton")

from hf_moe_ext.kernels.triton_forward import _default, combine, down_forward, up_forward  # noqa: E402
from hf_moe_ext.kernels.triton_routing import SlotGroups, group_slots  # noqa: E402


pytestmark = pytest.mark.usefixtures("poison_memory")

SMALL = KernelConfig(16, 32, 16)
CONFIGS = {
    "pointers": SMALL,
    "persistent": replace(SMALL, persistent=True, GROUP_M=2),
    "descriptors": replace(SMALL, tma=True, persistent=True, GROUP_M=1),
    "larger than the matrices": KernelConfig(32, 128, 64, tma=True),
    "halves": KernelConfig(32, 32, 16, halves=True, persistent=True),
    "halves by descriptors": KernelConfig(32, 32, 16, halves=True, tma=True),
}
FLOAT32 = 1e-5  # relative, in the norm: products in float32
FLOAT16 = 1e-3  # two units of the last place


def routed(case: str) -> tuple[Tensor, int]:
    index, num_experts = ROUTING_CASES[case]
    return index.to(DEVICE), num_experts


def layer(
    hidden: Tensor, weights: ExpertWeights, index: Tensor, factors: Tensor | None, config: KernelConfig = SMALL
) -> Tensor:
    """The whole forward."""
    groups = group_slots(index, weights.num_experts)
    activated, pre = up_forward(hidden, weights, groups, keep=False, config=config)
    if activated is None:
        assert pre is not None
        activated = weights.apply(pre)
    rows = down_forward(activated, weights, groups, config=config)
    return combine(rows, groups, factors, hidden.shape[0], out_dtype=hidden.dtype)


def inside_nan(tensor: Tensor, step: int, begin: int) -> Tensor:
    """The same values as a view of a wider tensor that is NaN elsewhere."""
    wide = poisoned(*tensor.shape[:-1], tensor.shape[-1] * step + begin + 9, dtype=tensor.dtype)
    view = wide[..., begin : begin + tensor.shape[-1] * step : step]
    return view.copy_(tensor)


# Each kernel against its loop ---------------------------------------------------------------------------------------


def check_up(hidden: Tensor, weights: ExpertWeights, index: Tensor, config: KernelConfig, limit: float) -> None:
    groups = group_slots(index, weights.num_experts)
    expected, expected_pre = up_reference(hidden, weights, group_slots_reference(index, weights.num_experts))
    used = len(expected)

    activated, pre = up_forward(hidden, weights, groups, keep=True, config=config)

    assert activated is not None and pre is not None and activated.dtype == pre.dtype == hidden.dtype
    assert relative_error(activated[:used], expected) < limit
    assert relative_error(pre[:used], expected_pre) < limit
    assert activated[used:].isnan().all() and pre[used:].isnan().all()  # never written
    alone, nothing = up_forward(hidden, weights, groups, keep=False, config=config)
    assert nothing is None and torch.equal(alone[:used], activated[:used])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_up_of_every_layout(layout, config):
    index, num_experts = routed("unused")
    weights = random_experts(num_experts, layout=layout)
    check_up(random_hidden(len(index)), weights, index, CONFIGS[config], FLOAT32)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, gated):
    formula = ACTIVATIONS[activation]
    if not gated and (formula.limit is not None or formula.alpha != 1):
        pytest.skip("limits and slopes belong to gates")
    index, num_experts = routed("plain")
    weights = random_experts(num_experts, layout=Layout(has_gate=gated, has_bias=True), activation=formula)
    check_up(random_hidden(len(index)), weights, index, SMALL, FLOAT32)


@pytest.mark.parametrize("layout", ["stock", "interleaved", "plain_bias"])
def test_an_activation_that_is_not_known_is_left_to_the_module(layout):
    index, num_experts = routed("plain")
    hidden = random_hidden(len(index))
    weights = random_experts(num_experts, layout=layout, activation=None)
    expected, expected_pre = up_reference(hidden, weights, group_slots_reference(index, num_experts))

    activated, pre = up_forward(hidden, weights, group_slots(index, num_experts), keep=False, config=SMALL)

    assert activated is None
    assert relative_error(pre, expected_pre) < FLOAT32
    assert relative_error(weights.apply(pre), expected) < FLOAT32


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_down_of_every_layout(layout, config):
    index, num_experts = routed("unused")
    weights = random_experts(num_experts, layout=layout)
    groups, slots = group_slots(index, num_experts), index.numel()
    activated = poisoned(slots, weights.intermediate_size)
    used = int(groups.offsets[-1])
    activated[:used] = random_hidden(used, weights.intermediate_size)
    expected = down_reference(activated, weights, group_slots_reference(index, num_experts))

    rows = down_forward(activated, weights, groups, config=CONFIGS[config])

    assert rows.shape == (slots, weights.hidden_size) and rows.is_contiguous()
    assert relative_error(rows[:used], expected) < FLOAT32
    assert rows[used:].isnan().all()


@pytest.mark.parametrize("hidden", [48, 2500])  # one and two blocks of columns
@pytest.mark.parametrize("options", ["plain", "weights", "add", "all"])
def test_combine(options, hidden):
    index, num_experts = routed("unused")
    groups, expected_groups = group_slots(index, num_experts), group_slots_reference(index, num_experts)
    used, tokens = int(groups.offsets[-1]), len(index)
    rows = poisoned(index.numel(), hidden)
    rows[:used] = random_hidden(used, hidden)
    factors = routing_weights(index, num_experts) if options in ("weights", "all") else None
    add = random_hidden(tokens, 2 * hidden, seed=9)[:, ::2] if options in ("add", "all") else None
    scale = 2.5 if options == "all" else 1.0
    expected = combine_reference(rows, expected_groups, factors, tokens, add=add, scale=scale)

    for dtype, limit in ((torch.float32, FLOAT32), (torch.float16, FLOAT16)):
        out = combine(rows, groups, factors, tokens, out_dtype=dtype, add=add, scale=scale)
        assert out.dtype == dtype and out.is_contiguous()
        assert relative_error(out, expected) < limit


def test_combine_takes_weights_of_any_layout_and_dtype():
    index, num_experts = routed("plain")
    groups = group_slots(index, num_experts)
    rows = random_hidden(index.numel())
    factors = routing_weights(index, num_experts).half()
    expected = combine(rows, groups, factors.float(), len(index), out_dtype=torch.float32)
    strided = factors.t().contiguous().t()
    assert not strided.is_contiguous()
    for given in (factors, strided):
        assert torch.equal(combine(rows, groups, given, len(index), out_dtype=torch.float32), expected)


# The whole layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", ROUTING_CASES)
def test_layer_of_every_routing(case, config):
    """Weights of unused slots are NaN."""
    index, num_experts = routed(case)
    weights, hidden = random_experts(num_experts), random_hidden(len(index))
    factors = routing_weights(index, num_experts)

    out = layer(hidden, weights, index, factors, CONFIGS[config])

    assert relative_error(out, experts_reference(hidden, weights, index, factors)) < FLOAT32
    assert (out[(index >= num_experts).all(dim=1)] == 0).all()


@pytest.mark.parametrize("layout", ["stock", "gpt_oss"])
@pytest.mark.parametrize("hidden_size, intermediate", [(80, 96), (64, 20), (33, 7)])
def test_sizes_that_blocks_do_not_divide(hidden_size, intermediate, layout):
    index, num_experts = routed("ragged")
    weights = random_experts(num_experts, hidden_size, intermediate, layout=layout, activation="gpt_oss")
    hidden, factors = random_hidden(len(index), hidden_size), routing_weights(index, num_experts)
    expected = experts_reference(hidden, weights, index, factors)
    # What lies behind the end of a row is NaN, in the input as well as in the weights.
    names = ("up", "down", "up_bias", "down_bias") if weights.up_bias is not None else ("up", "down")
    among_nan = replace(weights, **{name: inside_nan(getattr(weights, name), 1, 0) for name in names})
    for config in (replace(SMALL, tma=True), KernelConfig(16, 64, 64, tma=True, persistent=True)):
        for given, states in ((weights, hidden), (weights, inside_nan(hidden, 1, 0)), (among_nan, hidden)):
            assert relative_error(layer(states, given, index, factors, config), expected) < FLOAT32


def test_float16():
    index, num_experts = routed("unused")
    weights = random_experts(num_experts, layout="bias", dtype=torch.float16)
    hidden, factors = random_hidden(len(index), dtype=torch.float16), routing_weights(index, num_experts)
    out = layer(hidden, weights, index, factors, CONFIGS["descriptors"])
    assert out.dtype == torch.float16
    assert relative_error(out, experts_reference(hidden, weights, index, factors)) < FLOAT16


@pytest.mark.gpu  # arithmetic in bfloat16 is wrong in the interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16(layout):
    index = torch.rand(300, 8, device=DEVICE).argsort(dim=1)[:, :2].int()
    weights = random_experts(8, 256, 384, layout=layout, dtype=torch.bfloat16)
    hidden, factors = random_hidden(300, 256, dtype=torch.bfloat16), routing_weights(index, 8)
    expected = experts_reference(hidden, weights, index, factors)
    for rows in (1, 16, 32, 64, 128):
        config = default_config("up", rows, 768, 256, torch.bfloat16)
        assert relative_error(layer(hidden, weights, index, factors, config), expected) < 5e-3


def test_default_config_is_used_where_none_is_given():
    index, num_experts = routed("unused")
    weights, hidden = random_experts(num_experts), random_hidden(len(index))
    factors = routing_weights(index, num_experts)
    groups = group_slots(index, num_experts)
    activated, _ = up_forward(hidden, weights, groups, keep=False)
    out = combine(down_forward(activated, weights, groups), groups, factors, len(index), out_dtype=torch.float32)
    assert relative_error(out, experts_reference(hidden, weights, index, factors)) < FLOAT32


# Bit for bit --------------------------------------------------------------------------------------------------------


@pytest.fixture
def example() -> tuple[Tensor, ExpertWeights, Tensor, Tensor]:
    index, num_experts = routed("unused")
    weights = random_experts(num_experts, layout="bias", activation="gpt_oss")
    return random_hidden(len(index)), weights, index, routing_weights(index, num_experts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_configs_that_cut_the_contraction_alike_agree(layout):
    """Neither who computes a tile, nor how it is loaded, nor its order changes a bit."""
    index, num_experts = routed("unused")
    weights, hidden = random_experts(num_experts, layout=layout), random_hidden(len(index))
    factors = routing_weights(index, num_experts)
    expected = layer(hidden, weights, index, factors, SMALL)
    for name in ("persistent", "descriptors"):
        assert torch.equal(layer(hidden, weights, index, factors, CONFIGS[name]), expected)


def test_two_runs_agree(example):
    assert torch.equal(layer(*example), layer(*example))


def test_permuted_tokens(example):
    hidden, weights, index, factors = example
    order = torch.randperm(len(hidden)).to(DEVICE)
    assert rows_agree(layer(hidden[order], weights, index[order], factors[order]), layer(*example)[order])


def test_permuted_experts(example):
    hidden, weights, index, factors = example
    order = torch.randperm(weights.num_experts).to(DEVICE)
    moved = replace(
        weights,
        up=weights.up[order],
        down=weights.down[order],
        up_bias=weights.up_bias[order],
        down_bias=weights.down_bias[order],
    )
    place = order.argsort()  # expert e stands at place[e]
    used = index < weights.num_experts
    renamed = torch.where(used, place[index.clamp(max=weights.num_experts - 1).long()].int(), index)
    assert torch.equal(layer(hidden, moved, renamed, factors), layer(*example))


def test_more_unused_slots(example):
    hidden, weights, index, factors = example
    unused, nan = torch.full_like(index[:, :1], weights.num_experts + 7), torch.full_like(factors[:, :1], torch.nan)
    wide_index = torch.cat([unused, index[:, :2], unused, index[:, 2:], unused], dim=1)
    wide_factors = torch.cat([nan, factors[:, :2], nan, factors[:, 2:], nan], dim=1)
    assert torch.equal(layer(hidden, weights, wide_index, wide_factors), layer(*example))


def test_a_token_is_the_same_in_any_batch(example):
    """With one configuration for both; the rule gives one if it is asked to."""
    hidden, weights, index, factors = example
    whole = layer(*example)
    for cut in (1, 7, 16):
        parts = [layer(hidden[part], weights, index[part], factors[part]) for part in (slice(cut), slice(cut, None))]
        assert rows_agree(torch.cat(parts), whole)


def test_nan_stays_in_its_token(example):
    hidden, weights, index, factors = example
    clean, dirty = layer(*example), hidden.clone()
    token = int((index < weights.num_experts).all(dim=1).nonzero()[0])
    dirty[token, 5] = torch.nan

    out = layer(dirty, weights, index, factors)

    assert out[token].isnan().all()
    others = torch.arange(len(hidden)) != token
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_hidden_by_an_activation(activation):
    """As in torch: neither a limit nor relu makes a number of it. (A minimum would, but only on the GPU.)"""
    index, num_experts = routed("one_expert")
    hidden = random_hidden(len(index))
    for part in (slice(None, 32), slice(32, None)):  # gate or up columns
        weights = random_experts(num_experts, activation=activation)
        weights.up[:, part] = torch.nan
        activated, _ = up_forward(hidden, weights, group_slots(index, num_experts), keep=False, config=SMALL)
        assert activated.isnan().all()
    plain = random_experts(num_experts, layout="plain", activation=activation)
    plain.up.fill_(torch.nan)
    activated, _ = up_forward(hidden, plain, group_slots(index, num_experts), keep=False, config=SMALL)
    assert activated.isnan().all()


def test_one_expert_is_a_dense_block():
    index, num_experts = routed("one_expert")
    weights, hidden = random_experts(num_experts), random_hidden(len(index))
    gate, up = F.linear(hidden.double(), weights.up[0].double()).chunk(2, dim=-1)
    dense = F.linear(F.silu(gate) * up, weights.down[0].double())
    out = layer(hidden, weights, index, torch.ones(index.shape, device=DEVICE))
    assert relative_error(out, dense) < FLOAT32
    assert torch.equal(out, layer(hidden, weights, index, None))  # no weights: all 1


# Inputs in odd places -----------------------------------------------------------------------------------------------


def test_hidden_states_in_any_layout(example):
    hidden, weights, index, factors = example
    expected = layer(*example)
    wide = poisoned(2 * hidden.shape[0], 3 * hidden.shape[1])
    wide[::2, 1::3] = hidden
    for view in (hidden.t().contiguous().t(), wide[::2, 1::3]):
        assert not view.is_contiguous() and torch.equal(layer(view, weights, index, factors), expected)


def test_weights_that_are_views(example):
    """A descriptor cannot be made of all of them; the result is the same."""
    hidden, weights, index, factors = example
    expected = layer(*example)

    for step, begin in ((1, 1), (1, 4), (2, 0)):
        names = ("up", "down", "up_bias", "down_bias")
        views = {name: inside_nan(getattr(weights, name), step, begin) for name in names}
        assert torch.equal(layer(hidden, replace(weights, **views), index, factors, CONFIGS["descriptors"]), expected)


def test_offsets_beyond_int32(monkeypatch):
    """Steps between experts, tokens and rows so large that a product in int32 would wrap."""
    if DEVICE == "cpu":
        # After a launch the interpreter copies tensors back, those of the CPU onto themselves: here gigabytes.
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)

    step = 2**30 + 64

    def far(tensor: Tensor) -> Tensor:
        # Storage and not `torch.empty`, which is poisoned: memory of the CPU that nobody touches costs nothing.
        storage = torch.UntypedStorage((2 * step + tensor[0].numel()) * tensor.element_size(), device=DEVICE)
        view = torch.tensor([], dtype=tensor.dtype, device=DEVICE)
        return view.set_(storage, 0, tensor.shape, (step, *tensor.stride()[1:])).copy_(tensor)

    weights, hidden = random_experts(3, dtype=torch.float16), random_hidden(3, dtype=torch.float16)
    index = torch.tensor([[0, 2], [1, 0], [2, 1]], device=DEVICE)
    factors = routing_weights(index, 3)
    expected = layer(hidden, weights, index, factors)
    for config in (SMALL, CONFIGS["descriptors"]):
        for name in ("up", "down"):
            moved = replace(weights, **{name: far(getattr(weights, name))})
            assert torch.equal(layer(hidden, moved, index, factors, config), expected)
        assert torch.equal(layer(far(hidden), weights, index, factors, config), expected)
    one = index[:, :1].contiguous()
    groups, rows = group_slots(one, 3), random_hidden(3, 32, dtype=torch.float16)
    for config in (SMALL, CONFIGS["descriptors"]):
        expected = down_forward(rows, weights, groups, config=config)
        assert torch.equal(down_forward(far(rows), weights, groups, config=config), expected)
    expected = combine(rows, groups, None, 3, out_dtype=torch.float16)
    assert torch.equal(combine(far(rows), groups, None, 3, out_dtype=torch.float16), expected)


# Configurations and errors ------------------------------------------------------------------------------------------


def test_the_rule_for_configurations():
    for kind in ("up", "up_kept", "down"):
        large = default_config(kind, 512, 1536, 2048, torch.bfloat16, num_experts=128)
        assert (large.BLOCK_M, large.BLOCK_N, large.BLOCK_K, large.num_warps) == (128, 256, 64, 8)
        assert large.persistent == (kind != "up_kept") and large.tma and large.GROUP_M == 8
    halves = {
        (kind, n): default_config(kind, n, 1536, 2048, torch.bfloat16, num_experts=128).halves
        for kind in ("up", "up_kept", "down")
        for n in (512, 2048)
    }
    assert [key for key, value in halves.items() if value] == [("up", 512), ("up_kept", 512)]
    few_tiles = default_config("up", 512, 1536, 2048, torch.bfloat16, num_experts=8)  # 192: less than 2 * 132
    assert (few_tiles.BLOCK_M, few_tiles.BLOCK_N, few_tiles.persistent) == (128, 128, False)
    rows = {n: default_config("down", n, 2048, 768, torch.bfloat16).BLOCK_M for n in (0, 1, 17, 33, 64, 65, 999)}
    assert rows == {0: 16, 1: 16, 17: 32, 33: 64, 64: 64, 65: 128, 999: 128}
    assert default_config("up", 16, 1536, 2048, torch.bfloat16).GROUP_M == 1
    assert default_config("up", 512, 20, 33, torch.float16).BLOCK_N == 32


def test_wide_tiles_are_for_weights_that_come_by_descriptors():
    index = torch.empty(4096, 4, dtype=torch.int32, device="meta")
    groups = SlotGroups(index.new_empty(9), index.flatten(), index.flatten(), 8, 4)
    for layout, width in (("stock", 256), ("interleaved", 256), ("transposed", 256), ("gaps", 128)):
        known = "stock" if layout == "gaps" else layout
        shapes = random_experts(8, 16, 16, layout=known, dtype=torch.bfloat16)
        up = torch.empty((8, 2048, 8192), dtype=torch.bfloat16, device="meta")
        down = torch.empty((8, 2048, 4096), dtype=torch.bfloat16, device="meta")
        if shapes.is_transposed:
            up, down = (tensor.transpose(1, 2).contiguous() for tensor in (up, down))
        if layout == "gaps":
            up, down = (tensor.new_empty(*tensor.shape[:2], 2 * tensor.shape[2])[..., ::2] for tensor in (up, down))
        weights = replace(shapes, up=up, down=down)
        assert [_default(kind, weights, groups).BLOCK_N for kind in ("up", "down")] == [width, width], layout


def test_a_rule_that_ignores_the_batch():
    for dtype in (torch.bfloat16, torch.float32):
        fixed = {
            default_config("up", rows, 1536, 2048, dtype, num_experts=16, batch_invariant=True)
            for rows in (1, 64, 4096)
        }
        assert len(fixed) == 1


def test_precision_of_float32_is_that_of_torch():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for setting, precision in (("ieee", "ieee"), ("tf32", "tf32")):
            settings.fp32_precision = setting
            assert default_config("up", 64, 64, 64, torch.float32).precision == precision
    finally:
        settings.fp32_precision = before
    assert default_config("up", 64, 64, 64, torch.float32).precision == ("tf32" if before == "tf32" else "ieee")


def test_what_is_refused(example):
    hidden, weights, index, factors = example
    groups = group_slots(index, weights.num_experts)
    with pytest.raises(ValueError, match="`BLOCK_N` must be a power of 2 of at least 16, got 48"):
        KernelConfig(16, 48, 16)
    with pytest.raises(ValueError, match="`kind` must be"):
        default_config("sideways", 1, 1, 1, torch.float32)
    with pytest.raises(ValueError, match=r"the input must be \(rows, 48\), got \(24, 47\)"):
        up_forward(hidden[:, 1:], weights, groups, keep=False)
    with pytest.raises(ValueError, match="the groups are of 72 slots and 5 experts, the input has 69 and 5"):
        up_forward(hidden[1:], weights, groups, keep=False)
    with pytest.raises(TypeError, match="one dtype"):
        up_forward(hidden.half(), weights, groups, keep=False)
    with pytest.raises(TypeError, match="one dtype"):
        doubled = replace(weights, up=weights.up.double(), down=weights.down.double())
        up_forward(hidden.double(), doubled, groups, keep=False)
    rows = random_hidden(index.numel())
    with pytest.raises(ValueError, match="`rows` must have T"):
        combine(rows[1:], groups, None, len(index), out_dtype=torch.float32)
    with pytest.raises(ValueError, match="`routing_weights` must be"):
        combine(rows, groups, factors[:, 1:], len(index), out_dtype=torch.float32)
    with pytest.raises(ValueError, match="`add` must be"):
        combine(rows, groups, None, len(index), out_dtype=torch.float32, add=hidden[1:])
    with pytest.raises(ValueError, match="contiguous along its last axis"):
        combine(rows.t().contiguous().t(), groups, None, len(index), out_dtype=torch.float32)
