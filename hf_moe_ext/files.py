"""Writing files and folders so that a failure leaves nothing half-written."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_hex

from transformers.utils import logging


logger = logging.get_logger(__name__)

# Folders that belong to a model folder, so that replacing the model may replace them.
_MODEL_SUBFOLDERS = {"additional_chat_templates", "custom_generate"}


def holds_model(folder: Path) -> bool:
    """Whether `folder` holds a model, complete or not: a `config.json`, or weights."""
    return (folder / "config.json").exists() or any(folder.glob("*.safetensors"))


def check_target(directory: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """The absolute path of a folder that is about to be written, links resolved.

    A new or empty folder is fine. One that holds a model needs `overwrite=True`. One that holds anything else is never
    replaced.

    Raises:
        FileExistsError: where writing would destroy something; the message says what to do.
        NotADirectoryError: where a file stands in the way.
    """
    target = Path(os.path.realpath(Path(directory).expanduser()))
    for parent in target.parents:
        if parent.exists():
            if not parent.is_dir():
                raise NotADirectoryError(f"cannot write `{target}`: `{parent}` is a file. Choose another folder.")
            break
    if not target.exists():
        return target
    if not target.is_dir():
        raise NotADirectoryError(f"cannot write a folder `{target}`: a file of that name exists. Choose another name.")
    if not any(target.iterdir()):
        return target
    if not holds_model(target):
        raise FileExistsError(f"`{target}` holds files, but no model. Choose a new or an empty folder.")
    if not overwrite:
        raise FileExistsError(
            f"`{target}` holds a model already. Choose another folder, or pass `overwrite=True` to replace it."
        )
    foreign = sorted(path.name for path in target.iterdir() if path.is_dir() and path.name not in _MODEL_SUBFOLDERS)
    if foreign:
        raise FileExistsError(
            f"`{target}` holds the folders {foreign}, which would be lost with the model that is replaced. Move them "
            "away, or choose another folder."
        )
    return target


@contextlib.contextmanager
def staged_folder(
    directory: str | os.PathLike, *, overwrite: bool = False, check: Callable[..., Path] = check_target
) -> Iterator[Path]:
    """Write a folder completely or not at all.

    Yields an empty folder beside the target. When the block ends, it takes the target's place by renaming; a folder
    that stood there is removed last. When the block fails, Ctrl-C included, the target is as before.

    Args:
        directory (`str` or `PathLike`):
            The target. Its parents are made as needed.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a folder that holds a model may be replaced.
        check (`Callable`, *optional*, defaults to `check_target`):
            Called as it is, for folders that are no models.

    Raises:
        FileExistsError, NotADirectoryError: as `check`, before anything is written.

    Example:
        ```python
        >>> with staged_folder("model") as folder:
        ...     model.save_pretrained(folder)
        ```
    """
    target = check(directory, overwrite=overwrite)
    made = [parent for parent in target.parents if not parent.exists()]
    mark = token_hex(4)
    staging, old = (target.with_name(f".{target.name}.{mark}.{kind}") for kind in ("partial", "replaced"))
    done = False
    try:
        staging.mkdir(parents=True)
        yield staging
        check(target, overwrite=overwrite)  # it may have been filled meanwhile
        _swap(staging, target, old)
        done = True
    finally:
        if not done:
            shutil.rmtree(staging, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            logger.warning(f"the folder that was replaced could not be removed entirely; it is left at `{old}`.")


def _swap(staging: Path, target: Path, old: Path) -> None:
    if not target.exists():
        os.replace(staging, target)
        return
    os.replace(target, old)
    try:
        os.replace(staging, target)
    except BaseException:
        os.replace(old, target)
        raise


def write_file(path: str | os.PathLike, content: str | bytes) -> Path:
    """Write a file completely or not at all; an existing one is replaced in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{token_hex(4)}.partial")
    try:
        staging.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    return path
