"""What transformers users do with a model, done with ours: a MoE with another router, a dense host with experts."""

from __future__ import annotations

import copy
import functools
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCAB_SIZE, tiny_config, tiny_inputs, tiny_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaForCausalLM,
    MixtralForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from hf_moe_ext.modeling.configuration_moe_ext import MoeExtension
from hf_moe_ext.modeling.modeling_moe_ext import extended_class, extended_config_class
from hf_moe_ext.modeling.moe_experts import RoutedExperts
from hf_moe_ext.modeling.moe_structure import auxiliary_losses, created_blocks, iter_routers, trace_routing
from hf_moe_ext.modeling.router_top_p import TopPRouterConfig
from hf_moe_ext.patching import extend, restore


# PEFT asks for `is_gradient_checkpointing`, which transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ROUTER = TopPRouterConfig(threshold=0.5, max_slots=3, balance_coef=0.1, entropy_coef=0.05)
HOSTS = ("mixtral", "llama")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def _made(host: str, tie: bool):
    if host == "mixtral":
        return extend(tiny_model("mixtral", tie_word_embeddings=tie), MoeExtension(router=ROUTER))
    config_class = extended_config_class(LlamaForCausalLM.config_class)
    stock = tiny_config("llama", tie_word_embeddings=tie).to_dict()
    del stock["model_type"]
    extension = {"router": ROUTER.to_dict(), "experts": {"num_experts": 6}, "layers": {"0": None}}
    torch.manual_seed(0)
    model = extended_class(LlamaForCausalLM)(config_class(**(stock | {"moe_ext": extension}))).eval()
    for gate in iter_routers(model):
        nn.init.normal_(gate.weight, std=0.35)
    return model


def made(host: str, tie: bool = False):
    return copy.deepcopy(_made(host, tie))


def inputs(**options):
    return tiny_inputs("mixtral", **options)


@torch.no_grad()
def logits(model, **options):
    return model(**inputs(**options)).logits


def test_hosts_are_what_they_should_be():
    assert created_blocks(made("llama")) and not created_blocks(made("mixtral"))
    for host in HOSTS:
        model = made(host)
        assert len(list(iter_routers(model))) == {"mixtral": 3, "llama": 2}[host]
        assert model.config.model_type == f"moe_ext_{host}" and type(model).__name__.startswith("MoeExt")


# --- embeddings ---


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("host", HOSTS)
def test_embeddings(host, tie, tmp_path):
    model = made(host, tie)
    expected = logits(model)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embeddings is model.model.embed_tokens and head is model.lm_head
    assert (head.weight is embeddings.weight) == tie
    model.resize_token_embeddings(VOCAB_SIZE + 5, mean_resizing=False)
    assert model.config.vocab_size == VOCAB_SIZE + 5
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    found = logits(model)
    assert found.shape[-1] == VOCAB_SIZE + 5
    torch.testing.assert_close(found[..., :VOCAB_SIZE], expected, **CLOSE)
    labels = inputs()["input_ids"]
    model.train()(**inputs(), labels=labels).loss.backward()
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie
    assert torch.equal(logits(again), found)


# --- outputs ---


@pytest.mark.parametrize("host", HOSTS)
def test_router_logits(host):
    model = made(host)
    plain = model(**inputs())
    assert getattr(plain, "router_logits", None) is None
    for out in (model(**inputs(), output_router_logits=True), _with_config(model, output_router_logits=True)):
        assert torch.equal(out.logits, plain.logits)
        routers = list(iter_routers(model))
        assert len(out.router_logits) == len(routers)
        for found, router in zip(out.router_logits, routers, strict=True):
            assert found.shape == (14, router.moe_site.num_experts) and found.requires_grad
        assert out.aux_loss is None  # no labels, no loss
        assert out["router_logits"] is out.router_logits


def _with_config(model, **values):
    model = copy.deepcopy(model)
    for name, value in values.items():
        setattr(model.config, name, value)
    return model(**inputs())


