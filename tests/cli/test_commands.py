"""What each command prints and writes, on tiny models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_moe_ext import hub
from hf_moe_ext.cli import env
from hf_moe_ext.cli.list import KINDS
from hf_moe_ext.cli.main import COMMANDS, main
from hf_moe_ext.modeling.moe_router import list_routers
from tests.cli.conftest import tree
from tests.hub.models import token_ids


ROOT = Path(__file__).resolve().parents[2]


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(token_ids()).logits


# --- the overview ---


def test_overview(hf_moe):
    result = hf_moe("--help")
    assert result.code == 0 and all(name in result.out for name in COMMANDS)
    assert hf_moe().code == 2


def test_version(hf_moe):
    assert hf_moe("--version").out.strip().count(".") == 2


def test_unknown_command(hf_moe):
    result = hf_moe("upcycel")
    assert result.code == 2 and "unknown command `upcycel`. Did you mean `upcycle`?" in result.err


def test_both_entry_points():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'hf-moe = "hf_moe_ext.cli.main:main"' in project and 'hf-moe-ext = "hf_moe_ext.cli.main:main"' in project


def test_the_overview_imports_no_command():
    code = (
        "import sys; from hf_moe_ext.cli.main import main; main(['--help']);"
        "assert not [m for m in sys.modules if m.startswith(('hf_moe_ext.cli.', 'hf_moe_ext.upcycling', 'datasets'))"
        " and m != 'hf_moe_ext.cli.main']"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=120)


def test_a_reader_that_stops_early():
    """`hf-moe list families | head -1`."""
    command = f"{sys.executable} -m hf_moe_ext.cli.main list families | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("family") and done.stderr == ""


def test_a_traceback_with_verbose(hf_moe, tmp_path):
    result = hf_moe("inspect", tmp_path / "nothing", "--verbose")
    assert result.code == 1 and "Traceback" in result.err and "there is no folder" in result.err


# --- list, env ---


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("families", "mixtral"),
        ("routers", "top_p"),
        ("methods", "granular"),
        ("gates", "hidden_avg"),
        ("domains", "python"),
    ],
)
def test_list(hf_moe, kind, expected):
    result = hf_moe("list", kind)
    assert result.code == 0 and any(line.startswith(expected) for line in result.out.splitlines())


def test_list_routers_says_what_starts_as_the_stock_gate(hf_moe):
    rows = [re.split(r"  +", line) for line in hf_moe("list", "routers").out.strip().splitlines()[2:]]
    found = {row[0]: next((cell for cell in row if cell in ("yes", "no", "some families")), None) for row in rows}
    assert found["top_k"] == found["rmoe"] == "yes"
    assert found["hash"] == found["comet"] == "no"
    assert found["sigmoid"] == "some families"
    assert list(found) == list(list_routers())


def test_every_kind_is_listed_above():
    assert set(KINDS) == {"families", "routers", "methods", "gates", "domains"}


def test_list_something_else(hf_moe):
    result = hf_moe("list", "famlies")
    assert result.code == 2 and "unknown kind `famlies`; known: families" in result.err


def test_env(hf_moe):
    result = hf_moe("env")
    assert result.code == 0
    assert [name for name in ("python", *env.PACKAGES, "GPUs") if f"\n{name} " not in "\n" + result.out] == []


# --- inspect ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense", "LlamaForCausalLM (llama)"),
        ("stock", "MixtralForCausalLM (mixtral)"),
        ("extended", "top_p"),
        ("made_from_dense", "MoeExtLlamaForCausalLM (llama)"),
        ("bert", "BertForSequenceClassification (bert)"),
    ],
)
def test_inspect(hf_moe, saved, name, expected):
    folder = saved(name)
    (folder / "model.safetensors").unlink()  # only the config is read
    result = hf_moe("inspect", folder)
    assert result.code == 0 and expected in result.out
    assert ("moe_ext: {" in result.out) == (name in ("extended", "made_from_dense"))


def test_inspect_json(hf_moe, saved):
    data = json.loads(hf_moe("inspect", "--json", saved("extended")).out)
    assert data["layers"][0]["num_experts"] == 6 and data["moe_ext"]["router"]["type"] == "top_p"


# --- student ---


def test_student(hf_moe, saved, tmp_path):
    teacher = saved("extended")
    refused = hf_moe("student", teacher, tmp_path / "out")
    assert refused.code == 1 and "every 8th layer is left out" in refused.err
    refused = hf_moe("student", teacher, tmp_path / "out", "--keep_layers", "first")
    assert (
        refused.code == 2
        and '`--keep_layers` must be numbers and ranges such as "0,1,4:7", got "first"' in refused.err
    )
    assert not (tmp_path / "out").exists()
    result = hf_moe("student", teacher, tmp_path / "out", "--keep_layers", "1:2")
    assert result.code == 0 and "Kept 1 of 2 layers (without 0)" in result.out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 1 and type(model).__name__ == "MoeExtMixtralForCausalLM"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")
    assert hf_moe("student", teacher, tmp_path / "out", "--keep_layers", "0").code == 1


# --- extend ---


def test_extend(hf_moe, saved, tmp_path):
    """With the clean process that verifies the result."""
    stock = saved("stock")
    result = hf_moe("extend", stock, tmp_path / "out", "--router", "top_k")
    assert result.code == 0, result.err
    assert f"wrote {tmp_path / 'out'}" in result.out and "bit-equal logits in a clean process" in result.out
    assert AutoConfig.from_pretrained(tmp_path / "out").moe_ext["router"]["type"] == "top_k"
    torch.testing.assert_close(logits(tmp_path / "out"), logits(stock))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_extend_dry_run(hf_moe, saved, tmp_path):
    saved("stock")
    before = tree(tmp_path)
    result = hf_moe("extend", tmp_path / "stock", tmp_path / "out", "--router", "top_p", "--dry-run")
    assert result.code == 0 and "dry run" in result.out and "top_p" in result.out
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()


# --- upcycle ---


def test_upcycle_streams(hf_moe, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_moe_ext.cli.upcycle.load_model", None)  # the model is never loaded as a whole
    dense = saved("dense")
    result = hf_moe("upcycle", dense, tmp_path / "out", "--num-experts", "4")
    assert result.code == 0, result.err
    assert f"wrote {tmp_path / 'out'}" in result.out and "preserves the dense function" in result.out
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "mixtral"
    torch.testing.assert_close(logits(tmp_path / "out"), logits(dense))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_upcycle_options(hf_moe, saved, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "method: granular\ngranularity: 3\nnum_experts: 2\nnum_experts_per_tok: 1\nlayers: [1]\nseed: 3\n"
        "router: {type: top_k}\n"
    )
    result = hf_moe("upcycle", saved("dense"), tmp_path / "out", "--config", config)
    assert result.code == 0, result.err
    declared = AutoConfig.from_pretrained(tmp_path / "out").moe_ext
    assert declared["router"]["type"] == "top_k" and declared["experts"]["num_experts"] == 6
    assert "1 of 2 layers with 6 experts, 3 per token" in result.out


def test_upcycle_with_parts_and_masks(hf_moe, saved, tmp_path):
    parts = ("--shared_experts", "init=dense", "--momentum", "decay=0.0", "--zero_experts", "zero=1,init=identity")
    result = hf_moe("upcycle", saved("dense"), tmp_path / "out", "--num_experts", 4, "--router", "top_k", *parts)
    assert result.code == 0, result.err
    declared = AutoConfig.from_pretrained(tmp_path / "out").moe_ext
    assert declared["shared_experts"]["init"] == "dense" and declared["momentum"] == {"decay": 0.0}
    assert declared["zero_experts"] == {"zero": 1, "init": "identity"}
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "dense"), rtol=1e-4, atol=1e-4)

    masked = ("--method", "masked", "--keep", 0.5, "--rescale", "true", "--target", "stock")
    assert hf_moe("upcycle", tmp_path / "dense", tmp_path / "masked", "--num_experts", 4, *masked).code == 0
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "masked").model.layers[0].mlp.experts.down_proj
    assert 0.4 < (weights == 0).float().mean() < 0.6


def test_extend_with_parts(hf_moe, saved, tmp_path, unverified):
    result = hf_moe("extend", saved("stock"), tmp_path / "out", "--shared_experts", "", "--momentum", "decay=0.5")
    assert result.code == 0, result.err
    declared = AutoConfig.from_pretrained(tmp_path / "out").moe_ext
    assert declared == {"version": 1, "shared_experts": {}, "momentum": {"decay": 0.5}}
    refused = hf_moe("extend", tmp_path / "stock", tmp_path / "other", "--zero_experts", "zero=1")
    assert refused.code == 1 and "are choices of a router" in refused.err and not (tmp_path / "other").exists()


def test_upcycle_splits(hf_moe, saved, tmp_path, unverified):
    source = saved("dense")
    result = hf_moe(
        "upcycle", source, tmp_path / "out", "--method", "split", "--num_experts", 2, "--num_experts_per_tok", 1,
        "--split_by", "gradient", "--calibration", "python,prose", "--target", "ext",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "2 experts, 1 per token" in result.out and logits(tmp_path / "out").isfinite().all()
    result = hf_moe("upcycle", source, tmp_path / "no", "--method", "split", "--split_by", "gradient")
    assert result.code != 0 and "need `calibration`" in result.err and not (tmp_path / "no").exists()


def test_upcycle_mixes_several_models(hf_moe, saved, tmp_path):
    source = saved("dense")
    several = ("--sources", f"{source},{source}")
    result = hf_moe("upcycle", source, tmp_path / "out", "--method", "bam", *several, "--attention_kv", "shared")
    assert result.code == 0, result.err
    assert "3 experts, 1 per token" in result.out and logits(tmp_path / "out").isfinite().all()
    for words, text in (
        (("--method", "sparse"), "mixed by the methods `bam` and `btx`"),
        (("--method", "btx", "--num_experts", 4), "2 sources make 2 experts, `num_experts` asks for 4"),
        (("--method", "btx", "--dry_run"), "`--dry_run` does not go with `--sources`"),
    ):
        result = hf_moe("upcycle", source, tmp_path / "no", "--sources", source, *words)
        assert result.code != 0 and text in result.err, result.err
    assert not (tmp_path / "no").exists()


def test_upcycle_in_memory_with_prompts(hf_moe, saved, tmp_path, unverified):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("- [a b c, some words]\n- ['12 + 30 = 42']\n")
    options = ("--num_experts", "2", "--gate_init", "hidden", "--gate_prompts", prompts)
    result = hf_moe("upcycle", saved("dense"), tmp_path / "out", *options)
    assert result.code == 0, result.err
    assert "wrote" in result.out and (tmp_path / "out" / "tokenizer.json").is_file()


def test_upcycle_dry_run(hf_moe, saved, tmp_path):
    dense = saved("dense")
    before = tree(tmp_path)
    result = hf_moe("upcycle", dense, tmp_path / "out", "--dry_run")
    assert result.code == 0 and "dry run" in result.out and "MixtralForCausalLM" in result.out
    assert tree(tmp_path) == before


def test_upcycle_overwrites_when_told(hf_moe, saved, tmp_path):
    dense, out = saved("dense"), saved("stock")
    assert hf_moe("upcycle", dense, out).code == 1
    result = hf_moe("upcycle", dense, out, "--num_experts", "3", "--overwrite")
    assert result.code == 0 and AutoConfig.from_pretrained(out).num_local_experts == 3


# --- generate ---


@pytest.mark.parametrize("name", ["dense", "extended"])
def test_generate(hf_moe, saved, name):
    result = hf_moe("generate", saved(name), "Once upon", "--max_new_tokens", "4")
    assert result.code == 0 and result.out.startswith("Once upon")


def test_generate_is_seeded(hf_moe, saved):
    folder = saved("extended")
    words = ("generate", folder, "Once", "--do_sample", "--max_new_tokens", "8", "--temperature", "3.0")
    first, again, other = hf_moe(*words).out, hf_moe(*words).out, hf_moe(*words, "--seed", "1").out
    assert first == again != other


def test_generate_with_a_strategy(hf_moe, saved):
    words = ("generate", saved("stock"), "Once upon", "--max_new_tokens", "8")
    plain = hf_moe(*words).out
    assert hf_moe(*words, "--strategy", "self_contrast", "--beta", "0").out == plain
    for options in (("self_contrast", "--beta", "5", "--weak", "topk-1"), ("dola",), ("contrastive_search",)):
        result = hf_moe(*words, "--strategy", *options)
        assert result.code == 0 and result.out.startswith("Once upon") and result.out != plain, result.err
    assert hf_moe(*words, "--num_experts_per_tok", "1").out != plain


def test_generate_shows_the_routing(hf_moe, saved, tmp_path):
    page = tmp_path / "routing.html"
    result = hf_moe("generate", saved("stock"), "Once upon", "--max_new_tokens", "4", "--show_routing", page)
    assert result.code == 0 and "\x1b[48;2;" in result.out and "expert and tokens" in result.out, result.err
    assert "<h2>Layer 0</h2>" in page.read_text()


def test_generate_chat(hf_moe, saved):
    result = hf_moe("generate", saved("extended"), "Hi", "--chat", "--max_new_tokens", "4", "--dtype", "bfloat16")
    assert result.code == 0 and "Hi" not in result.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max_new_tokens", "0"), "`--max_new_tokens` must be at least 1"),
        (("--temperature", "0"), "`--temperature` must be positive"),
        (("--dtype", "float33"), "`--dtype` must be auto, float32"),
        (("--dtype", "int8"), "`--dtype` must be auto, float32"),
        (("--strategy", "beam"), "`--strategy` must be one of self_contrast, contrastive_search, dola, got beam"),
        (("--beta", "-1"), "`beta` must be a number of 0 or above"),
        (("--weak", "best"), "'best' is no routing mode"),
        (("--num_experts_per_tok", "0"), "`--num_experts_per_tok` must be at least 1"),
        (("--show_routing", "page.txt"), "names the .html file to write"),
    ],
)
def test_generate_refuses(hf_moe, saved, options, message):
    result = hf_moe("generate", saved("dense"), "Hi", *options)
    assert result.code == 2 and message in result.err


def test_generate_without_a_text_model(hf_moe, saved):
    result = hf_moe("generate", saved("bert"), "Hi")
    assert result.code == 1 and "BertForSequenceClassification does not generate text" in result.err


def test_generate_without_a_tokenizer(hf_moe, saved):
    folder = saved("dense")
    for path in folder.glob("tok*"):
        path.unlink()
    result = hf_moe("generate", folder, "Hi")
    assert result.code == 1 and "holds no tokenizer. `--tokenizer` takes" in result.err
    assert hf_moe("generate", folder, "Hi", "--tokenizer", saved("stock"), "--max_new_tokens", "2").code == 0


# --- export ---


def test_export(hf_moe, saved, tmp_path, unverified):
    source = saved("extended")
    result = hf_moe("export", source, tmp_path / "out", "--max_shard_size", "100KB")
    assert result.code == 0, result.err
    assert f"wrote {tmp_path / 'out'}" in result.out and "configuration_moe_ext.py, " in result.out
    assert (tmp_path / "out" / "README.md").is_file() and (tmp_path / "out" / "tokenizer.json").is_file()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert torch.equal(logits(tmp_path / "out"), logits(source))


def test_export_dry_run(hf_moe, saved, tmp_path):
    source = saved("extended")
    before = tree(tmp_path)
    result = hf_moe("export", source, tmp_path / "out", "--dry-run")
    assert result.code == 0 and "dry run" in result.out and tree(tmp_path) == before


def test_export_says_when_there_is_no_tokenizer(hf_moe, saved, tmp_path, unverified):
    source = saved("stock")
    for path in source.glob("tok*"):
        path.unlink()
    result = hf_moe("export", source, tmp_path / "out")
    assert result.code == 0 and "has no tokenizer, so none is written; `--tokenizer` names one" in result.out


def test_export_uploads_what_it_wrote(hf_moe, saved, tmp_path, unverified, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, **kwargs):
            calls.append(("create", name))
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, *, repo_id, folder_path):
            calls.append(("upload", repo_id, str(folder_path)))
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    result = hf_moe("export", saved("extended"), tmp_path / "out", "--push_to", "my-moe")
    assert result.code == 0 and "uploaded https://hub/commit" in result.out
    assert calls == [("create", "my-moe"), ("upload", "me/my-moe", str(tmp_path / "out"))]


def test_export_refuses_a_wrong_size(hf_moe, saved, tmp_path):
    result = hf_moe("export", saved("extended"), tmp_path / "out", "--max_shard_size", "large")
    assert result.code == 2 and "`max_shard_size` must be a positive size" in result.err


def test_a_failed_verification_leaves_nothing(hf_moe, saved, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise hub.VerificationError("other logits.")

    monkeypatch.setattr(hub, "verify_folder", fail)
    source = saved("extended")
    before = tree(tmp_path)
    result = hf_moe("export", source, tmp_path / "out")
    assert result.code == 1 and "other logits." in result.err and tree(tmp_path) == before


# --- report ---


def test_report_without_a_run(hf_moe, tmp_path):
    result = hf_moe("report", tmp_path)
    assert result.code == 1 and "trainer_state.json` does not exist" in result.err


# --- a process of its own ---


def test_the_exit_code_of_the_process():
    done = subprocess.run(
        [sys.executable, "-m", "hf_moe_ext.cli.main", "inspect", "./nothing"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr.startswith("hf-moe inspect: there is no folder ./nothing")


def test_main_returns_instead_of_exiting():
    assert main(["list", "--help"]) == 0


# --- quantize ---


def test_quantize(hf_moe, saved, tmp_path):
    stock = saved("stock")
    result = hf_moe("quantize", stock, tmp_path / "out", "--experts", "int8", "--linear", "int8", "--leave", "o_proj")
    assert result.code == 0, result.err
    assert "quantized: experts int8, linear layers int8" in result.out and "MB in few bits" in result.out
    assert "bit-equal logits in a clean process" in result.out
    assert AutoConfig.from_pretrained(tmp_path / "out").quantization_config["modules_to_not_convert"] == ["o_proj"]
    difference = (logits(tmp_path / "out") - logits(stock)).abs().max()
    assert 0 < difference < 0.2 * logits(stock).abs().max()
    assert "quantized: experts int8" in hf_moe("inspect", tmp_path / "out").out
    twice = hf_moe("quantize", tmp_path / "out", tmp_path / "again")
    assert twice.code == 1 and "is quantized already" in twice.err


def test_quantize_refuses_and_writes_nothing(hf_moe, saved, tmp_path):
    saved("stock")
    before = tree(tmp_path)
    cases = {
        ("--experts", "fp4"): (2, "must be one of int8, int4, nf4, ternary"),
        ("--experts", "none"): (2, "nothing to quantize"),
        ("--leave", "gate_proj"): (1, "names 'gate_proj', which no module"),
        ("--experts", "int8", "--dry-run"): (0, ""),
    }
    for arguments, (code, message) in cases.items():
        result = hf_moe("quantize", tmp_path / "stock", tmp_path / "out", *arguments)
        assert result.code == code and message in result.err, result.err
    assert tree(tmp_path) == before
