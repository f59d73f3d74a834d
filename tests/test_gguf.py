"""`from_gguf` on a tiny llama written with the `gguf` package."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_moe_ext import _imports
from hf_moe_ext import gguf as gguf_module
from hf_moe_ext.gguf import from_gguf


gguf = pytest.importorskip("gguf")


def _tokens() -> tuple[list[str], list[str]]:
    """Bytes, and two merges so that the tokenizer counts as byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab", "bc"], ["a b", "b c"]


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as llama.cpp orders them: rotary pairs side by side."""
    out, features = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, features).transpose(1, 2).reshape(out, features)


def _write(path: Path, model: LlamaForCausalLM, architecture: str = "llama") -> None:
    config = model.config
    tokens, merges = _tokens()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = {
        "token_embd": model.model.embed_tokens.weight,
        "output_norm": model.model.norm.weight,
        "output": model.lm_head.weight,
    }
    for number, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight
            if theirs == "attn_q":
                weight = _interleaved(weight, config.num_attention_heads)
            if theirs == "attn_k":
                weight = _interleaved(weight, config.num_key_value_heads)
            weights[f"blk.{number}.{theirs}"] = weight
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(_tokens()[0]),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    return _tiny_llama(0)


@pytest.fixture(scope="module")
def tiny(original, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    _write(path, original)
    return path


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(3, 15).reshape(2, 6)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("HF_MOE_EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@torch.no_grad()
def _logits(model, ids):
    return model(input_ids=ids).logits


def test_is_the_plain_model_that_was_written(tiny, original, ids):
    model, tokenizer = from_gguf(tiny)
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(_logits(model, ids), _logits(original, ids), rtol=1e-5, atol=1e-5)
    assert tokenizer.decode(tokenizer("abba cab", add_special_tokens=False)["input_ids"]) == "abba cab"


def test_saves_and_reloads_equal(tiny, ids, tmp_path):
    model, tokenizer = from_gguf(tiny, cache_dir=False)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(_logits(again, ids), _logits(model, ids))
    text = "ab \n abc"
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("cache_dir", [None, False], ids=["cached", "uncached"])
def test_every_parameter_trains(tiny, ids, cache_dir):
    model, _ = from_gguf(tiny, cache_dir=cache_dir)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []


def test_trainer_accepts_it(tiny, ids, tmp_path):
    from transformers import Trainer, TrainingArguments

    model, _ = from_gguf(tiny)
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(tmp_path / "run", max_steps=1, report_to=[], save_strategy="no", use_cpu=True)
    assert Trainer(model, args, train_dataset=data).train().global_step == 1


def test_second_load_comes_from_the_cache(tiny, ids, own_cache, monkeypatch):
    first, tokenizer = from_gguf(tiny)
    monkeypatch.setattr(gguf_module, "_convert", lambda *_: pytest.fail("converted again"))
    second, same_tokenizer = from_gguf(str(tiny))
    assert torch.equal(_logits(second, ids), _logits(first, ids))
    assert second.config.to_dict() == first.config.to_dict()
    assert second.name_or_path == first.name_or_path == tokenizer.name_or_path == str(tiny)
    assert same_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert [path.name for path in own_cache.iterdir()] == ["gguf"]


def test_needs_no_gguf_package_when_cached(tiny, ids, monkeypatch):
    from_gguf(tiny)
    monkeypatch.setattr(_imports, "_installed_version", lambda name: None)
    from_gguf(tiny)
    with pytest.raises(ImportError, match=r'pip install "hf-moe-ext\[gguf\]"'):
        from_gguf(tiny, cache_dir=False)


@pytest.mark.parametrize("cache_dir", [None, False], ids=["cached", "uncached"])
def test_dtype(tiny, original, ids, cache_dir):
    model, _ = from_gguf(tiny, dtype=torch.bfloat16, cache_dir=cache_dir)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = {name: weight.bfloat16() for name, weight in original.state_dict().items()}
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_another_file_of_the_same_name_is_not_mixed_up(tiny, ids, tmp_path, monkeypatch):
    """transformers looks for a relative `gguf_file` in the current folder before it looks beside the model."""
    other = _tiny_llama(1)
    _write(tmp_path / tiny.name, other)
    monkeypatch.chdir(tmp_path)
    here, there = from_gguf(tiny.name)[0], from_gguf(tiny)[0]
    torch.testing.assert_close(_logits(here, ids), _logits(other, ids), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(_logits(here, ids), _logits(there, ids), atol=1e-2)


def test_a_damaged_cache_is_made_again(tiny, ids, own_cache):
    expected = _logits(from_gguf(tiny)[0], ids)
    (weights,) = own_cache.rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert torch.equal(_logits(from_gguf(tiny)[0], ids), expected)
    shutil.rmtree(own_cache / "gguf")
    assert torch.equal(_logits(from_gguf(tiny)[0], ids), expected)


def test_a_full_disk_costs_only_the_cache(tiny, ids, own_cache, monkeypatch):
    def full(self, folder, *args, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    model, _ = from_gguf(tiny)
    assert torch.isfinite(_logits(model, ids)).all()
    assert [path for path in own_cache.rglob("*") if path.is_file()] == []


def test_interrupted_conversion_leaves_nothing(tiny, own_cache, monkeypatch):
    def interrupted(self, folder, *args, **kwargs):
        (Path(folder) / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        from_gguf(tiny)
    assert [path for path in own_cache.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("absent.gguf", None, FileNotFoundError, "there is no GGUF file at"),
        ("empty.gguf", b"", ValueError, "is not a GGUF file: it starts with b''"),
        ("page.gguf", b"<!DOCTYPE html>", ValueError, "is not a GGUF file: it starts with b'<!DO'"),
        ("cut.gguf", b"GGUF\x03\x00\x00", ValueError, "is a damaged GGUF file"),
        ("m-00001-of-00003.gguf", b"GGUF", ValueError, "one of 3 parts of a model.*llama-gguf-split"),
    ],
    ids=["absent", "empty", "html", "cut", "split"],
)
def test_bad_files_are_explained(tmp_path, own_cache, name, content, error, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        from_gguf(path)
    assert str(path) in str(raised.value)
    assert not own_cache.exists()


def test_a_folder_is_explained(tiny):
    with pytest.raises(FileNotFoundError, match=r"is a folder; pass .*tiny\.gguf"):
        from_gguf(tiny.parent)


def test_a_truncated_file_is_explained(tiny, tmp_path, own_cache):
    path = tmp_path / "short.gguf"
    path.write_bytes(tiny.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="is a damaged GGUF file"):
        from_gguf(path)
    assert not own_cache.exists()


def test_an_unsupported_architecture_is_explained(original, tmp_path, own_cache):
    path = tmp_path / "clip.gguf"
    _write(path, original, architecture="clip")
    with pytest.raises(ValueError, match=r"architecture 'clip', which transformers .* Expected one of: .*llama"):
        from_gguf(path)
    assert not own_cache.exists()


@pytest.mark.parametrize("dtype", ["float32", torch.int8], ids=["text", "integer"])
def test_a_wrong_dtype_is_explained(tiny, dtype):
    with pytest.raises(ValueError, match="`dtype` must be a floating-point"):
        from_gguf(tiny, dtype=dtype)
