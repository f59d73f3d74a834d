"""Which parts of a Mixture-of-Experts model are trained: routers, single experts, everything else.

The functions change `requires_grad` and register hooks on a live model; they need no trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..modeling.attention_heads import RoutedHeads
from ..modeling.moe_experts import MoeExtBlock
from ..modeling.moe_families import Family, get_by_path, get_family, has_path, iter_layers
from ..modeling.moe_install import is_installed
from ..modeling.moe_lora import STACK, adapter_names
from ..modeling.moe_routed_model import RoutedModel
from ..modeling.moe_router import MoERouter
from ..modeling.moe_shared_experts import SharedExperts
from ..modeling.moe_structure import find_moe_spec, shared_of_routers
from .optimizer_rules import check_blocks, clear_state, decay_rule


@dataclass(frozen=True)
class MoeParts:
    """The parts of one MoE layer."""

    key: str
    router: nn.Module
    experts: nn.Module
    shared: tuple[nn.Module, ...]
    declared: int = 0

    @property
    def num_experts(self) -> int:
        """Number of routed experts, also where this process holds some of them only."""
        declared = self.declared or getattr(vars(self.router).get("moe_site"), "num_experts", 0)
        return declared or int(getattr(self.experts, "num_experts", 0)) or len(list(self.experts.children()))


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside the wrappers of data parallelism, compilation and PEFT."""
    while True:
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def _family(model: nn.Module) -> Family | None:
    """The record of a transformers model; `None` for an unknown architecture."""
    return get_family(getattr(getattr(model, "config", None), "model_type", None) or "")


def moe_parts(model: nn.Module) -> list[MoeParts]:
    """The MoE layers of a stock or extended model, or of one of our architectures; empty for a dense model or an
    unknown architecture."""
    model = base_model(model)
    family = _family(model)
    if family is None:
        own = model.own_experts() if isinstance(model, RoutedModel) else []
        return [MoeParts(part.key, part.router, part.experts, (), part.num_experts) for part in own]
    found = []
    for key, layer, _ in iter_layers(model, family):
        block = next((m for m in layer.modules() if isinstance(m, MoeExtBlock)), None)
        spec = find_moe_spec(layer, family)
        added = tuple(m for m in layer.modules() if isinstance(m, SharedExperts))
        if block is not None:
            found.append(MoeParts(key, block.gate, block.experts, added))
        elif spec is not None:
            stock = get_by_path(layer, spec.block)
            shared = tuple(get_by_path(stock, path) for path in spec.shared if has_path(stock, path))
            router, experts = get_by_path(stock, spec.router), get_by_path(stock, spec.experts)
            found.append(MoeParts(key, router, experts, (*shared, *added)))
    return found


def attention_parts(model: nn.Module) -> list[MoeParts]:
    """The attention of layers where it has experts: its router, and what holds the experts."""
    model = base_model(model)
    family = _family(model)
    spec = None if family is None else family.attention
    if family is None or spec is None:
        return []
    found = []
    for key, layer, _ in iter_layers(model, family):
        if spec.experts is not None and has_path(layer, spec.experts.block):
            block = get_by_path(layer, spec.experts.block)
            experts = (spec.experts.experts, *spec.experts.stacks)
            first, *others = (get_by_path(block, path) for path in experts)
            found.append(MoeParts(key, get_by_path(block, spec.experts.router), first, tuple(others)))
        elif isinstance(attention := get_by_path(layer, spec.site), RoutedHeads):
            found.append(MoeParts(key, attention.moe_gate, attention, ()))
    return found


def shared_parts(model: nn.Module) -> list[nn.Module]:
    """What the routers of all layers share: the cell of `rmoe`, the pre-router of `read_me`."""
    model = base_model(model)
    family = _family(model)
    return [] if family is None else list(shared_of_routers(model, family))


