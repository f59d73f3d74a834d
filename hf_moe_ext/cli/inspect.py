"""`hf-moe inspect`: what stands where. Reads the config alone; no weights are loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from .common import check_source, parse


@dataclass
class InspectArguments:
    """Which model to look at."""

    model: str = field(metadata={"help": "Model folder, `.gguf` file or Hub id."})
    json: bool = field(default=False, metadata={"help": "Print JSON."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def run(argv: list[str]) -> int:
    """Print the layer table."""
    args: InspectArguments = parse("inspect", InspectArguments, argv, positional=("model",))
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from ..patching import describe
    from .common import load_model

    if args.model.endswith(".gguf"):
        model = load_model(args.model)
    else:
        check_source(args.model)
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
        auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=args.trust_remote_code)
    description = describe(model)
    if args.json:
        print(json.dumps({**asdict(description), "moe_ext": getattr(model.config, "moe_ext", None)}, indent=2))
        return 0
    print(description)
    if getattr(model.config, "moe_ext", None):
        print("\nmoe_ext: " + json.dumps(model.config.moe_ext))
    return 0
