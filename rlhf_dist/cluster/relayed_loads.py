"""Weights for the rollout workers of other nodes: a relay copies each version to its node, where they load it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rlhf_dist.cluster.inbox import Inbox
from rlhf_dist.cluster.relay_hosts import OFFER, Relays
from rlhf_dist.cluster.standing import Standing, is_done
from rlhf_dist.cluster.waits import fetch
from rlhf_dist.errors import RayLost, RlhfError, WeightSyncError
from rlhf_dist.loop.events import Event, Lost
from rlhf_dist.telemetry.timeline import Patience
from rlhf_dist.weights.receipts import Announcement

STILL_EARLIER = "its relay is still copying an earlier one"

Missed = Callable[[str, Standing, int, str], list[str]]
"""(worker, its standing, version, why) of a push that a worker misses -> what was wrong, a sentence each."""


class RelayedLoads:
    """Of one fleet."""

    def __init__(
        self,
        relays: Relays,
        inbox: Inbox,
        standings: Mapping[str, Standing],
        *,
        limit_s: float,
        missed: Missed,
        silence: Callable[[str, str], str],
    ) -> None:
        """`standings`: of the workers that are left. `limit_s`: for one push. `silence`: (who, what they did not do) ->
        the same with what they are doing."""
        self._relays, self._inbox, self._standings = relays, inbox, standings
        self._limit_s, self._missed, self._silence = limit_s, missed, silence
        self._calls: dict[str, Any] = {}
        """Relay -> its last call, or the one that comes before it."""
        self._copies: dict[str, tuple[Any, Announcement]] = {}
        """Relay -> its handle then, and what it copied last: what one that was lost has copied may be gone."""

    def forget(self) -> None:
        """The learner is another one now, and its versions are."""
        self._copies.clear()

    def load(self, announcement: Announcement, patience: Patience) -> list[str]:
        """Let the workers of other nodes load as soon as their node has the bytes; without them they miss the push.

        A relay that still copies an earlier version is neither asked nor waited for.
        """
        if self._relays.offer is None:
            return []
        busy = [relay for relay, call in self._calls.items() if not is_done(call)]
        problems = [why for relay in busy for why in self._without(relay, announcement, STILL_EARLIER)]
        offer = self._relays.offer.offer.remote(announcement)
        try:
            if not self._inbox.wait([offer], patience):
                raise WeightSyncError(self._silence(OFFER, "did not offer it in time"))
            address = fetch(offer, OFFER, "offer", self._limit_s)
        except RayLost:
            raise
        except RlhfError as error:
            free = [relay for relay in self._relays.fetch if relay not in busy]
            return problems + [why for relay in free for why in self._without(relay, announcement, str(error))]
        sent = self._relays.send(announcement, address, {*busy, *self._relays.idle(self._standings)})
        self._calls |= sent
        relays = {call: relay for relay, call in sent.items()}
        while relays and (done := self._inbox.wait(list(relays), patience)):
            for call in done:
                problems += self._loaded(relays.pop(call), call, announcement)
        late = {relay: self._silence(relay, "did not copy it in time") for relay in relays.values()}
        return problems + [why for name, how in late.items() for why in self._without(name, announcement, how)]

    def invite(self, worker: str, announcement: Announcement) -> None:
        """Ask a worker that has come back to load the published version, once its node has it.

        Its node may have missed the version, since nobody there could load it. Nobody waits for what is copied then.
        """
        relay = self._relays.of_worker[worker]
        owner, found = self._copies.get(relay, (None, None))
        if found is not None and found.version == announcement.version and owner is self._relays.fetch.get(relay):
            self._standings[worker].ask_to_load(found)
        elif relay not in self._calls or is_done(self._calls[relay]):
            call = self._calls[relay] = self._relays.offer.offer.remote(announcement)
            self._inbox.expect(call, partial(self._offered, relay, announcement, call))

    def _offered(self, relay: str, announcement: Announcement, asked: Any, call: Any) -> Sequence[Event]:
        """`asked`: the call; by now the relay may have been asked for more."""
        try:
            address = fetch(call, OFFER, "offer", self._limit_s)
        except RayLost:
            raise
        except RlhfError as error:
            return [Lost(OFFER, f"{OFFER} did not offer version {announcement.version}: {error}")]
        if self._calls.get(relay) is asked and relay in self._relays.fetch:
            owner = self._relays.fetch[relay]
            sent = self._calls[relay] = owner.fetch.remote(announcement, address)
            self._inbox.expect(sent, partial(self._copied, relay, owner))
        return []

    def _copied(self, relay: str, owner: Any, call: Any) -> Sequence[Event]:
        """Its workers are asked at the next look, if it is the published version still.

        A relay that cannot copy is lost: its workers would wait for a push that may never come without them.
        """
        try:
            self._copies[relay] = owner, fetch(call, relay, "fetch", self._limit_s)
        except RayLost:
            raise
        except RlhfError as error:
            return [Lost(relay, f"{relay} did not copy the published weights: {error}")]
        return []

    def _loaded(self, relay: str, call: Any, announcement: Announcement) -> list[str]:
        """The node has the bytes, or could not get them."""
        try:
            found: Announcement = fetch(call, relay, "fetch", self._limit_s)
        except RayLost:
            raise
        except RlhfError as error:
            return self._without(relay, announcement, str(error))
        self._copies[relay] = self._relays.fetch[relay], found
        for name in self._relays.workers(relay):
            if name in self._standings:
                self._standings[name].ask_to_load(found)
        return []

    def _without(self, relay: str, announcement: Announcement, why: str) -> list[str]:
        """The workers of a node that did not get the version."""
        problems: list[str] = []
        for name in self._relays.workers(relay):
            if (standing := self._standings.get(name)) is not None:
                text = f"{name} did not get version {announcement.version}: {why}"
                problems += self._missed(name, standing, announcement.version, text)
        return problems
