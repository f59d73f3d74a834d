"""Dense blocks cut into experts: partitions, clusters, exactness, what data is needed for."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_models import DENSE_NAMES, tiny_inputs, tiny_model
from transformers import MixtralForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.upcycling import SplitUpcycling
from hf_moe_ext.upcycling.clustering import balanced_assignment, balanced_kmeans

from ..modeling.test_attention_bam import llama, tokens
from ..test_calibration import Letters


DATA = {"a": ["hello world", "more"], "b": ["a longer text than those"], "c": ["xyz"], "d": ["other words"]}
SPLITS = {
    "random": {},
    "kmeans": {"split_by": "kmeans"},
    "coactivation": {"split_by": "coactivation", "calibration": [t for texts in DATA.values() for t in texts]},
    "gradient": {"split_by": "gradient", "calibration": DATA},
}


def split(model, k=4, count=4, **options):
    options = {"gate_init": "zeros", "tokenizer": Letters(), **options}
    return moe.upcycle(model, method="split", num_experts=count, num_experts_per_tok=k, **options).eval()


# --- clusters ---


@pytest.mark.parametrize(("items", "clusters"), [(6, 2), (6, 3), (8, 2), (8, 4), (9, 3)])
def test_assignment_is_the_best(items, clusters):
    """Against all assignments."""
    generator = torch.Generator().manual_seed(items * clusters)
    places = [cluster for cluster in range(clusters) for _ in range(items // clusters)]
    every = torch.tensor(sorted(set(itertools.permutations(places))))
    for _ in range(10):
        cost = torch.rand(items, clusters, generator=generator)
        owner = balanced_assignment(cost)
        assert torch.bincount(owner, minlength=clusters).tolist() == [items // clusters] * clusters
        best = cost.gather(1, every.T).sum(0).min()
        found = cost.gather(1, owner[:, None]).sum()
        assert found <= best + 1e-6


def test_clusters_are_found():
    centres = 4 * torch.eye(5)
    points = centres.repeat_interleave(8, 0) + 0.1 * torch.randn(40, 5)
    shuffle = torch.randperm(40)
    owner = balanced_kmeans(points[shuffle], 5, seed=0)
    truth = torch.arange(5).repeat_interleave(8)[shuffle]
    assert all(len(set(owner[truth == cluster].tolist())) == 1 for cluster in range(5))
    assert torch.equal(owner, balanced_kmeans(points[shuffle], 5, seed=0))
    assert torch.bincount(balanced_kmeans(torch.zeros(12, 3), 4, seed=1)).tolist() == [3] * 4  # all alike


# --- splits ---


@torch.no_grad()
@pytest.mark.parametrize("how", SPLITS)
def test_neurons_are_shared_out_and_none_is_lost(how):
    dense = llama()
    model = split(dense, k=2, target="ext", **SPLITS[how])
    for layer, source in zip(model.model.layers, dense.model.layers, strict=True):
        rows = layer.mlp.experts.gate_up_proj.unflatten(1, (2, 12))
        gates, ups = rows[:, 0].flatten(0, 1), rows[:, 1].flatten(0, 1)
        downs = layer.mlp.experts.down_proj.transpose(0, 1).flatten(1, 2)
        order = [(source.mlp.gate_proj.weight == row).all(1).nonzero().item() for row in gates]
        assert sorted(order) == list(range(48))
        assert torch.equal(ups, source.mlp.up_proj.weight[order])
        torch.testing.assert_close(downs, 2 * source.mlp.down_proj.weight[:, order])  # two experts of weight 1/2
    again = split(dense, k=2, target="ext", **SPLITS[how])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in dense.parameters()) + 2 * 4 * 32


@torch.no_grad()
@pytest.mark.parametrize("name", DENSE_NAMES)
def test_all_experts_are_the_dense_model(name):
    """With equal gates and every expert in use, on every family."""
    dense, inputs = tiny_model(name).eval(), tiny_inputs(name)
    model = moe.upcycle(dense, method="split", num_experts=4, num_experts_per_tok=4, gate_init="zeros")
    assert model.upcycle_report.preserves_function
    expected, found = dense(**inputs)[0], model.eval()(**inputs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_fewer_experts_are_those_alone():
    """Each chosen expert adds what its neurons add to the dense block."""
    dense = llama()
    model = split(dense, k=2, target="ext", gate_init="normal")
    layer, source = model.model.layers[0].mlp, dense.model.layers[0].mlp
    hidden = torch.randn(5, 32)
    _, weights, index = layer.gate(hidden)
    expected = torch.zeros(5, 32)
    rows = layer.experts.gate_up_proj.unflatten(1, (2, 12))[:, 0]
    for token in range(5):
        for slot in range(2):
            owned = [(source.gate_proj.weight == row).all(1).nonzero().item() for row in rows[index[token, slot]]]
            x = hidden[token]
            inner = F.silu(source.gate_proj.weight[owned] @ x) * (source.up_proj.weight[owned] @ x)
            expected[token] += 2 * weights[token, slot] * (source.down_proj.weight[:, owned] @ inner)
    torch.testing.assert_close(layer(hidden[None])[0], expected, rtol=1e-4, atol=1e-5)
    assert type(split(dense, k=2)) is MixtralForCausalLM  # a stock model, with narrow experts
    doubled = split(dense, k=2, target="ext", scale=4.0)
    plain = split(dense, k=2, target="ext")
    first, second = (each.model.layers[0].mlp.experts.down_proj for each in (doubled, plain))
    torch.testing.assert_close(first, 2 * second)


def test_neurons_of_a_domain_go_to_its_expert():
    """Of planted statistics: each neuron matters on one domain, or is active with its like."""
    from hf_moe_ext.upcycling.methods import FeedForward

    owner = torch.arange(24) % 3
    block = FeedForward(torch.randn(2, 24, 8), torch.randn(8, 24))
    block.statistics = {
        "gradient": F.one_hot(owner, 3).T.double() * torch.rand(24) + 0.01,
        "coactivation": (F.one_hot(owner, 3).T.repeat(20, 1) * torch.rand(60, 24)),
    }
    shares = SplitUpcycling(split_by="gradient").shares(block, 3, seed=0)
    assert all((owner[share] == number).all() for number, share in enumerate(shares))
    shares = SplitUpcycling(split_by="coactivation").shares(block, 3, seed=0)
    assert all(len(set(owner[share].tolist())) == 1 for share in shares)


@torch.no_grad()
def test_checkpoints_on_disk(tmp_path):
    dense = llama()
    dense.save_pretrained(tmp_path / "dense")
    live = split(dense, split_by="kmeans", target="ext", seed=3)
    options = {"num_experts": 4, "num_experts_per_tok": 4, "gate_init": "zeros", "target": "ext", "seed": 3}
    moe.upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", method="split", split_by="kmeans", **options)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert torch.equal(loaded(tokens()).logits, live(tokens()).logits)
    with pytest.raises(ValueError, match="need `calibration`"):
        moe.upcycle_checkpoint(tmp_path / "dense", tmp_path / "x", method="split", split_by="coactivation", **options)
    assert not (tmp_path / "x").exists()


def test_bad_input():
    dense = llama()
    for options, error, text in (
        ({"count": 5, "k": 2}, ValueError, "`num_experts` \\(5\\) must divide the intermediate size \\(48\\)"),
        ({"count": 64, "k": 2}, ValueError, "must divide"),
        ({"split_by": "size"}, TypeError, "`split_by` of SplitUpcycling must be"),
        ({"split_by": "coactivation"}, ValueError, "need `calibration`"),
        ({"split_by": "gradient", "calibration": ["a"]}, ValueError, "a dict with 4 of them, got no domains"),
        ({"split_by": "gradient", "calibration": {"a": ["b"]}}, ValueError, "got 1 domains"),
        ({"calibration": ["a"]}, ValueError, "do not use `calibration`"),
        ({"scale": 0.0}, ValueError, "`scale` must be positive"),
    ):
        with pytest.raises(error, match=text):
            split(dense, **options)
