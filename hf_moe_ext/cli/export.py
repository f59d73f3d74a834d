"""`hf-moe export`: write a model Hub-ready and verify it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .common import check_output, load_model, load_tokenizer, parse


@dataclass
class ExportArguments:
    """What to export, and where to."""

    model: str = field(metadata={"help": "Model folder (a training checkpoint, say)."})
    output: str = field(metadata={"help": "Folder to write."})
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not beside the model."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is already there."})
    no_verify: bool = field(default=False, metadata={"help": "Do not load the result in a clean process."})
    push_to: str | None = field(default=None, metadata={"help": "Hub id to upload the folder to afterwards."})
    dry_run: bool = field(default=False, metadata={"help": "Check; write nothing."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def run(argv: list[str]) -> int:
    """Export, verify, and upload where asked."""
    args: ExportArguments = parse("export", ExportArguments, argv, positional=("model", "output"))
    check_output(args.output, args.overwrite)
    from ..hub import export

    model = load_model(args.model, trust_remote_code=args.trust_remote_code)
    if args.dry_run:
        print(f"dry run: {args.output} was not written.")
        return 0
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    export(model, args.output, tokenizer=tokenizer, overwrite=args.overwrite, verify=not args.no_verify)
    print(f"wrote {args.output}" + ("" if args.no_verify else " (verified in a clean process)"))
    if args.push_to is not None:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(args.push_to, exist_ok=True)
        print(api.upload_folder(repo_id=args.push_to, folder_path=args.output))
    return 0
