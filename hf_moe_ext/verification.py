"""Is a saved model the model in memory? Load it in a clean process, as a stranger would, and compare logits."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import HF_MODULES_CACHE
from transformers.utils import logging

from . import _clean_process
from .model_card import is_extended
from .quantization.config import quantization_of


logger = logging.get_logger(__name__)

# Largest difference of the logits, relative to the largest logit, that rounding in this dtype explains.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}

# What the tokenizer has to encode alike before and after.
_TEXT = "The sum of 17 and 25 is 42; naïve café 數學 def f(x):\n    return x**2\n"


class VerificationError(RuntimeError):
    """A saved model does not load in a clean process, or does not compute what the model in memory computes."""


@dataclass(frozen=True)
class Verification:
    """What the comparison of a saved model with the one in memory found.

    Attributes:
        max_difference: largest absolute difference of the logits, both computed with the `"eager"` experts.
        max_logit: largest absolute logit, to set the difference against.
        exact: whether the logits are bit-equal. On the CPU they always should be.
        device: where the clean process ran.
        remote_code: whether it needed `trust_remote_code=True`.
        seconds: how long it took.
        needs_package: whether it needed this package, as quantised models do.
    """

    max_difference: float
    max_logit: float
    exact: bool
    device: str
    remote_code: bool
    seconds: float
    needs_package: bool = False

    def __str__(self) -> str:
        found = "bit-equal logits" if self.exact else f"logits differ by at most {self.max_difference:.3g}"
        return f"{found} in a clean process ({self.device}, {self.seconds:.1f} s)"


def verify_folder(folder: str | os.PathLike, model: PreTrainedModel, *, tokenizer: Any = None) -> Verification:
    """Load a saved model in a clean process and compare its logits with those of the model in memory.

    The process cannot import this package (unless the model is quantised by it), has an empty cache of remote code,
    and no network. Extended models are loaded with `trust_remote_code=True`, stock ones plainly. Both sides compute
    with the `"eager"` experts, where equal weights give bit-equal logits on the CPU; the default experts of the clean
    process must agree with them up to rounding.

    Args:
        folder (`str` or `PathLike`):
            What `save_pretrained` wrote.
        model (`PreTrainedModel`):
            The model it was written from.
        tokenizer (*optional*):
            The tokenizer saved along; it must encode a text alike after loading.

    Raises:
        VerificationError: with the cause.
    """
    started = time.perf_counter()
    inputs = _sample_inputs(model)
    with _plain_evaluation(model):
        expected = _clean_process.first_tensor(model(**{name: x.to(model.device) for name, x in inputs.items()}))
    expected = expected.float().cpu()
    request = _request(Path(folder).resolve(), model, tokenizer)
    with tempfile.TemporaryDirectory(prefix="hf_moe_ext_verify_") as scratch:
        found, answer = _run(request, inputs, Path(scratch))
    if answer["class_name"] != type(model).__name__:
        raise VerificationError(f"a {type(model).__name__} was saved, but it loads as a {answer['class_name']}.")
    if tokenizer is not None and answer["ids"] != _encode(tokenizer):
        raise VerificationError("the saved tokenizer encodes text differently from the one in memory.")
    difference = _compare(found, expected, model, request["device"])
    return Verification(
        max_difference=difference,
        max_logit=expected.abs().max().item(),
        exact=torch.equal(found["eager"], expected),
        device=request["device"],
        remote_code=is_extended(model) and request["package"] is None,
        seconds=time.perf_counter() - started,
        needs_package=request["package"] is not None,
    )


def _compare(found: Mapping[str, torch.Tensor], expected: torch.Tensor, model: Any, device: str) -> float:
    tolerance = _TOLERANCES.get(model.dtype, 3e-2) * max(1.0, expected.abs().max().item())
    for kind in ("eager", "default"):
        if found[kind].shape != expected.shape:
            raise VerificationError(
                f"the saved model gives outputs of shape {tuple(found[kind].shape)}, the one in memory "
                f"{tuple(expected.shape)}."
            )
        if not found[kind].isfinite().all() and expected.isfinite().all():
            raise VerificationError(f"the saved model computes NaN or infinite logits (experts: {kind}).")
    difference = (found["eager"] - expected).abs()
    # Rounding may move single tokens to other experts, so other kernels are judged by the bulk of the logits.
    same_kernels = device == model.device.type == "cpu"
    judged = difference.max() if same_kernels else difference.median()
    if judged > tolerance:
        raise VerificationError(
            f"the saved model computes other logits: they differ by up to {difference.max():.3g} "
            f"(rounding in {model.dtype} explains {tolerance:.3g}). Something the model in memory has is not in the "
            "saved files, or a hook changes its outputs."
        )
    if (found["default"] - found["eager"]).abs().median() > tolerance:
        raise VerificationError("the default experts of the clean process compute other logits than the eager ones.")
    if same_kernels and difference.max() > 0:
        logger.warning(
            f"the saved model's logits differ by up to {difference.max():.3g} from those in memory, which rounding in "
            f"{model.dtype} explains: parameters of other dtypes are converted to it when the model is loaded, and "
            f"buffers that are not saved (rotary frequencies) are made anew, not rounded as by `model.to(dtype)`."
        )
    return difference.max().item()


def _run(
    request: dict[str, Any], inputs: dict[str, torch.Tensor], scratch: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    request = {**request, **{name: str(scratch / name) for name in ("inputs", "logits", "answer")}}
    save_file(inputs, request["inputs"])
    (scratch / "request.json").write_text(json.dumps(request))
    hidden = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    if request["device"] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.run(
        [sys.executable, "-I", _clean_process.__file__, str(scratch / "request.json")],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or [f"it ended with exit code {process.returncode}"]
        logger.debug(process.stderr)
        cause = next((line for line in reversed(lines) if "Error" in line), lines[-1])
        raise VerificationError(f"the saved model does not load in a clean process: {cause}")
    return load_file(request["logits"]), json.loads(Path(request["answer"]).read_text())


def _request(folder: Path, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    name = type(model).__name__
    auto_map = getattr(model.config, "auto_map", None) or {}
    auto_class = next((key for key, value in auto_map.items() if value.endswith(f".{name}")), None)
    remote_class = None
    if is_extended(model) and auto_class is None:
        remote_class = f"{type(model).__module__.rpartition('.')[2]}.{name}"
    attention = model.config._attn_implementation
    return {
        "folder": str(folder),
        "class_name": name,
        "auto_class": auto_class,
        "remote_class": remote_class,
        "options": {"attn_implementation": attention} if attention in ("eager", "sdpa") else {},
        "can_choose_experts": model._can_set_experts_implementation(),
        "threads": torch.get_num_threads(),
        "device": _clean_device(model),
        "text": None if tokenizer is None else _TEXT,
        # Not the cache of remote code, which is there once some was loaded: it would hide that of the process.
        "sys_path": [entry for entry in sys.path if entry and entry != HF_MODULES_CACHE],
        "package": None if quantization_of(model.config) is None else str(Path(__file__).resolve().parents[1]),
    }


def _clean_device(model: PreTrainedModel) -> str:
    """The model's device if a second copy fits there, else the CPU."""
    if model.device.type != "cuda" or getattr(model, "hf_device_map", None):
        return "cpu"
    free, _ = torch.cuda.mem_get_info(model.device)
    return str(model.device) if free > 1.5 * model.get_memory_footprint() else "cpu"


def _sample_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A small fixed batch."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name != "input_ids":
        size = getattr(model.config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (1, getattr(model.config, "num_channels", 3), height, width)
        return {model.main_input_name: torch.rand(shape, generator=generator)}
    # Classifiers without a padding token take one row only.
    rows = 1 if config.pad_token_id is None else 2
    special = {
        value
        for values in (vars(config), vars(model.config))
        for key, value in values.items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    plain = torch.tensor([i for i in range(min(config.vocab_size, 10_000)) if i not in special])
    ids = plain[torch.randint(len(plain), (rows, 16), generator=generator)]
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


@contextlib.contextmanager
def _plain_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """No gradients, evaluation mode and the eager experts; afterwards everything is as before."""
    modes = {module: module.training for module in model.modules()}
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    chosen = {key: config._experts_implementation for key, config in configs.items()}
    try:
        model.eval()
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for key, config in configs.items():
            config._experts_implementation = chosen[key]


def _encode(tokenizer: Any) -> list[int]:
    return getattr(tokenizer, "tokenizer", tokenizer)(_TEXT)["input_ids"]
