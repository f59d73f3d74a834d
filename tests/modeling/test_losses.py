"""Auxiliary losses against loops in float64, and how models add them to their loss."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from tiny_models import MOE_NAMES, tiny_inputs, tiny_model

from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension
from hf_moe_ext.modeling.moe_losses import (
    expert_counts,
    experts_per_token,
    load_balancing_loss,
    router_concentration,
    router_entropy,
    router_information,
    router_z_loss,
)
from hf_moe_ext.modeling.moe_structure import auxiliary_losses, trace_routing
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.modeling.router_top_p import TopPRouterConfig
from hf_moe_ext.patching import extend


TOKENS, EXPERTS, SLOTS = 13, 6, 3


def example():
    """Logits, dynamic sets with unused slots and zero-computation experts, and a mask."""
    logits = torch.randn(TOKENS, EXPERTS, requires_grad=True)
    index = torch.stack([torch.randperm(EXPERTS + 3)[:SLOTS] for _ in range(TOKENS)])
    mask = torch.rand(TOKENS) < 0.6
    assert 2 < mask.sum() < TOKENS and (index >= EXPERTS).any()
    return logits, index, mask


def counting(mask):
    return [t for t in range(TOKENS) if mask is None or mask[t]]


def slow_balance(logits, index, mask):
    tokens = counting(mask)
    share = [sum(expert in index[t].tolist() for t in tokens) / len(tokens) for expert in range(EXPERTS)]
    probs = torch.stack([logits[t].softmax(-1) for t in tokens])
    return EXPERTS * sum(share[i] * sum(probs[:, i]) / len(tokens) for i in range(EXPERTS))


def slow_z(logits, index, mask):
    return sum(logits[t].exp().sum().log() ** 2 for t in counting(mask)) / len(counting(mask))


def slow_entropy(logits, index, mask):
    probs = [logits[t].softmax(-1) for t in counting(mask)]
    return -sum(p * p.log() for row in probs for p in row) / len(probs)


def slow_concentration(logits, index, mask):
    tokens = counting(mask)
    mean = [sum(logits[t].softmax(-1)[expert] for t in tokens) / len(tokens) for expert in range(EXPERTS)]
    return -sum(p * p.log() for p in mean)


def slow_information(logits, index, mask):
    return slow_entropy(logits, index, mask) - slow_concentration(logits, index, mask)


LOSSES = {
    "balance": (lambda logits, index, mask: load_balancing_loss(logits.softmax(-1), index, mask), slow_balance),
    "z": (lambda logits, index, mask: router_z_loss(logits, mask), slow_z),
    "entropy": (lambda logits, index, mask: router_entropy(logits.softmax(-1), mask), slow_entropy),
    "concentration": (
        lambda logits, index, mask: router_concentration(logits.softmax(-1), mask),
        slow_concentration,
    ),
    "information": (lambda logits, index, mask: router_information(logits.softmax(-1), mask), slow_information),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all_tokens", "masked"])
@pytest.mark.parametrize(("loss", "slow"), LOSSES.values(), ids=LOSSES)
def test_loss_and_gradient_equal_reference(loss, slow, masked):
    logits, index, mask = example()
    mask = mask if masked else None
    double = logits.detach().double().requires_grad_()
    found, expected = loss(logits, index, mask), slow(double, index, mask)
    assert found.dim() == 0 and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.double(), double.grad, rtol=1e-4, atol=1e-6)
    if masked:
        assert (logits.grad[~mask] == 0).all()


@pytest.mark.parametrize(("loss", "slow"), LOSSES.values(), ids=LOSSES)
def test_garbage_in_padding_does_not_count(loss, slow):
    """Padding may hold anything, infinities and NaN too."""
    logits, index, mask = example()
    expected = loss(logits, index, mask)
    garbage = logits.detach().clone()
    garbage[~mask] = torch.tensor([float("nan"), float("inf"), -1e30] * (EXPERTS // 3))
    found = loss(garbage, index.masked_fill(~mask[:, None], 0), mask)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("loss", "slow"), LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("case", ["no_tokens", "no_tokens_masked", "all_masked"])
def test_nothing_to_count_is_zero(loss, slow, case):
    count = TOKENS if case == "all_masked" else 0
    mask = None if case == "no_tokens" else torch.zeros(count, dtype=torch.bool)
    logits = torch.randn(count, EXPERTS, requires_grad=True)
    value = loss(logits, torch.zeros(count, SLOTS, dtype=torch.long), mask)
    value.backward()
    assert value == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("masked", [False, True], ids=["all_tokens", "masked"])
def test_counts_and_mean_experts(masked):
    _, index, mask = example()
    mask = mask if masked else None
    tokens = counting(mask)
    flat = [i for t in tokens for i in index[t].tolist() if i < EXPERTS]
    assert expert_counts(index, EXPERTS, mask).tolist() == [flat.count(i) for i in range(EXPERTS)]
    assert experts_per_token(index, EXPERTS, mask).item() == pytest.approx(len(flat) / len(tokens))


@pytest.mark.parametrize("k", [1, 2, 5, EXPERTS])
def test_balance_of_uniform_routing_is_the_mean_number_of_experts(k):
    index = torch.stack([(torch.arange(k) + t) % EXPERTS for t in range(2 * EXPERTS)])
    scores = torch.full((2 * EXPERTS, EXPERTS), 1 / EXPERTS)
    assert load_balancing_loss(scores, index).item() == pytest.approx(k)


def test_balance_is_largest_when_one_expert_takes_all():
    scores = torch.eye(EXPERTS)[[2] * TOKENS]
    assert load_balancing_loss(scores, torch.full((TOKENS, 1), 2)).item() == EXPERTS


def test_balance_has_no_gradient_through_the_counts():
    """f is a count: the gradient is that of Q alone, f_i E / T for each token."""
    logits, index, _ = example()
    scores = logits.softmax(-1).detach().requires_grad_()
    load_balancing_loss(scores, index).backward()
    share = expert_counts(index, EXPERTS) / TOKENS
    torch.testing.assert_close(scores.grad, (EXPERTS * share / TOKENS).expand(TOKENS, -1))


def test_entropy_range():
    assert router_entropy(torch.eye(EXPERTS)).item() == 0
    assert router_entropy(torch.full((TOKENS, 16), 1 / 16)).item() == pytest.approx(math.log(16))
    scores = (torch.randn(500, EXPERTS) * 3).softmax(-1)
    assert 0 < router_entropy(scores) < math.log(EXPERTS)


def test_information_and_concentration_range():
    """One expert for each token and all alike; one expert for all; no choice at all."""
    sure, one = torch.eye(EXPERTS).repeat(3, 1), torch.eye(EXPERTS)[[2] * TOKENS]
    unsure = torch.full((TOKENS, EXPERTS), 1 / EXPERTS)
    assert router_information(sure).item() == pytest.approx(-math.log(EXPERTS))
    assert router_concentration(sure).item() == pytest.approx(math.log(EXPERTS))
    assert router_information(one).item() == 0 and router_concentration(one).item() == 0
    assert router_information(unsure).item() == pytest.approx(0, abs=1e-6)
    assert router_concentration(unsure).item() == pytest.approx(math.log(EXPERTS))


def test_entropy_gradient_is_finite_at_zero_probability():
    """A softmax reaches 0 by underflow when logits are 104 apart, as those of attention sinks are."""
    logits = (torch.eye(3) * 1000).requires_grad_()
    router_entropy(logits.softmax(-1)).backward()
    assert (logits.grad == 0).all()


def test_z_loss_closed_form():
    assert router_z_loss(torch.zeros(TOKENS, EXPERTS)).item() == pytest.approx(math.log(EXPERTS) ** 2)
    assert router_z_loss(torch.full((4, 64), 2.0).bfloat16()).item() == pytest.approx((2 + math.log(64)) ** 2)


# --- in models ---


COEFS = {"balance": 0.05, "z": 0.02, "entropy": 0.03, "information": 0.04, "concentration": 0.01}
ROUTER = TopKRouterConfig(**{f"{name}_coef": value for name, value in COEFS.items()})


@functools.cache
def _stock(name: str):
    return tiny_model(name)


def extended(name: str, router=ROUTER):
    model = copy.deepcopy(_stock(name))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return extend(model, MoeExtension(router=router))


def labelled(model, inputs):
    ids = inputs.get("decoder_input_ids", inputs["input_ids"])
    if "decoder_input_ids" not in inputs:
        ids = ids.masked_fill(inputs["attention_mask"] == 0, -100)
    if type(model).__name__.endswith("ForTokenClassification"):
        ids = ids.clamp(max=1)
    return {**inputs, "labels": ids}


def expected_aux(contexts):
    """The weighted losses of all records, averaged over layers, from the pure functions."""
    total, count = 0.0, 0
    for context in contexts:
        for record in context.records.values():
            count += 1
            mask = context.attention_mask
            mask = None if mask is None or mask.numel() != len(record.index) else mask.reshape(-1).bool()
            total += COEFS["balance"] * load_balancing_loss(record.scores, record.index, mask)
            total += COEFS["z"] * router_z_loss(record.logits, mask)
            total += COEFS["entropy"] * router_entropy(record.scores, mask)
            total += COEFS["information"] * router_information(record.scores, mask)
            total += COEFS["concentration"] * router_concentration(record.scores, mask)
    return total / count


@pytest.mark.parametrize("name", MOE_NAMES)
def test_added_once_in_training_and_never_in_evaluation(name):
    model = extended(name)
    inputs = labelled(model, tiny_inputs(name))
    takes_router_logits = "output_router_logits" in model.moe_forward_parameters

    def loss(**extra):
        torch.manual_seed(0)
        with torch.no_grad(), trace_routing(model) as contexts:
            out = model(**inputs, **extra)
        return out, contexts

    with torch.no_grad():
        options = {"output_router_logits": False} if takes_router_logits else {}
        plain = copy.deepcopy(_stock(name))(**inputs, **options)
    evaluated, _ = loss()
    # the stock model's own loss: the labels' cross entropy and nothing else
    torch.testing.assert_close(evaluated.loss, plain.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(loss(output_router_logits=True)[0].loss, evaluated.loss)

    model.train()
    for base in model.modules():  # gates that behave differently in training would change the cross entropy
        base.training = base is model
    trained, contexts = loss()
    aux = expected_aux(contexts)
    assert aux > 0.05
    torch.testing.assert_close(trained.loss - evaluated.loss, aux.to(trained.loss), rtol=1e-4, atol=2e-5)
    asked, _ = loss(output_router_logits=True)
    assert torch.equal(asked.loss, trained.loss)
    torch.testing.assert_close(asked.aux_loss, aux)
    assert len(asked.router_logits) == sum(len(context.records) for context in contexts)
    as_tuple, _ = loss(return_dict=False)
    assert torch.equal(as_tuple[0], trained.loss)
    model.config.output_router_logits = True
    if getattr(model.config, "text_config", None) is not None:
        model.config.text_config.output_router_logits = True
    configured, _ = loss()
    assert torch.equal(configured.loss, trained.loss)


@pytest.mark.parametrize("name", MOE_NAMES)
def test_padded_generation_with_router_logits_in_the_config(name):
    model = extended(name)
    inputs = tiny_inputs(name)
    if not model.can_generate():
        pytest.skip("no generation")
    model.config.output_router_logits = True
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(**inputs, **options)
    model.config.output_router_logits = False
    assert torch.equal(out, model.generate(**inputs, **options))


def test_no_coefficients_no_aux_loss():
    model = extended("mixtral", TopKRouterConfig()).train()
    inputs = labelled(model, tiny_inputs("mixtral"))
    out = model(**inputs, output_router_logits=True)
    assert out.aux_loss is None
    assert torch.equal(out.loss, model.eval()(**inputs).loss)


def test_coefficients_do_not_depend_on_depth():
    model = extended("mixtral")
    with trace_routing(model) as contexts:
        model(**tiny_inputs("mixtral"))
    total, named = auxiliary_losses(contexts)
    torch.testing.assert_close(total, sum(COEFS[name] * loss for name, loss in named.items()))
    record = next(iter(contexts[0].records.values()))
    for copy_number in range(5):
        contexts[0].records = {str(i): record for i in range(copy_number + 1)}
        torch.testing.assert_close(auxiliary_losses(contexts)[0], expected_aux(contexts))


def test_no_records_no_loss():
    assert auxiliary_losses([]) == (None, {})


def gradient_parts(model, batches, num_items):
    """Sum of losses and gradients over micro-batches, as the trainer accumulates them."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=num_items).loss
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


