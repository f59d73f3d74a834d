"""Mixtures of PEFT's adapters: against PEFT itself, token by token; in, out, grown, narrowed, saved."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from hf_moe_ext.lora.mixtures import (
    active_adapters,
    add_adapter,
    disable_adapter,
    mix_adapters,
    route_tasks,
    set_adapter,
    stacks_of,
)
from hf_moe_ext.lora.peft_files import read_adapter
from hf_moe_ext.lora.saving import export_adapters, load_adapters, save_adapters
from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension
from hf_moe_ext.modeling.moe_structure import iter_routers
from hf_moe_ext.patching import extend

from .helpers import logits, saved_adapter


CLOSE = {"rtol": 1e-4, "atol": 1e-5}

ADAPTERS = {
    "plain": {},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.self_attn.v_proj": 17}},
}


@pytest.fixture
def bank(tmp_path):
    """Three adapters of different ranks and factors, and what PEFT computes with each."""
    folders = {name: tmp_path / name for name in ADAPTERS}
    return folders, {name: saved_adapter(folders[name], seed, **ADAPTERS[name]) for seed, name in enumerate(folders)}


@torch.no_grad()
def randomize_gates(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for router in iter_routers(model):
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    return model


# --- in ---


def test_each_adapter_alone_is_what_peft_computes(bank):
    folders, wanted = bank
    model = mix_adapters(tiny_model("llama"), list(folders.values()), num_experts_per_tok=2)
    for name, found in wanted.items():
        set_adapter(model, name)
        assert active_adapters(model) == [name]
        torch.testing.assert_close(logits(model), found, **CLOSE)
    set_adapter(model, None)
    assert active_adapters(model) == list(ADAPTERS)
    with disable_adapter(model):
        assert torch.equal(logits(model), logits(tiny_model("llama"))) and active_adapters(model) == []
    assert (logits(model) - logits(tiny_model("llama"))).abs().max() > 0.1


def test_the_mixture_is_a_loop_over_adapters_of_peft(bank):
    """Each projection: top-2 of a softmax, times what PEFT's layer adds for that token with that adapter active."""
    folders, _ = bank
    model = randomize_gates(mix_adapters(tiny_model("llama"), folders, num_experts_per_tok=2))
    peft = PeftModel.from_pretrained(tiny_model("llama"), folders["plain"], adapter_name="plain")
    for name in ("rslora", "patterns"):
        peft.load_adapter(folders[name], adapter_name=name)
    for layer in range(3):
        for projection in ("q_proj", "v_proj"):
            ours = model.model.layers[layer].self_attn.get_submodule(projection)
            theirs = peft.base_model.model.model.layers[layer].self_attn.get_submodule(projection)
            for token in torch.randn(5, 32):
                gate = ours.moe_lora_gate.weight @ token
                best = gate.argsort(descending=True)[:2]
                wanted = theirs.base_layer(token)
                for weight, expert in zip(gate[best].softmax(-1), best.tolist(), strict=True):
                    peft.set_adapter(list(ADAPTERS)[expert])
                    wanted = wanted + weight * (theirs(token) - theirs.base_layer(token))
                with torch.no_grad():
                    torch.testing.assert_close(ours(token), wanted, **CLOSE)


def test_copies_of_an_adapter_are_that_adapter(bank):
    folders, wanted = bank
    copies = {f"copy{i}": folders["rslora"] for i in range(3)}
    model = randomize_gates(mix_adapters(tiny_model("llama"), copies, num_experts_per_tok=2))
    torch.testing.assert_close(logits(model), wanted["rslora"], **CLOSE)


def test_zero_gates_give_the_mean(bank):
    folders, _ = bank
    model = mix_adapters(tiny_model("llama"), folders, init_router="zeros")
    dense = tiny_model("llama")
    with torch.no_grad():
        for folder in folders.values():
            adapter = read_adapter(folder)
            for path in adapter.pairs:
                dense.get_submodule(path).weight += adapter.delta(path) / 3
    torch.testing.assert_close(logits(model), logits(dense), **CLOSE)


