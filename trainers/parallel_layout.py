"""What cannot be trained on several processes, said before a training starts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..modeling.moe_capacity import CapacityGate
from ..modeling.moe_router import MoERouter
from .freezing import base_model


# Ways of Transformers to bring tokens to experts that count the ids of a token in a table of E places.
_COUNTING = ("auto", "all_to_all")


def check_layout(model: nn.Module, args: Any, routers: Iterable[MoERouter]) -> None:
    """Refuse layouts of `from_pretrained(distributed_config=...)` that would fail later, or go wrong.

    Args:
        model: what `MoETrainer` is given.
        args: the arguments of the training.
        routers: of the model.

    Raises:
        ValueError: for tensor parallelism on CPUs, `train_experts`, `fsdp` or `deepspeed` on top, or a way to the
            experts that cannot leave slots out.
    """
    inner: Any = base_model(model)
    layout = getattr(inner.config, "distributed_config", None)
    if not getattr(inner, "is_distributed_loading_by_transformers", False) or layout is None:
        return
    if layout.tp_size > 1 and args.device.type == "cpu":
        raise ValueError(
            f"the model is split by tensor parallelism (`tp_size={layout.tp_size}`), which accelerate does not train "
            "on CPUs. Load it with `DistributedConfig(fsdp_size=N, ep_size=N)`, where every process has its own batch."
        )
    if args.train_experts is not None:
        raise ValueError("`train_experts` works on whole tensors; `distributed_config` splits them.")
    if args.fsdp or args.deepspeed:
        raise ValueError("`distributed_config` has split the model already; leave `fsdp` and `deepspeed` out.")
    if layout.ep_size > 1 and layout.ep_implementation in _COUNTING:
        names = sorted({router.moe_config.type for router in routers if _leaves_slots(router)})
        if names or any(isinstance(module, CapacityGate) for module in inner.modules()):
            what = f"the routers {names}" if names else "a capacity"
            raise ValueError(
                f'`ep_implementation="{layout.ep_implementation}"` needs every slot of a token to be used, and {what} '
                'may leave some. Use `DistributedConfig(ep_implementation="moe_ext")`, after `import hf_moe_ext`.'
            )


def check_fsdp(args: Any, shards: bool) -> None:
    """Refuse `fsdp` where accelerate would quietly train whole copies (DDP) in its place, as it does on CPUs.

    Args:
        args: the arguments of the training.
        shards: whether the model is or will be sharded.

    Raises:
        ValueError: it will not.
    """
    wanted = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and not shards and args.world_size > 1:
        raise ValueError(
            f"`fsdp` is asked for, but accelerate does not shard on this device ({args.device.type}) and would train "
            "a whole copy in each process. Load the model with "
            "`from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N))`, or leave `fsdp` out."
        )


def _leaves_slots(router: MoERouter) -> bool:
    """Whether it may: those that say how many slots there are say so because not all of them are used."""
    kind = type(router)
    own = any("num_slots" in vars(base) for base in kind.__mro__ if base is not MoERouter)
    counts = own or hasattr(router.moe_config, "max_slots")
    return counts or kind.mixes_tokens or bool(router.moe_site.zero_experts)
