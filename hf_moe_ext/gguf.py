"""GGUF files as plain transformers models, which save and train."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ._imports import require
from .files import staged_folder


logger = logging.get_logger(__name__)

CACHE_VARIABLE = "HF_MOE_EXT_CACHE"


def cache_root() -> Path:
    """Where converted models and fetched package files are kept: `$HF_MOE_EXT_CACHE`, or `~/.cache/hf_moe_ext`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "hf_moe_ext").expanduser()


def from_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | os.PathLike[str] | Literal[False] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file as a plain model and its tokenizer.

    The weights are dequantised, and the model is not marked as quantised, so it saves and trains like any other. The
    conversion takes about half a minute for a 135M model; its result is kept and later loads take a second.

    Args:
        path (`str` or `PathLike`):
            The `.gguf` file.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of the model's parameters.
        cache_dir (`str`, `PathLike` or `False`, *optional*):
            Where the converted model is kept; `cache_root()` by default, `False` keeps nothing.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file is no GGUF file, or holds an architecture transformers cannot read.
        ImportError: where the package `gguf` is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no GGUF file at {path}.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'.")
    require("gguf", "Reading GGUF files")
    if cache_dir is False:
        return _convert(path, dtype)
    folder = Path(cache_dir or cache_root()) / "gguf" / f"{_digest(path)[:16]}-transformers-{transformers.__version__}"
    if not (folder / "config.json").is_file():
        logger.warning(f"Converting {path.name} once; the result is kept in {folder}.")
        model, tokenizer = _convert(path, torch.float32)
        with staged_folder(folder, overwrite=True) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


def _convert(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import GgufConfig

    options: dict[str, Any] = {"gguf_file": path.name}
    # Without `dequantize` the model stays marked as quantised, and neither saves nor trains.
    config = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, quantization_config=config, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"transformers cannot read {path}: {error}") from error
    return model, tokenizer


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow(file)


def _slow(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
