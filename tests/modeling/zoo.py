"""A working setting of every router for the common matrix, as a function of the family's name."""

from __future__ import annotations

from collections.abc import Callable

from tiny_models import VOCAB_SIZE

from hf_moe_ext.modeling.configuration_moe_ext import RouterConfig
from hf_moe_ext.modeling.moe_families import get_family
from hf_moe_ext.modeling.router_act_dts import ActDTSRouterConfig
from hf_moe_ext.modeling.router_adamoe import AdaMoERouterConfig
from hf_moe_ext.modeling.router_comet import CometRouterConfig
from hf_moe_ext.modeling.router_deepseek_moe import DeepSeekMoERouterConfig
from hf_moe_ext.modeling.router_dselect_k import DSelectKRouterConfig
from hf_moe_ext.modeling.router_dts import DTSRouterConfig
from hf_moe_ext.modeling.router_expert_choice import ExpertChoiceRouterConfig
from hf_moe_ext.modeling.router_hash import HashRouterConfig
from hf_moe_ext.modeling.router_moduleformer import ModuleFormerRouterConfig
from hf_moe_ext.modeling.router_moe_plus_plus import MoEPlusPlusRouterConfig
from hf_moe_ext.modeling.router_moefication import MoEficationRouterConfig
from hf_moe_ext.modeling.router_noisy_top_k import NoisyTopKRouterConfig
from hf_moe_ext.modeling.router_permuted_top_k import PermutedTopKRouterConfig
from hf_moe_ext.modeling.router_pre_gated import PreGatedRouterConfig
from hf_moe_ext.modeling.router_random_fixed import RandomFixedRouterConfig
from hf_moe_ext.modeling.router_read_me import ReadMeRouterConfig
from hf_moe_ext.modeling.router_rmoe import RMoERouterConfig
from hf_moe_ext.modeling.router_sigmoid import SigmoidRouterConfig
from hf_moe_ext.modeling.router_soft_moe import SoftMoERouterConfig
from hf_moe_ext.modeling.router_stochastic import StochasticRouterConfig
from hf_moe_ext.modeling.router_top_k import GATES_OF_ROWS, TopKRouterConfig
from hf_moe_ext.modeling.router_top_p import TopPRouterConfig
from hf_moe_ext.modeling.router_union import UnionRouterConfig
from hf_moe_ext.modeling.router_xmoe import XMoERouterConfig


def named_score(name: str) -> str | None:
    """A score for families whose gate follows a rule of its own, `None` for the others."""
    family = get_family(name)
    return "softmax" if family.moe is not None and family.moe.score == "custom" else None


def has_plain_gate(name: str) -> bool:
    """Whether the gate is one matrix with a row for each expert."""
    spec = get_family(name).moe
    return spec is None or spec.logits in GATES_OF_ROWS


# By router; tiny models have 8 experts (4 where they are upcycled), 2 per token. Losses are on.
SETTINGS: dict[str, Callable[[str], RouterConfig]] = {
    "top_k": lambda name: TopKRouterConfig(balance_coef=0.01, z_coef=0.001, entropy_coef=0.001),
    "top_p": lambda name: TopPRouterConfig(
        threshold=0.5, max_slots=3, renormalize=True, score=named_score(name), z_coef=0.001
    ),
    "act_dts": lambda name: ActDTSRouterConfig(temperature=0.2, balance_coef=0.01, z_coef=0.001, entropy_coef=0.001),
    "pre_gated": lambda name: PreGatedRouterConfig(level=1, balance_coef=0.01, z_coef=0.001),
    "read_me": lambda name: ReadMeRouterConfig(
        dim=16, num_heads=2, init_std=0.5, weights="renormalized", balance_coef=0.01, z_coef=0.001
    ),
    "rmoe": lambda name: RMoERouterConfig(state_size=8, additive=False, init_std=0.7, z_coef=0.001),
    "dts": lambda name: DTSRouterConfig(temperature=0.5, temperature_end=0.1, balance_coef=0.01, z_coef=0.001),
    "random_fixed": lambda name: RandomFixedRouterConfig(start_experts_per_tok=2, end_experts_per_tok=3),
    "adamoe": lambda name: AdaMoERouterConfig(null_experts=4, z_coef=0.001),
    "moe_plus_plus": lambda name: MoEPlusPlusRouterConfig(capacity_factor=1.1, z_coef=0.001),
    "stochastic": lambda name: StochasticRouterConfig(),
    "noisy_top_k": lambda name: NoisyTopKRouterConfig(balance_coef=0.01, z_coef=0.001),
    "sigmoid": lambda name: SigmoidRouterConfig(num_experts_per_tok=2, balance_coef=0.01, z_coef=0.001),
    "xmoe": lambda name: XMoERouterConfig(renormalize=True, balance_coef=0.01, z_coef=0.001),
    "union": lambda name: UnionRouterConfig(anneal=False, balance_coef=0.01, z_coef=0.001),
    "moefication": lambda name: MoEficationRouterConfig(
        predictor="mlp" if has_plain_gate(name) else "centroid", balance_coef=0.01, z_coef=0.001
    ),
    "moduleformer": lambda name: ModuleFormerRouterConfig(
        hidden_size=8, renormalize=True, sample_slots=1, information_coef=0.01, z_coef=0.001
    ),
    "expert_choice": lambda name: ExpertChoiceRouterConfig(max_slots=3, z_coef=0.001, allow_non_causal=True),
    "comet": lambda name: CometRouterConfig(
        permutation_steps=9, permutation_per_selector=True, sinkhorn_iterations=9, balance_coef=0.01
    ),
    "dselect_k": lambda name: DSelectKRouterConfig(balance_coef=0.01, entropy_coef=0.001),
    "deepseek_moe": lambda name: DeepSeekMoERouterConfig(
        device_balance_coef=0.05, num_devices=2, sequence_balance_coef=0.01, z_coef=0.001
    ),
    "hash": lambda name: HashRouterConfig(vocab_size=VOCAB_SIZE, num_experts_per_tok=2),
    "permuted_top_k": lambda name: PermutedTopKRouterConfig(permutation_steps=9, sinkhorn_iterations=9, z_coef=0.001),
    "soft_moe": lambda name: SoftMoERouterConfig(slots_per_expert=2, entropy_coef=0.001, allow_non_causal=True),
}

# On every family; the others stand on four that differ in structure.
FOUNDATION = ("top_k", "top_p")
UPCYCLED = "llama_upcycled"
STRUCTURES = ("mixtral", "deepseek_v3", "qwen2_moe", UPCYCLED)
