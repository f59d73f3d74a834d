"""DoLa: the last layer against an earlier one that says something else (2309.03883)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import LogitsProcessor

from .decoding import check_strengths, refuse_beams, sample


_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "embedding_norm")


def dola(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    layers: str | Sequence[int] = "high",
    alpha: float = 0.1,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode with `log p(last layer) - log p(earlier layer)`, for `model.generate(..., custom_generate=dola)`.

    At each step and in each row the earlier layer is the one whose distribution is furthest from the last one's
    (Jensen-Shannon divergence). Distributions of earlier layers are those of the head behind the final norm, as the
    head was trained to be; without the norm, as in some implementations, they are close to noise. The paper sets
    `repetition_penalty=1.2`, which is an argument of `generate`.

    Args:
        layers (`str` or sequence of `int`, *optional*, defaults to `"high"`):
            Earlier layers to choose among, by the number of layers computed (0 is the embedding): even ones of the
            lower half (`"low"`) or of the upper half (`"high"`), or these.
        alpha (`float`, *optional*, defaults to 0.1):
            Tokens below `alpha` times the highest probability of the last layer are not considered.

    Raises:
        ValueError: for beams, an encoder-decoder model, layers that do not exist, or a model whose logits are not its
            head applied to a normed state.
    """
    check_strengths(0, alpha)
    refuse_beams(generation_config, "dola")
    if model.config.is_encoder_decoder:
        raise ValueError("`dola` is for decoder-only models.")
    count = model.config.get_text_config().num_hidden_layers
    chosen = _layers(layers, count)
    processor = _Dola(model, chosen, alpha)
    with processor.watching():
        return sample(
            model,
            input_ids,
            logits_processor=LogitsProcessorList([processor, *logits_processor]),
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            streamer=streamer,
            **model_kwargs,
        )


def _layers(layers: str | Sequence[int], count: int) -> list[int]:
    if layers == "low":
        return list(range(0, max(count // 2, 1), 2))
    if layers == "high":
        return list(range(count // 2 + count // 2 % 2, count, 2)) or [count - 1]
    if isinstance(layers, str) or not layers or any(not 0 <= layer < count for layer in layers):
        raise ValueError(f"`layers` must be 'low', 'high' or numbers from 0 to {count - 1}, got {layers!r}.")
    return sorted(set(layers))


class _Dola(LogitsProcessor):
    def __init__(self, model: PreTrainedModel, layers: list[int], alpha: float) -> None:
        self.model, self.layers, self.alpha = model, layers, alpha
        self.head: Any = model.get_output_embeddings()
        self.norm = _final_norm(model)
        self.states: list[torch.Tensor] = []
        self.checked = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the states of the last position of each forward."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            self.asked = kwargs.get("output_hidden_states")
            return args, {**kwargs, "output_hidden_states": True}

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states = output.hidden_states
            self.states = [states[layer][:, -1] for layer in (*self.layers, -1)]

        handles = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        *earlier, final = self.states
        if not self.checked:  # once: the head may do more than this, such as a bound on the logits
            again = self.head(final).float()
            if not torch.allclose(again.to(scores.device), scores.float(), rtol=1e-2, atol=1e-2 * float(scores.std())):
                raise ValueError(
                    f"the logits of {type(self.model).__name__} are not its head applied to the last hidden state, so "
                    "`dola` cannot tell what an earlier layer says."
                )
            self.checked = True
        last = scores.float().log_softmax(dim=-1)
        others = torch.stack([self.head(self.norm(state)).float() for state in earlier]).to(last.device)
        others = others.log_softmax(dim=-1)  # (L, B, V)
        middle = (0.5 * (others.exp() + last.exp())).log()
        divergence = 0.5 * (
            (last.exp() * (last - middle)).sum(dim=-1) + (others.exp() * (others - middle)).sum(dim=-1)
        )
        best = divergence.argmax(dim=0)  # (B,)
        chosen = others[best, torch.arange(len(best), device=best.device)]
        out = last - chosen
        if self.alpha > 0:
            out = out.masked_fill(last < last.amax(dim=-1, keepdim=True) + math.log(self.alpha), float("-inf"))
        return out


def _final_norm(model: PreTrainedModel) -> nn.Module:
    decoder: Any = model.get_decoder()
    for name in _NORMS:
        if isinstance(getattr(decoder, name, None), nn.Module):
            return getattr(decoder, name)
    raise ValueError(f"no final norm was found in {type(decoder).__name__}, looking for {', '.join(_NORMS)}.")
