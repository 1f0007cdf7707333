"""In which order an epoch passes over the rows: prompts, demonstrations, judgements and the pre-training mix alike."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


def epoch_order(size: int, seed: int, epoch: int, shuffle: bool) -> Sequence[int]:
    """Every index below `size` once: in an order of the epoch's own, or, without `shuffle`, that of the file."""
    if not shuffle:
        return range(size)
    order = list(range(size))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


class RowOrder:
    """Endless epochs over rows, found again from a count alone: a resume needs nothing but its step."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self._size = size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._order: Sequence[int] = ()

    def batch(self, number: int, size: int) -> list[int]:
        """The rows of batch `number` (from 0) of `size`; it may run over the end of an epoch."""
        return [self._index(drawn) for drawn in range(number * size, (number + 1) * size)]

    def batches(self, number: int, size: int) -> Iterator[list[int]]:
        """Batch `number`, and those after it for as long as a row may have been in none of them."""
        for later in range(number, number + 2 * self._size // size + 2):
            yield self.batch(later, size)

    def _index(self, drawn: int) -> int:
        epoch, position = divmod(drawn, self._size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._size, self._seed, epoch, self._shuffle)
        return self._order[position]
