"""The kernels as a repository of the Hub: what is in it, that it stands alone, and that nothing is lost."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from hf_moe_ext import kernel_export
from hf_moe_ext.cli.main import main
from hf_moe_ext.kernel_export import VARIANTS, export_kernels, source_files
from hf_moe_ext.kernels import functions
from hf_moe_ext.kernels.layers import MoeExtExperts

from .references import (
    ROUTING_CASES,
    experts_reference,
    random_experts,
    random_hidden,
    relative_error,
    routing_weights,
)
from .test_expert_weights import made


ROOT = Path(__file__).resolve().parents[2]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return export_kernels(tmp_path_factory.mktemp("export") / "kernels")


def load(variant: Path) -> Any:
    """Import a variant as the package `kernels` does."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded(exported) -> Any:
    return load(exported / "build" / "torch-cpu")


def case(layout: str = "stock", name: str = "unused") -> tuple[Any, ...]:
    """Experts on the CPU with what they get; weights of unused slots are NaN."""
    index, num_experts = ROUTING_CASES[name]
    experts = random_experts(num_experts, layout=layout)
    return experts, random_hidden(len(index)), index, routing_weights(index, num_experts)


def parameters(experts: Any) -> tuple[Any, ...]:
    return experts.up, experts.down, experts.up_bias, experts.down_bias


def options(experts: Any) -> dict[str, Any]:
    return {name: getattr(experts, name) for name in ("has_gate", "is_transposed", "is_concatenated")} | {
        "activation": experts.activation.kind,
        "alpha": experts.activation.alpha,
        "limit": experts.activation.limit,
        "shift": experts.activation.shift,
    }


# What is written ----------------------------------------------------------------------------------------------------


def test_files(exported):
    assert sorted(path.name for path in exported.iterdir()) == ["LICENSE", "README.md", "build"]
    assert sorted(path.name for path in (exported / "build").iterdir()) == sorted(VARIANTS)
    wanted = {"__init__.py", "layers.py", "metadata.json", "namespace.py", "tuned.json", *source_files()}
    for variant in VARIANTS:
        assert {path.name for path in (exported / "build" / variant).iterdir()} == wanted
    assert "Apache License" in (exported / "LICENSE").read_text()
    assert (exported / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_what_is_imported_late_is_there_too():
    """And nothing that only the package needs."""
    found = set(source_files())
    assert {"triton_experts.py", "triton_router.py", "cpu_experts.py", "operators.py", "tuning.py"} <= found
    assert not {"experts.py", "triton_tune.py"} & found


@pytest.mark.parametrize("variant", VARIANTS)
def test_metadata(exported, variant):
    folder = exported / "build" / variant
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["name"] == "hf-moe-ext" and metadata["version"] == 0 and metadata["license"] == "Apache-2.0"
    assert metadata["backend"] == {"type": VARIANTS[variant]} and metadata["python-depends"] == []
    assert metadata["id"].isidentifier() and f"_{VARIANTS[variant]}_" in metadata["id"]
    digests = metadata["digest"]["files"]
    assert digests.keys() == {path.name for path in folder.iterdir()} - {"metadata.json"}
    for name, digest in digests.items():
        assert base64.b64decode(digest) == hashlib.sha256((folder / name).read_bytes()).digest()


def test_names_are_those_of_the_content(exported, tmp_path, monkeypatch):
    again = export_kernels(tmp_path / "again")
    assert tree(again) == tree(exported)
    source = tmp_path / "source"
    source.mkdir()
    for name in (*source_files(), "tuned.json"):
        (source / name).write_bytes((kernel_export._SOURCE / name).read_bytes())
    (source / "route_rule.py").write_text((source / "route_rule.py").read_text() + "\n# changed\n")
    monkeypatch.setattr(kernel_export, "_SOURCE", source)
    other = export_kernels(tmp_path / "other", version=3)
    ids = [json.loads((folder / "build/torch-cpu/metadata.json").read_text())["id"] for folder in (exported, other)]
    assert ids[0] != ids[1]
    assert json.loads((other / "build/torch-cuda/metadata.json").read_text())["version"] == 3
    assert "version=3" in (other / "README.md").read_text()


def test_only_pytorch_and_triton_are_imported(exported):
    for path in (exported / "build" / "torch-cpu").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if node.level == 0 else []
            known = {*sys.stdlib_module_names, "torch", "triton"}
            assert {name.partition(".")[0] for name in names} <= known, path.name


# That it stands alone -----------------------------------------------------------------------------------------------


def test_in_a_process_without_this_package(exported, tmp_path, plugin_free_python):
    experts, hidden, index, weights = case("gpt_oss")
    expected = experts_reference(hidden, experts, index, weights)
    torch.save([hidden, index, weights, parameters(experts), options(experts), expected], tmp_path / "case.pt")
    code = """
import importlib.util, json, pathlib, sys
import torch
sys.modules["transformers"] = None  # not to be imported
folder = pathlib.Path(sys.argv[1])
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
sys.modules[name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
device = "cuda" if torch.cuda.is_available() else "cpu"
case = torch.load(sys.argv[2], weights_only=True, map_location=device)
hidden, index, weights, parameters, options, expected = case
found = module.experts(hidden, index, weights, *parameters, **options)
print(float((found.double() - expected).norm() / expected.norm()))
assert not [n for n in sys.modules if n.startswith("hf_moe_ext")]
"""
    done = plugin_free_python(code, exported / "build" / "torch-cuda", tmp_path / "case.pt")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="the references are on the GPU")
@pytest.mark.parametrize("layout", ["stock", "gpt_oss", "interleaved", "plain_transposed"])
def test_experts_beside_this_package(loaded, layout):
    """Operators of two exports and of the package do not meet; gradients are those of float64."""
    experts, hidden, index, weights = case(layout)
    assert loaded.experts.__module__ != functions.experts.__module__
    tensors = [tensor.clone().requires_grad_() for tensor in (hidden, experts.up, experts.down)]
    slow = [tensor.detach().double().requires_grad_() for tensor in tensors]
    for compiled in (False, True):

        def call(hidden, up, down):
            others = (experts.up_bias, experts.down_bias)
            return loaded.experts(hidden, index, weights, up, down, *others, **options(experts))

        run = torch.compile(call, backend="eager", fullgraph=True) if compiled else call
        out = run(*tensors)
        found = torch.autograd.grad(out.square().sum(), tensors)
        clean = torch.where(index < experts.num_experts, weights, 0.0)
        replaced = types.SimpleNamespace(**{**vars(experts), "up": slow[1], "down": slow[2]})
        replaced.num_experts, replaced.hidden_size = experts.num_experts, experts.hidden_size
        expected = experts_reference(slow[0], replaced, index, clean)
        wanted = torch.autograd.grad(expected.square().sum(), slow)
        assert relative_error(out.detach(), expected.detach()) < 1e-5
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))
        torch._dynamo.reset()


def test_route(loaded):
    triton = pytest.importorskip("triton")
    logits = torch.randn(5, 7, device="cuda" if torch.cuda.is_available() else "cpu", requires_grad=True)
    weights, index = loaded.route(logits, 2, rule=loaded.RouteRule(divide="all"))
    best = logits.softmax(-1).topk(2)
    torch.testing.assert_close(weights, best.values)
    assert torch.equal(index.long(), best.indices)
    if not logits.is_cuda:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton.knobs.runtime, "interpret", False)
            with pytest.raises(ValueError, match="`route` runs on a GPU"):
                loaded.route(logits, 2)


def wrong_calls() -> dict[str, tuple[type[Exception], dict[str, Any]]]:
    return {
        "`hidden` must be": (ValueError, {"hidden": torch.randn(4, 5)}),
        "`index` and `weights` must be": (ValueError, {"weights": torch.rand(4, 3)}),
        "`index` must hold integers": (ValueError, {"index": torch.rand(4, 2)}),
        "`gate_up_proj` must be": (ValueError, {"gate_up_proj": torch.randn(3, 12, 7)}),
        "`gate_up_proj_bias` must be": (ValueError, {"gate_up_proj_bias": torch.randn(3, 6)}),
        "`down_proj_bias` must be": (ValueError, {"down_proj_bias": torch.randn(8)}),
        "must have three axes": (ValueError, {"down_proj": torch.randn(8, 6)}),
        "`activation` must be": (ValueError, {"activation": "swish"}),
        "no kernels for `meta`": (ValueError, {"hidden": torch.randn(4, 8, device="meta")}),
        "of one floating point type": (TypeError, {"gate_up_proj": torch.ones(3, 12, 8, dtype=torch.float64)}),
        "tokens of any, got torch.int64": (TypeError, {"hidden": torch.ones(4, 8, dtype=torch.int64)}),
    }


@pytest.mark.parametrize("message", wrong_calls())
def test_wrong_calls(loaded, message):
    right = {
        "hidden": torch.randn(4, 8),
        "index": torch.tensor([[0, 1]] * 4),
        "weights": torch.rand(4, 2),
        "gate_up_proj": torch.randn(3, 12, 8),
        "down_proj": torch.randn(3, 8, 6),
    }
    assert loaded.experts(**right).shape == (4, 8)
    error, changes = wrong_calls()[message]
    with pytest.raises(error) as caught:
        loaded.experts(**{**right, **changes})
    assert message in str(caught.value)


# The layer ----------------------------------------------------------------------------------------------------------


def test_the_layer_has_nothing_of_its_own(loaded):
    layer = loaded.layers.MoeExtExperts
    own = {name for name in vars(layer) if not name.startswith("__")}
    assert own == {"forward", "can_torch_compile", "has_backward"} and layer.__init__ is torch.nn.Module.__init__


