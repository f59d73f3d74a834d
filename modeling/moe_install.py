"""How our classes get in front of stock ones, as FSDP2 does it: `module.__class__` becomes `(Ours, Stock)`.

A module keeps its parameters, hooks, checkpoint keys and `isinstance` relations. Several of our classes may stand in
front of one module; `uninstall` takes all of them away, with what they added.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


@cache
def _installed_class(ours: Any, stock: Any, name: str) -> Any:
    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        # No module has a class of this name as an attribute, where pickle would look for it.
        return _new_installed, (ours, stock, name), *object.__reduce_ex__(self, protocol)[2:]

    namespace = {"moe_stock_class": stock, "__module__": stock.__module__, "__reduce_ex__": reduce}
    return type(name, (ours, stock), namespace)


def _new_installed(ours: Any, stock: Any, name: str) -> Any:
    cls = _installed_class(ours, stock, name)
    return cls.__new__(cls)


class Reference:
    """Leads to a module without making it a child of the one that holds this.

    In a copy of the whole model it leads to the copied module. A module that is copied alone (PEFT's
    `modules_to_save`) goes on referring to the one it came from.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        return Reference(memo.get(id(self.module), self.module))


def install(module: nn.Module, ours: Any, name: str | None = None, **attributes: Any) -> None:
    """Put the class `ours` in front of the module's class, and set `attributes`. Their names begin with `moe_`."""
    stock: Any = type(module)
    module.__class__ = _installed_class(ours, stock, name or stock.__name__)
    for key, value in attributes.items():
        setattr(module, key, value)
    module.moe_attributes = (*vars(module).get("moe_attributes", ()), *attributes)


def put_in_place(module: nn.Module, ours: Any) -> None:
    """Put the class `ours` in place of the one of our classes that was installed last, on a copy of a module."""
    stock = vars(type(module))["moe_stock_class"]
    module.__class__ = _installed_class(ours, stock, stock.__name__)


def is_installed(module: nn.Module) -> bool:
    """Whether one of our classes stands in front of this module's stock class."""
    return "moe_stock_class" in vars(type(module))


def own_names(module: nn.Module) -> list[str]:
    """Names of the parameters, buffers and children that hang directly on a module."""
    return [*module._parameters, *module._buffers, *module._modules]


def remember_added(module: nn.Module, before: list[str]) -> None:
    """Note what hangs on `module` now and did not when `before = own_names(module)` was taken, for `uninstall`."""
    known = vars(module).get("moe_added", ())
    module.moe_added = (*known, *(name for name in own_names(module) if name not in before and name not in known))


def add_child(module: nn.Module, name: str, child: nn.Module) -> None:
    """Hang `child` on `module`, in its training mode, until `uninstall`."""
    before = own_names(module)
    module.add_module(name, child.train(module.training))
    remember_added(module, before)


def freeze(module: nn.Module, names: list[str]) -> None:
    """Exclude parameters of a module from training until `uninstall`."""
    parameters = dict(module.named_parameters())
    trained = [name for name in names if parameters[name].requires_grad]
    known = vars(module).get("moe_frozen", ())
    module.moe_frozen = (*known, *(name for name in trained if name not in known))
    for name in names:
        parameters[name].requires_grad_(False)


def uninstall(module: nn.Module) -> None:
    """Give a module its stock class back, and drop what was added."""
    added, frozen = vars(module).get("moe_added", ()), vars(module).get("moe_frozen", ())
    for name in added:
        for store in (module._parameters, module._buffers, module._modules):
            store.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
    parameters = dict(module.named_parameters())
    for name in frozen:
        if name in parameters:  # or it was added itself, and is gone
            parameters[name].requires_grad_(True)
    for name in (*vars(module).get("moe_attributes", ()), "moe_attributes", "moe_added", "moe_frozen"):
        vars(module).pop(name, None)
    while is_installed(module):
        module.__class__ = vars(type(module))["moe_stock_class"]
