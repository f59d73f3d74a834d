"""One HTML page that holds all pictures and the numbers behind them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from .reading import Run


def render_page(run: Run, pictures: Sequence[Any]) -> str:
    """The page as text. It refers to no other file."""
    template = Template((files("hf_moe_ext") / "templates" / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"Routing report: {run.folder.resolve().name}"),
        summary=escape(_summary(run)),
        pictures="\n".join(_figure(picture) for picture in pictures),
        tables="\n".join([*_domain_table(run), _layer_table(run)]),
    )


def _summary(run: Run) -> str:
    last = run.routing[-1]
    experts = sum(len(layer.load) for layer in last.layers.values())
    dead = sum(layer.dead for layer in last.layers.values())
    return (
        f"At step {last.step}, {len(last.layers)} layers with {experts} experts in all; "
        f"{last.mean('mean_k'):.2f} experts per token on average; {dead} experts without any token."
    )


def _figure(picture: Any) -> str:
    data = base64.b64encode(picture.png).decode()
    text = escape(picture.text)
    return (
        f"<section><h2>{escape(picture.heading)}</h2>\n"
        f'<figure><img src="data:image/png;base64,{data}" alt="{text}">\n'
        f"<figcaption>{text}</figcaption></figure></section>"
    )


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads)
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<section><div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div></section>"
    )


def _domain_table(run: Run) -> list[str]:
    if not run.domains:
        return []
    rows = [
        [domain.name, *(_number(value) for value in (domain.dense, domain.upcycled, domain.trained, domain.mean_k))]
        for domain in run.domains
    ]
    heads = ("domain", "dense", "upcycled", "trained", "experts per token")
    return [_table("Held-out perplexity per domain", heads, rows)]


def _layer_table(run: Run) -> str:
    last = run.routing[-1]
    rows = [
        [
            key,
            str(len(layer.load)),
            f"{layer.mean_k:.2f}",
            f"{layer.entropy:.3f}",
            f"{max(layer.relative_load):.2f}",
            str(layer.dead),
        ]
        for key, layer in last.layers.items()
    ]
    heads = ("layer", "experts", "per token", "entropy (nats)", "fullest (1 = even)", "without tokens")
    return _table(f"Routing by layer at step {last.step}", heads, rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
