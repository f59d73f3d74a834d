"""Expert choice against loops over experts in float64; padding; where it may stand."""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from transformers import MixtralForCausalLM

from hf_moe_ext import upcycle
from hf_moe_ext.modeling.configuration_moe_ext import LayerExtension, MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_context import RoutingContext
from hf_moe_ext.modeling.moe_losses import expert_counts
from hf_moe_ext.modeling.moe_router import GateRule
from hf_moe_ext.modeling.moe_structure import auxiliary_losses, route_rows, trace_routing
from hf_moe_ext.modeling.router_expert_choice import ExpertChoiceRouterConfig, pick_tokens
from hf_moe_ext.patching import extend

from .test_routers import EXPERTS, HIDDEN, TOKENS, K, chosen, combine, compare, make_gate, slow_scores, slow_top_k


# The name of the cache among the arguments and outputs of a model; newer versions of Transformers have a shorter one.
CACHE = "cache" if "cache" in inspect.signature(MixtralForCausalLM.forward).parameters else "past_key_values"


def choice_config(**settings) -> ExpertChoiceRouterConfig:
    return ExpertChoiceRouterConfig(allow_non_causal=True, **settings)


def slow_expert_choice(
    hidden, weight, *, capacity_factor=2.0, max_slots=None, score="softmax", renormalize=False, scale=1.0, real=None
):
    """Each expert sorts the tokens by its score and takes the first; then each token looks who took it."""
    real = list(range(len(hidden))) if real is None else real
    scores = [slow_scores(weight @ token, score) for token in hidden]
    capacity = math.ceil(capacity_factor * len(real) / len(weight))
    takers: dict[int, list[int]] = {t: [] for t in range(len(hidden))}
    for expert in range(len(weight)):
        for t in sorted(real, key=lambda t: -scores[t][expert].item())[:capacity]:  # noqa: B023
            takers[t].append(expert)
    rows, sets = [], []
    for t, values in enumerate(scores):
        kept = sorted(takers[t], key=lambda i: -values[i].item())[:max_slots]  # noqa: B023
        total = sum(values[i] for i in kept) if renormalize else 1.0
        zero = torch.zeros((), dtype=torch.float64)
        rows.append(torch.stack([values[i] / total * scale if i in kept else zero for i in range(len(values))]))
        sets.append(kept)
    return torch.stack(rows), sets


