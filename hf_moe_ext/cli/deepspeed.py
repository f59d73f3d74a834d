"""`hf-moe deepspeed`: write the configuration of DeepSpeed for a stock model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from .arguments import UsageError, parse
from .common import load_config


@dataclass
class DeepSpeedArguments:
    """Write the configuration with which DeepSpeed trains a stock model under expert parallelism (AutoEP)."""

    model: str = field(metadata={"help": "Folder or Hub id of a model; its config is read."})
    output: str = field(metadata={"help": "JSON file to write."})
    expert_parallel_size: int = field(
        default=1, metadata={"help": "Processes that hold all experts of a layer together; divides their number."}
    )
    zero_stage: int = field(default=1, metadata={"help": "What ZeRO splits beside: 0, 1 or 2."})
    offload_optimizer: bool = field(default=False, metadata={"help": "Keep the optimizer on the CPU."})
    num_processes: int | None = field(default=None, metadata={"help": "Of the training, to check the sizes."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a file that is already there."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def run(argv: list[str]) -> int:
    """Check, and write the file."""
    args: DeepSpeedArguments = parse("deepspeed", DeepSpeedArguments, argv, positional=("model", "output"))
    path = Path(args.output)
    if path.is_dir():
        raise UsageError(f"`{path}` is a folder; name a JSON file to write.")
    if path.exists() and not args.overwrite:
        raise UsageError(f"`{path}` exists already. Name another file, or pass `--overwrite`.")
    from ..autoep import deepspeed_config
    from ..files import write_file

    config = load_config(args.model, trust_remote_code=args.trust_remote_code)
    settings = deepspeed_config(
        config,
        args.expert_parallel_size,
        zero_stage=args.zero_stage,
        offload_optimizer=args.offload_optimizer,
        num_processes=args.num_processes,
    )
    print(f"wrote {write_file(path, json.dumps(settings, indent=2) + chr(10))}")
    return 0
