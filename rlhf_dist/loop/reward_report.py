"""What held-out judgements say about a reward model: numbers, and `reward.png`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rlhf_dist.algo.preference import CalibrationBin, calibration, correlation_interval, wilson_interval
from rlhf_dist.errors import DiskError
from rlhf_dist.learner.preference_learner import HeldOutScores
from rlhf_dist.models.score_scale import ScoreScale
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.report import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCURACY_LOW = "reward_model/accuracy_low"
"""Lower end of the accuracy's 95% interval (Wilson), over pairs."""
ACCURACY_HIGH = "reward_model/accuracy_high"
"""Upper end."""
SCORE_MEAN = "reward_model/score_mean"
"""Mean raw score of all held-out responses."""
SCORE_STD = "reward_model/score_std"
"""Their standard deviation."""
BETTER_MEAN = "reward_model/better_mean"
"""Mean raw score of the better sides of the held-out pairs."""
WORSE_MEAN = "reward_model/worse_mean"
"""Mean raw score of the worse sides."""
CALIBRATION_ERROR = "reward_model/calibration_error"
"""Mean difference between predicted probability and the share that was right, over predictions (Guo et al. 2017)."""
CORRELATION = "reward_model/correlation"
"""Pearson correlation between held-out ratings and scores; 0 where either is all the same."""
CORRELATION_LOW = "reward_model/correlation_low"
"""Lower end of its 95% interval (Fisher), over responses."""
CORRELATION_HIGH = "reward_model/correlation_high"
"""Upper end."""
DROPPED = "data/dropped_held_out"
"""Held-out judgements left out as too long."""

BINS = 20
BLUE, ORANGE, GREEN = "#1f6fb4", "#e07b39", "#4c9a5b"


def scale_of(results: Mapping[str, float]) -> ScoreScale:
    """What is stored with the model that `results` are of."""
    accuracy = (names.REWARD_MODEL_ACCURACY, ACCURACY_LOW, ACCURACY_HIGH)
    known = (results.get(name) for name in (*accuracy, CORRELATION, CORRELATION_LOW, CORRELATION_HIGH))
    return ScoreScale(results[SCORE_MEAN], results[SCORE_STD], *known)


def held_out_results(held_out: HeldOutScores) -> dict[str, float]:
    """Metrics of an evaluation. A pair whose sides score the same counts half."""
    results = {names.REWARD_MODEL_HELD_OUT_LOSS: held_out.loss / held_out.judgements}
    _, outcomes = predictions(held_out)
    if len(outcomes):
        right = float(outcomes.sum())
        low, high = wilson_interval(right, len(outcomes))
        results |= {
            names.REWARD_MODEL_ACCURACY: right / len(outcomes),
            ACCURACY_LOW: low,
            ACCURACY_HIGH: high,
            CALIBRATION_ERROR: calibration_error(calibration_bins(held_out)),
        }
    if len(held_out.better):
        results |= {
            BETTER_MEAN: float(held_out.scores[held_out.better].mean(dtype=np.float64)),
            WORSE_MEAN: float(held_out.scores[held_out.worse].mean(dtype=np.float64)),
        }
    if len(held_out.values):
        found = correlation(held_out.values, held_out.scores)
        low, high = correlation_interval(found, len(held_out.values))
        results |= {CORRELATION: found, CORRELATION_LOW: low, CORRELATION_HIGH: high}
    return results | {
        SCORE_MEAN: float(held_out.scores.mean(dtype=np.float64)),
        SCORE_STD: float(held_out.scores.std(dtype=np.float64)),
        DROPPED: float(held_out.dropped),
    }


def predictions(held_out: HeldOutScores) -> tuple[np.ndarray, np.ndarray]:
    """(probability float64 [N] that the model gives to its own choice, 0.5 to 1; whether it was right, float64 [N]).

    The choice is the side of a pair that scores higher, or thumbs up for a score above 0; 0.5 where there is none.
    Ratings on a scale have no probability: none.
    """
    if len(held_out.better):
        leads = held_out.scores[held_out.better].astype(np.float64) - held_out.scores[held_out.worse]
    elif held_out.thumbs:
        leads = np.where(held_out.values > 0.5, 1.0, -1.0) * held_out.scores
    else:
        leads = np.empty(0)
    return 1.0 / (1.0 + np.exp(-np.abs(leads))), 0.5 + 0.5 * np.sign(leads)


