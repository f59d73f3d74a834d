"""Parts of a layer beside router and experts, such as momentum or shared experts.

A part is one file, one config (a field of `MoeExtension`) and one registration. It goes with every router.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from .configuration_moe_ext import _PARTS


if TYPE_CHECKING:
    from .moe_context import RoutingLink
    from .moe_structure import LayerPlan


_LAYER_PARTS: dict[str, type[LayerPart]] = {}


class PartModule(nn.Module):
    """A module that a part or a router creates; `initialize_weights` finds it by this class."""

    def init_weights(self, std: float) -> None:
        """Initialise its tensors with the functions of `transformers.initialization`, which skip loaded ones."""

    def resize_vocabulary(self, size: int) -> None:
        """Called after the token embeddings of the model have got `size` rows. Default: nothing."""

    @property
    def schedule_steps(self) -> int | None:
        """Optimizer steps until the last change of a scheduled setting; `None` where nothing is scheduled."""
        return None

    def schedule(self, step: int, total_steps: int) -> None:
        """Called by the trainer with the optimizer steps taken so far, as `MoERouter.schedule`."""


class LayerPart:
    """Base of the parts. Stateless: all work is done by what it installs.

    Attributes:
        crosses_layers: whether layers leave something for later ones in the context's carry.
    """

    crosses_layers: ClassVar[bool] = False

    @classmethod
    def check(cls, config: Any, plan: LayerPlan) -> None:
        """Raise `ValueError` where `config` cannot work at this layer. Called before anything is changed."""

    @classmethod
    def check_stack(cls, plans: list[LayerPlan]) -> None:
        """Raise `ValueError` where the layers of one stack that have this part do not go together."""

    @classmethod
    def install(
        cls, config: Any, plan: LayerPlan, block: nn.Module, gate: nn.Module, experts: nn.Module, link: RoutingLink
    ) -> None:
        """Put the part in place. Router, experts guard and block adapter stand already."""
        raise NotImplementedError


def register_part(name: str) -> Callable[[type[LayerPart]], type[LayerPart]]:
    """Class decorator: the part that the field `name` of `MoeExtension` declares."""

    def decorate(part: type[LayerPart]) -> type[LayerPart]:
        _LAYER_PARTS[name] = part
        return part

    return decorate


def get_part(name: str) -> type[LayerPart]:
    """The part of a field of `MoeExtension`."""
    return _LAYER_PARTS[name]


def list_parts() -> dict[str, type[LayerPart]]:
    """All parts by field, in the order in which they are installed: that of the fields of `MoeExtension`."""
    return {name: _LAYER_PARTS[name] for name in _PARTS if name in _LAYER_PARTS}
