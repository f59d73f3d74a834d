"""Registered classes: `MoeExt<Stock>Config` and `MoeExt<Stock>Model / ForCausalLM / ...` for every family record.

Classes are made on demand by the module's `__getattr__`; `auto_map` of a saved model names this one module for config
and model. Nothing here needs the rest of the package, so a saved model loads with `trust_remote_code=True` where only
torch and transformers are installed.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.utils import ModelOutput

from .configuration_moe_ext import MoeExtension
from .moe_context import RoutingContext
from .moe_experts import DEFAULT_IMPLEMENTATION, MoeExtGate, RoutedExperts
from .moe_families import FAMILIES, Family, get_family, iter_bases
from .moe_models import LazyConfig
from .moe_momentum import MomentumPart  # noqa: F401
from .moe_router import MoERouter
from .moe_shared_experts import SharedExpertsPart  # noqa: F401
from .moe_structure import (
    RoutedLayer,
    apply_plans,
    auxiliary_losses,
    given_cache,
    is_created,
    plan_extension,
    refuse_reentrant,
)
from .moe_zero_experts import ZeroExpertsPart  # noqa: F401

# Importing a router registers it, as importing a part did above.
from .router_act_dts import ActDTSRouter  # noqa: F401
from .router_adamoe import AdaMoERouter  # noqa: F401
from .router_comet import CometRouter  # noqa: F401
from .router_deepseek_moe import DeepSeekMoERouter  # noqa: F401
from .router_dselect_k import DSelectKRouter  # noqa: F401
from .router_dts import DTSRouter  # noqa: F401
from .router_expert_choice import ExpertChoiceRouter  # noqa: F401
from .router_hash import HashRouter  # noqa: F401
from .router_moe_plus_plus import MoEPlusPlusRouter  # noqa: F401
from .router_noisy_top_k import NoisyTopKRouter  # noqa: F401
from .router_permuted_top_k import PermutedTopKRouter  # noqa: F401
from .router_pre_gated import PreGatedRouter  # noqa: F401
from .router_random_fixed import RandomFixedRouter  # noqa: F401
from .router_rmoe import RMoERouter  # noqa: F401
from .router_sigmoid import SigmoidRouter  # noqa: F401
from .router_soft_moe import SoftMoERouter  # noqa: F401
from .router_stochastic import StochasticRouter  # noqa: F401
from .router_top_k import TopKRouter  # noqa: F401
from .router_top_p import TopPRouter  # noqa: F401
from .router_xmoe import XMoERouter  # noqa: F401


if TYPE_CHECKING:  # what the mixins are mixed into
    from transformers import PreTrainedConfig as _StockConfig
    from transformers import PreTrainedModel as _StockModel
else:
    _StockConfig = _StockModel = object

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


class MoeExtMixin(_StockModel):
    """Put in front of a stock model class: applies the extension when built, and adds its auxiliary losses.

    In training, when labels are given, the weighted auxiliary losses are added to the loss, once. With gradient
    accumulation (`num_items_in_batch`), they are scaled by the share of the batch's labels in this forward, so that
    the parts add up: to the whole batch's z-loss and entropy exactly where each part has the same share of the tokens.
    The balance loss is not a sum over tokens, so it is that of the parts. The stock auxiliary loss is not computed; it
    assumes plain top-k.
    """

    # The stock check reads the source of the class's module, where our factory does not look like an MoE.
    _can_set_experts_implementation_cached_value = True
    moe_family: Family
    moe_forward_parameters: tuple[str, ...]
    moe_is_base: bool

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo.setdefault(id(self.moe_link), self.moe_link.separate())
        twin: Any = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(vars(self), memo))
        return twin

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise the stock model, then the modules it does not know, whose linear maps it would take for its own.
        Loaded tensors are skipped."""
        super().initialize_weights()
        std = getattr(self.config.get_text_config(), "initializer_range", None) or 0.02
        with init.guard_torch_init_functions():
            for module in self.modules():
                if is_created(module):
                    if isinstance(module, MoERouter) and isinstance(module, MoeExtGate):
                        MoeExtGate.init_weights(module, std)  # the router in front of it has its own
                    module.init_weights(std)
            for module in self.modules():
                if isinstance(module, MoERouter) and is_created(module):
                    module.init_from_stock()

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; weights that are missing or damaged are named."""
        from safetensors import SafetensorError

        try:
            return super().from_pretrained(source, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"{_damaged_file(source)} is damaged or incomplete ({error}). Save or download it again."
            ) from error

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Called at the end of loading. Transformers only logs missing weights; experts must not be random unseen."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        problem = _loading_problem(self, loading_info)
        if problem is not None:
            # Otherwise transformers raises for these in place of the message below.
            loading_info.conversion_errors.clear()
            loading_info.mismatched_keys.clear()
            raise ValueError(problem)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> Any:
        result = super()._set_gradient_checkpointing(enable, *args, **kwargs)
        crosses = any(isinstance(module, RoutedLayer) and module.moe_crosses_layers for module in self.modules())
        try:
            if enable and crosses:
                refuse_reentrant(self)
        except ValueError:
            super()._set_gradient_checkpointing(False)
            raise
        return result

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the code that is needed to load the model travels along."""
        self.config.auto_map = auto_map(type(self.config))
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _refuse_to_generate(self) -> None:
        if self.moe_link.non_causal:
            raise ValueError(
                f"this model has the router `{self.moe_link.non_causal}` in causal layers. It looks at all tokens of "
                "a sequence at once, so the model cannot continue a text token by token."
            )

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An argument of the forward, by name or by place; `None` where it is missing."""
        parameters = self.moe_forward_parameters
        place = parameters.index(name) if name in parameters else len(args)
        return args[place] if place < len(args) else kwargs.get(name)

    def _moe_forward(self, stock_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        slots = self.moe_link.slots
        if slots.collected is not None:
            return stock_forward(self, *args, **kwargs)
        if self.moe_link.non_causal and _is_filled(given_cache(kwargs)):
            self._refuse_to_generate()
        parameters = self.moe_forward_parameters
        wants_logits = kwargs.pop("output_router_logits", None)
        if wants_logits is None:
            wants_logits = getattr(self.config, "output_router_logits", False)
        if "output_router_logits" in parameters:
            kwargs["output_router_logits"] = False
        # A base model's own hook has opened its context already.
        contexts: list[RoutingContext] = [slots.context] if self.moe_is_base and slots.context is not None else []
        slots.collected = contexts
        if not self.config.is_encoder_decoder:  # there they are the encoder's
            slots.input_ids = self._argument("input_ids", args, kwargs)
        try:
            output = stock_forward(self, *args, **kwargs)
        finally:
            # The hook that ends a context does not run on Ctrl-C.
            slots.collected = slots.context = slots.input_ids = None
        for observer in self.moe_link.observers:
            observer(contexts)

        labels = self._argument("labels", args, kwargs)
        aux_loss = None
        if labels is not None and (self.training or wants_logits):
            aux_loss, _ = auxiliary_losses(contexts)
        if aux_loss is not None and self.training:
            share = _label_share(labels, kwargs.get("num_items_in_batch"), self)
            output = _add_to_loss(output, aux_loss * share)
        if wants_logits and isinstance(output, ModelOutput):
            output = _with_router_logits(output, contexts, aux_loss)
        return output


def _is_filled(cache: Any) -> bool:
    return cache is not None and hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0


def _damaged_file(source: Any) -> str:
    from safetensors import SafetensorError, safe_open

    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return f"`{path}`"
    return f"a weights file of `{source}`"


def _loading_problem(model: Any, info: Any) -> str | None:
    """What is wrong with a checkpoint that one of our classes wrote, or `None`.

    Stock checkpoints are left to transformers: they may lack what an extension adds. A checkpoint of another head
    lacks that head.
    """
    written_by = next(iter(model.config.architectures or ()), "")
    if not written_by.startswith(PREFIX):
        return None
    ours = tuple(
        f"{name}." for name, module in model.named_modules() if is_created(module) or isinstance(module, RoutedExperts)
    )
    torn = set(info.conversion_errors)
    missing = {key for key in info.missing_keys if written_by == type(model).__name__ or key.startswith(ours)} - torn
    shapes = {
        key: f"`{key}` has the shape {list(found)}, the config says {list(wanted)}"
        for key, found, wanted in info.mismatched_keys
        if key.startswith(ours)
    }
    parts = [f"`{key}` is missing" for key in sorted(missing - set(shapes))]
    parts += [shapes[key] for key in sorted(shapes)]
    parts += [
        f"the single experts of `{key}` do not fit together: some are missing or misshapen" for key in sorted(torn)
    ]
    if not parts:
        return None
    more = f", and {len(parts) - 5} more" if len(parts) > 5 else ""
    return (
        f"the checkpoint `{model.config.name_or_path}` does not fit its config: {'; '.join(parts[:5])}{more}. It is "
        "incomplete, damaged, or its config.json was changed; save or download it again."
    )


def _label_share(labels: torch.Tensor, num_items: Any, model: Any) -> Any:
    if num_items is None:
        return 1.0
    # A loss that shifts labels predicts from position 1 on; the trainer counts the same labels.
    count = (labels[..., 1:] if loss_shifts_labels(model) and labels.dim() > 1 else labels).ne(-100).sum()
    return count / num_items


def loss_shifts_labels(model: Any) -> bool:
    """Whether the label of a position is predicted from the position before it."""
    return LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss and not model.config.is_encoder_decoder


def _add_to_loss(output: Any, extra: torch.Tensor) -> Any:
    if isinstance(output, tuple):
        return (output[0] + extra.to(output[0]), *output[1:])
    output.loss = output.loss + extra.to(output.loss)
    return output


@functools.cache
def _moe_output_class(stock: Any, names: tuple[str, ...]) -> Any:
    known = {item.name for item in fields(stock)}
    extra = {name: None for name in names if name not in known}
    if not extra:
        return stock
    annotations = {name: "torch.Tensor | tuple | None" for name in extra}
    namespace = {"__annotations__": annotations, "__module__": __name__, **extra}
    return dataclass(type(f"Moe{stock.__name__}", (stock,), namespace))


def _with_router_logits(output: ModelOutput, contexts: list[RoutingContext], aux_loss: Any) -> ModelOutput:
    inner = [context.attention for context in contexts if context.attention is not None]
    extra: dict[str, Any] = {"aux_loss": aux_loss, "router_logits": _logits(contexts)}
    if inner:
        extra["attn_router_logits"] = _logits(inner)
    stock_class: Any = type(output)
    return _moe_output_class(stock_class, tuple(extra))(**{**output, **extra})


def _logits(contexts: list[RoutingContext]) -> tuple[torch.Tensor, ...]:
    return tuple(record.logits for context in contexts for record in context.records.values())


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
    stock_forward = stock.forward

    @functools.wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._moe_forward(stock_forward, args, kwargs)

    namespace = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with an extension (routers, experts) declared in its config.",
        "config_class": extended_config_class(stock.config_class),
        "moe_family": family,
        "moe_stock_class": stock,
        "moe_is_base": stock.__name__ in family.base,
        "moe_forward_parameters": tuple(inspect.signature(stock_forward).parameters)[1:],
        "forward": forward,
    }
    if hasattr(stock, "generate"):
        stock_generate = stock.generate

        @functools.wraps(stock_generate)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            self._refuse_to_generate()
            return stock_generate(self, *args, **kwargs)

        namespace["generate"] = generate
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
