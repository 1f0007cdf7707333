"""Groups of single-turn samples from flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_dist.rollout.trajectories import Exchange, Response, conversation
from rlhf_dist.types import (
    NO_VERSION,
    POLICY_ROLE,
    PROMPT_ROLE,
    Group,
    Message,
    Prompt,
    Request,
    Sampling,
    Segment,
    Trajectory,
)

if TYPE_CHECKING:
    from rlhf_dist.learner.micro_batch_rows import Row

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=40, stop=())
PROMPT = Prompt("0/0", (Message("user", "x"),), "", "test")


def request_of(prompt: Prompt, n: int = 1, sampling: Sampling = SAMPLING) -> Request:
    """For training, with the seeds 0, 1, 2 ..."""
    return Request(prompt, 0, "train", sampling, tuple(range(n)))


def single_turn(prompt: Sequence[int], response: Response) -> Trajectory:
    """A prompt's tokens and the response to them."""
    return conversation([Exchange(prompt, "", response)])


def group_of(
    prompt_tokens: Sequence[int] | np.ndarray,
    tokens: Sequence[int] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    *,
    prompt: Prompt = PROMPT,
    logprobs: np.ndarray | float = 0.0,
    version: int = 0,
    reasons: Sequence[str] = (),
    texts: Sequence[str] = (),
    special: Sequence[str] = (),
) -> Group:
    """`tokens` and `logprobs` [N] are the responses' one after another, of these `lengths`."""
    n, cuts = len(lengths), np.cumsum(lengths)[:-1]
    flat = np.broadcast_to(np.asarray(logprobs, np.float32), (len(tokens),))
    parts = zip(
        np.split(np.asarray(tokens), cuts),
        np.split(flat, cuts),
        reasons or ("stop",) * n,
        texts or ("",) * n,
        special or (None,) * n,
        strict=True,
    )
    of_token = np.full(len(tokens), version, np.int32)
    responses = [
        Response("", part.tolist(), logps, of_token[: len(part)], of_token[: len(part)], reason, text, special_text)
        for part, logps, reason, text, special_text in parts
    ]
    prompt_ids = np.asarray(prompt_tokens).tolist()
    return Group(request_of(prompt, n), tuple(single_turn(prompt_ids, response) for response in responses))


def two_turns(prompt: Prompt = PROMPT, *, logprobs: Sequence[float] = (-1.0, -2.0, -3.0), version: int = 0) -> Group:
    """One sample: the policy says 5, reads 6 7 and says 8 9. The prompt is 1 2."""
    mask = np.array([False, False, True, False, False, True, True])
    per_token = np.zeros(len(mask), np.float32)
    per_token[mask] = logprobs
    versions = np.where(mask, version, NO_VERSION).astype(np.int32)
    sample = Trajectory(
        tokens=np.array([1, 2, 5, 6, 7, 8, 9], np.int32),
        loss_mask=mask,
        logprobs=per_token,
        versions=versions,
        cache_versions=versions,
        segments=(
            Segment(PROMPT_ROLE, 0, 0),
            Segment(POLICY_ROLE, 0, 2),
            Segment("user", 1, 3),
            Segment(POLICY_ROLE, 1, 5),
        ),
        finish_reason="stop",
        texts=("first", "what it read", "last"),
    )
    return Group(request_of(prompt), (sample,))


def rows_of(group: Group) -> list[Row]:
    """Its samples as rows, for what is worked out by other means."""
    from rlhf_dist.learner.micro_batch_rows import Row  # which imports torch, for which not all wait

    return [Row(sample.tokens, sample.loss_mask) for sample in group.trajectories]


def flat_tokens(group: Group) -> np.ndarray:
    """int32; the sampled tokens, sample after sample."""
    return np.concatenate([sample.tokens[sample.loss_mask] for sample in group.trajectories])


def flat_logprobs(group: Group) -> np.ndarray:
    """float32; theirs."""
    return np.concatenate([sample.logprobs[sample.loss_mask] for sample in group.trajectories])
