"""`export` writes a folder that works elsewhere, or nothing."""

import json
import os
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_moe_ext import hub, verification
from hf_moe_ext.hub import VerificationError, export, export_checked, push_to_hub, verify_folder
from tests.hub.models import EXTENDED, byte_tokenizer, mixtral, outputs, stock_llama, stock_mixtral


NEEDED_CODE = {
    "configuration_moe_ext.py",
    "modeling_moe_ext.py",
    "moe_context.py",
    "moe_experts.py",
    "moe_families.py",
    "moe_losses.py",
    "moe_router.py",
    "moe_structure.py",
    "router_top_k.py",
    "router_top_p.py",
}


@pytest.mark.parametrize("name", EXTENDED)
def test_an_extended_model_is_verified_without_the_package(name, tmp_path):
    model = EXTENDED[name]().train()
    expected = outputs(model.eval())
    model.train()
    implementation = model.config._experts_implementation
    tokenizer = byte_tokenizer()

    result = export_checked(model, tmp_path / "out", tokenizer=tokenizer)

    assert result.path == tmp_path / "out" and os.listdir(tmp_path) == ["out"]
    assert result.verification.exact and result.verification.max_difference == 0.0
    assert result.verification.remote_code and result.verification.device == "cpu"
    assert NEEDED_CODE <= set(result.files["code"])
    assert result.files["weights"] == ["model.safetensors"]
    assert result.files["config"] == ["config.json", "generation_config.json"]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(result.files["tokenizer"])
    assert set(os.listdir(result.path)) == {name for names in result.files.values() for name in names}
    assert result.size == sum(path.stat().st_size for path in result.path.iterdir())
    assert model.training and model.config._experts_implementation == implementation

    loaded = AutoModelForCausalLM.from_pretrained(result.path)
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded), expected)
    chat = [{"role": "user", "content": "hi"}]
    again = AutoTokenizer.from_pretrained(result.path)
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)


def test_a_stock_model_is_exported_as_plain_stock(tmp_path):
    model = stock_mixtral()
    result = export_checked(model, tmp_path / "out")

    assert "code" not in result.files and result.verification.exact and not result.verification.remote_code
    config = json.loads((result.path / "config.json").read_text())
    assert config["model_type"] == "mixtral" and not {"auto_map", "moe_ext", "experts_implementation"} & set(config)
    assert torch.equal(outputs(MixtralForCausalLM.from_pretrained(result.path)), outputs(model))
    assert "trust_remote_code" not in (result.path / "README.md").read_text()


def bert():
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, num_labels=3
    )
    return BertForSequenceClassification(config)


def t5():
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config)


@pytest.mark.slow
@pytest.mark.parametrize("make", [bert, t5, stock_llama], ids=["bert", "t5", "llama"])
def test_other_kinds_of_models_are_verified_too(make, tmp_path):
    assert export_checked(make(), tmp_path / "out").verification.exact


@pytest.mark.slow
def test_a_model_without_padding_token_and_in_bf16(tmp_path):
    model = mixtral()
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)

    result = export_checked(model, tmp_path / "out", max_shard_size="20KB")
    assert result.verification.exact
    assert "model.safetensors.index.json" in result.files["weights"] and len(result.files["weights"]) > 2


def test_an_existing_model_is_kept_or_replaced(tmp_path):
    first, second = mixtral(), mixtral()
    export(first, tmp_path / "out", verify=False)
    with pytest.raises(FileExistsError, match="overwrite"):
        export(second, tmp_path / "out", verify=False)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), outputs(first))

    assert export(second, tmp_path / "out", verify=False, overwrite=True, card=False) == tmp_path / "out"
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), outputs(second))
    assert os.listdir(tmp_path) == ["out"] and not (tmp_path / "out" / "README.md").exists()


