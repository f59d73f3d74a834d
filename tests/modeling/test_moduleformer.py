"""ModuleFormer against loops in float64: mixtures, gates, cache, saving, training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.activations import ACT2FN

import hf_moe_ext as moe
from hf_moe_ext.modeling.modeling_moduleformer import ModuleFormerConfig, ModuleFormerForCausalLM

from ..trainers.common import arguments, logged, rows, snapshot, train
from .test_stick_breaking import break_stick


VOCAB = 64


def make(seed=0, **overrides):
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_hidden_size": 16,
        "intermediate_size": 24,
        "moa_num_experts": 4,
        "mlp_num_experts": 6,
        "router_hidden_size": 8,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    model = ModuleFormerForCausalLM(ModuleFormerConfig(**(values | overrides))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts." in name:  # their own start is too small to tell anything
                parameter.normal_(std=0.3)
    return model


def tokens(batch=2, length=7):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


def gate_logits(gate, x):
    if gate.kind == "linear":
        return gate.weight.double() @ x
    if gate.kind == "mlp":
        return gate.weight.double() @ F.gelu(gate.hidden_weight.double() @ x + gate.hidden_bias.double())
    inner = gate.hidden_weight.double() @ x
    rows_of = gate.weight.double()
    cosines = rows_of @ inner / rows_of.norm(dim=1) / inner.norm()
    return cosines * gate.log_scale_norm.double().exp()


def chosen(gate, x):
    """(expert, weight) of the best k, weights not renormalised."""
    probabilities = gate_logits(gate, x).softmax(-1)
    best = probabilities.argsort(descending=True)[: gate.top_k].tolist()
    return [(number, probabilities[number]) for number in best]


def slow_forward(model, ids):
    """Token by token and expert by expert, in float64, from the equations."""
    config = model.config
    heads, size, act = config.num_attention_heads, config.head_dim, ACT2FN["gelu_new"]
    out = []
    for sequence in ids:
        stream = [model.model.embed_tokens.weight[token].double() for token in sequence]
        for layer in model.model.layers:

            def norm(x, module):
                return F.layer_norm(x, x.shape, module.weight.double(), module.bias.double(), module.eps)

            attention, normed = layer.attention, [norm(x, layer.input_layernorm) for x in stream]
            keys = [(F.linear(x, attention.k_proj.weight.double(), attention.k_proj.bias.double())) for x in normed]
            values = [(F.linear(x, attention.v_proj.weight.double(), attention.v_proj.bias.double())) for x in normed]
            added = []
            for i, x in enumerate(normed):
                total = torch.zeros_like(x)
                for number, weight in chosen(attention.gate, x):
                    query = attention.experts.query_proj[number].double() @ x
                    parts = []
                    for head in range(heads):
                        place = slice(head * size, (head + 1) * size)
                        logits = torch.stack([query[place] @ keys[j][place] for j in range(i + 1)]) / math.sqrt(size)
                        shares, _ = break_stick(logits)
                        parts.append(sum(shares[j] * values[j][place] for j in range(i + 1)))
                    total = total + weight * (attention.experts.output_proj[number].double() @ torch.cat(parts))
                added.append(total)
            stream = [x + a for x, a in zip(stream, added, strict=True)]
            experts = layer.mlp.experts
            for i, x in enumerate(stream):
                inner = norm(x, layer.post_attention_layernorm)
                for number, weight in chosen(layer.mlp.gate, inner):
                    middle = act(experts.up_proj[number].double() @ inner)
                    stream[i] = stream[i] + weight * (experts.down_proj[number].double() @ middle)
        final = model.model.norm
        out.append(
            torch.stack(
                [
                    F.layer_norm(x, x.shape, final.weight.double(), final.bias.double(), final.eps)
                    @ model.lm_head.weight.double().T
                    for x in stream
                ]
            )
        )
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"router_kind": "linear"},
        {"router_kind": "cosine", "moa_top_k": 3},
        {"moa_top_k": 4, "mlp_top_k": 6},  # all experts: the dense sums
        {"moa_top_k": 1, "mlp_top_k": 1, "num_attention_heads": 4},
    ],
    ids=["mlp", "linear", "cosine", "all_experts", "one_expert"],
)
def test_equations(overrides):
    model = make(**overrides)
    if overrides.get("router_kind") == "cosine":
        for module in model.modules():
            if hasattr(module, "log_scale_norm"):
                module.log_scale_norm.fill_(1.3)
    ids = tokens()
    torch.testing.assert_close(model(ids).logits.double(), slow_forward(model, ids), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cache_padding_and_causality():
    model, ids = make(), tokens()
    whole = model(ids).logits
    cache, parts = None, []
    for t in range(ids.shape[1]):
        out = model(ids[:, t : t + 1], use_cache=True, past_key_values=cache)
        cache = out.cache if "cache" in out else out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    # The cache has the shared keys only, whatever the number of experts.
    assert cache.layers[0].keys.shape == (2, 2, 7, 8)
    changed = ids.clone()
    changed[:, -1] = 1 + changed[:, -1] % (VOCAB - 1)
    torch.testing.assert_close(model(changed).logits[:, :-1], whole[:, :-1])
    padded = F.pad(ids, (3, 0))
    mask = (padded != 0).long()
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_generation_with_a_cache_is_generation_without(options):
    model, ids = make(), F.pad(tokens(), (2, 0))
    common = {"attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False, "num_beams": 1, **options}
    found = model.generate(ids, **common)
    common.pop("cache_implementation", None)
    assert torch.equal(found, model.generate(ids, use_cache=False, **common))


@torch.no_grad()
def test_saved_and_loaded(tmp_path, plugin_free_python):
    model, ids = make(router_aux_loss_coef=0.1), tokens()
    model.save_pretrained(tmp_path / "causal")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "causal")
    assert type(loaded) is ModuleFormerForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path / "causal")
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal", num_labels=3)
    assert classifier(ids, labels=torch.tensor([0, 2])).loss.isfinite()
    save_file({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.safetensors")
    done = plugin_free_python(
        """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/causal", trust_remote_code=True)
