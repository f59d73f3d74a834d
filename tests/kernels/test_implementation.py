"""`set_experts_implementation("moe_ext")` on stock models: logits, gradients, graphs, checkpoints, adapters."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import MOE_NAMES, tiny_inputs, tiny_model
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import hf_moe_ext  # noqa: F401
from hf_moe_ext.kernels import experts as implementation
from hf_moe_ext.kernels import lora_dispatch
from hf_moe_ext.modeling.moe_experts import MoeExtExperts, moe_ext_experts_forward

from .test_expert_weights import OWN_FORM, experts_of


# PEFT asks for `is_gradient_checkpointing`, which transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

NAMES = [name for name in MOE_NAMES if name not in OWN_FORM]
SOME = ("mixtral", "deepseek_v3", "gpt_oss", "nemotron_h")


@functools.cache
def stock(name):
    return tiny_model(name).eval()


def with_implementation(name, choice):
    model = copy.deepcopy(stock(name))
    model.set_experts_implementation(choice)
    return model


@pytest.fixture
def calls(monkeypatch):
    """How often the CPU path ran."""
    seen = []
    for module in (implementation, lora_dispatch):
        run = module.run
        monkeypatch.setattr(module, "run", lambda *args, run=run: seen.append(args[0].shape) or run(*args))
    return seen


def loss_and_gradients(model, name):
    inputs = tiny_inputs(name)
    model.zero_grad()
    logits = model(**inputs).logits
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_of_every_stock_family(name, calls):
    logits, wanted = loss_and_gradients(with_implementation(name, "eager"), name)
    model = with_implementation(name, "moe_ext")
    found, gradients = loss_and_gradients(model, name)
    assert bool(calls) == (name != "muse_spark")  # its experts have a norm of their own
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())
    assert gradients.keys() == wanted.keys()
    for key, want in wanted.items():
        error = (gradients[key] - want).norm()
        assert error <= 1e-4 * want.norm() + 1e-6 * max(g.norm() for g in wanted.values()), key
    with torch.no_grad():
        again = model(**tiny_inputs(name)).logits
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())


@pytest.mark.parametrize("name", SOME)
def test_generation(name):
    inputs = {"input_ids": tiny_inputs(name)["input_ids"], "max_new_tokens": 8, "do_sample": False}
    expected = with_implementation(name, "eager").generate(**inputs)
    assert torch.equal(with_implementation(name, "moe_ext").generate(**inputs), expected)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_as_one_graph(name, backend):
    model = with_implementation(name, "moe_ext")
    expected, wanted = loss_and_gradients(model, name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found, gradients = loss_and_gradients(compiled, name)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for key, want in wanted.items():
        have = gradients[f"_orig_mod.{key}"]
        torch.testing.assert_close(
            have, want, rtol=1e-3, atol=1e-4 * want.abs().max().item(), msg=lambda m, k=key: k + m
        )


def test_the_graph_holds_one_operator_for_a_layer():
    model = with_implementation("mixtral", "moe_ext")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(**tiny_inputs("mixtral"))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert targets.count("moe_ext.experts") == model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gradient_checkpointing_changes_nothing(name):
    model = with_implementation(name, "moe_ext").train()
    _, wanted = loss_and_gradients(model, name)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    _, found = loss_and_gradients(model, name)
    for key, want in wanted.items():
        assert torch.equal(found[key], want), key


def test_autocast_computes_in_bfloat16(calls):
    model, inputs = with_implementation("mixtral", "moe_ext"), tiny_inputs("mixtral")
    expected = with_implementation("mixtral", "eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = model(**inputs).logits, expected(**inputs).logits
    with torch.no_grad():
        exact = expected(**inputs).logits
    assert not calls  # weights are in float32, products in bfloat16: the portable form casts expert by expert
    assert (found - exact).norm() < 1.5 * (wanted - exact).norm() and (found - exact).norm() > 0


def test_adapters_on_the_experts_count(calls):
    model = with_implementation("mixtral", "moe_ext")
    config = LoraConfig(r=4, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], lora_dropout=0.0)
    adapted = get_peft_model(model, config)
    torch.manual_seed(0)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.1)
    inputs = tiny_inputs("mixtral")
    found = {}
    for choice in ("eager", "moe_ext"):
        adapted.base_model.model.set_experts_implementation(choice)
        adapted.zero_grad()
        logits = adapted(**inputs).logits
        logits.square().sum().backward()
        found[choice] = logits.detach(), [p.grad for k, p in adapted.named_parameters() if "lora_" in k]
    assert calls and not torch.allclose(found["moe_ext"][0], stock("mixtral")(**inputs).logits, atol=1e-3)
    torch.testing.assert_close(found["moe_ext"][0], found["eager"][0], rtol=1e-4, atol=1e-5)
    for have, want in zip(found["moe_ext"][1], found["eager"][1], strict=True):
        assert (have - want).norm() <= 1e-4 * want.norm() and want.norm() > 0


# --- what goes to the portable form ---


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(implementation.logger, "warning_once", messages.append)
    return messages


def test_a_norm_behind_each_expert_goes_to_the_portable_form(warnings, calls):
    experts = copy.deepcopy(experts_of("muse_spark"))
    experts.config = copy.copy(experts.config)
    hidden, index = torch.randn(4, experts.hidden_dim), torch.tensor([[0, 1]] * 4)
    found = {}
    for choice in ("eager", "moe_ext"):
        experts.config._experts_implementation = choice
        found[choice] = experts(hidden, index, torch.rand(4, 2, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(found["moe_ext"], found["eager"], rtol=1e-5, atol=1e-6)
    assert not calls and "the output of each expert is normalised" in warnings[0]


def own_experts(activation, dropout=None):
    config = copy.deepcopy(stock("mixtral").config)
    config._experts_implementation = "moe_ext"
    experts = MoeExtExperts(config, 3, 8, 6, activation=activation, dropout=dropout)
    experts.init_weights(0.5)
    return experts


@pytest.mark.parametrize(
    ("activation", "dropout", "training", "reason"),
    [
        (nn.PReLU(), None, False, "the activation has parameters of its own"),
        (nn.SiLU(), nn.Dropout(0.5), True, "there is dropout inside the experts"),
        (nn.SiLU(), nn.Dropout(0.5), False, None),
        (nn.Tanh(), None, True, None),
    ],
)
def test_reasons(activation, dropout, training, reason, warnings, calls):
    experts = own_experts(activation, dropout).train(training)
    hidden, index, factors = torch.randn(5, 8), torch.tensor([[0, 2]] * 5), torch.rand(5, 2)
    torch.manual_seed(0)
    out = experts(hidden, index, factors)
    torch.manual_seed(0)
    torch.testing.assert_close(out, moe_ext_experts_forward(experts, hidden, index, factors))
    assert bool(calls) == (reason is None)
    assert warnings == ([] if reason is None else [f"MoeExtExperts: {reason}, so the portable implementation runs."])
    out.sum().backward()
    assert all(p.grad is not None for p in experts.parameters())


def test_the_name_keeps_its_kernels_when_a_model_brings_files_of_its_own():
    function = ALL_EXPERTS_FUNCTIONS["moe_ext"]
    assert function.has_kernels and function.handles_unused_slots
    implementation.register_experts()
    assert ALL_EXPERTS_FUNCTIONS["moe_ext"] is function
