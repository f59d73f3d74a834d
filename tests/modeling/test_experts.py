"""Experts functions and unused slots, against one expert call per token and slot in float64."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_config, tiny_inputs, tiny_model
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN

from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension
from hf_moe_ext.modeling.modeling_moe_ext import extended_class, extended_config_class
from hf_moe_ext.modeling.moe_experts import (
    MoeExtBlock,
    MoeExtExperts,
    MoeExtGate,
    RoutedExperts,
    clamp_unused,
    dispatch,
)
from hf_moe_ext.modeling.moe_structure import created_blocks
from hf_moe_ext.modeling.router_top_p import TopPRouterConfig
from hf_moe_ext.patching import extend


IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "moe_ext")
FAMILIES = ("mixtral", "gpt_oss", "nemotron_h")  # gated; biased, transposed and interleaved; not gated
TOKENS, SLOTS, HIDDEN = 11, 3, 12


@functools.cache
def _extended(name: str):
    return extend(tiny_model(name), MoeExtension(router=TopPRouterConfig()))


def stock_experts(name: str, implementation: str) -> nn.Module:
    """The experts of a live extended model, with our guard in front."""
    model = copy.deepcopy(_extended(name))
    model.set_experts_implementation(implementation)
    experts = next(module for module in model.modules() if isinstance(module, RoutedExperts))
    assert experts.config._experts_implementation == implementation
    return experts


def sizes(experts: nn.Module) -> tuple[int, int]:
    """(hidden size, number of experts)."""
    down = experts.down_proj
    return (down.shape[-1] if getattr(experts, "is_transposed", False) else down.shape[1]), down.shape[0]


def slow_experts(experts, parameters, hidden, index, weights):
    """One expert at a time for one token at a time. `parameters` are those of `experts`, in float64."""
    num_experts, transposed = len(parameters["down_proj"]), getattr(experts, "is_transposed", False)
    has_gate, has_bias = experts.has_gate, experts.has_bias
    rows = []
    for token, ids, factors in zip(hidden, index.tolist(), weights, strict=True):
        row = token * 0
        for number, factor in zip(ids, factors, strict=True):
            if number >= num_experts:
                continue
            name = "gate_up_proj" if has_gate else "up_proj"
            up, down = parameters[name][number], parameters["down_proj"][number]
            x = token @ up if transposed else up @ token
            if has_bias:
                x = x + parameters[f"{name}_bias"][number]
            x = experts._apply_gate(x[None])[0] if has_gate else experts.act_fn(x)
            x = x @ down if transposed else down @ x
            if has_bias:
                x = x + parameters["down_proj_bias"][number]
            row = row + factor * x
        rows.append(row)
    return torch.stack(rows)


def routing(num_experts: int, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.stack([torch.randperm(num_experts)[:SLOTS] for _ in range(TOKENS)])
    if case == "one_takes_all":
        index = torch.full((TOKENS, 1), 5)
    elif case == "all_unused":
        index = torch.full((TOKENS, SLOTS), num_experts)
    elif case == "every_expert":
        index = torch.stack([torch.randperm(num_experts) for _ in range(TOKENS)])
    elif case == "some_unused":
        index = index.masked_fill(torch.rand(TOKENS, SLOTS) < 0.5, num_experts)
        index[3] = num_experts  # a token without any expert
        index[4, 0] = num_experts + 2  # a zero-computation expert, which is not ours to compute
    weights = torch.rand(index.shape) + 0.1
    return index, weights


def gradients(function, experts, hidden, index, weights, dtype):
    """Output and the gradients of hidden states, weights and parameters."""
    hidden = hidden.detach().to(dtype, copy=True).requires_grad_()
    weights = weights.detach().to(dtype, copy=True).requires_grad_()
    parameters = {n: p.detach().to(dtype, copy=True).requires_grad_() for n, p in experts.named_parameters()}
    out = function(parameters, hidden, index, weights)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * upstream).sum().backward()
    return out.detach(), {"hidden": hidden, "weights": weights, **parameters}


def run_module(experts):
    def run(parameters, hidden, index, weights):
        return torch.func.functional_call(experts, parameters, (hidden, index, weights))

    return run


def compare(experts, index, weights, tolerance=1e-5):
    hidden_size, num_experts = sizes(experts)
    hidden = torch.randn(TOKENS, hidden_size)
    out, found = gradients(run_module(experts), experts, hidden, index, weights, torch.float32)
    slow = functools.partial(slow_experts, experts)
    expected, wanted = gradients(slow, experts, hidden, index, weights, torch.float64)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for name, tensor in wanted.items():
        want = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        have = torch.zeros_like(found[name]) if found[name].grad is None else found[name].grad
        torch.testing.assert_close(
            have.double(), want, rtol=10 * tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    return out, found


@pytest.mark.parametrize("case", ["all_used", "some_unused", "one_takes_all", "every_expert", "all_unused"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_experts_of_a_stock_model(name, implementation, case):
    experts = stock_experts(name, implementation)
    index, weights = routing(sizes(experts)[1], case)
    out, found = compare(experts, index, weights)
    unused = index >= sizes(experts)[1]
    if unused.any():
        assert (found["weights"].grad is None and unused.all()) or (found["weights"].grad[unused] == 0).all()
        assert (out[unused.all(-1)] == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_garbage_in_unused_slots_is_never_read(name):
    experts = stock_experts(name, "moe_ext")
    index, weights = routing(sizes(experts)[1], "some_unused")
    unused = index >= sizes(experts)[1]
    hidden = torch.randn(TOKENS, sizes(experts)[0])
    clean = experts(hidden, index, weights.masked_fill(unused, 0))
    assert torch.equal(experts(hidden, index, weights.masked_fill(unused, float("nan"))), clean)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_garbage_weights_of_unused_slots_are_replaced(implementation):
    """The guard masks by the id, so stock functions are safe from NaN, too."""
    experts = stock_experts("mixtral", implementation)
    index, weights = routing(8, "some_unused")
    weights = weights.masked_fill(index >= 8, float("nan")).requires_grad_()
    hidden = torch.randn(TOKENS, 32, requires_grad=True)
    out = experts(hidden, index, weights)
    out.sum().backward()
    assert out.isfinite().all() and hidden.grad.isfinite().all() and weights.grad.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "moe_ext"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_tokens(name, implementation):
    experts = stock_experts(name, implementation)
    hidden = torch.randn(0, sizes(experts)[0], requires_grad=True)
    out = experts(hidden, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert out.shape == hidden.shape
    if implementation != "eager":  # the stock loop returns zeros outside the graph
        out.sum().backward()
        assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16(name):
    """Within the rounding of bfloat16 (8 bits) of the float32 result; float32 weights keep the sum exact."""
    experts = stock_experts(name, "moe_ext")
    index, weights = routing(sizes(experts)[1], "some_unused")
    hidden = torch.randn(TOKENS, sizes(experts)[0])
    expected = experts(hidden, index, weights)
    low = experts.to(torch.bfloat16)(hidden.to(torch.bfloat16), index, weights)
    assert low.dtype == torch.bfloat16
    assert (low.float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_one_slot_where_stock_experts_take_two_or_more():
    """Those of longcat_flash take the axis of a single slot for an expert's."""
    two = extend(tiny_model("longcat_flash"), MoeExtension(router=TopPRouterConfig(threshold=1e-9, max_slots=2)))
    one = extend(tiny_model("longcat_flash"), MoeExtension(router=TopPRouterConfig(threshold=1e-9, max_slots=1)))
    inputs = tiny_inputs("longcat_flash")
    with torch.no_grad():
        torch.testing.assert_close(one(**inputs).logits, two(**inputs).logits)


