"""Links, names and tables of the documentation are in step with the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

import hf_moe_ext
from hf_moe_ext._imports import is_trl_available
from hf_moe_ext.modeling.moe_router import list_routers
from hf_moe_ext.upcycling import list_gate_inits, list_methods
from tests.docs.pages import PAGES, ROOT, page_id, prose


_LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def anchors(path: Path) -> set[str]:
    """Anchors as GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.M)
    plain = (re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", title).strip().lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_relative_links_resolve(path):
    broken = []
    for link in (first or second for first, second in _LINK.findall(prose(path))):
        if "://" in link or link.startswith("mailto:"):
            continue
        target, _, anchor = link.partition("#")
        place = (path.parent / target).resolve() if target else path
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_pages_are_linked(path):
    """Every page of `docs/` can be reached from its index."""
    if path.parent != ROOT / "docs" or path.name == "index.md":
        pytest.skip("not a page of docs/")
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert f"({path.name})" in index


def test_every_public_name_is_told():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in hf_moe_ext.__all__ if f"`{name}" not in page] == []


def test_api_page_names_exist():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    if not is_trl_available():
        page = re.sub(r"^## `hf_moe_ext\.trainers\.trl`.*?(?=^## )", "", page, flags=re.M | re.S)
    told = re.findall(r"^\| `(\w+)", page, re.M)
    public = set(hf_moe_ext.__all__)
    modules = [sys.modules.get(name) or __import__(name, fromlist=["x"]) for name in _documented_modules(page)]
    unknown = [name for name in told if name not in public and not any(hasattr(module, name) for module in modules)]
    assert unknown == []


def _documented_modules(page: str) -> list[str]:
    return re.findall(r"^## `(hf_moe_ext[\w.]*)`", page, re.M)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        pytest.param("routers.md", list_routers, id="routers"),
        pytest.param("upcycling.md", list_methods, id="methods"),
        pytest.param("upcycling.md", list_gate_inits, id="gate_inits"),
    ],
)
def test_everything_registered_is_told(page, names):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    missing = [name for name in names() if f"`{name}`" not in text and f'`"{name}"`' not in text]
    assert missing == []


@pytest.mark.parametrize("name", [name for name in list_routers()])
def test_every_router_has_a_page(name):
    assert (ROOT / "docs" / "routers" / f"{name}.md").is_file()


def test_families_page_is_in_step():
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    made_with = re.search(r"transformers ([\d.]+)", text)
    assert made_with is not None
    if Version(transformers.__version__).release[:2] != Version(made_with[1]).release[:2]:
        pytest.skip(f"the page was made with transformers {made_with[1]}")
    command = [sys.executable, str(ROOT / "docs" / "make_families.py"), "--print"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert printed.stdout == text, "run `python docs/make_families.py`"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").glob("*.png")), ids=lambda path: path.name)
def test_pictures_are_small_and_used(path):
    assert path.stat().st_size < 150_000
    assert any(f"images/{path.name}" in page.read_text(encoding="utf-8") for page in PAGES)
