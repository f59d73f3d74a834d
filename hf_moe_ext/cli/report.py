"""`hf-moe report`: pictures of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from .common import parse


@dataclass
class ReportArguments:
    """Where the run is, and where the pictures go."""

    directory: str = field(metadata={"help": "Output folder of MoETrainer."})
    output: str | None = field(default=None, metadata={"help": "Folder for the pictures; the run's own by default."})


def run(argv: list[str]) -> int:
    """Draw and print the paths."""
    args: ReportArguments = parse("report", ReportArguments, argv, positional=("directory",))
    from ..reporting import report

    for path in report(args.directory, args.output):
        print(f"wrote {path}")
    return 0
