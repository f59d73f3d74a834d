"""The router kernels against loops in float64, and what has to hold exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_ext.kernels.route_rule import RouteConfig, RouteRule, default_route_config
from tests.kernels.references import DEVICE, relative_error


pytest.importorskip("triton")

from hf_moe_ext.kernels import triton_router  # noqa: E402
from hf_moe_ext.kernels.triton_router import route  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN, in the interpreter
BOUND = 1e-5


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    """Every `torch.empty` is filled: with NaN, or with an id that no test expects."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.zeros(1).new_empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def random_logits(tokens: int, columns: int, *, scale: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(tokens, columns, generator=generator)).to(DEVICE)


def random_bias(columns: int, seed: int = 1) -> Tensor:
    return (0.3 * torch.randn(columns, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


# Reference ----------------------------------------------------------------------------------------------------------


def route_row(x: Tensor, k: int, rule: RouteRule, bias: list[float] | None, count: int | None) -> tuple[list, list]:
    """One row in float64, by Python's own sort and sums: weights as tensors, so that autograd runs through them."""
    columns = len(x)
    if rule.score == "softmax":
        parts = [(value - x.detach().max()).exp() for value in x]
        scores = [part / sum(parts) for part in parts]
    elif rule.score == "sigmoid":
        scores = [1 / (1 + (-value).exp()) for value in x]
    else:
        scores = [value.exp().log1p().sqrt() for value in x]
    total = sum(scores)
    choice = [score.item() + (bias[column] if bias else 0.0) for column, score in enumerate(scores)]

    size = columns // rule.num_groups
    worth = []
    for group in range(rule.num_groups):
        best = sorted(choice[group * size : (group + 1) * size], reverse=True)
        worth.append(sum(best[:2]) if rule.group_score == "top2_sum" else best[0])
    groups = sorted(range(rule.num_groups), key=lambda group: -worth[group])[: rule.topk_groups]
    allowed = [column for column in range(columns) if column // size in groups]
    order = sorted(allowed, key=lambda column: -choice[column])[rule.first_rank - 1 :][:k]

    nobody = columns if rule.num_choices is None else rule.num_choices
    index, before = [], 0.0
    for slot in range(k):
        column = order[slot] if slot < len(order) else None
        share = 0.0 if column is None else (scores[column] / total).item()
        kept = {
            "all": True,
            "top_p": slot == 0 or slot < rule.min_kept or before <= rule.threshold,
            "threshold": slot == 0 or share > rule.threshold,
            "count": count is not None and slot < count,
        }[rule.keep]
        before += share
        index.append(column if column is not None and kept and column < nobody else nobody)

    counted = [column for column in index if column < nobody and not rule.null_start <= column < rule.null_end]
    zero = x.sum() * 0
    divisor = {"chosen": sum((scores[column] for column in counted), zero), "all": total, "none": 1.0}[rule.divide]
    return [rule.scale * scores[c] / divisor if c in counted else zero for c in index], index


def route_reference(
    logits: Tensor, k: int, rule: RouteRule, bias: Tensor | None = None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    rows = [
        route_row(row, k, rule, None if bias is None else bias.double().tolist(), None if counts is None else count)
        for row, count in zip(logits, range(len(logits)) if counts is None else counts.tolist(), strict=True)
    ]
    weights = torch.stack([torch.stack(weights) for weights, _ in rows])
    return weights, torch.tensor([index for _, index in rows], dtype=torch.int32, device=logits.device)


def check(
    logits: Tensor,
    k: int,
    rule: RouteRule,
    *,
    bias: Tensor | None = None,
    counts: Tensor | None = None,
    config: RouteConfig | None = None,
) -> Tensor:
    """Weights, ids and gradients of `route` against the reference; returns the ids."""
    logits = logits.detach().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    weights, index = route(logits, k, rule=rule, bias=bias, counts=counts, config=config)
    expected, expected_index = route_reference(exact, k, rule, bias, counts)
    assert (weights.dtype, index.dtype) == (torch.float32, torch.int32)
    assert torch.equal(index, expected_index)
    assert relative_error(weights, expected) < BOUND
    assert (weights[index == (logits.shape[1] if rule.num_choices is None else rule.num_choices)] == 0).all()
    grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    (found,) = torch.autograd.grad(weights, logits, grad)
    (wanted,) = torch.autograd.grad(expected, exact, grad.double())
    assert found.dtype == logits.dtype
    assert relative_error(found, wanted) < BOUND
    return index


RULES: dict[str, tuple[RouteRule, dict[str, Any]]] = {
    "softmax": (RouteRule(), {}),
    "softmax_of_all": (RouteRule(divide="none", scale=2.5), {}),
    "sigmoid": (RouteRule("sigmoid", "none"), {}),
    "sigmoid_divided": (RouteRule("sigmoid", "chosen", 1.5), {"bias": True}),
    "sigmoid_shares": (RouteRule("sigmoid", "all"), {}),
    "sqrt_softplus": (RouteRule("sqrt_softplus", "chosen", 1.5), {"bias": True}),
    "sqrt_softplus_plain": (RouteRule("sqrt_softplus", "none"), {}),
    "sqrt_softplus_shares": (RouteRule("sqrt_softplus", "all"), {}),
    "softmax_with_bias": (RouteRule(divide="none"), {"bias": True}),
    "groups": (RouteRule(num_groups=5, topk_groups=3, group_score="max", divide="none"), {}),
    "groups_of_two_best": (
        RouteRule("sigmoid", scale=2.5, num_groups=5, topk_groups=3, group_score="top2_sum"),
        {"bias": True},
    ),
    "top_p": (RouteRule(divide="none", keep="top_p", threshold=0.4), {}),
    "top_p_divided": (RouteRule(keep="top_p", threshold=0.6, min_kept=2), {}),
    "top_p_sigmoid": (RouteRule("sigmoid", "all", keep="top_p", threshold=0.3), {"bias": True}),
    "threshold": (RouteRule(keep="threshold", threshold=0.1), {}),
    "threshold_sigmoid": (RouteRule("sigmoid", keep="threshold", threshold=0.03), {}),
    "count": (RouteRule(keep="count"), {"counts": True}),
    "count_softmax_of_all": (RouteRule(divide="none", keep="count"), {"counts": True}),
    "second_best": (RouteRule(first_rank=2), {}),
    "nobody": (RouteRule(divide="none", num_choices=4), {}),
    "null": (RouteRule(null_start=2, null_end=5), {}),
    "null_sigmoid": (RouteRule("sigmoid", null_start=2, null_end=5), {}),
}


def inputs_for(name: str, columns: int, k: int) -> tuple[Tensor, RouteRule, dict[str, Any]]:
    tokens = 9
    (rule, needs), logits = RULES[name], random_logits(tokens, columns)
    if rule.num_groups > 1 and columns % rule.num_groups:
        rule = replace(rule, num_groups=1, topk_groups=1)
    extras: dict[str, Any] = {}
    if "bias" in needs:
        extras["bias"] = random_bias(columns)
    if "counts" in needs:
        extras["counts"] = (torch.arange(tokens, device=DEVICE) % (k + 1)).int()
    return logits, rule, extras


@pytest.mark.parametrize(("columns", "k"), [(5, 3), (60, 4)])
@pytest.mark.parametrize("name", RULES)
def test_rules(name, columns, k):
    logits, rule, extras = inputs_for(name, columns, k)
    check(logits, k, rule, **extras)


@pytest.mark.parametrize(("columns", "k"), [(60, 20), (257, 8)])
@pytest.mark.parametrize(
    "name", ["softmax", "sigmoid_divided", "groups_of_two_best", "top_p", "count", "second_best", "null"]
)
def test_many_columns_and_many_slots(name, columns, k):
    logits, rule, extras = inputs_for(name, columns, k)
    check(logits[:4], k, rule, **{key: value if key == "bias" else value[:4] for key, value in extras.items()})


def test_all_columns_chosen():
    for rule in (RouteRule(), RouteRule(divide="none", keep="top_p", threshold=0.7), RouteRule("sigmoid", "all")):
        check(random_logits(3, 60), 60, rule)
        check(random_logits(3, 5), 5, rule)


def test_one_column():
    check(random_logits(3, 1), 1, RouteRule())


@pytest.mark.parametrize("config", [RouteConfig(1, 1), RouteConfig(2, 4), RouteConfig(16, 4)])
def test_rows_of_a_program(config):
    """9 rows, so the last program is not full."""
    check(random_logits(9, 5), 2, RouteRule(divide="none"), config=config)


def test_groups_leave_fewer_columns_than_slots():
    rule = RouteRule("sigmoid", num_groups=4, topk_groups=1)
    for columns, k in ((8, 3), (60, 16), (60, 18)):  # by passes and sorted
        index = check(random_logits(5, columns), k, rule)
        assert ((index < columns).sum(dim=1) == columns // 4).all()


def test_at_the_threshold():
    """Four columns of probability 1/4, which floats know exactly. `top_p` keeps the one after a sum that is equal."""
    even = torch.zeros(1, 4, device=DEVICE)
    for threshold, kept in ((0.25, 2), (0.5, 3), (0.5 - 1e-6, 2), (0.0, 1)):
        index = route(even, 4, rule=RouteRule(keep="top_p", threshold=threshold))[1]
        assert index.tolist() == [[*range(kept), *[4] * (4 - kept)]]
    for threshold, kept in ((0.25, 1), (0.25 - 1e-6, 4)):
        index = route(even, 4, rule=RouteRule(keep="threshold", threshold=threshold))[1]
        assert index.tolist() == [[*range(kept), *[4] * (4 - kept)]]


def test_threshold_of_one_keeps_all():
    """Also where the sum of the first probabilities is rounded to more than 1, as here in some rows."""
    logits = random_logits(256, 16, scale=5.0)
    shares = logits.softmax(dim=-1).sort(dim=-1, descending=True).values
    assert (shares.cumsum(dim=-1)[:, :-1] > 1).any()
    assert (route(logits, 16, rule=RouteRule(divide="none", keep="top_p", threshold=1.0))[1] < 16).all()


def test_tiny_scores_keep_their_digits():
    """Softplus of a very negative logit is its exponential, which float32 cannot add to 1."""
    logits = torch.tensor([[-10.0, -15.0, -20.0, -40.0, -79.0, -81.0, -95.0, -150.0]], device=DEVICE).requires_grad_()
    weights, _ = route(logits, 8, rule=RouteRule("sqrt_softplus", "none"))
    exact = logits.detach().double().requires_grad_()
    expected = exact.exp().log1p().sqrt()
    torch.testing.assert_close(weights.double(), expected, rtol=BOUND, atol=0)
    (grad,), (wanted,) = torch.autograd.grad(weights.sum(), logits), torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(grad.double(), wanted, rtol=BOUND, atol=0)


def test_a_sure_null_column_does_not_hide_the_others():
    logits = torch.tensor([[300.0, 1.0, 0.0]], device=DEVICE)
    weights, index = route(logits, 3, rule=RouteRule(null_end=1))
    assert index.tolist() == [[0, 1, 2]]
    expected = torch.tensor([[0.0, *torch.tensor([1.0, 0.0]).softmax(0).tolist()]], device=DEVICE)
    torch.testing.assert_close(weights, expected, rtol=BOUND, atol=0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_far_logits(score):
    """Where a score underflows or saturates in float32, weights and gradients stay finite, and the order is kept."""
    logits = torch.tensor([[-300.0, -200.0, -100.0], [200.0, 300.0, 100.0], [-90.0, -85.0, 40.0]], device=DEVICE)
    for divide in ("chosen", "all", "none"):
        x = logits.clone().requires_grad_()
        weights, index = route(x, 2, rule=RouteRule(score, divide))
        assert index.tolist() == [[2, 1], [1, 0], [2, 1]]
        (grad,) = torch.autograd.grad(weights[:, 0].sum(), x)
        assert weights.isfinite().all() and grad.isfinite().all()
    if score != "sigmoid":
        x = random_logits(6, 5, scale=20.0)
        check(x.clamp(-60, 60), 2, RouteRule(score))


@pytest.mark.parametrize("used", ["both", "lse"])
@pytest.mark.parametrize("rule", [RouteRule(), RouteRule(divide="none"), RouteRule("sigmoid")])
def test_log_sum_exp(rule, used):
    logits = random_logits(7, 60).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    weights, index, lse = route(logits, 4, rule=rule, return_lse=True)
    expected, _ = route_reference(exact, 4, rule)
    expected_lse = exact.logsumexp(dim=-1)
    assert relative_error(lse, expected_lse) < BOUND
    loss, wanted = (lse**2).sum(), (expected_lse**2).sum()
    if used == "both":
        loss, wanted = loss + weights[:, 1].sum(), wanted + expected[:, 1].sum()
    (grad,), (reference,) = torch.autograd.grad(loss, logits), torch.autograd.grad(wanted, exact)
    assert relative_error(grad, reference) < BOUND


def test_layouts_and_dtypes():
    logits = random_logits(6, 60)
    weights, index = route(logits, 4)
    strided = torch.full((60, 12), math.nan, device=DEVICE)[:, ::2].T
    strided.copy_(logits)
    for found, expected in zip(route(strided, 4), (weights, index), strict=True):
        assert torch.equal(found, expected)
    grads = []
    for x in (logits.clone().requires_grad_(), strided.detach().requires_grad_()):
        grads.append(torch.autograd.grad(route(x, 4, rule=RouteRule(divide="none"))[0][:, 0].sum(), x)[0])
    assert relative_error(*grads) < 1e-6  # other loads, so other fused additions
    bias = torch.full((120,), math.nan, device=DEVICE)[::2]
    bias.copy_(random_bias(60))
    with_bias = route(logits, 4, bias=bias.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(route(logits, 4, bias=bias), with_bias, strict=True))
    for dtype in (torch.bfloat16, torch.float16):
        low = logits.to(dtype)
        for found, expected in zip(route(low, 4), route(low.float(), 4), strict=True):
            assert torch.equal(found, expected)
    x = logits.half().requires_grad_()
    (grad,) = torch.autograd.grad(route(x, 4)[0][:, 0].sum(), x)
    y = x.detach().float().requires_grad_()
    (wanted,) = torch.autograd.grad(route(y, 4)[0][:, 0].sum(), y)
    assert grad.dtype == torch.float16 and torch.equal(grad, wanted.half())


def test_no_tokens():
    logits = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    weights, index, lse = route(logits, 2, return_lse=True)
    assert weights.shape == index.shape == (0, 2) and lse.shape == (0,)
    weights.sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 5)


# Exact properties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 18])  # by passes and sorted
def test_equal_values_go_to_the_lower_column(k):
    logits = torch.zeros(1, 40, device=DEVICE)
    logits[0, 1::2] = -0.0  # equal to 0
    assert route(logits, k)[1].tolist() == [list(range(k))]
    logits[0, [7, 31]] = 1.0
    assert route(logits, k)[1][0, :2].tolist() == [7, 31]
    even = torch.zeros(1, 40, device=DEVICE)  # groups are equal, too
    for group_score in ("max", "top2_sum"):
        rule = RouteRule(num_groups=4, topk_groups=2, group_score=group_score)
        assert route(even, k, rule=rule)[1].tolist() == [list(range(k))]


@pytest.mark.parametrize("name", RULES)
def test_a_row_does_not_depend_on_the_others(name):
    logits, rule, extras = inputs_for(name, 60, 4)
    weights, index = route(logits, 4, rule=rule, **extras)
    for row in (0, 4, 8):
        own = {key: value if key == "bias" else value[row : row + 1] for key, value in extras.items()}
        alone = route(logits[row : row + 1], 4, rule=rule, **own)
        assert torch.equal(alone[0][0], weights[row]) and torch.equal(alone[1][0], index[row])


@pytest.mark.parametrize("k", [3, 18])
@pytest.mark.parametrize("name", RULES)
def test_nan_stays_in_its_row(name, k):
    logits, rule, extras = inputs_for(name, 20, k)
    logits.requires_grad_()
    grad = torch.ones(9, k, device=DEVICE).cumsum(dim=1)
    weights, index = route(logits, k, rule=rule, **extras)
    (expected,) = torch.autograd.grad(weights, logits, grad)
    bad = logits.detach().clone()
    bad[2, 11], bad[5] = -torch.tensor(math.nan), math.nan  # with and without a sign
    bad.requires_grad_()
    found, found_index = route(bad, k, rule=rule, **extras)
    (found_grad,) = torch.autograd.grad(found, bad, grad)
    good = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(found[good], weights[good]) and torch.equal(found_index[good], index[good])
    assert torch.equal(found_grad[good], expected[good])
    last = 20 if rule.num_choices is None else rule.num_choices
    assert ((found_index >= 0) & (found_index <= last)).all()
    for row in found_index.tolist():  # no expert twice
        chosen = [column for column in row if column < last]
        assert len(chosen) == len(set(chosen))
    if rule == RouteRule():
        assert found[[2, 5]].isnan().all() and found_index[2, 0] == 11


@pytest.mark.parametrize("name", ["softmax", "sigmoid_divided", "groups_of_two_best"])
def test_sorting_chooses_as_the_passes_do(name, monkeypatch):
    logits, rule, extras = inputs_for(name, 20, 10)
    _, by_passes = route(logits, 10, rule=rule, **extras)
    monkeypatch.setattr(triton_router, "_PASSES", 0)
    _, by_sort = route(logits, 10, rule=rule, **extras)
    assert torch.equal(by_passes, by_sort)


# Operator -----------------------------------------------------------------------------------------------------------


def test_compiled_in_one_graph():
    rule, bias = RouteRule("sigmoid", scale=2.5, num_groups=5, topk_groups=3), random_bias(60)

    def losses(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, index, lse = route(2 * x, 4, rule=rule, bias=bias, return_lse=True)
        return weights * 3, index + 1, lse

    x = random_logits(7, 60).requires_grad_()
    found = torch.compile(losses, backend="aot_eager", fullgraph=True)(x)
    expected = losses(x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    grads = [torch.autograd.grad((out[0] ** 2).sum() + out[2].sum(), x)[0] for out in (found, expected)]
    assert torch.equal(*grads)


def test_operator_is_registered_as_it_behaves():
    x = random_logits(5, 8).requires_grad_()
    torch.library.opcheck(
        torch.ops.moe_ext.route.default,
        (x, 2, None, None, True, "softmax", "chosen", 1.0, 1, 1, "max", "all", 1.0, 1, 1, None, 0, 0, 4, 4),
    )


def test_default_config_does_not_know_the_number_of_rows():
    assert default_route_config(128) == RouteConfig(4, 4)
    assert default_route_config(8) == RouteConfig(64, 4)
    assert default_route_config(257) == RouteConfig(1, 1)


def test_refusals():
    logits = random_logits(3, 8)
    for bad, message in (
        ({"score": "tanh"}, "`score` must be one of"),
        ({"divide": "sum"}, "`divide` must be one of"),
        ({"keep": "most"}, "`keep` must be one of"),
        ({"num_groups": 2, "topk_groups": 3}, "`topk_groups` \\(3\\) exceeds"),
        ({"first_rank": 0}, "`first_rank` must be at least 1"),
        ({"first_rank": 2, "keep": "top_p"}, "does not go with"),
        ({"threshold": 1.5}, "`threshold` must be in"),
        ({"null_start": 3, "null_end": 1}, "are no range"),
    ):
        with pytest.raises(ValueError, match=message):
            RouteRule(**bad)
    with pytest.raises(ValueError, match="`rows` must be a power of 2, got 3"):
        RouteConfig(rows=3)
    for arguments, message in (
        ((logits.double(), 2, {}), r"got \(3, 8\) in torch.float64"),
        ((logits[0], 2, {}), r"`logits` must be \(T, C\)"),
        ((logits, 0, {}), r"`k` \(0\)"),
        ((logits, 9, {}), r"`k` \(9\)"),
        ((logits, 8, {"rule": RouteRule(first_rank=2)}), "from rank 2 on"),
        ((logits, 2, {"rule": RouteRule(num_groups=3)}), "must divide the 8 columns"),
        ((logits, 2, {"bias": logits[0, :3]}), r"`bias` must have the shape \(8,\)"),
        ((logits, 2, {"rule": RouteRule(keep="count")}), "`counts` goes with"),
        ((logits, 2, {"counts": logits[:, 0].int()}), "`counts` goes with"),
        ((logits, 2, {"rule": RouteRule(keep="count"), "counts": logits[0].int()}), "`counts` must have the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            route(arguments[0], arguments[1], **arguments[2])
