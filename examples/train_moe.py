"""Train a Mixture-of-Experts: of a dense model or a stock one, on your text, on one device or many.

    python examples/train_moe.py examples/train_moe.yaml
    python examples/train_moe.py examples/train_moe.yaml --learning_rate 1e-4 --router '{"type": "top_k"}'
    accelerate launch --num_processes 2 examples/train_moe.py examples/train_moe.yaml

In less than a minute, to see that it runs:

    python examples/train_moe.py --smoke --output_dir /tmp/trained-moe

Options are those of `Arguments` below and of `MoETrainingArguments`, in a YAML file, on the command line, or both; the
command line wins. A dense model is upcycled by `method`; a stock Mixture-of-Experts gets the router; one that was
extended before is trained as it is. Written to `output_dir`: `model` for the Hub, checkpoints, the log, pictures of
losses and routing (with matplotlib), and held-out perplexity of every domain before and after.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import ConcatDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

import hf_moe_ext as moe
from hf_moe_ext.data import byte_tokenizer, load_domain, pack
from hf_moe_ext.evaluation import perplexity


@dataclass
class Arguments:
    """Which model, what becomes of it, which text."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id, of a dense model or of a MoE."})
    method: str = field(default="sparse", metadata={"help": "How a dense model is upcycled (`hf-moe list methods`)."})
    num_experts: int = field(default=4, metadata={"help": "Copies of each dense block."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Copies that a token uses."})
    layers: str = field(default="all", metadata={"help": 'Layers that are upcycled: "all", "every:2", ...'})
    method_options: str = field(default="{}", metadata={"help": "Options of the method, as JSON."})
    router: str = field(
        default='{"type": "top_k", "balance_coef": 0.01}',
        metadata={"help": 'The router, as its name or as JSON: {"type": "top_p", "threshold": 0.4}.'},
    )
    domains: list[str] = field(
        default_factory=lambda: ["prose"], metadata={"help": "Domains of text (`hf-moe list domains`)."}
    )
    text_files: list[str] = field(
        default_factory=list, metadata={"help": "Text files of your own; the last tenth of each is held out."}
    )
    length: int = field(default=256, metadata={"help": "Tokens in a window."})
    held_out: int = field(default=16, metadata={"help": "Most held-out windows of a domain or file."})
    smoke: bool = field(default=False, metadata={"help": "A tiny random model and a few steps."})

    def __post_init__(self) -> None:
        for name in ("method_options", "router"):  # JSON on the command line, what YAML makes of it in a file
            value = getattr(self, name)
            if isinstance(value, str) and value.lstrip().startswith("{"):
                setattr(self, name, json.loads(value))
        if not self.domains and not self.text_files:
            raise ValueError("nothing to train on: give `domains` or `text_files`.")


def parse(argv: list[str]) -> tuple[Arguments, moe.MoETrainingArguments]:
    """A YAML file in front, if any, then options.

    Raises:
        ValueError: for a key of the file that is no option.
    """
    parser = HfArgumentParser((Arguments, moe.MoETrainingArguments))
    if argv and argv[0].endswith((".yaml", ".yml")):
        values = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")) or {}
        known = {item.name for kind in (Arguments, moe.MoETrainingArguments) for item in fields(kind)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{argv[0]}: `{unknown[0]}` is no option of this script; see `--help`.")
        parser.set_defaults(**values)
        argv = argv[1:]
    args, training = parser.parse_args_into_dataclasses(argv)
    return args, training


def tiny_model() -> tuple[Any, Any]:
    """A random model with a tokenizer of single bytes."""
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config).eval(), tokenizer


def make_model(args: Arguments, seed: int) -> tuple[Any, Any]:
    """The model with its routers, and its tokenizer."""
    if args.smoke or args.model is None:
        source, tokenizer = tiny_model()
    else:
        source = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    if getattr(source.config, "moe_ext", None):
        return source, tokenizer
    if all(layer.kind == "dense" for layer in moe.describe(source).layers):
        counts = {"num_experts": args.num_experts, "num_experts_per_tok": args.num_experts_per_tok}
        options = {**counts, "layers": args.layers, "seed": seed, **args.method_options}
        return moe.upcycle(source, args.method, router=args.router, **options), tokenizer
    return moe.extend(source, moe.MoeExtension(router=args.router)), tokenizer


def load_text(args: Arguments, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """Windows to train on, and held-out ones by domain or file."""
    train, held_out = [], {}
    for name in args.domains:
        train.append(pack(load_domain(name), tokenizer, args.length))
        held_out[name] = pack(load_domain(name, "test"), tokenizer, args.length, limit=args.held_out)
    for path in map(Path, args.text_files):
        text = path.read_text(encoding="utf-8")
        cut = len(text) * 9 // 10
        train.append(pack([text[:cut]], tokenizer, args.length))
        held_out[path.name] = pack([text[cut:]], tokenizer, args.length, limit=args.held_out)
    return ConcatDataset(train), held_out


def main(args: Arguments, training: moe.MoETrainingArguments) -> dict[str, Any]:
    """Run all steps; returns what was measured."""
    if args.smoke:
        args.length, args.held_out = 64, 8
        training.max_steps, training.learning_rate, training.logging_steps = 20, 3e-3, 5
    set_seed(training.seed)
    model, tokenizer = make_model(args, training.seed)
    train, held_out = load_text(args, tokenizer)
    trainer = moe.MoETrainer(model=model, args=training, train_dataset=train)
    first = trainer.is_world_process_zero()
    if first:
        print(moe.describe(model))
    before = {name: perplexity(model, windows).perplexity for name, windows in held_out.items()}
    trainer.train()
    trainer.save_state()
    after = {name: perplexity(model, windows) for name, windows in held_out.items()}
    result = {
        "domains": [
            {"name": name, "upcycled": before[name], "trained": score.perplexity, "mean_k": score.mean_k}
            for name, score in after.items()
        ]
    }
    if first:
        folder = Path(training.output_dir)
        (folder / "evaluation.json").write_text(json.dumps(result, indent=2))
        for row in result["domains"]:
            print(f"{row['name']}: held-out perplexity {row['upcycled']:.2f} -> {row['trained']:.2f}")
        if importlib.util.find_spec("matplotlib"):
            moe.report(folder)
        moe.export(model, folder / "model", tokenizer=tokenizer, report=training.output_dir, overwrite=True)
        print(f"wrote {folder / 'model'}")
    return result


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
