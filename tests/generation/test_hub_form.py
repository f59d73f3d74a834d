"""The exported form of self-contrast: the same tokens in a process where this package cannot be imported."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tiny_models import tiny_model

import hf_moe_ext as moe
from hf_moe_ext.generation import self_contrast
from hf_moe_ext.hub import export
from tests.generation.test_self_contrast import GREEDY, Collected, random_ids, run


STRANGER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
def state():
    return [(type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
before = state()
settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
found = {
    "by place": model.generate(ids, beta=2.0, **settings),
    "by name": model.generate(input_ids=ids, beta=2.0, alpha=0.1, weak="rank-2", **settings),
    "topk-1": model.generate(ids, beta=2.0, weak="topk-1", **settings),
    "defaults": model.generate(ids, **settings),
    "greedy": model.generate(ids, beta=0.0, **settings),
}
torch.manual_seed(0)
found["sampled"] = model.generate(ids, **{**settings, "do_sample": True, "top_k": 0, "num_return_sequences": 2})
stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code="moe_ext" in type(model).__module__)
if "generate" in vars(stock):
    del stock.generate
found["by folder"] = stock.generate(ids, custom_generate=folder, trust_remote_code=True, beta=2.0, **settings)
found["after"] = stock.generate(ids, **settings)
for name in ("beta", "weak"):
    try:
        model.generate(ids, **{name: -1}, **settings)
    except ValueError as error:
        assert f"`{name}`" in str(error), error
    else:
        raise AssertionError(name)
assert state() == before
assert not [name for name in sys.modules if name.startswith("hf_moe_ext")]
print(json.dumps({name: ids.tolist() for name, ids in found.items()}))
"""


def expected(model, ids):
    torch.manual_seed(0)
    sampled = run(model, ids, do_sample=True, top_k=0, num_return_sequences=2)
    found = {
        "by place": run(model, ids, beta=2.0),
        "topk-1": run(model, ids, beta=2.0, weak="topk-1"),
        "defaults": run(model, ids),
        "greedy": model.generate(ids, max_new_tokens=8, **GREEDY),
        "sampled": sampled,
    }
    found |= {"by name": found["by place"], "by folder": found["by place"], "after": found["greedy"]}
    return {name: ids.tolist() for name, ids in found.items()}


def models():
    yield "mixtral", lambda: tiny_model("mixtral")
    yield "qwen3_moe", lambda: tiny_model("qwen3_moe", norm_topk_prob=False)
    yield "deepseek_v3", lambda: tiny_model("deepseek_v3")
    yield "extended", lambda: moe.extend(tiny_model("mixtral"), moe.TopKRouterConfig(num_experts_per_tok=3))


MODELS = dict(models())


@pytest.mark.parametrize("name", MODELS)
def test_a_stranger_gets_the_same_tokens(name, tmp_path, plugin_free_python):
    model, ids = MODELS[name](), random_ids(2)
    wanted = expected(model, ids)
    export(model, tmp_path / "model", custom_generate="self_contrast", verify=False)
    out = plugin_free_python(STRANGER, str(tmp_path / "model"), json.dumps(ids.tolist()))
    assert out.returncode == 0, out.stderr[-3000:]
    found = json.loads(out.stdout.strip().splitlines()[-1])
    assert found == wanted
    assert wanted["by place"] != wanted["greedy"] and wanted["by place"] != wanted["topk-1"]


def test_streamer_and_stop_strings_reach_it(tmp_path, word_tokenizer):
    from transformers import AutoModelForCausalLM

    model, ids = tiny_model("mixtral"), random_ids(1)
    export(model, tmp_path / "model", custom_generate="self_contrast", verify=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    streamer = Collected()
    out = loaded.generate(ids, max_new_tokens=5, streamer=streamer, **GREEDY)
    assert streamer.ended and torch.equal(torch.cat([part.flatten() for part in streamer.parts]), out[0])
    word = word_tokenizer.decode(out[0, -2:-1])
    stopped = loaded.generate(ids, max_new_tokens=9, tokenizer=word_tokenizer, stop_strings=[word], **GREEDY)
    assert stopped[0, -1] == out[0, -2]


def test_without_trust_nothing_of_it_runs(tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = tiny_model("mixtral"), random_ids(1)
    export(model, tmp_path / "model", custom_generate="self_contrast", verify=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(
        loaded.generate(ids, max_new_tokens=4, **GREEDY), model.generate(ids, max_new_tokens=4, **GREEDY)
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        loaded.generate(ids, custom_generate=str(tmp_path / "model"), trust_remote_code=False)


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda: tiny_model("mixtral"), "dola", "must be \"self_contrast\", got 'dola'"),
        (lambda: tiny_model("dbrx"), "self_contrast", "does not take its choice from a gate"),
        (lambda: tiny_model("switch_transformers"), "self_contrast", "no decoder-only model"),
        (lambda: moe.extend(tiny_model("mixtral"), moe.TopPRouterConfig()), "self_contrast", r"not \['top_p'\]"),
    ],
)
def test_what_is_refused_before_anything_is_written(make, name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(make(), tmp_path / "model", custom_generate=name, verify=False)
    assert not any(tmp_path.iterdir())


def test_the_package_and_the_file_agree_on_what_is_imported():
    """The exported files import torch, transformers and each other alone."""
    import ast
    from pathlib import Path

    import hf_moe_ext.generation.hub_generate as file

    for path in (Path(file.__file__), Path(file.__file__).with_name("decoding.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 or node.module == "decoding", ast.unparse(node)
                names = [node.module] if node.level == 0 else []
            roots = {name.split(".")[0] for name in names}
            assert roots <= {"torch", "transformers", *sys.stdlib_module_names}, roots
    assert self_contrast.__kwdefaults__["beta"] == 0.5
