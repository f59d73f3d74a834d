"""Write a folder's `custom_generate/`, by which a model generates with self-contrast where this package is missing."""

from __future__ import annotations

from pathlib import Path
from pprint import pformat
from typing import Any

from transformers import PreTrainedModel

from ..files import write_file
from ..modeling.moe_structure import iter_routers
from ..modeling.router_top_k import TopKRouterConfig, renormalizes
from ..patching import extend, restore
from .decoding import check_strengths


FOLDER = "custom_generate"
DEFAULTS: dict[str, Any] = {"beta": 0.5, "alpha": 0.1, "weak": "rank-2"}


def routing_of(model: PreTrainedModel) -> dict[str, Any]:
    """The gates of a model and the rule by which they choose, as `hub_generate.ROUTING` has them.

    Raises:
        ValueError: where the file could not choose in the place of the gates; the message says why.
    """
    if "moe_link" in vars(model):
        others = sorted({r.moe_config.type for r in iter_routers(model) if not hasattr(r.moe_config, "first_rank")})
        if others:
            raise ValueError(
                f"an exported folder can route weakly with routers of the type `top_k`, not {others}: these have no "
                "ranks of experts to choose."
            )
        return {}
    extend(model, TopKRouterConfig())
    try:
        sites = [(name, module.moe_site.rule) for name, module in model.named_modules() if hasattr(module, "moe_site")]
    finally:
        restore(model)
    rules = {rule for _, rule in sites}
    if len(rules) > 1:
        raise ValueError("the gates of this model have different rules.")
    rule = rules.pop()
    simple = {"L", "W", "I"} <= set(rule.returns) and rule.expert_scale is None and rule.bias != "arg"
    if not simple or rule.score == "custom" or rule.input_3d:
        raise ValueError(
            f"a `{model.config.model_type}` block does not take its choice from a gate that returns logits, weights "
            "and ids, so the exported file could not replace it. `self_contrast` of this package works with it."
        )
    return {
        "gates": [name for name, _ in sites],
        "returns": rule.returns,
        "score": rule.score,
        "bias": rule.bias,
        "groups": rule.groups,
        "renormalize": renormalizes(TopKRouterConfig(), rule),
        "scale": rule.scale,
    }


def write_self_contrast(folder: Path, model: PreTrainedModel, **defaults: Any) -> None:
    """Write `custom_generate/generate.py` and what it imports into a folder.

    Args:
        folder: of the exported model.
        model: which was exported.
        defaults: of `beta`, `alpha` and `weak`.

    Raises:
        ValueError: an unknown default or one out of range, or see `routing_of`.
    """
    unknown = set(defaults) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"self-contrast has the settings {sorted(DEFAULTS)}, not {sorted(unknown)}.")
    settings = DEFAULTS | defaults
    check_strengths(settings["beta"], settings["alpha"])
    here = Path(__file__).parent
    source = (here / "hub_generate.py").read_text()
    line = "ROUTING: dict[str, Any] = {}"
    routing = pformat({**settings, **routing_of(model)}, sort_dicts=False, width=110)
    write_file(folder / FOLDER / "generate.py", source.replace(line, f"ROUTING: dict[str, Any] = {routing}", 1))
    write_file(folder / FOLDER / "decoding.py", (here / "decoding.py").read_text())
