"""A few examples of a task, a bank of adapters, open text: choose adapters and text, mix, and train.

On a tiny random model, in about a minute on a CPU:

    python examples/open_knowledge.py --smoke --output_dir /tmp/open_knowledge

On a real model (SmolLM2-135M, from a package) and real texts, in about half an hour on one core:

    python examples/open_knowledge.py --output_dir open_knowledge

A bank of eight adapters is trained with PEFT, one on each domain. The task mixes two of the domains, and is known by a
few examples alone. `select_experts` chooses two adapters by them, `select_data` chooses text for the training out of a
pool of all domains, and `MoETrainer` trains the mixture. The table compares with two adapters drawn at random, with
the best single one, and with the whole bank: held-out loss on the task before and after the same training.
"""

from __future__ import annotations

import ast
import copy
import importlib.metadata
import json
import sysconfig
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed

import hf_moe_ext as moe
from hf_moe_ext.data import byte_tokenizer, load_domain, pack
from hf_moe_ext.data.packages import SMOLLM2, package_file
from hf_moe_ext.evaluation import perplexity
from hf_moe_ext.lora.data_selection import embed_texts
from hf_moe_ext.trainers.freezing import train_only_adapter_routers


BANK = ("python", "maths", "prose", "plays", "humaneval", "codeio", "docstrings", "licences")
SMOKE_BANK = ("python", "prose", "docstrings", "licences")  # what needs no package


@dataclass
class Arguments:
    """How the bank and the mixtures are trained, and where the results go."""

    output_dir: str = field(default="open_knowledge", metadata={"help": "Folder of the bank and of results.json."})
    task: str = field(default="maths,humaneval", metadata={"help": "Domains that the task mixes."})
    shots: int = field(default=8, metadata={"help": "Examples of each domain of the task (K)."})
    choose: int = field(default=2, metadata={"help": "Adapters of a mixture (N)."})
    rank: int = field(default=8, metadata={"help": "Rank of the adapters."})
    bank_steps: int = field(default=16, metadata={"help": "Optimizer steps of each adapter of the bank."})
    steps: int = field(default=12, metadata={"help": "Optimizer steps of each mixture."})
    batch: int = field(default=2, metadata={"help": "Windows in a step."})
    length: int = field(default=128, metadata={"help": "Tokens in a window."})
    held_out: int = field(default=6, metadata={"help": "Held-out windows of each domain of the task."})
    pool: int = field(default=12, metadata={"help": "Windows of each domain in the pool of open text."})
    select: int = field(default=24, metadata={"help": "Windows to choose out of the pool (C)."})
    bank_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the bank."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the mixtures."})
    routers_only: bool = field(default=False, metadata={"help": "Train the routers alone, and no adapter."})
    seed: int = field(default=0, metadata={"help": "Of everything random."})
    smoke: bool = field(default=False, metadata={"help": "A tiny random model, four adapters and a few steps."})


def documents(name: str, split: Any = "train") -> list[str]:
    """The texts of a domain: those of the package, docstrings of Python, and licences of installed packages."""
    if name == "docstrings":
        folder = Path(sysconfig.get_path("stdlib"))
        names = ("argparse", "heapq", "statistics") if split == "test" else ("ast", "bisect", "copy", "enum", "typing")
        trees = [ast.parse((folder / f"{name}.py").read_text(encoding="utf-8")) for name in names]
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        return [ast.get_docstring(n) or "" for tree in trees for n in ast.walk(tree) if isinstance(n, kinds)]
    if name == "licences":
        found: dict[str, str] = {}
        for distribution in importlib.metadata.distributions():
            for file in distribution.files or ():
                if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
                    path = Path(str(distribution.locate_file(file)))
                    if path.is_file() and path.stat().st_size < 50_000:
                        text = path.read_text(encoding="utf-8", errors="replace")
                        found.setdefault(text, distribution.metadata["Name"])
        texts = sorted(found, key=lambda text: (found[text], len(text)))
        return texts[::5] if split == "test" else [text for i, text in enumerate(texts) if i % 5]
    return load_domain(name, split)


def tiny_model() -> tuple[Any, Any]:
    """A random model with a tokenizer of single bytes."""
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config), tokenizer


def train_bank(base: Any, windows: dict[str, Any], args: Arguments) -> dict[str, Path]:
    """One adapter of PEFT for each domain. Those that are there already are used."""
    folders = {name: Path(args.output_dir) / "bank" / name for name in windows}
    for name, folder in folders.items():
        if (folder / "adapter_config.json").is_file():
            continue
        set_seed(args.seed)
        targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets)
        model = get_peft_model(copy.deepcopy(base), config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.bank_rate)
        rows = windows[name].ids
        for step in tqdm(range(args.bank_steps), desc=name, leave=False):
            ids = rows[[(step * args.batch + i) % len(rows) for i in range(args.batch)]]
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
    return folders


