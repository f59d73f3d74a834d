"""Upcycling while loading. That every family gets the tensors of `upcycle` is in test_families and test_stock."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping

from hf_moe_ext.modeling.modeling_moe_ext import extended_class
from hf_moe_ext.upcycling import load_upcycled, upcycle
from tests.tiny_models import tiny_inputs, tiny_model
from tests.upcycling.routers import register_random_router


@pytest.fixture
def dense_folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def run(model, name="llama"):
    with torch.no_grad():
        return model(**tiny_inputs(name)).logits


@pytest.mark.parametrize("target", ["ext", "stock"])
def test_it_computes_the_dense_function_saves_and_loads_again(dense_folder, tmp_path, target):
    reference = run(tiny_model("llama"))
    model = load_upcycled(dense_folder, num_experts=4, target=target)
    # float32 rounding, as in test_families
    assert (run(model) - reference).abs().max() < 1e-5
    assert model.upcycle_report.target == target and model.upcycle_report.preserves_function is None
    model.save_pretrained(tmp_path / "moe")
    again, info = type(model).from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(run(again), run(model))
    again.save_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(tmp_path / "moe" / "model.safetensors").keys()
    )


def test_the_class_is_the_usual_one_and_its_conversions_are_untouched(dense_folder):
    model = load_upcycled(dense_folder, num_experts=4, target="stock")
    assert type(model).__name__ == "MixtralForCausalLM" and type(model).__module__.startswith("transformers.")
    usual = conversion_mapping.get_checkpoint_conversion_mapping("mixtral")
    assert [type(entry) for entry in usual] and all(
        "mlp.gate_proj" not in pattern for entry in usual for pattern in entry.source_patterns
    )
    assert conversion_mapping.get_checkpoint_conversion_mapping("MixtralForCausalLMFromDense") == []
    model = load_upcycled(dense_folder, num_experts=4, target="ext")
    assert type(model) is extended_class(type(tiny_model("llama")))


@pytest.mark.parametrize(
    "device_map",
    [
        pytest.param("auto", id="auto"),
        pytest.param({"": "cpu"}, id="cpu"),
        pytest.param(
            {
                "model.embed_tokens": "cpu",
                "model.layers.0": "cpu",
                "model.layers.1": "disk",
                "model.layers.2": "disk",
                "model.norm": "cpu",
                "model.rotary_emb": "cpu",
                "lm_head": "cpu",
            },
            id="disk",
        ),
    ],
)
def test_device_maps_work(dense_folder, tmp_path, device_map):
    model = load_upcycled(
        dense_folder, num_experts=4, target="ext", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert (run(model) - run(tiny_model("llama"))).abs().max() < 1e-5


def test_options_of_the_method_and_of_loading_find_their_place(dense_folder):
    model = load_upcycled(
        dense_folder, "drop", num_experts=4, drop_ratio=0.25, layers=[1], dtype=torch.bfloat16, target="ext"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.upcycle_report.method_options == {"drop_ratio": 0.25}
    assert model.upcycle_report.layers == ["1"]
    with pytest.raises(TypeError, match="drop_rate"):
        load_upcycled(dense_folder, "drop", drop_rate=0.25)
    with pytest.raises(ValueError, match="loads unquantized"):
        load_upcycled(dense_folder, quantization_config={"load_in_8bit": True})
    with pytest.raises(ValueError, match="runs the dense model"):
        load_upcycled(dense_folder, gate_init="hidden")


@pytest.mark.parametrize(
    "router", ["top_p", {"type": "top_k", "correction_bias": True}, "random_scale"], ids=["top_p", "bias", "random"]
)
def test_routers_with_tensors_of_their_own_are_filled(dense_folder, router, poison_memory, monkeypatch):
    register_random_router(monkeypatch)
    model = load_upcycled(dense_folder, num_experts=3, router=router)
    expected = upcycle(dense_folder, num_experts=3, router=router).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_keys_without_the_prefix_of_the_base_model_are_found(name, tmp_path):
    dense = tiny_model(name)
    dense.save_pretrained(tmp_path)
    file, prefix = tmp_path / "model.safetensors", f"{dense.base_model_prefix}."
    save_file({key.removeprefix(prefix): tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    model = load_upcycled(tmp_path, num_experts=3, target="ext")
    assert (run(model, name) - run(dense, name)).abs().max() < 1e-5


def test_layer_names_that_start_alike_are_told_apart(tmp_path):
    dense = tiny_model("llama", num_hidden_layers=12)
    dense.save_pretrained(tmp_path)
    model = load_upcycled(tmp_path, "drop", num_experts=3, layers=[1], target="ext")
    expected = upcycle(dense, "drop", num_experts=3, layers=[1], target="ext").state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_the_usual_load_of_both_classes_still_works_afterwards(dense_folder, tmp_path):
    model = load_upcycled(dense_folder, num_experts=4, target="ext")
    model.save_pretrained(tmp_path / "moe")
    load_upcycled(dense_folder, num_experts=2, target="ext")
    assert torch.equal(run(type(model).from_pretrained(tmp_path / "moe")), run(model))
    assert torch.equal(run(type(tiny_model("llama")).from_pretrained(dense_folder)), run(tiny_model("llama")))