SETTINGS = {
    "paper": {},
    "one": {"capacity_factor": 1.0},
    "below_one": {"capacity_factor": 0.4},
    "fraction": {"capacity_factor": 3.3},
    "all": {"capacity_factor": float(EXPERTS)},
    "slots": {"capacity_factor": 4.0, "max_slots": 2},
    "renormalized": {"capacity_factor": 3.0, "renormalize": True},
    "sigmoid": {"score": "sigmoid", "renormalize": True, "scale": 1.5, "max_slots": 3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equals_reference(settings):
    """Choice, weights, and the gradients of input and gate."""
    record = compare(make_gate(choice_config(**settings)), slow_expert_choice, **settings)
    assert record.index.shape == (TOKENS, settings.get("max_slots", EXPERTS))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_with_padding_equals_reference_on_the_tokens_that_count(settings):
    gate = make_gate(choice_config(**settings))
    hidden = torch.randn(4, 7, HIDDEN)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, :3] = mask[3, 2:] = 0
    record = gate.route(hidden.flatten(0, 1), RoutingContext(attention_mask=mask))
    real = mask.flatten().nonzero()[:, 0].tolist()
    weight = gate.weight.detach().double()
    expected, sets = slow_expert_choice(hidden.flatten(0, 1).double(), weight, real=real, **settings)
    assert chosen(record) == sets
    torch.testing.assert_close(combine(record).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capacity_factor", [0.4, 1.0, 2.0, 3.3, 12.0])
@pytest.mark.parametrize("masked", [False, True])
def test_every_expert_has_as_many_tokens(capacity_factor, masked):
    gate = make_gate(choice_config(capacity_factor=capacity_factor))
    mask = torch.rand(3, 20) > 0.3
    context = RoutingContext(attention_mask=mask.long()) if masked else None
    record = gate.route(torch.randn(60, HIDDEN), context)
    total = int(mask.sum()) if masked else 60
    capacity = min(math.ceil(capacity_factor * total / EXPERTS), total)
    assert expert_counts(record.index, EXPERTS).tolist() == [capacity] * EXPERTS
    if masked:
        assert (record.index[~mask.flatten()] == EXPERTS).all()


def test_a_mask_of_ones_is_no_mask():
    """For every count the capacity is the same number, whether it is a shape or a value."""
    for total in (*range(1, 40), 700, 1001, 4097):
        for factor in (0.1, 0.7, 1.0, 1.1, 1.2, 2.0, 2.3, 7.0):
            scores = torch.rand(total, 7)
            ones = torch.ones(total, dtype=torch.bool)
            assert torch.equal(pick_tokens(scores, factor, None), pick_tokens(scores, factor, ones)), (total, factor)


def test_nothing_but_padding():
    gate = make_gate(choice_config())
    record = gate.route(torch.randn(6, HIDDEN), RoutingContext(attention_mask=torch.zeros(2, 3, dtype=torch.long)))
    assert (record.index == EXPERTS).all() and (record.weights == 0).all() and record.scores.isfinite().all()


@pytest.mark.parametrize(
    "rule", [GateRule(), GateRule(renormalize=False), GateRule(score="sigmoid", bias="correction")]
)
def test_limit_is_the_stock_top_k(rule):
    """Where every expert picks every token, and a token keeps its k best."""
    settings = {"capacity_factor": float(EXPERTS), "max_slots": K, "score": None, "renormalize": None}
    bias = torch.randn(EXPERTS) * 0.3 if rule.bias else None
    gate = make_gate(choice_config(**settings), rule=rule, bias=bias)
    options = {"score": rule.score, "renormalize": rule.renormalize}
    compare(gate, slow_top_k, **options, bias=None if bias is None else bias.tolist())


# --- in models ---


def upcycled(name, config=None, method="drop", **options):
    config = config or ExpertChoiceRouterConfig()
    model = upcycle(tiny_model(name), method, num_experts=4, router=config, target="ext", check=False, **options)
    for key, parameter in model.named_parameters():
        if key.endswith("mlp.gate.weight") or key.endswith("gate.weight"):
            parameter.data *= 30
    return model


@pytest.mark.parametrize("name", ["bert", "roberta", "vit"])
def test_encoders(name, tmp_path):
    """Their layers are not causal, so nothing has to be allowed; loads are equal; saving keeps everything."""
    model, inputs = upcycled(name), tiny_inputs(name)
    with trace_routing(model) as contexts, torch.no_grad():
        expected = model(**inputs)[0]
    mask = inputs.get("attention_mask")
    for record in contexts[0].records.values():
        total = len(record.index) if mask is None else int(mask.sum())
        assert expert_counts(record.index, 4).tolist() == [math.ceil(2 * total / 4)] * 4
    assert not model.moe_link.non_causal
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs)[0], expected)


def test_padding_changes_nothing_in_an_encoder():
    model = upcycled("bert", ExpertChoiceRouterConfig(balance_coef=0.01, z_coef=0.01))
    ids = tiny_inputs("bert")["input_ids"][:1]
    padded = torch.cat([ids, torch.randint(4, 79, (1, 5))], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 5, dtype=ids.dtype)], dim=1)
    with trace_routing(model) as contexts, torch.no_grad():
        torch.testing.assert_close(model(padded, attention_mask=mask)[0], model(ids)[0])
        torch.testing.assert_close(model(input_ids=padded, attention_mask=mask)[0], model(ids)[0])
    first, second, _, _ = (auxiliary_losses([context])[1] for context in contexts)
    for name in ("balance", "z"):
        torch.testing.assert_close(first[name], second[name])


def test_all_experts_of_copies_are_the_dense_model():
    """Copies, every token with every expert, weights divided by their sum: nothing has changed."""
    inputs, dense = {"input_ids": tiny_inputs("bert")["input_ids"]}, tiny_model("bert")
    with torch.no_grad():
        expected = dense(**inputs)[0]
    config = ExpertChoiceRouterConfig(capacity_factor=4.0, renormalize=True)
    model = upcycle(dense, num_experts=4, router=config, target="ext", check=False)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-5)


def test_later_tokens_change_earlier_ones():
    """Why causal layers are refused."""
    model, ids = extend(tiny_model("mixtral"), choice_config(capacity_factor=1.0)), tiny_inputs("mixtral")["input_ids"]
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 79
    with torch.no_grad():
        assert not torch.equal(model(ids).logits[:, :-1], model(other).logits[:, :-1])


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_causal_models_are_refused(name):
    model = tiny_model(name)
    kind = type(model)
    with pytest.raises(
        ValueError, match=r"causal attention, and the `expert_choice` router .* `allow_non_causal=True`"
    ):
        extend(model, ExpertChoiceRouterConfig())
    assert type(model) is kind
    with pytest.raises(ValueError, match="causal attention"):
        upcycle(tiny_model("llama"), num_experts=4, router=ExpertChoiceRouterConfig(), target="ext")


