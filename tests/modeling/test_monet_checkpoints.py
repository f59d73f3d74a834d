"""Monet on disk: masks, checkpoints of the authors, precision, damaged files."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_moe_ext as moe
from hf_moe_ext.modeling.configuration_monet import MonetConfig
from hf_moe_ext.modeling.modeling_monet import MonetForCausalLM

from .test_monet import FORMS, make, tokens


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_masks_are_saved_with_the_model(form, tmp_path):
    model, ids = make(moe_decompose=form), tokens()
    before = model(ids).logits
    model.set_expert_mask(1, [(0, 3), (5, 5), (2, 1)])
    masked = model(ids).logits
    assert (masked - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "masked")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "masked")
    assert type(loaded) is MonetForCausalLM and loaded.config.num_removed_experts == [0, 3]
    assert loaded.routers[1].removed_experts.tolist() == [3, 13, 35]
    assert torch.equal(loaded(ids).logits, masked)
    loaded.clear_expert_masks()
    loaded.save_pretrained(tmp_path / "whole")
    assert not any("removed" in name for name in load_file(tmp_path / "whole" / "model.safetensors"))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(ids).logits, before)


@torch.no_grad()
def test_in_a_process_without_the_package(tmp_path, plugin_free_python):
    model, ids = make(), tokens()
    model.set_expert_mask(0, [7, 8])
    model.save_pretrained(tmp_path / "model")
    save_file({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.safetensors")
    done = plugin_free_python(
        """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model", trust_remote_code=True)
expected = load_file(sys.argv[1] + "/expected.safetensors")
assert torch.equal(model(expected["ids"]).logits, expected["logits"])
model.generate(expected["ids"], max_new_tokens=2, do_sample=False)
model.clear_expert_masks()
model.save_pretrained(sys.argv[1] + "/again")
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    model.clear_expert_masks()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, model(ids).logits)


@torch.no_grad()
def test_classification(tmp_path):
    model, ids = make(), tokens()
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    out = classifier(ids, labels=torch.tensor([0, 2]))
    states = model.model(ids).last_hidden_state
    torch.testing.assert_close(out.logits, states[:, -1] @ classifier.score.weight.T)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 2])))


def test_the_model_card_names_the_paper(tmp_path):
    path = moe.export(make(), tmp_path / "exported", verify=False)
    assert "2412.04139" in (path / "README.md").read_text()


AUTHORS_CONFIG = {
    "architectures": ["MonetForCausalLM"],
    "attention_bias": False,
    "hidden_act": "relu2",
    "hidden_size": 16,
    "intermediate_size": None,
    "mlp_bias": None,
    "model_type": "monet",
    "moe_dim": 4,
    "moe_experts": 6,
    "moe_groups": 2,
    "moe_heads": 2,
    "moe_topk": 2,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "output_router_probs": False,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "rope_theta": 5e5,
    "torch_dtype": "float32",
    "transformers_version": "4.46.0",
    "vocab_size": 64,
}


def authors_tensors(form):
    """Tensors under the names and in the layouts of the released checkpoints, d = 16, S = 6, m = 4, H = 2."""
    shapes = {"model.embed_tokens.weight": (64, 16), "lm_head.weight": (64, 16), "model.norm.weight": (16,)}
    for number in range(3):
        here = f"model.layers.{number}."
        shapes |= {f"{here}self_attn.{x}_proj.weight": (16, 16) for x in "qkvo"}
        shapes |= {f"{here}{x}_layernorm.weight": (16,) for x in ("input", "post_attention")}
        if number % 2 == 0:
            shapes |= {f"{here}router.w{x}.weight": (2 * 6, 16) for x in "12"}
            shapes |= {f"{here}router.norm{x}.running_{y}": (2,) for x in "12" for y in ("mean", "var")}
        if form == "vertical":
            shapes |= {f"{here}moe.u{x}.weight": (6 * 2, 16) for x in "12"}
            shapes |= {f"{here}moe.u{x}.bias": (6 * 2,) for x in "12"}
            shapes |= {f"{here}moe.v{x}.weight": (8, 6 * 2) for x in ("11", "12", "21", "22")}
            shapes |= {f"{here}moe.b{x}": (6, 8) for x in "12"}
        else:
            shapes |= {f"{here}moe.u.weight": (6 * 4, 16), f"{here}moe.u.bias": (6 * 4,)}
            shapes |= {f"{here}moe.v.weight": (16, 6 * 4), f"{here}moe.b": (6, 16)}
    torch.manual_seed(0)
    return {name: torch.rand(shape) + 0.5 if "var" in name else torch.randn(shape) for name, shape in shapes.items()}


@torch.no_grad()
@pytest.mark.parametrize("counted", [True, False], ids=["count", "no_count"])
@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_of_the_authors(form, counted, tmp_path):
    tensors = authors_tensors(form)
    if counted:
        names = [name for name in tensors if name.endswith("running_mean")]
        tensors |= {name.replace("running_mean", "num_batches_tracked"): torch.tensor(7) for name in names}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(AUTHORS_CONFIG | {"moe_decompose": form}))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is MonetForCausalLM and not model.training
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.rope_parameters["rope_theta"] == 5e5
    for name, tensor in model.state_dict().items():
        if name in tensors:
            assert torch.equal(tensor, tensors[name]), name
    assert model(tokens()).logits.isfinite().all()


@torch.no_grad()
def test_statistics_stay_in_float32(tmp_path):
    model = make()
    model.routers[0].norm1.running_mean.fill_(1.2345678)
    low = copy.deepcopy(model).bfloat16()
    assert low.routers[0].norm1.running_mean.dtype == torch.float32
    assert torch.equal(low.routers[0].norm1.running_mean, model.routers[0].norm1.running_mean)
    assert low(tokens()).logits.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.routers[0].norm1.running_mean, model.routers[0].norm1.running_mean)


MASK = "model.layers.2.router.removed_experts"


@pytest.mark.parametrize(
    ("tensor", "counts", "text"),
    [
        ([3, 4, 99], [0, 3], "group 1 .* damaged: experts are 0 to 35, got 3 to 99"),
        ([3, 4, -1], [0, 3], "group 1 .* damaged: experts are 0 to 35, got -1 to 4"),
        ([3, 3, 5], [0, 3], "group 1 .* damaged: some are named twice"),
        ([3, 4, 5], None, "do not fit `num_removed_experts` of its config, None"),
        ([3, 4, 5], [0, 2], "do not fit `num_removed_experts` of its config, \\[0, 2\\]"),
        (None, [0, 3], f"`{MASK}` is missing"),
    ],
)
def test_damaged_masks_are_refused(tensor, counts, text, tmp_path):
    """A mask that is lost would bring removed knowledge back unseen."""
    model = make()
    model.set_expert_mask(1, [3, 4, 5])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del tensors[MASK]
    if tensor is not None:
        tensors[MASK] = torch.tensor(tensor)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_removed_experts": counts}))
    with pytest.raises(ValueError, match=text):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_config_of_old_checkpoints():
    old = {"rope_theta": 5e5, "moe_dim": 12, "moe_heads": 6, "intermediate_size": None}
    config = MonetConfig(**old)
    assert config.rope_parameters["rope_theta"] == 5e5 and config.intermediate_size is None
