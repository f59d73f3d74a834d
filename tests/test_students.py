"""Students against teachers whose layers are skipped by hand, on every family, in memory and from folder to folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_moe_ext as moe
from hf_moe_ext import students
from hf_moe_ext.modeling.moe_families import get_family, iter_layers
from hf_moe_ext.module_editing import insert_experts
from hf_moe_ext.students import make_student, make_student_checkpoint

from .tiny_models import MOE_NAMES, tiny_inputs, tiny_model


# What stands where depends on more than the config can say.
REFUSED = {
    "beam": "attn_residual_add_idx",
    "gemma4": "store_full_length_kv",
    "jamba": "JambaMambaDecoderLayer",
    "longcat_flash": "num_hidden_layers=4",
    "mistral_large4": "is_kv_shared_layer",
    "nllb_moe": "no single stack",
    "switch_transformers": "no single stack",
}
# Layers that get more than the hidden state of one stream, or whose place is in what they compute.
UNSKIPPABLE = ("glm5_next", "glm_moe_dsa", "hy_v4", "inkling2", "minimax", "zaya")
KEPT = [0, 2]


def layers_of(model):
    return [layer for _, layer, _ in iter_layers(model, get_family(model.config.model_type))]


def logits(model, name="mixtral"):
    with torch.no_grad():
        output = model.eval()(**tiny_inputs(name), use_cache=False)
    return output.logits if "logits" in output else output[0]


def skipping(model, numbers):
    """The model with some layers that return what they get."""
    for number in numbers:
        layers_of(model)[number].forward = lambda hidden, *args, **kwargs: hidden
    return model


@pytest.mark.parametrize("name", MOE_NAMES)
def test_a_student_is_its_teacher_without_some_layers(name, tmp_path):
    teacher = tiny_model(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            make_student(teacher, KEPT)
        return
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    random_state = torch.get_rng_state()
    student = make_student(teacher, KEPT)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(student) is type(teacher) and not student.training
    assert len(layers_of(student)) == 2 == student.config.get_text_config().num_hidden_layers
    assert all(torch.equal(before[key], tensor) for key, tensor in teacher.state_dict().items())
    own = {tensor.data_ptr() for tensor in student.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    for new, old in enumerate(KEPT):
        for (key, one), other in zip(
            layers_of(teacher)[old].state_dict().items(), layers_of(student)[new].state_dict().values(), strict=True
        ):
            assert torch.equal(one, other), key
    found = logits(student, name)
    if name not in UNSKIPPABLE:
        gone = [i for i in range(len(layers_of(teacher))) if i not in KEPT]
        torch.testing.assert_close(found, logits(skipping(teacher, gone), name), atol=1e-5, rtol=1e-5)
    student.save_pretrained(tmp_path)
    if name != "zaya":  # stock biases are not loaded
        loaded = type(student).from_pretrained(tmp_path, dtype=torch.float32)
        torch.testing.assert_close(logits(loaded, name), found, atol=1e-5, rtol=1e-5)


# Those whose checkpoints are not simply layer by layer.
STORED = ("mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "gpt_oss", "llama4", "qwen3_omni_moe", "deepseek_ocr2")


@pytest.mark.parametrize("original", [True, False], ids=["original", "live"])
@pytest.mark.parametrize("name", STORED)
def test_from_folder_to_folder_it_is_the_same(name, original, tmp_path):
    teacher = tiny_model(name)
    teacher.save_pretrained(tmp_path / "teacher", save_original_format=original, max_shard_size="40KB")
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 1
    report = make_student_checkpoint(tmp_path / "teacher", tmp_path / "student", KEPT, max_shard_size="30KB")
    student = make_student(teacher, KEPT)
    loaded = type(teacher).from_pretrained(tmp_path / "student", dtype=torch.float32)
    for (key, one), other in zip(student.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    assert report.kept == (0, 2) and report.removed == tuple(
        i for i in range(len(layers_of(teacher))) if i not in KEPT
    )
    assert report.parameters_after == sum(p.numel() for p in student.parameters())
    assert f"Kept 2 of {len(layers_of(teacher))} layers" in str(report)
    kept = {path.name for path in (tmp_path / "teacher").iterdir() if path.suffix == ".json"}
    assert kept <= {path.name for path in (tmp_path / "student").iterdir()}


def test_every_eighth_layer_is_left_out(tmp_path):
    """24 layers become 21, as in the paper."""
    teacher = tiny_model("mixtral", num_hidden_layers=24, hidden_size=8, head_dim=2, intermediate_size=4)
    student = make_student(teacher)
    wanted = [i for i in range(24) if i not in (7, 15, 23)]
    assert student.config.num_hidden_layers == 21 == len(wanted)
    for new, old in enumerate(wanted):
        gate = layers_of(student)[new].mlp.gate.weight
        assert torch.equal(gate, layers_of(teacher)[old].mlp.gate.weight)


def test_a_start_from_nothing_has_the_shape_alone():
    teacher = tiny_model("mixtral")
    first, second = (make_student(teacher, KEPT, init="random", seed=seed) for seed in (1, 1))
    other = make_student(teacher, KEPT, init="random", seed=2)
    started = make_student(teacher, KEPT)
    assert first.config.to_dict() == started.config.to_dict()
    for (key, one), same, changed, own in zip(
        first.state_dict().items(),
        second.state_dict().values(),
        other.state_dict().values(),
        started.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(one, same), key
        if one.dim() > 1:
            assert not torch.equal(one, changed) and not torch.equal(one, own), key


def pyramid():
    """Layers with 4, 4, none, 6 and 8 experts, and one router of its own."""
    dense = AutoModelForCausalLM.from_config(tiny_model("llama", num_hidden_layers=5).config)
    return moe.upcycle(
        dense,
        num_experts=4,
        router=moe.TopKRouterConfig(balance_coef=0.1),
        layers=[0, 1, 3, 4],
        parts={"shared_experts": {"intermediate_size": 8}},
        check=False,
    )


def uneven():
    model = pyramid()
    insert_experts(model, 2, layers=["3"])
    insert_experts(model, 4, layers=["4"])
    return model.eval()


def test_settings_by_layer_follow(tmp_path):
    teacher = uneven()
    assert [d.num_experts for d in moe.describe(teacher).layers] == [4, 4, 0, 6, 8]
    student = make_student(teacher, [1, 2, 4])
    assert [d.num_experts for d in moe.describe(student).layers] == [4, 0, 8]
    found = logits(student, "llama")
    torch.testing.assert_close(found, logits(skipping(teacher, [0, 3]), "llama"), atol=1e-5, rtol=1e-5)
    student.save_pretrained(tmp_path / "live")
    teacher = uneven()
    teacher.save_pretrained(tmp_path / "teacher")
    make_student_checkpoint(tmp_path / "teacher", tmp_path / "student", [1, 2, 4])
    for folder in ("live", "student"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        assert type(loaded).__name__ == "MoeExtLlamaForCausalLM"
        assert [d.num_experts for d in moe.describe(loaded).layers] == [4, 0, 8]
    teacher, student = uneven(), make_student(uneven(), [1, 2, 4])
    for (key, one), other in zip(student.state_dict().items(), loaded.state_dict().values(), strict=True):
        if not key.endswith("moe_progress"):
            assert one.shape == other.shape, key
    assert json.loads((tmp_path / "student" / "config.json").read_text())["moe_ext"] == student.config.moe_ext


@pytest.mark.parametrize(
    ("hidden", "counts", "billions"),
    [
        (1024, [128] * 12, 12.9),  # 350M+MoE-128, published as 13B
        (1024, [32] * 10 + [64] * 2, 3.8),  # PR-MoE 32/64: 4B
        (1024, [32] * 8 + [64] * 2, 3.2),  # its student of 21 layers: 3.5B
        (2048, [128] * 12, 51.5),  # 1.3B+MoE-128: 52B
        (2048, [64] * 10 + [128] * 2, 30.1),  # PR-MoE 64/128: 31B
    ],
)
def test_pyramids_have_the_published_sizes(hidden, counts, billions):
    """Every second layer of a GPT has experts of 2 * h * 4h parameters; their number is declared by layer."""
    layers = {str(2 * i): None for i in range(len(counts))}
    layers |= {str(2 * i + 1): {"experts": {"num_experts": count}} for i, count in enumerate(counts)}
    extension = {"router": "top_k", "experts": {"num_experts": counts[0], "num_experts_per_tok": 1}, "layers": layers}
    config = AutoConfig.for_model("moe_ext_gpt2", n_embd=hidden, n_layer=2 * len(counts), n_head=16, moe_ext=extension)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = [layer.num_experts for layer in moe.describe(model).layers if layer.kind == "moe"]
    assert found == counts
    weights = sum(p.numel() for name, p in model.named_parameters() if "experts" in name and p.dim() == 3)
    assert weights == sum(counts) * 2 * hidden * 4 * hidden
    assert weights / 1e9 == pytest.approx(billions, abs=0.06)


@pytest.mark.parametrize("router", ["top_p", "rmoe", "pre_gated", "dts", "momentum"])
def test_extended_teachers(router):
    """Also with routers that hand something from layer to layer, whose students train."""
    teacher = tiny_model("mixtral", num_hidden_layers=4)
    extension = {"router": "top_k", "momentum": {"decay": 0.5}} if router == "momentum" else {"router": router}
    moe.extend(teacher, {**extension, "layers": {"3": {"router": {"type": "top_k", "z_coef": 0.1}}}})
    student = make_student(teacher, [0, 1, 3])
    assert student.config.moe_ext["layers"]["2"]["router"]["z_coef"] == 0.1
    assert torch.isfinite(logits(student)).all()
    ids = tiny_inputs("mixtral")["input_ids"]
    student.train()(input_ids=ids, labels=ids).loss.backward()
    gates = [layer.mlp.gate.weight.grad for layer in layers_of(student)]
    assert sum(bool(g is not None and g.any()) for g in gates) >= 2


def test_sparse_steps_and_dense_layers_become_a_list():
    """Every second layer of five has experts, and one of those was made dense."""
    teacher = tiny_model("qwen2_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    sparse = [hasattr(layer.mlp, "experts") for layer in layers_of(teacher)]
    assert sparse == [False, True, False, False, False, True]
    student = make_student(teacher, [1, 3, 4, 5])
    assert [hasattr(layer.mlp, "experts") for layer in layers_of(student)] == [True, False, False, True]
    assert student.config.mlp_only_layers == [1, 2] and student.config.decoder_sparse_step == 1


def test_dense_layers_in_front_are_counted():
    teacher = tiny_model("deepseek_v2", num_hidden_layers=5, first_k_dense_replace=2)
    student = make_student(teacher, [1, 2, 4])
    assert [hasattr(layer.mlp, "experts") for layer in layers_of(student)] == [False, True, True]
    assert student.config.first_k_dense_replace == 1


def test_dense_teachers_have_students():
    teacher = tiny_model("gemma2", num_hidden_layers=4)
    student = make_student(teacher, [1, 2])
    assert student.config.layer_types == [teacher.config.layer_types[1], teacher.config.layer_types[2]]
    torch.testing.assert_close(logits(student, "gemma2"), logits(skipping(teacher, [0, 3]), "gemma2"))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (None, "every 8th layer is left out if `keep_layers` is not given, and this model has 3"),
        ([], "different layers from 0 to 2 in their order, at least one"),
        ([0, 0], "different layers from 0 to 2"),
        ([1, 0], "different layers from 0 to 2 in their order"),
        ([0, 3], "different layers from 0 to 2"),
        ([-1, 0], "different layers from 0 to 2"),
        ([0, 1, 2], "names all 3 layers"),
    ],
)
def test_layers_that_do_not_fit_are_refused(kept, message, tmp_path):
    teacher = tiny_model("mixtral")
    with pytest.raises(ValueError, match=message):
        make_student(teacher, kept)
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=message):
        make_student_checkpoint(tmp_path / "teacher", tmp_path / "student", kept)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_bad_arguments_are_refused(tmp_path):
    teacher = tiny_model("mixtral")
    with pytest.raises(TypeError, match="`keep_layers` must be a list of layer numbers"):
        make_student(teacher, ["0"])
    with pytest.raises(ValueError, match='`init` must be "teacher" or "random", got \'zero\''):
        make_student(teacher, KEPT, init="zero")
    with pytest.raises(TypeError, match="expected a transformers model"):
        make_student(torch.nn.Linear(2, 2), KEPT)
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="is the source folder"):
        make_student_checkpoint(tmp_path / "teacher", tmp_path / "teacher", KEPT, overwrite=True)
    with pytest.raises(FileExistsError, match="holds a model already"):
        make_student_checkpoint(tmp_path / "teacher", tmp_path / "teacher", KEPT)


def test_a_pattern_that_a_config_cannot_say_is_refused():
    teacher = tiny_model("jamba", num_hidden_layers=4)
    with pytest.raises(ValueError, match="layer 2 of the teacher cannot be layer 1 of a student.*leave the pattern"):
        make_student(teacher, [0, 2, 3])
    student = make_student(teacher, [0, 1])
    torch.testing.assert_close(logits(student, "jamba"), logits(skipping(teacher, [2, 3]), "jamba"))


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    teacher = tiny_model("mixtral")
    state = {name: tensor for name, tensor in teacher.state_dict().items() if ".layers.1." not in name}
    teacher.save_pretrained(tmp_path / "teacher", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks the layers \[1\] of `model.layers`"):
        make_student_checkpoint(tmp_path / "teacher", tmp_path / "student", KEPT)
    assert not (tmp_path / "student").exists()


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    tiny_model("mixtral").save_pretrained(tmp_path / "teacher")
    written = []

    def write(self, name, tensor):
        written.append(name)
        if len(written) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(students.SafetensorsWriter, "write", write)
    with pytest.raises(KeyboardInterrupt):
        make_student_checkpoint(tmp_path / "teacher", tmp_path / "student", KEPT)
    assert [Path(path).name for path in tmp_path.iterdir()] == ["teacher"]
