"""Pre-gated routing against a loop over layers that routes each block from an earlier input."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from hf_moe_ext import upcycle
from hf_moe_ext.modeling.configuration_moe_ext import LayerExtension, MoeExtension, ZeroExpertsConfig
from hf_moe_ext.modeling.moe_context import RoutingContext
from hf_moe_ext.modeling.moe_losses import load_balancing_loss
from hf_moe_ext.modeling.moe_router import GateRule, RouterSite
from hf_moe_ext.modeling.moe_structure import iter_routers, route_rows, trace_routing
from hf_moe_ext.modeling.router_pre_gated import PreGatedRouter, PreGatedRouterConfig
from hf_moe_ext.modeling.router_top_k import TopKRouterConfig
from hf_moe_ext.patching import extend, restore

from .test_routers import slow_scores


FAMILIES = ("mixtral", "deepseek_v3", "qwen2_moe")
GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@functools.cache
def _stock(name: str, layers: int):
    changes = {"mlp_layer_types": ["dense", *["sparse"] * (layers - 1)]} if name == "deepseek_v3" else {}
    model = tiny_model(name, num_hidden_layers=layers, **changes)
    model.set_experts_implementation("moe_ext")  # as in extended models, so that sums have one order
    return model


def stock(name: str = "mixtral", layers: int = 4):
    return copy.deepcopy(_stock(name, layers))


def made(name: str = "mixtral", **changes):
    return extend(stock(name), MoeExtension(router=PreGatedRouterConfig(**changes)))


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_level_zero_is_the_stock_model_bit_for_bit(name):
    model, inputs = stock(name), tiny_inputs(name)
    expected, keys = logits(model, inputs), list(model.state_dict())
    site = RouterSite("0", 0, 8, 2, 32, GateRule())
    assert PreGatedRouter.identity_config(site) == PreGatedRouterConfig(level=0)
    extend(model, MoeExtension(router=PreGatedRouterConfig(level=0)))
    assert torch.equal(logits(model, inputs), expected) and list(model.state_dict()) == keys


class EarlyGate(nn.Module):
    """The reference: a stock gate that looks up what an earlier gate of the same forward was given."""

    def __init__(self, gate: nn.Module, number: int, level: int, seen: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.gate, self.number, self.level, self.seen = gate, number, level, seen

    def forward(self, hidden, *args):
        self.seen[self.number] = hidden
        source = self.seen[self.number - self.level] if self.number >= self.level else hidden
        return self.gate(source, *args)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("gate"), name)


def reference(name: str, level: int):
    model, seen = stock(name), {}
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    for number, block in enumerate(blocks):
        block.gate = EarlyGate(block.gate, number, level, seen)
    return model


def language_gradients(model, inputs):
    """Output and gradients by name for a loss on the logits, without auxiliary losses."""
    out = model(**inputs).logits
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (out * upstream).sum().backward()
    return out, {n.replace(".gate.gate.", ".gate."): p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_model_equals_reference(name, level):
    """The whole model, in value and in the gradient of every parameter."""
    inputs = tiny_inputs(name)
    expected, theirs = language_gradients(reference(name, level), inputs)
    found, mine = language_gradients(made(name, level=level), inputs)
    assert torch.equal(found, expected)
    assert mine.keys() == theirs.keys() and any("gate.weight" in key for key in mine)
    for key, gradient in theirs.items():
        # float32 sums in another order, of terms as large as the largest gradient
        assert (mine[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), key
    assert (found - logits(stock(name), inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("level", [1, 3])
def test_decisions_equal_a_loop_in_float64(level):
    """Gates alone, without a model: which input every block is routed by, its weights and the gradients."""
    gates = list(iter_routers(made(level=level)))
    inputs = [torch.randn(9, 32, requires_grad=True) for _ in gates]
    context = RoutingContext()
    records = [gate.route(hidden, context) for gate, hidden in zip(gates, inputs, strict=True)]
    theirs = [hidden.detach().double().requires_grad_() for hidden in inputs]
    total = expected_total = 0.0
    for number, (gate, record) in enumerate(zip(gates, records, strict=True)):
        source = theirs[number - level] if number >= level else theirs[number]
        weight = gate.weight.detach().double()
        for token in range(9):
            scores = slow_scores(weight @ source[token], "softmax")
            best = sorted(range(8), key=lambda i: -scores[i].item())[:2]  # noqa: B023
            assert record.index[token].tolist() == best
            values = torch.stack([scores[i] for i in best]) / sum(scores[i] for i in best)
            torch.testing.assert_close(record.weights[token].double(), values, rtol=1e-5, atol=1e-6)
            total = total + (record.weights[token] * torch.tensor([1.0, -2.0])).sum()
            expected_total = expected_total + (values * torch.tensor([1.0, -2.0])).sum()
    total.backward()
    expected_total.backward()
    for mine, other in zip(inputs, theirs, strict=True):
        wanted = torch.zeros_like(other) if other.grad is None else other.grad
        found = torch.zeros_like(mine) if mine.grad is None else mine.grad
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    assert all(hidden.grad is None for hidden in inputs[len(gates) - level :][max(0, 2 * level - len(gates)) :])


def test_levels_coincide_where_blocks_see_the_same():
    """One gate for all blocks, zeroed residual branches, equal norms: what is seen early is what is seen later."""
    model = stock()
    first = model.model.layers[0]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
            layer.mlp.gate.weight.copy_(first.mlp.gate.weight)
            layer.post_attention_layernorm.weight.copy_(first.post_attention_layernorm.weight)
    found = []
    for level in (0, 1):
        extend(model, MoeExtension(router=PreGatedRouterConfig(level=level)))
        with trace_routing(model) as contexts:
            logits(model, tiny_inputs("mixtral"))
        found.append([(record.index, record.weights) for record in contexts[0].records.values()])
        restore(model)
    for (index, weights), (other_index, other_weights) in zip(*found, strict=True):
        assert torch.equal(index, other_index) and torch.equal(weights, other_weights)


def test_a_gate_is_known_one_block_early():
    """What an offloading runtime uses: gate n + 1 on the input of block n gives the decision of block n + 1."""
    model, inputs, seen = made(), tiny_inputs("mixtral"), {}
    gates = list(iter_routers(model))
    for number, gate in enumerate(gates):
        gate.register_forward_pre_hook(lambda _, args, n=number: seen.update({n: args[0].detach()}))
    with trace_routing(model) as contexts:
        logits(model, inputs)
    records = list(contexts[0].records.values())
    for number in range(1, len(gates)):
        early = torch.nn.functional.linear(seen[number - 1], gates[number].weight).softmax(-1).topk(2).indices
        assert torch.equal(early, records[number].index)
        late = torch.nn.functional.linear(seen[number], gates[number].weight).softmax(-1).topk(2).indices
        assert not torch.equal(late, records[number].index)


def test_every_forward_starts_anew():
    model = made()
    inputs, other = tiny_inputs("mixtral"), tiny_inputs("mixtral", seed=5)
    expected = logits(model, inputs)
    logits(model, other)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("level", [1, 2])
def test_recomputed_layers_see_the_input_of_their_own_forward(level):
    """Gradient checkpointing, and two forwards before one backward: the gradients of one forward at a time."""
    model = made(level=level).train()
    inputs = tiny_inputs("mixtral")
    batches = inputs, {key: value.flip(-1) for key, value in inputs.items()}

    def gradients(*batches):
        model.zero_grad()
        sum(model(**batch, labels=batch["input_ids"]).loss for batch in batches).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    first, second = gradients(batches[0]), gradients(batches[1])
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    with pytest.raises(ValueError, match="reentrant"):
        enable({"use_reentrant": True})
    enable({"use_reentrant": False})
    for key, gradient in gradients(*batches).items():
        torch.testing.assert_close(gradient, first[key] + second[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", [1, 2])
def test_saved_model_generates_the_same_text(level, tmp_path):
    """With the cache, without it, and after loading; rows of different lengths as each by itself."""
    model = made(level=level)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.moe_ext["router"] == {"type": "pre_gated"} | ({"level": level} if level != 1 else {})
    again.eval()
    ids = tiny_inputs("mixtral", batch=1, length=9)["input_ids"][:, 2:]
    short = ids[:, 3:]
    texts = [m.generate(ids, **GENERATE, use_cache=c).tolist() for m in (model, again) for c in (True, False)]
    assert all(text == texts[0] for text in texts)
    padded = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), short], dim=1)
    batch = torch.cat([ids, padded])
    both = again.generate(batch, attention_mask=(batch != 0).long(), **GENERATE)
    assert both[0].tolist() == texts[0][0]
    assert both[1, 7:].tolist() == again.generate(short, **GENERATE)[0, 4:].tolist()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_converting_changes_no_tensor(level):
    model = stock()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    extend(model, MoeExtension(router=PreGatedRouterConfig(level=level)))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_encoder_and_decoder_are_apart():
    """The first decoder block has its own input, not that of the encoder's last block."""
    model = upcycle(tiny_model("t5"), num_experts=4, router=PreGatedRouterConfig(), target="ext")
    for gate in iter_routers(model):
        gate.weight.data *= 30
    with trace_routing(model) as contexts:
        logits(model, tiny_inputs("t5"))
    encoder, decoder = contexts
    first, second = list(decoder.records.values())
    gates = {gate.moe_site.order: gate for gate in iter_routers(model)}
    seen = {order: hidden for (order, _), hidden in decoder.carry.items()}
    assert set(seen) == {first.order, second.order} and not set(seen) & {order for order, _ in encoder.carry}
    for record in (first, second):
        expected = torch.nn.functional.linear(seen[first.order], gates[record.order].weight)
        torch.testing.assert_close(record.logits, expected)


