"""Write `docs/families.md` from the family records.

    python docs/make_families.py            # writes the page
    python docs/make_families.py --print    # prints it

Run it with the newest supported version of Transformers, which has the most architectures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers

from hf_moe_ext.modeling.moe_families import Family, list_families
from hf_moe_ext.upcycling.stock_targets import stock_family


HEAD = """<!-- Written by docs/make_families.py. Do not edit. -->
# Families

Architectures this package knows, as of transformers {version}: {moe} with experts, {dense} dense. With an older
version, those that it lacks are skipped; `hf-moe list families` prints what the installed version has. To add one, see
[CONTRIBUTING.md](../CONTRIBUTING.md#add-a-family).

Every row is tested on a tiny random model. Large models of most rows were not run.
"""

MOE = """
## With experts

`extend` gives them another router. *Score* is what the stock gate computes: probabilities over all experts (softmax),
over the chosen ones (softmax of k), a value of its own for each expert (sigmoid), or a rule that only the stock gate
knows (custom; other routers then need a `score` of their own). *Bias* is a correction bias that moves the selection
only, *groups* a limit to the best groups of experts.

| family | score | renormalised | bias | groups | shared experts | note |
| --- | --- | --- | --- | --- | --- | --- |
"""

DENSE = """
## Dense

`upcycle` makes a Mixture-of-Experts of them. *Stock target* is the architecture of Transformers that the result can be
saved as, where everything else allows it (no declared router, no biases in the block, ...); without one, the result is
a class of ours.

| family | feed-forward block | stock target |
| --- | --- | --- |
"""


def moe_row(family: Family) -> str:
    spec = family.moe
    assert spec is not None
    score = "softmax of k" if spec.order == "topk_score" else spec.score
    if spec.score == "custom" or spec.order == "topk_score":
        renormalised = ""
    else:
        renormalised = f"`{spec.renormalize}`" if isinstance(spec.renormalize, str) else _yes(spec.renormalize)
    cells = (
        f"`{family.name}`",
        score,
        renormalised,
        _yes(spec.bias is not None),
        _yes(spec.groups is not None),
        _yes(bool(spec.shared)),
        family.note,
    )
    return f"| {' | '.join(cells)} |\n"


def dense_row(family: Family) -> str:
    spec = family.dense
    assert spec is not None
    kind = "gated" if spec.gate or spec.fused else "plain"
    if spec.fused:
        kind += ", fused"
    try:
        target = f"`{stock_family(family).name}`"
    except ValueError:
        target = ""
    return f"| `{family.name}` | {kind} | {target} |\n"


def _yes(value: bool) -> str:
    return "yes" if value else ""


def page() -> str:
    """The whole page."""
    families = list_families()
    moe = [family for family in families if family.moe is not None]
    dense = [family for family in families if family.dense is not None]
    version = ".".join(transformers.__version__.split(".")[:2])
    head = HEAD.format(version=version, moe=len(moe), dense=len(dense))
    return head + MOE + "".join(map(moe_row, moe)) + DENSE + "".join(map(dense_row, dense))


if __name__ == "__main__":
    if "--print" in sys.argv[1:]:
        print(page(), end="")
    else:
        place = Path(__file__).with_name("families.md")
        place.write_text(page(), encoding="utf-8")
        print(f"wrote {place}")
