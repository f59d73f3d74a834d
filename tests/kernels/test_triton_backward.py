"""The backward kernels against float64 autograd of a loop, and what has to hold bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_moe_ext.kernels.backward_config import down_backward_config, weight_gradient_config
from hf_moe_ext.kernels.expert_weights import ExpertWeights
from hf_moe_ext.kernels.tile_config import KernelConfig
from tests.kernels.references import (
    ACTIVATIONS,
    DEVICE,
    EXPERTS,
    HIDDEN,
    LAYOUTS,
    ROUTING_CASES,
    activate_reference,
    combine_reference,
    down_reference,
    experts_reference,
    in_float64,
    poisoned,
    random_experts,
    random_hidden,
    relative_error,
    routing_weights,
    up_reference,
)


pytest.importorskip("triton")

from hf_moe_ext.kernels.triton_backward import (  # noqa: E402
    bias_gradient,
    down_backward,
    down_backward_plain,
    input_gradient,
    weight_gradient,
)
from hf_moe_ext.kernels.triton_routing import SlotGroups, group_slots  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy, for exp(-x)

SMALL = KernelConfig(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16)
# Epilogues in parts, blocks that no size divides, and what the input's gradient has of descriptors.
WIDE = KernelConfig(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32, persistent=True, tma=True)
GATED = [name for name in LAYOUTS if LAYOUTS[name].has_gate]
PLAIN_KINDS = ["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"]
# float32 is exact but for roundings in the sums; a float16 result is rounded once, by half of 2**-10 at most.
BOUND = {torch.float32: 1e-5, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def poison_outputs(monkeypatch):
    """Whatever kernels are given to write to holds NaN, or a number that is no row, no slot and no expert."""

    def poisoning(make):
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan if tensor.is_floating_point() else -77)

        return filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


class Problem:
    """Inputs of the backward for a routing case, and its gradients by float64 autograd of a loop."""

    def __init__(
        self,
        case: str = "unused",
        *,
        layout: str = "stock",
        activation: str = "silu",
        hidden: int = HIDDEN,
        intermediate: int = 32,
        dtype: torch.dtype = torch.float32,
        reference: bool = True,
    ) -> None:
        index, experts = ROUTING_CASES[case]
        self.index = index.to(DEVICE)
        self.weights = random_experts(experts, hidden, intermediate, layout=layout, activation=activation, dtype=dtype)
        self.groups = group_slots(self.index, experts)
        self.factors = routing_weights(self.index, experts)
        self.hidden = random_hidden(len(index), hidden, dtype=dtype)
        self.grad_out = random_hidden(len(index), hidden, dtype=dtype, seed=5)
        self.num_rows = int(self.groups.offsets[-1])
        _, pre = up_reference(self.hidden, self.weights, self.groups)
        self.pre = over_rows(pre.to(dtype), self.index.numel())
        if reference:
            self.gradients = self.reference()

    def reference(self) -> dict[str, Tensor]:
        weights = in_float64(self.weights, requires_grad=True)
        hidden, factors = (x.double().requires_grad_() for x in (self.hidden, self.factors))
        out = experts_reference(hidden, weights, self.index, factors)
        leaves = {"hidden": hidden, "factors": factors, "up": weights.up, "down": weights.down}
        leaves |= {"up_bias": weights.up_bias, "down_bias": weights.down_bias} if weights.up_bias is not None else {}
        if not out.requires_grad:  # no slot is used
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        found = torch.autograd.grad((out * self.grad_out).sum(), list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    def kernels(self, config: KernelConfig | None = SMALL, *, finite: bool = True) -> dict[str, Tensor]:
        """All gradients by the kernels, those of parameters in float32."""
        weights, groups, out = self.weights, self.groups, torch.float32
        kind = {"out": out, "transposed": weights.is_transposed, "config": config}
        grad_pre, weighted, factors = down_backward(
            self.grad_out, weights, self.pre, self.factors, groups, config=config
        )
        rows = input_gradient(grad_pre, weights, groups, config=config)
        for buffer in (grad_pre, weighted, rows):
            assert not finite or buffer[: self.num_rows].isfinite().all()
            assert buffer[self.num_rows :].isnan().all()  # not written
        gradients = {
            "hidden": combine_reference(rows, groups, None, len(self.index)),
            "factors": factors,
            "up": weight_gradient(grad_pre, self.hidden, groups, left_is_tokens=False, right_is_tokens=True, **kind),
            "down": weight_gradient(
                self.grad_out, weighted, groups, left_is_tokens=True, right_is_tokens=False, **kind
            ),
        }
        if weights.up_bias is not None:
            gradients["up_bias"] = bias_gradient(grad_pre, groups, is_tokens=False, out=out)
            gradients["down_bias"] = bias_gradient(self.grad_out, groups, self.factors, is_tokens=True, out=out)
        return gradients | {"grad_pre": grad_pre, "weighted": weighted, "rows": rows}


def over_rows(values: Tensor, num_slots: int) -> Tensor:
    """The rows that exist, in a buffer for all slots with NaN in the others."""
    buffer = poisoned(num_slots, values.shape[1], dtype=values.dtype)
    buffer[: len(values)] = values
    return buffer


def check(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < bound, errors  # NaN compares false too


# Against float64 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, config",
    [*((layout, config) for layout in LAYOUTS for config in (SMALL, WIDE)), ("bias", None)],
    ids=lambda value: {SMALL: "small", WIDE: "wide", None: "by_rule"}.get(value, value),
)
def test_layer(layout, config):
    problem = Problem(layout=layout, activation="gpt_oss" if layout == "gpt_oss" else "gelu")
    check(problem.kernels(config), problem.gradients)


@pytest.mark.parametrize("case", ROUTING_CASES)
def test_layer_for_every_routing(case):
    problem = Problem(case, layout="gpt_oss", activation="gpt_oss")
    check(problem.kernels(), problem.gradients)


@pytest.mark.parametrize("layout", ["stock", "gpt_oss", "plain_bias"])
def test_layer_of_odd_sizes(layout):
    problem = Problem("ragged", layout=layout, activation="silu", hidden=80, intermediate=96)
    check(problem.kernels(WIDE), problem.gradients)


@pytest.mark.parametrize(("layout", "columns"), [("stock", 256), ("interleaved", 128)])  # in eight and four parts
def test_the_widest_tiles(layout, columns):
    problem = Problem(layout=layout, activation="silu", hidden=48, intermediate=272)
    check(problem.kernels(KernelConfig(16, columns, 16, tma=True)), problem.gradients)


def down_backward_reference(problem: Problem) -> dict[str, Tensor]:
    """From the same `pre`, rounded as it is."""
    pre = problem.pre[: problem.num_rows].double().requires_grad_()
    factors = problem.factors.double().requires_grad_()
    activated = activate_reference(pre, problem.weights)
    rows = down_reference(activated, problem.weights, problem.groups)
    out = combine_reference(rows, problem.groups, factors, len(problem.index))
    grad_pre, grad_factors = torch.autograd.grad((out * problem.grad_out).sum(), [pre, factors])
    slots = problem.groups.slot_of_row[: problem.num_rows].long()
    weighted = activated.detach() * problem.factors.double().flatten()[slots, None]
    return {"grad_pre": grad_pre, "weighted": weighted, "factors": grad_factors}


ALL_ACTIVATIONS = [(layout, name) for layout in GATED for name in ACTIVATIONS]
ALL_ACTIVATIONS += [(layout, name) for layout in LAYOUTS if layout not in GATED for name in PLAIN_KINDS]


@pytest.mark.parametrize(
    "layout, activation, dtype",
    [
        *((*pair, torch.float32) for pair in ALL_ACTIVATIONS),
        *((*pair, torch.float16) for pair in [("stock", "silu"), ("gpt_oss", "gpt_oss"), ("plain_bias", "relu2")]),
    ],
)
def test_down_backward(layout, activation, dtype):
    problem = Problem(layout=layout, activation=activation, dtype=dtype, reference=False)
    config = WIDE if layout in ("bias", "interleaved", "plain") else SMALL
    grad_pre, weighted, factors = down_backward(
        problem.grad_out, problem.weights, problem.pre, problem.factors, problem.groups, config=config
    )
    assert grad_pre.dtype == weighted.dtype == dtype and factors.dtype == torch.float32
    n = problem.num_rows
    found = {"grad_pre": grad_pre[:n], "weighted": weighted[:n], "factors": factors}
    expected = down_backward_reference(problem)
    check(found, expected, BOUND[dtype])
    if dtype == torch.float16:  # each element is rounded once, at the end
        for name in ("grad_pre", "weighted"):
            allowed = BOUND[dtype] * expected[name].abs() + 1e-5 * expected[name].abs().mean()
            assert ((found[name] - expected[name]).abs() <= allowed).all(), name


@pytest.mark.parametrize("layout", ["bias", "plain"])
def test_unknown_activation(layout):
    """`down_backward_plain`, with the activation differentiated by torch, is the backward of the known one."""
    problem = Problem(layout=layout, reference=False)
    weights = replace(problem.weights, activation=None)
    pre = problem.pre.clone().requires_grad_()
    activated = weights.apply(pre)
    grad_activated, weighted, factors = down_backward_plain(
        problem.grad_out, weights, activated.detach(), problem.factors, problem.groups, config=SMALL
    )
    n = problem.num_rows
    (grad_pre,) = torch.autograd.grad(activated, pre, grad_activated)
    found = {"grad_pre": grad_pre[:n], "weighted": weighted[:n], "factors": factors}
    check(found, down_backward_reference(problem))
    assert grad_activated[n:].isnan().all() and weighted[n:].isnan().all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_kinks_and_tails(name):
    """At a bound, at 0 and far out the derivative is the one that torch has, element by element."""
    activation = ACTIVATIONS[name]
    limit = activation.limit or 1.0
    next_up, next_down = (torch.nextafter(torch.tensor(limit), torch.tensor(x)).item() for x in (9.0, 0.0))
    special = torch.tensor([0.0, -0.0, limit, -limit, next_up, -next_up, next_down, 1e-3, -3.0, 30.0, -30.0, 1e4])
    values = torch.cartesian_prod(special, special).to(DEVICE)  # gate and up: 144 pairs, 16 a row
    pre = values.reshape(-1, 16, 2).transpose(1, 2).reshape(-1, 32).contiguous()
    weights = random_experts(1, 16, 16, activation=activation)
    groups = group_slots(torch.zeros(len(pre), 1, dtype=torch.int32, device=DEVICE), 1)
    grad_out = torch.randn(len(pre), 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    grad_pre, weighted, _ = down_backward(
        grad_out, weights, pre, torch.ones(len(pre), 1, device=DEVICE), groups, config=SMALL
    )
    reference = pre.double().requires_grad_()
    activated = weights.apply(reference)
    (expected,) = torch.autograd.grad(activated, reference, grad_out.double() @ weights.down[0].double())
    # The product with `down` has a rounding error of its own; what multiplies it reaches 1e4 and more.
    d_error = 1e-6 * (grad_out.abs() @ weights.down[0].abs()).double()
    slopes = torch.autograd.functional.jvp(weights.apply, pre.double(), torch.ones_like(pre).double())[1].abs()
    allowed = 1e-5 * expected.abs() + (d_error * slopes.clamp(min=1)).repeat(1, 2)
    assert ((grad_pre - expected).abs() <= allowed).all()
    assert not grad_pre[expected == 0].any()
    torch.testing.assert_close(weighted.double(), activated.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("left_is_tokens", [False, True])
@pytest.mark.parametrize("right_is_tokens", [False, True])
def test_weight_gradient(left_is_tokens, right_is_tokens, transposed):
    """All operands and layouts, into new and existing gradients of two dtypes, against a loop."""
    problem = Problem(reference=False)
    groups, tokens, slots = problem.groups, *problem.index.shape
    generator = torch.Generator().manual_seed(0)

    def operand(is_tokens: bool, width: int) -> Tensor:
        rows = tokens if is_tokens else problem.num_rows
        values = torch.randn(width, rows, generator=generator).to(DEVICE).T  # its last axis is not dense
        return values if is_tokens else over_rows(values, problem.index.numel())

    left, right = operand(left_is_tokens, 40), operand(right_is_tokens, 72)
    expected = torch.zeros(EXPERTS, 40, 72, dtype=torch.float64, device=DEVICE)
    slot_of_row, offsets = groups.slot_of_row.tolist(), groups.offsets.tolist()
    for expert in range(EXPERTS):
        for row in range(offsets[expert], offsets[expert + 1]):
            token = slot_of_row[row] // slots
            a, b = left[token if left_is_tokens else row], right[token if right_is_tokens else row]
            expected[expert] += torch.outer(a.double(), b.double())
    expected = expected.transpose(1, 2) if transposed else expected
    operands = {"left_is_tokens": left_is_tokens, "right_is_tokens": right_is_tokens, "transposed": transposed}
    for config in (SMALL, WIDE):
        found = weight_gradient(left, right, groups, **operands, out=torch.float32, config=config)
        assert found.is_contiguous() and relative_error(found, expected) < 1e-5
        for dtype in BOUND:
            existing = random_hidden(EXPERTS * 72, 40, dtype=dtype).reshape(EXPERTS, 72, 40)
            existing = existing if transposed else existing.transpose(1, 2)  # strides of their own
            total = expected + existing.double()
            found = weight_gradient(
                left, right, groups, **operands, out=dtype, accumulate_into=existing, config=config
            )
            assert found is existing and relative_error(found, total) < BOUND[dtype]


def test_finite_differences():
    """Directional derivatives of the loop without its autograd, for each input."""
    problem = Problem(layout="gpt_oss", activation="gelu")
    found, weights = problem.kernels(), in_float64(problem.weights)
    factors = routing_weights(problem.index, EXPERTS, poison_unused=False).double()
    inputs = {"hidden": problem.hidden.double(), "factors": factors}
    inputs |= {name: getattr(weights, name) for name in ("up", "down", "up_bias", "down_bias")}

    def loss(changed: dict[str, Tensor]) -> float:
        experts = replace(weights, **{name: changed[name] for name in ("up", "down", "up_bias", "down_bias")})
        out = experts_reference(changed["hidden"], experts, problem.index, changed["factors"])
        return (out * problem.grad_out.double()).sum().item()

    step = 1e-5
    for number, (name, value) in enumerate(inputs.items()):
        generator = torch.Generator().manual_seed(number)
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        ahead, behind = (loss(inputs | {name: value + sign * step * direction}) for sign in (1, -1))
        slope = (found[name].double() * direction).sum().item()
        scale = found[name].double().norm().item() * direction.norm().item()
        assert abs((ahead - behind) / (2 * step) - slope) < 1e-5 * scale, name


def test_wider_gradients_are_rounded_to_the_experts():
    """Gradients in float32 for float16 experts, and gradients that are no dense matrix."""
    problem = Problem(dtype=torch.float16, reference=False)
    expected = problem.kernels()
    problem.grad_out, problem.hidden = problem.grad_out.float(), problem.hidden.float()
    found = problem.kernels()
    assert all(torch.equal(found[name], expected[name]) for name in ("factors", "up", "down", "hidden"))
    problem.grad_out = problem.grad_out.T.contiguous().T
    assert torch.equal(problem.kernels()["factors"], expected["factors"])
    ones = torch.ones((), device=DEVICE)
    problem.grad_out = ones.expand(problem.hidden.shape)  # as `out.sum().backward()` has it
    expanded = problem.kernels()
    problem.grad_out = torch.ones_like(problem.hidden)
    assert torch.equal(expanded["down"], problem.kernels()["down"])


# Bit for bit --------------------------------------------------------------------------------------------------------


def same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def test_two_runs_agree():
    problem = Problem("ragged", layout="bias", reference=False)
    first, second = problem.kernels(), problem.kernels()
    assert all(same_bits(first[name], second[name]) for name in first)


def test_experts_without_rows():
    problem = Problem("empty_experts", layout="bias", reference=False)
    used = set(problem.index.flatten().tolist())
    found = problem.kernels()
    for expert in set(range(6)) - used:
        for name in ("up", "down", "up_bias", "down_bias"):
            assert same_bits(found[name][expert], torch.zeros_like(found[name][expert]))
    existing = torch.full((6, HIDDEN, 32), math.nan, device=DEVICE)
    existing[0] = -0.0
    before = existing.clone()
    weight_gradient(
        problem.grad_out,
        found["weighted"],
        problem.groups,
        left_is_tokens=True,
        right_is_tokens=False,
        out=torch.float32,
        accumulate_into=existing,
        config=SMALL,
    )
    assert all(same_bits(existing[expert], before[expert]) for expert in set(range(6)) - used)


def test_unused_slots_change_nothing():
    """More slots that nobody uses, with NaN in their weights."""
    problem = Problem("plain", layout="bias", reference=False)
    expected = problem.kernels()
    tokens, slots = problem.index.shape
    nobody = torch.tensor([EXPERTS, 2**31 - 1], dtype=torch.int32, device=DEVICE).repeat(tokens)[:tokens, None]
    problem.index = torch.cat([nobody, problem.index, nobody], dim=1)
    problem.factors = torch.cat([poisoned(tokens, 1), problem.factors, poisoned(tokens, 1)], dim=1)
    problem.groups = group_slots(problem.index, EXPERTS)
    problem.pre = over_rows(problem.pre, problem.index.numel())
    found = problem.kernels()
    for name in expected:
        if name == "factors":
            assert same_bits(found[name][:, 1:-1], expected[name])
            assert not found[name][:, [0, -1]].any()
        elif name in ("grad_pre", "weighted", "rows"):
            assert same_bits(found[name][: problem.num_rows], expected[name])
        else:
            assert same_bits(found[name], expected[name]), name


@pytest.mark.parametrize("where", ["grad_out", "pre", "factors", "hidden"])
def test_nan_stays_in_its_token(where):
    problem = Problem("plain", layout="bias", activation="gpt_oss", reference=False)
    expected = problem.kernels()
    token = 0  # which is also what a tile computes in place of rows that do not exist
    rows = problem.groups.row_of_slot.reshape(problem.index.shape)[token].long()
    chosen = problem.index[token].tolist()
    if where == "pre":
        problem.pre[rows, 0] = math.nan  # in one gate, which is bounded: a minimum would hide it
    else:
        getattr(problem, where)[token] = math.nan
    found = problem.kernels(finite=False)
    touched = {  # by name: whether NaN reaches the token's own rows, weights, or experts
        "grad_out": {"grad_pre", "rows", "factors", "up", "down", "up_bias", "down_bias"},
        "pre": {"grad_pre", "rows", "factors", "weighted", "up", "down", "up_bias"},
        "factors": {"grad_pre", "rows", "weighted", "up", "down", "up_bias", "down_bias"},
        "hidden": {"up"},
    }[where]
    for name, value in found.items():
        if name == "hidden":
            continue  # the sum of "rows"
        is_row, is_weight = name in ("grad_pre", "weighted", "rows"), name == "factors"
        own = rows.tolist() if is_row else [token] if is_weight else chosen
        others = [number for number in range(len(value)) if number not in own]
        assert same_bits(value[others], expected[name][others]), name
        assert value[own].flatten(1).isnan().any(1).all() == (name in touched), name
        if name not in touched:
            assert same_bits(value[own], expected[name][own]), name


def test_rows_do_not_depend_on_the_batch():
    """Half of the tokens alone have the same gradients, for a fixed tile."""
    problem = Problem("ragged", layout="gpt_oss", activation="gpt_oss", reference=False)
    expected, half = problem.kernels(), 11
    rows = problem.groups.row_of_slot.reshape(problem.index.shape)[:half].flatten().long()
    problem.index, problem.factors = problem.index[:half], problem.factors[:half]
    problem.groups = group_slots(problem.index, problem.weights.num_experts)
    order = problem.groups.row_of_slot.long()
    pre = torch.empty_like(problem.pre[: len(rows)])
    pre[order] = problem.pre[rows]
    problem.pre, problem.num_rows = pre, len(rows)
    problem.grad_out, problem.hidden = problem.grad_out[:half], problem.hidden[:half]
    found = problem.kernels()
    for name in ("grad_pre", "weighted", "rows"):
        assert same_bits(found[name][order], expected[name][rows])
    assert same_bits(found["factors"], expected["factors"][:half])


# What is refused, and tiles by rule ---------------------------------------------------------------------------------


def test_refusals():
    problem = Problem(reference=False)
    weights, groups = problem.weights, problem.groups

    def back(
        grad_out: Tensor = problem.grad_out,
        weights: ExpertWeights = weights,
        pre: Tensor = problem.pre,
        factors: Tensor = problem.factors,
        groups: SlotGroups = groups,
    ) -> None:
        down_backward(grad_out, weights, pre, factors, groups, config=SMALL)

    with pytest.raises(ValueError, match="down_backward_plain"):
        back(weights=replace(weights, activation=None))
    with pytest.raises(ValueError, match="norm"):
        back(weights=replace(weights, post_norm=torch.nn.LayerNorm(HIDDEN)))
    with pytest.raises(ValueError, match="experts"):
        back(groups=group_slots(problem.index, EXPERTS + 1))
    with pytest.raises(ValueError, match=r"`grad_out` must be \(24, 48\), got \(23, 48\)"):
        back(grad_out=problem.grad_out[:-1])
    with pytest.raises(ValueError, match=r"`pre` must be \(72, 64\), got \(72, 32\)"):
        back(pre=problem.pre[:, :32])
    with pytest.raises(ValueError, match="`routing_weights`"):
        back(factors=problem.factors.T)
    with pytest.raises(ValueError, match=r"the input must be \(rows, 64\)"):
        input_gradient(problem.pre[:, 1:], weights, groups, config=SMALL)
    with pytest.raises(ValueError, match="`row_weights`"):
        bias_gradient(problem.pre, groups, problem.factors[1:], is_tokens=False, out=torch.float32)
    both = {"left_is_tokens": True, "right_is_tokens": True, "out": torch.float32, "config": SMALL}
    with pytest.raises(ValueError, match="`right`"):
        weight_gradient(problem.grad_out, problem.pre, groups, **both)
    for existing in (poisoned(EXPERTS, HIDDEN, 8), poisoned(EXPERTS, HIDDEN, HIDDEN, dtype=torch.float16)):
        with pytest.raises(ValueError, match="`accumulate_into`"):
            weight_gradient(problem.grad_out, problem.hidden, groups, **both, accumulate_into=existing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40, 512])
def test_tiles_by_rule(rows, dtype):
    for narrow, widest in ((False, 256), (True, 128)):
        config = down_backward_config(rows, 768, 2048, dtype, narrow=narrow)
        assert not config.persistent and config.BLOCK_M <= 128 and config.BLOCK_N <= widest
    fixed = [down_backward_config(count, 768, 2048, dtype, batch_invariant=True) for count in (1, rows)]
    assert fixed[0] == fixed[1]
    for gathers_left in (False, True):
        wide = weight_gradient_config(rows, 2048, 768, dtype, gathers_left=gathers_left)
        assert wide.BLOCK_K <= 64
        if dtype == torch.bfloat16:
            assert (wide.BLOCK_M, wide.BLOCK_N) == ((128, 256) if gathers_left else (256, 128))
    small = weight_gradient_config(rows, 24, 8, dtype, gathers_left=True)
    assert (small.BLOCK_M, small.BLOCK_N) == (32, 16)
