"""Configuration of ModuleFormer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from transformers import PreTrainedConfig

from .configuration_moe_ext import AttentionConfig, MoeExtension, RouterConfig


# Auxiliary loss of all routers -> weights of the losses of a router, for a weight of 1. The z-loss beside the
# load-balancing loss has a tenth of its weight in the authors' code.
_LOSSES: dict[str, dict[str, float]] = {
    "information": {"information_coef": 1.0},
    "switch_z": {"balance_coef": 1.0, "z_coef": 0.1},
    "concentration": {"concentration_coef": 1.0},
}

# Sizes in the config of the authors' release. Taken for unknown keys, they would leave the defaults in place.
_AUTHORS_NAMES = {"n_embd", "n_layer", "n_head", "att_hidden", "ffd_hidden", "n_att_experts", "n_mlp_experts"}


class ModuleFormerConfig(PreTrainedConfig):
    r"""Configuration of a [`ModuleFormerModel`]: a decoder whose attention and feed-forward blocks are mixtures of
    experts, with stick-breaking attention. ModuleFormer (2306.04640). Defaults are those of the authors' code.

    Args:
        vocab_size (`int`, *optional*, defaults to 50295):
            Size of the vocabulary.
        hidden_size (`int`, *optional*, defaults to 1024):
            Width of the residual stream.
        num_hidden_layers (`int`, *optional*, defaults to 24):
            Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of one attention expert, and of the keys and values that all experts share.
        attention_hidden_size (`int`, *optional*, defaults to 512):
            Width of all heads together.
        intermediate_size (`int`, *optional*, defaults to 2048):
            Width of one feed-forward expert.
        hidden_act (`str`, *optional*, defaults to `"gelu_new"`):
            Activation of the feed-forward experts. That of the routers is GELU.
        moa_num_experts, mlp_num_experts (`int`, *optional*, default to 32):
            Experts of a layer's attention, and of its feed-forward block.
        moa_top_k, mlp_top_k (`int`, *optional*, default to 2):
            How many of them a token uses.
        router_kind (`"mlp"`, `"linear"` or `"cosine"`, *optional*, defaults to `"mlp"`):
            Logits of the routers: of two layers, of one, or cosines in `router_hidden_size` dimensions over a learned
            temperature.
        router_hidden_size (`int`, *optional*, defaults to 256):
            Width inside the routers of the kinds `"mlp"` and `"cosine"`.
        router_aux (`"information"`, `"switch_z"` or `"concentration"`, *optional*, defaults to `"information"`):
            Auxiliary loss of every router: minus the mutual information of tokens and experts; load balancing and a
            tenth of the z-loss; or the entropy of the mean load, which lets a task use few experts, for fine-tuning
            before pruning.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.0):
            Its weight. It is a mean over layers, apart for attention and feed-forward blocks; 1e-3 times the number of
            layers is the sum of the authors' code with the weight 1e-3.
        sample_top_k (`int`, *optional*, defaults to 0):
            In training, so many of the experts of a token are drawn at random, by their probability, from those that
            are not among its best.
        attention_dropout, resid_dropout, embed_dropout (`float`, *optional*, default to 0.0):
            Dropout of attention weights, of what the blocks add to the stream, and of the embeddings.
        max_position_embeddings (`int`, *optional*, defaults to 2048):
            Length of the training sequences. Nothing depends on it: there are no position embeddings.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5), initializer_range (`float`, *optional*, defaults to
            0.02), tie_word_embeddings (`bool`, *optional*, defaults to `False`), use_cache (`bool`, *optional*,
            defaults to `True`):
            As in other models.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether outputs have `router_logits` and `attn_router_logits`.
        moe_ext (`dict`, *optional*):
            A [`MoeExtension`] in place of the routers above, or for single layers whose numbers of experts differ.

    Raises:
        ValueError: for sizes that do not fit each other, and for the names of the authors' release.
    """

    model_type = "moduleformer"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"num_key_value_heads": "num_attention_heads"}

    vocab_size: int = 50295
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    attention_hidden_size: int = 512
    intermediate_size: int = 2048
    hidden_act: str = "gelu_new"
    moa_num_experts: int = 32
    moa_top_k: int = 2
    mlp_num_experts: int = 32
    mlp_top_k: int = 2
    router_kind: Literal["mlp", "linear", "cosine"] = "mlp"
    router_hidden_size: int = 256
    router_aux: Literal["information", "switch_z", "concentration"] = "information"
    router_aux_loss_coef: float = 0.0
    sample_top_k: int = 0
    attention_dropout: float = 0.0
    resid_dropout: float = 0.0
    embed_dropout: float = 0.0
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    output_router_logits: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    moe_ext: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        foreign = sorted(_AUTHORS_NAMES & kwargs.keys())
        if foreign:
            raise ValueError(
                f"the config has `{foreign[0]}`, a name of the authors' release, whose weights have another layout, "
                "too. `hf_moe_ext.moduleformer_checkpoint.convert_moduleformer_checkpoint(folder)` reads both."
            )
        super().__post_init__(**kwargs)
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "attention_hidden_size")
        for name in (*sizes, "intermediate_size", "router_hidden_size", "moa_top_k", "mlp_top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.attention_hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`attention_hidden_size` ({self.attention_hidden_size}) must be divisible by `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        for name in ("moa", "mlp"):
            top_k, count = getattr(self, f"{name}_top_k"), getattr(self, f"{name}_num_experts")
            if top_k > count:
                raise ValueError(f"`{name}_top_k` ({top_k}) must not exceed `{name}_num_experts` ({count}).")
            if not 0 <= self.sample_top_k <= top_k:
                raise ValueError(f"`sample_top_k` must be in [0, {name}_top_k={top_k}], got {self.sample_top_k}.")
        if self.router_aux not in _LOSSES:
            raise ValueError(f"`router_aux` must be one of {', '.join(_LOSSES)}, got {self.router_aux!r}.")
        if self.router_aux_loss_coef < 0:
            raise ValueError(f"`router_aux_loss_coef` must be non-negative, got {self.router_aux_loss_coef}.")
        if self.moe_ext is not None:
            self.moe_ext = MoeExtension.from_dict(self.moe_ext).to_dict()

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.attention_hidden_size // self.num_attention_heads

    @property
    def num_experts_per_tok(self) -> int:
        """Feed-forward experts that a token uses."""
        return self.mlp_top_k

    def extension(self) -> MoeExtension:
        """The routers of this model as a declaration: those of `moe_ext` where it names any, else the configured
        ones."""
        losses = {name: weight * self.router_aux_loss_coef for name, weight in _LOSSES[self.router_aux].items()}
        router = {"type": "top_k", "sample_slots": self.sample_top_k, **losses}
        declared = MoeExtension.from_dict(self.moe_ext or {})
        declared.router = declared.router or RouterConfig.from_dict(router)
        attention = declared.attention or AttentionConfig.from_dict({"type": "routed"})
        declared.attention = _with_router(attention, router)
        for part in declared.layers.values():
            if part is not None and part.attention is not None:
                part.attention = _with_router(part.attention, router)
        return declared


def _with_router(attention: Any, router: dict[str, Any]) -> AttentionConfig:
    """The configured router where a declaration of attention names none, which is plain top-k."""
    plain = attention.type == "routed" and attention.router.to_dict() == {"type": "top_k"}
    filled: AttentionConfig = replace(attention, router=RouterConfig.from_dict(router)) if plain else attention
    return filled
