"""Arguments of `MoETrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from ..modeling.moe_structure import REENTRANT


if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers import TrainingArguments as _Arguments
else:
    _Arguments = object

MIN_SERIES = 32


@dataclass
class MoETrainingArgumentsMixin(_Arguments):
    """The arguments that [`MoETrainingArguments`] adds, to be put in front of a class of arguments."""

    freeze_router: bool = field(default=False, metadata={"help": "Whether the routers keep their weights."})
    train_experts: list[int] | None = field(
        default=None, metadata={"help": "Train only these experts of every MoE layer; the others stay bit-equal."}
    )
    train_only_moe: bool = field(default=False, metadata={"help": "Train only routers, experts and shared experts."})
    distill_coef: float = field(default=1.0, metadata={"help": "Weight of the distillation loss."})
    distill_temperature: float = field(default=1.0, metadata={"help": "Temperature of the distillation."})
    distill_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps with a teacher; all of them if not given."}
    )
    distill_fraction: float | None = field(
        default=None, metadata={"help": "Share of the training with a teacher; all of it if not given."}
    )
    adaptive_balance: float | None = field(
        default=None, metadata={"help": "Let the weight of the load-balancing loss follow the load; 0.2 in Skywork."}
    )
    adaptive_balance_capacity: float = field(
        default=1.0, metadata={"help": "Capacity of an expert, relative to an even load, for `adaptive_balance`."}
    )
    routing_metrics: bool = field(
        default=True, metadata={"help": "Log load, entropy, dead experts and experts per token under `moe/`."}
    )
    routing_metrics_per_expert: bool = field(default=False, metadata={"help": "Log the load of single experts, too."})
    routing_metrics_max_series: int = field(
        default=256, metadata={"help": "Most series under `moe/`; evenly spaced layers and experts are logged then."}
    )
    routing_domains: list[str] | None = field(
        default=None, metadata={"help": "Names of domains to measure apart; the column `domain` has their positions."}
    )
    peak_tflops: float | None = field(
        default=None, metadata={"help": "Peak of one device in TFLOP/s, for `moe/mfu`; known for common GPUs."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train_experts = _expert_ids(self.train_experts)
        for name in ("freeze_router", "train_only_moe", "routing_metrics", "routing_metrics_per_expert"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be true or false, got {getattr(self, name)!r}.")
        if self.distill_coef < 0:
            raise ValueError(f"`distill_coef` must be non-negative, got {self.distill_coef}.")
        if self.distill_temperature <= 0:
            raise ValueError(f"`distill_temperature` must be positive, got {self.distill_temperature}.")
        if self.distill_steps is not None and self.distill_steps < 1:
            raise ValueError(f"`distill_steps` must be at least 1, got {self.distill_steps}.")
        if self.distill_fraction is not None and not 0 < self.distill_fraction <= 1:
            raise ValueError(f"`distill_fraction` must be above 0 and at most 1, got {self.distill_fraction}.")
        if self.distill_fraction is not None and self.distill_steps is not None:
            raise ValueError("`distill_steps` and `distill_fraction` say the same; give one of them.")
        if self.adaptive_balance is not None and self.adaptive_balance <= 0:
            raise ValueError(f"`adaptive_balance` must be positive, got {self.adaptive_balance}.")
        if self.adaptive_balance_capacity <= 0:
            raise ValueError(f"`adaptive_balance_capacity` must be positive, got {self.adaptive_balance_capacity}.")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"`peak_tflops` must be positive, got {self.peak_tflops}.")
        limit = self.routing_metrics_max_series
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < MIN_SERIES:
            raise ValueError(
                f"`routing_metrics_max_series` must be an integer of at least {MIN_SERIES}, got {limit!r}."
            )
        if self.routing_metrics_per_expert and not self.routing_metrics:
            raise ValueError("`routing_metrics_per_expert` needs `routing_metrics`; switch both on or both off.")
        if self.routing_domains is not None:
            _check_domains(self.routing_domains)
            if not self.routing_metrics:
                raise ValueError("`routing_domains` needs `routing_metrics`; switch both on or both off.")
        kwargs = self.gradient_checkpointing_kwargs
        if isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
            raise ValueError(REENTRANT)


@dataclass
class MoETrainingArguments(MoETrainingArgumentsMixin, TrainingArguments):
    """`TrainingArguments` with what concerns routers and experts.

    > Parameters that control what is trained

    Args:
        freeze_router (`bool`, *optional*, defaults to `False`):
            Whether the routers keep their weights, and their selection biases.
        train_experts (`list[int]`, *optional*):
            Only these experts of every MoE layer are trained; the others stay bit-equal, also under weight decay.
            Everything outside the experts trains as it would. `None` trains all experts.
        train_only_moe (`bool`, *optional*, defaults to `False`):
            Whether only routers, experts, shared experts and attention experts are trained.

    > Parameters that control the distillation from a `teacher`

    Args:
        distill_coef (`float`, *optional*, defaults to 1.0):
            Weight of the loss that compares predictions with the teacher's. The loss of the labels has weight 1.
        distill_temperature (`float`, *optional*, defaults to 1.0):
            Both are softened by it.
        distill_steps (`int`, *optional*):
            Optimizer steps after which the teacher is left out.
        distill_fraction (`float`, *optional*):
            The same as a share of the training. With neither, the teacher stays to the end.

    > Parameters that control the balance

    Args:
        adaptive_balance (`float`, *optional*):
            Lets the weight of the load-balancing loss follow the load, layer by layer: after each step
            `a <- 0.99 a + 0.01 min(adaptive_balance * d, 0.01)`, where d is the share of token-expert pairs above the
            experts' capacity. 0.2 in Skywork-MoE (2406.06563). `None` keeps the weight at `balance_coef`, with which
            it starts otherwise.
        adaptive_balance_capacity (`float`, *optional*, defaults to 1.0):
            That capacity relative to an even load. Nothing is dropped for it. Layers with a `capacity` part have
            their own.

    > Parameters that control the metrics

    Args:
        routing_metrics (`bool`, *optional*, defaults to `True`):
            Whether load, entropy, dead experts and experts per token are logged under `moe/`, and every layer's load
            is kept in `routing_history.jsonl`. The losses are logged in any case.
        routing_metrics_per_expert (`bool`, *optional*, defaults to `False`):
            Whether the load of single experts is logged, too.
        routing_metrics_max_series (`int`, *optional*, defaults to 256):
            Most series under `moe/`. With more layers or experts than fit, evenly spaced ones are logged; the history
            file always holds all.
        routing_domains (`list[str]`, *optional*):
            Names of domains that are measured apart, under `moe/domain/NAME/`. The data have a column `domain` with
            the position of an example's domain in this list.
        peak_tflops (`float`, *optional*):
            Dense peak of one device in TFLOP/s, of which `moe/mfu` is the share that the model needs. `None` knows
            that of common GPUs in 16 bits, and leaves the series out otherwise.

    Example:
        ```python
        >>> MoETrainingArguments("out", freeze_router=True, train_experts=[0, 3], max_steps=100)
        ```
    """


def _check_domains(names: Any) -> None:
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f'`routing_domains` must be a list of names such as ["code", "prose"], got {names!r}.')
    if not names or len(set(names)) < len(names) or not all(name.replace("-", "_").isidentifier() for name in names):
        raise ValueError(
            f"`routing_domains` must be different names of letters, digits, hyphens and underscores, got "
            f"{list(names)}."
        )


def _expert_ids(value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(type(item) is int for item in value):
        raise TypeError(f"`train_experts` must be a list of expert numbers such as [0, 3], got {value!r}.")
    if not value:
        raise ValueError("`train_experts` is empty; leave it out to train all experts.")
    if min(value) < 0:
        raise ValueError(f"`train_experts` must hold numbers from 0 on, got {min(value)}.")
    return sorted(set(value))
