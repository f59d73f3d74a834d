"""Which experts the tokens of one text went to: colours in a terminal, and a page."""

from __future__ import annotations

import colorsys
import os
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch
from transformers import PreTrainedModel

from ..files import write_file
from ..generation.routing import extended
from ..modeling.moe_structure import trace_routing


@dataclass(frozen=True)
class TokenRouting:
    """What `trace_tokens` found.

    Attributes:
        model: name of the model's class.
        texts: the tokens as text.
        keys: of the routed layers, in order.
        num_experts: of each layer.
        experts: for each layer and token the experts that computed it, best first.
        weights: theirs.
    """

    model: str
    texts: list[str]
    keys: list[str]
    num_experts: list[int]
    experts: list[list[list[int]]]
    weights: list[list[list[float]]]

    def main_expert(self, layer: int) -> list[int | None]:
        """The expert with the largest weight of each token of a layer; `None` where no expert computes it."""
        return [experts[0] if experts else None for experts in self.experts[layer]]

    def coloured(self, layer: int = -1) -> str:
        """The text for a terminal: each token has the colour of its main expert in one layer, the last by default."""
        count = self.num_experts[layer]
        parts = []
        for text, expert in zip(self.texts, self.main_expert(layer), strict=True):
            if expert is None:
                parts.append(text)
                continue
            red, green, blue = _colour(expert, count)
            parts.append(f"\x1b[48;2;{red};{green};{blue}m\x1b[38;2;0;0;0m{text}\x1b[0m")
        return "".join(parts)

    def legend(self, layer: int = -1) -> str:
        """The colours of the experts that occur, with how many tokens each has."""
        chosen = [expert for expert in self.main_expert(layer) if expert is not None]
        counts = sorted(((chosen.count(expert), expert) for expert in set(chosen)), reverse=True)
        parts = []
        for tokens, expert in counts[:16]:
            red, green, blue = _colour(expert, self.num_experts[layer])
            parts.append(f"\x1b[48;2;{red};{green};{blue}m\x1b[38;2;0;0;0m {expert} \x1b[0m {tokens}")
        return f"layer {self.keys[layer]}, expert and tokens: " + "  ".join(parts)

    def page(self) -> str:
        """An HTML page that refers to no other file: the text for each layer, with experts and weights to hover."""
        sections = []
        for layer, key in enumerate(self.keys):
            spans = []
            for token, text in enumerate(self.texts):
                experts, weights = self.experts[layer][token], self.weights[layer][token]
                told = ", ".join(f"{e}: {w:.2f}" for e, w in zip(experts, weights, strict=True)) or "no expert"
                style = ""
                if experts:
                    style = ' style="background:rgb({},{},{})"'.format(*_colour(experts[0], self.num_experts[layer]))
                spans.append(f'<span title="{escape(told)}"{style}>{escape(text)}</span>')
            sections.append(f'<h2>Layer {escape(key)}</h2>\n<p class="text">{"".join(spans)}</p>')
        template = Template((files("hf_moe_ext") / "templates" / "tokens.html").read_text(encoding="utf-8"))
        return template.substitute(
            model=escape(self.model), tokens=len(self.texts), layers=len(self.keys), sections="\n".join(sections)
        )

    def write(self, path: str | os.PathLike) -> Path:
        """Write the page; returns its path."""
        return write_file(Path(path).expanduser(), self.page())


@torch.no_grad()
def trace_tokens(model: PreTrainedModel, tokenizer: Any, ids: torch.Tensor) -> TokenRouting:
    """Run a text through a model and tell which experts each token went to.

    Args:
        model: a stock MoE model of a supported family, or an extended one; it is as before afterwards.
        tokenizer: turns ids into text.
        ids: (1, S).

    Raises:
        ValueError: more than one text, or a model without routers.
    """
    if ids.dim() != 2 or len(ids) != 1:
        raise ValueError(f"`ids` must be one text, (1, S), got {tuple(ids.shape)}.")
    name = type(model).__name__
    with extended(model), trace_routing(model) as contexts:
        model(input_ids=ids.to(model.device))
    records = [record for context in contexts for record in context.records.values()]
    if not records:
        raise ValueError(f"{name} has no routed layer.")
    experts: list[list[list[int]]] = []
    weights: list[list[list[float]]] = []
    for record in records:
        order = record.weights.float().argsort(dim=-1, descending=True)
        index, weight = record.index.gather(-1, order).tolist(), record.weights.float().gather(-1, order).tolist()
        kept = [[slot for slot, expert in enumerate(row) if expert < record.num_experts] for row in index]
        experts.append([[row[slot] for slot in slots] for row, slots in zip(index, kept, strict=True)])
        weights.append([[row[slot] for slot in slots] for row, slots in zip(weight, kept, strict=True)])
    texts = [tokenizer.decode([token]) for token in ids[0].tolist()]
    keys, counts = [record.key for record in records], [record.num_experts for record in records]
    return TokenRouting(name, texts, keys, counts, experts, weights)


def _colour(expert: int, count: int) -> tuple[int, int, int]:
    """Light colours, neighbours far apart: the hue goes round by the golden ratio, the lightness in three steps."""
    hue = expert * 0.618033988749895 % 1
    red, green, blue = colorsys.hls_to_rgb(hue, (0.82, 0.74, 0.66)[expert % 3 if count > 8 else 0], 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)
