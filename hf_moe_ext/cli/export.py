"""`hf-moe export`: write a model Hub-ready and verify it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import UsageError, parse
from .common import check_output, load_model, load_tokenizer, require_tokenizer


@dataclass
class ExportArguments:
    """Write a model Hub-ready: weights, the code it needs, tokenizer, model card. Then load it in a clean process."""

    model: str = field(metadata={"help": "Folder, `.gguf` file or Hub id of a model."})
    output: str = field(metadata={"help": "Folder to write."})
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not beside the model."})
    report: str | None = field(default=None, metadata={"help": "Output folder of the training, for the model card."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is already there."})
    no_verify: bool = field(default=False, metadata={"help": "Do not load the result in a clean process."})
    max_shard_size: str | None = field(default=None, metadata={"help": 'Size of one weights file, such as "5GB".'})
    custom_generate: str | None = field(
        default=None, metadata={"help": "self_contrast: the folder generates with self-contrast decoding."}
    )
    push_to: str | None = field(default=None, metadata={"help": "Hub id to upload the folder to afterwards."})
    dry_run: bool = field(default=False, metadata={"help": "Check and describe; write nothing."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def run(argv: list[str]) -> int:
    """Export, verify, and upload where asked."""
    args: ExportArguments = parse("export", ExportArguments, argv, positional=("model", "output"))
    if args.max_shard_size is not None:
        from ..upcycling.safetensors_io import parse_size

        try:
            parse_size(args.max_shard_size)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if args.custom_generate not in (None, "self_contrast"):
        raise UsageError(f"`--custom_generate` must be self_contrast, got {args.custom_generate}.")
    check_output(args.output, args.overwrite)
    from ..hub import export_checked

    trust = args.trust_remote_code
    model = load_model(args.model, trust_remote_code=trust)
    if args.tokenizer is None:
        tokenizer = load_tokenizer(args.model, trust_remote_code=trust)
    else:
        tokenizer = require_tokenizer(args.tokenizer, trust_remote_code=trust)
    if tokenizer is None:
        print(f"{args.model} has no tokenizer, so none is written; `--tokenizer` names one.")
    if args.dry_run:
        print(f"{type(model).__name__}, {model.num_parameters():,} parameters")
        print(f"dry run: {args.output} was not written.")
        return 0
    result = export_checked(
        model,
        args.output,
        tokenizer=tokenizer,
        report=args.report,
        overwrite=args.overwrite,
        verify=not args.no_verify,
        max_shard_size=args.max_shard_size,
        custom_generate=args.custom_generate,
    )
    for group, names in result.files.items():
        print(f"{group}: {', '.join(names)}")
    print(result.verification or "not verified")
    print(f"wrote {result.path} ({result.size / 1e6:.1f} MB)")
    if args.push_to is not None:
        from huggingface_hub import HfApi

        api = HfApi()
        full_id = api.create_repo(args.push_to, exist_ok=True).repo_id
        print(f"uploaded {api.upload_folder(repo_id=full_id, folder_path=result.path)}")
    return 0
