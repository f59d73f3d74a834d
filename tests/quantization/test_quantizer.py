"""Models with experts in few bits: loading, saving, all families, what is refused, and what takes how much memory."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import MOE_NAMES, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import hf_moe_ext as moe
from hf_moe_ext import MoeQuantizationConfig
from hf_moe_ext.hub import export_checked
from hf_moe_ext.kernels.quantized_tensor import QuantizedTensor
from hf_moe_ext.quantization import quantized_size
from hf_moe_ext.quantization.config import quantization_of


ROOT = Path(__file__).resolve().parents[2]
FORMATS = {
    "int8": MoeQuantizationConfig("int8"),
    "int4": MoeQuantizationConfig("int4"),
    "int4_zeros": MoeQuantizationConfig("int4", group_size=32, zero_points=True),
    "nf4": MoeQuantizationConfig("nf4"),
    "ternary": MoeQuantizationConfig("ternary"),
    "linear": MoeQuantizationConfig(None, "nf4", group_size=32),
    "both": MoeQuantizationConfig("nf4", "int8"),
}
# Their experts are linear layers or one matrix for all.
WITHOUT_STACKS = {"dbrx", "switch_transformers"}


@functools.cache
def dense():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        initializer_range=0.1,
    )
    return MixtralForCausalLM(config).eval()


def fresh():
    return copy.deepcopy(dense())


def ids():
    return torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model(ids()).logits


def quantized_names(model):
    return {name for name, parameter in model.named_parameters() if isinstance(parameter, QuantizedTensor)}


@pytest.fixture
def folder(tmp_path):
    fresh().save_pretrained(tmp_path / "full")
    return tmp_path / "full"


@pytest.mark.parametrize("name", FORMATS)
def test_loading_quantizing_live_and_reloading_are_the_same(name, folder, tmp_path):
    live = moe.quantize(fresh(), FORMATS[name])
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FORMATS[name])
    assert quantized_names(live) == quantized_names(loaded) != set()
    expected = logits(live)
    assert torch.equal(logits(loaded), expected) and not torch.equal(expected, logits(dense()))
    loaded.save_pretrained(tmp_path / "few", max_shard_size="40KB")
    assert len(list((tmp_path / "few").glob("*.safetensors"))) > 2
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "few", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")), expected)


@pytest.mark.parametrize("implementation", ["moe_ext", "eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", FORMATS)
def test_against_the_numbers_in_float64(name, implementation):
    """All that quantising does is to round the weights: a model of the rounded numbers computes the same."""
    model = moe.quantize(fresh(), FORMATS[name])
    reference = fresh().double()
    parameters = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            parameters[key].data = parameter.dequantize().double()
    reference.set_experts_implementation("eager")
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model).double(), logits(reference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("original", [True, False], ids=["original", "fused"])
def test_both_save_formats(original, tmp_path):
    model = moe.quantize(fresh(), FORMATS["both"])
    model.save_pretrained(tmp_path, save_original_format=original)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert any("packed_gate_up_proj" in key for key in file.keys())  # noqa: SIM118
        assert not any(key.endswith("gate_up_proj") and "_gate_up_proj" not in key for key in file.keys())  # noqa: SIM118
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def _stacks(model):
    """Matrices of the 8 experts of a tiny model."""
    return [p for name, p in model.named_parameters() if p.dim() == 3 and len(p) == 8 and "conv" not in name]


@pytest.mark.parametrize("name", MOE_NAMES)
def test_families(name, tmp_path):
    config = MoeQuantizationConfig("int8", "int8")
    model = tiny_model(name)
    if name in WITHOUT_STACKS:
        with pytest.raises(ValueError, match="no experts in stacks of matrices"):
            moe.quantize(model, config)
        return
    model.save_pretrained(tmp_path / "full")
    loaded = type(model).from_pretrained(tmp_path / "full", quantization_config=config)
    experts = [p for p in loaded.parameters() if isinstance(p, QuantizedTensor) and p.dim() == 3]
    assert experts and all(isinstance(p, QuantizedTensor) for p in loaded.parameters() for p in _stacks(loaded))
    router = [n for n in quantized_names(loaded) if n.endswith((".gate.weight", ".router.weight"))]
    assert not router
    with torch.no_grad():
        before, after = model(**tiny_inputs(name)).logits, loaded(**tiny_inputs(name)).logits
    if not any(p.numel() == 0 for p in model.parameters()):
        # Rows of random weights in 8 bits: tokens stay close, but for single ones that change experts.
        assert (before - after).abs().median() < 0.1 * before.abs().max()
    loaded.save_pretrained(tmp_path / "few")
    again, info = type(model).from_pretrained(tmp_path / "few", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    mine, theirs = (m.hf_quantizer.get_state_dict_and_metadata(m)[0] for m in (loaded, again))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    with torch.no_grad():
        torch.testing.assert_close(again(**tiny_inputs(name)).logits, after, rtol=1e-4, atol=1e-4)


def test_devices_and_dtypes(tmp_path):
    model = moe.quantize(fresh(), FORMATS["both"])
    model.save_pretrained(tmp_path)
    for options in ({"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"dtype": "auto"}):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, **options)), logits(model))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if isinstance(parameter, QuantizedTensor):
            stored = model.get_parameter(name).parts()
            assert all(torch.equal(part, stored[key]) for key, part in parameter.parts().items())
    torch.testing.assert_close(logits(half).float(), logits(model), rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="on disk"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"model": "cpu", "lm_head": "disk"})


def test_dequantize_gives_a_plain_model(tmp_path):
    model = moe.quantize(fresh(), FORMATS["both"])
    expected = logits(model)
    plain = model.dequantize()
    assert not quantized_names(plain) and not plain.is_quantized and quantization_of(plain.config) is None
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
    plain.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in saved and "experts_implementation" not in saved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain))
    plain.train()(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in plain.parameters())


TOP_P = {"router": {"type": "top_p", "threshold": 0.6}}


def test_extending_before_and_after(tmp_path):
    before = moe.quantize(moe.extend(fresh(), TOP_P), FORMATS["nf4"])
    after = moe.extend(moe.quantize(fresh(), FORMATS["nf4"]), TOP_P)
    expected = logits(before)
    assert torch.equal(logits(after), expected)
    for number, model in enumerate((before, after)):
        model.save_pretrained(tmp_path / str(number))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert type(loaded).__name__ == "MoeExtMixtralForCausalLM" and torch.equal(logits(loaded), expected)
    moe.restore(after)
    assert torch.equal(logits(after), logits(moe.quantize(fresh(), FORMATS["nf4"])))
    after.save_pretrained(tmp_path / "restored")
    assert "hf_moe_ext" in json.loads((tmp_path / "restored" / "config.json").read_text())["experts_implementation"]


def test_upcycled_models_and_unused_slots():
    dense_model = tiny_model("llama", hidden_size=64, intermediate_size=64, head_dim=16)
    parts = {"zero_experts": {"zero": 1, "copy": 1, "init": "identity"}}
    model = moe.upcycle(dense_model, num_experts=4, router=moe.TopPRouterConfig(threshold=0.5), parts=parts)
    reference = copy.deepcopy(model).double()
    moe.quantize(model, FORMATS["int8"])
    parameters = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            parameters[key].data = parameter.dequantize().double()
    inputs = tiny_inputs("llama")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits.double(), reference(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_what_is_left_out():
    model = moe.quantize(fresh(), MoeQuantizationConfig("nf4", "nf4", modules_to_not_convert=["layers.0", "o_proj"]))
    names = quantized_names(model)
    assert names == {
        *(f"model.layers.1.mlp.experts.{part}_proj" for part in ("gate_up", "down")),
        *(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"),
    }


def test_what_is_refused_before_anything_changes():
    model = fresh()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    cases = [
        (MoeQuantizationConfig("nf4", group_size=128), r"gate_up_proj` \(4, 256, 64\) cannot be stored as nf4"),
        (MoeQuantizationConfig("nf4", modules_to_not_convert=["mlpp"]), "names 'mlpp', which no module"),
        (MoeQuantizationConfig("nf4", modules_to_not_convert=["experts"]), "beside those left out"),
    ]
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            moe.quantize(model, config)
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert not getattr(model, "is_quantized", False)
    with pytest.raises(ValueError, match="no experts in stacks of matrices"):
        moe.quantize(tiny_model("llama"))
    with pytest.raises(TypeError, match="expected a model of Transformers"):
        moe.quantize(torch.nn.Linear(2, 2))
    model.get_parameter("model.layers.1.mlp.experts.down_proj").data[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="expert 2 are not all finite"):
        moe.quantize(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": "fp4"}, "must be one of int8, int4, nf4, ternary, or None, got 'fp4'"),
        ({"linear": 4}, "`linear` must be one of"),
        ({"experts": None}, "nothing to quantize"),
        ({"group_size": 48}, r"one of \(32, 64, 128\), got 48"),
        ({"experts": "int8", "group_size": 64}, "must be None"),
        ({"zero_points": True}, "for int4, which is not asked for"),
        ({"modules_to_not_convert": "o_proj"}, "must be a list of names"),
        ({"quant_method": "gptq"}, "must be 'moe_ext'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_configs(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoeQuantizationConfig(**arguments)


def test_the_config_is_json():
    config = FORMATS["int4_zeros"]
    text = config.to_json_string()
    assert MoeQuantizationConfig.from_dict(json.loads(text)) == config
    with pytest.raises(ValueError, match=r"unknown keys \['bits'\]"):
        MoeQuantizationConfig.from_dict({"bits": 3})


def test_quantizing_twice():
    model = moe.quantize(fresh())
    with pytest.raises(ValueError, match="is quantized already"):
        moe.quantize(model)
    for change in (lambda: moe.prune_experts(model, experts={"0": [1]}), lambda: moe.insert_experts(model, 1)):
        with pytest.raises(ValueError, match="weights are quantized"):
            change()


@pytest.mark.parametrize("lost", ["scales", "both"])
def test_a_damaged_checkpoint_is_an_error(lost, tmp_path):
    from safetensors.torch import load_file, save_file

    moe.quantize(fresh()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name in [key for key in tensors if key.endswith("down_proj") and (lost == "both" or "scales_" in key)]:
        del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    message = "down_proj` and 1 more could not be read" if lost == "both" else "We encountered some issues"
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_memory_is_what_the_tensors_take():
    model = moe.quantize(fresh(), FORMATS["nf4"])
    sizes = quantized_size(model)
    experts = sum(p.numel() for p in dense().parameters() if p.dim() == 3)
    assert sizes["quantized"] == experts // 2 + 2 * experts // 64  # half a byte, and a bfloat16 for 64 numbers
    rest = sum(p.nbytes for p in dense().parameters() if p.dim() < 3)
    assert sizes["total"] == sizes["quantized"] + rest + sum(buffer.nbytes for buffer in model.buffers())
    assert model.get_memory_footprint() == pytest.approx(sizes["total"])


def test_bitsandbytes_and_others_are_not_taken_for_ours():
    config = copy.deepcopy(dense().config)
    assert quantization_of(config) is None
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert quantization_of(config) is None


def test_description_names_the_formats(tmp_path):
    model = moe.quantize(fresh(), FORMATS["both"])
    assert moe.describe(model).quantization == "experts nf4 in groups of 64, linear layers int8"
    assert "quantized: experts nf4" in str(moe.describe(model))
    assert moe.describe(dense()).quantization == ""
    assert moe.describe(model).parameters == moe.describe(dense()).parameters


def test_export_needs_the_package_and_says_so(tmp_path):
    model = moe.quantize(fresh(), FORMATS["nf4"])
    result = export_checked(model, tmp_path / "hub")
    assert result.verification.exact and result.verification.needs_package
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "pip install hf-moe-ext" in card and "import hf_moe_ext" in card and "It is quantized (experts nf4" in card


@pytest.mark.parametrize("extended", [False, True], ids=["stock", "extended"])
def test_without_the_package_loading_fails_with_the_reason(extended, tmp_path):
    model = moe.quantize(moe.extend(fresh(), TOP_P) if extended else fresh())
    model.save_pretrained(tmp_path / "few")
    code = (
        "import sys; sys.modules['hf_moe_ext'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'few')!r}, trust_remote_code=True)"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert process.returncode != 0
    wanted = (
        "mlp.experts.down_proj` is missing" if extended else "these experts are quantized: `pip install hf-moe-ext`"
    )
    assert wanted in process.stderr


_PEAK = """
import json, sys, threading, time
import torch
import hf_moe_ext as moe
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
peak, stop = 0, threading.Event()

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    global peak
    while not stop.wait(0.005):
        peak = max(peak, anonymous())

options = {"quantization_config": moe.MoeQuantizationConfig(sys.argv[3])} if len(sys.argv) > 3 else {}
AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)  # the imports
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], **options)
stop.set()
thread.join()
print(json.dumps(peak - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_the_peak_while_loading_is_near_the_quantized_size(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    torch.manual_seed(0)
    for name, layers in (("tiny", 1), ("large", 20)):
        config = MixtralConfig(**sizes, num_key_value_heads=4, num_hidden_layers=layers, num_local_experts=16)
        model = MixtralForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name, max_shard_size="60MB")
    full = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    few = quantized_size(moe.quantize(model, FORMATS["int4"]))["total"]
    script = tmp_path / "peak.py"
    script.write_text(_PEAK)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}

    def peak(*arguments):
        command = [sys.executable, str(script), str(tmp_path / "tiny"), str(tmp_path / "large"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    # One parameter in full, and one expert of it in float64 with its codes.
    assert few < 0.35 * full
    assert peak("int4") < few + 3 * largest
    assert peak() > 0.9 * full
