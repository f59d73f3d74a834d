"""`hf-moe kernels export` and `hf-moe kernels tune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .arguments import UsageError, parse


if TYPE_CHECKING:
    from ..kernels.triton_tune import LayerShape
    from ..kernels.tuning import Entry


USAGE = """usage: hf-moe kernels ACTION [options]

actions:
  export    write the kernels as a repository for the Hub
  tune      find the fastest sizes of the kernels for this GPU

`hf-moe kernels ACTION --help` shows the options of an action."""


@dataclass
class KernelExportArguments:
    """Write the kernels as a repository that the package `kernels` loads, from a folder or from the Hub."""

    output: str = field(metadata={"help": "Folder to write."})
    overwrite: bool = field(default=False, metadata={"help": "Replace kernels that are already there."})
    version: int = field(default=0, metadata={"help": "Version number; 0 says that the interface may change."})


@dataclass
class KernelTuneArguments:
    """Measure which sizes of the kernels are fastest on this GPU, and keep them for every later run."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a model; its config is read."})
    hidden: int | None = field(default=None, metadata={"help": "Hidden size, in place of a model."})
    intermediate: int | None = field(default=None, metadata={"help": "Width of an expert, in place of a model."})
    experts: int | None = field(default=None, metadata={"help": "Number of experts, in place of a model."})
    top_k: int | None = field(default=None, metadata={"help": "Experts of a token, in place of a model."})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16, float16 or float32."})
    rows: list[int] = field(
        default_factory=lambda: [1, 4, 16, 64, 256, 1024],
        metadata={"help": "Tokens that an expert gets, tokens x top_k / experts; each a power of 2 up to 1024."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def run(argv: list[str]) -> int:
    """Do one action."""
    actions = {"export": _export, "tune": _tune}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in actions:
        raise UsageError(f"unknown action `{argv[0]}`; known: {', '.join(actions)}.")
    return actions[argv[0]](argv[1:])


def _export(argv: list[str]) -> int:
    args: KernelExportArguments = parse("kernels export", KernelExportArguments, argv, positional=("output",))
    from ..kernel_export import LAYER, VARIANTS, export_kernels

    path = export_kernels(args.output, version=args.version, overwrite=args.overwrite)
    print(f"variants: {', '.join(VARIANTS)}; functions: experts, route; layer: {LAYER}")
    print(f"wrote {path}")
    return 0


def _tune(argv: list[str]) -> int:
    args: KernelTuneArguments = parse("kernels tune", KernelTuneArguments, argv)
    import torch

    dtype: Any = getattr(torch, args.dtype, None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UsageError(f"`--dtype` must be bfloat16, float16 or float32, got `{args.dtype}`.")
    if any(rows < 1 or rows > 1024 for rows in args.rows):
        raise UsageError(f"`--rows` must be numbers from 1 to 1024, got {args.rows}.")
    sizes = (args.hidden, args.intermediate, args.experts, args.top_k)
    if (args.model is None) == (None in sizes) or (args.model is not None and any(sizes)):
        raise UsageError("give either `--model`, or all of `--hidden`, `--intermediate`, `--experts` and `--top_k`.")
    if not torch.cuda.is_available():
        raise ValueError("tuning measures on a GPU, and PyTorch sees none here. Nothing was written.")
    from .._imports import is_available

    if not is_available("triton"):
        raise ImportError("the kernels for a GPU need the package `triton`: pip install hf-moe-ext[triton]")
    from ..kernels.tuning import add_to_user_table, read_table, user_table_path

    if user_table_path().exists():
        read_table(user_table_path())  # a damaged one is told before minutes are spent
    from ..kernels.triton_tune import tune

    entries: list[Entry] = []
    for shape in _shapes(args):
        print(shape)
        # Each layer is kept as soon as it is done, so that an interruption loses one at most.
        found = tune(shape, dtype, args.rows, tell=_print)
        add_to_user_table(found)
        entries += found
    print(f"wrote {len(entries)} entries to {user_table_path()}")
    return 0


def _print(entry: Entry) -> None:
    gain = entry.default_microseconds / entry.microseconds
    print(f"{entry.key.kernel:<16}{entry.key.n}x{entry.key.k}, {entry.key.rows} rows: "
          f"{entry.microseconds:.1f} us, {gain:.2f} times as fast as by rule")  # fmt: skip


def _shapes(args: KernelTuneArguments) -> list[LayerShape]:
    from ..kernels.triton_tune import LayerShape

    if args.model is None:
        return [LayerShape(args.hidden, args.intermediate, args.experts, args.top_k)]  # type: ignore[arg-type]
    from .common import empty_model, load_config

    config = load_config(args.model, trust_remote_code=args.trust_remote_code)
    return layer_shapes(empty_model(args.model, config, trust_remote_code=args.trust_remote_code), args.model)


def layer_shapes(model: Any, name: str) -> list[LayerShape]:
    """The different shapes of experts in a model, which may be without weights.

    Raises:
        ValueError: it has no experts that the kernels can run.
    """
    from ..kernels.expert_weights import read_experts
    from ..kernels.triton_tune import LayerShape
    from ..patching import describe

    top_k = max((layer.num_experts_per_tok for layer in describe(model).layers if layer.kind == "moe"), default=0)
    shapes = []
    for module in model.modules():
        if top_k and hasattr(module, "is_transposed") and hasattr(module, "down_proj"):
            read = read_experts(module)
            layout = (read.has_gate, read.is_transposed, read.is_concatenated)
            shapes.append(LayerShape(read.hidden_size, read.intermediate_size, read.num_experts, top_k, *layout))
    if not shapes:
        raise ValueError(f"{name} has no experts that the kernels can run.")
    return list(dict.fromkeys(shapes))
