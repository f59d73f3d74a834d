"""Soft MoE against loops over sequences, slots and experts in float64; padding; where it may stand."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers import MixtralForCausalLM

from hf_moe_ext import upcycle
from hf_moe_ext.modeling.configuration_moe_ext import LayerExtension, MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_context import RoutingContext, RoutingLink
from hf_moe_ext.modeling.moe_experts import MoeExtBlock, MoeExtExperts, MoeExtGate, RoutedExperts
from hf_moe_ext.modeling.moe_install import install
from hf_moe_ext.modeling.moe_router import GateRule, RouterSite
from hf_moe_ext.modeling.moe_structure import (
    auxiliary_losses,
    install_router,
    iter_routers,
    route_rows,
    trace_routing,
)
from hf_moe_ext.modeling.router_soft_moe import SoftMoERouter, SoftMoERouterConfig
from hf_moe_ext.patching import extend


BATCH, LENGTH, EXPERTS, HIDDEN, WIDTH = 3, 5, 4, 8, 6

# The name of the cache among the arguments and outputs of a model; newer versions of Transformers have a shorter one.
CACHE = "cache" if "cache" in inspect.signature(MixtralForCausalLM.forward).parameters else "past_key_values"


def soft_config(**settings) -> SoftMoERouterConfig:
    return SoftMoERouterConfig(allow_non_causal=True, **settings)


def make_block(config: SoftMoERouterConfig, rule: GateRule | None = None, dtype=torch.float32) -> MoeExtBlock:
    """A block of gated experts with this router, without a model around it."""
    gate = MoeExtGate(EXPERTS, 2, HIDDEN)
    experts = MoeExtExperts(
        SimpleNamespace(_experts_implementation="eager"), EXPERTS, HIDDEN, WIDTH, activation=nn.SiLU()
    )
    site = RouterSite("0", 0, EXPERTS, 2, HIDDEN, rule or GateRule())
    link = RoutingLink()
    SoftMoERouter.check(config, site)
    install_router(gate, config, site, link)
    install(experts, RoutedExperts, moe_num_experts=EXPERTS, moe_link=link, moe_mixing_order=0)
    gate.init_weights(0.02)
    experts.init_weights(0.5)
    if config.normalize:
        gate.moe_scale.data.fill_(3.0)
    return MoeExtBlock(gate, experts).to(dtype)


def run(block: MoeExtBlock, hidden: torch.Tensor, mask: torch.Tensor | None = None):
    """The output of a block for (B, S, H), and the context."""
    context = RoutingContext(attention_mask=mask, batch_size=len(hidden))
    block.gate.moe_link.slots.layer_context = context
    try:
        return block(hidden), context
    finally:
        block.gate.moe_link.slots.layer_context = None


def slow_soft(hidden, slots, scale, up, down, *, per_expert, mask=None, factor=1.0):
    """The equations of section 2.1, one slot and one token at a time. `scale` is None without normalisation."""
    outputs = []
    for b, tokens in enumerate(hidden):
        real = [t for t in range(len(tokens)) if mask is None or mask[b, t]]

        def affinity(t, j, tokens=tokens):
            x, slot = tokens[t], slots[j]
            if scale is None:
                return x @ slot
            return scale[0] * (x @ slot) / torch.sqrt(x @ x) / torch.sqrt(slot @ slot)

        results = []
        for j in range(len(slots)):
            odds = {t: torch.exp(affinity(t, j)) for t in real}
            mixture = sum(odds[t] / sum(odds.values()) * tokens[t] for t in real)
            expert = j // per_expert
            gate, value = (up[expert] @ mixture).chunk(2)
            results.append(down[expert] @ (gate / (1 + torch.exp(-gate)) * value))
        rows = []
        for t in range(len(tokens)):
            odds = [torch.exp(affinity(t, j)) for j in range(len(slots))]
            rows.append(factor * sum(o / sum(odds) * result for o, result in zip(odds, results, strict=True)))
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("per_expert", [1, 3])
def test_equals_the_paper(per_expert, normalize, masked):
    """Output, and the gradients of input, slots, scale and experts."""
    block = make_block(soft_config(slots_per_expert=per_expert, normalize=normalize))
    hidden = torch.randn(BATCH, LENGTH, HIDDEN)
    mask = None
    if masked:
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        mask[0, :2] = mask[2, 1:] = 0
    own = [block.gate.moe_slots, *([block.gate.moe_scale] if normalize else [])]
    own += [block.experts.gate_up_proj, block.experts.down_proj]
    theirs = [tensor.detach().double().requires_grad_() for tensor in (hidden, *own)]
    hidden.requires_grad_()
    out, _ = run(block, hidden, mask)
    arguments = theirs if normalize else [*theirs[:2], None, *theirs[2:]]
    expected = slow_soft(*arguments, per_expert=per_expert, mask=mask)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(out)
    (out * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    for mine, reference in zip((hidden, *own), theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-3, atol=1e-4)
    assert block.gate.weight.grad is None and not block.gate.weight.requires_grad


@pytest.mark.parametrize(("scale", "factor"), [(None, 2.5), (0.5, 0.5)])
def test_output_scale_of_the_family(scale, factor):
    block = make_block(soft_config(scale=scale), GateRule(scale=2.5))
    hidden = torch.randn(BATCH, LENGTH, HIDDEN)
    tensors = (block.gate.moe_slots, block.gate.moe_scale, block.experts.gate_up_proj, block.experts.down_proj)
    expected = slow_soft(hidden.double(), *(tensor.double() for tensor in tensors), per_expert=1, factor=factor)
    torch.testing.assert_close(run(block, hidden)[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_one_token_is_a_dense_mixture():
    """Every slot is the token itself; the output is the mean of all experts by the combine weights."""
    block = make_block(soft_config(slots_per_expert=2))
    hidden = torch.randn(1, 1, HIDDEN)
    out, context = run(block, hidden)
    scores = context.records["0"].scores[0]
    gate, value = (block.experts.gate_up_proj @ hidden[0, 0]).chunk(2, dim=-1)
    outputs = (block.experts.down_proj @ (F.silu(gate) * value).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out[0, 0], scores @ outputs, rtol=1e-4, atol=1e-6)


def test_record_and_matrices():
    """Slots are means over tokens that count, outputs are means over slots; scores are the mass of an expert."""
    block = make_block(soft_config(slots_per_expert=3))
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    context = RoutingContext(attention_mask=mask, batch_size=BATCH)
    record = block.gate.route(torch.randn(BATCH * LENGTH, HIDDEN), context)
    dispatch, combine = (context.carry[(0, name)] for name in ("dispatch", "combine"))
    assert dispatch.shape == combine.shape == (BATCH, LENGTH, EXPERTS * 3)
    torch.testing.assert_close(dispatch.sum(1), torch.ones(BATCH, EXPERTS * 3))
    assert (dispatch[mask == 0] == 0).all() and (dispatch[mask == 1] > 0).all()
    torch.testing.assert_close(combine.sum(-1), torch.ones(BATCH, LENGTH))
    mass = combine.unflatten(-1, (EXPERTS, 3)).sum(-1).flatten(0, 1)
    torch.testing.assert_close(record.scores, mass)
    torch.testing.assert_close(record.weights, mass)
    torch.testing.assert_close(record.logits.softmax(-1), mass)
    assert record.index.tolist() == [list(range(EXPERTS))] * (BATCH * LENGTH)


def test_the_matrices_do_not_outlive_the_layer():
    block = make_block(soft_config())
    _, context = run(block, torch.randn(BATCH, LENGTH, HIDDEN))
    assert not context.carry


def test_symmetries():
    """Order of the tokens, order and company of the sequences, length of the tokens (for the mixing)."""
    block = make_block(soft_config(slots_per_expert=2))
    hidden = torch.randn(BATCH, LENGTH, HIDDEN)
    out, context = run(block, hidden)
    order = torch.randperm(LENGTH)
    torch.testing.assert_close(run(block, hidden[:, order])[0], out[:, order])
    torch.testing.assert_close(run(block, hidden[1:2])[0], out[1:2])
    torch.testing.assert_close(run(block, hidden.flip(0))[0], out.flip(0))
    longer = run(block, hidden * 10)[1].records["0"]
    torch.testing.assert_close(longer.scores, context.records["0"].scores)
    other = hidden.clone()
    other[0, -1] += 1
    changed = run(block, other)[0]
    assert not torch.allclose(changed[0, 0], out[0, 0]) and torch.equal(changed[1:], out[1:])


def test_padding_is_in_no_slot():
    """Its number, content and place do not matter to tokens; a sequence of padding alone is finite."""
    block = make_block(soft_config())
    hidden = torch.randn(1, LENGTH, HIDDEN)
    expected, _ = run(block, hidden)
    for left, right in ((0, 4), (3, 0), (1, 2)):
        pads = torch.randn(1, left, HIDDEN) * 100, torch.randn(1, right, HIDDEN) * 100
        mask = torch.tensor([[0] * left + [1] * LENGTH + [0] * right])
        out, _ = run(block, torch.cat([pads[0], hidden, pads[1]], dim=1), mask)
        torch.testing.assert_close(out[:, left : left + LENGTH], expected, rtol=1e-4, atol=1e-6)
    both = torch.cat([hidden, hidden]).requires_grad_()
    out, _ = run(block, both, torch.tensor([[1] * LENGTH, [0] * LENGTH]))
    out.sum().backward()
    assert out.isfinite().all() and both.grad.isfinite().all()


def test_a_large_scale_assigns_hard():
    """Then each slot is the token nearest to it, and each token gets the slot nearest to it."""
    block = make_block(soft_config())
    block.gate.moe_scale.data.fill_(1e4)
    hidden = torch.randn(1, LENGTH, HIDDEN)
    context = RoutingContext(batch_size=1)
    block.gate.route(hidden[0], context)
    dispatch, combine = (context.carry[(0, name)][0] for name in ("dispatch", "combine"))
    cosines = F.cosine_similarity(hidden[0][:, None], block.gate.moe_slots[None], dim=-1)
    assert torch.equal(dispatch.argmax(0), cosines.argmax(0)) and (dispatch.amax(0) > 0.99).all()
    assert torch.equal(combine.argmax(1), cosines.argmax(1)) and (combine.amax(1) > 0.99).all()


def test_bfloat16_mixes_by_float32_weights():
    block = make_block(soft_config(), dtype=torch.bfloat16)
    hidden = torch.randn(BATCH, LENGTH, HIDDEN).bfloat16()
    context = RoutingContext(batch_size=BATCH)
    record = block.gate.route(hidden.flatten(0, 1), context)
    assert record.scores.dtype == context.carry[(0, "dispatch")].dtype == torch.float32
    out, _ = run(block, hidden)
    exact, _ = run(block.float(), hidden.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.03)


# --- in models ---


def upcycled(name, config=None, **options):
    config = config or SoftMoERouterConfig(slots_per_expert=2)
    model = upcycle(tiny_model(name), "drop", num_experts=4, router=config, target="ext", check=False, **options)
    for router in iter_routers(model):
        router.moe_scale.data.fill_(5.0)
    return model


@pytest.mark.parametrize("name", ["bert", "roberta", "vit"])
def test_encoders(name, tmp_path):
    """Sequences are told apart in each of them: a row alone has the same output as in its batch."""
    model, inputs = upcycled(name), tiny_inputs(name, batch=3)
    with trace_routing(model) as contexts, torch.no_grad():
        expected = model(**inputs)[0]
        for row in range(3):
            alone = {key: value[row : row + 1] for key, value in inputs.items()}
            torch.testing.assert_close(model(**alone)[0], expected[row : row + 1], rtol=1e-4, atol=1e-5)
        base = model.base_model
        first = next(iter(inputs))
        extra = {key: value for key, value in inputs.items() if key != first}
        by_position = base(inputs[first], **extra)[0]
        torch.testing.assert_close(by_position, base(**inputs)[0])
    assert contexts[0].batch_size == 3 and not model.moe_link.non_causal
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs)[0], expected)


def test_mixing_matters():
    """The output is not that of the same weights used as a dense mixture of experts."""
    model, inputs = upcycled("bert"), tiny_inputs("bert")
    with torch.no_grad():
        soft = model(**inputs)[0]
        for module in model.modules():
            if isinstance(module, RoutedExperts):
                module.moe_mixing_order = None
        dense = model(**inputs)[0]
    assert not torch.allclose(soft, dense, atol=1e-3)


def test_padding_changes_nothing_in_an_encoder():
    model = upcycled("bert", SoftMoERouterConfig(balance_coef=0.01, z_coef=0.01))
    ids = tiny_inputs("bert")["input_ids"][:1]
    padded = torch.cat([ids, torch.randint(4, 79, (1, 5))], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 5, dtype=ids.dtype)], dim=1)
    with trace_routing(model) as contexts, torch.no_grad():
        torch.testing.assert_close(model(padded, attention_mask=mask)[0], model(ids)[0], rtol=1e-4, atol=1e-5)
    first, second = (auxiliary_losses([context])[1] for context in contexts)
    for name in ("balance", "z"):
        torch.testing.assert_close(first[name], second[name])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_every_experts_implementation(name, implementation):
    model, inputs = extend(tiny_model(name), soft_config(slots_per_expert=2)), tiny_inputs(name)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.config._experts_implementation = implementation
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_see_slots_and_nothing_else():
    """E * p rows for each sequence, whatever its length, equally many for each expert, with weight 1."""
    model, seen = extend(tiny_model("mixtral"), soft_config(slots_per_expert=3)), []

    def look(experts, hidden, index, weights):
        seen.append((hidden.shape, index, weights))

    original = RoutedExperts._run

    def spy(self, *args):
        look(self, *args)
        return original(self, *args)

    RoutedExperts._run = spy
    try:
        with torch.no_grad():
            model(**tiny_inputs("mixtral", length=11))
    finally:
        RoutedExperts._run = original
    assert len(seen) == 3
    for shape, index, weights in seen:
        assert shape == (2 * 8 * 3, 32) and (weights == 1).all()
        assert index[:, 0].tolist() == [expert for expert in range(8) for _ in range(3)] * 2


def test_the_stock_gate_rests():
    model, inputs = extend(tiny_model("mixtral"), soft_config()).train(), tiny_inputs("mixtral")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for router in iter_routers(model):
        assert router.weight.grad is None
        assert router.moe_slots.grad.abs().sum() > 0 and router.moe_scale.grad.abs().sum() > 0


def test_causal_models_are_refused_and_do_not_generate():
    with pytest.raises(ValueError, match="causal attention, and the `soft_moe` router"):
        extend(tiny_model("mixtral"), SoftMoERouterConfig())
    model, inputs = extend(tiny_model("mixtral"), soft_config()), tiny_inputs("mixtral", batch=1)
    with pytest.raises(ValueError, match="has the router `soft_moe` in causal layers"):
        model.generate(**inputs, max_new_tokens=2)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        with pytest.raises(ValueError, match="cannot continue a text token by token"):
            model(inputs["input_ids"][:, -1:], **{CACHE: cache})


@pytest.mark.parametrize("name", ["dbrx", "jetmoe", "llama4_text", "switch_transformers"])
def test_blocks_with_an_adapter_are_refused(name):
    try:
        model = tiny_model(name)
    except (KeyError, AssertionError):
        pytest.skip("this version of transformers does not have the architecture")
    keys, kind = list(model.state_dict()), type(model)
    with pytest.raises(ValueError, match=r"mixtures of tokens, which the blocks of \w+ models cannot take"):
        extend(model, soft_config())
    assert list(model.state_dict()) == keys and type(model) is kind


def test_zero_experts_are_refused():
    with pytest.raises(ValueError, match="does not go with `zero_experts`"):
        extend(tiny_model("mixtral"), MoeExtension(router=soft_config(), zero_experts=ZeroExpertsConfig(zero=1)))


def test_row_policies_are_refused():
    model = extend(tiny_model("mixtral"), soft_config())
    with pytest.raises(ValueError, match="its rows follow one policy"), route_rows(model, ["a", "b"]):
        pass


def test_a_layer_alone_is_refused():
    """Without a forward of the model there are no mixtures; the experts must not run on tokens unseen."""
    block = make_block(soft_config())
    with pytest.raises(ValueError, match="only inside a forward of their model"):
        block(torch.randn(BATCH, LENGTH, HIDDEN))


def test_unknown_sequences_are_refused():
    block = make_block(soft_config())
    for batch in (None, 2):
        with pytest.raises(ValueError, match="to which sequences the 5 tokens"):
            block.gate.route(torch.randn(5, HIDDEN), RoutingContext(batch_size=batch))


def test_other_layers_keep_their_routers():
    extension = MoeExtension(router="top_k", layers={"1": LayerExtension(router=soft_config())})
    model, inputs = extend(tiny_model("mixtral"), extension), tiny_inputs("mixtral")
    with trace_routing(model) as contexts, torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert [record.index.shape[-1] for record in contexts[0].records.values()] == [2, 8, 2]


def test_training_lowers_the_loss():
    """Direction: an upcycled vision encoder learns its labels."""
    model, inputs = upcycled("vit").train(), tiny_inputs("vit", batch=8)
    labels = torch.arange(8) % 2
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses


def test_bad_settings():
    with pytest.raises(ValueError, match="`slots_per_expert` must be at least 1, got 0"):
        SoftMoERouterConfig(slots_per_expert=0)
    with pytest.raises(TypeError, match="`normalize` of SoftMoERouterConfig must be bool"):
        SoftMoERouterConfig(normalize=1)