def test_settings_of_top_k_apply():
    """Its own choices on the earlier input."""
    gates = list(iter_routers(made(num_experts_per_tok=3, score="sigmoid", renormalize=False, scale=0.5)))
    context, inputs = RoutingContext(), [torch.randn(5, 32) for _ in gates]
    for number, (gate, hidden) in enumerate(zip(gates, inputs, strict=True)):
        record = gate.route(hidden, context)
        scores = (inputs[max(number - 1, 0)] @ gate.weight.T).sigmoid()
        torch.testing.assert_close(record.weights, 0.5 * scores.topk(3).values)


def test_zero_computation_experts():
    extension = MoeExtension(router=PreGatedRouterConfig(z_coef=0.1), zero_experts=ZeroExpertsConfig(zero=2))
    model = extend(stock(), extension).train()
    for gate in iter_routers(model):
        gate.moe_zero_weight.data.normal_(std=0.5)
    batch = tiny_inputs("mixtral")
    with trace_routing(model) as contexts:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    records = list(contexts[0].records.values())
    for record in records:
        assert record.scores.shape == (14, 10)
        null = record.choices >= 8
        assert (record.index[null] == 8).all() and (record.weights[null] == 0).all()
    assert sum(int((record.choices >= 8).sum()) for record in records) > 0
    assert all(gate.moe_zero_weight.grad.abs().sum() > 0 for gate in iter_routers(model))


