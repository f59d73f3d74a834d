"""Configs of the parts that a layer may have beside router, experts and attention, and the check of their types."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import dataclass, fields
from typing import Any, Literal


def _matches(value: Any, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or annotation)


def _describe_type(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_describe_type(option) for option in typing.get_args(annotation))
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def check_types(config: Any) -> None:
    """Raise `TypeError` naming the first field of a config dataclass whose value does not fit its annotation, or
    `ValueError` where it is infinite or NaN."""
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        value, annotation = getattr(config, item.name), hints[item.name]
        if not _matches(value, annotation):
            raise TypeError(
                f"`{item.name}` of {type(config).__name__} must be {_describe_type(annotation)}, got {value!r}."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{item.name}` of {type(config).__name__} must be finite, got {value}.")


@dataclass
class ZeroExpertsConfig:
    """Zero-computation experts: choices of the router beside the real experts that cost next to nothing.

    They go with every router that chooses by logits. Columns of the logits stand in the order: real experts, `zero`,
    `copy`, `constant`. MoE++ (2410.07348), section 3.1; the zero experts alone are the null experts of AdaMoE
    (2406.13233).

    Args:
        zero (`int`, *optional*, defaults to 0):
            Experts that return nothing; a slot that picks one is unused. Where weights are renormalised, they do not
            count.
        copy (`int`, *optional*, defaults to 0):
            Experts that return the block's input.
        constant (`int`, *optional*, defaults to 0):
            Experts that return a mixture of the block's input and a learned vector.
        init (`"random"`, `"copy"` or `"identity"`, *optional*, defaults to `"random"`):
            Rows of the gate for them: normal; the rows of the real experts in turn; or normal rows that are held back,
            so that the layer computes at first what it did before. In training their odds then grow linearly from 0.
        warmup_steps (`int`, *optional*):
            Optimizer steps until nothing is held back any more, with `init="identity"`. `None` means the whole
            training.
        balance (`"individual"` or `"grouped"`, *optional*, defaults to `"individual"`):
            Whether the load-balancing loss evens out the `zero` experts one by one, or only their mean load (AdaMoE).
        balance_weight (`float`, *optional*, defaults to 1.0):
            Factor on the terms of zero-computation experts in that loss (tau in MoE++). Below 1, they are picked more
            often than real experts.
    """

    zero: int = 0
    copy: int = 0
    constant: int = 0
    init: Literal["random", "copy", "identity"] = "random"
    warmup_steps: int | None = None
    balance: Literal["individual", "grouped"] = "individual"
    balance_weight: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("zero", "copy", "constant", "balance_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")
        if self.total == 0:
            raise ValueError("`zero_experts` has none: set `zero`, `copy` or `constant`, or leave it out.")
        if self.warmup_steps is not None and self.warmup_steps < 1:
            raise ValueError(f"`warmup_steps` must be at least 1, got {self.warmup_steps}.")
        if self.warmup_steps is not None and self.init != "identity":
            raise ValueError(
                f'`warmup_steps` ({self.warmup_steps}) goes with `init="identity"`; with `init="{self.init}"` '
                "nothing is held back."
            )

    @property
    def total(self) -> int:
        """Number of zero-computation experts of a layer."""
        return self.zero + self.copy + self.constant


@dataclass
class SharedExpertsConfig:
    """A feed-forward block that every token passes, added to the output of the block of routed experts.

    DeepSeekMoE (2401.06066), section 3.2. Activation and gating are those of the family's experts. Shared experts that
    a family has already stay as they are.

    Args:
        intermediate_size (`int`, *optional*):
            Its width: the number of shared experts times the width of one. `None` means the width of one routed
            expert, or of the dense block where `init="dense"`.
        init (`"zero"` or `"dense"`, *optional*, defaults to `"zero"`):
            How it starts: with an output projection of zeros, so that it changes nothing at first; or, when a dense
            model is upcycled, as the dense block, while the output projections of the routed experts start at zero.
            Both keep the function.
        combine (`"sum"` or `"mix"`, *optional*, defaults to `"sum"`):
            How it is put together with the routed experts: added, or, in the library of DeepSpeed-MoE (2201.05596),
            by the two weights of a softmax, which a linear map of the token gives. With `"mix"` and `init="dense"`,
            the routed experts start as the method made them, and both weights are 1/2: that keeps the function where
            the weights of a token's experts sum to 1.
    """

    intermediate_size: int | None = None
    init: Literal["zero", "dense"] = "zero"
    combine: Literal["sum", "mix"] = "sum"

    def __post_init__(self) -> None:
        check_types(self)
        if self.combine == "mix" and self.init != "dense":
            raise ValueError(
                '`combine="mix"` gives the routed experts half of the weight at first, which nothing makes up for '
                'with `init="zero"`; use `init="dense"`.'
            )
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ValueError(f"`intermediate_size` must be at least 1, got {self.intermediate_size}.")


@dataclass
class MomentumConfig:
    """Momentum from MoE layer to MoE layer, applied to the output of the block. MomentumSMoE (2410.14574).

    Args:
        kind (`"heavy_ball"`, `"adam"` or `"robust"`, *optional*, defaults to `"heavy_ball"`):
            Which optimizer the stack of layers imitates. `"adam"` is Adam in the first `adam_layers` MoE layers and
            heavy ball after them.
        scope (`"block"` or `"routed"`, *optional*, defaults to `"block"`):
            What is taken for the gradient: the output of the whole block, or that of its routed experts.

    > Heavy ball, and the layers after Adam

    Args:
        decay (`float`, *optional*, defaults to 0.7):
            Share of the velocity that the next layer keeps (mu in the paper), in [0, 1). 0 is the stock model.
        step_size (`float`, *optional*, defaults to 1.0):
            Factor on the velocity before the residual connection adds it (gamma). With `kind="adam"` it is that of the
            Adam layers, and 1 in the others, as in the authors' code.
        warmup_steps (`int`, *optional*, defaults to 0):
            Optimizer steps in which the decay grows from 0, for training on from pretrained weights. For heavy ball.

    > Adam

    Args:
        adam_layers (`int`, *optional*, defaults to 1):
            MoE layers of each stack, from the first, that imitate Adam.
        beta1, beta2 (`float`, *optional*, default to 0.9 and 0.999):
            Decays of the mean of the outputs and of their squares, in [0, 1).
        eps (`float`, *optional*, defaults to 1e-8):
            Added to the mean square inside the root.
        skip_coef (`float`, *optional*, defaults to 0.0):
            What is taken from the residual stream (kappa), as AdamW's weight decay. In the authors' code it is 1: the
            stream starts anew after an Adam layer.

    > Robust momentum (1710.04753)

    Args:
        smoothness (`float`, *optional*, defaults to 1.0):
            L, the largest curvature that the layers are taken to have.
        condition (`float`, *optional*, defaults to 10.0):
            Largest over smallest curvature, above 1.
        rate (`float`, *optional*):
            Rate of convergence (rho), from `1 - 1/sqrt(condition)`, the fastest, to `1 - 1/condition`, the most robust
            and the same as gradient descent. `None` is the fastest.
    """

    kind: Literal["heavy_ball", "adam", "robust"] = "heavy_ball"
    scope: Literal["block", "routed"] = "block"
    decay: float = 0.7
    step_size: float = 1.0
    warmup_steps: int = 0
    adam_layers: int = 1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    skip_coef: float = 0.0
    smoothness: float = 1.0
    condition: float = 10.0
    rate: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        for name in ("step_size", "eps", "smoothness"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("warmup_steps", "skip_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")
        if self.adam_layers < 1:
            raise ValueError(f"`adam_layers` must be at least 1, got {self.adam_layers}.")
        if self.condition <= 1:
            raise ValueError(f"`condition` must be above 1, got {self.condition}.")
        low, high = 1 - self.condition**-0.5, 1 - 1 / self.condition
        if self.rate is not None and not low - 1e-9 <= self.rate <= high + 1e-9:
            raise ValueError(
                f"`rate` must be in [{low:.6g}, {high:.6g}] where `condition` is {self.condition}, got {self.rate}."
            )
        if self.warmup_steps and self.kind != "heavy_ball":
            raise ValueError(
                f'`warmup_steps` is for `kind="heavy_ball"`; `kind="{self.kind}"` differs from the stock model at '
                "every decay."
            )
        if self.kind == "robust" and self.scope == "routed":
            raise ValueError('`kind="robust"` moves the input of the whole block; it needs `scope="block"`.')

    @property
    def needs_stream(self) -> bool:
        """Whether it reads the residual stream in front of the block, or moves it."""
        return self.kind == "robust" or (self.kind == "adam" and self.skip_coef > 0)


@dataclass
class CapacityConfig:
    """The most tokens an expert takes in one forward; what is above is dropped, and passes by the residual connection.

    The capacity is `max(ceil(T k / E * factor), minimum)`, with T tokens (padding does not count), k slots for real
    experts and E experts. Losses see the choices as they were before. Switch Transformers (2101.03961), section 2.2;
    `policy="random"` is the random token selection of Z-code M3 (2109.10465).

    Args:
        factor (`float`, *optional*, defaults to 1.0):
            Capacity in training, relative to an even load.
        eval_factor (`float`, *optional*):
            The same in evaluation. `None` drops nothing there, so that what a model says does not depend on the batch.
        minimum (`int`, *optional*, defaults to 4):
            The least capacity.
        policy (`"random"`, `"position"` or `"score"`, *optional*, defaults to `"random"`):
            Who stays: tokens drawn at random; the first ones of the batch, first choices before second ones; or those
            with the highest routing score.
        renormalize (`bool`, *optional*, defaults to `False`):
            Whether the weights that a token keeps are scaled so that their sum is what it was.
    """

    factor: float = 1.0
    eval_factor: float | None = None
    minimum: int = 4
    policy: Literal["random", "position", "score"] = "random"
    renormalize: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("factor", "eval_factor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if self.minimum < 0:
            raise ValueError(f"`minimum` must be non-negative, got {self.minimum}.")


@dataclass
class ExpertLoraConfig:
    """One low-rank adapter on each routed expert: `out = W_e x + s B_e A_e x`, for both projections of an expert e.

    The product `B_e A_e` is never made: each projection gains two thin ones. B starts at zero, so the model starts as
    it was. With equal ranks and without dropout it computes what PEFT's `target_parameters` does.

    Args:
        r (`int` or `list[int]`, *optional*, defaults to 8):
            Rank; a list has the rank of each expert, of all layers.
        lora_alpha (`float`, *optional*, defaults to 16.0):
            `s = lora_alpha / r`.
        use_rslora (`bool`, *optional*, defaults to `False`):
            `s = lora_alpha / sqrt(r)`.
        lora_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on what the adapters see, in training.
        target_parameters (`list[str]`, *optional*):
            `"up"`, `"down"`, or both: the projection in front of the activation (gate and up together) and the one
            behind it. `None` is both.
    """

    r: int | list[int] = 8
    lora_alpha: float = 16.0
    use_rslora: bool = False
    lora_dropout: float = 0.0
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        ranks = self.r if isinstance(self.r, list) else [self.r]
        if not ranks or not all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in ranks):
            raise ValueError(f"`r` must be a whole number above 0 or a list of such, got {self.r!r}.")
        if self.lora_alpha <= 0:
            raise ValueError(f"`lora_alpha` must be positive, got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {self.lora_dropout}.")
        targets = self.target_parameters
        if targets is not None and (not targets or not set(targets) <= {"up", "down"}):
            raise ValueError(f'`target_parameters` must be of "up" and "down", got {targets!r}.')

    def ranks(self, num_experts: int) -> tuple[int, ...]:
        """The rank of each expert."""
        return tuple(self.r) if isinstance(self.r, list) else (self.r,) * num_experts

    def scales(self, num_experts: int) -> tuple[float, ...]:
        """The factor of each expert."""
        return tuple(self.lora_alpha / (rank**0.5 if self.use_rslora else rank) for rank in self.ranks(num_experts))
