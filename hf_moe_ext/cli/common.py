"""What the commands share: parsing of dataclasses, positional arguments and YAML, loading of models, printing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser
from transformers.utils import logging

from ..modeling.configuration_moe_ext import RouterConfig, _unknown


Args = TypeVar("Args")


class UsageError(ValueError):
    """Wrong options; exit code 2."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}\n`{self.prog} --help` shows the options.")


def parse(command: str, classes: Any, argv: list[str], positional: Sequence[str] = (), epilog: str = "") -> Any:
    """Fill the dataclass (or the tuple of them) from the command line and from YAML files given by `--config`.

    Leading words without dashes fill the fields named in `positional`. Values of the command line win over those of a
    file.

    Raises:
        UsageError: for unknown options or files that cannot be read.
    """
    classes = classes if isinstance(classes, tuple) else (classes,)
    prog = f"hf-moe {command}"
    usage = " ".join([prog, *(name.upper() for name in positional), "[options]"])
    parser = _Parser(classes, prog=prog, usage=usage, epilog=epilog, allow_abbrev=False)
    argv = list(argv)
    words: list[str] = []
    for name in positional:
        if not argv or argv[0].startswith("-"):
            break
        words += [f"--{name}", argv.pop(0)]
    from_files: list[str] = []
    while "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise UsageError("`--config` needs a file.")
        from_files += _yaml_arguments(Path(argv[at + 1]), classes)
        del argv[at : at + 2]
    values = parser.parse_args_into_dataclasses(args=[*from_files, *words, *argv], look_for_args_file=False)
    return values[0] if len(classes) == 1 else values


def _yaml_arguments(path: Path, classes: tuple[Any, ...]) -> list[str]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"the configuration file {path} does not exist.") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold `option: value` lines, got {type(data).__name__}.")
    known = {field.name for cls in classes for field in fields(cls)}
    argv: list[str] = []
    for key, value in data.items():
        if key not in known:
            raise UsageError(f"{path}: {_unknown('option', str(key), known)}")
        if isinstance(value, list):
            argv += [f"--{key}", *map(str, value)]
        elif value is not None:
            argv += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return argv


def configure_logging(verbose: bool) -> None:
    """Quiet by default: our commands print what a user needs; libraries log warnings."""
    (logging.set_verbosity_info if verbose else logging.set_verbosity_warning)()


def parse_router(text: str | None) -> RouterConfig | None:
    """A router from `top_p`, `top_p:threshold=0.4,renormalize=true` or JSON `{"type": "top_p", "threshold": 0.4}`."""
    if text is None:
        return None
    text = text.strip()
    if text.startswith("{"):
        try:
            return RouterConfig.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise UsageError(f"`--router` is not valid JSON ({error}): {text}") from None
    name, _, rest = text.partition(":")
    data: dict[str, Any] = {"type": name}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"`--router` has `{item}`; expected `name:key=value,key=value`.")
        try:
            data[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            data[key.strip()] = value.strip()
    return RouterConfig.from_dict(data)


def load_model(source: str, *, trust_remote_code: bool = False, dtype: str = "auto", **kwargs: Any) -> Any:
    """A model from a folder, a `.gguf` file or a Hub id, with the head its config names.

    Raises:
        OSError: where there is no model; the message says what was looked for.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    if source.endswith(".gguf"):
        from ..gguf import from_gguf

        return from_gguf(source)[0]
    check_source(source)
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    name = (config.architectures or [None])[0]
    auto: Any = AutoModelForCausalLM
    for candidate in (
        "AutoModelForSeq2SeqLM",
        "AutoModelForSequenceClassification",
        "AutoModelForImageClassification",
    ):
        mapping = getattr(transformers, candidate)._model_mapping
        if name and type(config) in mapping and mapping[type(config)].__name__ == name:
            auto = getattr(transformers, candidate)
    return auto.from_pretrained(
        source,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        **kwargs,
    )


def check_source(source: str) -> None:
    """Say plainly when a local path holds no model, before anything looks for it on a hub."""
    path = Path(source)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{source} is a file; expected a model folder, a `.gguf` file or a Hub id.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json, so it is no model folder.")
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise FileNotFoundError(f"there is no folder {source}.")


def load_tokenizer(source: str) -> Any:
    """The tokenizer beside a model, or `None` where there is none."""
    from transformers import AutoTokenizer

    if source.endswith(".gguf"):
        from ..gguf import from_gguf

        return from_gguf(source)[1]
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return None


def check_output(directory: str, overwrite: bool) -> None:
    """Refuse a folder that already holds a model, before any work is done."""
    path = Path(directory)
    if path.is_file():
        raise FileExistsError(f"{directory} is a file; expected a folder to write to.")
    if (path / "config.json").exists() and not overwrite:
        raise FileExistsError(f"{directory} already holds a model. Choose another folder, or pass `--overwrite`.")


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Aligned text columns."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
