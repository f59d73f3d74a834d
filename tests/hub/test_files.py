"""Folders and files are written completely or not at all."""

import os
import stat

import pytest

from hf_moe_ext import files
from hf_moe_ext.files import check_target, staged_folder, write_file


@pytest.fixture
def old_model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    return folder


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "a" / "b" / "model"
    with staged_folder(target) as folder:
        (folder / "config.json").write_text("new")
        assert not target.exists() and folder.parent == target.parent

    assert (target / "config.json").read_text() == "new"
    assert os.listdir(target.parent) == ["model"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~mask


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), staged_folder(tmp_path / "a" / "model") as folder:
        (folder / "half").write_text("x")
        raise error

    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_keeps_the_old_model(old_model, error):
    with pytest.raises(type(error)), staged_folder(old_model, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        raise error

    assert (old_model / "config.json").read_text() == "old"
    assert os.listdir(old_model.parent) == ["model"]


def test_a_failure_while_swapping_keeps_the_old_model(old_model, monkeypatch):
    replace = os.replace

    def fail_second(source, target):
        if str(source).endswith(".partial"):
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fail_second)
    with pytest.raises(OSError, match="no"), staged_folder(old_model, overwrite=True) as folder:
        (folder / "config.json").write_text("new")

    assert (old_model / "config.json").read_text() == "old"
    assert os.listdir(old_model.parent) == ["model"]


def test_an_old_model_is_replaced_as_a_whole(old_model):
    (old_model / "stale.py").write_text("")
    with staged_folder(old_model, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert (old_model / "config.json").read_text() == "old"

    assert os.listdir(old_model) == ["config.json"] and (old_model / "config.json").read_text() == "new"
    assert os.listdir(old_model.parent) == ["model"]


def test_a_link_stays_a_link(old_model, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old_model)
    with staged_folder(link, overwrite=True) as folder:
        (folder / "config.json").write_text("new")

    assert link.is_symlink() and (old_model / "config.json").read_text() == "new"


def test_a_model_is_replaced_only_on_demand(old_model):
    with pytest.raises(FileExistsError, match="holds a model already.*`overwrite=True`"):
        check_target(old_model)
    assert check_target(old_model, overwrite=True) == old_model


def test_what_is_no_model_is_never_replaced(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="no model. Choose a new or an empty folder"):
        check_target(tmp_path, overwrite=True)


def test_folders_beside_a_model_are_not_lost(old_model):
    (old_model / "checkpoint-10").mkdir()
    with pytest.raises(FileExistsError, match="checkpoint-10.*would be lost"):
        check_target(old_model, overwrite=True)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(NotADirectoryError, match="is a file|a file of that name"):
            check_target(target)


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "empty").mkdir()
    with staged_folder(tmp_path / "empty") as folder:
        (folder / "x").write_text("x")
    assert os.listdir(tmp_path / "empty") == ["x"]


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = write_file(tmp_path / "a" / "x", "old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_file(path, b"new")

    assert path.read_text() == "old" and os.listdir(path.parent) == ["x"]