def as_examples(rows: torch.Tensor, tokenizer: Any) -> list[dict[str, str]]:
    """Windows as examples: from the first half, the next few characters are the answer, and the whole second half
    stands for the reasoned answer."""
    found = []
    for row in rows:
        first, second = (tokenizer.decode(part) for part in row.split(len(row) // 2)[:2])
        found.append({"prompt": first, "answer": second[:4], "rationale": second})
    return found


def main(args: Arguments) -> list[dict[str, Any]]:
    """Run everything; returns the rows of the table."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    bank, task = BANK, args.task.split(",")
    if args.smoke:
        bank, task, args.shots, args.bank_steps, args.steps, args.length = (
            SMOKE_BANK,
            ["python", "prose"],
            3,
            30,
            4,
            48,
        )
        args.held_out, args.pool, args.select, args.bank_rate, args.rank = 3, 6, 8, 1e-2, 4
    set_seed(args.seed)
    base, tokenizer = tiny_model() if args.smoke else moe.from_gguf(package_file(SMOLLM2))
    base.eval()
    needed = args.bank_steps * args.batch + args.pool + args.shots
    texts = {name: pack(documents(name), tokenizer, args.length, limit=needed) for name in bank}
    # The examples and the pool are none of what the bank was trained on, where a domain has enough text.
    shots = torch.cat([texts[name].ids[-args.shots :] for name in task])
    pool = {name: window.ids[-args.shots - args.pool : -args.shots] for name, window in texts.items()}
    held_out = {name: pack(documents(name, "test"), tokenizer, args.length, limit=args.held_out) for name in task}
    folders = train_bank(base, texts, args)

    examples = as_examples(shots, tokenizer)
    found = moe.select_experts(
        base, folders, examples, args.choose, tokenizer=tokenizer, candidates=min(8, len(bank)), progress=True
    )
    print(found)
    rows = torch.cat(list(pool.values()))
    embed = {"pooling": "mean", "batch_size": 8}
    embeddings = [
        embed_texts([tokenizer.decode(row) for row in part], base, tokenizer, **embed) for part in (shots, rows)
    ]
    centre = embeddings[1].mean(0)  # states of a language model share a large part, which tells nothing
    chosen = moe.select_data(embeddings[0] - centre, embeddings[1] - centre, count=args.select, threshold=0.9)
    origin = [name for name, part in pool.items() for _ in part]
    counts = {name: sum(origin[i] == name for i in chosen.index) for name in bank}
    print(f"open text: {counts}, {len(chosen.dropped)} near copies dropped")
    training = [{"input_ids": row, "labels": row} for row in (*shots, *rows[list(chosen.index)])]

    def score(model: Any) -> float:
        return sum(perplexity(model, window).nats for window in held_out.values()) / len(held_out)

    generator = torch.Generator().manual_seed(args.seed)
    draws = [torch.randperm(len(bank), generator=generator)[: args.choose].tolist() for _ in range(3)]
    best = min(found.scores, key=lambda name: found.scores[name].rank_accuracy + found.scores[name].rank_perplexity)
    candidates = {
        "chosen": list(found.chosen),
        "best single": [best],
        **{f"random {i + 1}": [bank[j] for j in draw] for i, draw in enumerate(draws)},
        "whole bank": list(bank),
    }
    out = [{"mixture": "base model", "adapters": "", "before": score(base), "after": None}]
    for label, names in candidates.items():
        set_seed(args.seed)
        model = moe.mix_adapters(
            copy.deepcopy(base), {name: folders[name] for name in names}, num_experts_per_tok=min(2, len(names))
        )
        before = score(model)
        if args.routers_only and len(names) > 1:
            train_only_adapter_routers(model)
        arguments = moe.MoETrainingArguments(
            str(Path(args.output_dir) / "runs" / label.replace(" ", "_")),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.learning_rate,
            seed=args.seed,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=max(args.steps // 2, 1),
        )
        trainer = moe.MoETrainer(model=model, args=arguments, train_dataset=training)
        if label == "chosen":
            print(trainer.parameter_report())
        trainer.train()
        out.append({"mixture": label, "adapters": ", ".join(names), "before": before, "after": score(model)})
        print(table(out[-1:]).splitlines()[-1], flush=True)
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"arguments": vars(args), "rows": out}, indent=2))
    print(f"\nHeld-out nats per token on {' and '.join(task)}, before and after the same training:\n\n{table(out)}")
    return out


def table(rows: list[dict[str, Any]]) -> str:
    """Nats by mixture."""
    lines = ["| mixture | adapters | before | after |", "| --- | --- | ---: | ---: |"]
    for row in rows:
        after = "" if row["after"] is None else f"{row['after']:.3f}"
        lines.append(f"| {row['mixture']} | {row['adapters']} | {row['before']:.3f} | {after} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
