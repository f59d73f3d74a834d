"""The layout that imports, builds and uploads rely on."""

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import hf_moe_ext
from hf_moe_ext import _imports


ROOT = Path(__file__).resolve().parents[2]
LINKS = ("kernels", "modeling", "trainers")
MODELING_FILES = sorted((ROOT / "modeling").glob("*.py"))

# What files that travel to the Hub may import at module level besides the standard library and each other.
TRAVELLERS_MAY_IMPORT = {"packaging", "torch", "transformers"}


def source_files() -> list[Path]:
    return sorted(path for folder in ("hf_moe_ext", *LINKS) for path in (ROOT / folder).rglob("*.py"))


def module_names() -> set[str]:
    """Name of every module of the package, from the files."""
    names = set()
    for folder, _, files in os.walk(ROOT / "hf_moe_ext", followlinks=True):
        for file in (Path(folder, name).relative_to(ROOT) for name in files if name.endswith(".py")):
            parts = file.with_suffix("").parts
            names.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def python_in(folder: Path, code: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@pytest.mark.parametrize("name", LINKS)
def test_subpackages_are_relative_links_to_the_root(name):
    link = ROOT / "hf_moe_ext" / name

    assert link.is_symlink(), f"{link} is not a link; check out with core.symlinks=true"
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()


def test_kernels_has_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the Hugging Face package `kernels`"


def test_an_installed_package_kernels_wins_in_the_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'installed'")

    assert python_in(ROOT, "import kernels; print(kernels.owner)", PYTHONPATH=str(tmp_path)) == "installed"


def test_import_kernels_in_the_root():
    try:
        version("kernels")
    except PackageNotFoundError:
        code = "import kernels; print(kernels.__file__, [n for n in vars(kernels) if not n.startswith('_')])"
        assert python_in(ROOT, code) == "None []"
    else:
        found = Path(python_in(ROOT, "import kernels; print(kernels.__file__)"))
        assert ROOT / "kernels" not in found.parents


def test_walk_packages_ends_and_finds_every_module():
    found = set()
    for module in pkgutil.walk_packages(hf_moe_ext.__path__, "hf_moe_ext."):
        assert module.name not in found and module.name.count("hf_moe_ext") == 1
        found.add(module.name)

    # pkgutil does not look into folders without `__init__.py`; kernels/ is the only one
    assert found | {"hf_moe_ext"} >= {name for name in module_names() if not name.startswith("hf_moe_ext.kernels")}


@pytest.mark.parametrize("name", sorted(module_names()))
def test_every_module_imports(name):
    if name.endswith(".__main__"):
        pytest.skip("a script")
    optional = "triton" if name.startswith("hf_moe_ext.kernels") and not _imports.is_triton_available() else None
    if name == "hf_moe_ext.trainers.trl" and not _imports.is_trl_available():
        optional = "trl"
    try:
        importlib.import_module(name)
    except ImportError as error:
        if optional is None or optional not in str(error):
            raise
        pytest.skip(f"needs {optional}")


def test_modeling_is_flat():
    folders = [path for path in (ROOT / "modeling").iterdir() if path.is_dir() and path.name != "__pycache__"]

    assert not folders, "transformers copies remote code into one flat folder"


@pytest.mark.parametrize("path", MODELING_FILES, ids=lambda path: path.name)
def test_files_that_travel_import_only_what_is_there(path):
    text = path.read_text()
    # transformers collects the files to upload with a regular expression on lines, docstrings included
    assert not re.search(r"^\s*from\s+\.\s+import\b", text, re.MULTILINE), "`from . import x` is not collected"
    assert not re.search(r"^\s*(from|import)\s+(\.\.|\.\w+\.)", text, re.MULTILINE), (
        "only siblings: `from .x import y`"
    )

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute = [node.module]
        else:
            continue
        roots = {name.partition(".")[0] for name in absolute}
        assert "hf_moe_ext" not in roots, f"line {node.lineno}: modeling/ runs without the package"
        if node.col_offset == 0:
            foreign = roots - TRAVELLERS_MAY_IMPORT - sys.stdlib_module_names
            assert not foreign, f"line {node.lineno}: {foreign} may be absent where the file travels to"

    siblings = re.findall(r"^\s*from\s+\.(\w+)\s+import\b", text, re.MULTILINE)
    assert all((path.parent / f"{name}.py").exists() for name in siblings), siblings


def test_kernels_import_neither_modeling_nor_the_package():
    for path in (ROOT / "kernels").rglob("*.py"):
        names = re.findall(r"^\s*(?:from|import)\s+([\w.]+)", path.read_text(), re.MULTILINE)
        assert not [name for name in names if name.startswith(("hf_moe_ext", ".."))], path


def is_a_string_or_strings(node: ast.expr) -> bool:
    values = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
    return any(isinstance(value, ast.Constant) and isinstance(value.value, str) for value in values)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_family_knowledge_stands_in_the_family_records_only(path):
    if path.name == "moe_families.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        names = {getattr(side, "attr", getattr(side, "id", None)) for side in sides}
        asks = "model_type" in names and any(map(is_a_string_or_strings, sides))
        assert not asks, f"{path}:{node.lineno} asks for a model type; add what it needs to the family record"


def test_public_names_are_the_same_everywhere():
    tree = ast.parse((ROOT / "hf_moe_ext" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    for_type_checkers = {alias.name: node.module for node in block.body for alias in node.names}

    assert for_type_checkers == hf_moe_ext._PUBLIC
    assert list(hf_moe_ext._PUBLIC) == sorted(hf_moe_ext._PUBLIC) == hf_moe_ext.__all__
    assert set(hf_moe_ext.__all__) < set(dir(hf_moe_ext))


@pytest.mark.parametrize("name", hf_moe_ext.__all__)
def test_public_names_resolve(name):
    value = getattr(hf_moe_ext, name)

    assert value is getattr(importlib.import_module(f"hf_moe_ext.{hf_moe_ext._PUBLIC[name]}"), name)
    assert f"hf_moe_ext.{name}" not in module_names(), "importing the submodule would replace the public name"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_moe_ext.no_such_name


def test_version_stands_in_the_citation():
    assert f"\nversion: {hf_moe_ext.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_lowest_versions_are_those_of_the_extras():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    for name, (lowest, extra) in _imports._OPTIONAL.items():
        (requirement,) = extras[extra]
        assert lowest is None or requirement.partition(";")[0].strip() == f"{name}>={lowest}"


def test_a_missing_optional_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(_imports, "_installed_version", lambda name: None)
    with pytest.raises(ImportError, match=r"Reading GGUF files needs `gguf>=.*not installed.*\"hf-moe-ext\[gguf\]\""):
        _imports.require("gguf", "Reading GGUF files")


def test_an_optional_package_that_is_too_old_is_named_with_both_versions(monkeypatch):
    monkeypatch.setattr(_imports, "_installed_version", lambda name: "0.1")
    with pytest.raises(ImportError, match=r"needs `matplotlib>=3.8`, but version 0.1 is installed"):
        _imports.require("matplotlib", "Drawing")


def test_a_folder_without_code_is_not_an_optional_package(monkeypatch, tmp_path):
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    assert _imports._installed_version.__wrapped__("no_such_package") is None
