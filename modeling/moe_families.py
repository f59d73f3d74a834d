"""What the package knows about each stock architecture, as data.

A family is one frozen record. Nothing else in the package asks for a `model_type`: structure, weight operations and
export read these records. To add an architecture, append one record below; `CONTRIBUTING.md` walks through it.

Paths are attribute paths; a number is an index into a `ModuleList` and may be negative (`layer.-1.mlp`), and `a|b` is
the first of the two that exists. Paths of `MoeSpec` start at the block, paths of `DenseSpec` at the decoder layer. A
config key is looked up on the `config` of the base module; `a.b` looks into a nested config.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .moe_models import OWN_MODELS


@dataclass(frozen=True)
class MoeSpec:
    """Where the parts of a stock Mixture-of-Experts block stand, and the rule its gate applies.

    Attributes:
        block: path of the block on the decoder layer; `""` when router and experts stand on the layer itself. Layers
            whose block has no `experts` child are dense and are left alone.
        router: path of the gate module on the block.
        experts: path of the experts module on the block.
        stacks: paths of further modules on the block that hold a matrix for each expert.
        shared: paths of shared experts on the block, which the routed sum does not include.
        returns: order in which the gate returns `L` (raw logits), `P` (softmax probabilities), `W` (weights of the
            chosen experts), `I` (their ids), `X` (anything else, passed through) and `_` (what an `adapter` replaces).
        returns_before: `((version, order), ...)`, oldest first: the order of transformers older than `version`.
        logits: `"linear"` when the raw logits are `F.linear(hidden, gate.weight)`, `"linear_fp32"` when both are cast
            to float32 first, `"layer"` when they are `gate.layer(hidden)` made float32 afterwards, `"rows"` when they
            are `gate.logits(hidden, gate.weight)`, `"stock"` when only the stock gate itself can say (its forward is
            called then).
        score: `"softmax"` or `"sigmoid"`, the map from logits to scores, or `"custom"` for a rule that only the stock
            gate knows.
        order: `"score_topk"` (scores first, then top-k) or `"topk_score"` (softmax over the chosen logits).
        renormalize: whether the weights of the chosen experts are divided by their sum: a constant or a config key.
            A softmax over the chosen logits sums to one anyway.
        scale: factor on the weights: a constant or a config key.
        bias: where the selection-only correction bias is: an attribute path on the gate, or `"arg"` when the block
            hands it to the gate as second positional argument. Its shape is (E,) or (1, E).
        block_bias: where the bias of `"arg"` is stored: an attribute path on the block. May be absent (lfm2_moe).
        expert_scale: attribute path on the gate of one factor per expert (E,), which multiplies the final weights.
        groups: config keys of the number of expert groups and of the groups a token may use, and how a group is scored
            (`"top2_sum"` or `"max"`). A number of groups that is `None` means no limit.
        num_experts: config key of the number of experts the router chooses from; `"a.b"` looks into a nested config,
            `"a+b"` adds two keys.
        top_k: config key of the experts per token.
        intermediate_size: config key of the width of one expert.
        input_3d: whether the gate only takes (batch, sequence, hidden) input; others take (tokens, hidden), too.
        fixed_routers: class names of gates that do not learn (hash routing); their layers are left alone.
        adapter: name of the adapter in `moe_adapters.py` for blocks that do not call
            `experts(hidden, top_k_index, top_k_weights)`; their `experts` is only looked for.
        min_slots: fewest slots that the stock experts can take; with fewer, unused ones are added.
        norm: path, on the decoder layer, of the norm whose output is the block's input and nothing else's. `None`
            where there is none, where attention reads it, too, or where its input is not the residual stream.
    """

    block: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    stacks: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    returns: str = "LWI"
    returns_before: tuple[tuple[str, str], ...] = ()
    logits: str = "stock"
    score: str = "softmax"
    order: str = "score_topk"
    renormalize: bool | str = True
    scale: float | str = 1.0
    bias: str | None = None
    block_bias: str | None = None
    expert_scale: str | None = None
    groups: tuple[str, str, str] | None = None
    num_experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    intermediate_size: str = "moe_intermediate_size"
    input_3d: bool = False
    fixed_routers: tuple[str, ...] = ()
    adapter: str | None = None
    min_slots: int = 1
    norm: str | None = "post_attention_layernorm"


@dataclass(frozen=True)
class DenseSpec:
    """Where the parts of a dense feed-forward block stand on its layer.

    Attributes:
        site: the module that a MoE block replaces.
        up: the projection from hidden to intermediate size (the linear one of a gated block).
        down: the projection back.
        gate: the projection that goes through the activation, for gated blocks. Where the config chooses (T5), a
            layer on which this path does not exist is not gated.
        fused: one projection holding `[gate; up]` rows, instead of `gate` and `up`; `up` names the same module then.
        activation: the activation module.
        dropout: a dropout module or probability inside the block, if it has one.
        dropout_at: `"hidden"` (between activation and `down`) or `"output"` (after `down`).
        bypass: modules outside `site` whose work the MoE block takes over; they become identities.
        transposed: weights are stored `(in, out)` (`Conv1D`) instead of `(out, in)`.
        norm: as in `MoeSpec`.
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
    norm: str | None = "post_attention_layernorm"


