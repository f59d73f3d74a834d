"""Layerwise recurrent routing: a small recurrent cell over depth tells each router how its token was routed before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .configuration_moe_ext import RouterConfig
from .moe_context import RouteRecord, RoutingContext
from .moe_install import Reference, add_child, freeze
from .moe_parts import PartModule
from .moe_router import MoERouter, RouterSite, as_distribution, expert_scores, register_router
from .router_top_k import TopKRouter, TopKRouterConfig


CELL_NAME = "moe_rmoe_cell"

# Kind of cell -> the step that PyTorch has for it, the gates stacked in its weights, and what it hands on.
_CELLS: dict[str, tuple[Any, int, tuple[str, ...]]] = {
    "gru": (torch.gru_cell, 3, ("rmoe_state",)),
    "rnn": (torch.rnn_tanh_cell, 1, ("rmoe_state",)),
    "lstm": (torch.lstm_cell, 4, ("rmoe_state", "rmoe_memory")),
}


@dataclass
class RMoERouterConfig(RouterConfig):
    """Config of `RMoERouter`. Defaults are those of the paper (2408.06793), but for `additive`.

    > Parameters of the recurrence

    Args:
        state_size (`int`, *optional*, defaults to 128):
            Size of the state that goes from layer to layer, and of the cell's input (p in the paper).
        cell (`"gru"`, `"rnn"` or `"lstm"`, *optional*, defaults to `"gru"`):
            Kind of the one cell that all layers of a stack share.
        variant (`"full"`, `"no_recurrence"`, `"detach"` or `"residual"`, *optional*, defaults to `"full"`):
            The paper's ablations: every layer starts from a zero state; the state is handed on without its gradient;
            the previous layer's scores are added to a layer's own.
        residual_coef (`float`, *optional*, defaults to 1.0):
            Weight of the previous layer's scores with `variant="residual"` (alpha).
        additive (`bool`, *optional*, defaults to `True`):
            Whether the recurrent logits are added to those of the stock gate, and start at zero. `False` replaces the
            stock gate, as in the paper; for training from scratch.
        init_std (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights. Biases start at zero.

    > Parameters that control the selection

    Args:
        num_experts_per_tok (`int`, *optional*):
            Experts per token (k), `None` for the family's.
        score (`"softmax"` or `"sigmoid"`, *optional*):
            Map from logits to scores, `None` for the family's.

    > Parameters that control the auxiliary losses

    Args:
        balance_coef (`float`, *optional*, defaults to 1e-2):
            Weight of the load-balancing loss.
    """

    state_size: int = 128
    cell: Literal["gru", "rnn", "lstm"] = "gru"
    variant: Literal["full", "no_recurrence", "detach", "residual"] = "full"
    residual_coef: float = 1.0
    additive: bool = True
    init_std: float = 0.02
    num_experts_per_tok: int | None = None
    score: Literal["softmax", "sigmoid"] | None = None
    balance_coef: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state_size < 1:
            raise ValueError(f"`state_size` must be at least 1, got {self.state_size}.")
        if self.residual_coef < 0:
            raise ValueError(f"`residual_coef` must be non-negative, got {self.residual_coef}.")
        if self.init_std <= 0:
            raise ValueError(f"`init_std` must be positive, got {self.init_std}.")
        if self.num_experts_per_tok is not None and self.num_experts_per_tok < 1:
            raise ValueError(f"`num_experts_per_tok` must be at least 1, got {self.num_experts_per_tok}.")


class RecurrentCell(PartModule):
    """One step of a recurrent cell, in float32: input (T, p) and states (T, p) -> new states.

    Its parameters have the names and the layout of `torch.nn.GRUCell`, `RNNCell` and `LSTMCell`.
    """

    def __init__(self, config: RMoERouterConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.init_std = config.cell, config.init_std
        rows = _CELLS[config.cell][1] * config.state_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.weight_ih, self.weight_hh = parameter(rows, config.state_size), parameter(rows, config.state_size)
        self.bias_ih, self.bias_hh = parameter(rows), parameter(rows)

    def init_weights(self, std: float) -> None:
        for weight in (self.weight_ih, self.weight_hh):
            init.normal_(weight, mean=0.0, std=self.init_std)
        for bias in (self.bias_ih, self.bias_hh):
            init.zeros_(bias)

    def forward(self, reduced: torch.Tensor, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        step, _, _ = _CELLS[self.kind]
        weights = [p.float() for p in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)]
        reduced, *before = (tensor.to(self.weight_ih.device) for tensor in (reduced, *states))
        # A recurrence over dozens of layers loses in bfloat16 the small differences that routing lives on.
        with maybe_autocast(reduced.device.type, enabled=False):
            out = step(reduced, before if len(before) > 1 else before[0], *weights)
        return out if isinstance(out, tuple) else (out,)


@register_router("rmoe")
class RMoERouter(MoERouter):
    """Top-k on the state of a recurrent cell that runs over the depth of the model, for each token by itself.

    "Layerwise Recurrent Router for Mixture-of-Experts" (2408.06793), section 3. Layer i reduces its input with a
    matrix of its own, the one cell of the stack makes `h_i` of that and of `h_{i-1}`, and a matrix of the layer's own
    maps `h_i` to logits. The family's scoring follows. Only layers with this router take part; dense ones between
    them, and layers left stock, hand the state on as it is.

    The comparison of the paper's ablations by loss (8 layers, 16 experts, thousands of steps, several seeds), and that
    of the mutual information between choices of adjacent layers, are not repeated in the tests; the information and
    gradient paths that distinguish the ablations are.
    """

    config_class = RMoERouterConfig
    replays = True
    paper = "Layerwise Recurrent Router for MoE (2408.06793)"
    needs = "a cell shared by all layers"
    crosses_layers = True
    moe_config: RMoERouterConfig
    moe_base: Reference

    @classmethod
    def identity_config(cls, site: RouterSite) -> RMoERouterConfig:
        """Stock logits plus recurrent ones that start at zero."""
        if site.rule.score == "custom":
            raise NotImplementedError(
                "this family's gate has a rule of its own, which score and top-k cannot express."
            )
        return RMoERouterConfig(balance_coef=0.0)

    @classmethod
    def check(cls, config: RMoERouterConfig, site: RouterSite) -> None:  # type: ignore[override]
        k = config.num_experts_per_tok or site.top_k
        TopKRouter.check(TopKRouterConfig(num_experts_per_tok=k, score=config.score), site)

    @classmethod
    def check_stack(cls, members: list[tuple[Any, RouterSite]]) -> None:
        super().check_stack(members)
        (first, site), *others = members
        for config, other in others:
            for name in ("state_size", "cell", "init_std"):
                mine, theirs = getattr(first, name), getattr(config, name)
                if mine != theirs:
                    raise ValueError(
                        f'layers "{site.key}" and "{other.key}" share one recurrent cell, so `{name}` must be equal '
                        f"in both, got {mine!r} and {theirs!r}."
                    )
            if config.variant == "residual" and other.num_choices != site.num_choices:
                raise ValueError(
                    f'`variant="residual"` adds the scores of the layer before, but layer "{site.key}" has '
                    f'{site.num_choices} experts to choose from and layer "{other.key}" has {other.num_choices}.'
                )

    @classmethod
    def setup_stack(cls, base: nn.Module, routers: list[Any]) -> None:
        first = routers[0]
        cell = RecurrentCell(first.moe_config, first.moe_input_weight.device, first.moe_input_weight.dtype)
        add_child(base, CELL_NAME, cell)
        for router in routers:
            router.moe_base = Reference(base)
            router.moe_attributes = (*router.moe_attributes, "moe_base")

    def setup(self) -> None:
        config, site = self.moe_config, self.moe_site
        place = {"device": self.own_device, "dtype": next(self.parameters()).dtype}
        if not config.additive:  # neither the stock gate nor its rows for zero-computation experts are used
            freeze(self, [name for name, _ in self.named_parameters()])
        self.moe_input_weight = nn.Parameter(torch.empty(config.state_size, site.hidden_size, **place))
        self.moe_output_weight = nn.Parameter(torch.empty(site.num_choices, config.state_size, **place))

    def reset_parameters(self) -> None:
        init.normal_(self.moe_input_weight, mean=0.0, std=self.moe_config.init_std)
        if self.moe_config.additive:
            init.zeros_(self.moe_output_weight)
        else:
            init.normal_(self.moe_output_weight, mean=0.0, std=self.moe_config.init_std)

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        config, site, rule = self.moe_config, self.moe_site, self.moe_site.rule
        score = config.score or rule.score
        logits = self._recurrent_logits(hidden, context)
        if config.additive:
            logits = self.router_logits(hidden, *args, **kwargs).float() + logits
        else:
            logits = self.hold_zero_experts(logits)
        raw = expert_scores(logits, score)
        if config.variant == "residual":
            own = raw
            before = None if context is None else context.carry.get((site.order - 1, "rmoe_scores"))
            if before is not None:
                raw = raw + config.residual_coef * before.to(raw.device)
            if context is not None:
                context.carry[site.order, "rmoe_scores"] = own
            score = "sigmoid"  # from here on: values that do not sum to 1, whichever way they were made
        scores = as_distribution(raw, score)
        choice = self.selection_scores(raw, self.selection_bias(*args), rule.groups)
        index = choice.topk(config.num_experts_per_tok or site.top_k, dim=-1).indices
        renormalize = rule.renormalize or rule.order == "topk_score"
        weights = self.slot_weights(logits, raw, index, score=score, renormalize=renormalize)
        return RouteRecord(logits, scores, self.final_weights(weights, index, None), index, config)

    def _recurrent_logits(self, hidden: torch.Tensor, context: RoutingContext | None) -> torch.Tensor:
        """Advance the state by this layer, leave it for the next one, and read the logits (T, C) off it."""
        names, order = _CELLS[self.moe_config.cell][2], self.moe_site.order
        with maybe_autocast(hidden.device.type, enabled=False):
            reduced = F.linear(hidden.float(), self.moe_input_weight.float())
        states = [None if context is None else context.carry.get((order - 1, name)) for name in names]
        if self.moe_config.variant == "no_recurrence":
            states = [None] * len(names)
        before = tuple(torch.zeros_like(reduced) if state is None else state for state in states)
        if self.moe_config.variant == "detach":
            before = tuple(state.detach() for state in before)
        after = getattr(self.moe_base.module, CELL_NAME)(reduced, before)
        if context is not None:
            for name, state in zip(names, after, strict=True):
                context.carry[order, name] = state
        with maybe_autocast(hidden.device.type, enabled=False):
            return F.linear(after[0].to(hidden.device), self.moe_output_weight.float())
