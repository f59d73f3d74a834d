"""Open data near a few examples of a task, without near copies.

Similarity first, then diversity: 2408.15915, section 3.3; the second step is that of SemDeDup (2303.09540).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..evaluation import _evaluation_mode


# What BGE models expect in front of a text that is compared with others of its kind.
BGE_PREFIX = "Represent the following sentence for similar task retrieval: "


@dataclass(frozen=True)
class DataSelection:
    """Result of `select_data`.

    Attributes:
        index: positions in the pool, the most similar first.
        similarity: of each, to the nearest example.
        dropped: those among the most similar that are near copies, with the position of what was kept in their place.
    """

    index: tuple[int, ...]
    similarity: tuple[float, ...]
    dropped: dict[int, int]


def select_data(
    k_shot: torch.Tensor, pool: torch.Tensor, count: int = 1000, threshold: float | None = 0.9
) -> DataSelection:
    """The items of a pool nearest to any of a few examples, less near copies of each other.

    The `count` items with the largest cosine to their nearest example are taken; then, from the most similar on, each
    is kept if no kept one has a cosine above `threshold` to it. So of two near copies the less similar one goes.

    Args:
        k_shot (`torch.Tensor`):
            Embeddings of the examples (K, D).
        pool (`torch.Tensor`):
            Embeddings of the pool (n, D).
        count (`int`, *optional*, defaults to 1000):
            Items before copies are dropped (C).
        threshold (`float`, *optional*, defaults to 0.9):
            Cosine above which two items are near copies (tau). `None` drops nothing.

    Returns:
        [`DataSelection`]. It does not depend on the order of the pool.

    Raises:
        ValueError: for embeddings of other shapes, or options out of range.
    """
    if k_shot.dim() != 2 or pool.dim() != 2 or k_shot.shape[1] != pool.shape[1] or not len(k_shot) or not len(pool):
        raise ValueError(
            f"`k_shot` and `pool` must be embeddings (K, D) and (n, D), got {tuple(k_shot.shape)} and "
            f"{tuple(pool.shape)}."
        )
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    if threshold is not None and not -1 <= threshold <= 1:
        raise ValueError(f"`threshold` is a cosine, from -1 to 1, got {threshold}.")
    examples, items = (F.normalize(tensor.double(), dim=-1) for tensor in (k_shot, pool))
    similarity = torch.cat([(part @ examples.T).amax(-1) for part in items.split(8192)])
    # Rounded, so that the order of summation does not decide; ties are broken by the items themselves.
    keys = [round(value, 10) for value in similarity.tolist()]
    order = sorted(range(len(keys)), key=lambda i: -keys[i])
    order = _by_content_where_equal(order, keys, pool)[:count]
    kept: list[int] = []
    dropped: dict[int, int] = {}
    for i in order:
        if threshold is not None and kept:
            cosines = items[kept] @ items[i]
            nearest = int(cosines.argmax())
            if float(cosines[nearest]) > threshold:
                dropped[i] = kept[nearest]
                continue
        kept.append(i)
    return DataSelection(tuple(kept), tuple(float(similarity[i]) for i in kept), dropped)


def _by_content_where_equal(order: list[int], keys: list[float], pool: torch.Tensor) -> list[int]:
    out: list[int] = []
    first = 0
    while first < len(order):
        last = first
        while last < len(order) and keys[order[last]] == keys[order[first]]:
            last += 1
        group = order[first:last]
        out += sorted(group, key=lambda i: pool[i].tolist()) if len(group) > 1 else group
        first = last
    return out


def embed_texts(
    texts: Sequence[str],
    model: Any,
    tokenizer: Any,
    *,
    pooling: Literal["cls", "mean"] = "cls",
    prefix: str = "",
    batch_size: int = 32,
    max_length: int = 512,
    progress: bool = False,
) -> torch.Tensor:
    """Embeddings of texts by any encoder: (n, D), of length 1.

    Args:
        texts (`list[str]`):
            The texts.
        model (`PreTrainedModel`):
            An encoder (`AutoModel`), or a decoder with `pooling="mean"`.
        tokenizer:
            Its tokenizer.
        pooling (`"cls"` or `"mean"`, *optional*, defaults to `"cls"`):
            The first token's state, as BGE models have it, or the mean over the real tokens.
        prefix (`str`, *optional*, defaults to `""`):
            Put in front of each text; BGE models expect `BGE_PREFIX`.
        batch_size, max_length (`int`, *optional*, default to 32 and 512):
            Texts of a forward, and tokens of a text that are looked at.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Raises:
        ValueError: for an empty list or an unknown pooling.
    """
    if pooling not in ("cls", "mean"):
        raise ValueError(f'`pooling` must be "cls" or "mean", got {pooling!r}.')
    if isinstance(texts, str) or not texts:
        raise ValueError("`texts` must be a list of texts, and not empty.")
    found = []
    for first in tqdm(range(0, len(texts), batch_size), desc="Embedding", disable=not progress):
        rows = [
            tokenizer(prefix + text, truncation=True, max_length=max_length)["input_ids"] or [0]
            for text in texts[first : first + batch_size]
        ]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=model.device)
        with _evaluation_mode(model), torch.no_grad():
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1].float()
        real = mask[..., None].float()
        pooled = states[:, 0] if pooling == "cls" else (states * real).sum(1) / real.sum(1)
        found.append(F.normalize(pooled, dim=-1).cpu())
    return torch.cat(found)
