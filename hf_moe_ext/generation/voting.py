"""Self-consistency: the answer that most of several samples give (2203.11171)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Vote:
    """What `majority_vote` found.

    Attributes:
        answer: the most frequent one; `None` where no text has an answer.
        share: of the texts, those that gave it; texts without an answer count.
        counts: how often each answer was given, most frequent first.
    """

    answer: str | None
    share: float
    counts: dict[str, int]


def last_number(text: str) -> str | None:
    """The last number of a text, without separators of thousands; `None` where there is none."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "").rstrip(".") if found else None


def majority_vote(texts: Iterable[str], extract: Callable[[str], str | None] = last_number) -> Vote:
    """The answer that most texts give; of equally frequent ones, that which came first.

    Args:
        texts (iterable of `str`):
            Samples for one question, such as those of `generate(..., do_sample=True, num_return_sequences=20)`.
        extract (function, *optional*):
            Text to answer, or `None` where it has none. Takes the last number if not given.

    Raises:
        ValueError: there are no texts.
    """
    answers = [extract(text) for text in texts]
    if not answers:
        raise ValueError("there are no texts to vote.")
    counts = Counter(answer for answer in answers if answer is not None)
    ordered = dict(counts.most_common())  # of equal counts, the first seen
    answer = next(iter(ordered), None)
    return Vote(answer, ordered.get(answer, 0) / len(answers) if answer is not None else 0.0, ordered)