@pytest.mark.parametrize("host", HOSTS)
def test_hidden_states_and_attentions(host):
    model = made(host)
    model.set_attn_implementation("eager")
    plain = model(**inputs())
    out = model(**inputs(), output_hidden_states=True, output_attentions=True)
    assert torch.equal(out.logits, plain.logits)
    assert len(out.hidden_states) == 4 and all(h.shape == (2, 7, 32) for h in out.hidden_states)
    assert len(out.attentions) == 3 and all(a.shape == (2, 4, 7, 7) for a in out.attentions)
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    as_tuple = model(**inputs(), return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], plain.logits)


@pytest.mark.parametrize("host", HOSTS)
def test_attention_implementations(host, tmp_path):
    model = made(host)
    model.save_pretrained(tmp_path)
    found = {}
    for name in ("eager", "sdpa"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.config._attn_implementation == name
        found[name] = logits(loaded)
        model.set_attn_implementation(name)
        assert torch.equal(logits(model), found[name])
    real = inputs()["attention_mask"] == 1  # what padding attends to is up to the implementation
    torch.testing.assert_close(found["eager"][real], found["sdpa"][real], **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "moe_ext"])
@pytest.mark.parametrize("host", HOSTS)
def test_experts_implementations(host, implementation, tmp_path):
    model = made(host)
    assert model.config._experts_implementation == "moe_ext"
    expected = logits(model)
    model.set_experts_implementation(implementation)
    experts = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    assert experts and all(e.config._experts_implementation == implementation for e in experts)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "moe_ext"
    chosen = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
    assert chosen.config._experts_implementation == implementation
    torch.testing.assert_close(logits(chosen), expected, **CLOSE)


@pytest.mark.parametrize("host", HOSTS)
def test_unknown_experts_implementation(host):
    with pytest.raises(ValueError, match="nonsense"):
        made(host).set_experts_implementation("nonsense")


# --- loading ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", "auto"], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_dtype(host, dtype, tmp_path):
    made(host).to(torch.bfloat16 if dtype == "auto" else torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wanted = {"bfloat16": torch.bfloat16, "auto": torch.bfloat16}.get(dtype, dtype)
    assert {p.dtype for p in model.parameters()} == {wanted} and model.dtype == wanted
    found = logits(model)
    assert found.dtype == wanted
    # bfloat16 may flip a near tie between experts, so only the bulk has to agree
    assert (found.float() - logits(made(host))).abs().median() < 0.1


@pytest.mark.parametrize("host", HOSTS)
def test_auto_model(host, tmp_path):
    """The base without a head, from a checkpoint with one."""
    model = made(host)
    model.save_pretrained(tmp_path)
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(base).__name__ == f"MoeExt{host.capitalize()}Model" and not info["missing_keys"]
    with torch.no_grad(), trace_routing(base) as contexts:
        hidden = base(**inputs()).last_hidden_state
    assert len(contexts) == 1 and len(contexts[0].records) == len(list(iter_routers(model)))
    torch.testing.assert_close(model.lm_head(hidden), logits(model), **CLOSE)


@pytest.mark.parametrize("host", HOSTS)
def test_shards(host, tmp_path):
    model = made(host)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("place", ["auto", "one", "cpu_and_disk"])
@pytest.mark.parametrize("host", HOSTS)
def test_device_maps(host, place, tmp_path):
    model = made(host)
    model.save_pretrained(tmp_path / "model")
    maps = {
        "auto": "auto",
        "one": {"": "cpu"},
        "cpu_and_disk": {
            "model.embed_tokens": "cpu",
            "model.rotary_emb": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.layers.2": "disk",
            "model.norm": "cpu",
            "lm_head": "cpu",
        },
    }
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=maps[place], offload_folder=tmp_path / "offload"
    )
    if place == "cpu_and_disk":
        assert placed.model.layers[2].mlp.experts.down_proj.device.type == "meta"
    with trace_routing(placed) as contexts:
        assert torch.equal(logits(placed), logits(model))
    assert len(contexts[0].records) == len(list(iter_routers(model)))
    ids = inputs(batch=1)["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(placed.generate(ids, **options), model.generate(ids, **options))


def test_dispatched_model_is_refused(tmp_path):
    """Hooks of accelerate stand where our classes would."""
    stock = tiny_model("mixtral")
    stock.save_pretrained(tmp_path / "model")
    device_map = {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(3)}
    device_map |= {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ValueError, match="hooks of accelerate. Extend the model before"):
        extend(placed, MoeExtension(router=ROUTER))


# --- generation ---


@pytest.mark.parametrize("host", HOSTS)
def test_static_cache(host):
    model = made(host)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs(), **options)
    found = model.generate(**inputs(), **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("host", HOSTS)
def test_sampling_beams_and_prefill(host):
    model = made(host)
    options = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    assert model.generate(**inputs(), **options, num_beams=3).shape == (2, 11)
    torch.manual_seed(0)
    first = model.generate(**inputs(), **options, do_sample=True)
    torch.manual_seed(0)
    config = GenerationConfig(**options, do_sample=True)
    assert torch.equal(model.generate(**inputs(), generation_config=config), first)


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCAB_SIZE))]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


