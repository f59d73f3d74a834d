"""Shared experts beside the routed ones: what they compute on every family, and how they start."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import DENSE_NAMES, MOE_NAMES, tiny_inputs, tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import hf_moe_ext as moe
from hf_moe_ext import MoeExtension, SharedExpertsConfig, describe, extend, restore, upcycle, upcycle_checkpoint
from hf_moe_ext.modeling.modeling_moe_ext import extended_class, extended_config_class
from hf_moe_ext.modeling.moe_experts import MoeExtBlock
from hf_moe_ext.modeling.moe_families import get_by_path, get_family, iter_layers
from hf_moe_ext.modeling.moe_shared_experts import SharedExperts
from hf_moe_ext.modeling.moe_structure import config_value, find_moe_spec
from hf_moe_ext.trainers.freezing import train_only_moe
from hf_moe_ext.upcycling import load_upcycled
from tests.trainers.common import arguments, rows, sgd, snapshot, stock_mixtral


# The layer itself holds router and experts there; tested by the refusal.
NAMES = [name for name in MOE_NAMES if name != "gemma4"]
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}
BEST_KNOWN = ("mixtral", "deepseek_v3", "qwen2_moe")


@functools.cache
def _stock(name: str):
    return tiny_model(name)


def stock(name="mixtral"):
    return copy.deepcopy(_stock(name))


def with_shared(name="mixtral", **settings):
    return extend(stock(name), MoeExtension(shared_experts=SharedExpertsConfig(**settings)))


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs)[0]


def shared_blocks(model) -> list[SharedExperts]:
    return [module for module in model.modules() if isinstance(module, SharedExperts)]


@torch.no_grad()
def fill(model):
    """Give shared experts something to say."""
    for block in shared_blocks(model):
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return model


def moe_blocks(model, name):
    """(block, experts) of the MoE layers of a family."""
    family = get_family(name)
    layers = [layer for _, layer, _ in iter_layers(model, family) if find_moe_spec(layer, family) is not None]
    blocks = [get_by_path(layer, family.moe.block) for layer in layers]
    return [(block, get_by_path(block, family.moe.experts)) for block in blocks]


# --- on every family ---


@pytest.mark.parametrize("name", NAMES)
def test_starts_as_the_stock_model_and_restores(name):
    model, inputs = stock(name), tiny_inputs(name)
    expected, keys = logits(model, inputs), list(model.state_dict())
    extend(model, MoeExtension(shared_experts=SharedExpertsConfig()))
    assert len(shared_blocks(model)) == len(moe_blocks(model, name))
    found = logits(model, inputs)
    if name in BEST_KNOWN:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, **ROUNDING)
    assert (logits(fill(model), inputs) - expected).abs().max() > 1e-3
    restore(model)
    assert list(model.state_dict()) == keys and torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("name", NAMES)
def test_adds_its_output_to_that_of_the_block(name):
    model, reference, inputs = fill(with_shared(name)), stock(name), tiny_inputs(name)
    block, plain = moe_blocks(model, name)[0][0], moe_blocks(reference, name)[0][0]
    seen = {}
    block.register_forward_hook(lambda m, args, out: seen.update(hidden=args[0], whole=out))
    block.moe_shared.register_forward_hook(lambda m, args, out: seen.update(shared=out))
    plain.register_forward_hook(lambda m, args, out: seen.update(alone=out))
    logits(model, inputs), logits(reference, inputs)
    whole, alone = (out[0] if isinstance(out, tuple) else out for out in (seen["whole"], seen["alone"]))
    torch.testing.assert_close(whole, alone + seen["shared"].reshape(alone.shape), **ROUNDING)
    if isinstance(seen["alone"], tuple):
        torch.testing.assert_close(seen["whole"][1], seen["alone"][1], **ROUNDING)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_computes_what_a_routed_expert_with_its_weights_computes(name):
    """Activation, gating and width are those of the family's experts."""
    family = get_family(name)
    model = with_shared(name)
    block, experts = moe_blocks(model, name)[0]
    shared, hidden = block.moe_shared, torch.randn(5, 32)
    up = getattr(shared, shared.up_name).weight
    width = config_value(
        next(base for _, _, base in iter_layers(model, family)).config, family.moe.intermediate_size, 0
    )
    assert shared.down_proj.weight.shape == (32, width)
    assert up.shape == (width if shared.up_name == "up_proj" else 2 * width, 32)
    up.normal_(std=0.5), shared.down_proj.weight.normal_()
    if not hasattr(experts, "_apply_gate") or name == "muse_spark":
        # Blocks that compute their experts themselves, or in another width: gated by the activation they have.
        first, second = (hidden @ up.T).chunk(2, dim=-1)
        expected = (F.relu if name == "switch_transformers" else F.silu)(first) * second @ shared.down_proj.weight.T
    else:
        stacked = experts.gate_up_proj if getattr(experts, "has_gate", True) else experts.up_proj
        turn = (lambda w: w.T) if getattr(experts, "is_transposed", False) else (lambda w: w)
        stacked[0], experts.down_proj[0] = turn(up), turn(shared.down_proj.weight)
        for bias in ("gate_up_proj_bias", "down_proj_bias"):
            if hasattr(experts, bias):
                getattr(experts, bias)[0] = 0.0
        expected = experts(hidden, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))
    torch.testing.assert_close(shared(hidden, experts), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(name, tmp_path):
    """No conversion of a stock checkpoint takes its tensors for those of routed or stock shared experts."""
    model, inputs = fill(with_shared(name)), tiny_inputs(name)
    model.save_pretrained(tmp_path)
    try:
        stock(name).save_pretrained(tmp_path / "stock")
        again = type(_stock(name)).from_pretrained(tmp_path / "stock").eval()
        if not torch.equal(logits(again, inputs), logits(_stock(name), inputs)):
            raise KeyError
    except (KeyError, RuntimeError):
        pytest.skip("the stock model itself does not survive saving and loading in this version of transformers")
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for mine, loaded in zip(shared_blocks(model), shared_blocks(again), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(logits(again.eval(), inputs), logits(model, inputs))


@pytest.mark.parametrize("name", BEST_KNOWN)
def test_a_stock_checkpoint_loads_with_shared_experts_that_add_nothing(name, tmp_path, poison_memory):
    model, inputs = stock(name), tiny_inputs(name)
    model.save_pretrained(tmp_path)
    config = copy.deepcopy(model.config)
    config.__class__ = extended_config_class(type(config))
    config.moe_ext = MoeExtension(shared_experts=SharedExpertsConfig()).to_dict()
    loaded = extended_class(type(model)).from_pretrained(tmp_path, config=config).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    for block in shared_blocks(loaded):
        up = getattr(block, block.up_name).weight
        assert up.isfinite().all() and 0.5 < up.std() / loaded.config.initializer_range < 1.5


# --- gradients and training ---


def gradients(model, inputs):
    model.train()
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", BEST_KNOWN)
def test_gradients(name):
    """At first only the down projection has one; then all do, also recomputed under checkpointing."""
    model, inputs = with_shared(name), tiny_inputs(name)
    down, up = (n for n, _ in model.named_parameters() if n.endswith("moe_shared.down_proj.weight")), []
    down = list(down)
    up = [n.replace("down_proj", "gate_up_proj") for n in down]
    first = gradients(model, inputs)
    assert all(first[n].abs().sum() > 0 for n in down) and all((first[n] == 0).all() for n in up)
    plain = gradients(fill(model), inputs)
    assert all(plain[n].abs().sum() > 0 for n in (*down, *up))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    for key, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, plain[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_full_graph_compile_equals_eager():
    model, inputs = fill(with_shared()), tiny_inputs("mixtral")
    expected = gradients(model, inputs)
    torch._dynamo.reset()
    found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{key}"], gradient, rtol=1e-4, atol=1e-5)


def test_bfloat16_and_device_map(tmp_path):
    model, inputs = fill(with_shared()).bfloat16(), tiny_inputs("mixtral")
    out = logits(model, inputs)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    model.save_pretrained(tmp_path)
    # Rotary frequencies stay in float32 when a model is loaded.
    plain = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    again = type(model).from_pretrained(tmp_path, device_map="auto", dtype=torch.bfloat16)
    assert torch.equal(logits(again, inputs), logits(plain, inputs))
    assert torch.equal(logits(plain.bfloat16(), inputs), out)


def test_train_only_moe_trains_them(tmp_path):
    model = extend(stock_mixtral(), MoeExtension(router="top_k", shared_experts=SharedExpertsConfig()))
    train_only_moe(model)
    before = snapshot(model)
    options = sgd(max_steps=2, learning_rate=0.1)
    trainer = moe.MoETrainer(model=model, args=arguments(tmp_path, **options), train_dataset=rows([9, 7, 9, 5]))
    trainer.train()
    changed = {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
    assert any("moe_shared.down_proj" in name for name in changed)
    assert any("moe_shared.gate_up_proj" in name for name in changed)
    assert all(".mlp." in name for name in changed)


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")
def test_adapters_on_the_routed_experts():
    """PEFT wraps the experts, whose gating the shared ones use."""
    model, inputs = fill(with_shared()), tiny_inputs("mixtral")
    expected = logits(model, inputs)
    config = LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"], r=2, lora_dropout=0.0)
    wrapped = get_peft_model(model, config)
    assert any(hasattr(experts, "base_layer") for _, experts in moe_blocks(model, "mixtral"))
    torch.testing.assert_close(logits(wrapped, inputs), expected, **ROUNDING)


def test_width_and_description():
    plain, wide = describe(stock()), describe(with_shared(intermediate_size=20))
    assert wide.parameters - plain.parameters == 3 * (3 * 20 * 32)
    assert wide.active_parameters - plain.active_parameters == 3 * (3 * 20 * 32)
    assert with_shared(intermediate_size=20).model.layers[0].mlp.moe_shared.down_proj.weight.shape == (32, 20)


# --- upcycling ---


def dense_part(**settings):
    return {"shared_experts": {"init": "dense", **settings}}


@pytest.mark.parametrize("init", ["zero", "dense"])
@pytest.mark.parametrize("name", DENSE_NAMES)
def test_upcycled_model_computes_the_dense_function(name, init):
    dense, inputs = stock(name), tiny_inputs(name)
    expected = logits(dense, inputs)
    model = upcycle(dense, num_experts=3, parts={"shared_experts": {"init": init}})
    torch.testing.assert_close(logits(model, inputs), expected, **ROUNDING)
    assert model.upcycle_report.preserves_function and model.upcycle_report.target == "ext"
    assert len(shared_blocks(model)) == len(model.upcycle_report.layers)
    routed = [t for n, t in model.named_parameters() if n.endswith(("experts.down_proj", "experts.down_proj_bias"))]
    assert routed and all((tensor == 0).all() == (init == "dense") for tensor in routed if tensor.dim() == 3)
    if init == "dense":  # whatever the routed experts are given, they add nothing
        for module in model.modules():
            if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
                module.gate_up_proj.data.normal_()
        torch.testing.assert_close(logits(model, inputs), expected, **ROUNDING)


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_mixed_with_copies_it_is_the_dense_model(name):
    """DeepSpeed-MoE: `c_0 MoE(x) + c_1 MLP(x)` with `c = softmax(W x + b)`, and both 1/2 where W and b are 0."""
    dense, inputs = stock(name), tiny_inputs(name)
    expected = logits(dense, inputs)
    model = upcycle(dense, num_experts=3, num_experts_per_tok=1, parts=dense_part(combine="mix"))
    torch.testing.assert_close(logits(model, inputs), expected, **ROUNDING)
    assert model.upcycle_report.preserves_function
    routed = [t for n, t in model.named_parameters() if n.endswith("experts.down_proj") and t.dim() == 3]
    assert routed and all(tensor.any() for tensor in routed)


@torch.no_grad()
def mixed_model():
    model = upcycle(stock("llama"), num_experts=3, num_experts_per_tok=2, parts=dense_part(combine="mix"), check=False)
    for layer in model.model.layers:
        layer.mlp.moe_shared.mix.weight.normal_()
        layer.mlp.moe_shared.mix.bias.normal_()
        layer.mlp.moe_shared.down_proj.weight.normal_(std=0.3)
        layer.mlp.experts.down_proj.normal_(std=0.3)
    return model


def test_a_mixture_is_that_of_the_equation(tmp_path):
    """Token by token; both branches and the weights learn, the coefficients sum to 1; saved and loaded."""
    model, inputs = mixed_model(), tiny_inputs("llama")
    block, seen = model.model.layers[0].mlp, {}
    block.register_forward_hook(lambda m, args, out: seen.update(hidden=args[0], whole=out))
    block.moe_shared.register_forward_hook(lambda m, args, out: seen.update(shared=out))
    found = logits(model, inputs)
    routed = MoeExtBlock.forward(block, seen["hidden"])
    for row in range(len(seen["hidden"])):
        for place in range(seen["hidden"].shape[1]):
            x = seen["hidden"][row, place].double()
            mix = block.moe_shared.mix
            c = (mix.weight.double() @ x + mix.bias.double()).softmax(-1)
            assert c.sum().item() == pytest.approx(1)
            expected = c[0] * routed[row, place].double() + c[1] * seen["shared"].reshape(routed.shape)[row, place]
            torch.testing.assert_close(seen["whole"][row, place].double(), expected, atol=1e-5, rtol=1e-5)
    ids = inputs["input_ids"]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    shared = block.moe_shared
    learning = (
        shared.mix.weight,
        shared.mix.bias,
        shared.down_proj.weight,
        block.experts.down_proj,
        block.gate.weight,
    )
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in learning)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(loaded, inputs), found)


def test_a_mixture_has_to_start_somewhere():
    with pytest.raises(ValueError, match='`combine="mix"` gives the routed experts half of the weight at first'):
        SharedExpertsConfig(combine="mix")


PARTS = {
    "zero": {"shared_experts": {}},
    "dense": dense_part(),
    "mix": dense_part(combine="mix"),
    "with_momentum": {"shared_experts": {"intermediate_size": 8}, "momentum": {"warmup_steps": 4}},
    "routed_momentum": {"momentum": {"decay": 0.4, "scope": "routed"}},
    "zero_experts": {"zero_experts": {"zero": 1, "copy": 1, "constant": 1}},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_all_ways_of_upcycling_give_the_same_tensors(name, parts, tmp_path):
    dense = stock(name)
    dense.save_pretrained(tmp_path / "dense")
    live = upcycle(dense, num_experts=3, parts=parts, seed=5, check=False)
    written = upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", num_experts=3, parts=parts, seed=5)
    streamed = type(live).from_pretrained(tmp_path / "moe")
    loaded = load_upcycled(tmp_path / "dense", num_experts=3, parts=parts, seed=5)
    expected = live.state_dict()
    for other in (streamed, loaded):
        found = other.state_dict()
        assert found.keys() == expected.keys() and other.config.moe_ext == live.config.moe_ext
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert written.parts == live.upcycle_report.parts != {}
    again = type(live).from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    assert torch.equal(logits(again, tiny_inputs(name)), logits(live.eval(), tiny_inputs(name)))


def test_checkpoint_of_mixed_precision(tmp_path):
    """The copy of a dense block has the precision of its source."""
    from safetensors.torch import load_file

    dense = stock("llama").bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", num_experts=3, parts=dense_part(), dtype=torch.float32)
    written = load_file(tmp_path / "moe" / "model.safetensors")
    copied = {name: tensor for name, tensor in written.items() if "moe_shared" in name}
    assert len(copied) == 6 and all(tensor.dtype == torch.float32 for tensor in copied.values())


def test_shared_experts_of_a_part_of_the_layers_and_of_slices():
    dense, inputs = stock("llama"), tiny_inputs("llama")
    model = upcycle(
        dense, "granular", granularity=4, num_experts=2, layers=[0, 2], parts=dense_part(), num_experts_per_tok=1
    )
    assert len(shared_blocks(model)) == 2
    assert all(block.down_proj.weight.shape == (32, 48) for block in shared_blocks(model))
    torch.testing.assert_close(logits(model, inputs), logits(dense, inputs), **ROUNDING)
    narrow = upcycle(dense, "granular", granularity=4, num_experts=2, parts={"shared_experts": {}})
    assert all(block.down_proj.weight.shape == (32, 12) for block in shared_blocks(narrow))


def test_dense_start_trains():
    """The output projections of the routed experts have a gradient at once, the rest of them after one step."""
    model, inputs = upcycle(stock("llama"), num_experts=3, parts=dense_part(), check=False), tiny_inputs("llama")
    first = gradients(model, inputs)
    layer = "model.layers.1.mlp"
    assert first[f"{layer}.experts.down_proj"].abs().sum() > 0 and (first[f"{layer}.gate.weight"] == 0).all()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 0.5 * first[name]
    assert gradients(model, inputs)[f"{layer}.gate.weight"].abs().sum() > 0


def test_automatic_target_with_parts_is_ours():
    assert upcycle(stock("llama"), num_experts=2, parts={}, check=False).upcycle_report.target == "stock"
    assert upcycle(stock("llama"), num_experts=2, parts=PARTS["zero"], check=False).upcycle_report.target == "ext"


# --- what is refused ---


BAD_PARTS = {
    "router": ({"router": {"type": "top_k"}}, {}, ValueError, "use `router` in place of `router`"),
    "experts": ({"experts": {"num_experts": 3}}, {}, ValueError, "use `num_experts` and"),
    "unknown": ({"shared": {}}, {}, ValueError, "`parts`: unknown key `shared`.*Did you mean `shared_experts`"),
    "type": ("shared_experts", {}, TypeError, "`parts` must be an object"),
    "stock": (PARTS["zero"], {"target": "stock"}, ValueError, '`target="stock"` cannot hold `parts`'),
    "dense_width": (dense_part(intermediate_size=7), {}, ValueError, "have the width of the dense block, 48"),
    "one_layer": ({"momentum": {}}, {"layers": [1]}, ValueError, "is the only one that has it"),
}


@pytest.mark.parametrize(("parts", "options", "error", "message"), BAD_PARTS.values(), ids=BAD_PARTS)
def test_upcycling_refuses(parts, options, error, message):
    dense = stock("llama")
    before = snapshot(dense)
    with pytest.raises(error, match=message):
        upcycle(dense, num_experts=2, parts=parts, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_refused_before_anything_is_changed():
    for name, settings, message in (
        ("gemma4", {}, "stand on the layer itself"),
        ("mixtral", {"init": "dense"}, "has experts already"),
    ):
        model = stock(name)
        kind, keys = type(model), list(model.state_dict())
        with pytest.raises(ValueError, match=message):
            extend(model, MoeExtension(shared_experts=SharedExpertsConfig(**settings)))
        assert type(model) is kind and list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="`intermediate_size` must be at least 1, got 0"):
        SharedExpertsConfig(intermediate_size=0)
    with pytest.raises(TypeError, match="`init`"):
        SharedExpertsConfig(init="copy")
