"""`extend`, `restore`, `describe`, `trace_routing` and `register_router` on live models."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers import initialization as init

import hf_moe_ext as moe
from hf_moe_ext.modeling.configuration_moe_ext import _ROUTER_CONFIGS, MoeExtension, RouterConfig
from hf_moe_ext.modeling.moe_context import RouteRecord
from hf_moe_ext.modeling.moe_router import _ROUTERS, MoERouter, get_router, list_routers, register_router
from hf_moe_ext.modeling.moe_structure import iter_routers, trace_routing
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.modeling.router_top_p import TopPRouterConfig
from hf_moe_ext.patching import describe, extend, restore


# PEFT asks for `is_gradient_checkpointing`, which transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TOP_P = {"router": {"type": "top_p", "threshold": 0.5}}


# --- a router of the user's own: everything a new method writes ---


@dataclass
class CarryRouterConfig(RouterConfig):
    """Config of `CarryRouter`."""

    num_experts_per_tok: int = 2
    state_size: int = 6


class CarryRouter(MoERouter):
    """Layerwise recurrent, like RMoE: a state per token goes from layer to layer and moves the logits."""

    config_class = CarryRouterConfig
    moe_config: CarryRouterConfig

    @classmethod
    def check(cls, config, site):
        if config.num_experts_per_tok > site.num_experts:
            raise ValueError(f"`num_experts_per_tok` exceeds the {site.num_experts} experts.")

    def setup(self):
        size, place = self.moe_config.state_size, {"device": self.weight.device, "dtype": self.weight.dtype}
        self.moe_in = nn.Linear(self.moe_site.hidden_size, size, **place)
        self.moe_state = nn.Linear(size, size, bias=False, **place)
        self.moe_out = nn.Linear(size, self.moe_site.num_experts, bias=False, **place)

    def reset_parameters(self):
        for name, parameter in self.named_parameters():
            if name.startswith("moe_"):
                init.normal_(parameter, std=0.5)

    def route(self, hidden, context, *args, **kwargs):
        state = self.moe_in(hidden)
        order = self.moe_site.order
        if (order - 1, "state") in context.carry:
            state = state + self.moe_state(context.carry[order - 1, "state"])
        state = torch.tanh(state)
        context.carry[order, "state"] = state
        logits = self.router_logits(hidden) + self.moe_out(state)
        scores = logits.float().softmax(-1)
        weights, index = scores.topk(self.moe_config.num_experts_per_tok, dim=-1)
        return RouteRecord(logits, scores, weights / weights.sum(-1, keepdim=True), index, self.moe_config)


@pytest.fixture
def carry_router():
    """Registered for one test."""
    register_router("carry")(CarryRouter)
    yield {"router": {"type": "carry"}}
    del _ROUTERS["carry"], _ROUTER_CONFIGS["carry"]


@functools.cache
def _stock(name: str):
    return tiny_model(name)


def stock(name="mixtral"):
    return copy.deepcopy(_stock(name))


@torch.no_grad()
def logits(model, inputs=None):
    return model(**(inputs or tiny_inputs("mixtral"))).logits


def snapshot(model):
    """Everything that hangs on the model: classes, attributes, hooks, config, logits."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    modules = [
        (name, type(m), sorted(vars(m)), list(m._parameters), list(m._buffers), [len(getattr(m, h)) for h in hooks])
        for name, m in model.named_modules()
    ]
    return modules, type(model.config), model.config.to_dict(), model.config._experts_implementation


# --- extend, restore, describe ---


