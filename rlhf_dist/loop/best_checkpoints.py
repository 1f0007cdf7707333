"""Which checkpoints are the best by a metric of the evaluation that was made at their own step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.config.schema import LoopConfig
from rlhf_dist.errors import ConfigError, DataError
from rlhf_dist.models.checkpoints import read_sealed


@dataclass(frozen=True, slots=True)
class Best:
    """What makes a checkpoint one of the best."""

    count: int
    """How many stay."""
    metric: str
    """Of evaluations, as `eval/reward`."""
    lowest: bool
    """Whether less is better."""


def best_of(loop: LoopConfig) -> Best | None:
    """What `loop.keep_best` asks for."""
    return Best(loop.keep_best, loop.best_metric, loop.best_is == "lowest") if loop.keep_best else None


def require_metric(best: Best | None, results: Mapping[str, float]) -> None:
    """Raise ConfigError where evaluations, as the one that gave `results`, do not have the metric."""
    if best is not None and best.metric not in results:
        raise ConfigError(
            f"loop.best_metric is {best.metric}, which the evaluations of this run do not have; they have "
            f"{', '.join(sorted(results))}"
        )


def best_steps(checkpoints: Mapping[int, Path], best: Best) -> list[int]:
    """Steps of those that stay, the best first; of equal ones the earlier. `checkpoints`: folders by step.

    One without an evaluation of its own step, or whose state.json cannot be read, is not among them.
    """
    scores = {step: score for step, folder in checkpoints.items() if (score := _score(folder, best)) is not None}
    sign = 1 if best.lowest else -1
    return sorted(scores, key=lambda step: (sign * scores[step], step))[: best.count]


def _score(checkpoint: Path, best: Best) -> float | None:
    try:
        state = read_sealed(checkpoint).state
    except DataError:
        return None
    results = state.get("results")
    score = results.get(best.metric) if isinstance(results, dict) else None
    own = state.get("evaluated") == state.get("step")
    return float(score) if own and isinstance(score, int | float) and math.isfinite(score) else None
