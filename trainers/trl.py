"""TRL's trainers for models with routers: `MoESFTTrainer` and `MoEDPOTrainer`. Needs `trl`.

TRL computes losses from hidden states, by a head of its own, and knows one auxiliary loss, which assumes plain top-k.
Here that loss is off, and what routers declare is added by the same code as in `MoETrainer`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from .._imports import require
from .domain_metrics import COLUMN as DOMAIN_COLUMN
from .moe_training_arguments import MoETrainingArgumentsMixin
from .trainer_mixin import MoETrainerMixin


require("trl", "training with TRL's trainers")

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402


class _TRLArguments(MoETrainingArgumentsMixin):
    """What both configs refuse."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_aux_loss_coef:
            raise ValueError(
                f"`router_aux_loss_coef` ({self.router_aux_loss_coef}) weighs the stock auxiliary loss, which is off "
                "for extended models. Declare losses in the router's config: `TopKRouterConfig(balance_coef=0.01)`."
            )


@dataclass
class MoESFTConfig(_TRLArguments, SFTConfig):
    """TRL's `SFTConfig` with the arguments of [`MoETrainingArguments`].

    Example:
        ```python
        >>> MoESFTConfig("out", max_length=1024, packing=True, freeze_router=True)
        ```
    """


@dataclass
class MoEDPOConfig(_TRLArguments, DPOConfig):
    """TRL's `DPOConfig` with the arguments of [`MoETrainingArguments`].

    Example:
        ```python
        >>> MoEDPOConfig("out", beta=0.1, train_only_moe=True)
        ```
    """


class _MoETRLMixin(MoETrainerMixin):
    """What differs from `MoETrainer` in all of TRL's trainers."""

    data_collator: Any
    padding_free: bool
    _metrics: dict[str, Any]
    _total_train_tokens: int

    def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        self.aux_loss_enabled = False
        self.model.config.get_text_config().output_router_logits = False
        if self.domain_metrics is not None:
            self.data_collator = _DomainCollator(self.data_collator)

    def _stock_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> tuple[torch.Tensor, Any]:
        return super(MoETrainerMixin, self).compute_loss(model, inputs, False, num_items), None

    def _model_adds_losses(self, inputs: dict[str, Any]) -> bool:
        return False  # TRL asks the base model, or gives no labels

    def _state_dict(self) -> dict[str, Any]:
        trl = {"metrics": dict(self._metrics["train"]), "tokens": self._total_train_tokens}
        return {**super()._state_dict(), "trl": trl}

    def begin_measuring(self) -> str | None:
        state = self._resumed.get("trl", {})
        self._metrics["train"].update(state.get("metrics", {}))
        self._total_train_tokens = state.get("tokens", self._total_train_tokens)
        return super().begin_measuring()


