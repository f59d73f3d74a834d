"""MoEfication: parts of a ReLU block of which a token uses those that are active, against planted activations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.modeling.moe_structure import created_blocks
from hf_moe_ext.upcycling import FeedForward, MoEficationUpcycling, load_upcycled, upcycle_checkpoint
from hf_moe_ext.upcycling.moefication import train_predictor

from ..test_calibration import Letters


TEXTS = ["hello world", "a longer text than that", "xyz", "other words", "more of the same kind"]
HIDDEN, WIDTH, EXPERTS, ACTIVE = 24, 48, 6, 2


def ids(batch=2, length=9, seed=3):
    return torch.randint(4, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def relu_model(name, activation="relu"):
    """A tiny model whose activation is zero for negative input."""
    dense = copy.deepcopy(tiny_model(name))
    if name == "opt":
        for layer in dense.model.decoder.layers:
            assert layer.activation_fn(torch.tensor(-1.0)) == 0 and layer.fc2.bias is not None
            nn.init.normal_(layer.fc1.bias, std=0.2)
            nn.init.normal_(layer.fc2.bias)
        return dense.eval()
    values = dense.config.to_dict() | {"hidden_act": activation}
    made = type(dense)(type(dense.config)(**values))
    made.load_state_dict(dense.state_dict())
    return made.eval()


FAMILIES = [("opt", "relu"), ("gpt_neox", "relu"), ("llama", "relu"), ("nemotron", "relu2"), ("arcee", "relu2")]


def moefy(dense, k=4, count=4, **options):
    options = {"num_experts": count, "num_experts_per_tok": k, **options}
    return moe.upcycle(dense, "moefication", tokenizer=Letters(), **options).eval()


# --- all experts are the dense block ---


@torch.no_grad()
@pytest.mark.parametrize("predictor", ["centroid", "mlp"])
@pytest.mark.parametrize(("name", "activation"), FAMILIES)
def test_with_all_experts_it_is_the_dense_model(name, activation, predictor):
    """Biases of the output count once; any gate will do, since all weights are one."""
    dense = relu_model(name, activation)
    model = moefy(dense, predictor=predictor, **({"calibration": TEXTS} if predictor == "mlp" else {}))
    assert model.upcycle_report.preserves_function
    inputs = tiny_inputs(name)
    torch.testing.assert_close(model(**inputs)[0], dense(**inputs)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_fewer_experts_are_the_block_without_the_others(name):
    """Against the dense block with the other neurons set to zero, and its bias, which stays whole."""
    dense = relu_model(name)
    model = moefy(dense, k=2)
    block = created_blocks(model)[1]
    if name == "opt":
        source = dense.model.decoder.layers[1]
        up, down, inner = source.fc1.weight, source.fc2, lambda x: source.fc1(x).relu()
        rows = block.experts.up_proj
    else:
        source = dense.model.layers[1].mlp
        up, down = source.gate_proj.weight, source.down_proj
        inner, rows = (lambda x: source.gate_proj(x).relu() * source.up_proj(x)), block.experts.gate_up_proj[:, :12]
    hidden = torch.randn(7, 32)
    owned = torch.tensor([[(up == row).all(1).nonzero().item() for row in expert] for expert in rows])
    # By the cosine of the token and the mean direction of an expert's input weights.
    centroids = F.normalize(up, dim=1)[owned].mean(1)
    chosen = F.cosine_similarity(hidden[:, None], centroids[None], dim=2).topk(2).indices
    keep = torch.zeros(7, 48)
    for token in range(7):
        keep[token, owned[chosen[token]].flatten()] = 1
    torch.testing.assert_close(block(hidden[None])[0], down(inner(hidden) * keep), rtol=1e-4, atol=1e-5)


# --- planted activations ---


def planted(seed=0):
    """A ReLU block with groups of neurons that see one direction each, and tokens made of few directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0][:EXPERTS]
    owner = torch.randperm(WIDTH, generator=generator) % EXPERTS
    size = 0.5 + torch.rand(WIDTH, 1, generator=generator)
    up = size * (directions[owner] + 0.05 * torch.randn(WIDTH, HIDDEN, generator=generator))
    block = FeedForward(up[None], torch.randn(HIDDEN, WIDTH, generator=generator))
    present = torch.rand(400, EXPERTS, generator=generator).topk(ACTIVE).indices
    signs = torch.full((400, EXPERTS), -1.0).scatter(1, present, 1.0)  # the other directions are away from the token
    tokens = (signs * (0.5 + torch.rand(400, EXPERTS, generator=generator))) @ directions
    return block, owner, tokens, present


