"""Merging: the merged model computes what the adapters did, and what cannot be merged says why."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_moe_ext.lora.merging import merge_and_unload
from hf_moe_ext.lora.mixtures import set_adapter, stacks_of
from hf_moe_ext.modeling.moe_expert_lora import ExpertLora
from hf_moe_ext.modeling.moe_structure import iter_routers
from hf_moe_ext.patching import extend

from .helpers import logits


CLOSE = {"rtol": 1e-4, "atol": 2e-5}
MIX_LORA = {"preset": "mix_lora", "num_lora_experts": 4, "r": 3}


@torch.no_grad()
def made(name, extension):
    torch.manual_seed(0)
    model = extend(tiny_model(name), extension).eval()
    for stack in stacks_of(model).values():
        nn.init.normal_(stack.B, std=0.2)
    for module in model.modules():
        if isinstance(module, ExpertLora):
            for key, parameter in module.named_parameters():
                if key.endswith("_B"):
                    nn.init.normal_(parameter, std=0.2)
    for router in iter_routers(model):
        if router.moe_site.lora:
            nn.init.normal_(router.weight)
    return model


STOCK = {"llama": "MixtralForCausalLM", "qwen2": "Qwen2MoeForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}


@pytest.mark.parametrize("name", STOCK)
def test_mix_lora_becomes_a_stock_moe(name, tmp_path):
    model = made(name, {"lora_experts": MIX_LORA})
    wanted, stock = logits(model, name), logits(tiny_model(name), name)
    merged = merge_and_unload(model, into="moe")
    assert type(merged).__name__ == STOCK[name] and (wanted - stock).abs().max() > 0.1
    torch.testing.assert_close(logits(merged, name), wanted, **CLOSE)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__ == STOCK[name]
    torch.testing.assert_close(logits(again, name), wanted, **CLOSE)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "arcee"])
def test_mix_lora_becomes_a_moe_of_ours_where_no_stock_one_fits(name):
    lora = {**MIX_LORA, "unrouted_modules": ["o_proj"] if name != "gpt2" else ["c_attn"]}
    model = made(name, {"lora_experts": lora})
    wanted = logits(model, name)
    merged = merge_and_unload(model, into="moe")
    assert type(merged).__name__.startswith("MoeExt")
    torch.testing.assert_close(logits(merged, name), wanted, **CLOSE)


def test_a_router_of_the_zoo_and_a_layer_without_adapters_stay():
    lora = {**MIX_LORA, "router": {"type": "top_p", "threshold": 0.9, "renormalize": True}}
    model = made("llama", {"lora_experts": lora, "layers": {"1": None}})
    wanted = logits(model)
    merged = merge_and_unload(model, into="moe")
    assert [type(layer.mlp).__name__ for layer in merged.model.layers] == ["MoeExtBlock", "LlamaMLP", "MoeExtBlock"]
    torch.testing.assert_close(logits(merged), wanted, **CLOSE)


def test_all_experts_of_a_token():
    model = made("llama", {"lora_experts": {**MIX_LORA, "num_experts_per_tok": None}})
    wanted = logits(model)
    merged = merge_and_unload(model, into="moe")
    assert merged.config.num_experts_per_tok == 4
    torch.testing.assert_close(logits(merged), wanted, **CLOSE)


@pytest.mark.parametrize("preset", ["mix_lora", "lora_moe"])
def test_one_active_adapter_folds_into_the_dense_model(preset):
    model = made("llama", {"lora_experts": {"preset": preset, "num_lora_experts": 3}})
    set_adapter(model, "1")
    wanted = logits(model)
    merged = merge_and_unload(model)
    assert merged is model and type(merged).__name__ == "LlamaForCausalLM" and not hasattr(merged.config, "moe_ext")
    torch.testing.assert_close(logits(merged), wanted, **CLOSE)
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_single_adapters_fold():
    model = made("gpt2", {"lora_experts": {"num_lora_experts": 1, "target_modules": ["c_attn", "c_fc"]}})
    wanted = logits(model, "gpt2")
    torch.testing.assert_close(logits(merge_and_unload(model), "gpt2"), wanted, **CLOSE)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_adapters_on_routed_experts_fold(name):
    model = made(name, {"expert_lora": {"r": [1, 2, 3, 4, 4, 3, 2, 1], "use_rslora": True}})
    wanted = logits(model, name)
    merged = merge_and_unload(model)
    assert not type(merged).__name__.startswith("MoeExt")
    torch.testing.assert_close(logits(merged, name), wanted, **CLOSE)


def test_the_rest_of_an_extension_stays():
    router = {"type": "noisy_top_k"}
    model = made("mixtral", {"router": router, "expert_lora": {}, "shared_experts": {}})
    for gate in iter_routers(model):
        nn.init.normal_(gate.moe_noise_weight) if hasattr(gate, "moe_noise_weight") else None
    before = {name: t.clone() for name, t in model.state_dict().items() if "moe_" in name and "moe_lora" not in name}
    wanted = logits(model, "mixtral")
    merged = merge_and_unload(model)
    assert merged.config.moe_ext == {"version": 1, "router": router, "shared_experts": {}}
    assert before and all(torch.equal(merged.state_dict()[name], tensor) for name, tensor in before.items())
    torch.testing.assert_close(logits(merged, "mixtral"), wanted, **CLOSE)


REFUSED = {
    "tokens": ({"lora_experts": "lora_moe"}, "base", "mixed by a router, token by token"),
    "projections": ({"lora_experts": "lora_moe"}, "moe", "experts of whole feed-forward blocks"),
    "sequences": ({"lora_experts": {**MIX_LORA, "routing": "sequence"}}, "moe", "needs routing by token"),
    "counts": (
        {"lora_experts": {**MIX_LORA, "num_lora_experts": [2, 3, 4]}},
        "moe",
        r"different numbers.*\[2, 3, 4\]",
    ),
    "name": ({"lora_experts": MIX_LORA}, "stock", '`into` must be "base" or "moe"'),
}


@pytest.mark.parametrize(("extension", "into", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_merge(extension, into, message):
    model = made("llama", extension)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        merge_and_unload(model, into=into)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_adapters():
    with pytest.raises(ValueError, match="has no adapters of this package"):
        merge_and_unload(tiny_model("llama"))
