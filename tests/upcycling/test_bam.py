"""BTX and BAM from several sources: tensors, means, checkpoints on disk, and what cannot be mixed."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralForCausalLM, OPTConfig, OPTForCausalLM
from transformers.models.cohere import CohereConfig, CohereForCausalLM

import hf_moe_ext as moe

from ..modeling.test_attention_bam import llama, tokens


SOURCES = 3


def sources(**overrides):
    return [llama(seed, **overrides) for seed in range(SOURCES)]


def saved(models, folder):
    paths = []
    for number, model in enumerate(models):
        paths.append(folder / f"source-{number}")
        model.save_pretrained(paths[-1])
    return paths


# --- tensors ---


@torch.no_grad()
@pytest.mark.parametrize("method", ["btx", "bam"])
def test_experts_are_the_sources_and_the_rest_their_mean(method):
    models = sources()
    model = moe.upcycle(models, method=method, target="ext") if method == "btx" else moe.upcycle(models, method=method)
    for number, layer in enumerate(model.model.layers):
        for j, source in enumerate(models):
            dense = source.model.layers[number].mlp
            expected = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])
            assert torch.equal(layer.mlp.experts.gate_up_proj[j], expected)
            assert torch.equal(layer.mlp.experts.down_proj[j], dense.down_proj.weight)
    means = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
    ]
    if method == "btx":
        means += [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"]
    for name in means:
        expected = torch.stack([m.get_parameter(name).double() for m in models]).mean(0).float()
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=2e-7, atol=0)
    for a in (p for m in models for p in m.parameters()):  # nothing is shared with the sources
        assert all(a.data_ptr() != p.data_ptr() for p in model.parameters())


@torch.no_grad()
def test_weighted_mean_and_equal_tensors():
    models = sources()
    model = moe.upcycle(models, method="btx", weights=[2, 1, 1])
    name = "model.embed_tokens.weight"
    parts = [m.get_parameter(name).double() for m in models]
    expected = (0.5 * parts[0] + 0.25 * parts[1] + 0.25 * parts[2]).float()
    torch.testing.assert_close(model.get_parameter(name), expected, rtol=2e-7, atol=0)
    twins = [models[0], copy.deepcopy(models[0]), copy.deepcopy(models[0])]
    same = moe.upcycle(twins, method="btx")
    assert torch.equal(same.get_parameter(name), models[0].get_parameter(name))  # to the bit


@torch.no_grad()
def test_identical_sources_under_btx_are_the_dense_model():
    dense, ids = llama(), tokens()
    model = moe.upcycle([dense, dense], method="btx")
    assert type(model) is MixtralForCausalLM and model.config.num_experts_per_tok == 2
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_defaults_of_the_papers(tmp_path):
    bam = moe.upcycle(sources(), method="bam", domains=["seed", "code", "law"])
    router = bam.model.layers[0].mlp.gate.moe_config
    assert (router.renormalize, router.balance_coef, router.z_coef) == (False, 1e-2, 1e-3)
    assert bam.model.layers[0].mlp.gate.top_k == 1
    assert bam.model.layers[0].self_attn.moe_gate.moe_config.num_experts_per_tok == SOURCES
    report = bam.upcycle_report
    assert (
        report.method == "bam" and report.sources == ["seed", "code", "law"] and "one after the other" in report.note
    )
    card = (moe.export(bam, tmp_path / "model", verify=False) / "README.md").read_text()
    assert "code" in card and "one after the other" in card and "2408.08274" in card
    config = CohereConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    parallel = moe.upcycle([CohereForCausalLM(config), CohereForCausalLM(config)], method="bam")
    assert parallel.upcycle_report.note == ""


@torch.no_grad()
def test_soft_weights_are_those_of_the_whole_softmax():
    """Top-1 of the feed-forward experts with its probability, not renormalised."""
    model, ids = moe.upcycle(sources(), method="bam"), tokens()
    from hf_moe_ext.modeling.moe_structure import trace_routing

    with trace_routing(model) as contexts:
        model(ids)
    record = contexts[0].records["0"]
    torch.testing.assert_close(record.weights, record.scores.max(-1, keepdim=True).values)
    assert record.weights.max() < 0.9


def test_gates_of_domains():
    """A row of each gate for each source, from texts of its domain."""

    class Words:
        pad_token_id, padding_side, pad_token = 0, "left", "x"

        def __call__(self, texts, **options):
            rows = [[1 + ord(c) % 60 for c in text] for text in ([texts] if isinstance(texts, str) else texts)]
            return {"input_ids": rows[0]} if isinstance(texts, str) else {"input_ids": torch.tensor(rows)}

    prompts = [["abcd"], ["mnop"], ["wxyz"]]
    model = moe.upcycle(sources(), method="btx", gate_init="cheap_embed", gate_prompts=prompts, tokenizer=Words())
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    torch.testing.assert_close(gates[0], gates[1])
    torch.testing.assert_close(gates[0].norm(dim=1), torch.ones(SOURCES))


# --- checkpoints ---


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("btx", {}),
        ("btx", {"target": "ext", "router": {"type": "top_p", "renormalize": True}}),
        ("bam", {"attention_kv": "shared"}),
        ("bam", {"parts": {"shared_experts": {}}, "layers": "every:2:1"}),
        ("bam", {"attention_router": {"type": "xmoe"}}),
    ],
    ids=["btx_stock", "btx_ext", "bam_shared", "bam_parts", "bam_router"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_folders_give_the_tensors_of_models(method, options, tied, tmp_path):
    models, ids = sources(tie_word_embeddings=tied), tokens()
    paths = saved(models, tmp_path)
    live = moe.upcycle(models, method=method, seed=3, **options).eval()
    report = moe.upcycle_checkpoint(paths, tmp_path / "mixed", method=method, seed=3, **options)
    assert report.sources == [str(path) for path in paths]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed").eval()
    assert type(loaded) is type(live)
    for name, tensor in live.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(ids).logits, live(ids).logits)
    live.save_pretrained(tmp_path / "live")
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("mixed", "live"))
    assert mine.keys() == theirs.keys()


def test_shards_dtype_and_what_is_left_behind(tmp_path):
    models = sources()
    paths = saved(models, tmp_path)
    moe.upcycle_checkpoint(paths, tmp_path / "small", method="bam", dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert loaded.dtype == torch.bfloat16 and loaded(tokens()).logits.isfinite().all()
    # A checkpoint that is cut off: refused before anything is written.
    file = paths[2] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged or cut off"):
        moe.upcycle_checkpoint(paths, tmp_path / "none", method="bam")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="one of the sources"):
        moe.upcycle_checkpoint(
            saved(models, tmp_path / "again"), tmp_path / "again" / "source-1", method="btx", overwrite=True
        )


def test_folders_as_live_sources(tmp_path):
    models = sources()
    paths = saved(models, tmp_path)
    live, read = moe.upcycle(models, method="bam"), moe.upcycle([models[0], *paths[1:]], method="bam")
    for name, tensor in live.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


# --- what cannot be mixed ---


def test_bad_sources():
    first = llama()
    for other, text in (
        (llama(vocab_size=70), "`vocab_size` is 70 in source 1 and 64 in source 0.*Resize"),
        (llama(intermediate_size=40), "`intermediate_size` is 40"),
        (llama(rope_parameters={"rope_type": "default", "rope_theta": 5.0}), "`rope_parameters` is"),
        (llama(rms_norm_eps=1e-3), "`rms_norm_eps` is 0.001"),
        (
            CohereForCausalLM(
                CohereConfig(
                    vocab_size=64,
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    pad_token_id=0,
                )
            ),
            "source 1 is a cohere model",
        ),
    ):
        for method in ("btx", "bam"):
            with pytest.raises(ValueError, match=text):
                moe.upcycle([first, other], method=method)


@pytest.mark.parametrize("method", ["btx", "bam"])
def test_tensors_of_another_shape(method, tmp_path):
    """Learned positions: `max_position_embeddings` may differ where it is a limit, and not where it is a size."""
    models = [
        OPTForCausalLM(
            OPTConfig(
                vocab_size=64,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=length,
                pad_token_id=0,
            )
        )
        for length in (16, 20)
    ]
    text = r"embed_positions.weight` has the shape \(22, 32\) in .* and \(18, 32\)"
    with pytest.raises(ValueError, match=text):
        moe.upcycle(models, method=method)
    with pytest.raises(ValueError, match=text):
        moe.upcycle_checkpoint(saved(models, tmp_path), tmp_path / "mixed", method=method)
    assert not (tmp_path / "mixed").exists()
    moe.upcycle([llama(max_position_embeddings=16), llama(max_position_embeddings=20)], method=method)


def test_bad_arguments(tmp_path):
    models = sources()
    for arguments, error, text in (
        (([models[0]], "bam"), ValueError, "at least two models, got 1"),
        ((models[0], "bam"), TypeError, "expected a list of models"),
        (([models[0], 3], "btx"), TypeError, "source 1 is a int"),
        ((models, "sparse"), ValueError, 'several models are mixed by `method="bam"`'),
    ):
        with pytest.raises(error, match=text):
            moe.upcycle(*arguments)
    for options, error, text in (
        ({"weights": [1, 2]}, ValueError, "`weights` has 2 entries for 3 models"),
        ({"weights": [0, 0, 0]}, ValueError, "positive sum"),
        ({"domains": ["a"]}, ValueError, "`domains` has 1 names for 3 models"),
        ({"num_experts": 4}, TypeError, "`bam` does not take `num_experts`"),
        ({"num_experts_per_tok": 4}, ValueError, "must not exceed"),
        ({"attention_kv": "own"}, TypeError, "`key_values` of BamAttentionConfig must be"),
        ({"parts": {"attention": {"type": "bam"}}}, ValueError, "drop it"),
        ({"gate_noise": -1.0}, ValueError, "non-negative"),
        ({"drop_ratio": 0.5}, TypeError, "`bam` does not take `drop_ratio`"),
    ):
        with pytest.raises(error, match=text):
            moe.upcycle(models, method="bam", **options)
    with pytest.raises(TypeError, match="BTX averages attention"):
        moe.upcycle_checkpoint(saved(models, tmp_path), tmp_path / "x", method="btx", attention_kv="shared")
    with pytest.raises(ValueError, match="not by `sparse`"):
        moe.upcycle_checkpoint([tmp_path / "source-0", tmp_path / "source-1"], tmp_path / "x", method="sparse")
    with pytest.raises(ValueError, match="a stock class has"):
        moe.upcycle_checkpoint([tmp_path / "source-0", tmp_path / "source-1"], tmp_path / "x", "bam", target="stock")
    assert not (tmp_path / "x").exists()
    assert type(models[0]) is LlamaForCausalLM


def test_trains(tmp_path):
    from ..trainers.common import logged, rows, train

    model = moe.upcycle(sources(), method="bam")
    trainer = train(model, rows([7, 6, 5, 7] * 4), tmp_path, max_steps=24, learning_rate=3e-3)
    losses = logged(trainer, "loss")
    assert sum(losses[-8:]) < sum(losses[:8])
    assert logged(trainer, "moe/loss_balance") and logged(trainer, "moe/loss_z")
    assert not logged(trainer, "moe/loss_attention_balance")  # soft routing needs none
