"""`hf-moe train`: train a Mixture-of-Experts on text."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ..trainers.moe_training_arguments import MoETrainingArguments
from .arguments import UsageError, parse
from .common import (
    check_source,
    is_gguf,
    load_config,
    load_model,
    parse_router,
    require_moe,
    require_tokenizer,
    table,
)


DEFAULT_LENGTH = 512

# The name of the option in the installed transformers.
_NAMES = {item.name for item in fields(MoETrainingArguments)}
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"


@dataclass
class TrainArguments:
    """Train a Mixture-of-Experts on text. The trained model goes to OUTPUT_DIR/model, checkpoints beside it."""

    model: str = field(metadata={"help": "Folder or Hub id of a Mixture-of-Experts model."})
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": 'Text files, .jsonl files with "text", or domains (`hf-moe list domains`) as domain:python.'
        },
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "The same, held out; of a domain, its held-out part. Scored before and after."},
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not beside the model."})
    length: int | None = field(
        default=None, metadata={"help": f"Tokens per window; {DEFAULT_LENGTH}, or fewer if the model takes fewer."}
    )
    limit: int | None = field(default=None, metadata={"help": "Most windows of each entry of --data."})
    eval_limit: int | None = field(default=None, metadata={"help": "Most windows of each entry of --eval_data."})
    router: str | None = field(
        default=None, metadata={"help": "Router for a stock model; without it, it is trained and saved as it is."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16 or auto."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the run that is already in OUTPUT_DIR."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in OUTPUT_DIR."})
    dry_run: bool = field(default=False, metadata={"help": "Check and describe; write nothing."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass
class TrainingOptions(MoETrainingArguments):
    """`MoETrainingArguments` as the command line offers them."""

    _argument_group_name: ClassVar[str] = "training"
    _common_options: ClassVar[tuple[str, ...]] = (
        *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "bf16", _CHECKPOINTING),
        *("freeze_router", "train_experts", "train_only_moe", "routing_metrics", "routing_metrics_per_expert"),
        *("logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit"),
        *("report_to", "seed", "use_cpu"),
    )

    output_dir: str | None = field(default=None, metadata={"help": "Folder to write."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps (below 1: share of all)."})

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise UsageError("missing: OUTPUT_DIR. Usage: hf-moe train MODEL OUTPUT_DIR --data FILE ...")
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for


def run(argv: list[str]) -> int:
    """Check, train, score, save."""
    args: TrainArguments
    options: TrainingOptions
    args, options = parse("train", (TrainArguments, TrainingOptions), argv, positional=("model", "output_dir"))
    output = check_run(args, options)
    router = parse_router(args.router)
    training = [find_source(name) for name in args.data]
    held_out = [find_source(name) for name in args.eval_data]
    if is_gguf(args.model):
        raise ValueError(
            f"{args.model} is a GGUF file. `hf-moe upcycle` or `hf-moe export` make a model folder of it."
        )
    check_source(args.model)
    config = load_config(args.model, trust_remote_code=args.trust_remote_code)
    extended = require_moe(args.model, config)
    if extended and router is not None:
        raise ValueError(f"`--router` is for stock models; {args.model} has declared routers already. Leave it out.")
    trust = args.trust_remote_code
    tokenizer = require_tokenizer(args.tokenizer or args.model, trust_remote_code=trust)
    length = window_length(args.length, config)
    train_windows = windows(training, "train", tokenizer, length, args.limit)
    eval_windows = windows(held_out, "test", tokenizer, length, args.eval_limit)
    check_vocabulary({**train_windows, **eval_windows}, config, args)

    from transformers import set_seed

    from ..modeling.configuration_moe_ext import MoeExtension
    from ..modeling.router_top_k import TopKRouterConfig
    from ..patching import describe, extend

    set_seed(options.seed)
    model = load_model(args.model, trust_remote_code=trust, dtype=args.dtype)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is no causal language model, which is what `hf-moe train` trains.")
    if not extended:  # with the stock routers' own rule, so that it computes and is saved as before
        model = extend(model, MoeExtension(router=router or TopKRouterConfig()))
    print(str(describe(model)).splitlines()[0])
    for kind, named in (("train", train_windows), ("held out", eval_windows)):
        for name, data in named.items():
            print(f"{kind}: {name}: {len(data):,} windows of {length} tokens")
    steps = planned_steps(options, sum(map(len, train_windows.values())))
    options.logging_steps = min(options.logging_steps, max(steps, 1))  # a short run logs something, too
    if args.dry_run:
        print(f"{steps:,} steps of {_batch(options):,} windows")
        print(f"dry run: {output} was not written.")
        return 0
    return _Run(args, options, output, tokenizer, restore_after=not extended and router is None).run(
        model, train_windows, eval_windows
    )


def check_run(args: TrainArguments, options: TrainingOptions) -> Path:
    """Options that contradict each other, and an output folder that holds something.

    Returns:
        The output folder.
    """
    if not args.data:
        raise UsageError("missing: `--data`, such as `--data book.txt rows.jsonl domain:python`.")
    if args.resume and args.overwrite:
        raise UsageError("`--resume` goes on with a run and `--overwrite` replaces it; pass one of them.")
    if options.push_to_hub:
        raise UsageError(
            "`--push_to_hub` is not for `train`; upload afterwards with `hf-moe export ... --push_to ID`."
        )
    if str(getattr(options.eval_strategy, "value", options.eval_strategy)) != "no" and not args.eval_data:
        raise UsageError("`--eval_strategy` needs `--eval_data`.")
    for name in ("length", "limit", "eval_limit"):
        value, least = getattr(args, name), 2 if name == "length" else 1
        if value is not None and value < least:
            raise UsageError(f"`--{name}` must be at least {least}, got {value}.")
    output = Path(options.output_dir or "").expanduser()
    options.output_dir = str(output)
    for place in (output, *output.parents):
        if place.exists():
            if not place.is_dir():
                raise NotADirectoryError(f"cannot write {output}: {place} is a file. Choose another folder.")
            break
    if (output / "config.json").exists():
        raise FileExistsError(f"{output} is a model folder itself. Choose another folder for the run.")
    checkpoint = last_checkpoint(output)
    if args.resume and checkpoint is None:
        raise FileNotFoundError(f"{output} holds no checkpoint to resume from; leave out `--resume`.")
    if args.resume:
        last_complete_checkpoint(output)  # none that is whole is told before data and model are loaded
    if not (args.resume or args.overwrite or options.resume_from_checkpoint):
        found = next((path for path in (output / "model", checkpoint) if path is not None and path.exists()), None)
        if found is not None:
            raise FileExistsError(
                f"{output} already holds a run ({found.name}). Choose another folder, go on with `--resume`, or "
                "replace it with `--overwrite`."
            )
    return output


def last_complete_checkpoint(output: Path) -> str | None:
    """The newest checkpoint of a run that is whole."""
    from ..trainers.checkpoints import last_complete_checkpoint

    return last_complete_checkpoint(output)


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint of a run, whole or not."""
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(str(output)) if output.is_dir() else None
    return None if found is None else Path(found)


