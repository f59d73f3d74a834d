"""The method contract: what turns the feed-forward weights of one dense layer into experts, and how it is registered.

A method sees the tensors of one layer and nothing else, so that converting a live model, a checkpoint on disk and a
checkpoint while it loads are the same computation.

Axes: E experts, P parts of the input projection (2, `[gate, up]`, for a gated block, else 1), I intermediate,
H hidden.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F

from ..modeling.configuration_moe_ext import RouterConfig, _to_dict, _unknown, check_types


@dataclass
class FeedForward:
    """Weights of one feed-forward block, in (out, in) layout.

    Attributes:
        up: (P, I, H), the gate's part first.
        down: (H, I).
        up_bias, down_bias: (P, I) and (H,), both or neither.
        activation_degree: n where the activation turns a positive factor c into c^n: 2 for squared ReLU, else 1
            (exact for ReLU, an approximation for SiLU and GELU).
        statistics: what the method's collectors have found in this layer, by name.
    """

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    activation_degree: int = 1
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.down.shape[-1]

    def forward(self, hidden: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What the block computes: (T, H) -> (T, H)."""
        biases = [None] * len(self.up) if self.up_bias is None else list(self.up_bias)
        parts = [F.linear(hidden, weight, bias) for weight, bias in zip(self.up, biases, strict=True)]
        inner = activation(parts[0])
        return F.linear(inner * parts[1] if len(parts) == 2 else inner, self.down, self.down_bias)


