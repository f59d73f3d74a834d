"""Splits, mixtures and JetMoE on real weights: SmolLM2-135M, where each of them has to be the dense model."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import JetMoeForCausalLM, LlamaForCausalLM, MixtralForCausalLM

from hf_moe_ext import upcycle
from hf_moe_ext.modeling.moe_structure import trace_routing
from hf_moe_ext.upcycling import to_dense
from tests.real.test_real_routers import ROUNDING, continuation, inputs, logits, smollm2  # noqa: F401


pytestmark = [pytest.mark.real_data, pytest.mark.slow]

# Weights of the feed-forward experts that sum to 1: copies of one block are that block.
EXACT = {"router": {"type": "top_k", "renormalize": True}, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def dense(smollm2):  # noqa: F811
    return smollm2[0].eval()


@pytest.fixture(scope="module")
def expected(dense, inputs):  # noqa: F811
    return logits(dense, inputs), continuation(dense, inputs)


def assert_equal(model, inputs, expected):  # noqa: F811
    """Logits to the rounding of sums in another order, and the same continuation with a cache."""
    torch.testing.assert_close(logits(model.eval(), inputs), expected[0], **ROUNDING)
    assert continuation(model, inputs) == expected[1]


@pytest.mark.parametrize("split_by", ["random", "kmeans"])
@pytest.mark.parametrize("target", ["stock", "ext"])
def test_all_shares_of_a_split_are_the_block(dense, inputs, expected, split_by, target):  # noqa: F811
    """Shares and gates of zeros: the weights are all 1/E, and the outputs are multiplied by E."""
    options = {"split_by": split_by, "num_experts": 3, "num_experts_per_tok": 3, "gate_init": "zeros"}
    model = upcycle(dense, "split", target=target, check=False, **options)
    assert type(model) is MixtralForCausalLM or target == "ext"
    # As many parameters as before, and a gate in each of 30 layers.
    assert model.num_parameters() == dense.num_parameters() + 30 * 3 * 576
    assert_equal(model, inputs, expected)


def test_some_shares_of_a_split_are_not(dense, inputs, expected):  # noqa: F811
    model = upcycle(dense, "split", num_experts=3, num_experts_per_tok=2, check=False)
    assert (logits(model.eval(), inputs) - expected[0]).abs().max() > 1


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_attention_experts_of_one_model_are_it(dense, inputs, expected, kv):  # noqa: F811
    """For a router that tells the experts apart: gates of all experts sum to 1."""
    model = upcycle([dense, dense], "bam", attention_kv=kv, **EXACT)
    with trace_routing(model) as contexts:
        assert_equal(model, inputs, expected)
    gates = contexts[0].attention.records["attention.0"].weights
    assert gates.shape == (128, 2) and gates[:, 0].std() > 1e-3
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.weight.shape == ((3 if kv == "shared" else 6) * 64, 576)
    assert attention.q_proj.weight.shape == (18 * 64, 576)


@torch.no_grad()
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_attention_experts_of_two_models(dense, inputs, kv):  # noqa: F811
    """The attention of the first layer against those of both sources, one after the other."""
    other = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.model.layers[0].self_attn.parameters():
        parameter.add_(0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    model = upcycle([dense, other], "bam", attention_kv=kv, layers=[0], **EXACT).eval()
    seen = {}
    module = model.model.layers[0].self_attn
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    module.register_forward_hook(lambda _, args, out: seen.update(out=out[0]))
    with trace_routing(model) as contexts:
        model(**inputs, use_cache=False)
    record = contexts[0].attention.records["attention.0"]
    gates = torch.zeros(128, 2).scatter(1, record.index, record.weights).view(2, 64, 2)
    out = seen.pop("out")
    total = torch.zeros_like(out)
    for number, source in enumerate((dense, other)):
        alone = copy.deepcopy(source.model.layers[0].self_attn)
        if kv == "shared":
            for name in ("k_proj", "v_proj"):
                pair = [getattr(each.model.layers[0].self_attn, name).weight for each in (dense, other)]
                getattr(alone, name).weight.copy_(torch.stack(pair).double().mean(0))
        total += gates[..., number, None] * alone(**seen)[0]
    torch.testing.assert_close(out, total, rtol=1e-4, atol=1e-4 * total.abs().max().item())


def test_branch_train_mix_of_one_model_is_it(dense, inputs, expected):  # noqa: F811
    model = upcycle([dense, dense], "btx")
    assert type(model) is MixtralForCausalLM and model.config.num_local_experts == 2
    assert_equal(model, inputs, expected)


def test_jetmoe_of_a_dense_model_is_it(dense, inputs, expected):  # noqa: F811
    """Nine query heads on three heads of keys: three attention experts of three heads, all of them in use.

    The norms of JetMoE add 1e-6 to the variance, those of SmolLM2 1e-5; the dense model is given those of JetMoE.
    """
    with pytest.raises(ValueError, match="`rms_norm_eps` is .*, and JetMoE has 1e-06"):
        upcycle(dense, "jetmoe", check=False)
    config = copy.deepcopy(dense.config)
    config.rms_norm_eps = 1e-6
    other = LlamaForCausalLM(config).eval()
    other.load_state_dict(dense.state_dict())
    other.generation_config = dense.generation_config
    model = upcycle(other, "jetmoe", check=False)
    assert type(model) is JetMoeForCausalLM and model.config.num_local_experts == 3
    assert (logits(other, inputs) - expected[0]).abs().max() > 10 * ROUNDING["atol"]  # it is another model
    assert_equal(model, inputs, (logits(other, inputs), continuation(other, inputs)))


@pytest.mark.parametrize("method", ["sparse", "split"])
def test_there_and_back(dense, inputs, expected, method):  # noqa: F811
    options = {"num_experts_per_tok": 3, "gate_init": "zeros"} if method == "split" else {"num_experts_per_tok": 2}
    model = upcycle(dense, method, num_experts=3, target="ext", layers="every:3", check=False, **options)
    back = to_dense(model)
    assert type(back) is LlamaForCausalLM
    if method == "sparse":
        for name, tensor in dense.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor), name
    assert_equal(back, inputs, expected)
