"""Adapters on experts, as PEFT puts them there, read as two thin matrices for each expert.

PEFT targets stacked experts by `LoraConfig(target_parameters=...)`: a `ParamWrapper` around the experts module (one
around the other where both projections are targeted) hangs a parametrization on the parameter while the module runs,
so that reading `gate_up_proj` gives `W + scale * B @ A` for all experts, a tensor of the size of W. `read_adapted`
looks below that parametrization and takes W, A and B as they are.

PEFT computes each parametrization once more when it is hung up, to check its shape. `keep_factors` leaves out that
check, and with it the last tensor of the size of W.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils import parametrize

from .expert_weights import ExpertWeights, Layout, read_experts


@dataclass(frozen=True)
class LowRank:
    """`scale * B @ A`, to be added to one projection of each expert.

    Args:
        a: (E, r, in), whatever the layout of the projection.
        b: (E, out, r), with rows in the module's own order.
        scale: factor of the product.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class ExpertLora:
    """Adapters of one experts module; `None` where a projection has none.

    Args:
        up: A (E, r, H), B (E, 2I, r), or (E, I, r) without a gate.
        down: A (E, r, I), B (E, H, r).
    """

    up: LowRank | None
    down: LowRank | None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """A and B of `up`, then A and B of `down`."""
        up = (None, None) if self.up is None else (self.up.a, self.up.b)
        return (*up, *((None, None) if self.down is None else (self.down.a, self.down.b)))

    def with_tensors(self, tensors: Any) -> ExpertLora:
        """The same adapters on other tensors, in the order of `tensors`."""
        up_a, up_b, down_a, down_b = tensors
        return ExpertLora(
            None if self.up is None else LowRank(up_a, up_b, self.up.scale),
            None if self.down is None else LowRank(down_a, down_b, self.down.scale),
        )


@dataclass(frozen=True)
class AdaptedExperts:
    """What `read_adapted` finds.

    Args:
        experts: tensors and layout, without the adapters.
        lora: the adapters.
    """

    experts: ExpertWeights
    lora: ExpertLora


def _proxy_class() -> type | None:
    layer = sys.modules.get("peft.tuners.lora.layer")  # where nobody imported PEFT, there is no adapter of it
    return getattr(layer, "_LoraFactorsProxy", None)


def read_adapted(experts: Any) -> AdaptedExperts | None:
    """The experts and their adapters apart, while a `ParamWrapper` of PEFT runs them.

    Gradients of A and B flow on to `lora_A.weight` (E*r, in), which has the rows of an expert together, and
    `lora_B.weight` (out, r*E), in whose columns the expert counts fastest: A and B are views of them.

    Args:
        experts: a module made with `use_experts_implementation`.

    Returns:
        `None` where reading the parameters, as always, is the way: no adapter is active, or it is merged, several are
        active at once, a projection has something else on it, there is one expert only (which PEFT treats as a plain
        layer), a parameter of the experts themselves is trained, or they do more than a known activation between
        their projections.
    """
    if not parametrize.is_parametrized(experts):
        return None
    proxy_class = _proxy_class()
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    if proxy_class is None or not {up_name, "down_proj"}.issuperset(experts.parametrizations):
        return None
    found: dict[str, LowRank] = {}
    originals: dict[str, nn.Parameter] = {}
    for name, functions in experts.parametrizations.items():
        if len(functions) != 1 or not isinstance(functions[0], proxy_class) or not functions.is_tensor:
            return None
        originals[name] = functions.original
        found[name] = _low_rank(functions[0], experts.is_transposed)
    kind = parametrize.type_before_parametrizations(experts)
    key, known = (kind, getattr(experts, "act_fn", None)), _layouts.get(experts)
    if known is None or known[0] != key:
        _layouts[experts] = known = (key, read_experts(_plain(experts, kind, originals)).layout)
    layout, parameters = known[1], {**experts._parameters, **originals}
    names = [up_name, "down_proj"] + ([f"{up_name}_bias", "down_proj_bias"] if experts.has_bias else [])
    up, down, up_bias, down_bias = [*(parameters.get(name) for name in names), None, None][:4]
    if layout is None or up is None or down is None:
        return None
    if any(parameter is not None and parameter.requires_grad for parameter in parameters.values()):
        return None
    read = ExpertWeights.from_layout(layout, up, down, up_bias, down_bias)
    return AdaptedExperts(read, ExpertLora(found.get(up_name), found.get("down_proj")))