@dataclass(frozen=True)
class AttentionSpec:
    """Where the parts of a layer's self-attention stand. Paths of projections start at the attention module.

    Attributes:
        site: path of the attention module on the decoder layer.
        query, key, value: the projections of the input to heads.
        output: the projection of the heads' outputs back to the hidden size.
        fused: one projection in place of `query`, `key` and `value`, whose rows are ordered by heads first.
        query_norm, key_norm: norms of single heads, with one weight for all heads or one for each; may be absent.
        norm_heads_first: whether they see (B, heads, S, d), and not (B, S, heads, d).
        other_norms: norms over all heads together, or whose weights cannot differ by head; may be absent.
        head_counts, key_counts: attributes of the module that count the heads of queries, and of keys and values.
        experts: the experts of an attention that is a mixture already; its block's path starts at the layer.
    """

    site: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    norm_heads_first: bool = False
    other_norms: tuple[str, ...] = ()
    head_counts: tuple[str, ...] = ()
    key_counts: tuple[str, ...] = ()
    experts: MoeSpec | None = None


@dataclass(frozen=True)
class Family:
    """One stock architecture.

    Attributes:
        name: `model_type` of the config.
        base: class names of the modules that own the layers (two instances in an encoder-decoder model).
        layers: path from a base module to its layers.
        moe: the MoE block, for MoE families.
        dense: the feed-forward block, for families that can be upcycled.
        attention: the self-attention, for families whose attention can be extended.
        stock_moe: dense families only: the stock MoE family that a plain upcycled model can be saved as.
        since: first transformers version whose implementation the record fits, when that is not the oldest supported.
        aliases: `model_type` of nested configs (the text config of a vision-language model).
        module: folder of the architecture in `transformers.models`, where it is not called `name`.
        parallel: whether a layer adds attention and feed-forward block to the same stream, side by side.
        recomputes: whether its layers can be checkpointed although the stock class refuses it.
        note: a limitation a user should read in `hf-moe list families`.
    """

    name: str
    base: tuple[str, ...]
    layers: str = "layers"
    moe: MoeSpec | None = None
    dense: DenseSpec | None = None
    attention: AttentionSpec | None = None
    stock_moe: str | None = None
    since: str | None = None
    aliases: tuple[str, ...] = ()
    module: str | None = None
    parallel: bool = False
    recomputes: bool = False
    note: str = ""

    @property
    def available(self) -> bool:
        """Whether the installed transformers has this architecture in a version the record fits."""
        if self.name in OWN_MODELS:
            return True
        if self.name not in CONFIG_MAPPING_NAMES:
            return False
        return self.since is None or Version(transformers.__version__) >= Version(self.since)

    def modeling_module(self) -> Any:
        """The `modeling_<name>` module (imports it)."""
        if self.name in OWN_MODELS:
            return import_module(f".{OWN_MODELS[self.name][0]}", __package__)
        name = self.module or self.name
        return import_module(f"transformers.models.{name}.modeling_{name}")


