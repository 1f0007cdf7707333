"""NLPO's mask in the sampler: an earlier policy reads along with the engine and says which tokens may come next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from rlhf_dist.algo.action_mask import likeliest
from rlhf_dist.algo.algorithm import LaggingMask
from rlhf_dist.errors import WeightSyncError
from rlhf_dist.models.hf import copy_weights

PREFILL_TOKENS = 8192
"""Padded tokens read at once."""


@dataclass(frozen=True, slots=True)
class MaskStart:
    """What an engine's mask begins with."""

    source: Path
    """The Hugging Face directory of the mask policy."""
    version: int
    """Of the policy that it goes with: 0, or that of the checkpoint."""
    lag: LaggingMask


@dataclass(eq=False, slots=True)
class Reading:
    """A sequence while it is sampled."""

    prompt: Sequence[int]
    response: Sequence[int]
    """The engine's own list, which grows by a token a step."""
    temperature: float
    read: int = 0
    """Tokens that `allowed` looks back on; 0: not read yet."""
    allowed: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    """bool [V]; what may come after them."""

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.prompt) + len(self.response)


class MaskReader:
    """The mask policy with a key-value cache of its own, whose rows are the sequences that are being sampled.

    All rows end in the same column, with empty ones before the shorter: a step adds one column for all of them,
    whenever a sequence came or how long its prompt is.
    """

    def __init__(self, model: PreTrainedModel, lag: LaggingMask, version: int) -> None:
        """`model` is the mask that goes with the policy's `version`."""
        self._model = model.eval().requires_grad_(False)
        self._lag = lag
        self._version = lag.at(version)
        self._rows: list[Reading] = []
        self._cache: list[tuple[Tensor, Tensor]] = []
        """Keys and values [B, heads, L, head_dim] of each layer."""
        self._filled = torch.empty((0, 0), dtype=torch.int64, device=model.device)
        """[B, L]; 1 where a column holds a token of the row."""

    def follow(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take the published weights if it is time for them; what was read by the old ones is forgotten.

        Raises WeightSyncError where an earlier publication did not arrive whose weights it would have.
        """
        if self._lag.follows(version):
            copy_weights(self._model, weights)
            self._version = version
            for row in self._rows:
                row.read = 0
            self._select([])
        if self._version != self._lag.at(version):
            raise WeightSyncError(
                f"version {version} goes with the mask of version {self._lag.at(version)}, which did not arrive; the "
                f"next that brings one is {self._lag.at(version) + self._lag.every}"
            )

    @torch.inference_mode()
    def allowed(self, sequences: Sequence[Reading]) -> Tensor:
        """bool [B, V]: what may come next in each sequence. What is not among them leaves the cache."""
        present = set(sequences)
        self._select([i for i, row in enumerate(self._rows) if row in present and row.length == row.read + 1])
        if self._rows:
            self._step()
        fresh = [sequence for sequence in sequences if sequence.length != sequence.read]
        for part in _parts(fresh):
            self._prefill(part)
        return torch.stack([sequence.allowed for sequence in sequences])

    def _step(self) -> None:
        """Read the newest token of each row."""
        last = [[(row.response or row.prompt)[-1]] for row in self._rows]
        self._filled = pad(self._filled, (0, 1), value=1)
        cache = DynamicCache(self._cache)
        self._read(self._rows, last, self._filled, [[row.read] for row in self._rows], cache)
        self._cache = _layers(cache)

    def _prefill(self, sequences: Sequence[Reading]) -> None:
        """Read whole sequences, such as are alike once, and put them below the rows."""
        alike: dict[tuple[float, ...], Reading] = {}
        firsts = [alike.setdefault((s.temperature, *s.prompt, *s.response), s) for s in sequences]
        read = list(alike.values())
        longest = max(sequence.length for sequence in read)
        empty = [longest - sequence.length for sequence in read]
        tokens = [[0] * count + [*s.prompt, *s.response] for count, s in zip(empty, read, strict=True)]
        positions = [[0] * count + list(range(longest - count)) for count in empty]
        filled = torch.tensor([[0] * count + [1] * (longest - count) for count in empty], device=self._model.device)
        cache = DynamicCache()
        self._read(read, tokens, filled, positions, cache)
        for sequence, first in zip(sequences, firsts, strict=True):
            sequence.allowed, sequence.read = first.allowed, first.read
        which = torch.tensor([read.index(first) for first in firsts], device=self._model.device)
        new = [(keys[which], values[which]) for keys, values in _layers(cache)]
        old = self._cache or [(keys[:0], values[:0]) for keys, values in new]
        self._cache = [
            (_below(k, keys, -2), _below(v, values, -2)) for (k, v), (keys, values) in zip(old, new, strict=True)
        ]
        self._filled = _below(self._filled, filled[which], -1)
        self._rows += sequences

    def _read(
        self,
        sequences: Sequence[Reading],
        tokens: list[list[int]],
        filled: Tensor,
        positions: list[list[int]],
        cache: DynamicCache,
    ) -> None:
        """One pass; `cache` grows by the columns of `tokens`, the sequences get their masks."""
        device = self._model.device
        logits = self._model(
            input_ids=torch.tensor(tokens, device=device),
            attention_mask=filled,
            position_ids=torch.tensor(positions, device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        temperatures = torch.tensor([[sequence.temperature] for sequence in sequences], device=device)
        for sequence, allowed in zip(sequences, likeliest(logits.float() / temperatures, self._lag.top_p), strict=True):
            sequence.allowed, sequence.read = allowed, sequence.length

    def _select(self, rows: list[int]) -> None:
        """Keep these rows of the cache, and the columns that one of them fills."""
        if rows == list(range(len(self._rows))):
            return
        self._rows = [self._rows[i] for i in rows]
        chosen = torch.tensor(rows, dtype=torch.int64, device=self._filled.device)
        filled = self._filled[chosen]
        start = filled.shape[1] - (int(filled.sum(-1).max()) if rows else 0)
        self._filled = filled[:, start:]
        self._cache = [(keys[chosen, :, start:], values[chosen, :, start:]) for keys, values in self._cache]


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _parts(sequences: Sequence[Reading]) -> Iterator[Sequence[Reading]]:
    """Cut into passes of at most `PREFILL_TOKENS` padded tokens; a longer sequence goes alone."""
    start = longest = 0
    for i, sequence in enumerate(sequences):
        longest = max(longest, sequence.length)
        if i > start and longest * (i + 1 - start) > PREFILL_TOKENS:
            yield sequences[start:i]
            start, longest = i, sequence.length
    if start < len(sequences):
        yield sequences[start:]


def _below(upper: Tensor, lower: Tensor, columns: int) -> Tensor:
    """Rows one below the other; the dimension `columns` of the narrower is filled up with zeros on the left."""
    width = max(upper.shape[columns], lower.shape[columns])
    before = (0, 0) if columns == -2 else ()
    return torch.cat([pad(part, (*before, width - part.shape[columns], 0)) for part in (upper, lower)])
