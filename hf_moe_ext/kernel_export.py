"""The kernels as a repository of the Hub, which the package `kernels` loads without this one.

The layout is that of [kernel repositories](https://huggingface.co/docs/kernels/kernel-requirements): one folder below
`build/` for each kind of device, with an `__init__.py`, a `layers.py` and a `metadata.json`. The kernels are Python
and Triton, so nothing is compiled, and the folders differ in their names alone. `torch-universal`, one folder for all
devices, is what the package `kernels` had before; it means to drop it
([#190](https://github.com/huggingface/kernels/pull/190)).
"""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from string import Template

from .files import check_target, staged_folder


NAME = "hf-moe-ext"
LAYER = "MoeExtExperts"
VARIANTS = {"torch-cpu": "cpu", "torch-cuda": "cuda"}  # folder -> backend

_SOURCE = Path(__file__).parent / "kernels"
_ROOTS = ("functions", "layers")
_DATA = ("tuned.json",)
_TOP_LEVEL = {"build", "README.md", "LICENSE", ".gitattributes"}
_CARD = Path(__file__).parent / "templates" / "kernel_card.md"
_INIT = '''"""Mixture-of-Experts layers: experts and routers, on a CPU and, in Triton, on a GPU."""

from . import layers
from .functions import RouteRule, experts, route


__all__ = ["RouteRule", "experts", "layers", "route"]
'''


def export_kernels(directory: str | os.PathLike[str], *, version: int = 0, overwrite: bool = False) -> Path:
    """Write the kernels as a kernel repository, completely or not at all.

    Args:
        directory (`str` or `PathLike`):
            A new or empty folder.
        version (`int`, *optional*, defaults to 0):
            Number of the version. By convention of the Hub, 0 stands for kernels whose interface may still change.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether an earlier export may be replaced.

    Returns:
        `Path`: the folder.

    Raises:
        FileExistsError: the folder holds something else, or an export and `overwrite` is not set.
        NotADirectoryError: a file stands in the way.
        ValueError: a negative version.
    """
    if version < 0:
        raise ValueError(f"`version` must not be negative, got {version}.")
    with staged_folder(directory, overwrite=overwrite, check=_check) as folder:
        for variant, backend in VARIANTS.items():
            _write_variant(folder / "build" / variant, backend, version)
        card = Template(_CARD.read_text(encoding="utf-8")).substitute(version=version, layer=LAYER)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "LICENSE").write_text(_license(), encoding="utf-8")
    return Path(os.path.realpath(Path(directory).expanduser()))


def is_export(folder: Path) -> bool:
    """Whether a folder was written by `export_kernels`."""
    for variant in VARIANTS:
        try:
            metadata = json.loads((folder / "build" / variant / "metadata.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(metadata, dict) and metadata.get("name") == NAME:
            return True
    return False


def _check(directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    target = Path(os.path.realpath(Path(directory).expanduser()))
    if not target.is_dir() or not any(target.iterdir()):
        return check_target(target)
    if not is_export(target):
        raise FileExistsError(f"`{target}` holds files, but no kernels. Choose a new or an empty folder.")
    if not overwrite:
        raise FileExistsError(f"`{target}` holds kernels already. Choose another folder, or overwrite them.")
    foreign = sorted(path.name for path in target.iterdir() if path.name not in _TOP_LEVEL)
    foreign += sorted(f"build/{path.name}" for path in (target / "build").iterdir() if path.name not in VARIANTS)
    if foreign:
        raise FileExistsError(
            f"`{target}` holds {foreign}, which would be lost with the kernels that are replaced. Move them away, or "
            "choose another folder."
        )
    return target


def source_files() -> list[str]:
    """Names of the kernel files that an export needs: those that its functions and layers import, however late."""
    found: list[str] = []
    waiting = list(_ROOTS)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.append(name)
        for node in ast.walk(ast.parse((_SOURCE / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                waiting += [node.module] if node.module else [alias.name for alias in node.names]
    return sorted(f"{name}.py" for name in found)


def _license() -> str:
    """The text of the licence: in the metadata of an installed package, in the root of a checkout."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        text = importlib.metadata.distribution(NAME).read_text("licenses/LICENSE")
        if text:
            return text
    return (Path(__file__).resolve().parents[1] / "LICENSE").read_text(encoding="utf-8")


def _write_variant(folder: Path, backend: str, version: int) -> None:
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(_INIT, encoding="utf-8")
    for name in (*source_files(), *_DATA):
        shutil.copyfile(_SOURCE / name, folder / name)
    # Several versions may be loaded into one process, so modules and operators have a name that is theirs alone.
    mark = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()[:7]
    name = f"_{NAME.replace('-', '_')}_{backend}_{mark}"
    namespace = f'"""The namespace of the operators of this export."""\n\nNAMESPACE = "{name}"\n'
    (folder / "namespace.py").write_text(namespace, encoding="utf-8")
    metadata = {
        "name": NAME,
        "id": name,
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {
                path.name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
                for path in sorted(folder.iterdir())
            },
        },
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
