"""Ways to continue a text: strategies for `model.generate(..., custom_generate=...)`, and routing at inference."""

from .contrastive import contrastive_decoding
from .contrastive_search import contrastive_search
from .dola import dola
from .profile import BranchProfile, contrast_profile
from .routing import RoutingMode, num_experts_per_tok, routed_by
from .self_contrast import self_contrast
from .strategies import STRATEGIES, generate
from .voting import Vote, majority_vote


__all__ = [
    "STRATEGIES",
    "BranchProfile",
    "RoutingMode",
    "Vote",
    "contrast_profile",
    "contrastive_decoding",
    "contrastive_search",
    "dola",
    "generate",
    "majority_vote",
    "num_experts_per_tok",
    "routed_by",
    "self_contrast",
]
