"""One pass over data for all operations that look at activations: what goes into the feed-forward blocks, what their
neurons do, and how much the loss cares.

    neurons = NeuronMagnitude()
    calibrate(model, {"code": [...], "law": [...]}, [neurons], tokenizer=tokenizer)
    neurons.means["code"]["0"]        # mean |activation| of every neuron of layer 0 on code

A collector is a small class that is shown one layer of one batch at a time, so nothing is stored but what it keeps.
Axes: n tokens of a batch (padding left out), H hidden, I neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .modeling.moe_families import get_by_path, get_family, has_path, iter_layers
from .modeling.moe_structure import dense_linears
from .upcycling.report import evaluating


Batch = Mapping[str, torch.Tensor]
_ALL = "all"  # name of the domain where the data has none


class Collector:
    """Base of the collectors. `add` is called once for each layer and batch.

    Attributes (of the class):
        needs_gradients: whether it wants the gradient of the language-modelling loss at the neurons.
    """

    needs_gradients: ClassVar[bool] = False

    def add(self, key: str, domain: str, hidden: torch.Tensor, neurons: torch.Tensor, gradient: Any) -> None:
        """Take in one layer of one batch.

        Args:
            key: of the layer.
            domain: of the batch.
            hidden: (n, H), the input of the feed-forward block.
            neurons: (n, I), the input of its down projection.
            gradient: (n, I), that of the loss, summed over the batch's tokens; `None` unless `needs_gradients`.
        """
        raise NotImplementedError


class NeuronMagnitude(Collector):
    """Mean absolute activation of every neuron, by domain and layer: `means[domain][key]` (I,) in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, torch.Tensor]] = {}
        self._counts: dict[str, dict[str, int]] = {}

    def add(self, key: str, domain: str, hidden: torch.Tensor, neurons: torch.Tensor, gradient: Any) -> None:
        sums, counts = self._sums.setdefault(domain, {}), self._counts.setdefault(domain, {})
        part = neurons.abs().sum(0, dtype=torch.float64)
        sums[key] = part if key not in sums else sums[key] + part
        counts[key] = counts.get(key, 0) + len(neurons)

    @property
    def means(self) -> dict[str, dict[str, torch.Tensor]]:
        """(I,) by domain and layer."""
        return {
            domain: {key: total / self._counts[domain][key] for key, total in sums.items()}
            for domain, sums in self._sums.items()
        }


class GradientImportance(Collector):
    """Mean of `|activation * gradient of the loss|` of every neuron, by domain and layer: what the loss would change
    by without it, to first order. `means[domain][key]` (I,) in float64."""

    needs_gradients = True

    def __init__(self) -> None:
        self._magnitude = NeuronMagnitude()

    def add(self, key: str, domain: str, hidden: torch.Tensor, neurons: torch.Tensor, gradient: Any) -> None:
        self._magnitude.add(key, domain, hidden, neurons.double() * gradient.double(), None)

    @property
    def means(self) -> dict[str, dict[str, torch.Tensor]]:
        """(I,) by domain and layer."""
        return self._magnitude.means


class _Sample(Collector):
    """Evenly spaced tokens of all that were seen, at most about `size` of them, by layer."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"`size` must be at least 1, got {size}.")
        self.size = size
        self._kept: dict[str, list[torch.Tensor]] = {}
        self._stride: dict[str, int] = {}
        self._seen: dict[str, int] = {}

    def _keep(self, key: str, rows: torch.Tensor) -> None:
        stride, seen = self._stride.setdefault(key, 1), self._seen.get(key, 0)
        first = -seen % stride
        kept = self._kept.setdefault(key, [])
        kept.append(rows[first::stride].float().cpu().clone())
        self._seen[key] = seen + len(rows)
        while sum(len(part) for part in kept) > 2 * self.size:  # every other one goes, from now on too
            kept[:] = [torch.cat(kept)[::2].clone()]
            self._stride[key] *= 2

    @property
    def rows(self) -> dict[str, torch.Tensor]:
        """The kept rows by layer."""
        return {key: torch.cat(parts) for key, parts in self._kept.items()}


class CoActivation(_Sample):
    """Which neurons are active together: absolute activations of up to `2 * size` tokens, `rows[key]` (n, I)."""

    def __init__(self, size: int = 1024) -> None:
        super().__init__(size)

    def add(self, key: str, domain: str, hidden: torch.Tensor, neurons: torch.Tensor, gradient: Any) -> None:
        self._keep(key, neurons.abs())


class HiddenStates(_Sample):
    """Inputs of the feed-forward blocks, `rows[key]` (n, H) of up to `2 * size` tokens."""

    def __init__(self, size: int = 1024) -> None:
        super().__init__(size)

    def add(self, key: str, domain: str, hidden: torch.Tensor, neurons: torch.Tensor, gradient: Any) -> None:
        self._keep(key, hidden)


def calibrate(
    model: PreTrainedModel,
    data: Any,
    collectors: Sequence[Collector],
    *,
    tokenizer: Any = None,
    max_length: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 4,
    keys: Sequence[str] | None = None,
) -> int:
    """Run a dense model over data and show its feed-forward blocks to the collectors. The model is left as it was.

    Args:
        model (`PreTrainedModel`):
            A dense model of a supported family.
        data:
            Texts, batches with `input_ids` (and `attention_mask`), or a `datasets.Dataset` with a column `text` or
            `input_ids`; or a dict of these by the name of their domain.
        collectors (`list[Collector]`):
            What is wanted.
        tokenizer (*optional*):
            For texts.
        max_length (`int`, *optional*, defaults to 512):
            Tokens of a text at the most.
        max_tokens (`int`, *optional*):
            Tokens of each domain at the most; all of them where it is not given.
        batch_size (`int`, *optional*, defaults to 4):
            Texts at once.
        keys (`list[str]`, *optional*):
            Only these layers.

    Returns:
        The number of tokens that were looked at.

    Raises:
        TypeError, ValueError: for a model without dense feed-forward blocks, data that is empty or of another form, or
            a model without a language-modelling loss where gradients are wanted.
    """
    sites = _sites(model, keys)
    wants_gradients = any(collector.needs_gradients for collector in collectors)
    if wants_gradients and not hasattr(model, "lm_head") and model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-modelling head, so there is no loss to differentiate."
        )
    domains = data if isinstance(data, Mapping) and "input_ids" not in data else {_ALL: data}
    if not domains:
        raise ValueError("the calibration data is empty.")
    total = 0
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with evaluating(model):
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for domain, source in domains.items():
                count = 0
                batches = token_batches(source, tokenizer, max_length, batch_size)
                for batch in tqdm(batches, desc=f"Calibrating ({domain})", unit="batch"):
                    count += _one_batch(model, sites, batch, domain, collectors, wants_gradients)
                    if max_tokens is not None and count >= max_tokens:
                        break
                if count == 0:
                    raise ValueError(f"the calibration data of `{domain}` has no tokens.")
                total += count
        finally:
            for parameter, flag in zip(model.parameters(), trained, strict=True):
                parameter.requires_grad_(flag)
    return total


def _sites(model: PreTrainedModel, keys: Sequence[str] | None) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The feed-forward block and its down projection, by layer."""
    family = get_family(model.config.model_type)
    if family is None or family.dense is None:
        raise ValueError(f"{type(model).__name__} is no dense model of a supported family.")
    found = {}
    for key, layer, _ in iter_layers(model, family):
        if (keys is None or key in keys) and has_path(layer, family.dense.site):
            found[key] = get_by_path(layer, family.dense.site), dense_linears(layer, family.dense)["down"]
    if model.main_input_name != "input_ids":
        raise ValueError(f"calibration data are texts, which {type(model).__name__} does not take.")
    if not found:
        raise ValueError(f"{type(model).__name__} has no dense feed-forward block to look at.")
    return found


