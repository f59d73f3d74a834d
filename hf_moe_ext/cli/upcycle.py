"""`hf-moe upcycle`: a dense checkpoint becomes a Mixture-of-Experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .common import check_output, check_source, load_model, load_tokenizer, parse, parse_router


@dataclass
class UpcycleArguments:
    """From which dense checkpoint, to which folder, and how."""

    model: str = field(metadata={"help": "Folder, `.gguf` file or Hub id of a dense model."})
    output: str = field(metadata={"help": "Folder to write."})
    method: str = field(default="sparse", metadata={"help": "Upcycling method (`hf-moe list methods`)."})
    num_experts: int = field(default=8, metadata={"help": "Experts per layer."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts per token."})
    router: str | None = field(default=None, metadata={"help": 'Router: "top_p:renormalize=true", or JSON.'})
    layers: str = field(default="all", metadata={"help": 'Layers: "all", "every:2", or "0,2,4".'})
    target: str = field(default="auto", metadata={"help": "auto, stock (loads without this package) or ext."})
    gate_init: str = field(default="normal", metadata={"help": "How gates start (`hf-moe list gates`)."})
    granularity: int | None = field(default=None, metadata={"help": "granular: parts each expert is cut into."})
    drop_ratio: float | None = field(default=None, metadata={"help": "drop: share of neurons drawn anew."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is already there."})
    dry_run: bool = field(default=False, metadata={"help": "Check and describe; write nothing."})


def run(argv: list[str]) -> int:
    """Upcycle: streaming from a safetensors folder, through memory otherwise."""
    args: UpcycleArguments = parse("upcycle", UpcycleArguments, argv, positional=("model", "output"))
    options: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("method", "num_experts", "num_experts_per_tok", "target", "gate_init", "seed")
    }
    options["router"] = parse_router(args.router)
    options["layers"] = [int(i) for i in args.layers.split(",")] if args.layers[:1].isdigit() else args.layers
    for name in ("granularity", "drop_ratio"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    check_output(args.output, args.overwrite)
    if not args.model.endswith(".gguf"):
        check_source(args.model)
    from ..patching import describe
    from ..upcycling import upcycle, upcycle_checkpoint

    streams = not args.model.endswith(".gguf") and any(Path(args.model).glob("*.safetensors"))
    if streams and not args.dry_run:
        print(upcycle_checkpoint(args.model, args.output, overwrite=args.overwrite, **options))
    else:
        model = upcycle(load_model(args.model), **options)
        print(describe(model))
        if args.dry_run:
            print(f"dry run: {args.output} was not written.")
            return 0
        from ..hub import export

        export(model, args.output, tokenizer=load_tokenizer(args.model), overwrite=args.overwrite)
    print(f"wrote {args.output}")
    return 0