class FullDisk(Exception):
    """What safetensors raises."""


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), FullDisk('IoError(Os { code: 28, kind: StorageFull, message: "..." })')],
    ids=["os", "safetensors"],
)
def test_a_full_disk_leaves_nothing(error, tmp_path, monkeypatch):
    model = mixtral()
    save = type(model).save_pretrained

    def save_half(self, folder, **kwargs):
        save(self, folder, **kwargs)
        raise error

    monkeypatch.setattr(type(model), "save_pretrained", save_half)
    with pytest.raises(OSError, match="the disk is full; nothing was left behind"):
        export(model, tmp_path / "out", verify=False)
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="the model needs"):
        export(mixtral(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_during_verification_keeps_the_old_model(tmp_path, monkeypatch):
    first = mixtral()
    export(first, tmp_path / "out", verify=False)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(verification.subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(mixtral(), tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), outputs(first))


def test_remote_code_that_was_loaded_before_does_not_matter(tmp_path, monkeypatch):
    """Loading a model with code of its own leaves the cache of such code on the path of the process."""
    from transformers.dynamic_module_utils import HF_MODULES_CACHE, init_hf_modules

    init_hf_modules()
    monkeypatch.setattr(sys, "path", [*sys.path, HF_MODULES_CACHE])
    export(EXTENDED["mixtral"](), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_model_that_computes_something_else_is_not_exported(tmp_path):
    model = mixtral()
    model.lm_head.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(VerificationError, match="computes other logits: they differ by up to 1"):
        export(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_model_that_does_not_load_is_not_exported(tmp_path, monkeypatch):
    model = mixtral()
    save = type(model).save_pretrained

    def forget_a_file(self, folder, **kwargs):
        save(self, folder, **kwargs)
        (folder / "moe_losses.py").unlink()

    monkeypatch.setattr(type(model), "save_pretrained", forget_a_file)
    with pytest.raises(VerificationError, match="does not load in a clean process: .*moe_losses.py"):
        export(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_was_changed_later_is_noticed(tmp_path):
    model = stock_llama()
    export(model, tmp_path / "out", verify=False)
    with torch.no_grad():
        model.lm_head.weight[5] += 0.5
    with pytest.raises(VerificationError, match="computes other logits"):
        verify_folder(tmp_path / "out", model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_what_cannot_be_exported(tmp_path):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        export(torch.nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(TypeError, match="carries adapters. Merge them first"):
        export(get_peft_model(stock_llama(), LoraConfig(target_modules=["q_proj"])), tmp_path / "out")
    with torch.device("meta"):
        empty = stock_llama()
    with pytest.raises(ValueError, match="`meta` device"):
        export(empty, tmp_path / "out")

    class Mine(MixtralForCausalLM):
        pass

    with pytest.raises(ValueError, match="Mine is neither a class of transformers nor one of this package"):
        export(Mine(stock_mixtral().config), tmp_path / "out")
    assert os.listdir(tmp_path) == []


class Plan:
    """Stands in for the Hub: notes what would be uploaded."""

    def __init__(self, monkeypatch):
        from huggingface_hub import HfApi

        self.files, self.contents, self.calls = set(), {}, []
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "create_commit", self.create_commit)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload_folder)

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create_repo", repo_id, kwargs.get("private")))
        return type("RepoUrl", (), {"repo_id": f"me/{repo_id}"})

    def create_commit(self, repo_id, operations, **kwargs):
        self.calls.append(("create_commit", repo_id))
        for operation in operations:
            with open(operation.path_or_fileobj, "rb") as file:
                self.contents[operation.path_in_repo] = file.read()
        self.files = set(self.contents)
        return "commit"

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        self.calls.append(("upload_folder", repo_id))
        self.contents = {
            str(p.relative_to(folder_path)): p.read_bytes() for p in folder_path.rglob("*") if p.is_file()
        }
        self.files = set(self.contents)
        return "commit"


@pytest.mark.parametrize("name", EXTENDED)
def test_push_to_hub_of_a_model_uploads_its_code(name, monkeypatch):
    plan = Plan(monkeypatch)
    EXTENDED[name]().push_to_hub("tiny")

    assert NEEDED_CODE | {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= plan.files
    assert [call[0] for call in plan.calls] == ["create_repo", "create_commit"]
    config = json.loads(plan.contents["config.json"])
    assert {value.partition(".")[0] for value in config["auto_map"].values()} == {"modeling_moe_ext"}


def test_push_to_hub_exports_first(monkeypatch):
    plan = Plan(monkeypatch)
    assert push_to_hub(mixtral(), "tiny", tokenizer=byte_tokenizer(), private=True) == "commit"

    assert plan.calls == [("create_repo", "tiny", True), ("upload_folder", "me/tiny")]
    assert NEEDED_CODE | {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= plan.files
    card = plan.contents["README.md"].decode()
    assert "# tiny" in card and "bit-equal" in card