def put_in(layer: type, module: torch.nn.Module) -> None:
    module.forward = types.MethodType(layer.forward, module)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_layer_in_place_of_stock_experts(loaded, name):
    experts = next(m for m in tiny_model(name).modules() if hasattr(m, "is_concatenated")).eval()
    number = experts.num_experts
    width = experts.gate_up_proj.shape[1 if experts.is_transposed else 2]
    hidden, weights = torch.randn(6, width), torch.rand(6, 2)
    index = torch.tensor([[0, 1], [1, 0], [number - 1, 0], [1, 1], [0, number - 1], [1, 0]])
    with torch.no_grad():
        expected = experts(hidden, index, weights)
        put_in(loaded.layers.MoeExtExperts, experts)
        torch.testing.assert_close(experts(hidden, index, weights), expected)
        index[0, 1], weights[0, 1] = number, float("nan")  # the stock forward cannot do this
        assert experts(hidden, index, weights).isfinite().all()


class Stock(torch.nn.Module):
    """Says when it is asked."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return "stock"


def test_what_the_layer_cannot_do_is_left_to_the_module(monkeypatch):
    experts = made(torch.nn.SiLU(), dropout=torch.nn.Dropout(0.5)).train()
    experts.__class__ = type("StockExperts", (Stock, type(experts)), {})
    put_in(MoeExtExperts, experts)
    hidden, index, weights = torch.randn(3, 4), torch.tensor([[0], [1], [0]]), torch.rand(3, 1)
    assert experts(hidden, index, weights) == "stock", "there is dropout inside"
    experts.eval()
    assert isinstance(experts(hidden, index, weights), torch.Tensor)
    with torch.autocast("cpu", torch.bfloat16):
        assert experts(hidden, index, weights) == "stock"
    assert experts(hidden.to("meta"), index, weights) == "stock"


# With the package `kernels` -----------------------------------------------------------------------------------------

KERNELIZE = """
import sys
from pathlib import Path
import kernels, torch
from kernels._rust import Digest
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
folder = Path(sys.argv[1])
module = kernels.get_local_kernel(folder)
assert Path(module.__file__).parent == folder / "build" / "torch-cpu", module.__file__
for variant in (folder / "build").iterdir():
    metadata = kernels.Metadata.read_from_file(variant / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4)).eval()
ids = torch.randint(64, (2, 9))
expected = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
kernels.replace_kernel_forward_from_hub(MixtralExperts, "MoeExtExperts")
layer = kernels.LocalLayerRepository(folder, layer_name="MoeExtExperts")
with kernels.use_kernel_mapping({"MoeExtExperts": {"cpu": layer}}):
    model = kernels.kernelize(model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device="cpu")
found = [m for m in model.modules() if type(m) is MixtralExperts]
names = {m.forward.__func__.__module__ for m in found}
assert names == {module.__name__ + ".layers"}, names
for a, b in zip(torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters())), expected):
    torch.testing.assert_close(a, b)
assert not [n for n in sys.modules if n.startswith("hf_moe_ext")]
print("kernelized", len(found))
"""


def test_with_the_package_kernels(exported, tmp_path):
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package `kernels` is not installed")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if torch.cuda.is_available():
        pytest.skip("the package chooses the variant by how PyTorch was built")
    done = subprocess.run(
        [sys.executable, "-c", KERNELIZE, str(exported)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "kernelized 2"


# Folders ------------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    folder = tmp_path / "new" / "kernels"
    assert main(["kernels", "export", str(folder)]) == 0
    out = capsys.readouterr().out
    assert str(folder) in out and "MoeExtExperts" in out and kernel_export.is_export(folder)
    before = tree(tmp_path)
    assert main(["kernels", "export", str(folder)]) == 1
    assert "holds kernels already" in capsys.readouterr().err and tree(tmp_path) == before
    assert main(["kernels", "export", str(folder), "--overwrite", "--version", "2"]) == 0
    assert json.loads((folder / "build/torch-cpu/metadata.json").read_text())["version"] == 2
    assert main(["kernels", "export", str(tmp_path / "other"), "--version", "-1"]) == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_folders_are_left_alone(tmp_path, overwrite):
    (tmp_path / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="holds files, but no kernels"):
        export_kernels(tmp_path, overwrite=overwrite)
    with pytest.raises(NotADirectoryError):
        export_kernels(tmp_path / "notes.txt", overwrite=overwrite)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "build/torch-xpu/__init__.py", ".git/config"])
def test_what_stands_beside_earlier_kernels_is_not_lost(tmp_path, name):
    folder = export_kernels(tmp_path / "kernels")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="would be lost"):
        export_kernels(folder, overwrite=True)
    assert tree(tmp_path) == before


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    folder = export_kernels(tmp_path / "kernels")
    before = tree(tmp_path)

    def fail():
        raise OSError("disk full")

    monkeypatch.setattr(kernel_export, "_license", fail)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            export_kernels(target, overwrite=True)
    assert tree(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["kernels"]
