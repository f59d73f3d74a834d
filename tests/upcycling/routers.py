"""A router with a random tensor of its own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import initialization as init

from hf_moe_ext.modeling import configuration_moe_ext, moe_router
from hf_moe_ext.modeling.router_top_k import TopKRouter, TopKRouterConfig


def register_random_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `random_scale` known during one test."""
    monkeypatch.setattr(moe_router, "_ROUTERS", dict(moe_router._ROUTERS))
    known = dict(configuration_moe_ext._ROUTER_CONFIGS)
    for module in (configuration_moe_ext, moe_router):
        monkeypatch.setattr(module, "_ROUTER_CONFIGS", known)

    @dataclass
    class RandomConfig(TopKRouterConfig):
        pass

    @moe_router.register_router("random_scale")
    class RandomRouter(TopKRouter):
        config_class = RandomConfig

        def setup(self) -> None:
            super().setup()
            self.moe_random = nn.Parameter(torch.empty_like(self.weight))

        def reset_parameters(self) -> None:
            super().reset_parameters()
            init.normal_(self.moe_random)
