"""What a kernel has to know of an experts module: its tensors, their layout, and the activation as a formula."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations


# Kind, alpha, limit, shift; gated, transposed, concatenated.
Layout: TypeAlias = tuple[str, float, float | None, float, bool, bool, bool]
ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"]


@dataclass(frozen=True)
class Activation:
    """`act(alpha * min(gate, limit)) / alpha * (clamp(up, -limit, limit) + shift)`, or `act(x)` without a gate.

    With the defaults this is SwiGLU. GPT-OSS has `alpha=1.702, limit=7, shift=1`, DeepSeek-V4 a limit alone.

    Args:
        kind: the function applied to the gate.
        alpha: slope inside the sigmoid of `silu`; 1 for the others.
        limit: bound of gate (from above) and up (from both sides), `None` for no bound.
        shift: added to up.
    """

    kind: ActivationKind = "silu"
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0

    def act(self, x: torch.Tensor) -> torch.Tensor:
        """The function of the gate alone, without the limit."""
        if self.kind == "silu":
            return F.silu(x) if self.alpha == 1.0 else x * torch.sigmoid(self.alpha * x)
        if self.kind == "gelu":
            return F.gelu(x)
        if self.kind == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        if self.kind == "relu":
            return F.relu(x)
        if self.kind == "relu2":
            return F.relu(x).square()
        return x

    def glu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Gate and up, of one shape -> that shape."""
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.act(gate) * (up + self.shift if self.shift else up)


@dataclass(frozen=True)
class ExpertWeights:
    """Tensors and layout of one experts module.

    Args:
        up: (E, 2I, H), or (E, I, H) without a gate; last two axes swapped where `is_transposed`.
        down: (E, H, I); (E, I, H) where `is_transposed`.
        up_bias, down_bias: (E, 2I) or (E, I), and (E, H).
        has_gate: whether `up` holds gate and up.
        is_transposed: whether `x @ W` is meant, not `x @ W.T`.
        is_concatenated: gate rows before up rows; else they alternate.
        activation: the formula, `None` if `apply` is none that we know.
        apply: (n, 2I) or (n, I) -> (n, I), as the module computes it.
        post_norm: applied to the output of each expert before the routing weight.
    """

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    has_gate: bool
    is_transposed: bool
    is_concatenated: bool
    activation: Activation | None
    apply: Callable[[torch.Tensor], torch.Tensor]
    post_norm: nn.Module | None

    @classmethod
    def from_layout(
        cls,
        layout: Layout,
        up: torch.Tensor,
        down: torch.Tensor,
        up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
    ) -> ExpertWeights:
        """The inverse of `layout`: for operators, which take tensors and plain values."""
        kind, alpha, limit, shift, has_gate, is_transposed, is_concatenated = layout
        activation = Activation(kind, alpha, limit, shift)  # type: ignore[arg-type]
        return cls(
            up,
            down,
            up_bias,
            down_bias,
            has_gate,
            is_transposed,
            is_concatenated,
            activation,
            functools.partial(_apply, activation, has_gate, is_concatenated),
            None,
        )

    @property
    def layout(self) -> Layout | None:
        """All but the tensors, as plain values; `None` if the activation is none that we know."""
        known = self.activation
        if known is None or self.post_norm is not None:
            return None
        numbers = (known.kind, known.alpha, known.limit, known.shift)
        return (*numbers, self.has_gate, self.is_transposed, self.is_concatenated)

    @property
    def num_experts(self) -> int:
        return self.down.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.down.shape[2 if self.is_transposed else 1]

    @property
    def intermediate_size(self) -> int:
        return self.down.shape[1 if self.is_transposed else 2]


def _apply(activation: Activation, has_gate: bool, is_concatenated: bool, rows: torch.Tensor) -> torch.Tensor:
    if not has_gate:
        return activation.act(rows)
    gate, up = rows.chunk(2, dim=-1) if is_concatenated else (rows[..., ::2], rows[..., 1::2])
    return activation.glu(gate, up)


def read_experts(experts: Any) -> ExpertWeights:
    """Tensors and layout of a module made with `use_experts_implementation`.

    The activation is recognised by what it computes (see `find_activation`), once for each module.
    """
    has_gate, has_bias = experts.has_gate, experts.has_bias
    name = "gate_up_proj" if has_gate else "up_proj"
    is_concatenated = getattr(experts, "is_concatenated", True)
    apply = experts._apply_gate if has_gate else experts.act_fn
    return ExpertWeights(
        up=getattr(experts, name),
        down=experts.down_proj,
        up_bias=getattr(experts, f"{name}_bias") if has_bias else None,
        down_bias=experts.down_proj_bias if has_bias else None,
        has_gate=has_gate,
        is_transposed=experts.is_transposed,
        is_concatenated=is_concatenated,
        activation=_activation_of(experts),
        apply=apply,
        post_norm=experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None,
    )


