"""Checkpoints that appear in one piece, also of models that are split over processes, and resuming from the last one
that is whole."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import rotate_checkpoints
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..modeling.moe_lora import adapter_names
from ..modeling.moe_structure import refuse_reentrant
from .freezing import base_model, moe_parts


if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.get_logger(__name__)

STATE_NAME = "moe_trainer_state.pt"
_STAGING_NAME = ".checkpoint_in_progress"
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "*/adapter_model.safetensors",
    "pytorch_model_fsdp.bin",
    "pytorch_model_fsdp_*",
    "latest",  # DeepSpeed's
)


class CheckpointMixin(_Trainer):
    """The part of `MoETrainerMixin` that saves and resumes. Checkpoints are written aside and moved in place when they
    are complete.

    - `train(resume_from_checkpoint=True)` passes over checkpoints that something cut off.
    - Models split by `from_pretrained(distributed_config=...)`, which the stock trainer does not resume, are saved
      with the state of their optimizer, and resumed by any number of processes.
    """

    _staging: str | None
    _resumed: dict[str, Any]
    _tr_loss: torch.Tensor

    @property
    def is_split(self) -> bool:
        """Whether `from_pretrained(distributed_config=...)` split the model over the processes."""
        return bool(getattr(self, "is_distributed_loading_by_transformers", False))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # --- saving ---

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write into a hidden folder and move the finished checkpoint in place: none is ever seen half-written."""
        run_dir = self._get_output_dir(trial)
        staging = os.path.join(run_dir, _STAGING_NAME)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_split:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from .sharded_checkpoint import save_optimizer

        save_optimizer(self.model, _plain(self.optimizer), output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _state_dict(self) -> dict[str, Any]:
        """What has been measured since the last log. Every process must call it."""
        loss = self.reduce_sum(self._tr_loss.clone()) / self.accelerator.num_processes
        return {
            "metrics": self.metrics.state_dict(self.reduce_sum),
            "domains": {} if self.domain_metrics is None else self.domain_metrics.state_dict(self.reduce_sum),
            "meter": self.meter.state_dict(self.reduce_sum, self.accelerator.num_processes),
            "loss": loss.cpu(),
            "last_logged": self._globalstep_last_logged,
            "balance": {} if self.adaptive_balance is None else self.adaptive_balance.coefs,
        }

    # --- resuming ---

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_split or hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        from .sharded_checkpoint import load_weights

        problem = checkpoint_problem(resume_from_checkpoint)
        if problem:
            raise ValueError(f"{resume_from_checkpoint} is no whole checkpoint: {problem}.")
        missing = load_weights(self.model, resume_from_checkpoint)
        self._issue_warnings_after_load(SimpleNamespace(missing_keys=missing, unexpected_keys=[]))

    def _load_best_model(self) -> None:
        if self.is_split and self.state.best_model_checkpoint is not None:
            logger.info(f"Loading the best model from {self.state.best_model_checkpoint}.")
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._load_stock_state(checkpoint)
        path = os.path.join(checkpoint or "", STATE_NAME)
        self._resumed = {"source": os.path.dirname(os.path.abspath(checkpoint))} if checkpoint else {}
        if checkpoint and os.path.isfile(path):
            self._resumed |= torch.load(path, map_location="cpu", weights_only=True)

    def _load_stock_state(self, checkpoint: str | None) -> None:
        """The optimizer's state and the scheduler's, in the form in which the checkpoint has them."""
        from .sharded_checkpoint import OPTIMIZER_FOLDER, load_optimizer

        if checkpoint is not None and os.path.isdir(os.path.join(checkpoint, OPTIMIZER_FOLDER)):
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    f"{checkpoint} is of a model that was split by `distributed_config`. Resume it so, or in one "
                    "process; or load its model with `from_pretrained` and train it anew with `fsdp` or `deepspeed`."
                )
            load_optimizer(self.model, _plain(self.optimizer), checkpoint)
            scheduler = os.path.join(checkpoint, "scheduler.pt")
            self._load_schedule(torch.load(scheduler, map_location="cpu", weights_only=True))
        elif checkpoint is not None and self.is_split and os.path.isfile(os.path.join(checkpoint, "optimizer.pt")):
            raise ValueError(
                f"{checkpoint} is of a model that was not split, and numbers the state of its optimizer by other "
                "groups than this training has. Resume it without `distributed_config`; or load its model with "
                "`from_pretrained(..., distributed_config=...)` and start a training of it."
            )
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_schedule(self, state: dict[str, Any]) -> None:
        """How many groups an optimizer has depends on how the model is split; lists by group are this training's."""
        groups = self.optimizer.param_groups
        own = self.lr_scheduler.state_dict() | {"_last_lr": [group["lr"] for group in groups]}
        by_group = {name for name, value in own.items() if isinstance(value, list) and len(value) == len(groups)}
        self.lr_scheduler.load_state_dict(state | {name: own[name] for name in by_group if name in state})

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
        processes = self.accelerator.num_processes
        self.meter.load_state_dict(mine.get("meter", {}), state.get("meter", {}), processes)
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
        needed |= adapter_names(self.model)
        missing = sorted(needed.intersection(load_result.missing_keys))
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors of routers and experts, such as `{missing[0]}`: it is "
                "in the format for publishing, or from another model. Load it with `from_pretrained` and start "
                "training from there; `resume_from_checkpoint` takes checkpoints that MoETrainer wrote."
            )
        super()._issue_warnings_after_load(load_result)


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The checkpoint of a run with the highest step among those that are whole; `None` where there is none at all.

    Others are named in a warning: a process that was killed while it wrote, a full disk or a broken copy leave them.
    `MoETrainer` itself does not, but the stock trainer may have begun the run.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    folder, steps = Path(folder), {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir() else ():
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if path.is_dir() and step.isdecimal():
            steps[int(step)] = path
    problems = []
    for _, path in sorted(steps.items(), reverse=True):
        problem = checkpoint_problem(path)
        if problem is None:
            return str(path)
        logger.warning_once(f"{path} is passed over, since it is not whole: {problem}.")
        problems.append(f"{path.name}: {problem}")
    if problems:
        raise ValueError(f"no checkpoint in {folder} is whole, so none can be resumed ({'; '.join(problems)}).")
    return None


def checkpoint_problem(folder: str | os.PathLike[str]) -> str | None:
    """What a checkpoint lacks to be whole, in words; `None` for a whole one. Reads the ends of files, not all of them.
    The stock trainer writes `trainer_state.json` last, so where that is there, nothing before it was left out."""
    folder = Path(folder)
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except ValueError:
        return "trainer_state.json is cut off"
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return "it has no weights"
    for index in folder.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"{index.name} is cut off"
        absent = sorted(name for name in names if not (folder / name).is_file())
        if absent:
            return f"{absent[0]} is missing"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix == ".safetensors" and not _is_whole_safetensors(path):
            return f"{name} is cut off"
        if path.suffix in (".pt", ".pth", ".bin") and not _is_whole_pickle(path):
            return f"{name} is cut off"
        if path.is_dir() and any(path.glob("*.distcp")) and not (path / ".metadata").is_file():
            return f"{name}/.metadata is missing"
        if path.name == "optimizer_shards" and not (path / "settings.json").is_file():
            return f"{name}/settings.json is missing"
    return None


def _is_whole_safetensors(path: Path) -> bool:
    """Whether a file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length or length > 100_000_000:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return size == 8 + length + max(ends, default=0)


def _is_whole_pickle(path: Path) -> bool:
    """Whether what `torch.save` wrote has its end, which is a table of contents. Older forms have none to look at."""
    with path.open("rb") as file:
        start = file.read(2)
    return zipfile.is_zipfile(path) if start == b"PK" else bool(start) and start != b"\0\0"


def _plain(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


@contextlib.contextmanager
def without_refusal(model: nn.Module | None, args: Any) -> Iterator[None]:
    """The stock trainer refuses to be made for checkpoints of split models unless they hold the model only, since it
    does not save more. This one does."""
    split = getattr(model, "is_distributed_loading_by_transformers", False)
    wanted, args.save_only_model = args.save_only_model, args.save_only_model or split
    try:
        yield
    finally:
        args.save_only_model = wanted


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
