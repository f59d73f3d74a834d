"""The router in front of the model: a slow transformer as reference, caches of every form, one decision for all."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import Cache

from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension
from hf_moe_ext.modeling.moe_compat import CACHE
from hf_moe_ext.modeling.moe_context import RoutingContext
from hf_moe_ext.modeling.moe_losses import load_balancing_loss, router_z_loss
from hf_moe_ext.modeling.moe_structure import auxiliary_losses, iter_routers, route_rows, trace_routing
from hf_moe_ext.modeling.router_read_me import PreRouter, ReadMeRouterConfig, RouterStates, StaticRouterStates
from hf_moe_ext.patching import extend, restore
from hf_moe_ext.trainers.freezing import freeze_router, train_only_moe


SMALL = {"dim": 16, "num_heads": 2, "init_std": 0.5}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
GENERATE = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@functools.cache
def _made(name: str, changes: tuple):
    return extend(tiny_model(name), ReadMeRouterConfig(**(SMALL | dict(changes))))


def made(name: str = "mixtral", **changes):
    return copy.deepcopy(_made(name, tuple(changes.items())))


def ids(batch: int = 2, length: int = 9, seed: int = 0):
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def routed(model, **inputs):
    """Logits of the model, and those of the router (B, S, N)."""
    with trace_routing(model) as contexts:
        out = model(**inputs)
    return out.logits, contexts[0].carry[-1, "read_me_logits"]


# --- the pre-router ---


def slow_pre_router(module: PreRouter, row: list[int], positions: list[int]) -> torch.Tensor:
    """(S, N) of one sequence without padding, token by token and head by head, in float64."""
    config = module.config
    p = {name: tensor.detach().double() for name, tensor in module.named_parameters()}
    heads, width = config.num_heads, config.dim // config.num_heads

    def norm(x, weight):
        return weight * x / torch.sqrt((x * x).mean() + config.norm_eps)

    def turn(x, position):
        out = x.clone()
        for i in range(width // 2):
            angle = position * config.rope_theta ** (-2 * i / width)
            a, b = x[i], x[i + width // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + width // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    states = [p["embed.weight"][token] for token in row]
    for n in range(config.num_layers):
        b = f"blocks.{n}."
        queries, keys, values = [], [], []
        for state, position in zip(states, positions, strict=True):
            x = norm(state, p[b + "attention_norm.weight"])
            x = p[b + "query_key_value.weight"] @ x + p[b + "query_key_value.bias"]
            q, k, v = x.view(3, heads, width)
            queries.append([turn(q[h], position) for h in range(heads)])
            keys.append([turn(k[h], position) for h in range(heads)])
            values.append(v)
        after = []
        for t, state in enumerate(states):
            mixed = []
            for h in range(heads):
                logits = torch.stack([queries[t][h] @ keys[s][h] for s in range(t + 1)])
                logits = logits / math.sqrt(width) if config.scale_attention else logits
                mixed.append(sum(w * values[s][h] for s, w in enumerate(logits.softmax(0))))
            state = state + p[b + "output.weight"] @ torch.cat(mixed) + p[b + "output.bias"]
            x = p[b + "up.weight"] @ norm(state, p[b + "feed_forward_norm.weight"]) + p[b + "up.bias"]
            state = state + p[b + "down.weight"] @ (x * x.sigmoid()) + p[b + "down.bias"]
            after.append(state)
        states = after
    return torch.stack([p["head.weight"] @ norm(state, p["norm.weight"]) for state in states])


@pytest.mark.parametrize(
    "changes", [{}, {"num_layers": 2, "intermediate_size": 24, "rope_theta": 50.0}, {"scale_attention": False}]
)
def test_logits_equal_a_slow_transformer(changes):
    model, tokens = made(**changes), ids()
    module = model.model.moe_read_me
    for name, parameter in module.named_parameters():  # biases and norms that are seen
        if "norm" in name or name.endswith("bias"):
            parameter.data.uniform_(0.5, 1.5)
    _, found = routed(model, input_ids=tokens)
    for row in range(2):
        expected = slow_pre_router(module, tokens[row].tolist(), list(range(9)))
        torch.testing.assert_close(found[row].double(), expected, **CLOSE)


def test_size_of_the_paper():
    """18.0M parameters with a vocabulary of 32,000 and 7 experts."""

    class Base(torch.nn.Module):
        pass

    with torch.device("meta"):
        module = PreRouter(ReadMeRouterConfig(vocab_size=32000), 7, Base(), ["0"])
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(18.0, abs=0.05)


def test_starts_with_the_columns_of_the_embedding(poison_memory):
    model = made()
    embedding, own = model.get_input_embeddings().weight, model.model.moe_read_me.embed.weight
    assert own.shape == (len(embedding), 16) and torch.equal(own, embedding[:, :16])
    wide = made(dim=64).model.moe_read_me.embed.weight  # the model has 32
    assert torch.equal(wide[:, :32], embedding) and wide[:, 32:].std().item() == pytest.approx(0.5, rel=0.1)
    random = made(embedding="random").model.moe_read_me
    assert random.embed.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert random.head.weight.std().item() == pytest.approx(0.5, rel=0.2)
    assert all((p == 0).all() for n, p in random.named_parameters() if n.endswith("bias"))
    assert all((p == 1).all() for n, p in random.named_parameters() if "norm" in n)


# --- one decision ---


def test_all_layers_carry_out_one_decision():
    model = made()
    with torch.no_grad(), trace_routing(model) as contexts:
        out = model(ids(), output_router_logits=True)
    records = list(contexts[0].records.values())
    assert len(records) == 3 and len(out.router_logits) == 1
    for record in records[1:]:
        assert torch.equal(record.index, records[0].index) and torch.equal(record.logits, records[0].logits)
    assert torch.equal(out.router_logits[0], records[0].logits)
    assert len(records[0].index.unique()) > 2


def test_losses_count_the_decision_once():
    """A stack of one decision has the losses of one layer; beside another router, one share of the mean."""
    model = made(balance_coef=0.5, z_coef=0.25).train()
    with trace_routing(model) as contexts:
        out = model(input_ids=ids(), labels=ids())
    record = contexts[0].records["0"]
    balance, z = load_balancing_loss(record.scores, record.index), router_z_loss(record.logits)
    total, named = auxiliary_losses(contexts)
    torch.testing.assert_close(total, 0.5 * balance + 0.25 * z)
    torch.testing.assert_close(named["z"], z)
    plain = copy.deepcopy(model).eval()(input_ids=ids(), labels=ids()).loss
    torch.testing.assert_close(out.loss, plain + total)
    mixed = extend(
        tiny_model("mixtral"),
        MoeExtension(
            router=ReadMeRouterConfig(**SMALL, z_coef=1.0),
            layers={"1": {"router": {"type": "top_k", "z_coef": 1.0}}},
        ),
    )
    with trace_routing(mixed) as contexts:
        mixed(ids())
    parts = [router_z_loss(contexts[0].records[key].logits) for key in ("0", "1")]
    torch.testing.assert_close(auxiliary_losses(contexts)[0], sum(parts) / 2)


@pytest.mark.parametrize("weights", ["one", "gate", "renormalized"])
def test_weights(weights):
    model = made(weights=weights, num_experts_per_tok=3)
    with torch.no_grad(), trace_routing(model) as contexts:
        model(ids())
    record = contexts[0].records["1"]
    scores, index = record.logits.double().softmax(-1).topk(3)
    expected = {"one": torch.ones_like(scores), "gate": scores, "renormalized": scores / scores.sum(-1, keepdim=True)}
    torch.testing.assert_close(record.weights.double(), expected[weights], **CLOSE)
    assert torch.equal(record.index, index)


def test_the_language_model_teaches_the_router_through_its_weights_alone():
    for weights, learns in (("one", False), ("gate", True)):
        model = made(weights=weights).train()
        model(input_ids=ids(), labels=ids()).loss.backward()
        gradients = [p.grad for p in model.model.moe_read_me.parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in gradients) == learns
        assert all(gate.weight.grad is None for gate in iter_routers(model))  # the stock gates are not used


def test_gradient_is_the_numerical_one():
    """Of a loss of the logits with regard to the embedding, in float64."""
    module = copy.deepcopy(made().model.moe_read_me).double()
    tokens = ids(1, 5)
    context = RoutingContext(tokens, batch_size=1)

    def loss():
        return (module.decide(context, None).double() * torch.linspace(-1, 1, 40).view(1, 5, 8)).sum()

    module.head.weight.data.mul_(0.3)
    loss().backward()
    for name in ("head.weight", "blocks.0.query_key_value.weight", "embed.weight"):
        parameter = module.get_parameter(name)
        place = parameter.grad.abs().argmax().item()
        flat = parameter.data.view(-1)
        before = flat[place].item()
        values = []
        for step in (1e-3, -1e-3):
            flat[place] = before + step
            values.append(loss().item())
        flat[place] = before
        assert (values[0] - values[1]) / 2e-3 == pytest.approx(parameter.grad.view(-1)[place].item(), rel=1e-2)


# --- causality, padding, caches ---


def test_later_tokens_change_nothing():
    model, tokens = made(), ids()
    _, expected = routed(model, input_ids=tokens)
    for place in range(1, 9):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 7) % 60
        _, found = routed(model, input_ids=changed)
        assert torch.equal(found[:, :place], expected[:, :place])
        assert not torch.equal(found[:, place], expected[:, place])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, tokens = made(), ids(1, 6)
    logits, decision = routed(model, input_ids=tokens)
    pad = torch.zeros(1, 3, dtype=torch.long)
    parts = [pad, tokens] if side == "left" else [tokens, pad]
    mask = torch.cat([torch.zeros_like(p) if p is pad else torch.ones_like(p) for p in parts], dim=1)
    real = mask[0] == 1
    for filler in (0, 5):
        padded = torch.cat([p + filler if p is pad else p for p in parts], dim=1)
        found_logits, found = routed(model, input_ids=padded, attention_mask=mask)
        torch.testing.assert_close(found[:, real], decision, **CLOSE)
        torch.testing.assert_close(found_logits[:, real], logits, **CLOSE)
        assert found.isfinite().all()


def test_packed_sequences_do_not_meet():
    model, tokens = made(), ids(1, 9)
    _, found = routed(model, input_ids=tokens, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    for part in (slice(0, 4), slice(4, 9)):
        _, alone = routed(model, input_ids=tokens[:, part])
        torch.testing.assert_close(found[:, part], alone, **CLOSE)


def caches(model, kind):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=12)
    return DynamicCache() if kind == "grows" else DynamicCache(config=model.config)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left padded"])
@pytest.mark.parametrize("kind", ["dynamic", "grows", "static"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_cached_decoding_decides_as_a_full_prefill(kind, padded, blocks):
    model, tokens = made(num_layers=blocks), ids()
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :2] = 0
    logits, decision = routed(model, input_ids=tokens, attention_mask=mask)
    cache, found, seen = caches(model, kind), [], []
    start = 0
    for length in (4, 1, 3, 1):
        end = start + length
        part, row = routed(
            model, input_ids=tokens[:, start:end], attention_mask=mask[:, :end], **{CACHE: cache}, use_cache=True
        )
        found.append(row)
        seen.append(part)
        start = end
    real = mask == 1
    torch.testing.assert_close(torch.cat(found, 1)[real], decision[real], **CLOSE)
    torch.testing.assert_close(torch.cat(seen, 1)[real], logits[real], **CLOSE)
    own = [layer for layer in cache.layers if isinstance(layer, (RouterStates, StaticRouterStates))]
    assert len(own) == blocks and len(cache.layers) == 3 + blocks and cache.layers[3:] == own


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"assistant": True},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_generation_with_a_cache_equals_that_without(name, options):
    """Reordered by beams, cropped after drafts, repeated for several sequences: the router's states follow."""
    model, options = made(name), dict(options)
    tokens = ids(1 if {"prompt_lookup_num_tokens", "assistant"} & set(options) else 2)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    found = []
    plain = {k: v for k, v in options.items() if k in ("num_beams", "do_sample", "num_return_sequences")}
    if options.pop("assistant", False):
        options["assistant_model"] = made(name, num_layers=2)
    for settings in ({**options, "use_cache": True}, {**plain, "use_cache": False}):
        torch.manual_seed(0)
        found.append(model.generate(tokens, attention_mask=mask, **(GENERATE | settings)).tolist())
    assert found[0] == found[1]