LINEAR_LOSSES = {
    "z": TopPRouterConfig(balance_coef=0.0, entropy_coef=0.0, z_coef=0.1),
    "entropy": TopPRouterConfig(balance_coef=0.0, entropy_coef=0.1),
}


@pytest.mark.parametrize("split", [[2, 2], [1, 3], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("router", LINEAR_LOSSES.values(), ids=LINEAR_LOSSES)
def test_gradient_accumulation_of_means_over_tokens(router, split):
    """Micro-batches of unequal size add up to the whole batch, in loss and gradient."""
    model = extended("mixtral", router).train()
    ids = tiny_inputs("mixtral", batch=4)["input_ids"][:, 2:]
    whole = {"input_ids": ids, "labels": ids}
    num_items = ids[:, 1:].numel()
    expected_loss, expected = gradient_parts(model, [whole], num_items)
    parts = [{"input_ids": part, "labels": part} for part in ids.split(split)]
    loss, found = gradient_parts(model, parts, num_items)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    reference = model(**whole).loss  # without `num_items_in_batch`: the mean over this batch
    torch.testing.assert_close(expected_loss, reference.detach())


def test_micro_batch_without_labels_adds_nothing():
    model = extended("mixtral").train()
    ids = tiny_inputs("mixtral")["input_ids"]
    out = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=10)
    assert out.loss == 0


def test_labels_given_by_position():
    model = extended("mixtral")
    inputs = labelled(model, tiny_inputs("mixtral"))
    names = model.moe_forward_parameters
    assert names[0] == "input_ids"
    positional = [inputs.get(name) for name in names[: names.index("labels") + 1]]
    with torch.no_grad():
        evaluated = model(*positional).loss
        model.train()
        assert torch.equal(model(*positional).loss, model(**inputs).loss)
        assert model(*positional).loss > evaluated
