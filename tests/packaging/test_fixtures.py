"""The shared fixtures do what they promise."""

import logging

import pytest
import torch


def test_poisoned_memory_is_nan(poison_memory):
    x = torch.ones(3)

    for made in (torch.empty(2, 3), torch.empty_like(x), torch.empty_strided((2,), (1,)), x.new_empty(4)):
        assert made.isnan().all()
    assert torch.empty(2, dtype=torch.bfloat16).isnan().all()
    assert torch.empty(2, dtype=torch.int64).dtype == torch.int64
    assert torch.empty(2, device="meta").is_meta
    assert not torch.nn.Linear(2, 2).weight.isnan().any()


def test_memory_is_not_poisoned_without_the_fixture():
    assert torch.empty.__module__ != __name__ and "poisoned" not in repr(torch.empty)
    assert "new_empty" not in vars(torch.Tensor)


def test_seeds_are_fixed():
    assert torch.initial_seed() == 0


def test_plugin_free_python_cannot_import_the_plugin(plugin_free_python):
    code = """
import os, subprocess, sys
print(sys.argv[1:], os.environ["HF_HUB_OFFLINE"])
child = subprocess.run([sys.executable, "-c", "import hf_moe_ext"], capture_output=True, text=True)
assert "blocked by the test" in child.stderr
import hf_moe_ext.modeling
"""
    process = plugin_free_python(code, "a", 1)

    assert process.stdout.strip() == "['a', '1'] 1"
    assert process.returncode == 1 and "No module named 'hf_moe_ext" in process.stderr


def test_plugin_free_python_runs_where_it_is_told(plugin_free_python, tmp_path):
    process = plugin_free_python("import os; print(os.getcwd())", cwd=tmp_path)

    assert process.stdout.strip() == str(tmp_path) and process.returncode == 0


def test_deprecations_that_transformers_logs_are_errors():
    with pytest.raises(FutureWarning, match="`old` is deprecated"):
        logging.getLogger("transformers.models").warning("`old` is deprecated, use `new`")
