"""`hf-moe demo`: the whole path on real weights and real text, on a CPU, without a hub."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .common import UsageError, check_output, parse, table


@dataclass
class DemoArguments:
    """Where to write, and how long to take."""

    output: str = field(default="hf-moe-demo", metadata={"help": "Folder to write."})
    fast: bool = field(default=False, metadata={"help": "A short run, which still has to improve."})
    prepare: bool = field(default=False, metadata={"help": "Only fetch and convert the model and the texts."})
    model: str | None = field(default=None, metadata={"help": "A dense model to start from, instead of SmolLM2."})
    num_experts: int = field(default=4, metadata={"help": "Experts per converted layer."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})


@dataclass(frozen=True)
class Size:
    """How much is done in one run."""

    length: int
    batch: int
    steps: int
    held_out: int
    new_tokens: int
    learning_rate: float


FULL = Size(length=256, batch=4, steps=30, held_out=8, new_tokens=48, learning_rate=2e-4)
FAST = Size(length=128, batch=4, steps=10, held_out=4, new_tokens=12, learning_rate=3e-4)
DOMAINS = ("python", "maths", "prose")
QUESTION = "What is the capital of France?"


def run(argv: list[str]) -> int:
    """Upcycle, train, compare, chat, export, reload, draw."""
    args: DemoArguments = parse("demo", DemoArguments, argv, positional=("output",))
    if args.num_experts < 2:
        raise UsageError(f"`--num_experts` must be at least 2, got {args.num_experts}.")
    output = Path(args.output)
    check_output(str(output / "model"), overwrite=True)
    _step("A real dense model and real text")
    model, tokenizer = _load(args.model)
    from ..data import load_domain

    for name in DOMAINS:
        load_domain(name)
    if args.prepare:
        print("model and texts are in place.")
        return 0
    return _Demo(args, FAST if args.fast else FULL, output, tokenizer).run(model)


def _load(source: str | None) -> tuple[Any, Any]:
    if source is None:
        from ..data.packages import SMOLLM2, package_file
        from ..gguf import from_gguf

        return from_gguf(package_file(SMOLLM2))
    from .common import load_config, load_model, require_dense, require_tokenizer

    if not source.endswith(".gguf"):
        require_dense(source, load_config(source))
    return load_model(source, dtype="float32"), require_tokenizer(source)


def _step(title: str) -> None:
    print(f"\n== {title}", flush=True)


class _Demo:
    """One run; its methods are the steps, in order."""

    def __init__(self, args: DemoArguments, size: Size, output: Path, tokenizer: Any) -> None:
        from ..data import load_domain, pack

        self.args, self.size, self.output, self.tokenizer = args, size, output, tokenizer
        self.started = time.perf_counter()
        self.held_out = {
            name: pack(load_domain(name, "test"), tokenizer, size.length, limit=size.held_out) for name in DOMAINS
        }
        needed = size.steps * size.batch // len(DOMAINS) + 1
        self.training = {
            name: pack(load_domain(name, "train"), tokenizer, size.length, limit=needed) for name in DOMAINS
        }

    def run(self, dense: Any) -> int:
        from transformers import set_seed

        from ..data import get_domain
        from ..hub import export_checked
        from ..patching import describe
        from ..reporting import report
        from ..upcycling import upcycle

        set_seed(self.args.seed)
        print(f"{type(dense).__name__}, {dense.num_parameters():,} parameters")
        for name in DOMAINS:
            domain = get_domain(name)
            print(f"{name}: {domain.title}, from {domain.source} ({domain.licence})")
        dense_scores = self.score(dense, "dense")

        _step(f"Upcycle: every third layer gets {self.args.num_experts} experts and top-p routing")
        model = upcycle(
            dense,
            num_experts=self.args.num_experts,
            router={"type": "top_p", "threshold": 0.4, "max_slots": 2, "renormalize": True},
            layers="every:3",
            gate_init="hidden_avg",
            gate_prompts=self.prompts(),
            tokenizer=self.tokenizer,
            seed=self.args.seed,
        )
        del dense
        print(model.upcycle_report)
        print(describe(model).__str__().splitlines()[0])
        upcycled_scores = self.score(model, "upcycled")

        _step(f"Train routers and experts: {self.size.steps} steps of {self.size.batch * self.size.length} tokens")
        log = self.train(model)
        trained_scores = self.score(model, "trained")
        rows = [
            {
                "name": name,
                "dense": dense_scores[name].perplexity,
                "upcycled": upcycled_scores[name].perplexity,
                "trained": trained_scores[name].perplexity,
                "mean_k": trained_scores[name].mean_k,
                "tokens_per_second": trained_scores[name].tokens_per_second,
            }
            for name in DOMAINS
        ]

        _step("Ask it something")
        print(f"> {QUESTION}\n{self.chat(model)}")

        _step("Export, and load again in a clean process without this package")
        from ..files import write_file

        training = self.output / "training"
        write_file(training / "evaluation.json", json.dumps({"domains": rows}, indent=2))
        model.config.use_cache = True
        result = export_checked(
            model,
            self.output / "model",
            tokenizer=self.tokenizer,
            report=training,
            overwrite=True,
        )
        print(f"wrote {result.path} ({result.size / 1e6:.0f} MB)")
        print(result.verification)

        _step("Pictures")
        pictures = report(training, self.output / "report")
        self.summary(rows, log, pictures)
        worse = [row["name"] for row in rows if row["trained"] >= row["dense"]]
        if worse:
            print(f"\nThe trained model is not better than the dense one on: {', '.join(worse)}.")
            return 1
        return 0

    def prompts(self) -> list[list[str]]:
        """Texts that say what each expert is for: the domains, then plain questions for further experts."""
        from ..data import load_domain

        groups = [[text[:400] for text in load_domain(name)[:3]] for name in DOMAINS]
        groups.append([QUESTION, "Tell me about the weather today.", "Write a short letter to a friend."])
        return [groups[i % len(groups)] for i in range(self.args.num_experts)]

    def score(self, model: Any, label: str) -> dict[str, Any]:
        """Held-out perplexity per domain."""
        from ..evaluation import perplexity

        return {name: perplexity(model, data, progress=f"{label}: {name}") for name, data in self.held_out.items()}

    def train(self, model: Any) -> dict[str, Any]:
        """Train on the three domains in equal shares; returns the final metrics."""
        import torch
        from transformers import PrinterCallback, ProgressCallback

        from ..data import Windows
        from ..trainers import MoETrainer, MoETrainingArguments

        size, folder = self.size, self.output / "training"
        total = size.steps * size.batch
        # Rows of the domains alternate; a short domain is read again.
        rows = [
            self.training[name].ids[i % len(self.training[name])]
            for i in range(total // len(DOMAINS) + 1)
            for name in DOMAINS
        ]
        arguments = MoETrainingArguments(
            str(folder),
            max_steps=size.steps,
            per_device_train_batch_size=size.batch,
            learning_rate=size.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(2, size.steps // 10),
            weight_decay=0.0,
            train_only_moe=True,
            logging_steps=max(1, size.steps // 12),
            save_strategy="no",
            disable_tqdm=True,
            report_to=["tensorboard"] if _has_tensorboard() else [],
            use_cpu=True,
            seed=self.args.seed,
            dataloader_pin_memory=False,
        )
        trainer = MoETrainer(model=model, args=arguments, train_dataset=Windows(torch.stack(rows[:total])))
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_progress_bar())
        metrics = trainer.train().metrics
        trainer.save_state()
        return metrics

    def chat(self, model: Any) -> str:
        """A greedy answer through the chat template."""
        from .generate import encode

        inputs = encode(self.tokenizer, QUESTION, chat=bool(self.tokenizer.chat_template))
        out = model.generate(**inputs, max_new_tokens=self.size.new_tokens, do_sample=False)
        return self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def summary(self, rows: list[dict[str, Any]], log: dict[str, Any], pictures: list[Path]) -> None:
        """The table, the paths, and what to type next."""
        _step("Held-out perplexity")
        print(
            table(
                [
                    (
                        row["name"],
                        f"{row['dense']:.2f}",
                        f"{row['upcycled']:.2f}",
                        f"{row['trained']:.2f}",
                        f"{row['mean_k']:.2f}",
                        f"{row['tokens_per_second']:.0f}",
                    )
                    for row in rows
                ],
                ("domain", "dense", "upcycled", "trained", "experts/token", "tokens/s"),
            )
        )
        tokens = self.size.steps * self.size.batch * self.size.length
        print(f"\nTrained on {tokens:,} tokens in {log['train_runtime']:.0f} s.")
        print("Not compared: the dense model trained on the same tokens; it would improve too.")
        print(f"The whole run took {time.perf_counter() - self.started:.0f} s.\n")
        for path in (self.output / "model", self.output / "training", *pictures):
            print(f"wrote {path}")
        model = self.output / "model"
        print("\nNext:")
        print(f'  hf-moe generate {model} "Explain gravity to a child." --chat')
        print(f"  hf-moe inspect {model}")
        print("  hf-moe upcycle PATH_OR_ID my-moe --num_experts 8")


def _progress_bar() -> Any:
    """One bar with the figures that matter, where the stock callback prints every metric."""
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = tqdm(total=state.max_steps, desc="training", unit="step")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update(1)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            names = {"moe/lm_loss": "loss", "moe/mean_k": "experts", "moe/tokens_per_second": "tokens/s"}
            self.bar.set_postfix({short: f"{logs[key]:.2f}" for key, short in names.items() if key in logs})

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    return Bar()


def _has_tensorboard() -> bool:
    from .._imports import is_available

    return is_available("tensorboard")
