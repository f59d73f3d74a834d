"""Which tokens go into a batch together."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens of one request that go to one expert, and are computed in one piece.

    Attributes:
        request: whose they are.
        expert: where they go.
        tokens: how many.
    """

    request: Hashable
    expert: int
    tokens: int = 1


class Batcher:
    """Base: pieces come in by `add`, and leave by `next_batch`, each once.

    Args:
        token_budget (`int`): most tokens of a batch.

    Raises:
        ValueError: for a budget below 1.
    """

    def __init__(self, token_budget: int) -> None:
        if token_budget < 1:
            raise ValueError(f"`token_budget` must be at least 1, got {token_budget}.")
        self.token_budget = token_budget

    def add(self, piece: RoutedTokens) -> None:
        """Queue a piece.

        Raises:
            ValueError: for one that no batch can hold.
        """
        if not 1 <= piece.tokens <= self.token_budget:
            raise ValueError(
                f"a piece of {piece.tokens} tokens does not fit a batch of {self.token_budget}; cut it before."
            )
        self._queue(piece)

    def _queue(self, piece: RoutedTokens) -> None:
        raise NotImplementedError

    def next_batch(self) -> list[RoutedTokens]:
        """The next batch; empty where nothing waits."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Pieces that wait."""
        raise NotImplementedError


class FifoBatcher(Batcher):
    """First come, first served."""

    def __init__(self, token_budget: int) -> None:
        super().__init__(token_budget)
        self._waiting: deque[RoutedTokens] = deque()

    def _queue(self, piece: RoutedTokens) -> None:
        self._waiting.append(piece)

    def next_batch(self) -> list[RoutedTokens]:
        batch: list[RoutedTokens] = []
        room = self.token_budget
        while self._waiting and self._waiting[0].tokens <= room:
            batch.append(self._waiting.popleft())
            room -= batch[-1].tokens
        return batch

    def __len__(self) -> int:
        return len(self._waiting)


class ExpertAwareBatcher(Batcher):
    """As few experts in a batch as possible: the longest queue first. Read-ME (2410.19123), section 4.1.

    There is a queue for each expert. The longest one, by tokens, goes into the batch; where it does not fit whole, the
    part that fits does, and the batch is full. A rare expert can wait without bound in this rule; `max_wait` is one.

    Args:
        token_budget (`int`): most tokens of a batch.
        max_wait (`int`, *optional*): batches after which a queue goes first whatever its length. `None`, as in the
            paper, has no such bound.
    """

    def __init__(self, token_budget: int, max_wait: int | None = None) -> None:
        super().__init__(token_budget)
        if max_wait is not None and max_wait < 1:
            raise ValueError(f"`max_wait` must be at least 1, got {max_wait}.")
        self.max_wait = max_wait
        self._queues: dict[int, deque[tuple[int, RoutedTokens]]] = {}
        self._tokens: dict[int, int] = {}
        self._batches = 0

    def _queue(self, piece: RoutedTokens) -> None:
        self._queues.setdefault(piece.expert, deque()).append((self._batches, piece))
        self._tokens[piece.expert] = self._tokens.get(piece.expert, 0) + piece.tokens

    def _first(self) -> int:
        """The queue that is next: one that waited too long, the longest waiting first, or else the longest."""
        if self.max_wait is not None:
            oldest = min(self._queues, key=lambda expert: (self._queues[expert][0][0], expert))
            if self._batches - self._queues[oldest][0][0] >= self.max_wait:
                return oldest
        return max(self._queues, key=lambda expert: (self._tokens[expert], -expert))

    def next_batch(self) -> list[RoutedTokens]:
        batch: list[RoutedTokens] = []
        room, whole = self.token_budget, True
        while self._queues and whole:
            expert = self._first()
            queue = self._queues[expert]
            while queue and queue[0][1].tokens <= room:
                _, piece = queue.popleft()
                batch.append(piece)
                room -= piece.tokens
                self._tokens[expert] -= piece.tokens
            whole = not queue
            if whole:
                del self._queues[expert], self._tokens[expert]
        self._batches += 1
        return batch

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())
