"""`hf-moe inspect`: what stands where. Reads the config alone; no weights are loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from .arguments import parse
from .common import empty_model, is_gguf, load_config, load_model


@dataclass
class InspectArguments:
    """Show what stands where in a model. Only its config is read."""

    model: str = field(metadata={"help": "Model folder, `.gguf` file or Hub id."})
    json: bool = field(default=False, metadata={"help": "Print JSON."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def run(argv: list[str]) -> int:
    """Print the layer table."""
    args: InspectArguments = parse("inspect", InspectArguments, argv, positional=("model",))
    from ..patching import describe

    if is_gguf(args.model):
        model = load_model(args.model)
    else:
        config = load_config(args.model, trust_remote_code=args.trust_remote_code)
        model = empty_model(args.model, config, trust_remote_code=args.trust_remote_code)
    description = describe(model)
    declaration = getattr(model.config, "moe_ext", None)
    if args.json:
        print(json.dumps({**asdict(description), "moe_ext": declaration}, indent=2))
        return 0
    print(description)
    if declaration:
        print("\nmoe_ext: " + json.dumps(declaration))
    return 0