def test_layers_that_one_adapter_lacks(tmp_path):
    wanted = {
        "a": saved_adapter(tmp_path / "a", 0, target_modules=["q_proj"], layers_to_transform=[0, 2]),
        "b": saved_adapter(tmp_path / "b", 1, target_modules=["q_proj", "up_proj"], r=7),
    }
    model = mix_adapters(tiny_model("llama"), {name: tmp_path / name for name in wanted})
    for name, found in wanted.items():
        set_adapter(model, name)
        torch.testing.assert_close(logits(model), found, **CLOSE)
    export_adapters(model, tmp_path / "out")
    assert set(read_adapter(tmp_path / "out" / "a").pairs) == set(read_adapter(tmp_path / "a").pairs)
    set_adapter(model, None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(**tiny_inputs("llama")).logits.sum().backward()
        optimizer.step()
    stack = stacks_of(model)["model.layers.1.self_attn.q_proj"]
    assert not stack.A[0].any() and not stack.B[0].any() and stack.B[1].any()


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_other_families(name, tmp_path):
    targets = {"gpt2": ["c_attn", "c_fc"], "qwen2": ["q_proj", "down_proj"]}[name]
    wanted = [
        saved_adapter(tmp_path / str(i), i, name, target_modules=targets, fan_in_fan_out=name == "gpt2")
        for i in (0, 1)
    ]
    model = mix_adapters(tiny_model(name), [tmp_path / "0", tmp_path / "1"])
    for i, found in enumerate(wanted):
        set_adapter(model, str(i))
        torch.testing.assert_close(logits(model, name), found, **CLOSE)
    export_adapters(model, tmp_path / "out")
    again = PeftModel.from_pretrained(tiny_model(name), tmp_path / "out" / "1").eval()
    torch.testing.assert_close(logits(again, name), wanted[1], **CLOSE)


# --- out ---


def test_exported_adapters_are_the_imported_ones(bank, tmp_path):
    folders, wanted = bank
    model = mix_adapters(tiny_model("llama"), folders)
    written = export_adapters(model, tmp_path / "out")
    assert [path.name for path in written] == list(ADAPTERS)
    for path in written:
        old, new = read_adapter(folders[path.name]), read_adapter(path)
        assert old.scales == pytest.approx(new.scales) and old.pairs.keys() == new.pairs.keys()
        for key, (a, b) in old.pairs.items():
            assert torch.equal(a, new.pairs[key][0]) and torch.equal(b, new.pairs[key][1])
        again = PeftModel.from_pretrained(tiny_model("llama"), path).eval()
        torch.testing.assert_close(logits(again), wanted[path.name], **CLOSE)
    with pytest.raises(FileExistsError):
        export_adapters(model, tmp_path / "out")
    assert export_adapters(model, tmp_path / "out", names=["plain"], overwrite=True) == [tmp_path / "out" / "plain"]


@pytest.mark.parametrize("preset", ["mix_lora", "lora_moe"])
def test_experts_of_a_preset_are_exported_with_what_has_no_router(preset, tmp_path):
    model = extend(tiny_model("llama"), {"lora_experts": {"preset": preset, "num_lora_experts": 3}}).eval()
    with torch.no_grad():
        for stack in stacks_of(model).values():
            nn.init.normal_(stack.B, std=0.1)
    for path in export_adapters(model, tmp_path / "out"):
        set_adapter(model, path.name)
        again = PeftModel.from_pretrained(tiny_model("llama"), path).eval()
        torch.testing.assert_close(logits(again), logits(model), **CLOSE)


def test_ranks_by_layer_are_exported_as_patterns(tmp_path):
    model = extend(tiny_model("llama"), {"lora_experts": {"num_lora_experts": 2, "r": [2, 4, 3]}}).eval()
    with torch.no_grad():
        for stack in stacks_of(model).values():
            nn.init.normal_(stack.B, std=0.1)
    export_adapters(model, tmp_path / "out")
    set_adapter(model, "1")
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "out" / "1").eval()
    torch.testing.assert_close(logits(again), logits(model), **CLOSE)


