"""The actor side: requests -> groups -> scores and reference logprobs -> experiences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_dist.errors import RunError
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.non_finite import NON_FINITE, dropped as without_rewards, with_finite_rewards
from rlhf_dist.loop.ports import References, Rollouts, Scoring
from rlhf_dist.types import (
    DroppedPrompt,
    Experience,
    Group,
    GroupHead,
    Handle,
    NonFinite,
    Referenced,
    Request,
    Scores,
)


@dataclass(frozen=True, slots=True)
class Collected:
    """What became of prompts that were sampled and scored."""

    experiences: list[Experience]
    """In the order of the prompts, without the samples that `scoring.non_finite: mask` leaves out."""
    dropped: list[DroppedPrompt]
    """Prompts that gave none, and why."""
    non_finite: tuple[NonFinite, ...]
    """All responses with a reward that came as NaN or infinite."""


def collect(
    requests: Sequence[Request],
    *,
    rollouts: Rollouts,
    scoring: Scoring,
    reference: References | None = None,
    ledger: Ledger | None = None,
) -> Collected:
    """Answer and score each request; a group is scored while the others are still being sampled.

    Evaluation has no ledger, and a run without KL no reference. Raises `RunError` when a prompt gave neither an
    experience nor a reason.
    """
    by_uid = {request.uid: request for request in requests}
    finished: dict[str, tuple[GroupHead, Handle[Group]]] = {}
    pending: dict[str, Handle[Scores]] = {}
    compared: dict[str, Handle[Referenced]] = {}
    dropped: list[DroppedPrompt] = []
    for result in rollouts.generate(requests):
        if isinstance(result, DroppedPrompt):
            dropped.append(result)
            continue
        head, body = result
        finished[head.uid] = (head, body)
        pending[head.uid] = scoring.submit(body)
        if reference is not None:
            compared[head.uid] = reference.submit(body, by_uid[head.uid].sampling.temperature)
    lost = by_uid.keys() - finished.keys() - {drop.uid for drop in dropped}
    if lost:
        raise RunError(
            f"{len(lost)} of {len(requests)} prompts came back neither sampled nor dropped, first {min(lost)}"
        )
    if ledger is not None:
        for drop in dropped:
            ledger.drop([drop.uid], drop.reason)
        ledger.finish(finished)
    scores = scoring.gather(pending)
    references = {} if reference is None else reference.gather(compared)
    if ledger is not None:
        ledger.score(scores)
    experiences = [
        Experience(
            request.prompt,
            head=finished[uid][0],
            scores=scores[uid],
            body=finished[uid][1],
            reference=references.get(uid),
        )
        for uid, request in by_uid.items()
        if uid in finished
    ]
    kept = [with_finite_rewards(experience) for experience in experiences]
    gone = [without_rewards(whole) for whole, left in zip(experiences, kept, strict=True) if left is None]
    if ledger is not None:
        ledger.drop([drop.uid for drop in gone], NON_FINITE)
    return Collected(
        [experience for experience in kept if experience is not None],
        dropped + gone,
        tuple(found for experience in experiences for found in experience.scores.non_finite),
    )