def adapter_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of LoRA experts by the key of their site."""
    found = (module for module in model.modules() if isinstance(module, MoERouter) and is_installed(module))
    return {router.moe_site.key: router for router in found if router.moe_site.lora}


def train_only_adapter_routers(model: nn.Module) -> None:
    """Train the routers of LoRA experts and nothing else, so that adapters of a bank keep what they can do where there
    is little data of a task.

    Args:
        model (`nn.Module`):
            A model with routed LoRA experts.

    Raises:
        ValueError: for a model without routers of LoRA experts.
    """
    routers = adapter_routers(model)
    if not routers:
        raise ValueError(f"{type(base_model(model)).__name__} has no LoRA experts with a router.")
    model.requires_grad_(False)
    for router in routers.values():
        router.requires_grad_(True)


def _require_parts(model: nn.Module, what: str) -> list[MoeParts]:
    parts = moe_parts(model)
    if not parts and not adapter_names(model):
        name = type(base_model(model)).__name__
        raise ValueError(f"{what} needs a Mixture-of-Experts model; {name} has no routers or experts.")
    return parts


def freeze_router(model: nn.Module) -> None:
    """Keep the routers of a model as they are, those in attention and what they share too: their parameters get no
    gradient.

    The running statistics of Monet's routers are none of their weights; they follow the data of the training.

    Args:
        model (`nn.Module`):
            A stock or extended MoE model, also inside PEFT.

    Raises:
        ValueError: for a model without routers.
    """
    for parts in _require_parts(model, "`freeze_router`") + attention_parts(model):
        parts.router.requires_grad_(False)
    for router in (*shared_parts(model), *adapter_routers(model).values()):
        router.requires_grad_(False)


def train_only_moe(model: nn.Module) -> None:
    """Freeze everything outside routers, experts, shared experts, attention experts and adapters. What is frozen there
    already stays so.

    Args:
        model (`nn.Module`):
            A stock or extended MoE model.

    Raises:
        ValueError: for a model without routers.
    """
    kept = set()
    for parts in _require_parts(model, "`train_only_moe`") + attention_parts(model):
        for module in (parts.router, parts.experts, *parts.shared):
            kept |= {id(parameter) for parameter in module.parameters()}
    kept |= {id(parameter) for shared in shared_parts(model) for parameter in shared.parameters()}
    adapters = adapter_names(model)
    kept |= {id(parameter) for name, parameter in model.named_parameters() if name in adapters}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


class ExpertMask:
    """Keeps all but some experts bit-equal. Made by `train_experts`; `remove` takes it back.

    Gradients of frozen experts are set to zero, so momentum stays zero for them; weight decay is taken out of the
    optimizer for the stacked tensors and applied to the trained experts alone, which `attach` arranges.
    """

    def __init__(self) -> None:
        self.trained: dict[str, tuple[int, ...]] = {}
        self._masks: dict[nn.Parameter, list[int]] = {}
        self._frozen: list[nn.Parameter] = []
        self._handles: list[Any] = []

    def attach(self, optimizer: Any) -> None:
        """Make the weight decay and the state of `optimizer` respect the mask. Call it before the first step.

        Args:
            optimizer (`torch.optim.Optimizer`):
                One with elementwise updates, also in 8 bits. With weight decay: an AdamW, Adam or SGD, or one of
                bitsandbytes.

        Raises:
            ValueError: where weight decay is on and it is unknown how this optimizer applies it, or where its state in
                8 bits has blocks in which frozen and trained experts meet.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)
        check_blocks(optimizer, self._masks)
        groups = list(optimizer.param_groups)
        if any(group.get("weight_decay") and self._masked(group) for group in groups):
            decay = decay_rule(optimizer)
            for group in groups:
                self._split(optimizer, group)
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: self._decay(optimizer, decay)))
        for parameter, kept in self._masks.items():
            clear_state(optimizer.state.get(parameter, {}), parameter, _others(parameter, kept))

    def _masked(self, group: dict[str, Any]) -> list[nn.Parameter]:
        return [parameter for parameter in group["params"] if parameter in self._masks]

    def _split(self, optimizer: Any, group: dict[str, Any]) -> None:
        """Move masked tensors into a group without weight decay that remembers it under `moe_weight_decay`."""
        masked = self._masked(group)
        if not masked or not group.get("weight_decay"):
            return
        moved = {id(parameter) for parameter in masked}
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
        options = {name: value for name, value in group.items() if name != "params"}
        options |= {"weight_decay": 0.0, "moe_weight_decay": group["weight_decay"]}
        optimizer.add_param_group({"params": masked, **options})

    @torch.no_grad()
    def _decay(self, optimizer: Any, apply: Callable[[nn.Parameter, int, Any, float], None]) -> None:
        for group in optimizer.param_groups:
            weight_decay = group.get("moe_weight_decay")
            for parameter in group["params"] if weight_decay else ():
                if parameter.grad is not None:
                    for expert in self._masks.get(parameter, ()):
                        apply(parameter, expert, group["lr"], weight_decay)

    def bind(self, handle: Any) -> None:
        """Let `remove` call `handle.remove()`, too."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Let all experts train again. An optimizer it was attached to should not be used further."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.__init__()  # type: ignore[misc]

    def num_masked(self) -> int:
        """Elements of tensors with `requires_grad` that the mask keeps as they are."""
        sizes = (len(_others(p, kept)) * p[0].numel() for p, kept in self._masks.items() if p.requires_grad)
        return sum(sizes)


def train_experts(model: nn.Module, ids: Iterable[int]) -> ExpertMask:
    """Train only some experts of every MoE layer; the others stay bit-equal. Nothing else is frozen.

    Args:
        model (`nn.Module`):
            A stock or extended MoE model.
        ids (`Iterable[int]`):
            Expert numbers. A number that only some layers have is trained there.

    Returns:
        `ExpertMask`: call its `attach(optimizer)` before the first step, and `remove()` to undo.

    Raises:
        ValueError: for a model without experts, a number no layer has, or experts whose layout is unknown.

    Example:
        ```python
        >>> mask = train_experts(model, [0, 3])
        >>> mask.attach(optimizer)
        ```
    """
    parts = _require_parts(model, "`train_experts`")
    wanted = sorted(set(ids))
    most = max(part.num_experts for part in parts)
    unknown = [expert for expert in wanted if not 0 <= expert < most]
    if unknown:
        raise ValueError(f"`train_experts` names {unknown}, but the experts of this model are 0 to {most - 1}.")
    for part in parts:
        if hasattr(part.experts, "base_layer") or STACK in part.experts._modules:
            raise ValueError(
                f'the experts of layer "{part.key}" carry adapters. `train_experts` works on the weights of the '
                "experts themselves; leave it out, or train without adapters on the experts."
            )
    plans = [(part, list(_expert_tensors(part))) for part in parts]
    mask = ExpertMask()
    for part, tensors in plans:
        kept = [expert for expert in wanted if expert < part.num_experts]
        mask.trained[part.key] = tuple(kept)
        stacked = [tensor for expert, tensor in tensors if expert is None and tensor.shape[0] == part.num_experts]
        for expert, tensor in tensors:
            if not tensor.requires_grad or (expert is not None and expert in kept):
                continue
            if any(tensor is one for one in stacked) and kept:
                _mask_gradient(mask, tensor, kept)
            else:
                mask._frozen.append(tensor)
    for tensor in mask._frozen:
        tensor.requires_grad_(False)
    return mask


def train_rows(model: nn.Module, rows: Mapping[nn.Parameter, Iterable[int]]) -> ExpertMask:
    """Train only some rows of some tensors, such as those of single experts; everything else is frozen.

    Args:
        model (`nn.Module`):
            Any model.
        rows (`dict`):
            Parameter of the model -> the indices along its first axis that are trained.

    Returns:
        `ExpertMask`: call its `attach(optimizer)` before the first step, and `remove()` to undo.

    Raises:
        ValueError: for a tensor that is not of the model, or a row that it does not have.
    """
    known = {id(parameter) for parameter in model.parameters()}
    wanted = {parameter: sorted(set(kept)) for parameter, kept in rows.items()}
    for parameter, kept in wanted.items():
        if id(parameter) not in known:
            raise ValueError(
                f"`rows` names a tensor of the shape {list(parameter.shape)} that the model does not have."
            )
        outside = [row for row in kept if not 0 <= row < parameter.shape[0]]
        if outside:
            raise ValueError(f"`rows` names {outside} of a tensor with {parameter.shape[0]} rows.")
    mask = ExpertMask()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if wanted.get(parameter):
            _mask_gradient(mask, parameter, wanted[parameter])
        else:
            mask._frozen.append(parameter)
    for parameter in mask._frozen:
        parameter.requires_grad_(False)
    return mask


def _expert_tensors(part: MoeParts) -> Iterator[tuple[int | None, nn.Parameter]]:
    """Every parameter of the experts with the number of its expert, `None` where it is stacked or shared."""
    own = list(part.experts.parameters(recurse=False))
    children = list(part.experts.children())
    if own and all(tensor.shape[:1] == (part.num_experts,) for tensor in own):
        yield from ((None, tensor) for tensor in own)
        # A norm after the experts is shared by all of them.
        yield from ((None, tensor) for child in children for tensor in child.parameters() if tensor.dim() < 2)
        return
    if own or len(children) != part.num_experts:
        raise ValueError(
            f'`train_experts` does not know how layer "{part.key}" stores its experts ({type(part.experts).__name__}).'
        )
    for number, child in enumerate(children):
        yield from ((number, tensor) for tensor in child.parameters())


def _mask_gradient(mask: ExpertMask, tensor: nn.Parameter, kept: list[int]) -> None:
    if len(kept) == tensor.shape[0]:
        return

    def zero(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(0, _others(tensor, kept), 0)

    mask._masks[tensor] = kept
    mask._handles.append(tensor.register_hook(zero))


def _others(tensor: torch.Tensor, kept: list[int]) -> torch.Tensor:
    frozen = torch.ones(tensor.shape[0], dtype=torch.bool)
    frozen[kept] = False
    return frozen.nonzero().squeeze(1).to(tensor.device)