def test_saved_and_loaded_apart_from_the_base(bank, tmp_path):
    folders, _ = bank
    model = randomize_gates(mix_adapters(tiny_model("llama"), folders, num_experts_per_tok=2))
    save_adapters(model, tmp_path / "small")
    size = sum(path.stat().st_size for path in (tmp_path / "small").iterdir())
    model.save_pretrained(tmp_path / "whole")
    assert size < 0.5 * (tmp_path / "whole" / "model.safetensors").stat().st_size
    again = load_adapters(tiny_model("llama"), tmp_path / "small")
    assert torch.equal(logits(again), logits(model)) and again.config.moe_ext == model.config.moe_ext


# --- grown ---


def test_an_adapter_is_added(bank):
    folders, wanted = bank
    model = tiny_model("llama")
    add_adapter(model, folders["plain"])
    torch.testing.assert_close(logits(model), wanted["plain"], **CLOSE)  # one expert needs no router
    add_adapter(model, folders["rslora"])
    randomize_gates(model)
    before = {router.moe_site.key: router.weight.detach().clone() for router in iter_routers(model)}
    add_adapter(model, folders["patterns"], "third")
    assert active_adapters(model) == ["plain", "rslora", "third"]
    for router in iter_routers(model):
        assert torch.equal(router.weight[:2], before[router.moe_site.key]) and router.weight.shape[0] == 3
    for name, found in (("plain", "plain"), ("rslora", "rslora"), ("third", "patterns")):
        set_adapter(model, name)
        torch.testing.assert_close(logits(model), wanted[found], **CLOSE)
    add_adapter(model, name="new", r=9)
    set_adapter(model, "new")
    torch.testing.assert_close(logits(model), logits(tiny_model("llama")), **CLOSE)
    set_adapter(model, "rslora")
    torch.testing.assert_close(logits(model), wanted["rslora"], **CLOSE)


def test_an_adapter_joins_a_declared_mixture(tmp_path):
    wanted = saved_adapter(tmp_path / "a", target_modules=["up_proj", "down_proj", "gate_proj"])
    model = extend(tiny_model("llama"), {"router": None, "lora_experts": {"num_lora_experts": 2}}).eval()
    with torch.no_grad():
        for stack in stacks_of(model).values():
            nn.init.normal_(stack.B, std=0.1)
    set_adapter(model, "1")
    before = logits(model)
    set_adapter(model, None)
    add_adapter(model, tmp_path / "a")
    set_adapter(model, "1")
    torch.testing.assert_close(logits(model), before, **CLOSE)
    set_adapter(model, "a")
    torch.testing.assert_close(logits(model), wanted, **CLOSE)


def test_tasks_of_a_generation(bank):
    folders, _ = bank
    model = mix_adapters(tiny_model("llama"), folders, routing="task", num_tasks=3, num_experts_per_tok=1)
    with torch.no_grad():
        for router in iter_routers(model):
            router.weight.copy_(10 * torch.eye(3))
    ids, options = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for task, name in enumerate(ADAPTERS):
        with route_tasks(model, [task]):
            by_task = model.generate(ids, num_beams=2, **options)
        set_adapter(model, name)
        assert torch.equal(by_task, model.generate(ids, num_beams=2, **options))
        set_adapter(model, None)


# --- bad input ---


