"""The port between learner and rollout workers: one call publishes a version, loads it and checks the receipts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rlhf_dist.weights.receipts import Announcement, changed_share, sent_share


class Publisher(Protocol):
    """The learner's end."""

    def publish(self, version: int) -> Announcement:
        """Write the weights where workers read them; those that have not moved keep their place and hashes."""
        ...


class Receivers(Protocol):
    """The rollout workers' end."""

    def make_room(self) -> list[str]:
        """Before a publication: see that workers which do not answer leave a buffer free; returns what was done."""
        ...

    def load_weights(self, announcement: Announcement) -> list[str]:
        """Push a version to every worker and check the receipts; returns what was wrong, one sentence a worker.

        Workers that come back are asked for it later. Raises `WeightSyncError` where it could not be sent to anybody.
        """
        ...


@dataclass(frozen=True, slots=True)
class PushReport:
    """What a push came to."""

    announcement: Announcement
    problems: tuple[str, ...]
    """What was wrong with workers and receipts, one sentence a worker."""
    changed_share: float
    """Share of bytes in buckets that differ from the version before: 1 for the first push, 0 where nothing moved."""
    sent_share: float
    """Bytes for a node that has the version before, over those of the whole."""

    @property
    def version(self) -> int:
        """The version that workers serve now."""
        return self.announcement.version


class WeightSync:
    """Both ends. A push is done when every worker has proved the version, or serves no more."""

    def __init__(self, publisher: Publisher, receivers: Receivers) -> None:
        self._publisher = publisher
        self._receivers = receivers
        self._hashes: tuple[str, ...] = ()

    def push(self, version: int) -> PushReport:
        """Publish the learner's weights as `version` and load them. Raises `WeightSyncError`, or what the ends raise.

        Weights that have not moved since the last push are not sent again: workers that hold them take over the
        number, so that every token has the version that its step expects, and the others load the bytes that are there.
        """
        problems = self._receivers.make_room()
        announcement = self._publisher.publish(version)
        problems += self._receivers.load_weights(announcement)
        share = changed_share(self._hashes, announcement)
        self._hashes = announcement.hashes
        return PushReport(announcement, tuple(problems), share, sent_share(announcement, share))
