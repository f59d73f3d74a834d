"""Text domains that come with pip packages or with Python itself, each split into training and held-out documents."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..modeling.configuration_moe_ext import _unknown
from .packages import GSM8K, PLAYS, package_file


Split = Literal["train", "test"]


@dataclass(frozen=True)
class Domain:
    """A named source of text.

    Attributes:
        name: what commands call it.
        title: what it is, for people.
        licence: of the text.
        source: where it comes from.
        load: gives the documents of a split.
    """

    name: str
    title: str
    licence: str
    source: str
    load: Callable[[Split], list[str]]


# Present and much alike in Python 3.10 to 3.14. The halves share no module.
_TRAIN_MODULES = (
    *("ast", "calendar", "cmd", "codecs", "configparser", "csv", "difflib", "dis", "fileinput", "fractions"),
    *("ftplib", "functools", "gettext", "gzip", "heapq", "inspect", "locale", "mailbox", "optparse", "pickle"),
    *("pprint", "queue", "random", "sched", "selectors", "shlex", "shutil", "socket", "statistics", "string"),
    *("subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "traceback", "types"),
)
_TEST_MODULES = ("argparse", "bisect", "copy", "datetime", "decimal", "enum", "glob", "shelve", "zipfile")


def _python(split: Split) -> list[str]:
    documents = []
    for name in _TRAIN_MODULES if split == "train" else _TEST_MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            documents.append(Path(spec.origin).read_text(encoding="utf-8"))
    return documents


def _maths(split: Split) -> list[str]:
    """Every fifth problem is held out. The calculator marks (`<<5*2=10>>`) are removed."""
    lines = package_file(GSM8K).read_text(encoding="utf-8").splitlines()
    documents = []
    for number, line in enumerate(lines):
        if (number % 5 == 0) == (split == "test"):
            case = json.loads(line)
            answer = re.sub(r"<<[^>]*>>", "", case["upstream_answer"])
            documents.append(f"Question: {case['prompt']}\nAnswer: {answer}\n\n")
    return documents


def _plays(split: Split) -> list[str]:
    """Scenes of three tragedies; Hamlet is held out."""
    plays = PLAYS[1:] if split == "train" else PLAYS[:1]
    return [package_file(play).read_text(encoding="utf-8", errors="replace") for play in plays]


_DOMAINS = {
    domain.name: domain
    for domain in (
        Domain("python", "Python source code", "PSF-2.0", "standard library of the running Python", _python),
        Domain("maths", "grade-school maths problems (GSM8K)", "MIT", GSM8K.requirement, _maths),
        Domain("plays", "verse drama (Shakespeare)", "public domain", PLAYS[0].requirement, _plays),
    )
}


def list_domains() -> list[Domain]:
    """All domains."""
    return list(_DOMAINS.values())


def get_domain(name: str) -> Domain:
    """The domain of that name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _DOMAINS:
        raise ValueError(_unknown("domain", name, _DOMAINS))
    return _DOMAINS[name]


def load_domain(name: str, split: Split = "train") -> list[str]:
    """The documents of one split; the splits share no document."""
    if split not in ("train", "test"):
        raise ValueError(f'`split` must be "train" or "test", got {split!r}.')
    return get_domain(name).load(split)


class Windows(torch.utils.data.Dataset):
    """Token windows of one length: (N, length) ids. Items are `input_ids`, `attention_mask` and `labels`."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.ids[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()}


def pack(texts: list[str], tokenizer: Any, length: int, limit: int | None = None) -> Windows:
    """Cut the concatenated documents into windows of `length` tokens, without padding.

    Args:
        texts: documents, in order.
        tokenizer: of the model.
        length: tokens per window.
        limit: most windows to make.

    Raises:
        ValueError: where the text does not fill one window.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if limit is not None and len(ids) >= limit * length:
            break
    count = min(len(ids) // length, limit or len(ids))
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens, which do not fill one window of {length}.")
    return Windows(torch.tensor(ids[: count * length]).reshape(count, length))
