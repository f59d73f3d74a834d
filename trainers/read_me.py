"""Tuning of Read-ME models, in turns: the router learns from the dense model's activations, the experts from text.

Read-ME (2410.19123), and the authors' code where that differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..modeling.configuration_moe_ext import check_types
from ..modeling.moe_context import RoutingContext
from ..modeling.moe_families import get_family, iter_layers
from ..modeling.moe_structure import dense_linears, dense_sizes
from ..modeling.router_read_me import PreRouter
from .distillation import Teacher
from .freezing import base_model, shared_parts
from .moe_trainer import MoETrainer
from .moe_training_arguments import MoETrainingArguments


@dataclass
class ReadMeTuningArguments:
    """Arguments of `tune_read_me`. Defaults are those of the paper (2410.19123).

    > Parameters of both phases

    Args:
        output_dir (`str`):
            Folder for what the trainers log.
        rounds (`int`, *optional*, defaults to 8):
            How often the two phases alternate.
        per_device_batch_size (`int`, *optional*, defaults to 1):
            Rows of one forward; divides both batch sizes.
        learning_rate_decay (`float`, *optional*, defaults to 0.8):
            Factor on both learning rates after each round. Inside a phase they fall to zero along a cosine.
        weight_decay (`float`, *optional*, defaults to 0.01):
            Of AdamW.
        max_grad_norm (`float`, *optional*, defaults to 0.0):
            Norm that gradients are clipped to; 0 for none, as in the authors' code.
        seed (`int`, *optional*, defaults to 0):
            Of the order of rows inside a phase.
        options (`dict`, *optional*):
            Further arguments of both trainers, such as `{"bf16": True, "logging_steps": 10}`.

    > Parameters of the router's phase

    Args:
        router_steps (`int`, *optional*, defaults to 100):
            Optimizer steps of a round; 0 leaves the phase out.
        router_batch_size (`int`, *optional*, defaults to 64):
            Rows of a step.
        router_learning_rate (`float`, *optional*, defaults to 5e-4):
            In the first round.
        loss (`"overlap"` or `"authors"`, *optional*, defaults to `"overlap"`):
            That of the paper, or that of the authors' code (see `RouterDistillation`).
        activation_share (`float`, *optional*, defaults to 0.5):
            Share of the dense neurons that count as active for a token, with `loss="overlap"`.
        temperature (`float`, *optional*, defaults to 1.0):
            What overlaps, counts of neurons, are divided by in front of the softmax, with `loss="overlap"`.

    > Parameters of the experts' phase

    Args:
        expert_steps (`int`, *optional*, defaults to 200):
            Optimizer steps of a round; 0 leaves the phase out.
        expert_batch_size (`int`, *optional*, defaults to 128):
            Rows of a step.
        expert_learning_rate (`float`, *optional*, defaults to 5e-5):
            In the first round; of everything but the routers.
    """

    output_dir: str
    rounds: int = 8
    per_device_batch_size: int = 1
    learning_rate_decay: float = 0.8
    weight_decay: float = 0.01
    max_grad_norm: float = 0.0
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    router_steps: int = 100
    router_batch_size: int = 64
    router_learning_rate: float = 5e-4
    loss: Literal["overlap", "authors"] = "overlap"
    activation_share: float = 0.5
    temperature: float = 1.0
    expert_steps: int = 200
    expert_batch_size: int = 128
    expert_learning_rate: float = 5e-5

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("rounds", "per_device_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("router_steps", "expert_steps", "weight_decay", "max_grad_norm", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")
        for name in ("router_learning_rate", "expert_learning_rate", "learning_rate_decay", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("router_batch_size", "expert_batch_size"):
            if getattr(self, name) < 1 or getattr(self, name) % self.per_device_batch_size:
                raise ValueError(
                    f"`{name}` ({getattr(self, name)}) must be a multiple of `per_device_batch_size` "
                    f"({self.per_device_batch_size})."
                )
        if not 0 < self.activation_share <= 1:
            raise ValueError(f"`activation_share` must be in (0, 1], got {self.activation_share}.")
        if self.router_steps + self.expert_steps == 0:
            raise ValueError("`router_steps` and `expert_steps` are both 0, so nothing would be trained.")


# --- targets and losses. Axes: n tokens, D dense neurons, N experts, L layers ---


def overlap_scores(magnitude: torch.Tensor, neurons: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    """(n, N): how many of a token's strongest dense neurons each expert has. Read-ME (2410.19123).

    Args:
        magnitude: (n, D) absolute activations.
        neurons: (N, D) bool, true where an expert has a neuron.
        share: of the neurons that count as strongest.
    """
    count = max(1, int(share * magnitude.shape[1]))
    strongest = magnitude.topk(count, dim=1).indices
    marked = torch.zeros(magnitude.shape, device=magnitude.device).scatter_(1, strongest, 1.0)
    return marked @ neurons.to(marked).T


def nested_scores(magnitude: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    """(n, N): the authors' overlap, of five nested sets of strongest neurons with those that not all experts have.

    Their sizes are 1, 4/5, 3/5, 2/5 and 1/5 of the number of these neurons in an expert, M; each neuron counts
    1 / 3M for each set that it is in. The authors' code sorts signed activations; these are their magnitudes.
    """
    special = neurons & ~neurons.all(dim=0)
    size = int(special[0].sum())
    if size == 0:
        return magnitude.new_zeros(len(magnitude), len(neurons), dtype=torch.float32)
    rank = torch.arange(size, device=magnitude.device)
    weight = sum((rank < part * size // 5).float() for part in (5, 4, 3, 2, 1)) / (3 * size)
    strongest = magnitude.topk(size, dim=1).indices
    marked = torch.zeros(magnitude.shape, device=magnitude.device)
    marked.scatter_(1, strongest, weight.expand(len(magnitude), -1))
    return marked @ special.to(marked).T


def overlap_loss(logits: torch.Tensor, scores: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`KL(softmax(logits) || softmax(scores / temperature))`, mean over tokens and layers: (n, N), (L, n, N) -> ().

    Read-ME (2410.19123).
    """
    found, wanted = logits.float().log_softmax(-1), (scores.float() / temperature).log_softmax(-1)
    return (found.exp() * (found - wanted)).sum(-1).mean()


