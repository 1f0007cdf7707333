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


@dataclass(frozen=True, slots=True)
class Response:
    """What the policy sampled in one turn. Made by an engine."""

    key: str
    """The turn's."""
    tokens: Sequence[int]
    """At least one; the token that ended it included."""
    logprobs: np.ndarray
    """float32 [tokens]."""
    versions: np.ndarray
    """int32 [tokens]."""
    finish_reason: str
    text: str
    special_text: str | None = None
    """With the special tokens inside; None where no reward asks for it."""


def single_turn(prompt: Sequence[int], response: Response) -> Trajectory:
    """A prompt's tokens and the response to them."""
    before, after = len(prompt), len(response.tokens)
    return Trajectory(
        tokens=np.array([*prompt, *response.tokens], np.int32),
        loss_mask=np.arange(before + after) >= before,
        logprobs=np.concatenate([np.zeros(before, np.float32), response.logprobs]),
        versions=np.concatenate([np.full(before, NO_VERSION, np.int32), response.versions]),
        segments=(Segment(PROMPT_ROLE, 0, 0), Segment(POLICY_ROLE, 0, before)),
        finish_reason=response.finish_reason,
        texts=(response.text,),
        special_texts=() if response.special_text is None else (response.special_text,),
    )


def head_of(group: Group, worker: str) -> GroupHead:
    """The small part of a group."""
    versions = np.concatenate([sample.versions[sample.loss_mask] for sample in group.trajectories])
    return GroupHead(
        uid=group.prompt.uid,
        tokens=np.array([len(sample.tokens) for sample in group.trajectories]),
        lengths=np.array([sample.length for sample in group.trajectories]),
        finish_reasons=tuple(sample.finish_reason for sample in group.trajectories),
        oldest_version=int(versions.min()),
        newest_version=int(versions.max()),
        first_version=min(int(sample.versions[sample.loss_mask][0]) for sample in group.trajectories),
        mean_version=float(versions.mean()),
        worker=worker,
    )
