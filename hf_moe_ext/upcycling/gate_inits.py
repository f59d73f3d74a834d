"""Initial weights of the gates. Every way is one registered function in this file.

A gate's weight is (E, H), one row per copy of the dense block; methods that cut a copy into slices repeat its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling.configuration_moe_ext import _unknown
from .clustering import kmeans
from .methods import derive_seed
from .report import evaluating


logger = logging.get_logger(__name__)

# Above this condition number of a layer's gate, some experts are told apart by little but noise (as in mergekit).
_CONDITION_LIMIT = 5.0


@dataclass(frozen=True)
class GateRequest:
    """What a gate initialisation may use.

    Attributes:
        hidden_sizes: H by layer key.
        num_experts: E, rows of each gate.
        seed: of everything random.
        sites: by layer key, the module in the dense model whose input the gate will see. Empty where no model is at
            hand (a checkpoint is converted on disk).
        model: the dense model, or `None`.
        prompts, negative_prompts: texts for each expert.
        tokenizer: turns them into ids.
        hidden_states: (n, H) inputs of the block by layer key, from `calibration` data, for functions that were
            registered as `calibrated`; else empty.
    """

    hidden_sizes: dict[str, int]
    num_experts: int
    seed: int
    sites: dict[str, nn.Module]
    model: PreTrainedModel | None = None
    prompts: Sequence[Sequence[str]] | None = None
    negative_prompts: Sequence[Sequence[str]] | None = None
    tokenizer: Any = None
    hidden_states: dict[str, torch.Tensor] = field(default_factory=dict)

    def generator(self, key: str, purpose: str) -> torch.Generator:
        """A generator of its own for each layer."""
        return torch.Generator().manual_seed(derive_seed(self.seed, key, purpose))


GateInit = Callable[[GateRequest], dict[str, torch.Tensor]]
_GATE_INITS: dict[str, GateInit] = {}
_CALIBRATED: set[str] = set()


def register_gate_init(
    name: str, *, exist_ok: bool = False, calibrated: bool = False
) -> Callable[[GateInit], GateInit]:
    """Decorator that makes a function known as `upcycle(..., gate_init=name)`: `GateRequest` -> (E, H) float32 weights
    by layer key.

    Args:
        name (`str`):
            Lower-case name with underscores.
        exist_ok (`bool`, *optional*, defaults to `False`):
            Whether an existing function of that name may be replaced.
        calibrated (`bool`, *optional*, defaults to `False`):
            Whether it looks at `hidden_states`, which takes a pass over `calibration` data.

    Raises:
        ValueError: for a name that is taken or not in lower case.
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"a gate init's name must be lower-case letters, digits and underscores, got {name!r}.")
    if name in _GATE_INITS and not exist_ok:
        raise ValueError(f"a gate init named `{name}` is registered already.")

    def decorate(function: GateInit) -> GateInit:
        _GATE_INITS[name] = function
        (_CALIBRATED.add if calibrated else _CALIBRATED.discard)(name)
        return function

    return decorate


def get_gate_init(name: str) -> GateInit:
    """The function registered under `name`.

    Raises:
        ValueError: for an unknown name.
    """
    if not isinstance(name, str) or name not in _GATE_INITS:
        raise ValueError(_unknown("gate_init", str(name), _GATE_INITS))
    return _GATE_INITS[name]


def is_calibrated(init: str | dict[str, torch.Tensor]) -> bool:
    """Whether a gate initialisation needs `calibration` data."""
    return isinstance(init, str) and init in _CALIBRATED


def list_gate_inits() -> dict[str, GateInit]:
    """All registered functions by name, sorted."""
    return dict(sorted(_GATE_INITS.items()))


@register_gate_init("normal")
def _normal(request: GateRequest) -> dict[str, torch.Tensor]:
    """N(0, 0.02), as most published upcycled models."""
    return {
        key: 0.02 * torch.randn(request.num_experts, size, generator=request.generator(key, "gate"))
        for key, size in request.hidden_sizes.items()
    }


