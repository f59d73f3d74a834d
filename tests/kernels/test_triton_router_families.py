"""The router kernels against the package's own routers and stock gates: the same logits give the same choice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_ext.kernels.route_rule import RouteRule
from hf_moe_ext.modeling.configuration_moe_ext import ZeroExpertsConfig
from hf_moe_ext.modeling.moe_router import GateRule, MoERouter, RouterSite
from hf_moe_ext.modeling.router_act_dts import ActDTSRouter, ActDTSRouterConfig
from hf_moe_ext.modeling.router_deepseek_moe import DeepSeekMoERouter, DeepSeekMoERouterConfig
from hf_moe_ext.modeling.router_sigmoid import SigmoidRouter, SigmoidRouterConfig
from hf_moe_ext.modeling.router_top_k import TopKRouter, TopKRouterConfig
from hf_moe_ext.modeling.router_top_p import TopPRouter, TopPRouterConfig
from tests.kernels.references import DEVICE, relative_error


pytest.importorskip("triton")

from hf_moe_ext.kernels.triton_router import route  # noqa: E402


BOUND = 1e-5


def random_logits(tokens: int, columns: int) -> Tensor:
    return 2 * torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def random_bias(columns: int) -> Tensor:
    return 0.3 * torch.randn(columns, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def own_router(kind: type[MoERouter], config: Any, gate: GateRule, columns: int, top_k: int, **site: Any) -> Any:
    """A router that takes its logits as input, without a gate below it."""
    router = kind()
    router.moe_config = config
    router.moe_site = RouterSite("0", 0, site.pop("num_experts", columns), top_k, 8, gate, **site)
    router.router_logits = lambda hidden, *args, **kwargs: hidden
    router.correction = random_bias(columns)
    router.register_parameter("some", torch.nn.Parameter(torch.zeros(1, device=DEVICE)))
    return router


OWN: dict[str, tuple[type[MoERouter], Any, GateRule, RouteRule]] = {
    "top_k": (TopKRouter, TopKRouterConfig(score="softmax"), GateRule(), RouteRule()),
    "top_k_not_divided": (
        TopKRouter,
        TopKRouterConfig(score="softmax", renormalize=False, scale=2.0),
        GateRule(),
        RouteRule(divide="none", scale=2.0),
    ),
    "top_k_of_logits": (
        TopKRouter,
        TopKRouterConfig(score_order="topk_score"),
        GateRule(renormalize=False),
        RouteRule(),
    ),
    "top_k_second_rank": (TopKRouter, TopKRouterConfig(first_rank=2), GateRule(), RouteRule(first_rank=2)),
    "top_k_sigmoid": (
        TopKRouter,
        TopKRouterConfig(score="sigmoid"),
        GateRule(bias="correction", scale=2.5),
        RouteRule("sigmoid", scale=2.5),
    ),
    "deepseek_v3": (
        DeepSeekMoERouter,
        DeepSeekMoERouterConfig(score="sigmoid"),
        GateRule("sigmoid", bias="correction", scale=2.5, groups=(5, 3, "top2_sum")),
        RouteRule("sigmoid", scale=2.5, num_groups=5, topk_groups=3, group_score="top2_sum"),
    ),
    "deepseek_v2": (
        DeepSeekMoERouter,
        DeepSeekMoERouterConfig(score="softmax"),
        GateRule(renormalize=False, scale=16.0, groups=(5, 3, "max")),
        RouteRule(divide="none", scale=16.0, num_groups=5, topk_groups=3),
    ),
    "sigmoid": (
        SigmoidRouter,
        SigmoidRouterConfig(num_experts_per_tok=None),
        GateRule("sigmoid", renormalize=False),
        RouteRule("sigmoid", "none"),
    ),
    "top_p": (
        TopPRouter,
        TopPRouterConfig(max_slots=4),
        GateRule(),
        RouteRule(divide="none", keep="top_p", threshold=0.4),
    ),
    "top_p_divided": (
        TopPRouter,
        TopPRouterConfig(threshold=0.6, max_slots=4, min_experts=2, renormalize=True),
        GateRule(),
        RouteRule(keep="top_p", threshold=0.6, min_kept=2),
    ),
    "top_p_sigmoid": (
        TopPRouter,
        TopPRouterConfig(threshold=0.06, max_slots=4, score="sigmoid"),
        GateRule(),
        RouteRule("sigmoid", "all", keep="top_p", threshold=0.06),
    ),
    "top_p_groups": (
        TopPRouter,
        TopPRouterConfig(threshold=0.3, max_slots=4, renormalize=None),
        GateRule("sigmoid", bias="correction", groups=(5, 2, "top2_sum")),
        RouteRule("sigmoid", num_groups=5, topk_groups=2, group_score="top2_sum", keep="top_p", threshold=0.3),
    ),
    "act_dts": (
        ActDTSRouter,
        ActDTSRouterConfig(
            activation="identity",
            gate_bias=False,
            temperature_mode="fixed",
            select="threshold",
            threshold=0.1,
            num_experts_per_tok=4,
        ),
        GateRule(),
        RouteRule(keep="threshold", threshold=0.1),
    ),
}


def check_own(router: Any, rule: RouteRule, columns: int, k: int) -> None:
    logits = random_logits(11, columns).requires_grad_()
    bias = router.correction if router.moe_site.rule.bias else None
    record = router.route(logits, None)
    weights, index = route(logits, k, rule=rule, bias=bias)
    assert torch.equal(index, record.index.int())
    assert relative_error(weights, record.weights) < BOUND
    grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    (found,) = torch.autograd.grad(weights, logits, grad)
    (expected,) = torch.autograd.grad(record.weights, logits, grad)
    assert relative_error(found, expected) < BOUND


@pytest.mark.parametrize("name", OWN)
def test_own_routers(name):
    kind, config, gate, rule = OWN[name]
    check_own(own_router(kind, config, gate, 60, 4), rule, 60, 4)


def test_own_zero_computation_experts():
    zero = ZeroExpertsConfig(zero=3, copy=2)
    for score in ("softmax", "sigmoid"):
        router = own_router(
            TopKRouter, TopKRouterConfig(score=score), GateRule(), 12, 4, num_experts=7, zero_experts=zero
        )
        check_own(router, RouteRule(score, null_start=7, null_end=10), 12, 4)


def test_own_skip_class():
    router = own_router(TopPRouter, TopPRouterConfig(max_slots=4), GateRule(), 5, 4, num_experts=4)
    check_own(router, RouteRule(divide="none", keep="top_p", threshold=0.4, num_choices=4), 5, 4)


def test_stock_gate_with_sqrt_softplus():
    stock = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = SimpleNamespace(
        num_experts_per_tok=6,
        num_local_experts=60,
        hidden_size=60,
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=1.5,
    )
    gate = stock.DeepseekV4TopKRouter(config).to(DEVICE)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(60))
        gate.e_score_correction_bias.copy_(random_bias(60))
    logits = random_logits(7, 60)
    _, expected, expected_index = gate(logits)
    weights, index = route(logits, 6, rule=RouteRule("sqrt_softplus", scale=1.5), bias=gate.e_score_correction_bias)
    dense = torch.zeros(7, 60, device=DEVICE)
    found = dense.scatter(1, index.long(), weights)  # its order of the slots is not said
    assert relative_error(found, dense.scatter(1, expected_index, expected.detach())) < BOUND
