"""What `upcycle` refuses, and what it reports."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

import hf_moe_ext as moe
from hf_moe_ext.upcycling import UpcycleReport, load_upcycled, upcycle, upcycle_checkpoint
from hf_moe_ext.upcycling.plan import select_layers
from tests.tiny_models import tiny_inputs, tiny_model


KEYS = [str(i) for i in range(7)]
STACKS = ["encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1", "decoder.2"]


@pytest.mark.parametrize(
    ("layers", "keys", "expected"),
    [
        pytest.param("all", KEYS, KEYS, id="all"),
        pytest.param("every:2", KEYS, ["0", "2", "4", "6"], id="every"),
        pytest.param("every:2:1", KEYS, ["1", "3", "5"], id="offset"),
        pytest.param("every:3:2", STACKS, ["encoder.2", "decoder.2"], id="stacks"),
        pytest.param([5, 1], KEYS, ["1", "5"], id="order"),
        pytest.param([-1, "0", 0], KEYS, ["0", "6"], id="negative"),
        pytest.param(range(2, 4), KEYS, ["2", "3"], id="range"),
        pytest.param(["decoder.1"], STACKS, ["decoder.1"], id="key"),
    ],
)
def test_layers_are_selected(layers, keys, expected):
    assert select_layers(layers, keys) == expected


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        pytest.param("some", 'must be "all", "every:2".*got \'some\'', id="word"),
        pytest.param("every:0", "must be", id="zero"),
        pytest.param("every:2:x", "must be", id="offset"),
        pytest.param("every:2:2", "selects none of the layers 0 to 6", id="none"),
        pytest.param([], r"must be .*got \[\]", id="empty"),
        pytest.param([9], "unknown layer `9`", id="index"),
        pytest.param(["encoder.0"], "unknown layer `encoder.0`", id="key"),
        pytest.param([1.5], "got the entry 1.5", id="float"),
        pytest.param([True], "got the entry True", id="bool"),
        pytest.param(3, "must be .*got 3", id="int"),
    ],
)
def test_bad_layers_are_named(layers, match):
    with pytest.raises(ValueError, match=match):
        select_layers(layers, KEYS)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        pytest.param(
            {"num_experts": 2, "num_experts_per_tok": 3},
            ValueError,
            r"`num_experts_per_tok` \(3\) must not exceed `num_experts` \(2\)",
            id="top_k",
        ),
        pytest.param({"num_experts": 0}, ValueError, "`num_experts` must be a positive integer, got 0", id="none"),
        pytest.param({"num_experts": "8"}, ValueError, "positive integer, got '8'", id="string"),
        pytest.param({"seed": -1}, ValueError, "`seed` must be", id="seed"),
        pytest.param({"method": "brx"}, ValueError, "unknown upcycling method `brx`", id="method"),
        pytest.param({"target": "mixtral"}, ValueError, "`target` must be .*got 'mixtral'", id="target"),
        pytest.param({"layers": [12]}, ValueError, "unknown layer `12`", id="layers"),
        pytest.param({"granularity": 2}, TypeError, "unknown option `granularity`", id="option"),
        pytest.param({"router": "top_q"}, ValueError, "unknown router type `top_q`.*`top_", id="router"),
        pytest.param({"router": {"type": "top_p", "max_slots": 99}}, ValueError, "exceeds the 8 experts", id="slots"),
        pytest.param({"router": {"threshold": 0.1}}, TypeError, '"type"', id="router_type"),
        pytest.param({"method": "granular", "granularity": 7}, ValueError, "must divide", id="granularity"),
        pytest.param({"inplace": True, "target": "stock"}, ValueError, "`inplace=True` keeps", id="inplace"),
        pytest.param({"check": "text"}, ValueError, "needs `tokenizer=...`", id="check"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_bad_arguments_are_named_and_change_nothing(options, error, match, inplace):
    dense = tiny_model("llama")
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    with pytest.raises(error, match=match):
        upcycle(dense, **{"inplace": inplace and options.get("target") is None, **options})
    assert type(dense).__name__ == "LlamaForCausalLM" and type(dense.config).__name__ == "LlamaConfig"
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())


def test_a_model_with_adapters_is_refused(adapters_of_transformers):
    dense = tiny_model("llama")
    dense.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries adapters; merge or remove"):
        upcycle(dense)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # said of PEFT's code
def test_other_models_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"is a Mixture-of-Experts already.*`extend\(model, ...\)`"):
        upcycle(tiny_model("mixtral"))
    model = upcycle(tiny_model("llama"), num_experts=4, target="ext")
    with pytest.raises(ValueError, match="Mixture-of-Experts of ours already"):
        upcycle(model)
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        upcycle(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="before adapters are added"):
        upcycle(get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])))
    inner = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["up_proj"])).base_model.model
    inner._hf_peft_config_loaded = False
    with pytest.raises(ValueError, match='`up` projection of layer "0" is a Linear.*Merge adapters'):
        upcycle(inner)


def test_quantized_models_are_refused(tmp_path):
    dense = tiny_model("llama")
    dense.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(ValueError, match="is quantized.*Load it unquantized"):
        upcycle(dense)


def test_an_unknown_family_is_refused():
    from transformers import CTRLConfig, CTRLLMHeadModel

    other = CTRLLMHeadModel(CTRLConfig(vocab_size=8, n_embd=8, dff=8, n_layer=1, n_head=1, n_positions=8))
    with pytest.raises(ValueError, match="`ctrl` is not supported.*`hf-moe list families`"):
        upcycle(other)


def test_a_bias_before_the_activation_only_is_refused():
    dense = tiny_model("llama", mlp_bias=True)
    for layer in dense.model.layers:
        layer.mlp.down_proj.bias = None
    with pytest.raises(ValueError, match='layer "0" has a bias before the activation but none after'):
        upcycle(dense)


def test_a_bias_after_the_activation_only_is_kept():
    dense = tiny_model("llama", mlp_bias=True)
    for layer in dense.model.layers:
        layer.mlp.up_proj.bias = layer.mlp.gate_proj.bias = None
    assert upcycle(dense, num_experts=4).upcycle_report.relative_error < 1e-5


def test_a_dispatched_model_is_refused():
    from accelerate import cpu_offload

    dense = cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"dispatched over devices.*load_upcycled\(..., device_map=...\)"):
        upcycle(dense, target="ext")


@pytest.mark.parametrize(
    "function", [upcycle, load_upcycled, lambda source: upcycle_checkpoint(source, f"{source}-moe")]
)
def test_a_folder_that_holds_a_moe_is_refused(function, tmp_path):
    upcycle(tiny_model("llama"), num_experts=4, target="ext").save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="`moe_ext_llama` of .*ours is upcycled already"):
        function(str(tmp_path / "ours"))
    tiny_model("mixtral").save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="is a Mixture-of-Experts already"):
        function(str(tmp_path / "stock"))
    tiny_model("llama").save_pretrained(tmp_path / "nameless")
    config = json.loads((tmp_path / "nameless" / "config.json").read_text())
    (tmp_path / "nameless" / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(ValueError, match="names no class of transformers"):
        function(str(tmp_path / "nameless"))


def test_the_report_is_json_safe_and_says_what_was_done():
    dense = tiny_model("llama")
    options = {"num_experts": 4, "num_experts_per_tok": 1, "layers": [1], "seed": 3, "drop_ratio": 0.25}
    report = upcycle(dense, "drop", router="top_p", **options).upcycle_report
    data = json.loads(json.dumps(report.to_dict()))
    assert UpcycleReport(**data) == report
    assert data["method"] == "drop" and data["method_options"] == {"drop_ratio": 0.25}
    assert data["router"] == {"type": "top_p"} and data["layers"] == ["1"] and data["dense_layers"] == ["0", "2"]
    assert data["source_class"] == "LlamaForCausalLM" and data["result_class"] == "MoeExtLlamaForCausalLM"
    assert (data["num_experts"], data["num_experts_per_tok"], data["seed"]) == (4, 1, 3)
    assert data["preserves_function"] is False and data["relative_error"] > 1e-3 and data["kl_divergence"] > 0
    assert "does not preserve the dense function (relative error of the logits" in str(report)


def test_the_report_is_logged(monkeypatch):
    from hf_moe_ext.upcycling import live

    messages = []
    monkeypatch.setattr(live.logger, "info", messages.append)
    upcycle(tiny_model("llama"), num_experts=4)
    assert len(messages) == 1 and "preserves the dense function" in messages[0]
    assert live.logger.level == logging.NOTSET


def test_what_is_measured_is_the_difference_of_the_two_models():
    dense = tiny_model("llama")
    inputs = tiny_inputs("llama")
    model = upcycle(dense, "drop", num_experts=4, check=inputs)
    with torch.no_grad():
        a, b = dense(**inputs).logits, model(**inputs).logits
    report = model.upcycle_report
    assert report.max_abs_difference == pytest.approx(float((a - b).abs().max()), rel=1e-4)
    assert report.relative_error == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-4)
    kl = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none")
    assert report.kl_divergence == pytest.approx(float(kl.sum(-1).mean()), rel=1e-3)


def test_a_router_that_does_not_renormalise_is_found_out():
    report = upcycle(tiny_model("llama"), num_experts=4, router=moe.TopPRouterConfig(threshold=0.3)).upcycle_report
    assert report.preserves_function is False and report.relative_error > 0.05


def test_texts_are_measured_one_by_one_and_the_worst_counts():
    class Letters:
        def __call__(self, text):
            return {"input_ids": [ord(letter) - 90 for letter in text]}

    def error(check):
        return upcycle(tiny_model("llama"), "drop", check=check, tokenizer=Letters()).upcycle_report.relative_error

    one, other = error("abc"), error("defgh")
    assert one != other and error(["abc", "defgh"]) == max(one, other)


def test_nothing_is_measured_when_not_asked():
    report = upcycle(tiny_model("llama"), num_experts=4, check=False).upcycle_report
    assert report.preserves_function is None and "not measured" in str(report)


def test_one_expert_is_the_dense_model():
    dense = tiny_model("llama")
    report = upcycle(dense, num_experts=1, num_experts_per_tok=1, target="ext").upcycle_report
    assert report.relative_error < 1e-5


def test_the_global_generator_is_left_alone():
    dense = tiny_model("llama")
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    upcycle(dense, "drop", num_experts=4, router="top_p")
    assert torch.equal(torch.rand(1), expected)