def get_by_path(module: Any, path: str) -> Any:
    """`module.a[-1].b` for the path `"a.-1.b"`; the module itself for `""`. Works on configs, too."""
    for part in path.split(".") if path else ():
        if "|" in part:
            names = part.split("|")
            part = next((name for name in names if getattr(module, name, None) is not None), names[0])
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
    """`(key, layer, base)` of every layer, in the order of computation. Keys are `"0"`, `"1"` or `"encoder.0"`."""
    for prefix, base in iter_bases(model, family):
        for index, layer in enumerate(get_by_path(base, family.layers)):
            yield f"{prefix}{index}", layer, base


# softmax over all experts, top-k, divided by their sum
_MIXTRAL = MoeSpec(logits="linear", num_experts="num_local_experts", intermediate_size="intermediate_size")
# the same with a switch for the division
_QWEN = MoeSpec(logits="linear", renormalize="norm_topk_prob")
_QWEN_SHARED = replace(_QWEN, shared=("shared_expert", "shared_expert_gate"))
# softmax over the chosen logits
_GRANITE = replace(_MIXTRAL, block="block_sparse_moe", router="router", order="topk_score")
_GRANITE_OLD = replace(_GRANITE, returns_before=(("5.21", "IWL"),))
# sigmoid scores, selection with a correction bias within the best groups, scaled
_DEEPSEEK = MoeSpec(
    shared=("shared_experts",),
    logits="linear_fp32",
    score="sigmoid",
    renormalize="norm_topk_prob",
    scale="routed_scaling_factor",
    bias="e_score_correction_bias",
    groups=("n_group", "topk_group", "top2_sum"),
    num_experts="num_local_experts",
)
_DEEPSEEK_V2 = replace(
    _DEEPSEEK,
    score="softmax",
    renormalize=False,
    bias=None,
    groups=("n_group", "topk_group", "max"),
    num_experts="num_experts",
)
# sigmoid scores with a correction bias, no groups; the block applies the scale
_MINIMAX_M2 = replace(_MIXTRAL, score="sigmoid", bias="arg", block_bias="e_score_correction_bias")
_MINIMAX_M3 = replace(
    _MIXTRAL, shared=("shared_experts",), score="sigmoid", bias="e_score_correction_bias", block_bias=None
)
_ERNIE = MoeSpec(shared=("shared_experts",), logits="linear_fp32", bias="moe_statics.e_score_correction_bias")
# the layer holds router and experts; the gate normalises its input and returns probabilities
_GEMMA4 = MoeSpec(
    block="", router="router", returns="PWI", expert_scale="per_expert_scale", top_k="top_k_experts", norm=None
)

