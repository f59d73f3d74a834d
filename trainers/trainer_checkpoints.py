"""Checkpoints of a trainer for models with routers: written in one piece, and exact to resume from."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import rotate_checkpoints

from ..modeling.moe_structure import refuse_reentrant
from .freezing import base_model, moe_parts


if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

STATE_NAME = "moe_trainer_state.pt"
_STAGING_NAME = ".checkpoint_in_progress"


class CheckpointMixin(_Trainer):
    """The part of `MoETrainerMixin` that saves and resumes."""

    _staging: str | None
    _resumed: dict[str, Any]
    _tr_loss: torch.Tensor

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write into a hidden folder and move the finished checkpoint in place: none is ever seen half-written."""
        run_dir = self._get_output_dir(trial)
        staging = os.path.join(run_dir, _STAGING_NAME)
        name = f"checkpoint-{self.state.global_step}"
        staged, final = os.path.join(staging, name), os.path.join(run_dir, name)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        push, self.args.push_to_hub = self.args.push_to_hub, False
        self._staging = staging
        try:
            with _in_live_format(base_model(self.model)):
                super()._save_checkpoint(model, trial)
            if not self.args.save_only_model:
                state = self._state_dict()
                if self.args.should_save:
                    torch.save(state, os.path.join(staged, STATE_NAME))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.state.best_model_checkpoint == staged:
                    self.state.best_model_checkpoint = final
                    self.state.save_to_json(os.path.join(staged, "trainer_state.json"))
                if os.path.isdir(final):
                    os.rename(final, os.path.join(staging, "replaced"))
                os.rename(staged, final)
        finally:
            self._staging = None
            self.args.push_to_hub = push
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        if self.state.best_model_checkpoint == staged:
            self.state.best_model_checkpoint = final
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(final)
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(output_dir=run_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _state_dict(self) -> dict[str, Any]:
        """What has been measured since the last log. Every process must call it."""
        loss = self.reduce_sum(self._tr_loss.clone()) / self.accelerator.num_processes
        return {
            "metrics": self.metrics.state_dict(self.reduce_sum),
            "domains": {} if self.domain_metrics is None else self.domain_metrics.state_dict(self.reduce_sum),
            "meter": self.meter.state_dict(self.reduce_sum),
            "loss": loss.cpu(),
            "last_logged": self._globalstep_last_logged,
            "balance": {} if self.adaptive_balance is None else self.adaptive_balance.coefs,
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint or "", STATE_NAME)
        self._resumed = {"source": os.path.dirname(os.path.abspath(checkpoint))} if checkpoint else {}
        if checkpoint and os.path.isfile(path):
            self._resumed |= torch.load(path, map_location="cpu", weights_only=True)

    def begin_measuring(self) -> str | None:
        """Reset all measurements, or take them from the checkpoint that is resumed; called when training begins.

        Returns:
            The folder whose history is continued.
        """
        refuse_reentrant(self.model)
        state, self._resumed = self._resumed, {}
        mine = state if self.accelerator.is_main_process else {}
        self.metrics.load_state_dict(mine.get("metrics", {}))
        if self.domain_metrics is not None:
            self.domain_metrics.load_state_dict(mine.get("domains", {}))
        self.meter.load_state_dict(mine.get("meter", {}), state.get("meter", {}))
        if self.adaptive_balance is not None:
            self.adaptive_balance.begin(state.get("balance", {}))
        if "loss" in state:
            self._tr_loss += state["loss"].to(self._tr_loss)
            self._globalstep_last_logged = state["last_logged"]
            # The final `train_loss` is the mean over the steps of this call.
            self._total_loss_scalar -= state["loss"].item()
        return state.get("source")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        experts = {
            id(p) for part in moe_parts(self.model) for m in (part.router, part.experts) for p in m.parameters()
        }
        needed = {name for name, parameter in self.model.named_parameters() if id(parameter) in experts}
        missing = sorted(needed.intersection(load_result.missing_keys))
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors of routers and experts, such as `{missing[0]}`: it is "
                "in the format for publishing, or from another model. Load it with `from_pretrained` and start "
                "training from there; `resume_from_checkpoint` takes checkpoints that MoETrainer wrote."
            )
        super()._issue_warnings_after_load(load_result)


@contextlib.contextmanager
def _in_live_format(model: nn.Module) -> Iterator[None]:
    """Save tensors under the names they have in the running model.

    `save_pretrained` translates them to the names of published checkpoints, which resuming would not find again.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained
