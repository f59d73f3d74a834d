"""Routers whose settings change over training, or that draw: driven by the trainer, saved, and resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_moe_ext import (
    ActDTSRouterConfig,
    AdaMoERouterConfig,
    CometRouterConfig,
    DeepSeekMoERouterConfig,
    DSelectKRouterConfig,
    DTSRouterConfig,
    HashRouterConfig,
    MoEPlusPlusRouterConfig,
    MoETrainer,
    NoisyTopKRouterConfig,
    PermutedTopKRouterConfig,
    PreGatedRouterConfig,
    RandomFixedRouterConfig,
    RMoERouterConfig,
    StochasticRouterConfig,
    XMoERouterConfig,
)
from hf_moe_ext.modeling.moe_structure import iter_routers

from .common import VOCAB_SIZE, arguments, rows, tiny_moe
from .test_resume import assert_same_state, comparable


LENGTH, STEPS, SAVED = 4, 6, 3  # of the schedule, of the training, at which it is saved


def temperature(router: Any) -> float:
    return router.moe_config.temperature_at(router.moe_progress).item()


def permutation_is_fixed(router: Any) -> int:
    return int((router.moe_permutation >= 0).all())


# A config, the value it sets at a time, and that value at 0, half of the schedule, its end, and after it.
SCHEDULED: dict[str, tuple[Any, Callable[[Any], float], list[float]]] = {
    "random_fixed_linear": (
        RandomFixedRouterConfig(start_experts_per_tok=1, end_experts_per_tok=5, steps=LENGTH),
        lambda router: int(router.moe_active),
        [1, 3, 5, 5],
    ),
    "random_fixed_cosine": (
        RandomFixedRouterConfig(start_experts_per_tok=6, end_experts_per_tok=2, steps=LENGTH, k_shape="cosine"),
        lambda router: int(router.moe_active),
        [6, 5, 2, 2],  # 2 + 4 cos(pi/4) = 4.83
    ),
    "dts_linear": (DTSRouterConfig(steps=LENGTH), temperature, [2.0, 1.25, 0.5, 0.5]),
    "dts_exponential": (
        DTSRouterConfig(steps=LENGTH, temperature_shape="exponential", gumbel_weights=True, balance_coef=0.1),
        temperature,
        [2.0, 1.0, 0.5, 0.5],
    ),
    "adamoe_balance": (
        AdaMoERouterConfig(null_experts=2, balance_schedule="linear", balance_coef_end=0.01, balance_steps=LENGTH),
        lambda router: float(router._balance_coef()),
        [0.02, 0.015, 0.01, 0.01],
    ),
    "adamoe_warmup": (
        AdaMoERouterConfig(null_experts=2, null_init="identity", null_warmup_steps=LENGTH),
        lambda router: float(router._warmup_fraction()),
        [0.0, 0.5, 1.0, 1.0],
    ),
    "moe_plus_plus_warmup": (
        MoEPlusPlusRouterConfig(additive=True, zero_init="identity", zero_warmup_steps=LENGTH, capacity_factor=1.1),
        lambda router: float(router._warmup_fraction()),
        [0.0, 0.5, 1.0, 1.0],
    ),
    "act_dts": (
        ActDTSRouterConfig(temperature_mode="schedule", temperature=1.0, temperature_end=0.2, steps=LENGTH),
        lambda router: float(router.temperature()),
        [1.0, 0.6, 0.2, 0.2],
    ),
    "comet": (CometRouterConfig(permutation_steps=LENGTH), permutation_is_fixed, [0, 0, 1, 1]),
    "permuted_top_k": (
        PermutedTopKRouterConfig(permutation_steps=LENGTH, permutation_noise=0.1),
        permutation_is_fixed,
        [0, 0, 1, 1],
    ),
    "deepseek_moe": (
        DeepSeekMoERouterConfig(correction_bias=True, bias_update_rate=0.01, bias_update_until=LENGTH),
        lambda router: int(router.moe_progress[0] >= router.moe_config.bias_update_until),
        [0, 0, 1, 1],
    ),
    "dts_hard": (
        DTSRouterConfig(steps=2, hard_after=LENGTH),
        lambda router: int(router.moe_progress[0] >= router.moe_config.hard_after),
        [0, 0, 1, 1],
    ),
}
DRAWING = {
    "stochastic": StochasticRouterConfig(),
    "stochastic_token": StochasticRouterConfig(train_draw="token", consistency_coef=0.0),
    "noisy_top_k": NoisyTopKRouterConfig(),
}
# With state from layer to layer, or parameters of their own.
OTHERS = {
    "rmoe": RMoERouterConfig(state_size=8),
    "pre_gated": PreGatedRouterConfig(),
    "xmoe": XMoERouterConfig(),
    "dselect_k": DSelectKRouterConfig(),
    "hash": HashRouterConfig(vocab_size=VOCAB_SIZE),
}


class Watch(TrainerCallback):
    """The value of every layer's router in each step."""

    def __init__(self, read: Callable[[Any], float]) -> None:
        self.read = read
        self.values: dict[int, set[float]] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.values[state.global_step] = {self.read(router) for router in iter_routers(model)}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.on_step_begin(args, state, control, model=model)


def make(folder, config, read=lambda router: 0.0, seed: int = 0, **overrides) -> tuple[MoETrainer, Watch]:
    options = {
        "max_steps": STEPS,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random",
    }
    watch = Watch(read)
    trainer = MoETrainer(
        model=tiny_moe(config, seed, attention_dropout=0.1),
        args=arguments(folder, **(options | overrides)),
        train_dataset=rows([9, 5, 7, 3, 9, 9, 2, 8]),
        callbacks=[watch],
    )
    return trainer, watch


@pytest.mark.parametrize("name", SCHEDULED)
def test_the_trainer_drives_the_schedule(tmp_path, name):
    config, read, values = SCHEDULED[name]
    trainer, watch = make(tmp_path, config, read)
    trainer.train()
    assert list(watch.values) == list(range(STEPS + 1))
    for step, value in zip((0, LENGTH // 2, LENGTH, STEPS), values, strict=True):
        assert list(watch.values[step]) == [pytest.approx(value, rel=1e-6)], step

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{SAVED}")
    assert {read(router) for router in iter_routers(loaded)} == watch.values[SAVED]


@pytest.mark.parametrize("name", [*SCHEDULED, *DRAWING, *OTHERS])
def test_resuming_goes_on_with_the_same_values_and_draws(tmp_path, name):
    """Bit for bit, with noise, draws and dropout, into a model with other weights and another schedule position."""
    config, read, _ = SCHEDULED[name] if name in SCHEDULED else ((DRAWING | OTHERS)[name], lambda router: 0.0, [])
    whole, watched = make(tmp_path / "a", config, read)
    whole.train()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / f"checkpoint-{STEPS}")
    resumed, again = make(tmp_path / "b", config, read, seed=7)
    resumed.train(resume_from_checkpoint=True)
    assert again.values == {step: value for step, value in watched.values.items() if step >= SAVED}
    assert_same_state(whole, resumed)
    assert comparable(whole.state.log_history) == comparable(resumed.state.log_history)


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_longer_than_the_training_is_refused(tmp_path, name):
    config, read, _ = SCHEDULED[name]
    trainer, _ = make(tmp_path, config, read, max_steps=LENGTH - 1, save_strategy="no")
    with pytest.raises(
        ValueError, match=f"`{config.type}` router takes {LENGTH} optimizer steps, this training has 3"
    ):
        trainer.train()
