"""Models whose forward leaves records of their routing, whatever the architecture.

`RoutedModel` opens and closes the routing contexts around a forward, adds the auxiliary losses to the loss and the
routers' logits to the output, initialises what routers and parts create, and reads checkpoints strictly.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import ModelOutput

from .moe_context import RoutingContext
from .moe_experts import MoeExtGate, RoutedExperts
from .moe_lora import freeze_base
from .moe_parts import PartModule
from .moe_router import MoERouter
from .moe_structure import RoutedLayer, auxiliary_losses, given_cache, is_created, refuse_reentrant


if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers import PreTrainedModel as _StockModel
else:
    _StockModel = object

_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True)
class OwnExperts:
    """Routers and experts of one layer, as an architecture without a family record tells them.

    Attributes:
        key: key of the layer.
        layer: the decoder layer.
        router: its router; layers may share one.
        experts: the module that holds its experts.
        num_experts: how many these are.
    """

    key: str
    layer: nn.Module
    router: nn.Module
    experts: nn.Module
    num_experts: int


class RoutedModel(_StockModel):
    """Put in front of a model class whose routing is installed by `apply_plans`.

    In training, when labels are given, the weighted auxiliary losses are added to the loss, once. With gradient
    accumulation (`num_items_in_batch`), they are scaled by the share of the batch's labels in this forward, so that
    the parts add up: to the whole batch's z-loss and entropy exactly where each part has the same share of the tokens.
    The balance loss is not a sum over tokens, so it is that of the parts. The stock auxiliary loss is not computed; it
    assumes plain top-k.

    Attributes (of the class):
        moe_forward_parameters: names of the parameters of the forward, in order.
        moe_is_base: whether this is the model that owns the layers, without a head.
        moe_written_by: how the names of the classes begin whose checkpoints have to be complete.
    """

    # The stock check reads the source of the class's module, where our factory does not look like an MoE.
    _can_set_experts_implementation_cached_value = True
    moe_forward_parameters: tuple[str, ...]
    moe_is_base: bool
    moe_written_by: str

    def own_experts(self) -> list[OwnExperts]:
        """Routers and experts by layer, where no family record says where they are. Default: none."""
        return []

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
        freeze_base(self)  # loading makes new, trainable parameters

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; what has embeddings of its own for the same tokens follows."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, PartModule):
                module.resize_vocabulary(embeddings.weight.shape[0])
        return embeddings

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
        task_ids = kwargs.pop("task_ids", None)
        wants_logits = kwargs.pop("output_router_logits", None)
        if wants_logits is None:
            wants_logits = getattr(self.config, "output_router_logits", False)
        if "output_router_logits" in parameters:
            kwargs["output_router_logits"] = False
        # A base model's own hook has opened its context already.
        contexts: list[RoutingContext] = [slots.context] if self.moe_is_base and slots.context is not None else []
        slots.collected = contexts
        slots.task_ids = task_ids
        if not self.config.is_encoder_decoder:  # there they are the encoder's
            slots.input_ids = self._argument("input_ids", args, kwargs)
        try:
            output = stock_forward(self, *args, **kwargs)
        finally:
            # The hook that ends a context does not run on Ctrl-C.
            slots.collected = slots.context = slots.input_ids = slots.task_ids = None
        for observer in self.moe_link.observers:
            observer(contexts)

        labels = self._argument("labels", args, kwargs)
        aux_loss = None
        if labels is not None and (self.training or wants_logits):
            aux_loss, _ = auxiliary_losses(contexts)
        if aux_loss is not None and self.training:
            share = label_share(labels, kwargs.get("num_items_in_batch"), self)
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
    if not written_by.startswith(type(model).moe_written_by):
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


def label_share(labels: torch.Tensor, num_items: Any, model: Any) -> Any:
    """Share of the labels of a whole batch that is in this forward; 1 where `num_items` is `None`."""
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
    extra: dict[str, Any] = {"aux_loss": aux_loss, "router_logits": _logits(contexts)}
    for group, name in (("attention", "attn_router_logits"), ("lora", "lora_router_logits")):
        inner = [context.inner[group] for context in contexts if group in context.inner]
        if inner:
            extra[name] = _logits(inner)
    stock_class: Any = type(output)
    return _moe_output_class(stock_class, tuple(extra))(**{**output, **extra})


def _logits(contexts: list[RoutingContext]) -> tuple[torch.Tensor, ...]:
    return tuple(record.logits for context in contexts for record in context.decisions())


def routed_methods(stock: Any) -> dict[str, Any]:
    """Forward and `generate` of a model class, as `RoutedModel` needs them, to be put into a subclass."""
    stock_forward = stock.forward

    @functools.wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._moe_forward(stock_forward, args, kwargs)

    methods: dict[str, Any] = {
        "moe_forward_parameters": tuple(inspect.signature(stock_forward).parameters)[1:],
        "forward": forward,
    }
    if hasattr(stock, "generate"):
        stock_generate = stock.generate

        @functools.wraps(stock_generate)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            self._refuse_to_generate()
            return stock_generate(self, *args, **kwargs)

        methods["generate"] = generate
    return methods


def routed(model_class: _Class) -> _Class:
    """Class decorator for a model class of an architecture of our own that derives from `RoutedModel`."""
    for name, method in routed_methods(model_class).items():
        setattr(model_class, name, method)
    return model_class