def test_selecting_and_repeating_rows_of_a_cache():
    model, tokens = made(), ids(3, 6)
    cache = DynamicCache(config=model.config)
    routed(model, input_ids=tokens[:, :5], **{CACHE: cache}, use_cache=True)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 0, 0])
    _, expected = routed(model, input_ids=tokens[rows])
    _, found = routed(model, input_ids=tokens[rows, 5:], **{CACHE: cache}, use_cache=True)
    torch.testing.assert_close(found[:, 0], expected[:, 5], **CLOSE)


@pytest.mark.parametrize("weights", ["one", "gate"])
def test_gradient_checkpointing(weights):
    """The decision is made outside of what is recomputed, once in a forward."""
    gradients, calls = [], []
    for recompute in (False, True):
        model = made(weights=weights, z_coef=0.1).train()
        if recompute:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        module = model.model.moe_read_me
        count = []
        module.register_forward_hook(lambda *_, count=count: count.append(1))
        model(input_ids=ids(), labels=ids()).loss.backward()
        calls.append(len(count))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert calls == [1, 1] and gradients[0].keys() == gradients[1].keys()
    assert any("moe_read_me" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_compiles_in_one_graph():
    model, tokens = made(), ids()
    expected, _ = routed(model, input_ids=tokens)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected, **CLOSE)


