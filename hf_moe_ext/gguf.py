"""GGUF files as plain transformers models, which save and train."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ._imports import require
from .files import staged_folder


logger = logging.get_logger(__name__)

CACHE_VARIABLE = "HF_MOE_EXT_CACHE"

_MAGIC = b"GGUF"
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


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
            The `.gguf` file. It holds a whole model, not one part of several.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of the model's parameters.
        cache_dir (`str`, `PathLike` or `False`, *optional*):
            Where the converted model is kept, in float32; `cache_root()` by default, `False` keeps nothing.

    Returns:
        `tuple`: the model in evaluation mode, and the tokenizer.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file is no GGUF file, is damaged, or holds an architecture transformers cannot read.
        ImportError: where the package `gguf` is missing.

    Examples:
        ```python
        >>> model, tokenizer = from_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
        >>> model.save_pretrained("smollm2")
        ```
    """
    path = Path(path).expanduser().absolute()
    _check(path, dtype)
    if cache_dir is False:
        require("gguf", "Reading GGUF files")
        return _convert(path, dtype)
    root = cache_root() if cache_dir is None else Path(cache_dir).expanduser()
    # Another version of transformers may read the same file differently.
    folder = root / "gguf" / f"{file_sha256(path)[:16]}-transformers-{transformers.__version__}"
    if folder.is_dir():
        try:
            return _load(folder, path, dtype)
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning(f"the converted model in {folder} is damaged ({error}); converting {path.name} anew.")
            shutil.rmtree(folder, ignore_errors=True)
    require("gguf", "Reading GGUF files")
    logger.warning(f"Converting {path.name} once; the result is kept in {folder}.")
    model, tokenizer = _convert(path, torch.float32)
    try:
        with staged_folder(folder, overwrite=True) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    except (OSError, SafetensorError) as error:  # a full disk costs the next call its time, and this one nothing
        logger.warning(f"the converted model cannot be kept in {folder}, so the next call converts again: {error}")
    return model.to(dtype), tokenizer


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as a hexadecimal string."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _check(path: Path, dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a floating-point `torch.dtype`, got {dtype!r}.")
    if path.is_dir():
        inside = ", ".join(sorted(file.name for file in path.glob("*.gguf"))) or "none"
        raise FileNotFoundError(
            f"{path} is a folder; pass the path of the .gguf file itself (in this folder: {inside})."
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no GGUF file at {path}. Pass the path of an existing .gguf file.")
    part = _PART.search(path.name)
    if part and int(part[1]) > 1:
        raise ValueError(
            f"{path} is one of {int(part[1])} parts of a model, expected one file. Join them first: "
            "`llama-gguf-split --merge FIRST_PART WHOLE.gguf`."
        )
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ValueError(
            f"{path} is not a GGUF file: it starts with {magic!r}, expected {_MAGIC!r}. Check that the download is "
            "complete; a folder made by `save_pretrained` is loaded with `AutoModelForCausalLM.from_pretrained`."
        )


def _convert(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import GgufConfig

    # An absolute path: transformers looks for a relative one in the current folder first.
    source: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": str(path)}
    try:
        config = AutoConfig.from_pretrained(**source)
    except Exception as error:  # the reader raises whatever numpy and struct raise
        raise _explained(path, error) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise _explained(path, f"{type(config).__name__} has no causal language model")
    # Without `dequantize` the model stays marked as quantised, and neither saves nor trains.
    model = AutoModelForCausalLM.from_pretrained(
        **source, config=config, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    return _named(path, model, AutoTokenizer.from_pretrained(**source))


def _explained(path: Path, cause: object) -> ValueError:
    """What to tell the user about a file that transformers does not read as a causal language model."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        field = GGUFReader(path).fields["general.architecture"]
        architecture = bytes(field.parts[field.data[0]]).decode()
    except Exception as error:
        return ValueError(
            f"{path} is a damaged GGUF file ({type(error).__name__}: {error}). Expected a complete file that names "
            "its architecture; fetch it again."
        )
    return ValueError(
        f"{path} holds a model of architecture {architecture!r}, which transformers {transformers.__version__} cannot "
        f"read from GGUF as a causal language model ({cause}). Expected one of: "
        f"{', '.join(sorted(GGUF_SUPPORTED_ARCHITECTURES))}. Use a newer transformers or the original checkpoint."
    )


def _load(folder: Path, path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return _named(path, model, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def _named(path: Path, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Name model and tokenizer after the file, so that they are the same from the cache and from the conversion."""
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = str(path)
    return model.eval(), tokenizer
