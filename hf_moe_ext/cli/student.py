"""`hf-moe student`: a checkpoint with fewer layers, to be taught by the one it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .arguments import UsageError, parse
from .common import check_output, load_config


@dataclass
class StudentArguments:
    """Write a student: some layers of a teacher, with their weights. From folder to folder, tensor by tensor."""

    model: str = field(metadata={"help": "Folder or Hub id of the teacher, with safetensors."})
    output: str = field(metadata={"help": "Folder to write."})
    keep_layers: str | None = field(
        default=None, metadata={"help": 'Layers that stay: "0,1,3", "0:7,8:15". All but every 8th if not given.'}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is already there."})


def run(argv: list[str]) -> int:
    """Write the student."""
    args: StudentArguments = parse("student", StudentArguments, argv, positional=("model", "output"))
    kept = None if args.keep_layers is None else read_numbers(args.keep_layers)
    check_output(args.output, args.overwrite)
    load_config(args.model)
    from ..students import make_student_checkpoint

    print(make_student_checkpoint(args.model, args.output, kept, overwrite=args.overwrite))
    print(f"wrote {Path(args.output).expanduser().resolve()}")
    return 0


def read_numbers(text: str) -> list[int]:
    """`"0,2:4"` as `[0, 2, 3]`.

    Raises:
        UsageError: for anything else.
    """
    numbers: list[int] = []
    for item in text.split(","):
        first, colon, end = item.strip().partition(":")
        if not first.isdigit() or (colon and not end.isdigit()):
            raise UsageError(f'`--keep_layers` must be numbers and ranges such as "0,1,4:7", got "{text}".')
        numbers += range(int(first), int(end)) if colon else [int(first)]
    return numbers
