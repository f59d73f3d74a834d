"""The dense block is cut into experts; no neuron is copied, so the model keeps its size and uses a part of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .clustering import balanced_assignment, balanced_kmeans
from .methods import ExpertStack, FeedForward, UpcyclingMethod, derive_seed, register_upcycling_method


# Ways to split whose statistics tell which neurons matter: to a domain, or to a token.
_IMPORTANCE = ("coactivation", "gradient", "activation")


def share_width(intermediate_size: int, num_experts: int, shared: int = 0) -> int:
    """Neurons of each expert where they share those of a dense block, but for so many in a shared one.

    Raises:
        ValueError: where it does not come out even.
    """
    size = intermediate_size - shared
    if size % num_experts:
        divisors = [n for n in range(1, 65) if size % n == 0]
        what = f"{intermediate_size} less `shared_expert_size` {shared}" if shared else f"{intermediate_size}"
        raise ValueError(
            f"`num_experts` ({num_experts}) must divide the intermediate size ({what}); possible up to 64: "
            f"{', '.join(map(str, divisors))}."
        )
    return size // num_experts


def most_wanted(importance: torch.Tensor, reach: int) -> torch.Tensor:
    """All neurons, those that most rows want first. A row wants the `reach` neurons that matter most to it; of equally
    wanted neurons, those with the greater part of the rows' importance come first.

    "Inter" of LLaMA-MoE (2406.16554), section 3.2: neurons that many experts would take go to the shared block.

    Args:
        importance: (D, I) of each neuron in each domain, or for each token.
        reach: neurons that an expert can use.

    Returns:
        (I,) their numbers.
    """
    votes = torch.zeros_like(importance).scatter(1, importance.topk(reach, dim=1).indices, 1).sum(0)
    part = (importance / importance.sum(1, keepdim=True).clamp_min(1e-300)).mean(0)
    by_part = part.argsort(descending=True, stable=True)
    return by_part[votes[by_part].argsort(descending=True, stable=True)]


@register_upcycling_method("split")
@dataclass
class SplitUpcycling(UpcyclingMethod):
    """Each expert is a share of the dense block's neurons, which together are all of them.

    LLaMA-MoE (2406.16554, v2 2411.15708) and, for clusters, MoEfication (2110.01786). `num_experts` is the number of
    shares; it must divide the intermediate size, less `shared_expert_size`. Where a token uses all experts and the
    gates are equal, the function is preserved; with fewer it is not, and SwiGLU models need training then.

    Args:
        split_by (`"random"`, `"kmeans"`, `"coactivation"`, `"gradient"` or `"activation"`, *optional*):
            Which neurons stand together: any, the default; those with similar input weights (rows of the gate, or of
            the up projection where there is none, by direction); those that are active for the same tokens; those
            that matter to the loss on the same domain; or those that are active on the same domain. The last three
            need `calibration` data, and the last two as many domains as experts.
        shared_expert_size (`int`, *optional*, defaults to 0):
            Neurons that are not shared out but stand in a block that every token passes: those that most domains
            want, and with `"coactivation"` most tokens; with `"random"` any.
        scale (`float`, *optional*):
            Factor on the output. `None` is the number of experts of a token, with which each chosen expert counts as
            much as in the dense block. The authors of LLaMA-MoE use the number of experts divided by that.
    """

    split_by: Literal["random", "kmeans", "coactivation", "gradient", "activation"] = "random"
    shared_expert_size: int = 0
    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"`scale` must be positive, got {self.scale}.")
        if self.shared_expert_size < 0:
            raise ValueError(f"`shared_expert_size` must be non-negative, got {self.shared_expert_size}.")
        if self.shared_expert_size and self.split_by == "kmeans":
            raise ValueError(
                '`split_by="kmeans"` does not tell which neurons all need; with `shared_expert_size` use '
                f'"random" or one of {", ".join(_IMPORTANCE)}.'
            )

    def prepared(self, num_experts: int, num_experts_per_tok: int) -> SplitUpcycling:
        return self if self.scale is not None else replace(self, scale=float(num_experts_per_tok))

    @property
    def shared_width(self) -> int:
        return self.shared_expert_size

    def expert_width(self, intermediate_size: int, num_copies: int = 1) -> int:
        if self.shared_expert_size >= intermediate_size:
            raise ValueError(
                f"`shared_expert_size` ({self.shared_expert_size}) leaves nothing of the intermediate size "
                f"({intermediate_size}) to the routed experts."
            )
        return share_width(intermediate_size, num_copies, self.shared_expert_size)

    def collectors(self, num_experts: int) -> dict[str, Any]:
        from ..calibration import CoActivation, GradientImportance, NeuronMagnitude  # which needs this package

        made = {"coactivation": CoActivation, "gradient": GradientImportance, "activation": NeuronMagnitude}
        return {self.split_by: made[self.split_by]()} if self.split_by in made else {}

    def check_calibration(self, data: Any, num_experts: int) -> None:
        if self.split_by not in ("gradient", "activation"):
            return
        if not isinstance(data, dict) or len(data) != num_experts:
            found = f"{len(data)} domains" if isinstance(data, dict) else "no domains"
            raise ValueError(
                f'`split_by="{self.split_by}"` gives each expert the neurons of one domain: `calibration` must be a '
                f"dict with {num_experts} of them, got {found}."
            )

    def statistics(self, collected: dict[str, Any], key: str) -> dict[str, torch.Tensor]:
        if self.split_by == "coactivation":
            return {"coactivation": collected["coactivation"].rows[key]}
        if self.split_by in ("gradient", "activation"):
            means = collected[self.split_by].means
            return {self.split_by: torch.stack([means[domain][key] for domain in means])}
        return {}

    def shared_neurons(self, dense: FeedForward, num_experts: int, seed: int) -> torch.Tensor:
        """(S,) the neurons of the shared block, in the order of the dense block."""
        size, count = dense.intermediate_size, self.shared_expert_size
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        if self.split_by == "random":
            generator = torch.Generator().manual_seed(derive_seed(seed, "shared"))
            return torch.randperm(size, generator=generator)[:count].sort().values
        reach = count + self.expert_width(size, num_experts)
        return most_wanted(dense.statistics[self.split_by].double().cpu(), reach)[:count].sort().values

    def shares(self, dense: FeedForward, num_experts: int, seed: int) -> torch.Tensor:
        """(E, (I - S) / E) the neurons of each expert, in the order of the dense block."""
        size = dense.intermediate_size
        self.expert_width(size, num_experts)
        left = torch.ones(size, dtype=torch.bool)
        left[self.shared_neurons(dense, num_experts, seed)] = False
        members = left.nonzero().flatten()
        if self.split_by == "random":
            order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
            return members[order].view(num_experts, -1).sort(dim=1).values
        if self.split_by == "kmeans":
            owner = balanced_kmeans(F.normalize(dense.up[0].float().cpu(), dim=1), num_experts, seed)
        elif self.split_by == "coactivation":
            profiles = F.normalize(dense.statistics["coactivation"].float().cpu().T[members], dim=1)
            owner = balanced_kmeans(profiles, num_experts, seed)
        else:
            importance = dense.statistics[self.split_by].double().cpu()[:, members]
            # Of a neuron's importance, the part that each domain has: otherwise large neurons decide everything.
            owner = balanced_assignment(-(importance / importance.sum(0).clamp_min(1e-300)).T)
        return torch.stack([members[owner == expert] for expert in range(num_experts)])

    def convert(self, dense: FeedForward, num_copies: int, seed: int) -> ExpertStack:
        shares = self.shares(dense, num_copies, seed).to(dense.down.device)
        shared = self._shared_block(dense, num_copies, seed) if self.shared_expert_size else None
        scale = 1.0 if self.scale is None else self.scale
        up = dense.up[:, shares].transpose(0, 1)  # (E, P, I / E, H)
        down = dense.down[:, shares].transpose(0, 1) * scale
        up_bias = down_bias = None
        if dense.up_bias is not None and dense.down_bias is not None:
            up_bias = dense.up_bias[:, shares].transpose(0, 1).clone()
            # Weights sum to one, so every expert carries the whole bias.
            down_bias = dense.down_bias.expand(num_copies, -1).clone()
        return ExpertStack(up.contiguous(), down.contiguous(), up_bias, down_bias, shared)

    def _shared_block(self, dense: FeedForward, num_experts: int, seed: int) -> FeedForward:
        chosen = self.shared_neurons(dense, num_experts, seed).to(dense.down.device)
        biases = (None, None)
        if dense.up_bias is not None and dense.down_bias is not None:
            biases = dense.up_bias[:, chosen], torch.zeros_like(dense.down_bias)  # the experts carry it
        return FeedForward(dense.up[:, chosen], dense.down[:, chosen], *biases, dense.activation_degree)
