"""What the commands share: loading of models with clear errors, checks of folders, routers, tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..modeling.configuration_moe_ext import RouterConfig
from .arguments import UsageError as UsageError
from .arguments import parse as parse


REMOTE_CODE = "comes with code of its own. Read it, then pass `--trust_remote_code` to run it."


def configure_logging(verbose: bool) -> None:
    """Quiet by default: our commands print what a user needs; libraries log warnings."""
    (logging.set_verbosity_info if verbose else logging.set_verbosity_warning)()
    if not verbose and not sys.stderr.isatty():
        logging.disable_progress_bar()  # the short ones of transformers, for reading and writing files


def parse_router(text: str | None) -> RouterConfig | None:
    """A router from `top_p`, `top_p:threshold=0.4,renormalize=true` or JSON `{"type": "top_p", "threshold": 0.4}`.

    Raises:
        UsageError: for a malformed text, an unknown router or key, or a value that does not fit.
    """
    if text is None:
        return None
    from ..modeling import modeling_moe_ext  # noqa: F401  (registers the routers)

    text = text.strip()
    if text.startswith("{"):
        data = _parse_json("router", text)
    else:
        name, _, rest = text.partition(":")
        data = {"type": name} | _parse_fields("router", rest, "name:key=value,key=value")
    try:
        return RouterConfig.from_dict(data)
    except (TypeError, ValueError) as error:
        raise UsageError(f"`--router`: {error}\n`hf-moe list routers` shows the routers.") from error


# Parts beside the router, which are options of `extend` and `upcycle`.
PARTS = ("zero_experts", "shared_experts", "momentum", "capacity")
# Those that `extend` has beside them. The first may name a preset: "mix_lora", "mola:r=4".
ADAPTERS = ("lora_experts", "expert_lora")


def parse_parts(**texts: str | None) -> dict[str, dict[str, Any]]:
    """Parts beside the router, by field of `MoeExtension`: `key=value,key=value`, JSON, or `""` for the defaults.

    Raises:
        UsageError: for a malformed text, an unknown key, or a value that does not fit.
    """
    from ..modeling.configuration_moe_ext import MoeExtension

    parts = {}
    for name, text in texts.items():
        if text is None:
            continue
        preset, colon, rest = text.partition(":")
        if name == "lora_experts" and preset.strip().isidentifier():
            data = {"preset": preset.strip()} | _parse_fields(name, rest, "preset:key=value")
        elif text.strip().startswith("{"):
            data = _parse_json(name, text)
        else:
            data = _parse_fields(name, text, "key=value")
        try:
            MoeExtension.from_dict({name: data})
        except (TypeError, ValueError) as error:
            raise UsageError(f"`--{name}`: {error}") from error
        parts[name] = data
    return parts


def _parse_json(option: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"`--{option}` is not valid JSON ({error}): {text}") from None


def _parse_fields(option: str, text: str, form: str) -> dict[str, Any]:
    data = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"`--{option}` has `{item}`; expected `{form}`.")
        try:
            data[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            data[key.strip()] = value.strip()
    return data


def is_gguf(source: str) -> bool:
    """Whether a model is given as a GGUF file."""
    return source.endswith(".gguf")


def load_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """The config of a folder or Hub id.

    Raises:
        OSError: where there is no model, or no config in it.
        ValueError: where the config is damaged, holds wrong types, or is of an unknown architecture.
    """
    from transformers import AutoConfig

    check_source(source)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise explained(source, error) from error


def load_model(source: str, *, trust_remote_code: bool = False, dtype: str = "auto", **kwargs: Any) -> Any:
    """A model from a folder, a `.gguf` file or a Hub id, with the head its config names.

    Raises:
        UsageError: for an unknown `dtype`.
        OSError: where there is no model; the message says what was looked for.
        ValueError: where config or weights are damaged, or do not fit each other.
    """
    import torch

    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise UsageError(f"`--dtype` must be auto, float32, bfloat16 or float16, got `{dtype}`.")
    if is_gguf(source):
        from ..gguf import from_gguf

        return from_gguf(source, **({} if dtype == "auto" else {"dtype": wanted}))[0]
    config = load_config(source, trust_remote_code=trust_remote_code)
    try:
        model, info = auto_class(config).from_pretrained(
            source, dtype=wanted, trust_remote_code=trust_remote_code, output_loading_info=True, **kwargs
        )
    except Exception as error:
        raise explained(source, error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights that its config asks for, such as `{missing[0]}`. Its weights are "
            "incomplete, or its config.json was changed; get both anew."
        )
    return model


def auto_class(config: Any) -> Any:
    """The Auto class with the head that a config names; causal language models by default."""
    import transformers

    name = (getattr(config, "architectures", None) or [None])[0]
    for candidate in _HEADS:
        mapping = getattr(transformers, candidate)._model_mapping
        if type(config) in mapping and name in (None, mapping[type(config)].__name__):
            return getattr(transformers, candidate)
    stock = transformers.AutoModelForCausalLM
    headless = type(config) not in stock._model_mapping and not getattr(config, "auto_map", None)
    return transformers.AutoModel if headless else stock


_HEADS = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageClassification",
    "AutoModelForMaskedLM",
)


def empty_model(source: str, config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model without weights.

    Raises:
        ValueError: where none can be made of the config.
    """
    import torch

    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise explained(source, error) from error


