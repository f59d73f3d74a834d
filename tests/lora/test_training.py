"""Adapters in `MoETrainer`, in other declarations, and at the command line."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from hf_moe_ext.cli.main import main
from hf_moe_ext.lora.mixtures import active_adapters, mix_adapters, set_adapter, stacks_of
from hf_moe_ext.modeling.moe_lora import adapter_names
from hf_moe_ext.modeling.moe_structure import iter_routers
from hf_moe_ext.patching import extend
from hf_moe_ext.trainers import MoETrainer, MoETrainingArguments
from hf_moe_ext.trainers.freezing import freeze_router, train_experts, train_only_moe
from hf_moe_ext.trainers.parameter_report import ParameterReport

from .helpers import logits, saved_adapter


class Rows(torch.utils.data.Dataset):
    """Token rows of one pattern, with the task of each."""

    def __init__(self, tasks=True):
        generator = torch.Generator().manual_seed(0)
        starts = torch.randint(4, 40, (16, 1), generator=generator)
        self.ids = starts + torch.arange(12)
        self.tasks = tasks

    def __len__(self):
        return 16

    def __getitem__(self, i):
        row = {"input_ids": self.ids[i], "attention_mask": torch.ones(12, dtype=torch.long), "labels": self.ids[i]}
        return {**row, "task_ids": i % 2} if self.tasks else row


def trainer(model, folder, steps=6, **options):
    options = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], **options}
    arguments = MoETrainingArguments(str(folder), max_steps=steps, use_cpu=True, **options)
    return MoETrainer(model=model, args=arguments, train_dataset=Rows())


MODELS = {
    "lora_moe": ("llama", {"lora_experts": {"preset": "lora_moe", "num_lora_experts": 4}}),
    "mix_lora": ("llama", {"lora_experts": {"preset": "mix_lora", "num_lora_experts": 4}}),
    "task": ("llama", {"lora_experts": {"num_lora_experts": 3, "routing": "task", "num_tasks": 2}}),
    "experts": ("mixtral", {"expert_lora": {"r": 4, "lora_dropout": 0.1}}),
    "both": ("mixtral", {"router": "top_k", "expert_lora": {}, "lora_experts": {"target_modules": ["attention"]}}),
}


@pytest.mark.parametrize("name", MODELS)
def test_adapters_are_trained_and_nothing_else(name, tmp_path):
    host, extension = MODELS[name]
    torch.manual_seed(0)
    model = extend(tiny_model(host), extension)
    before, trained = copy.deepcopy(model.state_dict()), adapter_names(model)
    run = trainer(model, tmp_path)
    report = str(run.parameter_report())
    assert "Adapters trained" in report and f"Training {sum(before[n].numel() for n in trained):,} of" in report
    run.train()
    history = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert history[-1] < history[0]
    after = model.state_dict()
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert changed and changed <= trained
    assert any(".B" in key or "_B" in key for key in changed)
    if "lora_experts" in extension:
        assert any("moe_lora_gate" in key for key in changed)
        assert any("moe/lora/mean_k" in entry for entry in run.state.log_history)
    if name == "lora_moe":
        assert any("moe/loss_lora_localized" in entry for entry in run.state.log_history)
    if name == "mix_lora":
        assert any("moe/loss_lora_balance" in entry for entry in run.state.log_history)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    def made():
        torch.manual_seed(0)
        return extend(tiny_model("llama"), {"lora_experts": {"preset": "mix_lora", "num_lora_experts": 3}})

    whole = trainer(made(), tmp_path / "a", 4, save_steps=2)
    whole.train()
    again = trainer(made(), tmp_path / "b", 4)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[key]), key


def test_what_is_frozen():
    model = extend(tiny_model("llama"), {"lora_experts": {"num_lora_experts": 2}})
    freeze_router(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith((".A", ".B")) for name in trained)
    model.requires_grad_(True)
    train_only_moe(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapter_names(model)
    report = ParameterReport.of(model)
    stacks = sum(s.A.numel() + s.B.numel() for s in stacks_of(model).values())
    assert report.adapters == stacks and len(report.adapter_routers) == len(list(iter_routers(model))) == 9
    assert "Routers trained" not in str(report)
    with_experts = extend(tiny_model("mixtral"), {"expert_lora": {}})
    report = ParameterReport.of(with_experts)
    assert report.adapters and not report.routers and set(report.experts.values()) == {()}
    with pytest.raises(ValueError, match="carry adapters"):
        train_experts(with_experts, [0])
    with pytest.raises(ValueError, match="needs a Mixture-of-Experts model"):
        freeze_router(tiny_model("llama"))


# --- command line ---


@pytest.fixture
def dense(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def run(*words):
    return main([str(word) for word in words])


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_extend(dense, tmp_path, capsys):
    assert (
        run("extend", dense, tmp_path / "out", "--lora_experts", "mix_lora:num_lora_experts=4,r=2", "--no_verify") == 0
    )
    declared = json.loads((tmp_path / "out" / "config.json").read_text())["moe_ext"]["lora_experts"]
    assert declared["share_base_ffn"] and declared["num_lora_experts"] == 4
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(dense)), rtol=1e-4, atol=1e-5)
    assert run("extend", dense, tmp_path / "no", "--lora_experts", "mixlora") == 2
    assert "unknown preset" in capsys.readouterr().err
    assert run("extend", dense, tmp_path / "no", "--router", "top_p") == 1
    assert "is a dense model" in capsys.readouterr().err
    tiny_model("mixtral").save_pretrained(tmp_path / "moe")
    assert run("extend", tmp_path / "moe", tmp_path / "adapted", "--expert_lora", "r=3", "--no_verify") == 0
    assert "expert_lora" in json.loads((tmp_path / "adapted" / "config.json").read_text())["moe_ext"]


def test_adapters_from_folder_to_folder(dense, tmp_path, capsys):
    wanted = {name: saved_adapter(tmp_path / name, seed) for seed, name in enumerate(("code", "maths"))}
    adapters = ["--adapters", tmp_path / "code", tmp_path / "maths"]
    assert run("adapters", "mix", dense, tmp_path / "mixed", *adapters, "--num_experts_per_tok", 1, "--no_verify") == 0
    assert "experts: code, maths" in capsys.readouterr().out
    model = load(tmp_path / "mixed")
    set_adapter(model, "maths")
    torch.testing.assert_close(logits(model), wanted["maths"], rtol=1e-4, atol=1e-5)
    assert run("adapters", "export", tmp_path / "mixed", tmp_path / "peft", "--names", "maths") == 0
    again = mix_adapters(tiny_model("llama"), [tmp_path / "peft" / "maths"])
    torch.testing.assert_close(logits(again), wanted["maths"], rtol=1e-4, atol=1e-5)
    assert run("adapters", "save", tmp_path / "mixed", tmp_path / "small") == 0
    loaded = ["--adapters", tmp_path / "small", "--no_verify"]
    assert run("adapters", "load", dense, tmp_path / "again", *loaded) == 0
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(tmp_path / "mixed")))
    assert run("adapters", "merge", tmp_path / "mixed", tmp_path / "merged", "--adapter", "code", "--no_verify") == 0
    merged = load(tmp_path / "merged")
    assert type(merged).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(merged), wanted["code"], rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert run("adapters", "merge", tmp_path / "mixed", tmp_path / "no") == 1
    assert "token by token" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert run("adapters", "mix", dense, tmp_path / "no") == 2
    assert run("adapters", "twist") == 2 and run("adapters", "--help") == 0
    assert active_adapters(model) == ["maths"]


def test_verified_in_a_clean_process(dense, tmp_path, capsys):
    """The folder loads where the package is not installed."""
    assert run("extend", dense, tmp_path / "out", "--lora_experts", "lora_moe:num_lora_experts=2") == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"moe_lora.py", "modeling_moe_ext.py"} <= files
