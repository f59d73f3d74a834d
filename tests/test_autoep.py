"""The configuration of DeepSpeed: its fields, what is refused, and what an installed DeepSpeed makes of it."""

from __future__ import annotations

import json

import pytest
from transformers import TrainingArguments

import hf_moe_ext as moe
from hf_moe_ext.autoep import AUTOEP_PRESETS
from hf_moe_ext.cli.main import main
from hf_moe_ext.modeling.moe_families import get_family, iter_layers
from hf_moe_ext.modeling.moe_structure import gate_rule
from tests.tiny_models import tiny_config, tiny_model


# Presets that a tiny model exists for, under the family's name.
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")


@pytest.mark.parametrize("family", FAMILIES)
def test_fields(family):
    config = tiny_config(family)
    settings = moe.deepspeed_config(config, 2, zero_stage=2, offload_optimizer=True, num_processes=4)

    assert json.loads(json.dumps(settings)) == settings
    rule = gate_rule(get_family(family).moe, config)
    assert settings["expert_parallel"] == {
        "enabled": True,
        "autoep_size": 2,
        "preset_model": {"qwen2_moe": "qwen3_moe"}.get(family, family),
        "score_func": "sigmoid" if family == "deepseek_v3" else "softmax",
        "route_norm": rule.renormalize,
    }
    assert settings["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    assert settings["train_micro_batch_size_per_gpu"] == settings["gradient_clipping"] == "auto"


def test_renormalization_is_the_models_and_not_the_presets():
    for value in (False, True):
        settings = moe.deepspeed_config(tiny_config("qwen3_moe", norm_topk_prob=value), 1)
        assert settings["expert_parallel"]["route_norm"] is value


def test_takes_a_model_or_its_config():
    model = tiny_model("mixtral")
    assert moe.deepspeed_config(model, 2) == moe.deepspeed_config(model.config, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_parallel_size": 3}, r"must divide the 4 experts of a layer: \[1, 2, 4\]"),
        ({"expert_parallel_size": 8}, r"must divide the 4 experts"),
        ({"expert_parallel_size": 0}, "must be a positive integer, got 0"),
        ({"expert_parallel_size": True}, "must be a positive integer, got True"),
        ({"expert_parallel_size": 2, "num_processes": 3}, r"`num_processes` \(3\) must be a multiple"),
        ({"expert_parallel_size": 2, "zero_stage": 3}, "must be 0, 1 or 2, got 3"),
        ({"expert_parallel_size": 2, "zero_stage": 0, "offload_optimizer": True}, "needs `zero_stage` 1 or 2"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        moe.deepspeed_config(tiny_config("mixtral", num_local_experts=4), **options)


def test_models_that_autoep_does_not_know():
    with pytest.raises(ValueError, match="no preset for `olmoe`; it has some for .*'mixtral'"):
        moe.deepspeed_config(tiny_config("olmoe"), 2)
    with pytest.raises(ValueError, match="no preset for `llama`"):
        moe.deepspeed_config(tiny_config("llama"), 2)
    extended = moe.extend(tiny_model("mixtral"), moe.MoeExtension(router=moe.TopPRouterConfig(threshold=0.5)))
    with pytest.raises(ValueError, match="is extended, and AutoEP would put its own blocks in place of ours"):
        moe.deepspeed_config(extended, 2)
    assert moe.deepspeed_config(moe.restore(extended), 2)


def test_composites_are_told_apart():
    pytest.importorskip("transformers.models.qwen3_5_moe")
    from transformers import Qwen3_5MoeConfig

    config = Qwen3_5MoeConfig()
    with pytest.raises(ValueError, match="the text model of `qwen3_5_moe` and not the composite"):
        moe.deepspeed_config(config, 2)
    settings = moe.deepspeed_config(config.text_config, 2)
    assert settings["expert_parallel"]["preset_model"] == "qwen3_5_moe" and settings["expert_parallel"]["route_norm"]


def test_command(tmp_path, capsys):
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    target = tmp_path / "new" / "ds.json"
    command = ["deepspeed", str(tmp_path / "model"), str(target), "--expert_parallel_size", "2", "--zero_stage", "2"]
    assert main(command) == 0
    settings = json.loads(target.read_text())
    assert settings == moe.deepspeed_config(tiny_model("mixtral"), 2, zero_stage=2)

    assert main(command) == 2 and "exists already" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main(["deepspeed", str(tmp_path / "model"), str(tmp_path)]) == 2
    assert main(["deepspeed", str(tmp_path / "model"), str(target), "--overwrite", "--zero_stage", "3"]) == 1
    assert json.loads(target.read_text()) == settings
    assert [path.name for path in target.parent.iterdir()] == ["ds.json"]


@pytest.mark.parametrize("family", FAMILIES)
def test_deepspeed_reads_it_so(family, tmp_path):
    """The parser, the checks and the detection of layers of DeepSpeed itself."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import (
        PRESET_MODELS,
        parse_autoep_config,
        validate_autoep_config,
        validate_autoep_post_detection,
    )

    assert all(kind in PRESET_MODELS[name].hf_model_types for kind, name in AUTOEP_PRESETS.items())
    model = tiny_model(family)
    settings = moe.deepspeed_config(model, 2, zero_stage=2)
    assert TrainingArguments(str(tmp_path), report_to="none", deepspeed=settings).deepspeed == settings

    parsed = parse_autoep_config(settings["expert_parallel"])
    validate_autoep_config(parsed, world_size=4, pp_size=1, tp_size=1, sp_size=1, zero_stage=2)
    layers = AutoEP(model, parsed).ep_parser()
    validate_autoep_post_detection(parsed, layers)

    record = get_family(family)
    rule = gate_rule(record.moe, model.config)
    expected = [layer.mlp for _, layer, _ in iter_layers(model, record) if hasattr(layer.mlp, "experts")]
    assert len(layers) == len(expected) > 0
    for layer in layers:
        assert (layer.route_norm, layer.score_func, layer.route_scale) == (rule.renormalize, rule.score, rule.scale)
        assert (layer.e_score_correction_bias_path is not None) == (rule.bias is not None)
        if rule.groups is not None:
            assert (layer.num_expert_groups, layer.num_limited_groups) == rule.groups[:2]
