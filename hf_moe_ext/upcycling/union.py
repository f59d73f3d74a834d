"""Union of Experts: the dense block is cut as tensor parallelism would cut it, and each part is an expert."""

from __future__ import annotations

from dataclasses import dataclass

from ..modeling.configuration_moe_ext import RouterConfig
from ..modeling.router_union import UnionRouterConfig
from .methods import ExpertStack, FeedForward, UpcyclingMethod, register_upcycling_method
from .split import share_width


@register_upcycling_method("union_of_experts")
@dataclass
class UnionUpcycling(UpcyclingMethod):
    """Each expert is a contiguous share of the dense block's neurons; with all of them it is the block, exactly.

    "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer" (2503.02495). The tensors
    are those of the dense model in another shape. `num_experts` is the number of parts, which must divide the
    intermediate size; `num_experts_per_tok` is how many a token uses at the end of training. The router is `union`
    unless another is given: each chosen part has a weight of one, and at first all are chosen, so that the model
    starts as the dense one and becomes sparse while it trains. `parts={"attention": "union"}` does the same with the
    heads of attention.
    """

    @property
    def default_router(self) -> RouterConfig:
        return UnionRouterConfig()

    def expert_width(self, intermediate_size: int, num_copies: int = 1) -> int:
        return share_width(intermediate_size, num_copies)

    def convert(self, dense: FeedForward, num_copies: int, seed: int) -> ExpertStack:
        parts, width = len(dense.up), self.expert_width(dense.intermediate_size, num_copies)
        up = dense.up.unflatten(1, (num_copies, width)).transpose(0, 1)  # (E, P, I / E, H)
        down = dense.down.unflatten(1, (num_copies, width)).transpose(0, 1)  # (E, H, I / E)
        up_bias = down_bias = None
        if dense.up_bias is not None and dense.down_bias is not None:
            up_bias = dense.up_bias.view(parts, num_copies, width).transpose(0, 1).contiguous()
            # Parts are added, so each carries its share of the one bias.
            down_bias = (dense.down_bias / num_copies).expand(num_copies, -1).clone()
        return ExpertStack(up.contiguous(), down.contiguous(), up_bias, down_bias)
