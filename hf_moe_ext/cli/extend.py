"""`hf-moe extend`: a stock MoE checkpoint with other routers."""

from __future__ import annotations

from dataclasses import dataclass, field

from .common import check_output, load_model, load_tokenizer, parse, parse_router


@dataclass
class ExtendArguments:
    """From which checkpoint, to which folder, with which router."""

    model: str = field(metadata={"help": "Folder or Hub id of a stock MoE model."})
    output: str = field(metadata={"help": "Folder to write."})
    router: str = field(metadata={"help": 'Router: "top_p", "top_p:threshold=0.4" or JSON.'})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is already there."})
    dry_run: bool = field(default=False, metadata={"help": "Check and describe; write nothing."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def run(argv: list[str]) -> int:
    """Extend and export."""
    args: ExtendArguments = parse("extend", ExtendArguments, argv, positional=("model", "output"))
    router = parse_router(args.router)
    check_output(args.output, args.overwrite)
    from ..hub import export
    from ..modeling.configuration_moe_ext import MoeExtension
    from ..patching import describe, extend

    model = extend(load_model(args.model, trust_remote_code=args.trust_remote_code), MoeExtension(router=router))
    print(describe(model))
    if args.dry_run:
        print(f"dry run: {args.output} was not written.")
        return 0
    export(model, args.output, tokenizer=load_tokenizer(args.model), overwrite=args.overwrite)
    print(f"wrote {args.output}")
    return 0
