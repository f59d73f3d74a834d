"""DeepSeekMoE (2401.06066) and loss-free balancing (2408.15664, 2412.19437) against loops in float64: the rule, the
three balance losses, the bias and its end, experts cut into slices."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import MOE_NAMES, tiny_inputs, tiny_model

from hf_moe_ext import MoETrainer
from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_context import RouteRecord, RoutingContext
from hf_moe_ext.modeling.moe_families import get_family
from hf_moe_ext.modeling.moe_losses import expert_counts, load_balancing_loss
from hf_moe_ext.modeling.moe_router import GateRule, RouterSite, get_router
from hf_moe_ext.modeling.moe_structure import auxiliary_losses, iter_routers, route_rows, trace_routing
from hf_moe_ext.modeling.router_deepseek_moe import (
    DeepSeekMoERouter,
    DeepSeekMoERouterConfig,
    device_balance_loss,
    sequence_balance_loss,
)
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.patching import extend

from ..trainers.common import arguments, logged, rows, snapshot, tiny_moe, train
from .test_routers import EXPERTS, HIDDEN, RULES, TOKENS, K, combine, compare, make_gate, rule_options, slow_top_k
from .test_zero_experts import make_gate as make_gate_with_zero_experts


ROUNDING = {"rtol": 1e-5, "atol": 2e-5}
V3 = GateRule(score="sigmoid", bias="correction", groups=(4, 2, "top2_sum"), scale=2.5)
QUIET = {"expert_balance_coef": 0.0}


def decided(scores: torch.Tensor, index: torch.Tensor, config: DeepSeekMoERouterConfig, **extras) -> RouteRecord:
    """A record of these decisions, without a gate."""
    columns = scores.shape[-1]
    site = RouterSite("0", 0, columns, index.shape[-1], HIDDEN, GateRule())
    return RouteRecord(scores.log(), scores, torch.ones_like(index).float(), index, config, extras=extras, site=site)


def balanced(tokens: int = 24, experts: int = 8, k: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform scores, and picks that fall on every expert alike."""
    index = torch.stack([(torch.arange(k) + k * token) % experts for token in range(tokens)])
    assert len(set(expert_counts(index, experts).tolist())) == 1
    return torch.full((tokens, experts), 1 / experts), index


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs)[0]


# --- the rule ---


@pytest.mark.parametrize("rule", [*RULES.values(), V3], ids=[*RULES, "v3"])
def test_rule_of_the_family(rule):
    """The bias moves the choice alone, groups limit it, weights are scores: as in the released models."""
    bias = torch.randn(EXPERTS) * 0.3 if rule.bias else None
    gate = make_gate(DeepSeekMoERouterConfig(num_experts_per_tok=K), rule=rule, bias=bias)
    options = rule_options(rule) | {"order": rule.order, "renormalize": rule.renormalize}
    compare(gate, slow_top_k, **options, bias=None if bias is None else bias.tolist())


def test_rule_of_the_paper_on_another_family():
    """Raw softmax probabilities, not divided by their sum."""
    config = DeepSeekMoERouterConfig(score="softmax", score_order="score_topk", renormalize=False, scale=1.0)
    compare(make_gate(config, rule=GateRule(score="sigmoid", scale=3.0)), slow_top_k, renormalize=False)


def test_one_group_is_plain_top_k():
    gate = make_gate(DeepSeekMoERouterConfig(num_groups=1, topk_groups=1, score="sigmoid"))
    compare(gate, slow_top_k, score="sigmoid")


def test_bias_moves_the_choice_and_no_weight():
    """A constant on all experts changes nothing; a large one forces its expert; where the choice stays, weights do."""
    gate = make_gate(DeepSeekMoERouterConfig(correction_bias=True, score="sigmoid", renormalize=False))
    hidden = torch.randn(300, HIDDEN)
    before = gate.decide(hidden)
    gate.moe_correction_bias.fill_(0.25)
    shifted = gate.decide(hidden)
    assert torch.equal(shifted.index, before.index) and torch.equal(shifted.weights, before.weights)
    gate.moe_correction_bias.zero_()[5] = 0.1
    nudged = gate.decide(hidden)
    same = (nudged.index.sort(-1).values == before.index.sort(-1).values).all(-1)
    assert 0 < same.sum() < 300
    torch.testing.assert_close(combine(nudged)[same], combine(before)[same], rtol=0, atol=0)
    gate.moe_correction_bias[5] = 10.0
    forced = gate.decide(hidden)
    assert (forced.index == 5).any(-1).all()
    torch.testing.assert_close(combine(forced)[:, 5], forced.logits[:, 5].sigmoid())


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        ({"score": "softmax", "renormalize": True}, 4.0),
        ({"score": "softmax", "renormalize": False}, 4.0),
        ({"score": "sigmoid", "renormalize": False}, 1.0),
    ],
    ids=["renormalized", "raw", "sigmoid"],
)
@torch.no_grad()
def test_experts_cut_into_slices_compute_the_same(rule, factor):
    """Four slices of each expert and four times as many picks. Equal logits share the weight of a softmax, which a
    factor on the output projection makes up for; scores of a sigmoid are not shared."""
    slices, inputs = 4, tiny_inputs("mixtral")
    coarse = tiny_model("mixtral")
    fine = tiny_model(
        "mixtral", num_local_experts=8 * slices, intermediate_size=48 // slices, num_experts_per_tok=2 * slices
    )
    state = coarse.state_dict()
    for name, tensor in state.items():
        if name.endswith("gate.weight"):
            state[name] = tensor.repeat_interleave(slices, dim=0)
        elif name.endswith("gate_up_proj"):  # (E, 2I, H): rows of gate and up
            parts = tensor.unflatten(1, (2, slices, -1)).transpose(1, 2)
            state[name] = parts.flatten(2, 3).flatten(0, 1)
        elif name.endswith("experts.down_proj"):  # (E, H, I): columns
            state[name] = factor * tensor.unflatten(2, (slices, -1)).permute(0, 2, 1, 3).flatten(0, 1)
    fine.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
    extend(coarse, TopKRouterConfig(**rule))
    extend(fine, DeepSeekMoERouterConfig(**rule))
    torch.testing.assert_close(logits_of(fine, inputs), logits_of(coarse, inputs), **ROUNDING)


# --- the balance losses ---


def slow_share(chosen, i, tokens, columns):
    """f of the paper: picks of expert i, 1 where all are picked alike."""
    return columns / (chosen.shape[1] * len(tokens)) * sum(i in chosen[t].tolist() for t in tokens)


def slow_mean(scores, i, tokens):
    return sum(scores[t, i] for t in tokens) / len(tokens)


def slow_expert(scores, chosen, tokens):
    columns = scores.shape[1]
    return sum(slow_share(chosen, i, tokens, columns) * slow_mean(scores, i, tokens) for i in range(columns))


def slow_device(scores, chosen, tokens, devices, experts):
    size, total = experts // devices, 0.0
    for device in range(devices):
        members = range(device * size, (device + 1) * size)
        share = sum(slow_share(chosen, i, tokens, scores.shape[1]) for i in members) / size
        total = total + share * sum(slow_mean(scores, i, tokens) for i in members)
    return total


def slow_sequence(scores, chosen, tokens, length):
    sequences = [range(start, start + length) for start in range(0, len(scores), length)]
    kept = [[t for t in sequence if t in tokens] for sequence in sequences]
    losses = [slow_expert(scores, chosen, sequence) for sequence in kept if sequence]
    return sum(losses) / len(losses)


LOSSES = ("expert_balance", "device_balance", "sequence_balance")
ALL = {"expert_balance_coef": 0.3, "device_balance_coef": 0.05, "num_devices": 4, "sequence_balance_coef": 0.2}


