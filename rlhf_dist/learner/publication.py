"""One rank's part in publishing the policy's weights: whole, or by the words that changed since the last time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.learner.changed_words import ChangedWords
from rlhf_dist.learner.deepspeed_engine import DeepSpeedEngine
from rlhf_dist.weights.buckets import WeightPlan
from rlhf_dist.weights.changes import MOST_CHANGED, WORD_BYTES, Piece, pack, unpack
from rlhf_dist.weights.changes_file import ChangesFile
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.shared_memory import WeightWriter

Weights = Callable[[Collection[str] | None], Iterator[tuple[str, Tensor]]]
"""Whole parameters, all or those of these names. Under ZeRO 3 every rank reads them to the end."""


class Publication:
    """Every rank calls each method; rank 0 has the shared memory."""

    def __init__(
        self,
        deepspeed: DeepSpeedEngine,
        weights: Weights,
        plan: WeightPlan,
        *,
        prefix: str,
        changes: bool,
        shared: bool,
    ) -> None:
        """`prefix`: what DeepSpeed's names have before the plan's. `changes`: publish by changed words where that is
        less. `shared`: rollout workers have the same devices."""
        self._deepspeed = deepspeed
        self._weights = weights
        self._plan = plan
        self._on_gpu = deepspeed.device.type == "cuda"
        self._frees = shared and self._on_gpu
        self._starts = {prefix + slot.name: slot.offset // WORD_BYTES for slot in plan.slots}
        self._changes = changes
        self._marks: ChangedWords | None = None
        """From the first publication on; before it nothing is there to be changed."""
        self._writer: WeightWriter | None = None
        self._file: ChangesFile | None = None
        self._published: Announcement | None = None
        self.moved = True
        """Since the last publication; the same on every rank."""

    def publish(self, version: int) -> Announcement | None:
        """Write the weights where rollout workers read them; rank 0 returns the announcement.

        Without an optimizer step since the last publication, its bytes get the new number.
        """
        moved, self.moved = self.moved, False
        if not moved:
            return None if self._published is None else replace(self._published, version=version)
        before, self._published = self._published, None  # until the new one is whole
        pieces = self._changed_pieces(before)
        if pieces is None:
            self._published = self._write(version)
            if self._changes and self._marks is None:
                self._marks = ChangedWords(self._deepspeed.optimizer, self._deepspeed.parts())
        else:
            self._published = self._change(version, before, pieces)
            self._audit(version)
        if self._frees:
            # A rollout worker makes each layer beside the old one, outside of what vLLM has planned.
            torch.cuda.empty_cache()
        return self._published

    def _write(self, version: int) -> Announcement | None:
        if self._deepspeed.rank > 0:
            if self._deepspeed.zero_stage == 3:
                for _ in self._weights(None):  # what the others do while rank 0 reads
                    pass
            return None
        if self._writer is None:
            self._writer = WeightWriter(self._plan, pinned=self._on_gpu)
            self._file = ChangesFile(self._writer.path)
        return self._writer.write(version, self._weights(None))

    def _changed_pieces(self, before: Announcement | None) -> list[Piece] | None:
        """On rank 0 what all ranks changed, in order; nothing on the others. None: the whole has to be published."""
        if self._marks is None:
            return None
        known = self._deepspeed.rank > 0 or before is not None
        everyone = self._deepspeed.of_all_ranks((known, self._marks.count()))
        most = MOST_CHANGED * self._plan.nbytes / WORD_BYTES
        pieces = None
        if all(known for known, _ in everyone) and sum(count for _, count in everyone) <= most:
            parts = self._deepspeed.to_rank_0(pack(list(self._marks.pieces(self._starts))))
            pieces = sorted((piece for part in parts for piece in unpack(part)), key=lambda piece: piece.start)
        self._marks.clear()
        return pieces

    def _change(self, version: int, before: Announcement | None, pieces: list[Piece]) -> Announcement | None:
        if before is None or self._writer is None or self._file is None:
            return None  # not rank 0
        found = self._writer.change(version, before, pieces)
        return self._file.keep(found, before.hashes, pack(pieces))

    def _audit(self, version: int) -> None:
        """Compare a bucket, another one each time, with the weights themselves.

        The hashes are of the shared memory: a change that was not marked would be missing there, and not be found.
        """
        bucket = self._plan.buckets[version % len(self._plan.buckets)]
        names = [slot.name for slot in bucket.slots]
        found: dict[str, Any] = {}
        if self._writer is not None and self._published is not None:
            found = dict(self._writer.tensors(self._published, bucket))
        elif self._deepspeed.zero_stage < 3:
            return
        wrong = [name for name, tensor in self._weights(names) if name in found and not same_bits(tensor, found[name])]
        if wrong:
            raise WeightSyncError(
                f"version {version}: {wrong[0]} in shared memory is not what the learner holds, so a change was not "
                "marked; set learner.delta_push to false, and report it"
            )

    def close(self) -> None:
        """Remove the shared memory."""
        for one in (self._file, self._writer):
            if one is not None:
                one.close()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two bfloat16 tensors have the same words."""
    return torch.equal(one.cpu().view(torch.int16), other.view(torch.int16))
