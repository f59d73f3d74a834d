"""The parameter in few bits: what it stands for, what keeps it in few bits, and what it refuses."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_moe_ext.kernels.quantized_tensor import QuantizedTensor, _dequantize_in_graph
from hf_moe_ext.kernels.quantized_weights import NF4, quantize

from .test_quantized import FORMATS, codes_reference, groups_of, normal, scales_of


E, N, K = 3, 10, 128


def made(name="nf4", *, dims=3, is_transposed=False, dtype=torch.float32):
    """A tensor in a format, and the stack it was made of."""
    kind, settings = FORMATS[name]
    stack = quantize(normal(E if dims == 3 else 1, N, K, dtype=dtype), kind, **settings)
    return QuantizedTensor.from_stack(stack, dims=dims, is_transposed=is_transposed), stack


def numbers_reference(stack):
    """(E, N, K) in float64, by the table of formats."""
    codes = groups_of(stack, codes_reference(stack))
    if stack.kind == "nf4":
        values = torch.tensor(NF4, dtype=torch.float64)[codes]
    elif stack.zeros is not None:
        values = (codes - stack.zeros[..., None].long()).double()
    else:
        values = (codes - {"int8": 0, "int4": 8, "ternary": 1}[stack.kind]).double()
    return (values * scales_of(stack)).view(stack.shape)


@pytest.mark.parametrize("is_transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", [n for n in FORMATS if n != "ternary_expert"])
def test_numbers(name, dims, is_transposed):
    tensor, stack = made(name, dims=dims, is_transposed=is_transposed)
    expected = numbers_reference(stack)
    expected = expected[0] if dims == 2 else expected
    expected = expected.transpose(-1, -2) if is_transposed else expected
    assert tensor.shape == expected.shape and tensor.dtype == torch.float32
    # A product of a code and a scale is exact in float32, one of the NF4 table is rounded once.
    torch.testing.assert_close(tensor.dequantize().double(), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close((tensor + 0).double(), expected, rtol=1e-7, atol=0)
    graph = _dequantize_in_graph(tensor)
    torch.testing.assert_close(graph.transpose(-1, -2) if is_transposed else graph, tensor.dequantize())


@pytest.mark.parametrize("is_transposed", [False, True], ids=["plain", "transposed"])
def test_one_expert_and_turned_matrices_stay_in_few_bits(is_transposed):
    tensor, _ = made(is_transposed=is_transposed)
    whole = tensor.dequantize()
    parts = tensor.unbind(0)
    for e in (0, 2, -1):
        assert isinstance(tensor[e], QuantizedTensor) and torch.equal(tensor[e].dequantize(), whole[e])
        assert torch.equal(parts[e].dequantize(), whole[e])
        turned = tensor[e].t()
        assert isinstance(turned, QuantizedTensor) and torch.equal(turned.dequantize(), whole[e].t())
    turned = tensor.transpose(1, 2)
    assert isinstance(turned, QuantizedTensor) and torch.equal(turned.dequantize(), whole.transpose(1, 2))
    # What no few bits can say becomes plain.
    assert torch.equal(tensor.transpose(0, 1), whole.transpose(0, 1)) and type(tensor[:, 1]) is torch.Tensor
    assert torch.equal(tensor[:, 1], whole[:, 1]) and torch.equal(tensor[1:], whole[1:])


@pytest.mark.parametrize("is_transposed", [False, True], ids=["plain", "transposed"])
def test_products_and_their_gradients(is_transposed):
    tensor, _ = made("int4_zeros", is_transposed=is_transposed)
    weight = tensor.dequantize().double()
    x = normal(7, tensor.shape[-1], seed=1).requires_grad_()
    slow = x.detach().double().requires_grad_()
    out, expected = F.linear(x, tensor[1]).tanh(), F.linear(slow, weight[1]).tanh()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad.double(), slow.grad, rtol=1e-5, atol=1e-5)


def test_autograd_keeps_few_bits():
    layer = nn.Linear(256, 256, bias=False)
    stack = quantize(layer.weight.detach()[None], "nf4")
    layer.weight = nn.Parameter(QuantizedTensor.from_stack(stack, dims=2), requires_grad=False)
    kept = []
    x = torch.randn(2, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x)
    assert any(isinstance(t, QuantizedTensor) for t in kept)
    assert all(isinstance(t, QuantizedTensor) or t.numel() < 256 * 256 for t in kept)
    out.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.dequantize().sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)


def test_a_dtype_is_what_the_numbers_are_made_in():
    tensor, stack = made("nf4")
    half = tensor.to(torch.bfloat16)
    assert isinstance(half, QuantizedTensor) and half.dtype == torch.bfloat16
    assert torch.equal(half.packed, stack.packed) and torch.equal(half.scales, stack.scales)
    assert torch.equal(half.dequantize(), tensor.dequantize().to(torch.bfloat16))
    assert torch.equal(half.float().dequantize(), tensor.dequantize())
    module = nn.Module()
    module.weight = nn.Parameter(tensor, requires_grad=False)
    module.to(torch.float16)
    assert isinstance(module.weight, QuantizedTensor) and module.weight.dtype == torch.float16
    assert module.weight.to("meta").packed.is_meta and not module.weight.packed.is_meta


def test_casting_the_data_as_peft_does():
    parameter = nn.Parameter(made(dtype=torch.bfloat16)[0], requires_grad=False)
    before = parameter.dequantize()
    parameter.data = parameter.data.to(torch.float32)
    assert parameter.dtype == torch.float32 and torch.equal(parameter.dequantize().to(torch.bfloat16), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.add_(1.0),
        lambda w: w.data.add_(torch.ones(w.shape)),
        lambda w: w.copy_(torch.zeros(w.shape)),
        lambda w: w[0].zero_(),
        lambda w: nn.init.normal_(w),
    ],
    ids=["add", "data", "copy", "part", "init"],
)
def test_changes_in_place_are_refused(change):
    tensor, _ = made()
    before = tensor.dequantize()
    with pytest.raises(RuntimeError, match=r"quantized \(nf4\) and cannot be changed in place"):
        change(tensor)
    assert torch.equal(tensor.dequantize(), before)


def test_state_dict_copy_and_pickle():
    first, second = nn.Module(), nn.Module()
    first.weight = nn.Parameter(made("int8")[0], requires_grad=False)
    kind, settings = FORMATS["int8"]
    other = quantize(normal(E, N, K, seed=9), kind, **settings)
    second.weight = nn.Parameter(QuantizedTensor.from_stack(other), requires_grad=False)
    assert not torch.equal(first.weight.dequantize(), second.weight.dequantize())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.weight.dequantize(), second.weight.dequantize())
    second.weight.packed.zero_()
    assert first.weight.packed.any()  # a copy

    twin = copy.deepcopy(first)
    assert isinstance(twin.weight, nn.Parameter) and torch.equal(twin.weight.dequantize(), first.weight.dequantize())
    assert twin.weight.packed.data_ptr() != first.weight.packed.data_ptr()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)["weight"]
    assert isinstance(loaded, QuantizedTensor) and torch.equal(loaded.dequantize(), first.weight.dequantize())


def test_other_forms_are_not_copied():
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        made("nf4")[0].copy_(made("int8")[0])


def test_sizes_are_those_of_what_is_stored():
    tensor, stack = made("nf4")
    assert tensor.numel() * tensor.element_size() == stack.nbytes
