"""The collator's process. It needs no torch, so it starts in a fraction of the time that the others take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rlhf_dist.cluster.roster import Alive, work
from rlhf_dist.cluster.spec import ActorSpec, enter
from rlhf_dist.cluster.waits import fetched
from rlhf_dist.learner.collator import Collator
from rlhf_dist.learner.step_file import write_step

KEEP_LIMIT_S, COPY_LIMIT_S = 10.0, 1.0
"""For what is kept to come from where it was made: finished groups with their reference logprobs, and copies of those
that are being sampled."""


class CollatorHost(Alive):
    """The collator's actor."""

    def __init__(self, spec: ActorSpec) -> None:
        enter(spec)
        self._collator = Collator()
        self._name, self._groups = spec.name, 0

    @work
    def keep(self, keys: Sequence[str], places: Sequence[Any]) -> list[str]:
        """See `Collator.keep`; the keys of groups that are lost, or have not come in time.

        `places`: references, in a list so that Ray does not fetch them for this call: it would hold all later calls
        back, signs of life too, while a maker's node does not answer.
        """
        lost: list[str] = []
        for key, group in zip(keys, fetched(places, KEEP_LIMIT_S), strict=True):
            if group is None:
                lost.append(key)
                continue
            self._collator.keep(key, group)
            self._groups += 1
        return lost

    @work
    def keep_references(self, keys: Sequence[str], places: Sequence[Any]) -> list[str]:
        """See `Collator.keep_reference`; the keys of logprobs that are lost. `places` as for `keep`."""
        lost: list[str] = []
        for key, logprobs in zip(keys, fetched(places, KEEP_LIMIT_S), strict=True):
            if logprobs is None:
                lost.append(key)
                continue
            self._collator.keep_reference(key, logprobs)
        return lost

    @ray.method(num_returns=0)
    def keep_copy(self, key: str, places: Sequence[Any]) -> None:
        """See `Collator.keep_copy`; `places` as for `keep`, one. Without it the copy before stays."""
        (group,) = fetched(places, COPY_LIMIT_S)
        if group is not None:
            self._collator.keep_copy(key, group)

    def recall(self, key: str) -> Any:
        """See `Collator.recall`: (int64 [n], tokens of each sample; a reference to the group), or None."""
        group = self._collator.recall(key)
        if group is None:
            return None
        return np.array([sample.length for sample in group.trajectories]), ray.put(group)

    @ray.method(num_returns=0)
    def forget(self, keys: list[str]) -> None:
        """See `Collator.forget`."""
        self._collator.forget(keys)

    @ray.method(num_returns=0)
    def forget_all(self) -> None:
        """See `Collator.forget_all`."""
        self._collator.forget_all()

    @work
    def texts(self, keys: list[str]) -> Any:
        """See `Collator.texts`."""
        return self._collator.texts(keys)

    @work
    def batches(self, shards: Any, keys: list[str], compared: bool) -> Any:
        """See `Collator.batches`; references to them, since a small answer would travel through who asks."""
        return [ray.put(batch) for batch in self._collator.batches(shards, keys, compared)]

    @work
    def save_step(self, path: Path, shards: Any, keys: list[str], compared: bool, facts: Any, *estimates: Any) -> None:
        """See `loop.ports.Bodies`; `estimates`: by rank, none where credit is by response."""
        write_step(path, self._collator.batches(shards, keys, compared), estimates, facts)

    def counts(self) -> Mapping[str, int]:
        """Groups that it has taken over; see `Alive`."""
        return {"groups": self._groups}

    def ready(self) -> str:
        """Answers once it can be used."""
        return self._name