def _one_batch(
    model: PreTrainedModel,
    sites: dict[str, tuple[nn.Module, nn.Module]],
    batch: Batch,
    domain: str,
    collectors: Sequence[Collector],
    wants_gradients: bool,
) -> int:
    ids = batch["input_ids"].to(model.device)
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask.to(model.device)
    real = mask.flatten() != 0
    hidden: dict[str, torch.Tensor] = {}
    neurons: dict[str, torch.Tensor] = {}
    handles = []
    for key, (block, down) in sites.items():

        def see_hidden(_: Any, args: Any, kwargs: Any, key: str = key) -> None:
            hidden[key] = (args[0] if args else next(iter(kwargs.values()))).detach()

        def see_neurons(_: Any, args: Any, key: str = key) -> Any:
            found = args[0]
            if wants_gradients:
                found = found.detach().requires_grad_() if not found.requires_grad else found
                found.retain_grad()
            neurons[key] = found
            return (found, *args[1:])

        handles.append(block.register_forward_pre_hook(see_hidden, with_kwargs=True))
        handles.append(down.register_forward_pre_hook(see_neurons))
    try:
        with torch.set_grad_enabled(wants_gradients):
            inputs = {"input_ids": ids, "attention_mask": mask}
            if getattr(model.config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = ids
            if wants_gradients:
                labels = ids.masked_fill(mask == 0, -100)
                loss = model(**inputs, labels=labels, use_cache=False).loss
                (loss * int((labels[:, 1:] != -100).sum())).backward()
            else:
                model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    for key in sites:
        if key not in neurons:
            continue
        rows = neurons[key].detach().flatten(0, -2)
        gradient = None
        if wants_gradients and neurons[key].grad is not None:
            gradient = neurons[key].grad.flatten(0, -2)[real]
        elif wants_gradients:
            gradient = torch.zeros_like(rows)[real]
        for collector in collectors:
            own = gradient if collector.needs_gradients else None
            collector.add(key, domain, hidden[key].flatten(0, -2)[real], rows[real], own)
    return int(real.sum())


def token_batches(data: Any, tokenizer: Any, max_length: int, batch_size: int) -> Iterator[Batch]:
    """Batches of token ids, padded on the right, from texts, batches, or a dataset.

    Raises:
        TypeError: for something else.
        ValueError: for texts without a tokenizer.
    """
    if isinstance(data, str) or (isinstance(data, Mapping) and "input_ids" in data):
        data = [data]
    if not isinstance(data, Iterable):
        raise TypeError(f"expected texts or batches, got {type(data).__name__}.")
    rows: list[list[int]] = []
    for item in data:
        if (
            isinstance(item, Mapping)
            and isinstance(item.get("input_ids"), torch.Tensor)
            and item["input_ids"].dim() == 2
        ):
            yield item
            continue
        if isinstance(item, Mapping):
            item = item.get("input_ids", item.get("text"))
        if isinstance(item, str):
            if tokenizer is None:
                raise ValueError("texts need `tokenizer=...`.")
            item = tokenizer(item)["input_ids"]
        if not isinstance(item, (list, torch.Tensor)):
            raise TypeError(f"expected a text or `input_ids`, got {type(item).__name__}.")
        row = [int(token) for token in item][:max_length]
        if row:
            rows.append(row)
        if len(rows) == batch_size:
            yield _padded(rows)
            rows = []
    if rows:
        yield _padded(rows)


def _padded(rows: list[list[int]]) -> Batch:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
