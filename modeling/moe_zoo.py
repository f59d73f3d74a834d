"""Importing this file registers every router and every part. A new one is one line here."""

from __future__ import annotations

from .attention_bam import BamAttention
from .attention_routed import RoutedAttention
from .attention_union import UnionAttention
from .moe_capacity import CapacityPart
from .moe_expert_lora import ExpertLoraPart
from .moe_momentum import MomentumPart
from .moe_shared_experts import SharedExpertsPart
from .moe_zero_experts import ZeroExpertsPart
from .router_act_dts import ActDTSRouter
from .router_adamoe import AdaMoERouter
from .router_comet import CometRouter
from .router_deepseek_moe import DeepSeekMoERouter
from .router_dselect_k import DSelectKRouter
from .router_dts import DTSRouter
from .router_expert_choice import ExpertChoiceRouter
from .router_hash import HashRouter
from .router_moduleformer import ModuleFormerRouter
from .router_moe_plus_plus import MoEPlusPlusRouter
from .router_moefication import MoEficationRouter
from .router_noisy_top_k import NoisyTopKRouter
from .router_permuted_top_k import PermutedTopKRouter
from .router_pre_gated import PreGatedRouter
from .router_random_fixed import RandomFixedRouter
from .router_read_me import ReadMeRouter
from .router_rmoe import RMoERouter
from .router_sigmoid import SigmoidRouter
from .router_soft_moe import SoftMoERouter
from .router_stochastic import StochasticRouter
from .router_top_k import TopKRouter
from .router_top_p import TopPRouter
from .router_union import UnionRouter
from .router_xmoe import XMoERouter


__all__ = [
    "BamAttention",
    "ActDTSRouter",
    "AdaMoERouter",
    "CapacityPart",
    "CometRouter",
    "DSelectKRouter",
    "DTSRouter",
    "DeepSeekMoERouter",
    "ExpertChoiceRouter",
    "ExpertLoraPart",
    "HashRouter",
    "MoEPlusPlusRouter",
    "MoEficationRouter",
    "ModuleFormerRouter",
    "MomentumPart",
    "NoisyTopKRouter",
    "PermutedTopKRouter",
    "PreGatedRouter",
    "RMoERouter",
    "RandomFixedRouter",
    "ReadMeRouter",
    "RoutedAttention",
    "SharedExpertsPart",
    "SigmoidRouter",
    "SoftMoERouter",
    "StochasticRouter",
    "TopKRouter",
    "TopPRouter",
    "UnionAttention",
    "UnionRouter",
    "XMoERouter",
    "ZeroExpertsPart",
]
