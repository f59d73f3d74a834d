"""Adapters of PEFT on the experts of stock models: logits, gradients, memory, and when PEFT has to add them itself."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from tiny_models import tiny_inputs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_moe_ext  # noqa: F401
from hf_moe_ext.kernels import expert_weights, lora, lora_dispatch
from hf_moe_ext.kernels.lora import keep_factors, read_adapted

from .test_cpu_experts import assert_near
from .test_lora import MORE


# PEFT asks for `is_gradient_checkpointing`, which transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TARGETS = {
    "mixtral": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "nemotron_h": ["mixer.experts.up_proj", "mixer.experts.down_proj"],
}


@functools.cache
def stock(name):
    return tiny_model(name).eval()


def adapted(name, targets=None, *, rank=3, keep=True, dtype=torch.float32):
    """A model with random adapters on its experts; both factors count from the first step."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_parameters=targets or TARGETS[name], lora_dropout=0.0)
    model = get_peft_model(copy.deepcopy(stock(name)).to(dtype), config)
    randomize(model)
    if keep:
        assert keep_factors(model) > 0
    return model


@torch.no_grad()
def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def choose(model, implementation):
    model.base_model.model.set_experts_implementation(implementation)
    return model


def loss_and_gradients(model, name):
    model.zero_grad()
    logits = model(**tiny_inputs(name)).logits
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    """How often experts ran with their adapters apart."""
    seen, run = [], lora_dispatch.run
    monkeypatch.setattr(lora_dispatch, "run", lambda *args: seen.append(args[0].shape) or run(*args))
    return seen


def assert_same(found, wanted, tolerance=1e-4):
    assert_near(found[0], wanted[0], "logits", tolerance)
    assert found[1].keys() == wanted[1].keys()
    largest = max(gradient.norm() for gradient in wanted[1].values())
    for key, want in wanted[1].items():
        assert want.norm() > 0 and (found[1][key] - want).norm() <= tolerance * want.norm() + 1e-6 * largest, key


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_logits_and_gradients_are_those_of_eager(name, keep, calls):
    wanted = loss_and_gradients(choose(adapted(name, keep=False), "eager"), name)
    model = choose(adapted(name, keep=keep), "moe_ext")
    assert_same(loss_and_gradients(model, name), wanted)
    assert calls and all(("lora_A" in key) or ("lora_B" in key) for key in wanted[1])
    with torch.no_grad():
        assert_near(model(**tiny_inputs(name)).logits, wanted[0], "logits", 1e-4)
    with torch.no_grad():
        plain = stock(name)(**tiny_inputs(name)).logits
    assert (wanted[0] - plain).norm() > 1e-2 * plain.norm()  # the adapters are no small thing


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("number", [0, 1])
def test_one_targeted_projection(number, name, calls):
    target = [TARGETS[name][number]]
    wanted = loss_and_gradients(choose(adapted(name, target, keep=False), "eager"), name)
    assert_same(loss_and_gradients(choose(adapted(name, target), "moe_ext"), name), wanted)
    assert calls


