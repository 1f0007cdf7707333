"""The collator: holds the tokens of finished groups until they are trained on, and lays out each rank's batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_dist.learner.rank_batch import RankBatch, rank_batch
from rlhf_dist.learner.shard import Shard
from rlhf_dist.types import Group, Trajectory


class Collator:
    """Groups by the key of their request. Used by one thread."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}
        self._references: dict[str, np.ndarray] = {}
        self._copies: dict[str, Group] = {}
        """Of groups that are being sampled."""

    def keep(self, key: str, group: Group) -> None:
        """Take a group over."""
        self._groups[key] = group
        self._copies.pop(key, None)

    def keep_copy(self, key: str, group: Group) -> None:
        """What there is of a group that is being sampled, in place of an earlier copy."""
        self._copies[key] = group

    def recall(self, key: str) -> Group | None:
        """The last copy, which is not kept any more; None without one."""
        return self._copies.pop(key, None)

    def keep_reference(self, key: str, logprobs: np.ndarray) -> None:
        """Take over the reference's logprobs of a group, float32 [sum of N], sample after sample."""
        if key in self._groups:
            self._references[key] = logprobs

    def forget(self, keys: Sequence[str]) -> None:
        """Nobody needs these groups any more."""
        for key in keys:
            self._groups.pop(key, None)
            self._references.pop(key, None)
            self._copies.pop(key, None)

    def forget_all(self) -> None:
        """Nobody needs any of them."""
        self._groups.clear()
        self._references.clear()
        self._copies.clear()

    def texts(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        """Each group's samples, to be read by people."""
        return [tuple(readable(sample) for sample in self._groups[key].trajectories) for key in keys]

    def batches(self, shards: Sequence[Shard], keys: Sequence[str], compared: bool) -> list[RankBatch]:
        """One for each rank, of a step that is made of these groups; `compared`: with the reference's logprobs."""
        groups = [self._groups[key] for key in keys]
        references = [self._references[key] for key in keys] if compared else []
        return [rank_batch(shard, groups, references) for shard in shards]


def readable(sample: Trajectory) -> str:
    """The response; of a conversation all that was said after the prompt, a line each, with whose words they are."""
    if len(sample.texts) == 1:
        return sample.texts[0]
    return "\n".join(
        f"[{segment.role}] {text}" for segment, text in zip(sample.segments[1:], sample.texts, strict=True)
    )
