"""`hf-moe quantize`: a checkpoint with experts in few bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .arguments import UsageError, parse
from .common import check_output, load_config, load_model, load_tokenizer


@dataclass
class QuantizeArguments:
    """Store the experts of a model in 8, 4 or 2 bits. Its weights are quantised one by one while they are read."""

    model: str = field(metadata={"help": "Folder or Hub id of a model."})
    output: str = field(metadata={"help": "Folder to write."})
    experts: str = field(default="nf4", metadata={"help": "Format of the experts: int8, int4, nf4, ternary or none."})
    linear: str = field(default="none", metadata={"help": "Format of the linear layers around them, or none."})
    group_size: int | None = field(default=None, metadata={"help": "int4, nf4: numbers with one scale; 64."})
    zero_points: bool = field(default=False, metadata={"help": "int4: from the least to the largest number."})
    leave: str | None = field(
        default=None, metadata={"help": "Modules to leave as they are, such as o_proj,layers.0."}
    )
    dtype: str = field(default="auto", metadata={"help": "Of what is not quantised, and of the computation."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is already there."})
    no_verify: bool = field(default=False, metadata={"help": "Do not load the result in a clean process."})
    dry_run: bool = field(default=False, metadata={"help": "Check and describe; write nothing."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def run(argv: list[str]) -> int:
    """Load quantised and export."""
    args: QuantizeArguments = parse("quantize", QuantizeArguments, argv, positional=("model", "output"))
    from ..quantization import MoeQuantizationConfig, quantized_size

    options: dict[str, Any] = {
        name: None if getattr(args, name).lower() == "none" else getattr(args, name) for name in ("experts", "linear")
    }
    if args.leave is not None:
        options["modules_to_not_convert"] = [name.strip() for name in args.leave.split(",")]
    try:
        config = MoeQuantizationConfig(group_size=args.group_size, zero_points=args.zero_points, **options)
    except ValueError as error:
        raise UsageError(str(error).replace("modules_to_not_convert", "leave")) from error
    check_output(args.output, args.overwrite)
    if getattr(load_config(args.model, trust_remote_code=args.trust_remote_code), "quantization_config", None):
        raise ValueError(f"{args.model} is quantized already. Start from the full weights.")
    trust = args.trust_remote_code
    model = load_model(args.model, trust_remote_code=trust, dtype=args.dtype, quantization_config=config)
    from ..hub import export_checked
    from ..patching import describe

    print(describe(model))
    sizes = quantized_size(model)
    print(f"{sizes['total'] / 1e6:,.1f} MB, of which {sizes['quantized'] / 1e6:,.1f} MB in few bits")
    if args.dry_run:
        print(f"dry run: {args.output} was not written.")
        return 0
    tokenizer = load_tokenizer(args.model, trust_remote_code=trust)
    result = export_checked(
        model, args.output, tokenizer=tokenizer, overwrite=args.overwrite, verify=not args.no_verify
    )
    print(result.verification or "not verified")
    print(f"wrote {result.path}")
    return 0
