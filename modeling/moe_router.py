"""The router contract: what every router implements, how it is registered, and the selection rules they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .configuration_moe_ext import _ROUTER_CONFIGS, RouterConfig, _unknown
from .configuration_parts import ZeroExpertsConfig
from .moe_context import RouteRecord, RoutingContext, RoutingLink
from .moe_families import get_by_path
from .moe_install import freeze
from .moe_losses import (
    load_balancing_loss,
    localized_balancing_loss,
    mixed_balancing_loss,
    router_concentration,
    router_entropy,
    router_information,
    router_z_loss,
)
from .moe_schedules import schedule_fraction


_ROUTERS: dict[str, type[MoERouter]] = {}
_Router = TypeVar("_Router", bound="MoERouter")


@dataclass(frozen=True)
class GateRule:
    """The rule of a stock gate, with config keys resolved to values. Fields as in `MoeSpec`."""

    score: str = "softmax"
    order: str = "score_topk"
    renormalize: bool = True
    scale: float = 1.0
    bias: str | None = None
    expert_scale: str | None = None
    groups: tuple[int, int, str] | None = None
    logits: str = "linear"
    returns: str = "LWI"
    input_3d: bool = False


@dataclass(frozen=True)
class RouterSite:
    """Where a router stands: layer key, position among the routed layers, counts, and the stock rule there.

    `zero_experts` are the choices beside the real experts; together they are the `num_choices` columns of the logits.
    `causal` says whether the layer's attention is. `attention` says that the router chooses experts of attention, and
    `lora` that it chooses low-rank adapters; their keys are that of the layer with `attention.` or `lora.` in front.
    """

    key: str
    order: int
    num_experts: int
    top_k: int
    hidden_size: int
    rule: GateRule
    zero_experts: ZeroExpertsConfig | None = None
    causal: bool = True
    attention: bool = False
    lora: bool = False

    @property
    def group(self) -> str:
        """Which routers share a context of their own: `""` for those in front of experts, `"attention"`, `"lora"`."""
        return "attention" if self.attention else "lora" if self.lora else ""

    @property
    def num_choices(self) -> int:
        """Columns of the logits: real experts, then zero-computation experts. As an index, an unused slot."""
        return self.num_experts + (self.zero_experts.total if self.zero_experts else 0)

    @property
    def num_null(self) -> int:
        """Zero-computation experts that return nothing; their columns follow the real experts'."""
        return self.zero_experts.zero if self.zero_experts else 0


class BlockBias:
    """Leads from a gate to the correction bias that its block keeps and hands to it.

    A copy of the whole model refers to the copied block, a copy of the gate alone to the block it came from.
    """

    def __init__(self, block: nn.Module, path: str) -> None:
        self.block, self.path = block, path

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockBias:
        twin = memo.get(id(self.block))
        return self if twin is None else BlockBias(twin, self.path)

    def get(self) -> torch.Tensor:
        """The tensor itself."""
        return get_by_path(self.block, self.path)


