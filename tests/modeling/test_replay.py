"""Recorded choices in place of a router's own: the same choices give the same pass, others go where they say."""

from __future__ import annotations

import pytest
import torch

import hf_moe_ext as moe
from hf_moe_ext import MoeExtension, TopKRouterConfig, TopPRouterConfig, extend
from hf_moe_ext.modeling.moe_router import get_router
from tests.tiny_models import tiny_model

from .zoo import SETTINGS


REPLAYED = [name for name in SETTINGS if get_router(name).replays]


def extended(router="top_k", family="mixtral"):
    config = SETTINGS[router](family) if isinstance(router, str) else router
    return extend(tiny_model(family), MoeExtension(router=config)).eval()


def ids_of(model, rows=2, length=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (rows, length), generator=generator)


def record(model, ids):
    with moe.record_routing(model) as recorded, torch.no_grad():
        logits = model(ids).logits
    return recorded.routed_experts(), logits


@pytest.mark.parametrize("router", REPLAYED)
def test_own_choices_give_the_same_pass(router):
    model = extended(router)
    ids = ids_of(model)
    routed, logits = record(model, ids)
    assert routed.dtype == torch.int32 and routed.shape[:3] == (2, 7, model.config.num_hidden_layers)
    with moe.replay_routing(model, routed), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "deepseek_v2", "qwen2_moe", "gemma4", "gpt_oss", "olmoe", "glm4_moe", "ernie4_5_moe"]
)
def test_the_rules_of_stock_gates(family):
    """Without a replay the stock gate chooses by itself, with one its rule is computed anew."""
    model = extended(TopKRouterConfig(), family)
    ids = ids_of(model)
    routed, logits = record(model, ids)
    with moe.replay_routing(model, routed), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", REPLAYED)
def test_other_choices_are_followed(router):
    """Every token goes where the token before it went, and the record says so."""
    model = extended(router)
    ids = ids_of(model)
    routed, logits = record(model, ids)
    other = routed.roll(1, dims=1)
    assert (other != routed).any()
    with moe.replay_routing(model, other):
        found, again = record(model, ids)
    width = other.shape[-1]
    as_sets = [tensor.sort(dim=-1, descending=True).values for tensor in (found, other)]
    assert torch.equal(as_sets[0][..., :width], as_sets[1]) and (as_sets[0][..., width:] == -1).all()
    assert not torch.allclose(again, logits)


def slow_weights(logits, chosen):
    """Mixtral's rule, one token at a time: softmax over the chosen experts."""
    rows = []
    for row, experts in zip(logits.double(), chosen.tolist(), strict=True):
        odds = torch.stack([row[expert].exp() if expert >= 0 else row.new_zeros(()) for expert in experts])
        rows.append(odds / odds.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_weights_are_those_of_the_running_pass_with_gradients(slots):
    model = extended(TopKRouterConfig())
    ids, layers = ids_of(model), model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(3)
    routed = torch.rand(2, 7, layers, 4, generator=generator).argsort(dim=-1)[..., :slots].int()
    if slots == 3:
        routed[:, ::2, :, 2] = -1  # an unused slot
    with moe.replay_routing(model, routed), moe.trace_routing(model) as contexts:
        out = model(ids).logits
    for number, (key, each) in enumerate(contexts[0].records.items()):
        chosen = routed[:, :, number].flatten(0, 1)
        wanted = slow_weights(each.logits.detach(), chosen)
        width = chosen.shape[-1]
        torch.testing.assert_close(each.weights[:, :width].double(), wanted, rtol=1e-5, atol=1e-7, msg=key)
        assert (each.weights[:, width:] == 0).all()
    out.square().sum().backward()
    gates = [p.grad for name, p in model.named_parameters() if name.endswith("gate.weight")]
    assert len(gates) == layers and (slots == 1 or all(grad.abs().sum() > 0 for grad in gates))


def test_tokens_that_were_not_recorded_choose_by_themselves():
    model = extended(TopPRouterConfig(threshold=0.6))
    ids = ids_of(model)
    routed, logits = record(model, ids)
    routed[:, 3:] = -1
    routed[0, :, 1] = -1
    with moe.replay_routing(model, routed), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-6)


