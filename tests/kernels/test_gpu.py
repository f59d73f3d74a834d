"""What only a GPU can show: sizes of real models, whole models, graphs, and what 16 bits cost."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F


pytest.importorskip("triton")

from tiny_models import tiny_model  # noqa: E402

from hf_moe_ext.kernels import dispatch, operators, triton_experts  # noqa: E402
from hf_moe_ext.kernels import experts as implementation  # noqa: E402
from hf_moe_ext.kernels.expert_weights import Activation, ExpertWeights  # noqa: E402

from .references import relative_error  # noqa: E402


pytestmark = pytest.mark.gpu
run = functools.partial(implementation.run, kernels=triton_experts)


@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch):
    """Whatever the environment says."""
    monkeypatch.setenv("HF_MOE_EXT_TRITON", "1")
    dispatch.uses_triton.cache_clear()
    yield
    dispatch.uses_triton.cache_clear()


def layer(num_experts: int, hidden: int, width: int, *, dtype=torch.bfloat16, seed: int = 0) -> ExpertWeights:
    """Random experts in the stock layout, made on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def stack(rows: int, columns: int) -> torch.Tensor:
        out = torch.empty(num_experts, rows, columns, dtype=dtype, device="cuda")
        for matrix in out:
            matrix.copy_(torch.randn(rows, columns, generator=generator, device="cuda") * columns**-0.5)
        return out

    return ExpertWeights.from_layout(
        ("silu", 1.0, None, 0.0, True, False, True), stack(2 * width, hidden), stack(hidden, width), None, None
    )


def tokens_for(num: int, hidden: int, num_experts: int, top_k: int, *, dtype=torch.bfloat16, seed: int = 1):
    """Tokens with outlier channels, experts of each token (a tenth of the slots unused), weights."""
    generator = torch.Generator("cuda").manual_seed(seed)
    states = torch.randn(num, hidden, generator=generator, device="cuda")
    states[:, 3] *= 30
    index = torch.rand(num, num_experts, generator=generator, device="cuda").topk(top_k).indices
    weights = torch.rand(num, top_k, generator=generator, device="cuda")
    unused = torch.rand(num, top_k, generator=generator, device="cuda") < 0.1
    return states.to(dtype), index.masked_fill(unused, num_experts), weights.masked_fill(unused, 0)


def exactly(hidden, index, weights, up, down):
    """The layer by a loop over experts, in the dtype of its inputs, with gradients."""
    out = torch.zeros_like(hidden)
    for expert in range(len(up)):
        token, slot = torch.where(index == expert)
        gate, value = (hidden[token] @ up[expert].T).chunk(2, dim=-1)
        out = out.index_add(0, token, (F.silu(gate) * value) @ down[expert].T * weights[token, slot, None])
    return out


@pytest.mark.parametrize("num_tokens", [1, 7, 200, 3000])
@pytest.mark.parametrize("shape", [(32, 8, 2048, 768), (8, 2, 1024, 3584), (37, 4, 1536, 96)], ids=str)
def test_sizes_of_real_models(shape, num_tokens):
    """Forward and all gradients in bfloat16 against float64; the weights of unused slots are NaN."""
    num_experts, top_k, hidden, width = shape
    experts = layer(num_experts, hidden, width)
    states, index, weights = tokens_for(num_tokens, hidden, num_experts, top_k)
    upstream = torch.randn_like(states)
    exact = [t.detach().double().requires_grad_() for t in (states, weights, experts.up, experts.down)]
    expected = exactly(exact[0], index, exact[1], exact[2], exact[3])
    wanted = torch.autograd.grad(expected, exact, upstream.double())

    poisoned = weights.masked_fill(index == num_experts, float("nan"))
    with torch.no_grad():
        assert relative_error(run(states, index, poisoned, experts), expected) < 5e-3
    leaves = [t.detach().requires_grad_() for t in (states, poisoned, experts.up, experts.down)]
    mine = ExpertWeights.from_layout(experts.layout, leaves[2], leaves[3], None, None)
    out = run(leaves[0], index, leaves[1], mine)
    assert relative_error(out, expected) < 5e-3
    for name, found, want in zip(
        ("hidden", "weights", "up", "down"), torch.autograd.grad(out, leaves, upstream), wanted, strict=True
    ):
        assert relative_error(found, want) < 8e-3, name


def test_stacks_of_more_than_2_to_31_numbers():
    num_experts, hidden, width = 300, 4096, 1024
    experts = layer(num_experts, hidden, width)
    assert experts.up.numel() > 2**31
    states, _, _ = tokens_for(40, hidden, num_experts, 2)
    last = torch.tensor([[num_experts - 1, num_experts - 2]], device="cuda").expand(40, 2).contiguous()
    weights = torch.rand(40, 2, device="cuda")
    names = (experts.up, experts.down)
    expected = sum(
        ((F.silu(a) * b) @ names[1][e].double().T) * weights[:, slot, None].double()
        for slot, e in enumerate((num_experts - 1, num_experts - 2))
        for a, b in [(states.double() @ names[0][e].double().T).chunk(2, dim=-1)]
    )
    for few in (40, 3):
        with torch.no_grad():
            out = run(states[:few], last[:few], weights[:few], experts)
        assert relative_error(out, expected[:few]) < 5e-3


