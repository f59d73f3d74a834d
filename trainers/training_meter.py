"""Losses by name, tokens and time since the last log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


# What is counted over all processes; anything else is a mean over them.
_TOTALS = ("tokens", "pairs")


class TrainingMeter:
    """Running sums since the last `read`; losses and tokens stay on the device until then."""

    def __init__(self) -> None:
        self.load_state_dict({}, {})

    def add_losses(self, total: torch.Tensor | None, named: dict[str, torch.Tensor], weight: Any) -> None:
        """Add the auxiliary losses of one forward: the weighted `total`, and the unweighted ones by name.

        Args:
            weight: the part this forward has in the mean of its optimizer step.
        """
        if total is None:
            return
        for name, loss in (("aux_loss", total), *((f"loss_{name}", loss) for name, loss in named.items())):
            self._add(name, loss.detach() * weight)

    def add_tokens(self, inputs: dict[str, Any]) -> None:
        """Add the tokens of one forward; padding does not count."""
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            lengths = (mask != 0).sum(dim=1)
        elif isinstance(ids, torch.Tensor):
            lengths = torch.full((ids.numel() // max(ids.shape[-1], 1),), ids.shape[-1], device=ids.device)
        else:
            return
        self._add("tokens", lengths.sum())
        self._add("pairs", lengths.square().sum())

    def _add(self, name: str, value: torch.Tensor) -> None:
        # MPS has no float64.
        value = value.to("cpu" if value.device.type == "mps" else value.device).to(torch.float64)
        old = self._sums.get(name)
        self._sums[name] = value if old is None else old + value.to(old.device)

    def start_clock(self) -> None:
        """Time from here on counts."""
        self._mark = time.perf_counter()

    def end_step(self) -> None:
        """An optimizer step has ended."""
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._steps += 1
        self._mark = now

    def read(
        self,
        reduce: Callable[[torch.Tensor], torch.Tensor],
        num_processes: int,
        loss: float,
        flops: Callable[[float, float], float] | None = None,
        peak: float | None = None,
    ) -> dict[str, float]:
        """The values to log, by name, and start anew. Every process must call it.

        Args:
            reduce: sums a tensor over the processes.
            num_processes: their number.
            loss: mean of the full loss since the last log.
            flops: operations for so many tokens, the squared lengths of whose rows have such a sum.
            peak: of one device, in TFLOP/s.
        """
        names = list(self._sums)
        steps, seconds = max(self._steps, 1), max(self._seconds, 1e-9)
        sums: dict[str, float] = {}
        if names:
            device = self._sums[names[0]].device
            packed = torch.stack([self._sums[name].to(device) for name in names])
            sums = dict(zip(names, reduce(packed).tolist(), strict=True))
        tokens, pairs = sums.pop("tokens", None), sums.pop("pairs", 0.0)
        out = {f"moe/{name}": value / num_processes / steps for name, value in sums.items()}
        out["moe/lm_loss"] = loss - out.get("moe/aux_loss", 0.0)
        out["moe/step_time"] = seconds / steps
        if tokens is not None:
            out["moe/tokens_per_second"] = tokens / seconds
            if flops is not None:
                # Each process has its own device.
                out["moe/model_tflops"] = flops(tokens, pairs) / seconds / num_processes / 1e12
                if peak is not None:
                    out["moe/mfu"] = out["moe/model_tflops"] / peak
        mark = self._mark
        self.load_state_dict({}, {})
        self._mark = mark
        return out

    def state_dict(self, reduce: Callable[[torch.Tensor], torch.Tensor], num_processes: int = 1) -> dict[str, Any]:
        """The sums over all processes, with steps and seconds. Every process must call it."""
        sums = {name: reduce(value.clone()).cpu() for name, value in self._sums.items()}
        return {"sums": sums, "steps": self._steps, "seconds": self._seconds, "processes": num_processes}

    def load_state_dict(self, sums: dict[str, Any], clock: dict[str, Any], num_processes: int = 1) -> None:
        """Continue from a state; empty ones reset.

        Args:
            sums: the state whose sums are taken (in a distributed run, by one process only).
            clock: the state whose steps and seconds are taken.
            num_processes: how many go on. Losses are means over processes, so their sum grows with the number.
        """
        grown = num_processes / sums.get("processes", num_processes)
        stored = sums.get("sums", {}).items()
        self._sums: dict[str, torch.Tensor] = {
            name: value if name in _TOTALS or grown == 1 else value * grown for name, value in stored
        }
        self._steps: int = clock.get("steps", 0)
        self._seconds: float = clock.get("seconds", 0.0)
        self._mark = time.perf_counter()
