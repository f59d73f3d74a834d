"""Capacity: which tokens an expert keeps, against loops; what is left alone; the statistics of random selection."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import MOE_NAMES, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

import hf_moe_ext as moe
from hf_moe_ext import CapacityConfig, MoeExtension, TopKRouterConfig, extend, restore, trace_routing
from hf_moe_ext.modeling.moe_capacity import expert_capacity, keep_within_capacity
from hf_moe_ext.modeling.moe_losses import load_balancing_loss
from hf_moe_ext.modeling.moe_structure import auxiliary_losses, iter_routers


def limited(name="mixtral", router=None, **capacity):
    router = router or TopKRouterConfig(balance_coef=0.1)
    return extend(copy.deepcopy(tiny_model(name)), MoeExtension(router=router, capacity=CapacityConfig(**capacity)))


def tokens(name="mixtral"):
    """Without padding."""
    return {"input_ids": tiny_inputs(name)["input_ids"]}


def records(model, inputs):
    with trace_routing(model) as contexts:
        outputs = model(**inputs)
    return outputs, [record for context in contexts for record in context.records.values()]


def slow_keep(index, priority, num_experts, capacity):
    """Expert by expert, slot by slot."""
    keep = torch.ones_like(index, dtype=torch.bool)
    for expert in range(num_experts):
        wanting = [(-priority[t, j].item(), j, t) for t, j in (index == expert).nonzero().tolist()]
        for _, j, t in sorted(wanting)[int(capacity) :]:
            keep[t, j] = False
    return keep


# --- the selection ---


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("tokens", "slots", "experts"), [(1, 1, 1), (17, 2, 5), (40, 3, 4), (23, 4, 4)])
def test_keeps_what_a_loop_keeps(tokens, slots, experts, ties):
    generator = torch.Generator().manual_seed(tokens)
    for capacity in (0, 1, 3, tokens, tokens * slots):
        logits = torch.randn(tokens, experts + 1, generator=generator)
        index = logits.topk(min(slots, experts + 1)).indices  # `experts` is nobody
        priority = torch.randint(3, index.shape, generator=generator).float() if ties else torch.rand(index.shape)
        found = keep_within_capacity(index, priority, experts, torch.tensor(capacity))
        assert torch.equal(found, slow_keep(index, priority, experts, capacity))


@pytest.mark.parametrize(
    ("counts", "factor", "minimum", "expected"),
    [
        ([5, 5, 5, 5], 1.0, 4, 5),
        ([20, 0, 0, 0], 1.2, 0, 6),  # 6.000000000000001 in floating point arithmetic of another order
        ([9, 0, 0, 0], 1.0, 0, 3),
        ([9, 0, 0, 0], 1.0, 4, 4),
        ([0, 0], 2.0, 0, 0),
        ([7, 7, 7], 0.1, 0, 1),
    ],
)
def test_capacity_is_the_even_load_times_the_factor(counts, factor, minimum, expected):
    assert int(expert_capacity(torch.tensor(counts), factor, minimum)) == expected


def test_capacity_of_whole_numbers_is_exact():
    for total in range(1, 200):
        for experts in (3, 7, 10):
            for tenths in range(1, 30):
                counts = torch.zeros(experts, dtype=torch.int64)
                counts[0] = total
                exact = -(-total * tenths // (experts * 10))
                assert int(expert_capacity(counts, tenths / 10, 0)) == exact


# --- in models ---


@pytest.mark.parametrize("name", MOE_NAMES)
def test_enough_room_changes_nothing(name):
    """Bit for bit, in training, on every family."""
    model = copy.deepcopy(tiny_model(name))
    inputs = tiny_inputs(name)
    extend(model, TopKRouterConfig())
    torch.manual_seed(0)
    with torch.no_grad():
        before = model.train()(**inputs)[0]
    other = limited(name, TopKRouterConfig(), factor=100.0, policy="position").train()
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(other(**inputs)[0], before)


@pytest.mark.parametrize("policy", ["random", "position", "score"])
def test_full_experts_have_exactly_the_capacity(policy):
    model = limited(factor=0.6, minimum=1, policy=policy).train()
    inputs = tokens()
    _, found = records(model, inputs)
    assert found
    for record in found:
        before = torch.bincount(record.choices.flatten(), minlength=record.num_experts)
        after = torch.bincount(record.index.flatten(), minlength=record.num_experts)[: record.num_experts]
        room = math.ceil(record.index.numel() / record.num_experts * 0.6)
        assert torch.equal(after, before.clamp(max=room)) and (after < before).any()
        dropped = record.index == record.num_experts
        assert torch.equal(record.index[~dropped], record.choices[~dropped])
        assert (record.weights[dropped] == 0).all() and (record.weights[~dropped] > 0).all()


def test_position_keeps_the_first_and_score_the_best():
    for policy in ("position", "score"):
        model = limited(factor=0.6, minimum=1, policy=policy).train()
        _, found = records(model, tokens())
        for record in found:
            room = math.ceil(record.index.numel() / record.num_experts * 0.6)
            priority = torch.zeros_like(record.weights)
            if policy == "score":
                priority = record.scores.gather(-1, record.choices)
            expected = slow_keep(record.choices, priority, record.num_experts, room)
            assert torch.equal(record.index < record.num_experts, expected)


def test_random_selection_is_even():
    """Every token of an expert stays with probability C / n, wherever it stands (chi-square over draws)."""
    tokens, capacity, draws = 24, 7, 4000
    index = torch.zeros(tokens, 1, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    stayed = torch.zeros(tokens)
    for _ in range(draws):
        priority = torch.rand(index.shape, generator=generator)
        stayed += keep_within_capacity(index, priority, 1, torch.tensor(capacity))[:, 0]
    expected = draws * capacity / tokens
    # Without replacement: the variance of a count is that of independent draws, their sum is fixed.
    statistic = ((stayed - expected) ** 2).sum() / (expected * (1 - capacity / tokens)) * (tokens - 1) / tokens
    assert float(statistic) < 49.7  # chi-square with 23 degrees of freedom: exceeded once in a thousand
    assert stayed.sum() == draws * capacity


def test_the_place_in_the_batch_matters_only_by_position():
    """What a row keeps in front, and behind the other one."""
    ids = tiny_inputs("mixtral", length=32)["input_ids"]
    kept = {}
    for policy in ("random", "position"):
        model = limited(factor=0.5, minimum=1, policy=policy).train()
        for place, batch in (("front", ids), ("behind", ids.flip(0))):
            count = 0
            for seed in range(60):
                torch.manual_seed(seed)
                _, found = records(model, {"input_ids": batch})
                rows = (found[0].index < found[0].num_experts).view(2, -1).sum(1)
                count += int(rows[int(place == "behind")])
            kept[policy, place] = count
    assert kept["position", "front"] > 1.2 * kept["position", "behind"]
    assert kept["random", "front"] == pytest.approx(kept["random", "behind"], rel=0.05)


def test_evaluation_drops_nothing_by_default():
    model, plain = limited(factor=0.2, minimum=1), extend(copy.deepcopy(tiny_model("mixtral")), TopKRouterConfig())
    inputs = tokens()
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs)[0], plain.eval()(**inputs)[0])
        bounded = limited(factor=0.2, minimum=1, eval_factor=0.5, policy="position").eval()
        _, found = records(bounded, inputs)
    room = math.ceil(found[0].index.numel() / found[0].num_experts * 0.5)
    assert torch.bincount(found[0].index.flatten())[: found[0].num_experts].max() == room


def test_padding_takes_no_place():
    """Real tokens are dropped as they are without the padding in front of them."""
    model = limited(factor=0.6, minimum=1, policy="position").train()
    ids = tokens()["input_ids"][:1]
    _, alone = records(model, {"input_ids": ids})
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    _, found = records(model, {"input_ids": padded, "attention_mask": mask})
    for one, other in zip(alone, found, strict=True):
        assert torch.equal(one.index, other.index[5:])


def test_dropped_tokens_pass_by_the_residual_and_reach_no_gate():
    """With room for nobody the block adds nothing, and the task loss has no gradient for the gate."""
    model = limited(router=TopKRouterConfig(), factor=1e-9, minimum=0).train()
    inputs = tokens()
    outputs = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda m, a, out, index=index: outputs.update({index: out}))
    model(**inputs)
    # ceil of a positive number is 1: one token stays at each expert that is chosen
    for out in outputs.values():
        assert (out.flatten(0, 1).abs().sum(-1) > 0).sum() <= 8
    loss = model(**inputs)[0].float().square().mean()
    loss.backward()
    gates = [router.weight.grad for router in iter_routers(model)]
    assert all(gate is not None for gate in gates)


def test_losses_see_the_choices_before_dropping():
    model = limited(factor=0.4, minimum=1, policy="position").train()
    inputs = tokens()
    with trace_routing(model) as contexts:
        model(**inputs)
    total, named = auxiliary_losses(contexts)
    by_hand = [load_balancing_loss(r.scores, r.choices) for r in contexts[0].records.values()]
    torch.testing.assert_close(named["balance"], torch.stack(by_hand).mean())
    torch.testing.assert_close(total, 0.1 * named["balance"])


def test_renormalised_weights_keep_their_sum():
    model = limited(router=TopKRouterConfig(), factor=0.5, minimum=1, renormalize=True).train()
    _, found = records(model, tokens())
    for record in found:
        kept = record.index < record.num_experts
        torch.testing.assert_close(record.weights.sum(-1)[kept.any(-1)], torch.ones(int(kept.any(-1).sum())))
        assert (record.weights[~kept] == 0).all()
        assert kept.sum(-1).eq(1).any()  # a token that lost one of two


def test_recomputation_drops_the_same_tokens():
    gradients = []
    for checkpointing in (False, True):
        model = limited(factor=0.6, minimum=1).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        torch.manual_seed(3)
        inputs = tokens()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_zero_experts_take_everybody():
    parts = MoeExtension(
        router=TopKRouterConfig(),
        zero_experts={"zero": 2, "copy": 6, "init": "copy"},
        capacity={"factor": 0.5, "minimum": 1},
    )
    model = extend(copy.deepcopy(tiny_model("mixtral")), parts).train()
    _, found = records(model, tokens())
    for record in found:
        real = record.choices < record.num_experts
        room = math.ceil(int(real.sum()) / record.num_experts * 0.5)
        assert torch.bincount(record.index.flatten())[: record.num_experts].max() <= room
        copies = record.choices >= record.num_experts + 2
        assert copies.any() and (record.index[copies] == record.choices[copies] - 1).all()


def test_saves_loads_and_restores(tmp_path):
    stock = tiny_model("mixtral")
    model = limited(factor=0.6, minimum=2, policy="position", eval_factor=0.7)
    inputs = tokens()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.moe_ext["capacity"] == {"factor": 0.6, "eval_factor": 0.7, "minimum": 2, "policy": "position"}
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs)[0], model.eval()(**inputs)[0])
        restored = restore(model)
        assert torch.equal(restored.eval()(**inputs)[0], stock.eval()(**inputs)[0])
    assert not any(hasattr(module, "moe_capacity") for module in restored.modules())


def test_dropping_goes_with_routers_of_varying_k():
    model = limited(router=moe.TopPRouterConfig(threshold=0.6), factor=0.5, minimum=1).train()
    _, found = records(model, tokens())
    for record in found:
        assigned = int((record.choices < record.num_experts).sum())
        room = math.ceil(assigned / record.num_experts * 0.5)
        assert torch.bincount(record.index.flatten())[: record.num_experts].max() <= room


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0.0}, "`factor` must be positive, got 0.0"),
        ({"eval_factor": -1.0}, "`eval_factor` must be positive"),
        ({"minimum": -1}, "`minimum` must be non-negative"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CapacityConfig(**options)


def test_bad_policy_is_refused():
    with pytest.raises(TypeError, match="`policy` of CapacityConfig must be one of 'random'"):
        CapacityConfig(policy="last")


def test_needs_a_router_that_chooses():
    model = copy.deepcopy(tiny_model("mixtral"))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="`capacity` bounds what a router of this package chooses"):
        extend(model, MoeExtension(capacity=CapacityConfig()))
    with pytest.raises(ValueError, match="`soft_moe` router mixes them"):
        extend(
            model,
            MoeExtension(router=moe.SoftMoERouterConfig(allow_non_causal=True), capacity=CapacityConfig()),
        )
    assert list(model.state_dict()) == keys and not hasattr(model.config, "moe_ext")
