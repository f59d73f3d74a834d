"""Bad input: the message has cause and cure, the exit code is not zero, and nothing is left half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hf_moe_ext.upcycling.safetensors_io import SafetensorsWriter
from tests.cli.conftest import change_config, tree


def commands(model, out) -> dict[str, tuple]:
    """Every command that takes a model."""
    return {
        "inspect": ("inspect", model),
        "generate": ("generate", model, "Hi", "--max_new_tokens", "1"),
        "upcycle": ("upcycle", model, out),
        "extend": ("extend", model, out, "--router", "top_p"),
        "export": ("export", model, out),
        "train": ("train", model, out, "--data", __file__, "--use_cpu"),
    }


ALL = sorted(commands("", ""))
LOADING = [name for name in ALL if name != "inspect"]


@pytest.fixture
def fails(hf_moe, tmp_path):
    """Run a command that must fail, and compare the folder before and after."""

    def run(words, *parts: str, code: int = 1) -> str:
        before = tree(tmp_path)
        result = hf_moe(*words)
        assert result.code == code, result.out + result.err
        assert [part for part in parts if part not in result.err] == [], result.err
        assert tree(tmp_path) == before and not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))
        return result.err

    return run


# --- no model ---


@pytest.mark.parametrize("name", ALL)
def test_a_folder_that_does_not_exist(fails, tmp_path, name):
    folder = tmp_path / "missing" / "model"
    fails(commands(folder, tmp_path / "out")[name], f"there is no folder {folder}. Pass a model folder")


@pytest.mark.parametrize("name", ALL)
def test_a_name_that_no_hub_knows(fails, tmp_path, name):
    fails(commands("nobody/nothing", tmp_path / "out")[name], "no model of that name", "Check the name")


@pytest.mark.parametrize("name", ALL)
def test_a_file(fails, tmp_path, name, book):
    fails(commands(book, tmp_path / "out")[name], "book.txt is a file; expected a model folder")


@pytest.mark.parametrize("name", ALL)
def test_a_folder_without_a_model(fails, tmp_path, name):
    (tmp_path / "empty").mkdir()
    fails(commands(tmp_path / "empty", tmp_path / "out")[name], "holds no config.json, so it is no model folder")


def test_the_folder_around_a_model(fails, saved, tmp_path):
    saved("extended").rename(tmp_path / "model")
    fails(("inspect", tmp_path), f"Did you mean {tmp_path / 'model'}?")


@pytest.mark.parametrize("name", ["inspect", "generate", "upcycle", "export"])
def test_a_missing_gguf_file(fails, tmp_path, name):
    fails(commands(tmp_path / "model.gguf", tmp_path / "out")[name], "there is no GGUF file at")


def test_a_gguf_file_is_not_trained(fails, tmp_path):
    fails(commands("model.gguf", tmp_path / "out")["train"], "`hf-moe upcycle` or `hf-moe export`")


# --- the wrong kind of model ---


def test_a_dense_model_for_a_moe_command(fails, saved, tmp_path):
    dense = saved("dense")
    message = f"is a dense model (llama) without routers. `hf-moe upcycle {dense} OUTPUT`"
    fails(commands(dense, tmp_path / "out")["extend"], message)


@pytest.mark.parametrize("name", ["stock", "extended", "made_from_dense"])
def test_a_moe_for_upcycling(fails, saved, tmp_path, name):
    message = ("is a Mixture-of-Experts already", "only dense models are upcycled", "`hf-moe extend`")
    fails(commands(saved(name), tmp_path / "out")["upcycle"], *message)


@pytest.mark.parametrize("name", ["extended", "made_from_dense"])
def test_extending_twice(fails, saved, tmp_path, name):
    fails(commands(saved(name), tmp_path / "out")["extend"], "is extended already. Start from the stock model")


@pytest.mark.parametrize("name", ["inspect", "upcycle", "extend", "train"])
def test_an_unknown_family(fails, saved, tmp_path, name):
    words = commands(saved("unsupported"), tmp_path / "out")[name]
    fails(words, "the architecture `distilbert`", "not supported. `hf-moe list families` shows those")


@pytest.mark.parametrize("name", ALL)
def test_an_unknown_architecture(fails, saved, tmp_path, name):
    change_config(saved("stock"), model_type="no_such_type")
    fails(commands(tmp_path / "stock", tmp_path / "out")[name], "model type `no_such_type`")


@pytest.mark.parametrize("name", ALL)
def test_remote_code_is_never_asked_about(fails, saved, tmp_path, name):
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    change_config(saved("extended"), model_type="own", auto_map=names)
    words = commands(tmp_path / "extended", tmp_path / "out")[name]
    fails(words, "comes with code of its own. Read it, then pass `--trust_remote_code`")


# --- options ---


def test_more_experts_per_token_than_experts(fails, saved, tmp_path):
    words = commands(saved("dense"), tmp_path / "out")["upcycle"]
    fails((*words, "--num_experts", "2", "--num_experts_per_tok", "3"), "`num_experts_per_tok` (3) must not exceed")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--router", "top_pp"), 2, "unknown router type `top_pp`"),
        (("--router", "top_p:threshold"), 2, "expected `name:key=value,key=value`"),
        (("--router", "{"), 2, "not valid JSON"),
        (("--router", "top_p", "--target", "stock"), 1, '`target="stock"` cannot hold a declared router'),
        (("--method", "dense"), 1, "dense"),
        (("--method", "granular", "--granularity", "5"), 1, "granularity"),
        (("--layers", "7"), 1, "7"),
        (("--layers", "odd"), 1, "odd"),
        (("--gate_init", "nice"), 1, "unknown gate_init `nice`"),
        (("--gate_init", "hidden"), 2, "`--gate_init hidden` needs `--gate_prompts FILE`"),
        (("--gate_prompts", "nowhere.yaml"), 2, "`--gate_prompts` nowhere.yaml cannot be read"),
        (("--num_experts", "0"), 1, "`num_experts` must be a positive integer"),
        (("--drop_ratio", "0.5"), 1, "drop_ratio"),
        (("--target", "sotck"), 1, "`target` must be"),
        (("--num_expert", "4"), 2, "Did you mean `--num_experts`?"),
    ],
)
def test_upcycling_options(fails, saved, tmp_path, options, code, message):
    words = commands(saved("dense"), tmp_path / "out")["upcycle"]
    fails((*words, *options), message, code=code)


def test_prompts_that_are_no_lists(fails, saved, tmp_path):
    (tmp_path / "prompts.yaml").write_text("one: two\n")
    words = commands(saved("dense"), tmp_path / "out")["upcycle"]
    fails((*words, "--gate_prompts", tmp_path / "prompts.yaml"), "must hold one list of texts for each expert", code=2)


@pytest.mark.parametrize("name", ["upcycle", "extend", "export"])
def test_a_target_that_holds_a_model(hf_moe, saved, tmp_path, name):
    source, target = saved("dense" if name == "upcycle" else "stock"), saved("extended")
    before = tree(tmp_path)
    result = hf_moe(*commands(source, target)[name])
    assert result.code == 1 and "already holds a model. Choose another folder, or pass `--overwrite`" in result.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["upcycle", "extend", "export"])
def test_a_target_that_holds_something_else(hf_moe, saved, tmp_path, name):
    source, target = saved("dense" if name == "upcycle" else "stock"), tmp_path / "thesis"
    target.mkdir()
    (target / "chapter.tex").write_text("years of work")
    before = tree(tmp_path)
    result = hf_moe(*commands(source, target)[name], "--overwrite")
    assert result.code == 1 and "holds files, but no model" in result.err and tree(tmp_path) == before


@pytest.mark.parametrize("name", ["upcycle", "extend", "export", "train"])
def test_a_target_below_a_file(fails, saved, tmp_path, name, book):
    source = saved("dense" if name == "upcycle" else "stock")
    fails(commands(source, book / "out")[name], "book.txt` is a file" if name != "train" else "book.txt is a file")


# --- damaged models ---


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str (value: 'wide')"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"model_type": None}, "Should have a `model_type` key in its config.json"),
        ({"num_key_value_heads": 0}, "holds a wrong value"),
    ],
    ids=["str for int", "int for dict", "no type", "zero"],
)
def test_a_config_of_wrong_values(fails, saved, tmp_path, name, values, message):
    folder = saved("dense" if name == "upcycle" else "stock")
    change_config(folder, **values)
    fails(commands(folder, tmp_path / "out")[name], message, str(folder))


@pytest.mark.parametrize("name", ALL)
def test_a_config_that_is_no_json(fails, saved, tmp_path, name):
    (saved("stock") / "config.json").write_text('{"model_type": ')
    fails(commands(tmp_path / "stock", tmp_path / "out")[name], "config.json", "not a valid JSON file")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router": {"type": "top_pp"}}, "unknown router type `top_pp`"),
        ({"router": {"type": "top_p", "max_slots": "two"}}, "`max_slots` of TopPRouterConfig must be int or null"),
        ({"version": 9}, "format version 9"),
        ("top_p", "`moe_ext` must be a JSON object"),
    ],
)
@pytest.mark.parametrize("name", ["inspect", "generate", "export", "train"])
def test_a_damaged_declaration(fails, saved, tmp_path, name, values, message):
    change_config(saved("extended"), moe_ext=values)
    fails(commands(tmp_path / "extended", tmp_path / "out")[name], message)


@pytest.mark.parametrize("name", LOADING)
@pytest.mark.parametrize("kind", ["cut off", "garbage", "empty"])
def test_a_damaged_shard(fails, saved, tmp_path, name, kind):
    folder = saved("dense" if name == "upcycle" else "stock")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut off": data[: len(data) // 2], "garbage": b"garbage" * 99, "empty": b""}[kind])
    fails(commands(folder, tmp_path / "out")[name], f"cannot read {path}", "damaged or cut off; get it anew")


@pytest.mark.parametrize("name", LOADING)
def test_no_weights(fails, saved, tmp_path, name):
    folder = saved("dense" if name == "upcycle" else "stock")
    (folder / "model.safetensors").unlink()
    fails(commands(folder, tmp_path / "out")[name], "model.safetensors")


@pytest.mark.parametrize("name", [name for name in LOADING if name != "upcycle"])
def test_a_missing_weight(fails, saved, tmp_path, name):
    path = saved("stock") / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    fails(commands(path.parent, tmp_path / "out")[name], "model.layers.1.self_attn.q_proj.weight", "get both anew")


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ],
)
def test_a_missing_weight_of_a_dense_model(fails, saved, tmp_path, tensor):
    path = saved("dense") / "model.safetensors"
    weights = load_file(path)
    del weights[tensor]
    save_file(weights, path, {"format": "pt"})
    fails(commands(path.parent, tmp_path / "out")["upcycle"], tensor)


@pytest.mark.parametrize("name", LOADING)
def test_weights_of_other_shapes(fails, saved, tmp_path, name):
    folder = saved("dense" if name == "upcycle" else "stock")
    change_config(folder, vocab_size=300)
    expected = "asks for" if name == "upcycle" else "have other shapes than its config.json asks for"
    fails(commands(folder, tmp_path / "out")[name], expected)


@pytest.mark.parametrize("name", ["generate", "extend", "export", "train"])
def test_a_damaged_tokenizer(fails, saved, tmp_path, name):
    folder = saved("stock")
    (folder / "tokenizer.json").write_text("{")
    fails(commands(folder, tmp_path / "out")[name], f"the tokenizer of {folder} cannot be loaded", "get them anew")


# --- what happens while something is written ---


def _half_a_file(error):
    def save(tensors, filename, *args, **kwargs):
        Path(filename).write_bytes(b"half")
        raise error

    return save


FAILURES = pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device"), 1, "nothing was left behind"),
        (KeyboardInterrupt(), 130, "interrupted. Finished files are whole"),
    ],
    ids=["full disk", "ctrl-c"],
)


@FAILURES
@pytest.mark.parametrize("name", ["extend", "export"])
def test_a_save_that_fails(fails, saved, tmp_path, monkeypatch, name, error, code, message):
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", _half_a_file(error))
    fails(commands(saved("stock"), tmp_path / "out")[name], message, code=code)


@FAILURES
def test_a_save_that_fails_keeps_the_old_model(hf_moe, saved, tmp_path, monkeypatch, error, code, message):
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", _half_a_file(error))
    source, target = saved("stock"), saved("extended")
    before = tree(tmp_path)
    result = hf_moe(*commands(source, target)["export"], "--overwrite")
    assert result.code == code and message in result.err and tree(tmp_path) == before


@FAILURES
def test_streaming_that_fails(fails, saved, tmp_path, monkeypatch, error, code, message):
    write, calls = SafetensorsWriter.write, []

    def failing(self, name, tensor):
        calls.append(name)
        if len(calls) == 5:
            raise error
        write(self, name, tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", failing)
    fails(commands(saved("dense"), tmp_path / "out")["upcycle"], message, code=code)
    assert len(calls) == 5
