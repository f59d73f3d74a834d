"""PEFT asks for `is_gradient_checkpointing`, which transformers 5.23 deprecates."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def _quiet_peft():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield
