"""Adapters on routed experts: against PEFT's `target_parameters` and folded weights; layouts of their files."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_moe_ext.kernels import lora_dispatch
from hf_moe_ext.lora.expert_layouts import (
    ExpertPair,
    export_expert_lora,
    find_layout,
    load_expert_lora,
    pack_experts,
    unpack_experts,
)
from hf_moe_ext.lora.mixtures import disable_adapter, experts_lora_of
from hf_moe_ext.lora.saving import load_adapters, save_adapters
from hf_moe_ext.modeling import moe_expert_lora
from hf_moe_ext.patching import extend

from .helpers import logits, randomize_peft


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PEFT_TARGETS = {
    "mixtral": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "nemotron_h": ["mixer.experts.up_proj", "mixer.experts.down_proj"],
}
RANKS = [1, 3, 2, 3, 1, 2, 3, 1]


@torch.no_grad()
def made(name="mixtral", **config):
    torch.manual_seed(1)
    model = extend(tiny_model(name), {"expert_lora": {"r": 3, **config}}).eval()
    for lora in experts_lora_of(model).values():
        used = torch.arange(max(lora.ranks)) < torch.tensor(lora.ranks)[:, None]
        for key, parameter in lora.named_parameters():
            if key.endswith("_B"):
                parameter.copy_(0.2 * torch.randn_like(parameter) * used[:, None])
    return model


def peft(name, targets=None, **options):
    options = {"r": 3, "lora_alpha": 6, "target_parameters": targets or PEFT_TARGETS[name], **options}
    options["target_modules"] = []  # PEFT adds others of its own to some families
    return randomize_peft(get_peft_model(tiny_model(name), LoraConfig(**options)).eval())


def folded(model):
    """The stock model with `W + s B A` in place."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for path, lora in experts_lora_of(twin).items():
            experts = twin.get_submodule(path)
            for which in ("up", "down"):
                if f"{which}_A" not in lora._parameters:
                    continue
                name = "down_proj" if which == "down" else "gate_up_proj" if experts.has_gate else "up_proj"
                for expert, (rank, scale) in enumerate(zip(lora.ranks, lora.scales, strict=True)):
                    a, b = getattr(lora, f"{which}_A")[expert, :rank], getattr(lora, f"{which}_B")[expert, :, :rank]
                    delta = scale * b @ a
                    getattr(experts, name)[expert] += delta.T if experts.is_transposed else delta
    twin.moe_link.adapters_enabled = False
    return twin


@pytest.fixture
def portable(monkeypatch):
    """Without the kernels of the package."""
    monkeypatch.setattr(lora_dispatch, "lora_kernels_of", lambda device: None)


# --- what it computes ---


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"r": RANKS}, {"target_parameters": ["down"]}], ids=str)
@pytest.mark.parametrize("name", PEFT_TARGETS)
def test_it_is_the_folded_weights(name, config):
    model = made(name, **config)
    torch.testing.assert_close(logits(model, name), logits(folded(model), name), **CLOSE)
    with disable_adapter(model):
        torch.testing.assert_close(logits(model, name), logits(tiny_model(name), name), **CLOSE)
    assert (logits(model, name) - logits(tiny_model(name), name)).abs().max() > 0.1


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "moe_ext"])
def test_any_experts_implementation(implementation):
    model = made()
    wanted = logits(model, "mixtral")
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model, "mixtral"), wanted, **CLOSE)


def gradients(model, name):
    model.zero_grad()
    out = model(**tiny_inputs(name)).logits
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", PEFT_TARGETS)
def test_peft_gives_the_same_logits_and_gradients(name, implementation, tmp_path):
    theirs = peft(name)
    theirs.save_pretrained(tmp_path)
    theirs.base_model.model.set_experts_implementation(implementation)
    ours = load_expert_lora(tiny_model(name), tmp_path)
    torch.testing.assert_close(logits(ours, name), logits(theirs, name), **CLOSE)
    wanted, found = gradients(theirs, name), gradients(ours, name)
    count = 0
    for path in experts_lora_of(ours):
        for which, level in (("up", ".base_layer"), ("down", "")):
            grads = [wanted[f"base_model.model.{path}{level}.lora_{f}.default.weight"] for f in "AB"]
            pair = unpack_experts(*grads, 8, "peft")
            torch.testing.assert_close(found[f"{path}.moe_lora.{which}_A"], pair.a, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(found[f"{path}.moe_lora.{which}_B"], pair.b, rtol=1e-3, atol=1e-4)
            count += 1
    assert count == 2 * len(experts_lora_of(ours)) > 0
    unused = [g for g in found.values() for expert in g if not expert.any()]
    assert all(gradient is not None for gradient in found.values()) and isinstance(unused, list)


@pytest.mark.parametrize("name", PEFT_TARGETS)
def test_the_portable_form_is_the_kernels(name, portable, monkeypatch):
    model = made(name, r=RANKS)
    found = logits(model, name), gradients(model, name)
    monkeypatch.undo()
    calls, run = [], lora_dispatch.run
    monkeypatch.setattr(lora_dispatch, "run", lambda *args: calls.append(1) or run(*args))
    torch.testing.assert_close(found[0], logits(model, name), **CLOSE)
    for key, gradient in gradients(model, name).items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-3, atol=1e-4)
    assert calls


