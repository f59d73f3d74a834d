"""The Python code of every page runs, block after block in one namespace, on tiny random models.

A block that cannot run is preceded by `<!-- not run: reason -->`.
"""

from __future__ import annotations

import ast
import doctest
import functools
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import hf_moe_ext.hub as hub
from hf_moe_ext import MoETrainingArguments
from hf_moe_ext.files import check_target, staged_folder
from hf_moe_ext.modeling import moe_families
from hf_moe_ext.verification import Verification
from tests.hub.models import byte_tokenizer

from .conftest import dense_model, extended_model, windows


ROOT = Path(__file__).resolve().parents[2]