@dataclass(frozen=True)
class Source:
    """One entry of `--data`: a domain, or a file."""

    name: str
    path: Path | None = None


def find_source(text: str) -> Source:
    """Look an entry of `--data` up, without reading it.

    Raises:
        ValueError: for an unknown domain, or a folder.
        FileNotFoundError: where there is no such file.
    """
    from ..data import get_domain, list_domains

    if text.startswith("domain:"):
        return Source(get_domain(text.removeprefix("domain:")).name)
    path = Path(text).expanduser()
    if path.is_dir():
        raise ValueError(f"{text} is a folder; name the files in it, as in `--data {text.rstrip('/')}/*.txt`.")
    if not path.is_file():
        hint = f" Did you mean `domain:{text}`?" if text in {domain.name for domain in list_domains()} else ""
        raise FileNotFoundError(f"there is no data file {text}.{hint}")
    return Source(path.stem, path)


def read_source(source: Source, split: Any) -> list[str]:
    """The documents of a source.

    Raises:
        ValueError: where a file is no text, or a line of a .jsonl file is not as expected.
    """
    if source.path is None:
        from ..data import load_domain

        return load_domain(source.name, split)
    try:
        text = source.path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source.path} is no text in UTF-8 ({error.reason} at byte {error.start}).") from None
    if source.path.suffix not in (".jsonl", ".json"):
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {source.path} is not valid JSON: {error}.") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f'line {number} of {source.path} must be an object with "text", got {line[:60]!r}.')
        documents.append(row["text"])
    return documents


def windows(sources: list[Source], split: str, tokenizer: Any, length: int, limit: int | None) -> dict[str, Any]:
    """Token windows by name of the source.

    Raises:
        ValueError: where a source does not fill one window; the message names it.
    """
    from ..data import pack

    found: dict[str, Any] = {}
    for source in sources:
        name, number = source.name, 2
        while name in found:
            name, number = f"{source.name}_{number}", number + 1
        try:
            found[name] = pack(read_source(source, split), tokenizer, length, limit)
        except ValueError as error:
            if "fill one window" not in str(error):
                raise
            where = source.path or f"domain:{source.name}"
            raise ValueError(f"{where}: {error} Pass a smaller `--length`, or more text.") from None
    return found


