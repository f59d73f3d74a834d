"""Experts that know languages: a ModuleFormer specialises, is cut down to one language, and learns a third one.

In less than a minute on a CPU, to see that it runs:

    python examples/moduleformer_modules.py --smoke --output_dir /tmp/modules

In full, about two minutes on one core:

    python examples/moduleformer_modules.py --output_dir modules

The languages are random: each token is followed by one of three others, with equal probability, so that no model can
be better than log 3 = 1.099 nats. Languages a and b have tokens of their own; c is made of both. Three things are
measured, each a claim of ModuleFormer (2306.04640), as means over seeds:

1. With the information loss, the choice of experts tells more of the language than without a loss.
2. Fine-tuned on a with the concentration loss, the model needs fewer experts for 95 % of the choices of each mixture
   than fine-tuned without; experts that less than 2 % of the tokens choose are pruned, which hardly changes the loss.
3. Two models learn c: in one, all parameters are trained, in the other, new experts and their rows of the gates. The
   second forgets less.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import HfArgumentParser

from hf_moe_ext.modeling.modeling_moduleformer import ModuleFormerConfig, ModuleFormerForCausalLM
from hf_moe_ext.module_editing import insert_experts, prune_experts, train_new_experts
from hf_moe_ext.usage import ExpertUsage, expert_usage


FIRST = {"a": 0, "b": 24, "c": 12}  # first of the 24 tokens of each language
VOCAB, LENGTH = 48, 24


@dataclass
class Arguments:
    """How long, and where the results go."""

    output_dir: str = field(default="modules", metadata={"help": "Folder of results.json and table.md."})
    steps: int = field(default=300, metadata={"help": "Optimizer steps of the first training; half as many after it."})
    batch: int = field(default=16, metadata={"help": "Sequences in a step."})
    seeds: int = field(default=3, metadata={"help": "Repetitions."})
    information: float = field(default=0.1, metadata={"help": "Weight of the information loss."})
    concentration: float = field(default=0.3, metadata={"help": "Weight of the concentration loss."})
    new_experts: int = field(default=4, metadata={"help": "New experts of every mixture."})
    gate_penalty: float = field(default=0.1, metadata={"help": "Weight of the squared norm of their gates."})
    smoke: bool = field(default=False, metadata={"help": "One seed, fewer steps."})


def sentences(language: str, count: int, seed: int) -> torch.Tensor:
    """Token ids (count, LENGTH) of a language."""
    first, grammar = FIRST[language], torch.Generator().manual_seed(FIRST[language])
    followers = torch.stack([torch.randperm(24, generator=grammar)[:3] for _ in range(24)])
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(24, (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        tokens.append(followers[tokens[-1], torch.randint(3, (count,), generator=generator)])
    return torch.stack(tokens, dim=1) + first


def make_model(args: Arguments, seed: int, information: float) -> ModuleFormerForCausalLM:
    """A small model with the information loss, or without a loss of its routers."""
    torch.manual_seed(seed)
    config = ModuleFormerConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_hidden_size=24,
        intermediate_size=48,
        moa_num_experts=6,
        mlp_num_experts=8,
        router_hidden_size=24,
        initializer_range=0.1,
        router_aux_loss_coef=information,
        bos_token_id=None,
        eos_token_id=None,
    )
    return ModuleFormerForCausalLM(config)


def with_loss(model: ModuleFormerForCausalLM, kind: str, weight: float) -> ModuleFormerForCausalLM:
    """A copy of a model whose routers have another loss."""
    config = copy.deepcopy(model.config)
    config.router_aux, config.router_aux_loss_coef = kind, weight
    twin = ModuleFormerForCausalLM(config)
    twin.load_state_dict(model.state_dict())
    return twin


def train(model: Any, languages: str, steps: int, args: Arguments, seed: int, rate: float, mask: Any = None) -> None:
    """Plain AdamW on equal parts of the languages."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    if mask is not None:
        mask.attach(optimizer)
    model.train()
    for step in range(steps):
        count = args.batch // len(languages)
        ids = torch.cat([sentences(name, count, 10_000 * seed + step) for name in languages])
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def losses(model: Any) -> dict[str, float]:
    """Held-out loss on each language, in nats per token."""
    found = {}
    with torch.no_grad():
        for name in FIRST:
            ids = sentences(name, 128, seed=-1)
            found[name] = model(ids, labels=ids).loss.item()
    return found


