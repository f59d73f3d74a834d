"""What a training run left behind, read and checked."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

STATE, ROUTING = "trainer_state.json", "routing_history.jsonl"
EVALUATIONS = ("evaluation.json", "demo.json")
_MADE_BY = {
    STATE: "It is written by `trainer.save_state()`, and with every checkpoint.",
    ROUTING: "It is written by `MoETrainer` while it trains.",
}
# `moe/lm_loss` is the training loss without the auxiliary losses of the routers.
_LOSS_KEY = re.compile(r"loss|moe/lm_loss|eval(_.+)?_loss")


@dataclass(frozen=True)
class LayerRouting:
    """Routing of one layer over some steps.

    Attributes:
        load: share of the routed tokens that each expert got.
        entropy: mean entropy of the routing distribution, in nats.
        mean_k: mean number of experts per token.
        dead: number of experts that got no token.
    """

    load: tuple[float, ...]
    entropy: float
    mean_k: float
    dead: int

    @property
    def relative_load(self) -> tuple[float, ...]:
        """Load against an even share, which is 1."""
        mean = sum(self.load) / len(self.load)
        return tuple(value / mean if mean else 0.0 for value in self.load)


@dataclass(frozen=True)
class RoutingStep:
    """Routing of all layers at one step, by layer key."""

    step: int
    layers: dict[str, LayerRouting]

    def mean(self, name: str) -> float:
        """Mean over layers of an attribute of `LayerRouting`."""
        return sum(getattr(layer, name) for layer in self.layers.values()) / len(self.layers)


@dataclass(frozen=True)
class Domain:
    """Held-out perplexity of one domain: of the dense model, after upcycling, after training; and mean k."""

    name: str
    dense: float | None = None
    upcycled: float | None = None
    trained: float | None = None
    mean_k: float | None = None


@dataclass(frozen=True)
class Run:
    """Everything a report is made of."""

    folder: Path
    losses: dict[str, list[tuple[int, float]]]
    routing: list[RoutingStep]
    domains: list[Domain] = field(default_factory=list)


def read_run(source: Any) -> Run:
    """Read the output folder of a training.

    Args:
        source: the folder, or a trainer.

    Raises:
        FileNotFoundError: where a file is missing; the message says what writes it.
        ValueError: where a file is empty or damaged.
    """
    source = getattr(getattr(source, "args", None), "output_dir", source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"expected a training output folder or a trainer, got {type(source).__name__}.")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"`{folder}` is not a folder; a report is made from the output folder of a training.")
    return Run(folder, read_losses(folder), read_routing(folder), read_domains(folder))


def read_losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The logged losses, training and evaluation, as (step, value) by key."""
    path = folder / STATE
    if not path.exists():
        numbered = [(int(p.parent.name[11:]), p) for p in folder.glob(f"checkpoint-*/{STATE}") if _is_checkpoint(p)]
        if not numbered:
            raise FileNotFoundError(f"`{path}` does not exist. {_MADE_BY[STATE]}")
        path = max(numbered)[1]
    history = _parse(path, path.read_text(encoding="utf-8"), _history)
    losses: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if _LOSS_KEY.fullmatch(key) and isinstance(value, (int, float)) and math.isfinite(value):
                losses.setdefault(key, []).append((int(entry.get("step", 0)), float(value)))
    if not losses:
        raise ValueError(f"`{path}` logs no loss. Train at least one logging step (`logging_steps`).")
    if losses.get("moe/lm_loss") == losses.get("loss"):
        losses.pop("moe/lm_loss", None)
    return losses


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name.removeprefix("checkpoint-").isdigit()


def _history(data: Any) -> list[dict[str, Any]]:
    history = data["log_history"]
    if not (isinstance(history, list) and all(isinstance(entry, dict) for entry in history)):
        raise TypeError("`log_history` must be a list of objects")
    return history


def read_routing(folder: Path) -> list[RoutingStep]:
    """The routing history, in the order of steps. An unfinished last line (the run was killed) is left out."""
    path = folder / ROUTING
    if not path.exists():
        raise FileNotFoundError(f"`{path}` does not exist. {_MADE_BY[ROUTING]}")
    lines = path.read_text(encoding="utf-8").splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"`{path}` is empty: the run ended before its first logging step. {_MADE_BY[ROUTING]}")
    by_step: dict[int, RoutingStep] = {}
    for number, line in numbered:
        try:
            found = _parse(path, line, _routing_step, number)
        except ValueError:
            if number != numbered[-1][0] or not by_step or line.rstrip().endswith("}"):
                raise
            logger.warning(f"the last line of `{path}` is unfinished and is left out.")
            continue
        by_step[found.step] = found  # a resumed run may repeat steps; the later line counts
    return [by_step[step] for step in sorted(by_step)]


def _routing_step(data: Any) -> RoutingStep:
    layers = {str(key): _layer_routing(value) for key, value in data["layers"].items()}
    if not layers:
        raise ValueError("`layers` is empty")
    return RoutingStep(int(data["step"]), layers)


def _layer_routing(data: Any) -> LayerRouting:
    load = tuple(float(value) for value in data["load"])
    if not load or min(load) < 0 or not all(map(math.isfinite, load)):
        raise ValueError("`load` must hold one non-negative share per expert")
    dead = data.get("dead")
    return LayerRouting(
        load, float(data["entropy"]), float(data["mean_k"]), load.count(0.0) if dead is None else int(dead)
    )


def read_domains(folder: Path) -> list[Domain]:
    """Perplexities by domain, where an evaluation wrote them, else an empty list."""
    path = next((folder / name for name in EVALUATIONS if (folder / name).exists()), None)
    if path is None:
        return []
    return _parse(path, path.read_text(encoding="utf-8"), parse_domains)


def parse_domains(data: Any) -> list[Domain]:
    """Domains of `{"domains": [{"name", "dense", "upcycled", "trained", "mean_k"}, ...]}`; only names are required."""
    numbers = ("dense", "upcycled", "trained", "mean_k")
    return [
        Domain(str(entry["name"]), **{name: float(entry[name]) for name in numbers if entry.get(name) is not None})
        for entry in data["domains"]
    ]


def parse_routing(data: Any) -> RoutingStep:
    """One entry of the routing history, given as a dict."""
    return _parse("routing", json.dumps(data), _routing_step)


def _parse(path: Path | str, text: str, build: Callable[[Any], Any], line: int | None = None) -> Any:
    where = f"`{path}`" if line is None else f"`{path}`, line {line},"
    made_by = _MADE_BY.get(Path(path).name, "")
    if not text.strip():
        raise ValueError(f"{where} is empty. {made_by}".rstrip())
    try:
        return build(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is damaged, it is not JSON ({error}). {made_by}".rstrip()) from error
    except KeyError as error:
        raise ValueError(f"{where} has no {error}. {made_by}".rstrip()) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} holds something unexpected: {error}. {made_by}".rstrip()) from error
