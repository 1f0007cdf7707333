"""Turns, the responses to them, samples as trajectories, and the small part of a group. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_dist.types import NO_VERSION, POLICY_ROLE, PROMPT_ROLE, Group, GroupHead, Sampling, Segment, Trajectory


@dataclass(frozen=True, slots=True)
class Turn:
    """One response to be sampled. Made by a worker, answered by an engine with a `Response`."""

    key: str
    """Names it among all that are under way in the engine."""
    context: Sequence[int]
    """Tokens that stand before the response; at least one."""
    sampling: Sampling
    seed: int
    """Of this response alone; greedy ones do not use it."""
    begun: Response | None = None
    """`UNFINISHED`: its beginning, from another engine. The response goes on from there, and has it in itself."""


@dataclass(frozen=True, slots=True)
class Response:
    """What the policy sampled in one turn. Made by an engine."""

    key: str
    """The turn's."""
    tokens: Sequence[int]
    """At least one, the token that ended it included; none or more where it is `UNFINISHED`."""
    logprobs: np.ndarray
    """float32 [tokens]."""
    versions: np.ndarray
    """int32 [tokens]."""
    cache_versions: np.ndarray
    """int32 [tokens]; see `Trajectory`."""
    finish_reason: str
    text: str
    special_text: str | None = None
    """With the special tokens inside; None where no reward asks for it."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the policy read, and what it said to it."""

    read: Sequence[int]
    """Tokens: the prompt at first, later what stands between two responses."""
    text: str
    """Of a later one: the observation, as the template was given it."""
    response: Response


def conversation(exchanges: Sequence[Exchange]) -> Trajectory:
    """At least one, in their order, as one trajectory; only the responses are sampled."""
    responses = [exchange.response for exchange in exchanges]
    parts = [np.asarray(part, np.int32) for one in exchanges for part in (one.read, one.response.tokens)]
    starts = np.cumsum([0, *map(len, parts)])
    mask = np.repeat([False, True] * len(exchanges), np.diff(starts))
    logprobs, versions = np.zeros(len(mask), np.float32), np.full(len(mask), NO_VERSION, np.int32)
    cache_versions = versions.copy()
    logprobs[mask] = np.concatenate([response.logprobs for response in responses])
    versions[mask] = np.concatenate([response.versions for response in responses])
    cache_versions[mask] = np.concatenate([response.cache_versions for response in responses])
    segments, texts, special = [], list[str](), list[str]()
    for turn, exchange in enumerate(exchanges):
        segments += [
            Segment("user" if turn else PROMPT_ROLE, turn, int(starts[2 * turn])),
            Segment(POLICY_ROLE, turn, int(starts[2 * turn + 1])),
        ]
        texts += [exchange.text, exchange.response.text]
        special += [exchange.text, exchange.response.special_text or ""]
    return Trajectory(
        tokens=np.concatenate(parts),
        loss_mask=mask,
        logprobs=logprobs,
        versions=versions,
        cache_versions=cache_versions,
        segments=tuple(segments),
        finish_reason=responses[-1].finish_reason,
        texts=tuple(texts[1:]),
        special_texts=() if responses[0].special_text is None else tuple(special[1:]),
    )


def exchanges_of(sample: Trajectory) -> list[Exchange]:
    """The way back from `conversation`. Of responses before the last it is not known how they ended."""
    found: list[Exchange] = []
    starts = [segment.start for segment in sample.segments]
    ends = [*starts[2::2], len(sample.tokens)]
    for turn, end in enumerate(ends):
        read, said = starts[2 * turn : 2 * turn + 2]
        response = Response(
            key="",
            tokens=sample.tokens[said:end].tolist(),
            logprobs=sample.logprobs[said:end],
            versions=sample.versions[said:end],
            cache_versions=sample.cache_versions[said:end],
            finish_reason=sample.finish_reason if turn == len(ends) - 1 else "",
            text=sample.texts[2 * turn],
            special_text=sample.special_texts[2 * turn] if sample.special_texts else None,
        )
        found.append(Exchange(sample.tokens[read:said].tolist(), sample.texts[2 * turn - 1] if turn else "", response))
    return found


def head_of(group: Group) -> GroupHead:
    """The small part of a group."""
    versions = np.concatenate([sample.versions[sample.loss_mask] for sample in group.trajectories])
    return GroupHead(
        uid=group.prompt.uid,
        tokens=np.array([len(sample.tokens) for sample in group.trajectories]),
        lengths=np.array([sample.length for sample in group.trajectories]),
        longest=np.array([sample.longest for sample in group.trajectories]),
        finish_reasons=tuple(sample.finish_reason for sample in group.trajectories),
        oldest_version=int(versions.min()),
        newest_version=int(versions.max()),
        first_version=min(int(sample.versions[sample.loss_mask][0]) for sample in group.trajectories),
        mean_version=float(versions.mean()),
    )
