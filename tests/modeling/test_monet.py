"""Monet against double loops over its experts, its router against the rule, its model against its parts."""

from __future__ import annotations

import copy
import math
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from hf_moe_ext.modeling import monet_experts
from hf_moe_ext.modeling.configuration_monet import MonetConfig
from hf_moe_ext.modeling.modeling_monet import MonetForCausalLM
from hf_moe_ext.modeling.monet_experts import EXPERTS, MonetBatchNorm, ambiguity_loss, uniformity_loss


VOCAB = 64
FORMS = ("vertical", "horizontal")


def make(seed=0, **overrides):
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_dim": 4,
        "moe_heads": 2,
        "moe_experts": 6,
        "moe_topk": 2,
        "moe_groups": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    model = MonetForCausalLM(MonetConfig(**(values | overrides))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".moe.b" in name or "bias" in name:
                parameter.normal_(std=0.3)
    return model


def tokens(batch=2, length=7):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


# --- experts ---


def problem(form, tokens=5, pieces=6, heads=2):
    config = MonetConfig(
        hidden_size=8, num_attention_heads=2, moe_dim=4, moe_experts=pieces, moe_topk=2, moe_decompose=form
    )
    experts = EXPERTS[form](config).double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    scores = []
    for _ in range(2):
        raw = torch.randn(tokens, heads, pieces, dtype=torch.float64)
        raw[..., ::3] = float("-inf")  # most pieces are not kept
        scores.append(raw.softmax(-1))
    return experts, torch.randn(tokens, 8, dtype=torch.float64), *scores


def single(experts, form, i, j, x):
    """The output of expert (i, j), built by itself."""
    act = experts.act_fn
    if form == "horizontal":
        m = 4
        inner = act(experts.u.weight[i * m : (i + 1) * m] @ x + experts.u.bias[i * m : (i + 1) * m])
        return experts.v.weight[:, j * m : (j + 1) * m] @ inner + experts.b[j]
    m = 2
    own, other = slice(i * m, (i + 1) * m), slice(j * m, (j + 1) * m)
    a1 = act(experts.u1.weight[own] @ x + experts.u1.bias[own])
    a2 = act(experts.u2.weight[other] @ x + experts.u2.bias[other])
    top = experts.v11.weight[:, own] @ a1 + experts.v12.weight[:, own] @ a2 + experts.b1[i]
    bottom = experts.v21.weight[:, other] @ a1 + experts.v22.weight[:, other] @ a2 + experts.b2[j]
    return torch.cat([top, bottom])


def double_loop(experts, form, x, g1, g2, removed=()):
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for i in range(g1.shape[-1]):
            for j in range(g2.shape[-1]):
                if i * g1.shape[-1] + j not in removed:
                    score = (g1[t, :, i] * g2[t, :, j]).sum()
                    out[t] += score * single(experts, form, i, j, x[t])
    return out


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("removed", [[], [0], [3, 8, 9, 35, 13], list(range(36))], ids=["none", "one", "some", "all"])
def test_experts(form, removed, monkeypatch):
    experts, x, g1, g2 = problem(form)
    expected = double_loop(experts, form, x, g1, g2, removed)
    for chunk in (2**24, 8):  # all tokens at once, and one by one
        monkeypatch.setattr(monet_experts, "_CHUNK", chunk)
        found = experts(x, g1, g2, torch.tensor(removed, dtype=torch.int64))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_removing_one_expert_takes_its_part(form):
    experts, x, g1, g2 = problem(form)
    i, j = 4, 2
    whole = experts(x, g1, g2)
    without = experts(x, g1, g2, torch.tensor([i * 6 + j]))
    score = (g1[:, :, i] * g2[:, :, j]).sum(1, keepdim=True)
    part = torch.stack([single(experts, form, i, j, row) for row in x])
    torch.testing.assert_close(whole - without, score * part, rtol=1e-9, atol=1e-12)
    assert (score * part).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_of_removed_experts_stays(form, dtype):
    """Not even as rounding: without experts the output is zero, and a piece without experts has no say."""
    experts, x, g1, g2 = problem(form)
    experts, x = experts.to(dtype), x.to(dtype)
    assert torch.equal(experts(x, g1, g2, torch.arange(36)), torch.zeros_like(x))
    removed = torch.arange(6 * 4, 6 * 5)  # all of the first piece 4
    before = experts(x, g1, g2, removed)
    for name in ("u", "u1", "v11", "v12") if form == "vertical" else ("u",):
        if hasattr(experts, name) and name.startswith("u"):
            getattr(experts, name).weight.unflatten(0, (6, -1))[4].fill_(1e3)
        elif hasattr(experts, name):
            getattr(experts, name).weight.unflatten(1, (6, -1))[:, 4].fill_(1e3)
    assert torch.equal(experts(x, g1, g2, removed), before)
    assert not torch.equal(experts(x, g1, g2), before)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_scores_have_to_sum_to_one(form):
    """The single sums rely on it: with other scores the factorised form is not the sum over pairs."""
    experts, x, g1, g2 = problem(form)
    found, expected = experts(x, 0.5 * g1, 0.7 * g2), double_loop(experts, form, x, 0.5 * g1, 0.7 * g2)
    assert (found - expected).abs().max() > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    experts, x, g1, g2 = problem(form, tokens=2, pieces=3)

    def run(x, g1, g2, *parameters):
        names = [name for name, _ in experts.named_parameters()]
        arguments = (x, g1, g2, torch.tensor([1, 5]))
        return torch.func.functional_call(experts, dict(zip(names, parameters, strict=True)), arguments)

    inputs = [t.detach().clone().requires_grad_() for t in (x, g1, g2, *experts.parameters())]
    assert torch.autograd.gradcheck(run, inputs)


# --- router ---


def test_router_follows_the_rule():
    model = make(moe_experts=12, moe_topk=3)
    router = model.routers[0]
    router.norm1.running_mean.normal_(std=0.2)
    router.norm1.running_var.uniform_(0.5, 2)
    hidden = torch.randn(40, 32)
    g1, g2, statistics = router(hidden, None)
    assert statistics is None  # running statistics in evaluation
    raw = (hidden @ router.w1.weight.T).view(40, 2, 12)
    normed = (raw - router.norm1.running_mean[:, None]) / (router.norm1.running_var[:, None] + 1e-5).sqrt()
    sigma = NormalDist().inv_cdf(1 - 3 / 12)
    for t in range(40):
        for h in range(2):
            kept = (normed[t, h] >= sigma).nonzero().flatten().tolist() or [int(normed[t, h].argmax())]
            assert (g1[t, h] > 0).nonzero().flatten().tolist() == kept
            torch.testing.assert_close(g1[t, h, kept], raw[t, h, kept].softmax(0))
    for scores in (g1, g2):
        torch.testing.assert_close(scores.sum(-1), torch.ones(40, 2))
    torch.testing.assert_close(router(hidden[3:5], None)[0], g1[3:5], rtol=1e-5, atol=0)  # independent of the batch
    router.train()  # where statistics are those of the batch
    hidden[5:] += 3
    assert not torch.equal(router(hidden, None)[0][:5] > 0, router(hidden[:5], None)[0] > 0)


def test_as_many_pieces_are_kept_as_asked_for():
    model = make(hidden_size=64, num_attention_heads=4, moe_experts=128, moe_topk=8, moe_heads=4).train()
    router = model.routers[0]
    torch.nn.init.normal_(router.w1.weight)
    g1, _, _ = router(torch.randn(600, 64), None)
    assert (g1 > 0).sum(-1).float().mean().item() == pytest.approx(8, rel=0.05)


def test_batch_normalisation_is_that_of_torch():
    ours, stock = MonetBatchNorm(3), torch.nn.BatchNorm1d(3, affine=False)
    for _ in range(3):
        logits = 2 + 3 * torch.randn(20, 3, 7)
        found, statistics = ours(logits, None)
        torch.testing.assert_close(found, stock(logits), rtol=1e-5, atol=1e-5)
        ours.update(statistics)
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(getattr(ours, name), buffer)
    ours.eval(), stock.eval()
    torch.testing.assert_close(ours(logits, None)[0], stock(logits), rtol=1e-5, atol=1e-5)
    mask = torch.rand(20) < 0.5
    ours.train()
    garbage = logits.masked_fill(~mask[:, None, None], 1e4)
    torch.testing.assert_close(ours(garbage, mask)[1], ours(logits[mask], None)[1])


def test_losses():
    uniform = torch.full((9, 2, 6), 1 / 6)
    sure = F.one_hot(torch.arange(18).view(9, 2) % 6, 6).float()
    assert uniformity_loss(uniform, uniform).item() == pytest.approx(math.log(6))
    assert ambiguity_loss(uniform, uniform).item() == pytest.approx(1 - 1 / 6)
    assert ambiguity_loss(sure, sure).item() == 0
    uneven = torch.randn(9, 2, 6).mul(3).softmax(-1)
    assert uniformity_loss(uneven, uniform) > math.log(6) + 0.01
    mask = torch.tensor([True] * 5 + [False] * 4)
    for loss in (uniformity_loss, ambiguity_loss):
        torch.testing.assert_close(loss(uneven, uniform, mask), loss(uneven[:5], uniform[:5]))


# --- models ---


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_model_against_its_parts(form):
    """The layers by hand: a Llama with the double loop in place of its blocks, and scores shared in groups."""
    model, ids = make(moe_decompose=form), tokens()
    out = model(ids, output_router_probs=True, output_hidden_states=True)
    assert len(out.router_probs) == 2  # three layers in groups of two
    for number, group in ((0, 0), (1, 0), (2, 1)):
        layer = model.model.layers[number]
        assert (layer.router is None) == (number == 1)
        hidden = out.hidden_states[number]
        attended = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=model.model.rotary_emb(hidden, torch.arange(7)[None]),
            attention_mask=torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None],
        )[0]
        hidden = hidden + attended
        g1, g2 = (scores.flatten(0, 1).double() for scores in out.router_probs[group])
        normed = layer.post_attention_layernorm(hidden).flatten(0, 1).double()
        experts = copy.deepcopy(layer.moe).double()
        expected = hidden.double() + double_loop(experts, form, normed, g1, g2).view(hidden.shape)
        last = number == 2
        found = out.hidden_states[number + 1]
        if last:
            expected = model.model.norm(expected.float()).double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cache_padding_and_generation():
    model, ids = make(), tokens()
    whole = model(ids).logits
    padded = F.pad(ids, (3, 0))
    mask = (padded != 0).long()
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], whole, rtol=1e-4, atol=1e-5)
    for options in ({}, {"num_beams": 3}):
        common = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, **options}
        assert torch.equal(model.generate(padded, **common), model.generate(padded, use_cache=False, **common))
    common = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    static = model.generate(padded, cache_implementation="static", disable_compile=True, **common)
    assert torch.equal(static, model.generate(padded, **common))