@pytest.mark.parametrize("masked", [False, True], ids=["all_tokens", "masked"])
@pytest.mark.parametrize("rule", [GateRule(renormalize=False), V3], ids=["softmax", "v3"])
def test_losses_and_gradients_equal_reference(rule, masked):
    """Through P alone: the counts of the reference are plain numbers. One sequence is padding from end to end."""
    bias = torch.randn(EXPERTS) * 0.3 if rule.bias else None
    gate = make_gate(DeepSeekMoERouterConfig(num_experts_per_tok=K, **ALL), rule=rule, bias=bias)
    hidden = torch.randn(4, 7, HIDDEN)
    mask = torch.ones(4, 7, dtype=torch.long)
    if masked:
        mask[0, 5:] = mask[2, :4] = mask[3] = 0
    context = RoutingContext(attention_mask=mask if masked else None, batch_size=4)
    record = gate.route(hidden.flatten(0, 1), context)
    record.site = gate.moe_site
    found = gate.aux_losses(record, context.token_mask(28))
    assert set(found) == set(LOSSES)

    weight = gate.weight.detach().double().requires_grad_()
    raw = hidden.flatten(0, 1).double() @ weight.T
    raw = raw.softmax(-1) if rule.score == "softmax" else raw.sigmoid()
    scores = raw / raw.sum(-1, keepdim=True)
    tokens = mask.flatten().nonzero()[:, 0].tolist()
    expected = {
        "expert_balance": slow_expert(scores, record.index, tokens),
        "device_balance": slow_device(scores, record.index, tokens, 4, EXPERTS),
        "sequence_balance": slow_sequence(scores, record.index, tokens, 7),
    }
    for name in LOSSES:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
        (mine,) = torch.autograd.grad(found[name], gate.weight, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected[name], weight, retain_graph=True)
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6, msg=name)
        assert theirs.abs().max() > 1e-3


def test_gradient_worked_out_by_hand():
    """For the logits z of a token: `P_i (f_i - sum_j f_j P_j) / T`."""
    logits = torch.randn(TOKENS, 6, requires_grad=True)
    scores, index = logits.softmax(-1), logits.topk(2).indices
    DeepSeekMoERouter.aux_losses(decided(scores, index, DeepSeekMoERouterConfig()), None)["expert_balance"].backward()
    share = 6 / (2 * TOKENS) * torch.bincount(index.flatten(), minlength=6)
    p = scores.detach()
    torch.testing.assert_close(logits.grad, p * (share - (p * share).sum(-1, keepdim=True)) / TOKENS)


def test_losses_at_perfect_balance_are_one():
    scores, index = balanced()
    start = torch.arange(24) % 12 == 0
    for devices in (1, 2, 4, 8):
        config = DeepSeekMoERouterConfig(**ALL | {"num_devices": devices})
        found = DeepSeekMoERouter.aux_losses(decided(scores, index, config, sequence_start=start), None)
        torch.testing.assert_close(found, {name: torch.tensor(1.0) for name in LOSSES})


def test_one_expert_for_all_is_the_worst():
    scores, index = torch.eye(8)[:1].repeat(10, 1), torch.zeros(10, 1, dtype=torch.long)
    config = DeepSeekMoERouterConfig(**ALL)
    found = DeepSeekMoERouter.aux_losses(decided(scores, index, config, sequence_start=torch.arange(10) == 0), None)
    assert {name: loss.item() for name, loss in found.items()} == {
        "expert_balance": 8.0,
        "device_balance": 4.0,
        "sequence_balance": 8.0,
    }


def test_groups_of_one_expert_and_of_all():
    """As many groups as experts: the expert-level loss. One group: constant."""
    scores = torch.randn(TOKENS, 8).softmax(-1).requires_grad_()
    index = scores.topk(2).indices
    whole = load_balancing_loss(scores, index) / 2
    torch.testing.assert_close(device_balance_loss(scores, index, 8, 8), whole)
    torch.testing.assert_close(device_balance_loss(scores, index, 1, 8), torch.tensor(1.0))
    assert (device_balance_loss(scores, index, 2, 8) - whole).abs() > 1e-3


def test_one_sequence_is_the_whole():
    scores = torch.randn(TOKENS, 8).softmax(-1)
    index = scores.topk(2).indices
    first = torch.arange(TOKENS) == 0
    torch.testing.assert_close(sequence_balance_loss(scores, index, first), load_balancing_loss(scores, index) / 2)
    # Balanced over the batch, not in a sequence: only the sequence-wise loss sees it.
    scores = torch.eye(2).repeat_interleave(5, dim=0) * 0.8 + 0.1
    index = scores.argmax(-1, keepdim=True)
    assert load_balancing_loss(scores, index).item() == pytest.approx(1.0)
    assert sequence_balance_loss(scores, index, torch.arange(10) % 5 == 0).item() == pytest.approx(1.8)


