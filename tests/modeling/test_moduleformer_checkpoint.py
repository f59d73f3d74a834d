"""Checkpoints in the layout of ModuleFormer's authors, against a plain implementation that reads them itself."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from hf_moe_ext.modeling.modeling_moduleformer import ModuleFormerForCausalLM
from hf_moe_ext.moduleformer_checkpoint import (
    convert_moduleformer_checkpoint,
    from_reference_state,
    moduleformer_config,
    to_reference_state,
)


AUTHORS = {
    "model_type": "moduleformer",
    "vocab_size": 40,
    "block_size": 16,
    "history_length": 16,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "att_hidden": 12,
    "ffd_hidden": 20,
    "activation_function": "gelu_new",
    "n_att_experts": 4,
    "k_att": 2,
    "n_mlp_experts": 5,
    "k_mlp": 3,
    "gating_size": 7,
    "sample_topk": 0,
    "aux_loss_type": "mi",
    "aux_loss_weight": 0.01,
    "gate_type": "mlp",
    "layer_norm_epsilon": 1e-3,  # their norms take no notice of it
    "torch_dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": None,
}


def authors_state(data, seed=0):
    """Random tensors by the names and in the shapes of the authors' code."""
    generator = torch.Generator().manual_seed(seed)
    width, att, ffd, inner = data["n_embd"], data["att_hidden"], data["ffd_hidden"], data["gating_size"]

    def normal(*shape):
        return 0.4 * torch.randn(*shape, generator=generator)

    state = {"transformer.wte.weight": normal(data["vocab_size"], width)}
    for number in range(data["n_layer"]):
        at = f"transformer.h.{number}"
        for norm in ("ln_1", "ln_2"):
            state |= {f"{at}.{norm}.weight": 1 + normal(width), f"{at}.{norm}.bias": normal(width)}
        for name in ("k_proj", "v_proj"):
            state |= {f"{at}.attn.{name}.weight": normal(att, width), f"{at}.attn.{name}.bias": normal(att)}
        context = data["block_size"] + data["history_length"]
        state[f"{at}.attn.mask"] = torch.ones(context, context, dtype=torch.int8).tril()
        state[f"{at}.attn.cum_weight"] = torch.ones(context, context).tril(-1)
        for place, count, size in (("attn.q_proj", data["n_att_experts"], att), ("mlpf", data["n_mlp_experts"], ffd)):
            state[f"{at}.{place}.experts.weight"] = normal(count, width, size)
            state[f"{at}.{place}.output_experts.weight"] = normal(count, size, width)
            gate = f"{at}.{place}.gate"
            if data["gate_type"] == "mlp":
                state |= {f"{gate}.w_gate.0.weight": normal(inner, width), f"{gate}.w_gate.0.bias": normal(inner)}
                state[f"{gate}.w_gate.3.weight"] = normal(count, inner)
            elif data["gate_type"] == "linear":
                state[f"{gate}.w_gate.0.weight"] = normal(count, width)
            else:
                state |= {f"{gate}.w_gate.weight": normal(inner, width), f"{gate}.temperature": normal(1)}
                state[f"{gate}.expert_centroids"] = normal(count, inner)
    state |= {"transformer.ln_f.weight": 1 + normal(width), "transformer.ln_f.bias": normal(width)}
    if not data.get("tie_word_embeddings"):
        state["lm_head.weight"] = normal(data["vocab_size"], width)
    return state


