"""Every dense family: the upcycled model computes what the dense model computes, and saves, loads and trains."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_moe_ext as moe
from hf_moe_ext.modeling.moe_experts import MoeExtBlock
from hf_moe_ext.modeling.moe_structure import created_blocks
from hf_moe_ext.upcycling import load_upcycled, upcycle, upcycle_checkpoint
from tests.tiny_models import DENSE_NAMES, tiny_inputs, tiny_model


# Rounding of float32 (6e-8) through three layers of sums over about 50 products, on logits of size 1 to 5.
TOLERANCE = 1e-5
ROUTERS = [
    pytest.param(None, id="default"),
    pytest.param({"type": "top_p", "threshold": 0.4, "renormalize": True}, id="top_p"),
]


def run(model, name):
    with torch.no_grad():
        return model(**tiny_inputs(name)).logits


@pytest.mark.parametrize("name", DENSE_NAMES)
@pytest.mark.parametrize("router", ROUTERS)
def test_copies_compute_the_dense_function(name, router):
    dense = tiny_model(name)
    reference = run(dense, name)
    state = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    model = upcycle(dense, num_experts=4, router=router, target="ext")
    assert (run(model, name) - reference).abs().max() < TOLERANCE
    assert len(created_blocks(model)) == len(model.upcycle_report.layers)
    assert model.upcycle_report.preserves_function and model.upcycle_report.relative_error < TOLERANCE
    # the source is as it was, and shares nothing with the result
    assert type(dense).__name__ == model.upcycle_report.source_class
    assert all(torch.equal(tensor, state[key]) for key, tensor in dense.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(dense, name), reference)


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_slices_compute_the_dense_function(name):
    dense = tiny_model(name)
    model = upcycle(dense, "granular", num_experts=3, num_experts_per_tok=2, granularity=4, target="ext")
    assert (run(model, name) - run(dense, name)).abs().max() < TOLERANCE
    block, whole = created_blocks(model)[0], created_blocks(upcycle(dense, target="ext", check=False))[0]
    assert block.experts.num_experts == 12 and block.gate.top_k == 8
    assert 4 * block.experts.intermediate_dim == whole.experts.intermediate_dim


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_a_saved_model_loads_to_the_same_logits(name, tmp_path):
    dense = tiny_model(name)
    keys = ["encoder.1", "decoder.1"] if dense.config.is_encoder_decoder else [1]
    model = upcycle(dense, "drop", num_experts=4, layers=keys, router="top_p", check=False)
    reference = run(model, name)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(run(again, name), reference)


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_every_way_of_converting_gives_the_same_tensors(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    options = {"num_experts": 3, "seed": 5, "target": "ext", "drop_ratio": 0.3}
    live = upcycle(tmp_path / "dense", "drop", **options)
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "streamed", "drop", **options, max_shard_size="30KB")
    streamed, info = type(live).from_pretrained(tmp_path / "streamed", output_loading_info=True)
    loaded = load_upcycled(tmp_path / "dense", "drop", **options, device_map="auto")
    assert not any(info.values()), info
    assert type(loaded) is type(live)
    expected = live.state_dict()
    for other in (streamed.state_dict(), loaded.state_dict()):
        assert expected.keys() == other.keys()
        assert [key for key in expected if not torch.equal(expected[key], other[key])] == []


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_bf16_stays_bf16_and_close(name):
    dense = tiny_model(name).bfloat16()
    inputs = {key: x.bfloat16() if x.is_floating_point() else x for key, x in tiny_inputs(name).items()}
    model = upcycle(dense, num_experts=4, target="ext", check=inputs)
    kept = {key: tensor.dtype for key, tensor in dense.state_dict().items()}
    assert all(tensor.dtype == kept.get(key, torch.bfloat16) for key, tensor in model.state_dict().items())
    # 8 bits of mantissa; the reordered sums of three layers move a logit by a few units of the last place
    assert model.upcycle_report.relative_error < 0.03
    assert model.upcycle_report.preserves_function


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_experts_and_gates_get_gradients(name):
    model = upcycle(tiny_model(name), "drop", num_experts=3, num_experts_per_tok=3, target="ext", check=False)
    model(**tiny_inputs(name)).logits.square().mean().backward()
    for block in created_blocks(model):
        for parameter in block.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt", "t5"])
def test_in_place_the_object_is_kept(name):
    dense = tiny_model(name)
    reference = run(dense, name)
    embeddings = dense.get_input_embeddings().weight
    model = upcycle(dense, num_experts=4, inplace=True)
    assert model is dense and model.get_input_embeddings().weight is embeddings
    assert type(model).__name__.startswith("MoeExt")
    assert (run(model, name) - reference).abs().max() < TOLERANCE


def test_gradients_of_untouched_parameters_equal_the_dense_ones():
    """Weights that sum to one whatever the router does: nothing flows back through it."""
    dense = tiny_model("llama")
    model = upcycle(dense, num_experts=4, target="ext", check=False)
    inputs = tiny_inputs("llama")
    for each in (dense, model):
        each(**inputs).logits.square().mean().backward()
    name = "model.layers.0.self_attn.q_proj.weight"
    gradient, reference = (each.get_parameter(name).grad for each in (model, dense))
    assert (gradient - reference).norm() < 1e-5 * reference.norm()


def test_tied_weights_generation_config_modes_and_flags_are_kept():
    dense = tiny_model("llama", tie_word_embeddings=True)
    dense.generation_config.temperature = 0.3
    dense.config.custom_field = [1, 2]
    dense.train()
    dense.model.layers[1].eval()
    dense.model.embed_tokens.weight.requires_grad = False
    dense.model.layers[0].mlp.requires_grad_(False)
    dense.model.layers[1].mlp.up_proj.requires_grad_(False)
    modes = [module.training for module in dense.modules()]
    for target in ("ext", "stock"):
        model = upcycle(dense, num_experts=3, target=target)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.data_ptr() != dense.lm_head.weight.data_ptr()
        assert model.generation_config.temperature == 0.3 and model.training
        assert [module.training for module in dense.modules()] == modes
        assert not model.model.embed_tokens.weight.requires_grad
        frozen = [not layer.mlp.experts.gate_up_proj.requires_grad for layer in model.model.layers]
        assert frozen == [True, False, False] and model.model.layers[0].mlp.gate.weight.requires_grad
    model = upcycle(dense, num_experts=3, target="ext")
    assert model.config.custom_field == [1, 2] and not model.model.layers[1].training


def test_each_layer_is_converted_or_stays_dense_as_asked():
    dense = tiny_model("llama")
    model = upcycle(dense, num_experts=4, layers="every:2:1")
    kinds = [isinstance(layer.mlp, MoeExtBlock) for layer in model.model.layers]
    assert kinds == [False, True, False]
    assert model.config.moe_ext["layers"] == {"0": None, "2": None}
    assert model.upcycle_report.layers == ["1"] and model.upcycle_report.dense_layers == ["0", "2"]


def test_parameter_counts_are_told():
    dense = tiny_model("llama")
    size = sum(p.numel() for p in dense.parameters())
    block = sum(p.numel() for p in dense.model.layers[0].mlp.parameters())
    gate = 32 * 8
    copies = upcycle(dense, num_experts=8, num_experts_per_tok=2, target="ext").upcycle_report
    assert copies.parameters_before == size
    assert copies.parameters_after == size + 3 * (7 * block + gate)
    assert copies.active_parameters == size + 3 * (block + gate)
    split = upcycle(
        dense, "granular", num_experts=1, num_experts_per_tok=1, granularity=8, target="ext"
    ).upcycle_report
    assert split.parameters_after == size + 3 * gate


def test_a_spread_scale_knows_squared_relu():
    assert upcycle(tiny_model("nemotron"), "granular", scale_mode="spread").upcycle_report.relative_error < TOLERANCE
    assert upcycle(tiny_model("llama"), "granular", scale_mode="spread").upcycle_report.relative_error > 1e-3


def test_layers_draw_different_numbers():
    dense = tiny_model("llama")
    dense.model.layers[1].mlp.load_state_dict(dense.model.layers[0].mlp.state_dict())
    model = upcycle(dense, "drop", num_experts=2, drop_ratio=0.0, target="ext")
    first, second = (block.experts.down_proj for block in created_blocks(model)[:2])
    assert not torch.equal(first, second)


def test_a_base_model_can_be_upcycled():
    dense = tiny_model("llama").model
    inputs = tiny_inputs("llama")
    for target in ("ext", "stock"):
        model = upcycle(dense, num_experts=4, target=target)
        with torch.no_grad():
            difference = model(**inputs).last_hidden_state - dense(**inputs).last_hidden_state
        assert difference.abs().max() < TOLERANCE
        assert model.upcycle_report.measured == "hidden states"


def test_the_result_is_extended_and_described():
    model = moe.upcycle(tiny_model("qwen3"), num_experts=4, router=moe.TopPRouterConfig(renormalize=True))
    text = str(moe.describe(model))
    assert "top_p" in text and "MoeExtQwen3ForCausalLM" in text
    assert copy.deepcopy(model).upcycle_report.to_dict() == model.upcycle_report.to_dict()
