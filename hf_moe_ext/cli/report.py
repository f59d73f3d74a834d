"""`hf-moe report`: pictures of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import parse


@dataclass
class ReportArguments:
    """Draw what a training run recorded: losses, load of the experts, entropy and experts per token."""

    directory: str = field(metadata={"help": "Output folder of a training."})
    output: str | None = field(
        default=None, metadata={"help": "Folder for the pictures; DIRECTORY/report if not given."}
    )


def run(argv: list[str]) -> int:
    """Draw and print the paths."""
    args: ReportArguments = parse("report", ReportArguments, argv, positional=("directory", "output"))
    from ..reporting import report

    for path in report(args.directory, args.output):
        print(f"wrote {path}")
    return 0
