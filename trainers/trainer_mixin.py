"""What a trainer needs for models with routers, to be put in front of `Trainer` or a trainer derived from it."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging

from ..modeling.moe_context import RoutingContext, RoutingLink
from ..modeling.moe_lora import adapter_names
from ..modeling.moe_models import OWN_MODELS
from ..modeling.moe_parts import PartModule
from ..modeling.moe_routed_model import label_share, loss_shifts_labels
from ..modeling.moe_router import MoERouter
from ..modeling.moe_structure import auxiliary_losses, iter_routers, refuse_reentrant
from .adaptive_balance import AdaptiveBalance
from .callbacks import RoutingCallback, shorten_console_logs
from .checkpoints import CheckpointMixin, without_refusal
from .consistency import consistency_coef, consistency_loss, logits_of
from .distillation import Teacher, distillation_loss
from .domain_metrics import COLUMN as DOMAIN_COLUMN
from .domain_metrics import DomainMetrics, Domains, domain_series
from .freezing import ExpertMask, base_model, freeze_router, moe_parts, train_experts, train_only_moe
from .model_flops import ModelFlops, device_peak
from .moe_training_arguments import MoETrainingArguments, MoETrainingArgumentsMixin
from .parallel_layout import check_fsdp, check_layout
from .parameter_report import ParameterReport
from .routing_metrics import LayerStatistics, RoutingMetrics, SeriesPlan
from .routing_replay import COLUMN as REPLAY_COLUMN
from .routing_replay import replayed
from .training_meter import TrainingMeter


logger = logging.get_logger(__name__)


class MoETrainerMixin(CheckpointMixin):
    """Everything `MoETrainer` adds to the stock trainer; see there.

    Attributes (of the class):
        arguments_class: what `args` must be.
    """

    arguments_class: ClassVar[type[MoETrainingArgumentsMixin]] = MoETrainingArguments
    args: Any
    label_smoother: Any
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *rest: Any,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        args = self.arguments_class("tmp_trainer") if args is None else args
        if not isinstance(args, self.arguments_class):
            raise TypeError(f"`args` must be {self.arguments_class.__name__}, got {type(args).__name__}.")
        if isinstance(model, nn.Module):
            _require_link(model)
            check_layout(model, args, iter_routers(model))
        self._staging = None
        self._resumed = {}
        self.meter = TrainingMeter()
        self.metrics = RoutingMetrics()
        self.domain_metrics = None if args.routing_domains is None else DomainMetrics(args.routing_domains)
        self.domain_statistics: Domains = {}
        self.layer_statistics: dict[str, LayerStatistics] = {}
        # By name, since trainers have different arguments between these two.
        names = [*inspect.signature(super().__init__).parameters]
        kwargs |= dict(zip(names[names.index("args") + 1 :], rest, strict=False))
        with without_refusal(model, args):
            super().__init__(model=model, args=args, **kwargs)
        if model is not None:  # otherwise `call_model_init` has
            self._adopt(self.model, args)
        self.teacher = None if teacher is None else Teacher(teacher, base_model(self.model))
        if args.n_gpu > 1:
            raise ValueError(
                "MoETrainer does not run under DataParallel, whose replicas would not share their routing. Start one "
                "process per GPU (`torchrun --nproc-per-node N ...`), or show one GPU (`CUDA_VISIBLE_DEVICES=0`)."
            )
        check_fsdp(self.args, self.is_fsdp_enabled or self.is_split)
        if self.expert_mask is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("`train_experts` works on whole tensors; FSDP and DeepSpeed split them.")
        stock = self.label_smoother
        if stock is not None:
            self.label_smoother = _ShiftingLabelSmoother(stock.epsilon, stock.ignore_index, self._loss_shifts_labels)
        self.add_callback(RoutingCallback(self))
        shorten_console_logs(self)

    def _adopt(self, model: nn.Module, args: MoETrainingArgumentsMixin) -> None:
        """Find what the trainer needs in a model, and freeze what is to be frozen."""
        self.link = _require_link(model)
        self.routers = list(iter_routers(model))
        parts = [module for module in model.modules() if isinstance(module, PartModule)]
        self.scheduled: list[MoERouter | PartModule] = [*self.routers, *parts]  # what is told the progress
        if not self.routers and not adapter_names(model) and base_model(model).config.model_type not in OWN_MODELS:
            logger.warning(
                "No layer of this model has a declared router, so there are no auxiliary losses and no routing "
                "metrics. Declare one, e.g. `MoeExtension(router=TopKRouterConfig())`."
            )
        refuse_reentrant(model)
        self.consistency_coef = consistency_coef(self.routers)
        self.adaptive_balance: AdaptiveBalance | None = None
        if args.adaptive_balance is not None:
            self.adaptive_balance = AdaptiveBalance(
                self.routers, args.adaptive_balance, args.adaptive_balance_capacity
            )
        updates = [r for r in self.routers if type(r).after_optimizer_step is not MoERouter.after_optimizer_step]
        self.updated_routers = [] if args.freeze_router else updates
        if args.freeze_router:
            freeze_router(model)
        if args.train_only_moe:
            train_only_moe(model)
        self.expert_mask: ExpertMask | None = None
        if args.train_experts is not None:
            self.expert_mask = train_experts(model, args.train_experts)
        num_experts = {router.moe_site.key: router.moe_site.num_experts for router in self.routers}
        self.series_plan = SeriesPlan.make(
            num_experts,
            args.routing_metrics_max_series,
            args.routing_metrics_per_expert,
            domains=len(args.routing_domains or ()),
        )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._adopt(model, self.args)
        return model

    def parameter_report(self) -> ParameterReport:
        """What is trained: numbers of parameters, and which experts of which layers."""
        return ParameterReport.of(self.model, self.expert_mask)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.expert_mask is not None:
            self.expert_mask.attach(optimizer)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        with replayed(self.model, inputs) as inputs:
            return self._whole_loss(model, inputs, return_outputs, num_items_in_batch)

    def _whole_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Any) -> Any:
        inputs = dict(inputs)
        domain = self._pop_domain(inputs, needed=model.training)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items)
        weight = self._auxiliary_weight(inputs.get("labels"), num_items)
        share = weight / self._remaining_divisor(num_items)
        loss, outputs = self._training_pass(model, inputs, num_items, weight, share, domain)
        if self.consistency_coef:
            second_loss, second_outputs = self._training_pass(model, inputs, num_items, weight, share, domain)
            consistency = self._consistency(outputs, second_outputs, inputs)
            weighted = self.consistency_coef * consistency
            loss = loss + second_loss + (weighted * weight).to(loss)
            self.meter.add_losses(weighted, {"consistency": consistency}, share)
        if self._learns_from_teacher:
            distillation = self._distillation(outputs, inputs)
            weighted = self.args.distill_coef * distillation
            loss = loss + (weighted * weight).to(loss)
            self.meter.add_losses(weighted, {"distillation": distillation}, share)
        self.meter.add_tokens(inputs)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with replayed(self.model, inputs) as inputs:
            inputs = dict(inputs)
            self._pop_domain(inputs)
            return super().prediction_step(model, inputs, *args, **kwargs)

    def _pop_domain(self, inputs: dict[str, Any], *, needed: bool = False) -> torch.Tensor | None:
        if self.domain_metrics is None:
            return None
        if DOMAIN_COLUMN not in inputs and needed:
            raise ValueError(
                f"`routing_domains` are to be measured apart, but the data have no column `{DOMAIN_COLUMN}`."
            )
        domain: torch.Tensor | None = inputs.pop(DOMAIN_COLUMN, None)
        return domain

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            known = [REPLAY_COLUMN] if self.domain_metrics is None else [REPLAY_COLUMN, DOMAIN_COLUMN]
            known.append("task_ids")  # which the forward of an extended model takes
            self._signature_columns = [*(self._signature_columns or ()), *known]

    def _training_pass(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items: Any,
        weight: Any,
        share: Any,
        domain: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Any]:
        """One forward: its loss with the auxiliary losses, which are measured, and the outputs.

        Args:
            weight: factor on the auxiliary losses in the loss.
            share: their part in the mean of the optimizer step.
            domain: (B,) of the rows, where domains are measured.
        """
        inputs = dict(inputs)
        contexts: list[RoutingContext] = []

        def observer(found: list[RoutingContext]) -> None:
            if torch.is_grad_enabled():  # others are not what is trained, such as those of a reference
                contexts.extend(found)

        self.link.observers.append(observer)
        try:
            loss, outputs = self._stock_loss(model, inputs, num_items)
        finally:
            self.link.observers.remove(observer)
        if self.domain_metrics is not None and domain is not None:
            self.domain_metrics.update(contexts, domain)

        added_by_model = self._model_adds_losses(inputs)
        with torch.set_grad_enabled(not added_by_model):
            total, named = auxiliary_losses(contexts)
        if total is not None and not added_by_model:
            loss = loss + (total * weight).to(loss)
        self.meter.add_losses(total, named, share)
        if self.args.routing_metrics or self.updated_routers:
            self.metrics.update(contexts)
        if self.adaptive_balance is not None:
            self.adaptive_balance.update(contexts)
        return loss, outputs

    def _stock_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> tuple[torch.Tensor, Any]:
        """The loss of the trainer that this is mixed into, and the outputs with logits where a loss needs them."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items)
        return loss, outputs

    def _model_adds_losses(self, inputs: dict[str, Any]) -> bool:
        """Whether the forward that `_stock_loss` made has added the auxiliary losses."""
        # The stock method pops the labels where it computes the loss itself.
        return "labels" in inputs

    def _consistency(self, outputs: Any, second: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if "labels" not in inputs:
            raise ValueError("the consistency loss counts at the labels, and this batch has none.")
        shift = loss_shifts_labels(base_model(self.model))
        return consistency_loss(logits_of(outputs), logits_of(second), inputs["labels"], shift=shift)

    @property
    def _learns_from_teacher(self) -> bool:
        last = self.args.distill_steps
        if self.args.distill_fraction is not None:
            last = round(self.args.distill_fraction * self.state.max_steps)
        wanted = self.teacher is not None and self.args.distill_coef > 0
        return wanted and (last is None or self.state.global_step < last)

    def _distillation(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        assert self.teacher is not None
        if "labels" not in inputs:
            raise ValueError("distillation counts at the labels, and this batch has none.")
        return distillation_loss(
            logits_of(outputs),
            self.teacher.logits(inputs),
            inputs["labels"],
            temperature=self.args.distill_temperature,
            shift=loss_shifts_labels(base_model(self.model)),
        )

    def _auxiliary_weight(self, labels: torch.Tensor | None, num_items: Any) -> Any:
        """Factor on the auxiliary losses of one forward: its share of the labels of the whole batch, times the factor
        that the trainer puts on the loss."""
        if num_items is None or labels is None:
            return 1.0 / self._accumulated if self.compute_loss_func is not None else 1.0
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return 1.0
        share = label_share(labels, num_items, base_model(self.model))
        averaged = self.args.average_tokens_across_devices
        return share * (self.accelerator.num_processes // self.get_tp_size()) if averaged else share

    def _remaining_divisor(self, num_items: Any) -> int:
        """What `training_step` still divides the loss by."""
        scaled = (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        return 1 if (scaled if declared is None else declared) else self._accumulated

    @property
    def _accumulated(self) -> int:
        """Micro-batches of the running optimizer step."""
        return getattr(self, "current_gradient_accumulation_steps", 1)

    def reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all processes."""
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.args.device), reduction="sum")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.is_in_train and "loss" in logs:
            statistics = self.metrics.read(self.reduce_sum) if self.args.routing_metrics else {}
            # Tokens are those of `input_ids`; a decoder beside them has others.
            counted = statistics and not base_model(self.model).config.is_encoder_decoder
            flops = (lambda *amount: self._flops(statistics, *amount)) if counted else None
            processes = self.accelerator.num_processes
            logs.update(self.meter.read(self.reduce_sum, processes, logs["loss"], flops, self._peak))
            if self.adaptive_balance is not None:
                coefs = self.adaptive_balance.coefs.values()
                logs["moe/balance_coef"] = sum(coefs) / len(coefs)
            if self.args.routing_metrics:
                self.layer_statistics = statistics
                logs.update(self.series_plan.series(statistics))
            if self.domain_metrics is not None:
                self.domain_statistics = self.domain_metrics.read(self.reduce_sum)
                self.domain_metrics.check(self.domain_statistics, statistics)
                logs.update(domain_series(self.domain_statistics))
        super().log(logs, start_time)

    def _flops(self, statistics: dict[str, LayerStatistics], tokens: float, pairs: float) -> float:
        """Operations since the last log; with a consistency loss every batch is seen twice."""
        passes = 2 if self.consistency_coef else 1
        return passes * ModelFlops(self.model).total(tokens, pairs, statistics)

    @property
    def _peak(self) -> float | None:
        """Peak of a device in TFLOP/s, for the precision of this training, as far as it is known."""
        if self.args.peak_tflops is not None:
            return self.args.peak_tflops
        half = self.args.bf16 or self.args.fp16 or next(self.model.parameters()).dtype.itemsize == 2
        return device_peak(self.args.device) if half else None


class _ShiftingLabelSmoother(LabelSmoother):
    """Label smoothing that knows from the loss, and not from a list of class names, whether labels are shifted."""

    def __init__(self, epsilon: float, ignore_index: int, shifts: bool) -> None:
        super().__init__(epsilon=epsilon, ignore_index=ignore_index)
        self.shifts = shifts

    def __call__(self, model_output: Any, labels: Any, shift_labels: bool = False, **kwargs: Any) -> Any:
        return super().__call__(model_output, labels, shift_labels=shift_labels or self.shifts, **kwargs)


def find_link(model: nn.Module) -> RoutingLink | None:
    """The routing link of an extended model, also inside PEFT or data-parallel wrappers."""
    links = (vars(module).get("moe_link") for module in model.modules())
    return next((link for link in links if isinstance(link, RoutingLink)), None)


def _require_link(model: nn.Module) -> RoutingLink:
    link = find_link(model)
    if link is not None:
        return link
    name = type(base_model(model)).__name__
    if moe_parts(model):
        raise ValueError(
            f"this {name} has stock routers, which leave no records. Extend it first, which changes no result: "
            "`extend(model, MoeExtension(router=TopKRouterConfig()))`. Or train it with the stock `Trainer`."
        )
    raise ValueError(
        f"{name} is a dense model, or one of an unsupported architecture: there is nothing for MoETrainer to do. "
        "Make a Mixture-of-Experts of it with `upcycle(model, ...)`, or train it with the stock `Trainer`."
    )
