"""Stock targets: exact, complete, loadable without this package; and a reason where there is none."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_moe_ext.modeling.moe_families import get_family
from hf_moe_ext.upcycling import load_upcycled, upcycle, upcycle_checkpoint
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
    "cohere2": "Cohere2MoeForCausalLM",
    "ernie4_5": "Ernie4_5_MoeForCausalLM",
}
# In a bare process: load each model, say what was loaded, compare the logits.
LOAD = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    data = load_file(folder / "data.safetensors")
    reference = data.pop("reference")
    model, info = AutoModelForCausalLM.from_pretrained(folder / "moe", output_loading_info=True)
    with torch.no_grad():
        difference = (model(**data).logits - reference).abs().max().item()
    found[folder.name] = [type(model).__name__, difference, {k: sorted(v) for k, v in info.items() if v}]
assert not any(name.startswith("hf_moe_ext") for name in sys.modules)
print(json.dumps(found))
"""


def run(model, name):
    with torch.no_grad():
        return model(**tiny_inputs(name)).logits


def test_the_table_and_the_family_records_agree():
    told = {name: family.stock_moe for name in DENSE_NAMES if (family := get_family(name)).stock_moe}
    assert set(told) == set(STOCK) and set(told.values()) <= set(STOCK_TARGETS)


def test_models_load_without_the_package_and_compute_the_dense_function(tmp_path, plugin_free_python):
    for name in STOCK:
        dense = tiny_model(name)
        model = upcycle(dense, num_experts=4, target="stock")
        assert model.upcycle_report.preserves_function
        model.save_pretrained(tmp_path / "all" / f"{name}-saved" / "moe")
        dense.save_pretrained(tmp_path / name)
        streamed = tmp_path / "all" / f"{name}-streamed"
        report = upcycle_checkpoint(tmp_path / name, streamed / "moe", num_experts=4, target="stock")
        assert report.preserves_function and report.measured == "blocks"
        for folder in (streamed, streamed.with_name(f"{name}-saved")):
            save_file({**tiny_inputs(name), "reference": run(dense, name)}, folder / "data.safetensors")
    done = plugin_free_python(LOAD, tmp_path / "all")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * len(STOCK)
    for folder, (class_name, difference, info) in found.items():
        assert class_name == STOCK[folder.partition("-")[0]] and info == {}, folder
        # float32 rounding, as in test_families
        assert difference < 1e-5, folder


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_way_of_converting_gives_the_same_tensors(name, dtype, tmp_path):
    tiny_model(name).to(dtype).save_pretrained(tmp_path / "dense")
    options = {"num_experts": 3, "seed": 5, "target": "stock", "drop_ratio": 0.3}
    live = upcycle(tmp_path / "dense", "drop", **options)
    live.save_pretrained(tmp_path / "saved")
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "streamed", "drop", **options)
    streamed = type(live).from_pretrained(tmp_path / "streamed", dtype="auto").state_dict()
    loaded = load_upcycled(tmp_path / "dense", "drop", **options).state_dict()
    expected = live.state_dict()
    for other in (streamed, loaded):
        assert expected.keys() == other.keys()
        assert [key for key in expected if expected[key].dtype != other[key].dtype] == []
        assert [key for key in expected if not torch.equal(expected[key], other[key])] == []
    names = [set(SafetensorsFolder(tmp_path / folder).infos) for folder in ("saved", "streamed")]
    assert names[0] == names[1]


VARIANTS = [
    pytest.param("llama", {"head_dim": 16, "tie_word_embeddings": True}, id="llama"),
    pytest.param("mistral", {"sliding_window": None}, id="mistral"),
    pytest.param("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, id="qwen2_mixed"),
    pytest.param("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, id="qwen3_all_sliding"),
    pytest.param("qwen3", {"use_sliding_window": True, "max_window_layers": 3}, id="qwen3_none_sliding"),
    pytest.param("qwen3", {"attention_bias": True}, id="qwen3_bias"),
    pytest.param("granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.4}, id="granite"),
    pytest.param("granite", {"embedding_multiplier": 2.0, "logits_scaling": 2.0}, id="granite_scaled"),
    pytest.param("cohere2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, id="cohere2"),
    pytest.param("ernie4_5", {"tie_word_embeddings": False, "head_dim": 16}, id="ernie4_5"),
]


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_what_the_config_says_is_carried_over(name, overrides):
    dense = tiny_model(name, **overrides)
    model = upcycle(dense, num_experts=4, target="stock")
    assert (run(model, name) - run(dense, name)).abs().max() < 1e-5


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
        pytest.param(
            "qwen3",
            {"use_sliding_window": True, "max_window_layers": 1},
            {},
            "one kind of attention in all layers",
            id="sliding",
        ),
    ],
)
def test_what_it_cannot_say_is_refused_with_the_reason(name, overrides, options, match):
    with pytest.raises(ValueError, match=rf'`target="stock"` is not possible here: .*{match}.*Use `target="ext"`'):
        upcycle(tiny_model(name, **overrides), target="stock", **options)
    assert upcycle(tiny_model(name, **overrides), **options).upcycle_report.preserves_function


def test_a_head_without_counterpart_is_refused():
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
