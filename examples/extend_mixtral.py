"""Give a stock MoE other routers and compare them: experts per token, change of the output, perplexity.

On a tiny random model, in seconds on a CPU:

    python examples/extend_mixtral.py --smoke

On a checkpoint of any supported MoE family (`hf-moe list families`):

    python examples/extend_mixtral.py --model allenai/OLMoE-1B-7B-0924 --text prose

The routers are put on a model that was not trained with them, so the output changes; how much is what the table shows.
Nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, MixtralConfig, MixtralForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.data import Windows, load_domain, pack
from hf_moe_ext.evaluation import perplexity


ROUTERS = {
    "stock gate": moe.TopKRouterConfig(),
    "one expert": moe.TopKRouterConfig(num_experts_per_tok=1),
    "top-p 0.2": moe.TopPRouterConfig(threshold=0.2, max_slots=4, renormalize=None),
    "top-p 0.4": moe.TopPRouterConfig(threshold=0.4, max_slots=4, renormalize=None),
    "top-p 0.6": moe.TopPRouterConfig(threshold=0.6, max_slots=4, renormalize=None),
}


@dataclass
class Arguments:
    """Which model, which text."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a stock MoE model."})
    text: str = field(default="prose", metadata={"help": "Domain to measure on (`hf-moe list domains`)."})
    length: int = field(default=128, metadata={"help": "Tokens in a window."})
    windows: int = field(default=8, metadata={"help": "Windows to measure."})
    smoke: bool = field(default=False, metadata={"help": "A tiny random model and random tokens."})


def load(args: Arguments) -> tuple[torch.nn.Module, Windows]:
    """The model, and the tokens to measure it on."""
    if args.smoke or args.model is None:
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            initializer_range=0.2,
        )
        return MixtralForCausalLM(config).eval(), Windows(torch.randint(128, (4, 32)))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return model, pack(load_domain(args.text, "test"), tokenizer, args.length, limit=args.windows)


@torch.no_grad()
def main(args: Arguments) -> list[tuple[str, float, float, float]]:
    """Print one row for each router: experts per token, relative change of the logits, perplexity."""
    model, windows = load(args)
    sample = windows[0]["input_ids"][None].to(model.device)
    reference = model(sample).logits.float()
    rows = []
    for name, router in ROUTERS.items():
        moe.extend(model, moe.MoeExtension(router=router))
        change = ((model(sample).logits.float() - reference).norm() / reference.norm()).item()
        result = perplexity(model, windows)
        moe.restore(model)
        rows.append((name, result.mean_k, change, result.perplexity))

    print(f"{'router':<12}{'experts/token':>14}{'change':>10}{'perplexity':>12}")
    for name, mean_k, change, value in rows:
        print(f"{name:<12}{mean_k:>14.2f}{change:>10.2%}{value:>12.2f}")
    if not torch.equal(model(sample).logits.float(), reference):
        raise RuntimeError("the restored model is not the stock model")
    print("restored: the stock model, bit for bit")
    return rows


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