@register_gate_init("uniform")
def _uniform(request: GateRequest) -> dict[str, torch.Tensor]:
    """U(-1/sqrt(H), 1/sqrt(H)), the default of a linear layer (mergekit's `uniform_random`)."""
    return {
        key: (2 * torch.rand(request.num_experts, size, generator=request.generator(key, "gate")) - 1) * size**-0.5
        for key, size in request.hidden_sizes.items()
    }


@register_gate_init("zeros")
def _zeros(request: GateRequest) -> dict[str, torch.Tensor]:
    """All experts alike. Top-k then breaks ties always the same way: add `gate_noise`."""
    return {key: torch.zeros(request.num_experts, size) for key, size in request.hidden_sizes.items()}


@register_gate_init("hidden")
def _hidden(request: GateRequest) -> dict[str, torch.Tensor]:
    """Direction of the last token's state, averaged over each expert's prompts (mergekit's `hidden`).

    mergekit takes the residual stream at the layer's input, and `[-1]` even where that is padding. Here it is what the
    gate will multiply (after attention and norm), and prompts run one by one, without padding.
    """
    return _from_states(request, lambda states: states[-1])


@register_gate_init("hidden_avg")
def _hidden_avg(request: GateRequest) -> dict[str, torch.Tensor]:
    """As `hidden`, averaged over the tokens of a prompt."""
    return _from_states(request, lambda states: states.mean(dim=0))


@register_gate_init("cheap_embed")
def _cheap_embed(request: GateRequest) -> dict[str, torch.Tensor]:
    """Direction of the summed token embeddings of each expert's prompts; the same in all layers. Needs no forward."""
    model, positive, negative = _prompts(request, "cheap_embed")
    embed = model.get_input_embeddings()
    if len(set(request.hidden_sizes.values()) | {embed.weight.shape[1]}) > 1:
        raise ValueError(
            f'`gate_init="cheap_embed"` needs embeddings as wide as the gates; they have {embed.weight.shape[1]}, the '
            f"gates {sorted(set(request.hidden_sizes.values()))}."
        )

    def vector(texts: Sequence[str]) -> torch.Tensor:
        ids = torch.cat([_ids(request, text) for text in texts]).to(embed.weight.device)
        return embed.weight.detach()[ids].float().sum(dim=0).cpu()

    rows = torch.stack([vector(texts) for texts in positive])
    if negative is not None:
        rows = rows - torch.stack([vector(texts) for texts in negative])
    weight = _unit(rows)
    _warn_if_alike(weight, "all")
    return {key: weight.clone() for key in request.hidden_sizes}


@register_gate_init("centroid", calibrated=True)
def _centroid(request: GateRequest) -> dict[str, torch.Tensor]:
    """Centres of clusters of the gate's inputs, by direction (LLaMA-MoE v2, 2411.15708): k-means of unit vectors, and
    rows of unit length, so that a token's largest logit is that of the nearest centre."""
    weights = {}
    for key in request.hidden_sizes:
        states = F.normalize(request.hidden_states[key].float(), dim=1)
        if len(states) < request.num_experts:
            raise ValueError(
                f'`gate_init="centroid"` needs at least as many tokens as the {request.num_experts} experts; '
                f"`calibration` has {len(states)}."
            )
        seed = derive_seed(request.seed, key, "gate")
        weights[key] = _unit(kmeans(states, request.num_experts, seed))
        _warn_if_alike(weights[key], f'"{key}"', "the centres of some clusters")
    return weights


