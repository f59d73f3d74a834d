"""What happens around the steps of `MoETrainer`: routers are driven, time is taken, the history is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from ..modeling.moe_router import MoERouter
from .moe_training_arguments import MoETrainingArgumentsMixin
from .routing_history import append_history, rewind_history
from .routing_metrics import LayerStatistics


if TYPE_CHECKING:
    from .trainer_mixin import MoETrainerMixin

logger = logging.get_logger(__name__)


class RoutingCallback(TrainerCallback):
    """Drives the routers of a `MoETrainer` and writes its history. The trainer adds it by itself."""

    def __init__(self, trainer: MoETrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: MoETrainingArgumentsMixin, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        source = trainer.begin_measuring()
        if state.is_world_process_zero:
            logger.info(str(trainer.parameter_report()))
            if args.routing_metrics:
                rewind_history(args.output_dir, state.global_step, source)
        for module in trainer.scheduled:
            length = module.schedule_steps
            if length is not None and length > state.max_steps:
                what = f"`{type(module).__name__.lower()}`"
                if isinstance(module, MoERouter):
                    what = f"the `{module.moe_config.type}` router"
                raise ValueError(
                    f"the schedule of {what} takes {length} optimizer steps, this training has {state.max_steps}. "
                    "Train longer, or shorten the schedule in its config."
                )
        self._tell_routers(state)
        trainer.meter.start_clock()

    def _tell_routers(self, state: TrainerState) -> None:
        self.trainer.link.step = state.global_step
        for module in self.trainer.scheduled:
            module.schedule(state.global_step, state.max_steps)

    def on_optimizer_step(
        self, args: MoETrainingArgumentsMixin, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.adaptive_balance is not None:
            self.trainer.adaptive_balance.step(self.trainer.reduce_sum)
        counts, listening = self.trainer.metrics.end_step(), self.trainer.updated_routers
        if not listening:
            return
        # Every process packs the same layers, also one whose forward left some out.
        sizes = {router.moe_site.key: router.moe_site.num_experts for router in listening}
        zeros = {key: torch.zeros(size, dtype=torch.int64) for key, size in sizes.items()}
        packed = torch.cat([counts.get(key, zero).to(args.device) for key, zero in zeros.items()])
        reduced = dict(zip(sizes, self.trainer.reduce_sum(packed).split(list(sizes.values())), strict=True))
        for router in listening:
            router.after_optimizer_step(reduced[router.moe_site.key])

    def on_step_end(
        self, args: MoETrainingArgumentsMixin, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Before a checkpoint of this step is written, so that it holds the settings of the next one.
        self._tell_routers(state)
        self.trainer.meter.end_step()

    def on_evaluate(
        self, args: MoETrainingArgumentsMixin, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.meter.start_clock()

    def on_save(
        self, args: MoETrainingArgumentsMixin, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.meter.start_clock()

    def on_log(
        self, args: MoETrainingArgumentsMixin, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        statistics, self.trainer.layer_statistics = self.trainer.layer_statistics, {}
        domains, self.trainer.domain_statistics = self.trainer.domain_statistics, {}
        if statistics and state.is_world_process_zero:
            line: dict[str, Any] = {"step": state.global_step, "layers": _as_dicts(statistics)}
            if domains:
                line["domains"] = {name: _as_dicts(layers) for name, layers in domains.items()}
            append_history(args.output_dir, line)

    def on_train_end(
        self, args: MoETrainingArgumentsMixin, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.link.step = None
        if self.trainer.adaptive_balance is not None:
            self.trainer.adaptive_balance.end()


def _as_dicts(layers: dict[str, LayerStatistics]) -> dict[str, Any]:
    return {key: layer.to_dict() for key, layer in layers.items()}


class _ShortProgress(ProgressCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=_means_only(logs), **kwargs)


class _ShortPrinter(PrinterCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=_means_only(logs), **kwargs)


def _means_only(logs: dict[str, float] | None) -> dict[str, float] | None:
    return logs and {name: value for name, value in logs.items() if name.count("/") < 2}


def shorten_console_logs(trainer: Trainer) -> None:
    """Leave the series of single layers out of what the progress bar prints; loggers get them all."""
    for stock, short in ((ProgressCallback, _ShortProgress), (PrinterCallback, _ShortPrinter)):
        if any(type(callback) is stock for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(stock)
            trainer.add_callback(short)
