"""Which server scores or compares a finished group, also where servers are lost meanwhile. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_dist.loop.events import Command, Compare, Compared, KeepReference, MemberKind, ReferenceKept, Score, Tell
from rlhf_dist.loop.healing import Healing
from rlhf_dist.loop.members import LOGPROBS, SERVERS, Members
from rlhf_dist.loop.open_groups import OpenRequest


class Servers:
    """Asks who has least to do. Where no server of a kind is there, groups wait for the first that comes back.

    A group that a server has had for long is given to another one, too, where one has nothing to do ("hedging"): the
    first answer counts.
    """

    def __init__(self, members: Members, healing: Healing, hedge_s: float = 0.0) -> None:
        """`hedge_s`: how long one server may have a group before another one is asked, too; 0: for ever."""
        self._members, self._healing, self._hedge_s = members, healing, hedge_s
        self._asked: dict[tuple[MemberKind, str], float] = {}
        """(kind, request key) -> when a server was last asked, of what may not be answered; empty without hedging."""
        self._waiting: dict[MemberKind, list[str]] = {}
        """Request keys."""

    def ask(self, one: OpenRequest, kind: MemberKind, now: float) -> list[Command]:
        """Have a server work on a group whose tokens are there."""
        key, body = one.request.key, one.body
        assert body is not None, "nobody asks about a group that is not finished"
        server = self._members.server(kind, key, now)
        if server is None:
            self._waiting.setdefault(kind, []).append(key)
            return []
        if self._hedge_s:
            self._asked[kind, key] = now
        if kind == "scoring":
            return [Score(server, key, body)]
        return [Compare(server, key, body, one.request.sampling.temperature)]

    def compared(self, one: OpenRequest, event: Compared, now: float) -> list[Command]:
        """A reference server has answered; its logprobs are lost with it until the collator has them."""
        one.reference = event.reference.head
        self._members.server("collator", event.key + LOGPROBS, now)
        return [KeepReference(event.key, event.reference.logprobs)]

    def reference_kept(self, one: OpenRequest, event: ReferenceKept, now: float) -> list[Command]:
        """The collator has them; or they were lost before, and are computed again.

        Raises `ActorLost` where those of a group were lost too often.
        """
        one.reference_kept = not event.lost
        if not event.lost:
            return []
        one.reference = None
        lost = f"the reference logprobs of {event.key} were lost before the collator had them"
        self._healing.lost_again(f"what a reference server computed for {event.key}", lost, now)
        text = f"{lost}, and are computed again"
        return [Tell("asked_again", text, one.request.uid), *self.ask(one, "reference", now)]

    def hedge(self, open_requests: Mapping[str, OpenRequest], now: float) -> list[Command]:
        """Ask a second server about what the first has had for long."""
        commands: list[Command] = []
        for (kind, key), since in list(self._asked.items()):
            one = open_requests.get(key)
            if one is None or not one.wants(kind):
                del self._asked[kind, key]
            elif now - since >= self._hedge_s and self._members.has_idle(kind):
                text = f"{key} has waited {now - since:.0f} s for a {kind} server, and another one is asked, too"
                commands += [*self.ask(one, kind, now), Tell("hedged", text, one.request.uid)]
        return commands

    def lost(
        self, had: Mapping[MemberKind, Sequence[str]], open_requests: Mapping[str, OpenRequest], now: float
    ) -> list[Command]:
        """Others do what a lost process had as a server; `had`: request keys."""
        return [
            command
            for kind, keys in had.items()
            if kind in SERVERS
            for key in keys
            if (one := open_requests.get(key)) is not None and one.wants(kind)
            for command in self.ask(one, kind, now)
        ]

    def returned(self, open_requests: Mapping[str, OpenRequest], now: float) -> list[Command]:
        """A server is back: what has waited for one."""
        waiting, self._waiting = self._waiting, {}
        return self.lost(waiting, open_requests, now)