expected = load_file(sys.argv[1] + "/expected.safetensors")
assert type(model).__module__.startswith("transformers_modules."), type(model)
out = model(expected["ids"], labels=expected["ids"], output_router_logits=True)
assert torch.equal(out.logits, expected["logits"]) and len(out.attn_router_logits) == 2
model.generate(expected["ids"], max_new_tokens=2, do_sample=False)
model.save_pretrained(sys.argv[1] + "/again")
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_export_verifies_itself(tmp_path):
    path = moe.export(make(), tmp_path / "exported")
    card = (path / "README.md").read_text()
    assert "2306.04640" in card and "attention.0" in card


def test_gradients_with_and_without_checkpointing():
    ids, found = tokens(), []
    for checkpointing in (False, True):
        model = make(router_aux_loss_coef=0.5).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, recomputed = found
    for name, gradient in plain.items():
        assert gradient is not None and gradient.norm() > 0, name
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


@pytest.mark.parametrize("kind", ["information", "switch_z", "concentration"])
def test_losses_reach_all_routers_once(kind):
    """The means over layers, for attention and blocks apart; in training only."""
    model, ids = make(router_aux=kind, router_aux_loss_coef=0.5), tokens()
    plain = model(ids, labels=ids).loss
    out = model.train()(ids, labels=ids, output_router_logits=True)
    assert len(out.router_logits) == len(out.attn_router_logits) == 2
    expected = torch.zeros(())
    for logits in (out.router_logits, out.attn_router_logits):
        for layer in logits:
            p = layer.softmax(-1)
            entropy = -(p * p.log()).sum(-1).mean()
            marginal = -(p.mean(0) * p.mean(0).log()).sum()
            share = F.one_hot(layer.topk(2).indices, p.shape[-1]).sum(1).float().mean(0)
            switch = p.shape[-1] * (share * p.mean(0)).sum() + 0.1 * layer.logsumexp(-1).square().mean()
            value = {"information": entropy - marginal, "concentration": marginal, "switch_z": switch}[kind]
            expected = expected + 0.5 * value / 2
    torch.testing.assert_close(out.aux_loss, expected)
    torch.testing.assert_close(out.loss, plain + expected, rtol=1e-5, atol=1e-5)
    gates = [module for module in model.modules() if hasattr(module, "hidden_weight")]
    (grads) = torch.autograd.grad(out.aux_loss, [gate.hidden_weight for gate in gates])
    assert len(gates) == 4 and all(grad.norm() > 0 for grad in grads)