def test_two_runs_give_the_same_bits():
    experts = layer(16, 1024, 512)
    states, index, weights = tokens_for(2000, 1024, 16, 4)
    found = []
    for _ in range(2):
        leaves = [t.detach().requires_grad_() for t in (states, weights, experts.up, experts.down)]
        mine = ExpertWeights.from_layout(experts.layout, leaves[2], leaves[3], None, None)
        out = run(leaves[0], index, leaves[1], mine)
        found.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("num_tokens", [4, 500])
def test_a_graph_is_captured_and_replayed_with_other_tokens(num_tokens):
    experts = layer(16, 512, 256)
    states, index, weights = tokens_for(num_tokens, 512, 16, 4)
    with torch.no_grad():
        run(states, index, weights, experts)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(states, index, weights, experts)
        others = tokens_for(num_tokens, 512, 16, 4, seed=5)
        for place, other in zip((states, index, weights), others, strict=True):
            place.copy_(other)
        graph.replay()
        assert torch.equal(out, run(*others, experts))


def test_the_operator_in_a_compiled_graph():
    experts = layer(16, 512, 256)
    inputs = tokens_for(700, 512, 16, 4)
    upstream = torch.randn_like(inputs[0])

    def whole(states, index, weights, up, down):
        out = operators.run_tensors(2 * states, index, weights, (up, down, None, None), experts.layout)
        return out + states

    found = []
    for call in (whole, torch.compile(whole, fullgraph=True)):
        states, index, weights = inputs
        leaves = [t.detach().requires_grad_() for t in (states, weights, experts.up, experts.down)]
        out = call(leaves[0], index, leaves[1], leaves[2], leaves[3])
        found.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for one, two in zip(*found, strict=True):
        assert relative_error(two, one) < 5e-3  # sums beside it are rounded once less in a graph


# Models -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return tiny_model("qwen3_moe").cuda()


def logits_and_gradients(model, implementation_name, ids, call=None):
    model = copy.deepcopy(model)
    model.set_experts_implementation(implementation_name)
    call = model if call is None else call(model)
    out = call(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance):
    assert relative_error(found[0], expected[0]) < tolerance
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        assert relative_error(gradient, expected[1][name]) < 10 * tolerance, name


@pytest.fixture
def ids(model):
    return torch.randint(0, model.config.vocab_size, (2, 70), device="cuda")


def test_a_stock_model(model, ids):
    assert_same(logits_and_gradients(model, "moe_ext", ids), logits_and_gradients(model, "eager", ids), 1e-5)


def test_gradient_checkpointing(model, ids):
    def checkpointed(model):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        model.train()
        enable()
        return model

    expected = logits_and_gradients(model, "moe_ext", ids, lambda model: model.train())
    assert_same(logits_and_gradients(model, "moe_ext", ids, checkpointed), expected, 1e-6)


@pytest.mark.skipif(not implementation._GRAPHS_READ_MODULES, reason="a graph of this PyTorch has the portable form")
def test_compiled_whole(model, ids):
    def compiled(model):
        return torch.compile(model, fullgraph=True)

    assert_same(
        logits_and_gradients(model, "moe_ext", ids, compiled), logits_and_gradients(model, "moe_ext", ids), 1e-5
    )


def test_autocast(model, ids):
    expected = logits_and_gradients(model, "eager", ids)[0]
    with torch.autocast("cuda", torch.bfloat16):
        found, stock = (logits_and_gradients(model, name, ids)[0] for name in ("moe_ext", "eager"))
    assert relative_error(found, expected) < 1.2 * relative_error(stock, expected)


def test_generation(model, ids):
    texts = []
    for name in ("eager", "moe_ext"):
        model.set_experts_implementation(name)
        texts.append(model.generate(ids[:, :9], max_new_tokens=12, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


def test_the_formulas_of_activations_in_16_bits():
    for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"):
        experts = layer(4, 256, 128)
        shape = (kind, 1.0, None, 0.0, True, False, True)
        experts = ExpertWeights.from_layout(shape, experts.up, experts.down, None, None)
        states, index, weights = tokens_for(300, 256, 4, 2)
        formula = Activation(kind)
        expected = torch.zeros(300, 256, dtype=torch.float64, device="cuda")
        for expert in range(4):
            token, slot = torch.where(index == expert)
            gate, value = (states[token].double() @ experts.up[expert].double().T).chunk(2, dim=-1)
            out = (formula.act(gate) * value) @ experts.down[expert].double().T
            expected.index_add_(0, token, out * weights[token, slot, None].double())
        with torch.no_grad():
            assert relative_error(run(states, index, weights, experts), expected) < 5e-3, kind