def output(block, tokens):
    return block.forward(tokens, F.relu)


def choose(stack, tokens, k):
    """(T, k) the experts, as the router chooses them."""
    logits = F.normalize(tokens, dim=1) @ stack.router["weight"].T
    if "moe_mix_weight" in stack.router:
        logits = logits.tanh() @ stack.router["moe_mix_weight"].T
    return logits.topk(k).indices


def sparse_output(stack, tokens, chosen):
    parts = torch.stack([output(FeedForward(u, d), tokens) for u, d in zip(stack.up, stack.down, strict=True)], 1)
    return parts.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[1])).sum(1)


@pytest.mark.parametrize("predictor", ["centroid", "mlp"])
def test_planted_experts_are_found_and_the_error_shrinks_with_k(predictor):
    block, owner, tokens, present = planted()
    neurons = F.relu(tokens @ block.up[0].T)
    block.statistics = {"hidden": tokens[:300], "coactivation": neurons[:300]}
    method = MoEficationUpcycling(predictor=predictor).prepared(EXPERTS, ACTIVE)
    stack = method.convert(block, EXPERTS, seed=0)
    numbers = [next(e for e in range(WIDTH) if torch.equal(block.up[0, e], row)) for row in stack.up[:, 0, 0]]
    group = owner[numbers]  # which planted group each expert is
    assert sorted(group.tolist()) == list(range(EXPERTS))
    unseen, found = tokens[300:], choose(stack, tokens[300:], ACTIVE)
    assert torch.equal(group[found].sort(1).values, present[300:].sort(1).values)
    expected = output(block, unseen)
    errors = []
    for k in range(1, EXPERTS + 1):
        difference = sparse_output(stack, unseen, choose(stack, unseen, k)) - expected
        errors.append(float(difference.norm() / expected.norm()))
    assert errors[0] > 0.4 and errors[ACTIVE - 1] < 0.05 and errors[-1] < 1e-5
    assert all(later <= earlier + 1e-6 for earlier, later in zip(errors, errors[1:], strict=False))
    share = neurons[300:, :].gather(
        1, torch.stack([(owner == g).nonzero().flatten() for g in group])[found].flatten(1)
    )
    assert float(share.sum() / neurons[300:].sum()) > 0.95  # of the activation; a random choice keeps ACTIVE / EXPERTS


def test_the_trained_predictor_sees_what_centroids_do_not():
    """Experts whose neurons differ in size, of which a cosine knows nothing: on unseen tokens, the network makes up
    for most of what is lost against a choice that knows the activations."""
    generator = torch.Generator().manual_seed(1)
    directions, sizes = torch.randn(8, 1, 16, generator=generator), torch.linspace(0.2, 3, 8)[:, None, None]
    up = (sizes * (directions + 0.5 * torch.randn(8, 8, 16, generator=generator))).flatten(0, 1)
    tokens = torch.randn(6000, 16, generator=generator)
    activity = F.relu(tokens @ up.T).unflatten(1, (8, 8)).sum(2)
    centroids = F.normalize(F.normalize(up, dim=1).unflatten(0, (8, 8)).mean(1), dim=1)
    options = {"epochs": 30, "learning_rate": 0.01, "seed": 0}
    first, second = train_predictor(tokens[:5000], activity[:5000], centroids, **options)
    again = train_predictor(tokens[:5000], activity[:5000], centroids, **options)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    unseen, mass = F.normalize(tokens[5000:], dim=1), activity[5000:]

    def kept(logits, k):
        return float(mass.gather(1, logits.topk(k).indices).sum() / mass.sum())

    for k in (1, 2, 3):
        plain, best = kept(unseen @ centroids.T, k), kept(mass, k)
        trained = kept((unseen @ first.T).tanh() @ second.T, k)
        assert plain > k / 8 and best - trained < 0.5 * (best - plain)


def test_one_step_of_the_predictor_by_hand():
    """The loss of the first step, token by token: Adam's first step is the sign of its gradient."""
    tokens, activity = torch.randn(5, 4), torch.rand(5, 3)
    centroids = F.normalize(torch.randn(3, 4), dim=1)
    first, second = centroids.double().requires_grad_(), torch.eye(3, dtype=torch.float64).requires_grad_()
    total = 0.0
    for token, active in zip(tokens.double(), activity.double(), strict=True):
        logits = second @ (first @ (token / token.norm())).tanh()
        wanted, chance = active / active.max(), logits.sigmoid()
        total = total - (wanted * chance.log() + (1 - wanted) * (1 - chance).log()).sum()
    total.backward()
    found = train_predictor(tokens, activity, centroids, epochs=1, learning_rate=0.01, seed=0)
    for new, old in zip(found, (first, second), strict=True):
        torch.testing.assert_close(new.double(), old.detach() - 0.01 * old.grad.sign(), rtol=0, atol=1e-5)