def gradients(model, ids, checkpointing):
    model = copy.deepcopy(model).train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing(form):
    model, ids = make(moe_decompose=form, router_aux_loss_coef=0.5), tokens()
    model.set_expert_mask(0, [(1, 4), (2, 0)])
    (plain, buffers), (again, others) = (gradients(model, ids, flag) for flag in (False, True))
    for name, gradient in plain.items():
        assert gradient is not None and gradient.norm() > 0, name
        torch.testing.assert_close(again[name], gradient, msg=name)
    for name, buffer in buffers.items():  # statistics move once
        assert torch.equal(others[name], buffer), name
    assert buffers["model.layers.0.router.norm1.num_batches_tracked"] == 1


def test_the_router_learns_from_all_layers_of_its_group():
    model, ids = make(router_aux_loss_coef=0.0), tokens()
    whole = gradients(model, ids, False)[0]["model.layers.0.router.w1.weight"]
    cut = copy.deepcopy(model)
    with torch.no_grad():  # the second layer of the group says nothing
        for name, parameter in cut.model.layers[1].moe.named_parameters():
            if name.startswith(("v", "b")):
                parameter.zero_()
    assert (whole - gradients(cut, ids, False)[0]["model.layers.0.router.w1.weight"]).norm() > 1e-3