def test_rows_of_different_policies():
    model, tokens = made(), ids(3)
    with (
        route_rows(model, ["few", "many", "few"], {"many": {"num_experts_per_tok": 3}}),
        trace_routing(model) as mixed,
    ):
        model(tokens)
    records = list(mixed[0].records.values())
    counts = (records[0].index < 8).sum(-1).view(3, 9)
    assert counts[:, 0].tolist() == [2, 3, 2]
    assert all(torch.equal(record.index, records[0].index) for record in records)
    assert len(mixed[0].decisions()) == 1


# --- saving, resizing, freezing ---


def test_saves_loads_and_restores(tmp_path):
    stock, model = tiny_model("mixtral"), made(dense_width=40)
    model.model.moe_read_me.neurons[:] = torch.rand(3, 8, 40) < 0.5
    expected, _ = routed(model, input_ids=ids())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    found, _ = routed(again, input_ids=ids())
    assert torch.equal(found, expected)
    assert torch.equal(again.model.moe_read_me.neurons, model.model.moe_read_me.neurons)
    twin = copy.deepcopy(model)
    twin.model.moe_read_me.head.weight.data.zero_()
    assert torch.equal(routed(model, input_ids=ids())[0], expected)
    assert (routed(twin, input_ids=ids())[1] == 0).all()
    restore(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, stock(ids()).logits)