@pytest.mark.parametrize("kernels", [True, False])
def test_experts_without_a_token_get_zero_gradients(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(lora_dispatch, "lora_kernels_of", lambda device: None)
    model = made()
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(3, 32, requires_grad=True)
    index = torch.tensor([[1, 8], [1, 2], [8, 8]])  # 8 is nobody
    out = experts(hidden, index, torch.tensor([[0.7, 0.0], [0.4, 0.6], [0.0, 0.0]]))
    assert not out[2].any()
    out.sum().backward()
    for parameter in experts.moe_lora.parameters():
        assert [bool(gradient.any()) for gradient in parameter.grad] == [e in (1, 2) for e in range(8)]
    experts.moe_lora.zero_grad()
    experts(hidden, torch.full((3, 2), 8), torch.zeros(3, 2)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in experts.moe_lora.parameters())


def test_gradients_are_slopes(portable):
    model = made(r=RANKS).double()
    experts = model.model.layers[0].mlp.experts
    index, weights = (
        torch.tensor([[1, 8], [1, 2], [5, 0]]),
        torch.tensor([[0.7, 0.0], [0.4, 0.6], [0.5, 0.5]]).double(),
    )
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)

    def run(x, *tensors):
        return torch.func.functional_call(experts, dict(zip(names, tensors, strict=True)), (x, index, weights))

    names = [f"moe_lora.{name}" for name, _ in experts.moe_lora.named_parameters()]
    tensors = [p.detach().requires_grad_() for p in experts.moe_lora.parameters()]
    assert torch.autograd.gradcheck(run, (x, *tensors), fast_mode=True)


def test_dropout_leaves_the_mean_and_works_in_training_only(portable):
    model = made(lora_dropout=0.5, target_parameters=["down"])
    experts, x = model.model.layers[0].mlp.experts, torch.randn(2, 32)
    index, weights = torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5)
    with torch.no_grad():
        wanted = experts(x, index, weights)
        assert torch.equal(wanted, experts(x, index, weights))
        experts.train()
        found = torch.stack([experts(x, index, weights) for _ in range(4000)])
    assert found.std(0).min() > 1e-3
    torch.testing.assert_close(found.mean(0), wanted, rtol=0, atol=float(5 * found.std(0).max() / 4000**0.5))


def test_dropout_in_training_does_not_go_to_the_kernels(monkeypatch):
    calls, forward = [], moe_expert_lora.lora_experts_forward
    monkeypatch.setattr(moe_expert_lora, "lora_experts_forward", lambda *a: calls.append(1) or forward(*a))
    model = made(lora_dropout=0.1)
    logits(model, "mixtral")
    assert not calls
    logits(model.train(), "mixtral")
    assert len(calls) == 3


def test_filled_up_ranks_stay_zero_in_training():
    model = made(r=RANKS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = tiny_inputs("mixtral")["input_ids"]
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for lora in experts_lora_of(model).values():
        for expert, rank in enumerate(RANKS):
            assert not lora.up_A[expert, rank:].any() and not lora.down_B[expert, :, rank:].any()
            assert lora.up_A[expert, :rank].any()


def test_with_other_parts_and_upcycled_experts():
    import hf_moe_ext as moe

    model = moe.upcycle(tiny_model("llama"), num_experts=4, target="ext", check=False)
    declared = model.config.moe_ext
    moe_ext = {**declared, "expert_lora": {"r": 2}, "zero_experts": {"copy": 1}}
    config = type(model.config)(**{**model.config.to_dict(), "moe_ext": moe_ext})
    built = type(model)(config).eval()
    built.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for lora in experts_lora_of(built).values():
            nn.init.normal_(lora.up_B)
    torch.testing.assert_close(logits(built), logits(folded(built)), **CLOSE)
    names = [name for name, p in built.named_parameters() if p.requires_grad]
    assert names and all("moe_lora" in name for name in names)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_saved_and_loaded(name, tmp_path):
    model = made(name, r=RANKS)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), name), logits(model, name))
    save_adapters(model, tmp_path / "small")
    assert torch.equal(logits(load_adapters(tiny_model(name), tmp_path / "small"), name), logits(model, name))


