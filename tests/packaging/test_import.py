"""`import hf_moe_ext` is cheap and imports nothing optional."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = {"bitsandbytes", "datasets", "evaluate", "gguf", "kernels", "matplotlib", "peft", "tensorboard", "trackio"}
OPTIONAL |= {"accelerate", "triton", "trl"}

# transformers imports its parts when they are first used. Any program that loads a model uses these two, so they are
# part of what the package is compared with.
MEASURE = """
import json, sys, time
import torch, transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
before = set(sys.modules)
begin = time.process_time()
import hf_moe_ext
seconds = time.process_time() - begin
print(json.dumps({"seconds": seconds, "added": sorted(set(sys.modules) - before)}))
"""


def measure() -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def first_import() -> dict:
    return measure()


def test_import_adds_nothing_optional(first_import):
    assert not OPTIONAL & {name.partition(".")[0] for name in first_import["added"]}


def test_import_adds_only_models_and_the_entry_to_the_kernels(first_import):
    ours = {name for name in first_import["added"] if name.startswith("hf_moe_ext")}

    assert {"hf_moe_ext", "hf_moe_ext.modeling", "hf_moe_ext.kernels.experts"} <= ours
    known = ("hf_moe_ext.modeling", "hf_moe_ext.quantization")  # classes that Transformers looks up by a name
    rest = {name for name in ours - {"hf_moe_ext"} if not name.startswith(known)}
    assert not [name for name in rest if not name.startswith("hf_moe_ext.kernels") or "triton" in name], rest


def test_import_is_fast(first_import):
    """In seconds of the processor, not of the clock; best of several, since a busy machine slows single runs."""
    limit, best = 0.3, first_import["seconds"]
    for _ in range(4):
        if best < limit:
            break
        best = min(best, measure()["seconds"])
    assert best < limit


def test_import_registers_the_model_classes():
    from transformers import AutoConfig

    import hf_moe_ext  # noqa: F401

    assert AutoConfig.for_model("moe_ext_mixtral").model_type == "moe_ext_mixtral"
