"""Every router on real weights: a Mixture-of-Experts made of SmolLM2-135M.

Routers that have an identity start must reproduce the stock gate on experts that differ. The others replace the gate;
on experts that are copies of the dense block, any mixture of them is the dense model again.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hf_moe_ext import MoeExtension, extend, restore, upcycle
from hf_moe_ext.data import load_domain, pack, package_file
from hf_moe_ext.data.packages import SMOLLM2
from hf_moe_ext.gguf import from_gguf
from hf_moe_ext.modeling.configuration_parts import MomentumConfig, SharedExpertsConfig, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_router import GateRule, RouterSite, get_router
from hf_moe_ext.modeling.moe_structure import trace_routing
from hf_moe_ext.modeling.router_dts import DTSRouterConfig
from hf_moe_ext.modeling.router_hash import HashRouterConfig
from hf_moe_ext.modeling.router_sigmoid import SigmoidRouterConfig
from tests.modeling.zoo import SETTINGS


pytestmark = [pytest.mark.real_data, pytest.mark.slow]

# Logits are near 20; thirty layers of float32 products in another order.
ROUNDING = {"rtol": 1e-4, "atol": 2e-3}
LAYERS = "every:3"  # ten of thirty: memory and time, not the method, ask for it
COUNTS = {"num_experts": 4, "num_experts_per_tok": 2, "layers": LAYERS, "check": False}


@pytest.fixture(scope="module")
def smollm2():
    try:
        return from_gguf(package_file(SMOLLM2))
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def inputs(smollm2):
    windows = pack(load_domain("prose", "test"), smollm2[1], 64, limit=2)
    return {"input_ids": torch.stack([torch.as_tensor(windows[i]["input_ids"]) for i in range(2)])}


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def continuation(model, inputs):
    prompt = inputs["input_ids"][:1, :16]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options).tolist()


@pytest.fixture(scope="module")
def stock(smollm2, inputs):
    """A stock Mixtral whose experts and gates differ, its logits, and a continuation."""
    model = upcycle(smollm2[0], "drop", gate_noise=0.05, target="stock", **COUNTS | {"layers": "all"}).eval()
    assert type(model).__name__ == "MixtralForCausalLM"
    return model, logits(model, inputs), continuation(model, inputs)


def identities():
    site = RouterSite("0", 0, num_experts=4, top_k=2, hidden_size=576, rule=GateRule())
    for name in SETTINGS:
        try:
            yield pytest.param({"router": get_router(name).identity_config(site)}, id=name)
        except NotImplementedError:
            pass


PARTS = [
    pytest.param({"momentum": MomentumConfig(decay=0.0)}, id="momentum"),
    pytest.param({"shared_experts": SharedExpertsConfig()}, id="shared_experts"),
    pytest.param({"router": "top_k", "zero_experts": ZeroExpertsConfig(1, 1, 2, init="identity")}, id="zero_experts"),
]


@pytest.mark.parametrize("declaration", [*identities(), *PARTS])
def test_identity_start(stock, inputs, declaration):
    model, expected, tokens = stock
    extend(model, MoeExtension(**declaration))
    try:
        torch.testing.assert_close(logits(model, inputs), expected, **ROUNDING)
        assert continuation(model, inputs) == tokens
    finally:
        restore(model)
    assert torch.equal(logits(model, inputs), expected)


OF_PARTS = ("union", "moefication")


# Settings in which a token's weights sum to 1. Soft MoE mixes tokens before the experts, so copies are not the dense
# model; the sigmoid router does not normalise; two choose among parts of a block, each with weight one.
def copies_setting(name: str):
    config = SETTINGS[name]("llama")
    if name == "hash":
        return HashRouterConfig(vocab_size=49152, num_experts_per_tok=2)
    if name == "dts":
        return DTSRouterConfig(renormalize=True)
    if name == "random_fixed":
        return dataclasses.replace(config, start_experts_per_tok=1, end_experts_per_tok=2)
    if name == "expert_choice":  # at this capacity every expert picks every token
        return dataclasses.replace(config, renormalize=True, capacity_factor=4.0, max_slots=None)
    if name == "permuted_top_k":  # rows of a permutation that is far from converged do not sum to 1
        return dataclasses.replace(config, permutation_diagonal=1.0)
    if name in ("adamoe", "moe_plus_plus"):
        return dataclasses.replace(config, **{"null_init" if name == "adamoe" else "zero_init": "identity"})
    return config


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("soft_moe", "sigmoid", *OF_PARTS)])
def test_copies_are_the_dense_model(smollm2, inputs, name):
    dense = smollm2[0]
    model = upcycle(dense, "sparse", router=copies_setting(name), target="ext", **COUNTS)
    with trace_routing(model) as contexts:
        found = logits(model.eval(), inputs)
    torch.testing.assert_close(found, logits(dense, inputs), **ROUNDING)
    assert len(contexts[0].records) == 10
    if get_router(name).causal:
        assert continuation(model, inputs) == continuation(dense, inputs)


@pytest.mark.parametrize("name", OF_PARTS)
def test_all_parts_are_the_dense_model(smollm2, inputs, name):
    """And without half of them the sum is another one."""
    dense = smollm2[0]
    for k, same in ((4, True), (2, False)):
        router = dataclasses.replace(SETTINGS[name]("llama"), num_experts_per_tok=k)
        counts = COUNTS | {"num_experts_per_tok": k}
        model = upcycle(dense, "split", scale=1.0, router=router, target="ext", **counts).eval()
        found = logits(model, inputs)
        if same:
            torch.testing.assert_close(found, logits(dense, inputs), **ROUNDING)
            assert continuation(model, inputs) == continuation(dense, inputs)
        else:
            assert (found - logits(dense, inputs)).abs().max() > 1


def test_sigmoid_weights_on_copies(smollm2, inputs):
    """Gates of zeros weigh each of two copies by 1/2."""
    router = SigmoidRouterConfig(num_experts_per_tok=2)
    model = upcycle(smollm2[0], "sparse", router=router, gate_init="zeros", target="ext", **COUNTS)
    torch.testing.assert_close(logits(model.eval(), inputs), logits(smollm2[0], inputs), **ROUNDING)


@torch.no_grad()
def test_soft_moe_on_copies(smollm2, inputs):
    """Slots are means of tokens, which the dense block computes; tokens are means of what comes out (2308.00951)."""
    dense = smollm2[0]
    model = upcycle(dense, "sparse", router=SETTINGS["soft_moe"]("llama"), target="ext", **COUNTS).eval()
    seen = {}
    block = model.model.layers[0].mlp
    block.register_forward_hook(lambda module, args, out: seen.update(hidden=args[0], out=out))
    logits(model, inputs)
    slots = F.normalize(block.gate.moe_slots, dim=-1) * block.gate.moe_scale
    affinity = F.normalize(seen["hidden"], dim=-1) @ slots.T  # (B, S, slots)
    mixed = affinity.softmax(dim=1).transpose(1, 2) @ seen["hidden"]
    expected = affinity.softmax(dim=2) @ dense.model.layers[0].mlp(mixed)
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-4)