REFUSED = {
    "unknown_router": ({"router": {"type": "topp"}}, ValueError, "Did you mean `top_p`"),
    "wrong_type": ({"router": {"type": "top_p", "threshold": "0.4"}}, TypeError, "`threshold`"),
    "newer": ({"version": 9} | TOP_P, ValueError, "format version 9"),
    "nothing": ({}, ValueError, "nothing to extend"),
    "no_such_layer": (TOP_P | {"layers": {"7": None}}, ValueError, "layers 0 to 2"),
    "too_many": (
        {"layers": {"2": {"router": {"type": "top_p", "max_slots": 99}}}, **TOP_P},
        ValueError,
        "exceeds the 8 experts",
    ),
    "counts": ({"experts": {"num_experts": 3}}, ValueError, "keeps weights as they are"),
    "not_a_declaration": (None, TypeError, "expected a MoeExtension or its dict, got NoneType"),
    "text": ("top_p", TypeError, "expected a MoeExtension or its dict, got str"),
}


@pytest.mark.parametrize(("data", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_extension_leaves_the_model_alone(data, error, message):
    model = stock()
    before, expected = snapshot(model), logits(model)
    with pytest.raises(error, match=message):
        extend(model, data)
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)


def test_router_that_fails_while_it_is_installed_leaves_the_model_alone(carry_router, monkeypatch):
    """An error in the second layer's `setup`: the first layer has been changed by then."""

    def failing(self):
        self.moe_in = nn.Linear(2, 2)
        if self.moe_site.order == 1:
            raise RuntimeError("no memory left")

    monkeypatch.setattr(CarryRouter, "setup", failing)
    model = stock()
    before, expected = snapshot(model), logits(model)
    with pytest.raises(RuntimeError, match="no memory left"):
        extend(model, carry_router)
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)


def test_forms_of_a_declaration():
    """A dict, a router's config alone, the declaration: the same model."""
    config = TopPRouterConfig(threshold=0.5)
    models = [extend(stock(), form) for form in (TOP_P, config, MoeExtension(router=config))]
    assert all(model.config.moe_ext == {"version": 1, **TOP_P} for model in models)
    assert all(torch.equal(logits(model), logits(models[0])) for model in models)


def test_second_extension_is_refused():
    model = extend(stock(), TOP_P)
    before, expected = snapshot(model), logits(model)
    for declaration in (TOP_P, {"router": {"type": "top_k"}}):
        with pytest.raises(ValueError, match=r"extended already; call `restore\(model\)`"):
            extend(model, declaration)
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)


def test_extended_base_inside_a_stock_head_is_refused():
    model = stock()
    extend(model.model, TOP_P)
    with pytest.raises(ValueError, match="extended already"):
        extend(model, TOP_P)


def test_restore_twice_is_refused():
    model = restore(extend(stock(), TOP_P))
    with pytest.raises(ValueError, match="nothing to restore"):
        restore(model)


def test_extend_restore_extend():
    """The second extension is as good as the first, also with parameters of its own in between."""
    model, expected = stock(), logits(stock())
    first = logits(extend(model, TOP_P))
    assert not torch.equal(first, expected)
    assert torch.equal(logits(restore(model)), expected)
    extend(model, {"router": {"type": "top_k", "num_experts_per_tok": 1, "correction_bias": True}})
    assert any("moe_correction_bias" in key for key in model.state_dict())
    restore(model)
    assert list(model.state_dict()) == list(stock().state_dict())
    assert torch.equal(logits(extend(model, TOP_P)), first)


def test_restore_gives_the_number_of_experts_back():
    model, inputs = tiny_model("mixtral"), tiny_inputs("mixtral")
    with torch.no_grad():
        before = model(**inputs).logits
        extend(model, {"router": {"type": "top_k"}, "experts": {"num_experts_per_tok": 3}})
        assert not torch.allclose(model(**inputs).logits, before, atol=1e-3)
        restore(model)
        assert torch.equal(model(**inputs).logits, before)
    assert [layer.mlp.gate.top_k for layer in model.model.layers] == [2, 2, 2]
    assert "moe_stock_top_k" not in vars(model.model.layers[0].mlp.gate)


