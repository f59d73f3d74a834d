"""A Mixture-of-Experts that was made of a dense model, as a dense model again, where that is exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling.moe_experts import MoeExtBlock
from ..modeling.moe_families import DenseSpec, has_path, iter_layers
from ..modeling.moe_structure import dense_linears, dense_sizes
from ..patching import require_family
from .methods import FeedForward
from .report import check_inputs, compare, outputs, rounding_tolerance


logger = logging.get_logger(__name__)


def to_dense(model: PreTrainedModel, *, allow_inexact: bool = False, seed: int = 0) -> PreTrainedModel:
    """The dense model that an upcycled one computes.

    Experts that are copies of each other become one of them; experts that are the shares of a dense block
    (`method="split"`, with its shared block) are put together again; a shared expert whose routed experts add nothing
    becomes the block. Whether the result computes the same depends on the router too, so it is measured on a random
    batch.

    Args:
        model (`PreTrainedModel`):
            A model that `upcycle(..., target="ext")` made. It is left as it is.
        allow_inexact (`bool`, *optional*, defaults to `False`):
            Whether a result that differs by more than rounding is returned, with a warning. Shares whose router does
            not use all of them alike differ.
        seed (`int`, *optional*, defaults to 0):
            Of the random batch.

    Returns:
        An instance of the stock dense class.

    Raises:
        ValueError: for a model without experts in place of dense blocks, experts that no dense block computes, or a
            result that differs.
    """
    family = require_family(model)
    blocks = {
        key: block
        for key, layer, _ in iter_layers(model, family)
        for block in layer.modules()
        if isinstance(block, MoeExtBlock)
    }
    if not blocks or family.dense is None:
        raise ValueError(
            f"{type(model).__name__} has no experts in place of dense blocks; `to_dense` takes models that "
            '`upcycle(..., target="ext")` made.'
        )
    extension = model.config.moe_ext or {}
    for name in ("zero_experts", "momentum", "attention"):
        if name in extension or any(name in (part or {}) for part in extension.get("layers", {}).values()):
            raise ValueError(f"this model declares `{name}`, which no dense model has.")
    stock: Any = type(model).moe_stock_class
    values = {
        k: v
        for k, v in model.config.to_dict().items()
        if k not in ("moe_ext", "model_type", "auto_map", "architectures")
    }
    values.pop("experts_implementation", None)
    config = stock.config_class(**values)
    with torch.device("meta"):
        empty = stock._from_config(config, dtype=model.dtype)
    state = {
        name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name in empty.state_dict()
    }
    names = {id(module): name for name, module in empty.named_modules()}
    for key, layer, _ in tqdm(list(iter_layers(empty, family)), desc="To dense", unit="layer"):
        if key in blocks:
            width = dense_sizes(layer, family.dense)[1]
            dense = _merge(key, blocks[key], width)
            state |= _named(dense, layer, family.dense, names)
    result: PreTrainedModel = stock.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    result.train(model.training)
    batch = check_inputs(model, seed)
    (expected, logits), (found, _) = outputs(model, batch), outputs(result, batch)
    difference = compare(expected, found, logits=logits)
    if difference.relative > rounding_tolerance(model.dtype):
        message = (
            f"the dense model differs from the experts by {difference.relative:.1e} of its output: the router does "
            "not give all experts the weights under which they are the dense block"
        )
        if not allow_inexact:
            raise ValueError(f"{message}. `allow_inexact=True` returns it all the same.")
        logger.warning(f"{message}.")
    return result


@torch.no_grad()
def _merge(key: str, block: MoeExtBlock, width: int) -> FeedForward:
    """The dense block that the experts of one layer compute with equal weights.

    Raises:
        ValueError: where there is none of that width.
    """
    experts: Any = block.experts
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    up, down = getattr(experts, name), experts.down_proj * block.output_scale
    up_bias, down_bias = (getattr(experts, f"{n}_bias", None) for n in (name, "down_proj"))
    down_bias = None if down_bias is None else down_bias * block.output_scale
    count, parts = up.shape[0], 2 if experts.has_gate else 1
    shared = _shared_block(block, name, parts)
    silent = not down.any() and (down_bias is None or not down_bias.any())
    if shared is not None and silent:
        return shared
    tensors = [tensor for tensor in (up, down, up_bias, down_bias) if tensor is not None]
    rows = up.unflatten(1, (parts, -1))
    if shared is None and up.shape[1] == parts * width and all(torch.equal(t, t[:1].expand_as(t)) for t in tensors):
        bias = None if up_bias is None else up_bias[0].view(parts, -1)
        return FeedForward(rows[0], down[0], bias, None if down_bias is None else down_bias[0])
    shared_width = 0 if shared is None else shared.intermediate_size
    if count * rows.shape[2] + shared_width == width:
        merged_bias = None if up_bias is None else up_bias.unflatten(1, (parts, -1)).transpose(0, 1).flatten(1)
        merged = FeedForward(
            rows.transpose(0, 1).flatten(1, 2),
            down.transpose(0, 1).flatten(1) / count,
            merged_bias,
            None if down_bias is None else down_bias.mean(0),
        )
        return merged if shared is None else _beside(merged, shared)
    beside = f", beside a shared expert {shared_width} wide" if shared_width else " and differ"
    raise ValueError(
        f'the {count} experts of layer "{key}" are {rows.shape[2]} wide{beside}; a dense block that is {width} '
        "wide cannot compute what they do."
    )


def _shared_block(block: MoeExtBlock, name: str, parts: int) -> FeedForward | None:
    shared = getattr(block, "moe_shared", None)
    if shared is None:
        return None
    linear: nn.Linear = getattr(shared, name)
    bias = None if linear.bias is None else linear.bias.view(parts, -1)
    return FeedForward(linear.weight.unflatten(0, (parts, -1)), shared.down_proj.weight, bias, shared.down_proj.bias)


def _beside(first: FeedForward, second: FeedForward) -> FeedForward:
    """One block with the neurons of both, whose output is their sum."""
    up_bias = down_bias = None
    if first.up_bias is not None and second.up_bias is not None:
        up_bias = torch.cat([first.up_bias, second.up_bias], dim=1)
    if first.down_bias is not None and second.down_bias is not None:
        down_bias = first.down_bias + second.down_bias
    return FeedForward(
        torch.cat([first.up, second.up], dim=1), torch.cat([first.down, second.down], dim=1), up_bias, down_bias
    )


def _named(dense: FeedForward, layer: nn.Module, spec: DenseSpec, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """The tensors of a dense block by their names in the model."""
    linears = dense_linears(layer, spec)
    parts: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {"down": (dense.down, dense.down_bias)}
    rows = list(dense.up)
    biases = [None] * len(rows) if dense.up_bias is None else list(dense.up_bias)
    if "fused" in linears:
        parts["fused"] = dense.up.flatten(0, 1), None if dense.up_bias is None else dense.up_bias.flatten()
    else:
        for role, weight, bias in zip(["gate", "up"] if len(rows) == 2 else ["up"], rows, biases, strict=True):
            parts[role] = weight, bias
    made: dict[str, torch.Tensor] = {}
    for role, (weight, bias) in parts.items():
        name = names[id(linears[role])]
        made[f"{name}.weight"] = (weight.t() if spec.transposed else weight).detach().clone().contiguous()
        if has_path(linears[role], "bias") and bias is not None:
            made[f"{name}.bias"] = bias.detach().clone()
    return made