def wrappers_of(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


@pytest.mark.parametrize("name", TARGETS)
def test_a_and_b_are_read_in_the_order_of_peft(name, monkeypatch):
    """Every expert's B @ A is the update that PEFT would add to its matrix."""
    model, seen = choose(adapted(name), "moe_ext"), []

    def read(module):
        found = read_adapted(module)
        seen.append((module, found))
        return found

    monkeypatch.setattr(lora_dispatch, "read_adapted", read)
    with torch.no_grad():
        model(**tiny_inputs(name))
    checked = 0
    for wrapper in wrappers_of(model):
        found = next(found for module, found in seen if module is wrapper.get_base_layer())
        adapter = found.lora.down if wrapper.parameter_name == "down_proj" else found.lora.up
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        delta = wrapper.get_delta_weight("default")
        assert found.experts.is_transposed == (name == "gpt_oss") and adapter.scale == 2.0
        for expert in range(found.experts.num_experts):
            assert torch.equal(adapter.a[expert], a[3 * expert : 3 * expert + 3])
            assert torch.equal(adapter.b[expert], b[:, expert :: found.experts.num_experts])
            update = adapter.scale * adapter.b[expert] @ adapter.a[expert]
            want = delta[expert].T if found.experts.is_transposed else delta[expert]
            torch.testing.assert_close(update, want)
            checked += 1
        weight = found.experts.down if wrapper.parameter_name == "down_proj" else found.experts.up
        assert weight is wrapper.get_param()
    assert checked


def test_the_activation_is_looked_at_once(monkeypatch):
    looked, find = [], expert_weights.find_activation
    monkeypatch.setattr(expert_weights, "find_activation", lambda module: looked.append(module) or find(module))
    model = choose(adapted("mixtral"), "moe_ext")
    for _ in range(3):
        model(**tiny_inputs("mixtral"))
    assert len(looked) == model.config.num_hidden_layers


class LargeTensors(TorchDispatchMode):
    """Which operators made a tensor of at least so many elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        # Views share the storage of a tensor that was there before.
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                if tensor.numel() >= self.size:
                    self.made.append(str(function))
        return out


def large_model(keep):
    """Experts that are larger than anything else in a forward."""
    overrides = {"num_local_experts": 8, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48}
    model = tiny_model("mixtral", **overrides)
    config = LoraConfig(r=2, target_parameters=TARGETS["mixtral"], lora_dropout=0.0)
    model = choose(get_peft_model(model, config), "moe_ext")
    randomize(model)
    if keep:
        keep_factors(model)
    down = wrappers_of(model)[0].get_base_layer().down_proj
    assert down.shape == (8, 64, 48)
    return model, down.numel()


def step(model):
    ids = torch.arange(12).view(1, 12)
    model(input_ids=ids).logits.square().sum().backward()


def test_no_tensor_of_the_size_of_the_experts_is_made():
    model, size = large_model(keep=True)
    with LargeTensors(size) as large:
        step(model)
    assert large.made == []
    # What is seen when it is made, so that the mode is known to see it: PEFT's check, once for each wrapper.
    model, size = large_model(keep=False)
    with LargeTensors(size) as large:
        step(model)
    assert large.made == ["aten.baddbmm.default"] * len(wrappers_of(model))


def test_nothing_of_the_size_of_the_experts_is_kept_but_the_experts():
    model, size = large_model(keep=True)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        choose(model, "moe_ext")(input_ids=torch.arange(12).view(1, 12))
        ours, largest = sum(kept.values()), max(kept.values())
        kept.clear()
        eager = choose(model, "eager")(input_ids=torch.arange(12).view(1, 12))
    assert eager.logits.requires_grad and largest < 4 * size and ours < sum(kept.values()) - 4 * size


def test_merged_disabled_and_unloaded_adapters(calls):
    name = "mixtral"
    model, inputs = choose(adapted(name), "moe_ext"), tiny_inputs(name)
    with torch.no_grad():
        with_adapters, plain = model(**inputs).logits, stock(name)(**inputs).logits
        assert calls
        calls.clear()
        with model.disable_adapter():
            assert_near(model(**inputs).logits, plain, "disabled", 1e-5)
        model.merge_adapter()
        assert_near(model(**inputs).logits, with_adapters, "merged", 1e-4)
        assert not calls
        model.unmerge_adapter()
        assert_near(model(**inputs).logits, with_adapters, "unmerged", 1e-4)
        assert calls
        calls.clear()
        assert_near(model.merge_and_unload()(**inputs).logits, with_adapters, "unloaded", 1e-4)
    assert not calls


def test_several_active_adapters_are_added_by_peft(calls):
    name, model = "mixtral", choose(adapted("mixtral", keep=False), "moe_ext")
    config = LoraConfig(r=2, target_parameters=TARGETS[name], lora_dropout=0.0)
    model.add_adapter("other", config)
    keep_factors(model)
    randomize(model)
    model.base_model.set_adapter(["default", "other"])
    found = loss_and_gradients(model, name)
    assert not calls
    assert_same(found, loss_and_gradients(choose(model, "eager"), name))
    model.set_adapter("other")
    found = loss_and_gradients(choose(model, "moe_ext"), name)
    assert calls
    assert_same(found, loss_and_gradients(choose(model, "eager"), name))


def test_experts_that_are_trained_too_get_their_gradients(calls):
    name, model = "mixtral", adapted("mixtral")
    for wrapper in wrappers_of(model):
        wrapper.get_param().requires_grad_()
    found = loss_and_gradients(choose(model, "moe_ext"), name)
    assert not calls and any(key.endswith("down_proj") for key in found[1])
    assert_same(found, loss_and_gradients(choose(model, "eager"), name))


def test_an_adapter_on_a_bias_is_left_to_peft(calls):
    name = "gpt_oss"
    targets = [*TARGETS[name], "mlp.experts.down_proj_bias"]
    wanted = loss_and_gradients(choose(adapted(name, targets, keep=False), "eager"), name)
    assert_same(loss_and_gradients(choose(adapted(name, targets), "moe_ext"), name), wanted)
    assert not calls


def test_experts_with_an_activation_that_is_not_known(calls):
    name, model = "mixtral", adapted("mixtral")
    for wrapper in wrappers_of(model):
        wrapper.get_base_layer().act_fn = torch.nn.Tanh()
    found = loss_and_gradients(choose(model, "moe_ext"), name)
    assert not calls
    assert_same(found, loss_and_gradients(choose(model, "eager"), name))


def test_autocast_and_checkpointing(calls):
    name, model = "mixtral", choose(adapted("mixtral"), "moe_ext").train()
    wanted = loss_and_gradients(model, name)
    stock_model = model.base_model.model
    enable = getattr(stock_model, "activation_checkpointing_enable", None) or stock_model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()
    found = loss_and_gradients(model, name)
    assert len(calls) == 3 * model.config.num_hidden_layers
    assert torch.equal(found[0], wanted[0]) and all(
        torch.equal(found[1][key], want) for key, want in wanted[1].items()
    )
    calls.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_near(model(**tiny_inputs(name)).logits, wanted[0], "logits", 0.1)
    assert not calls


@pytest.mark.parametrize("name", TARGETS)
def test_bfloat16_is_as_exact_as_eager(name, calls):
    """One layer, so that no router decides otherwise; both against the same bfloat16 weights in float64."""
    model = adapted(name, dtype=torch.bfloat16)
    wrappers = wrappers_of(model)
    layer = next(w for w in wrappers if not any(w is other.base_layer for other in wrappers))
    num_experts = layer.get_base_layer().num_experts

    def layer_gradients(layer, implementation, dtype, hidden, index, factors):
        layer.get_base_layer().config._experts_implementation = implementation
        layer.zero_grad()
        x, w = (t.detach().clone().to(dtype).requires_grad_() for t in (hidden, factors))
        out = layer(x, index, w)
        out.square().sum().backward()
        adapters = [p.grad for key, p in layer.named_parameters() if "lora_" in key]
        return [out.detach(), x.grad, w.grad, *adapters]

    squares = {"moe_ext": 0.0, "eager": 0.0}
    for seed in range(4):  # one draw alone says little: a few large values decide
        randomize(model, seed)
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(64, model.config.hidden_size, generator=generator).bfloat16()
        index = torch.rand(64, num_experts, generator=generator).argsort(-1)[:, :2]
        inputs = (hidden, index, torch.rand(64, 2, generator=generator).bfloat16())
        exact = layer_gradients(copy.deepcopy(layer).double(), "eager", torch.float64, *inputs)
        assert len(exact) == 7
        for choice in squares:
            found = layer_gradients(layer, choice, torch.bfloat16, *inputs)
            errors = [(have - want).norm() / want.norm() for have, want in zip(found, exact, strict=True)]
            squares[choice] += torch.stack(errors).square()
    ours, theirs = squares["moe_ext"].sqrt(), squares["eager"].sqrt()
    assert len(calls) == 4 and (ours <= MORE * theirs).all(), (ours, theirs)


def test_keeping_factors_changes_no_results_and_no_files(tmp_path):
    name = "mixtral"
    model = adapted(name, keep=False)
    wanted = loss_and_gradients(choose(model, "eager"), name)
    assert keep_factors(model) == keep_factors(model) == len(wrappers_of(model))
    found = loss_and_gradients(model, name)
    assert torch.equal(found[0], wanted[0]) and all(
        torch.equal(found[1][key], want) for key, want in wanted[1].items()
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(stock(name)), tmp_path)
    with torch.no_grad():
        assert torch.equal(choose(loaded, "eager")(**tiny_inputs(name)).logits, wanted[0])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert keep_factors(twin) == len(wrappers_of(twin))
        assert torch.equal(loss_and_gradients(choose(twin, "eager"), name)[0], wanted[0])
    assert keep_factors(torch.nn.Linear(2, 2)) == 0


def test_nothing_is_read_without_peft_or_with_an_older_one(monkeypatch, calls):
    name = "mixtral"
    model = choose(adapted(name), "moe_ext")
    wanted = loss_and_gradients(model, name)
    calls.clear()
    monkeypatch.setattr(lora, "_proxy_class", lambda: None)
    assert_same(loss_and_gradients(model, name), wanted)
    assert not calls
    with pytest.raises(ValueError, match="computes the whole update"):
        keep_factors(model)


def test_experts_of_llama4_when_extended():
    """A block with an adapter of ours runs its experts through what PEFT has put around them."""
    targets = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    found = []
    for extended in (False, True):
        model = copy.deepcopy(stock("llama4"))
        if extended:
            hf_moe_ext.extend(model, {"router": "top_k"})
        model = get_peft_model(model, LoraConfig(r=3, target_parameters=targets, lora_dropout=0.0))
        randomize(model)
        found.append(loss_and_gradients(model, "llama4"))
        if extended:
            hf_moe_ext.restore(model.unload())
    (expected, theirs), (logits, mine) = found
    assert (expected - stock("llama4")(**tiny_inputs("llama4")).logits).abs().max() > 0.05
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    adapters = [name for name in theirs if "lora_" in name]
    assert len(adapters) >= 4 and theirs.keys() == mine.keys()
    for name in adapters:
        assert theirs[name].norm() > 0
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5, msg=name)