def test_nothing_but_padding_is_zero():
    scores, index = balanced()
    config, none = DeepSeekMoERouterConfig(**ALL), torch.zeros(24, dtype=torch.bool)
    found = DeepSeekMoERouter.aux_losses(decided(scores, index, config, sequence_start=torch.arange(24) == 0), none)
    assert {name: loss.item() for name, loss in found.items()} == dict.fromkeys(LOSSES, 0.0)


def test_zero_computation_experts_stand_on_no_device():
    config = DeepSeekMoERouterConfig(num_experts_per_tok=3, **ALL | {"num_devices": 3})
    gate = make_gate_with_zero_experts(config, ZeroExpertsConfig(zero=1, copy=1))
    gate.moe_zero_weight.data.normal_()
    record = gate.decide(torch.randn(40, HIDDEN))
    assert (record.chosen >= 6).any()
    found = gate.aux_losses(record, None)
    scores, tokens = record.scores.double(), range(40)
    expected = {
        "expert_balance": slow_expert(scores, record.chosen, tokens),
        "device_balance": slow_device(scores, record.chosen, tokens, 3, 6),
        "sequence_balance": slow_expert(scores, record.chosen, tokens),
    }
    for name in LOSSES:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_losses_enter_the_total_by_their_weights():
    model = extend(tiny_model("mixtral"), DeepSeekMoERouterConfig(z_coef=0.5, balance_coef=0.7, **ALL)).train()
    inputs = tiny_inputs("mixtral")
    with trace_routing(model) as contexts:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    total, named = auxiliary_losses(contexts)
    weights = {"expert_balance": 0.3, "device_balance": 0.05, "sequence_balance": 0.2, "z": 0.5, "balance": 0.7}
    assert set(named) == set(weights)
    torch.testing.assert_close(total, sum(weights[name] * value for name, value in named.items()))
    torch.testing.assert_close(named["expert_balance"], named["balance"] / 2)
    plain = model.eval()(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(loss - plain, total)


def test_padding_changes_nothing():
    """Neither what stands there, nor a sequence of padding alone."""
    model, inputs = extend(tiny_model("mixtral"), DeepSeekMoERouterConfig(**ALL)), tiny_inputs("mixtral")
    assert not inputs["attention_mask"].all()
    found = []
    for token in (0, 50):
        ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, token)
        with trace_routing(model) as contexts:
            logits_of(model, {"input_ids": ids, "attention_mask": inputs["attention_mask"]})
        found.append(auxiliary_losses(contexts)[1])
    torch.testing.assert_close(found[0], found[1])
    more = {key: torch.cat([value, torch.zeros_like(value[:1])]) for key, value in inputs.items()}
    with trace_routing(model) as contexts:
        logits_of(model, more)
    torch.testing.assert_close(auxiliary_losses(contexts)[1], found[0], rtol=1e-4, atol=1e-6)


