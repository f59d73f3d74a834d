"""The pictures of a report. Imports matplotlib, so it is imported only when something is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .reading import Domain, RoutingStep


# Okabe-Ito: told apart with every kind of colour vision, and by lightness.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
_STYLES = [(BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), ("#CC79A7", ":", "D"), ("#56B4E9", "-", "v")]

_SETTINGS = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Picture:
    """A PNG, its file name, a heading for the page, and the text for those who do not see it."""

    name: str
    heading: str
    text: str
    png: bytes


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Figure, name: str, heading: str, text: str) -> Picture:
    buffer = io.BytesIO()
    # Without metadata, equal data gives equal files.
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return Picture(name, heading, text, buffer.getvalue())


def load_map(last: RoutingStep) -> Picture:
    """Layers x experts: load against an even share."""
    rows = [layer.relative_load for layer in last.layers.values()]
    width = max(map(len, rows))
    grid = [[*row, *[math.nan] * (width - len(row))] for row in rows]
    fullest = max(max(row) for row in rows)
    dead = sum(layer.dead for layer in last.layers.values())
    with matplotlib.rc_context({**_SETTINGS, "axes.grid": False}):
        figure = _figure(min(14, max(6.4, 2.6 + 0.55 * width)), min(16, max(3.4, 1.8 + 0.34 * len(rows))))
        axes = figure.subplots()
        colours = matplotlib.colormaps["PuOr_r"].with_extremes(bad="white")
        norm = TwoSlopeNorm(1.0, 0.0, max(2.0, fullest))
        image = axes.imshow(grid, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
        axes.set_xticks(_few(width), [str(i) for i in _few(width)])
        keys = list(last.layers)
        axes.set_yticks(_few(len(keys), 24), [keys[i] for i in _few(len(keys), 24)])
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.set_title(
            f"Load of the experts at step {last.step}\nfullest: {fullest:.1f} times an even share; "
            f"without any token (×): {dead}"
        )
        bar = figure.colorbar(image, ax=axes, label="load (1 = even share)")
        bar.set_ticks(sorted({0.0, 0.5, 1.0, *_nice(fullest)}))
        _mark_cells(axes, grid, norm, numbers=width <= 16 and len(rows) <= 40)
        for spine in axes.spines.values():
            spine.set_visible(False)
    text = (
        f"Heat map of {len(rows)} layers by up to {width} experts at step {last.step}. The fullest expert gets "
        f"{fullest:.2f} times an even share; {dead} experts get no token."
    )
    return _finish(figure, "routing_load.png", "Load of the experts", text)


def _mark_cells(axes: Any, grid: list[list[float]], norm: TwoSlopeNorm, *, numbers: bool) -> None:
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if math.isnan(value) or (value > 0 and not numbers):
                continue
            colour = "white" if abs(float(norm(value)) - 0.5) > 0.33 else "black"
            text = f"{value:.1f}" if value > 0 else "×"
            axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=9 if value > 0 else 11)


def depth(first: RoutingStep, last: RoutingStep, ceiling: float) -> Picture:
    """Entropy and mean k over depth, at the first and the last logged step."""
    keys = list(last.layers)
    with matplotlib.rc_context(_SETTINGS):
        figure = _figure(11, 4.2)
        left, right = figure.subplots(1, 2)
        drawn = [(last, BLUE, "-", "o")]
        if first.step != last.step:
            drawn.insert(0, (first, GREY, "--", "s"))
        for axes, name, label in ((left, "entropy", "entropy (nats)"), (right, "mean_k", "experts per token")):
            for step, colour, line, marker in drawn:
                values = [getattr(step.layers[key], name) if key in step.layers else math.nan for key in keys]
                axes.plot(range(len(keys)), values, line, color=colour, marker=marker, ms=5, label=f"step {step.step}")
            axes.set_xticks(_few(len(keys), 16), [keys[i] for i in _few(len(keys), 16)])
            axes.set_xlabel("layer")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        left.axhline(ceiling, color=GREY, lw=1, ls=":")
        left.annotate("even choice", (0, ceiling), xytext=(0, 3), textcoords="offset points", color="#555555", size=10)
        left.set_ylim(0, max(ceiling, 0.1) * 1.12)
        left.set_title("How undecided the routers are")
        most = max(layer.mean_k for step, *_ in drawn for layer in step.layers.values())
        right.set_ylim(0, max(1.0, most) * 1.1)
        right.set_title("How many experts a token uses")
        right.legend(frameon=False, loc="lower right")
    ends = {name: [getattr(last.layers[key], name) for key in (keys[0], keys[-1])] for name in ("entropy", "mean_k")}
    text = (
        f"Two curves over depth at step {last.step}. Routing entropy goes from {ends['entropy'][0]:.2f} nats in the "
        f"first layer to {ends['entropy'][1]:.2f} in the last, experts per token from {ends['mean_k'][0]:.2f} to "
        f"{ends['mean_k'][1]:.2f}."
    )
    return _finish(figure, "routing_depth.png", "Entropy and experts per token over depth", text)


def over_training(history: Sequence[RoutingStep]) -> Picture:
    """Mean k, entropy and the fullest expert over training, as means over layers."""
    steps = [entry.step for entry in history]
    fullest = [
        sum(max(layer.relative_load) for layer in entry.layers.values()) / len(entry.layers) for entry in history
    ]
    curves = [
        ("Experts per token", "mean over layers", [entry.mean("mean_k") for entry in history], BLUE),
        ("Routing entropy", "nats, mean over layers", [entry.mean("entropy") for entry in history], ORANGE),
        ("Fullest expert of a layer", "times an even share", fullest, GREEN),
    ]
    with matplotlib.rc_context(_SETTINGS):
        figure = _figure(12, 3.8)
        for axes, (title, label, values, colour) in zip(figure.subplots(1, 3), curves, strict=True):
            axes.plot(steps, values, color=colour, lw=2, marker="o", ms=4 if len(steps) < 40 else 0)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_ylim(0, max(values) * 1.15 or 1)
    text = "; ".join(f"{title.lower()} from {values[0]:.2f} to {values[-1]:.2f}" for title, _, values, _ in curves)
    return _finish(
        figure, "routing_over_training.png", "Routing over training", f"From step {steps[0]} to {steps[-1]}: {text}."
    )


def loss_curve(losses: dict[str, list[tuple[int, float]]]) -> Picture:
    """Training loss and evaluation losses."""
    names = {key: _loss_name(key) for key in sorted(losses, key=lambda key: (key.startswith("eval"), key))}
    with matplotlib.rc_context(_SETTINGS):
        figure = _figure(8, 4.2)
        axes = figure.subplots()
        for number, (key, name) in enumerate(names.items()):
            colour, line, marker = _STYLES[number % len(_STYLES)]
            steps, values = zip(*sorted(losses[key]), strict=True)
            few = len(steps) < 40
            axes.plot(steps, values, line, color=colour, lw=2, marker=marker if few else "", ms=4, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        key = "loss" if "loss" in losses else next(iter(names))
        start, end = min(losses[key])[1], max(losses[key])[1]
        axes.set_title(f"{names[key][0].upper()}{names[key][1:]} loss from {start:.3g} to {end:.3g}")
        if len(names) > 1:
            axes.legend(frameon=False)
    ends = {name: (min(losses[key])[1], max(losses[key])[1]) for key, name in names.items()}
    text = "; ".join(f"{name} loss from {start:.3f} to {end:.3f}" for name, (start, end) in ends.items())
    return _finish(figure, "loss.png", "Loss", f"Curves over steps: {text}.")


def _loss_name(key: str) -> str:
    known = {"loss": "training", "moe/lm_loss": "training without auxiliary", "eval_loss": "held-out"}
    return known.get(key) or f"held-out, {key[5:-5].replace('_', ' ')}"


def perplexities(domains: Sequence[Domain]) -> Picture:
    """Held-out perplexity per domain of the dense, the upcycled and the trained model, as bars."""
    kinds = [("dense", GREY), ("upcycled", ORANGE), ("trained", BLUE)]
    kinds = [(kind, colour) for kind, colour in kinds if any(getattr(domain, kind) is not None for domain in domains)]
    values = [value for domain in domains for kind, _ in kinds if (value := getattr(domain, kind)) is not None]
    with matplotlib.rc_context({**_SETTINGS, "axes.grid.axis": "y"}):
        figure = _figure(max(6.4, 2 + 1.9 * len(domains)), 4.4)
        axes = figure.subplots()
        width = 0.8 / len(kinds)
        for number, (kind, colour) in enumerate(kinds):
            places = [i + (number - (len(kinds) - 1) / 2) * width for i in range(len(domains))]
            heights = [getattr(domain, kind) or math.nan for domain in domains]
            bars = axes.bar(places, heights, width * 0.94, color=colour, label=kind)
            axes.bar_label(
                bars, [f"{value:.3g}" if value == value else "" for value in heights], fontsize=10, padding=2
            )
        axes.set_xticks(range(len(domains)), [_domain_label(domain) for domain in domains])
        if max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.margins(y=0.14)
        axes.set_ylabel("perplexity (lower is better)")
        better = sum(1 for d in domains if d.dense and d.trained and d.trained < d.dense)
        compared = sum(1 for d in domains if d.dense and d.trained)
        title = "Held-out perplexity per domain"
        axes.set_title(f"{title}\ntrained is below dense on {better} of {compared}" if compared else title)
        figure.legend(frameon=False, loc="outside lower center", ncols=len(kinds))
    parts = [f"{domain.name}: {_perplexities_of(domain)}" for domain in domains]
    return _finish(figure, "perplexity.png", "Held-out perplexity", f"Bars per domain. {'; '.join(parts)}.")


def _perplexities_of(domain: Domain) -> str:
    values = {kind: getattr(domain, kind) for kind in ("dense", "upcycled", "trained")}
    return ", ".join(f"{kind} {value:.3g}" for kind, value in values.items() if value is not None)


def _domain_label(domain: Domain) -> str:
    return domain.name if domain.mean_k is None else f"{domain.name}\n{domain.mean_k:.2f} experts per token"


def _few(count: int, most: int = 20) -> list[int]:
    """Evenly spaced tick positions."""
    return list(range(0, count, max(1, math.ceil(count / most))))


def _nice(top: float) -> list[float]:
    step = max(1, math.ceil(max(2.0, top) / 5))
    return [float(value) for value in range(step, math.floor(max(2.0, top)) + 1, step)]
