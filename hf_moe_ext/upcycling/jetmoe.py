"""Dense models to JetMoE, and what its checkpoints and its training need.

"JetMoE: Reaching Llama2 Performance with 0.1M Dollars" (2404.07413). JetMoE is a stock architecture: the result loads
without this package, and with it gets routers and auxiliary losses (`jetmoe_extension`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm
from transformers import JetMoeConfig, JetMoeForCausalLM, PreTrainedModel
from transformers.utils import logging

from ..modeling.attention_routed import RoutedAttentionConfig
from ..modeling.configuration_moe_ext import MoeExtension
from ..modeling.router_top_k import TopKRouterConfig
from ..patching import describe
from .live import load_dense
from .methods import derive_seed, register_model_method
from .plan import require_dense
from .report import UpcycleReport, check_inputs, compare, outputs, rounding_tolerance


logger = logging.get_logger(__name__)

# Names of the authors' first checkpoints -> those of Transformers.
_OLD_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "ffd_hidden": "intermediate_size",
    "moe_num_experts": "num_local_experts",
    "moe_top_k": "num_experts_per_tok",
    "resid_pdrop": None,
    "embd_pdrop": None,
    "glu": None,
    "bias": None,
    "moe_type": None,
    "gate_type": None,
}
_NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok")
_NORM_EPS = 1e-6  # of every norm inside the layers, whatever the config says


def jetmoe_config(data: dict[str, Any]) -> JetMoeConfig:
    """The config of a JetMoE checkpoint, also where its keys have the names of the authors' first release. The stock
    class takes no notice of those and falls back to its defaults, 12 layers.

    Args:
        data (`dict`):
            What `config.json` holds.

    Raises:
        ValueError: where sizes are missing, or an old and a new name disagree.
    """
    values: dict[str, Any] = {}
    for name, value in data.items():
        target = _OLD_NAMES.get(name, name)
        if target is None:
            continue
        if values.get(target, value) != value:
            raise ValueError(f"`{name}` is {value!r}, but `{target}` is {values[target]!r}; remove one of them.")
        values[target] = value
    missing = [name for name in _NEEDED if name not in values]
    if missing:
        raise ValueError(
            f"the config says nothing of {', '.join(f'`{name}`' for name in missing)}; the defaults of the class "
            "would not fit the weights. Add them."
        )
    if "rope_theta" in values and "rope_parameters" not in values:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    for name in ("architectures", "model_type", "auto_map", "transformers_version"):
        values.pop(name, None)
    return JetMoeConfig(**values)


def jetmoe_extension(config: JetMoeConfig, coef: float | None = None) -> MoeExtension:
    """Routers of both mixtures with the auxiliary loss of the authors' code: `E sum_i f_i P_i + 0.1 mean logsumexp^2`,
    with `f` summing to 1, summed over all routers, times `coef`. Padding does not count, nor does evaluation.

    Args:
        config (`JetMoeConfig`):
            Of the model.
        coef (`float`, *optional*):
            Its weight; `None` is `config.aux_loss_coef`, 0.01 in the authors' code.

    Example:
        ```python
        >>> model = extend(JetMoeForCausalLM.from_pretrained(folder), jetmoe_extension(config))
        ```
    """
    coef = config.aux_loss_coef if coef is None else coef
    # Losses are means over layers here, and `f` of the load-balancing loss sums to k.
    total = coef * config.num_hidden_layers
    losses = {"balance_coef": total / config.num_experts_per_tok, "z_coef": 0.1 * total}
    attention = RoutedAttentionConfig(router=TopKRouterConfig(**losses))
    return MoeExtension(router=TopKRouterConfig(**losses), attention=attention)


@register_model_method("jetmoe")
def upcycle_to_jetmoe(
    dense: PreTrainedModel | str | Path,
    *,
    num_experts: int = 1,
    num_experts_per_tok: int = 1,
    mlp: Literal["split", "copy"] = "split",
    seed: int = 0,
    check: bool = True,
) -> JetMoeForCausalLM:
    """Make a JetMoE of a dense model with grouped-query attention, keeping its function.

    With K heads of keys and values and G query heads for each, attention expert e takes the query heads
    `{kv * G + e}`: G experts are the dense attention. Their gates are equal, 1/G, so output projections are multiplied
    by G. Further copies have a row of the router of their own, which their G experts share: top-k then takes whole
    copies, and the result is exact for any router.

    Args:
        dense (`PreTrainedModel` or `str`):
            A causal language model with the layout of llama: gated blocks with SiLU, no biases, no norms of queries
            and keys, full attention.
        num_experts (`int`, *optional*, defaults to 1):
            Copies of every block. The model has G times as many experts.
        num_experts_per_tok (`int`, *optional*, defaults to 1):
            Copies that a token uses.
        mlp (`"split"` or `"copy"`, *optional*, defaults to `"split"`):
            Whether the G feed-forward experts of a copy are slices of the dense block, which cost together what it
            costs, or whole copies of it.
        seed (`int`, *optional*, defaults to 0):
            Of the routers.
        check (`bool`, *optional*, defaults to `True`):
            Compare the logits of both models on a random batch.

    Returns:
        The stock model, with an `UpcycleReport` as its attribute `upcycle_report`.

    Raises:
        ValueError: for a model that JetMoE cannot express, with the reason.
    """
    if isinstance(dense, (str, Path)):
        dense = load_dense(dense)
    for name, value in (("num_experts", num_experts), ("num_experts_per_tok", num_experts_per_tok)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    if num_experts_per_tok > num_experts:
        raise ValueError(
            f"`num_experts_per_tok` ({num_experts_per_tok}) must not exceed `num_experts` ({num_experts})."
        )
    if mlp not in ("split", "copy"):
        raise ValueError(f'`mlp` must be "split" or "copy", got {mlp!r}.')
    group = _require_expressible(dense)
    width = dense.config.intermediate_size
    if mlp == "split" and width % group:
        raise ValueError(
            f'the feed-forward blocks are {width} wide, which {group} experts cannot share alike. Use `mlp="copy"`.'
        )
    config = _config(
        dense.config, group, num_experts, num_experts_per_tok, width // group if mlp == "split" else width
    )
    with torch.device("meta"):
        model = JetMoeForCausalLM(config).to(dense.dtype)
    state = {
        "model.embed_tokens.weight": dense.model.embed_tokens.weight.detach().clone(),
        "model.norm.weight": dense.model.norm.weight.detach().clone(),
    }
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = dense.lm_head.weight.detach().clone()
    for number, layer in enumerate(tqdm(dense.model.layers, desc="Upcycling", unit="layer")):
        for name, tensor in _convert(layer, config, group, mlp, derive_seed(seed, str(number))).items():
            state[f"model.layers.{number}.{name}"] = tensor
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(dense.device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, left
    model.train(dense.training)
    description = describe(model)
    report = UpcycleReport(
        "jetmoe",
        {"mlp": mlp},
        str(dense.config._name_or_path or ""),
        type(dense).__name__,
        type(model).__name__,
        "stock",
        config.num_local_experts,
        config.num_experts_per_tok,
        [str(number) for number in range(config.num_hidden_layers)],
        seed=seed,
        parameters_before=sum(p.numel() for p in dense.parameters()),
        parameters_after=description.parameters,
        active_parameters=description.active_parameters,
    )
    if check:
        batch = check_inputs(dense, seed)
        difference = compare(outputs(dense, batch)[0], outputs(model, batch)[0], logits=True)
        report.record("logits", difference, rounding_tolerance(model.dtype))
    model.upcycle_report = report
    logger.info(str(report))
    return model


def _require_expressible(dense: PreTrainedModel) -> int:
    """The number of query heads for each head of keys, G.

    Raises:
        ValueError: where JetMoE has no place for something that the model has.
    """
    require_dense(dense)
    config: Any = dense.config
    layer = dense.model.layers[0] if hasattr(getattr(dense, "model", None), "layers") else None
    attention, block = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    linears = [getattr(attention, f"{name}_proj", None) for name in "qkvo"]
    linears += [getattr(block, f"{name}_proj", None) for name in ("gate", "up", "down")]
    rope = getattr(config, "rope_parameters", None) or {}
    known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    reasons = (
        (not hasattr(dense, "lm_head"), "it has no language-modelling head"),
        (any(not isinstance(linear, torch.nn.Linear) for linear in linears), "its layers are not laid out as llama's"),
        (any(getattr(linear, "bias", None) is not None for linear in linears), "its projections have biases"),
        (layer is not None and {name for name, _ in layer.named_children()} != known, "its layers have further norms"),
        (
            attention is not None and any(hasattr(attention, n) for n in ("q_norm", "k_norm")),
            "it has norms of queries",
        ),
        (getattr(config, "hidden_act", None) not in ("silu", "swish"), "its activation is not SiLU"),
        (rope.get("rope_type", "default") != "default", f"its RoPE is of the type {rope.get('rope_type')!r}"),
        (rope.get("partial_rotary_factor", 1.0) != 1.0, "its RoPE turns part of a head only"),
        (_windows(config), "its attention has a sliding window"),
        (
            abs(getattr(config, "rms_norm_eps", _NORM_EPS) - _NORM_EPS) > 1e-12,
            f"`rms_norm_eps` is {getattr(config, 'rms_norm_eps', None)}, and JetMoE has {_NORM_EPS} in every layer",
        ),
        (any(hasattr(config, n) for n in ("embedding_multiplier", "logit_scale")), "it scales embeddings or logits"),
    )
    for found, reason in reasons:
        if found:
            raise ValueError(f"{type(dense).__name__} cannot become a JetMoE: {reason}.")
    return int(config.num_attention_heads // config.num_key_value_heads)


def _windows(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or ()
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def _config(config: Any, group: int, copies: int, used: int, width: int) -> JetMoeConfig:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return JetMoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_key_value_heads=config.num_key_value_heads,
        kv_channels=head_dim,
        intermediate_size=width,
        max_position_embeddings=config.max_position_embeddings,
        num_local_experts=group * copies,
        num_experts_per_tok=group * used,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters=dict(config.rope_parameters),
        rms_norm_eps=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        attention_dropout=config.attention_dropout,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


@torch.no_grad()
def _convert(layer: Any, config: JetMoeConfig, group: int, mlp: str, seed: int) -> dict[str, torch.Tensor]:
    """The tensors of one layer, by their names in it."""
    attention, block = layer.self_attn, layer.mlp
    copies, heads, size = config.num_local_experts // group, config.num_key_value_heads, config.kv_channels
    hidden = config.hidden_size
    # Query head kv * G + e belongs to expert e.
    query = attention.q_proj.weight.view(heads, group, size, hidden).transpose(0, 1).reshape(group, -1, hidden)
    out = attention.o_proj.weight.view(hidden, heads, group, size).permute(2, 0, 1, 3).reshape(group, hidden, -1)
    gate, up, down = (getattr(block, f"{name}_proj").weight for name in ("gate", "up", "down"))
    if mlp == "split":
        gate, up = gate.unflatten(0, (group, -1)), up.unflatten(0, (group, -1))
        down = group * down.unflatten(1, (group, -1)).transpose(0, 1)
    else:
        gate, up, down = (weight.expand(group, -1, -1) for weight in (gate, up, down))
    generator = torch.Generator().manual_seed(seed)
    routers = 0.02 * torch.randn(2, copies, hidden, generator=generator)
    tensors = {
        "input_layernorm.weight": layer.input_layernorm.weight,
        "post_attention_layernorm.weight": layer.post_attention_layernorm.weight,
        "self_attention.kv_proj.weight": torch.cat([attention.k_proj.weight, attention.v_proj.weight]),
        "self_attention.experts.bias": query.new_zeros(hidden),
        "self_attention.experts.input_linear.weight": query.repeat(copies, 1, 1),
        "self_attention.experts.output_linear.weight": (group * out).repeat(copies, 1, 1),
        "self_attention.experts.router.layer.weight": routers[0].repeat_interleave(group, 0).to(query),
        "mlp.bias": query.new_zeros(hidden),
        "mlp.input_linear.weight": torch.cat([gate, up], dim=1).repeat(copies, 1, 1),
        "mlp.output_linear.weight": down.repeat(copies, 1, 1),
        "mlp.router.layer.weight": routers[1].repeat_interleave(group, 0).to(query),
    }
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def load_jetmoe(folder: str | Path, **options: Any) -> JetMoeForCausalLM:
    """`JetMoeForCausalLM.from_pretrained` for a folder whose config has the names of the authors' first release.

    Args:
        folder (`str`):
            Folder with safetensors.
        options:
            As in `from_pretrained`.

    Raises:
        ValueError: where the config lacks a size.
    """
    data, _ = JetMoeConfig.get_config_dict(folder)
    return JetMoeForCausalLM.from_pretrained(folder, config=jetmoe_config(data), **options)
