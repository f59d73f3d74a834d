"""Configuration of Monet."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedConfig


class MonetConfig(PreTrainedConfig):
    r"""Configuration of a [`MonetModel`]: a Llama whose feed-forward blocks are replaced by a great many tiny experts,
    composed of two sets of pieces. Monet (2412.04139). Names are those of the released checkpoints.

    Args:
        moe_dim (`int`, *optional*, defaults to 16):
            Width of one expert (m).
        moe_heads (`int`, *optional*, defaults to 8):
            Heads of the router; each chooses experts of its own (H).
        moe_experts (`int`, *optional*, defaults to 512):
            Pieces on each side (S): a layer has `moe_experts ** 2` experts.
        moe_topk (`int`, *optional*, defaults to 32):
            Pieces that a head keeps on the average (k): those above the quantile `1 - k/S` of a normal distribution.
        moe_groups (`int`, *optional*, defaults to 4):
            Layers that share a router, the first of which owns it.
        moe_decompose (`"vertical"` or `"horizontal"`, *optional*, defaults to `"vertical"`):
            How an expert is composed: halves of both layers of both pieces, or the first layer of one piece and the
            second of the other.
        router_aux_loss_coef (`float`, *optional*, defaults to 1e-3):
            Weight of the two losses of the router, in training.
        output_router_probs (`bool`, *optional*, defaults to `False`):
            Whether outputs have `router_probs`, the scores of the pieces.
        num_removed_experts (`list[int]`, *optional*):
            How many experts of each group of layers are removed (`set_expert_mask`); which, is saved with the weights.
        intermediate_size (`int`, *optional*):
            Not used.
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, hidden_act, ...:
            As in `LlamaConfig`. `hidden_act` is squared ReLU. An old `rope_theta` becomes `rope_parameters`.

    Raises:
        ValueError: for sizes that do not fit each other.
    """

    # Not a `LlamaConfig`, whose `intermediate_size` must be a number.
    model_type = "monet"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    default_theta = 10000.0

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "relu2"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    moe_dim: int = 16
    moe_heads: int = 8
    moe_experts: int = 512
    moe_topk: int = 32
    moe_groups: int = 4
    moe_decompose: Literal["vertical", "horizontal"] = "vertical"
    router_aux_loss_coef: float = 1e-3
    output_router_probs: bool = False
    num_removed_experts: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        for total, part in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
            if getattr(self, total) % getattr(self, part):
                raise ValueError(
                    f"`{total}` ({getattr(self, total)}) must be divisible by `{part}` ({getattr(self, part)})."
                )
        for name in ("moe_dim", "moe_heads", "moe_experts", "moe_topk", "moe_groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        if self.moe_topk >= self.moe_experts:
            raise ValueError(f"`moe_topk` ({self.moe_topk}) must be below `moe_experts` ({self.moe_experts}).")
        if self.moe_decompose not in ("vertical", "horizontal"):
            raise ValueError(f'`moe_decompose` must be "vertical" or "horizontal", got {self.moe_decompose!r}.')
        if self.moe_decompose == "vertical" and (self.moe_dim % 2 or self.hidden_size % 2):
            raise ValueError(
                f"the vertical decomposition halves experts and hidden states: `moe_dim` ({self.moe_dim}) and "
                f"`hidden_size` ({self.hidden_size}) must be even."
            )
        if self.router_aux_loss_coef < 0:
            raise ValueError(f"`router_aux_loss_coef` must be non-negative, got {self.router_aux_loss_coef}.")
        removed = self.num_removed_experts
        if removed is not None and len(removed) != self.num_router_groups:
            raise ValueError(
                f"`num_removed_experts` must have an entry for each of the {self.num_router_groups} groups of layers, "
                f"got {removed}."
            )
        if removed is not None and not all(0 <= count <= self.moe_experts**2 for count in removed):
            raise ValueError(f"`num_removed_experts` must be in [0, {self.moe_experts**2}], got {removed}.")

    @property
    def num_router_groups(self) -> int:
        """Groups of layers, each with a router."""
        return -(-self.num_hidden_layers // self.moe_groups)