def parameters(layers, hidden, heads, dim, router_heads, groups=4, **overrides):
    config = MonetConfig(
        vocab_size=32_000,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        moe_dim=dim,
        moe_heads=router_heads,
        moe_groups=groups,
        tie_word_embeddings=False,
        **overrides,
    )
    with torch.device("meta"):
        return sum(p.numel() for p in MonetForCausalLM(config).parameters())


def test_parameters_of_the_published_sizes():
    """In billions, as published and as counted from the equations (the first figure is cut off, not rounded)."""
    assert parameters(24, 1536, 12, 12, 6) / 1e9 == pytest.approx(0.853, abs=1e-3)
    assert round(parameters(24, 2048, 16, 16, 8) / 1e9, 3) == 1.465
    assert round(parameters(32, 3072, 24, 24, 12) / 1e9, 3) == 4.173
    assert round(parameters(24, 2048, 16, 16, 8, groups=1) / 1e9, 3) == 1.767


def test_experts_grow_with_the_square_of_their_parameters():
    def expert_parameters(pieces):
        config = MonetConfig(hidden_size=32, num_attention_heads=4, moe_dim=4, moe_experts=pieces, moe_topk=2)
        return sum(p.numel() for p in EXPERTS["vertical"](config).parameters())

    assert expert_parameters(16) == 2 * expert_parameters(8)  # and four times as many experts


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_compile(form, training):
    """In one graph, with removed experts."""
    model, ids = make(moe_decompose=form).train(training), tokens()
    model.set_expert_mask(0, [3, 9, 10])
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    found, expected = (each(ids, labels=ids, use_cache=False) for each in (compiled, model))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)


