"""A shared block beside the shares of a dense block: which neurons stand in it, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import DENSE_NAMES, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.upcycling import FeedForward, SplitUpcycling, load_upcycled, to_dense
from hf_moe_ext.upcycling.split import most_wanted

from ..modeling.test_attention_bam import llama, tokens
from ..test_calibration import Letters, by_hand
from .test_split import DATA


TEXTS = [text for texts in DATA.values() for text in texts]
WAYS = {
    "random": {},
    "coactivation": {"calibration": TEXTS},
    "gradient": {"calibration": DATA},
    "activation": {"calibration": DATA},
}


def split(model, how="random", k=4, **options):
    options = {"gate_init": "zeros", "tokenizer": Letters(), "shared_expert_size": 16, **WAYS[how], **options}
    return moe.upcycle(model, "split", split_by=how, num_experts=4, num_experts_per_tok=k, **options).eval()


def places(rows, source):
    """The neurons of the dense block that rows of its gate belong to."""
    return [(source == row).all(1).nonzero().item() for row in rows]


@torch.no_grad()
@pytest.mark.parametrize("how", WAYS)
def test_shared_and_routed_neurons_are_all_of_them(how):
    dense = llama()
    model = split(dense, how, k=2)
    for layer, source in zip(model.model.layers, dense.model.layers, strict=True):
        gates, shared = layer.mlp.experts.gate_up_proj[:, :8].flatten(0, 1), layer.mlp.moe_shared
        routed = places(gates, source.mlp.gate_proj.weight)
        apart = places(shared.gate_up_proj.weight[:16], source.mlp.gate_proj.weight)
        assert sorted(routed + apart) == list(range(48)) and len(apart) == 16
        assert torch.equal(shared.gate_up_proj.weight[16:], source.mlp.up_proj.weight[apart])
        assert torch.equal(shared.down_proj.weight, source.mlp.down_proj.weight[:, apart])  # weight one, no factor
    assert model.num_parameters() == dense.num_parameters() + 2 * 4 * 32


@torch.no_grad()
@pytest.mark.parametrize("name", DENSE_NAMES)
def test_with_all_experts_it_is_the_dense_model(name):
    """Every family, biases included, and back again."""
    dense, inputs = tiny_model(name).eval(), tiny_inputs(name)
    model = moe.upcycle(
        dense, "split", num_experts=4, num_experts_per_tok=4, gate_init="zeros", shared_expert_size=8
    ).eval()
    assert model.upcycle_report.preserves_function and model.upcycle_report.target == "ext"
    expected = dense(**inputs)[0]
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(to_dense(model)(**inputs)[0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_fewer_experts_leave_the_shared_block_whole():
    """Against the dense block's neurons, one by one: the shared ones, and k / k times those of the chosen experts."""
    dense = llama()
    model = split(dense, k=2, gate_init="normal")
    layer, source = model.model.layers[0].mlp, dense.model.layers[0].mlp
    hidden = torch.randn(5, 32)
    _, weights, index = layer.gate(hidden)
    inner = F.silu(source.gate_proj(hidden)) * source.up_proj(hidden)
    shared = places(layer.moe_shared.gate_up_proj.weight[:16], source.gate_proj.weight)
    factor = torch.zeros(5, 48)
    factor[:, shared] = 1
    for token in range(5):
        for slot in range(2):
            owned = places(layer.experts.gate_up_proj[index[token, slot], :8], source.gate_proj.weight)
            factor[token, owned] = 2 * weights[token, slot]
    torch.testing.assert_close(layer(hidden[None])[0], source.down_proj(inner * factor), rtol=1e-4, atol=1e-5)


def test_neurons_that_most_rows_want_are_found():
    """By votes, and by importance where votes are equal; worked out by hand."""
    importance = torch.tensor(
        [
            [9.0, 8.0, 0.0, 0.0, 1.0, 0.0],
            [0.0, 8.0, 9.0, 0.0, 0.1, 0.0],
            [0.0, 8.0, 0.0, 9.0, 0.1, 0.0],
        ]
    ).double()
    order = most_wanted(importance, 2).tolist()
    assert order[0] == 1  # all three want it
    assert set(order[1:4]) == {0, 2, 3} and order[3] == 0  # one vote each; of 18 in the first row, not of 17.1
    assert order[4:] == [4, 5]
    scaled = importance * torch.tensor([[1e4], [1.0], [1e-4]]).double()  # rows count alike, whatever their size
    assert most_wanted(scaled, 2).tolist() == order


