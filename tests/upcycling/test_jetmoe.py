"""JetMoE: routers beside the stock class, its loss, and dense models as JetMoE."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, JetMoeConfig, JetMoeForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.modeling.moe_compat import CACHE
from hf_moe_ext.modeling.moe_structure import trace_routing
from hf_moe_ext.upcycling import jetmoe_config, jetmoe_extension, load_jetmoe


VOCAB = 64


def stock(seed=0, **overrides):
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "kv_channels": 8,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    model = JetMoeForCausalLM(JetMoeConfig(**(values | overrides))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def llama(seed=0, **overrides):
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(values | overrides))).eval()


def tokens(batch=2, length=9):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


def extended(model, **losses):
    return moe.extend(copy.deepcopy(model), moe.MoeExtension(router={"type": "top_k", **losses}, attention="routed"))


# --- beside the stock class ---


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("implementation", ["moe_ext", "grouped_mm", "eager"])
def test_equals_the_stock_class(k, implementation):
    model = stock(num_experts_per_tok=k)
    mine, ids = extended(model), tokens()
    mine.set_experts_implementation(implementation)
    torch.testing.assert_close(mine(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    if k <= 2:  # the order of a sum of two does not matter
        assert torch.equal(mine(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(mine.generate(ids, **options), model.generate(ids, **options))
    gradients = []
    with torch.enable_grad():
        for found in (model, mine):
            found.train()(ids, labels=ids).loss.backward()
            gradients.append({name: p.grad for name, p in found.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        if k > 1 or "router" not in name:  # with one expert the gate is constant
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_attention_against_loops():
    """Each token attends with the queries of each of its experts by itself."""
    model = extended(stock())
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    attention, block = layer.self_attention, layer.self_attention.experts
    hidden = torch.randn(2, 5, 32)
    cos, sin = rotary(hidden, torch.arange(5)[None])
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)[None, None]
    with trace_routing(model) as contexts:
        model(inputs_embeds=hidden)
    record = contexts[0].attention.records["attention.0"]
    found, _, _ = attention(hidden, attention_mask=mask, position_embeddings=(cos, sin))
    expected = torch.zeros(2, 5, 32, dtype=torch.float64)

    def rotate(x, t):
        half = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * cos[0, t].double() + half * sin[0, t].double()

    for b in range(2):
        keys, values = attention.kv_proj(hidden[b]).double().chunk(2, -1)
        keys, values = keys.view(5, 2, 8), values.view(5, 2, 8)
        for t in range(5):
            logits = block.router.layer(hidden[b, t]).double()
            best = logits.topk(2).indices
            weights = logits[best].softmax(-1)
            for number, weight in zip(best.tolist(), weights, strict=True):
                queries = (block.input_linear.weight[number].double() @ hidden[b, t].double()).view(2, 8)
                parts = []
                for head in range(2):
                    query = rotate(queries[head], t)
                    scores = torch.stack([query @ rotate(keys[j, head], j) for j in range(t + 1)]) * 8**-0.5
                    parts.append(scores.softmax(-1) @ values[: t + 1, head])
                expected[b, t] += weight * (block.output_linear.weight[number].double() @ torch.cat(parts))
    torch.testing.assert_close(found.double(), expected + block.bias.double(), rtol=1e-4, atol=1e-5)
    assert record.index.shape == (10, 2)


@torch.no_grad()
def test_the_order_of_heads_matters():
    """Keys are tiled over the slots. Interleaved, another head of keys would meet the queries."""
    model, ids = stock(), tokens()
    mine = extended(model)
    for layer in mine.model.layers:
        rows = layer.self_attention.experts.input_linear.weight
        rows.copy_(rows.unflatten(1, (2, 8)).flip(1).flatten(1, 2))
    assert (mine(ids).logits - model(ids).logits).abs().max() > 0.1


@torch.no_grad()
def test_logits_are_recorded_once():
    ids = tokens()
    out = extended(stock())(ids, output_router_logits=True)
    assert len(out.router_logits) == len(out.attn_router_logits) == 3
    # The stock class mixes both kinds, and has repeated those of attention.
    assert len(stock()(ids, output_router_logits=True).router_logits) in (6, 9)


def reference_loss(logits, k, mask):
    """Summed over routers, from the equations: assignments and probabilities normalised to 1."""
    total = 0.0
    for layer in logits:
        layer = layer.double()[mask]
        probabilities = layer.softmax(-1)
        counts = torch.zeros(layer.shape[-1], dtype=torch.float64)
        for row in layer.topk(k).indices.tolist():
            for number in row:
                counts[number] += 1
        switch = layer.shape[-1] * (counts / counts.sum() * probabilities.mean(0)).sum()
        total = total + switch + 0.1 * layer.logsumexp(-1).square().mean()
    return total


def test_the_loss_of_the_authors():
    model, ids = stock(), tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mine = moe.extend(copy.deepcopy(model), jetmoe_extension(model.config)).train()
    labels = ids.masked_fill(mask == 0, -100)
    out = mine(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    expected = 0.01 * reference_loss((*out.router_logits, *out.attn_router_logits), 2, mask.flatten().bool())
    torch.testing.assert_close(out.aux_loss.double(), expected, rtol=1e-5, atol=1e-7)
    plain = mine.eval()(ids, attention_mask=mask, labels=labels).loss  # nothing in evaluation
    torch.testing.assert_close(out.loss, plain + out.aux_loss, rtol=1e-5, atol=1e-5)
    routers = [p for name, p in mine.named_parameters() if "router" in name]
    gradients = torch.autograd.grad(out.aux_loss, routers)
    assert len(routers) == 6 and all(gradient.norm() > 0 for gradient in gradients)


def test_balanced_and_collapsed_routing():
    from hf_moe_ext.modeling.moe_losses import load_balancing_loss

    balanced = torch.arange(8).repeat(2).view(8, 2)
    scores = torch.full((8, 8), 1 / 8)
    assert load_balancing_loss(scores, balanced).item() / 2 == pytest.approx(1.0)
    collapsed = torch.zeros(8, 8).index_fill(1, torch.tensor([3, 5]), 0.5)
    index = torch.tensor([[3, 5]]).expand(8, 2)
    assert load_balancing_loss(collapsed, index).item() / 2 == pytest.approx(8 / 2)


@torch.no_grad()
def test_the_number_of_experts_may_change_while_decoding():
    model, ids = stock(), tokens()
    mine = moe.extend(
        model,
        moe.MoeExtension(
            router={"type": "top_p", "threshold": 0.6, "max_slots": 3},
            attention={"type": "routed", "router": {"type": "top_p", "threshold": 0.6, "max_slots": 3}},
        ),
    )
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(mine.generate(ids, **options), mine.generate(ids, use_cache=False, **options))
    with trace_routing(mine) as contexts:
        out = mine(ids, use_cache=True)
    used = (contexts[0].attention.records["attention.0"].index < 4).sum(-1)
    assert used.unique().numel() > 1
    cache = out.cache if "cache" in out else out.past_key_values
    assert cache.layers[0].keys.shape == (2, 2, 9, 8)  # whatever the slots
    for router in ("model.layers.0.self_attention.experts.router",):
        assert mine.get_submodule(router).moe_site.attention


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 3])
def test_another_number_of_experts_after_prefill(k):
    """Keys and values do not depend on it: in one layer, the next token is that of a whole pass with the other."""
    model, ids = extended(stock(num_hidden_layers=1)), tokens()
    out = model(ids[:, :-1], use_cache=True)
    cache = out[CACHE]
    with moe.route_rows(model, ["other"] * 2, {"other": {"num_experts_per_tok": k}}):
        found = model(ids[:, -1:], **{CACHE: cache}).logits[:, -1]
        expected = model(ids).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - model(ids).logits[:, -1]).abs().max() > 1e-3
    assert cache.layers[0].keys.shape == (2, 2, 9, 8)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_adapters_on_the_experts():
    """LoRA of PEFT on the stacks of both mixtures does what it does on the stock class."""
    peft = pytest.importorskip("peft")
    names = [f"{place}.{stack}.weight" for place in ("mlp", "experts") for stack in ("input_linear", "output_linear")]
    base, ids, found = stock(), tokens(), []
    for model in (copy.deepcopy(base), extended(base)):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=names))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        out = adapted(ids, labels=ids)
        out.loss.backward()
        found.append((out.logits, {n: p.grad for n, p in adapted.named_parameters() if "lora_" in n}))
    (expected, theirs), (logits, mine) = found
    assert (expected - base(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(theirs) == len(mine) == 3 * 4 * 2
    for name, gradient in theirs.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_unused_slots_add_nothing():
    """Top-p with a threshold of 1 and all slots is the softmax over all experts; with less, a sum over fewer."""
    model, ids = stock(num_experts_per_tok=4), tokens()
    declared = {"type": "top_p", "threshold": 1.0, "max_slots": 4, "renormalize": True}
    mine = moe.extend(
        copy.deepcopy(model),
        moe.MoeExtension(router=declared, attention={"type": "routed", "router": declared}),
    )
    torch.testing.assert_close(mine(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    one = {"type": "top_p", "threshold": 1e-6, "max_slots": 4, "renormalize": True}
    single = {"type": "top_k", "num_experts_per_tok": 1}
    pair = [
        moe.extend(copy.deepcopy(model), moe.MoeExtension(router=r, attention={"type": "routed", "router": r}))
        for r in (one, single)
    ]
    torch.testing.assert_close(pair[0](ids).logits, pair[1](ids).logits, rtol=1e-4, atol=1e-5)


def checkpoint(model):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def test_checkpointing_and_compile():
    ids, model = tokens(), extended(stock(), z_coef=0.1).train()
    with pytest.raises(ValueError, match="checkpointing"):
        checkpoint(stock())
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    checkpoint(model)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)
    model = extended(stock())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_saved_loaded_restored(tmp_path):
    model, ids = stock(), tokens()
    mine = extended(model, balance_coef=0.1)
    mine.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, mine(ids).logits)
    assert loaded.model.layers[0].self_attention.experts.router.moe_config.type == "top_k"
    moe.restore(mine)
    assert type(mine) is JetMoeForCausalLM and mine.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(mine(ids).logits, model(ids).logits)


def test_counts_of_the_released_model():
    config = JetMoeConfig(num_hidden_layers=24)
    with torch.device("meta"):
        found = moe.describe(JetMoeForCausalLM(config))
    # The figures of the release count neither norms nor the biases of the mixtures.
    others = 24 * 4 * 2048 + 2048
    assert found.parameters == 8_522_237_952 and found.parameters - others == 8_522_039_296
    per_layer = 6 * (2048 * 11264 + 5632 * 2048) + 6 * 2 * 2048 * 2048
    assert found.active_parameters == found.parameters - 24 * per_layer


# --- checkpoints with the old names ---

OLD = {
    "n_layer": 3,
    "n_embd": 32,
    "n_head": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 24,
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "vocab_size": VOCAB,
    "rope_theta": 10000.0,
    "glu": True,
}


def test_old_names(tmp_path):
    config = jetmoe_config(OLD)
    assert (config.num_hidden_layers, config.intermediate_size, config.num_attention_heads) == (3, 24, 4)
    model = stock()
    model.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    for old, new in (("n_layer", "num_hidden_layers"), ("moe_top_k", "num_experts_per_tok")):
        text[old] = text.pop(new)
    (tmp_path / "config.json").write_text(json.dumps(text))
    ids = tokens()
    assert torch.equal(load_jetmoe(tmp_path)(ids).logits, model(ids).logits)


def test_incomplete_configs():
    with pytest.raises(ValueError, match="nothing of `num_hidden_layers`"):
        jetmoe_config({name: value for name, value in OLD.items() if name != "n_layer"})
    with pytest.raises(ValueError, match="`num_hidden_layers` is 4, but `num_hidden_layers` is 3"):
        jetmoe_config({**OLD, "num_hidden_layers": 4})


# --- dense models ---


@torch.no_grad()
@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ({}, {"num_experts": 1, "num_experts_per_tok": 1}),
        ({}, {"num_experts": 3, "num_experts_per_tok": 1, "mlp": "copy"}),
        ({}, {"num_experts": 4, "num_experts_per_tok": 2}),
        ({"num_key_value_heads": 4}, {"num_experts": 2, "num_experts_per_tok": 1}),
        (
            {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 16},
            {"num_experts": 2, "num_experts_per_tok": 1},
        ),
    ],
    ids=["one_copy", "three_copies", "two_of_four", "no_groups", "one_head_of_keys"],
)
def test_dense_model_as_jetmoe(overrides, options, tmp_path):
    dense, ids = llama(**overrides), tokens()
    model = moe.upcycle(dense, method="jetmoe", **options)
    assert type(model) is JetMoeForCausalLM and model.upcycle_report.preserves_function
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    generated = dense.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), generated)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    group = dense.config.num_attention_heads // dense.config.num_key_value_heads
    with trace_routing(moe.extend(model, moe.MoeExtension(router="top_k", attention="routed"))) as contexts:
        model(ids)
    for record in contexts[0].all_records().values():  # whole copies only
        copies = (record.index // group).sort(-1).values.unflatten(-1, (-1, group))
        assert (copies == copies[..., :1]).all()


def test_dense_models_without_a_jetmoe():
    for overrides, reason in (
        ({"rms_norm_eps": 1e-5}, "`rms_norm_eps` is 1e-05"),
        ({"attention_bias": True}, "projections have biases"),
        ({"hidden_act": "gelu"}, "activation is not SiLU"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "of the type 'linear'"),
    ):
        with pytest.raises(ValueError, match=reason):
            moe.upcycle(llama(**overrides), method="jetmoe", num_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="48 wide, which 5 experts cannot share"):
        moe.upcycle(
            llama(hidden_size=40, num_attention_heads=5, num_key_value_heads=1), "jetmoe", num_experts_per_tok=1
        )
    with pytest.raises(TypeError, match="`jetmoe` does not take `router`"):
        moe.upcycle(llama(), "jetmoe", router="top_k")
    with pytest.raises(ValueError, match="must not exceed"):
        moe.upcycle(llama(), "jetmoe", num_experts=1, num_experts_per_tok=2)
