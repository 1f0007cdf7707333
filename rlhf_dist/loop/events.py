"""What the controller hears, and what it says to be done. Records only.

`controller.Controller.handle` turns one into the other; `shell.Shell` carries them between it and the processes.
Events from processes name the request that they are about by its key. One about a request that is not open any more
(answered twice, or by a worker that was given up) is counted and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_dist.loop.activity import NOTHING, Activity
from rlhf_dist.loop.left_out import Tally
from rlhf_dist.types import (
    Answered,
    Beat,
    Copied,
    DroppedPrompt,
    Experience,
    Group,
    Handle,
    NonFinite,
    Partial,
    PartialLost,
    Referenced,
    Request,
    Scores,
    Unanswered,
)

MemberKind = Literal["rollout", "scoring", "reference", "collator", "learner", "critic", "relay"]
"""What a process does for the loop."""
NOBODY = ""
"""In place of a member's name: of a request that waits for a worker."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The collator owns a group's tokens: they outlive the worker that made them."""

    key: str


@dataclass(frozen=True, slots=True)
class Scored:
    """The rewards of a group are there."""

    server: str
    key: str
    scores: Scores


@dataclass(frozen=True, slots=True)
class Compared:
    """A group's distance to the reference is there."""

    server: str
    key: str
    reference: Referenced


@dataclass(frozen=True, slots=True)
class ReferenceKept:
    """The collator owns a group's reference logprobs."""

    key: str
    lost: bool = False
    """It could not get them: they were lost with the server that made them, or did not come in time."""


@dataclass(frozen=True, slots=True)
class Undone:
    """A server, or the collator, could not get at a group's tokens: they were lost with the worker that made them."""

    kind: MemberKind
    server: str
    key: str


@dataclass(frozen=True, slots=True)
class Published:
    """All serving workers hold this version; the groups that it was trained on give their seats back."""

    version: int


@dataclass(frozen=True, slots=True)
class Serving:
    """The rollout workers that may be given work now. The others keep what they have, until they are lost."""

    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """A process is gone, with all that nobody else has."""

    member: str
    why: str
    told: bool = False
    """People know already."""


@dataclass(frozen=True, slots=True)
class Returned:
    """A process that was started again is ready; a rollout worker serves once it has proved the published weights."""

    member: str


@dataclass(frozen=True, slots=True)
class NotStarted:
    """A process that was started again could not."""

    member: str
    why: str
    away: bool = False
    """Its node is gone: it starts when the node is back."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """A process lives, whatever it is busy with."""

    member: str
    activity: Activity = NOTHING


@dataclass(frozen=True, slots=True)
class Asked:
    """An evaluation is wanted: these requests, beside what is under way."""

    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: who has been silent for too long?"""


About = Answered | Unanswered | Partial | PartialLost | Copied | Kept | Scored | Compared | ReferenceKept | Undone
"""Events about one request; `key` is its."""
Event = About | Beat | Published | Serving | Lost | NotStarted | Returned | Pulse | Asked | Tick


@dataclass(frozen=True, slots=True)
class Submit:
    """Give these requests to a rollout worker."""

    worker: str
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """End these requests at a rollout worker; nothing more is wanted of them."""

    worker: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HandOver:
    """Let a rollout worker stop these requests, and say what there is of them: others are to go on."""

    worker: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Keep:
    """Let the collator take a group's tokens over."""

    key: str
    body: Handle[Group]


@dataclass(frozen=True, slots=True)
class KeepReference:
    """Let the collator take a group's reference logprobs over."""

    key: str
    logprobs: Handle[np.ndarray]


@dataclass(frozen=True, slots=True)
class KeepCopy:
    """Let the collator keep what there is of a group that is being sampled."""

    key: str
    body: Handle[Group]


@dataclass(frozen=True, slots=True)
class Recall:
    """A group's worker is lost: have the collator say what it has a copy of."""

    key: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Nobody needs these groups' tokens any more."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Have a server score a group."""

    server: str
    key: str
    body: Handle[Group]


@dataclass(frozen=True, slots=True)
class Compare:
    """Have a server compute a group's reference logprobs."""

    server: str
    key: str
    body: Handle[Group]
    temperature: float


@dataclass(frozen=True, slots=True)
class Book:
    """A line in the ledger: these attempts, each (uid, attempt), have come to this state."""

    state: Literal["issued", "finished", "scored", "dropped"]
    attempts: tuple[tuple[str, int], ...]
    version: int = 0
    """issued: the version that was published then."""
    tokens: tuple[int, ...] = ()
    """finished: sampled tokens of each."""
    reason: str = ""
    """dropped: one of a few fixed words."""


@dataclass(frozen=True, slots=True)
class Tell:
    """A line in the run's event log; a warning is shown to people, too."""

    kind: Literal["dropped", "handed_over", "hedged", "asked_again", "returned", "warning"]
    message: str
    uid: str = ""


@dataclass(frozen=True, slots=True)
class Respawn:
    """End a process, if anything is left of it, and start it again. `Returned` comes of it, or `NotStarted`."""

    member: str


@dataclass(frozen=True, slots=True)
class Rebuild:
    """A rank is lost, and with it what the ranks hold together: all are to be started again."""

    why: str


Limit = Literal["work", "pulse", "start", "step"]
"""What a process did not do in time: go on with its work, give a sign of life, start; or the run did not: a step."""


@dataclass(frozen=True, slots=True)
class TimedOut:
    """A process did not do in time what it should have done."""

    kind: MemberKind
    member: str
    limit_s: float
    limit: Limit = "work"
    ends: bool = True
    """Whether the run ends; else the process counts as lost."""
    detail: str = ""
    """step: who is to blame, and for what."""


Command = (
    Submit
    | Cancel
    | HandOver
    | Keep
    | KeepReference
    | KeepCopy
    | Recall
    | Forget
    | Score
    | Compare
    | Book
    | Tell
    | Respawn
    | Rebuild
    | TimedOut
)


@dataclass(frozen=True, slots=True)
class Taken:
    """A step's groups, and what happened since those before them."""

    experiences: tuple[Experience, ...]
    """As many as a step has, in the order in which they were issued."""
    attempts: tuple[tuple[str, int], ...]
    """(uid, attempt) of each."""
    dropped: Mapping[str, int]
    """Reason -> groups."""
    tally: Tally
    """Of the responses that were scored."""
    late: int
    """Events that changed nothing: they came twice, or after nobody wanted them any more."""
    seconds: float
    """Mean time from issue to ready, of these groups."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request of an evaluation came to: one of the two."""

    experience: Experience | None
    drop: DroppedPrompt | None
    non_finite: tuple[NonFinite, ...] = ()
    """Responses with a reward that failed, or came as NaN or infinite."""