def test_restore_gives_the_implementation_back():
    model = stock()
    model.set_experts_implementation("batched_mm")
    extend(model, TOP_P)
    assert model.config._experts_implementation == "batched_mm"  # a choice is kept
    assert restore(model).config._experts_implementation == "batched_mm"
    model.set_experts_implementation("eager")
    assert extend(model, TOP_P).config._experts_implementation == "moe_ext"
    assert restore(model).config._experts_implementation == "eager"


def test_dense_model():
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"dense model without routers. `upcycle\(model, ...\)`"):
        extend(model, TOP_P)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="nothing to restore"):
        restore(model)


def test_other_objects():
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        extend(nn.Linear(2, 2), TOP_P)
    with pytest.raises(TypeError, match="expected a transformers model, got str"):
        extend("mixtral", TOP_P)
    with pytest.raises(ValueError, match="carries no extension"), trace_routing(stock()):
        pass


def test_unsupported_architecture():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=8, n_layer=1, n_head=2))
    for function in (lambda m: extend(m, TOP_P), restore, describe):
        with pytest.raises(ValueError, match="architecture `bloom` is not supported.*hf-moe list families"):
            function(model)


def peft_model(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))


def test_peft_model_is_refused():
    model = peft_model(stock())
    with pytest.raises(TypeError, match="got PeftModelForCausalLM. Pass the base model"):
        extend(model, TOP_P)


def test_describe_counts_parameters():
    for model in (stock(), extend(stock(), {"router": {"type": "top_p", "max_slots": 3}, "layers": {"0": None}})):
        found = describe(model)
        total = sum(p.numel() for p in model.parameters())
        assert found.parameters == total
        used = {layer.key: layer.num_experts_per_tok for layer in found.layers}
        experts = {
            str(i): sum(p.numel() for p in x.mlp.experts.parameters()) for i, x in enumerate(model.model.layers)
        }
        assert found.active_parameters == total - sum(experts[key] // 8 * (8 - k) for key, k in used.items())
        rows = str(found).splitlines()
        assert len(rows) == 2 + 3 and f"{total:,}" in rows[0]
    assert used == {"0": 2, "1": 3, "2": 3}


# --- copies, threads, errors ---


def test_deep_copy_is_independent():
    model = extend(stock(), TOP_P)
    twin = copy.deepcopy(model)
    expected = logits(model)
    assert torch.equal(logits(twin), expected)
    with trace_routing(model) as of_model, trace_routing(twin) as of_twin:
        logits(twin)
        assert (len(of_model), len(of_twin)) == (0, 1)
        logits(model)
        assert (len(of_model), len(of_twin)) == (1, 1)
    model.moe_link.step = 7
    assert twin.moe_link.step is None
    restore(model)
    assert torch.equal(logits(twin), expected) and isinstance(twin.model.layers[0].mlp.gate, MoERouter)
    restore(twin)
    assert twin.config._experts_implementation == model.config._experts_implementation
    assert torch.equal(logits(twin), logits(model))


def test_deep_copy_of_a_part_stays_connected():
    """As PEFT's `modules_to_save` copies a gate: its record must reach the model."""
    model = extend(stock(), TOP_P)
    gate = copy.deepcopy(model.model.layers[1].mlp.gate)
    gate.weight.data.neg_()
    model.model.layers[1].mlp.gate = gate
    with trace_routing(model) as contexts:
        logits(model)
    record = contexts[0].records["1"]
    assert list(contexts[0].records) == ["0", "1", "2"]
    assert record.config is gate.moe_config


@pytest.mark.parametrize("through", ["pickle", "torch.save"])
def test_pickle(through, tmp_path):
    model = extend(stock(), TOP_P)
    expected = logits(model)
    if through == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again), expected)
    with trace_routing(again) as contexts:
        logits(again)
    assert len(contexts[0].records) == 3


