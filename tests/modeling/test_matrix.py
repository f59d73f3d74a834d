"""Every family with every router: what must hold wherever a router stands.

One row a family, on tiny random models. The stock model is the reference: identity starts, restored models and
unextended layers must reproduce it bit for bit or to float32 rounding.
"""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile

import pytest
import torch
from tiny_models import MOE_NAMES, tiny_inputs, tiny_model

from hf_moe_ext import upcycle
from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension, RouterConfig
from hf_moe_ext.modeling.modeling_moe_ext import extended_class, extended_config_class
from hf_moe_ext.modeling.moe_families import get_family
from hf_moe_ext.modeling.moe_router import get_router
from hf_moe_ext.modeling.moe_structure import iter_routers, plan_extension, trace_routing
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.patching import describe, extend, restore
from hf_moe_ext.trainers.freezing import shared_parts

from .zoo import FOUNDATION, SETTINGS, STRUCTURES, UPCYCLED


ROWS = [
    pytest.param(name, router, id=f"{name}-{router}")
    for name in (*MOE_NAMES, UPCYCLED)
    for router in SETTINGS
    if router in FOUNDATION or name in STRUCTURES
]

# Families whose structure is like one of the four above, or of their own; they get a shorter test.
OTHERS = [
    pytest.param(name, router, id=f"{name}-{router}")
    for name in MOE_NAMES
    for router in SETTINGS
    if router not in FOUNDATION and name not in STRUCTURES
]

# Sums of a few dozen float32 products in another order differ by a few units in the last place of logits near 10.
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}


def inputs_of(name: str, **kwargs):
    return tiny_inputs("llama" if name == UPCYCLED else name, **kwargs)


def _upcycled(config: RouterConfig):
    model = upcycle(tiny_model("llama"), "drop", num_experts=4, router=config, target="ext")
    for router in iter_routers(model):
        router.weight.data *= 30  # a fresh gate is nearly flat
    return model


@functools.cache
def _stock(name: str):
    return _upcycled(TopKRouterConfig()) if name == UPCYCLED else tiny_model(name)


def router_config(name: str, router: str) -> RouterConfig:
    return SETTINGS[router]("llama" if name == UPCYCLED else name)


def extended(name: str, router: str, model=None):
    config = router_config(name, router)
    if name == UPCYCLED:
        return _upcycled(config)
    model = copy.deepcopy(_stock(name)) if model is None else model
    try:
        return extend(model, MoeExtension(router=config))
    except (ValueError, NotImplementedError) as refusal:
        if get_family(name).note and router != "top_k":
            pytest.skip(f"{name} refuses {router}: {refusal}")
        raise


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs)[0]


@pytest.mark.parametrize(("name", "router"), ROWS)
def test_identity_start_equals_stock(name, router):
    model, inputs = copy.deepcopy(_stock(name)), inputs_of(name)
    expected = logits(model, inputs)
    if name == UPCYCLED:
        site = next(iter_routers(model)).moe_site
    else:
        site = plan_extension(model, get_family(name), MoeExtension(router="top_k"), building=False).layers[0].site
    try:
        config = get_router(router).identity_config(site)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    if name == UPCYCLED:
        torch.testing.assert_close(logits(_upcycled(config), inputs), expected, **ROUNDING)
        return
    extend(model, MoeExtension(router=config))
    torch.testing.assert_close(logits(model, inputs), expected, **ROUNDING)
    restore(model)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("name", MOE_NAMES)
def test_explicit_rule_equals_stock(name):
    """The family's rule computed by our own code, not by the stock gate."""
    family = get_family(name)
    if family.moe.score == "custom":
        pytest.skip("the stock gate follows a rule of its own")
    model, inputs = copy.deepcopy(_stock(name)), inputs_of(name)
    expected = logits(model, inputs)
    site = plan_extension(model, family, MoeExtension(router=TopKRouterConfig()), building=False).layers[0].site
    extend(model, MoeExtension(router=TopKRouterConfig(num_experts_per_tok=site.top_k)))
    torch.testing.assert_close(logits(model, inputs), expected, **ROUNDING)


