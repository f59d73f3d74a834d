"""Hub-ready folders: write everything, load it in a clean process, compare, and only then put it in place."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from .files import check_target, staged_folder, write_file
from .generation.hub_export import routing_of, write_self_contrast
from .model_card import is_extended, render_card
from .verification import Verification, VerificationError, verify_folder


__all__ = [
    "ExportResult",
    "Verification",
    "VerificationError",
    "export",
    "export_checked",
    "push_to_hub",
    "verify_folder",
]


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ExportResult:
    """What `export_checked` wrote: the folder, its files by group, and what the verification found."""

    path: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    size: int = 0
    verification: Verification | None = None
    seconds: float = 0.0


def export(
    model: PreTrainedModel,
    directory: str | os.PathLike,
    *,
    tokenizer: Any = None,
    report: Any = None,
    overwrite: bool = False,
    verify: bool = True,
    card: bool = True,
    max_shard_size: int | str | None = None,
    custom_generate: str | None = None,
) -> Path:
    """Write a Hub-ready folder: weights, config, the code it needs, generation config, tokenizer, model card.

    Everything is written beside the target, then loaded there in a fresh process in which this package cannot be
    imported, and its logits are compared. Only then it takes the target's place. On any failure, a full disk and
    Ctrl-C included, the target is as before. A stock model gives a plain stock folder, without code of ours.

    Args:
        model (`PreTrainedModel`):
            A stock or an extended model.
        directory (`str` or `PathLike`):
            The folder to write.
        tokenizer (*optional*):
            Tokenizer or processor to save along, chat template included.
        report (*optional*):
            What the model card tells beyond the model: a dict as `render_card` takes it, the report of an upcycling,
            or the output folder of a training.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a folder that holds a model may be replaced.
        verify (`bool`, *optional*, defaults to `True`):
            Whether the result is loaded and compared. It needs memory for a second copy of the model.
        card (`bool`, *optional*, defaults to `True`):
            Whether a model card (`README.md`) is written.
        max_shard_size (`int` or `str`, *optional*):
            Largest size of one weights file, as in `save_pretrained`.
        custom_generate (`str`, *optional*):
            `"self_contrast"` writes `custom_generate/generate.py` along: who loads the folder with
            `trust_remote_code=True` then generates with self-contrast decoding, without this package.

    Returns:
        The folder's absolute path. `export_checked` takes the same arguments and tells more.

    Raises:
        FileExistsError: where the folder holds something that would be lost.
        TypeError: for something that is no transformers model, or one with adapters.
        VerificationError: where the clean process fails or computes something else.
        OSError: where the disk is full.

    Example:
        ```python
        >>> export(model, "my-moe", tokenizer=tokenizer)
        >>> AutoModelForCausalLM.from_pretrained("my-moe", trust_remote_code=True)
        ```
    """
    return export_checked(
        model,
        directory,
        tokenizer=tokenizer,
        report=report,
        overwrite=overwrite,
        verify=verify,
        card=card,
        max_shard_size=max_shard_size,
        custom_generate=custom_generate,
    ).path


def export_checked(
    model: PreTrainedModel,
    directory: str | os.PathLike,
    *,
    tokenizer: Any = None,
    report: Any = None,
    overwrite: bool = False,
    verify: bool = True,
    card: bool = True,
    max_shard_size: int | str | None = None,
    custom_generate: str | None = None,
) -> ExportResult:
    """As `export`, returning also what was written and what the verification found."""
    started = time.perf_counter()
    _check_model(model)
    if custom_generate is not None:
        _check_custom_generate(model, custom_generate)
    target = check_target(directory, overwrite=overwrite)
    _check_space(model, target)
    with _explain_full_disk(target), staged_folder(target, overwrite=overwrite) as folder:
        model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if custom_generate is not None:
            write_self_contrast(folder, model)
        found = verify_folder(folder, model, tokenizer=tokenizer) if verify else None
        if card:
            write_file(folder / "README.md", render_card(model, report=report, name=target.name, verification=found))
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = _by_group([str(path.relative_to(folder)) for path in paths])
        size = sum(path.stat().st_size for path in paths)
    for group, names in files.items():
        logger.info(f"{target}: {group}: {', '.join(names)}")
    return ExportResult(target, files, size, found, time.perf_counter() - started)


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: Any = None,
    report: Any = None,
    verify: bool = True,
    max_shard_size: int | str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
) -> str:
    """Export to a temporary folder, verify it there, and upload it in one commit.

    `model.push_to_hub(...)` works too; it uploads weights, config and code with the card of transformers, unverified.

    Args:
        model, tokenizer, report, verify, max_shard_size: as in `export`.
        repo_id (`str`):
            `"name"` or `"owner/name"`; the repository is made if need be.
        private, token, revision, create_pr, commit_message: as in `huggingface_hub`.

    Returns:
        Address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, repo_id.rpartition("/")[2])
        export(model, folder, tokenizer=tokenizer, report=report, verify=verify, max_shard_size=max_shard_size)
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=full_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit)


def _check_model(model: Any) -> None:
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise TypeError(
            "this model carries adapters. Merge them first (`model = model.merge_and_unload()`), or save the adapters "
            "alone with `model.save_pretrained(...)`."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}.")
    if not is_extended(model) and not hasattr(transformers, type(model).__name__):
        raise ValueError(
            f"{type(model).__name__} is neither a class of transformers nor one of this package, so nobody could load "
            "the exported folder. Save it with `save_pretrained`."
        )
    if not getattr(model, "hf_device_map", None) and any(p.is_meta for p in model.parameters()):
        raise ValueError("some parameters of this model are on the `meta` device, that is, hold no values yet.")


def _check_custom_generate(model: PreTrainedModel, name: str) -> None:
    if name != "self_contrast":
        raise ValueError(f'`custom_generate` must be "self_contrast", got {name!r}.')
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is no decoder-only model that generates text.")
    routing_of(model)


def _check_space(model: PreTrainedModel, target: Path) -> None:
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    place = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"the model needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free", str(place)
        )


@contextlib.contextmanager
def _explain_full_disk(target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # safetensors raises an error of its own, which holds the text of the system's.
        full = getattr(error, "errno", None) == errno.ENOSPC or "StorageFull" in str(error)
        if full or "No space left on device" in str(error):
            message = (
                f"the disk is full; nothing was left behind. Free some space or choose another disk for `{target}`"
            )
            raise OSError(errno.ENOSPC, message) from error
        raise


def _by_group(names: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        if ".safetensors" in name:
            group = "weights"
        elif name.endswith(".py"):
            group = "code"
        elif name in ("config.json", "generation_config.json"):
            group = "config"
        else:
            group = "model card" if name == "README.md" else "tokenizer"
        groups.setdefault(group, []).append(name)
    return groups