def test_resized_vocabulary(tmp_path):
    model = made()
    _, expected = routed(model, input_ids=ids())
    size = model.config.vocab_size + 5
    model.resize_token_embeddings(size, mean_resizing=False)
    own = model.model.moe_read_me.embed.weight
    assert len(own) == size and torch.equal(own[-5:], model.get_input_embeddings().weight[-5:, :16])
    assert torch.equal(routed(model, input_ids=ids())[1], expected)
    routed(model, input_ids=torch.tensor([[1, size - 1]]))
    model.save_pretrained(tmp_path)
    assert torch.equal(routed(AutoModelForCausalLM.from_pretrained(tmp_path), input_ids=ids())[1], expected)
    model.resize_token_embeddings(40)
    with pytest.raises(ValueError, match="knows the token ids 0 to 39, `input_ids` has"):
        model.model.moe_read_me.decide(RoutingContext(torch.tensor([[41]]), batch_size=1), None)
    fixed = made(vocab_size=99)
    fixed.resize_token_embeddings(70)
    assert len(fixed.model.moe_read_me.embed.weight) == 99


def test_freezing_reaches_what_routers_share():
    model = made()
    freeze_router(model)
    assert not any(p.requires_grad for p in model.model.moe_read_me.parameters())
    model = made()
    train_only_moe(model)
    assert all(p.requires_grad for p in model.model.moe_read_me.parameters())
    assert not model.model.embed_tokens.weight.requires_grad
    rmoe = extend(tiny_model("mixtral"), {"router": {"type": "rmoe", "state_size": 8}})
    freeze_router(rmoe)
    assert not any(p.requires_grad for p in rmoe.model.moe_rmoe_cell.parameters())