@pytest.mark.parametrize("host", HOSTS)
def test_text_generation_pipeline(host, tmp_path):
    model = made(host)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    options = {
        "generation_config": GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0),
        "return_full_text": False,
    }
    texts = ["w5 w9 w10 w40", "w7"]
    loaded = pipeline("text-generation", model=str(tmp_path))
    assert type(loaded.model) is type(model)
    given = pipeline("text-generation", model=model, tokenizer=tokenizer())
    found = [[out[0]["generated_text"] for out in pipe(texts, **options)] for pipe in (loaded, given)]
    assert found[0] == found[1] and all(text.strip() for text in found[0])
    batched = [out[0]["generated_text"] for out in loaded(texts, **options, batch_size=2)]
    assert batched == found[0]


# --- compiling ---


@pytest.mark.parametrize(
    ("host", "training"), [("mixtral", True), ("llama", False)], ids=["mixtral-train", "llama-eval"]
)
def test_compile_in_one_graph(host, training):
    """No graph break in the whole model, in value and gradient, with the auxiliary losses."""
    model = made(host).train(training)
    batch = {**inputs(), "labels": inputs()["input_ids"]}
    expected = model(**batch)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        model.zero_grad()
        out = compiled(**batch)
        torch.testing.assert_close(out.loss, expected.loss, **CLOSE)
        torch.testing.assert_close(out.logits, expected.logits, **CLOSE)
        out.loss.backward()
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    # neither use disturbs the other
    torch.testing.assert_close(model(**batch).loss, expected.loss)
    torch.testing.assert_close(compiled(**batch).loss, expected.loss, **CLOSE)


def test_compile_with_graph_breaks_keeps_the_auxiliary_losses():
    """Parts of the forward run outside the graph; their records must count all the same."""
    model = extend(tiny_model("mixtral", num_hidden_layers=1), MoeExtension(router=ROUTER)).train()
    batch = {**inputs(), "labels": inputs()["input_ids"]}
    expected = model(**batch).loss
    assert expected > model.eval()(**batch).loss + 0.01
    model.train()

    class Breaking(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            torch._dynamo.graph_break()
            return self.inner(hidden)

    layer = model.model.layers[0]
    layer.post_attention_layernorm = Breaking(layer.post_attention_layernorm)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(**batch).loss, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler for inductor")
def test_compile_with_inductor():
    model = extend(tiny_model("mixtral", num_hidden_layers=1), MoeExtension(router=ROUTER))
    expected = logits(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, **CLOSE)


# --- training ---


def test_gradient_checkpointing_default_is_exact():
    """What `Trainer` switches on by default."""
    model = made("mixtral").train()
    batch = {**inputs(), "labels": inputs()["input_ids"]}
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model(**batch).loss.backward()
    for name, gradient in expected.items():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("host", HOSTS)
def test_lora_on_attention(host, tmp_path):
    """Train an adapter, save it, load it on a fresh copy, merge it."""
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(made(host), config)
    batch = {**inputs(), "labels": inputs()["input_ids"]}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.eval()
    without_aux = model(**batch).loss
    model.train()
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > without_aux + 0.01 and losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    model.eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(made(host), tmp_path)), expected)
    merged = model.merge_and_unload()
    assert type(merged) is type(made(host))
    torch.testing.assert_close(logits(merged), expected, **CLOSE)