@pytest.mark.parametrize("how", ["gradient", "activation", "coactivation"])
def test_planted_neurons_go_where_they_belong(how):
    """Neurons 0-3 matter everywhere; each of the others to one domain."""
    owner = torch.arange(20) % 3
    block = FeedForward(torch.randn(2, 24, 8), torch.randn(8, 24))
    own = torch.cat([torch.full((3, 4), 0.9), F.one_hot(owner, 3).T.float() * (1 + torch.rand(20))], dim=1) + 0.01
    if how == "coactivation":
        own = own.repeat(20, 1) * (1 + 0.01 * torch.rand(60, 24))
    # A domain wants its own six or seven neurons and the common ones: reach is 5 + 4, of 11.
    block.statistics = {how: own}
    method = SplitUpcycling(split_by=how, shared_expert_size=3)
    assert not set(method.shared_neurons(block, 3, 0).tolist()) - set(range(4))
    method = SplitUpcycling(split_by=how, shared_expert_size=6)
    assert {0, 1, 2, 3} < set(method.shared_neurons(block, 3, 0).tolist())
    left = method.shares(block, 3, 0)
    assert left.shape == (3, 6)
    for share in left:
        assert torch.bincount(owner[share - 4]).max() >= 5


def test_activation_is_the_mean_of_each_domain():
    """The statistics of the split are those of the model run text by text."""
    dense = llama()
    seen = {}
    original = SplitUpcycling.shares

    def spy(self, block, num_experts, seed):
        seen.setdefault("statistics", []).append(block.statistics["activation"])
        return original(self, block, num_experts, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SplitUpcycling, "shares", spy)
        split(dense, "activation", check=False)
    for row, texts in enumerate(DATA.values()):
        for layer, (_, active, _) in enumerate(by_hand(dense, texts).values()):
            expected = active.double().abs().mean(0)
            torch.testing.assert_close(seen["statistics"][layer][row], expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_every_way_of_converting_gives_the_same_tensors(tmp_path):
    dense = llama()
    dense.save_pretrained(tmp_path / "dense")
    live = split(dense, k=2, gate_init="normal", seed=3)
    expected = live(tokens()).logits
    options = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_size": 16, "seed": 3}
    moe.upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", "split", **options)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert torch.equal(streamed(tokens()).logits, expected)
    loaded = load_upcycled(tmp_path / "dense", "split", **options).eval()
    assert torch.equal(loaded(tokens()).logits, expected)
    live.save_pretrained(tmp_path / "live")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "live")(tokens()).logits, expected)
    half = llama().bfloat16()
    model = split(half)
    assert model.upcycle_report.preserves_function and model.dtype == torch.bfloat16


def test_gradients_reach_both_blocks():
    model = split(llama(), k=2, gate_init="normal").train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for layer in model.model.layers:
        for tensor in (layer.mlp.moe_shared.gate_up_proj.weight, layer.mlp.experts.down_proj, layer.mlp.gate.weight):
            assert tensor.grad.abs().sum() > 0


def test_bad_input():
    for how, options, error, text in (
        ("random", {"shared_expert_size": 15}, ValueError, r"must divide.*48 less `shared_expert_size` 15.*1, 3, 11"),
        ("random", {"shared_expert_size": 48}, ValueError, "leaves nothing of the intermediate size"),
        ("random", {"shared_expert_size": -1}, ValueError, "must be non-negative, got -1"),
        ("random", {"target": "stock"}, ValueError, "cannot hold the shared experts"),
        ("random", {"parts": {"shared_experts": {}}}, ValueError, "make shared experts themselves"),
        ("activation", {"calibration": ["a"]}, ValueError, "a dict with 4 of them, got no domains"),
        ("activation", {"calibration": None}, ValueError, "need `calibration`"),
    ):
        with pytest.raises(error, match=text):
            split(llama(), how, **options)
    with pytest.raises(ValueError, match="does not tell which neurons all need"):
        SplitUpcycling(split_by="kmeans", shared_expert_size=4)
