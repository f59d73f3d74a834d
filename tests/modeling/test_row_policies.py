"""Two routing policies in one batch: each row must come out as if it were alone under its policy."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from hf_moe_ext import upcycle
from hf_moe_ext.modeling.moe_structure import iter_routers, route_rows, trace_routing
from hf_moe_ext.patching import extend

from .test_patching import CarryRouter, carry_router  # noqa: F401


WEAK = {"weak": {"num_experts_per_tok": 1, "first_rank": 2}}
MODES = ["strong", "weak", "weak", "strong"]


def model_and_ids(name="mixtral", router="top_k"):
    model = extend(tiny_model(name), {"router": {"type": router}})
    return model, tiny_inputs(name, batch=4)["input_ids"]


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


def configured(model, **changes):
    twin = copy.deepcopy(model)
    for router in iter_routers(twin):
        for key, value in changes.items():
            setattr(router.moe_config, key, value)
    return twin


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen2_moe", "dbrx", "gpt_oss"])
def test_each_row_follows_its_policy(name):
    model, ids = model_and_ids(name)
    strong, weak = logits(model, ids), logits(configured(model, **WEAK["weak"]), ids)
    assert not torch.allclose(strong, weak, atol=1e-3)
    with route_rows(model, MODES, WEAK):
        both = logits(model, ids)
    expected = torch.stack([(strong if mode == "strong" else weak)[row] for row, mode in enumerate(MODES)])
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(logits(model, ids), strong)  # nothing stays behind


def test_encoder_and_decoder_follow_the_policy():
    model = extend(tiny_model("switch_transformers"), {"router": {"type": "top_k"}})
    inputs = tiny_inputs("switch_transformers", batch=2)
    weak = configured(model, num_experts_per_tok=1, first_rank=2)
    with torch.no_grad():
        expected = model(**inputs).logits[0], weak(**inputs).logits[1]
        with route_rows(model, ["strong", "weak"], WEAK):
            both = model(**inputs).logits
    torch.testing.assert_close(both[0], expected[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(both[1], expected[1], rtol=1e-5, atol=2e-5)


def test_records_are_in_the_order_of_the_rows():
    model, ids = model_and_ids()
    with route_rows(model, MODES, WEAK), trace_routing(model) as contexts:
        logits(model, ids)
    for record in contexts[0].records.values():
        used = (record.index < record.num_experts).sum(-1).view(4, -1)
        assert (used == torch.tensor([[2], [1], [1], [2]])).all()
        second = record.logits.topk(2).indices[:, 1].view(4, -1)[1]
        assert torch.equal(record.index.view(4, -1, 2)[1, :, 0], second)


def test_gradients_are_those_of_the_rows_alone():
    model, ids = model_and_ids()
    weak = configured(model, **WEAK["weak"])
    model.train(), weak.train()
    model(input_ids=ids[:1]).logits.square().sum().backward()
    weak(input_ids=ids[1:2]).logits.square().sum().backward()
    apart = {
        name: p.grad + q.grad
        for (name, p), q in zip(model.named_parameters(), weak.parameters(), strict=True)
        if p.grad is not None
    }
    model.zero_grad()
    with route_rows(model, ["strong", "weak"], WEAK):
        model(input_ids=ids[:2]).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, apart[name], rtol=1e-4, atol=1e-4)


def test_state_between_layers_belongs_to_the_rows(carry_router):  # noqa: F811
    model, ids = model_and_ids(router="carry")
    weak = configured(model, num_experts_per_tok=1)
    expected = torch.stack([logits(model, ids)[0], logits(weak, ids)[1], logits(model, ids)[2]])
    with route_rows(model, ["a", "weak", "b"], {"weak": {"num_experts_per_tok": 1}}):
        torch.testing.assert_close(logits(model, ids[:3]), expected, rtol=1e-5, atol=2e-5)


def test_cached_generation_follows_the_policies():
    model, ids = model_and_ids()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    weak = configured(model, **WEAK["weak"])
    expected = [model.generate(ids[:1], **options)[0].tolist(), weak.generate(ids[1:2], **options)[0].tolist()]
    with route_rows(model, ["strong", "weak"], WEAK):
        assert model.generate(ids[:2], **options).tolist() == expected


def test_compiled():
    model, ids = model_and_ids()
    with route_rows(model, MODES, WEAK):
        expected = logits(model, ids)
        torch._dynamo.reset()
        found = logits(torch.compile(model, fullgraph=True, backend="aot_eager"), ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_upcycled_model():
    model = upcycle(tiny_model("llama"), "drop", num_experts=4, router="top_k", target="ext")
    ids = tiny_inputs("llama", batch=2)["input_ids"]
    weak = configured(model, num_experts_per_tok=1)
    with route_rows(model, ["strong", "weak"], {"weak": {"num_experts_per_tok": 1}}):
        both = logits(model, ids)
    torch.testing.assert_close(both[0], logits(model, ids)[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(both[1], logits(weak, ids)[1], rtol=1e-5, atol=2e-5)


REFUSED = {
    "too_many": (["a"], {"a": {"num_experts_per_tok": 9}}, "exceeds the 8 experts"),
    "no_such_field": (["a"], {"a": {"k": 1}}, "policy `a` does not fit the `top_k` router.*'k'"),
    "unused": (["a"], {"b": {"num_experts_per_tok": 1}}, r"`policies` defines \['b'\]"),
    "no_rows": ([], None, "`modes` is empty"),
}


@pytest.mark.parametrize(("modes", "policies", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_policies(modes, policies, message):
    model, _ = model_and_ids()
    with pytest.raises(ValueError, match=message), route_rows(model, modes, policies):
        pass


def test_another_number_of_rows_is_refused_and_the_model_works_afterwards():
    model, ids = model_and_ids()
    expected = logits(model, ids)
    with (
        pytest.raises(ValueError, match="policies of 2 rows, but this forward has a batch of 4 rows"),
        route_rows(model, ["strong", "weak"], WEAK),
    ):
        logits(model, ids)
    assert torch.equal(logits(model, ids), expected)


def test_stock_model_is_refused():
    with (
        pytest.raises(ValueError, match="no layer of this model has a router of this package"),
        route_rows(tiny_model("mixtral"), ["a"]),
    ):
        pass
