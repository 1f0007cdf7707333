"""Responses whose reward is NaN or infinite: left out of their groups, counted. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress

import numpy as np

from rlhf_dist.errors import RewardError
from rlhf_dist.loop.reasons import NON_FINITE
from rlhf_dist.scoring.non_finite import first_of
from rlhf_dist.types import DroppedPrompt, Experience, NonFinite, ReferenceHead

MOST_LOST = 10
"""Groups lost for each one of a step, ..."""
MOST_LOST_AT_LEAST = 100
"""... and so many at least, after which a reward is taken for broken: else it would be asked for a whole epoch."""


def with_finite_rewards(experience: Experience) -> Experience | None:
    """The experience without its samples whose total is NaN; None where none is left. No token is moved."""
    kept = np.isfinite(experience.scores.total)
    if kept.all():
        return experience
    if not kept.any():
        return None
    head, scores, reference = experience.head, experience.scores, experience.reference
    if reference is not None:
        reference = ReferenceHead(reference.kl[kept], reference.logprob[kept])
    return replace(
        experience,
        head=replace(
            head,
            tokens=head.tokens[kept],
            lengths=head.lengths[kept],
            finish_reasons=tuple(compress(head.finish_reasons, kept.tolist())),
        ),
        scores=replace(
            scores,
            total=scores.total[kept],
            components={name: values[kept] for name, values in scores.components.items()},
            distinct=scores.distinct[kept],
            hashes=scores.hashes[kept],
        ),
        reference=reference,
        left_out=tuple(np.flatnonzero(~kept).tolist()),
    )


def dropped(experience: Experience) -> DroppedPrompt:
    """A prompt of which `with_finite_rewards` leaves nothing."""
    return DroppedPrompt(
        experience.prompt.uid, NON_FINITE, f"no finite reward: {first_of(experience.scores.non_finite)}"
    )


def counted(found: Sequence[NonFinite], policy: str) -> dict[str, float]:
    """`reward/non_finite` of a step; nothing where such a reward ends the run."""
    return {} if policy == "fail" else {"reward/non_finite": float(len(found))}


def refuse_if_hopeless(lost: int, wanted: int, found: Sequence[NonFinite]) -> None:
    """Raise RewardError where `lost` groups were dropped for their rewards while `wanted` were collected for a step."""
    if lost >= max(MOST_LOST * wanted, MOST_LOST_AT_LEAST):
        raise RewardError(
            f"{lost} prompt groups without a finite reward were dropped while {wanted} were collected for a step; "
            f"mend the reward (the last: {first_of(found[-1:])})"
        )
