"""`hf-moe extend`: a stock MoE checkpoint with other routers, or a stock checkpoint with LoRA experts."""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import UsageError, parse
from .common import (
    ADAPTERS,
    PARTS,
    check_output,
    load_config,
    load_model,
    load_tokenizer,
    parse_parts,
    parse_router,
    require_moe,
)


@dataclass
class ExtendArguments:
    """Give a stock MoE checkpoint other routers, or parts beside them; its weights stay as they are. LoRA experts go
    with dense checkpoints, too."""

    model: str = field(metadata={"help": "Folder or Hub id of a stock MoE model."})
    output: str = field(metadata={"help": "Folder to write."})
    router: str | None = field(
        default=None, metadata={"help": 'Router: "top_p", "top_p:threshold=0.4" or JSON (`hf-moe list routers`).'}
    )
    zero_experts: str | None = field(
        default=None, metadata={"help": 'Zero-computation experts, such as "zero=1,copy=1".'}
    )
    shared_experts: str | None = field(
        default=None, metadata={"help": 'A shared expert, such as "intermediate_size=256".'}
    )
    momentum: str | None = field(default=None, metadata={"help": 'Momentum between layers, such as "decay=0.7".'})
    capacity: str | None = field(
        default=None, metadata={"help": 'The most tokens of an expert in training, such as "factor=1.25".'}
    )
    lora_experts: str | None = field(
        default=None, metadata={"help": 'LoRA experts: "mix_lora", "mola:r=4", or "num_lora_experts=4,r=8".'}
    )
    expert_lora: str | None = field(
        default=None, metadata={"help": 'An adapter on each routed expert, such as "r=8,lora_dropout=0.05".'}
    )
    seed: int = field(default=0, metadata={"help": "Seed of what a router has beside the stock gate."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is already there."})
    no_verify: bool = field(default=False, metadata={"help": "Do not load the result in a clean process."})
    dry_run: bool = field(default=False, metadata={"help": "Check and describe; write nothing."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def run(argv: list[str]) -> int:
    """Extend and export."""
    args: ExtendArguments = parse("extend", ExtendArguments, argv, positional=("model", "output"))
    router = parse_router(args.router)
    parts = parse_parts(**{name: getattr(args, name) for name in (*PARTS, *ADAPTERS)})
    if router is None and not parts:
        raise UsageError(
            "nothing to extend by: give `--router` (`hf-moe list routers`), `--zero_experts`, `--shared_experts`, "
            "`--momentum`, `--capacity`, `--lora_experts` or `--expert_lora`."
        )
    check_output(args.output, args.overwrite)
    config = load_config(args.model, trust_remote_code=args.trust_remote_code)
    if require_moe(args.model, config, dense="lora_experts" in parts):
        raise ValueError(f"{args.model} is extended already. Start from the stock model, or edit its `moe_ext`.")
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    from transformers import set_seed

    from ..hub import export_checked
    from ..modeling.configuration_moe_ext import MoeExtension
    from ..patching import describe, extend

    set_seed(args.seed)
    extension = MoeExtension.from_dict({**({} if router is None else {"router": router.to_dict()}), **parts})
    model = extend(load_model(args.model, trust_remote_code=args.trust_remote_code), extension)
    print(describe(model))
    if args.dry_run:
        print(f"dry run: {args.output} was not written.")
        return 0
    result = export_checked(
        model, args.output, tokenizer=tokenizer, overwrite=args.overwrite, verify=not args.no_verify
    )
    print(result.verification or "not verified")
    print(f"wrote {result.path}")
    return 0