@pytest.mark.parametrize("host", HOSTS)
def test_peft_modules_to_save_with_a_router(host, tmp_path):
    """PEFT copies the gate; the copy is trained, decides, and is seen by the losses."""
    config = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["gate"], task_type="CAUSAL_LM")
    model = get_peft_model(made(host), config)
    batch = {**inputs(), "labels": inputs()["input_ids"]}
    model.train()(**batch).loss.backward()
    gates = {n: p for n, p in model.named_parameters() if ".gate." in n and "modules_to_save" in n}
    assert len(gates) == len(list(iter_routers(made(host)))) and all(p.grad.abs().sum() > 0 for p in gates.values())
    with torch.no_grad():
        for parameter in gates.values():
            parameter.neg_()
    model.eval()
    with trace_routing(model) as contexts:
        found = logits(model)
    assert len(contexts[0].records) == len(gates)
    assert (found - logits(made(host))).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(made(host), tmp_path)), found)


def test_adapter_is_kept_by_extend_and_restore(adapters_of_transformers):
    """`model.add_adapter` before the extension."""
    model = tiny_model("mixtral")
    model.add_adapter(LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    expected = logits(model)
    extend(model, MoeExtension(router=ROUTER))
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(restore(model)), expected)


# --- heads ---


def classification_config(host):
    config = copy.deepcopy(made(host).config)
    config.num_labels = 3
    return config


@pytest.mark.parametrize("host", HOSTS)
def test_sequence_classification(host, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(classification_config(host))
    assert type(model).__name__ == f"MoeExt{host.capitalize()}ForSequenceClassification"
    routers = len(list(iter_routers(model)))
    assert routers == len(list(iter_routers(made(host))))
    batch = {**inputs(), "labels": torch.tensor([0, 2])}

    def aux(contexts):
        assert sum(len(context.records) for context in contexts) == routers
        return auxiliary_losses(contexts)[0]

    with torch.no_grad(), trace_routing(model) as contexts:
        evaluated = model.eval()(**batch)
        trained = model.train()(**batch)
    plain = nn.functional.cross_entropy(evaluated.logits, batch["labels"])
    torch.testing.assert_close(evaluated.loss, plain)
    torch.testing.assert_close(trained.loss - evaluated.loss, aux(contexts[1:]))
    model(**batch).loss.backward()
    assert all(gate.weight.grad.abs().sum() > 0 for gate in iter_routers(model))
    model.eval().save_pretrained(tmp_path)
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and AutoConfig.from_pretrained(tmp_path).num_labels == 3
    assert torch.equal(logits(again), logits(model))


def test_sequence_classification_from_a_causal_checkpoint(tmp_path):
    """The head is new, everything else is loaded."""
    model = made("mixtral")
    model.save_pretrained(tmp_path)
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert all(torch.equal(p, model.model.get_parameter(n)) for n, p in again.model.named_parameters())


def test_live_sequence_classification_model(tmp_path):
    config = tiny_config("mixtral", num_labels=3)
    model = extend(MixtralForSequenceClassification(config).eval(), MoeExtension(router=ROUTER))
    batch = {**inputs(), "labels": torch.tensor([0, 2])}
    with torch.no_grad():
        evaluated = model(**batch)
        assert model.train()(**batch).loss > evaluated.loss + 0.01
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again), evaluated.logits)
