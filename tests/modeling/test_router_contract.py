"""What the base class of routers promises, whatever the router: checks, state between layers, schedules, restoring."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers import initialization as init

from hf_moe_ext.modeling.configuration_moe_ext import _ROUTER_CONFIGS, RouterConfig
from hf_moe_ext.modeling.moe_context import RouteRecord, RoutingContext
from hf_moe_ext.modeling.moe_router import _ROUTERS, MoERouter, register_router
from hf_moe_ext.modeling.moe_schedules import ramp, schedule_fraction
from hf_moe_ext.modeling.moe_structure import iter_routers
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.patching import extend, restore
from hf_moe_ext.trainers import MoETrainer

from ..trainers.common import arguments, rows
from .test_routers import make_gate, slow_scores


@dataclass
class OwnRouterConfig(RouterConfig):
    """Config of `OwnRouter`."""

    steps: int | None = None

    @property
    def schedule_steps(self) -> int | None:
        return self.steps


class OwnRouter(MoERouter):
    """Ignores the stock gate, hands something on, and follows a schedule."""

    config_class = OwnRouterConfig
    crosses_layers = True

    def setup(self) -> None:
        self.freeze_stock()
        self.use_progress()
        self.moe_own = nn.Parameter(torch.empty_like(self.weight))

    def reset_parameters(self) -> None:
        init.normal_(self.moe_own)

    def route(self, hidden, context, *args, **kwargs):
        logits = hidden @ self.moe_own.T
        if context is not None:
            logits = logits + context.carry.get((self.moe_site.order - 1, "logits"), 0)
            context.carry[self.moe_site.order, "logits"] = logits
        scores = logits.float().softmax(-1)
        weights, index = scores.topk(2, dim=-1)
        return RouteRecord(logits, scores, weights, index, self.moe_config)


@pytest.fixture
def own_router():
    register_router("own")(OwnRouter)
    yield {"type": "own"}
    del _ROUTERS["own"], _ROUTER_CONFIGS["own"]


# --- crossing layers ---


def enable_checkpointing(model, reentrant):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def test_reentrant_checkpointing_with_state_between_layers_is_refused(own_router):
    model = extend(tiny_model("mixtral"), {"router": own_router})
    with pytest.raises(ValueError, match="wrong gradients"):
        enable_checkpointing(model, True)
    assert not model.model.gradient_checkpointing
    enable_checkpointing(model, False)


def test_a_model_with_reentrant_checkpointing_is_not_extended(own_router):
    model = tiny_model("mixtral")
    enable_checkpointing(model, True)
    with pytest.raises(ValueError, match="wrong gradients"):
        extend(model, {"router": own_router})
    extend(model, TopKRouterConfig())


def test_layers_must_follow_each_other(own_router):
    model = tiny_model("mixtral")
    with pytest.raises(ValueError, match='between layer "0" and layer "2" stands another router'):
        extend(model, {"router": own_router, "layers": {"1": {"router": "top_k"}}})
    extend(model, {"router": own_router, "layers": {"2": {"router": "top_k"}}})


def test_a_stock_layer_between_does_not_count(own_router):
    """State goes over dense and stock layers, as over attention."""
    extend(tiny_model("mixtral"), {"router": own_router, "layers": {"1": None}})


# --- freezing ---


def test_the_stock_gate_is_frozen_until_restored(own_router, tmp_path):
    model = tiny_model("mixtral")
    gate = model.model.layers[0].mlp.gate
    extend(model, {"router": own_router})
    assert not gate.weight.requires_grad and gate.moe_own.requires_grad
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).model.layers[0].mlp.gate
    assert not loaded.weight.requires_grad and loaded.moe_own.requires_grad
    twin = copy.deepcopy(model)
    restore(twin)
    assert twin.model.layers[0].mlp.gate.weight.requires_grad and not hasattr(twin.model.layers[0].mlp.gate, "moe_own")


# --- schedules ---


def test_the_trainer_tells_the_progress(own_router, tmp_path):
    model = extend(tiny_model("mixtral"), {"router": {**own_router, "steps": 3}})
    trainer = MoETrainer(model=model, args=arguments(tmp_path, max_steps=4), train_dataset=rows([8] * 16))
    seen = []
    router = next(iter_routers(model))
    route = router.route
    router.route = lambda *a, **k: (seen.append(router.moe_progress.tolist()), route(*a, **k))[1]
    trainer.train()
    assert [step for step, _ in seen] == sorted(step for step, _ in seen)
    assert sorted(set(map(tuple, seen))) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert router.moe_progress.tolist() == [4, 4]
    assert model.to(torch.bfloat16) and router.moe_progress.tolist() == [4, 4]


def test_a_schedule_longer_than_the_training_is_refused(own_router, tmp_path):
    model = extend(tiny_model("mixtral"), {"router": {**own_router, "steps": 5}})
    trainer = MoETrainer(model=model, args=arguments(tmp_path, max_steps=4), train_dataset=rows([8] * 8))
    with pytest.raises(ValueError, match="`own` router takes 5 optimizer steps, this training has 4"):
        trainer.train()


def test_fraction_of_a_schedule():
    def at(step, total, steps):
        return float(schedule_fraction(torch.tensor([step, total]), steps))

    assert [at(step, 8, None) for step in (0, 2, 8, 9)] == [0, 0.25, 1, 1]
    assert [at(step, 8, 4) for step in (0, 1, 4, 8)] == [0, 0.25, 1, 1]
    assert at(0, 0, None) == 0 and at(0, 0, 4) == 0
    assert at(10**6, 4 * 10**6, None) == 0.25


def test_shapes_of_a_schedule():
    def at(fraction, shape, start=2.0, end=0.5):
        return float(ramp(torch.tensor(fraction), start, end, shape))

    for shape in ("linear", "exponential", "cosine"):
        assert at(0.0, shape) == pytest.approx(2.0) and at(1.0, shape) == pytest.approx(0.5)
    assert at(0.5, "linear") == 1.25
    assert at(0.5, "exponential") == pytest.approx(1.0)
    assert at(0.5, "cosine") == pytest.approx(0.5 + 1.5 * math.cos(math.pi / 4))
    with pytest.raises(ValueError, match="'square'"):
        at(0.5, "square")


# --- NaN ---


def test_nan_is_named():
    model = extend(tiny_model("mixtral"), TopKRouterConfig())
    inputs = tiny_inputs("mixtral")
    gates = list(iter_routers(model))
    with torch.no_grad():
        gates[1].weight[0, 0] = math.nan
        with pytest.raises(ValueError, match='layer "1" has NaN logits: its own parameters have NaN'):
            model(**inputs)
        gates[1].weight[0, 0] = 0.0
        model(**inputs)
        model.model.embed_tokens.weight[:] = math.nan
        with pytest.raises(ValueError, match='layer "0" has NaN logits: its input has NaN already'):
            model(**inputs)


# --- random draws ---


def test_draws_of_a_generator_are_kept():
    context = RoutingContext(generator=torch.Generator().manual_seed(0))
    first = context.draw(0, "noise", lambda g: torch.rand(3, generator=g))
    assert torch.equal(context.draw(0, "noise", lambda g: torch.rand(3, generator=g)), first)
    assert not torch.equal(context.draw(1, "noise", lambda g: torch.rand(3, generator=g)), first)


# --- weights of slots ---


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_of_slots(score, renormalize):
    gate = make_gate(TopKRouterConfig())
    torch.manual_seed(0)
    logits = torch.randn(7, 12, dtype=torch.float64)
    index = torch.stack([torch.randperm(12)[:4] for _ in range(7)])
    keep = torch.rand(7, 4) > 0.4
    keep[0] = False
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    found = gate.slot_weights(logits, scores, index, score=score, renormalize=renormalize, keep=keep)
    for token in range(7):
        values = slow_scores(logits[token], score)[index[token]] * keep[token]
        if renormalize and keep[token].any():
            values = values / values.sum()
        torch.testing.assert_close(found[token].double(), values, rtol=1e-6, atol=1e-7)
