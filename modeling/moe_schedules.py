"""Settings of a router that change over training, computed from the progress that a trainer reports.

Progress is an integer buffer `[step, total_steps]`: it is saved with the model, does not lose precision in bfloat16,
and a value computed from it is the same after resuming, in evaluation and in a loaded model.
"""

from __future__ import annotations

import math

import torch


def schedule_fraction(progress: torch.Tensor, steps: int | None) -> torch.Tensor:
    """How much of a schedule is over: scalar in [0, 1], float32.

    Args:
        progress: int64 `[step, total_steps]`; zeros before any training.
        steps: length of the schedule, `None` for the whole training.
    """
    step, total = progress.float().unbind()
    length = total if steps is None else torch.full_like(total, float(steps))
    return torch.where(length > 0, step / length.clamp(min=1), torch.zeros_like(step)).clamp(max=1)


def ramp(fraction: torch.Tensor, start: float, end: float, shape: str = "linear") -> torch.Tensor:
    """From `start` to `end` while `fraction` goes from 0 to 1.

    Args:
        shape: `"linear"`, `"exponential"` (`start * (end / start)^fraction`, both positive) or `"cosine"`
            (`end + (start - end) * cos(pi/2 * fraction)`, slow at first).
    """
    if shape == "exponential":
        return start * torch.exp(fraction * math.log(end / start))
    if shape == "cosine":
        return end + (start - end) * torch.cos(fraction * (math.pi / 2))
    if shape != "linear":
        raise ValueError(f'`shape` must be "linear", "exponential" or "cosine", got {shape!r}.')
    return start + (end - start) * fraction
