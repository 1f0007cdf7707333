"""Which 16-bit words of the weights an optimizer step changed, marked where its float32 masters are rounded to them.

Each rank marks its own part, one bit a word: before a part is rounded, its words are still the old ones, so that no
copy of the weights is kept to compare with. Marks of several steps add up until they are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.weights.changes import Piece, encode

CHUNK = 2**22
"""Words that are compared at a time; a multiple of 8."""
GATHER_BITS = 0x0102040810204080
"""Times eight bytes of 0 or 1, as one number: its highest byte has them as bits, the first one lowest."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run of words that lies as it is in a parameter and in a rank's part."""

    name: str
    """Of the parameter."""
    begin: int
    """Its first word in the parameter."""
    start: int
    """Its first word in the part."""
    count: int


@dataclass(frozen=True, slots=True)
class Part:
    """Words of a rank that the optimizer steps as one."""

    master: Tensor
    """Float32: what the optimizer steps; flat from ZeRO 1 on."""
    words: Tensor
    """In the model's dtype, flat and as long: where it is rounded to after the step."""
    runs: tuple[Run, ...]


class ChangedWords:
    """The marks of one rank."""

    def __init__(self, optimizer: torch.optim.Optimizer, parts: Sequence[Part]) -> None:
        """From now on every `step` of the optimizer is marked, before what it stepped is rounded."""
        self._parts = {id(part.master): part for part in parts}
        self._marks = {
            key: torch.zeros(-(-part.words.numel() // 8), dtype=torch.uint8, device=part.words.device)
            for key, part in self._parts.items()
        }
        optimizer.register_step_post_hook(self._note)

    @torch.no_grad()
    def _note(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for master in group["params"]:
                if part := self._parts.get(id(master)):
                    mark(part, self._marks[id(master)])

    def count(self) -> int:
        """How many words are marked."""
        return sum(int(np.bitwise_count(marks.cpu().numpy()).sum()) for marks in self._marks.values())

    def pieces(self, starts: Mapping[str, int]) -> Iterator[Piece]:
        """What is marked, with the words of now. `starts`: parameter -> its first word in the whole; others are left
        out."""
        for key, part in self._parts.items():
            marks = self._marks[key].cpu().numpy()
            for run in part.runs:
                if run.name in starts:
                    yield from run_pieces(part, marks, run, starts[run.name] + run.begin)

    def clear(self) -> None:
        """Begin anew."""
        for marks in self._marks.values():
            marks.zero_()


def mark(part: Part, marks: Tensor) -> None:
    """Set the bits of the words that will not be the same after rounding."""
    count = part.words.numel()
    for start in range(0, count, CHUNK):
        old = part.words[start : start + CHUNK]
        new = part.master.detach()[start : start + CHUNK].to(old.device, old.dtype)
        changed = (new.view(torch.int16) != old.view(torch.int16)).view(torch.uint8)
        if missing := -len(changed) % 8:
            changed = torch.nn.functional.pad(changed, (0, missing))
        bits = (changed.view(torch.int64) * GATHER_BITS) >> 56
        marks[start // 8 : start // 8 + len(bits)] |= bits.to(torch.uint8)


def run_pieces(part: Part, marks: np.ndarray, run: Run, place: int) -> Iterator[Piece]:
    """The changes of a run whose first word is number `place` of the whole, in pieces of at most `CHUNK` words."""
    end = run.start + run.count
    for start in range(run.start - run.start % 8, end, CHUNK):
        stop = min(start + CHUNK, end)
        bits = np.unpackbits(marks[start // 8 : -(-stop // 8)], bitorder="little")
        first = max(start, run.start)
        found = np.flatnonzero(bits[first - start : stop - start])
        if len(found):
            where = torch.from_numpy(found).to(part.words.device) + first
            values = part.words.view(torch.int16)[where].cpu().numpy().view(np.uint16)
            yield encode(place + first - run.start, found, values)
