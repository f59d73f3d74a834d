"""A gate of two layers, `A tanh(W x)`: the rows of the stock gate, and a square matrix behind them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .moe_router import MoERouter, RouterSite
from .router_top_k import GATES_OF_ROWS


class TanhGateRouter(MoERouter):
    """Base of routers that may have such a gate. W is `weight`, (E, H); A is `moe_mix_weight`, (E, E)."""

    @classmethod
    def check_second_layer(cls, site: RouterSite) -> None:
        """Raise `ValueError` where the stock gate is no matrix with a row for each expert."""
        if site.rule.logits not in GATES_OF_ROWS:
            raise ValueError(
                f'the gate of layer "{site.key}" is more than one matrix with a row for each expert; a second layer '
                "behind it is not supported."
            )

    def add_second_layer(self) -> None:
        """For `setup`: create A."""
        size = self.moe_site.num_experts
        place = {"device": self.own_device, "dtype": next(self.parameters()).dtype}
        self.moe_mix_weight = nn.Parameter(torch.empty(size, size, **place))

    def stock_logits(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raw logits (T, E) of the gate, of both layers where it has two."""
        logits = super().stock_logits(hidden, *args, **kwargs)
        if "moe_mix_weight" not in self._parameters:
            return logits
        return F.linear(logits.float().tanh(), self.moe_mix_weight.float())