def plain_forward(state, data, ids):
    """One sequence, from the equations, in float64: all experts are computed, unchosen ones get the weight 0."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def gates(x, name, k):
        if data["gate_type"] == "mlp":
            inner = F.gelu(x @ state[f"{name}.w_gate.0.weight"].T + state[f"{name}.w_gate.0.bias"])
            logits = inner @ state[f"{name}.w_gate.3.weight"].T
        elif data["gate_type"] == "linear":
            logits = x @ state[f"{name}.w_gate.0.weight"].T
        else:
            inner = x @ state[f"{name}.w_gate.weight"].T
            cosines = F.cosine_similarity(inner[:, None], state[f"{name}.expert_centroids"][None], dim=-1)
            logits = cosines * state[f"{name}.temperature"].exp()
        p = logits.softmax(-1)
        return p * (p >= p.topk(k).values[:, -1:])  # (T, E)

    x = state["transformer.wte.weight"][ids]
    length, heads = len(ids), data["n_head"]
    size = data["att_hidden"] // heads
    for number in range(data["n_layer"]):
        at = f"transformer.h.{number}"
        h = norm(x, f"{at}.ln_1")
        key, value = (
            (h @ state[f"{at}.attn.{n}.weight"].T + state[f"{at}.attn.{n}.bias"]).view(length, heads, size)
            for n in ("k_proj", "v_proj")
        )
        weights = gates(h, f"{at}.attn.q_proj.gate", data["k_att"])
        for expert in range(data["n_att_experts"]):
            query = (h @ state[f"{at}.attn.q_proj.experts.weight"][expert]).view(length, heads, size)
            logits = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(size)
            shares = torch.zeros_like(logits)
            for i in range(length):
                left = torch.ones(heads, dtype=torch.float64)
                for j in range(i, -1, -1):
                    shares[:, i, j] = left * logits[:, i, j].sigmoid()
                    left = left * (1 - logits[:, i, j].sigmoid())
            out = torch.einsum("hij,jhd->ihd", shares, value).reshape(length, -1)
            x = x + weights[:, expert, None] * (out @ state[f"{at}.attn.q_proj.output_experts.weight"][expert])
        h = norm(x, f"{at}.ln_2")
        weights = gates(h, f"{at}.mlpf.gate", data["k_mlp"])
        for expert in range(data["n_mlp_experts"]):
            inner = ACT2FN[data["activation_function"]](h @ state[f"{at}.mlpf.experts.weight"][expert])
            x = x + weights[:, expert, None] * (inner @ state[f"{at}.mlpf.output_experts.weight"][expert])
    head = state["transformer.wte.weight" if data.get("tie_word_embeddings") else "lm_head.weight"]
    return norm(x, "transformer.ln_f") @ head.T


def write(folder, data, state, form="bin"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data))
    if form == "bin":  # in two parts, as the release
        names = sorted(state)
        for part, chosen in enumerate((names[::2], names[1::2]), 1):
            tensors = {name: state[name] for name in chosen}
            torch.save(tensors, folder / f"pytorch_model-{part:05d}-of-00002.bin")
    else:
        save_file(state, folder / "model.safetensors")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("gate", ["mlp", "linear", "gmm"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_read_written_and_equal(gate, tied, form, tmp_path):
    data = {**AUTHORS, "gate_type": gate, "tie_word_embeddings": tied}
    state = authors_state(data)
    model = convert_moduleformer_checkpoint(write(tmp_path / "authors", data, state, form))
    ids = torch.randint(0, 40, (9,), generator=torch.Generator().manual_seed(1))
    expected = plain_forward(state, data, ids)
    torch.testing.assert_close(model(ids[None]).logits[0].double(), expected, rtol=1e-4, atol=1e-5)
    again = to_reference_state(model)
    kept = {name for name in state if not name.endswith((".mask", ".cum_weight"))}
    assert kept == again.keys() - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(again[name], state[name]) for name in kept)
    model.save_pretrained(tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded(ids[None]).logits, model(ids[None]).logits)


def test_config():
    config = moduleformer_config(AUTHORS)
    assert (config.hidden_size, config.attention_hidden_size, config.num_attention_heads) == (24, 12, 3)
    assert (config.moa_num_experts, config.moa_top_k, config.mlp_num_experts, config.mlp_top_k) == (4, 2, 5, 3)
    assert (config.layer_norm_eps, config.max_position_embeddings, config.router_hidden_size) == (1e-5, 32, 7)
    # A sum over two layers there, a mean over them here.
    assert (config.router_aux, config.router_aux_loss_coef) == ("information", 0.02)
    assert moduleformer_config({**AUTHORS, "gate_type": "gmm", "aux_loss_type": "switch"}).router_aux == "switch_z"


def test_the_loss_is_the_authors():
    """The sum of minus the mutual information over all routers, times their weight."""
    config = moduleformer_config(AUTHORS)
    state = authors_state(AUTHORS)
    model = ModuleFormerForCausalLM(config)
    model.load_state_dict(from_reference_state(state, config))
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = model.eval()(ids, labels=ids).loss
    out = model.train()(ids, labels=ids, output_router_logits=True)
    expected = 0.0
    for logits in (*out.attn_router_logits, *out.router_logits):
        p = logits.double().softmax(-1)
        mean = p.mean(0)
        expected = expected - ((p * p.log()).sum(-1).mean() - (mean * mean.log()).sum())
    torch.testing.assert_close(out.loss.double(), plain.double() + 0.01 * expected, rtol=1e-5, atol=1e-6)


def test_dtype(tmp_path):
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in authors_state(AUTHORS).items()}
    folder = write(tmp_path / "authors", AUTHORS, state)
    assert convert_moduleformer_checkpoint(folder).dtype == torch.bfloat16
    model = convert_moduleformer_checkpoint(folder, dtype=torch.float32)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_names_of_the_release_are_no_config_of_ours(tmp_path):
    """Otherwise the sizes would be taken for unknown keys, and be the defaults."""
    write(tmp_path / "authors", AUTHORS, authors_state(AUTHORS))
    with pytest.raises(ValueError, match="convert_moduleformer_checkpoint"):
        AutoConfig.from_pretrained(tmp_path / "authors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": None}, "says nothing of `n_layer`"),
        ({"gate_type": "topk"}, "`gate_type` must be one of mlp, linear, gmm, got 'topk'"),
        ({"aux_loss_type": "sparse"}, "`aux_loss_type` must be one of mi, switch, got 'sparse'"),
        ({"n_head": 1, "att_hidden": 24}, "no projections of keys and values"),
    ],
)
def test_bad_configs(change, message):
    data = {name: value for name, value in (AUTHORS | change).items() if not (name in change and value is None)}
    with pytest.raises(ValueError, match=message):
        moduleformer_config(data)


def test_bad_weights(tmp_path):
    state = authors_state(AUTHORS)
    with pytest.raises(FileNotFoundError, match="no folder with a `config.json`"):
        convert_moduleformer_checkpoint(tmp_path / "nothing")
    folder = write(tmp_path / "authors", AUTHORS, {})
    for path in folder.glob("*.bin"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="neither `model"):
        convert_moduleformer_checkpoint(folder)
    lost = {name: tensor for name, tensor in state.items() if "h.1.mlpf.experts" not in name}
    with pytest.raises(ValueError, match="`model.layers.1.mlp.experts.up_proj` is missing"):
        convert_moduleformer_checkpoint(write(tmp_path / "lost", AUTHORS, lost))
    with pytest.raises(ValueError, match=r"query_proj` has the shape \[4, 12, 24\], the config says \[6, 12, 24\]"):
        convert_moduleformer_checkpoint(write(tmp_path / "other", {**AUTHORS, "n_att_experts": 6}, state))
    with pytest.raises(ValueError, match=r"w_gate.0.bias` belongs to no language model with this config \(linear"):
        convert_moduleformer_checkpoint(write(tmp_path / "kind", {**AUTHORS, "gate_type": "linear"}, state))
    model = ModuleFormerForCausalLM(moduleformer_config(AUTHORS))
    model.config.moe_ext = {"router": {"type": "top_p"}}
    with pytest.raises(ValueError, match="`moe_ext` of this model"):
        to_reference_state(model)
