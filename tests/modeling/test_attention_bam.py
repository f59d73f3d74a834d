"""Attention experts as one wide attention, against stock attention modules run one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import DENSE_NAMES, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.cohere import CohereConfig, CohereForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.modeling.attention_bam import BamAttentionConfig
from hf_moe_ext.modeling.moe_compat import CACHE
from hf_moe_ext.modeling.moe_families import get_by_path, get_family, iter_layers
from hf_moe_ext.modeling.moe_structure import trace_routing
from hf_moe_ext.upcycling.plan import UpcycleOptions, make_plan


SUPPORTED = [name for name in DENSE_NAMES if get_family(name).attention is not None]
REFUSED = [name for name in DENSE_NAMES if get_family(name).attention is None] + ["olmo2", "olmo3"]
SUPPORTED = [name for name in SUPPORTED if name not in REFUSED]
# Weights of the feed-forward experts sum to 1: N copies of one block are that block.
EXACT = {"type": "top_k", "renormalize": True}


def variants(name, count=3):
    """Models of one architecture with weights of their own."""
    first = tiny_model(name).eval()
    found = [first]
    for seed in range(1, count):
        other = copy.deepcopy(first)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator))
        found.append(other)
    return found


def mix(sources, kv="expert", **options):
    options = {"router": EXACT, "num_experts_per_tok": 2, **options}
    return moe.upcycle(sources, method="bam", attention_kv=kv, **options).eval()


def layouts(name):
    spec = get_family(name).attention
    return ["expert"] if spec.fused or set(spec.head_counts) & set(spec.key_counts) else ["expert", "shared"]


CASES = [pytest.param(name, kv, id=f"{name}-{kv}") for name in SUPPORTED for kv in layouts(name)]


@torch.no_grad()
@pytest.mark.parametrize(("name", "kv"), CASES)
def test_identical_sources_are_the_dense_model(name, kv):
    """For any router: the gates sum to 1."""
    dense, inputs = tiny_model(name).eval(), tiny_inputs(name)
    model = mix([dense] * 3, kv)
    torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits, rtol=1e-4, atol=1e-4)
    router = next(m for n, m in model.named_modules() if n.endswith("moe_gate"))
    assert router.weight.std() > 0.01


def attention_of(model, key="0"):
    family = get_family(model.config.model_type)
    layer = {k: layer for k, layer, _ in iter_layers(model, family)}[key]
    return get_by_path(layer, family.attention.site), family.attention


def record_inputs(model, inputs, use_cache=False):
    """What the attention of the first layer is given in a forward, and its output."""
    module, spec = attention_of(model)
    seen = {}

    def before(_, args, kwargs):
        seen["args"], seen["kwargs"] = args, dict(kwargs)

    def after(_, args, kwargs, output):
        seen["output"] = output[0] if isinstance(output, tuple) else output

    handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
    handles.append(module.register_forward_hook(after, with_kwargs=True))
    with trace_routing(model) as contexts:
        model(**inputs, use_cache=use_cache)
    for handle in handles:
        handle.remove()
    record = contexts[0].attention.records["attention.0"]
    hidden = seen["kwargs"].get("hidden_states", seen["args"][0] if seen["args"] else None)
    gates = torch.zeros(len(record.index), record.num_experts).scatter(1, record.index, record.weights)
    return seen, gates.view(*hidden.shape[:-1], -1)


@torch.no_grad()
@pytest.mark.parametrize(("name", "kv"), CASES)
def test_against_the_attention_of_each_source(name, kv):
    """The mixture of the outputs of stock attention modules, one for each source."""
    sources, inputs = variants(name), tiny_inputs(name)
    inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    model = mix(sources, kv)
    seen, gates = record_inputs(model, inputs)
    expected = torch.zeros(seen["output"].shape)
    spec = get_family(name).attention
    for number, source in enumerate(sources):
        module = copy.deepcopy(attention_of(source)[0])
        if kv == "shared":
            for path in (spec.key, spec.value, spec.key_norm):
                if path is None or not hasattr(module, path):
                    continue
                for role, parameter in getattr(module, path).named_parameters():
                    others = [getattr(attention_of(s)[0], path).get_parameter(role) for s in sources]
                    parameter.copy_(torch.stack(others).double().mean(0))
        out = module(*seen["args"], **seen["kwargs"])
        expected += gates[..., number, None] * (out[0] if isinstance(out, tuple) else out)
    torch.testing.assert_close(seen["output"], expected, rtol=1e-4, atol=1e-5)
    assert gates.std() > 0.003  # the experts are told apart


@pytest.mark.parametrize("name", ["gpt_neox", "opt"])
def test_keys_that_cannot_be_shared(name):
    dense = tiny_model(name).eval()
    with pytest.raises(ValueError, match="keys and values cannot be shared"):
        mix([dense, dense], "shared")


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_are_refused(name):
    dense = tiny_model(name).eval()
    with pytest.raises(ValueError, match="cannot extend the attention|cannot hold experts"):
        mix([dense, dense])


def llama(seed=0, **overrides):
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(values | overrides))).eval()


def tokens(batch=2, length=7):
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cache_and_generation(kv, implementation):
    model, ids = mix([llama(0), llama(1), llama(2)], kv), tokens()
    model.set_attn_implementation(implementation)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    whole = model(ids).logits
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], whole, rtol=1e-4, atol=1e-5)
    out = model(ids, use_cache=True)
    cache = out.cache if "cache" in out else out.past_key_values
    assert cache.layers[0].keys.shape == (2, 2 if kv == "shared" else 6, 7, 8)
    for options in ({}, {"num_beams": 3}):
        common = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask, **options}
        cached = model.generate(padded, **common)
        assert torch.equal(cached, model.generate(padded, use_cache=False, **common))
    static = {"cache_implementation": "static", "disable_compile": True}
    common = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(padded, **common, **static), model.generate(padded, **common))


@torch.no_grad()
@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_identical_sources_with_a_cache(kv, implementation):
    """Step by step with a cache, heads grouped by keys, as the dense model does."""
    dense, ids = llama(), tokens()
    model = mix([dense] * 3, kv)
    for each in (dense, model):
        each.set_attn_implementation(implementation)
    expected = dense(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    cache = DynamicCache(config=model.config)
    parts = (ids[:, :4], *ids[:, 4:].split(1, 1))
    steps = [model(part, **{CACHE: cache}, use_cache=True).logits for part in parts]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)
    common = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **common), dense.generate(ids, **common))


@torch.no_grad()
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_decoding_against_sources_with_caches_of_their_own(kv):
    """Step by step: the wide attention with one cache, and the attention of each source with a cache of its own."""
    sources, ids = [llama(0), llama(1), llama(2)], tokens()
    model = mix(sources, kv)
    alone = [copy.deepcopy(attention_of(source)[0]) for source in sources]
    if kv == "shared":
        for name in ("k_proj", "v_proj"):
            mean = torch.stack([getattr(each, name).weight for each in alone]).double().mean(0)
            for each in alone:
                getattr(each, name).weight.copy_(mean)
    cache, own = DynamicCache(), [DynamicCache() for _ in sources]
    for part in (ids[:, :4], *ids[:, 4:].split(1, 1)):
        seen, gates = record_inputs(model, {"input_ids": part, CACHE: cache}, use_cache=True)
        expected = torch.zeros(seen["output"].shape)
        for number, (module, past) in enumerate(zip(alone, own, strict=True)):
            out = module(*seen["args"], **seen["kwargs"] | {CACHE: past})[0]
            expected += gates[..., number, None] * out
        torch.testing.assert_close(seen["output"], expected, rtol=1e-4, atol=1e-5)
    assert cache.layers[0].keys.shape == (2, 2 if kv == "shared" else 6, 7, 8)
    assert all(past.layers[0].keys.shape == (2, 2, 7, 8) for past in own)


@torch.no_grad()
def test_norms_of_heads_are_those_of_their_experts():
    """Cohere has one weight of the query and key norms for each head, with `use_qk_norm`."""
    sources = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = CohereConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_qk_norm=True,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
        sources.append(CohereForCausalLM(config).eval())
        for name, parameter in sources[-1].named_parameters():
            if "norm" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape))
    for kv in ("expert", "shared"):
        seen, gates = record_inputs(mix(sources, kv), {"input_ids": tokens()})
        expected = torch.zeros(seen["output"].shape)
        for number, source in enumerate(sources):
            module = copy.deepcopy(attention_of(source)[0])
            for path in ("k_proj", "v_proj", "k_norm") if kv == "shared" else ():
                others = [getattr(attention_of(s)[0], path).weight for s in sources]
                getattr(module, path).weight.copy_(torch.stack(others).double().mean(0))
            expected += gates[..., number, None] * module(*seen["args"], **seen["kwargs"])[0]
        torch.testing.assert_close(seen["output"], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_all_feed_forward_experts_of_one_source_are_its_block():
    """Weights of the whole softmax sum to 1 where all experts are used, and one that is chosen puts out its part."""
    dense, ids = llama(), tokens()
    model = moe.upcycle([dense] * 3, method="bam", num_experts_per_tok=3).eval()
    assert not model.model.layers[0].mlp.gate.moe_config.renormalize
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    model = moe.upcycle([dense] * 3, method="bam").eval()
    seen = {}
    block = model.model.layers[0].mlp
    block.register_forward_hook(lambda module, args, out: seen.update(hidden=args[0], out=out))
    with trace_routing(model) as contexts:
        model(ids)
    record = contexts[0].records["0"]
    probability = (seen["hidden"].flatten(0, 1) @ block.gate.weight.t()).softmax(-1).max(-1, keepdim=True).values
    torch.testing.assert_close(record.weights, probability)
    expected = probability.view(2, 7, 1) * dense.model.layers[0].mlp(seen["hidden"])
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_one_hot_gates_are_the_chosen_source(kv):
    sources, ids = [llama(0), llama(1), llama(2)], tokens()
    if kv == "shared":
        for source in sources[1:]:
            for name, parameter in source.named_parameters():
                if "k_proj" in name or "v_proj" in name:
                    parameter.copy_(sources[0].get_parameter(name))
    model = mix(sources, kv, router={"type": "top_k", "num_experts_per_tok": 3})
    seen, _ = record_inputs(model, {"input_ids": ids})
    hidden = seen["kwargs"]["hidden_states"]
    module, _ = attention_of(model)
    pinned = torch.zeros_like(module.moe_gate.weight)
    pinned[1] = 1e4 * hidden.reshape(-1, 32)[0]  # the first token goes to source 1 for certain
    module.moe_gate.weight.copy_(pinned)
    seen, gates = record_inputs(model, {"input_ids": ids})
    assert gates[0, 0].tolist() == [0.0, 1.0, 0.0]
    alone = attention_of(sources[1])[0](*seen["args"], **seen["kwargs"])[0]
    torch.testing.assert_close(seen["output"][0, 0], alone[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_one_token_trains_every_source(kv):
    """Soft routing reaches all attention experts and their router; of the feed-forward experts, the chosen one."""
    model = mix([llama(0), llama(1), llama(2)], kv, router=None, num_experts_per_tok=1).train()
    model(tokens(1, 1)).logits.square().sum().backward()
    layer = model.model.layers[0]
    attention = layer.self_attn
    # A single token attends to itself alone, whatever the query.
    rows = attention.v_proj.weight.grad.unflatten(0, (2 if kv == "shared" else 6, 8))
    assert (rows.norm(dim=(1, 2)) > 0).all()
    assert (attention.o_proj.weight.grad.norm(dim=0) > 0).all() and (
        attention.moe_gate.weight.grad.norm(dim=1) > 0
    ).all()
    used = layer.mlp.experts.down_proj.grad.flatten(1).norm(dim=1) > 0
    assert used.sum() == 1
    assert (layer.mlp.gate.weight.grad.norm(dim=1) > 0).all()
    model.zero_grad()
    model(tokens(1, 4)).logits.square().sum().backward()
    assert (attention.q_proj.weight.grad.unflatten(0, (12, 8)).norm(dim=(1, 2)) > 0).all()


def test_checkpointing_compile_and_bfloat16():
    model, ids = mix([llama(0), llama(1)], router=None, num_experts_per_tok=1), tokens()
    exact = model(ids).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, exact, rtol=1e-4, atol=1e-5)
    found = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointing:
            enable = getattr(trained, "activation_checkpointing_enable", None) or trained.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        trained(ids, labels=ids).loss.backward()
        found.append({name: parameter.grad for name, parameter in trained.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    low = copy.deepcopy(model).bfloat16()(ids).logits.float()
    assert ((low - exact).norm(dim=-1) / exact.norm(dim=-1)).median() < 0.05


@torch.no_grad()
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_saved_and_loaded(kv, tmp_path, plugin_free_python):
    model, ids = mix([llama(0), llama(1)], kv), tokens()
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    path = moe.export(model, tmp_path / "exported")  # loads it in a clean process
    assert "bit-equal" in (path / "README.md").read_text()


@torch.no_grad()
def test_other_routers_in_attention():
    """Top-1 and top-2 routing of attention experts, the ablation of the paper."""
    sources, ids = [llama(0), llama(1), llama(2)], tokens()
    for router, used in (
        (None, 3),
        ({"type": "top_k", "num_experts_per_tok": 2}, 2),
        ({"type": "top_p", "max_slots": 2}, 2),
    ):
        model = mix(sources, attention_router=router)
        with trace_routing(model) as contexts:
            out = model(ids, output_router_logits=True)
        record = contexts[0].attention.records["attention.1"]
        assert record.index.shape == (14, used)
        assert len(out.attn_router_logits) == len(out.router_logits) == 2
    with pytest.raises(ValueError, match="mixtures of tokens"):
        mix(sources, attention_router={"type": "soft_moe", "allow_non_causal": True})
    with pytest.raises(ValueError, match="has no place in attention"):
        mix(sources, attention_router="rmoe")


def test_extend_keeps_weights():
    with pytest.raises(ValueError, match="Use `upcycle"):
        moe.extend(llama(), moe.MoeExtension(attention={"type": "bam", "num_experts": 2}))
    with pytest.raises(ValueError, match="unknown attention type `bem`.*Did you mean `bam`"):
        moe.MoeExtension(attention="bem")


def test_counts_of_the_paper():
    """Operations of attention and active parameters of the small model, 2408.08274, table 1 and appendix."""
    d, context = 1024, 256

    def operations(model):
        """Of one token: two for each weight of a projection, and the products of its query with all keys."""
        attention = model.model.layers[0].self_attn
        shapes = [getattr(attention, f"{name}_proj").weight.shape for name in "qkvo"]
        return 2 * sum(rows * columns for rows, columns in shapes) + 2 * context * attention.q_proj.out_features

    config = LlamaConfig(
        vocab_size=256_000,
        hidden_size=d,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        dense = LlamaForCausalLM(config)
    options = UpcycleOptions("sparse", 4, 1, "top_k", target="ext", parts={"attention": BamAttentionConfig(4)})
    plan = make_plan(dense, options)
    with torch.device("meta"):
        model = plan.result_class(dense)._from_config(plan.result_config(dense))
    assert operations(dense) == 8_912_896 and operations(model) == 35_651_584
    found = moe.describe(model)
    # The paper counts one norm and one router for each block; here attention and experts have their own.
    assert found.active_parameters - 6 * (d + 4 * d) == 662_731_776


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_lora_sees_what_the_projection_sees(kv):
    """An adapter of the output projection is given weighed heads: merged into the weights it computes the same."""
    peft = pytest.importorskip("peft")
    model, ids = mix([llama(seed, attention_bias=True) for seed in range(3)], kv), tokens()
    with torch.no_grad():
        bare = model(ids).logits
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config).eval()
    found = adapted(ids).logits
    assert (found - bare).abs().max() > 0.5
    found.square().mean().backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "o_proj.lora_" in name]
    assert len(gradients) == 4 and all(gradient.norm() > 0 for gradient in gradients)
    with torch.no_grad():
        with adapted.disable_adapter():
            assert torch.equal(adapted(ids).logits, bare)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, found, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_part_of_the_heads_is_refused():
    """As under a tensor-parallel plan, which knows nothing of experts."""
    model = mix([llama(0), llama(1)])
    attention = model.model.layers[0].self_attn
    for name in "qkv":
        projection = getattr(attention, f"{name}_proj")
        projection.weight = torch.nn.Parameter(projection.weight[: len(projection.weight) // 2])
    with pytest.raises(ValueError, match="are 64 wide, and 32 arrived.*without `tp_plan`"):
        model(tokens())