def attributes(model):
    """Names of everything that hangs on any module, hooks included."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    return [(name, sorted(vars(m)), [len(getattr(m, h)) for h in hooks]) for name, m in model.named_modules()]


@pytest.mark.parametrize(("name", "router"), ROWS)
def test_restore_is_bit_equal(name, router):
    if name == UPCYCLED:
        pytest.skip("the dense blocks of an upcycled model no longer exist")
    model, inputs = copy.deepcopy(_stock(name)), inputs_of(name)
    expected, keys, kind, before = logits(model, inputs), list(model.state_dict()), type(model), attributes(model)
    extended(name, router, model)
    logits(model, inputs)
    restore(model)
    assert type(model) is kind and type(model.config) is kind.config_class
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, inputs), expected)
    assert attributes(model) == before


@pytest.mark.parametrize(("name", "router"), ROWS)
def test_records_of_every_layer(name, router):
    model, inputs = extended(name, router), inputs_of(name)
    with trace_routing(model) as contexts:
        logits(model, inputs)
    records = {key: record for context in contexts for key, record in context.records.items()}
    expected = [layer.key for layer in describe(model).layers if layer.router == router]
    assert list(records) == expected and expected
    for record in records.values():
        used = record.index < record.num_experts
        assert record.index.dtype == torch.int64 and record.index.min() >= 0
        free = record.index > record.num_experts  # zero-computation experts
        assert (record.weights[~used & ~free] == 0).all()
        assert (record.index[~used & ~free] == record.num_experts).all()
        torch.testing.assert_close(record.scores.sum(-1), torch.ones(len(record.scores)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "router"), OTHERS)
def test_runs_on_every_family(name, router):
    """Decides in every layer, trains, and is taken back; or is refused with a reason, before anything changes."""
    model, inputs = copy.deepcopy(_stock(name)), inputs_of(name)
    expected, before = logits(model, inputs), attributes(model)
    try:
        extend(model, MoeExtension(router=router_config(name, router)))
    except ValueError as refusal:
        assert attributes(model) == before and torch.equal(logits(model, inputs), expected)
        pytest.skip(f"refused: {refusal}")
    with trace_routing(model) as contexts:
        assert logits(model, inputs).isfinite().all()
    records = {key: record for context in contexts for key, record in context.records.items()}
    assert list(records) == [layer.key for layer in describe(model).layers if layer.router == router]
    gradients = backward(model, inputs)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    if get_router(router).learned:
        own = {id(p) for gate in (*iter_routers(model), *shared_parts(model)) for p in gate.parameters()}
        assert any(
            gradients[n].abs().sum() > 0 for n, p in model.named_parameters() if id(p) in own and n in gradients
        )
    model.eval()
    restore(model)
    assert torch.equal(logits(model, inputs), expected)


@functools.cache
def _stock_survives_saving(name: str) -> bool:
    model, inputs = copy.deepcopy(_stock(name)), inputs_of(name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            return torch.equal(logits(type(model).from_pretrained(folder).eval(), inputs), logits(model, inputs))
        except (KeyError, RuntimeError):
            return False


@pytest.mark.parametrize(("name", "router"), ROWS)
def test_save_load(name, router, tmp_path):
    if not _stock_survives_saving(name):
        pytest.skip("the stock model itself does not survive saving and loading in this version of transformers")
    model, inputs = extended(name, router), inputs_of(name)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.moe_ext == model.config.moe_ext
    assert torch.equal(logits(again.eval(), inputs), expected)


def backward(model, inputs):
    """One training forward and backward; the gradients by name."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.zero_grad()
    labels = _labels(model, inputs)
    torch.manual_seed(0)
    model(**inputs, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _labels(model, inputs):
    if "pixel_values" in inputs and "input_ids" not in inputs:
        return torch.zeros(len(inputs["pixel_values"]), dtype=torch.long)
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    kind = type(model).__name__
    if kind.endswith("ForSequenceClassification"):
        return torch.zeros(len(ids), dtype=torch.long)
    return torch.zeros_like(ids) if kind.endswith("ForTokenClassification") else ids.clone()


@pytest.mark.parametrize(("name", "router"), ROWS)
def test_gradient_reaches_every_router(name, router):
    model = extended(name, router)
    if not get_router(router).learned:
        pytest.skip("this router is not learned")
    gradients = backward(model, inputs_of(name))
    shared = [parameter for module in shared_parts(model) for parameter in module.parameters()]
    for gate in iter_routers(model):
        own = [n for n, p in model.named_parameters() if any(p is q for q in (*gate.parameters(), *shared))]
        assert sum(gradients[n].abs().sum() for n in own if n in gradients) > 0, gate.moe_site.key


@pytest.mark.parametrize(("name", "router"), ROWS)
def test_gradient_checkpointing_equals_plain(name, router):
    model, inputs = extended(name, router), inputs_of(name)
    if not model.supports_gradient_checkpointing:
        pytest.skip("the stock model does not support gradient checkpointing")
    plain = backward(model, inputs)
    enable = getattr(model, "activation_checkpointing_enable", None)  # the name since 5.23
    if enable is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        enable()
    recomputed = backward(model, inputs)
    assert plain.keys() == recomputed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("name", "router"), ROWS)
def test_bfloat16(name, router):
    model, inputs = extended(name, router).to(torch.bfloat16), inputs_of(name)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    try:
        expected = logits(copy.deepcopy(_stock(name)).to(torch.bfloat16), inputs)
    except RuntimeError as error:
        pytest.skip(f"the stock model does not run in bfloat16: {error}")
    out = logits(model, inputs)
    assert out.dtype == expected.dtype and out.isfinite().all()


def _generates(model, inputs) -> bool:
    return model.can_generate() and "pixel_values" not in inputs and not model.config.is_encoder_decoder


