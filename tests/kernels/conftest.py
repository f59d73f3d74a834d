"""Without a GPU the Triton kernels run in Triton's interpreter, chosen before anything imports triton."""

import os
import sys

import pytest
import torch


NEEDS_INTERPRETER = not torch.cuda.is_available()
TOO_LATE = NEEDS_INTERPRETER and "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"

if NEEDS_INTERPRETER:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Bit for bit comparisons need one rule for fused multiply-add; the default of Triton is about to change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> None:
    """Triton's own functions are made for the interpreter, or not, when it is imported: torch may have done that."""
    if TOO_LATE:
        pytest.fail("triton was imported before TRITON_INTERPRET=1 was set: set it in the environment of the tests.")