def test_rows_of_several_policies_stay_sequences():
    """The sequence-wise loss is the mean of the rows alone, in whichever groups they were routed."""
    model, ids = extend(tiny_model("mixtral"), DeepSeekMoERouterConfig(**ALL)), tiny_inputs("mixtral", batch=3)
    ids = ids["input_ids"]

    def found(rows_of, **policies):
        with route_rows(model, **policies) if policies else trace_routing(model), trace_routing(model) as contexts:
            logits_of(model, {"input_ids": rows_of})
        return auxiliary_losses(contexts)[1]["sequence_balance"]

    alone = torch.stack([found(ids[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(found(ids), alone.mean(), rtol=1e-4, atol=1e-6)
    mixed = found(ids, modes=["a", "b", "a"], policies={"b": {"temperature": 1.0}})
    torch.testing.assert_close(mixed, alone.mean(), rtol=1e-4, atol=1e-6)


def test_unknown_sequences_are_named():
    gate = make_gate(DeepSeekMoERouterConfig(**ALL))
    record = gate.route(torch.randn(5, HIDDEN), RoutingContext(batch_size=2))
    record.site, record.key = gate.moe_site, "7"
    with pytest.raises(ValueError, match='to which sequences the tokens of layer "7" belong. Set it to 0'):
        gate.aux_losses(record, None)


# --- loss-free balancing ---


BIASED = {"correction_bias": True, "score": "sigmoid", **QUIET}


def violation(counts: torch.Tensor) -> float:
    """How far the busiest expert is above the mean load, relative to it."""
    return float(counts.max() / counts.float().mean() - 1)


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_sign_controller_balances(rate):
    """16 experts, two per token, a router that prefers some: the largest violation falls far within 600 steps."""
    config = DeepSeekMoERouterConfig(num_experts_per_tok=2, bias_update_rate=rate, **BIASED)
    gate = make_gate(config, num_experts=16, top_k=2, hidden=32)
    gate.weight.data *= 0.1
    offset = torch.randn(32)
    violations = []
    with torch.no_grad():
        for _ in range(600):
            counts = expert_counts(gate.decide(torch.randn(1000, 32) + offset).index, 16)
            violations.append(violation(counts))
            gate.after_optimizer_step(counts)
    print(f"rate {rate}: {violations[0]:.2f} -> {sum(violations[-20:]) / 20:.2f}")
    assert violations[0] > 1.5 and sum(violations[-20:]) / 20 < 0.35


def test_the_update_by_hand():
    """Up below the mean, down above it, not at all at the mean; as often as it is asked until the end."""
    gate = make_gate(DeepSeekMoERouterConfig(bias_update_rate=0.5, bias_update_until=2, **BIASED), num_experts=4)
    assert gate.schedule_steps == 2
    for step, expected in enumerate(([0.5, 0.5, -0.5, 0.0], [1.0, 1.0, -1.0, 0.0], [1.0, 1.0, -1.0, 0.0])):
        gate.schedule(step, 3)
        gate.after_optimizer_step(torch.tensor([0, 1, 8, 3]))
        assert gate.moe_correction_bias.tolist() == expected
    gate.schedule(0, 3)
    gate.after_optimizer_step(torch.full((4,), 7))
    assert gate.moe_correction_bias.tolist() == [1.0, 1.0, -1.0, 0.0]
    assert not gate.moe_correction_bias.requires_grad


def test_small_steps_do_not_vanish_in_bfloat16():
    gate = make_gate(DeepSeekMoERouterConfig(bias_update_rate=1e-3, **BIASED), num_experts=4)
    gate.moe_correction_bias.fill_(1.0)
    gate.to(torch.bfloat16)
    for _ in range(10):
        gate.after_optimizer_step(torch.tensor([0, 0, 4, 4]))
    torch.testing.assert_close(gate.moe_correction_bias, torch.tensor([1.01, 1.01, 0.99, 0.99]))


def _has_bias(name: str) -> bool:
    return get_family(name).moe.bias is not None


@pytest.mark.parametrize("name", [name for name in MOE_NAMES if _has_bias(name)])
def test_the_bias_of_every_family_is_moved(name):
    """Wherever it is kept, on the gate or on the block: the stock gate uses what was moved."""
    model, inputs = tiny_model(name), tiny_inputs(name)
    try:
        extend(model, DeepSeekMoERouterConfig(bias_update_rate=50.0, **QUIET))
    except ValueError as reason:
        pytest.skip(str(reason))
    for router in iter_routers(model):
        counts = torch.zeros(router.moe_site.num_experts, dtype=torch.long)
        counts[2:] = 10
        router.after_optimizer_step(counts)
    with trace_routing(model) as contexts:
        logits_of(model, inputs)
    for record in contexts[0].records.values():
        assert set(record.index.flatten().tolist()) <= {0, 1, record.num_experts} or record.site.rule.groups
        assert (record.index == 0).any(-1).all() or (record.index == 1).any(-1).all()


def moved(model) -> torch.Tensor:
    return torch.stack([router.moe_correction_bias for router in iter_routers(model)])


def test_trained_bias_follows_the_tokens_that_count(tmp_path):
    """Over the micro-batches of a step, without padding; evaluation never moves it."""
    config = DeepSeekMoERouterConfig(bias_update_rate=0.5, **BIASED)
    model, data = tiny_moe(config), rows([9, 3, 2, 4])
    with trace_routing(model) as contexts:
        trainer = train(model, data, tmp_path, gradient_accumulation_steps=2, learning_rate=0.0)
    expected, with_padding = [], []
    for key in ("0", "1"):
        kept = [context.token_mask(len(context.records[key].index)) for context in contexts]
        assert not all(mask.all() for mask in kept)
        index = [context.records[key].index for context in contexts]
        for out, parts in (
            (expected, [i[m] for i, m in zip(index, kept, strict=True)]),
            (with_padding, index),
        ):
            load = torch.bincount(torch.cat(parts).flatten(), minlength=6).float()
            out.append(0.5 * torch.sign(load.mean() - load))
    assert torch.equal(moved(model), torch.stack(expected))
    assert not torch.equal(torch.stack(expected), torch.stack(with_padding))
    trainer.evaluate(data)
    assert torch.equal(moved(model), torch.stack(expected))


def test_the_trainer_ends_the_update(tmp_path):
    """After two of four steps; what is saved then is what is loaded, and training on does not move it again."""
    config = DeepSeekMoERouterConfig(bias_update_rate=0.01, bias_update_until=2, **BIASED)
    data = rows([9, 7, 8, 6, 9, 5, 9, 9])
    with pytest.raises(ValueError, match="takes 2 optimizer steps, this training has 1"):
        train(tiny_moe(config), data, tmp_path, max_steps=1)
    two, four = tiny_moe(config), tiny_moe(config)
    train(two, data, tmp_path, max_steps=2, learning_rate=0.0)
    train(four, data, tmp_path, max_steps=4, learning_rate=0.0)
    assert moved(two).abs().max() == pytest.approx(0.02) and torch.equal(moved(four), moved(two))
    four.save_pretrained(tmp_path / "model")
    again = type(four).from_pretrained(tmp_path / "model")
    assert torch.equal(moved(again), moved(four))
    assert all(router.moe_progress.tolist() == [4, 4] for router in iter_routers(again))
    inputs = {key: value[None] for key, value in data[0].items() if key != "labels"}
    assert torch.equal(logits_of(again.eval(), inputs), logits_of(four.eval(), inputs))


def test_rate_zero_changes_no_bit(tmp_path):
    inputs, data = {"input_ids": rows([9, 9])[0]["input_ids"][None]}, rows([9, 7])
    for config in (DeepSeekMoERouterConfig(**BIASED), DeepSeekMoERouterConfig(**QUIET)):
        model = tiny_moe(config)
        before, expected = snapshot(model), logits_of(model.eval(), inputs)
        train(model, data, tmp_path, learning_rate=0.0, max_steps=2)
        assert torch.equal(logits_of(model.eval(), inputs), expected)
        assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())


def test_losses_are_logged_by_name(tmp_path):
    trainer = train(tiny_moe(DeepSeekMoERouterConfig(**ALL | {"num_devices": 2})), rows([9, 7]), tmp_path)
    line = trainer.state.log_history[0]
    total = sum(ALL[f"{name}_coef"] * line[f"moe/loss_{name}"] for name in LOSSES)
    assert line["moe/aux_loss"] == pytest.approx(total, rel=1e-5)
    assert line["loss"] == pytest.approx(line["moe/lm_loss"] + line["moe/aux_loss"], rel=1e-5)


def test_accumulated_losses_do_not_grow_with_the_micro_batches(tmp_path):
    """Two micro-batches of one row each give the sequence-wise loss of one batch of both."""
    config, found = DeepSeekMoERouterConfig(sequence_balance_coef=1.0, **QUIET), []
    for size, steps in ((2, 1), (1, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = MoETrainer(model=tiny_moe(config), args=arguments(tmp_path, **options), train_dataset=rows([9, 9]))
        trainer.train()
        found.append((logged(trainer, "moe/aux_loss")[0], snapshot(trainer.model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from tests.trainers.common import rows, tiny_moe, train
from hf_moe_ext import DeepSeekMoERouterConfig
from hf_moe_ext.modeling.moe_structure import iter_routers

folder, size = Path(sys.argv[1]), int(sys.argv[2])
config = DeepSeekMoERouterConfig(
    correction_bias=True, score="sigmoid", bias_update_rate=0.01, expert_balance_coef=0.0
)
model = tiny_moe(config)
options = dict(max_steps=3, learning_rate=0.0, per_device_train_batch_size=size)
trainer = train(model, rows([9, 2, 9, 5, 3, 9, 9, 7, 2, 2, 9, 9]), folder, **options)
biases = [router.moe_correction_bias.tolist() for router in iter_routers(model)]
(folder / f"bias_{trainer.args.process_index}.json").write_text(json.dumps(biases))
"""


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_move_the_bias_like_one(tmp_path):
    """The tokens of the whole batch are counted, padding of neither half."""
    script, root = tmp_path / "script.py", Path(__file__).resolve().parents[2]
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, command in (
        ("one", [str(script), str(tmp_path / "one"), "4"]),
        ("two", [*launch, str(script), str(tmp_path / "two"), "2"]),
    ):
        process = subprocess.run(
            [sys.executable, *command], env=environment, cwd=root, capture_output=True, text=True, timeout=240
        )
        assert process.returncode == 0, f"{name}: {process.stderr[-3000:]}"
    one, first, second = (
        json.loads((tmp_path / name).read_text()) for name in ("one/bias_0.json", "two/bias_0.json", "two/bias_1.json")
    )
    assert one == first == second
    assert len({round(value, 3) for layer in one for value in layer}) > 2


# --- in a model, and what is refused ---


def test_a_copy_moves_its_own_bias():
    model = extend(tiny_model("mixtral"), DeepSeekMoERouterConfig(bias_update_rate=0.5, **BIASED))
    twin = copy.deepcopy(model)
    for router in iter_routers(model):
        router.after_optimizer_step(torch.arange(8))
    assert moved(model).abs().min() > 0 and (moved(twin) == 0).all()


def test_what_the_class_says():
    site = RouterSite("0", 0, EXPERTS, K, HIDDEN, GateRule(score="custom"))
    config = get_router("deepseek_moe").identity_config(site)
    assert config.is_stock and not any(config.loss_coefs.values())
    extension = MoeExtension(router=DeepSeekMoERouterConfig(bias_update_rate=0.1, bias_update_until=4, **ALL))
    assert MoeExtension.from_dict(extension.to_dict()) == extension
    router = get_router("deepseek_moe")
    assert "2401.06066" in router.paper and not router.needs and router.causal and not router.crosses_layers


BAD = [
    ({"expert_balance_coef": -1.0}, "`expert_balance_coef` must be non-negative, got -1.0"),
    ({"device_balance_coef": -1.0, "num_devices": 2}, "`device_balance_coef` must be non-negative"),
    ({"sequence_balance_coef": -0.1}, "`sequence_balance_coef` must be non-negative"),
    ({"num_devices": 0}, "`num_devices` must be at least 1, got 0"),
    ({"device_balance_coef": 0.1}, "`device_balance_coef` needs `num_devices`"),
    ({"bias_update_rate": 0.1, "bias_update_until": 0}, "`bias_update_until` must be at least 1, got 0"),
    ({"bias_update_until": 3}, "set a `bias_update_rate`"),
    ({"bias_update_rate": -0.1}, "`bias_update_rate` must be non-negative"),
    ({"bias_update_rate": 0.1}, 'no bias to move at layer "0"; set `correction_bias=True`'),
    ({"bias_update_rate": 0.1, "correction_bias": False}, "has no bias to move"),
    ({"num_devices": 5}, r"`num_devices` \(5\) must divide the 12 experts"),
    ({"num_experts_per_tok": 13}, "exceeds the 12 experts"),
    ({"num_groups": 6, "topk_groups": 2, "num_experts_per_tok": 5}, "hold fewer than k=5"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_gate(DeepSeekMoERouterConfig(**settings))
