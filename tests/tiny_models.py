"""A tiny random model for every family record: small enough for CPU tests, with router logits that differ clearly."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_moe_ext.modeling.moe_families import get_by_path, get_family, has_path, iter_layers, list_families


MOE_NAMES = tuple(family.name for family in list_families() if family.moe is not None)
DENSE_NAMES = tuple(family.name for family in list_families() if family.dense is not None)

VOCAB_SIZE = 96
_FIRST_TOKEN, _LAST_TOKEN = 4, 79  # special and multimodal tokens stand outside this range

# Given to every config class that has the field.
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 4,
    # experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
    "norm_topk_prob": True,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "router_scaling_factor": 1.5,
    "moe_routed_scaling_factor": 1.5,
    "moe_router_scaling_factor": 1.5,
    "moe_router_logit_softcapping": 5.0,
    "route_scale": 1.5,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    # vision
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "image_size": 8,
    "image_token_id": 80,
    "image_token_index": 80,
    "video_token_id": 81,
    "video_token_index": 81,
    "vision_start_token_id": 82,
    "vision_end_token_id": 83,
    "audio_token_id": 84,
}

_MLA = {"num_key_value_heads": 4}  # latent attention has no grouped heads
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LINEAR = ["linear_attention", "linear_attention", "full_attention"]
_DELTA_NET = {
    "layer_types": _LINEAR,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
}
_DEEPSEEK_V2 = {"topk_method": "group_limited_greedy"}
_INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 8}
_SAM = {
    "sam_config": {"output_channels": 8, "downsample_channels": [8, 32], "global_attn_indexes": [0], "mlp_dim": 32}
}
_QWEN_VISION = {"out_hidden_size": 32, "deepstack_visual_indexes": (0,), "num_position_embeddings": 16}

# What a family needs beyond that. `model_type` names the text config where a text-only model exists.
_EXTRA: dict[str, dict[str, Any]] = {
    "aria": {"model_type": "aria_text"},
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": _MLA | {"layer_types": _LINEAR, "num_mtp_layers": 0},
    "bert": {"is_decoder": False},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
        "rope_parameters": _ROPE,
    },
    "deepseek_ocr2": {"vision_config": _SAM, "text_config": _DEEPSEEK_V2},
    "deepseek_v2": _MLA | _DEEPSEEK_V2,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": ["sliding_attention"] * 3,
        "o_groups": 2,
        "o_lora_rank": 8,
    },
    "dots3_note": _MLA
    | {
        "model_type": "dots3_note_text",
        "layer_types": ["indexed_attention"] * 3,
        "shared_experts_intermediate_size": 16,
    },
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [16, 8], "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}}
    },
    "gemma4": {"model_type": "gemma4_text", "enable_moe_block": True, "hidden_size_per_layer_input": 0},
    "glm4_moe_lite": _MLA,
    "glm4v_moe": {
        "vision_config": {"out_hidden_size": 32},
        "text_config": {"rope_parameters": _ROPE | {"mrope_section": [1, 0, 0], "partial_rotary_factor": 0.25}},
    },
    "glm5_next": {
        "vision_config": {"out_hidden_size": 32, "projection_intermediate_size": 32},
        "text_config": _MLA
        | {
            "num_hidden_layers": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "index_kpool": 2,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "head_dim": 0,
            "qk_rope_head_dim": 0,
        },
    },
    "glm_moe_dsa": _MLA,
    "gpt2": {"n_inner": 48},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 4,
        "shared_intermediate_size": 16,
    },
    "granitemoeshared": {"shared_intermediate_size": 16},
    "inkling2": _INKLING | {"model_type": "inkling2_text", "unpadded_vocab_size": VOCAB_SIZE},
    "inkling_mm_model": _INKLING | {"model_type": "inkling_text", "logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "mamba_d_state": 8},
    "kimi_linear": _MLA | {"layer_types": _LINEAR, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": _MLA
    | {"num_layers": 2, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48, "zero_expert_num": 2},
    "minimax_m3_vl": {
        "projector_hidden_size": 32,
        "text_config": {
            "model_type": "minimax_m3_vl_text",
            "dense_intermediate_size": 48,
            "shared_intermediate_size": 16,
            "index_topk_blocks": 2,
            "rotary_dim": 4,
        },
        "vision_config": {"model_type": "minimax_m3_vl_vision"},
    },
    "mistral4": _MLA,
    "mistral_large4": {"vision_config": {"model_type": "pixtral"}, "text_config": _MLA},
    "muse_spark": {
        "projector_hidden_size": 32,
        "out_hidden_size": 128,
        "text_config": {"moe_hidden_size": 24},
        "audio_config": {
            "num_hidden_layers": 4,
            "hidden_sizes": (8, 8, 8, 8),
            "depths": (1, 1, 1, 1),
            "out_hidden_size": 32,
        },
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 4,
        "moe_shared_expert_intermediate_size": 16,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.15},
    "qwen3_5_moe": _DELTA_NET | {"model_type": "qwen3_5_moe_text"},
    "qwen3_next": _DELTA_NET,
    "qwen3_omni_moe": {
        "model_type": "qwen3_omni_moe_thinker",
        "vision_start_token_id": 82,
        "vision_config": _QWEN_VISION,
        "audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
    },
    "qwen3_vl_moe": {"vision_config": _QWEN_VISION},
    "qwen4_exp": _DELTA_NET
    | {
        "model_type": "qwen4_exp_text",
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
    },
    "switch_transformers": {
        "d_kv": 8,
        "d_ff": 48,
        "num_decoder_layers": 3,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "t5": {"d_ff": 48, "num_layers": 2},
    "step3p7": {"text_config": {"share_expert_dim": 16}},
    "unlimited_ocr": {"vision_config": _SAM, "text_config": _DEEPSEEK_V2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

_AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText)
_OTHER_AUTO_CLASS = {
    "bert": AutoModelForSequenceClassification,
    "roberta": AutoModelForSequenceClassification,
    "vit": AutoModelForImageClassification,
    "openai_privacy_filter": AutoModelForTokenClassification,
}

# Gates that scale their logits down by themselves.
_GATE_GAIN = {"gemma4": 12.0, "muse_spark": 12.0}


def _build(config_class: type[PreTrainedConfig], extra: dict[str, Any]) -> PreTrainedConfig:
    """A config with the shared values its class knows, then `extra`; nested configs alike."""
    alias = config_class.attribute_map
    known = {field.name for field in fields(config_class)} | set(alias)
    values = {key: value for key, value in _SHARED.items() if key in known and alias.get(key) not in extra} | extra
    for name, nested_class in config_class.sub_configs.items():
        nested = dict(extra.get(name, {}))
        model_type = nested.pop("model_type", None)
        if nested_class is AutoConfig:
            nested_class = CONFIG_MAPPING[model_type]
        values[name] = _build(nested_class, nested)
    return config_class(**values)


def tiny_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The config of `tiny_model(name, **overrides)`."""
    extra = _EXTRA.get(name, {}) | overrides
    return _build(CONFIG_MAPPING[extra.pop("model_type", name)], extra)


