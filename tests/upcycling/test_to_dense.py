"""Upcycled models as dense models again: exact where they are, refused where not."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DENSE_NAMES, tiny_inputs, tiny_model

import hf_moe_ext as moe
from hf_moe_ext.upcycling import to_dense

from ..modeling.test_attention_bam import llama, tokens


@torch.no_grad()
@pytest.mark.parametrize("name", DENSE_NAMES)
@pytest.mark.parametrize("method", ["sparse", "split"])
def test_there_and_back(name, method):
    dense, inputs = tiny_model(name).eval(), tiny_inputs(name)
    options = {"num_experts": 4, "num_experts_per_tok": 4 if method == "split" else 2, "target": "ext"}
    options["gate_init"] = "zeros" if method == "split" else "normal"
    model = moe.upcycle(dense, method=method, **options).eval()
    back = to_dense(model)
    assert type(back) is type(dense)
    torch.testing.assert_close(back(**inputs)[0], dense(**inputs)[0], rtol=1e-4, atol=1e-4)
    if method == "sparse":
        for key, tensor in dense.state_dict().items():
            torch.testing.assert_close(back.state_dict()[key], tensor, msg=key)
    assert model.state_dict().keys() != back.state_dict().keys()  # the model itself is as before


@torch.no_grad()
def test_shared_experts_and_single_layers():
    dense, ids = llama(), tokens()
    model = moe.upcycle(dense, num_experts=3, parts={"shared_experts": {"init": "dense"}}, layers=[1])
    back = to_dense(model)
    for key, tensor in dense.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key
    assert torch.equal(back(ids).logits, dense(ids).logits)


@torch.no_grad()
def test_what_is_not_exact(tmp_path):
    dense = llama()
    some = moe.upcycle(dense, method="split", num_experts=4, num_experts_per_tok=2, target="ext")
    with pytest.raises(ValueError, match="differs from the experts by"):
        to_dense(some)
    # Put together again, the shares are the dense block all the same, but for the factor of two experts of four.
    back = to_dense(some, allow_inexact=True)
    order = [
        (dense.model.layers[0].mlp.gate_proj.weight == row).all(1).nonzero().item()
        for row in back.model.layers[0].mlp.gate_proj.weight
    ]
    expected = dense.model.layers[0].mlp.down_proj.weight[:, order]
    torch.testing.assert_close(back.model.layers[0].mlp.down_proj.weight, expected * 2 / 4)
    for build, text in (
        (lambda: moe.upcycle(dense, "drop", num_experts=3, target="ext"), "are 48 wide and differ"),
        (lambda: moe.upcycle([dense, llama(1)], "bam"), "declares `attention`"),
        (lambda: moe.upcycle(dense, num_experts=3, parts={"zero_experts": {"zero": 1}}), "declares `zero_experts`"),
        (lambda: dense, "no experts in place of dense blocks"),
        (lambda: moe.upcycle(dense, num_experts=3, target="stock"), "no experts in place of dense blocks"),
    ):
        with pytest.raises(ValueError, match=text):
            to_dense(build())
