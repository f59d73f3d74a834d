"""Adapters folded into the weights: into the model they stand on, or into one expert each of a Mixture-of-Experts."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.configuration_moe_ext import MoeExtension
from ..modeling.moe_expert_lora import ExpertLora
from ..modeling.moe_families import iter_layers
from ..modeling.moe_lora import STACK, UNROUTED, LoraBlock, LoraLinear, LoraStack, SharedBaseFfn
from ..modeling.moe_router import MoERouter
from ..modeling.router_top_k import TopKRouterConfig
from ..patching import require_family
from ..trainers.freezing import moe_parts
from ..upcycling import upcycle
from .mixtures import reextend, require_adapters, stacks_of, without_adapters


def merge_and_unload(model: PreTrainedModel, into: Literal["base", "moe"] = "base") -> PreTrainedModel:
    """Fold adapters into the weights and take them off.

    Adapters without a router, one active expert (`set_adapter(model, name)`), and adapters on routed experts fold into
    the weights they stand on. Experts that a router mixes token by token do not: there is no one matrix for all
    tokens. Experts of MixLoRA (`share_base_ffn`) can become a Mixture-of-Experts, each a feed-forward block with its
    adapters in it: `into="moe"`, a stock one where an architecture fits (llama -> mixtral). Both are exact but for
    rounding.

    Args:
        model (`PreTrainedModel`):
            A model with adapters. Its weights are changed; do not use it further.
        into (`"base"` or `"moe"`, *optional*, defaults to `"base"`):
            What becomes of it.

    Returns:
        The model without adapters: the same object, or with `into="moe"` a new one.

    Raises:
        ValueError: where the adapters do not fold; the message says why, and the model is unchanged.
    """
    if into not in ("base", "moe"):
        raise ValueError(f'`into` must be "base" or "moe", got {into!r}.')
    link = require_adapters(model)
    stacks = stacks_of(model)
    for path in stacks:
        weight = model.get_submodule(path).weight
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ValueError(
                f"`{path}` is stored in few bits, where an update would be rounded away. Load the base model "
                "in float32 or bfloat16, with `load_adapters`, and merge there."
            )
    if into == "moe":
        return _into_moe(model, stacks)
    chosen = {path: _only_expert(path, stack, link.active_adapters) for path, stack in stacks.items()}
    extension = MoeExtension.from_dict(model.config.moe_ext)
    with torch.no_grad():
        for path, expert in chosen.items():
            if expert is not None:
                _add(model.get_submodule(path), stacks[path].delta(expert))
        for module in model.modules():
            lora = module._modules.get(STACK)
            if isinstance(lora, ExpertLora):
                _fold_experts(module, lora)
    _reextend_without(model, extension)
    return model


def _only_expert(path: str, stack: LoraStack, active: tuple[str, ...] | None) -> int | None:
    """The one expert of a stack that counts, `None` where none does."""
    if stack.names == (UNROUTED,):
        return 0
    used = [i for i, name in enumerate(stack.names) if active is None or name in active]
    if len(used) > 1:
        raise ValueError(
            f"the {len(used)} experts of `{path}` are mixed by a router, token by token: no single matrix does that. "
            'Choose one with `set_adapter(model, name)`, or, for experts of `share_base_ffn`, pass `into="moe"`.'
        )
    return used[0] if used else None


def _add(linear: Any, delta: torch.Tensor) -> None:
    delta = delta if isinstance(linear, nn.Linear) else delta.T
    linear.weight.copy_((linear.weight.float() + delta).to(linear.weight.dtype))


def _fold_experts(experts: Any, lora: ExpertLora) -> None:
    for name in ("up", "down"):
        if f"{name}_A" not in lora._parameters:
            continue
        parameter = (
            experts.down_proj if name == "down" else experts.gate_up_proj if experts.has_gate else experts.up_proj
        )
        delta = lora.delta(name)
        delta = delta.transpose(1, 2) if experts.is_transposed else delta
        parameter.copy_((parameter.float() + delta).to(parameter.dtype))


def _reextend_without(model: PreTrainedModel, extension: MoeExtension) -> None:
    vars(model)["moe_link"].active_adapters = None
    reextend(model, without_adapters(extension))


def _into_moe(model: PreTrainedModel, stacks: dict[str, LoraStack]) -> PreTrainedModel:
    family = require_family(model)
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, SharedBaseFfn)}
    routed = [
        m for m in model.modules() if isinstance(m, LoraBlock) or (isinstance(m, LoraLinear) and m.moe_gated == "own")
    ]
    if not blocks or routed:
        raise ValueError(
            '`into="moe"` makes experts of whole feed-forward blocks: it needs `share_base_ffn=True`, and no experts '
            "elsewhere. The experts of this model are on single projections, whose outputs are mixed."
        )
    if any(block.moe_routing != "token" for block in blocks.values()):
        raise ValueError('`into="moe"` needs routing by token, as a Mixture-of-Experts has it.')
    sites = {path: block.moe_lora_gate.moe_site for path, block in blocks.items()}
    counts = {(site.num_experts, site.top_k) for site in sites.values()}
    if len(counts) > 1:
        raise ValueError(f"the layers have different numbers of experts, {sorted(n for n, _ in counts)}.")
    ((count, top_k),) = counts
    config = next(iter(blocks.values())).moe_lora_gate.moe_config
    plain = isinstance(config, TopKRouterConfig) and config.is_stock
    top_k = MoERouter.num_slots(config, next(iter(sites.values()))) if not plain else top_k
    gates = {s.key.removeprefix("lora."): blocks[p].moe_lora_gate.weight.detach().clone() for p, s in sites.items()}
    layers = list(gates)
    deltas: dict[str, dict[str, torch.Tensor]] = {}
    for path, block in blocks.items():
        key = sites[path].key.removeprefix("lora.")
        deltas[key] = {}
        for role, name in block.moe_roles.items():
            stack = stacks.get(f"{path}.{name}")
            if stack is not None:
                deltas[key][role] = torch.stack([stack.delta(expert) for expert in range(count)])
    with torch.no_grad():
        for path, stack in stacks.items():
            if stack.names == (UNROUTED,):
                _add(model.get_submodule(path), stack.delta(0))
    extension = MoeExtension.from_dict(model.config.moe_ext)
    _reextend_without(model, extension)
    router = None if plain and config.loss_coefs == TopKRouterConfig().loss_coefs else config
    every = len(layers) == sum(1 for _ in iter_layers(model, family))
    moe = upcycle(
        model,
        num_experts=count,
        num_experts_per_tok=top_k,
        router=None if plain else router,
        layers="all" if every else layers,
        gate_init=gates,
        check=False,
    )
    with torch.no_grad():
        for part in moe_parts(moe):
            _add_to_experts(part.experts, deltas[part.key])
    return moe


def _add_to_experts(experts: Any, deltas: dict[str, torch.Tensor]) -> None:
    """Stacked updates (E, out, in) by role, added to stacked experts in the layout of `upcycle`."""
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    if "fused" in deltas:
        up.copy_((up.float() + deltas["fused"]).to(up.dtype))
    half = up.shape[1] // 2
    for role, rows in (("gate", slice(0, half)), ("up", slice(half, None) if experts.has_gate else slice(None))):
        if role in deltas:
            up[:, rows] = (up[:, rows].float() + deltas[role]).to(up.dtype)
    if "down" in deltas:
        experts.down_proj.copy_((experts.down_proj.float() + deltas["down"]).to(experts.down_proj.dtype))
