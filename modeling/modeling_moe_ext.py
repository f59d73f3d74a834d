"""Registered classes: `MoeExt<Stock>Config` and `MoeExt<Stock>Model / ForCausalLM / ...` for every family record.

Classes are made on demand by the module's `__getattr__`; `auto_map` of a saved model names this one module for config
and model. Nothing here needs the rest of the package, so a saved model loads with `trust_remote_code=True` where only
torch and transformers are installed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from .configuration_moe_ext import MoeExtension
from .moe_experts import DEFAULT_IMPLEMENTATION
from .moe_families import FAMILIES, Family, get_family, iter_bases
from .moe_models import LazyConfig
from .moe_routed_model import RoutedModel, routed_methods
from .moe_structure import (
    apply_plans,
    plan_extension,
)
from .moe_zoo import TopKRouter  # noqa: F401  (registers routers and parts)


if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers import PreTrainedConfig as _StockConfig
else:
    _StockConfig = object

PREFIX = "MoeExt"
TYPE_PREFIX = "moe_ext_"

# A stock class (`MixtralForCausalLM.from_pretrained(folder)`) would warn about the model type and go on with random
# experts. It refuses an implementation it does not know, and this text is what the user reads then.
_NOT_FOR_STOCK = (
    "hf-moe-ext (not for stock classes: load this model with an Auto class such as AutoModelForCausalLM, "
    "after `import hf_moe_ext` or with trust_remote_code=True)"
)

# Auto class -> the transformers table that says which model class a family has for it.
_AUTO_TABLES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}


class MoeExtConfigMixin(_StockConfig):
    """Adds the validated field `moe_ext` to a stock config class."""

    if TYPE_CHECKING:
        moe_ext: dict[str, Any] | None

    def __post_init__(self, **kwargs: Any) -> None:
        # By its beginning, so that the text may change.
        if str(kwargs.get("experts_implementation")).startswith(_NOT_FOR_STOCK.split()[0]):
            del kwargs["experts_implementation"]
        super().__post_init__(**kwargs)
        if self.moe_ext is not None:
            self.moe_ext = MoeExtension.from_dict(self.moe_ext).to_dict()

    @classmethod
    def is_custom_code(cls) -> bool:
        """A stock config with one field more: foreign code would have its `layer_types` renamed, which the stock model
        of some families (lfm2) does not understand."""
        return False

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds. It names an experts implementation that no stock class accepts."""
        return {**super().to_diff_dict(), "experts_implementation": _NOT_FOR_STOCK}