def window_length(length: int | None, config: Any) -> int:
    """The length asked for, or a default that the model takes.

    Raises:
        ValueError: where the model takes fewer tokens.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 2:
        return length or DEFAULT_LENGTH
    if length is not None and length > longest:
        raise ValueError(f"`--length` is {length}, but the model takes at most {longest} tokens.")
    return length or min(DEFAULT_LENGTH, longest)


def check_vocabulary(named: dict[str, Any], config: Any, args: TrainArguments) -> None:
    """Refuse a tokenizer of another model."""
    size = config.get_text_config().vocab_size
    highest = max(int(data.ids.max()) for data in named.values())
    if highest >= size:
        raise ValueError(
            f"the tokenizer of {args.tokenizer or args.model} gives ids up to {highest}, but the model knows {size}. "
            "Pass the model's own with `--tokenizer`."
        )


def _batch(options: TrainingOptions) -> int:
    return options.train_batch_size * options.gradient_accumulation_steps * options.world_size


def planned_steps(options: TrainingOptions, count: int) -> int:
    """Optimizer steps of a run over `count` windows."""
    if options.max_steps > 0:
        return options.max_steps
    return math.ceil(math.ceil(count / _batch(options)) * options.num_train_epochs)


class _Run:
    """One training, after everything was checked."""

    def __init__(
        self, args: TrainArguments, options: TrainingOptions, output: Path, tokenizer: Any, restore_after: bool
    ) -> None:
        self.args, self.options, self.output = args, options, output
        self.tokenizer, self.restore_after = tokenizer, restore_after

    def run(self, model: Any, training: dict[str, Any], held_out: dict[str, Any]) -> int:
        """Train, score, save, and say what was written."""
        import torch

        from ..data import Windows
        from ..hub import export_checked
        from ..patching import restore
        from ..trainers import MoETrainer

        checkpoint = self.options.resume_from_checkpoint or (
            last_complete_checkpoint(self.output) if self.args.resume else None
        )
        if self.args.overwrite:
            self.remove_previous()
        use_cache = model.config.use_cache
        with _no_empty_folder(self.output):
            trainer = MoETrainer(
                model=model,
                args=self.options,
                train_dataset=Windows(torch.cat([data.ids for data in training.values()])),
                eval_dataset=held_out or None,
            )
            before = self.score(model, held_out, "before")
            try:
                metrics = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).metrics
            except KeyboardInterrupt:
                self.say_how_to_resume()
                raise
            trainer.save_state()
        if not trainer.is_world_process_zero():
            return 0
        after = self.score(model, held_out, "after")
        self.record(after)
        model.config.use_cache = use_cache
        if self.restore_after:
            restore(model)
        logged = any("loss" in entry for entry in trainer.state.log_history)
        result = export_checked(
            model.eval(),
            self.output / "model",
            tokenizer=self.tokenizer,
            report=self.output if logged else None,
            overwrite=self.args.overwrite or checkpoint is not None,
            verify=False,  # a training of hours is kept whatever a second copy of the model does to the memory
        )
        self.summary(metrics, before, after)
        for path in (result.path, *sorted(self.output.glob("checkpoint-*")), self.output / "trainer_state.json"):
            print(f"wrote {path}")
        print(f"\nNext:\n  hf-moe report {self.output}")
        print(f"  hf-moe export {self.output / 'model'} FOLDER --report {self.output}")
        return 0

    def remove_previous(self) -> None:
        """Checkpoints and logs of the run that is replaced. Its model is replaced when the new one is complete."""
        for path in self.output.glob("checkpoint-*"):
            shutil.rmtree(path)
        for name in ("trainer_state.json", "routing_history.jsonl", "evaluation.json"):
            (self.output / name).unlink(missing_ok=True)

    def score(self, model: Any, held_out: dict[str, Any], when: str) -> dict[str, Any]:
        """Held-out perplexity by source."""
        from ..evaluation import perplexity

        size = self.options.per_device_eval_batch_size
        show = None if self.options.disable_tqdm else when
        return {name: perplexity(model, data, batch_size=size, progress=show) for name, data in held_out.items()}

    def record(self, scores: dict[str, Any]) -> None:
        """For `hf-moe report` and the model card."""
        from ..files import write_file

        if scores:
            rows = [{"name": name, "trained": s.perplexity, "mean_k": s.mean_k} for name, s in scores.items()]
            write_file(self.output / "evaluation.json", json.dumps({"domains": rows}, indent=2))

    def say_how_to_resume(self) -> None:
        """Printed when a training is interrupted."""
        found = last_checkpoint(self.output)
        hint = "No checkpoint had been written; see `--save_steps`."
        if found is not None:
            hint = f"The same command with `--resume` goes on from {found}."
        print(f"\n{hint}", file=sys.stderr)

    def summary(self, metrics: dict[str, float], before: dict[str, Any], after: dict[str, Any]) -> None:
        """Loss, speed, and the perplexities beside each other."""
        speed, seconds = metrics["train_samples_per_second"], metrics["train_runtime"]
        print(f"train_loss {metrics['train_loss']:.4f}, {seconds:.1f} s, {speed:.1f} windows/s")
        if after:
            rows = [
                (name, f"{before[name].perplexity:.2f}", f"{s.perplexity:.2f}", f"{s.mean_k or 0:.2f}")
                for name, s in after.items()
            ]
            print(table(rows, ("held out", "perplexity before", "after", "experts/token")))


@contextlib.contextmanager
def _no_empty_folder(output: Path) -> Iterator[None]:
    """Do not leave an empty folder behind where nothing was written."""
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