def test_clamp_unused():
    index, weights = torch.tensor([[0, 3, 4], [7, 2, 1]]), torch.ones(2, 3, requires_grad=True)
    clamped, masked = clamp_unused(index, weights, 4)
    assert clamped.tolist() == [[0, 3, 3], [3, 2, 1]] and masked.tolist() == [[1, 1, 0], [0, 1, 1]]
    masked.sum().backward()
    assert weights.grad.tolist() == [[1, 1, 0], [0, 1, 1]]


# --- dispatch ---


def test_dispatch_calls_each_used_expert_once_with_its_tokens():
    calls = {}

    def expert(number, rows):
        assert number not in calls
        calls[number] = rows[:, 0].tolist()
        return rows * (number + 1)

    hidden = torch.arange(4.0)[:, None]
    index = torch.tensor([[2, 5], [0, 2], [5, 5], [2, 9]])
    weights = torch.tensor([[1.0, 9.0], [0.5, 2.0], [9.0, 9.0], [1.0, 9.0]])
    out = dispatch(hidden, index, weights, 5, expert)
    assert calls == {0: [1.0], 2: [0.0, 1.0, 3.0]}
    assert out[:, 0].tolist() == [0.0, 0.5 + 6.0, 0.0, 9.0]


def test_dispatch_weighs_the_input_on_request():
    hidden, index, weights = torch.ones(1, 1), torch.tensor([[0]]), torch.tensor([[3.0]])
    square = lambda number, rows: rows.square()  # noqa: E731
    assert dispatch(hidden, index, weights, 1, square).item() == 3.0
    assert dispatch(hidden, index, weights, 1, square, weigh_input=True).item() == 9.0