def explained(source: str, error: Exception) -> Exception:
    """What a user can act on, in place of what the libraries say."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    text = str(error)
    if "contains custom code" in text:
        return ValueError(f"{source} {REMOTE_CODE}")
    if isinstance(error, SafetensorError):
        return ValueError(_damaged_weights(source, text))
    if isinstance(error, StrictDataclassError):
        return ValueError(f"{source}/config.json does not hold what it should. {text}\nCorrect it, or get it anew.")
    if "ignore_mismatched_sizes" in text:
        return ValueError(
            f"the weights of {source} have other shapes than its config.json asks for (the table above names them). "
            "One of the two was changed; get both anew."
        )
    if "couldn't connect" in text or "offline mode" in text:
        return FileNotFoundError(
            f"there is no folder {source}, and no model of that name could be fetched from the Hub (no connection) or "
            "is in its cache. Check the name, or the connection."
        )
    if isinstance(error, (OSError, ValueError, ImportError, NotImplementedError, MemoryError)):
        return error
    if isinstance(error, RuntimeError) and "memory" in text:
        return error
    return ValueError(
        f"no model can be made of {source} ({type(error).__name__}: {text}). Most often its config.json holds a wrong "
        "value; get it anew. `--verbose` shows where it failed."
    )


def _damaged_weights(source: str, text: str) -> str:
    from ..upcycling.safetensors_io import SafetensorsFolder

    try:
        if Path(source).is_dir():
            SafetensorsFolder(Path(source))
    except (OSError, ValueError) as error:
        return str(error)
    return f"the weights of {source} cannot be read: {text}. A file is damaged or cut off; get it anew."


def check_source(source: str) -> None:
    """Say plainly when a local path holds no model, before anything looks for it on a hub."""
    path = Path(source)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{source} is a file; expected a model folder, a `.gguf` file or a Hub id.")
    if path.is_dir() and not (path / "config.json").is_file():
        inside = path / "model"
        hint = f" Did you mean {inside}?" if (inside / "config.json").is_file() else ""
        raise FileNotFoundError(f"{source} holds no config.json, so it is no model folder.{hint}")
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise FileNotFoundError(f"there is no folder {source}. Pass a model folder, a `.gguf` file or a Hub id.")


def require_dense(source: str, config: Any) -> None:
    """Refuse what cannot be upcycled."""
    family = _family(source, config)
    if config.model_type.startswith("moe_ext_") or family.moe is not None:
        raise ValueError(
            f"{source} is a Mixture-of-Experts already ({config.model_type}); only dense models are upcycled. "
            "`hf-moe extend` gives it other routers."
        )


def require_moe(source: str, config: Any, *, dense: bool = False) -> bool:
    """Refuse a dense model, unless `dense` says it is welcome. Returns whether the model is extended already."""
    family = _family(source, config)
    extended = config.model_type.startswith("moe_ext_")
    if not extended and family.moe is None and not dense:
        raise ValueError(
            f"{source} is a dense model ({config.model_type}) without routers. `hf-moe upcycle {source} OUTPUT` makes "
            "a Mixture-of-Experts of it."
        )
    return extended


def _family(source: str, config: Any) -> Any:
    from ..modeling.moe_families import get_family

    family = get_family(config.model_type)
    if family is None:
        raise ValueError(
            f"the architecture `{config.model_type}` of {source} is not supported. `hf-moe list families` shows those "
            "that are."
        )
    return family


_TOKENIZER_FILES = ("tokenizer*", "vocab*", "spiece.model", "*.tiktoken", "merges.txt", "sentencepiece*")


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model, or `None` where there is none.

    Raises:
        ValueError: where there is one that cannot be loaded.
    """
    from transformers import AutoTokenizer

    if is_gguf(source):
        from ..gguf import from_gguf

        return from_gguf(source)[1]
    folder = Path(source)
    if folder.is_dir() and not any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern)):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        if not folder.is_dir() and isinstance(error, OSError):
            return None
        if "contains custom code" in str(error):
            raise ValueError(f"the tokenizer of {source} {REMOTE_CODE}") from error
        raise ValueError(
            f"the tokenizer of {source} cannot be loaded ({type(error).__name__}: {error}). Its files are damaged; "
            "get them anew."
        ) from error


def require_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer at `source`.

    Raises:
        FileNotFoundError: where there is none.
    """
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise FileNotFoundError(f"{source} holds no tokenizer. `--tokenizer` takes a folder or Hub id that does.")
    return tokenizer


def check_output(directory: str, overwrite: bool) -> None:
    """Refuse a folder that holds something that would be lost, before any work is done."""
    path = Path(directory).expanduser()
    if path.is_dir() and (path / "config.json").exists() and not overwrite:
        raise FileExistsError(f"{directory} already holds a model. Choose another folder, or pass `--overwrite`.")
    from ..files import check_target

    check_target(path, overwrite=overwrite)


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Aligned text columns."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