class MoESFTTrainer(_MoETRLMixin, SFTTrainer):
    """TRL's `SFTTrainer` for models with routers.

    It has everything that [`MoETrainer`] adds, among it a `teacher`, and takes every argument of `SFTTrainer`. A loss
    that compares predictions (of a teacher, or of two passes) needs the logits of all tokens, so TRL's head, which
    does without them, is not used then.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            An extended model, or where to load one from.
        args (`MoESFTConfig`, *optional*):
            The arguments.
        teacher (`PreTrainedModel`, *optional*):
            A model to learn from, as in [`MoETrainer`].
        kwargs:
            As in `SFTTrainer`: `train_dataset`, `processing_class`, `peft_config`, ...

    Raises:
        TypeError: where `args` are no [`MoESFTConfig`].
        ValueError: for a model without an extension, or an option that does not fit the model: packing with a router
            that looks at a whole row.

    Example:
        ```python
        >>> model = upcycle(dense, num_experts=4, num_experts_per_tok=2)
        >>> trainer = MoESFTTrainer(model, MoESFTConfig("out"), train_dataset=chats, processing_class=tokenizer)
        >>> trainer.train()
        ```
    """

    arguments_class: ClassVar[type[MoETrainingArgumentsMixin]] = MoESFTConfig

    def __init__(self, model: Any, args: MoESFTConfig | None = None, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        if self.padding_free:
            self._check_rows_of_documents()

    def _check_rows_of_documents(self) -> None:
        """Refuse what would mix the documents of a row."""
        name = self.link.non_causal
        name = name or next((r.moe_config.type for r in self.routers if _draws_by_row(r.moe_config)), "")
        if name:
            raise ValueError(
                f"the router `{name}` looks at a whole row, where packing and `padding_free` put several documents, "
                "which would meet. Set `packing=False` and `padding_free=False`."
            )
        if self.domain_metrics is not None:
            raise ValueError(
                "`routing_domains` are measured row by row, and packing and `padding_free` put several documents into "
                "one. Set `packing=False` and `padding_free=False`, or leave the domains out."
            )

    def _stock_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> tuple[torch.Tensor, Any]:
        if not (self.consistency_coef or self._learns_from_teacher):
            return super()._stock_loss(model, inputs, num_items)
        whole = _WithLogits(model)
        loss, _ = super()._stock_loss(whole, inputs, num_items)
        return loss, whole.outputs


class MoEDPOTrainer(_MoETRLMixin, DPOTrainer):
    """TRL's `DPOTrainer` for models with routers.

    It has what [`MoETrainer`] adds but the losses that compare predictions: the reference is a teacher already. The
    auxiliary losses and metrics are those of the chosen and rejected texts in the model that is trained; the reference
    counts nowhere.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            An extended model, or where to load one from.
        ref_model (`PreTrainedModel`, *optional*):
            The reference. `None` takes a copy of the model as it is given, or the model without its adapters.
        args (`MoEDPOConfig`, *optional*):
            The arguments.
        kwargs:
            As in `DPOTrainer`: `train_dataset`, `processing_class`, `peft_config`, ...

    Raises:
        TypeError: where `args` are no [`MoEDPOConfig`].
        ValueError: for a model without an extension, a `teacher`, or an option that does not fit the model: a
            router with a consistency loss.

    Example:
        ```python
        >>> trainer = MoEDPOTrainer(model, args=MoEDPOConfig("out"), train_dataset=pairs, processing_class=tokenizer)
        >>> trainer.train()
        ```
    """

    arguments_class: ClassVar[type[MoETrainingArgumentsMixin]] = MoEDPOConfig

    def __init__(
        self, model: Any, ref_model: PreTrainedModel | None = None, args: MoEDPOConfig | None = None, **kwargs: Any
    ) -> None:
        if kwargs.get("teacher") is not None:
            raise ValueError("`MoEDPOTrainer` learns from preferences; distil with `MoESFTTrainer` or `MoETrainer`.")
        if ref_model is None and isinstance(model, PreTrainedModel) and not kwargs.get("peft_config"):
            if args is None or not args.precompute_ref_log_probs:
                # TRL would load the folder that the model came from, which may hold another one.
                ref_model = copy.deepcopy(model).eval()
        super().__init__(model, args, ref_model=ref_model, **kwargs)
        if self.consistency_coef:
            raise ValueError(
                "a router of this model asks for a consistency loss between two passes, which DPO does not have. Set "
                "`consistency_coef=0` in its config."
            )


def _draws_by_row(config: Any) -> bool:
    return getattr(config, "train_draw", None) == "sequence"


class _WithLogits:
    """Stands for a model that TRL calls: one forward with all logits, kept, from which it answers.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.outputs: Any = None

    def __call__(self, *, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        if self.outputs is None:
            self.outputs = self.model(**inputs)
        if not fused_lm_head:
            return self.outputs
        assert labels is not None
        log_probs = self.outputs.logits[:, :-1].float().log_softmax(dim=-1)  # (B, S - 1, V)
        wanted = labels[:, 1:].to(log_probs.device)
        used = wanted != -100
        chosen = log_probs.gather(-1, wanted.clamp(min=0)[..., None]).squeeze(-1)
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
            best = log_probs.argmax(dim=-1) == wanted
        return SimpleNamespace(
            log_probs=chosen.masked_fill(~used, 0),
            entropy=entropy.masked_fill(~used, 0),
            is_top1=best & used,
            label_mask=used,
        )


class _DomainCollator:
    """Adds the column `domain` to a batch, for every row that an example has there: two in preference data.

    Args:
        collator: makes a batch of the other columns, with `input_ids`.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        if all(DOMAIN_COLUMN in example for example in examples):
            domain = torch.tensor([example[DOMAIN_COLUMN] for example in examples])
            batch[DOMAIN_COLUMN] = domain.repeat(len(batch["input_ids"]) // len(examples))
        return batch
