"""Training: `MoETrainer`, its arguments, and what it is made of. Every name is imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .freezing import freeze_router as freeze_router
    from .freezing import train_experts as train_experts
    from .freezing import train_only_adapter_routers as train_only_adapter_routers
    from .freezing import train_only_moe as train_only_moe
    from .freezing import train_rows as train_rows
    from .moe_trainer import MoETrainer as MoETrainer
    from .moe_training_arguments import MoETrainingArguments as MoETrainingArguments
    from .read_me import ReadMeTuningArguments as ReadMeTuningArguments
    from .read_me import RouterDistillation as RouterDistillation
    from .read_me import tune_read_me as tune_read_me
    from .routing_history import read_history as read_history
    from .routing_replay import RoutingReplayCollator as RoutingReplayCollator

_PUBLIC = {
    "MoETrainer": "moe_trainer",
    "MoETrainingArguments": "moe_training_arguments",
    "ReadMeTuningArguments": "read_me",
    "RouterDistillation": "read_me",
    "RoutingReplayCollator": "routing_replay",
    "freeze_router": "freezing",
    "read_history": "routing_history",
    "train_experts": "freezing",
    "train_only_adapter_routers": "freezing",
    "train_only_moe": "freezing",
    "train_rows": "freezing",
    "tune_read_me": "read_me",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