@dataclass
class ExpertStack:
    """Weights of the experts of one layer: as `FeedForward`, with the axis E in front.

    Attributes:
        shared: the block that every token passes, where the method makes one (`shared_width`).
        router: tensors of the router that the method makes itself, by name (`own_gate`); `weight` is the gate's.
    """

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    shared: FeedForward | None = None
    router: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class UpcyclingMethod:
    """Base of all methods. A subclass is a dataclass whose fields are the method's options; `name` is set by
    `register_upcycling_method`.

    Attributes (of the class):
        sizes_from_data: whether the widths of experts follow from calibration data, so that this runs first.
    """

    name: ClassVar[str] = ""
    sizes_from_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def experts_per_copy(self) -> int:
        """Experts that stand for one copy of the dense block. `num_experts` and `num_experts_per_tok` count copies."""
        return 1

    @classmethod
    def counts(cls, num_experts: int | None, num_experts_per_tok: int | None, calibration: Any) -> tuple[int, int]:
        """Copies of each block and copies of a token, where `None` was given for them. Default: 8 and 2."""
        return 8 if num_experts is None else num_experts, 2 if num_experts_per_tok is None else num_experts_per_tok

    @property
    def default_router(self) -> RouterConfig | None:
        """The router of the result where none is given; `None` for the plain rule."""
        return None

    def fit_router(self, router: RouterConfig, num_experts_per_tok: int, dense_widths: list[int]) -> RouterConfig:
        """The router with what it has to know of the dense model; `dense_widths` are those of its blocks.

        Raises:
            ValueError: where it does not go with the options.
        """
        return router

    @property
    def own_gate(self) -> str:
        """How the gates start, in a word, where `convert` makes them (`ExpertStack.router`) for `default_router`.
        Empty where `gate_init` does."""
        return ""

    def prepared(self, num_experts: int, num_experts_per_tok: int) -> UpcyclingMethod:
        """The method for these numbers of copies; options that depend on them are filled in."""
        return self

    def collectors(self, num_experts: int) -> dict[str, Any]:
        """What a calibration pass has to collect, by name (see `hf_moe_ext.calibration`). Default: nothing."""
        return {}

    def check_calibration(self, data: Any, num_experts: int) -> None:
        """Raise `ValueError` where calibration data does not fit. Called before anything is changed."""

    def statistics(self, collected: dict[str, Any], key: str) -> dict[str, torch.Tensor]:
        """What the collectors have found in one layer, as `convert` wants it."""
        return {}

    def check_activation(self, key: str, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Raise `ValueError` where the activation of a layer does not fit. Called before anything is changed."""

    def expert_width(self, intermediate_size: int, num_copies: int = 1) -> int:
        """Intermediate size of one expert.

        Raises:
            ValueError: where the dense width does not fit the options.
        """
        return intermediate_size

    @property
    def shared_width(self) -> int:
        """Intermediate size of the shared block that `convert` makes beside the experts; 0 for none."""
        return 0

    @property
    def makes_shared(self) -> bool:
        """Whether there is such a block."""
        return self.shared_width > 0

    def widths(self, intermediate_size: int, num_copies: int, statistics: dict[str, torch.Tensor]) -> tuple[int, int]:
        """Intermediate size of one expert and of the shared block, 0 for none. `statistics` are those of the layer
        where `sizes_from_data` is set."""
        return self.expert_width(intermediate_size, num_copies), self.shared_width

    def finish(self, model: Any, statistics: dict[str, dict[str, torch.Tensor]]) -> None:
        """Called with the finished model and the statistics by layer key. Default: nothing."""

    def convert(self, dense: FeedForward, num_copies: int, seed: int) -> ExpertStack:
        """Make the experts of one layer.

        Args:
            dense: the dense block.
            num_copies: copies of the dense block; the result has `num_copies * experts_per_copy` experts.
            seed: of everything random in this layer.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {name: value for name, value in _to_dict(self).items() if name in option_names(self.name)}


# Options of `from_pretrained` that are easily given to the wrong function.
_LOADING = ("device_map", "dtype", "low_cpu_mem_usage", "low_memory", "max_memory", "torch_dtype")

_METHODS: dict[str, type[UpcyclingMethod]] = {}
_Method = TypeVar("_Method", bound=UpcyclingMethod)


def register_upcycling_method(name: str, *, exist_ok: bool = False) -> Callable[[type[_Method]], type[_Method]]:
    """Class decorator that makes a method known as `upcycle(..., method=name)`.

    Args:
        name (`str`):
            Lower-case name with underscores.
        exist_ok (`bool`, *optional*, defaults to `False`):
            Whether an existing method of that name may be replaced.

    Raises:
        ValueError: for a name in another form, or one that is taken.
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"a method's name must be lower-case letters, digits and underscores, got {name!r}.")
    if name in _METHODS and not exist_ok:
        raise ValueError(f"an upcycling method named `{name}` is registered already ({_METHODS[name].__qualname__}).")

    def decorate(method: type[_Method]) -> type[_Method]:
        method.name = name
        _METHODS[name] = method
        return method

    return decorate


_MODEL_METHODS: dict[str, Callable[..., Any]] = {}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def register_model_method(name: str) -> Callable[[_Function], _Function]:
    """Decorator for a function `(dense, *, ...) -> model` that makes a model of another form than experts in place of
    feed-forward blocks, so that `upcycle(dense, method=name, ...)` calls it with the given options.

    Raises:
        ValueError: for a name that is taken.
    """
    if name in _METHODS or name in _MODEL_METHODS:
        raise ValueError(f"an upcycling method named `{name}` is registered already.")

    def decorate(function: _Function) -> _Function:
        _MODEL_METHODS[name] = function
        return function

    return decorate


def run_model_method(name: str, dense: Any, given: dict[str, Any], options: dict[str, Any]) -> Any:
    """Call the function registered by `register_model_method`; `None` where there is none of that name.

    Args:
        given: arguments of `upcycle`, `None` where they were left at their defaults.
        options: further keyword arguments.

    Raises:
        TypeError: for an argument that the function does not take.
    """
    function = _MODEL_METHODS.get(name)
    if function is None:
        return None
    known = set(inspect.signature(function).parameters)
    unknown = [key for key, value in given.items() if key not in known and value not in (None, False)]
    unknown += [key for key in options if key not in known]
    if unknown:
        takes = ", ".join(f"`{key}`" for key in sorted(known - {"dense"}))
        raise TypeError(f"the method `{name}` does not take `{unknown[0]}`; it takes {takes}.")
    taken = {key: value for key, value in given.items() if key in known and value is not None}
    return function(dense, **taken, **options)


def method_class(name: str) -> type[UpcyclingMethod]:
    """The class registered under `name`; the base class for an unknown one."""
    return _METHODS.get(name, UpcyclingMethod) if isinstance(name, str) else UpcyclingMethod


def option_names(name: str) -> list[str]:
    """The options of a method; none for an unknown one."""
    return [item.name for item in fields(_METHODS[name]) if item.init] if name in _METHODS else []


def make_method(name: str, options: dict[str, Any]) -> UpcyclingMethod:
    """The method registered under `name`, with its options checked.

    Raises:
        ValueError: for an unknown method or option, or a value out of range.
        TypeError: for a value of the wrong type.
    """
    if not isinstance(name, str) or name not in _METHODS:
        if name in _MODEL_METHODS:
            raise ValueError(f"the method `{name}` makes a model of another form; use `upcycle(model, method=...)`.")
        raise ValueError(_unknown("upcycling method", str(name), {**_METHODS, **_MODEL_METHODS}))
    known = option_names(name)
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            raise TypeError(
                f"unknown option `{option}`; the method `{name}` has "
                + (", ".join(f"`{item}`" for item in known) or "no options")
                + (f". Did you mean `{close[0]}`?" if close else ".")
                + (" `load_upcycled` takes what `from_pretrained` takes." if option in _LOADING else "")
            )
    return _METHODS[name](**options)


def list_methods() -> dict[str, type[UpcyclingMethod]]:
    """All methods that make experts of feed-forward blocks by name, sorted."""
    return dict(sorted(_METHODS.items()))


def list_model_methods() -> dict[str, Callable[..., Any]]:
    """All methods that make a model of another form by name, sorted."""
    return dict(sorted(_MODEL_METHODS.items()))


def derive_seed(seed: int, *labels: str) -> int:
    """A seed for one purpose in one layer. Depends on nothing but its arguments, in particular not on the order in
    which layers are converted."""
    digest = hashlib.sha256("/".join([str(seed), *labels]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
