"""Experts as slices by domain: which neurons, both layouts, exactness, batches of mixed experts."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from tiny_models import DENSE_NAMES, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.calibration import NeuronMagnitude, calibrate
from hf_moe_ext.modeling.moe_structure import created_blocks
from hf_moe_ext.upcycling import FeedForward, ReadMeUpcycling
from hf_moe_ext.upcycling.read_me import permanent_neurons, strongest_neurons

from ..modeling.test_attention_bam import llama, tokens
from ..test_calibration import Letters
from .references import dense_token, expert_of, random_block, silu


DATA = {"a": ["hello world", "more"], "b": ["a longer text than those"], "c": ["xyz 123"]}
ROUTER = {"type": "read_me", "dim": 8, "num_heads": 2, "init_std": 0.6}
TEXT_MODELS = [name for name in DENSE_NAMES if name != "vit"]


def made(model, **options):
    options = {"calibration": DATA, "tokenizer": Letters(), "router": ROUTER, **options}
    return moe.upcycle(model, method="read_me", **options).eval()


@functools.cache
def pair(layout: str):
    dense = llama()
    return dense, made(dense, layout=layout)


@torch.no_grad()
def routed(model, **inputs):
    with moe.trace_routing(model) as contexts:
        out = model(**inputs)
    return out.logits, next(iter(contexts[0].records.values())).index


# --- which neurons ---


@pytest.mark.parametrize("width", [1, 5, 12, 23, 24])
def test_strongest_and_permanent_neurons(width):
    """Against sets, with ties."""
    magnitude = torch.randint(0, 6, (3, 24), generator=torch.Generator().manual_seed(width)).double()
    chosen = strongest_neurons(magnitude, width)
    sets = [sorted(range(24), key=lambda i: (-row[i].item(), i))[:width] for row in magnitude]  # noqa: B023
    assert chosen.shape == (3, width) and chosen.tolist() == [sorted(one) for one in sets]
    common, own = permanent_neurons(chosen)
    both = set.intersection(*map(set, sets))
    if len(both) < width:
        assert set(common.tolist()) == both
    for one, rest in zip(sets, own.tolist(), strict=True):
        assert set(rest).isdisjoint(common.tolist()) and set(rest) | set(common.tolist()) == set(one)
    for multiple in (4, 8):
        fewer, more = permanent_neurons(chosen, multiple)
        assert set(fewer.tolist()) <= set(common.tolist()) and len(fewer) + more.shape[1] == width
        assert more.shape[1] % multiple == 0 or -(-own.shape[1] // multiple) * multiple > width


def test_experts_have_the_neurons_of_their_domain():
    """Found again in the dense block, layer by layer, against the calibration pass itself."""
    dense, model = pair("fused")
    seen = NeuronMagnitude()
    calibrate(dense, DATA, [seen], tokenizer=Letters())
    memory = model.model.moe_read_me.neurons
    assert model.model.moe_read_me.keys == ["0", "1"] and memory.shape == (2, 3, 48)
    for number, (layer, source) in enumerate(zip(model.model.layers, dense.model.layers, strict=True)):
        rows = layer.mlp.experts.gate_up_proj.unflatten(1, (2, 24))
        for expert, domain in enumerate(DATA):
            found = [(source.mlp.gate_proj.weight == row).all(1).nonzero().item() for row in rows[expert, 0]]
            expected = seen.means[domain][str(number)].topk(24).indices.sort().values.tolist()
            assert found == expected == memory[number, expert].nonzero().flatten().tolist()
            assert torch.equal(rows[expert, 1], source.mlp.up_proj.weight[found])
            assert torch.equal(layer.mlp.experts.down_proj[expert], source.mlp.down_proj.weight[:, found])
    report = model.upcycle_report
    assert (report.num_experts, report.num_experts_per_tok, report.preserves_function) == (3, 1, False)


@pytest.mark.parametrize("layout", ["fused", "shared"])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True), (True, True)])
def test_slices_equal_the_masked_block(layout, gated, bias):
    """In float64: expert i is the dense block with all neurons outside of M_i switched off."""
    torch.manual_seed(0)
    block = random_block(gated, bias, width=40, hidden=6)
    magnitude = torch.rand(4, 40) + torch.tensor([2.0] * 12 + [0.0] * 28)  # twelve that all have
    block.statistics = {"magnitude": magnitude}
    method = ReadMeUpcycling(layout=layout)
    stack = method.convert(block, 4, seed=0)
    masks = torch.zeros(4, 40, dtype=torch.bool).scatter_(1, magnitude.topk(20).indices, True)
    assert (stack.shared is not None) == (layout == "shared")
    routed_width, shared_width = method.widths(40, 4, block.statistics)
    assert stack.down.shape == (4, 6, routed_width)
    if layout == "shared":
        assert stack.shared.intermediate_size == shared_width and routed_width + shared_width == 20
        assert routed_width == 8  # 20 - 12
    for expert in range(4):
        x = torch.randn(6, dtype=torch.float64)
        found = dense_token(expert_of(stack, expert), x, silu)
        if layout == "shared":
            found = found + dense_token(stack.shared, x, silu)
        masked = FeedForward(block.up, block.down * masks[expert], block.up_bias, block.down_bias)
        torch.testing.assert_close(found, dense_token(masked, x, silu), rtol=0, atol=1e-12)


def test_layers_without_common_neurons():
    """The shared expert is one neuron of zeros; alike experts keep a neuron to themselves."""
    block = random_block(width=12)
    block.statistics = {"magnitude": F.one_hot(torch.arange(12) // 6, 2).T.double()}
    stack = ReadMeUpcycling(layout="shared").convert(block, 2, seed=0)
    assert stack.down.shape[-1] == 6 and (stack.shared.down == 0).all() and stack.shared.down.shape == (5, 1)
    block.statistics = {"magnitude": torch.rand(12).repeat(3, 1)}
    stack = ReadMeUpcycling(layout="shared", slice_width=4).convert(block, 3, seed=0)
    assert stack.down.shape[-1] == 1 and stack.shared.down.shape[-1] == 3


@torch.no_grad()
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_both_layouts_on_every_family(name):
    """They are the same function; with experts as wide as the block, that of the dense model."""
    dense, inputs = tiny_model(name).eval(), tiny_inputs(name)
    fused, shared = (made(dense, layout=layout, check=False)(**inputs)[0] for layout in ("fused", "shared"))
    expected = dense(**inputs)[0]
    torch.testing.assert_close(fused, shared, rtol=1e-4, atol=2e-5)
    assert (fused - expected).abs().max() > 1e-3
    width = made(dense, check=False).config.moe_ext["router"]["dense_width"]
    for layout in ("fused", "shared"):
        model = made(dense, layout=layout, slice_width=width)
        assert model.upcycle_report.preserves_function
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_full_width_is_the_dense_model():
    """One expert with all neurons has the weights of the block, in their order, and weight one. Gate and up are one
    product there, which some processors round in another way than two."""
    dense = llama()
    model = made(dense, slice_width=48, calibration={"all": DATA["a"]})
    for layer, source in zip(model.model.layers, dense.model.layers, strict=True):
        up = torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight])
        assert torch.equal(layer.mlp.experts.gate_up_proj[0], up)
        assert torch.equal(layer.mlp.experts.down_proj[0], source.mlp.down_proj.weight)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(model(tokens()).logits, dense(tokens()).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["fused", "shared"])
def test_mixed_experts_equal_runs_of_one(layout):
    """Each layer, token by token: what a batch of mixed experts gives is what each token gets alone."""
    _, model = pair(layout)
    hidden = torch.randn(1, 14, 32)
    _, index = routed(model, input_ids=tokens())
    assert len(index.unique()) > 1
    for layer in model.model.layers:
        experts = layer.mlp.experts
        together = experts(hidden[0], index, torch.ones(14, 1))
        for token in range(14):
            alone = experts(hidden[0, token : token + 1], index[token : token + 1], torch.ones(1, 1))
            torch.testing.assert_close(together[token], alone[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_model_is_the_masked_dense_model_of_its_routing():
    """End to end: the dense model, in which each token's neurons outside of its expert are switched off."""
    for layout in ("fused", "shared"):
        dense, model = pair(layout)
        found, index = routed(model, input_ids=tokens())
        memory = model.model.moe_read_me.neurons
        handles = []
        for number, layer in enumerate(dense.model.layers):
            mask = memory[number][index[:, 0]].view(*tokens().shape, -1)

            def switch_off(_, args, mask=mask):
                return (args[0] * mask,)

            handles.append(layer.mlp.down_proj.register_forward_pre_hook(switch_off))
        expected = dense(tokens()).logits
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_several_experts_of_a_token():
    """Common neurons count once: by renormalised weights, or by a shared expert."""
    dense = llama()
    with pytest.raises(ValueError, match='`layout="fused"`, 2 experts per token and `weights="one"`'):
        made(dense, num_experts_per_tok=2)
    shared = made(dense, num_experts_per_tok=2, layout="shared")
    fused = made(dense, num_experts_per_tok=2, router={**ROUTER, "weights": "renormalized"})
    assert routed(fused, input_ids=tokens())[1].shape == (14, 2)
    _, index = routed(shared, input_ids=tokens())
    layer, source = shared.model.layers[0].mlp, dense.model.layers[0].mlp
    hidden = torch.randn(14, 32)
    memory = shared.model.moe_read_me.neurons[0]
    inner = F.silu(source.gate_proj(hidden)) * source.up_proj(hidden)
    # The neurons of the shared expert once, those of each routed one once.
    width = layer.moe_shared.down_proj.in_features
    common = memory.all(0).nonzero().flatten()[:width]
    own = memory.clone().float()
    own[:, common] = 0
    counts = own[index].sum(1)
    counts[:, common] = 1
    expected = source.down_proj(inner * counts)
    found = layer.experts(hidden, index, torch.ones(14, 2)) + layer.moe_shared(hidden, layer.experts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- saving, seeds, sizes ---


@pytest.mark.parametrize("layout", ["fused", "shared"])
def test_saves_and_loads_in_the_same_form(layout, tmp_path):
    _, model = pair(layout)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.moe_ext == model.config.moe_ext
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(routed(again, input_ids=tokens())[0], routed(model, input_ids=tokens())[0])


def test_widths_differ_by_layer_and_save_columns():
    dense = llama()
    fused, shared = made(dense), made(dense, layout="shared")
    widths = [
        (block.experts.intermediate_dim, block.moe_shared.down_proj.in_features) for block in created_blocks(shared)
    ]
    assert all(own + common == 24 and own % 8 == 0 for own, common in widths)
    saved = sum(2 * common * 3 * 32 for _, common in widths)  # (N - 1) |R| columns of three matrices
    assert fused.num_parameters() - shared.num_parameters() == saved > 0
    assert moe.describe(fused).active_parameters == moe.describe(shared).active_parameters
    # Half of each block's neurons; the stock gates and the pre-router come on top.
    extra = sum(p.numel() for p in fused.model.moe_read_me.parameters()) + 2 * 3 * 32
    halves = 2 * 3 * 24 * 32
    assert moe.describe(fused).active_parameters == dense.num_parameters() - halves + extra


def test_sizes_of_the_paper():
    """Llama-2-7B in seven domains: 4.6B active of 17.5B, the paper's 4.7B of 17B."""
    config = LlamaConfig(intermediate_size=11008)
    with torch.device("meta"):
        dense = LlamaForCausalLM(config)
    total = sum(p.numel() for p in dense.parameters())
    layers = 3 * 4096 * 11008 * 32
    rest, expert = total - layers, layers // 2
    assert (rest / 1e9, expert / 1e9) == (pytest.approx(2.41, abs=0.01), pytest.approx(2.16, abs=0.01))
    assert (rest + 7 * expert) / 1e9 == pytest.approx(17.6, abs=0.1)


def test_seeds_sources_and_other_routers():
    dense = llama()
    before = copy.deepcopy(dense.state_dict())
    one, two, other = made(dense, seed=3), made(dense, seed=3), made(dense, seed=4)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
    head = "model.moe_read_me.head.weight"
    assert not torch.equal(one.state_dict()[head], other.state_dict()[head])
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    inplace = made(copy.deepcopy(dense), seed=3, inplace=True)
    assert torch.equal(inplace.model.moe_read_me.neurons, one.model.moe_read_me.neurons)
    plain = made(dense, router="top_k")
    assert not hasattr(plain.model, "moe_read_me") and plain.config.moe_ext["router"] == {"type": "top_k"}
    some = made(dense, layers=[1])
    assert some.model.moe_read_me.keys == ["1"] and len(created_blocks(some)) == 1


def test_streaming_without_data(tmp_path):
    """The method runs the model; its router goes with methods that do not, and says what it needs."""
    dense = llama()
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="need `calibration`"):
        moe.upcycle_checkpoint(tmp_path / "dense", tmp_path / "x", method="read_me")
    with pytest.raises(ValueError, match="which is not in memory here"):
        moe.upcycle_checkpoint(tmp_path / "dense", tmp_path / "x", num_experts=4, router=ROUTER)
    assert not (tmp_path / "x").exists()
    from hf_moe_ext.upcycling import load_upcycled

    options = {"num_experts": 4, "num_experts_per_tok": 2, "router": {**ROUTER, "weights": "renormalized"}, "seed": 5}
    live = moe.upcycle(dense, **options).eval()
    loaded = load_upcycled(tmp_path / "dense", **options).eval()
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in live.state_dict().items())
    options["router"]["embedding"] = "random"
    moe.upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", check=False, **options)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").state_dict()
    live = moe.upcycle(dense, **options).state_dict()
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in live.items())


def test_bad_input():
    dense = llama()
    for options, error, text in (
        ({"slice_width": 49}, ValueError, "`slice_width` \\(49\\) exceeds the width of the dense block, 48"),
        ({"slice_width": 0}, ValueError, "`slice_width` must be at least 1"),
        ({"layout": "wide"}, TypeError, "`layout` of ReadMeUpcycling must be"),
        ({"calibration": None}, ValueError, "need `calibration`"),
        ({"calibration": ["a"]}, ValueError, "for each of the 1 experts, got no domains"),
        ({"num_experts": 2}, ValueError, "for each of the 2 experts, got 3 domains"),
        ({"calibration": {"a": ["b"], "c": []}}, ValueError, "the calibration data of `c` has no tokens"),
        ({"layout": "shared", "parts": {"shared_experts": {}}}, ValueError, "make shared experts themselves"),
        ({"router": {**ROUTER, "num_experts_per_tok": 4}}, ValueError, "4 experts per token"),
    ):
        with pytest.raises(error, match=text):
            made(dense, **options)
    with pytest.raises(ValueError, match="which ViTForImageClassification does not take"):
        made(tiny_model("vit"))