class MoERouter(nn.Module):
    """Base of all routers.

    A router is installed by giving the stock gate the class `(Router, StockGate)`: the gate keeps its parameters,
    hooks, checkpoint keys and `isinstance` relations, and gains what the router adds. `restore` gives the old class
    back. So a router has no `__init__`; it makes its own parameters in `setup`.

    A subclass sets `config_class`, implements `route`, and is registered by `register_router`.

    Attributes (of the class):
        paper: where the method was published, as `hf-moe list routers` shows it.
        needs: what it needs beside the stock gate, in a few words; empty for nothing.
        crosses_layers: whether a layer leaves something for later ones in the context's carry.
        causal: whether a token's routing is independent of later tokens. Models with another router do not generate.
        learned: whether the router has parameters that are trained.
        own_logits: whether the router makes its logits itself, all `num_choices` columns. Otherwise `router_logits`
            adds the columns of zero-computation experts to those of the stock gate.
        holds_zero_experts: whether zero-computation experts can be held back at first (`hold_zero_experts`).
        replays: whether the weights of any choice follow from the logits, by `slot_weights`, so that recorded choices
            can take the place of the router's own (see `replay_routing`).
        expert_rows: names of the tensors made in `setup` that have a row for each expert. `None` where it is not as
            simple, so that experts cannot be added to a layer or taken out of it.
        stateless: whether `setup` creates nothing, with fields at their defaults, so that some rows of a batch may be
            routed by it beside another router (see `route_rows`).
        mixes_tokens: whether the experts get mixtures of tokens in place of tokens. `route` leaves the matrices
            `dispatch` and `combine`, both (B, S, slots), in the context's carry under its order; see `RoutedExperts`.

    Attributes (set at installation):
        moe_config: the router's config.
        moe_site: the `RouterSite` it stands at.
        moe_link: the `RoutingLink` of the model.
        moe_coefs: weights of auxiliary losses that a trainer sets in place of the config's, scalar tensors by name.
    """

    config_class: ClassVar[type[RouterConfig]]
    paper: ClassVar[str] = ""
    needs: ClassVar[str] = ""
    crosses_layers: ClassVar[bool] = False
    causal: ClassVar[bool] = True
    learned: ClassVar[bool] = True
    own_logits: ClassVar[bool] = False
    holds_zero_experts: ClassVar[bool] = True
    mixes_tokens: ClassVar[bool] = False
    stateless: ClassVar[bool] = False
    replays: ClassVar[bool] = False
    expert_rows: ClassVar[tuple[str, ...] | None] = None
    moe_config: Any
    moe_site: RouterSite
    moe_link: RoutingLink
    moe_coefs: dict[str, torch.Tensor] | None = None

    def setup(self) -> None:
        """Create the router's own parameters and buffers (on `self.weight`'s device or meta). Default: none.

        Names must start with `moe_`, so that they never meet a stock name.
        """

    def reset_parameters(self) -> None:
        """Initialise what `setup` created, with the functions of `transformers.initialization`. Default: nothing.

        Called again after loading; those functions skip loaded tensors.
        """

    @classmethod
    def default_zero_experts(cls, config: RouterConfig, num_experts: int) -> ZeroExpertsConfig | None:
        """Zero-computation experts of a layer whose declaration names none. Default: none."""
        return None

    @classmethod
    def num_slots(cls, config: Any, site: RouterSite) -> int:
        """Slots of a token: the most choices it has."""
        if hasattr(config, "max_slots"):
            return config.max_slots or site.num_choices
        return getattr(config, "num_experts_per_tok", None) or site.top_k

    @classmethod
    def extra_slots(cls, config: Any, site: RouterSite) -> int:
        """Slots that every token has beyond those of the stock gate. An identity start fills them with null experts.
        Default: none."""
        return 0

    @classmethod
    def input_factor(cls, config: Any, site: RouterSite) -> float:
        """Factor on the input of all experts of a layer with zero-computation experts. Default: 1."""
        return 1.0

    @classmethod
    def check_stack(cls, members: list[tuple[RouterConfig, RouterSite]]) -> None:
        """Raise `ValueError` where the layers of one stack that have this router do not go together. Routers that
        cross layers must stand on routed layers that follow each other."""
        orders = [site.order for _, site in members]
        if cls.crosses_layers and orders != list(range(orders[0], orders[0] + len(orders))):
            gap = next(i for i, order in enumerate(orders) if order != orders[0] + i)
            raise ValueError(
                f"the `{cls.config_class.type}` router hands something from layer to layer, so its MoE layers must "
                f'follow each other; between layer "{members[gap - 1][1].key}" and layer "{members[gap][1].key}" '
                "stands another router."
            )

    @classmethod
    def setup_stack(cls, base: nn.Module, routers: list[Any]) -> None:
        """Create what the routers of one stack share, as a child of `base` whose name starts with `moe_`, by
        `add_child`. Default: nothing."""

    def before_layer(self, context: RoutingContext, cache: Any) -> None:
        """Called in front of the router's decoder layer in every forward, with the model's cache, if any. What it
        leaves in the context's carry is not recomputed by activation checkpointing. Default: nothing."""

    @classmethod
    def check(cls, config: RouterConfig, site: RouterSite) -> None:
        """Raise `ValueError` where `config` cannot work at `site`. Called before anything is changed."""

    @classmethod
    def identity_config(cls, site: RouterSite) -> RouterConfig:
        """The config with which a freshly installed router reproduces the stock gate exactly.

        Raises:
            NotImplementedError: where the method has no such point; the message says why.
        """
        raise NotImplementedError(f"{cls.__name__} has no setting that reproduces a stock gate.")

    def route(self, hidden: torch.Tensor, context: RoutingContext | None, *args: Any, **kwargs: Any) -> RouteRecord:
        """Decide. `hidden` is (T, H); further arguments are what the family's block hands its gate, and go to
        `stock_route`, `router_logits` and `selection_bias`."""
        raise NotImplementedError

    @staticmethod
    def aux_losses(record: RouteRecord, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Unweighted auxiliary losses of one layer by name; only those with a non-zero weight in the config."""
        coefs = record.config.loss_coefs
        losses = {}
        if coefs.get("balance"):
            losses["balance"] = balance_loss(record, mask)
        if coefs.get("z"):
            losses["z"] = router_z_loss(record.logits, mask)
        if coefs.get("entropy"):
            losses["entropy"] = router_entropy(record.scores, mask)
        if coefs.get("information"):
            losses["information"] = router_information(record.scores, mask)
        if coefs.get("concentration"):
            losses["concentration"] = router_concentration(record.scores, mask)
        if coefs.get("localized"):
            losses["localized"] = localized_loss(record, mask)
        return losses

    def schedule(self, step: int, total_steps: int) -> None:
        """Called by the trainer with the optimizer steps taken so far: before training and after each step.

        Keeps them in the buffer `moe_progress` where `setup` asked for it by `use_progress()`."""
        if "moe_progress" in self._buffers:
            self.moe_progress.copy_(torch.tensor([step, total_steps]))

    def after_optimizer_step(self, counts: torch.Tensor) -> None:
        """Called by the trainer after each optimizer step with the (E,) token counts of that step."""

    # --- what subclasses build on ---

    def init_weights(self, std: float) -> None:
        """Initialise everything that installation created: rows of zero-computation experts, progress, and what
        `setup` made. Loaded tensors are skipped."""
        if "moe_zero_weight" in self._parameters:
            self.reset_zero_experts(std)
        if "moe_progress" in self._buffers:
            init.zeros_(self.moe_progress)
        freeze(self, list(vars(self).get("moe_frozen", ())))  # loading makes new, trainable parameters
        self.reset_parameters()
        self.init_from_stock()

    def init_from_stock(self) -> None:
        """Initialise what starts from the values of the stock gate. Called again where those came later."""
        zero = self.moe_site.zero_experts
        if "moe_zero_weight" in self._parameters and zero is not None and zero.init == "copy":
            rows = torch.arange(zero.total, device=self.weight.device) % self.moe_site.num_experts
            init.copy_(self.moe_zero_weight, self.weight.detach()[rows])

    @property
    def schedule_steps(self) -> int | None:
        """Optimizer steps until the last change of a scheduled setting, of the router or its zero-computation experts;
        `None` where nothing is scheduled, or over the whole training."""
        zero = self.moe_site.zero_experts
        lengths = (self.moe_config.schedule_steps, None if zero is None else zero.warmup_steps)
        return max((length for length in lengths if length is not None), default=None)

    def use_progress(self) -> None:
        """For `setup`: keep the progress of training in an int64 buffer `moe_progress`, `[step, total_steps]`."""
        self.register_buffer("moe_progress", torch.zeros(2, dtype=torch.int64, device=self.own_device))

    def freeze_stock(self) -> None:
        """For `setup` of a router that does not use the stock gate: exclude its parameters from training."""
        freeze(self, [name for name, _ in self.named_parameters() if not name.startswith("moe_")])

    @property
    def own_device(self) -> torch.device:
        """Device of the stock gate, where `setup` puts what it creates."""
        return next(self.parameters()).device

    def setup_zero_experts(self) -> None:
        """Create the gate's rows for zero-computation experts, (Z, H) and (Z,), unless the router makes all logits
        itself, and what their warm-up needs."""
        if self._holds_zero_experts:
            self.use_progress()
        if self.own_logits:
            return
        count, first = self.moe_site.num_choices - self.moe_site.num_experts, next(self.parameters())
        place = {"device": first.device, "dtype": first.dtype}
        self.moe_zero_weight = nn.Parameter(torch.empty(count, self.moe_site.hidden_size, **place))
        self.moe_zero_bias = nn.Parameter(torch.empty(count, **place))

    def reset_zero_experts(self, std: float) -> None:
        """Initialise those rows; copies of the stock gate's rows are made by `init_from_stock`."""
        init.normal_(self.moe_zero_weight, mean=0.0, std=std)
        init.zeros_(self.moe_zero_bias)

    @property
    def _holds_zero_experts(self) -> bool:
        """Whether zero-computation experts are held back at first, so that the layer starts as it was."""
        zero = self.moe_site.zero_experts
        return zero is not None and zero.init == "identity"

    def _warmup_fraction(self) -> torch.Tensor:
        zero = self.moe_site.zero_experts
        return schedule_fraction(self.moe_progress, None if zero is None else zero.warmup_steps)

    def hold_zero_experts(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (T, C), where zero-computation experts start held back: their odds are multiplied by the share of the
        warm-up that is over. At the start they have no probability at all, whatever the stock logits are."""
        if not self._holds_zero_experts:
            return logits
        # A finite logit for "never": differences of infinities are NaN.
        odds = self._warmup_fraction().log().clamp(min=-1e4)
        real = self.moe_site.num_experts
        return logits + F.pad(odds.expand(self.moe_site.num_choices - real), (real, 0))

    def _hold_choice(self, choice: torch.Tensor) -> torch.Tensor:
        """The same for selection scores, where probability 0 is no bound: a correction bias makes real experts
        negative, groups make them -inf. Held experts stand below all real ones that may be chosen; the null experts
        that fill extra slots stand above."""
        real = self.moe_site.num_experts
        chosen_from, zero = choice[..., :real], choice[..., real:]
        barred = ~chosen_from.isfinite()
        margin = 1e-3  # decides at the start only; small, so that it does not weigh during the warm-up
        low = chosen_from.masked_fill(barred, float("inf")).amin(dim=-1, keepdim=True) - margin
        high = chosen_from.masked_fill(barred, float("-inf")).amax(dim=-1, keepdim=True) + margin
        filling = torch.arange(zero.shape[-1], device=zero.device) < self.extra_slots(self.moe_config, self.moe_site)
        held = torch.where(filling, high, low)
        return torch.cat([chosen_from, torch.lerp(held, zero, self._warmup_fraction())], dim=-1)

    def stock_route(
        self, hidden: torch.Tensor, *args: Any, input_shape: torch.Size | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Run the stock gate; its outputs by letter (`L`, `W`, `I`, ... as in `MoeSpec.returns`)."""
        if input_shape is not None:
            hidden = hidden.reshape(input_shape)
        outputs = super().forward(hidden, *args, **kwargs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return dict(zip(self.moe_site.rule.returns, outputs, strict=False))

    def router_logits(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raw logits (T, C): (T, E) bit-equal to those of the stock gate, then those of zero-computation experts."""
        logits = self.stock_logits(hidden, *args, **kwargs)
        if "moe_zero_weight" not in self._parameters:
            return logits
        # In float32, where rows that start as copies of each other are not tied by rounding.
        with maybe_autocast(device_type=hidden.device.type, enabled=False):
            zero = F.linear(hidden.float(), self.moe_zero_weight.float(), self.moe_zero_bias.float())
        return self.hold_zero_experts(torch.cat([logits.float(), zero], dim=-1))

    def stock_logits(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raw logits (T, E), bit-equal to those of the stock gate."""
        how = self.moe_site.rule.logits
        if how == "linear":
            return F.linear(hidden, self.weight)
        if how == "linear_fp32":
            return F.linear(hidden.float(), self.weight.float())
        if how == "layer":
            return self.layer(hidden).float()
        if how == "rows":
            return self.logits(hidden, self.weight)
        outputs = self.stock_route(hidden, *args, **kwargs)
        if "L" in outputs:
            return outputs["L"].flatten(0, -2)
        return outputs["P"].float().clamp_min(torch.finfo(torch.float32).tiny).log()

    def selection_bias(self, *args: Any) -> torch.Tensor | None:
        """The stock correction bias (C,), which moves the selection but not the weights, or `None`. It is 0 for
        zero-computation experts."""
        where = self.moe_site.rule.bias
        if where is None:
            return None
        bias = args[0] if where == "arg" else get_by_path(self, where)
        if bias is None:
            return None
        return F.pad(bias.reshape(-1), (0, self.moe_site.num_choices - self.moe_site.num_experts))

    def stored_bias(self) -> torch.Tensor | None:
        """The stock correction bias where it is stored, on the gate or on its block, or `None`."""
        where = self.moe_site.rule.bias
        if where == "arg":
            home = vars(self).get("moe_block_bias")
            return None if home is None else home.get()
        return None if where is None else get_by_path(self, where)

    def selection_scores(
        self, scores: torch.Tensor, bias: torch.Tensor | None, groups: tuple[int, int, str] | None
    ) -> torch.Tensor:
        """What experts are chosen by (T, C): scores plus bias, -inf outside the best groups of real experts."""
        choice = scores if bias is None else scores + bias
        if groups is not None and groups[0] > 1:
            real = self.moe_site.num_experts
            choice = torch.cat([limit_groups(choice[..., :real], groups), choice[..., real:]], dim=-1)
        return self._hold_choice(choice) if self._holds_zero_experts else choice

    def slot_weights(
        self,
        logits: torch.Tensor,
        scores: torch.Tensor,
        index: torch.Tensor,
        *,
        score: str,
        renormalize: bool,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Combine weights (T, K) of the chosen columns; 0 in slots that are not kept and for null experts.

        Args:
            logits, scores: (T, C).
            index: (T, K) columns.
            score: how the scores came from the logits.
            renormalize: whether the weights that count are divided by their sum. Null experts do not count; AdaMoE
                (2406.13233), option 2. A token with null experts alone gets zeros.
            keep: (T, K) slots that are used; `None` for all.
        """
        site = self.moe_site
        index, keep = self._replay(index, keep)
        counts = index < site.num_choices if keep is None else keep & (index < site.num_choices)
        if site.num_null:
            counts = counts & ((index < site.num_experts) | (index >= site.num_experts + site.num_null))
        index = index.clamp(max=logits.shape[-1] - 1)
        if not renormalize:
            return scores.gather(-1, index).masked_fill(~counts, 0)
        if score == "softmax":
            # The same as dividing probabilities by their sum, but it does not underflow beside a sure null expert.
            chosen = logits.float().gather(-1, index).masked_fill(~counts, float("-inf"))
            none = ~counts.any(dim=-1, keepdim=True)
            return chosen.masked_fill(none, 0).softmax(dim=-1).masked_fill(~counts, 0)
        weights = scores.gather(-1, index).masked_fill(~counts, 0)
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)

    def final_weights(self, weights: torch.Tensor, index: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Weights (T, K) times `scale` (`None`: the family's) and, where the family has one, a factor per expert."""
        rule = self.moe_site.rule
        index, _ = self._replay(index)
        weights = weights * (rule.scale if scale is None else scale)
        if rule.expert_scale is not None:
            factors = get_by_path(self, rule.expert_scale)
            if self.moe_site.num_choices > self.moe_site.num_experts:
                factors = F.pad(factors, (0, self.moe_site.num_choices - self.moe_site.num_experts), value=1.0)
            weights = weights * factors[index.clamp(max=len(factors) - 1)]
        return weights

    def decide(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> RouteRecord:
        """`route` for the tokens `hidden` (T, H), and keep the record in the context of the running forward."""
        context, site = self.moe_link.slots.layer_context, self.moe_site
        if context is not None:
            context = context.at(site)
        replayed = None if context is None else context.replayed.get(site.key)
        if context is not None and replayed is not None:
            record = self._route_replayed(hidden, context, replayed, *args, **kwargs)
        elif context is None or context.row_modes is None:
            record = self.route(hidden, context, *args, **kwargs)
        else:
            record = self._route_rows(hidden, context, context.row_modes, *args, **kwargs)
        if not torch.compiler.is_compiling() and record.logits.device.type == "cpu" and record.logits.isnan().any():
            where = "its input has NaN already" if hidden.isnan().any() else "its own parameters have NaN"
            raise ValueError(
                f'the router of layer "{site.key}" has NaN logits: {where}. Look for a learning rate that is too high '
                "or a value out of the range of the dtype."
            )
        if site.zero_experts is not None:
            self._place_zero_experts(record)
        if self.moe_config.localized_coef:
            _note_sequences(record, context)
        if self.moe_coefs is not None:
            coefs = self.moe_config.loss_coefs if record.coefs is None else record.coefs
            record.coefs = {**coefs, **self.moe_coefs}
        record.key, record.order, record.num_experts, record.site = site.key, site.order, site.num_experts, site
        if context is not None:
            context.add(record)
        return record

    @property
    def recorded_choices(self) -> torch.Tensor | None:
        """(T, K) columns that take the place of the router's own choices in the running pass, if any."""
        link = getattr(self, "moe_link", None)  # a router may be used without a model
        return None if link is None else link.slots.replayed

    def _route_replayed(
        self, hidden: torch.Tensor, context: RoutingContext, replayed: torch.Tensor, *args: Any, **kwargs: Any
    ) -> RouteRecord:
        """Route with recorded choices (B, S, K): as many tokens as this forward has, or one for each row less."""
        batch = context.batch_size or 1
        length = hidden.shape[0] // batch
        if context.row_modes is not None:
            raise ValueError("`replay_routing` and `route_rows` cannot be combined.")
        if replayed.shape[0] != batch or replayed.shape[1] not in (length, length - 1):
            raise ValueError(
                f"`replay_routing` has choices for {replayed.shape[0]} rows of {replayed.shape[1]} tokens, but this "
                f"forward has {batch} rows of {length}."
            )
        replayed = F.pad(replayed.to(hidden.device), (0, 0, 0, length - replayed.shape[1]), value=-1)
        slots = self.moe_link.slots
        slots.replayed = replayed.flatten(0, 1)
        try:
            record = self.route(hidden, context, *args, **kwargs)
            record.index, _ = self._replay(record.index)
        finally:
            slots.replayed = None
        return record

    def _replay(
        self, index: torch.Tensor, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Columns (T, K) and which of them are kept: the recorded ones, if any, in place of those given."""
        recorded = self.recorded_choices
        if recorded is None:
            return index, keep
        unused, slots = self.moe_site.num_choices, max(index.shape[-1], recorded.shape[-1])
        own = index if keep is None else index.masked_fill(~keep, unused)
        own = F.pad(own, (0, slots - own.shape[-1]), value=unused)
        known = (recorded >= 0).all(dim=-1, keepdim=True)
        index = torch.where(known, F.pad(recorded, (0, slots - recorded.shape[-1]), value=unused), own)
        return index, None if keep is None else index < unused

    def _place_zero_experts(self, record: RouteRecord) -> None:
        """From columns to the ids that experts understand: null experts are nobody (E), then copies and constants."""
        real, null = self.moe_site.num_experts, self.moe_site.num_null
        columns = record.index
        zero = (columns >= real) & (columns < real + null) | (columns >= self.moe_site.num_choices)
        record.choices = columns
        record.index = torch.where(columns < real, columns, columns - null + 1).masked_fill(zero, real)
        record.weights = record.weights.masked_fill(zero, 0)

    def _route_rows(
        self, hidden: torch.Tensor, context: RoutingContext, modes: list[str], *args: Any, **kwargs: Any
    ) -> RouteRecord:
        """Route each group of rows by the policy it follows, and put the rows together again."""
        batch, site = len(modes), self.moe_site
        actual = batch if context.input_ids is None else context.input_ids.shape[0]
        if actual != batch or hidden.shape[0] % batch:
            found = f"{hidden.shape[0]} tokens" if actual == batch else f"a batch of {actual} rows"
            raise ValueError(f"`route_rows` names the policies of {batch} rows, but this forward has {found}.")
        rows = hidden.unflatten(0, (batch, -1))
        groups = {mode: [row for row, other in enumerate(modes) if other == mode] for mode in dict.fromkeys(modes)}
        records = []
        for mode, members in groups.items():
            if "input_shape" in kwargs:
                kwargs["input_shape"] = torch.Size([len(members), *rows.shape[1:]])
            router = context.policies.get(mode, {}).get(site.key, self)
            part = context.part(mode, members)
            # What a block hands its gate for each row, such as what the gate of the layer before has seen.
            own = [x[members] if _has_rows(x, batch) else x for x in args]
            named = {name: x[members] if _has_rows(x, batch) else x for name, x in kwargs.items()}
            records.append(router.route(rows[members].flatten(0, 1), part, *own, **named))
        order = [row for members in groups.values() for row in members]
        back = [order.index(row) for row in range(batch)]
        slots = max(record.index.shape[-1] for record in records)

        def merge(parts: list[torch.Tensor]) -> torch.Tensor:
            tokens = [
                part.unflatten(0, (len(members), -1)) for part, members in zip(parts, groups.values(), strict=True)
            ]
            return torch.cat(tokens)[back].flatten(0, 1)

        def widen(part: torch.Tensor, value: int) -> torch.Tensor:
            return F.pad(part, (0, slots - part.shape[-1]), value=value)

        shared = set.intersection(*(set(record.extras) for record in records))
        return RouteRecord(
            merge([record.logits for record in records]),
            merge([record.scores for record in records]),
            merge([widen(record.weights, 0) for record in records]),
            merge([widen(record.index, site.num_choices) for record in records]),
            self.moe_config,
            extras={name: merge([record.extras[name] for record in records]) for name in sorted(shared)},
            coefs=records[0].coefs,
            decision=records[0].decision,
        )

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """The stock protocol: returns what the stock gate returns, in its order."""
        if self.moe_site.rule.input_3d:
            kwargs["input_shape"] = hidden_states.shape
        record = self.decide(hidden_states.reshape(-1, hidden_states.shape[-1]), *args, **kwargs)
        letters = {"L": record.logits, "P": record.scores, "W": record.weights, "I": record.index}
        returns = self.moe_site.rule.returns
        if not set(returns) <= set(letters):
            stock = record.stock or self.stock_route(hidden_states, *args, **kwargs)
            letters = {**stock, **letters}
        return tuple(letters[letter] for letter in returns)


def _has_rows(value: Any, batch: int) -> bool:
    """Whether an argument of a gate is (B, S, ...)."""
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and value.shape[0] == batch


def balance_loss(record: RouteRecord, mask: torch.Tensor | None) -> torch.Tensor:
    """The load-balancing loss of a layer, as its zero-computation experts want it where it has some."""
    site = record.site
    if site is None or site.zero_experts is None:
        return load_balancing_loss(record.scores, record.chosen, mask)
    return mixed_balancing_loss(
        record.scores,
        record.chosen,
        site.num_experts,
        site.num_null,
        grouped=site.zero_experts.balance == "grouped",
        zero_weight=site.zero_experts.balance_weight,
        mask=mask,
    )


def localized_loss(record: RouteRecord, mask: torch.Tensor | None) -> torch.Tensor:
    """The localized balancing loss of a layer."""
    config = record.config
    return localized_balancing_loss(
        record.scores,
        record.extras["rows"],
        record.extras.get("tasks"),
        groups=config.localized_groups,
        offset=config.localized_offset,
        mask=mask,
    )


def _note_sequences(record: RouteRecord, context: RoutingContext | None) -> None:
    """Which sequence each token is of, and which task that is, for the localized balancing loss."""
    tokens, device = record.scores.shape[0], record.scores.device
    batch = (None if context is None else context.batch_size) or 1
    if tokens % batch:
        raise ValueError(f"it is not known to which of {batch} sequences the {tokens} tokens of this forward belong.")
    record.extras["rows"] = torch.arange(batch, device=device).repeat_interleave(tokens // batch)
    tasks = None if context is None else context.task_ids
    if tasks is not None:
        record.extras["tasks"] = tasks.to(device).repeat_interleave(tokens // batch)


def register_router(name: str, *, exist_ok: bool = False) -> Callable[[type[_Router]], type[_Router]]:
    """Class decorator that makes a router known under `name` in configs and in `hf-moe list routers`.

    Args:
        name (`str`):
            Lower-case name with underscores.
        exist_ok (`bool`, *optional*, defaults to `False`):
            Whether an existing router of that name may be replaced.

    Raises:
        ValueError: for a name in another form, or one that is taken.
        TypeError: where the class has no `config_class` derived from `RouterConfig`.
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"a router's name must be lower-case letters, digits and underscores, got {name!r}.")
    if name in _ROUTERS and not exist_ok:
        raise ValueError(f"a router named `{name}` is registered already ({_ROUTERS[name].__qualname__}).")

    def decorate(router: type[_Router]) -> type[_Router]:
        config_class = getattr(router, "config_class", None)
        if not (isinstance(config_class, type) and issubclass(config_class, RouterConfig)):
            raise TypeError(
                f"{router.__name__} needs a `config_class` derived from RouterConfig, got {config_class!r}."
            )
        config_class.type = name
        _ROUTERS[name] = router
        _ROUTER_CONFIGS[name] = config_class
        return router

    return decorate


def get_router(name: str) -> type[MoERouter]:
    """The router class registered under `name`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _ROUTERS:
        raise ValueError(_unknown("router type", name, _ROUTERS))
    return _ROUTERS[name]


def list_routers() -> dict[str, type[MoERouter]]:
    """All registered routers by name, sorted."""
    return dict(sorted(_ROUTERS.items()))


def expert_scores(logits: torch.Tensor, score: str) -> torch.Tensor:
    """(T, E) logits to float32 scores, `"softmax"` over the experts or elementwise `"sigmoid"`."""
    return logits.float().softmax(dim=-1) if score == "softmax" else logits.float().sigmoid()


def as_distribution(scores: torch.Tensor, score: str) -> torch.Tensor:
    """Scores with rows that sum to 1, for losses and thresholds (sigmoid scores are divided by their sum)."""
    return scores if score == "softmax" else scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)


def limit_groups(choice: torch.Tensor, groups: tuple[int, int, str] | None) -> torch.Tensor:
    """Set the selection scores of experts outside a token's best groups to -inf.

    DeepSeek-V2/V3 (2405.04434, 2412.19437): experts are split into `groups[0]` equal groups, a group scores the sum of
    its two best experts (`"top2_sum"`) or its best one (`"max"`), and the `groups[1]` best groups remain.
    """
    if groups is None or groups[0] <= 1:
        return choice
    num_groups, keep, how = groups
    grouped = choice.unflatten(-1, (num_groups, -1))
    size = grouped.shape[-1]
    best = grouped.topk(min(2, size), dim=-1).values.sum(-1) if how == "top2_sum" else grouped.amax(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(keep, dim=-1).indices, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
