"""Monet: a Llama with up to a quarter of a million tiny experts in each layer, to be read and removed one by one.

"Monet: Mixture of Monosemantic Experts for Transformers" (2412.04139). Checkpoints of the authors load under their own
names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from .configuration_monet import MonetConfig
from .moe_compat import CACHE, causal_mask
from .moe_context import RoutingLink
from .moe_routed_model import OwnExperts, RoutedModel, routed
from .moe_structure import connect
from .monet_experts import (
    EXPERTS,
    MonetBatchNorm,
    MonetExperts,
    MonetRouter,
    ambiguity_loss,
    uniformity_loss,
)


Scores = tuple[torch.Tensor, torch.Tensor]


@dataclass
class MonetModelOutput(BaseModelOutputWithPast):
    """Output of [`MonetModel`]; `router_probs` are the scores (B, S, heads, pieces) of both sides for each group."""

    router_probs: tuple[Scores, ...] | None = None


@dataclass
class MonetCausalLMOutput(CausalLMOutputWithPast):
    """Output of [`MonetForCausalLM`]; `router_probs` as in [`MonetModelOutput`]."""

    aux_loss: torch.Tensor | None = None
    router_probs: tuple[Scores, ...] | None = None


class MonetLayer(GradientCheckpointingLayer):
    """A Llama layer with Monet's experts. The first of each group of layers owns the router; the scores go from layer
    to layer as arguments and results."""

    def __init__(self, config: MonetConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        group, place = divmod(layer_idx, config.moe_groups)
        self.router = MonetRouter(config, group) if place == 0 else None
        self.moe = EXPERTS[config.moe_decompose](config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        scores: Scores | None = None,
        token_mask: torch.Tensor | None = None,
        removed: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Scores, torch.Tensor | None, Any]:
        attended, weights, *_ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states).flatten(0, 1)
        statistics = None
        if self.router is not None:
            *found, statistics = self.router(normed, token_mask)
            scores = (found[0], found[1])
        assert scores is not None
        out = self.moe(normed, *scores, removed)
        return hidden_states + out.view(hidden_states.shape), scores, statistics, weights


class MonetPreTrainedModel(RoutedModel, PreTrainedModel):
    """Base of the Monet models."""

    config_class = MonetConfig
    config: MonetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    moe_is_base = False
    moe_written_by = "Monet"
    _no_split_modules = ["MonetLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["norm1", "norm2"]
    # A count that nothing reads; converted checkpoints may lack it.
    _keys_to_ignore_on_load_missing = [r"router\.norm[12]\.num_batches_tracked"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MonetExperts):
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("b"):
                    init.zeros_(parameter)
        elif isinstance(module, MonetBatchNorm):
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, MonetRouter):
            init.zeros_(module.removed_experts)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the code that is needed to load the model travels along."""
        self.config.auto_map = dict(_AUTO_MAP)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Called at the end of loading. A mask that is lost or damaged must not bring removed experts back unseen."""
        found = [*loading_info.unexpected_keys, *(key for key, *_ in loading_info.mismatched_keys)]
        untold = sorted(key for key in found if key.endswith(".removed_experts"))
        if untold:
            loading_info.mismatched_keys.clear()  # transformers would raise for these in place of the message below
            raise ValueError(
                f"the checkpoint `{self.config.name_or_path}` holds removed experts, `{untold[0]}`, that do not fit "
                f"`num_removed_experts` of its config, {self.config.num_removed_experts}. Its config.json was "
                "changed; save or download it again."
            )
        super()._adjust_missing_and_unexpected_keys(loading_info)
        for group, router in enumerate(self.routers):
            problem = router.mask_problem()
            if problem is not None:
                raise ValueError(
                    f"the removed experts of group {group} in the checkpoint `{self.config.name_or_path}` are "
                    f"damaged: {problem}. Save or download it again."
                )

    @property
    def routers(self) -> list[MonetRouter]:
        """The routers, one for each group of layers."""
        return [module for module in self.modules() if isinstance(module, MonetRouter)]

    def own_experts(self) -> list[OwnExperts]:
        """Routers and experts by layer. The layers of a group have one router, that of the first."""
        layers = [module for module in self.modules() if isinstance(module, MonetLayer)]
        pairs = zip(layers, (router for router in self.routers for _ in range(self.config.moe_groups)), strict=False)
        return [
            OwnExperts(str(number), layer, router, layer.moe, layer.moe.pieces**2)
            for number, (layer, router) in enumerate(pairs)
        ]

    @torch.no_grad()
    def set_expert_mask(self, group: int, experts: torch.Tensor | Iterable[int] | Iterable[tuple[int, int]]) -> None:
        """Remove experts from all layers of a group: their scores become 0, and nothing is renormalised. In place of
        those that were removed before. The mask is saved with the model.

        Args:
            group (`int`):
                Which group of layers, from 0.
            experts:
                Numbers `i * moe_experts + j`, or pairs `(i, j)`. Empty to remove none.

        Raises:
            ValueError: for a group or an expert that does not exist.
        """
        routers, pieces = self.routers, self.config.moe_experts
        if not 0 <= group < len(routers):
            raise ValueError(f"this model has the groups 0 to {len(routers) - 1}, got {group}.")
        numbers = torch.as_tensor(experts if isinstance(experts, torch.Tensor) else list(experts))
        if numbers.numel() and (numbers.is_floating_point() or numbers.dtype == torch.bool):
            raise ValueError(f"experts are whole numbers or pairs of them, got {numbers.dtype}.")
        numbers = numbers.long()
        if numbers.dim() == 2 and numbers.shape[1] == 2:
            if numbers.numel() and not (0 <= int(numbers.min()) and int(numbers.max()) < pieces):
                raise ValueError(f"pieces are 0 to {pieces - 1}, got {int(numbers.min())} to {int(numbers.max())}.")
            numbers = numbers[:, 0] * pieces + numbers[:, 1]
        elif numbers.dim() != 1:
            raise ValueError(f"experts must be numbers or pairs, got a tensor of shape {tuple(numbers.shape)}.")
        if numbers.numel() and not (0 <= int(numbers.min()) and int(numbers.max()) < pieces**2):
            raise ValueError(f"experts are 0 to {pieces**2 - 1}, got {int(numbers.min())} to {int(numbers.max())}.")
        router = routers[group]
        router.remove(numbers.unique().to(router.removed_experts.device))
        counts = [other.removed_experts.numel() for other in routers]
        self.config.num_removed_experts = counts if any(counts) else None

    def clear_expert_masks(self) -> None:
        """Let every expert take part again."""
        for group in range(len(self.routers)):
            self.set_expert_mask(group, [])


@routed
class MonetModel(MonetPreTrainedModel):
    """The decoder without a head."""

    moe_is_base = True

    def __init__(self, config: MonetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MonetLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        connect(self, RoutingLink())
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
        output_router_probs: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> MonetModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`.")
        config = self.config
        cache = past_key_values if cache is None else cache
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        output_router_probs = config.output_router_probs if output_router_probs is None else output_router_probs
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None] + past
        assert position_ids is not None
        mask = causal_mask(config, hidden, attention_mask, cache, position_ids)
        embeddings = self.rotary_emb(hidden, position_ids)
        context = self.moe_link.slots.context
        token_mask = None if context is None else context.token_mask(hidden.shape[0] * hidden.shape[1])
        states, attentions = [], []
        groups: list[Scores] = []
        scores: Scores | None = None
        removed: torch.Tensor | None = None
        for layer in self.layers:
            states.append(hidden)
            if layer.router is not None:
                removed = layer.router.removed_experts
            hidden, scores, statistics, weights = layer(
                hidden,
                scores=scores,
                token_mask=token_mask,
                removed=removed,
                attention_mask=mask,
                position_embeddings=embeddings,
                position_ids=position_ids,
                **{CACHE: cache},
            )
            attentions.append(weights)
            if layer.router is not None:
                groups.append(scores)
                if statistics is not None:
                    layer.router.norm1.update(statistics[0])
                    layer.router.norm2.update(statistics[1])
        hidden = self.norm(hidden)
        if context is not None and config.router_aux_loss_coef and self.training:
            for name, loss in (("uniformity", uniformity_loss), ("ambiguity", ambiguity_loss)):
                values = [loss(*group, token_mask) for group in groups]
                context.losses[name] = torch.stack(values).mean(), config.router_aux_loss_coef
        batch = hidden.shape[:2]
        found: dict[str, Any] = {CACHE: cache if use_cache else None}
        return MonetModelOutput(
            last_hidden_state=hidden,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_probs=tuple((a.unflatten(0, batch), b.unflatten(0, batch)) for a, b in groups)
            if output_router_probs
            else None,
            **found,
        )


@routed
class MonetForCausalLM(MonetPreTrainedModel, GenerationMixin):
    """Monet with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MonetConfig) -> None:
        super().__init__(config)
        self.model = MonetModel(config)
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
        output_router_probs: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> MonetCausalLMOutput:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_probs=output_router_probs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MonetCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_probs=outputs.router_probs,
            **{CACHE: getattr(outputs, CACHE)},
        )


@routed
class MonetForSequenceClassification(GenericForSequenceClassification, MonetPreTrainedModel):
    """Monet with a classification head on the last token."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__(config)
        self.moe_link = self.model.moe_link


_HEADS = {
    AutoModel: MonetModel,
    AutoModelForCausalLM: MonetForCausalLM,
    AutoModelForSequenceClassification: MonetForSequenceClassification,
}
_AUTO_MAP = {
    "AutoConfig": f"{__name__.rpartition('.')[2]}.MonetConfig",
    **{auto.__name__: f"{__name__.rpartition('.')[2]}.{model.__name__}" for auto, model in _HEADS.items()},
}
for _auto, _model in _HEADS.items():
    _model.register_for_auto_class(_auto.__name__)
    if not __name__.startswith("transformers_modules"):
        _auto.register(MonetConfig, _model, exist_ok=True)