def test_dispatch_same_expert_in_two_slots_counts_twice():
    hidden, index, weights = torch.ones(1, 2), torch.tensor([[1, 1]]), torch.tensor([[0.25, 0.5]])
    assert dispatch(hidden, index, weights, 2, lambda n, rows: rows).tolist() == [[0.75, 0.75]]


def test_dispatch_without_work_stays_in_the_graph():
    hidden = torch.randn(3, 2, requires_grad=True)
    out = dispatch(hidden, torch.full((3, 2), 4), torch.ones(3, 2), 4, lambda n, rows: 1 / 0)
    out.sum().backward()
    assert (out == 0).all() and (hidden.grad == 0).all()


def test_dispatch_of_broken_tokens_without_experts_is_zero():
    """Zero means zero: a token whose state overflowed elsewhere gets nothing from nobody."""
    hidden = torch.tensor([[float("inf"), float("nan")]])
    assert (dispatch(hidden, torch.tensor([[4]]), torch.ones(1, 1), 4, lambda n, rows: rows) == 0).all()


def test_dispatch_sums_in_the_precision_of_the_weights():
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    index, weights = torch.arange(300)[None], torch.ones(1, 300)
    assert dispatch(hidden, index, weights, 300, lambda n, rows: rows).item() == 300


# --- experts made for dense hosts ---


FORMS = {
    "gated": {"has_gate": True},
    "gated_bias": {"has_gate": True, "has_bias": True},
    "plain": {"has_gate": False},
    "plain_bias": {"has_gate": False, "has_bias": True},
}


def made_experts(implementation="moe_ext", **form) -> MoeExtExperts:
    config = PreTrainedConfig()
    config._experts_implementation = implementation
    experts = MoeExtExperts(config, 6, HIDDEN, 16, activation=ACT2FN["gelu"], **form)
    experts.init_weights(0.3)
    for parameter in experts.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    return experts


