"""A checkpoint that is damaged or not what it seems is an error that names the thing."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_moe_ext.modeling.modeling_moe_ext import extended_class
from hf_moe_ext.patching import restore
from tests.hub.models import EXTENDED, mixtral, outputs, stock_mixtral


EXPERTS = "model.layers.1.mlp.experts.down_proj"
SINGLE = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


@pytest.fixture(params=EXTENDED)
def saved(request, tmp_path):
    EXTENDED[request.param]().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def saved_llama(tmp_path):
    EXTENDED["llama"]().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def saved_mixtral(tmp_path):
    EXTENDED["mixtral"]().save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_an_unknown_router(saved):
    change_config(saved, lambda config: config["moe_ext"]["router"].update(type="top_pp"))
    with pytest.raises(ValueError, match="unknown router type `top_pp`.*Did you mean `top_p`"):
        load(saved)


def test_a_newer_format(saved):
    change_config(saved, lambda config: config["moe_ext"].update(version=9))
    with pytest.raises(ValueError, match="format version 9.*pip install -U hf-moe-ext"):
        load(saved)


def test_a_field_of_the_wrong_type(saved):
    change_config(saved, lambda config: config["moe_ext"]["router"].update(max_slots="two"))
    with pytest.raises(TypeError, match="`max_slots` of TopPRouterConfig must be int or null, got 'two'"):
        load(saved)


def test_a_stock_field_of_the_wrong_type(saved):
    change_config(saved, lambda config: config.update(hidden_size="wide"))
    with pytest.raises(StrictDataclassFieldValidationError, match="(?s)hidden_size.*expected int, got str"):
        load(saved)


def test_a_declaration_that_is_no_object(saved):
    change_config(saved, lambda config: config.update(moe_ext="top_p"))
    with pytest.raises(TypeError, match="`moe_ext` must be a JSON object, got 'top_p'"):
        load(saved)


def test_a_missing_declaration(saved):
    change_config(saved, lambda config: config.pop("moe_ext"))
    with pytest.raises(ValueError, match="has no `moe_ext`, which says how the model differs"):
        load(saved)


def test_missing_experts(saved_llama):
    change_weights(saved_llama, lambda weights: weights.pop(EXPERTS))
    for auto_class in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match="layers.1.mlp.experts.down_proj` is missing. It is incomplete, damaged"):
            auto_class.from_pretrained(saved_llama)


def test_a_missing_expert(saved_mixtral):
    change_weights(saved_mixtral, lambda weights: weights.pop(SINGLE))
    with pytest.raises(ValueError, match="single experts of `model.layers.1.mlp.experts.gate_up_proj` do not fit"):
        load(saved_mixtral)


def test_a_misshapen_expert(saved_mixtral):
    change_weights(saved_mixtral, lambda weights: weights.update({SINGLE: weights[SINGLE][:5].clone()}))
    with pytest.raises(ValueError, match="single experts of `model.layers.1.mlp.experts.gate_up_proj` do not fit"):
        load(saved_mixtral)


def test_misshapen_experts(saved_llama):
    change_weights(saved_llama, lambda weights: weights.update({EXPERTS: weights[EXPERTS][:3].clone()}))
    with pytest.raises(ValueError, match=r"down_proj` has the shape \[3, 32, 48\], the config says \[4, 32, 48\]"):
        load(saved_llama)


def test_a_missing_router(saved):
    change_weights(saved, lambda weights: weights.pop(next(key for key in weights if key.endswith("gate.weight"))))
    with pytest.raises(ValueError, match="`model.layers.0.mlp.gate.weight` is missing"):
        load(saved)


def test_a_missing_attention_weight(saved):
    change_weights(saved, lambda weights: weights.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(ValueError, match="`model.layers.1.self_attn.q_proj.weight` is missing"):
        load(saved)


def test_all_missing_weights_are_counted(saved_llama):
    change_weights(saved_llama, lambda weights: [weights.pop(key) for key in list(weights) if ".mlp." in key])
    with pytest.raises(ValueError, match="is missing, and 1 more"):
        load(saved_llama)


def test_a_new_head_is_no_missing_weight(saved):
    model, info = AutoModelForSequenceClassification.from_pretrained(saved, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}


def test_a_stock_checkpoint_may_lack_what_an_extension_adds(tmp_path):
    stock = stock_mixtral()
    stock.save_pretrained(tmp_path)
    model_class = extended_class(MixtralForCausalLM)
    values = {
        key: value for key, value in stock.config.to_dict().items() if key not in ("model_type", "architectures")
    }
    config = model_class.config_class(**values, moe_ext={"router": {"type": "top_p"}})
    change_weights(tmp_path, lambda weights: weights.pop("model.layers.1.block_sparse_moe.gate.weight"))

    _, info = model_class.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert info["missing_keys"] == {"model.layers.1.mlp.gate.weight"}


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"<html>" * 50], ids=["cut", "junk"]
)
def test_a_damaged_file(saved, damage):
    path = saved / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=f"`{path}` is damaged or incomplete"):
        load(saved)


def test_the_damaged_shard_is_named(tmp_path):
    EXTENDED["llama"]().save_pretrained(tmp_path, max_shard_size="40KB")
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(OSError, match=f"`{path}` is damaged or incomplete"):
        load(tmp_path)


def test_missing_files(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        load(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON file"):
        load(saved)


@pytest.mark.parametrize(
    ("name", "stock_class"),
    [("mixtral", MixtralForCausalLM), ("llama", LlamaForCausalLM), ("llama", LlamaModel)],
    ids=["mixtral", "llama", "base"],
)
def test_a_stock_class_refuses_an_extended_checkpoint(name, stock_class, tmp_path):
    EXTENDED[name]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hf-moe-ext .not for stock classes: load this model with an Auto class"):
        stock_class.from_pretrained(tmp_path)


def test_the_note_for_stock_classes_is_in_the_file_only(saved):
    assert json.loads((saved / "config.json").read_text())["experts_implementation"].startswith("hf-moe-ext")

    config = AutoConfig.from_pretrained(saved)
    assert config._experts_implementation is None and "experts_implementation" not in config.to_dict()
    model = AutoModelForCausalLM.from_pretrained(saved, experts_implementation="eager")
    assert model.config._experts_implementation == "eager"


def test_a_restored_model_saves_as_stock(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path / "extended")
    stock = restore(model)
    stock.save_pretrained(tmp_path / "stock")

    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["model_type"] == MixtralConfig.model_type and "experts_implementation" not in config
    assert torch.equal(outputs(MixtralForCausalLM.from_pretrained(tmp_path / "stock")), outputs(stock))
