"""The cards in `model_cards/`: what `export` writes for a tiny model of each kind.

`python -m tests.hub.cards` renews them. The models are untrained and as small as can be; every number in a card is
read from its model. Only the names of dense models, and licence and language, are made up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.models.cohere import CohereConfig, CohereForCausalLM

import hf_moe_ext as moe


FOLDER = Path(__file__).resolve().parents[2] / "model_cards"
OWN_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
SIZES: dict[str, Any] = {
    **OWN_SIZES,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DOMAINS = ["seed", "code", "maths"]


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def cohere(seed: int) -> Any:
    torch.manual_seed(seed)
    return CohereForCausalLM(CohereConfig(**SIZES)).eval()


def bam() -> Any:
    return moe.upcycle([cohere(seed) for seed in range(3)], "bam", attention_kv="shared", domains=DOMAINS)


def btx() -> Any:
    return moe.upcycle([llama(seed) for seed in range(3)], "btx", domains=DOMAINS)


def split() -> Any:
    return moe.upcycle(llama(), "split", split_by="kmeans", num_experts=4, num_experts_per_tok=2)


def union() -> Any:
    return moe.upcycle(llama(), "union_of_experts", num_experts=4, num_experts_per_tok=2, parts={"attention": "union"})


def moefication() -> Any:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return moe.upcycle(OPTForCausalLM(config).eval(), "moefication", num_experts=6, num_experts_per_tok=2)


def read_me() -> Any:
    generator = torch.Generator().manual_seed(0)
    batches = {name: [{"input_ids": torch.randint(1, 64, (2, 16), generator=generator)}] for name in DOMAINS}
    router = moe.ReadMeRouterConfig(dim=16, num_heads=2)
    return moe.upcycle(llama(), "read_me", calibration=batches, router=router)


def jetmoe() -> Any:
    return moe.upcycle(llama(), "jetmoe")


def moduleformer() -> Any:
    torch.manual_seed(0)
    config = moe.ModuleFormerConfig(
        **OWN_SIZES,
        attention_hidden_size=16,
        intermediate_size=24,
        moa_num_experts=4,
        mlp_num_experts=6,
        router_hidden_size=8,
    )
    return moe.ModuleFormerForCausalLM(config).eval()


def monet() -> Any:
    torch.manual_seed(0)
    config = moe.MonetConfig(
        **OWN_SIZES, num_key_value_heads=2, moe_dim=4, moe_heads=2, moe_experts=6, moe_topk=2, moe_groups=2
    )
    return moe.MonetForCausalLM(config).eval()


_SOURCES = [f"someone/{name}" for name in DOMAINS]
_DENSE = "someone/a-dense-model"
# How to make the model, and the dense models it is said to come from.
CARDS: dict[str, tuple[Callable[[], Any], Any]] = {
    "bam": (bam, _SOURCES),
    "btx": (btx, _SOURCES),
    "split": (split, _DENSE),
    "union_of_experts": (union, _DENSE),
    "moefication": (moefication, _DENSE),
    "read_me": (read_me, _DENSE),
    "jetmoe": (jetmoe, _DENSE),
    "moduleformer": (moduleformer, None),
    "monet": (monet, None),
}


def report(name: str) -> dict[str, Any]:
    """What is told beside what the model itself knows."""
    return {"license": "apache-2.0", "language": ["en"], "base_model": CARDS[name][1]}


def exported(name: str, folder: Path) -> str:
    """The card that `export` writes beside the weights, after it has loaded them in a clean process."""
    path = moe.export(CARDS[name][0](), folder / f"tiny-{name}", report=report(name))
    return (path / "README.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        for card in CARDS:
            (FOLDER / f"{card}.md").write_text(exported(card, Path(temporary)), encoding="utf-8")