def test_what_generation_chose_is_replayed_in_one_pass():
    model = extended(TopKRouterConfig(num_experts_per_tok=1))
    prompt = ids_of(model, rows=2, length=4)
    with moe.record_routing(model) as recorded:
        text = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    routed = recorded.routed_experts()
    assert routed.shape[:2] == (2, text.shape[1] - 1)
    own, _ = record(model, text)
    assert torch.equal(own[:, :-1], routed)
    with torch.no_grad():  # the policy moves on, the choices stay
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.copy_(-parameter)
    assert not torch.equal(record(model, text)[0], own)
    with moe.replay_routing(model, routed):
        again, _ = record(model, text)
    assert torch.equal(again[:, :-1], routed)


def test_gradient_checkpointing():
    grads = []
    for checkpointed in (False, True):
        model = extended(TopKRouterConfig()).train()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        ids = ids_of(model)
        routed = torch.arange(4).expand(2, 7, model.config.num_hidden_layers, 4)[..., 1:3]
        with moe.replay_routing(model, routed):
            loss = model(ids, labels=ids).loss
        loss.backward()  # computes again what it was in the forward
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_nothing_stays():
    model = extended()
    ids = ids_of(model)
    routed, logits = record(model, ids)
    with pytest.raises(RuntimeError, match="stop"), moe.replay_routing(model, routed.roll(1, dims=1)):
        raise RuntimeError("stop")
    assert torch.equal(record(model, ids)[1], logits)
    other = extended(family="mixtral")  # a copy knows nothing of a replay that runs
    with moe.replay_routing(model, routed.roll(1, dims=1)):
        assert torch.equal(record(other, ids)[1], logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[0], r"must be integers of shape \(B, S, 3, K\)"),
        (lambda r: r.float(), "must be integers"),
        (lambda r: r[:, :, :1], r"must be integers of shape \(B, S, 3, K\)"),
        (lambda r: r.masked_fill(r == r.max(), 8), r'has \d to 8 in layer "\d", whose experts are 0 to 7'),
        (lambda r: r.masked_fill(r == r.max(), -2), "has -2 to"),
    ],
)
def test_what_a_record_may_not_be(change, message):
    model = extended()
    routed, _ = record(model, ids_of(model))
    with pytest.raises(ValueError, match=message), moe.replay_routing(model, change(routed)):
        pass


def test_what_is_refused_in_the_forward():
    model = extended()
    ids = ids_of(model)
    routed, _ = record(model, ids)
    with moe.replay_routing(model, routed):
        with pytest.raises(ValueError, match="2 rows of 7 tokens, but this forward has 1 rows of 7"):
            model(ids[:1])
        with pytest.raises(ValueError, match="2 rows of 7 tokens, but this forward has 2 rows of 4"):
            model(ids[:, :4])
        with pytest.raises(ValueError, match="cannot be combined"), moe.route_rows(model, ["a", "b"]):
            model(ids)
    with pytest.raises(ValueError, match="no forward has run"), moe.record_routing(model) as recorded:
        recorded.routed_experts()


def test_models_that_cannot_be_replayed():
    with (
        pytest.raises(ValueError, match="no layer of this model has a router"),
        moe.record_routing(tiny_model("llama")),
    ):
        pass
    with pytest.raises(ValueError, match=r"\['hash'\] cannot be replayed"), moe.record_routing(extended("hash")):
        pass


def test_factors_of_experts_are_those_of_the_recorded_ones():
    """Gemma 4 multiplies the weights by a factor for each expert, which follows the recorded choice."""
    model = extended(TopKRouterConfig(), family="gemma4")
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "per_expert_scale"):
                module.per_expert_scale.copy_(torch.arange(1.0, 1 + len(module.per_expert_scale)))
    ids = ids_of(model)
    routed, _ = record(model, ids)
    other = routed.roll(1, dims=1)
    with moe.replay_routing(model, other), moe.trace_routing(model) as contexts, torch.no_grad():
        model(ids)
    for number, each in enumerate(contexts[0].records.values()):
        chosen = other[:, :, number].flatten(0, 1).long()
        wanted = slow_weights(each.logits, chosen) * (chosen + 1)
        torch.testing.assert_close(each.weights.double(), wanted, rtol=1e-4, atol=1e-6)
