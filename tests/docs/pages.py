"""The pages of the documentation, their code blocks, and the tiny models that the code runs on."""

from __future__ import annotations

import doctest
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.data import Windows


ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "kernels" / "README.md",
        ROOT / "model_cards" / "README.md",
    ]
)

# Names that pages give to models of a hub or to folders.
DENSE_NAMES = ("HuggingFaceTB/SmolLM2-135M-Instruct", "dense", "dense-7b")
STOCK_MOE_NAMES = ("mistralai/Mixtral-8x7B-v0.1", "moe")

_SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w+-]*)[^\n]*\n(?P<body>.*?)^(?P=indent)```", re.M | re.S)
_NOT_RUN = re.compile(r"<!-- not run: [^>]+ -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it starts at, and whether the page says that it is not run."""

    language: str
    text: str
    line: int
    skipped: bool


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    page = path.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(page):
        indent, body = match["indent"], match["body"]
        text = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        line = page.count("\n", 0, match.start()) + 2
        found.append(Block(match["language"], text, line, bool(_NOT_RUN.search(page[: match.start()]))))
    return found


def python_source(block: Block) -> str:
    """The code of a block, also of one written as an interactive session."""
    if not block.text.lstrip().startswith(">>>"):
        return block.text
    return "".join(example.source for example in doctest.DocTestParser().get_examples(block.text))


def prose(path: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


def dense_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**_SIZES)).eval()


def stock_moe_model() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=8, num_experts_per_tok=2)).eval()


def extended_model():
    router = moe.TopPRouterConfig(threshold=0.4, max_slots=2, renormalize=True)
    return moe.upcycle(dense_model(), num_experts=4, router=router, check=False)


def windows() -> Windows:
    return Windows(torch.randint(4, 260, (24, 32), generator=torch.Generator().manual_seed(0)))