def tiny_model(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of a family in eval mode; one `seed` always gives the same weights."""
    if name not in (*MOE_NAMES, *DENSE_NAMES):
        pytest.skip(f"{name} needs a newer transformers")
    torch.manual_seed(seed)
    config = tiny_config(name, **overrides)
    if name in _OTHER_AUTO_CLASS:
        auto_class = _OTHER_AUTO_CLASS[name]
    else:
        auto_class = next(auto for auto in _AUTO_CLASSES if type(config) in auto._model_mapping)
    model = auto_class.from_config(config).float().eval()
    _randomize(model, name)
    return model


@torch.no_grad()
def _randomize(model: PreTrainedModel, name: str) -> None:
    """Move what stock initialisation leaves at zero or one, and spread the router logits."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].normal_(std=0.15)  # a row of zeros would tie all experts
    family = get_family(name)
    assert family is not None
    if family.moe is None:
        return
    for _, layer, _ in iter_layers(model, family):
        if not has_path(layer, family.moe.block):
            continue
        block = get_by_path(layer, family.moe.block)
        if not has_path(block, family.moe.router) or not has_path(block, family.moe.experts):
            continue
        gate: nn.Module = get_by_path(block, family.moe.router)
        for parameter in gate.parameters():
            if parameter.dim() == 2 and parameter.shape[0] > 1:
                parameter.normal_(std=_GATE_GAIN.get(name, 2.0) * parameter.shape[1] ** -0.5)
        bias = gate if family.moe.bias != "arg" else block
        path = family.moe.bias if family.moe.bias != "arg" else family.moe.block_bias
        if path is not None and has_path(bias, path):
            get_by_path(bias, path).normal_(std=0.2)


def tiny_inputs(name: str, batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Forward arguments of `tiny_model(name)`. The last row is padded on the left by two tokens."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        config = tiny_config(name)
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    ids = torch.randint(_FIRST_TOKEN, _LAST_TOKEN, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, :2] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if tiny_config(name).is_encoder_decoder:
        shape = (batch, length)
        inputs["decoder_input_ids"] = torch.randint(_FIRST_TOKEN, _LAST_TOKEN, shape, generator=generator)
    return inputs
