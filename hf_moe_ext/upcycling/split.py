"""The dense block is cut into experts; no neuron is copied, so the model keeps its size and uses a part of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .clustering import balanced_assignment, balanced_kmeans
from .methods import ExpertStack, FeedForward, UpcyclingMethod, register_upcycling_method


def share_width(intermediate_size: int, num_experts: int) -> int:
    """Neurons of each expert where they share those of a dense block.

    Raises:
        ValueError: where it does not come out even.
    """
    if intermediate_size % num_experts:
        divisors = [n for n in range(1, 65) if intermediate_size % n == 0]
        raise ValueError(
            f"`num_experts` ({num_experts}) must divide the intermediate size ({intermediate_size}); possible up "
            f"to 64: {', '.join(map(str, divisors))}."
        )
    return intermediate_size // num_experts


@register_upcycling_method("split")
@dataclass
class SplitUpcycling(UpcyclingMethod):
    """Each expert is a share of the dense block's neurons, which together are all of them.

    LLaMA-MoE (2406.16554) and, for clusters, MoEfication (2110.01786). `num_experts` is the number of shares; it must
    divide the intermediate size. Where a token uses all experts and the gates are equal, the function is preserved;
    with fewer it is not, and SwiGLU models need training then.

    Args:
        split_by (`"random"`, `"kmeans"`, `"coactivation"` or `"gradient"`, *optional*, defaults to `"random"`):
            Which neurons stand together: any; those with similar input weights (rows of the gate, or of the up
            projection where there is none, by direction); those that are active for the same tokens; or those that
            matter to the loss on the same domain. The last two need `calibration` data, and `"gradient"` needs as many
            domains as experts.
        scale (`float`, *optional*):
            Factor on the output. `None` is the number of experts of a token, with which each chosen expert counts as
            much as in the dense block. The authors of LLaMA-MoE use the number of experts divided by that.
    """

    split_by: Literal["random", "kmeans", "coactivation", "gradient"] = "random"
    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"`scale` must be positive, got {self.scale}.")

    def prepared(self, num_experts: int, num_experts_per_tok: int) -> SplitUpcycling:
        return self if self.scale is not None else replace(self, scale=float(num_experts_per_tok))

    def expert_width(self, intermediate_size: int, num_copies: int = 1) -> int:
        return share_width(intermediate_size, num_copies)

    def collectors(self, num_experts: int) -> dict[str, Any]:
        from ..calibration import CoActivation, GradientImportance  # which needs this package

        if self.split_by == "coactivation":
            return {"coactivation": CoActivation()}
        return {"gradient": GradientImportance()} if self.split_by == "gradient" else {}

    def check_calibration(self, data: Any, num_experts: int) -> None:
        if self.split_by == "gradient" and (not isinstance(data, dict) or len(data) != num_experts):
            found = f"{len(data)} domains" if isinstance(data, dict) else "no domains"
            raise ValueError(
                f'`split_by="gradient"` gives each expert the neurons of one domain: `calibration` must be a dict '
                f"with {num_experts} of them, got {found}."
            )

    def statistics(self, collected: dict[str, Any], key: str) -> dict[str, torch.Tensor]:
        if self.split_by == "coactivation":
            return {"coactivation": collected["coactivation"].rows[key]}
        if self.split_by == "gradient":
            means = collected["gradient"].means
            return {"gradient": torch.stack([means[domain][key] for domain in means])}
        return {}

    def shares(self, dense: FeedForward, num_experts: int, seed: int) -> torch.Tensor:
        """(E, I / E) the neurons of each expert, in the order of the dense block."""
        size = dense.intermediate_size
        self.expert_width(size, num_experts)
        if self.split_by == "random":
            order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
            return order.view(num_experts, -1).sort(dim=1).values
        if self.split_by == "kmeans":
            owner = balanced_kmeans(F.normalize(dense.up[0].float().cpu(), dim=1), num_experts, seed)
        elif self.split_by == "coactivation":
            profiles = F.normalize(dense.statistics["coactivation"].float().T, dim=1)
            owner = balanced_kmeans(profiles, num_experts, seed)
        else:
            importance = dense.statistics["gradient"].double()
            # Of a neuron's importance, the part that each domain has: otherwise large neurons decide everything.
            owner = balanced_assignment(-(importance / importance.sum(0).clamp_min(1e-300)).T)
        return torch.stack([(owner == expert).nonzero().flatten() for expert in range(num_experts)])

    def convert(self, dense: FeedForward, num_copies: int, seed: int) -> ExpertStack:
        shares = self.shares(dense, num_copies, seed).to(dense.down.device)
        scale = 1.0 if self.scale is None else self.scale
        up = dense.up[:, shares].transpose(0, 1)  # (E, P, I / E, H)
        down = dense.down[:, shares].transpose(0, 1) * scale
        up_bias = down_bias = None
        if dense.up_bias is not None and dense.down_bias is not None:
            up_bias = dense.up_bias[:, shares].transpose(0, 1).clone()
            # Weights sum to one, so every expert carries the whole bias.
            down_bias = dense.down_bias.expand(num_copies, -1).clone()
        return ExpertStack(up.contiguous(), down.contiguous(), up_bias, down_bias)