def corrupt(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


BAD_CONFIGS = {
    "no_lora": ({"peft_type": "IA3"}, "describes a 'IA3' adapter"),
    "rank": ({"r": 0}, "`r` must be a positive number"),
    "other_rank": ({"r": 4}, "its config says rank 4"),
    "dora": ({"use_dora": True}, "use_dora.*cannot hold"),
    "bias": ({"bias": "all"}, "bias.*cannot hold"),
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save.*cannot hold"),
    "experts": ({"target_parameters": ["experts.down_proj"]}, "on stacked experts"),
    "regex": ({"alpha_pattern": {"(a+)+b": 3}}, "is a regular expression"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs(changes, message, tmp_path):
    saved_adapter(tmp_path / "a")
    corrupt(tmp_path / "a", **changes)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        mix_adapters(model, [tmp_path / "a"])
    assert type(model).__name__ == "LlamaForCausalLM"


def test_bad_files(tmp_path, caplog):
    saved_adapter(tmp_path / "a")
    model = tiny_model("llama")
    with pytest.raises(FileNotFoundError, match="no adapter of PEFT"):
        mix_adapters(model, [tmp_path])
    with pytest.raises(TypeError, match="must be several folders"):
        mix_adapters(model, str(tmp_path / "a"))
    with pytest.raises(ValueError, match="give them different names"):
        mix_adapters(model, [tmp_path / "a", tmp_path / "a"])
    with pytest.raises(ValueError, match="for another model.*from 32 to"):
        mix_adapters(tiny_model("llama", num_attention_heads=8), [tmp_path / "a"])
    with pytest.raises(ValueError, match="has no such linear layer"):
        mix_adapters(tiny_model("llama", num_hidden_layers=2), [tmp_path / "a"])
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(2)}, weights)
    with pytest.raises(ValueError, match="has the tensor `base_model.model.lm_head.weight`"):
        mix_adapters(model, [tmp_path / "a"])
    save_file({key: t for key, t in tensors.items() if "layers.0.self_attn.q_proj.lora_B" not in key}, weights)
    with pytest.raises(ValueError, match="and not the other matrix"):
        mix_adapters(model, [tmp_path / "a"])
    weights.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        mix_adapters(model, [tmp_path / "a"])
    weights.rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle runs code"):
        mix_adapters(model, [tmp_path / "a"])


def test_another_base_is_said(tmp_path, caplog):
    saved_adapter(tmp_path / "a")
    corrupt(tmp_path / "a", base_model_name_or_path="someone/else")
    model = tiny_model("llama")
    model.config._name_or_path = "me/mine"
    import logging

    logger = logging.getLogger("transformers")
    logger.propagate = True
    with caplog.at_level("WARNING"):
        mix_adapters(model, [tmp_path / "a"])
    assert "trained on `someone/else`, and this model is `me/mine`" in caplog.text


def test_what_does_not_fit_a_mixture(bank, tmp_path):
    folders, _ = bank
    stock = tiny_model("llama")
    for function in (lambda: set_adapter(stock, "a"), lambda: active_adapters(stock)):
        with pytest.raises(ValueError, match="has no adapters of this package"):
            function()
    model = mix_adapters(stock, folders)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"has no adapters \['other'\]"):
        set_adapter(model, "other")
    with pytest.raises(ValueError, match="has an adapter `plain` already"):
        add_adapter(model, folders["plain"])
    with pytest.raises(ValueError, match="a new adapter needs a `name`"):
        add_adapter(model)
    saved_adapter(tmp_path / "up", target_modules=["up_proj"])
    with pytest.raises(ValueError, match="where the mixture has no experts"):
        add_adapter(model, tmp_path / "up")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match="moe_adapters.json"):
        load_adapters(tiny_model("llama"), tmp_path)
    save_adapters(model, tmp_path / "small")
    with pytest.raises(ValueError, match="for a llama model, this is a qwen2"):
        load_adapters(tiny_model("qwen2"), tmp_path / "small")
    fresh = tiny_model("llama", num_attention_heads=8)
    with pytest.raises(ValueError, match="do not fit this model"):
        load_adapters(fresh, tmp_path / "small")
    assert type(fresh).__name__ == "LlamaForCausalLM"
    declared = MoeExtension.from_dict(model.config.moe_ext)
    mola = extend(tiny_model("llama"), {"lora_experts": {"num_lora_experts": [1, 2, 3]}})
    with pytest.raises(ValueError, match="these differ by layer"):
        add_adapter(mola, name="x")
    assert declared.lora_experts.num_lora_experts == 3
