"""What an upcycling did, and how far the result is from the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .methods import derive_seed


# Largest relative error that is rounding: the sum over experts adds a few roundings per layer to the dense block's.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def rounding_tolerance(dtype: torch.dtype) -> float:
    """Largest relative error that counts as rounding in this precision."""
    return _TOLERANCE.get(dtype, 5e-2)


@dataclass
class UpcycleReport:
    """Record of one upcycling; `to_dict()` is JSON-safe.

    Attributes:
        method, method_options: what made the experts.
        source: name or path of the dense model.
        source_class, result_class: classes of the dense and the resulting model.
        target: `"stock"` or `"ext"`.
        num_experts, num_experts_per_tok: of the result.
        layers: keys of the layers that were converted.
        dense_layers: keys of those that stay dense.
        router: the declared router, `None` for the stock one.
        parts: the declared parts beside it.
        gate_init, seed: as given (`"tensors"` for given weights).
        parameters_before, parameters_after, active_parameters: of the whole model; active is what one token uses.
        measured: what was compared: `"logits"`, `"blocks"` (each converted layer on random input) or `""` for nothing.
        preserves_function: whether the difference is rounding. `None` where nothing was measured.
        max_abs_difference: largest difference of an output.
        relative_error: norm of the difference by norm of the dense output.
        kl_divergence: mean KL(dense || MoE) of the predicted distributions in nats, where there are logits.
        sources: names of the models that were mixed, or of their domains, where there are several.
        note: what a reader should know of the result.
    """

    method: str
    method_options: dict[str, Any]
    source: str
    source_class: str
    result_class: str
    target: str
    num_experts: int
    num_experts_per_tok: int
    layers: list[str]
    dense_layers: list[str] = field(default_factory=list)
    router: dict[str, Any] | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    gate_init: str = "normal"
    seed: int = 0
    parameters_before: int = 0
    parameters_after: int = 0
    active_parameters: int = 0
    measured: str = ""
    preserves_function: bool | None = None
    max_abs_difference: float | None = None
    relative_error: float | None = None
    kl_divergence: float | None = None
    sources: list[str] = field(default_factory=list)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def record(self, measured: str, difference: Difference, tolerance: float) -> None:
        """Enter a measurement."""
        self.measured = measured
        self.max_abs_difference, self.relative_error = difference.max_abs, difference.relative
        self.kl_divergence = difference.kl
        self.preserves_function = difference.relative <= tolerance

    def __str__(self) -> str:
        head = (
            f"{self.source_class} -> {self.result_class} by `{self.method}`: {len(self.layers)} of "
            f"{len(self.layers) + len(self.dense_layers)} layers with {self.num_experts} experts, "
            f"{self.num_experts_per_tok} per token; {self.parameters_before:,} -> {self.parameters_after:,} "
            f"parameters, {self.active_parameters:,} per token"
        )
        if self.preserves_function is None:
            return f"{head}; difference to the dense model not measured."
        verdict = "preserves the dense function" if self.preserves_function else "does not preserve the dense function"
        kl = "" if self.kl_divergence is None else f", KL {self.kl_divergence:.2e} nats"
        return f"{head}; {verdict} (relative error of the {self.measured} {self.relative_error:.2e}{kl})."


@dataclass(frozen=True)
class Difference:
    """How far one output is from another."""

    max_abs: float
    relative: float
    kl: float | None = None


def compare(dense: torch.Tensor, moe: torch.Tensor, *, logits: bool = False) -> Difference:
    """The difference of two outputs of equal shape."""
    dense, moe = dense.double().cpu(), moe.double().cpu()
    difference = dense - moe
    relative = float(difference.norm() / dense.norm().clamp_min(1e-30))
    kl = None
    if logits:
        log_p, log_q = dense.log_softmax(dim=-1), moe.log_softmax(dim=-1)
        kl = max(0.0, float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()))
    return Difference(float(difference.abs().max()), relative, kl)


def worst(differences: Sequence[Difference]) -> Difference:
    """The largest of each number."""
    kls = [difference.kl for difference in differences if difference.kl is not None]
    return Difference(
        max(difference.max_abs for difference in differences),
        max(difference.relative for difference in differences),
        max(kls) if kls else None,
    )


def check_inputs(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """A random batch that any model of a supported family takes."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "check"))
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
        pixels = torch.randn(2, config.num_channels, *size, generator=generator)
        return {"pixel_values": pixels.to(device=model.device, dtype=model.dtype)}
    text = config.get_text_config()
    length = min(16, getattr(text, "max_position_embeddings", None) or 16)
    ids = torch.randint(text.vocab_size, (2, length), generator=generator)
    if (pad := getattr(text, "pad_token_id", None)) is not None:
        # Some families derive the attention mask from padding ids; every token shall count here.
        ids = ids.masked_fill(ids == pad, (pad + 1) % text.vocab_size)
    inputs = {"input_ids": ids.to(model.device)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    return inputs


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """The main output of a model in eval mode, and whether it holds logits."""
    with evaluating(model):
        out = model(**inputs)
    logits = getattr(out, "logits", None)
    return (out[0], False) if logits is None else (logits, True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