def test_bad_input():
    for overrides, text in (
        ({"moe_topk": 6}, "`moe_topk` \\(6\\) must be below `moe_experts` \\(6\\)"),
        ({"moe_dim": 3}, "must be even"),
        ({"moe_heads": 0}, "`moe_heads` must be a whole number of at least 1, got 0"),
        ({"moe_groups": "4"}, "`moe_groups` must be a whole number of at least 1, got '4'"),
        (
            {"num_key_value_heads": 3},
            "`num_attention_heads` \\(4\\) must be divisible by `num_key_value_heads` \\(3\\)",
        ),
        ({"router_aux_loss_coef": -1.0}, "must be non-negative, got -1.0"),
        ({"moe_decompose": "diagonal"}, "moe_decompose"),
        ({"num_removed_experts": [1]}, "each of the 2 groups"),
        ({"num_removed_experts": [0, 40]}, "must be in \\[0, 36\\]"),
    ):
        with pytest.raises(ValueError, match=text):
            make(**overrides)
    model = make()
    for group, experts, text in (
        (2, [0], "groups 0 to 1, got 2"),
        (0, [36], "experts are 0 to 35, got 36"),
        (0, [(0, 6)], "pieces are 0 to 5, got 0 to 6"),
        (0, torch.tensor([0.5]), "whole numbers"),
        (0, torch.zeros(36, dtype=torch.bool), "whole numbers or pairs of them, got torch.bool"),
        (0, torch.zeros(2, 3, dtype=torch.long), "numbers or pairs"),
    ):
        with pytest.raises(ValueError, match=text):
            model.set_expert_mask(group, experts)
    assert model.config.num_removed_experts is None
    assert AutoConfig.for_model("monet").moe_experts == 512
