"""On a GPU: same tensors as on the CPU, nothing moved elsewhere."""

from __future__ import annotations

import pytest
import torch

from hf_moe_ext.upcycling import load_upcycled, upcycle
from tests.tiny_models import tiny_model


pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("target", ["ext", "stock"])
@pytest.mark.parametrize("method", ["sparse", "granular", "drop"])
def test_seeds_mean_the_same_tensors_as_on_the_cpu(method, target):
    expected = upcycle(tiny_model("llama"), method, num_experts=4, target=target).state_dict()
    model = upcycle(tiny_model("llama").cuda(), method, num_experts=4, target=target)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    for key, tensor in model.state_dict().items():
        # the statistics of redrawn neurons are sums, which round differently
        torch.testing.assert_close(tensor.cpu(), expected[key], rtol=1e-5, atol=1e-6)
    assert model.upcycle_report.preserves_function == (method != "drop")


def test_a_checkpoint_is_converted_on_the_device_it_is_loaded_to(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    model = load_upcycled(tmp_path, num_experts=4, target="ext", device_map="cuda")
    expected = upcycle(tiny_model("llama"), num_experts=4, target="ext").state_dict()
    assert all(torch.equal(tensor.cpu(), expected[key]) for key, tensor in model.state_dict().items())
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
