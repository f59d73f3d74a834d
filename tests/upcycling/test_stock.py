"""Stock targets: exact, complete, loadable without this package; and a reason where there is none."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_moe_ext.modeling.moe_families import get_family
from hf_moe_ext.upcycling import upcycle, upcycle_checkpoint
from hf_moe_ext.upcycling.safetensors_io import SafetensorsFolder
from hf_moe_ext.upcycling.stock_targets import STOCK_TARGETS
from tests.tiny_models import DENSE_NAMES, tiny_inputs, tiny_model


STOCK = {
    "llama": "MixtralForCausalLM",
    "mistral": "MixtralForCausalLM",
    "qwen2": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
    "olmo2": "FlexOlmoForCausalLM",
    "granite": "GraniteMoeForCausalLM",
}
# In a bare process: load, say what was loaded, compare the logits.
LOAD = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, data = sys.argv[1:]
data = load_file(data)
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
reference = data.pop("reference")
with torch.no_grad():
    difference = (model(**data).logits - reference).abs().max().item()
keys = {name: sorted(keys) for name, keys in info.items() if keys}
print(json.dumps({"class": type(model).__name__, "difference": difference, "info": keys,
                  "plugin": any(name.startswith("hf_moe_ext") for name in sys.modules)}))
"""


def run(model, name):
    with torch.no_grad():
        return model(**tiny_inputs(name)).logits


def test_the_table_and_the_family_records_agree():
    told = {name: family.stock_moe for name in DENSE_NAMES if (family := get_family(name)).stock_moe}
    assert set(told) == set(STOCK) and set(told.values()) <= set(STOCK_TARGETS)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("how", ["saved", "streamed"])
def test_it_loads_without_the_package_and_computes_the_dense_function(name, how, tmp_path, plugin_free_python):
    dense = tiny_model(name)
    if how == "saved":
        model = upcycle(dense, num_experts=4, target="stock")
        assert model.upcycle_report.preserves_function
        model.save_pretrained(tmp_path / "moe")
    else:
        dense.save_pretrained(tmp_path / "dense")
        report = upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", num_experts=4, target="stock")
        assert report.preserves_function and report.measured == "blocks"
    save_file({**tiny_inputs(name), "reference": run(dense, name)}, tmp_path / "data.safetensors")
    done = plugin_free_python(LOAD, tmp_path / "moe", tmp_path / "data.safetensors")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["class"] == STOCK[name] and not found["plugin"] and found["info"] == {}
    # float32 rounding, as in test_families
    assert found["difference"] < 1e-5


def test_the_files_have_the_names_that_other_engines_expect(tmp_path):
    model = upcycle(tiny_model("llama"), num_experts=4, target="stock")
    model.save_pretrained(tmp_path)
    names = SafetensorsFolder(tmp_path).infos
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names


@pytest.mark.parametrize("method", ["sparse", "granular", "drop"])
def test_auto_is_stock_where_that_is_possible(method):
    model = upcycle(tiny_model("llama"), method, num_experts=4)
    assert type(model).__name__ == "MixtralForCausalLM" and model.upcycle_report.target == "stock"
    assert model.upcycle_report.router is None
    assert model.upcycle_report.preserves_function == (method != "drop")
    if method == "granular":
        assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (8, 4)
        assert model.config.intermediate_size == 24


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("llama", {"router": {"type": "top_k"}}, id="router"),
        pytest.param("llama", {"layers": [0]}, id="layers"),
        pytest.param("llama", {"inplace": True}, id="inplace"),
        pytest.param("gemma", {}, id="no_stock_family"),
    ],
)
def test_auto_is_ours_where_it_is_not(name, options):
    assert upcycle(tiny_model(name), num_experts=4, **options).upcycle_report.target == "ext"


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_layers_stay_dense_where_the_stock_family_can_say_so(name):
    dense = tiny_model(name)
    model = upcycle(dense, num_experts=4, layers=[1], target="stock")
    assert model.config.mlp_only_layers == [0, 2]
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [False, True, False]
    assert (run(model, name) - run(dense, name)).abs().max() < 1e-5


def test_a_shared_expert_adds_nothing_and_can_learn():
    model = upcycle(tiny_model("qwen2"), num_experts=4, target="stock")
    shared = model.model.layers[0].mlp.shared_expert
    assert not shared.down_proj.weight.any() and shared.up_proj.weight.any() and shared.gate_proj.weight.any()
    model(**tiny_inputs("qwen2")).logits.square().mean().backward()
    assert shared.down_proj.weight.grad.any()


@pytest.mark.parametrize(
    ("name", "overrides", "options", "match"),
    [
        pytest.param("llama", {"attention_bias": True}, {}, "mixtral.*`attention_bias=True`", id="attention_bias"),
        pytest.param("llama", {"mlp_bias": True}, {}, "no biases in its experts", id="mlp_bias"),
        pytest.param("llama", {}, {"layers": [0, 2]}, r"some layers dense \(here \[1\]\)", id="layers"),
        pytest.param("gemma", {}, {}, "no stock .* matches gemma", id="family"),
        pytest.param("qwen3", {"use_sliding_window": True}, {}, "`use_sliding_window=True`", id="sliding"),
    ],
)
def test_what_it_cannot_say_is_refused_with_the_reason(name, overrides, options, match):
    with pytest.raises(ValueError, match=rf'`target="stock"` is not possible here: .*{match}.*Use `target="ext"`'):
        upcycle(tiny_model(name, **overrides), target="stock", **options)
    assert upcycle(tiny_model(name, **overrides), **options).upcycle_report.preserves_function


def test_a_head_without_counterpart_is_refused():
    from transformers import LlamaForQuestionAnswering, T5ForConditionalGeneration  # noqa: F401
    from transformers.models.olmo2.modeling_olmo2 import Olmo2ForSequenceClassification

    config = tiny_model("olmo2").config
    with pytest.raises(ValueError, match="no class FlexOlmoForSequenceClassification"):
        upcycle(Olmo2ForSequenceClassification(config), target="stock")


@pytest.mark.parametrize("router", ["top_k", {"type": "top_p"}])
def test_a_declared_router_is_refused(router):
    with pytest.raises(ValueError, match="cannot hold a declared router"):
        upcycle(tiny_model("llama"), target="stock", router=router)


def test_rope_scaling_head_size_and_window_are_carried_over():
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1234.0}
    overrides = {"rope_parameters": rope, "head_dim": 16, "sliding_window": 3, "rms_norm_eps": 1e-3}
    dense = tiny_model("mistral", **overrides)
    model = upcycle(dense, num_experts=4, target="stock")
    assert (run(model, "mistral") - run(dense, "mistral")).abs().max() < 1e-5
    for name, value in overrides.items():
        assert getattr(model.config, name) == getattr(dense.config, name), (name, value)


def test_labels_of_a_classifier_are_carried_over():
    from transformers import LlamaForSequenceClassification

    config = tiny_model("llama").config
    config.id2label, config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    dense = LlamaForSequenceClassification(config).eval()
    model = upcycle(dense, num_experts=4, target="stock")
    assert type(model).__name__ == "MixtralForSequenceClassification" and model.config.num_labels == 3
    assert model.config.id2label == config.id2label and model.upcycle_report.preserves_function
