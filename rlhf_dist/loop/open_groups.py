"""A request that is under way, with what is known of its answer so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_dist.loop.controller_rules import Rules
from rlhf_dist.loop.events import About, Compared, Kept, MemberKind, ReferenceKept, Scored, Undone
from rlhf_dist.loop.requests import greedy, make_request
from rlhf_dist.types import (
    Answered,
    Copied,
    Experience,
    Group,
    GroupHead,
    Handle,
    Partial,
    PartialLost,
    Prompt,
    ReferenceHead,
    Request,
    Scores,
    Unanswered,
)


@dataclass(slots=True)
class OpenRequest:
    """Changed by the controller alone, as events come."""

    request: Request
    number: int
    """Of a group in training: how many were issued before it. -1 for others."""
    since: float
    """When it was issued."""
    compares: bool
    """A reference model is asked."""
    partner: OpenRequest | None = None
    """Of a greedy baseline: the group that is compared with it. Of such a group: its baseline, while that is open."""
    worker: str = ""
    """Who samples it; empty in the backlog."""
    leaves: bool = False
    """That worker was asked to hand it over."""
    copied: bool = False
    """The collator has a copy of what that worker had sampled at some time."""
    head: GroupHead | None = None
    body: Handle[Group] | None = None
    """Once it is sampled, until all servers have answered: what they are asked about."""
    orphaned: bool = False
    """That worker has been lost since it was sampled; another process may have its name by now."""
    kept: bool = False
    """The collator owns the group."""
    scores: Scores | None = None
    reference: ReferenceHead | None = None
    reference_kept: bool = False
    """The collator owns the reference's logprobs, too."""
    baseline: float = 0.0
    experience: Experience | None = None
    """Once all is there, of a group in training: it is ready."""
    ready: float = 0.0
    """When it became so."""

    @property
    def can_go_on(self) -> bool:
        """Whether another worker can go on from what this one had sampled, once it is lost."""
        return self.copied and self.head is None

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation waits for it."""
        return self.request.purpose in ("eval", "eval_greedy")

    @property
    def trains(self) -> bool:
        """Whether it is a group in training, which has a seat and is in the ledger."""
        return self.request.purpose == "train"

    @property
    def attempt(self) -> tuple[str, int]:
        """(uid, attempt), as the ledger has it."""
        return self.request.uid, self.request.attempt

    def whole(self) -> Experience | None:
        """All that is known of it, once everything that was asked for has come."""
        if self.head is None or self.scores is None or not self.kept or (self.trains and self.partner is not None):
            return None
        if self.compares and not self.reference_kept:
            return None
        request = self.request
        return Experience(request.prompt, self.head, self.scores, request.key, self.reference, self.baseline)

    def wants(self, kind: MemberKind) -> bool:
        """Whether a server of this kind is still to work on it."""
        if self.body is None:
            return False
        return self.scores is None if kind == "scoring" else self.compares and self.reference is None

    def knows(self, event: About) -> bool:
        """Whether the event says what an earlier one has said."""
        match event:
            case Answered() | Unanswered() | Partial() | PartialLost():
                return self.head is not None
            case Copied():  # by a worker that is lost, as it may be by the time that this comes
                return self.head is not None or not self.worker
            case Kept():
                return self.kept
            case Scored():
                return self.scores is not None
            case Compared():
                return self.reference is not None
            case ReferenceKept():  # or of logprobs that are lost by now
                return self.reference is None or self.reference_kept
            case Undone():  # somebody else may have done it by then
                done = {"collator": self.kept or None, "scoring": self.scores, "reference": self.reference}
                return done.get(event.kind) is not None

    def begin_again(self, attempt: int) -> None:
        """The next attempt: with the same seeds, so that the same samples come of it."""
        self.request = replace(self.request, attempt=attempt, part=0, begun=None)
        self.worker, self.leaves, self.orphaned, self.copied = "", False, False, False
        self.head, self.body, self.kept, self.scores = None, None, False, None
        self.reference, self.reference_kept = None, False


def newly_issued(rules: Rules, prompt: Prompt, attempt: int, number: int, now: float) -> tuple[OpenRequest, ...]:
    """A group in training, and the greedy response that it is compared with, where there is one."""
    request = make_request(prompt, "train", rules.group_size, rules.sampling, rules.seed, attempt, rules.life)
    one = OpenRequest(request, number, now, rules.compares)
    if not rules.greedy_baseline:
        return (one,)
    beside = replace(request, purpose="baseline", sampling=greedy(rules.sampling), seeds=request.seeds[:1])
    one.partner = OpenRequest(beside, -1, now, False, one)
    return one, one.partner
