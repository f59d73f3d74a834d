"""Text domains that come with pip packages or with Python itself, each split into training and held-out documents."""

from __future__ import annotations

import gzip
import json
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..modeling.configuration_moe_ext import _unknown
from .packages import CODEIO, GSM8K, HUMANEVAL, PLAYS, package_file


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


# Plain files in Python 3.10 to 3.14, though not the same to the letter. The parts share no module.
_MODULES = {
    "train": (
        *("calendar", "contextlib", "csv", "dataclasses", "difflib", "fractions", "functools", "gettext", "gzip"),
        *("inspect", "ipaddress", "mailbox", "optparse", "pickle", "plistlib", "pprint", "random", "shlex", "shutil"),
        *("smtplib", "socketserver", "subprocess", "tarfile", "tempfile", "threading", "traceback", "typing", "uuid"),
        *("weakref", "webbrowser"),
    ),
    "test": ("argparse", "heapq", "textwrap", "configparser", "shelve", "statistics"),
}
_HELD_OUT_CHAPTERS = 9


def _python(split: Split) -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    missing = [name for name in _MODULES[split] if not (folder / f"{name}.py").is_file()]
    if missing:
        raise FileNotFoundError(
            f"the sources of the standard library in {folder} are incomplete ({', '.join(missing)} missing). Use a "
            "Python that has them, or another domain."
        )
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES[split]]


def _held_out(documents: list[str], split: Split, every: int) -> list[str]:
    """Every n-th document is in the test part, the others in the training part."""
    return [text for number, text in enumerate(documents) if (number % every == 0) == (split == "test")]


def _maths(split: Split) -> list[str]:
    """Every fifth problem is held out. The calculator marks (`<<5*2=10>>`) are removed."""
    documents = []
    for line in package_file(GSM8K).read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        answer = re.sub(r"<<[^>]*>>", "", case["upstream_answer"])
        documents.append(f"Question: {case['prompt']}\nAnswer: {answer}\n\n")
    return _held_out(documents, split, 5)


def _prose(split: Split) -> list[str]:
    """The first nine chapters are held out."""
    book = (Path(__file__).parent / "texts" / "moby_dick.txt").read_text(encoding="utf-8")
    chapters = re.split(r"(?<=\n\n)(?=CHAPTER \d+\. )", book)
    return chapters[:_HELD_OUT_CHAPTERS] if split == "test" else chapters[_HELD_OUT_CHAPTERS:]


def _plays(split: Split) -> list[str]:
    """Hamlet is held out."""
    plays = PLAYS[1:] if split == "train" else PLAYS[:1]
    return [package_file(play).read_text(encoding="utf-8", errors="replace") for play in plays]


def _humaneval(split: Split) -> list[str]:
    problems = _json_lines(package_file(HUMANEVAL))
    return _held_out([f"{problem['prompt']}{problem['canonical_solution']}\n\n" for problem in problems], split, 5)


def _codeio(split: Split) -> list[str]:
    problems = _json_lines(package_file(CODEIO))
    documents = [f"{problem['task_description']}\n\n{problem['code_sample']}\n\n" for problem in problems]
    return _held_out(list(dict.fromkeys(documents)), split, 10)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


_DOMAINS = {
    domain.name: domain
    for domain in (
        Domain("python", "Python source code", "PSF-2.0", "standard library of the running Python", _python),
        Domain("maths", "grade-school maths problems (GSM8K)", "MIT", GSM8K.requirement, _maths),
        Domain("prose", "a novel of 1851 (Moby-Dick, chapters 1 to 40)", "public domain", "hf-moe-ext", _prose),
        Domain("plays", "verse drama (Shakespeare)", "public domain", PLAYS[0].requirement, _plays),
        Domain("humaneval", "short Python functions (HumanEval)", "MIT", HUMANEVAL.requirement, _humaneval),
        Domain("codeio", "science and maths with Python solutions", "Apache-2.0", CODEIO.requirement, _codeio),
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
    """Cut the concatenated documents into windows of `length` tokens, without padding or special tokens.

    What is left at the end and does not fill a window is dropped.

    Args:
        texts: documents, in order.
        tokenizer: of the model.
        length: tokens per window.
        limit: most windows to make.

    Raises:
        ValueError: where the text does not fill one window.
    """
    if isinstance(texts, str):
        raise TypeError("`texts` must be a list of documents, got one string; pass `[text]`.")
    if length < 2:
        raise ValueError(f"`length` must be at least 2, since a window's first token is not predicted; got {length}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    ids: list[int] = []
    for text in texts:
        # `verbose=False`: a document longer than the model's context is no mistake here.
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if limit is not None and len(ids) >= limit * length:
            break
    count = min(len(ids) // length, limit or len(ids))
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens, which do not fill one window of {length}.")
    return Windows(torch.tensor(ids[: count * length]).reshape(count, length))
