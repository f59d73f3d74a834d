"""`report`: the pictures of a run as files and as one page."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .._imports import require
from ..files import write_file
from .page import render_page
from .reading import Run, read_run


logger = logging.get_logger(__name__)


def report(source: Any, output: str | os.PathLike | None = None) -> list[Path]:
    """Draw what a training did: load of the experts, entropy and experts per token over depth, loss.

    Reads `trainer_state.json` and `routing_history.jsonl` of the folder, and `evaluation.json` or `demo.json` where
    there is one. Needs matplotlib (`pip install "hf-moe-ext[plot]"`).

    Args:
        source (`str`, `PathLike` or trainer):
            Output folder of a training with `MoETrainer`, or the trainer.
        output (`str` or `PathLike`, *optional*):
            Folder for the pictures; `report` inside the training folder by default. Earlier pictures are replaced.

    Returns:
        Paths of the PNG files, and of `report.html` at the end, which holds them all and needs no other file.

    Raises:
        FileNotFoundError, ValueError: for a missing, empty or damaged file; the message says what writes it.
        ImportError: without matplotlib.

    Example:
        ```python
        >>> report("output")[-1]
        PosixPath('output/report/report.html')
        ```
    """
    require("matplotlib", "Drawing a report")
    run = read_run(source)
    target = run.folder / "report" if output is None else Path(output).expanduser()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"cannot write the report to `{target}`: a file of that name exists.")
    pictures = draw(run)
    page = render_page(run, pictures)
    written = [write_file(target / picture.name, picture.png) for picture in pictures]
    written.append(write_file(target / "report.html", page))
    for path in written:
        logger.info(f"wrote {path}")
    return written


def draw(run: Run) -> list[Any]:
    """All pictures the data allows, in reading order."""
    from . import pictures

    last = run.routing[-1]
    ceiling = math.log(max(len(layer.load) for layer in last.layers.values()))
    drawn = [pictures.loss_curve(run.losses)]
    if run.domains:
        drawn.insert(0, pictures.perplexities(run.domains))
    drawn += [pictures.load_map(last), pictures.depth(run.routing[0], last, ceiling)]
    if len(run.routing) > 1:
        drawn.append(pictures.over_training(run.routing))
    return drawn