@pytest.mark.parametrize(("name", "router"), ROWS)
def test_cached_generation_equals_uncached(name, router):
    model, inputs = extended(name, router), inputs_of(name, batch=1)
    if not _generates(model, inputs):
        pytest.skip("no causal generation from text")
    if not get_router(router).causal:
        pytest.skip("models with this router do not generate")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def both(model):
        return [model.generate(**inputs, **options, use_cache=cache).tolist() for cache in (True, False)]

    cached, uncached = both(copy.deepcopy(_stock(name)))
    if cached != uncached:
        pytest.skip("the stock model itself generates other tokens with its cache than without")
    cached, uncached = both(model)
    assert cached == uncached


@pytest.mark.parametrize(("name", "router"), [row for row in ROWS if row.values[1] not in FOUNDATION])
def test_beam_search_with_a_cache_equals_without(name, router):
    model, inputs = extended(name, router), inputs_of(name, batch=1)
    if not get_router(router).causal:
        pytest.skip("models with this router do not generate")
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, uncached = (model.generate(**inputs, **options, use_cache=cache).tolist() for cache in (True, False))
    assert cached == uncached


@pytest.mark.parametrize(("name", "router"), ROWS)
def test_left_padding_equals_single_rows(name, router):
    model, inputs = extended(name, router), inputs_of(name, batch=1)
    if not _generates(model, inputs):
        pytest.skip("no causal text model")
    if not get_router(router).causal:
        pytest.skip("the rows of a batch are routed together")
    ids = inputs["input_ids"]
    padded = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), torch.ones_like(ids)], dim=1)
    positions = torch.cat([torch.ones(1, 3, dtype=ids.dtype), torch.arange(ids.shape[1])[None]], dim=1)
    stock = copy.deepcopy(_stock(name))
    extra = {"position_ids": positions}
    before = logits(stock, {"input_ids": ids}), logits(stock, {"input_ids": padded, "attention_mask": mask, **extra})
    if not torch.allclose(before[0], before[1][:, 3:], atol=1e-4):
        pytest.skip("the stock model itself is not invariant to left padding")
    with trace_routing(model) as contexts:
        single = logits(model, {"input_ids": ids})
        whole = logits(model, {"input_ids": padded, "attention_mask": mask, **extra})
    torch.testing.assert_close(whole[:, 3:], single, rtol=1e-4, atol=1e-4)
    last = contexts[-1]
    assert last.token_mask(padded.numel()).tolist() == [False] * 3 + [True] * ids.shape[1]


@pytest.mark.parametrize(("name", "router"), ROWS)
def test_automatic_device_map(name, router, tmp_path):
    if not _stock_survives_saving(name):
        pytest.skip("the stock model itself does not survive saving and loading in this version of transformers")
    model, inputs = extended(name, router), inputs_of(name)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(logits(again, inputs), expected)


# A C++ compiler is what inductor needs on a CPU.
BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is here")],
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("router", SETTINGS)
def test_full_graph_compile_equals_eager(router, backend):
    model, inputs = extended("mixtral", router), inputs_of("mixtral")
    expected = backward(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._inductor.config.patch(fallback_random=True):  # the random numbers of eager PyTorch
        found = {name.removeprefix("_orig_mod."): gradient for name, gradient in backward(compiled, inputs).items()}
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("name", "router"), [row for row in ROWS if row.values[1] not in FOUNDATION])
def test_two_forwards_before_one_backward(name, router):
    """What layers hand on belongs to its own forward."""
    model, inputs = extended(name, router), inputs_of(name)
    other = {key: value.flip(-1) for key, value in inputs.items()}
    apart = [backward(model, batch) for batch in (inputs, other)]
    model.zero_grad()
    torch.manual_seed(0)
    first = model(**inputs, labels=_labels(model, inputs)).loss
    torch.manual_seed(0)
    second = model(**other, labels=_labels(model, other)).loss
    (first + second).backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected = sum(gradients[key] for gradients in apart if key in gradients)
            torch.testing.assert_close(
                parameter.grad, expected, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("name", MOE_NAMES)
def test_new_parameters_are_initialised(name, tmp_path, poison_memory):
    """A stock checkpoint lacks what a router adds; loading it must not leave raw memory there."""
    config = TopKRouterConfig(correction_bias=True, num_experts_per_tok=1, score="softmax")
    stock = copy.deepcopy(_stock(name))
    stock.save_pretrained(tmp_path)
    model = extended_class(type(stock)).from_pretrained(
        tmp_path, config=_with_extension(stock.config, MoeExtension(router=config))
    )
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert not tensor.is_floating_point() or tensor.isfinite().all(), key
    biases = [b for n, b in model.named_buffers() if n.endswith("moe_correction_bias")]
    assert all((bias == 0).all() for bias in biases)


def _with_extension(config, extension):
    config = copy.deepcopy(config)
    config.__class__ = extended_config_class(type(config))
    config.moe_ext = extension.to_dict()
    return config