def authors_loss(logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """That of the authors' code: three quarters of the cross-entropy of the best expert, labels smoothed by half, and
    one quarter of that of `softmax(10 scores)`; mean over tokens, sum over layers: (n, N), (L, n, N) -> ()."""
    layers = len(scores)
    logits = logits.float().expand(layers, -1, -1).flatten(0, 1)
    scores = scores.float().flatten(0, 1)
    hard = F.cross_entropy(logits, scores.argmax(-1), label_smoothing=0.5)
    soft = F.cross_entropy(logits, (10 * scores).softmax(-1))
    return layers * (0.75 * hard + 0.25 * soft)


class RouterDistillation(nn.Module):
    """The pre-router of a Read-ME model and the dense model that it learns from; trained by any `Trainer`.

    Only the dense model and the pre-router run. For each layer, experts are scored by how much they have of what is
    active in the dense block for a token; the pre-router's distribution is to be that of the scores in all layers.

    Args:
        model (`PreTrainedModel`):
            Made by `upcycle(dense, method="read_me")`. Its pre-router is trained in place.
        teacher (`PreTrainedModel`):
            The dense model. It is frozen.
        loss (`"overlap"` or `"authors"`, *optional*, defaults to `"overlap"`):
            `overlap_loss` of `overlap_scores`, or `authors_loss` of `nested_scores`.
        activation_share, temperature (`float`, *optional*, default to 0.5 and 1.0):
            Of the former.

    Raises:
        ValueError: for a model without a pre-router that knows its experts' neurons, or another dense model.

    Example:
        ```python
        >>> distillation = RouterDistillation(model, dense)
        >>> distillation(input_ids=ids)["loss"].backward()
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        loss: Literal["overlap", "authors"] = "overlap",
        activation_share: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if loss not in ("overlap", "authors"):
            raise ValueError(f'`loss` must be "overlap" or "authors", got {loss!r}.')
        found = [module for module in shared_parts(model) if isinstance(module, PreRouter)]
        if len(found) != 1 or "neurons" not in found[0]._buffers:
            raise ValueError(
                f"{type(base_model(model)).__name__} has no pre-router that knows which neurons its experts have. "
                'Make the model by `upcycle(dense, method="read_me", calibration={...})`.'
            )
        self.pre_router = found[0]
        self.loss, self.share, self.temperature = loss, activation_share, temperature
        self.teacher = Teacher(teacher, base_model(model))
        self._downs = _down_projections(teacher, self.pre_router)
        self.reset_accuracy()

    def reset_accuracy(self) -> None:
        """Begin a new mean in `accuracy`."""
        self._right, self._seen = 0, 0

    @property
    def accuracy(self) -> float:
        """Share of tokens and layers where the router's choice was the expert of the highest score."""
        return self._right / max(self._seen, 1)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The loss, and the pre-router's logits (B, S, N). Labels are not used."""
        scores = self.scores(input_ids, attention_mask)  # (L, n, N)
        context = RoutingContext(input_ids, attention_mask, batch_size=len(input_ids))
        logits = self.pre_router.decide(context, None)
        flat = logits.flatten(0, 1)
        if attention_mask is not None:
            flat = flat[attention_mask.flatten().to(flat.device) != 0]
        scores = scores.to(flat.device)
        if self.loss == "overlap":
            loss = overlap_loss(flat, scores, self.temperature)
        else:
            loss = authors_loss(flat, scores)
        right = flat.detach().argmax(-1) == scores.argmax(-1)
        self._right, self._seen = self._right + int(right.sum()), self._seen + right.numel()
        return {"loss": loss, "logits": logits}

    @torch.no_grad()
    def scores(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(L, n, N): what the dense model's activations say of each layer's experts, for the tokens that count."""
        real = None if attention_mask is None else attention_mask.flatten() != 0
        found: dict[int, torch.Tensor] = {}
        handles = []
        for place, down in enumerate(self._downs):

            def see(_: nn.Module, args: Any, place: int = place) -> None:
                magnitude = args[0].flatten(0, -2).abs()
                magnitude = magnitude if real is None else magnitude[real.to(magnitude.device)]
                neurons = self.pre_router.neurons[place, :, : magnitude.shape[1]].to(magnitude.device)
                if self.loss == "overlap":
                    found[place] = overlap_scores(magnitude, neurons, self.share)
                else:
                    found[place] = nested_scores(magnitude, neurons)

            handles.append(down.register_forward_pre_hook(see))
        try:
            self.teacher.logits({"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False})
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([found[place].to(found[0].device) for place in range(len(self._downs))])


def _down_projections(teacher: PreTrainedModel, pre_router: PreRouter) -> list[nn.Module]:
    """Those of the dense layers that the pre-router decides for."""
    family = get_family(teacher.config.model_type)
    layers = {} if family is None else {key: layer for key, layer, _ in iter_layers(teacher, family)}
    if (
        family is None
        or family.dense is None
        or not set(pre_router.keys) <= set(layers)
        or "moe_link" in vars(teacher)
    ):
        raise ValueError(
            f"`teacher` must be the dense model that the experts are slices of, got {type(teacher).__name__}."
        )
    width = max(dense_sizes(layers[key], family.dense)[1] for key in pre_router.keys)
    if width != pre_router.neurons.shape[-1]:
        raise ValueError(
            f"the dense blocks of `teacher` have {width} neurons, those that the experts are slices of "
            f"{pre_router.neurons.shape[-1]}."
        )
    return [dense_linears(layers[key], family.dense)["down"] for key in pre_router.keys]


class _Part(Dataset):
    """Rows of a data set from one on, begun anew at its end."""

    def __init__(self, rows: Any, start: int, count: int) -> None:
        self.rows, self.start, self.count = rows, start, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Any:
        return self.rows[(self.start + place) % len(self.rows)]


def tune_read_me(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    train_dataset: Any,
    args: ReadMeTuningArguments,
    data_collator: Any = None,
) -> list[dict[str, Any]]:
    """Train a Read-ME model in rounds: first its router, by distillation, then everything else, on text.

    The router gets no gradient of the language-modelling loss. Rows are taken from the data set in order, each phase
    going on where the last one ended. Every phase has an optimizer of its own.

    Args:
        model (`PreTrainedModel`):
            Made by `upcycle(dense, method="read_me")`; trained in place.
        teacher (`PreTrainedModel`):
            The dense model. The authors let the router learn from the backbone as it is tuned, of which they keep all
            neurons; here the dense model stays what it was.
        train_dataset:
            Rows with `input_ids` and `labels` (and `attention_mask`).
        args (`ReadMeTuningArguments`):
            Rounds, steps and rates.
        data_collator (*optional*):
            As in `Trainer`.

    Returns:
        One dict for each phase: `round`, `phase` (`"router"` or `"experts"`), the mean `loss`, and the `accuracy` of
        the router's phase.

    Raises:
        TypeError, ValueError: where model, teacher and data do not go together, before anything is trained.

    Example:
        ```python
        >>> history = tune_read_me(model, dense, rows, ReadMeTuningArguments("out", rounds=2))
        ```
    """
    if not hasattr(train_dataset, "__getitem__") or not len(train_dataset):
        raise TypeError("`train_dataset` must have rows that can be indexed, and one at least.")
    was_training, teacher_was_training = model.training, teacher.training
    with _flags_kept(teacher), _flags_kept(model):
        distillation = RouterDistillation(model, teacher, args.loss, args.activation_share, args.temperature)
        history = _rounds(model, distillation, train_dataset, args, data_collator)
    distillation.pre_router.zero_grad()
    model.train(was_training)
    teacher.train(teacher_was_training)
    return history


def _rounds(
    model: PreTrainedModel, distillation: RouterDistillation, rows: Any, args: ReadMeTuningArguments, collator: Any
) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = []
    start = 0
    for number in range(args.rounds):
        rate = args.learning_rate_decay**number
        if args.router_steps:
            data = _Part(rows, start, args.router_steps * args.router_batch_size)
            options = _options(args, args.router_steps, args.router_batch_size, args.router_learning_rate * rate)
            distillation.reset_accuracy()
            distillation.pre_router.requires_grad_(True)
            trainer: Trainer = Trainer(
                distillation, TrainingArguments(**options), train_dataset=data, data_collator=collator
            )
            loss = trainer.train().training_loss
            history.append({"round": number, "phase": "router", "loss": loss, "accuracy": distillation.accuracy})
            start += len(data)
        if args.expert_steps:
            data = _Part(rows, start, args.expert_steps * args.expert_batch_size)
            options = _options(args, args.expert_steps, args.expert_batch_size, args.expert_learning_rate * rate)
            arguments = MoETrainingArguments(**options, freeze_router=True)
            trainer = MoETrainer(model, arguments, train_dataset=data, data_collator=collator)
            history.append({"round": number, "phase": "experts", "loss": trainer.train().training_loss})
            start += len(data)
    return history


def _options(args: ReadMeTuningArguments, steps: int, batch_size: int, learning_rate: float) -> dict[str, Any]:
    """Arguments of the trainer of one phase."""
    return {
        "output_dir": args.output_dir,
        "max_steps": steps,
        "per_device_train_batch_size": args.per_device_batch_size,
        "gradient_accumulation_steps": batch_size // args.per_device_batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "seed": args.seed,
        "save_strategy": "no",
        "report_to": "none",
        **args.options,
    }


@contextlib.contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Let parameters be frozen for a while."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