def test_exploration_in_training():
    """Each token keeps its best experts and draws the others, by their probability."""
    from hf_moe_ext.modeling.moe_context import RoutingContext
    from hf_moe_ext.modeling.router_top_k import TopKRouterConfig

    from .test_routers import make_gate

    gate = make_gate(TopKRouterConfig(num_experts_per_tok=3, sample_slots=2)).train()
    hidden = torch.randn(1, gate.moe_site.hidden_size).expand(4000, -1)
    context = RoutingContext(generator=torch.Generator().manual_seed(0))
    record = gate.route(hidden, context)
    best = record.scores[0].argmax()
    assert (record.index[:, 0] == best).all()
    assert (record.index.sort(-1).values.diff(dim=-1) > 0).all()  # without replacement
    rest = record.scores[0].clone()
    rest[best] = 0
    first = torch.bincount(record.index[:, 1], minlength=len(rest)) / 4000
    torch.testing.assert_close(first, rest / rest.sum(), atol=4 * math.sqrt(0.25 / 4000), rtol=0)
    assert torch.equal(record.index, gate.route(hidden, context).index)  # as in a recomputation
    gate.eval()
    assert torch.equal(gate.route(hidden, context).index[0], record.scores[0].topk(3).indices)
    with pytest.raises(ValueError, match="exceeds the k=1"):
        make_gate(TopKRouterConfig(num_experts_per_tok=1, sample_slots=2))
    assert make(sample_top_k=1).model.layers[0].attention.gate.moe_config.sample_slots == 1


def test_other_routers_and_counts_by_layer(tmp_path):
    declared = {
        "router": {"type": "top_p", "threshold": 0.5, "max_slots": 3},
        "attention": {"type": "routed", "router": {"type": "xmoe", "num_experts_per_tok": 1}},
        "layers": {"1": {"experts": {"num_experts": 3}, "attention": {"type": "routed", "num_experts": 9}}},
    }
    model, ids = make(moe_ext=declared), tokens()
    second = model.model.layers[1]
    assert second.attention.experts.query_proj.shape[0] == second.attention.gate.weight.shape[0] == 9
    assert second.mlp.experts.up_proj.shape[0] == second.mlp.gate.weight.shape[0] == 3
    assert second.attention.gate.hidden_weight.shape == (8, 32)
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path).generate(ids, max_new_tokens=3, do_sample=False), out
    )


def test_trains_and_resumes(tmp_path):
    data = rows([7, 5, 6, 7, 4, 7, 6, 5])
    trainer = train(
        make(router_aux_loss_coef=0.1), data, tmp_path / "a", max_steps=6, save_strategy="steps", save_steps=3
    )
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    for name in ("moe/loss_information", "moe/loss_attention_information", "moe/attention/mean_k", "moe/mean_k"):
        assert logged(trainer, name), name
    again = moe.MoETrainer(
        model=make(seed=3, router_aux_loss_coef=0.1), args=arguments(tmp_path / "a", max_steps=6), train_dataset=data
    )
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for name, tensor in snapshot(trainer.model).items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_bfloat16_and_compile():
    model, ids = make(), tokens()
    exact = model(ids).logits
    low = copy.deepcopy(model).bfloat16()(ids).logits
    errors = (low.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert low.dtype == torch.bfloat16 and errors.median() < 0.05  # a token near the border chooses another expert
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, exact, rtol=1e-4, atol=1e-5)


def test_counts():
    model = make()
    found = moe.describe(model)
    assert [layer.key for layer in found.attention] == ["attention.0", "attention.1"]
    expert, attention_expert = 2 * 24 * 32, 2 * 16 * 32
    inactive = 2 * (4 * expert + 2 * attention_expert)
    assert found.active_parameters == sum(p.numel() for p in model.parameters()) - inactive
    assert [layer.num_experts for layer in found.attention] == [4, 4]


def test_bad_configs():
    for overrides, text in (
        ({"moa_top_k": 5}, "`moa_top_k` \\(5\\) must not exceed `moa_num_experts` \\(4\\)"),
        ({"attention_hidden_size": 15}, "divisible by `num_attention_heads`"),
        ({"sample_top_k": 3}, "`sample_top_k` must be in"),
        ({"router_aux_loss_coef": -1.0}, "non-negative"),
        ({"moe_ext": {"router": {"type": "nothing"}}}, "unknown router type `nothing`"),
    ):
        with pytest.raises(ValueError, match=text):
            make(**overrides)
    with pytest.raises(ValueError, match="declares its routers in its own config"):
        moe.extend(make(), moe.MoeExtension(router="top_k"))
    assert AutoConfig.for_model("moduleformer").moa_num_experts == 32