def test_threads_do_not_mix(carry_router):
    """Two requests at once: each forward has its own context, carry and records."""
    model = extend(stock(), carry_router)
    lengths = (5, 9)
    inputs = {n: tiny_inputs("mixtral", length=n, seed=n) for n in lengths}
    expected = {n: logits(model, inputs[n]) for n in lengths}
    barrier = threading.Barrier(2)

    def meet(*_):
        barrier.wait(10)

    for layer in model.model.layers:  # meet in the middle of every layer
        layer.mlp.experts.register_forward_pre_hook(meet)
    found, errors = {n: [] for n in lengths}, []

    def work(n):
        try:
            for _ in range(4):
                found[n].append(logits(model, inputs[n]))
        except BaseException as error:
            errors.append(error)

    with trace_routing(model) as contexts:
        threads = [threading.Thread(target=work, args=(n,)) for n in lengths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not errors
    for n in lengths:
        assert len(found[n]) == 4 and all(torch.equal(out, expected[n]) for out in found[n])
    assert len(contexts) == 8
    for context in contexts:
        sizes = {len(record.index) for record in context.records.values()}
        assert list(context.records) == ["0", "1", "2"] and sizes == {context.input_ids.numel()}


@pytest.mark.parametrize("where", ["layer", "router", "attention_mask"])
def test_error_in_a_forward_leaves_nothing_behind(where, carry_router):
    model = extend(stock(), carry_router)
    expected = logits(model)
    broken = {"layer": model.model.layers[1], "router": model.model.layers[1].mlp.gate}.get(where)

    def fail(*_):
        raise KeyboardInterrupt

    with trace_routing(model) as contexts:
        if broken is None:
            with pytest.raises((RuntimeError, IndexError, ValueError, TypeError)):
                logits(model, {"input_ids": torch.tensor([[200]])})  # no such token
        else:
            handle = broken.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                logits(model)
            handle.remove()
        slots = model.moe_link.slots
        assert slots.context is None and slots.layer_context is None and slots.collected is None
        assert contexts == []
        assert torch.equal(logits(model), expected)
        assert [list(context.records) for context in contexts] == [["0", "1", "2"]]
    assert model.moe_link.observers == []


def test_parts_of_a_model_work_alone():
    """Outside a forward of the base model there is no context; routers route without one."""
    model = extend(stock(), TOP_P)
    layer = model.model.layers[0]
    hidden = torch.randn(1, 4, 32)
    with torch.no_grad():
        assert layer.mlp(hidden).shape == hidden.shape
        logits_, weights, index = layer.mlp.gate(hidden.reshape(-1, 32))
        assert index.shape == (4, 8)
        out = model.model(**tiny_inputs("mixtral"))
    assert out.last_hidden_state.shape == (2, 7, 32)


# --- trace_routing ---


def test_traces_nest():
    model = extend(stock(), TOP_P)
    with trace_routing(model) as outer:
        logits(model)
        with trace_routing(model) as inner, trace_routing(model) as same:
            logits(model)
        logits(model)
    logits(model)
    assert (len(outer), len(inner), len(same)) == (3, 1, 1)
    assert outer[1] is inner[0] is same[0]


def test_trace_ends_after_an_error():
    model = extend(stock(), TOP_P)
    with pytest.raises(KeyError), trace_routing(model):
        raise KeyError
    assert model.moe_link.observers == []


def test_trace_sees_generation():
    model = extend(stock(), TOP_P)
    ids = tiny_inputs("mixtral", batch=1)["input_ids"]
    with trace_routing(model) as contexts:
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert [len(context.records["0"].index) for context in contexts] == [7, 1, 1]


def test_trace_through_peft_and_a_bare_base():
    model = extend(stock(), TOP_P)
    wrapped = peft_model(model)
    with trace_routing(wrapped) as contexts:
        logits(wrapped)
    assert len(contexts) == 1
    with trace_routing(model.model) as contexts, torch.no_grad():
        model.model(**tiny_inputs("mixtral"))
    assert [len(context.records) for context in contexts] == [3]


def test_records_keep_their_graph():
    model = extend(stock(), TOP_P)
    with trace_routing(model) as contexts:
        model(**tiny_inputs("mixtral"))
    contexts[0].records["2"].scores[:, 0].sum().backward()
    assert model.model.layers[2].mlp.gate.weight.grad.abs().sum() > 0
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


# --- registration ---


BAD_NAMES = ["TopQ", "top-q", "top q", "", "1top"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_router_names(name):
    with pytest.raises(ValueError, match="lower-case letters"):
        register_router(name)


def test_taken_router_names():
    with pytest.raises(ValueError, match="`top_p` is registered already .TopPRouter."):
        register_router("top_p")(CarryRouter)
    assert get_router("top_p").__name__ == "TopPRouter"


def test_router_without_a_config():
    class NoConfig(MoERouter):
        pass

    class WrongConfig(MoERouter):
        config_class = dict

    for router in (NoConfig, WrongConfig):
        with pytest.raises(TypeError, match="needs a `config_class` derived from RouterConfig"):
            register_router("nothing")(router)
    assert "nothing" not in list_routers()


def test_replacing_a_router(carry_router):
    class Other(CarryRouter):
        pass

    register_router("carry", exist_ok=True)(Other)
    assert get_router("carry") is Other and list(list_routers()) == sorted(list_routers())


def test_unknown_router():
    with pytest.raises(ValueError, match="unknown router type `top_q`; known: .*Did you mean"):
        get_router("top_q")


def test_router_of_ones_own_end_to_end(carry_router, tmp_path):
    """Extend, train, save, load, restore, with what CONTRIBUTING.md asks for and nothing else."""
    model = extend(stock(), moe.MoeExtension(router=CarryRouterConfig(z_coef=0.01, state_size=4)))
    inputs = tiny_inputs("mixtral")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(5):
        loss = model.train()(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    own = [name for name in before if ".moe_" in name]
    assert len(own) == 3 * 4
    idle = {"model.layers.0.mlp.gate.moe_state.weight"}  # the first layer has no state before it
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert set(own) - moved <= idle
    model.eval()
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(isinstance(gate, CarryRouter) for gate in iter_routers(again))
    assert torch.equal(logits(again), logits(model))
    assert [layer.router for layer in describe(again).layers] == ["carry"] * 3
    restore(model)
    assert list(model.state_dict()) == list(stock().state_dict())


def test_new_parameters_of_a_live_model_are_initialised(carry_router, poison_memory):
    model = extend(stock(), carry_router)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name


def test_carried_state_matters_and_crosses_layers(carry_router):
    """The state of layer 0 reaches the router of layer 2, with gradient."""
    model = extend(stock(), carry_router)
    with trace_routing(model) as contexts:
        model(**tiny_inputs("mixtral"))
    context = contexts[0]
    assert set(context.carry) == {(i, "state") for i in range(3)}
    (gradient,) = torch.autograd.grad(context.carry[2, "state"].sum(), context.carry[0, "state"])
    assert gradient.abs().sum() > 0


def two_forwards(model, checkpointing: bool):
    """Gradients of one backward through two forwards, the second on other text."""
    model = copy.deepcopy(model).train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    losses = []
    for seed in (1, 2):
        inputs = tiny_inputs("mixtral", length=6 + seed, seed=seed)
        losses.append(model(**inputs, labels=inputs["input_ids"]).loss * seed)
    sum(losses).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses).detach(), gradients


def test_two_forwards_before_one_backward_under_checkpointing(carry_router):
    """Recomputation must read the state of its own forward, not that of the last one."""
    config = CarryRouterConfig(z_coef=0.1, balance_coef=0.1)
    model = extend(stock(), MoeExtension(router=config))
    losses, expected = two_forwards(model, checkpointing=False)
    found_losses, found = two_forwards(model, checkpointing=True)
    torch.testing.assert_close(found_losses, losses)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_public_names():
    assert moe.extend is extend and moe.restore is restore and moe.describe is describe
    assert moe.trace_routing is trace_routing and moe.register_router is register_router
    assert moe.TopKRouterConfig is TopKRouterConfig
