"""What the package knows about each stock architecture, as data.

A family is one frozen record. Nothing else in the package asks for a `model_type`: structure, weight operations and
export read these records. To add an architecture, append one record below; `CONTRIBUTING.md` walks through it.

Paths are attribute paths; a number is an index into a `ModuleList` and may be negative (`layer.-1.mlp`). Paths of
`MoeSpec` start at the block, paths of `DenseSpec` at the decoder layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


@dataclass(frozen=True)
class MoeSpec:
    """Where the parts of a stock Mixture-of-Experts block stand, and the rule its gate applies.

    Attributes:
        block: path of the block on the decoder layer; `""` when router and experts stand on the layer itself. Layers
            whose block has no `experts` child are dense and are left alone.
        router: path of the gate module on the block.
        experts: path of the experts module on the block.
        shared: paths of shared experts on the block, which the routed sum does not include.
        returns: order in which the gate returns `L` (raw logits), `P` (softmax probabilities), `W` (weights of the
            chosen experts), `I` (their ids) and `X` (anything else, passed through). Empty for a gate that returns
            something an `adapter` has to read.
        returns_before: `((version, order), ...)`, oldest first: the order of transformers older than `version`.
        logits: `"linear"` when the raw logits are `F.linear(hidden, gate.weight)`, `"linear_fp32"` when both are cast to
            float32 first, `"stock"` when only the stock gate itself can say (its forward is called then).
        score: `"softmax"` or `"sigmoid"`, the map from logits to scores, or `"custom"` for a rule that only the stock
            gate knows.
        order: `"score_topk"` (scores first, then top-k) or `"topk_score"` (softmax over the chosen logits).
        renormalize: whether the weights of the chosen experts are divided by their sum: a constant or a config key.
        scale: factor on the weights: a constant or a config key.
        bias: where the selection-only correction bias is: an attribute path on the gate, or `"arg"` when the block
            hands it to the gate as second positional argument.
        groups: config keys of the number of expert groups and of the groups a token may use, and how a group is scored
            (`"top2_sum"` or `"max"`).
        num_experts: config key of the number of routed experts.
        top_k: config key of the experts per token.
        intermediate_size: config key of the width of one expert.
        adapter: name of the adapter in `moe_adapters.py` for blocks that do not call
            `experts(hidden, top_k_index, top_k_weights)`.
    """

    block: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    shared: tuple[str, ...] = ()
    returns: str = "LWI"
    returns_before: tuple[tuple[str, str], ...] = ()
    logits: str = "stock"
    score: str = "softmax"
    order: str = "score_topk"
    renormalize: bool | str = True
    scale: float | str = 1.0
    bias: str | None = None
    groups: tuple[str, str, str] | None = None
    num_experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    intermediate_size: str = "moe_intermediate_size"
    adapter: str | None = None


@dataclass(frozen=True)
class DenseSpec:
    """Where the parts of a dense feed-forward block stand on its layer.

    Attributes:
        site: the module that a MoE block replaces.
        up: the projection from hidden to intermediate size (the linear one of a gated block).
        down: the projection back.
        gate: the projection that goes through the activation, for gated blocks.
        fused: one projection holding `[gate; up]` rows, instead of `gate` and `up`.
        activation: the activation module.
        dropout: a dropout module or probability inside the block, if it has one.
        dropout_at: `"hidden"` (between activation and `down`) or `"output"` (after `down`).
        bypass: modules outside `site` whose work the MoE block takes over; they become identities.
        transposed: weights are stored `(in, out)` (`Conv1D`) instead of `(out, in)`.
    """

    site: str = "mlp"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gate: str | None = "mlp.gate_proj"
    fused: str | None = None
    activation: str = "mlp.act_fn"
    dropout: str | None = None
    dropout_at: str = "output"
    bypass: tuple[str, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """One stock architecture.

    Attributes:
        name: `model_type` of the config.
        base: class names of the modules that own the layers (two instances in an encoder-decoder model).
        layers: path from a base module to its layers.
        moe: the MoE block, for MoE families.
        dense: the feed-forward block, for families that can be upcycled.
        stock_moe: dense families only: the stock MoE family that a plain upcycled model can be saved as.
        since: first transformers version whose implementation the record fits, when that is not the oldest supported.
        aliases: `model_type` of nested configs (the text config of a vision-language model).
        note: a limitation a user should read in `hf-moe list families`.
    """

    name: str
    base: tuple[str, ...]
    layers: str = "layers"
    moe: MoeSpec | None = None
    dense: DenseSpec | None = None
    stock_moe: str | None = None
    since: str | None = None
    aliases: tuple[str, ...] = ()
    note: str = ""

    @property
    def available(self) -> bool:
        """Whether the installed transformers has this architecture in a version the record fits."""
        if self.name not in CONFIG_MAPPING_NAMES:
            return False
        return self.since is None or Version(transformers.__version__) >= Version(self.since)

    def modeling_module(self) -> Any:
        """The stock `modeling_<name>` module (imports it)."""
        return import_module(f"transformers.models.{self.name}.modeling_{self.name}")


def get_by_path(module: nn.Module, path: str) -> Any:
    """`module.a.-1.b` for the path `"a.-1.b"`; the module itself for `""`."""
    for part in path.split(".") if path else ():
        module = module[int(part)] if part.lstrip("-").isdigit() else getattr(module, part)
    return module


def set_by_path(module: nn.Module, path: str, value: Any) -> None:
    """Put `value` at `path` below `module`."""
    parent_path, _, name = path.rpartition(".")
    parent = get_by_path(module, parent_path)
    if name.lstrip("-").isdigit():
        parent[int(name)] = value
    else:
        setattr(parent, name, value)


def has_path(module: nn.Module, path: str) -> bool:
    """Whether every part of `path` exists below `module` and is not `None`."""
    try:
        return get_by_path(module, path) is not None
    except (AttributeError, IndexError, KeyError, TypeError):
        return False


def iter_bases(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model` that own its layers, with the prefix of their layers' keys.

    The prefix is `""` for one base and the base's own name and a dot (`"encoder."`) where there are several.
    """
    found = [(name, m) for name, m in model.named_modules() if type(m).__name__.removeprefix("MoeExt") in family.base]
    found = [(name, m) for name, m in found if has_path(m, family.layers)]
    for name, module in found:
        yield (f"{name.rpartition('.')[2]}." if len(found) > 1 else ""), module


