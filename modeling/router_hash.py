"""Hash routing: a fixed table from token id to expert."""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import initialization as init

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_permutation import PermutedRouter, PermutedRouterConfig, extra_losses, refuse_z_loss, to_distribution
from .moe_router import MoERouter, RouterSite, register_router


@dataclass
class HashRouterConfig(PermutedRouterConfig):
    """Config of `HashRouter` (2106.04426).

    > Parameters that control the table

    Args:
        vocab_size (`int`):
            Number of token ids; required. Take `model.config.vocab_size`.
        num_experts_per_tok (`int`, *optional*, defaults to 1):
            Hash functions: experts per token (k), all different, of weight 1/k.
        table (`"random"` or `"balanced"`, *optional*, defaults to `"random"`):
            How ids are spread over experts: each on its own, or so that all experts have equally many. What counts is
            how often ids occur: for that, see `balanced_table` and `HashRouter.set_table`.
        seed (`int`, *optional*, defaults to 0):
            Of the tables; every layer has its own.
    """

    vocab_size: int | None = None
    num_experts_per_tok: int = 1
    table: Literal["random", "balanced"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size is None or self.vocab_size < 1:
            raise ValueError(
                f"`vocab_size` of the `hash` router must be the number of token ids, got {self.vocab_size}; take "
                "`model.config.vocab_size` (of a multimodal model: `model.config.get_text_config().vocab_size`)."
            )
        if self.num_experts_per_tok < 1:
            raise ValueError(f"`num_experts_per_tok` must be at least 1, got {self.num_experts_per_tok}.")
        if self.permutation_per_selector:
            raise ValueError("`permutation_per_selector=True` needs a gate with several selectors; a table is one.")
        refuse_z_loss(self)
        for name in ("balance_coef", "entropy_coef"):
            if getattr(self, name) and not self.permutation_steps:
                raise ValueError(
                    f"`{name}` must be 0 without `permutation_steps`, got {getattr(self, name)}: a fixed table has "
                    "nothing that a loss could train."
                )


@register_router("hash")
class HashRouter(PermutedRouter):
    """The token id alone decides, by a table that is never trained.

    "Hash Layers For Large Sparse Models" (2106.04426), with the permutation of COMET (2306.02824). The id is that of
    the input token at each position, so the router needs `input_ids`.
    """

    config_class = HashRouterConfig
    paper = "Hash Layers (2106.04426)"
    needs = "token ids, not embeddings"
    learned = False
    own_logits = True
    moe_config: HashRouterConfig
    moe_table: torch.Tensor

    @classmethod
    def identity_config(cls, site: RouterSite) -> RouterConfig:
        raise NotImplementedError("a table of token ids does not look at hidden states, as a stock gate does.")

    @classmethod
    def check(cls, config: HashRouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        if config.num_experts_per_tok > site.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` ({config.num_experts_per_tok}) exceeds the {site.num_experts} experts of "
                f'layer "{site.key}".'
            )
        if site.zero_experts is not None:
            raise ValueError(
                "the `hash` router does not choose, so zero-computation experts would take their tokens for good; "
                "remove `zero_experts`."
            )

    def setup(self) -> None:
        config = self.moe_config
        shape = config.vocab_size, config.num_experts_per_tok
        self.register_buffer("moe_table", torch.empty(*shape, dtype=torch.int64, device=self.own_device))
        self.freeze_stock()
        self.setup_permutation()

    def reset_parameters(self) -> None:
        config, site = self.moe_config, self.moe_site
        # Drawn on the CPU, so that a seed means the same table on every device.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}/{site.key}".encode()))
        draw = random_table if config.table == "random" else even_table
        vocab_size, k = self.moe_table.shape
        init.copy_(self.moe_table, draw(vocab_size, k, site.num_experts, generator))
        self.reset_permutation()

    def set_table(self, table: torch.Tensor) -> None:
        """Replace the table of a live model.

        Args:
            table (`torch.Tensor`):
                (vocab_size,) or (vocab_size, k) experts, those of one token all different. It is saved with the model.

        Raises:
            ValueError: for another shape, or for entries that are no experts or stand twice.
        """
        wanted, experts = tuple(self.moe_table.shape), self.moe_site.num_experts
        if tuple(table.shape) not in (wanted, wanted[:1]) or table.numel() != self.moe_table.numel():
            raise ValueError(f"the table must have the shape {list(wanted)}, got {list(table.shape)}.")
        table = table.reshape(wanted).long()
        if table.min() < 0 or table.max() >= experts:
            raise ValueError(f"the table must hold experts 0 to {experts - 1}, got {table.min()} to {table.max()}.")
        ordered = table.sort(dim=-1).values
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError("the table names an expert twice for one token.")
        self.moe_table.copy_(table)

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        columns = self.moe_table[self._ids(hidden, context)]  # (T, k)
        weights = hidden.new_full(columns.shape, 1 / columns.shape[-1], dtype=torch.float32)
        matrices = self.permutation(context)
        weights, index = self.permute_slots(weights, columns, matrices)
        size = self.moe_site.num_choices
        scores = weights.new_zeros(len(index), size + 1).scatter(-1, index, weights)[:, :-1]
        scores = to_distribution(scores)
        weights = self.final_weights(weights, index, None)
        extras = self.permutation_extras(matrices, len(hidden))
        return RouteRecord(scores.clamp_min(1e-30).log(), scores, weights, index, self.moe_config, extras=extras)

    def _ids(self, hidden: torch.Tensor, context: RoutingContext | None) -> torch.Tensor:
        """(T,) token ids of this forward."""
        ids = None if context is None else context.input_ids
        if ids is None:
            raise ValueError(
                f'the `hash` router of layer "{self.moe_site.key}" looks up token ids; call the model with '
                "`input_ids` (not `inputs_embeds`, images or sound alone)."
            )
        if ids.numel() != len(hidden):
            raise ValueError(
                f'the `hash` router of layer "{self.moe_site.key}" got {len(hidden)} hidden states for '
                f"{ids.numel()} `input_ids`; it goes with models that have one hidden state for each id."
            )
        ids = ids.reshape(-1).to(self.moe_table.device)
        if not torch.compiler.is_compiling() and ids.device.type == "cpu" and ids.numel():
            last = len(self.moe_table) - 1
            if ids.min() < 0 or ids.max() > last:
                raise ValueError(
                    f"the table of the `hash` router has ids 0 to {last} (`vocab_size`), `input_ids` has {ids.min()} "
                    f"to {ids.max()}."
                )
        return ids

    @staticmethod
    def aux_losses(record: RouteRecord, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return {**MoERouter.aux_losses(record, mask), **extra_losses(record, mask, "permutation")}


# --- tables ---


def random_table(vocab_size: int, k: int, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """(V, k) experts, drawn for every token on its own, without repetition."""
    chosen = torch.empty(vocab_size, 0, dtype=torch.int64)
    for taken in range(k):
        # A number among those that are left, then counted on over the taken ones, in order.
        drawn = torch.randint(num_experts - taken, (vocab_size,), generator=generator)
        for other in chosen.sort(dim=-1).values.unbind(dim=-1):
            drawn = drawn + (drawn >= other)
        chosen = torch.cat([chosen, drawn.unsqueeze(-1)], dim=-1)
    return chosen


def even_table(vocab_size: int, k: int, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """(V, k) experts, such that the numbers of token ids of two experts differ by k at most."""
    places = torch.randperm(vocab_size, generator=generator)
    # Every E ids in a row are dealt to all experts once for each hash function, each round with other offsets.
    offsets = random_table(-(-vocab_size // num_experts), k, num_experts, generator)[places // num_experts]
    return (places.unsqueeze(-1) + offsets) % num_experts


def balanced_table(frequencies: torch.Tensor | Sequence[float], num_experts: int, k: int = 1) -> torch.Tensor:
    """A table for `HashRouter.set_table` by which experts get equally many tokens of a text.

    In order of frequency, each token id goes to the k experts with the least load so far (2106.04426, balanced
    assignment).

    Args:
        frequencies (`torch.Tensor`):
            (vocab_size,) how often each token id occurs.
        num_experts (`int`):
            E.
        k (`int`, *optional*, defaults to 1):
            Experts per token.

    Returns:
        (vocab_size, k) int64.

    Example:
        ```python
        >>> table = balanced_table(torch.bincount(ids, minlength=model.config.vocab_size), num_experts=8)
        >>> for router in model.modules():
        ...     if isinstance(router, HashRouter):
        ...         router.set_table(table)
        ```
    """
    counts = torch.as_tensor(frequencies, dtype=torch.float64)
    if counts.dim() != 1 or not (counts >= 0).all():
        raise ValueError("`frequencies` must be one-dimensional and non-negative.")
    if not 1 <= k <= num_experts:
        raise ValueError(f"`k` must be in [1, num_experts={num_experts}], got {k}.")
    loads = [(0.0, expert) for expert in range(num_experts)]
    rows = [[0] * k for _ in range(len(counts))]
    for token in counts.argsort(descending=True, stable=True).tolist():
        least = [heapq.heappop(loads) for _ in range(k)]
        rows[token] = [expert for _, expert in least]
        for load, expert in least:
            heapq.heappush(loads, (load + counts[token].item(), expert))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, k)
