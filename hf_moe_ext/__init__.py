"""Mixture-of-Experts for Hugging Face Transformers.

Importing the package registers its model classes with `AutoConfig` and `AutoModel*` and does nothing else: every
public name below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .modeling import modeling_moe_ext as _registered  # noqa: F401


__version__ = "0.1.0"

# Public name -> the submodule that defines it. A new name is added here and under TYPE_CHECKING. It must not be the
# name of a submodule: importing that submodule would put the module in its place.
_PUBLIC = {
    "ExpertsConfig": "modeling.configuration_moe_ext",
    "MoERouter": "modeling.moe_router",
    "MoETrainer": "trainers",
    "MoETrainingArguments": "trainers",
    "MoeExtension": "modeling.configuration_moe_ext",
    "RouteRecord": "modeling.moe_context",
    "RouterConfig": "modeling.configuration_moe_ext",
    "RouterSite": "modeling.moe_router",
    "RoutingContext": "modeling.moe_context",
    "TopKRouterConfig": "modeling.router_top_k",
    "TopPRouterConfig": "modeling.router_top_p",
    "describe": "patching",
    "export": "hub",
    "extend": "patching",
    "from_gguf": "gguf",
    "list_families": "modeling.moe_families",
    "register_router": "modeling.moe_router",
    "report": "reporting",
    "restore": "patching",
    "route_rows": "modeling.moe_structure",
    "trace_routing": "modeling.moe_structure",
    "upcycle": "upcycling",
    "upcycle_checkpoint": "upcycling",
}

if TYPE_CHECKING:  # for type checkers and editors; `as` marks a name as public
    from .gguf import from_gguf as from_gguf
    from .hub import export as export
    from .modeling.configuration_moe_ext import ExpertsConfig as ExpertsConfig
    from .modeling.configuration_moe_ext import MoeExtension as MoeExtension
    from .modeling.configuration_moe_ext import RouterConfig as RouterConfig
    from .modeling.moe_context import RouteRecord as RouteRecord
    from .modeling.moe_context import RoutingContext as RoutingContext
    from .modeling.moe_families import list_families as list_families
    from .modeling.moe_router import MoERouter as MoERouter
    from .modeling.moe_router import RouterSite as RouterSite
    from .modeling.moe_router import register_router as register_router
    from .modeling.moe_structure import route_rows as route_rows
    from .modeling.moe_structure import trace_routing as trace_routing
    from .modeling.router_top_k import TopKRouterConfig as TopKRouterConfig
    from .modeling.router_top_p import TopPRouterConfig as TopPRouterConfig
    from .patching import describe as describe
    from .patching import extend as extend
    from .patching import restore as restore
    from .reporting import report as report
    from .trainers import MoETrainer as MoETrainer
    from .trainers import MoETrainingArguments as MoETrainingArguments
    from .upcycling import upcycle as upcycle
    from .upcycling import upcycle_checkpoint as upcycle_checkpoint

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
