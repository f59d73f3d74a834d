"""Parsing: dataclasses as options, words without dashes, YAML files."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool


class UsageError(ValueError):
    """Wrong options; exit code 2."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option; no default where there is none."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        name = action.option_strings[0]
        if isinstance(action, argparse._StoreFalseAction) or action.nargs == "?":
            return name
        many = action.choices is not None and len(list(action.choices)) > 4
        return f"{name} {action.dest.upper() if many else self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.required or action.default == []:
            return action.help
        return super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}\n`{self.prog} --help` shows the options.")


def parse(command: str, classes: Any, argv: list[str], positional: Sequence[str] = (), epilog: str = "") -> Any:
    """Fill the dataclass (or the tuple of them) from the command line and from YAML files given by `--config`.

    Words without dashes fill the fields named in `positional`, in order. Values of the command line win over those of
    a file. The first dataclass's docstring describes the command. A dataclass may list in `_common_options` those of
    its options that `--help` shows; `--help_all` shows the others too.

    Raises:
        UsageError: for unknown or missing options, values that do not fit, and files that cannot be read.
    """
    classes = classes if isinstance(classes, tuple) else (classes,)
    prog = f"hf-moe {command}"
    usage = " ".join([prog, *(name.upper() for name in positional), "[options]"])
    notes = ["Options may be written with dashes, and given as `option: value` lines of a YAML file: `--config FILE`."]
    hidden = _rare_options(classes)
    if hidden:
        notes.append("`--help_all` shows all options.")
    parser = _Parser(
        classes,
        prog=prog,
        usage=usage,
        description=(classes[0].__doc__ or "").partition("\n\n")[0],
        epilog=" ".join([*filter(None, [epilog]), *notes]),
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    argv = list(argv)
    all_wanted = bool({"--help_all", "--help-all"}.intersection(argv))
    if hidden:
        argv = ["--help" if word in ("--help_all", "--help-all") else word for word in argv]
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:  # `bool | None`
            action.nargs, action.const = "?", True
        shown = all_wanted or action.dest not in hidden
        action.help = " ".join((action.help or "").split()) if shown else argparse.SUPPRESS
    argv, files = _take_config(argv)
    options, words = _split(parser, argv)
    if len(words) > len(positional):
        raise UsageError(f"unexpected `{words[len(positional)]}`. Usage: {usage}")
    from_words = [f"--{name}={word}" for name, word in zip(positional, words, strict=False)]
    arguments = [*(word for file in files for word in _from_yaml(file, parser)), *from_words, *options]
    _require(parser, arguments, usage)
    try:
        values = parser.parse_args_into_dataclasses(args=arguments, look_for_args_file=False)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, UsageError) else UsageError(str(error)) from error
    return values[0] if len(classes) == 1 else values


def option_names(classes: Any) -> set[str]:
    """Names of all options of a dataclass or a tuple of them, `--config` included."""
    classes = classes if isinstance(classes, tuple) else (classes,)
    return {"config", *(field.name for cls in classes for field in fields(cls) if field.init)}


def _rare_options(classes: tuple[Any, ...]) -> set[str]:
    listing = [cls for cls in classes if hasattr(cls, "_common_options")]
    return {field.name for cls in listing for field in fields(cls)} - {
        name for cls in listing for name in cls._common_options
    }


def _take_config(argv: list[str]) -> tuple[list[str], list[Path]]:
    rest: list[str] = []
    files: list[Path] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        path = value if equals else next(words, "")
        if not path:
            raise UsageError("`--config` needs a file.")
        files.append(Path(path).expanduser())
    return rest, files


def _split(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[list[str], list[str]]:
    """Options with their values, and the words that belong to no option."""
    options: list[str] = []
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            words.append(word)
            continue
        options.append(word)
        name = word.partition("=")[0]
        if name not in parser._option_string_actions:
            raise UsageError(_unknown_option(parser, name, parser._option_string_actions))
        action = parser._option_string_actions.get(word)
        if action is None or not rest:
            continue
        if action.nargs == "?":
            if _is_bool(rest[0]):
                options[-1] = f"{word}={rest.pop(0)}"
        elif action.nargs == "+":
            while rest and not rest[0].startswith("--"):
                options.append(rest.pop(0))
        elif action.nargs is None and not rest[0].startswith("--"):
            options[-1] = f"{word}={rest.pop(0)}"  # the value may begin with a dash
    return options, words


def _unknown_option(parser: argparse.ArgumentParser, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return f"unknown option `{name}`.{hint}\n`{parser.prog} --help` shows the options."


def _is_bool(word: str) -> bool:
    try:
        string_to_bool(word)
    except argparse.ArgumentTypeError:
        return False
    return True


def _require(parser: _Parser, arguments: list[str], usage: str) -> None:
    """Name what is missing as the user writes it."""
    given = {word.partition("=")[0] for word in arguments if word.startswith("-")}
    if given & {"-h", "--help"}:
        return
    missing = [
        action.dest for action in parser._actions if action.required and not given.intersection(action.option_strings)
    ]
    if missing:
        raise UsageError(f"missing: {', '.join(name.upper() for name in missing)}. Usage: {usage}")


def _from_yaml(path: Path, parser: _Parser) -> list[str]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"the configuration file {path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold `option: value` lines, got {type(data).__name__}.")
    known = option_names(tuple(parser.dataclass_types)) - {"config"}
    argv: list[str] = []
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(f"{path}: {_unknown_option(parser, str(key), known)}")
        several = parser._option_string_actions[f"--{name}"].nargs == "+"
        if value is None or (several and value == []):
            continue
        if several:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        elif isinstance(value, list):
            argv.append(f"--{name}={','.join(map(str, value))}")
        else:
            argv.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv
