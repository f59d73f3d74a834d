"""Momentum across layers, against an independent chain of hooks, closed forms and the theory of the optimizers."""

from __future__ import annotations

import copy
import functools
import inspect
import math

import pytest
import torch
from tiny_models import DENSE_NAMES, MOE_NAMES, tiny_inputs, tiny_model
from transformers import MixtralForCausalLM

import hf_moe_ext as moe
from hf_moe_ext import MoeExtension, MomentumConfig, extend, restore, upcycle
from hf_moe_ext.modeling.configuration_moe_ext import LayerExtension
from hf_moe_ext.modeling.moe_context import RoutingContext, RoutingLink
from hf_moe_ext.modeling.moe_families import get_by_path, get_family, has_path, iter_layers
from hf_moe_ext.modeling.moe_momentum import Momentum, robust_coefficients
from hf_moe_ext.modeling.moe_structure import find_moe_spec
from tests.trainers.common import arguments, rows, sgd, stock_mixtral


STRUCTURES = ("mixtral", "deepseek_v3", "qwen2_moe", "llama4")
KINDS = {
    "heavy_ball": {"decay": 0.6, "step_size": 0.8},
    "adam": {"kind": "adam", "adam_layers": 2, "step_size": 0.05, "beta1": 0.8, "beta2": 0.95, "skip_coef": 0.3},
    "robust": {"kind": "robust", "condition": 4.0, "smoothness": 1.5, "rate": 0.6},
}
DEEP = {"num_hidden_layers": 5}
# The name of the cache among the arguments and outputs of a model; newer versions of Transformers have a shorter one.
CACHE = "cache" if "cache" in inspect.signature(MixtralForCausalLM.forward).parameters else "past_key_values"


@functools.cache
def _stock(name: str, **overrides):
    return tiny_model(name, **overrides)


def stock(name="mixtral", **overrides):
    return copy.deepcopy(_stock(name, **overrides))


def with_momentum(name="mixtral", config=None, **overrides):
    return extend(stock(name, **overrides), MoeExtension(momentum=MomentumConfig(**(config or {}))))


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs)[0]


def momenta(model) -> list[Momentum]:
    found = [module for module in model.modules() if isinstance(module, Momentum)]
    return sorted(found, key=lambda module: module.order)


# --- the reference: a chain of hooks on the stock model, with its own formulas ---


class Chain:
    """Momentum by hooks that share one Python object, in the order of computation."""

    def __init__(self, model, config: MomentumConfig, *, detach=False, name="mixtral"):
        self.config, self.detach = config, detach
        family = get_family(name)
        for index, (_, layer, _) in enumerate(
            item for item in iter_layers(model, family) if find_moe_spec(item[1], family) is not None
        ):
            block = get_by_path(layer, family.moe.block)
            block.register_forward_hook(functools.partial(self.after, index))
            get_by_path(layer, family.moe.norm).register_forward_pre_hook(functools.partial(self.before, index))

    def before(self, index, module, args):
        if index == 0:
            self.p = self.m = self.v = 0.0
        (self.x,) = args
        if self.config.kind != "robust":
            return None
        c, rho = self.config.condition, self.config.rate
        return (self.x + rho**3 / ((c - 1) * (1 - rho) ** 2 * (1 + rho)) * self.p,)

    def after(self, index, module, args, output):
        f = (output[0] if isinstance(output, tuple) else output).view_as(self.x)
        out = self.step(index, f)
        if self.detach:
            self.p = self.p.detach()
        return (out.view_as(output[0]), *output[1:]) if isinstance(output, tuple) else out

    def step(self, index, f):
        c = self.config
        if c.kind == "robust":
            cond, rho = c.condition, c.rate
            self.p = cond * rho**3 / (cond - 1) * self.p + cond * (1 - rho) ** 2 * (1 + rho) / c.smoothness * f
            return self.p
        self.p = c.decay * self.p + f
        if c.kind == "heavy_ball":
            return c.step_size * self.p
        self.m = c.beta1 * self.m + (1 - c.beta1) * f
        self.v = c.beta2 * self.v + (1 - c.beta2) * f**2
        if index < c.adam_layers:
            return c.step_size * self.m / torch.sqrt(self.v + c.eps) - c.skip_coef * self.x
        return self.p


def gradients(model, inputs):
    model.train()
    model.zero_grad()
    labels = inputs["input_ids"].clone()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_logits_and_gradients_equal_the_reference(name, kind):
    config = MomentumConfig(**KINDS[kind])
    mine, reference = with_momentum(name, KINDS[kind], **DEEP).double(), stock(name, **DEEP).double()
    reference.set_experts_implementation("eager")  # the default one has no float64
    Chain(reference, config, name=name)
    inputs = tiny_inputs(name)
    torch.testing.assert_close(logits(mine, inputs), logits(reference, inputs), rtol=1e-6, atol=1e-6)
    found, expected = gradients(mine, inputs), gradients(reference, inputs)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")


def test_gradient_goes_through_the_carry():
    """Layer 0 is trained for what later layers make of its velocity: without that path its gradient differs."""
    config = MomentumConfig(decay=0.7)
    inputs, key = tiny_inputs("mixtral"), "model.layers.0.mlp.experts.down_proj"
    whole, cut = stock(), stock()
    Chain(whole, config), Chain(cut, config, detach=True)
    mine, whole, cut = (gradients(m, inputs)[key] for m in (with_momentum(config={"decay": 0.7}), whole, cut))
    torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-6)
    assert (mine - cut).norm() > 0.05 * cut.norm()


# --- identity ---


