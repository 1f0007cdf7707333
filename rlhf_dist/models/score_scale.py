"""What is stored with a reward model about its scores: how to scale them, and how good they are."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

LEAST_STD = 0.01
"""Raw scores that deviate by less hardly differ: a pair's probability moves by a quarter of a percent. They are centred
and not scaled, since that would blow noise up to deviation 1."""
CHANCE = 0.5


@dataclass(frozen=True, slots=True)
class ScoreScale:
    """What centres a reward model's scores to mean 0 and scales them to deviation 1; in its config.json."""

    score_mean: float
    """Of the raw scores of held-out responses."""
    score_std: float
    """Of the same; greater than 0."""
    accuracy: float | None = None
    """Held-out accuracy; None where it was not measured, as for ratings on a scale."""
    accuracy_low: float | None = None
    """Lower end of its 95% interval."""
    accuracy_high: float | None = None
    """Upper end."""
    correlation: float | None = None
    """Of held-out ratings and scores; None where there were no ratings."""
    correlation_low: float | None = None
    """Lower end of its 95% interval."""
    correlation_high: float | None = None
    """Upper end."""

    @property
    def divisor(self) -> float:
        """The deviation, or 1 where it is too small to divide by."""
        return self.score_std if self.score_std >= LEAST_STD else 1.0

    def stored(self) -> dict[str, float]:
        """As it is in config.json: what is known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def doubts(self) -> list[str]:
        """Why its scores may mean nothing, a clause each, as in `its held-out accuracy is ...`; empty: no reason."""
        found = []
        if self.accuracy is not None and self.accuracy_low is not None and not self.accuracy_low > CHANCE:
            high = math.nan if self.accuracy_high is None else self.accuracy_high
            found.append(
                f"its held-out accuracy, {self.accuracy:.3f} (95%: {self.accuracy_low:.3f} to {high:.3f}), is not "
                f"above chance, {CHANCE}"
            )
        if self.correlation is not None and self.correlation_low is not None and not self.correlation_low > 0:
            found.append(self._correlation_doubt(self.correlation, self.correlation_low))
        if not self.score_std >= LEAST_STD:
            found.append(
                f"its held-out scores hardly differ, their deviation is {self.score_std:.2g}: they are centred, and "
                "not scaled to deviation 1"
            )
        return found

    def _correlation_doubt(self, correlation: float, low: float) -> str:
        high = math.nan if self.correlation_high is None else self.correlation_high
        if (low, high) == (-1, 1):
            return "it has fewer than 4 held-out ratings, too few to tell whether its scores follow them"
        return (
            f"its held-out correlation with the ratings, {correlation:.3f} (95%: {low:.3f} to {high:.3f}), is not "
            "above 0"
        )


NO_SCALE = ScoreScale(0.0, 1.0)


def parse_scale(stored: Any) -> ScoreScale | None:
    """What `stored` gave; None where it cannot be one."""
    try:
        known = {name: float(stored[name]) for name in ScoreScale.__dataclass_fields__ if name in stored}
        scale = ScoreScale(**known)
    except (TypeError, KeyError, ValueError):
        return None
    return scale if all(map(math.isfinite, known.values())) and scale.score_std > 0 else None
