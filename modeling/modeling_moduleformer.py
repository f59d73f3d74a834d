"""ModuleFormer: attention and feed-forward blocks are both mixtures of experts, with stick-breaking attention.

"ModuleFormer: Modularity Emerges from Mixture-of-Experts" (2306.04640). The experts of the feed-forward
block are those of the other models here, so the kernels and `experts_implementation` work; all gates have routers of
this package, so records, auxiliary losses, metrics and the trainer work as for extended stock models.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_moduleformer import ModuleFormerConfig
from .moe_compat import CACHE, causal_mask
from .moe_expert_linear import expert_linear
from .moe_experts import DEFAULT_IMPLEMENTATION, MoeExtBlock, MoeExtExperts
from .moe_families import get_family
from .moe_routed_model import RoutedModel, routed
from .moe_structure import apply_plans, plan_extension
from .moe_zoo import TopKRouter  # noqa: F401  (registers routers and parts)
from .stick_breaking import stick_breaking_attention_forward


class ModuleFormerGate(nn.Module):
    """Gate of a mixture: softmax of its logits, the k best experts, weights not renormalised. Returns `(L, W, I)`.

    Logits (T, E) are `A gelu(B x + b)` (`"mlp"`; the paper writes ReLU, the authors' code has GELU), `A x`
    (`"linear"`), or cosines of `B x` and the rows of A times a learned scale (`"cosine"`). A is `weight`, B is
    `hidden_weight`.
    """

    moe_not_per_expert = ("hidden_weight", "hidden_bias")

    def __init__(self, config: ModuleFormerConfig, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.kind = num_experts, top_k, config.router_kind
        width = config.hidden_size if self.kind == "linear" else config.router_hidden_size
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        if self.kind != "linear":
            self.hidden_weight = nn.Parameter(torch.empty(width, config.hidden_size))
        if self.kind == "mlp":
            self.hidden_bias = nn.Parameter(torch.empty(width))
        if self.kind == "cosine":
            # The logarithm of the scale. `norm` in its name keeps it out of weight decay.
            self.log_scale_norm = nn.Parameter(torch.empty(1))

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(T, H) -> (T, E); with `rows` (R, width) in place of A, (T, R)."""
        rows = self.weight if rows is None else rows
        if self.kind == "linear":
            return F.linear(hidden, rows)
        if self.kind == "mlp":
            return F.linear(F.gelu(F.linear(hidden, self.hidden_weight, self.hidden_bias)), rows)
        tokens = F.normalize(F.linear(hidden, self.hidden_weight).float(), dim=-1)
        return F.linear(tokens, F.normalize(rows.float(), dim=-1)) * self.log_scale_norm.float().exp()

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self.logits(hidden_states.reshape(-1, hidden_states.shape[-1]))
        weights, index = logits.float().softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits, weights, index


class ModuleFormerAttentionExperts(nn.Module):
    """What the attention experts of a layer own: `query_proj` (E, A, H) and `output_proj` (E, H, A)."""

    def __init__(self, num_experts: int, hidden_size: int, attention_hidden_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.query_proj = nn.Parameter(torch.empty(num_experts, attention_hidden_size, hidden_size))
        self.output_proj = nn.Parameter(torch.empty(num_experts, hidden_size, attention_hidden_size))

    def queries(self, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """(T, H), (T, K) -> (T, K, A), 0 in unused slots."""
        rows = hidden.repeat_interleave(index.shape[1], dim=0)
        return expert_linear(rows, index.flatten(), self.query_proj).unflatten(0, index.shape)

    def outputs(self, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """(T, K, A), (T, K), (T, K) -> (T, H): the weighted sum over the slots."""
        out = expert_linear(rows.flatten(0, 1), index.flatten(), self.output_proj).unflatten(0, index.shape)
        return (out * weights[..., None].to(torch.promote_types(out.dtype, weights.dtype))).sum(1).to(out.dtype)


class ModuleFormerAttention(nn.Module):
    """Mixture of attention experts over shared keys and values: each expert of a token has queries and an output
    projection of its own. The cache holds the shared keys and values only."""

    def __init__(self, config: ModuleFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling, self.is_causal = config.head_dim, config.head_dim**-0.5, True
        width = config.attention_hidden_size
        self.gate = ModuleFormerGate(config, config.moa_num_experts, config.moa_top_k)
        self.experts = ModuleFormerAttentionExperts(config.moa_num_experts, config.hidden_size, width)
        self.k_proj = nn.Linear(config.hidden_size, width)
        self.v_proj = nn.Linear(config.hidden_size, width)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        rows = hidden_states.flatten(0, 1)
        _, weights, index = self.gate(rows)
        slots, heads = index.shape[1], self.config.num_attention_heads
        # Heads in the order [key head, slot], so that grouped attention gives every slot the head of its keys.
        query = self.experts.queries(rows, index).view(batch, length, slots, heads, self.head_dim)
        query = query.permute(0, 3, 2, 1, 4).flatten(1, 2)
        shape = (batch, length, heads, self.head_dim)
        key, value = self.k_proj(hidden_states).view(shape), self.v_proj(hidden_states).view(shape)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, stick_breaking_attention_forward
        )
        self.num_key_value_groups = slots
        dropout = self.config.attention_dropout if self.training else 0.0
        out, shares = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)
        out = out.view(batch, length, heads, slots, self.head_dim).transpose(2, 3).reshape(batch * length, slots, -1)
        return self.experts.outputs(out, index, weights).view(hidden_states.shape), shares


class ModuleFormerLayer(GradientCheckpointingLayer):
    """`x += MoA(LN1 x)`, `x += MoE(LN2 x)`."""

    def __init__(self, config: ModuleFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ModuleFormerAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        gate: Any = ModuleFormerGate(config, config.mlp_num_experts, config.mlp_top_k)
        sizes = (config.mlp_num_experts, config.hidden_size, config.intermediate_size)
        experts = MoeExtExperts(config, *sizes, activation=ACT2FN[config.hidden_act], has_gate=False)
        self.mlp = MoeExtBlock(gate, experts)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, shares = self.attention(self.input_layernorm(hidden_states), attention_mask, cache, **kwargs)
        hidden_states = hidden_states + self.dropout(out)
        hidden_states = hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        return hidden_states, shares


class ModuleFormerPreTrainedModel(RoutedModel, PreTrainedModel):
    """Base of the ModuleFormer models."""

    config_class = ModuleFormerConfig
    config: ModuleFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    moe_is_base = False
    moe_written_by = "ModuleFormer"
    _no_split_modules = ["ModuleFormerLayer"]
    _supports_attention_backend = False
    _can_compile_fullgraph = True

    def __init__(self, config: ModuleFormerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config._experts_implementation is None:
            config._experts_implementation = DEFAULT_IMPLEMENTATION

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, ModuleFormerGate):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.kind != "linear":
                init.normal_(module.hidden_weight, mean=0.0, std=std)
            if module.kind == "mlp":
                init.zeros_(module.hidden_bias)
            if module.kind == "cosine":
                init.zeros_(module.log_scale_norm)
        elif isinstance(module, ModuleFormerAttentionExperts):
            for weight in (module.query_proj, module.output_proj):
                init.uniform_(weight, -1 / weight.shape[2], 1 / weight.shape[2])

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the code that is needed to load the model travels along."""
        self.config.auto_map = dict(_AUTO_MAP)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def initialize_weights(self) -> None:
        """As other routed models, and the feed-forward experts uniform in `±1 / fan_in`, as in the authors' code."""
        super().initialize_weights()
        with init.guard_torch_init_functions():
            for module in self.modules():
                if isinstance(module, MoeExtExperts):
                    for weight in (module.up_proj, module.down_proj):
                        init.uniform_(weight, -1 / weight.shape[2], 1 / weight.shape[2])


@routed
class ModuleFormerModel(ModuleFormerPreTrainedModel):
    """The decoder without a head."""

    moe_is_base = True

    def __init__(self, config: ModuleFormerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList([ModuleFormerLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        family = get_family("moduleformer")
        assert family is not None
        apply_plans(self, family, plan_extension(self, family, config.extension(), building=True))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`.")
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None] + past
        assert position_ids is not None
        mask = causal_mask(self.config, hidden, attention_mask, cache, position_ids)
        hidden = self.dropout(hidden)
        states, shares = [], []
        for layer in self.layers:
            states.append(hidden)
            hidden, share = layer(hidden, attention_mask=mask, cache=cache, output_attentions=output_attentions)
            shares.append(share)
        hidden = self.norm(hidden)
        return MoeModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(shares) if output_attentions else None,
            **{CACHE: cache if use_cache else None},
        )


@routed
class ModuleFormerForCausalLM(ModuleFormerPreTrainedModel, GenerationMixin):
    """ModuleFormer with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ModuleFormerConfig) -> None:
        super().__init__(config)
        self.model = ModuleFormerModel(config)
        self.moe_link = self.model.moe_link
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


@routed
class ModuleFormerForSequenceClassification(GenericForSequenceClassification, ModuleFormerPreTrainedModel):
    """ModuleFormer with a classification head on the last token."""

    def __init__(self, config: ModuleFormerConfig) -> None:
        super().__init__(config)
        self.moe_link = self.model.moe_link


_HEADS = {
    AutoModel: ModuleFormerModel,
    AutoModelForCausalLM: ModuleFormerForCausalLM,
    AutoModelForSequenceClassification: ModuleFormerForSequenceClassification,
}
# One module for config and models: registries of routers would exist twice otherwise.
_AUTO_MAP = {
    "AutoConfig": f"{__name__.rpartition('.')[2]}.ModuleFormerConfig",
    **{auto.__name__: f"{__name__.rpartition('.')[2]}.{model.__name__}" for auto, model in _HEADS.items()},
}
for _auto, _model in _HEADS.items():
    _model.register_for_auto_class(_auto.__name__)
    if not __name__.startswith("transformers_modules"):
        _auto.register(ModuleFormerConfig, _model, exist_ok=True)
