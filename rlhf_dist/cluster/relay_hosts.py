"""The processes that bring published weights to other nodes than learner rank 0's, and the fleet's view of them."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from rlhf_dist.cluster.roster import Alive, work
from rlhf_dist.cluster.spec import ActorSpec, enter
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.relay import Address, Fetch, Offer

SECRET_BYTES = 32
OFFER = "weight relay of the learner"


class OfferHost(Alive):
    """On the learner's node: hands out the version that was published last."""

    def __init__(self, spec: ActorSpec, secret: bytes) -> None:
        enter(spec)
        self._name = spec.name
        self._offer = Offer(ray.util.get_node_ip_address(), secret, timeout_s=spec.config.weights.timeout_s)

    @work
    def offer(self, announcement: Announcement) -> Address:
        """See `Offer.offer`; returns where."""
        self._offer.offer(announcement)
        return self._offer.address

    def ready(self) -> str:
        """Answers once it listens."""
        return self._name


class FetchHost(Alive):
    """On each other node: copies it into that node's shared memory."""

    def __init__(self, spec: ActorSpec, secret: bytes) -> None:
        enter(spec)
        self._name = spec.name
        self._fetch = Fetch(secret, timeout_s=spec.config.weights.timeout_s)

    @work
    def fetch(self, announcement: Announcement, address: Address) -> Announcement:
        """See `Fetch.fetch`."""
        return self._fetch.fetch(announcement, address)

    def close(self) -> None:
        """Remove the node's file."""
        self._fetch.close()

    def ready(self) -> str:
        """Answers once it can be asked."""
        return self._name


def new_secret() -> bytes:
    """Of one run."""
    return secrets.token_bytes(SECRET_BYTES)


@dataclass(slots=True)
class Relays:
    """Which relay brings the weights to which rollout worker; workers on the learner's node need none."""

    offer: Any
    """The one on the learner's node; None where all workers are there."""
    fetch: Mapping[str, Any]
    """Name -> handle of the others."""
    of_worker: Mapping[str, str]
    """Rollout worker -> the name of its node's relay."""
    nodes: Mapping[str, str] = field(default_factory=dict)
    """Name of a relay -> the address of its node."""

    def node_of(self, name: str) -> str:
        """The address of a relay's or a worker's node; empty: the learner's, or not known."""
        return self.nodes.get(self.of_worker.get(name, name), "")

    def idle(self, workers: Collection[str]) -> list[str]:
        """Those that have none of these workers on their node; one that is gone would only be waited for."""
        return [name for name in self.fetch if not any(worker in workers for worker in self.workers(name))]

    def admit(self, name: str, relay: Any) -> None:
        """One that was started again. What it had copied lies where it was, until it is asked for a version."""
        if name == OFFER:
            self.offer = relay
        else:
            self.fetch = {**self.fetch, name: relay}

    def send(self, announcement: Announcement, address: Address, busy: Collection[str]) -> dict[str, Any]:
        """Let the nodes copy the version that is offered there, but for those whose relay is `busy` or has no worker.

        Returns name of the relay -> the call, which gives the node's announcement.
        """
        free = {name: relay for name, relay in self.fetch.items() if name not in busy}
        return {name: relay.fetch.remote(announcement, address) for name, relay in free.items()}

    def all(self) -> dict[str, Any]:
        """Name -> handle of every one."""
        return dict(self.fetch) | ({} if self.offer is None else {OFFER: self.offer})

    def workers(self, relay: str) -> list[str]:
        """Those whose node it serves."""
        return [worker for worker, own in self.of_worker.items() if own == relay]


ONE_NODE = Relays(None, {}, {})
"""Of a run that is all on one node."""
