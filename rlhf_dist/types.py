"""The records that cross rooms: Prompt -> Request -> Trajectory (in a Group) -> Experience -> Batch.

Frozen and slotted. Sequences are ragged, so that nothing is padded between processes.
Arrays are numpy: Ray ships them without a copy on one machine, and the config and the CLI need no torch to import this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np

RecordT = TypeVar("RecordT")
Purpose = Literal["train", "eval", "eval_greedy", "baseline"]
"""What samples are for: training, an evaluation, its greedy responses, or greedy ones that training compares with."""
PROMPT_ROLE, POLICY_ROLE = "prompt", "assistant"
"""Roles of segments: everything before the first response as one, and what the policy sampled."""
NO_VERSION = -1
"""Version of a token that no weights of the run sampled."""
UNFINISHED = "unfinished"
"""Finish reason of a sample that another rollout worker is to go on with."""


@dataclass(frozen=True, slots=True)
class Handle(Generic[RecordT]):
    """A reference to a record that stays where it was made, opaque to the loop."""

    place: Any
    """What the fleet that made the handle finds the record by: a Ray object reference, say."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    """The text of the turn."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to the policy. Made by `data`, sampled `group_size` times by a rollout worker."""

    uid: str
    """Names this issue of the prompt, once in a run: `EPOCH/INDEX` in training, `eval/INDEX` held out."""
    messages: tuple[Message, ...]
    """The conversation so far; never empty, the last turn is the user's."""
    answer: str
    """What a rule compares with; empty when the data has none."""
    source: str
    """Where it came from: the task's name or the file's; shown in tables."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample; made from the `rollout` section, or greedy for evaluation."""

    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    """0 is off."""
    max_tokens: int
    """Response tokens at most."""
    stop: tuple[str, ...]
    """Strings that end a response."""
    masked: bool = False
    """Under the engine's mask, if it has one."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be sampled `n` times. Made by the loop, answered by a rollout worker with a `Group`."""

    prompt: Prompt
    attempt: int
    """0 for the first; one more each time the prompt is submitted again."""
    purpose: Purpose
    sampling: Sampling
    seeds: tuple[int, ...]
    """n; of each sample, from the run's seed, uid and sample, not attempt: a lost group is sampled again the same."""
    part: int = 0
    """How often a worker has handed this attempt over to another."""
    begun: Handle[Group] | None = None
    """The samples as the last of them left them; those that are `UNFINISHED` go on from there. None in part 0."""
    life: int = 0
    """How often the learner was started again before, so that what is heard of an earlier life changes nothing."""

    @property
    def uid(self) -> str:
        """The prompt's."""
        return self.prompt.uid

    @property
    def key(self) -> str:
        """Names the request among all that are ever made in a run, but for those of different evaluations."""
        named = f"{self.purpose}/{self.uid}/{self.attempt}" + (f"@{self.life}" if self.life else "")
        return named + (f"+{self.part}" if self.part else "")

    @property
    def n(self) -> int:
        """Samples."""
        return len(self.seeds)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a trajectory's tokens by one author; it ends where the next begins."""

    role: str
    """`prompt`: everything before the first response. `assistant`: sampled by the policy. Else whose words they are."""
    turn: int
    """From 0: the number of the policy's response that the segment is, or is read by."""
    start: int
    """Its first token."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One sample: a conversation as tokens. Made by a rollout worker. T are all tokens, N those that were sampled."""

    tokens: np.ndarray
    """int32 [T]; prompt, response and any further turns, the tokens that ended a response included."""
    loss_mask: np.ndarray
    """bool [T]; true where the policy sampled the token. The first is never sampled, one at least is."""
    logprobs: np.ndarray
    """float32 [T]; of each sampled token under what it was drawn from (with temperature and cuts); 0 for the others."""
    versions: np.ndarray
    """int32 [T]; the weight version that sampled each token; `NO_VERSION` for the others."""
    cache_versions: np.ndarray
    """int32 [T]; no key or value that a token was sampled from is of older weights than these. As `versions`, but lower
    for what is sampled after a push with `rollout.kv_after_push: keep`; `NO_VERSION` for the others."""
    segments: tuple[Segment, ...]
    """At least two: the prompt and a response. The last is a response."""
    finish_reason: str
    """Of the last response: `stop` (ended by itself) or `length` (truncated at max_tokens). `UNFINISHED` on its way
    from one worker to another alone; then the last response may have no tokens."""
    texts: tuple[str, ...]
    """Of each segment after the first: decoded, special tokens left out."""
    special_texts: tuple[str, ...] = ()
    """The same with special tokens, but for the end's; none where no reward asks for them (`keep_special_tokens`)."""

    @property
    def length(self) -> int:
        """N."""
        return int(self.loss_mask.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        ends = [*(segment.start for segment in self.segments[1:]), len(self.tokens)]
        return max(end - s.start for s, end in zip(self.segments, ends, strict=True) if s.role == POLICY_ROLE)


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one request. Made by a rollout worker; stays in the object store."""

    request: Request
    trajectories: tuple[Trajectory, ...]
    """n."""

    @property
    def prompt(self) -> Prompt:
        """The request's."""
        return self.request.prompt

    def sampled(self, per_token: np.ndarray) -> list[np.ndarray]:
        """Values of the group's sampled tokens, sample after sample [sum of N, ...] -> one array [N, ...] a sample."""
        return np.split(per_token, np.cumsum([sample.length for sample in self.trajectories])[:-1])


@dataclass(frozen=True, slots=True)
class GroupHead:
    """What the controller needs of a `Group`: everything but the tokens."""

    uid: str
    tokens: np.ndarray
    """int64 [n]; all tokens of each trajectory."""
    lengths: np.ndarray
    """int64 [n]; the sampled ones."""
    longest: np.ndarray
    """int64 [n]; those of the longest response: `max_tokens` is the limit of one."""
    finish_reasons: tuple[str, ...]
    oldest_version: int
    """Lowest weight version among the sampled tokens."""
    newest_version: int
    """Highest among them."""
    first_version: int
    """Lowest among the first sampled tokens of its trajectories."""
    mean_version: float
    """Over all sampled tokens."""


@dataclass(frozen=True, slots=True)
class DroppedPrompt:
    """A prompt that gave no group, and why. Counted and shown, never silent."""

    uid: str
    reason: str
    """One of a few short fixed words (`prompt_too_long`), used as a counter's name."""
    detail: str
    """The sentence for a person: the length and the limit."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A rollout worker has sampled all of a request."""

    key: str
    """The request's."""
    head: GroupHead
    body: Handle[Group]


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A rollout worker cannot sample a request."""

    key: str
    drop: DroppedPrompt


@dataclass(frozen=True, slots=True)
class Partial:
    """A request that another rollout worker is to go on with: its own has stopped to sample it, or is lost."""

    key: str
    lengths: np.ndarray
    """int64 [n]; tokens sampled so far."""
    body: Handle[Group]
    """The samples as they are; see `Request.begun`."""


@dataclass(frozen=True, slots=True)
class PartialLost:
    """Nobody can go on with a request: what was sampled of it is lost with the worker that had it."""

    key: str


@dataclass(frozen=True, slots=True)
class Copied:
    """What a rollout worker has sampled of a request until now, for the case that it is lost. It samples on."""

    key: str
    body: Handle[Group]
    """As that of `Partial`."""


@dataclass(frozen=True, slots=True)
class EngineWork:
    """What an engine has done since it started."""

    tokens: int = 0
    """Sampled: one a response and decoding step."""
    busy_s: float = 0.0
    """Seconds inside decoding steps, prefills included."""
    kv_use: float = 0.0
    """Sum over decoding steps of the share of the cache in use after it."""

    def less(self, other: EngineWork) -> EngineWork:
        """Without what had been done before."""
        return EngineWork(self.tokens - other.tokens, self.busy_s - other.busy_s, self.kv_use - other.kv_use)


@dataclass(frozen=True, slots=True)
class Beat:
    """A rollout worker's sign of life."""

    worker: str
    steps: int
    """Decoding steps that its engine has done since it started."""
    work: EngineWork = field(default_factory=EngineWork, compare=False)


@dataclass(frozen=True, slots=True)
class NonFinite:
    """A response with a reward that is NaN or infinite (`scoring.non_finite`) or that failed (`scoring.on_failure`)."""

    uid: str
    """Of its prompt; empty for a text that came without one."""
    sample: int
    """Which of its group's."""
    rewards: Mapping[str, float]
    """Name of each reward that came and is not finite -> what it was."""
    response: str
    """Its text as Python writes it, cut for a message."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Name of each reward that failed for this response alone, too -> why, in its own words."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The rewards of one prompt group."""

    total: np.ndarray
    """float32 [n]; weighted sum of the components; NaN for a response that is to be left out (see `NonFinite`)."""
    components: Mapping[str, np.ndarray]
    """Name of each reward -> float32 [n], before its weight."""
    distinct: np.ndarray
    """float32 [n]; share of a response's word pairs that differ (distinct-2); 1 for less than two words."""
    hashes: np.ndarray
    """uint64 [n]; of each response's text, to tell how many of a step are different."""
    non_finite: tuple[NonFinite, ...] = ()
    """The responses with a reward that failed, or that came as NaN or infinite, also where that counts as 0."""
    asked_again: int = 0
    """Responses that a reward was asked for by themselves, since it had failed for them together."""


@dataclass(frozen=True, slots=True)
class ReferenceHead:
    """How far a prompt group's responses are from the reference model. Made by a reference server."""

    kl: np.ndarray
    """float32 [n]; sum over the sampled tokens of rollout logprob - reference logprob (k1), nats per response."""
    logprob: np.ndarray
    """float32 [n]; sum of the reference's logprobs over the sampled tokens, nats."""


@dataclass(frozen=True, slots=True)
class Referenced:
    """A group's distance to the reference, with its per-token logprobs where they were made."""

    head: ReferenceHead
    logprobs: Handle[np.ndarray]
    """float32 [sum of N] of the group's sampled tokens, sample after sample, at the sampler's temperature."""


@dataclass(frozen=True, slots=True)
class Experience:
    """A group with its scores: what the learner learns from. `n` below are the samples that were not left out."""

    prompt: Prompt
    head: GroupHead
    scores: Scores
    key: str
    """Of its request: the collator has the group by it."""
    reference: ReferenceHead | None
    """None in a run without a reference model."""
    baseline: float = 0.0
    """Taken off each of its scores: with remax the score of the greedy response to the same prompt, else 0."""
    left_out: tuple[int, ...] = ()
    """Samples of the group that have no place in head, scores and reference: a reward of theirs is not finite."""

    @property
    def samples(self) -> np.ndarray:
        """int64 [n]; place in head, scores and reference -> sample of the group."""
        return np.setdiff1d(np.arange(len(self.head.lengths) + len(self.left_out)), self.left_out)


@dataclass(frozen=True, slots=True)
class Credit:
    """How much each row is to be encouraged."""

    advantages: np.ndarray
    """float32 [B]; spread over the row's sampled tokens."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """A rollout worker's proof that it loaded a version."""

    worker: str
    version: int
    hashes: tuple[str, ...]
    """xxh3-128 of each bucket as received; all were hashed before the first was loaded."""
    loaded: Mapping[str, int]
    """Announced parameter -> how many of its elements the engine copied into its own memory."""
    unfilled: tuple[str, ...] = ()
    """Parameters and layers, by the engine's own names, that the engine reports as not loaded or loaded in part."""