def iter_layers(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """`(key, layer, base)` of every layer, in the order of computation. Keys are `"0"`, `"1"`, ... or `"encoder.0"`."""
    for prefix, base in iter_bases(model, family):
        for index, layer in enumerate(get_by_path(base, family.layers)):
            yield f"{prefix}{index}", layer, base


_GATED = DenseSpec()

FAMILIES: tuple[Family, ...] = (
    # --- Mixture of Experts ---
    Family(
        "mixtral",
        base=("MixtralModel",),
        moe=MoeSpec(logits="linear", num_experts="num_local_experts", intermediate_size="intermediate_size"),
    ),
    Family("qwen3_moe", base=("Qwen3MoeModel",), moe=MoeSpec(logits="linear", renormalize="norm_topk_prob")),
    Family(
        "deepseek_v3",
        base=("DeepseekV3Model",),
        moe=MoeSpec(
            shared=("shared_experts",),
            logits="linear_fp32",
            score="sigmoid",
            renormalize="norm_topk_prob",
            scale="routed_scaling_factor",
            bias="e_score_correction_bias",
            groups=("n_group", "topk_group", "top2_sum"),
            num_experts="num_local_experts",
        ),
    ),
    # --- dense ---
    Family("llama", base=("LlamaModel",), dense=_GATED, stock_moe="mixtral"),
    Family(
        "gpt2",
        base=("GPT2Model",),
        layers="h",
        dense=DenseSpec(
            up="mlp.c_fc",
            down="mlp.c_proj",
            gate=None,
            activation="mlp.act",
            dropout="mlp.dropout",
            transposed=True,
        ),
    ),
)

_BY_NAME = {key: family for family in FAMILIES for key in (family.name, *family.aliases)}


def get_family(model_type: str) -> Family | None:
    """The record for a `model_type` (ours, `moe_ext_<name>`, too), or `None` where there is none or it is unavailable."""
    family = _BY_NAME.get(model_type.removeprefix("moe_ext_"))
    return family if family is not None and family.available else None


def list_families() -> list[Family]:
    """All records that the installed transformers can use, in alphabetical order."""
    return sorted((family for family in FAMILIES if family.available), key=lambda family: family.name)