@pytest.mark.parametrize("scope", ["block", "routed"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen2_moe"])
def test_no_decay_is_the_stock_model_bit_for_bit(name, scope):
    model, inputs = stock(name), tiny_inputs(name, batch=1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected, tokens = logits(model, inputs), model.generate(**inputs, **options)
    extend(model, MoeExtension(momentum=MomentumConfig(decay=0.0, scope=scope)))
    assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(model.generate(**inputs, **options), tokens)
    restore(model)
    assert torch.equal(logits(model, inputs), expected) and not momenta(model)


def test_no_decay_is_the_stock_model_in_bfloat16():
    model, inputs = stock().bfloat16(), tiny_inputs("mixtral")
    model.set_experts_implementation("moe_ext")  # as the extension will: another one rounds in other places
    expected = logits(model, inputs)
    extend(model, MoeExtension(momentum=MomentumConfig(decay=0.0)))
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("name", MOE_NAMES)
def test_every_family(name):
    """The stock function at decay 0; another one above; or a refusal that says why."""
    model, inputs = stock(name), tiny_inputs(name)
    expected = logits(model, inputs)
    try:
        extend(model, MoeExtension(momentum=MomentumConfig(decay=0.0)))
    except ValueError as refusal:
        keys = [k for k, layer, _ in iter_layers(model, get_family(name)) if find_moe_spec(layer, get_family(name))]
        if name == "gemma4":
            assert "router and experts stand on the layer itself" in str(refusal)
        else:
            assert "is the only one that has it" in str(refusal) and len(keys) <= 2  # one in each stack
        return
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=2e-5)
    restore(model)
    extend(model, MoeExtension(momentum=MomentumConfig(decay=0.7)))
    out = logits(model, inputs)
    assert out.isfinite().all() and (out - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", sorted({*MOE_NAMES, *DENSE_NAMES}))
def test_the_norm_of_the_record_feeds_the_block_and_nothing_else(name):
    """Its output is the block's input, its input has the shape of the residual stream, and with the block silenced
    a change of its input changes nothing."""
    model, family = stock(name), get_family(name)
    layers = [layer for _, layer, _ in iter_layers(model, family)]
    layers = [layer for layer in layers if family.moe is None or find_moe_spec(layer, family) is not None]
    layer, spec = layers[-1], family.moe or family.dense
    if spec.norm is None:
        with pytest.raises(ValueError, match=r"needs a norm in front|have none|layer itself"):
            robust = MoeExtension(momentum=MomentumConfig(kind="robust"))
            if family.moe is not None:
                extend(model, robust)
            else:
                upcycle(model, num_experts=2, parts={"momentum": {"kind": "robust"}}, check=False)
        return
    norm, block = get_by_path(layer, spec.norm), get_by_path(layer, spec.block if family.moe else spec.site)
    seen, outputs = {}, []
    norm.register_forward_hook(lambda m, args, out: seen.update(stream=args[0], normed=out))
    block.register_forward_pre_hook(lambda m, args: seen.update(taken=args[0]))
    silenced = [block, *(get_by_path(layer, path) for path in (() if family.moe else spec.bypass))]
    for module in silenced:
        module.register_forward_hook(lambda m, a, o: (o[0] * 0, *o[1:]) if isinstance(o, tuple) else o * 0)
    layer.register_forward_hook(lambda m, a, o: outputs.append(o[0] if isinstance(o, tuple) else o))
    logits(model, tiny_inputs(name))
    norm.register_forward_pre_hook(lambda m, args: (args[0] + torch.randn_like(args[0]), *args[1:]))
    logits(model, tiny_inputs(name))
    assert seen["taken"] is seen["normed"]
    assert seen["stream"].numel() == outputs[0].numel() and torch.equal(*outputs)


# --- the unrolled form, generation, checkpointing ---


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_unrolled(name):
    """`out_l = gamma * sum_j mu^(l-j) f_j` at every MoE layer; dense layers in between leave the state alone."""
    mu, gamma = 0.6, 0.8
    model = with_momentum(name, {"decay": mu, "step_size": gamma}, **DEEP)
    taken, given = [], []
    for module in momenta(model):
        module.register_forward_hook(lambda m, args, out: taken.append(args[0]) or given.append(out))
    logits(model, tiny_inputs(name))
    assert len(given) == (5 if name == "mixtral" else 4)
    for place, out in enumerate(given):
        expected = gamma * sum(mu ** (place - j) * taken[j] for j in range(place + 1))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_equals_full_forward(kind):
    """Nothing crosses tokens, so nothing belongs into the cache."""
    model, ids = with_momentum(config=KINDS[kind], **DEEP), tiny_inputs("mixtral", batch=1)["input_ids"]
    with torch.no_grad():
        whole, cache, steps = model(ids).logits, None, []
        for t in range(ids.shape[1]):
            out = model(ids[:, t : t + 1], use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(kind):
    model, inputs = with_momentum(config=KINDS[kind], **DEEP), tiny_inputs("mixtral")
    other = {key: value.flip(-1) for key, value in inputs.items()}
    plain, second = gradients(model, inputs), gradients(model, other)
    enable = getattr(model, "activation_checkpointing_enable", None)  # the name since 5.23
    if enable is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        enable()
    for key, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, plain[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    model.zero_grad()
    losses = [model(**batch, labels=batch["input_ids"]).loss for batch in (inputs, other)]
    sum(losses).backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain[key] + second[key], rtol=1e-4, atol=1e-5)


def test_reentrant_checkpointing_is_refused():
    model = with_momentum()
    model.model.gradient_checkpointing = True
    model.model._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    restored = restore(model)
    with pytest.raises(ValueError, match="use_reentrant"):
        extend(restored, MoeExtension(momentum=MomentumConfig()))


@pytest.mark.parametrize("kind", KINDS)
def test_full_graph_compile_equals_eager(kind):
    model, inputs = with_momentum(config=KINDS[kind], num_hidden_layers=2), tiny_inputs("mixtral")
    expected = gradients(model, inputs)
    torch._dynamo.reset()
    found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{key}"], gradient, rtol=1e-4, atol=1e-5)


STATES = {
    "heavy_ball": {"momentum"},
    "adam": {"momentum", "momentum_mean", "momentum_square"},
    "robust": {"momentum"},
}


@pytest.mark.parametrize(("kind", "names"), STATES.items(), ids=STATES)
def test_state_is_float32_in_a_bfloat16_model(kind, names):
    model = with_momentum(config=KINDS[kind], **DEEP).bfloat16()
    normed: list[torch.dtype] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda m, args, out: normed.append(out.dtype))
    contexts = []
    model.moe_link.observers.append(contexts.extend)
    out = logits(model, tiny_inputs("mixtral"))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    state = {name: value.dtype for (_, name), value in contexts[0].carry.items() if name != "momentum_stream"}
    assert set(state) == names
    assert set(state.values()) == {torch.float32} and normed == [torch.bfloat16] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model, inputs = with_momentum(config=KINDS[kind], **DEEP), tiny_inputs("mixtral")
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.moe_ext == model.config.moe_ext
    assert torch.equal(logits(again.eval(), inputs), logits(model, inputs))
    assert torch.equal(logits(copy.deepcopy(model), inputs), logits(model, inputs))


def test_goes_with_every_part_and_router():
    extension = {
        "router": {"type": "top_p", "threshold": 0.5},
        "zero_experts": {"zero": 1, "copy": 1},
        "shared_experts": {},
        "momentum": {"decay": 0.5},
    }
    model, inputs = extend(stock(), extension), tiny_inputs("mixtral")
    first = model.model.layers[0].mlp
    first.moe_shared.down_proj.weight.data.normal_()
    taken = []
    first.moe_momentum.register_forward_hook(lambda m, args, out: taken.append((args[0], out)))
    shared = []
    first.moe_shared.register_forward_hook(lambda m, args, out: shared.append(out))
    routed = []
    first.experts.register_forward_hook(lambda m, args, out: routed.append(out))
    logits(model, inputs)
    whole = routed[0].view_as(shared[0]) + shared[0]  # momentum stands outside: it takes the whole block
    torch.testing.assert_close(taken[0][0], whole)


def test_scope_routed_leaves_shared_experts_out():
    block = with_momentum("deepseek_v3", {"scope": "routed", "decay": 0.5}).model.layers[2].mlp
    assert "moe_momentum" in block.experts._modules and "moe_momentum" not in block._modules
    model, reference = with_momentum("deepseek_v3", {"scope": "routed", "decay": 0.5}), stock("deepseek_v3")
    velocity = []

    def carry(module, args, out):
        velocity.append(out + 0.5 * velocity[-1] if velocity else out)
        return velocity[-1]

    for layer in reference.model.layers[1:]:
        layer.mlp.experts.register_forward_hook(carry)
    inputs = tiny_inputs("deepseek_v3")
    torch.testing.assert_close(logits(model, inputs), logits(reference, inputs), rtol=1e-5, atol=1e-5)


def test_each_stack_starts_anew():
    """Orders count on over encoder and decoder; the decoder's first layer must not see the encoder's last."""
    model = upcycle(tiny_model("t5"), num_experts=4, parts={"momentum": {"decay": 0.7}}, check=False)
    seen = {}
    for module in momenta(model):
        module.register_forward_hook(lambda m, args, out, order=module.order: seen.update({order: (args[0], out)}))
    logits(model, tiny_inputs("t5"))
    first = [torch.equal(*seen[order]) for order in sorted(seen)]
    assert first == [True, False, True, False]


def test_a_layer_left_out_is_passed_over():
    model = extend(stock(**DEEP), MoeExtension(momentum=MomentumConfig(decay=0.5), layers={"2": None}))
    seen = []
    for module in momenta(model):
        module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    logits(model, tiny_inputs("mixtral"))
    assert len(seen) == 4
    torch.testing.assert_close(seen[2][1], seen[2][0] + 0.5 * seen[1][1])


# --- the theory of the optimizers, on linear experts ---


def roll(config: MomentumConfig, expert, x: torch.Tensor, steps: int) -> tuple[list, list]:
    """The residual stream after each of many layers, and the points at which the experts were asked."""
    link, context = RoutingLink(), RoutingContext()
    link.slots.layer_context = context
    stream, asked = [x], []
    for order in range(steps):
        layer = Momentum(config, order, link, torch.device("cpu"))
        point = layer.before(stream[-1]) if config.needs_stream else stream[-1]
        asked.append(point)
        stream.append(stream[-1] + layer(expert(point)))
        for key in [key for key in context.carry if key[0] < order and key[1] != "momentum"]:
            del context.carry[key]
    return stream, asked


def test_heavy_ball_converges_exactly_where_theory_says():
    """On `f = -sigma x`: iff `0 < gamma sigma < 2 (1 + mu)`, as the eigenvalues of its matrix say. mu = 0 is the stock
    model, which converges for `gamma sigma < 2` only."""
    checked = 0
    for mu in torch.linspace(0, 0.95, 20, dtype=torch.float64).tolist():
        sigma = torch.linspace(-0.5, 4.5, 200, dtype=torch.float64)
        for gamma in (0.5, 1.0):
            config = MomentumConfig(decay=mu, step_size=gamma)
            last = roll(config, lambda x: -sigma * x, torch.ones_like(sigma), 300)[0][-1]  # noqa: B023
            for s, x in zip(sigma.tolist(), last.tolist(), strict=True):
                matrix = torch.tensor([[1 + mu - gamma * s, -mu], [1.0, 0.0]], dtype=torch.float64)
                radius = torch.linalg.eigvals(matrix).abs().max().item()
                theory = 0 < gamma * s < 2 * (1 + mu)
                if abs(radius - 1) > 0.025:  # decided within 300 layers
                    assert (radius < 1) == theory, (mu, gamma, s)
                    assert (abs(x) < 0.1) == theory, (mu, gamma, s, x)
                    checked += 1
    assert checked > 6000


def quadratic(condition: float, size: int = 12):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    curvature = torch.linspace(1 / condition, 1, size, dtype=torch.float64)
    matrix = basis @ torch.diag(curvature) @ basis.T
    return lambda x: -x @ matrix


def test_most_robust_rate_is_gradient_descent():
    """`rho = 1 - 1/cond`: the points at which the experts are asked are those of gradient descent with step 1/L."""
    expert, start = quadratic(10), torch.randn(3, 12, dtype=torch.float64)
    config = MomentumConfig(kind="robust", condition=10.0, smoothness=2.0, rate=0.9)
    _, asked = roll(config, expert, start, 30)
    y = start
    for point in asked:
        torch.testing.assert_close(point, y, rtol=0, atol=1e-12)
        y = y + expert(y) / 2.0


def test_fastest_rate_is_the_triple_momentum_method():
    """cond 10, 40 layers: gradient descent is at 0.9^40 = 1.5e-2, triple momentum near 0.684^40 = 2.5e-7."""
    expert, start = quadratic(10), torch.ones(1, 12, dtype=torch.float64)
    errors = {}
    for rate in (None, 0.9):
        stream, asked = roll(MomentumConfig(kind="robust", condition=10.0, rate=rate), expert, start, 41)
        errors[rate] = (asked[40].norm() / start.norm()).item()
    assert 1e-3 < errors[0.9] < 1.6e-2 and errors[None] < 1e-5
    rho = 1 - 1 / math.sqrt(10)
    step, decay, ahead = robust_coefficients(1.0, 10.0, None)
    # Van Scoy et al. 2018, with L = 1 and m = 0.1; gamma and beta of a method that evaluates at x + gamma (x - x').
    assert step == pytest.approx(1 + rho)
    assert decay == pytest.approx(rho**2 / (2 - rho))
    assert ahead == pytest.approx(rho**2 / ((1 + rho) * (2 - rho)))


def test_adam_step_has_the_same_size_whatever_the_experts_say():
    """The first step is `gamma (1 - b1) / sqrt(1 - b2) = 3.16 gamma` in every coordinate."""
    config = MomentumConfig(kind="adam", step_size=0.5)
    for scale in (1.0, 30.0, 1e3):
        push = scale * torch.randn(50, 8).sign() * (0.5 + torch.rand(50, 8))
        stream, _ = roll(config, lambda x: push, torch.zeros(50, 8), 1)  # noqa: B023
        torch.testing.assert_close(
            stream[1].abs(), torch.full((50, 8), 0.5 * 0.1 / math.sqrt(0.001)), rtol=1e-3, atol=0
        )
        assert torch.equal(stream[1].sign(), push.sign())


def test_adam_then_heavy_ball_token_by_token():
    """The Adam layers, then heavy ball whose buffer has counted from the first layer on with step 1."""
    config = MomentumConfig(kind="adam", adam_layers=2, decay=0.7, step_size=0.8, skip_coef=0.25, beta2=0.9)
    pushes = torch.randn(5, 4, 3, dtype=torch.float64)
    calls = iter(pushes)
    stream, _ = roll(config, lambda x: next(calls), torch.randn(4, 3, dtype=torch.float64), 5)
    for token in range(4):
        for unit in range(3):
            x, mean, square, velocity = stream[0][token, unit].item(), 0.0, 0.0, 0.0
            for place in range(5):
                f = pushes[place, token, unit].item()
                mean, square = 0.9 * mean + 0.1 * f, 0.9 * square + 0.1 * f * f
                velocity = 0.7 * velocity + f
                if place < 2:
                    x = x + 0.8 * mean / math.sqrt(square + 1e-8) - 0.25 * x
                else:
                    x = x + velocity
            assert stream[5][token, unit].item() == pytest.approx(x, rel=1e-10)


# --- warm-up ---


def test_warmup_starts_as_the_stock_model_and_ends_at_the_decay(tmp_path):
    model, inputs = stock_mixtral(num_hidden_layers=3).eval(), {"input_ids": torch.arange(1, 15).view(2, 7)}
    expected = logits(model, inputs)
    target = logits(extend(copy.deepcopy(model), MoeExtension(momentum=MomentumConfig(decay=0.6))), inputs)
    extend(model, MoeExtension(momentum=MomentumConfig(decay=0.6, warmup_steps=4)))
    assert torch.equal(logits(model, inputs), expected)
    for step, decay in ((1, 0.15), (2, 0.3), (4, 0.6), (9, 0.6)):
        for module in momenta(model):
            module.schedule(step, 10)
            assert float(module._decay()) == pytest.approx(decay)
    assert torch.equal(logits(model, inputs), target)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval(), inputs), target)


def test_the_trainer_drives_the_warmup(tmp_path):
    model = extend(stock_mixtral(), MoeExtension(router="top_k", momentum=MomentumConfig(warmup_steps=3)))
    seen = []
    momenta(model)[0].register_forward_hook(lambda m, args, out: seen.append(float(m._decay())))
    options = sgd(max_steps=4, learning_rate=0.0)
    trainer = moe.MoETrainer(model=model, args=arguments(tmp_path, **options), train_dataset=rows([9] * 8))
    trainer.train()
    assert seen == pytest.approx([0.0, 0.7 / 3, 1.4 / 3, 0.7])
    assert [module.moe_progress.tolist() for module in momenta(model)] == [[4, 4]] * 2
    short = moe.MoETrainer(model=model, args=arguments(tmp_path, **sgd(max_steps=2)), train_dataset=rows([9] * 4))
    with pytest.raises(ValueError, match="the schedule of `momentum` takes 3 optimizer steps, this training has 2"):
        short.train()


def test_a_stock_checkpoint_loads_with_a_fresh_warmup(tmp_path, poison_memory):
    stock_mixtral().save_pretrained(tmp_path)
    model = with_momentum(config={"warmup_steps": 3})
    values = stock_mixtral().config.to_dict()
    config = type(model.config)(**{k: v for k, v in values.items() if k != "model_type"}, moe_ext=model.config.moe_ext)
    loaded = type(model).from_pretrained(tmp_path, config=config)
    assert [module.moe_progress.tolist() for module in momenta(loaded)] == [[0, 0]] * 2


# --- what is refused ---


BAD = {
    "decay_of_one": ({"decay": 1.0}, ValueError, r"`decay` must be in \[0, 1\), got 1.0"),
    "decay_below": ({"decay": -0.1}, ValueError, r"`decay` must be in \[0, 1\)"),
    "beta1": ({"beta1": 1.5}, ValueError, "`beta1`"),
    "step_size": ({"step_size": 0.0}, ValueError, "`step_size` must be positive, got 0.0"),
    "eps": ({"eps": 0.0}, ValueError, "`eps` must be positive"),
    "smoothness": ({"smoothness": -1.0}, ValueError, "`smoothness` must be positive"),
    "condition": ({"condition": 1.0}, ValueError, "`condition` must be above 1, got 1.0"),
    "rate_low": ({"condition": 4.0, "rate": 0.4}, ValueError, r"`rate` must be in \[0.5, 0.75\]"),
    "rate_high": ({"condition": 4.0, "rate": 0.8}, ValueError, r"`rate` must be in \[0.5, 0.75\]"),
    "adam_layers": ({"adam_layers": 0}, ValueError, "`adam_layers` must be at least 1"),
    "skip_coef": ({"skip_coef": -1.0}, ValueError, "`skip_coef` must be non-negative"),
    "warmup": ({"warmup_steps": -1}, ValueError, "`warmup_steps` must be non-negative"),
    "warmup_kind": ({"kind": "adam", "warmup_steps": 5}, ValueError, '`warmup_steps` is for `kind="heavy_ball"`'),
    "robust_scope": ({"kind": "robust", "scope": "routed"}, ValueError, 'needs `scope="block"`'),
    "kind": ({"kind": "nesterov"}, TypeError, "`kind`"),
}


@pytest.mark.parametrize(("settings", "error", "message"), BAD.values(), ids=BAD)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        MomentumConfig(**settings)


REFUSED = {
    "one_layer": ("mixtral", {"num_hidden_layers": 1}, MoeExtension(momentum=MomentumConfig()), "is the only one"),
    "no_block": ("gemma4", {}, MoeExtension(momentum=MomentumConfig()), "stand on the layer itself"),
    "routed_adapter": ("dbrx", {}, MoeExtension(momentum=MomentumConfig(scope="routed")), 'Use `scope="block"`'),
    "no_norm": ("flex_olmo", {}, MoeExtension(momentum=MomentumConfig(kind="robust")), "needs a norm in front"),
    "skip_no_norm": (
        "cohere2_moe",
        {},
        MoeExtension(momentum=MomentumConfig(kind="adam", skip_coef=1.0)),
        "`skip_coef` needs a norm in front",
    ),
    "gap": (
        "mixtral",
        {},
        MoeExtension(router="top_k", layers={key: LayerExtension(momentum=MomentumConfig()) for key in ("0", "2")}),
        r"must follow each other, they are \['0', '2'\]",
    ),
}


@pytest.mark.parametrize(("name", "overrides", "extension", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_changed(name, overrides, extension, message):
    model, inputs = stock(name, **overrides), tiny_inputs(name)
    expected, kind = logits(model, inputs), type(model)
    with pytest.raises(ValueError, match=message):
        extend(model, extension)
    assert type(model) is kind and torch.equal(logits(model, inputs), expected)


def test_norms_exist_where_the_records_say():
    for name in MOE_NAMES:
        family = get_family(name)
        for _, layer, _ in iter_layers(stock(name), family):
            if find_moe_spec(layer, family) is not None and family.moe.norm is not None:
                assert has_path(layer, family.moe.norm), name
