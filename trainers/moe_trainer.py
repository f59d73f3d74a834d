"""`MoETrainer`: the stock trainer for models with routers."""

from __future__ import annotations

from transformers import Trainer

from .trainer_mixin import MoETrainerMixin


class MoETrainer(MoETrainerMixin, Trainer):
    """`Trainer` for models with routers: made by `upcycle`, `extend`, or loaded from an extended checkpoint.

    It adds to the stock trainer:

    - the auxiliary losses by name and the loss without them (`moe/loss_balance`, `moe/lm_loss`, ...), so that
      `loss = moe/lm_loss + moe/aux_loss`; also with label smoothing or a `compute_loss_func` of your own, where the
      model does not see the labels and the trainer adds the losses. Evaluation losses never hold them;
    - routing metrics (`moe/mean_k`, `moe/entropy`, `moe/dead_experts`, `moe/layer_03/load_max`, ...) and the file
      `routing_history.jsonl` with the load of every expert;
    - schedules and updates of routers that have them;
    - distillation from a `teacher` (`moe/loss_distillation`), for the whole training or its first steps;
    - recorded routing in a column `routed_experts` of the data, which the forward then follows (see
      [`RoutingReplayCollator`]);
    - a second pass and a consistency loss (`moe/loss_consistency`) for routers that draw their experts;
    - `freeze_router`, `train_experts` and `train_only_moe` of [`MoETrainingArguments`]. A model with adapters has a
      frozen base: adapters and their routers are trained, and a column `task_ids` of the data goes to them;
    - checkpoints that appear in one piece, and from which training goes on bit for bit on a CPU.

    Args:
        model (`PreTrainedModel` or `PeftModel`, *optional*):
            An extended model. `model_init` may be given instead.
        args (`MoETrainingArguments`, *optional*):
            The arguments.
        teacher (`PreTrainedModel`, *optional*):
            A model to learn from, of the same vocabulary, as `distill_coef` and its neighbours in `args` say.
        kwargs:
            As in `Trainer`.

    Raises:
        TypeError: where `args` are no [`MoETrainingArguments`].
        ValueError: for a model without an extension, or an option that does not fit the model.

    Example:
        ```python
        >>> extend(model, MoeExtension(router=TopPRouterConfig(threshold=0.4)))
        >>> trainer = MoETrainer(model=model, args=MoETrainingArguments("out"), train_dataset=dataset)
        >>> trainer.train()
        ```
    """
