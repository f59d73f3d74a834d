"""`hf-moe adapters`: mixtures of PEFT adapters, made, exported, saved apart, loaded and merged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import UsageError, parse
from .common import check_output, load_model, load_tokenizer, parse_router


USAGE = """usage: hf-moe adapters ACTION [options]

actions:
  mix       make a mixture of LoRA experts of PEFT adapters
  export    write each LoRA expert of a model as a PEFT adapter
  save      write adapters and routers without the base model
  load      give a base model what `save` wrote
  merge     fold adapters into the weights, or into a Mixture-of-Experts

`hf-moe adapters ACTION --help` shows the options of an action."""


@dataclass
class _Common:
    model: str = field(metadata={"help": "Folder or Hub id of a model."})
    output: str = field(metadata={"help": "Folder to write."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what is already there."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass
class MixArguments(_Common):
    """Make a mixture of LoRA experts of PEFT adapters of one base model."""

    adapters: list[str] = field(default_factory=list, metadata={"help": "Folders of the adapters."})
    num_experts_per_tok: int | None = field(default=None, metadata={"help": "Experts of a token; all if not given."})
    router: str | None = field(default=None, metadata={"help": "Router (`hf-moe list routers`); top-k if not given."})
    route_per: str = field(default="linear", metadata={"help": "linear or block: what has a router of its own."})
    init_router: str = field(default="normal", metadata={"help": "normal or zeros."})
    seed: int = field(default=0, metadata={"help": "Seed of the routers."})
    no_verify: bool = field(default=False, metadata={"help": "Do not load the result in a clean process."})


@dataclass
class ExportAdaptersArguments(_Common):
    """Write each LoRA expert of a model as a PEFT adapter of its own."""

    names: list[str] | None = field(default=None, metadata={"help": "Names of the experts; all if not given."})


@dataclass
class SaveArguments(_Common):
    """Write adapters and their routers without the base model."""


@dataclass
class LoadArguments(_Common):
    """Give a base model the adapters that `save` wrote."""

    adapters: str | None = field(default=None, metadata={"help": "Folder that `save` wrote."})
    no_verify: bool = field(default=False, metadata={"help": "Do not load the result in a clean process."})


@dataclass
class MergeArguments(_Common):
    """Fold adapters into the weights: those of the model, or those of one expert each of a Mixture-of-Experts."""

    into: str = field(default="base", metadata={"help": "base or moe."})
    adapter: str | None = field(default=None, metadata={"help": "The one LoRA expert to merge, with `--into base`."})
    no_verify: bool = field(default=False, metadata={"help": "Do not load the result in a clean process."})


def run(argv: list[str]) -> int:
    """Do one action."""
    actions = {"mix": _mix, "export": _export, "save": _save, "load": _load, "merge": _merge}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in actions:
        raise UsageError(f"unknown action `{argv[0]}`; known: {', '.join(actions)}.")
    return actions[argv[0]](argv[1:])


def _parse(action: str, kind: Any, argv: list[str]) -> Any:
    return parse(f"adapters {action}", kind, argv, positional=("model", "output"))


def _mix(argv: list[str]) -> int:
    args: MixArguments = _parse("mix", MixArguments, argv)
    if not args.adapters:
        raise UsageError("missing: `--adapters`, such as `--adapters adapters/code adapters/maths`.")
    router = parse_router(args.router)
    check_output(args.output, args.overwrite)
    from transformers import set_seed

    from ..lora.mixtures import active_adapters, mix_adapters

    set_seed(args.seed)
    options: dict[str, Any] = {"num_experts_per_tok": args.num_experts_per_tok, "route_per": args.route_per}
    model = mix_adapters(
        load_model(args.model, trust_remote_code=args.trust_remote_code),
        args.adapters,
        init_router=args.init_router,  # type: ignore[arg-type]
        router=router,
        **options,
    )
    print(f"experts: {', '.join(active_adapters(model))}")
    return _write(model, args)


def _write(model: Any, args: Any) -> int:
    from ..hub import export_checked

    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    result = export_checked(
        model, args.output, tokenizer=tokenizer, overwrite=args.overwrite, verify=not args.no_verify
    )
    print(result.verification or "not verified")
    print(f"wrote {result.path}")
    return 0


def _export(argv: list[str]) -> int:
    args: ExportAdaptersArguments = _parse("export", ExportAdaptersArguments, argv)
    from ..lora.saving import export_adapters

    model = load_model(args.model, trust_remote_code=args.trust_remote_code)
    for path in export_adapters(model, args.output, names=args.names, overwrite=args.overwrite):
        print(f"wrote {path}")
    return 0


def _save(argv: list[str]) -> int:
    args: SaveArguments = _parse("save", SaveArguments, argv)
    from ..lora.saving import save_adapters

    model = load_model(args.model, trust_remote_code=args.trust_remote_code)
    path = save_adapters(model, args.output, overwrite=args.overwrite)
    size = sum(file.stat().st_size for file in Path(path).iterdir())
    print(f"wrote {path} ({size / 1e6:.1f} MB)")
    return 0


def _load(argv: list[str]) -> int:
    args: LoadArguments = _parse("load", LoadArguments, argv)
    if args.adapters is None:
        raise UsageError("missing: `--adapters`, the folder that `hf-moe adapters save` wrote.")
    check_output(args.output, args.overwrite)
    from ..lora.saving import load_adapters

    model = load_model(args.model, trust_remote_code=args.trust_remote_code)
    return _write(load_adapters(model, args.adapters), args)


def _merge(argv: list[str]) -> int:
    args: MergeArguments = _parse("merge", MergeArguments, argv)
    if args.adapter is not None and args.into != "base":
        raise UsageError(f"`--adapter` merges one expert into the base; it excludes `--into {args.into}`.")
    check_output(args.output, args.overwrite)
    from ..lora.merging import merge_and_unload
    from ..lora.mixtures import set_adapter

    model = load_model(args.model, trust_remote_code=args.trust_remote_code)
    if args.adapter is not None:
        set_adapter(model, args.adapter)
    merged = merge_and_unload(model, into=args.into)  # type: ignore[arg-type]
    print(f"{type(merged).__name__}, {merged.num_parameters():,} parameters")
    return _write(merged, args)
