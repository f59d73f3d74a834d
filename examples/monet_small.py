"""Train a small Monet on text of four domains, see which experts belong to which, and let it forget one.

In less than a minute on a CPU, to see that it runs:

    python examples/monet_small.py --smoke --output_dir /tmp/monet

In full, about three minutes on one core:

    python examples/monet_small.py --output_dir monet

A byte-level Monet with 1024 experts in each layer is trained from scratch on Python code, mathematics, a novel and
plays in equal parts. Then the mean score of every expert is taken on training text of each domain; an expert belongs
to a domain if its score there is at least twice that in any other. Removing the experts of one domain raises the
held-out loss on all; the table shows by how much, in nats per byte. A picture shows the scores of the experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, set_seed

import hf_moe_ext as moe
from hf_moe_ext.data import byte_tokenizer, load_domain, pack
from hf_moe_ext.evaluation import perplexity
from hf_moe_ext.monet_knowledge import attribute_experts, collect_expert_scores


DOMAINS = ("python", "maths", "prose", "plays")


@dataclass
class Arguments:
    """What is trained, and where the results go."""

    output_dir: str = field(default="monet", metadata={"help": "Folder of results.json, table.md and the picture."})
    steps: int = field(default=800, metadata={"help": "Optimizer steps."})
    batch: int = field(default=8, metadata={"help": "Windows in a step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "At its highest, after a quarter of the steps."})
    aux_coef: float = field(default=0.03, metadata={"help": "Weight of the losses of the routers."})
    length: int = field(default=128, metadata={"help": "Bytes in a window."})
    held_out: int = field(default=32, metadata={"help": "Held-out windows of each domain."})
    factor: float = field(default=2.0, metadata={"help": "How many times a score has to be above all others."})
    seed: int = field(default=0, metadata={"help": "Of weights and order."})
    smoke: bool = field(default=False, metadata={"help": "A few steps."})


def main(args: Arguments) -> dict[str, Any]:
    """Run everything; returns the results."""
    if args.smoke:
        args.steps, args.length, args.held_out = 30, 64, 8
    set_seed(args.seed)
    tokenizer = byte_tokenizer()
    config = moe.MonetConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        moe_experts=32,
        moe_topk=4,
        moe_dim=8,
        moe_heads=4,
        moe_groups=2,
        router_aux_loss_coef=args.aux_coef,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = moe.MonetForCausalLM(config)
    needed = args.steps * args.batch // len(DOMAINS) + 1
    training = {name: pack(load_domain(name), tokenizer, args.length, limit=needed) for name in DOMAINS}
    held_out = {name: pack(load_domain(name, "test"), tokenizer, args.length, limit=args.held_out) for name in DOMAINS}
    rows = [training[name][i % len(training[name])] for i in range(needed) for name in DOMAINS]
    arguments = moe.MoETrainingArguments(
        args.output_dir,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        # Pieces that nothing chooses get no gradient; they are lost in the first steps if these are large.
        warmup_steps=max(1, args.steps // 4),
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to=[],
        seed=args.seed,
    )
    trainer = moe.MoETrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    model.eval()

    def losses() -> dict[str, float]:
        return {name: perplexity(model, windows).nats for name, windows in held_out.items()}

    # Windows from all over the training text, not from the beginning of one of its documents.
    sample = {name: training[name].ids[:: max(1, len(training[name]) // 256)] for name in DOMAINS}
    scores = collect_expert_scores(
        model, {name: [{"input_ids": ids} for ids in sample[name].split(64)] for name in DOMAINS}
    )
    found = attribute_experts(scores, args.factor)
    before = losses()
    rises: dict[str, dict[str, float]] = {}
    for name in DOMAINS:
        for group, experts in enumerate(found[name]):
            model.set_expert_mask(group, experts)
        after = losses()
        rises[name] = {domain: after[domain] - before[domain] for domain in DOMAINS}
        model.clear_expert_masks()
    results = {
        "arguments": vars(args),
        "loss": before,
        "experts": {name: [len(experts) for experts in found[name]] for name in DOMAINS},
        "rise": rises,
    }
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    text = table(results)
    (folder / "table.md").write_text(f"{text}\n")
    draw(scores, folder / "experts.png")
    print(f"\n{text}")
    return results


def table(results: dict[str, Any]) -> str:
    """Experts of each domain, and what their removal does to every domain."""
    lines = ["| experts removed | number, by group | " + " | ".join(DOMAINS) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(DOMAINS))
    cells = " | ".join(f"{results['loss'][name]:.3f}" for name in DOMAINS)
    lines.append(f"| none | | {cells} |")
    for name in DOMAINS:
        count = ", ".join(map(str, results["experts"][name]))
        cells = " | ".join(f"{results['rise'][name][domain]:+.3f}" for domain in DOMAINS)
        lines.append(f"| those of {name} | {count} | {cells} |")
    return "\n".join(lines)


def draw(scores: dict[str, torch.Tensor], path: Path) -> None:
    """The share of each domain in the score of every expert, for each group of layers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stacked = torch.stack(list(scores.values()))  # (D, groups, S * S)
    shares = stacked / stacked.sum(0)  # nothing is drawn of an expert that no text uses
    groups, pieces = stacked.shape[1], round(stacked.shape[2] ** 0.5)
    size = (2.2 * len(scores) + 1, 2.3 * groups + 0.4)
    figure, axes = pyplot.subplots(groups, len(scores), figsize=size, squeeze=False, layout="constrained")
    for number, name in enumerate(scores):
        for group in range(groups):
            axis = axes[group, number]
            image = axis.imshow(shares[number, group].view(pieces, pieces).numpy(), vmin=0, vmax=1, cmap="viridis")
            axis.set(xticks=[], yticks=[])
            if group == 0:
                axis.set_title(name)
            if number == 0:
                axis.set_ylabel(f"group {group}")
    figure.colorbar(image, ax=axes, label="share of the expert's score", shrink=0.8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
