"""Checkpoints in the layout of ModuleFormer's authors (MoLM, 2306.04640) as models of this package, and back.

    model = convert_moduleformer_checkpoint("MoLM-350M-4B")
    model.save_pretrained("molm")

Names of tensors differ, and the authors keep the matrices of experts as (E, in, out), we as (E, out, in).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from .modeling.modeling_moduleformer import ModuleFormerConfig, ModuleFormerForCausalLM


logger = logging.get_logger(__name__)

# Names in the config: the authors' -> ours.
_CONFIG = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "att_hidden": "attention_hidden_size",
    "ffd_hidden": "intermediate_size",
    "activation_function": "hidden_act",
    "n_att_experts": "moa_num_experts",
    "k_att": "moa_top_k",
    "n_mlp_experts": "mlp_num_experts",
    "k_mlp": "mlp_top_k",
    "gating_size": "router_hidden_size",
    "sample_topk": "sample_top_k",
    "resid_pdrop": "resid_dropout",
    "embd_pdrop": "embed_dropout",
    "initializer_range": "initializer_range",
    "use_cache": "use_cache",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_NEEDED = ["vocab_size", "n_embd", "n_layer", "n_head", "att_hidden", "ffd_hidden"]
_NEEDED += ["n_att_experts", "k_att", "n_mlp_experts", "k_mlp"]
_KINDS = {"mlp": "mlp", "linear": "linear", "gmm": "cosine"}
_LOSSES = {"mi": "information", "switch": "switch_z"}

# Names of tensors: ours -> the authors'. Those of experts are transposed.
_TOP = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "model.norm.bias": "transformer.ln_f.bias",
    "lm_head.weight": "lm_head.weight",
}
_LAYER = {
    "input_layernorm.weight": "ln_1.weight",
    "input_layernorm.bias": "ln_1.bias",
    "post_attention_layernorm.weight": "ln_2.weight",
    "post_attention_layernorm.bias": "ln_2.bias",
    "attention.k_proj.weight": "attn.k_proj.weight",
    "attention.k_proj.bias": "attn.k_proj.bias",
    "attention.v_proj.weight": "attn.v_proj.weight",
    "attention.v_proj.bias": "attn.v_proj.bias",
}
_EXPERTS = {
    "attention.experts.query_proj": "attn.q_proj.experts.weight",
    "attention.experts.output_proj": "attn.q_proj.output_experts.weight",
    "mlp.experts.up_proj": "mlpf.experts.weight",
    "mlp.experts.down_proj": "mlpf.output_experts.weight",
}
_GATES = {
    "mlp": {"weight": "w_gate.3.weight", "hidden_weight": "w_gate.0.weight", "hidden_bias": "w_gate.0.bias"},
    "linear": {"weight": "w_gate.0.weight"},
    "cosine": {"weight": "expert_centroids", "hidden_weight": "w_gate.weight", "log_scale_norm": "temperature"},
}
_BUFFERS = re.compile(r"\.attn\.(mask|cum_weight)$")  # the authors keep the causal mask with the weights


def moduleformer_config(data: Mapping[str, Any]) -> ModuleFormerConfig:
    """Our config for a `config.json` of the authors.

    Their loss is a sum over layers, ours a mean, so `aux_loss_weight` is multiplied by the number of layers. Their
    norms have an epsilon of 1e-5 and their attention no dropout, whatever the config says, so have ours.

    Args:
        data (`dict`):
            What the file holds.

    Raises:
        ValueError: where a size is missing, or a gate or loss is unknown.
    """
    missing = [name for name in _NEEDED if name not in data]
    if missing:
        raise ValueError(
            f"the config says nothing of {', '.join(f'`{name}`' for name in missing)}; it is not one of the authors' "
            "ModuleFormer, or it is incomplete."
        )
    kind, loss = data.get("gate_type", "mlp"), data.get("aux_loss_type", "mi")
    for name, value, known in (("gate_type", kind, _KINDS), ("aux_loss_type", loss, _LOSSES)):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
    if data["att_hidden"] == data["n_embd"] and data["n_head"] == 1:
        raise ValueError(
            f"with one head of the width of the model ({data['n_embd']}), the authors' attention has no projections "
            "of keys and values; this package has no such model."
        )
    if data.get("moe_pdrop"):
        logger.warning(
            f"`moe_pdrop` is {data['moe_pdrop']}: dropout inside the gates, in training. There is none here."
        )
    values = {ours: data[theirs] for theirs, ours in _CONFIG.items() if theirs in data}
    length = data.get("history_length", 512) + data.get("block_size", 512)
    return ModuleFormerConfig(
        **values,
        max_position_embeddings=length,
        router_kind=_KINDS[kind],
        router_aux=_LOSSES[loss],
        router_aux_loss_coef=data.get("aux_loss_weight", 0) * data["n_layer"],
    )


def convert_moduleformer_checkpoint(
    source: str | Path, *, dtype: torch.dtype | None = None
) -> ModuleFormerForCausalLM:
    """Read a checkpoint in the authors' layout.

    Args:
        source (`str`):
            Folder with `config.json` and the weights, as safetensors or as `pytorch_model*.bin`. Of a model on the
            Hub, `huggingface_hub.snapshot_download` gives one.
        dtype (`torch.dtype`, *optional*):
            Of the model; `None` is that of the weights.

    Returns:
        The model, in evaluation mode. What `save_pretrained` makes of it loads as any model of this package.

    Raises:
        FileNotFoundError: where the folder, its config or its weights are missing.
        ValueError: where config and weights do not fit; the message names the tensors.
    """
    folder = Path(source).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"`{folder}` is no folder with a `config.json`.")
    config = moduleformer_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    state: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        state |= load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    state = from_reference_state(state, config)
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    config.dtype = state["model.embed_tokens.weight"].dtype
    with torch.device("meta"):
        model = ModuleFormerForCausalLM(config)
    skipped = {"lm_head.weight"} if config.tie_word_embeddings else set()
    _check_fit({name: t for name, t in model.state_dict().items() if name not in skipped}, state, str(folder))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.config._name_or_path = str(source)
    return model.eval()


def from_reference_state(state: Mapping[str, torch.Tensor], config: ModuleFormerConfig) -> dict[str, torch.Tensor]:
    """Tensors by our names, from those by the authors' names. Their buffers of masks are left out, and the head where
    it is the embedding.

    Args:
        state (`dict`):
            The authors' state dict of a language model.
        config (`ModuleFormerConfig`):
            Of the model.

    Raises:
        ValueError: for a tensor that no ModuleFormer of this config has.
    """
    known = {theirs: (ours, flip) for ours, theirs, flip in _tensors(config)}
    found = {}
    for name, tensor in state.items():
        if _BUFFERS.search(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if name not in known:
            raise ValueError(f"`{name}` belongs to no language model with this config ({config.router_kind} gates).")
        ours, flip = known[name]
        found[ours] = tensor.transpose(1, 2).contiguous() if flip else tensor
    return found


def to_reference_state(model: ModuleFormerForCausalLM) -> dict[str, torch.Tensor]:
    """The tensors of a model by the authors' names and in their layout, for their code.

    Args:
        model (`ModuleFormerForCausalLM`):
            One whose layers all have the routers and the numbers of experts of its config.

    Raises:
        ValueError: for a model whose config declares something else in `moe_ext`.
    """
    if model.config.moe_ext is not None:
        raise ValueError("`moe_ext` of this model declares what the authors' code does not have.")
    state = model.state_dict()
    return {
        theirs: state[ours].transpose(1, 2).contiguous() if flip else state[ours]
        for ours, theirs, flip in _tensors(model.config)
        if ours in state
    }


def _tensors(config: ModuleFormerConfig) -> Iterator[tuple[str, str, bool]]:
    """(our name, the authors' name, whether it is transposed) of every tensor."""
    yield from ((ours, theirs, False) for ours, theirs in _TOP.items())
    gates = _GATES[config.router_kind].items()
    for number in range(config.num_hidden_layers):
        mine, other = f"model.layers.{number}", f"transformer.h.{number}"
        yield from ((f"{mine}.{ours}", f"{other}.{theirs}", False) for ours, theirs in _LAYER.items())
        yield from ((f"{mine}.{ours}", f"{other}.{theirs}", True) for ours, theirs in _EXPERTS.items())
        for place, where in (("attention", "attn.q_proj"), ("mlp", "mlpf")):
            yield from (
                (f"{mine}.{place}.gate.{ours}", f"{other}.{where}.gate.{theirs}", False) for ours, theirs in gates
            )


def _weight_files(folder: Path) -> list[Path]:
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    raise FileNotFoundError(f"`{folder}` has neither `model*.safetensors` nor `pytorch_model*.bin`.")


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state


def _check_fit(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], where: str) -> None:
    missing = [name for name in wanted if name not in found]
    shapes = [
        f"`{name}` has the shape {list(found[name].shape)}, the config says {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    problems = [f"`{name}` is missing" for name in missing] + shapes
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"the weights of `{where}` do not fit its config: {'; '.join(problems[:4])}{more}.")