class MoeExtMixin(RoutedModel):
    """Put in front of a stock model class: applies the extension when built."""

    moe_family: Family
    moe_written_by = PREFIX

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        _register_models(type(self).moe_family.name)  # some heads build their base through AutoModel
        requested = config._experts_implementation
        # Inner dense models refuse the literal name `grouped_mm`; any registered other name passes.
        config._experts_implementation = DEFAULT_IMPLEMENTATION if requested in (None, "grouped_mm") else requested
        super().__init__(config, *args, **kwargs)
        if requested is not None:
            config._experts_implementation = requested
        family = type(self).moe_family
        inner = next((base for _, base in iter_bases(self, family) if "moe_link" in vars(base)), None)
        if inner is not None:  # a head around an AutoModel that is extended already
            self.moe_link = inner.moe_link
        else:
            if config.moe_ext is None:
                raise ValueError(
                    f"{type(config).__name__} has no `moe_ext`, which says how the model differs from the stock one. "
                    f"Load a saved extended model, or `extend` a stock {family.name} model."
                )
            extension = MoeExtension.from_dict(config.moe_ext)
            apply_plans(self, family, plan_extension(self, family, extension, building=True))
        self.post_init()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the code that is needed to load the model travels along."""
        self.config.auto_map = auto_map(type(self.config))
        return super().save_pretrained(save_directory, *args, **kwargs)


def _stock_config_class(model_type: str) -> Any:
    return CONFIG_MAPPING[model_type]


@functools.cache
def extended_config_class(stock: Any) -> Any:
    """`MoeExt<Stock>Config` for a stock config class."""
    name = PREFIX + stock.__name__
    namespace = {
        "__annotations__": {"moe_ext": "dict | None"},
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with the declaration of an extension in `moe_ext`.",
        "model_type": TYPE_PREFIX + stock.model_type,
        "moe_ext": None,
    }
    cls: Any = type(name, (MoeExtConfigMixin, stock), namespace)
    globals()[name] = cls
    cls.register_for_auto_class()
    return cls


@functools.cache
def extended_class(stock: Any) -> Any:
    """`MoeExt<Stock>` for a stock model class.

    Raises:
        ValueError: for a class of an architecture without a family record.
    """
    family = get_family(stock.config_class.model_type)
    if family is None:
        raise ValueError(
            f"{stock.__name__} belongs to the architecture `{stock.config_class.model_type}`, which is not supported. "
            "`hf-moe list families` shows those that are; CONTRIBUTING.md tells how to add one."
        )
    name = PREFIX + stock.__name__
    namespace = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with an extension (routers, experts) declared in its config.",
        "config_class": extended_config_class(stock.config_class),
        "moe_family": family,
        "moe_stock_class": stock,
        "moe_is_base": stock.__name__ in family.base,
        **routed_methods(stock),
    }
    if family.recomputes:
        namespace["supports_gradient_checkpointing"] = True
    cls: Any = type(name, (MoeExtMixin, stock), namespace)
    globals()[name] = cls
    # Classes outside transformers get the stock checkpoint conversions only if they are registered by name.
    mapping = get_checkpoint_conversion_mapping(stock.__name__) or get_checkpoint_conversion_mapping(
        stock.config_class.model_type
    )
    if mapping is not None:
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
    for auto_name, model_name in _auto_names(stock.config_class.model_type):
        if model_name == stock.__name__:
            auto_class = getattr(modeling_auto, auto_name)
            auto_class.register(cls.config_class, cls, exist_ok=True)
            cls.register_for_auto_class(auto_name)
    return cls


def _auto_names(model_type: str) -> list[tuple[str, str]]:
    found = []
    for auto_name, table in _AUTO_TABLES.items():
        names = getattr(modeling_auto, table).get(model_type)
        names = names if isinstance(names, (tuple, list)) else [names]
        found += [(auto_name, name) for name in names[:1] if name]
    return found


def auto_map(config_class: Any) -> dict[str, str]:
    """The `auto_map` of a saved model: this module for the config and every Auto class the family has."""
    module = __name__.rpartition(".")[2]
    model_type = config_class.model_type.removeprefix(TYPE_PREFIX)
    out = {"AutoConfig": f"{module}.{config_class.__name__}"}
    for auto_name, model_name in _auto_names(model_type):
        out[auto_name] = f"{module}.{PREFIX}{model_name}"
    return out


@functools.cache
def _register_models(model_type: str) -> None:
    family = get_family(model_type)
    if family is None:
        return
    module = family.modeling_module()
    for _, model_name in _auto_names(model_type):
        if hasattr(module, model_name):
            extended_class(getattr(module, model_name))


class _ExtendedConfig(LazyConfig):
    """Making the classes of all families at import would import every stock modelling file."""

    @classmethod
    def _resolve(cls) -> Any:
        config_class = extended_config_class(_stock_config_class(cls.model_type.removeprefix(TYPE_PREFIX)))
        _register_models(cls.model_type.removeprefix(TYPE_PREFIX))
        return config_class


def _model_types() -> list[str]:
    return [key for f in FAMILIES if f.available for key in (f.name, *f.aliases) if key in CONFIG_MAPPING_NAMES]


def _register_lazily() -> None:
    for model_type in _model_types():
        ours = TYPE_PREFIX + model_type
        if ours not in CONFIG_MAPPING:
            name = PREFIX + CONFIG_MAPPING_NAMES[model_type]
            stub = type(name, (_ExtendedConfig,), {"model_type": ours, "__module__": __name__})
            AutoConfig.register(ours, stub, exist_ok=True)


def _module_stem(model_type: str) -> str:
    family = get_family(model_type)
    return "" if family is None else (family.module or family.name).replace("_", "")


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock_name = name.removeprefix(PREFIX)
    best: tuple[int, str] = (0, "")
    for model_type in _model_types():
        config_name = CONFIG_MAPPING_NAMES[model_type]
        if config_name == stock_name:
            config_class = extended_config_class(_stock_config_class(model_type))
            _register_models(model_type)
            return config_class
        for stem in (config_name.removesuffix("Config"), _module_stem(model_type)):
            if stock_name.lower().startswith(stem.lower()):
                best = max(best, (len(stem), model_type))
    family = get_family(best[1]) if best[1] else None
    stock = getattr(family.modeling_module(), stock_name, None) if family is not None else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: no supported stock class {stock_name}")
    return extended_class(stock)


if not __name__.startswith("transformers_modules"):
    _register_lazily()