# --- the router ---


def test_weights_are_one_and_the_gate_has_no_gradient():
    model = moefy(relu_model("llama"), k=2).train()
    with moe.trace_routing(model) as contexts:
        model(input_ids=ids(), labels=ids()).loss.backward()
    for record in contexts[0].records.values():
        assert (record.weights == 1).all() and record.index.shape == (18, 2)
    for block in created_blocks(model):
        assert block.gate.weight.grad is None and block.experts.down_proj.grad.abs().sum() > 0


def test_the_choice_does_not_depend_on_the_size_of_a_token():
    block = created_blocks(moefy(relu_model("llama"), k=2, predictor="mlp", calibration=TEXTS))[0]
    hidden = torch.randn(9, 32)
    assert torch.equal(block.gate(hidden)[2], block.gate(1000 * hidden)[2])


@torch.no_grad()
def test_it_is_saved_with_its_predictor(tmp_path):
    model = moefy(relu_model("opt"), k=2, predictor="mlp", calibration=TEXTS)
    mix = [block.gate.moe_mix_weight for block in created_blocks(model)]
    assert all(not torch.equal(weight, torch.eye(4)) for weight in mix)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert model.upcycle_report.gate_init == "trained predictor"
    assert model.upcycle_report.method_options == {"predictor": "mlp"}
    half = moefy(relu_model("opt").bfloat16(), k=4, predictor="mlp", calibration=TEXTS)
    assert half.upcycle_report.preserves_function
    with_cache = model.generate(ids()[:, :4], max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(with_cache, model.generate(ids()[:, :4], max_new_tokens=5, do_sample=False, use_cache=False))


@torch.no_grad()
def test_padding_on_the_left_changes_nothing():
    model = moefy(relu_model("llama"), k=2)
    plain = model(ids(1)).logits
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids(1)], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), torch.ones_like(ids(1))], dim=1)
    found = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(found[:, 3:], plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_way_of_converting_gives_the_same_tensors(tmp_path):
    dense = relu_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    expected = moefy(dense, k=2, seed=3)(ids()).logits
    options = {"num_experts": 4, "num_experts_per_tok": 2, "seed": 3}
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", "moefication", **options)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "moe")(ids()).logits, expected)
    assert torch.equal(load_upcycled(tmp_path / "dense", "moefication", **options).eval()(ids()).logits, expected)


@pytest.mark.parametrize("split_by", ["coactivation", "random"])
def test_other_splits(split_by):
    data = {"calibration": TEXTS} if split_by == "coactivation" else {}
    assert moefy(relu_model("opt"), split_by=split_by, **data).upcycle_report.preserves_function


def test_bad_input():
    dense = relu_model("llama")
    for options, error, text in (
        ({"count": 5}, ValueError, r"`num_experts` \(5\) must divide the intermediate size \(48\)"),
        ({"gate_init": "zeros"}, ValueError, "makes router and gates itself; leave `gate_init` out"),
        ({"router": "top_k"}, ValueError, "leave `router` out"),
        ({"gate_noise": 0.1}, ValueError, "leave `gate_noise` out"),
        ({"predictor": "mlp"}, ValueError, "need `calibration`"),
        ({"calibration": TEXTS}, ValueError, "do not use `calibration`"),
        ({"epochs": 0}, ValueError, "`epochs` must be at least 1, got 0"),
        ({"learning_rate": 0.0}, ValueError, "`learning_rate` must be positive"),
        ({"split_by": "gradient"}, TypeError, "`split_by` of MoEficationUpcycling must be"),
        ({"experts_per_token": 3}, TypeError, "unknown option `experts_per_token`"),
    ):
        with pytest.raises(error, match=text):
            moefy(dense, **options)
    with pytest.raises(ValueError, match='layer "0" .*is not zero for negative input.*`method="split"`'):
        moefy(tiny_model("llama"))
    with pytest.raises(ValueError, match="exceeds the 8 experts"):
        moe.extend(copy.deepcopy(tiny_model("mixtral")), {"router": {"type": "moefication", "num_experts_per_tok": 9}})
    with pytest.raises(ValueError, match="zero-computation experts are none"):
        moe.extend(
            copy.deepcopy(tiny_model("mixtral")),
            {"router": "moefication", "zero_experts": {"zero": 1, "init": "copy"}},
        )
