"""Every router with every part, and with row policies: what is published apart must also work together."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension
from hf_moe_ext.modeling.moe_router import get_router
from hf_moe_ext.modeling.moe_structure import route_rows, trace_routing
from hf_moe_ext.patching import extend, restore

from .test_matrix import backward
from .zoo import SETTINGS


# Routers that refuse zero-computation experts, with a piece of the reason.
NO_ZERO_EXPERTS = {
    "hash": "does not choose",
    "soft_moe": "mixes tokens for real experts",
    "read_me": "one path through all layers",
    "permuted_top_k": "does not go with zero-computation experts",
    "union": "chooses parts of a block",
    "moefication": "chooses parts of a block",
}
PARTS = {
    "momentum": {"momentum": {"decay": 0.5}},
    "shared_experts": {"shared_experts": {"intermediate_size": 8}},
    "zero_experts": {"zero_experts": {"zero": 4, "copy": 1, "constant": 1}},
    "all": {
        "momentum": {"decay": 0.5, "scope": "routed"},
        "shared_experts": {"intermediate_size": 8},
        "zero_experts": {"zero": 4, "copy": 1, "constant": 1},
    },
}
COMPOSED = [pytest.param(router, parts, id=f"{router}-{parts}") for router in SETTINGS for parts in PARTS]
CAUSAL = [name for name in SETTINGS if get_router(name).causal]


def declaration(router: str, parts: str, name: str = "mixtral") -> MoeExtension:
    chosen = dict(PARTS[parts])
    if router in NO_ZERO_EXPERTS:
        chosen.pop("zero_experts", None)
    return MoeExtension(router=SETTINGS[router](name), **chosen)


def composed(router: str, parts: str):
    if parts == "zero_experts" and router in NO_ZERO_EXPERTS:
        pytest.skip("refused, see below")
    model = extend(tiny_model("mixtral"), declaration(router, parts))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "moe_shared" in name or "moe_zero" in name:  # what starts at zero would hide mistakes
            parameter.data.normal_(std=0.3)
    return model, tiny_inputs("mixtral")


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize(("router", "parts"), COMPOSED)
def test_saves_loads_and_restores(router, parts, tmp_path):
    stock = tiny_model("mixtral")
    model, inputs = composed(router, parts)
    expected = logits(model, inputs)
    assert (expected - logits(stock, inputs)).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(again.eval(), inputs), expected)
    restore(model)
    assert torch.equal(logits(model, inputs), logits(stock, inputs))


@pytest.mark.parametrize(("router", "parts"), [row for row in COMPOSED if row.values[1] == "all"])
def test_checkpointing_cache_and_losses(router, parts):
    model, inputs = composed(router, parts)
    if get_router(router).causal:
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        cached, uncached = (model.generate(**inputs, **options, use_cache=use).tolist() for use in (True, False))
        assert cached == uncached
    plain = backward(model, inputs)
    # Parameters of all parts are trained.
    added = {name for name, p in model.named_parameters() if ".moe_shared" in name or ".moe_zero_experts" in name}
    assert added and all(plain[name].abs().sum() > 0 for name in added if "shared" in name)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    recomputed = backward(model, inputs)
    assert plain.keys() == recomputed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("router", NO_ZERO_EXPERTS)
def test_refused_with_the_reason(router):
    model = tiny_model("mixtral")
    before = copy.deepcopy(model.state_dict())
    extension = MoeExtension(router=SETTINGS[router]("mixtral"), **PARTS["zero_experts"])
    with pytest.raises(ValueError, match=NO_ZERO_EXPERTS[router]):
        extend(model, extension)
    assert list(model.state_dict()) == list(before) and type(model).__name__ == "MixtralForCausalLM"


@pytest.mark.parametrize("parts", ["none", "all"])
@pytest.mark.parametrize("router", CAUSAL)
def test_rows_of_different_names_come_out_as_alone(router, parts):
    """Two policies that change nothing: whatever a router carries or draws, rows must not meet."""
    if parts == "none":
        model, inputs = extend(tiny_model("mixtral"), SETTINGS[router]("mixtral")), tiny_inputs("mixtral", batch=3)
    else:
        model, _ = composed(router, parts)
        inputs = tiny_inputs("mixtral", batch=3)
    expected = logits(model, inputs)
    with route_rows(model, ["a", "b", "a"]), trace_routing(model) as contexts:
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=2e-5)
    assert len(contexts[0].records) == 3


@pytest.mark.parametrize("router", [name for name in SETTINGS if not get_router(name).mixes_tokens])
def test_losses_of_rows_are_those_of_the_batch(router):
    """Records of two policies are put together with all that their losses need."""
    model, inputs = extend(tiny_model("mixtral"), SETTINGS[router]("mixtral")), tiny_inputs("mixtral", batch=2)
    if not get_router(router).causal:
        pytest.skip("its tokens are chosen from the whole batch, which a policy divides")
    model.eval()

    def losses():
        with trace_routing(model) as contexts, torch.no_grad():
            model(**inputs)
        (context,) = contexts
        return [get_router(router).aux_losses(record, None) for record in context.records.values()]

    expected = losses()
    with route_rows(model, ["a", "b"]):
        found = losses()
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("router", ["comet", "dselect_k", "stochastic"])
def test_what_has_no_logits_cannot_be_held_back(router):
    extension = MoeExtension(router=SETTINGS[router]("mixtral"), zero_experts={"zero": 1, "init": "identity"})
    with pytest.raises(ValueError, match='`init="identity"` are held back at first by their logits'):
        extend(tiny_model("mixtral"), extension)
