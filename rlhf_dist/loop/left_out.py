"""Responses whose reward failed, is NaN or infinite: left out of their groups, counted, up to a budget. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import compress

import numpy as np

from rlhf_dist.config.schema import ScoringConfig
from rlhf_dist.errors import RewardError
from rlhf_dist.loop.reasons import NON_FINITE
from rlhf_dist.scoring.non_finite import failed_rewards, first_of
from rlhf_dist.types import DroppedPrompt, Experience, NonFinite, ReferenceHead, Scores

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


def what_is_left(experience: Experience) -> tuple[Experience | None, DroppedPrompt | None]:
    """One of the two: what `with_finite_rewards` leaves, or why that is nothing."""
    kept = with_finite_rewards(experience)
    if kept is not None:
        return kept, None
    why = f"no finite reward: {first_of(experience.scores.non_finite)}"
    return None, DroppedPrompt(experience.prompt.uid, NON_FINITE, why)


@dataclass(slots=True)
class Tally:
    """What was scored while a step was collected, dropped groups and greedy responses too, or for an evaluation."""

    most: float
    """`scoring.max_failed_share`."""
    least: int
    """Responses of a step, or of the evaluation: a share is of so many at least, however few are scored yet."""
    what: str = "a step"
    scored: int = 0
    """Responses."""
    asked_again: int = 0
    """See `Scores`."""
    failed: int = 0
    """Responses of which a reward failed."""
    found: list[NonFinite] = field(default_factory=list)
    """Those of which one failed or is not finite."""

    @property
    def failed_share(self) -> float:
        """Of the responses."""
        return self.failed / max(self.scored, self.least)

    def add(self, scores: Scores) -> None:
        """Count a group's. Raises RewardError where more have failed than the budget allows."""
        self.scored += len(scores.total)
        self.asked_again += scores.asked_again
        self.found += scores.non_finite
        self.failed += sum(bool(bad.failed) for bad in scores.non_finite)
        if self.failed_share > self.most:
            failed = [bad for bad in self.found if bad.failed]
            raise RewardError(
                f"{len(failed)} of {self.scored} responses scored for {self.what} have no reward, which failed "
                f"({failed_rewards(failed)}): more than scoring.max_failed_share allows, {self.most:g} of "
                f"{max(self.scored, self.least)}; the first: {first_of(failed)}; mend the reward, or raise "
                "scoring.max_failed_share; a run that has begun goes on with --resume"
            )

    def fresh(self) -> Tally:
        """For the next step."""
        return Tally(self.most, self.least, self.what)


def counted(tally: Tally, scoring: ScoringConfig) -> dict[str, float]:
    """`reward/non_finite`, `reward/failed_share` and `reward/asked_again` of a step; nothing of what ends the run."""
    found: dict[str, float] = {}
    if scoring.non_finite != "fail":
        found["reward/non_finite"] = float(sum(bool(bad.rewards) for bad in tally.found))
    if scoring.on_failure == "mask":
        found |= {"reward/failed_share": tally.failed_share, "reward/asked_again": float(tally.asked_again)}
    return found


def refuse_if_hopeless(lost: int, wanted: int, found: Sequence[NonFinite]) -> None:
    """Raise RewardError where `lost` groups were dropped for their rewards while `wanted` were collected for a step."""
    if lost >= max(MOST_LOST * wanted, MOST_LOST_AT_LEAST):
        raise RewardError(
            f"{lost} prompt groups without a finite reward were dropped while {wanted} were collected for a step; "
            f"mend the reward (the last: {first_of(found[-1:])})"
        )