def _from_states(request: GateRequest, pool: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    model, positive, negative = _prompts(request, "hidden")

    def means(groups: Sequence[Sequence[str]]) -> dict[str, torch.Tensor]:
        per_expert = [[_gate_inputs(request, model, text, pool) for text in texts] for texts in groups]
        return {
            key: torch.stack([torch.stack([state[key] for state in states]).mean(dim=0) for states in per_expert])
            for key in request.sites
        }

    rows = means(positive)
    if negative is not None:
        away = means(negative)
        rows = {key: value - away[key] for key, value in rows.items()}
    weights = {key: _unit(value) for key, value in rows.items()}
    for key, weight in weights.items():
        _warn_if_alike(weight, f'"{key}"')
    return weights


@torch.no_grad()
def _gate_inputs(
    request: GateRequest, model: PreTrainedModel, text: str, pool: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}

    def remember(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[key] = pool(args[0].reshape(-1, args[0].shape[-1]).float()).cpu()

        return hook

    handles = [module.register_forward_pre_hook(remember(key)) for key, module in request.sites.items()]
    ids = _ids(request, text)[None].to(model.device)
    try:
        with evaluating(model):
            kwargs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            model(input_ids=ids, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _ids(request: GateRequest, text: str) -> torch.Tensor:
    ids = torch.as_tensor(request.tokenizer(text)["input_ids"], dtype=torch.long)
    if ids.numel() == 0:
        raise ValueError(f"the tokenizer made no token of the prompt {text!r}.")
    return ids


def _prompts(
    request: GateRequest, name: str
) -> tuple[PreTrainedModel, Sequence[Sequence[str]], Sequence[Sequence[str]] | None]:
    if request.model is None:
        raise ValueError(
            f'`gate_init="{name}"` runs the dense model, which is not loaded here. Use `upcycle(model, ...)`, or pass '
            "tensors by layer key as `gate_init`."
        )
    if request.prompts is None or request.tokenizer is None:
        raise ValueError(
            f'`gate_init="{name}"` needs `gate_prompts=[["...", ...], ...]`, one list of texts for each expert, and '
            "`tokenizer=...`."
        )
    if request.model.main_input_name != "input_ids":
        raise ValueError(f'`gate_init="{name}"` reads texts, which {type(request.model).__name__} does not take.')
    for option, groups in (("gate_prompts", request.prompts), ("negative_prompts", request.negative_prompts)):
        if groups is None:
            continue
        if len(groups) != request.num_experts or any(isinstance(texts, str) or not texts for texts in groups):
            raise ValueError(
                f"`{option}` must hold one non-empty list of texts for each of the {request.num_experts} experts, got "
                f"{len(groups)} entries."
            )
    return request.model, request.prompts, request.negative_prompts


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _warn_if_alike(weight: torch.Tensor, where: str, what: str = "") -> None:
    condition = float(torch.linalg.cond(weight))
    if weight.shape[0] <= weight.shape[1] and condition > _CONDITION_LIMIT:
        advice = "use data that differs more, or fewer experts"
        if not what:
            what, advice = "the prompts of some experts", "use prompts that differ more, or `negative_prompts`"
        logger.warning_once(
            f"{what} give nearly the same gate rows (layers: {where}, condition number {condition:.1f}); {advice}."
        )


def make_gates(init: str | dict[str, torch.Tensor], request: GateRequest, noise: float) -> dict[str, torch.Tensor]:
    """Gate weights by layer key: those given, or made by the registered function, plus `noise` times N(0, 1).

    Raises:
        ValueError: for an unknown name, missing prompts, or tensors that do not fit.
    """
    if isinstance(init, dict):
        gates = {str(key): value.detach().float().cpu() for key, value in init.items()}
        for key, size in request.hidden_sizes.items():
            shape = tuple(gates[key].shape) if key in gates else "nothing"
            if shape != (request.num_experts, size):
                raise ValueError(
                    f'`gate_init` must hold a ({request.num_experts}, {size}) tensor for layer "{key}", got {shape}.'
                )
    else:
        gates = get_gate_init(init)(request)
    if noise:
        gates = {
            key: gate + noise * torch.randn(gate.shape, generator=request.generator(key, "gate_noise"))
            for key, gate in gates.items()
        }
    return gates
