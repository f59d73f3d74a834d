"""Folder to folder: same tensors, one layer in memory, complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_moe_ext.modeling.modeling_moe_ext import extended_class
from hf_moe_ext.upcycling import checkpoint, register_upcycling_method, stored_names, upcycle, upcycle_checkpoint
from hf_moe_ext.upcycling import methods as method_registry
from hf_moe_ext.upcycling.safetensors_io import INDEX_NAME, SafetensorsWriter
from hf_moe_ext.upcycling.sparse import SparseUpcycling
from tests.tiny_models import tiny_inputs, tiny_model
from tests.upcycling.routers import register_random_router


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dense_folder(tmp_path):
    folder = tmp_path / "dense"
    tiny_model("llama").save_pretrained(folder, max_shard_size="30KB")
    assert (folder / INDEX_NAME).exists()
    return folder


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB", 10_000], ids=str)
def test_shards_are_valid_and_complete(dense_folder, tmp_path, max_shard_size):
    out = tmp_path / "moe"
    report = upcycle_checkpoint(dense_folder, out, num_experts=3, target="ext", max_shard_size=max_shard_size)
    model, info = extended_class(type(tiny_model("llama"))).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert sum(tensor.numel() for tensor in contents(out).values()) == report.parameters_after
    files = sorted(path.name for path in out.glob("*.safetensors"))
    if max_shard_size == "5GB":
        assert files == ["model.safetensors"] and not (out / INDEX_NAME).exists()
        return
    index = json.loads((out / INDEX_NAME).read_text())
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 3
    assert index["metadata"]["total_size"] == 4 * report.parameters_after
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as shard:
            assert name in shard.keys() and shard.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "router", ["top_p", {"type": "top_k", "correction_bias": True}, "random_scale"], ids=["top_p", "bias", "random"]
)
def test_routers_with_tensors_of_their_own_are_filled(dense_folder, tmp_path, router, monkeypatch):
    register_random_router(monkeypatch)
    live = upcycle(dense_folder, num_experts=3, router=router)
    upcycle_checkpoint(dense_folder, tmp_path / "moe", num_experts=3, router=router)
    again, info = type(live).from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(info.values())
    expected = live.state_dict()
    assert any("moe_" in key for key in expected) == (router != "top_p")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())


def test_a_type_is_applied_to_every_floating_point_tensor(dense_folder, tmp_path):
    out = tmp_path / "moe"
    upcycle_checkpoint(dense_folder, out, num_experts=3, target="ext", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in contents(out).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    live = upcycle(tiny_model("llama").bfloat16(), num_experts=3, target="ext")
    expected = live.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in contents(out).items())


def test_what_stands_beside_the_weights_comes_along(dense_folder, tmp_path):
    (dense_folder / "tokenizer.json").write_text("{}")
    (dense_folder / "chat_template.jinja").write_text("{{ messages }}")
    (dense_folder / "notes.txt").write_text("private")
    (dense_folder / "pytorch_model.bin").write_text("old weights")
    generation = json.loads((dense_folder / "generation_config.json").read_text()) | {"temperature": 0.3}
    (dense_folder / "generation_config.json").write_text(json.dumps(generation))
    out = tmp_path / "deep" / "moe"
    upcycle_checkpoint(dense_folder, out, num_experts=3, target="ext")
    names = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "config.json", "generation_config.json"} <= names
    assert {"modeling_moe_ext.py", "configuration_moe_ext.py", "router_top_k.py"} <= names
    assert not {"notes.txt", "pytorch_model.bin", "hf_moe_ext"} & names
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.3
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["MoeExtLlamaForCausalLM"] and "AutoModelForCausalLM" in config["auto_map"]


def test_it_loads_with_remote_code_where_the_package_is_not_installed(dense_folder, tmp_path, plugin_free_python):
    upcycle_checkpoint(dense_folder, tmp_path / "moe", num_experts=3, router={"type": "top_p", "renormalize": True})
    with torch.no_grad():
        reference = tiny_model("llama")(**tiny_inputs("llama")).logits
    save_file({**tiny_inputs("llama"), "reference": reference}, tmp_path / "data.safetensors")
    code = (
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "data = load_file(sys.argv[2])\n"
        "reference = data.pop('reference')\n"
        "print(type(model).__name__, (model(**data).logits - reference).abs().max().item() < 1e-5)\n"
    )
    done = plugin_free_python(code, tmp_path / "moe", tmp_path / "data.safetensors")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["MoeExtLlamaForCausalLM", "True"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_keys_without_the_prefix_of_the_base_model_are_found(name, tmp_path):
    dense = tiny_model(name)
    dense.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    prefix = f"{dense.base_model_prefix}."
    save_file({key.removeprefix(prefix): tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", num_experts=3, target="ext")
    expected = upcycle(dense, num_experts=3, target="ext").state_dict()
    again = extended_class(type(dense)).from_pretrained(tmp_path / "moe").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in expected.items())


def test_unknown_tensors_are_left_out_with_a_warning(dense_folder, tmp_path, monkeypatch):
    file = next(dense_folder.glob("*.safetensors"))
    index = json.loads((dense_folder / INDEX_NAME).read_text())
    save_file({**load_file(file), "model.rotary.inv_freq": torch.ones(2)}, file, {"format": "pt"})
    index["weight_map"]["model.rotary.inv_freq"] = file.name
    (dense_folder / INDEX_NAME).write_text(json.dumps(index))
    messages = []
    monkeypatch.setattr(stored_names.logger, "warning", messages.append)
    upcycle_checkpoint(dense_folder, tmp_path / "moe", num_experts=3)
    assert len(messages) == 1 and "1 tensors" in messages[0] and "model.rotary.inv_freq" in messages[0]
    assert "model.rotary.inv_freq" not in contents(tmp_path / "moe")


@pytest.mark.parametrize(
    ("method", "options", "exact"),
    [
        pytest.param("sparse", {}, True, id="sparse"),
        pytest.param("granular", {"granularity": 4}, True, id="granular"),
        pytest.param("drop", {"drop_ratio": 0.5}, False, id="drop"),
        pytest.param("sparse", {"router": {"type": "top_p", "threshold": 0.2}}, False, id="not_renormalised"),
    ],
)
def test_blocks_are_measured(dense_folder, tmp_path, method, options, exact):
    report = upcycle_checkpoint(dense_folder, tmp_path / "moe", method, num_experts=4, **options)
    assert report.measured == "blocks" and report.preserves_function is exact
    assert (report.relative_error < 1e-5) == exact
    again = upcycle_checkpoint(dense_folder, tmp_path / "other", method, num_experts=4, check=False, **options)
    assert again.preserves_function is None
    assert {**contents(tmp_path / "moe")}.keys() == contents(tmp_path / "other").keys()


_MEASURE_PEAK = """
import sys, threading, time
from pathlib import Path
from hf_moe_ext.upcycling import upcycle_checkpoint
folder, target = Path(sys.argv[1]), sys.argv[2]
upcycle_checkpoint(folder / "tiny", folder / "warm", num_experts=4, target=target)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
before, peak, done = resident(), [0.0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
upcycle_checkpoint(folder / "dense", folder / "moe", num_experts=4, target=target, max_shard_size="200MB")
done.set()
thread.join()
print(peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
@pytest.mark.parametrize("target", ["ext", "stock"])
def test_peak_memory_is_about_one_layer(target, tmp_path):
    sizes = {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 10}
    tiny_model("llama", **sizes).save_pretrained(tmp_path / "dense", max_shard_size="100MB")
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-c", _MEASURE_PEAK, str(tmp_path), target]
    # Large blocks are given back as soon as they are freed; how the allocator fragments is not the question.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    total = sum(path.stat().st_size for path in (tmp_path / "moe").glob("*.safetensors")) / 1e6
    assert total > 750
    # A dense layer and the same one converted are 19 + 75 MB. Before, gate and up are put together (13 MB); after, the
    # largest tensor is split into experts (50 MB). Seen: 110 and 130 MB.
    assert float(done.stdout) < 180


def test_tensors_of_one_layer_are_alive_at_a_time(dense_folder, tmp_path, monkeypatch):
    convert, write = checkpoint.UpcyclePlan.convert, SafetensorsWriter.write
    made, most = [], [0]

    def counted_convert(self, job, tensors):
        assert sum(reference() is not None for reference in made) == 0, "a layer outlived its writing"
        out = convert(self, job, tensors)
        made.extend(weakref.ref(tensor) for name, tensor in out.items() if "experts" in name)
        return out

    def counted_write(self, name, tensor):
        write(self, name, tensor)
        most[0] = max(most[0], sum(reference() is not None for reference in made))

    monkeypatch.setattr(checkpoint.UpcyclePlan, "convert", counted_convert)
    monkeypatch.setattr(SafetensorsWriter, "write", counted_write)
    upcycle_checkpoint(dense_folder, tmp_path / "moe", num_experts=3, target="ext")
    assert len(made) == 6 and most == [2]


# --- complete or not at all ---


def fail_at(monkeypatch, count, error):
    """Let the writer fail at its `count`-th tensor."""
    write, calls = SafetensorsWriter.write, []

    def failing(self, name, tensor):
        calls.append(name)
        if len(calls) == count:
            raise error
        write(self, name, tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", failing)


@pytest.mark.parametrize(
    ("error", "expected", "match"),
    [
        pytest.param(
            OSError(errno.ENOSPC, "No space left on device"), OSError, "is full; nothing was left", id="full"
        ),
        pytest.param(OSError(errno.EIO, "Input/output error"), OSError, "Input/output error", id="io"),
        pytest.param(KeyboardInterrupt(), KeyboardInterrupt, None, id="interrupt"),
        pytest.param(RuntimeError("boom"), RuntimeError, "boom", id="bug"),
    ],
)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_failure_in_the_middle_leaves_nothing_behind(
    dense_folder, tmp_path, monkeypatch, error, expected, match, existing
):
    out = tmp_path / "out" / "moe"
    if existing:
        upcycle_checkpoint(dense_folder, out, num_experts=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    fail_at(monkeypatch, 12, error)
    with pytest.raises(expected, match=match):
        upcycle_checkpoint(dense_folder, out, num_experts=3, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (tmp_path / "out").exists() == existing


def test_a_model_is_replaced_only_when_asked(dense_folder, tmp_path):
    out = tmp_path / "moe"
    upcycle_checkpoint(dense_folder, out, num_experts=2, max_shard_size="20KB")
    with pytest.raises(FileExistsError, match="holds a model already.*`overwrite=True`"):
        upcycle_checkpoint(dense_folder, out, num_experts=3)
    upcycle_checkpoint(dense_folder, out, num_experts=3, overwrite=True)
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["model.safetensors"]
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds files, but no model"):
        upcycle_checkpoint(dense_folder, tmp_path / "mine", overwrite=True)
    with pytest.raises(ValueError, match="is the source folder"):
        upcycle_checkpoint(dense_folder, dense_folder, overwrite=True)


def test_too_little_space_is_found_before_anything_is_written(dense_folder, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="needs .* GB, its disk has 0.0 GB free"):
        upcycle_checkpoint(dense_folder, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


# --- damaged and unsuitable sources ---


def cut_off(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def garbage(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].write_bytes(b"\x00\x01" * 50)


def remove(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def spoil_index(folder: Path) -> None:
    (folder / INDEX_NAME).write_text('{"weight_map": ')


def drop_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    name = "model.layers.1.mlp.down_proj.weight"
    file = folder / index["weight_map"].pop(name)
    save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file, {"format": "pt"})
    (folder / INDEX_NAME).write_text(json.dumps(index))


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))


def only_pickle(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        pytest.param(cut_off, ValueError, r"cannot read .*model-00002-of-\d+.safetensors.*cut off", id="cut_off"),
        pytest.param(garbage, ValueError, r"cannot read .*model-00002-of-\d+.safetensors", id="garbage"),
        pytest.param(remove, FileNotFoundError, r"lacks model-00002-of-\d+.safetensors", id="removed"),
        pytest.param(spoil_index, ValueError, "cannot read .*index.json", id="index"),
        pytest.param(drop_tensor, ValueError, "lacks 1 tensors.*layers.1.mlp.down_proj.weight", id="tensor"),
        pytest.param(other_config, ValueError, r"has the shape \(.*48.*but its config asks for \(.*64", id="config"),
        pytest.param(
            only_pickle, FileNotFoundError, r"holds no model.safetensors .*\(but pytorch_model.bin\)", id="bin"
        ),
        pytest.param(no_config, Exception, "config.json|model_type", id="no_config"),
    ],
)
def test_a_damaged_source_is_named_before_anything_is_written(dense_folder, tmp_path, spoil, error, match):
    spoil(dense_folder)
    with pytest.raises(error, match=match):
        upcycle_checkpoint(dense_folder, tmp_path / "moe", num_experts=3)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_file_is_no_folder(dense_folder, tmp_path):
    with pytest.raises(ValueError, match="is a file; pass the folder.*`from_gguf`"):
        upcycle_checkpoint(next(dense_folder.glob("*.safetensors")), tmp_path / "moe")


@pytest.mark.parametrize("source", ["no-such-model", "me/no-such-model", "./no/such/folder"])
def test_a_missing_source_is_named(source, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{source} is no folder, and no model could be fetched by that name"):
        upcycle_checkpoint(source, tmp_path / "moe")
    assert not any(tmp_path.iterdir())


def test_initialisations_that_need_the_model_are_refused_and_their_result_is_taken(dense_folder, tmp_path):
    with pytest.raises(ValueError, match="runs the dense model, which is not loaded here"):
        upcycle_checkpoint(dense_folder, tmp_path / "moe", gate_init="hidden")
    gates = {str(layer): torch.randn(3, 32) for layer in range(3)}
    upcycle_checkpoint(dense_folder, tmp_path / "moe", num_experts=3, gate_init=gates, target="ext")
    assert torch.equal(contents(tmp_path / "moe")["model.layers.2.mlp.gate.weight"], gates["2"])


def test_a_method_that_makes_the_wrong_shape_is_named(dense_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(method_registry, "_METHODS", dict(method_registry._METHODS))

    @register_upcycling_method("wrong")
    class Wrong(SparseUpcycling):
        def convert(self, dense, num_copies, seed):
            return super().convert(dense, num_copies + 1, seed)

    with pytest.raises(ValueError, match="gate_up_proj` should be .*, but is"):
        upcycle_checkpoint(dense_folder, tmp_path / "moe", "wrong", num_experts=3, target="ext", check=False)
    assert not (tmp_path / "moe").exists()
