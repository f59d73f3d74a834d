"""A working setting of every router for the common matrix, as a function of the family's name."""

from __future__ import annotations

from collections.abc import Callable

from hf_moe_ext.modeling.configuration_moe_ext import RouterConfig
from hf_moe_ext.modeling.moe_families import get_family
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.modeling.router_top_p import TopPRouterConfig


def named_score(name: str) -> str | None:
    """A score for families whose gate follows a rule of its own, `None` for the others."""
    family = get_family(name)
    return "softmax" if family.moe is not None and family.moe.score == "custom" else None


# By router; tiny models have 8 experts (4 where they are upcycled), 2 per token. Losses are on.
SETTINGS: dict[str, Callable[[str], RouterConfig]] = {
    "top_k": lambda name: TopKRouterConfig(balance_coef=0.01, z_coef=0.001, entropy_coef=0.001),
    "top_p": lambda name: TopPRouterConfig(
        threshold=0.5, max_slots=3, renormalize=True, score=named_score(name), z_coef=0.001
    ),
}

# On every family; the others stand on four that differ in structure.
FOUNDATION = ("top_k", "top_p")
UPCYCLED = "llama_upcycled"
STRUCTURES = ("mixtral", "deepseek_v3", "qwen2_moe", UPCYCLED)
