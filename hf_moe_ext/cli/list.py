"""`hf-moe list`: what the package knows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .arguments import UsageError, parse
from .common import table


if TYPE_CHECKING:
    from ..modeling.moe_router import MoERouter


@dataclass
class ListArguments:
    """List what the package knows."""

    kind: str = field(default="families", metadata={"help": "families, routers, methods, gates or domains."})


def families() -> str:
    """Every supported architecture of the installed transformers, and what works on it."""
    from ..modeling.moe_families import list_families

    rows = [
        (
            family.name,
            "extend" if family.moe else "upcycle",
            (family.moe.score if family.moe else family.stock_moe or "own class"),
            family.note,
        )
        for family in list_families()
    ]
    return table(rows, ("family", "use", "gate / stock target", "note"))


def routers() -> str:
    """Registered routers, their papers and whether they can start as the stock gate."""
    from ..modeling import modeling_moe_ext  # noqa: F401  (registers the routers)
    from ..modeling.moe_router import list_routers

    rows = []
    for name, router in list_routers().items():
        needs = router.needs or ("" if router.causal else "a model that is not causal")
        rows.append((name, router.paper, needs, _identity_start(router), _first_sentence(router)))
    return table(rows, ("router", "paper", "needs", "identity start", "what it does"))


def _identity_start(router: type[MoERouter]) -> str:
    from ..modeling.moe_router import GateRule, RouterSite

    # The rules of most stock gates: weights that are divided by their sum, and raw sigmoids.
    rules = (GateRule("softmax", renormalize=True), GateRule("sigmoid", renormalize=False))
    found = []
    for rule in rules:
        try:
            router.identity_config(RouterSite("0", 0, num_experts=8, top_k=2, hidden_size=64, rule=rule))
            found.append(True)
        except NotImplementedError:
            found.append(False)
    return "yes" if all(found) else "some families" if any(found) else "no"


def _first_sentence(thing: Any) -> str:
    text = " ".join((thing.__doc__ or "").split())
    return text.partition(". ")[0].removesuffix(".") + "."


def methods() -> str:
    """Registered upcycling methods."""
    from ..upcycling import list_methods
    from ..upcycling.methods import list_model_methods

    known = {**list_methods(), **list_model_methods()}
    rows = [(name, _first_sentence(method)) for name, method in sorted(known.items())]
    return table(rows, ("method", "what it does"))


def gates() -> str:
    """Registered gate initialisations."""
    from ..upcycling import list_gate_inits

    rows = [(name, _first_sentence(init)) for name, init in list_gate_inits().items()]
    return table(rows, ("gate_init", "what it does"))


def domains() -> str:
    """Text domains that need no download from a hub."""
    from ..data import list_domains

    rows = [(domain.name, domain.title, domain.licence, domain.source) for domain in list_domains()]
    return table(rows, ("domain", "text", "licence", "source"))


KINDS = {"families": families, "routers": routers, "methods": methods, "gates": gates, "domains": domains}


def run(argv: list[str]) -> int:
    """Print one table."""
    args: ListArguments = parse("list", ListArguments, argv, positional=("kind",))
    if args.kind not in KINDS:
        raise UsageError(f"unknown kind `{args.kind}`; known: {', '.join(KINDS)}.")
    print(KINDS[args.kind]())
    return 0