def test_rows_may_be_converted_apart():
    """One half of a batch pre-gated, the other as in the stock model."""
    model, ids = made(), tiny_inputs("mixtral", batch=4)["input_ids"]
    plain = logits(model, {"input_ids": ids})
    with route_rows(model, ["early", "stock", "early", "stock"], {"stock": {"level": 0}}):
        mixed = logits(model, {"input_ids": ids})
    torch.testing.assert_close(mixed[[0, 2]], plain[[0, 2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[[1, 3]], logits(stock(), {"input_ids": ids})[[1, 3]], rtol=1e-5, atol=1e-5)


def test_padding_does_not_count():
    model, batch = made(balance_coef=1.0).train(), tiny_inputs("mixtral")
    with trace_routing(model) as contexts:
        model(**batch, labels=batch["input_ids"])
    mask = batch["attention_mask"].reshape(-1).bool()
    for record in contexts[0].records.values():
        found = PreGatedRouter.aux_losses(record, contexts[0].token_mask(len(mask)))
        torch.testing.assert_close(found, {"balance": load_balancing_loss(record.scores[mask], record.index[mask])})


# --- what is refused ---


def test_negative_level_is_refused():
    with pytest.raises(ValueError, match="`level` must be non-negative, got -1"):
        PreGatedRouterConfig(level=-1)


REFUSED = {
    "level_too_high": (PreGatedRouterConfig(level=4), {}, r"`level` \(4\) of layer \"0\" must be below the number"),
    "one_layer_too_high": (
        PreGatedRouterConfig(),
        {"2": LayerExtension(router=PreGatedRouterConfig(level=5))},
        r"`level` \(5\) of layer \"2\"",
    ),
    "gap": (PreGatedRouterConfig(), {"1": LayerExtension(router=TopKRouterConfig())}, "must follow each other"),
    "too_many_experts": (PreGatedRouterConfig(num_experts_per_tok=9), {}, "exceeds the 8 experts"),
}


@pytest.mark.parametrize(("router", "layers", "message"), REFUSED.values(), ids=REFUSED)
def test_model_refuses(router, layers, message):
    model = stock()
    expected = logits(model, tiny_inputs("mixtral"))
    with pytest.raises(ValueError, match=message):
        extend(model, MoeExtension(router=router, layers=layers))
    assert torch.equal(logits(model, tiny_inputs("mixtral")), expected)


# --- direction ---


TOPICS, VOCABULARY = 4, 32


def sentences(permutations: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    """Each row has a topic, under which a token is followed by its image in a permutation; one in ten is random."""
    topic = torch.randint(TOPICS, (rows,), generator=generator)
    tokens = [torch.randint(VOCABULARY, (rows,), generator=generator)]
    for _ in range(23):
        noise = torch.randint(VOCABULARY, (rows,), generator=generator)
        random = torch.rand(rows, generator=generator) < 0.1
        tokens.append(torch.where(random, noise, permutations[topic, tokens[-1]]))
    return torch.stack(tokens, dim=1)


def train(model, permutations, steps: int, generator: torch.Generator) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids = sentences(permutations, 16, generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.slow
def test_conversion_costs_little_and_is_recovered():
    """2308.12066: a trained model is converted, loses a little, and gets it back in ordinary training."""
    generator = torch.Generator().manual_seed(7)
    permutations = torch.stack([torch.randperm(VOCABULARY, generator=generator) for _ in range(TOPICS)])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes, **experts))
    train(model, permutations, 350, generator)
    held_out = sentences(permutations, 256, generator)

    def loss(model) -> float:
        with torch.no_grad():
            return model(input_ids=held_out, labels=held_out).loss.item()

    start, state = loss(model), generator.get_state()
    table = {}
    for level in (0, 1, 2):
        twin = extend(copy.deepcopy(model), MoeExtension(router=PreGatedRouterConfig(level=level)))
        converted = loss(twin)
        generator.set_state(state)  # the same batches for all
        train(twin, permutations, 40, generator)
        table[level] = converted, loss(twin)
    print({level: tuple(round(value, 4) for value in values) for level, values in table.items()})
    assert table[0][0] == start
    for level in (1, 2):
        converted, tuned = table[level]
        assert start < converted < start + 0.1
        assert tuned < converted and tuned - table[0][1] < converted - start