# Looked at once for each module: while it is parametrized, its class is a new one in each forward.
_layouts: WeakKeyDictionary[nn.Module, tuple[Any, Layout | None]] = WeakKeyDictionary()


def _low_rank(proxy: Any, is_transposed: bool) -> LowRank:
    """`scale * lhs @ rhs` is in the layout of the parameter: B @ A, or its transpose (E, in, out)."""
    lhs, rhs = proxy.lhs, proxy.rhs
    if is_transposed:
        return LowRank(lhs.transpose(1, 2), rhs.transpose(1, 2), float(proxy.scaling))
    return LowRank(rhs, lhs, float(proxy.scaling))


def _plain(experts: nn.Module, kind: type[nn.Module], originals: dict[str, nn.Parameter]) -> nn.Module:
    """A module object that shares all with `experts`, but has plain parameters and the class that it had before."""
    module: nn.Module = object.__new__(kind)
    module.__dict__.update(experts.__dict__)
    module.__dict__["_parameters"] = {**experts._parameters, **originals}
    module.__dict__["_modules"] = {n: child for n, child in experts._modules.items() if n != "parametrizations"}
    return module


if TYPE_CHECKING:
    _Wrapper = Any
else:
    _Wrapper = object


class FactoredWrapper(_Wrapper):
    """Put in front of the class of a `ParamWrapper` by `keep_factors`."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        proxy_class = _proxy_class()
        adapters = [name for name in active_adapters if name in self.lora_A]
        param = self.get_param()
        # Where PEFT itself does not keep the factors; parameters of one byte are added to in another precision.
        if len(adapters) != 1 or self.num_experts == 1 or param.dtype.itemsize == 1 or proxy_class is None:
            with super()._activate_lora(active_adapters):
                yield
            return
        proxy = proxy_class(*self.get_delta_factors(adapters[0]))
        experts, is_trained = self.get_base_layer(), param.requires_grad
        # unsafe: do not compute it, only to see that its shape is right.
        parametrize.register_parametrization(experts, self.parameter_name, proxy, unsafe=True)
        experts.parametrizations[self.parameter_name].original.requires_grad_(is_trained)
        try:
            with parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made when it is needed, so a pickle says how.
        (_, _, *rest) = super().__reduce_ex__(protocol)
        return (_new_factored, (type(self).__bases__[1],), *rest)


def _factored(kind: type) -> type:
    made = _made.get(kind)
    if made is None:
        made = _made[kind] = type(f"Factored{kind.__name__}", (FactoredWrapper, kind), {})
    return made


_made: dict[type, type] = {}


def _new_factored(kind: type) -> Any:
    return object.__new__(_factored(kind))


def keep_factors(model: nn.Module) -> int:
    """Keep PEFT from computing `W + scale * B @ A` of all experts just to check its shape, in each forward.

    Gives every `ParamWrapper` of a model with adapters a class of ours in front of its own. Results are the same, with
    any experts implementation; with `"moe_ext"` no tensor of the size of the experts is made any more. Call it after
    `get_peft_model` or `PeftModel.from_pretrained`. Calling it twice does no harm.

    Args:
        model: changed in place.

    Returns:
        How many wrappers now keep their factors.

    Raises:
        ValueError: PEFT is so old that its wrappers have no factors (before 0.21).
    """
    layer = sys.modules.get("peft.tuners.lora.layer")
    wrapper: Any = getattr(layer, "ParamWrapper", None)
    found = [] if wrapper is None else [module for module in model.modules() if isinstance(module, wrapper)]
    if found and _proxy_class() is None:
        raise ValueError("this version of PEFT computes the whole update of the experts before it hands it on.")
    for module in found:
        if not isinstance(module, FactoredWrapper):
            module.__class__ = _factored(type(module))
    return len(found)
