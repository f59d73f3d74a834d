"""Momentum from MoE layer to MoE layer: a stack of layers read as the steps of an optimizer.

MomentumSMoE (2410.14574). The output f of a MoE block is taken for a negative gradient, so that `x + f` is a step of
gradient descent on the residual stream x. This part puts a step of heavy ball, Adam or robust momentum in its place.
Signs are those of the stock model (the authors' code subtracts, and its experts learn the negative); a decay of 0 is
then the stock model exactly.

The state of a token goes from layer to layer in the context's carry, in float32: sums over many layers drift in
bfloat16, and squares of small outputs underflow. Nothing crosses tokens, so nothing goes into the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .configuration_parts import MomentumConfig
from .moe_context import RoutingContext, RoutingLink
from .moe_families import get_by_path, has_path
from .moe_install import add_child, install
from .moe_parts import LayerPart, PartModule, register_part
from .moe_schedules import ramp, schedule_fraction
from .moe_structure import LayerPlan


def robust_coefficients(smoothness: float, condition: float, rate: float | None) -> tuple[float, float, float]:
    """(step size, decay, extrapolation) of the robust momentum method (1710.04753), as functions of L, L/m and rho.

    `rate=1 - 1/condition` gives gradient descent of step 1/L, `1 - 1/sqrt(condition)` the triple momentum method.
    """
    rho = 1 - condition**-0.5 if rate is None else rate
    step = condition * (1 - rho) ** 2 * (1 + rho) / smoothness
    decay = condition * rho**3 / (condition - 1)
    extrapolation = rho**3 / ((condition - 1) * (1 - rho) ** 2 * (1 + rho))
    return step, decay, extrapolation


class Momentum(PartModule):
    """The step of one layer; a child of what it is installed on.

    State in the context's carry, by the order of the layer: `momentum` (the velocity), `momentum_mean` and
    `momentum_square` (Adam), `momentum_stream` (the residual stream in front of the block, where it is needed).

    Args:
        config (`MomentumConfig`): the part's config.
        order (`int`): position of the layer among the routed layers.
        link (`RoutingLink`): of the model.
        device: of its buffer.
    """

    def __init__(self, config: MomentumConfig, order: int, link: RoutingLink, device: torch.device) -> None:
        super().__init__()
        self.config, self.order, self.moe_link = config, order, link
        if config.warmup_steps:
            self.register_buffer("moe_progress", torch.zeros(2, dtype=torch.int64, device=device))

    def init_weights(self, std: float) -> None:
        if "moe_progress" in self._buffers:
            init.zeros_(self.moe_progress)

    @property
    def schedule_steps(self) -> int | None:
        return self.config.warmup_steps or None

    def schedule(self, step: int, total_steps: int) -> None:
        if "moe_progress" in self._buffers:
            self.moe_progress.copy_(torch.tensor([step, total_steps]))

    @property
    def _context(self) -> RoutingContext | None:
        return self.moe_link.slots.layer_context

    def _previous(self, name: str, like: torch.Tensor) -> torch.Tensor | None:
        """What the layer before left. Each stack has a context of its own, so that a decoder starts from nothing."""
        state = None if self._context is None else self._context.carry.get((self.order - 1, name))
        return None if state is None else state.to(like.device)

    def _keep(self, name: str, state: torch.Tensor) -> torch.Tensor:
        if self._context is not None:
            # Recomputation under checkpointing must not replace what later layers have read.
            self._context.carry.setdefault((self.order, name), state)
        return state

    def _average(self, name: str, value: torch.Tensor, decay: float) -> torch.Tensor:
        previous = self._previous(name, value)
        mean = (1 - decay) * value
        return self._keep(name, mean if previous is None else decay * previous + mean)

    @property
    def _is_adam_layer(self) -> bool:
        """Whether this is one of the first layers of its stack."""
        if self.config.kind != "adam":
            return False
        carry = {} if self._context is None else self._context.carry
        return sum(name == "momentum" and order < self.order for order, name in carry) < self.config.adam_layers

    def _decay(self) -> float | torch.Tensor:
        if "moe_progress" not in self._buffers:
            return self.config.decay
        return ramp(schedule_fraction(self.moe_progress, self.config.warmup_steps), 0.0, self.config.decay)

    def before(self, stream: torch.Tensor) -> torch.Tensor:
        """The norm's input: the residual stream, or the point ahead of it where robust momentum asks the experts."""
        if self.config.kind == "robust":
            velocity = self._previous("momentum", stream)
            if velocity is None:
                return stream
            _, _, ahead = self._robust
            return (stream + ahead * velocity.reshape(stream.shape)).to(stream.dtype)
        self._keep("momentum_stream", stream)
        return stream

    @property
    def _robust(self) -> tuple[float, float, float]:
        return robust_coefficients(self.config.smoothness, self.config.condition, self.config.rate)

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream in place of `output`."""
        config = self.config
        value = output.to(torch.promote_types(output.dtype, torch.float32))
        scale, decay, step = 1.0, self._decay(), config.step_size if config.kind == "heavy_ball" else 1.0
        if config.kind == "robust":
            scale, decay, _ = self._robust
        previous = self._previous("momentum", value)
        velocity = value if scale == 1.0 else scale * value
        velocity = self._keep("momentum", velocity if previous is None else decay * previous + velocity)
        if not self._is_adam_layer:
            return (velocity if step == 1.0 else step * velocity).to(output.dtype)
        mean = self._average("momentum_mean", value, config.beta1)
        square = self._average("momentum_square", value.square(), config.beta2)
        change = config.step_size * mean / (square + config.eps).sqrt()
        if config.skip_coef and self._context is not None:
            change = change - config.skip_coef * self._context.carry[self.order, "momentum_stream"].reshape(
                change.shape
            )
        return change.to(output.dtype)


class MomentumBlock(nn.Module):
    """Installed in front of a MoE block, or of its experts."""

    moe_momentum: Momentum

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.moe_momentum(output[0]), *output[1:])
        return self.moe_momentum(output)


class MomentumNorm(nn.Module):
    """Installed in front of the norm before a MoE block."""

    moe_momentum: Momentum

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.moe_momentum.before(hidden_states), *args, **kwargs)


@register_part("momentum")
class MomentumPart(LayerPart):
    """Momentum from one MoE layer to the next.

    The paper's robustness to swapped words (WikiText-103, long trainings) is not repeated in the tests.
    """

    crosses_layers = True

    @classmethod
    def check(cls, config: MomentumConfig, plan: LayerPlan) -> None:
        spec = plan.moe or plan.dense
        assert spec is not None
        if plan.moe is not None and plan.moe.block == "":
            raise ValueError(
                f'`momentum` works on the output of a block, and layer "{plan.key}" has none: router and experts '
                "stand on the layer itself."
            )
        if config.scope == "routed" and plan.moe is not None and plan.moe.adapter is not None:
            raise ValueError(
                f'`momentum` with `scope="routed"` needs experts that are one call; the block of layer "{plan.key}" '
                'computes them itself. Use `scope="block"`.'
            )
        if config.needs_stream and (spec.norm is None or not has_path(plan.layer, spec.norm)):
            what = '`kind="robust"`' if config.kind == "robust" else "`skip_coef`"
            raise ValueError(
                f"`momentum` with {what} needs a norm in front of the block that nothing else reads, and layer "
                f'"{plan.key}" has none.'
            )

    @classmethod
    def check_stack(cls, plans: list[LayerPlan]) -> None:
        orders = [plan.site.order for plan in plans]
        if len(orders) < 2:
            raise ValueError(
                f'`momentum` goes from one MoE layer to the next, and layer "{plans[0].key}" is the only one that has '
                "it."
            )
        if orders != list(range(orders[0], orders[0] + len(orders))):
            raise ValueError(
                "`momentum` goes from one MoE layer to the next; the layers that have it must follow each other, "
                f"they are {[plan.key for plan in plans]}."
            )

    @classmethod
    def install(
        cls,
        config: MomentumConfig,
        plan: LayerPlan,
        block: nn.Module,
        gate: nn.Module,
        experts: nn.Module,
        link: RoutingLink,
    ) -> None:
        spec = plan.moe or plan.dense
        momentum = Momentum(config, plan.site.order, link, next(gate.parameters()).device)
        place = experts if config.scope == "routed" else block
        add_child(place, "moe_momentum", momentum)
        install(place, MomentumBlock)
        if config.needs_stream:
            assert spec is not None and spec.norm is not None
            norm = get_by_path(plan.layer, spec.norm)
            add_child(norm, "moe_momentum", momentum)
            install(norm, MomentumNorm)