# --- layouts ---


@pytest.mark.parametrize("layout", ["peft", "peft_0.18", "expert_major"])
def test_stacked_layouts_are_undone(layout):
    pair = ExpertPair(torch.randn(4, 3, 5), torch.randn(4, 7, 3))
    lora_a, lora_b = pack_experts(pair, layout)
    again = unpack_experts(lora_a, lora_b, 4, layout)
    assert torch.equal(again.a, pair.a) and torch.equal(again.b, pair.b)
    other = {"peft": "expert_major", "expert_major": "peft", "peft_0.18": "peft"}[layout]
    mixed = unpack_experts(lora_a, lora_b, 4, other)
    assert mixed.b.shape != pair.b.shape or not torch.equal(mixed.b, pair.b)
    with pytest.raises(ValueError, match="a stacked layout is"):
        pack_experts(pair, "other")
    with pytest.raises(ValueError, match="no equal ranks of 5 experts"):
        unpack_experts(lora_a, lora_b, 5, layout)


def test_stacked_layouts_by_their_definitions():
    """As PEFT 0.19 and 0.18 form the update, and as unsloth-zoo reads the columns of B."""
    pair, wanted = ExpertPair(torch.randn(4, 3, 5), torch.randn(4, 7, 3)), []
    wanted = torch.stack([b @ a for a, b in zip(pair.a, pair.b, strict=True)])  # (E, out, in)
    a, b = pack_experts(pair, "peft")
    found = torch.einsum("ore,eri->eoi", b.reshape(7, 3, 4), a.reshape(4, 3, 5))
    torch.testing.assert_close(found, wanted)
    for expert in range(4):
        torch.testing.assert_close(b[:, expert::4] @ a[3 * expert : 3 * expert + 3], wanted[expert])
    a, b = pack_experts(pair, "peft_0.18")
    assert a.shape == (12, 7) and b.shape == (5, 12)
    found = torch.einsum("ore,eri->eio", b.reshape(5, 3, 4), a.reshape(4, 3, 7))
    torch.testing.assert_close(found, wanted)
    a, b = pack_experts(pair, "expert_major")
    found = torch.einsum("oer,eri->eoi", b.view(7, 4, 3), a.view(4, 3, 5))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("layout", ["peft", "peft_0.18", "expert_major", "per_expert"])
@pytest.mark.parametrize("targets", [None, ["up"], ["down"]])
def test_files_round_trip(layout, targets, tmp_path):
    model = made(target_parameters=targets)
    export_expert_lora(model, tmp_path / "a", layout=layout)
    assert find_layout(tmp_path / "a") == layout
    again = load_expert_lora(tiny_model("mixtral"), tmp_path / "a")
    assert torch.equal(logits(again, "mixtral"), logits(model, "mixtral"))
    with pytest.raises(ValueError, match=f"says that its layout is `{layout}`"):
        load_expert_lora(tiny_model("mixtral"), tmp_path / "a", layout="peft" if layout != "peft" else "expert_major")


def test_different_ranks_round_trip(tmp_path):
    model = made(r=RANKS)
    for layout in ("peft", "per_expert"):
        export_expert_lora(model, tmp_path / layout, layout=layout)
        again = load_expert_lora(tiny_model("mixtral"), tmp_path / layout)
        torch.testing.assert_close(logits(again, "mixtral"), logits(model, "mixtral"), **CLOSE)


@pytest.mark.parametrize("name", PEFT_TARGETS)
def test_peft_reads_what_is_exported(name, tmp_path):
    model = made(name, use_rslora=True)
    export_expert_lora(model, tmp_path / "a")
    again = PeftModel.from_pretrained(tiny_model(name), tmp_path / "a").eval()
    torch.testing.assert_close(logits(again, name), logits(model, name), **CLOSE)


