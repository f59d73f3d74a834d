"""A saved model is the same model everywhere: with the package, and by its own code without it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.hub.models import EXTENDED, outputs, token_ids


# Loads every folder, writes the logits down, saves again. Arguments: the test's folder, prefix of the sources, of the
# copies.
STRANGER = """
import sys, importlib.util
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file

assert importlib.util.find_spec("torch") is not None
home, source, copy = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
ids = load_file(home / "ids.safetensors")["ids"]
logits = {}
for auto_class in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
    folder = home / (source + auto_class)
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    for part in (type(model), type(model.config)):
        assert part.__module__.startswith("transformers_modules."), part
    assert isinstance(model.config, type(model).config_class)
    assert isinstance(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True), type(model.config))
    with torch.no_grad():
        output = model(ids)
    logits[auto_class] = output.logits if "logits" in output else output.last_hidden_state
    model.save_pretrained(home / (copy + auto_class))
    if auto_class == "AutoModelForCausalLM":
        with torch.no_grad():
            model.generate(ids, max_new_tokens=2, do_sample=False)
assert not [name for name in sys.modules if name.startswith("hf_moe_ext")]
save_file(logits, home / (copy + "logits.safetensors"))
"""

NO_TRUST = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
"""


@pytest.mark.parametrize("name", EXTENDED)
def test_a_stranger_loads_saves_and_loads_again(name, tmp_path, plugin_free_python):
    from safetensors.torch import save_file

    causal = EXTENDED[name]()
    causal.save_pretrained(tmp_path / "1-AutoModelForCausalLM")
    base = AutoModel.from_pretrained(tmp_path / "1-AutoModelForCausalLM")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "1-AutoModelForCausalLM")
    models = {"AutoModel": base, "AutoModelForCausalLM": causal, "AutoModelForSequenceClassification": classifier}
    for auto_class, model in models.items():
        model.save_pretrained(tmp_path / f"1-{auto_class}")
    save_file({"ids": token_ids()}, tmp_path / "ids.safetensors")
    expected = {auto_class: outputs(model.eval()) for auto_class, model in models.items()}

    for source, copy in (("1-", "2-"), ("2-", "3-")):
        process = plugin_free_python(STRANGER, tmp_path, source, copy)
        assert process.returncode == 0, process.stderr[-3000:]
        found = load_file(tmp_path / f"{copy}logits.safetensors")
        for auto_class in models:
            assert torch.equal(found[auto_class], expected[auto_class]), (copy, auto_class)

    # What a stranger saved, with the package: no `trust_remote_code`.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "3-AutoModelForCausalLM")
    assert type(loaded) is type(causal) and type(loaded.config) is type(causal.config)
    assert torch.equal(outputs(loaded), expected["AutoModelForCausalLM"])
    first, third = (json.loads((tmp_path / f"{i}-AutoModel" / "config.json").read_text()) for i in (1, 3))
    assert first == third

    refused = plugin_free_python(NO_TRUST, tmp_path / "1-AutoModelForCausalLM")
    assert refused.returncode == 1
    assert "trust_remote_code=True" in refused.stderr and "Traceback" in refused.stderr


@pytest.mark.parametrize("name", EXTENDED)
def test_the_package_wins_over_remote_code(name, tmp_path):
    model = EXTENDED[name]()
    model.save_pretrained(tmp_path)

    for options in ({}, {"trust_remote_code": True}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert type(loaded) is type(model) and isinstance(loaded.config, type(loaded).config_class)
        assert torch.equal(outputs(loaded), outputs(model))