def usage(model: Any, language: str) -> dict[str, ExpertUsage]:
    """Which experts a language uses, on text that is not trained on."""
    return expert_usage(model, [{"input_ids": sentences(language, 128, seed=-2)}])


def information(model: Any) -> float:
    """Mutual information of the chosen expert and the language, a or b, in nats: a mean over mixtures."""
    found = [usage(model, name) for name in "ab"]
    values = []
    for key in found[0]:
        joint = torch.stack([part[key].frequency for part in found])
        joint = joint / joint.sum()
        independent = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
        values.append(torch.special.xlogy(joint, joint / independent.clamp_min(1e-30)).sum().item())
    return mean(values)


def covering(found: dict[str, ExpertUsage]) -> float:
    """Experts that take 95 % of the choices: a mean over mixtures."""
    return mean(part.num_covering(0.95) for part in found.values())


def one_seed(args: Arguments, seed: int) -> dict[str, Any]:
    """All measurements of one repetition."""
    result: dict[str, Any] = {}
    for name, weight in (("no loss", 0.0), ("information", args.information)):
        model = make_model(args, seed, weight)
        train(model, "ab", args.steps, args, seed, rate=3e-3)
        result[name] = {"loss": losses(model), "information": information(model)}
    for name, weight in (("tuned", 0.0), ("concentrated", args.concentration)):
        tuned = with_loss(model, "concentration", weight)
        train(tuned, "a", args.steps // 2, args, seed + 100, rate=1e-3)
        found, before = usage(tuned, "a"), losses(tuned)["a"]
        pruning = prune_experts(tuned, found, threshold=0.02)
        result[name] = {
            "covering": covering(found),
            "removed": sum(map(len, pruning.removed.values())),
            "loss": before,
            "pruned": losses(tuned)["a"],
        }
    for name in ("all parameters", "new experts"):
        learner = with_loss(model, "information", 0.0)
        mask = None
        if name == "new experts":
            insertion = insert_experts(learner, args.new_experts, seed=seed)
            mask = train_new_experts(learner, insertion, gate_penalty=args.gate_penalty)
        train(learner, "c", args.steps // 2, args, seed + 200, rate=3e-3, mask=mask)
        result[name] = {"loss": losses(learner)}
    return result


def table(results: Iterable[dict[str, Any]]) -> str:
    """Means over the seeds, as Markdown."""
    rows = list(results)

    def average(*path: str) -> float:
        values = []
        for row in rows:
            for name in path:
                row = row[name]
            values.append(float(row))  # type: ignore[arg-type]
        return mean(values)

    lines = ["| routers trained with | loss on a | on b | I(expert; language) |", "| --- | --- | --- | --- |"]
    for name in ("no loss", "information"):
        numbers = (average(name, "loss", "a"), average(name, "loss", "b"), average(name, "information"))
        lines.append(f"| {name} | {numbers[0]:.3f} | {numbers[1]:.3f} | {numbers[2]:.3f} |")
    lines += [
        "",
        "| then on a | experts for 95 % | removed | loss before | after |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ("tuned", "concentrated"):
        numbers = (average(name, "covering"), average(name, "removed"), average(name, "loss"), average(name, "pruned"))
        lines.append(f"| {name} | {numbers[0]:.1f} | {numbers[1]:.1f} | {numbers[2]:.4f} | {numbers[3]:.4f} |")
    lines += ["", "| then on c, training | loss on a | on b | on c |", "| --- | --- | --- | --- |"]
    for name, label in (
        ("information", "nothing"),
        ("all parameters", "all parameters"),
        ("new experts", "new experts"),
    ):
        numbers = tuple(average(name, "loss", language) for language in "abc")
        lines.append(f"| {label} | {numbers[0]:.2f} | {numbers[1]:.2f} | {numbers[2]:.2f} |")
    return "\n".join(lines) + "\n"


def main(args: Arguments) -> None:
    """Run all seeds, write and print the table."""
    if args.smoke:
        args.steps, args.seeds = min(args.steps, 100), 1
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = [one_seed(args, seed) for seed in range(args.seeds)]
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table(results), encoding="utf-8")
    print(f"The best possible loss is {math.log(3):.3f}.\n\n{table(results)}")


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    main(parsed)
