"""The records that cross rooms: Prompt -> Rollout -> Experience -> Batch -> Credit -> StepReport.

Frozen and slotted. Sequences are ragged: flat arrays plus `offsets`, so that nothing is padded between processes.
Arrays are numpy: Ray ships them without a copy on one machine, and the config and the CLI need no torch to import this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Handle = Any
"""A reference to a record that stays where it was made (a Ray object reference), opaque to the loop."""


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

    n: int
    """Samples per prompt."""
    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    """0 is off."""
    max_tokens: int
    """Response tokens at most."""
    stop: tuple[str, ...]
    """Strings that end a response."""
    seed: int | None
    """None: the engine's own stream."""
    masked: bool = False
    """Under the engine's mask, if it has one."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One prompt group as sampled. Made by a rollout worker; stays in the object store."""

    prompt: Prompt
    prompt_tokens: np.ndarray
    """int32 [P]; shared by the group's samples."""
    tokens: np.ndarray
    """int32 [N]; the responses one after another, the token that ended one included."""
    offsets: np.ndarray
    """int64 [n + 1]; sample i is tokens[offsets[i]:offsets[i + 1]]."""
    logprobs: np.ndarray
    """float32 [N]; log-probability of each token under what it was drawn from (temperature and cuts included)."""
    versions: np.ndarray
    """int32 [N]; the weight version that sampled each token."""
    finish_reasons: tuple[str, ...]
    """n of `stop` (ended by itself) or `length` (cut at max_tokens)."""
    texts: tuple[str, ...]
    """n decoded responses, special tokens left out."""
    special_texts: tuple[str, ...] = ()
    """n decoded responses with the special tokens inside them, without the token that ended them; none where no reward
    asks for them (`keep_special_tokens`)."""


@dataclass(frozen=True, slots=True)
class RolloutHead:
    """What the controller needs of a `Rollout`: everything but the tokens."""

    uid: str
    prompt_length: int
    """Tokens."""
    lengths: np.ndarray
    """int64 [n]; response tokens."""
    finish_reasons: tuple[str, ...]
    oldest_version: int
    """Lowest weight version among the tokens."""
    newest_version: int
    worker: str
    """Which worker made it, for messages."""


@dataclass(frozen=True, slots=True)
class DroppedPrompt:
    """A prompt that gave no rollout, and why. Counted and shown, never silent."""

    uid: str
    reason: str
    """One of a few short fixed words (`prompt_too_long`), used as a counter's name."""
    detail: str
    """The sentence for a person: the length and the limit."""


@dataclass(frozen=True, slots=True)
class NonFinite:
    """A response with a reward that is NaN or infinite. What becomes of it says `scoring.non_finite`."""

    uid: str
    """Of its prompt; empty for a text that came without one."""
    sample: int
    """Which of its group's."""
    rewards: Mapping[str, float]
    """Name of each reward that is not finite -> what it was."""
    response: str
    """Its text as Python writes it, cut for a message."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The rewards of one prompt group."""

    total: np.ndarray
    """float32 [n]; weighted sum of the components; NaN for a response that is to be left out (`scoring.non_finite`)."""
    components: Mapping[str, np.ndarray]
    """Name of each reward -> float32 [n], before its weight."""
    distinct: np.ndarray
    """float32 [n]; share of a response's word pairs that are different from each other (distinct-2); 1 for a response
    of less than two words."""
    hashes: np.ndarray
    """uint64 [n]; of each response's text, to tell how many of a step are different."""
    non_finite: tuple[NonFinite, ...] = ()
    """The responses with a reward that came as NaN or infinite, also where that counts as 0."""


@dataclass(frozen=True, slots=True)
class ReferenceHead:
    """How far a prompt group's responses are from the reference model. Made by a reference server."""

    kl: np.ndarray
    """float32 [n]; sum over the response's tokens of rollout logprob - reference logprob (k1), nats per response."""
    logprob: np.ndarray
    """float32 [n]; sum of the reference's logprobs over the response's tokens, nats."""


@dataclass(frozen=True, slots=True)
class Referenced:
    """A group's distance to the reference, with its per-token logprobs where they were made."""

    head: ReferenceHead
    logprobs: Handle
    """Reference to float32 [N], in the order of the rollout's tokens, at the sampler's temperature."""


@dataclass(frozen=True, slots=True)
class Experience:
    """A rollout with its scores: what the learner learns from. `n` below are the samples that were not left out."""

    prompt: Prompt
    head: RolloutHead
    scores: Scores
    rollout: Handle
    """Reference to the `Rollout`."""
    reference: Referenced | None
    """None in a run without a reference model."""
    baseline: float = 0.0
    """Taken off each of its scores: with remax the score of the greedy response to the same prompt, else 0."""
    left_out: tuple[int, ...] = ()
    """Samples of the rollout that have no place in head, scores and reference: a reward of theirs is not finite."""

    @property
    def samples(self) -> np.ndarray:
        """int64 [n]; place in head, scores and reference -> sample of the rollout."""
        return np.setdiff1d(np.arange(len(self.head.lengths) + len(self.left_out)), self.left_out)


@dataclass(frozen=True, slots=True)
class Batch:
    """The experiences of one training step, by rows (one row is one sample). No tokens, only references to them."""

    rollouts: tuple[Handle, ...]
    """G references to `Rollout`s, in the order of the groups."""
    groups: np.ndarray
    """int64 [B]; row -> group."""
    samples: np.ndarray
    """int64 [B]; row -> sample within its group."""
    prompt_lengths: np.ndarray
    """int64 [B] tokens."""
    response_lengths: np.ndarray
    """int64 [B] tokens."""
    ended: np.ndarray
    """bool [B]; false for a response that was cut before its end token."""
    scores: np.ndarray
    """float32 [B]; total reward as scored."""
    distinct: np.ndarray
    """float32 [B]; as `Scores.distinct`."""
    baselines: np.ndarray
    """float32 [B]; as `Experience.baseline`."""
    references: tuple[Handle, ...]
    """G references to the reference's logprobs, as `Referenced.logprobs`; none in a run without a reference."""
    kl: np.ndarray
    """float32 [B]; nats per response to the reference; 0 in a run without one."""
    oldest_version: int
    newest_version: int


@dataclass(frozen=True, slots=True)
class Credit:
    """How much each row is to be encouraged."""

    advantages: np.ndarray
    """float32 [B]; spread over the row's response tokens."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """A rollout worker's proof that it loaded a version."""

    worker: str
    version: int
    names: tuple[str, ...]
    """Parameters received, in order."""
    hashes: tuple[str, ...]
    """xxh3-128 of each bucket as received, hashed before it was loaded."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one training step did."""

    step: int
    """Optimizer step of the run, from 1."""
    version: int
    """Weight version published after it."""
    metrics: Mapping[str, float]
    """Metric name -> value, ready for the sinks."""
