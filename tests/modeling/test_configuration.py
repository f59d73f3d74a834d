"""The declaration: JSON form, what it refuses, exceptions by layer."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from tiny_models import MOE_NAMES, tiny_inputs, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_moe_ext.modeling.configuration_moe_ext import (
    FORMAT_VERSION,
    ExpertsConfig,
    LayerExtension,
    MoeExtension,
    RouterConfig,
)
from hf_moe_ext.modeling.modeling_moe_ext import extended_class, extended_config_class
from hf_moe_ext.modeling.moe_structure import iter_routers, trace_routing
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.modeling.router_top_p import TopPRouterConfig
from hf_moe_ext.patching import describe, extend


TOP_P, TOP_K = TopPRouterConfig(threshold=0.3, max_slots=3), TopKRouterConfig(num_experts_per_tok=1, z_coef=0.5)

DECLARATIONS = {
    "empty": MoeExtension(),
    "router": MoeExtension(router=TOP_P),
    "experts": MoeExtension(experts=ExpertsConfig(num_experts=4)),
    "both": MoeExtension(router=TOP_K, experts=ExpertsConfig(4, 1, 24, 2.0)),
    "layers": MoeExtension(
        router=TOP_P,
        layers={
            "0": None,
            "2": LayerExtension(router=TOP_K),
            "4:7": LayerExtension(experts=ExpertsConfig(num_experts=3)),
            "encoder.1": LayerExtension(router=TOP_K, experts=ExpertsConfig(num_experts=2)),
        },
    ),
}


@pytest.mark.parametrize("extension", DECLARATIONS.values(), ids=DECLARATIONS)
def test_json_round_trip(extension):
    text = json.dumps(extension.to_dict())
    again = MoeExtension.from_dict(json.loads(text))
    assert again == extension and again.to_dict() == extension.to_dict()
    assert again.version == FORMAT_VERSION


def test_shortest_form():
    extension = MoeExtension.from_dict({"router": {"type": "top_p"}})
    assert extension == MoeExtension(router=TopPRouterConfig())
    assert extension.to_dict() == {"version": 1, "router": {"type": "top_p"}}
    assert MoeExtension.from_dict({}) == MoeExtension()
    assert MoeExtension(router="top_p", layers={"1": {"router": "top_k"}}) == MoeExtension(
        router=TopPRouterConfig(), layers={"1": LayerExtension(router=TopKRouterConfig())}
    )


def test_only_what_differs_from_the_defaults_is_written():
    router = TopPRouterConfig(threshold=0.4, entropy_coef=0.0)
    assert router.to_dict() == {"type": "top_p", "entropy_coef": 0.0}
    assert MoeExtension(experts=ExpertsConfig(num_experts=8)).to_dict()["experts"] == {"num_experts": 8}


def test_parts_may_be_given_as_dicts():
    layers = {3: {"router": {"type": "top_k"}}}
    extension = MoeExtension(router={"type": "top_p"}, experts={"num_experts": 4}, layers=layers)
    assert isinstance(extension.router, TopPRouterConfig) and isinstance(extension.experts, ExpertsConfig)
    assert isinstance(extension.layers["3"].router, TopKRouterConfig)
    assert layers == {3: {"router": {"type": "top_k"}}}  # the caller's dict is left alone


def test_reading_does_not_change_what_is_read():
    data = DECLARATIONS["layers"].to_dict()
    before = copy.deepcopy(data)
    MoeExtension.from_dict(data)
    assert data == before


def test_ranges_are_half_open():
    extension = MoeExtension(layers={"4:6": None, "encoder.1:3": None})
    assert list(extension.layers) == ["4", "5", "encoder.1", "encoder.2"]


def test_parts_of_a_layer():
    extension = MoeExtension(
        router=TOP_P,
        experts=ExpertsConfig(num_experts=4),
        layers={"0": None, "1": LayerExtension(router=TOP_K), "2": LayerExtension(experts=ExpertsConfig(2))},
    )
    assert extension.for_layer("0") is None
    assert extension.for_layer("1") == LayerExtension(router=TOP_K, experts=ExpertsConfig(4))
    assert extension.for_layer("2") == LayerExtension(router=TOP_P, experts=ExpertsConfig(2))
    assert extension.for_layer("3") == LayerExtension(router=TOP_P, experts=ExpertsConfig(4))


BAD = {
    "unknown_router": ({"router": {"type": "topp"}}, ValueError, "unknown router type `topp`.*Did you mean `top_p`"),
    "foreign_router": ({"router": {"type": "mine"}}, ValueError, "has to be imported"),
    "router_without_type": ({"router": {"threshold": 0.4}}, TypeError, 'must be an object with a "type"'),
    "unknown_router_name": ({"router": "topp"}, ValueError, "unknown router type `topp`.*Did you mean `top_p`"),
    "router_is_number": ({"router": 3}, TypeError, "`router` of MoeExtension must be RouterConfig or null"),
    "router_type_is_number": ({"router": {"type": 3}}, TypeError, 'must be an object with a "type"'),
    "unknown_key": ({"routr": {}}, ValueError, "unknown key `routr`.*Did you mean `router`"),
    "unknown_router_key": (
        {"router": {"type": "top_p", "treshold": 0.4}},
        ValueError,
        'router of type "top_p": unknown key `treshold`.*Did you mean `threshold`',
    ),
    "unknown_experts_key": ({"experts": {"num_expert": 4}}, ValueError, "`experts`: unknown key.*`num_experts`"),
    "unknown_layer_key": ({"layers": {"3": {"router_": None}}}, ValueError, 'layer "3": unknown key'),
    "not_an_object": ([1], TypeError, "`moe_ext` must be a JSON object"),
    "text": ("top_p", TypeError, "`moe_ext` must be a JSON object"),
    "newer": ({"version": 2}, ValueError, "format version 2.*reads up to 1.*pip install -U"),
    "version_text": ({"version": "1"}, TypeError, "positive integer"),
    "version_zero": ({"version": 0}, TypeError, "positive integer"),
    "version_bool": ({"version": True}, TypeError, "must be int|positive integer"),
    "threshold_text": ({"router": {"type": "top_p", "threshold": "0.4"}}, TypeError, "`threshold` of TopP.* float"),
    "threshold_bool": ({"router": {"type": "top_p", "threshold": True}}, TypeError, "`threshold`"),
    "threshold_null": ({"router": {"type": "top_p", "threshold": None}}, TypeError, "`threshold`"),
    "threshold_negative": ({"router": {"type": "top_p", "threshold": -0.1}}, ValueError, r"in \(0, 1\], got -0.1"),
    "threshold_nan": ({"router": {"type": "top_p", "threshold": float("nan")}}, ValueError, "finite"),
    "coef_nan": ({"router": {"type": "top_k", "z_coef": float("nan")}}, ValueError, "finite"),
    "scale_infinite": ({"router": {"type": "top_k", "scale": float("inf")}}, ValueError, "finite"),
    "slots_float": ({"router": {"type": "top_p", "max_slots": 2.0}}, TypeError, "`max_slots` .* int or null"),
    "slots_below_min": (
        {"router": {"type": "top_p", "max_slots": 2, "min_experts": 3}},
        ValueError,
        "must not be below `min_experts`",
    ),
    "min_experts": ({"router": {"type": "top_p", "min_experts": 0}}, ValueError, "`min_experts` must be at least 1"),
    "coef_negative": ({"router": {"type": "top_k", "balance_coef": -1}}, ValueError, "`balance_coef` must be non-neg"),
    "score": ({"router": {"type": "top_k", "score": "relu"}}, TypeError, "one of 'softmax', 'sigmoid' or null"),
    "temperature": ({"router": {"type": "top_k", "temperature": 0}}, ValueError, "`temperature` must be positive"),
    "jitter": ({"router": {"type": "top_k", "jitter": 1}}, ValueError, "`jitter` must be in"),
    "k_zero": ({"router": {"type": "top_k", "num_experts_per_tok": 0}}, ValueError, "at least 1"),
    "half_groups": ({"router": {"type": "top_k", "num_groups": 2}}, ValueError, "go together"),
    "groups": ({"router": {"type": "top_k", "num_groups": 2, "topk_groups": 3}}, ValueError, "must be in .1, num_"),
    "sigmoid_of_chosen": (
        {"router": {"type": "top_k", "score": "sigmoid", "score_order": "topk_score"}},
        ValueError,
        "excludes sigmoid",
    ),
    "no_experts": ({"experts": {"num_experts": 0}}, ValueError, "`num_experts` must be at least 1"),
    "k_above_experts": (
        {"experts": {"num_experts": 2, "num_experts_per_tok": 3}},
        ValueError,
        "`num_experts_per_tok` .3. must not exceed",
    ),
    "experts_text": ({"experts": {"num_experts": "8"}}, TypeError, "`num_experts` of ExpertsConfig must be int"),
    "experts_list": ({"experts": [8]}, TypeError, "`experts` .*must be"),
    "layers_list": ({"layers": [None]}, TypeError, "must map layer keys"),
    "layer_text": ({"layers": {"3": "top_p"}}, TypeError, "must be an object or null"),
    "layer_key": ({"layers": {"three": None}}, ValueError, 'key "three"; expected "3", "4:8"'),
    "open_range": ({"layers": {"4:": None}}, ValueError, 'key "4:"'),
    "negative": ({"layers": {"-1": None}}, ValueError, 'key "-1"'),
    "empty_range": ({"layers": {"8:4": None}}, ValueError, 'key "8:4".* names no layer'),
    "doubled": ({"layers": {"4:8": None, "5": None}}, ValueError, 'layer "5" is named twice'),
    "doubled_ranges": ({"layers": {"0:3": None, "2:4": None}}, ValueError, 'layer "2" is named twice'),
}


@pytest.mark.parametrize(("data", "error", "message"), BAD.values(), ids=BAD)
def test_refused(data, error, message):
    with pytest.raises(error, match=message):
        MoeExtension.from_dict(data)


def test_a_config_of_a_model_is_checked_when_it_is_made():
    config_class = extended_config_class(type(tiny_model("mixtral").config))
    with pytest.raises(ValueError, match="Did you mean `top_p`"):
        config_class(moe_ext={"router": {"type": "topp"}})
    config = config_class(moe_ext={"router": {"type": "top_p"}})
    assert config.moe_ext == {"version": 1, "router": {"type": "top_p"}}


@pytest.mark.parametrize(
    "config", [TOP_P, TOP_K, TopKRouterConfig(score="sigmoid", jitter=0.1)], ids=["top_p", "top_k", "sigmoid"]
)
def test_router_configs_round_trip(config):
    assert RouterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# --- exceptions by layer, in models ---


@functools.cache
def _stock(name: str):
    return tiny_model(name)


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs)[0]


def routers_by_layer(model):
    return {
        layer.key: (layer.router, layer.num_experts, layer.num_experts_per_tok) for layer in describe(model).layers
    }


def reload(model, folder, auto_class=AutoModelForCausalLM):
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())["moe_ext"]
    assert saved == model.config.moe_ext == AutoConfig.from_pretrained(folder).moe_ext
    again = auto_class.from_pretrained(folder)
    assert type(again) is type(model) and routers_by_layer(again) == routers_by_layer(model)
    return again


def test_layers_of_a_live_model(tmp_path):
    """None, the model-wide router, another router: each does what it says, and survives saving."""
    stock, inputs = copy.deepcopy(_stock("mixtral")), tiny_inputs("mixtral")
    expected = logits(stock, inputs)
    extension = MoeExtension(router=TOP_P, layers={"0": None, "2": LayerExtension(router=TOP_K)})
    model = extend(stock, extension)
    assert routers_by_layer(model) == {"0": ("MixtralTopKRouter", 8, 2), "1": ("top_p", 8, 3), "2": ("top_k", 8, 1)}
    assert [gate.moe_site.key for gate in iter_routers(model)] == ["1", "2"]
    with trace_routing(model) as contexts:
        found = logits(model, inputs)
    assert [(r.key, r.config.type, r.index.shape[1]) for r in contexts[0].records.values()] == [
        ("1", "top_p", 3),
        ("2", "top_k", 1),
    ]
    assert not torch.equal(found, expected)
    assert torch.equal(logits(reload(model, tmp_path), inputs), found)


def test_only_one_layer(tmp_path):
    model = extend(copy.deepcopy(_stock("mixtral")), {"layers": {"1": {"router": {"type": "top_p"}}}})
    assert [layer.router for layer in describe(model).layers] == ["MixtralTopKRouter", "top_p", "MixtralTopKRouter"]
    found = logits(model, tiny_inputs("mixtral"))
    assert torch.equal(logits(reload(model, tmp_path), tiny_inputs("mixtral")), found)


def build(name: str, moe_ext: dict):
    """The registered class with random weights."""
    stock = _stock(name)
    config = copy.deepcopy(stock.config)
    config.__class__ = extended_config_class(type(config))
    config._experts_implementation = None  # as after loading, not as the stock model chose
    config.moe_ext = MoeExtension.from_dict(moe_ext).to_dict()
    torch.manual_seed(0)
    return extended_class(type(stock))(config).eval()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_other_counts_in_a_moe(name, tmp_path):
    """Layers of a stock MoE with other numbers of experts, as pruning leaves them."""
    layers = {
        "0": {"experts": {"num_experts": 5}},
        "1": {"experts": {"num_experts": 1}},
        "2": {"experts": {"num_experts_per_tok": 3}, "router": {"type": "top_k"}},
    }
    model = build(name, {"layers": layers})
    found = {key: counts[1:] for key, counts in routers_by_layer(model).items()}
    assert found["2"] == (8, 3)
    sizes = [len(layer.mlp.experts.down_proj) for layer in model.model.layers]
    assert sizes == [5, 1, 8]
    gates = [(m.num_experts, m.top_k) for m in model.modules() if hasattr(m, "top_k") and hasattr(m, "weight")]
    assert gates == [(5, 2), (1, 1), (8, 3)]
    inputs = tiny_inputs(name)
    expected = logits(model, inputs)
    assert expected.isfinite().all()
    assert torch.equal(logits(reload(model, tmp_path), inputs), expected)


def test_other_counts_in_a_dense_host(tmp_path):
    moe_ext = {
        "router": {"type": "top_p", "threshold": 0.6},
        "experts": {"num_experts": 4},
        "layers": {
            "0": None,
            "2": {
                "router": {"type": "top_k"},
                "experts": {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 8},
            },
        },
    }
    model = build("llama", moe_ext)
    assert routers_by_layer(model) == {"0": ("", 0, 0), "1": ("top_p", 4, 4), "2": ("top_k", 6, 3)}
    assert model.model.layers[2].mlp.experts.down_proj.shape == (6, 32, 8)
    assert isinstance(model.model.layers[0].mlp, type(_stock("llama").model.layers[0].mlp))
    inputs = tiny_inputs("llama")
    expected = logits(model, inputs)
    assert torch.equal(logits(reload(model, tmp_path), inputs), expected)


def test_encoder_and_decoder_layers(tmp_path):
    moe_ext = {
        "experts": {"num_experts": 4},
        "layers": {"encoder.0": None, "decoder.1": {"experts": {"num_experts": 2}}, "decoder.0:1": None},
    }
    model = build("t5", moe_ext)
    assert {key: counts[1] for key, counts in routers_by_layer(model).items()} == {
        "encoder.0": 0,
        "encoder.1": 4,
        "decoder.0": 0,
        "decoder.1": 2,
    }
    inputs = tiny_inputs("t5")
    expected = logits(model, inputs)
    assert torch.equal(logits(reload(model, tmp_path, AutoModelForSeq2SeqLM), inputs), expected)


MISFITS = {
    "no_such_layer": ("mixtral", {"layers": {"3": None}, "router": {"type": "top_p"}}, "layers 0 to 2"),
    "range_too_long": ("mixtral", {"layers": {"1:5": {"router": {"type": "top_p"}}}}, r"\['3', '4'\]"),
    "no_such_stack": ("mixtral", {"layers": {"encoder.0": {"router": {"type": "top_p"}}}}, "layers 0 to 2"),
    "missing_stack": ("switch_transformers", {"layers": {"1": {"router": {"type": "top_k"}}}}, "layers encoder.0 to"),
    "nothing": ("mixtral", {}, "nothing to extend"),
    "all_layers_stock": ("mixtral", {"router": {"type": "top_p"}, "layers": {"0:3": None}}, "nothing to extend"),
    "count": ("mixtral", {"experts": {"num_experts": 4}}, "has 8 experts, `num_experts` asks for 4"),
    "slots": ("mixtral", {"router": {"type": "top_p", "max_slots": 9}}, "exceeds the 8 experts"),
    "k": ("mixtral", {"layers": {"1": {"router": {"type": "top_k", "num_experts_per_tok": 9}}}}, 'layer "1"'),
}


@pytest.mark.parametrize(("name", "data", "message"), MISFITS.values(), ids=MISFITS)
def test_misfits_of_a_live_model(name, data, message):
    if name not in MOE_NAMES:
        pytest.skip(f"the installed transformers has no {name} that we support")
    with pytest.raises(ValueError, match=message):
        extend(copy.deepcopy(_stock(name)), data)


def test_experts_without_a_number_on_a_dense_host():
    with pytest.raises(ValueError, match="`experts.num_experts` is required"):
        build("llama", {"experts": {"intermediate_size": 8}})
