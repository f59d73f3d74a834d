"""Union of Experts: all parts are the dense model; a choice of parts is what the dense model computes with the others
switched off, against explicit gathering of tokens head by head."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import DENSE_NAMES, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import hf_moe_ext as moe
from hf_moe_ext import MoeExtension, extend, restore, trace_routing, upcycle
from hf_moe_ext.modeling.attention_union import UnionAttentionConfig
from hf_moe_ext.modeling.moe_families import get_family
from hf_moe_ext.modeling.moe_structure import iter_routers
from hf_moe_ext.modeling.router_union import UnionRouterConfig

from ..character_runs import character_llama, held_out_loss, train_characters, training_rows


HEADS = [name for name in DENSE_NAMES if get_family(name).attention is not None]
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
SPARSE = {"type": "union", "anneal": False}


def ids(batch=2, length=9, seed=3):
    return torch.randint(4, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def union(name="llama", *, attention=None, mlp=True, router="union", dense=None, **options):
    """A dense model as a union: its feed-forward blocks in 4 parts, of which 2, and its heads."""
    dense = copy.deepcopy(tiny_model(name)) if dense is None else dense
    if not mlp:
        return extend(dense, MoeExtension(attention=attention)).eval()
    parts = None if attention is None else {"attention": attention}
    options = {"num_experts": 4, "num_experts_per_tok": 2, "gate_init": "normal", **options}
    return upcycle(dense, "union_of_experts", router=router, parts=parts, **options).eval()


def sharpen(model, scale=40.0):
    """Gates that tell tokens apart."""
    for router in iter_routers(model):
        router.weight.data.mul_(scale)
    return model


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


# --- all parts are the dense model ---


@pytest.mark.parametrize("what", ["mlp", "attention", "both"])
@pytest.mark.parametrize("name", HEADS)
def test_all_parts_are_the_dense_model(name, what):
    """In double precision, to its rounding; grouped heads, biases, fused projections and sliding windows included."""
    dense = copy.deepcopy(tiny_model(name)).double().eval()
    inputs = {key: value for key, value in tiny_inputs(name).items() if not key.endswith("attention_mask")}
    expected = dense(**inputs)[0].detach()
    attention = None if what == "mlp" else "union"
    model = union(name, attention=attention, mlp=what != "attention", dense=dense)
    with torch.no_grad():
        found = model(**inputs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    gates = list(iter_routers(model))
    assert gates and all(router.weight.abs().max() > 0 for router in gates)


def test_the_report_says_so_and_the_tensors_are_those_of_the_dense_model():
    dense = tiny_model("llama")
    model = union(dense=copy.deepcopy(dense))
    assert model.upcycle_report.preserves_function
    for layer, source in zip(model.model.layers, dense.model.layers, strict=True):
        experts = layer.mlp.experts
        gate, up = experts.gate_up_proj.chunk(2, dim=1)
        assert torch.equal(gate.flatten(0, 1), source.mlp.gate_proj.weight)
        assert torch.equal(up.flatten(0, 1), source.mlp.up_proj.weight)
        assert torch.equal(experts.down_proj.transpose(0, 1).flatten(1), source.mlp.down_proj.weight)
    assert sum(p.numel() for p in model.model.layers[0].mlp.experts.parameters()) == sum(
        p.numel() for p in dense.model.layers[0].mlp.parameters()
    )


# --- some parts ---


def test_a_choice_is_the_dense_block_without_the_others():
    """The output with parts S is the sum of S: token by token, in double precision."""
    dense = copy.deepcopy(tiny_model("llama")).double()
    model = sharpen(union(dense=dense, router=SPARSE))
    block, source = model.model.layers[1].mlp, dense.model.layers[1].mlp
    hidden = torch.randn(2, 5, dense.config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        logits_ = hidden.flatten(0, 1) @ block.gate.weight.double().T
        chosen = logits_.topk(2).indices
        inner = source.act_fn(source.gate_proj(hidden)) * source.up_proj(hidden)
        width = inner.shape[-1] // 4
        keep = torch.zeros(10, 4).scatter(1, chosen, 1).repeat_interleave(width, 1).view_as(inner)
        expected = source.down_proj(inner * keep)
        torch.testing.assert_close(block(hidden), expected)
    assert len(chosen.sort(1).values.unique(dim=0)) > 2


def slow_attention(attention, hidden, chosen, position_embeddings):
    """Head by head: gather the tokens that chose it, attend among them in order, add the result. (1, S, H)."""
    config = attention.config
    heads, key_heads, size = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    query = attention.q_proj(hidden).view(1, -1, heads, size).transpose(1, 2)
    key = attention.k_proj(hidden).view(1, -1, key_heads, size).transpose(1, 2)
    value = attention.v_proj(hidden).view(1, -1, key_heads, size).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    out = torch.zeros_like(hidden)
    for head in range(heads):
        group = head // (heads // key_heads)
        part = group // (key_heads // chosen.shape[-1])
        mine = chosen[:, part].nonzero().flatten()
        q, k, v = query[0, head, mine], key[0, group, mine], value[0, group, mine]
        scores = (q @ k.T / math.sqrt(size)).masked_fill(
            torch.triu(torch.ones(len(mine), len(mine)), 1).bool(), -1e300
        )
        columns = attention.o_proj.weight[:, head * size : (head + 1) * size]
        out[0, mine] += scores.softmax(-1) @ v @ columns.T
    return out


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "union_gather"])
@pytest.mark.parametrize(("key_heads", "experts", "k"), [(4, 4, 2), (4, 2, 1), (2, 2, 1), (4, 4, 3), (1, 1, 1)])
def test_the_mask_is_gathering(key_heads, experts, k, implementation):
    dense = tiny_model("llama", num_key_value_heads=key_heads, attn_implementation=implementation)
    dense = copy.deepcopy(dense).double()
    config = UnionAttentionConfig(num_experts=experts, router={**SPARSE, "num_experts_per_tok": k})
    model = sharpen(union(attention=config, mlp=False, dense=copy.deepcopy(dense)))
    seen = {}

    def remember(module, args, kwargs, output):
        seen["in"], seen["out"], seen["rope"] = kwargs["hidden_states"], output[0], kwargs["position_embeddings"]

    model.model.layers[1].self_attn.register_forward_hook(remember, with_kwargs=True)
    with trace_routing(model) as contexts, torch.no_grad():
        model(ids(1, 12))
        index = contexts[0].all_records()["attention.1"].index
        chosen = torch.zeros(12, experts, dtype=torch.bool).scatter(1, index, True)
        expected = slow_attention(dense.model.layers[1].self_attn, seen["in"], chosen, seen["rope"])
    exact = implementation != "eager"  # eager attention takes its softmax in float32
    torch.testing.assert_close(
        seen["out"], expected, **({"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 1e-4, "atol": 1e-6})
    )
    assert k == experts or len(index.sort(1).values.unique(dim=0)) > 1


# --- gathering ---


def gathering(model, copied=True):
    """The model with the tokens of each head gathered."""
    model = copy.deepcopy(model) if copied else model
    model.set_attn_implementation("union_gather")
    return model


@pytest.mark.parametrize("name", HEADS)
def test_gathering_is_the_mask(name, monkeypatch):
    """On every family, with padding, in products of the tokens that chose a head."""
    dense = copy.deepcopy(tiny_model(name)).eval()
    model = sharpen(union(name, attention={"type": "union", "router": SPARSE}, mlp=False, dense=dense))
    inputs = tiny_inputs(name)
    if getattr(model.config, "attn_logit_softcapping", None):
        with pytest.raises(ValueError, match='"union_gather" has no `softcap`'):
            gathering(model)(**inputs)
        return
    twin, shapes = gathering(model), []
    original = F.scaled_dot_product_attention

    def count(query, key, value, **options):
        shapes.append((query.shape[-2], key.shape[-2]))
        return original(query, key, value, **options)

    with torch.no_grad():
        expected = model(**inputs)[0]
        monkeypatch.setattr(F, "scaled_dot_product_attention", count)
        with trace_routing(twin) as contexts:
            found = twin(**inputs)[0]
    real = inputs.get("attention_mask", torch.ones(found.shape[:2])) != 0  # what padding sees is nobody's business
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    records = [r for context in contexts for key, r in context.all_records().items() if key.startswith("attention")]
    largest = []
    for record in records:
        used = torch.zeros(len(record.index), record.num_experts + 1).scatter(1, record.index, 1.0)[:, :-1]
        largest.append(int(used.view(len(found), -1, record.num_experts).sum(1).max()))
    assert len(records) > 1 and shapes == [(m, m) for m in largest]


def test_gathering_with_padding_and_gradients():
    model = sharpen(union(attention={"type": "union", "router": SPARSE}, router=SPARSE)).train()
    tokens, mask = ids(3, 10), torch.ones(3, 10, dtype=torch.long)
    mask[0, :4] = mask[2, 7:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[0, 4] = -100  # which padding would foretell
    gradients = []
    for one in (model, gathering(model)):
        out = one(input_ids=tokens, attention_mask=mask, labels=labels)
        out.loss.backward()
        gradients.append([out.logits[mask == 1], *(p.grad for p in one.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_gathering_costs_the_square_of_the_share():
    """Products of queries and keys, where heads share the tokens evenly; and k / N of the feed-forward blocks."""
    from torch.utils.flop_counter import FlopCounterMode

    dense = tiny_model("llama", num_key_value_heads=4, num_hidden_layers=1)
    model = union(
        attention={"type": "union", "router": {**SPARSE, "num_experts_per_tok": 1}}, router=SPARSE, dense=dense
    )
    model.set_experts_implementation("eager")
    model = gathering(model, copied=False)
    gate = model.model.layers[0].self_attn.moe_gate
    chosen, length, seen = torch.arange(32) % 4, 32, []

    def decide(self, hidden):
        return F.one_hot(chosen, 4).float() * 50

    original = F.scaled_dot_product_attention

    def count(query, key, value, **options):
        seen.append(query.shape[0] * query.shape[1] * query.shape[-2] * key.shape[-2])
        return original(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(gate), "router_logits", lambda self, hidden, *a, **k: decide(self, hidden))
        patch.setattr(F, "scaled_dot_product_attention", count)
        model(ids(1, length))
    assert seen == [4 * (length // 4) ** 2]  # 4 heads; the dense attention has 4 * 32 ** 2
    block, hidden = model.model.layers[0].mlp, torch.randn(1, length, 32)
    with FlopCounterMode(display=False) as sparse, torch.no_grad():
        block(hidden)
    gates = 2 * length * 32 * 4
    whole = 3 * 2 * length * 32 * 48
    assert sparse.get_total_flops() - gates == whole * 2 // 4


# --- patches ---


@pytest.mark.parametrize("size", [1, 2, 3, None])
def test_patches_choose_by_their_mean(size):
    """Against a loop, with padding, which does not count."""
    model = sharpen(union("bert", router={**SPARSE, "patch_size": size}))
    tokens, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    seen = {}
    originals = {r.moe_site.key: r for r in iter_routers(model)}
    route = type(originals["0"]).route

    def watch(self, hidden, context, *args, **kwargs):
        seen[self.moe_site.key] = hidden.detach()
        return route(self, hidden, context, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, trace_routing(model) as contexts, torch.no_grad():
        for one in {type(r) for r in originals.values()}:
            patch.setattr(one, "route", watch)
        model(input_ids=tokens, attention_mask=mask)
    records = contexts[0].all_records()
    assert set(records) == set(originals)
    for key, record in records.items():
        hidden, index = seen[key].view(2, 7, -1), record.index.view(2, 7, -1)
        for row in range(2):
            ends = list(range(7, 0, -(size or 7)))
            for end in ends:
                start = max(0, end - (size or 7))
                real = [t for t in range(start, end) if mask[row, t]]
                if not real:
                    continue
                logits_ = hidden[row, real].mean(0) @ originals[key].weight.T
                expected = logits_.topk(2).indices
                for t in range(start, end):
                    assert set(index[row, t].tolist()) == set(expected.tolist()), (key, row, t)


def test_patches_of_an_image():
    """On a vision model: everything chosen is the dense model; a row's choice does not depend on its neighbours, and
    the class token in front stands alone."""
    small = tiny_model("vit").config
    stock = tiny_model("vit", image_size=4 * small.patch_size)  # 16 patches
    pixels = torch.randn(3, small.num_channels, stock.config.image_size, stock.config.image_size)
    router = {"type": "union", "patch_size": 4}
    dense = copy.deepcopy(stock).double().eval()
    expected = dense(pixel_values=pixels.double())[0].detach()
    model = sharpen(union("vit", attention={"type": "union", "router": router}, router=router, dense=dense))
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=pixels.double())[0], expected, rtol=1e-9, atol=1e-10)
    router = {**SPARSE, "patch_size": 4}
    attention = {"type": "union", "router": router}
    model = sharpen(union("vit", attention=attention, router=router, dense=copy.deepcopy(stock)))
    with trace_routing(model) as contexts, torch.no_grad():
        whole = model(pixel_values=pixels)[0]
        torch.testing.assert_close(model(pixel_values=pixels[1:2])[0], whole[1:2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gathering(model)(pixel_values=pixels)[0], whole, rtol=1e-4, atol=1e-5)
    index = contexts[0].all_records()["0"].index.view(3, 17, -1)
    blocks = index[:, 1:].unflatten(1, (-1, 4))
    assert (blocks == blocks[:, :, :1]).all() and len(index.flatten(0, 1).sort(1).values.unique(dim=0)) > 1


def test_patches_are_not_for_causal_models():
    with pytest.raises(ValueError, match="`patch_size` .2. lets tokens choose by what comes after them"):
        union(router={**SPARSE, "patch_size": 2})
    with pytest.raises(ValueError, match="`patch_size` .None. lets tokens choose"):
        union(attention={"type": "union", "router": {**SPARSE, "patch_size": None}}, mlp=False)


# --- caches ---


CACHED = ["llama", "qwen3", "gemma2", "mistral", "gpt_neox", "phi", "opt"]


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("name", CACHED)
def test_a_cache_changes_nothing(name, gather):
    """Token by token, and in two pieces; keys of the past keep who chose them."""
    model = sharpen(union(name, attention={"type": "union", "router": SPARSE}, router=SPARSE))
    if gather:
        if getattr(model.config, "attn_logit_softcapping", None):
            pytest.skip("refused: a soft cap on the logits")
        model = gathering(model, copied=False)
    tokens = ids(2, 10)
    expected = logits(model, input_ids=tokens)
    for pieces in ([1] * 10, [6, 4], [9, 1]):
        cache, found = None, []
        for piece in tokens.split(pieces, dim=1):
            with torch.no_grad():
                out = model(input_ids=piece, use_cache=True, **({} if cache is None else {CACHE: cache}))
            cache = out[CACHE]
            found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gather", [False, True])
def test_a_static_cache_and_beams(gather):
    model = sharpen(union(attention={"type": "union", "router": SPARSE}, router=SPARSE))
    model = gathering(model, copied=False) if gather else model
    prompt = ids(2, 5)
    plain = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    dynamic = model.generate(prompt, **plain)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **plain), dynamic)
    without = model.generate(prompt, use_cache=False, **plain)
    assert torch.equal(dynamic, without)
    beams = model.generate(prompt, num_beams=3, **plain)
    assert torch.equal(beams, model.generate(prompt, num_beams=3, use_cache=False, **plain))


def test_padding_on_the_left_changes_nothing():
    model = sharpen(union(attention={"type": "union", "router": SPARSE}, router=SPARSE))
    tokens = ids(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, input_ids=padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found[:, 3:], logits(model, input_ids=tokens), rtol=1e-4, atol=1e-4)


def test_later_tokens_and_other_rows_change_nothing():
    """Neither the choice nor the output of what stands before."""
    model = sharpen(union(attention={"type": "union", "router": SPARSE}, router=SPARSE))
    one = ids(2, 8)
    other = one.clone()
    other[0, 6:] = (one[0, 6:] + 7) % 50 + 4
    other[1] = (one[1] + 11) % 50 + 4
    results = []
    for tokens in (one, other):
        with trace_routing(model) as contexts:
            out = logits(model, input_ids=tokens)
        results.append((out, {key: r.index.view(2, 8, -1) for key, r in contexts[0].all_records().items()}))
    torch.testing.assert_close(results[0][0][0, :6], results[1][0][0, :6], rtol=1e-5, atol=1e-5)
    for key, index in results[0][1].items():
        assert torch.equal(index[0, :6], results[1][1][key][0, :6])
    assert not torch.allclose(results[0][0][1], results[1][0][1])


# --- training ---


@pytest.mark.parametrize(("weights", "learns"), [("one", True), ("soft", True), ("none", False)])
def test_what_gives_the_router_a_gradient(weights, learns):
    router = {"type": "union", "weights": weights}
    model = union(attention={"type": "union", "router": router}, router=router, gate_init="zeros").train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    for gate in iter_routers(model):
        grad = gate.weight.grad
        assert (grad is not None and grad.abs().sum() > 0) if learns else (grad is None or not grad.any())


def test_soft_weights_are_one_for_a_flat_gate():
    dense = copy.deepcopy(tiny_model("llama"))
    expected = logits(dense, input_ids=ids())
    model = union(dense=dense, router={"type": "union", "weights": "soft"}, gate_init="zeros")
    torch.testing.assert_close(logits(model, input_ids=ids()), expected, rtol=1e-5, atol=1e-5)


def test_straight_through_is_the_gradient_of_the_probability():
    """d loss / d logits with weight 1 + (s - stop(s)) is that of s, with the value 1."""
    model = union(router={"type": "union", "weights": "one"}).train()
    block = model.model.layers[0].mlp
    hidden = torch.randn(1, 4, 32)
    block(hidden).square().sum().backward()
    gate = block.gate.weight.detach().clone().requires_grad_()
    scores = (hidden[0] @ gate.T).softmax(-1)
    with torch.no_grad():
        index = torch.arange(4).repeat(4, 1)
        parts = torch.stack([block.experts(hidden[0], index[:, i : i + 1], torch.ones(4, 1)) for i in range(4)], 1)
    weighted = ((1 + scores - scores.detach())[..., None] * parts).sum(1)
    weighted.square().sum().backward()
    torch.testing.assert_close(block.gate.weight.grad, gate.grad, rtol=1e-4, atol=1e-5)


def test_experts_become_fewer_over_training(tmp_path):
    """From all to k, linearly; a trained model keeps what it ended with, also when it is saved and loaded."""
    from tests.trainers.common import arguments, rows

    router = {"type": "union", "num_experts_per_tok": 1, "balance_coef": 0.01}
    model = union(attention={"type": "union", "router": router}, router=router)
    args = arguments(tmp_path, max_steps=6, logging_steps=1, learning_rate=1e-3)
    trainer = moe.MoETrainer(model=model, args=args, train_dataset=rows([9] * 12))
    trainer.train()
    used = [line["moe/mean_k"] for line in trainer.state.log_history if "moe/mean_k" in line]
    assert used[0] == 4 and used == sorted(used, reverse=True) and used[-1] == 2
    heads = [line["moe/attention/mean_k"] for line in trainer.state.log_history if "moe/attention/mean_k" in line]
    assert heads[0] == 2 and heads[-1] == 1
    model.eval().save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with trace_routing(again) as contexts:
        found = logits(again, input_ids=ids())
    assert torch.equal(found, logits(model, input_ids=ids()))
    assert all((r.index < r.num_experts).sum(1).eq(1).all() for r in contexts[0].all_records().values())


@pytest.mark.parametrize("router", ["union", SPARSE])
def test_checkpointing_gives_the_same_gradients(router):
    gradients = []
    for checkpointing in (False, True):
        model = sharpen(union(attention={"type": "union", "router": router}, router=router)).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model(input_ids=ids(), labels=ids()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_bfloat16():
    dense = copy.deepcopy(tiny_model("llama")).to(torch.bfloat16)
    expected = logits(dense, input_ids=ids())
    model = union(attention="union", dense=dense)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model, input_ids=ids()), expected, rtol=0.05, atol=0.1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_sees_the_chosen_heads_only():
    """LoRA on the output projection is its product added to the weight."""
    from peft import LoraConfig, get_peft_model

    model = sharpen(union(attention={"type": "union", "router": SPARSE}, mlp=False))
    plain = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        found = adapted(input_ids=ids()).logits
        for layer, twin in zip(model.model.layers, plain.model.layers, strict=True):
            lora = layer.self_attn.o_proj
            twin.self_attn.o_proj.weight += lora.get_delta_weight("default")
        expected = plain(input_ids=ids()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- saving, taking back, other ways in ---


def test_saves_and_loads(tmp_path):
    model = sharpen(union(attention={"type": "union", "router": SPARSE}, router=SPARSE))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.moe_ext["attention"] == {"type": "union", "router": SPARSE}
    assert torch.equal(logits(again, input_ids=ids()), logits(model, input_ids=ids()))


def test_a_live_extension_can_be_taken_back():
    dense = copy.deepcopy(tiny_model("llama"))
    expected, keys = logits(dense, input_ids=ids()), list(dense.state_dict())
    model = sharpen(union(attention={"type": "union", "router": SPARSE}, mlp=False, dense=dense))
    assert not torch.allclose(logits(model, input_ids=ids()), expected)
    restored = restore(model)
    assert type(restored) is LlamaForCausalLM and list(restored.state_dict()) == keys
    assert torch.equal(logits(restored, input_ids=ids()), expected)


def test_from_folder_to_folder_and_while_loading(tmp_path):
    """All three ways give the same tensors, the routers of attention included."""
    from hf_moe_ext.upcycling import load_upcycled, upcycle_checkpoint

    dense = copy.deepcopy(tiny_model("llama"))
    dense.save_pretrained(tmp_path / "dense")
    options = {"num_experts": 4, "num_experts_per_tok": 2, "parts": {"attention": "union"}, "seed": 5}
    live = upcycle(dense, "union_of_experts", **options)
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", "union_of_experts", **options)
    folder = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    loaded = load_upcycled(tmp_path / "dense", "union_of_experts", **options)
    for name, tensor in live.state_dict().items():
        assert torch.equal(folder.state_dict()[name], tensor), name
        assert torch.equal(loaded.state_dict()[name], tensor), name


# --- bad input ---


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match=r"`num_experts` \(5\) must divide the intermediate size \(48\)"):
        union(num_experts=5)
    with pytest.raises(ValueError, match=r"`num_experts` \(3\) must divide the 2 heads of keys of layer \"0\""):
        union(attention={"type": "union", "num_experts": 3}, mlp=False)
    with pytest.raises(ValueError, match=r"`num_experts_per_tok` \(9\) exceeds the 4 experts"):
        union(router={"type": "union", "num_experts_per_tok": 9})
    with pytest.raises(ValueError, match="`steps` .5. goes with `anneal=True`"):
        UnionRouterConfig(anneal=False, steps=5)
    with pytest.raises(ValueError, match="`num_experts` must be at least 1, got 0"):
        UnionAttentionConfig(num_experts=0)
    with pytest.raises(ValueError, match="zero-computation experts are none"):
        upcycle(tiny_model("llama"), "union_of_experts", num_experts=4, parts={"zero_experts": {"zero": 1}})


def test_attention_of_another_implementation_is_refused():
    model = union(attention="union", mlp=False)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match='attn_implementation="flex_attention" cannot take'):
        model.model.layers[0].self_attn(hidden_states=torch.zeros(1, 2, 32))


def test_attention_of_several_models_is_no_part_of_one(tmp_path):
    from hf_moe_ext.upcycling import load_upcycled, upcycle_checkpoint

    dense, parts = copy.deepcopy(tiny_model("llama")), {"attention": {"type": "bam", "num_experts": 2}}
    dense.save_pretrained(tmp_path / "dense")
    for attempt in (
        lambda: upcycle(dense, "sparse", parts=parts),
        lambda: upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", "sparse", parts=parts),
        lambda: load_upcycled(tmp_path / "dense", "sparse", parts=parts),
    ):
        with pytest.raises(ValueError, match="the attention `bam` is made of several models"):
            attempt()
    assert not (tmp_path / "moe").exists()


# --- the direction of the paper ---


@pytest.mark.slow
def test_a_union_starts_as_the_dense_model_and_learns_while_parts_leave(tmp_path):
    """From a trained dense model. The loss does not jump where the union begins, and is below that of the dense model
    after 400 more steps, in which half of the parts are left out; two of four parts without training are far above."""
    dense = character_llama()
    train_dense(dense, tmp_path / "dense", 600)
    before = held_out_loss(dense)
    router = {"type": "union", "steps": 200, "balance_coef": 0.01}
    options = {"num_experts": 4, "num_experts_per_tok": 2, "gate_init": "zeros"}
    model = upcycle(dense, "union_of_experts", router=router, **options)
    assert held_out_loss(model) == pytest.approx(before, abs=1e-4)
    at_once = upcycle(dense, "union_of_experts", router=SPARSE, **options)
    assert held_out_loss(at_once) > before + 0.1
    train_characters(model, tmp_path / "union", 400, learning_rate=1e-3)
    assert held_out_loss(model) < before
    with trace_routing(model) as contexts:
        held_out_loss(model)
    assert all((r.index < 4).sum(1).eq(2).all() for r in contexts[0].records.values())


@pytest.mark.slow
def test_a_union_beats_a_fixed_half_of_the_width(tmp_path):
    """Both from one dense model and tuned alike, with half of the neurons for a token. (A short tuning is not enough:
    after 400 steps the fixed half is still ahead.)"""
    dense = character_llama()
    train_dense(dense, tmp_path / "dense", 600)
    router = {"type": "union", "steps": 375, "balance_coef": 0.01}
    options = {"num_experts": 4, "num_experts_per_tok": 2, "gate_init": "zeros", "gate_noise": 0.01}
    model = upcycle(copy.deepcopy(dense), "union_of_experts", router=router, check=False, **options)
    train_characters(model, tmp_path / "union", 1500, learning_rate=1e-3)
    generator = torch.Generator().manual_seed(0)
    for layer in dense.model.layers:
        block = layer.mlp
        kept = torch.randperm(block.down_proj.in_features, generator=generator)[: block.down_proj.in_features // 2]
        for linear in (block.gate_proj, block.up_proj):
            linear.weight = torch.nn.Parameter(linear.weight.detach()[kept])
        block.down_proj.weight = torch.nn.Parameter(block.down_proj.weight.detach()[:, kept])
    train_dense(dense, tmp_path / "half", 1500, learning_rate=1e-3)
    assert held_out_loss(model) < held_out_loss(dense) - 0.002


def train_dense(model, folder, steps, **overrides):
    """As `train_characters`, with the stock trainer."""
    values = {"learning_rate": 3e-3, "lr_scheduler_type": "cosine", "weight_decay": 0.0, **overrides}
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=steps,
        **values,
    )
    Trainer(model, args, train_dataset=training_rows()).train()
    model.eval()
