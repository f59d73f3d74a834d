"""MoEfication: a dense ReLU block in parts, of which a token uses those that would be active."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..modeling.configuration_moe_ext import RouterConfig
from ..modeling.router_moefication import MoEficationRouterConfig
from .methods import ExpertStack, FeedForward, UpcyclingMethod, derive_seed, register_upcycling_method
from .split import SplitUpcycling


_BATCH = 512  # tokens in a step of the predictor's training, as in the authors' code


@register_upcycling_method("moefication")
@dataclass
class MoEficationUpcycling(UpcyclingMethod):
    """Each expert is a share of the neurons; a chosen one counts as in the dense block, with weight one.

    "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts" (2110.01786). Works where the activation is
    zero for negative input (ReLU, squared ReLU): neurons that are zero can be left out. `num_experts` is the number of
    shares and must divide the intermediate size. With all experts it is the dense block; with fewer, what is left out
    is what the neurons of the others would have added. The method makes gate and router itself.

    Args:
        split_by (`"kmeans"`, `"coactivation"` or `"random"`, *optional*, defaults to `"kmeans"`):
            As for `"split"`.
        predictor (`"centroid"` or `"mlp"`, *optional*, defaults to `"centroid"`):
            What chooses: cosines of the block's input and the mean direction of an expert's input weights; or a
            network `A tanh(C x)` that starts from them (C, and A the identity) and learns, on `calibration` data, to
            tell the summed activations of the experts, each relative to the token's largest.
        epochs (`int`, *optional*, defaults to 30):
            Of the network's training.
        learning_rate (`float`, *optional*, defaults to 0.01):
            Of Adam there.
        sample_size (`int`, *optional*, defaults to 4096):
            Calibration tokens that it is trained on, or up to twice as many.
    """

    split_by: Literal["kmeans", "coactivation", "random"] = "kmeans"
    predictor: Literal["centroid", "mlp"] = "centroid"
    epochs: int = 30
    learning_rate: float = 0.01
    sample_size: int = 4096
    experts_per_token: int = field(default=1, init=False, repr=False)  # set by `prepared`

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "sample_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.learning_rate <= 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}.")

    @property
    def own_gate(self) -> str:
        return "centroids" if self.predictor == "centroid" else "trained predictor"

    @property
    def default_router(self) -> RouterConfig:
        return MoEficationRouterConfig(predictor=self.predictor)

    @property
    def _split(self) -> SplitUpcycling:
        return SplitUpcycling(split_by=self.split_by, scale=1.0)

    def prepared(self, num_experts: int, num_experts_per_tok: int) -> MoEficationUpcycling:
        made = replace(self)
        made.experts_per_token = num_experts_per_tok
        return made

    def check_activation(self, key: str, activation: Any) -> None:
        below = torch.tensor([-8.0, -1.0, -0.1], device="cpu")
        if activation(below).any():
            raise ValueError(
                f'the method `moefication` leaves out neurons that are zero, and the activation of layer "{key}" '
                f"({type(activation).__name__}) is not zero for negative input. Use a model with ReLU, or "
                '`method="split"`, whose result has to be trained.'
            )

    def expert_width(self, intermediate_size: int, num_copies: int = 1) -> int:
        return self._split.expert_width(intermediate_size, num_copies)

    def collectors(self, num_experts: int) -> dict[str, Any]:
        from ..calibration import CoActivation, HiddenStates  # which needs this package

        if self.predictor == "mlp":  # two samples of one size hold the same tokens
            return {"hidden": HiddenStates(self.sample_size), "coactivation": CoActivation(self.sample_size)}
        return self._split.collectors(num_experts)

    def statistics(self, collected: dict[str, Any], key: str) -> dict[str, torch.Tensor]:
        return {name: collector.rows[key] for name, collector in collected.items()}

    def convert(self, dense: FeedForward, num_copies: int, seed: int) -> ExpertStack:
        shares = self._split.shares(dense, num_copies, seed)
        stack = self._split.convert(dense, num_copies, seed)
        if dense.down_bias is not None:  # once in the sum of a token's experts
            stack.down_bias = (dense.down_bias / self.experts_per_token).expand(num_copies, -1).clone()
        rows = F.normalize(dense.up[0].float().cpu(), dim=1)
        stack.router = {"weight": F.normalize(rows[shares].mean(1), dim=1)}
        if self.predictor == "mlp":
            neurons = dense.statistics["coactivation"]
            activity = torch.stack([neurons[:, share].sum(1) for share in shares], dim=1)
            stack.router = dict(
                zip(
                    ("weight", "moe_mix_weight"),
                    train_predictor(
                        dense.statistics["hidden"],
                        activity,
                        stack.router["weight"],
                        epochs=self.epochs,
                        learning_rate=self.learning_rate,
                        seed=derive_seed(seed, "predictor"),
                    ),
                    strict=True,
                )
            )
        return stack


def train_predictor(
    hidden: torch.Tensor,
    activity: torch.Tensor,
    centroids: torch.Tensor,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two layers C and A of `A tanh(C x / |x|)`, trained to tell how active experts are.

    Binary cross-entropy of the logits, on activities relative to the largest of each token.

    Args:
        hidden: (n, H) inputs of the block.
        activity: (n, E) summed activations of the experts, non-negative.
        centroids: (E, H), where C starts; A starts as the identity.
        epochs, learning_rate: of Adam.
        seed: of the order.

    Returns:
        C (E, H) and A (E, E), in float32.
    """
    inputs = F.normalize(hidden.float(), dim=1)
    targets = activity.float() / activity.float().amax(1, keepdim=True).clamp_min(1e-20)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        first = centroids.detach().float().clone().requires_grad_()
        second = torch.eye(len(centroids)).requires_grad_()
        optimizer = torch.optim.Adam([first, second], lr=learning_rate)
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs), generator=generator).split(_BATCH):
                logits = F.linear(F.linear(inputs[rows], first).tanh(), second)
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(logits, targets[rows]).backward()
                optimizer.step()
    return first.detach(), second.detach()