def calibration_bins(held_out: HeldOutScores) -> tuple[CalibrationBin, ...]:
    """Predicted probability of the model's choices against the share that was right."""
    probabilities, outcomes = predictions(held_out)
    return calibration(torch.from_numpy(probabilities), torch.from_numpy(outcomes), BINS)


def calibration_error(bins: tuple[CalibrationBin, ...]) -> float:
    """Mean over predictions of |predicted - observed| of their bin."""
    return sum(b.count * abs(b.predicted - b.observed) for b in bins) / sum(b.count for b in bins)


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson's; 0 where either is all the same."""
    a, b = left.astype(np.float64) - left.mean(), right.astype(np.float64) - right.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return max(-1.0, min(1.0, float((a * b).sum()) / scale)) if scale > 0 else 0.0


def draw(held_out: HeldOutScores, series: Series, best: float | None, out: Path) -> None:
    """`reward.png`: scores, calibration, and held-out results over the steps. Raises DiskError.

    `series`: the run's metrics; `best`: the accuracy that the labels' noise allows, where it is known.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bins = calibration_bins(held_out)
    figure = Figure(figsize=(14.0 if bins else 9.4, 3.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3 if bins else 2)
    _draw_scores(panels[0], held_out)
    if bins:
        _draw_calibration(panels[1], bins)
    _draw_steps(panels[-1], series, best)
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="lower right" if axes is panels[-1] else "upper left")
    try:
        figure.savefig(out, dpi=130, format="png")
    except OSError as error:
        raise DiskError(f"{out}: cannot be written: {error.strerror or error}") from error


def _draw_scores(axes: Axes, held_out: HeldOutScores) -> None:
    if len(held_out.better):
        groups = (("better side", held_out.scores[held_out.better]), ("worse side", held_out.scores[held_out.worse]))
    elif held_out.thumbs:
        up = held_out.values > 0.5
        groups = (("thumbs up", held_out.scores[up]), ("thumbs down", held_out.scores[~up]))
    else:
        axes.scatter(held_out.values, held_out.scores, s=8, alpha=0.5, color=BLUE, label="held-out response")
        _title(axes, "Scores", "rating", "score")
        return
    edges = np.histogram_bin_edges(held_out.scores, bins=30).tolist()
    for (label, scores), colour in zip(groups, (BLUE, ORANGE), strict=True):
        axes.hist(scores, bins=edges, alpha=0.55, color=colour, label=label)
    _title(axes, "Held-out scores", "score", "responses")


def _draw_calibration(axes: Axes, bins: tuple[CalibrationBin, ...]) -> None:
    axes.plot([0.5, 1.0], [0.5, 1.0], color="#999999", linewidth=1, linestyle="--", label="perfect")
    predicted, observed = [b.predicted for b in bins], [b.observed for b in bins]
    ends = [wilson_interval(b.observed * b.count, b.count) for b in bins]
    below = [b.observed - low for b, (low, _) in zip(bins, ends, strict=True)]
    above = [high - b.observed for b, (_, high) in zip(bins, ends, strict=True)]
    axes.errorbar(
        predicted, observed, yerr=np.abs([below, above]), color=BLUE, marker="o", capsize=2, label="model, 95% interval"
    )
    _title(axes, "Calibration", "predicted probability", "share that was right")


def _draw_steps(axes: Axes, series: Series, best: float | None) -> None:
    if names.REWARD_MODEL_ACCURACY not in series:
        axes.plot(*series[names.REWARD_MODEL_HELD_OUT_LOSS], color=BLUE, marker="o", markersize=3.5, label="held out")
        _title(axes, "Loss", "step", "")
        return
    steps, accuracy = series[names.REWARD_MODEL_ACCURACY]
    axes.fill_between(steps, series[ACCURACY_LOW][1], series[ACCURACY_HIGH][1], color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(steps, accuracy, color=BLUE, marker="o", markersize=3.5, label="held out, 95% interval")
    if best is not None:
        axes.axhline(best, color=GREEN, linewidth=1.2, linestyle="--", label=f"best the labels allow, {best:.3f}")
    _title(axes, "Accuracy", "step", "")


def _title(axes: Axes, title: str, horizontal: str, vertical: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(horizontal, fontsize=9)
    axes.set_ylabel(vertical, fontsize=9)