@pytest.mark.parametrize("case", ["some_unused", "every_expert"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_made_experts(form, implementation, case):
    experts = made_experts(implementation, **form)
    index, weights = routing(6, case)
    if implementation != "moe_ext":  # the guard stands in front of them in a model
        index, weights = clamp_unused(index, weights, 6)
    compare(experts, index, weights)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_initialisation_of_made_experts(form):
    experts = MoeExtExperts(PreTrainedConfig(), 6, 50, 60, activation=nn.ReLU(), **form)
    for parameter in experts.parameters():
        parameter.data.fill_(float("nan"))
    experts.init_weights(0.02)
    for name, parameter in experts.named_parameters():
        if name.endswith("_bias"):
            assert (parameter == 0).all()
        else:
            assert abs(parameter.std() - 0.02) < 1e-3 and abs(parameter.mean()) < 1e-3


@pytest.mark.parametrize("has_gate", [True, False], ids=["gated", "plain"])
def test_hidden_dropout(has_gate):
    """Between activation and down projection: in training the output differs, on average it does not."""
    experts = made_experts(has_gate=has_gate, dropout=nn.Dropout(0.5))
    hidden, index, weights = torch.randn(1, HIDDEN), torch.tensor([[2]]), torch.ones(1, 1)
    experts.eval()
    expected = experts(hidden, index, weights)
    experts.train()
    rows = experts(hidden.expand(4000, -1), index.expand(4000, -1), weights.expand(4000, -1))
    assert rows.std(0).min() > 0.01
    error = (rows.mean(0) - expected[0]).abs() / (rows.std(0) / 4000**0.5)
    assert error.max() < 5  # standard errors


def test_gate_of_made_blocks():
    """Softmax, top-k, renormalise."""
    gate = MoeExtGate(6, 2, HIDDEN)
    gate.init_weights(1.0)
    hidden = torch.randn(TOKENS, HIDDEN)
    logits, weights, index = gate(hidden)
    probs = F.softmax(hidden.double() @ gate.weight.double().T, -1)
    for t in range(TOKENS):
        best = sorted(range(6), key=lambda i: -probs[t, i])[:2]  # noqa: B023
        assert index[t].tolist() == best
        torch.testing.assert_close(weights[t].double(), probs[t, best] / probs[t, best].sum(), rtol=1e-5, atol=1e-6)


def test_block_scale_and_dropout():
    block = MoeExtBlock(MoeExtGate(6, 2, HIDDEN), made_experts(), output_scale=3.0, dropout=nn.Dropout(0.5)).eval()
    block.gate.init_weights(1.0)
    hidden = torch.randn(2, 4, HIDDEN)
    _, weights, index = block.gate(hidden.reshape(-1, HIDDEN))
    plain = block.experts(hidden.reshape(-1, HIDDEN), index, weights).view_as(hidden)
    torch.testing.assert_close(block(hidden), 3 * plain)
    zeros = (block.train()(hidden) == 0).float().mean()
    assert 0.25 < zeros < 0.75


HOSTS = {"llama": {}, "gpt2": {"resid_pdrop": 0.3}, "opt": {}, "phi3": {}, "vit": {}, "t5": {"dropout_rate": 0.3}}


@pytest.mark.parametrize("router", [None, {"type": "top_p", "threshold": 0.4}], ids=["no_router", "top_p"])
@pytest.mark.parametrize("name", HOSTS)
def test_experts_in_a_dense_host(name, router):
    """Each created block computes what the reference does, in each implementation; every expert can learn."""
    stock = tiny_model(name, **HOSTS[name])
    config = stock.config
    config.__class__ = extended_config_class(type(config))
    config.moe_ext = {"experts": {"num_experts": 4, "num_experts_per_tok": 4}}
    if router:
        config.moe_ext["router"] = router
    model = extended_class(type(stock))(config).eval()
    blocks = created_blocks(model)
    assert blocks and all(parameter.isfinite().all() for parameter in model.parameters())
    inputs = tiny_inputs(name)
    with torch.no_grad():
        expected = model(**inputs)[0]
        for implementation in IMPLEMENTATIONS:
            model.set_experts_implementation(implementation)
            torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    hidden_size = blocks[0].gate.weight.shape[1]
    hidden = torch.randn(3, 5, hidden_size)
    experts = blocks[0].experts
    outputs = blocks[0].gate(hidden.reshape(-1, hidden_size))
    double = copy.deepcopy(experts).double()
    slow = slow_experts(
        double, dict(double.named_parameters()), hidden.reshape(-1, hidden_size).double(), outputs[2], outputs[1]
    )
    torch.testing.assert_close(blocks[0](hidden).double().view_as(slow), slow, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.Identity) and m.training for m in model.modules())


@pytest.mark.parametrize("router", [None, "top_k", "top_p"])
def test_a_gate_of_our_making_is_initialised(router, poison_memory):
    """Built from a config alone, with a router in front of it or without."""
    config = tiny_config("llama")
    config.__class__ = extended_config_class(type(config))
    config.moe_ext = {"experts": {"num_experts": 4}} | ({"router": router} if router else {})
    for block in created_blocks(extended_class(LlamaForCausalLM)(config)):
        assert block.gate.weight.isfinite().all() and 0 < block.gate.weight.std() < 0.5