# Beside the modules and not on them: they are pickled, copied and compared as they were.
_activations: WeakKeyDictionary[nn.Module, tuple[Any, Activation | None]] = WeakKeyDictionary()


def _activation_of(experts: nn.Module) -> Activation | None:
    act_fn = getattr(experts, "act_fn", None)
    # What the answer depends on: a replaced activation is looked at again.
    key = (type_before_parametrizations(experts), act_fn)  # PEFT makes a new class for each forward
    found = _activations.get(experts)
    if found is None or found[0] != key:
        dropout = getattr(experts, "hidden_dropout", None)  # ours: between activation and down projection
        _activations[experts] = found = (key, None if dropout is not None else find_activation(experts))
    return found[1]


def find_activation(experts: Any) -> Activation | None:
    """The formula that the experts' activation computes, or `None`.

    The parameters are read off a few values, then the formula has to agree on many, in float64. So a class that
    inherits, renames or rewrites an activation is recognised by what it does, and one that only looks alike is not.
    """
    act_fn = getattr(experts, "act_fn", None)
    if isinstance(act_fn, nn.Module) and (any(True for _ in act_fn.parameters()) or has_dropout(act_fn)):
        return None
    try:
        with torch.no_grad(), torch.device("cpu"):
            candidates = (
                _gated_candidates(experts) if experts.has_gate else [Activation(kind) for kind in _PLAIN_KINDS]
            )
            return next((candidate for candidate in candidates if _agrees(experts, candidate)), None)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None  # it does not take plain float64 tensors: nothing that we know


_GATED_KINDS: tuple[ActivationKind, ...] = ("silu", "gelu", "gelu_tanh", "relu")
_PLAIN_KINDS: tuple[ActivationKind, ...] = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
_NEAR, _FAR = 0.25, 1e8  # within, and beyond, any limit that a model would use


def has_dropout(module: nn.Module) -> bool:
    """Whether anything in a module drops at random in training."""
    return any(isinstance(child, nn.modules.dropout._DropoutNd) for child in module.modules())


def _apply_gate(experts: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    parts = (gate, up)
    joined = torch.cat(parts, -1) if getattr(experts, "is_concatenated", True) else torch.stack(parts, -1).flatten(-2)
    out: torch.Tensor = experts._apply_gate(joined)
    return out


def _gated_candidates(experts: Any) -> list[Activation]:
    gate = torch.full((1, 3), _NEAR, dtype=torch.float64)
    up = torch.tensor([[0.0, _NEAR, _FAR]], dtype=torch.float64)
    at_zero, at_near, at_far = _apply_gate(experts, gate, up)[0].tolist()
    act = (at_near - at_zero) / _NEAR  # of the gate
    if not math.isfinite(at_far) or act <= 0:
        return []
    shift = round(at_zero / act, 5)
    largest = at_far / act - shift
    limit = None if largest > _FAR / 2 else round(largest, 5)
    sigmoid = act / _NEAR  # if it is silu: sigmoid(alpha * gate)
    alpha = round(math.log(sigmoid / (1 - sigmoid)) / _NEAR, 5) if sigmoid < 1 else 1.0
    return [Activation("silu", alpha, limit, shift)] + [
        Activation(kind, 1.0, limit, shift) for kind in _GATED_KINDS[1:]
    ]


def _agrees(experts: Any, activation: Activation) -> bool:
    generator = torch.Generator().manual_seed(0)
    # Small and large values, so that limits, tails and signs all count.
    scale = torch.tensor([0.1, 1.0, 10.0, 1e3], dtype=torch.float64).repeat_interleave(64)
    gate, up = (scale * torch.randn(2, 256, dtype=torch.float64, generator=generator))[:, None]
    if experts.has_gate:
        found, expected = _apply_gate(experts, gate, up), activation.glu(gate, up)
    else:
        found, expected = experts.act_fn(gate), activation.act(gate)
    return found.shape == expected.shape and torch.allclose(
        found.double(), expected, rtol=1e-6, atol=1e-12
    )  # some compute it in float32
