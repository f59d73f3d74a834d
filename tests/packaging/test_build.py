"""What is built and installed is the whole package, and works away from the checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PYTHON_OF_THE_TESTS = Path(sys.executable)

# Imports the package and one module behind each link, and says where the package came from.
PROBE = """
import hf_moe_ext
import hf_moe_ext.modeling.moe_families, hf_moe_ext.kernels, hf_moe_ext.trainers
print(hf_moe_ext.__file__)
"""


def source_modules() -> set[str]:
    return {
        str(Path(folder, name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "hf_moe_ext", followlinks=True)
        for name in names
        if name.endswith(".py")
    }


def run(*command: object, cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, f"{command}\n{process.stdout[-3000:]}\n{process.stderr[-3000:]}"
    return process.stdout.strip()


def copy_of_the_checkout(folder: Path) -> Path:
    """What a build reads; a copy, since builds and editable installs write into the checkout."""
    folder.mkdir()
    names = ("hf_moe_ext", "kernels", "modeling", "trainers", "pyproject.toml", "README.md", "LICENSE")
    run("cp", "-a", *(ROOT / name for name in names if (ROOT / name).exists()), folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """The source archive, and the wheel built from it, without network."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    checkout = copy_of_the_checkout(folder / "checkout")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    (source,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return source, wheel


def borrowing_environment(folder: Path) -> Path:
    """Python of a new virtual environment that finds the packages of this one, without their `.pth` files."""
    run(PYTHON_OF_THE_TESTS, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_source_archive_holds_every_module(archives):
    with tarfile.open(archives[0]) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}

    assert not [member.name for member in members if member.issym() or member.islnk()]
    assert source_modules() <= names
    assert {"LICENSE", "pyproject.toml"} <= names


def test_wheel_holds_exactly_the_modules_as_plain_folders(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())

    assert {name for name in names if name.endswith(".py")} == source_modules()
    assert "hf_moe_ext/py.typed" in names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"hf_moe_ext"}
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_wheel_works_away_from_the_checkout(archives, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", target, archives[1], cwd=elsewhere)

    origin = run(sys.executable, "-c", PROBE, cwd=elsewhere, PYTHONPATH=str(target))
    assert Path(origin) == target / "hf_moe_ext" / "__init__.py"

    listing = "import os, hf_moe_ext; print([e.name for e in os.scandir(hf_moe_ext.__path__[0]) if e.is_symlink()])"
    assert run(sys.executable, "-c", listing, cwd=elsewhere, PYTHONPATH=str(target)) == "[]"


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable_install_works_in_the_root_and_elsewhere(mode, tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    checkout = copy_of_the_checkout(tmp_path / "checkout")
    python = borrowing_environment(tmp_path / "env")
    pip = (python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    settings = () if mode == "lenient" else ("--config-settings", f"editable_mode={mode}")
    run(*pip, *settings, "--editable", checkout, cwd=tmp_path)

    origins = {Path(run(python, "-c", PROBE, cwd=folder)).resolve() for folder in (checkout, tmp_path)}
    assert origins == {(checkout / "hf_moe_ext" / "__init__.py").resolve()}
    assert (tmp_path / "env" / "bin" / "hf-moe").exists()
