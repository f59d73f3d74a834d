"""Stock Mixture-of-Experts architectures that an upcycled dense model can be saved as.

Everything that differs between them is in the table. Names of counts and modules come from the family records.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..modeling.moe_families import Family, get_family


@dataclass(frozen=True)
class StockTarget:
    """How a stock MoE architecture says what an upcycled model is.

    Attributes:
        constants: config values that make the gate's rule exact for copies.
        requires: values the dense config must have, because the target cannot say others.
        dense_layers: config key listing the layers that stay dense, where the target knows such layers.
        carry: config keys that the target reads although its config class does not declare them.
        one_attention: whether all layers have the same kind of attention, said by `use_sliding_window`.
        correction_bias: path on the router of a (1, E) float32 selection bias, which is zero for copies.
        shared_expert: config key of the width of a shared expert that every layer has. It is given this width and a
            down projection of zeros: exact, and free to be trained.
    """

    constants: dict[str, Any] = field(default_factory=dict)
    requires: dict[str, Any] = field(default_factory=dict)
    dense_layers: str | None = None
    carry: tuple[str, ...] = ()
    one_attention: bool = False
    correction_bias: str | None = None
    shared_expert: str | None = None


SHARED_EXPERT_WIDTH = 256

STOCK_TARGETS: dict[str, StockTarget] = {
    "mixtral": StockTarget(requires={"attention_bias": False}),
    "qwen2_moe": StockTarget(
        constants={"norm_topk_prob": True, "qkv_bias": True, "decoder_sparse_step": 1},
        dense_layers="mlp_only_layers",
        shared_expert="shared_expert_intermediate_size",
    ),
    "qwen3_moe": StockTarget(
        constants={"norm_topk_prob": True, "decoder_sparse_step": 1},
        dense_layers="mlp_only_layers",
        one_attention=True,
    ),
    "olmoe": StockTarget(constants={"norm_topk_prob": True}),
    "flex_olmo": StockTarget(constants={"norm_topk_prob": True}),
    "granitemoe": StockTarget(),
    "cohere2_moe": StockTarget(
        constants={"expert_selection_fn": "softmax", "num_shared_experts": 0}, carry=("rope_parameters",)
    ),
    "ernie4_5_moe": StockTarget(
        constants={
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
        },
        carry=("head_dim",),
        correction_bias="moe_statics.e_score_correction_bias",
    ),
}


def stock_family(dense: Family) -> Family:
    """The stock MoE family that a dense family can be saved as.

    Raises:
        ValueError: where there is none.
    """
    family = get_family(dense.stock_moe) if dense.stock_moe else None
    if family is None or family.moe is None or family.name not in STOCK_TARGETS:
        raise ValueError(f"no stock Mixture-of-Experts architecture of transformers matches {dense.name}")
    return family


def stock_model_class(model_class: type[PreTrainedModel], dense: Family, target: Family) -> type[PreTrainedModel]:
    """`LlamaForCausalLM` -> `MixtralForCausalLM`.

    Raises:
        ValueError: where the stock MoE family has no such head.
    """
    old, new = (family.base[0].removesuffix("Model") for family in (dense, target))
    name = model_class.__name__.replace(old, new, 1)
    found = getattr(target.modeling_module(), name, None)
    if found is None:
        raise ValueError(f"{target.name} has no class {name}, which {model_class.__name__} would become")
    return found


def stock_config(
    config: PreTrainedConfig,
    target: Family,
    *,
    num_experts: int,
    top_k: int,
    width: int,
    dense_layers: list[int],
) -> PreTrainedConfig:
    """The stock MoE config of an upcycled model.

    Raises:
        ValueError: where the target cannot say what the dense config says; the message gives the reason only.
    """
    spec, rules = target.moe, STOCK_TARGETS[target.name]
    assert spec is not None
    for name, expected in rules.requires.items():
        if (value := getattr(config, name, expected)) != expected:
            raise ValueError(f"{target.name} has no counterpart to `{name}={value}`")
    if dense_layers and rules.dense_layers is None:
        raise ValueError(f"{target.name} cannot keep some layers dense (here {dense_layers})")
    config_class: Any = CONFIG_MAPPING[target.name]
    known = {item.name for item in fields(config_class)} | {"id2label", "label2id", *rules.carry}
    values = {key: value for key, value in config.to_dict().items() if key in known}
    for name in ("model_type", "architectures"):
        values.pop(name, None)
    if "head_dim" in known and values.get("head_dim") is None:
        values["head_dim"] = config.hidden_size // config.num_attention_heads
    if rules.one_attention:
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if len(kinds) > 1:
            raise ValueError(f"{target.name} has one kind of attention in all layers, these have {sorted(kinds)}")
        values["use_sliding_window"] = kinds == {"sliding_attention"}
    values |= {spec.num_experts: num_experts, spec.top_k: top_k, spec.intermediate_size: width, **rules.constants}
    if rules.dense_layers is not None:
        values[rules.dense_layers] = dense_layers
    if rules.shared_expert is not None:
        values[rules.shared_expert] = min(SHARED_EXPERT_WIDTH, width)
    return config_class(**values)
