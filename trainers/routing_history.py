"""The load of every expert over training, as a file.

`routing_history.jsonl` in the output directory holds one JSON object per line and log step:

    {"step": 20, "layers": {"0": {"load": [0.3, 0.1, ...], "entropy": 1.2, "mean_k": 2.0, "dead": 0}, ...}}

`step` is the optimizer step, and a line covers the training tokens since the line before it; padding never counts.
Keys of `layers` are layer keys (`"3"`, or `"encoder.3"` with two stacks). `load` is the share of each expert in all
token-expert pairs (sums to 1), `entropy` the mean entropy of the routing distribution in nats, `mean_k` the mean
number of real experts per token, `dead` the number of experts without a token. Where domains are measured, `domains`
has the same for each, by its name. Six significant digits are kept.

A line is appended by one write; a line that a crash cut off is ignored by `read_history` and removed on resuming.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


HISTORY_NAME = "routing_history.jsonl"


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The complete lines of a history file, or of the one in a folder, in the order of training.

    Raises:
        FileNotFoundError: where there is none.
    """
    path = Path(path)
    path = path / HISTORY_NAME if path.is_dir() else path
    complete, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in complete.splitlines() if line]


def append_history(folder: str | os.PathLike[str], line: dict[str, Any]) -> None:
    """Append one line to the history in `folder`."""
    text = json.dumps(line, separators=(",", ":")) + "\n"
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(Path(folder) / HISTORY_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        file.write(text.encode())


def rewind_history(folder: str | os.PathLike[str], step: int, source: str | os.PathLike[str] | None = None) -> None:
    """Drop the lines after `step` from the history in `folder`, atomically. Step 0 starts a new history.

    Args:
        folder: where the history is written.
        step: the optimizer step at which training goes on.
        source: folder whose history is continued if `folder` has none (training resumed into another folder).
    """
    target = Path(folder) / HISTORY_NAME
    found = next((p for p in (target, Path(source or folder) / HISTORY_NAME) if p.is_file()), None)
    if found is None:
        return
    if step == 0:
        target.unlink(missing_ok=True)
        return
    kept = [line for line in read_history(found) if line["step"] <= step]
    temporary = target.with_name(f".{HISTORY_NAME}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, target)