def test_a_causal_model_with_it_does_not_generate(tmp_path):
    model, inputs = extend(tiny_model("mixtral"), choice_config()), tiny_inputs("mixtral", batch=1)
    model.save_pretrained(tmp_path)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), type(model).from_pretrained(tmp_path)
    for each in (model, *copies):
        assert each.can_generate()
        with pytest.raises(ValueError, match="has the router `expert_choice` in causal layers"):
            each.generate(**inputs, max_new_tokens=2)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        with pytest.raises(ValueError, match="cannot continue a text token by token"):
            model(inputs["input_ids"][:, -1:], **{CACHE: cache})
    assert not hasattr(type(model.model), "generate")


def test_encoder_of_an_encoder_decoder():
    """There it stands in the encoder, and the model generates; the decoder is refused."""
    inputs = tiny_inputs("t5")
    router = ExpertChoiceRouterConfig(renormalize=True)
    options = {"num_experts": 4, "router": router, "target": "ext", "check": False}
    model = upcycle(tiny_model("t5"), "drop", layers=["encoder.0", "encoder.1"], **options)
    assert not model.moe_link.non_causal
    ids = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "decoder_start_token_id": 0}
    cached, uncached = (model.generate(**ids, **settings, use_cache=cache).tolist() for cache in (True, False))
    assert cached == uncached
    with pytest.raises(ValueError, match='layer "decoder.0" has causal attention'):
        upcycle(tiny_model("t5"), "drop", layers=["decoder.0"], **options)


def test_stock_routers_still_generate():
    model = extend(tiny_model("mixtral"), MoeExtension(router="top_k", layers={"0": None}))
    assert model.generate(**tiny_inputs("mixtral", batch=1), max_new_tokens=2).shape == (1, 9)


def test_one_layer_of_many_is_enough_to_refuse():
    extension = MoeExtension(router="top_k", layers={"1": LayerExtension(router=choice_config())})
    model = extend(tiny_model("mixtral"), extension)
    with pytest.raises(ValueError, match="has the router `expert_choice`"):
        model.generate(**tiny_inputs("mixtral", batch=1), max_new_tokens=2)


def test_row_policies_pick_among_their_own_rows():
    model, inputs = extend(tiny_model("mixtral"), choice_config()), tiny_inputs("mixtral")
    policies = {"wide": {"capacity_factor": 8.0}}
    with route_rows(model, ["wide", "plain"], policies), trace_routing(model) as contexts, torch.no_grad():
        model(**inputs)
    for record in contexts[0].records.values():
        used = (
            expert_counts(record.index.view(2, -1)[0][:, None], 8),
            expert_counts(record.index.view(2, -1)[1][:, None], 8),
        )
        assert used[0].tolist() == [7] * 8 and used[1].tolist() == [2] * 8  # ceil(2 * 5 / 8), 2 of 7 are padding


def test_zero_experts_pick_tokens_too():
    extension = MoeExtension(router=choice_config(), zero_experts=ZeroExpertsConfig(zero=1, copy=1))
    model, inputs = extend(tiny_model("mixtral"), extension), tiny_inputs("mixtral")
    with trace_routing(model) as contexts, torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    for record in contexts[0].records.values():
        counts = expert_counts(record.choices, 10)
        assert counts.tolist() == [math.ceil(2 * 12 / 10)] * 10
        assert (record.index[record.choices == 8] == 8).all() and (record.index[record.choices == 9] == 9).all()


def test_training_lowers_the_loss():
    """Direction: an upcycled encoder learns, and stays balanced without a loss."""
    model, inputs = upcycled("bert").train(), tiny_inputs("bert", batch=8)
    labels = inputs["input_ids"][:, -1] % 2
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with trace_routing(model) as contexts:
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for record in contexts[0].records.values():
            assert len(set(expert_counts(record.index, 4).tolist())) == 1
    assert losses[-1] < 0.2 * losses[0], losses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity_factor": 0.0}, "`capacity_factor` must be positive, got 0.0"),
        ({"capacity_factor": 12.5}, r"`capacity_factor` \(12.5\) exceeds the 12 experts"),
        ({"max_slots": 0}, "`max_slots` must be at least 1, got 0"),
        ({"max_slots": 13}, r"`max_slots` \(13\) exceeds the 12 experts"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_gate(choice_config(**settings))


def test_a_rule_of_its_own_is_refused_where_it_would_be_followed():
    with pytest.raises(ValueError, match="a rule of its own"):
        make_gate(choice_config(score=None), rule=GateRule(score="custom"))
    make_gate(choice_config(), rule=GateRule(score="custom"))