# --- bad input ---


def test_bad_configs():
    for values, text in (
        ({"dim": 0}, "`dim` must be at least 1, got 0"),
        ({"dim": 12, "num_heads": 4}, "`num_heads` \\(4\\) must divide `dim` \\(12\\)"),
        ({"rope_theta": 0.0}, "`rope_theta` must be positive"),
        ({"num_experts_per_tok": 9}, "exceeds the 8 experts"),
    ):
        with pytest.raises(ValueError, match=text):
            extend(tiny_model("mixtral"), ReadMeRouterConfig(**values))
    other = {"1": {"router": {"type": "read_me", "dim": 32}}}
    with pytest.raises(ValueError, match="share one `read_me` router, so their configs must be equal"):
        extend(tiny_model("mixtral"), MoeExtension(router=ReadMeRouterConfig(**SMALL), layers=other))


def test_bad_input():
    model = made()
    with pytest.raises(ValueError, match="reads token ids; call the model with `input_ids`"):
        model(inputs_embeds=torch.randn(1, 4, 32))
    with pytest.raises(ValueError, match="this layer was called alone"):
        model.model.layers[0].mlp(torch.randn(1, 4, 32))
    stock, cache = tiny_model("mixtral"), DynamicCache()
    stock(ids()[:, :5], **{CACHE: cache}, use_cache=True)  # a cache of another model
    with pytest.raises(ValueError, match="has seen 0 tokens before these 2. A cache has to come from this model"):
        model(ids()[:, 5:7], attention_mask=torch.ones(2, 7), **{CACHE: cache}, use_cache=True)
    with pytest.raises(ValueError, match="got one of the shape \\[2, 1, 3, 3\\]"):
        module = model.model.moe_read_me
        module.decide(RoutingContext(ids(), attention_mask=torch.ones(2, 1, 3, 3), batch_size=2), None)


def test_a_cache_with_a_length_of_its_own_is_refused():
    class Odd(Cache):
        def __len__(self):
            return 7

    import transformers.models.mixtral.modeling_mixtral as stock

    stock.Odd = Odd
    try:
        with pytest.raises(ValueError, match="counts its layers in a way of its own"):
            extend(tiny_model("mixtral"), ReadMeRouterConfig(**SMALL))
    finally:
        del stock.Odd


def test_runs_in_bfloat16():
    model = made().to(torch.bfloat16)
    logits, decision = routed(model, **tiny_inputs("mixtral"))
    assert logits.dtype == torch.bfloat16 and decision.dtype == torch.float32 and decision.isfinite().all()
    tokens = ids()
    cached = model.generate(tokens, **GENERATE).tolist()
    assert len(cached[0]) == 17
