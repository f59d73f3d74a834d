"""`hf-moe upcycle`: a dense checkpoint becomes a Mixture-of-Experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import UsageError, parse
from .common import (
    PARTS,
    check_output,
    empty_model,
    is_gguf,
    load_config,
    load_model,
    load_tokenizer,
    parse_parts,
    parse_router,
    require_dense,
    require_tokenizer,
)


GATES_FROM_TEXTS = ("hidden", "hidden_avg", "cheap_embed")
_TEXTS = 32  # documents of a domain that calibration looks at


@dataclass
class UpcycleArguments:
    """Make a Mixture-of-Experts of a dense checkpoint. A safetensors folder is converted layer by layer."""

    model: str = field(metadata={"help": "Folder, `.gguf` file or Hub id of a dense model."})
    output: str = field(metadata={"help": "Folder to write."})
    method: str = field(default="sparse", metadata={"help": "Upcycling method (`hf-moe list methods`)."})
    sources: str | None = field(
        default=None, metadata={"help": "bam, btx: further models of the same seed, such as code-7b,law-7b."}
    )
    num_experts: int | None = field(default=None, metadata={"help": "Experts per layer; 8 unless models are mixed."})
    num_experts_per_tok: int | None = field(default=None, metadata={"help": "Experts per token; 2, and 1 for bam."})
    router: str | None = field(
        default=None, metadata={"help": 'Router: "top_p:renormalize=true", or JSON. Plain top-k if not given.'}
    )
    zero_experts: str | None = field(
        default=None, metadata={"help": 'Zero-computation experts beside them, such as "zero=1,copy=1".'}
    )
    shared_experts: str | None = field(
        default=None, metadata={"help": 'A shared expert beside them, such as "init=dense".'}
    )
    momentum: str | None = field(default=None, metadata={"help": 'Momentum between layers, such as "decay=0.7".'})
    capacity: str | None = field(
        default=None, metadata={"help": 'The most tokens of an expert in training, such as "factor=1.25".'}
    )
    layers: str = field(default="all", metadata={"help": 'Layers: "all", "every:2", or "0,2,4".'})
    target: str = field(default="auto", metadata={"help": "auto, stock (loads without this package) or ext."})
    gate_init: str = field(default="normal", metadata={"help": "How gates start (`hf-moe list gates`)."})
    gate_prompts: str | None = field(
        default=None, metadata={"help": "YAML or JSON file with a list of texts for each expert, where gates need it."}
    )
    gate_noise: float = field(default=0.0, metadata={"help": "Standard deviation of noise on the gates."})
    granularity: int | None = field(default=None, metadata={"help": "granular: parts each expert is cut into."})
    drop_ratio: float | None = field(default=None, metadata={"help": "drop: share of neurons drawn anew."})
    keep: float | None = field(default=None, metadata={"help": "masked: share of weights that are not set to zero."})
    rescale: bool | None = field(
        default=None, metadata={"help": "masked: divide the weights that are kept by `keep`."}
    )
    split_by: str | None = field(
        default=None, metadata={"help": "split: random, kmeans, coactivation, gradient or activation."}
    )
    shared_expert_size: int | None = field(
        default=None, metadata={"help": "split: neurons in a block that every token passes."}
    )
    predictor: str | None = field(default=None, metadata={"help": "moefication: centroid, or mlp with calibration."})
    scale: float | None = field(default=None, metadata={"help": "split, granular: factor on the output."})
    layout: str | None = field(
        default=None, metadata={"help": "read_me: fused, or shared (a shared expert of what all experts have)."}
    )
    slice_width: int | None = field(
        default=None, metadata={"help": "read_me: neurons of an expert; half of them all."}
    )
    calibration: str | None = field(
        default=None,
        metadata={"help": "Domains to look at, such as python,prose (`hf-moe list domains`), for what needs data."},
    )
    attention_kv: str | None = field(
        default=None, metadata={"help": "bam: expert (keys and values of its own) or shared."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is already there."})
    dry_run: bool = field(default=False, metadata={"help": "Check and describe; write nothing."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def run(argv: list[str]) -> int:
    """Upcycle: streaming from safetensors, through memory otherwise."""
    args: UpcycleArguments = parse("upcycle", UpcycleArguments, argv, positional=("model", "output"))
    names = ("method", "num_experts", "num_experts_per_tok", "target", "gate_init", "gate_noise", "seed")
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options["router"] = parse_router(args.router)
    options["layers"] = read_layers(args.layers)
    parts = parse_parts(**{name: getattr(args, name) for name in PARTS})
    if parts:
        options["parts"] = parts
    for name in (
        "granularity",
        "drop_ratio",
        "keep",
        "rescale",
        "split_by",
        "shared_expert_size",
        "scale",
        "predictor",
        "attention_kv",
        "layout",
        "slice_width",
    ):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if args.gate_init in GATES_FROM_TEXTS and args.gate_prompts is None:
        raise UsageError(f"`--gate_init {args.gate_init}` needs `--gate_prompts FILE`, with texts for each expert.")
    prompts = None if args.gate_prompts is None else read_prompts(args.gate_prompts)
    trust = args.trust_remote_code
    if args.sources is not None:
        return mix(args, options)
    check_output(args.output, args.overwrite)
    if not is_gguf(args.model):
        config = load_config(args.model, trust_remote_code=trust)
        require_dense(args.model, config)
        # Says better than the conversion would what is wrong with a config.
        empty_model(args.model, config, trust_remote_code=trust)
    from ..patching import describe
    from ..upcycling import upcycle, upcycle_checkpoint

    folder = Path(args.model)
    in_memory = is_gguf(args.model) or (folder.is_dir() and not any(folder.glob("*.safetensors")))
    if not (in_memory or prompts or args.calibration or args.dry_run):
        print(upcycle_checkpoint(args.model, args.output, overwrite=args.overwrite, **options))
    else:
        if prompts is not None:
            options |= {"gate_prompts": prompts, "tokenizer": require_tokenizer(args.model, trust_remote_code=trust)}
        if args.calibration is not None:
            from ..data import load_domain

            domains = [name.strip() for name in args.calibration.split(",")]
            options["calibration"] = {domain: load_domain(domain)[:_TEXTS] for domain in domains}
            options["tokenizer"] = require_tokenizer(args.model, trust_remote_code=trust)
        tokenizer = load_tokenizer(args.model, trust_remote_code=trust)
        model = upcycle(load_model(args.model, trust_remote_code=trust), **options)
        print(describe(model))
        print(model.upcycle_report)
        if args.dry_run:
            print(f"dry run: {args.output} was not written.")
            return 0
        from ..hub import export

        export(model, args.output, tokenizer=tokenizer, overwrite=args.overwrite)
    print(f"wrote {Path(args.output).expanduser().resolve()}")
    return 0


def mix(args: UpcycleArguments, options: dict[str, Any]) -> int:
    """Mix several checkpoints, from folder to folder."""
    from ..upcycling import upcycle_checkpoint

    unused = [name for name in ("calibration", "gate_prompts") if getattr(args, name) is not None]
    if unused or args.dry_run:
        word = f"--{unused[0]}" if unused else "--dry_run"
        raise UsageError(f"`{word}` does not go with `--sources`, which converts from folder to folder.")
    names = [args.model, *(name.strip() for name in str(args.sources).split(","))]
    check_output(args.output, args.overwrite)
    for name in names:
        require_dense(name, load_config(name, trust_remote_code=args.trust_remote_code))
    print(upcycle_checkpoint(names, args.output, overwrite=args.overwrite, **options))
    print(f"wrote {Path(args.output).expanduser().resolve()}")
    return 0


def read_layers(text: str) -> str | list[int | str]:
    """`"all"` and `"every:n"` as they are; `"0,2"` and `"encoder.1,encoder.3"` as lists."""
    if text.partition(":")[0] in ("all", "every"):
        return text
    items = [item.strip() for item in text.split(",")]
    return [int(item) if item.removeprefix("-").isdigit() else item for item in items]


def read_prompts(path: str) -> list[list[str]]:
    """Lists of texts from a YAML (or JSON) file.

    Raises:
        UsageError: where the file cannot be read or holds something else.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"`--gate_prompts` {path} cannot be read: {error}") from None
    valid = isinstance(data, list) and all(
        isinstance(group, list) and group and all(isinstance(text, str) for text in group) for group in data
    )
    if not valid:
        raise UsageError(f"`--gate_prompts` {path} must hold one list of texts for each expert.")
    return data