def test_gate_and_up_with_matrices_of_their_own(tmp_path):
    """Per-expert files of others need not share A between gate and up: B then stands in blocks."""
    model = made(target_parameters=["up"])
    export_expert_lora(model, tmp_path / "a", layout="per_expert")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in tensors:
        if ".up_proj.lora_A" in key:
            tensors[key] = torch.randn_like(tensors[key])
    save_file(tensors, path, metadata={"moe_lora_layout": "per_expert"})
    again = load_expert_lora(tiny_model("mixtral"), tmp_path / "a")
    lora = again.model.layers[0].mlp.experts.moe_lora
    assert lora.ranks == (6,) * 8 and lora.scales == pytest.approx((16 / 3,) * 8)
    prefix = "base_model.model.model.layers.0.mlp.experts.2"
    gate, up = (
        tensors[f"{prefix}.{p}.lora_B.weight"] @ tensors[f"{prefix}.{p}.lora_A.weight"]
        for p in ("gate_proj", "up_proj")
    )
    torch.testing.assert_close(lora.delta("up")[2], 16 / 3 * torch.cat([gate, up]))


def rewritten(folder, *, metadata=None, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata=metadata)


def test_who_wrote_an_adapter_is_told_by_metadata_alone(tmp_path):
    peft("mixtral").save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert "moe_lora_layout" not in (file.metadata() or {})
    assert find_layout(tmp_path) == "peft"
    rewritten(tmp_path, peft_version="0.18.1")
    assert find_layout(tmp_path) == "peft_0.18"
    with pytest.raises(ValueError, match="does not fit its layout `peft_0.18`"):
        load_expert_lora(tiny_model("mixtral"), tmp_path)
    rewritten(tmp_path, peft_version="0.21.2", auto_mapping={"unsloth_fixed": True})
    assert find_layout(tmp_path) is None
    rewritten(tmp_path, auto_mapping=None, peft_version=None)
    with pytest.raises(ValueError, match="does not say how.*`layout`"):
        load_expert_lora(tiny_model("mixtral"), tmp_path)
    assert load_expert_lora(tiny_model("mixtral"), tmp_path, layout="peft")
    rewritten(tmp_path, metadata={"moe_lora_layout": "sideways"})
    with pytest.raises(ValueError, match="unknown layout 'sideways'"):
        load_expert_lora(tiny_model("mixtral"), tmp_path)


def test_square_projections_are_read_by_their_metadata(tmp_path):
    """`down_proj` of I = H: shapes fit both orientations."""
    sizes = {"intermediate_size": 32}
    stock = tiny_model("mixtral", **sizes)
    theirs = randomize_peft(
        get_peft_model(
            tiny_model("mixtral", **sizes), LoraConfig(r=3, lora_alpha=6, target_parameters=["experts.down_proj"])
        ).eval()
    )
    theirs.save_pretrained(tmp_path)
    found = load_expert_lora(copy.deepcopy(stock), tmp_path)
    torch.testing.assert_close(logits(found, "mixtral"), logits(theirs, "mixtral"), **CLOSE)
    rewritten(tmp_path, peft_version="0.18.0")
    other = load_expert_lora(copy.deepcopy(stock), tmp_path)
    assert (logits(other, "mixtral") - logits(found, "mixtral")).abs().max() > 1e-2
    rewritten(tmp_path, peft_version=None)
    with pytest.raises(ValueError, match="their shapes do not tell"):
        load_expert_lora(copy.deepcopy(stock), tmp_path)


# --- bad input ---

BAD = {
    "ranks": ({"r": [1, 2]}, ValueError, '`r` has 2 ranks, and layer "0" has 8 experts'),
    "rank": ({"r": 0}, ValueError, "`r` must be a whole number above 0"),
    "alpha": ({"lora_alpha": 0}, ValueError, "`lora_alpha` must be positive"),
    "dropout": ({"lora_dropout": 1.0}, ValueError, r"in \[0, 1\)"),
    "targets": ({"target_parameters": ["gate"]}, ValueError, '"up" and "down"'),
}


@pytest.mark.parametrize(("config", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(config, error, message):
    with pytest.raises(error, match=message):
        extend(tiny_model("mixtral"), {"expert_lora": config})


def test_models_that_cannot():
    with pytest.raises(ValueError, match="dense model without routers"):
        extend(tiny_model("llama"), {"expert_lora": {}})
    with pytest.raises(ValueError, match="needs experts in stacked tensors"):
        extend(tiny_model("dbrx"), {"expert_lora": {}})
    with pytest.raises(ValueError, match="has no `expert_lora`"):
        export_expert_lora(tiny_model("mixtral"), "somewhere")
