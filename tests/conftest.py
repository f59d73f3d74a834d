"""What every test shares: offline, seeded, strict about deprecations."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the flag is read once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MKL_CBWR", "AUTO")  # otherwise MKL rounds by where in memory a matrix begins, which is chance
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import logging
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


if not torch.cuda.is_available():  # before anything imports triton, which looks at it once; torch does so late
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Nothing in a test may depend on the clock: products on a CPU are not chosen by time.
os.environ.setdefault("HF_MOE_EXT_CPU_MATMUL", "rows")
# Bit for bit comparisons need one rule for fused multiply-add; the default of Triton is about to change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

ROOT = Path(__file__).resolve().parents[1]

# Deprecation messages of transformers that are not about our code, as parts of the message.
# The first: how assisted generation calls the assistant.
_TOLERATED_DEPRECATIONS: tuple[str, ...] = ("'min_new_tokens'",)

# Runs before any code of the child process; `sitecustomize` so that grandchildren are bound by it too.
_BLOCK_PLUGIN = """
import sys

class _NoPlugin:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "hf_moe_ext":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)
        return None

sys.meta_path.insert(0, _NoPlugin)
"""


class _FailOnDeprecation(logging.Handler):
    """Turn the deprecation messages that transformers logs (it seldom uses `warnings`) into errors."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        is_deprecation = "is deprecated" in message or "are deprecated" in message or "will be removed in" in message
        if is_deprecation and not any(part in message for part in _TOLERATED_DEPRECATIONS):
            raise FutureWarning(message)


def pytest_configure(config: pytest.Config) -> None:
    logging.getLogger("transformers").addHandler(_FailOnDeprecation(logging.WARNING))
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture
def adapters_of_transformers() -> None:
    """For `model.add_adapter`: some versions of transformers ask for a PEFT that is newer than the one installed."""
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils import check_peft_version

    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and its relatives return with NaN, so that an element nobody writes is seen."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make_poisoned(*args, **kwargs) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if not (tensor.is_floating_point() or tensor.is_complex()):
                return tensor
            with torch.no_grad():
                return tensor.fill_(float("nan"))

        return make_poisoned

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def plugin_free_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess]:
    """Run code in a fresh Python process in which `hf_moe_ext` cannot be imported, as on a stranger's machine.

    `run(code, *args, cwd=None, timeout=300)`; the arguments are `sys.argv[1:]`. The processes of one test share one
    empty cache of remote code. The caller looks at `returncode`, `stdout` and `stderr`.
    """
    home = tmp_path_factory.mktemp("plugin_free")
    blocker, elsewhere = home / "site", home / "cwd"
    blocker.mkdir()
    elsewhere.mkdir()
    (blocker / "sitecustomize.py").write_text(_BLOCK_PLUGIN)
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(home / "modules"),
        "PYTHONPATH": str(blocker),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def run(code: str, *args: object, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            cwd=cwd or elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
