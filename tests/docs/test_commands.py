"""Every command that a page shows exists, with the options it is shown with."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from hf_moe_ext.cli import common
from hf_moe_ext.cli.main import COMMANDS
from tests.docs.pages import PAGES, ROOT, blocks, page_id, prose


_SHELLS = ("bash", "sh", "console", "shell")
_COMMENT = re.compile(r"(^|\s)#\s.*$")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def command_lines(path: Path) -> list[str]:
    """Lines of shell blocks, continuations joined, and inline code that is a command."""
    lines: list[str] = []
    for block in blocks(path):
        if block.language in _SHELLS and not block.skipped:
            lines += block.text.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", prose(path).replace("\n", " "))
    cleaned = (_COMMENT.sub("", line.strip().removeprefix("$ ")) for line in lines)
    return [line.strip() for line in cleaned if re.match(r"(hf-moe(-ext)?|make)\s+\S", line)]


CASES = [pytest.param(line, id=f"{page_id(path)}:{line}") for path in PAGES for line in command_lines(path)]


class _Parsed(Exception):
    """The options of a command were accepted."""


def _is_form(word: str) -> bool:
    return word.isupper() and word.isalpha()


def check_hf_moe(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for word in words if word != "--verbose"]
    if not words or words[0] in ("--help", "--version"):
        return
    name, *argv = words
    if name == "COMMAND":
        return
    assert name in COMMANDS, f"there is no command `hf-moe {name}`"
    command = import_module(f"hf_moe_ext.cli.{COMMANDS[name][0]}")
    if "--help" in argv:
        return
    loose = "--config" in argv or not argv or "..." in argv

    def parse(command: str, classes: Any, argv: list[str], positional: Any = (), epilog: str = "") -> Any:
        if loose:  # a file, or the reader, has the rest
            from dataclasses import fields

            known = {f.name for cls in (classes if isinstance(classes, tuple) else (classes,)) for f in fields(cls)}
            options = {word[2:].partition("=")[0] for word in argv if word.startswith("--")} - {"config"}
            assert options <= known, f"unknown options {sorted(options - known)}"
        else:
            common.parse(command, classes, argv, positional, epilog)
        raise _Parsed

    monkeypatch.setattr(command, "parse", parse)
    with pytest.raises(_Parsed):
        command.run(argv)


def check_make(words: list[str]) -> None:
    for word in words:
        variable, equals, _ = word.partition("=")
        if equals:
            assert re.search(rf"\b{variable}\b", MAKEFILE), f"the Makefile knows no variable {variable}"
        else:
            assert re.search(rf"^{re.escape(word)}:", MAKEFILE, re.M), f"there is no `make {word}`"


@pytest.mark.parametrize("line", CASES)
def test_command_exists(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(line.partition(" | ")[0].partition(" && ")[0])
    if program == "make":
        check_make(words)
    else:
        check_hf_moe(words, monkeypatch)


def test_every_command_is_told():
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"hf-moe {name}" not in page] == []
