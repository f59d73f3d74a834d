"""The configuration of DeepSpeed for a stock Mixture-of-Experts, with its experts spread over the processes (AutoEP).

DeepSpeed puts blocks of its own in place of those of the architectures that it knows, so this is for stock models. The
fields are those of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .modeling.moe_families import get_family
from .modeling.moe_structure import config_value, gate_rule


# Model types that AutoEP has a preset for, and its name.
AUTOEP_PRESETS = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "minimax_m3_vl_text": "minimax_m3",
    "mixtral": "mixtral",
    "qwen2_moe": "qwen3_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_moe": "qwen3_moe",
}
# Composites whose text model has one.
_COMPOSITES = {"minimax_m3_vl": "minimax_m3_vl_text", "qwen3_5_moe": "qwen3_5_moe_text"}


def deepspeed_config(
    model: PreTrainedModel | PreTrainedConfig,
    expert_parallel_size: int,
    *,
    zero_stage: int = 1,
    offload_optimizer: bool = False,
    num_processes: int | None = None,
) -> dict[str, Any]:
    """The settings with which DeepSpeed trains a stock model under expert parallelism, as `TrainingArguments` takes
    them: `deepspeed=deepspeed_config(model, 8)`, or a JSON file with them.

    What the trainer knows itself (batch size, clipping, precision) is left to it by `"auto"`, the optimizer too.

    Args:
        model (`PreTrainedModel` or `PreTrainedConfig`):
            A stock model of a family in [`AUTOEP_PRESETS`], or its config.
        expert_parallel_size (`int`):
            Processes that hold all experts of a layer together. It divides the number of experts.
        zero_stage (`int`, *optional*, defaults to 1):
            What ZeRO splits beside: nothing (0), the states of the optimizer (1), the gradients too (2).
        offload_optimizer (`bool`, *optional*, defaults to `False`):
            Whether the optimizer and its states are on the CPU (ZeRO-Offload). Needs stage 1 or 2.
        num_processes (`int`, *optional*):
            Of the training, to check that `expert_parallel_size` divides it.

    Returns:
        `dict[str, Any]`: JSON-safe settings.

    Raises:
        ValueError: for an extended model, an architecture without a preset, or sizes that do not fit.

    Example:
        ```python
        >>> settings = deepspeed_config(model, expert_parallel_size=4, zero_stage=2)
        >>> arguments = TrainingArguments("out", deepspeed=settings)
        ```
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    preset = _preset(config)
    _check_number("expert_parallel_size", expert_parallel_size)
    if zero_stage not in (0, 1, 2):
        raise ValueError(
            f"`zero_stage` must be 0, 1 or 2, got {zero_stage!r}. Stage 3 splits parameters as well, which AutoEP "
            "supports for some settings only; write such a configuration by hand."
        )
    if offload_optimizer and zero_stage == 0:
        raise ValueError("`offload_optimizer` needs `zero_stage` 1 or 2: without ZeRO nothing is offloaded.")
    family = get_family(config.model_type)
    assert family is not None and family.moe is not None
    experts = int(config_value(config, family.moe.num_experts, 0))
    if experts % expert_parallel_size:
        fitting = [size for size in range(1, experts + 1) if experts % size == 0]
        raise ValueError(
            f"`expert_parallel_size` ({expert_parallel_size}) must divide the {experts} experts of a layer: {fitting}."
        )
    if num_processes is not None:
        _check_number("num_processes", num_processes)
        if num_processes % expert_parallel_size:
            raise ValueError(
                f"`num_processes` ({num_processes}) must be a multiple of `expert_parallel_size` "
                f"({expert_parallel_size})."
            )
    rule = gate_rule(family.moe, config)
    zero: dict[str, Any] = {"stage": zero_stage}
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
        "expert_parallel": {
            "enabled": True,
            "autoep_size": expert_parallel_size,
            "preset_model": preset,
            # As the stock gate does it; a preset holds for several families, which differ here. Groups and the scale
            # of the weights are read from the model's config.
            "score_func": rule.score,
            "route_norm": rule.renormalize,
        },
    }


def _preset(config: PreTrainedConfig) -> str:
    kind = config.model_type
    if kind.startswith("moe_ext_") or getattr(config, "moe_ext", None):
        raise ValueError(
            f"this model ({kind}) is extended, and AutoEP would put its own blocks in place of ours: routers and "
            "parts would be lost without a word. Train it with `MoETrainer` and "
            '`DistributedConfig(fsdp_size=N, ep_size=N, ep_implementation="moe_ext")`, or `restore` the stock model.'
        )
    if kind in _COMPOSITES:
        raise ValueError(
            f"AutoEP knows the text model of `{kind}` and not the composite: give the model whose type is "
            f"`{_COMPOSITES[kind]}`."
        )
    if kind not in AUTOEP_PRESETS:
        raise ValueError(
            f"AutoEP has no preset for `{kind}`; it has some for {sorted(AUTOEP_PRESETS)}. Transformers' own expert "
            "parallelism knows more: `DistributedConfig(fsdp_size=N, ep_size=N)`."
        )
    return AUTOEP_PRESETS[kind]


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
