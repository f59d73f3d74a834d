"""Stick-breaking attention against the stick itself, in its limits, and inside stock models."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe_ext.modeling import stick_breaking
from hf_moe_ext.modeling.stick_breaking import stick_breaking_attention_forward, stick_breaking_weights


LOWEST = torch.finfo(torch.float32).min


def break_stick(logits):
    """One row: from the nearest key (the last) back, each takes its share of what is left."""
    left, shares = 1.0, []
    for logit in reversed(logits.tolist()):
        share, rest = (1 / (1 + math.exp(sign * max(min(logit, 700.0), -700.0))) for sign in (-1, 1))
        shares.append(left * share)
        left *= rest
    return torch.tensor(shares[::-1], dtype=torch.float64), left


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_the_stick(scale):
    logits = scale * torch.randn(40, 17, dtype=torch.float64)
    found = stick_breaking_weights(logits)
    for row, weights in zip(logits, found, strict=True):
        expected, left = break_stick(row)
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-16)
        assert weights.sum().item() + left == pytest.approx(1.0, abs=1e-14)
    assert (found >= 0).all() and (found <= 1).all()


def test_float32_keeps_small_sums_beside_large_ones():
    """A far key whose logit is huge takes all that is left, and must not blur the shares before it."""
    logits = torch.tensor([3.0e4, -2.0, 0.5, -1.0])
    expected, _ = break_stick(logits.double().clamp(max=700))
    torch.testing.assert_close(stick_breaking_weights(logits).double(), expected, rtol=1e-6, atol=0)


def test_limits():
    far = torch.tensor([0.3, -1.0, 2.0, 1e4])
    assert torch.equal(stick_breaking_weights(far), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert (stick_breaking_weights(torch.full((5,), LOWEST)) == 0).all()
    halves = stick_breaking_weights(torch.zeros(6))
    torch.testing.assert_close(halves, torch.tensor([2.0**-k for k in (6, 5, 4, 3, 2, 1)]))


def test_gradient():
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stick_breaking_weights, (logits,))
    masked = torch.full((1, 4), LOWEST).index_fill(1, torch.tensor([2]), 0.7).requires_grad_()
    stick_breaking_weights(masked).sum().backward()
    assert masked.grad.isfinite().all() and masked.grad[0, 2] > 0 and (masked.grad[0, [0, 1, 3]] == 0).all()


def attend(query, key, value, mask=None, is_causal=True, **kwargs):
    module = SimpleNamespace(is_causal=is_causal, training=False)
    return stick_breaking_attention_forward(module, query, key, value, mask, **kwargs)


def reference(query, key, value, seen):
    """Loops over batch, heads and queries; `seen` (B, S, T)."""
    batch, heads, length, size = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, length, heads, size, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                places = seen[b, i].nonzero().flatten()
                logits = key[b, h // group, places].double() @ query[b, h, i].double() / math.sqrt(size)
                weights, _ = break_stick(logits)
                out[b, i, h] = weights @ value[b, h // group, places].double()
    return out


@pytest.mark.parametrize("block", [2**24, 40])
@pytest.mark.parametrize("kind", ["none", "additive", "boolean"])
def test_interface(kind, block, monkeypatch):
    """Grouped heads, fewer queries than keys, padding on the left, in blocks and at once."""
    monkeypatch.setattr(stick_breaking, "_BLOCK", block)
    query, key, value = torch.randn(2, 4, 3, 6), torch.randn(2, 2, 5, 6), torch.randn(2, 2, 5, 6)
    seen = (torch.arange(5) <= torch.arange(3)[:, None] + 2).expand(2, 3, 5).clone()
    mask = None
    if kind != "none":
        seen[1, :, :2] = False
        mask = seen[:, None] if kind == "boolean" else torch.zeros(2, 1, 3, 5).masked_fill(~seen[:, None], LOWEST)
    out, weights = attend(query, key, value, mask, output_attentions=True)
    torch.testing.assert_close(out.double(), reference(query, key, value, seen), rtol=1e-5, atol=1e-6)
    assert weights.shape == (2, 4, 3, 5) and (weights.masked_select(~seen[:, None]) == 0).all()
    torch.testing.assert_close((weights @ value.repeat_interleave(2, 1)).transpose(1, 2), out)


@pytest.mark.parametrize("block", [2**24, 40])
def test_gradients_of_the_interface(block, monkeypatch):
    """In float64, with grouped heads, at once and in blocks."""
    monkeypatch.setattr(stick_breaking, "_BLOCK", block)
    mask = torch.zeros(2, 1, 3, 4).masked_fill(torch.ones(3, 4).triu(2).bool(), LOWEST)
    mask[1, :, :, 0] = LOWEST
    states = [torch.randn(2, heads, length, 3, dtype=torch.float64) for heads, length in ((4, 3), (2, 4), (2, 4))]
    inputs = [state.requires_grad_() for state in states]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, mask.double())[0], inputs)
    out = attend(*inputs, mask.double())[0]
    seen = (mask == 0)[:, 0].expand(2, 3, 4)
    torch.testing.assert_close(out, reference(*inputs, seen), rtol=1e-12, atol=1e-14)


def test_dropout():
    """Leaves weights out in training, so that the mean stays; not in evaluation."""
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    plain, _ = attend(query, key, value)
    assert torch.equal(attend(query, key, value, dropout=0.4)[0], plain)
    module = SimpleNamespace(is_causal=True, training=True)
    many = [stick_breaking_attention_forward(module, query, key, value, None, dropout=0.4)[0] for _ in range(4000)]
    assert not torch.equal(many[0], many[1])
    spread = torch.stack(many).std(0) / math.sqrt(4000)
    assert ((torch.stack(many).mean(0) - plain).abs() <= 5 * spread + 1e-6).all()


def test_what_it_refuses():
    states = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    with pytest.raises(ValueError, match="not causal"):
        attend(*states, is_causal=False)
    with pytest.raises(ValueError, match="no `softcap`"):
        attend(*states, softcap=30.0)


def test_in_a_stock_model():
    """`attn_implementation="stick_breaking"` on a llama: its RoPE stays, cache and left padding change nothing."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.3,
        pad_token_id=0,
        attn_implementation="stick_breaking",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 64, (2, 9))
    whole = model(ids).logits
    eager = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "attn_implementation": "eager"})).eval()
    eager.load_state_dict(model.state_dict())
    assert (whole - eager(ids).logits).abs().max() > 0.1  # it is another attention
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], cached)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, cached)