_GATED = DenseSpec()
_POST_NORM = DenseSpec(norm=None)  # the block reads the residual stream itself
_PARALLEL = DenseSpec(norm=None)  # attention and the block share one norm
_PLAIN = DenseSpec(gate=None)
_FUSED = DenseSpec(up="mlp.gate_up_proj", gate=None, fused="mlp.gate_up_proj", activation="mlp.activation_fn")
_PHI = DenseSpec(up="mlp.fc1", down="mlp.fc2", gate=None, activation="mlp.activation_fn")
_NEOX = DenseSpec(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", gate=None, activation="mlp.act")
_CFC = DenseSpec(up="mlp.c_fc", down="mlp.c_proj", gate=None, activation="mlp.act")
_BERT = DenseSpec(
    site="intermediate",
    up="intermediate.dense",
    down="output.dense",
    gate=None,
    activation="intermediate.intermediate_act_fn",
    bypass=("output.dense",),
    norm=None,
)

_HEADS = AttentionSpec()  # separate projections, heads counted by nothing but their sizes
_HEADS_NORM = AttentionSpec(query_norm="q_norm", key_norm="k_norm")
_HEADS_PHI = AttentionSpec(output="dense", other_norms=("q_layernorm", "k_layernorm"))
_HEADS_OLMO = replace(_HEADS, other_norms=("q_norm", "k_norm"))
_HEADS_STABLELM = replace(
    _HEADS,
    head_counts=("num_heads",),
    key_counts=("num_key_value_heads",),
    other_norms=("q_layernorm", "k_layernorm"),
)
_HEADS_NEOX = AttentionSpec(site="attention", fused="query_key_value", output="dense")

FAMILIES: tuple[Family, ...] = (
    # --- Mixture of Experts: softmax ---
    Family("mixtral", base=("MixtralModel",), moe=_MIXTRAL),
    Family("minimax", base=("MiniMaxModel",), moe=replace(_MIXTRAL, norm=None)),
    Family("qwen2_moe", base=("Qwen2MoeModel",), moe=_QWEN_SHARED),
    Family("qwen3_moe", base=("Qwen3MoeModel",), moe=_QWEN),
    Family("qwen3_next", base=("Qwen3NextModel",), moe=_QWEN_SHARED),
    Family(
        "qwen3_5_moe",
        base=("Qwen3_5MoeTextModel",),
        moe=replace(_QWEN_SHARED, renormalize=True),
        aliases=("qwen3_5_moe_text",),
    ),
    Family(
        "qwen4_exp",
        base=("Qwen4ExpTextModel",),
        moe=replace(_QWEN_SHARED, norm=None),
        aliases=("qwen4_exp_text",),
    ),
    Family(
        "qwen3_vl_moe",
        base=("Qwen3VLMoeTextModel",),
        moe=replace(_QWEN, renormalize=True),
        aliases=("qwen3_vl_moe_text",),
    ),
    Family(
        "qwen3_omni_moe",
        base=("Qwen3OmniMoeThinkerTextModel",),
        moe=_QWEN,
        aliases=("qwen3_omni_moe_thinker", "qwen3_omni_moe_text"),
        note="The talker's experts are left alone.",
    ),
    Family("olmoe", base=("OlmoeModel",), moe=replace(_QWEN, intermediate_size="intermediate_size")),
    Family(
        "flex_olmo",
        base=("FlexOlmoModel",),
        moe=replace(_QWEN, intermediate_size="intermediate_size", norm=None),
    ),
    Family("mellum", base=("MellumModel",), moe=_QWEN),
    Family(
        "jamba",
        base=("JambaModel",),
        moe=MoeSpec(
            block="feed_forward",
            router="router",
            logits="linear",
            renormalize=False,
            intermediate_size="intermediate_size",
            norm="pre_ff_layernorm",
        ),
        since="5.21",
    ),
    Family(
        "hunyuan_v1_moe",
        base=("HunYuanMoEV1Model",),
        moe=MoeSpec(shared=("shared_mlp",), top_k="moe_topk", intermediate_size="intermediate_size"),
        note="Configs with a list of expert counts, one for each layer, are not supported.",
    ),
    Family("ernie4_5_moe", base=("Ernie4_5_MoeModel",), moe=_ERNIE),
    Family(
        "ernie4_5_vl_moe",
        base=("Ernie4_5_VLMoeTextModel",),
        moe=replace(_ERNIE, block="mlp.text_moe", shared=(), intermediate_size="moe_intermediate_size.0", norm=None),
        aliases=("ernie4_5_vl_moe_text",),
        note="Only the text experts; the vision experts are left alone.",
    ),
    Family(
        "mistral4",
        base=("Mistral4Model",),
        moe=replace(_DEEPSEEK, logits="linear", score="softmax", bias=None),
    ),
    Family(
        "mistral_large4",
        base=("MistralLarge4TextModel",),
        moe=replace(_DEEPSEEK, score="softmax", renormalize=True, bias=None),
        aliases=("mistral_large4_text",),
    ),
    Family("deepseek_v2", base=("DeepseekV2Model",), moe=_DEEPSEEK_V2),
    Family("deepseek_ocr2", base=("DeepseekOcr2TextModel",), moe=_DEEPSEEK_V2, aliases=("deepseek_ocr2_text",)),
    Family("unlimited_ocr", base=("UnlimitedOcrTextModel",), moe=_DEEPSEEK_V2, aliases=("unlimited_ocr_text",)),
    Family("gemma4", base=("Gemma4TextModel",), moe=_GEMMA4, aliases=("gemma4_text",)),
    # --- Mixture of Experts: softmax over the chosen logits ---
    Family("granitemoe", base=("GraniteMoeModel",), moe=_GRANITE_OLD),
    Family("granitemoe_swa", base=("GraniteMoeSWAModel",), moe=_GRANITE),
    Family("granitemoeshared", base=("GraniteMoeSharedModel",), moe=replace(_GRANITE_OLD, norm=None)),
    Family("granitemoehybrid", base=("GraniteMoeHybridModel",), moe=replace(_GRANITE_OLD, norm=None)),
    Family(
        "aria",
        base=("AriaTextModel",),
        moe=MoeSpec(
            router="router",
            shared=("shared_experts",),
            logits="linear",
            order="topk_score",
            num_experts="moe_num_experts",
            top_k="moe_topk",
            intermediate_size="intermediate_size",
        ),
        since="5.18",
        aliases=("aria_text",),
    ),
    Family(
        "gpt_oss", base=("GptOssModel",), moe=replace(_MIXTRAL, router="router", logits="stock", order="topk_score")
    ),
    # --- Mixture of Experts: sigmoid ---
    Family("deepseek_v3", base=("DeepseekV3Model",), moe=_DEEPSEEK),
    Family("deepseek_v32", base=("DeepseekV32Model",), moe=_DEEPSEEK),
    Family("axk1", base=("AXK1Model",), moe=_DEEPSEEK),
    Family("axk2", base=("AXK2Model",), moe=_DEEPSEEK),
    Family("bailing_hybrid", base=("BailingHybridModel",), moe=_DEEPSEEK),
    Family(
        "beam",
        base=("BeamModel",),
        moe=replace(_DEEPSEEK, shared=(), scale=1.0, num_experts="num_experts", norm="pre_feedforward_layernorm"),
    ),
    Family("dots1", base=("Dots1Model",), moe=_DEEPSEEK),
    Family(
        "dots3_note",
        base=("Dots3NoteTextModel",),
        moe=_DEEPSEEK,
        aliases=("dots3_note_text",),
        note="The vision tower's experts are left alone.",
    ),
    Family("exaone_moe", base=("ExaoneMoeModel",), moe=replace(_DEEPSEEK, num_experts="num_experts")),
    Family("glm4_moe", base=("Glm4MoeModel",), moe=_DEEPSEEK),
    Family("glm4_moe_lite", base=("Glm4MoeLiteModel",), moe=_DEEPSEEK),
    Family("glm4v_moe", base=("Glm4vMoeTextModel",), moe=_DEEPSEEK, aliases=("glm4v_moe_text",)),
    Family("glm_moe_dsa", base=("GlmMoeDsaModel",), moe=_DEEPSEEK),
    Family(
        "glm5_next",
        base=("Glm5NextTextModel",),
        moe=replace(_DEEPSEEK, norm=None),
        aliases=("glm5_next_text",),
    ),
    Family("hy_v4", base=("HYV4Model",), moe=replace(_DEEPSEEK, norm=None)),
    Family("kimi_linear", base=("KimiLinearModel",), moe=_DEEPSEEK),
    Family("mimo_v2_flash", base=("MiMoV2FlashModel",), moe=replace(_DEEPSEEK, shared=())),
    Family("nemotron_h", base=("NemotronHModel",), moe=replace(_DEEPSEEK, block="mixer", norm="norm")),
    Family("solar_open", base=("SolarOpenModel",), moe=_DEEPSEEK),
    Family(
        "hy_v3",
        base=("HYV3Model",),
        moe=replace(
            _DEEPSEEK,
            renormalize=True,
            scale="router_scaling_factor",
            bias="arg",
            block_bias="e_score_correction_bias",
            groups=None,
        ),
    ),
    Family(
        "inkling2",
        base=("Inkling2TextModel",),
        moe=replace(_DEEPSEEK, shared=(), renormalize=True, groups=None),
        aliases=("inkling2_text",),
    ),
    Family(
        "muse_spark",
        base=("MuseSparkTextModel",),
        moe=replace(
            _DEEPSEEK,
            shared=(),
            logits="stock",
            renormalize=True,
            groups=None,
            norm="pre_feedforward_layernorm",
        ),
        aliases=("muse_spark_text",),
    ),
    Family("minimax_m2", base=("MiniMaxM2Model",), moe=_MINIMAX_M2),
    Family("minimax_m3_vl", base=("MiniMaxM3VLTextModel",), moe=_MINIMAX_M3, aliases=("minimax_m3_vl_text",)),
    Family(
        "step3p7",
        base=("Step3p7TextModel",),
        moe=replace(_MINIMAX_M3, intermediate_size="moe_intermediate_size"),
        aliases=("step3p5",),
        note="The experts clip their activations and always run their own code.",
    ),
    Family(
        "laguna",
        base=("LagunaModel",),
        moe=MoeSpec(shared=("shared_experts",), score="sigmoid", bias="e_score_correction_bias"),
    ),
    Family(
        "afmoe",
        base=("AfmoeModel",),
        moe=MoeSpec(
            router="router",
            shared=("shared_experts",),
            score="sigmoid",
            scale="route_scale",
            bias="arg",
            block_bias="expert_bias",
            input_3d=True,
            norm="pre_mlp_layernorm",
        ),
    ),
    Family(
        "lfm2_moe",
        base=("Lfm2MoeModel",),
        moe=MoeSpec(
            block="feed_forward",
            logits="linear",
            score="sigmoid",
            renormalize="norm_topk_prob",
            scale="routed_scaling_factor",
            bias="arg",
            block_bias="expert_bias",
            norm="ffn_norm",
        ),
    ),
    Family(
        "flint",
        base=("FlintModel",),
        moe=replace(_QWEN, shared=("shared_expert",), logits="linear_fp32", score="sigmoid"),
    ),
    # --- Mixture of Experts: rules of their own ---
    Family("phimoe", base=("PhimoeModel",), moe=replace(_MIXTRAL, router="router", score="custom")),
    Family(
        "cohere2_moe",
        base=("Cohere2MoeModel",),
        moe=replace(
            _QWEN, shared=("shared_experts",), score="custom", intermediate_size="intermediate_size", norm=None
        ),
    ),
    Family(
        "kolibri1",
        base=("Kolibri1Model",),
        # selects by logit plus bias and scores afterwards
        moe=replace(
            _QWEN,
            shared=("shared_experts",),
            logits="linear_fp32",
            score="custom",
            bias="e_score_correction_bias",
        ),
    ),
    Family(
        "openai_privacy_filter",
        base=("OpenAIPrivacyFilterModel",),
        # gate divides by k, block multiplies by k
        moe=replace(_MIXTRAL, router="router", logits="stock", score="custom"),
    ),
    Family(
        "inkling_mm_model",
        base=("InklingTextModel",),
        moe=MoeSpec(
            shared=("shared_experts",),
            returns="LWIX",
            score="custom",
            scale="route_scale",
            bias="e_score_correction_bias",
            num_experts="n_routed_experts",
        ),
        aliases=("inkling_text",),
        module="inkling",
    ),
    Family(
        "deepseek_v4",
        base=("DeepseekV4Model",),
        moe=replace(
            _DEEPSEEK,
            logits="linear",
            score="custom",
            renormalize=True,
            groups=None,
            fixed_routers=("DeepseekV4HashRouter",),
            norm=None,
        ),
        note="Hash-routed layers choose experts by token id.",
    ),
    Family(
        "zaya",
        base=("ZayaModel",),
        moe=MoeSpec(returns="LWIX", score="custom", bias="balancing_biases", input_3d=True),
        note="One router class more than experts: the skip class.",
    ),
    Family(
        "longcat_flash",
        base=("LongcatFlashModel",),
        moe=MoeSpec(
            router="router",
            renormalize=False,
            scale="routed_scaling_factor",
            bias="e_score_correction_bias",
            num_experts="n_routed_experts+zero_expert_num",
            top_k="moe_topk",
            intermediate_size="expert_ffn_hidden_size",
            min_slots=2,
            norm=None,
        ),
        since="5.19",
        note="The router has `zero_expert_num` classes more than experts: identity experts.",
    ),
    # --- Mixture of Experts: blocks that do not call `experts(hidden, top_k_index, top_k_weights)` ---
    # Not here: doge (product keys over embeddings, no experts), vitpose_backbone (experts chosen by data set id),
    # diffusion_gemma (two stacks share one set of weights) and nllb_moe (up to 5.23 its experts read the 0/1 entries
    # of the dispatch mask as expert ids, so that there is no correct stock behaviour to start from).
    Family(
        "llama4",
        base=("Llama4TextModel",),
        moe=replace(
            _MIXTRAL,
            block="feed_forward",
            router="router",
            shared=("shared_expert",),
            returns="_L",
            logits="stock",
            score="sigmoid",
            renormalize=False,
            adapter="llama4",
        ),
        aliases=("llama4_text",),
    ),
    Family(
        "dbrx",
        base=("DbrxModel",),
        layers="blocks",
        moe=MoeSpec(
            block="ffn",
            router="router",
            returns="L",
            renormalize="ffn_config.moe_normalize_expert_weights",
            num_experts="ffn_config.moe_num_experts",
            top_k="ffn_config.moe_top_k",
            intermediate_size="ffn_config.ffn_hidden_size",
            adapter="dbrx",
            norm="norm_attn_norm.norm_2",
        ),
    ),
    Family(
        "jetmoe",
        base=("JetMoeModel",),
        moe=replace(
            _MIXTRAL,
            router="router",
            experts="input_linear",
            stacks=("output_linear",),
            returns="____L",
            logits="layer",
            order="topk_score",
            adapter="jetmoe",
        ),
        attention=AttentionSpec(
            site="self_attention",
            experts=replace(
                _MIXTRAL,
                block="self_attention.experts",
                router="router",
                experts="input_linear",
                stacks=("output_linear",),
                returns="____L",
                logits="layer",
                order="topk_score",
                adapter="jetmoe_attention",
                norm="input_layernorm",
            ),
        ),
        recomputes=True,
        note="Routers of the attention's experts are declared under `attention`.",
    ),
    Family(
        "switch_transformers",
        base=("SwitchTransformersStack",),
        layers="block",
        moe=MoeSpec(
            block="layer.-1.mlp",
            router="router",
            returns="__L",
            renormalize=False,
            top_k="",
            intermediate_size="d_ff",
            adapter="switch",
            norm="layer.-1.layer_norm",
        ),
        since="5.18",
    ),
    # --- dense ---
    Family("llama", base=("LlamaModel",), dense=_GATED, attention=_HEADS, stock_moe="mixtral"),
    Family("mistral", base=("MistralModel",), dense=_GATED, attention=_HEADS, stock_moe="mixtral"),
    Family("qwen2", base=("Qwen2Model",), dense=_GATED, attention=_HEADS, stock_moe="qwen2_moe"),
    Family("qwen3", base=("Qwen3Model",), dense=_GATED, attention=_HEADS_NORM, stock_moe="qwen3_moe"),
    Family("olmo", base=("OlmoModel",), dense=_GATED, attention=_HEADS),
    Family(
        "olmo2",
        base=("Olmo2Model",),
        dense=_POST_NORM,
        attention=_HEADS_OLMO,
        stock_moe="flex_olmo",
    ),
    Family("olmo3", base=("Olmo3Model",), dense=_POST_NORM, attention=_HEADS_OLMO),
    Family("granite", base=("GraniteModel",), dense=_GATED, attention=_HEADS, stock_moe="granitemoe"),
    Family("gemma", base=("GemmaModel",), dense=_GATED, attention=_HEADS),
    Family("gemma2", base=("Gemma2Model",), dense=replace(_GATED, norm="pre_feedforward_layernorm"), attention=_HEADS),
    Family(
        "gemma3_text",
        base=("Gemma3TextModel",),
        dense=replace(_GATED, norm="pre_feedforward_layernorm"),
        attention=replace(_HEADS_NORM, norm_heads_first=True),
        module="gemma3",
    ),
    Family("cohere", base=("CohereModel",), dense=_PARALLEL, attention=_HEADS_NORM, parallel=True),
    Family(
        "cohere2", base=("Cohere2Model",), dense=_PARALLEL, attention=_HEADS, stock_moe="cohere2_moe", parallel=True
    ),
    Family("ernie4_5", base=("Ernie4_5Model",), dense=_GATED, attention=_HEADS, stock_moe="ernie4_5_moe"),
    Family("helium", base=("HeliumModel",), dense=_GATED, attention=_HEADS),
    Family(
        "seed_oss", base=("SeedOssModel",), dense=replace(_GATED, dropout="mlp.residual_dropout"), attention=_HEADS
    ),
    Family("smollm3", base=("SmolLM3Model",), dense=_GATED, attention=_HEADS),
    Family("stablelm", base=("StableLmModel",), dense=_GATED, attention=_HEADS_STABLELM),
    Family("glm", base=("GlmModel",), dense=_FUSED, attention=_HEADS),
    Family("glm4", base=("Glm4Model",), dense=_FUSED, attention=_HEADS),
    Family("phi3", base=("Phi3Model",), dense=_FUSED),
    Family("arcee", base=("ArceeModel",), dense=_PLAIN, attention=_HEADS),
    Family("nemotron", base=("NemotronModel",), dense=_PLAIN, attention=_HEADS),
    Family("phi", base=("PhiModel",), dense=replace(_PHI, norm=None), attention=_HEADS_PHI, parallel=True),
    Family(
        "vit",
        base=("ViTModel",),
        dense=replace(_PHI, norm="layernorm_after"),
        attention=replace(_HEADS, site="attention", head_counts=("num_attention_heads",)),
    ),
    Family("gpt_neox", base=("GPTNeoXModel",), dense=_NEOX, attention=_HEADS_NEOX, parallel=True),
    Family("falcon", base=("FalconModel",), layers="h", dense=replace(_NEOX, norm=None), parallel=True),
    Family(
        "starcoder2", base=("Starcoder2Model",), dense=replace(_CFC, dropout="mlp.residual_dropout"), attention=_HEADS
    ),
    Family(
        "gpt2",
        base=("GPT2Model",),
        layers="h",
        dense=replace(_CFC, dropout="mlp.dropout", transposed=True, norm="ln_2"),
    ),
    Family(
        "opt",
        base=("OPTDecoder",),
        dense=DenseSpec(
            site="fc1",
            up="fc1",
            down="fc2",
            gate=None,
            activation="activation_fn",
            bypass=("activation_fn", "fc2"),
            norm="final_layer_norm",
        ),
        attention=replace(_HEADS, output="out_proj", head_counts=("num_heads",), key_counts=("num_heads",)),
    ),
    Family("bert", base=("BertModel",), layers="encoder.layer", dense=_BERT),
    Family("roberta", base=("RobertaModel",), layers="encoder.layer", dense=_BERT),
    Family(
        "t5",
        base=("T5Stack",),
        layers="block",
        dense=DenseSpec(
            site="layer.-1.DenseReluDense",
            up="layer.-1.DenseReluDense.wi_1|wi",
            down="layer.-1.DenseReluDense.wo",
            gate="layer.-1.DenseReluDense.wi_0",
            activation="layer.-1.DenseReluDense.act",
            dropout="layer.-1.DenseReluDense.dropout",
            dropout_at="hidden",
            norm="layer.-1.layer_norm",
        ),
    ),
)

# Architectures of this package, whose modules install their routing themselves.
OWN_FAMILIES: tuple[Family, ...] = (
    Family(
        "moduleformer",
        base=("ModuleFormerModel",),
        moe=MoeSpec(
            logits="rows",
            renormalize=False,
            num_experts="mlp_num_experts",
            top_k="mlp_top_k",
            intermediate_size="intermediate_size",
        ),
        attention=AttentionSpec(
            site="attention",
            experts=MoeSpec(
                block="attention",
                logits="rows",
                renormalize=False,
                num_experts="moa_num_experts",
                top_k="moa_top_k",
                intermediate_size="attention_hidden_size",
                norm="input_layernorm",
            ),
        ),
    ),
)

_BY_NAME = {key: family for family in (*FAMILIES, *OWN_FAMILIES) for key in (family.name, *family.aliases)}


def get_family(model_type: str) -> Family | None:
    """The record for a `model_type` (ours, `moe_ext_<name>`, too); `None` where there is none or it is unavailable."""
    family = _BY_NAME.get(model_type.removeprefix("moe_ext_"))
    return family if family is not None and family.available else None


def list_families() -> list[Family]:
    """All records that the installed transformers can use, in alphabetical order."""
    return sorted((family for family in FAMILIES if family.available), key=lambda family: family.name)
