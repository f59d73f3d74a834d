"""The cards in `model_cards/` are those that `export` writes for a model of their kind."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import ModelCard

from hf_moe_ext.model_card import render_card
from tests.hub.cards import CARDS, FOLDER, exported, report


README = (FOLDER / "README.md").read_text()
# Rounding differs from machine to machine.
MEASURED = re.compile(r"^(- (?:max abs difference|relative error|kl divergence)): [\d.e+-]+$", re.M)
CHECKED = re.compile(
    r"^Checked when it was written: .* bit-equal to those of the model it was written from\.\n\n", re.M
)


def stored(name):
    return (FOLDER / f"{name}.md").read_text()


def in_form(text):
    return MEASURED.sub(r"\1", text)


@pytest.mark.parametrize("name", CARDS)
def test_cards_are_in_step(name):
    # To renew them: python -m tests.hub.cards
    text = stored(name)
    assert len(CHECKED.findall(text)) == 1
    made = render_card(CARDS[name][0](), report=report(name), name=f"tiny-{name}")
    assert in_form(CHECKED.sub("", text)) == in_form(made)
    assert f"[`{name}.md`]({name}.md)" in README


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_cards_are_those_of_exports(name, tmp_path):
    assert in_form(exported(name, tmp_path)) == in_form(stored(name))


def test_no_card_without_a_model():
    assert {path.stem for path in FOLDER.glob("*.md")} == {*CARDS, "example", "README"}


@pytest.mark.parametrize("name", CARDS)
def test_what_a_card_has_to_tell(name):
    text = stored(name)
    data = ModelCard(text).data.to_dict()
    own_code = name in ("bam", "union_of_experts", "moefication", "read_me", "moduleformer", "monet")
    paper = {
        "bam": "2408.08274",
        "btx": "2403.07816",
        "split": "2406.16554",
        "union_of_experts": "2503.02495",
        "moefication": "2110.01786",
        "read_me": "2410.19123",
        "jetmoe": "2404.07413",
        "moduleformer": "2306.04640",
        "monet": "2412.04139",
    }[name]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert f"arxiv:{paper}" in data["tags"] and f"papers/{paper}" in text
    assert ("custom_code" in data["tags"]) == ("trust_remote_code=True" in text) == own_code
    assert data.get("base_model") == CARDS[name][1]
    assert "No evaluation was recorded." in text and "family record" not in text
    assert re.search(r"A Mixture-of-Experts `\w+` with [\d.]+K parameters, of which a token uses at most", text)


def test_limits_are_those_of_the_method():
    for name in ("bam", "btx"):
        assert "does what none of them does" in stored(name) and "Untrained copies" not in stored(name)
    for name in ("split", "union_of_experts", "moefication", "read_me", "jetmoe"):
        assert "less where a token uses some of them only" in stored(name)
    assert "| attention.0 to attention.1 | moe | `top_k` | 3 | 3 |" in stored("bam")  # attention experts
    assert "| 0 | moe | `MonetRouter` | 36 | 36 |" in stored("monet")
