"""Architectures of this package that no stock one can express, and how the Auto classes find them.

Each has a configuration file and a modelling file here, as the architectures of Transformers have. Its config class
stands in `AutoConfig` from the start; the modelling file is imported when the config is first used, and registers its
classes with `AutoModel*` itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


# model_type -> (modelling file, config class). A new architecture is one line here.
OWN_MODELS: dict[str, tuple[str, str]] = {
    "monet": ("modeling_monet", "MonetConfig"),
    "moduleformer": ("modeling_moduleformer", "ModuleFormerConfig"),
}


class LazyConfig:
    """Stands in `AutoConfig` for a config class that is made, or imported, with its models at first use.

    It stays there, so that the model classes are registered whichever way a config is loaded.
    """

    model_type: str

    @classmethod
    def _resolve(cls) -> Any:
        raise NotImplementedError

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._resolve()(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        return cls._resolve().from_dict(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        return cls._resolve().from_pretrained(*args, **kwargs)


class _OwnConfig(LazyConfig):
    @classmethod
    def _resolve(cls) -> Any:
        module, name = OWN_MODELS[cls.model_type]
        return getattr(import_module(f".{module}", __package__), name)


def register_own_models() -> None:
    """Make the model types known to `AutoConfig`. Imports no modelling file."""
    for model_type, (_, name) in OWN_MODELS.items():
        if model_type not in CONFIG_MAPPING:
            stub: Any = type(name, (_OwnConfig,), {"model_type": model_type, "__module__": __name__})
            AutoConfig.register(model_type, stub, exist_ok=True)
