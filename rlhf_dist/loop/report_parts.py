"""The parts of a report that a run's page and a pipeline's page share: answers, calibration, over-optimisation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_dist.algo.preference import wilson_interval
from rlhf_dist.loop.run_facts import RunFacts, metrics_of
from rlhf_dist.loop.shown_answers import Answers, Said, ShownAnswer
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.charts import Chart, Line, figure
from rlhf_dist.telemetry.html_page import folded, grid, missing, paragraph, shown, soft, table
from rlhf_dist.telemetry.report import PANELS, Panel, found_lines

FIRST = 6
"""Prompts that are shown because they are the first."""
EXTREMES = 2
"""Prompts that are shown of each RL stage for the largest rise, and as many for the largest fall."""
POINTS = 16
"""Points of a curve over the KL, about; each is a mean over steps."""
MOST_BINS = 50
"""Points of a calibration curve."""
MOST_PAIRS = 1 << 53
"""Behind one of them."""
OPEN_PANELS = ("Reward of sampled responses", "KL to the reference", "Response length", "Held-out accuracy")


@dataclass(frozen=True, slots=True)
class Side:
    """What one model said."""

    model: str
    answers: Answers


# ---- figures ---------------------------------------------------------------------------------------------------------


def interval(name: str, metrics: Mapping[str, float], run: RunFacts) -> tuple[float, float] | None:
    """95% interval of a held-out result, where one can be computed: of means as of independent samples, of shares
    Wilson's."""
    ends = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    if ends[0] is not None and ends[1] is not None:
        return ends[0], ends[1]
    prompts = run.number("eval.prompts")
    n = (prompts - metrics.get("eval/dropped", 0.0)) * max(run.number("eval.samples"), 1.0)
    if f"{name}_std" in metrics and n > 1:
        half = 1.96 * metrics[f"{name}_std"] / math.sqrt(n)
        return metrics[name] - half, metrics[name] + half
    if name == names.EVAL_GREEDY and prompts >= 1 and 0 <= metrics[name] <= 1:  # of all: a dropped one is not solved
        return wilson_interval(metrics[name] * prompts, prompts)
    return None


def with_interval(name: str, metrics: Mapping[str, float], run: RunFacts) -> str:
    """`3.348 (3.19 to 3.50)`, or the figure alone, or "-"."""
    if name not in metrics:
        return "-"
    found = interval(name, metrics, run)
    text = f"{metrics[name]:z.3f}"
    return text if found is None else f"{text} ({found[0]:z.2f} to {found[1]:z.2f})"


# ---- curves ----------------------------------------------------------------------------------------------------------


def curves(run: RunFacts) -> str:
    """All panels of a run: what matters most open, the others folded."""
    if "metrics.jsonl" in run.gaps:
        return missing(f"No curves: metrics.jsonl {run.gaps['metrics.jsonl']}")
    panels = [panel for panel in PANELS if found_lines(panel, run.series)]
    if not panels:
        return missing("No curves: no step has logged any of the metrics that are drawn.")
    first = [panel for panel in panels if panel.title in OPEN_PANELS] or panels[:3]
    others = [panel for panel in panels if panel not in first]
    rest = folded(f"{len(others)} more curves", grid([_drawn(p, run) for p in others])) if others else ""
    return grid([_drawn(panel, run) for panel in first]) + rest


def _drawn(panel: Panel, run: RunFacts) -> str:
    lines = [Line(label, *run.series[name]) for name, label in found_lines(panel, run.series)]
    return figure(Chart(panel.title, lines, "step", panel.unit, panel.log, panel.bottom, panel.top))


# ---- over-optimisation -----------------------------------------------------------------------------------------------


def over_optimization(runs: Sequence[RunFacts]) -> str:
    """Proxy and gold over the KL to the reference, and where gold was highest."""
    usable = [(run, _over_kl(run)) for run in runs]
    drawn = [(run, points) for run, points in usable if points]
    told = [
        missing(
            f"{run.name}: not drawn; it takes a gold reward (scoring.gold) and the KL to a reference, at each step."
        )
        for run, points in usable
        if not points
    ]
    if not drawn:
        return "".join(told) or missing("No reinforcement stage was read.")
    figures = []
    for title, place in (("Proxy reward (what is trained on)", 1), ("Gold reward (the truth)", 2)):
        lines = [Line(run.name, [p[0] for p in points], [p[place] for p in points]) for run, points in drawn]
        figures.append(figure(Chart(title, lines, "KL to the reference, nats per response", "mean reward")))
    why = (
        "The reward model is the proxy of the gold reward, and is right only near the answers it was trained on. Where "
        "the proxy goes on rising and gold falls, the policy exploits its mistakes."
    )
    return soft(why) + grid(figures) + "".join([*(_peak(run, points) for run, points in drawn), *told])


def _over_kl(run: RunFacts) -> list[tuple[float, float, float, int, int]]:
    """(KL, proxy, gold, first step, last step) means over neighbouring steps."""
    found = [dict(zip(*run.series.get(name, ([], [])), strict=True)) for name in _OVER]
    steps = [step for step in found[0] if all(math.isfinite(series.get(step, math.nan)) for series in found)]
    size = max(1, -(-len(steps) // POINTS))
    parts = [steps[start : start + size] for start in range(0, len(steps), size)]
    means = [[sum(series[step] for step in part) / len(part) for series in found] for part in parts]
    return [(kl, proxy, gold, part[0], part[-1]) for (kl, proxy, gold), part in zip(means, parts, strict=True)]


_OVER = (names.KL_REFERENCE, names.REWARD_PROXY, names.REWARD_GOLD)


def _peak(run: RunFacts, points: Sequence[tuple[float, float, float, int, int]]) -> str:
    best, last = max(points, key=lambda point: point[2]), points[-1]
    size = best[4] - best[3] + 1
    means = f"means of {size} steps" if size > 1 else "single steps"
    if f"{best[2]:.2f}" == f"{last[2]:.2f}":
        return paragraph(f"{run.name}: gold was highest at the end, {last[2]:z.2f} at {last[0]:.1f} nats ({means}).")
    return paragraph(
        f"{run.name}: gold was highest at step {best[4]}, {best[2]:z.2f} at {best[0]:.1f} nats; at the end it was "
        f"{last[2]:z.2f} at {last[0]:.1f} nats, with the proxy at {last[1]:z.2f} after {best[1]:z.2f} ({means})."
    )


# ---- calibration -----------------------------------------------------------------------------------------------------


def calibration(summary: Mapping[str, Any], name: str) -> str:
    """A reward model's predicted probabilities against what was observed, of its run's summary."""
    bins = _bins(summary.get("calibration"))
    if bins is None:
        return missing(f"{name}: the calibration in its summary.json cannot be read.")
    if not bins:
        return missing(f"{name}: no calibration: its summary.json has none, as of a model of ratings on a scale.")
    ends = [wilson_interval(observed * count, count) for _, observed, count in bins]
    pairs = sum(count for *_, count in bins)
    error = sum(count * abs(predicted - observed) for predicted, observed, count in bins) / pairs
    predicted, observed = [p for p, *_ in bins], [o for _, o, _ in bins]
    line = Line(name, predicted, observed, [low for low, _ in ends], [high for _, high in ends])
    guide = Line("perfect", [0.5, 1.0], [0.5, 1.0], dashed=True)
    results = metrics_of(summary.get("after"))
    chart = Chart(f"{name}: calibration", [line, guide], "predicted probability of the choice", "share that was right")
    accuracy, best = results.get("accuracy"), results.get("best_accuracy")
    told = f" It orders {accuracy:.3f} of them as the label does" if accuracy is not None else ""
    told += f" (the most that the labels' noise allows: {best:.3f})." if told and best is not None else "." * bool(told)
    words = (
        f"Of {pairs:,} held-out pairs: how sure the model was of its choice, and how often it was right, with 95% "
        f"intervals (Wilson). On average the two differ by {error:.3f}.{told}"
    )
    rows = [
        (f"{p:.3f}", f"{o:.3f}", f"{low:.2f} to {high:.2f}", f"{n:,}")
        for (p, o, n), (low, high) in zip(bins, ends, strict=True)
    ]
    figures = folded("the figures", table(("predicted", "observed", "95% interval", "pairs"), rows, ()))
    return paragraph(words) + grid([figure(chart)]) + figures


def _bins(found: Any) -> list[tuple[float, float, int]] | None:
    """(predicted, observed, count) of a summary; none where it has none, None where they are something else."""
    try:
        bins = [(float(b["predicted"]), float(b["observed"]), int(b["count"])) for b in found or ()]
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    right = all(0 <= predicted <= 1 and 0 <= observed <= 1 and 1 <= n < MOST_PAIRS for predicted, observed, n in bins)
    return bins[:MOST_BINS] if right else None


# ---- answers ---------------------------------------------------------------------------------------------------------


def answers(start: Side | None, ends: Sequence[Side], why: str = "") -> str:
    """Side by side: the first prompts, then those with the largest rise and fall. `why`: what is missing."""
    if start is None or not ends:
        return missing(why or "No answers: no evaluation of this run was read.")
    asked = [row.prompt for row in start.answers.rows]
    sides = [start, *ends]
    first = list(range(min(FIRST, len(asked))))
    sampled = any(row.sample for side in sides for row in side.answers.rows)
    rule = (
        f"The first {len(first)} held-out prompts, in their order: not chosen. "
        + ("Large: the first response sampled at the training's temperature. Small: the greedy one." if sampled else
           "Greedy responses: this run kept no sampled ones.")
    )  # fmt: skip
    parts = [soft(rule), *(_card(asked[place], sides, place, start) for place in first)]
    for end in ends:
        for word, places in _extremes(start, end, len(first)):
            shown_places = "".join(_card(asked[place], sides, place, start) for place in places)
            among = f"among the {len(asked)} prompts recorded, of the sampled responses shown"
            parts.append(soft(f"{end.model}: the largest {word} against {start.model}, {among}.") + shown_places)
    return "".join(parts)


def _extremes(start: Side, end: Side, after: int) -> Iterator[tuple[str, list[int]]]:
    """(rise or fall, places); prompts before `after` are shown anyway."""
    changes = {}
    pairs = zip(start.answers.rows, end.answers.rows, strict=False)
    for place, (before, then) in enumerate(pairs):
        known = _value(before), _value(then)
        if place >= after and before.prompt == then.prompt and known[0] is not None and known[1] is not None:
            changes[place] = known[1] - known[0]
    for word, sign in (("rise", 1), ("fall", -1)):
        largest = sorted((place for place in changes if sign * changes[place] > 0), key=lambda p: -sign * changes[p])
        if largest:
            yield word, largest[:EXTREMES]


def _value(row: ShownAnswer) -> float | None:
    """The gold reward of the sample where there is one, else its total."""
    if row.sample is None:
        return None
    return row.sample.reward if row.sample.gold is None else row.sample.gold


def _card(prompt: str, sides: Sequence[Side], place: int, start: Side) -> str:
    columns = []
    for side in sides:
        rows = side.answers.rows
        row = rows[place] if place < len(rows) and rows[place].prompt == prompt else None
        step = f" (step {side.answers.step})" if side is not start else ""
        columns.append(f"<div class=side><b>{shown(side.model + step)}</b>{_said(row)}</div>")
    return f"<div class=card><h4>{shown(prompt)}</h4><div class=sides>{''.join(columns)}</div></div>"


def _said(row: ShownAnswer | None) -> str:
    if row is None:
        return missing("not asked")
    if row.sample is None and row.greedy is None:
        return missing(row.dropped or "no answer")
    main = row.sample or row.greedy
    assert main is not None
    greedy = (
        f"<div class=said><small>greedy: {shown(row.greedy.text)}</small></div>" if row.sample and row.greedy else ""
    )
    return f"<div class=said>{shown(main.text) or '<small>(empty)</small>'}</div>{_scores(main)}{greedy}"


def _scores(said: Said) -> str:
    told = [
        f"{name} {value:z.2f}" for name, value in (("gold", said.gold), ("reward", said.reward)) if value is not None
    ]
    return f"<small>{' · '.join(told)}</small>"


# ---- what was run ----------------------------------------------------------------------------------------------------


def config_keys(run: RunFacts) -> str:
    """The changed keys, folded."""
    if "config.yaml" in run.gaps:
        return missing(f"{run.name}: config.yaml {run.gaps['config.yaml']}")
    rows = [(key, str(value)) for key, value in run.changed.items()]
    return folded(
        f"{run.name}: {len(rows)} keys that are not at their default", table(("key", "value"), rows, range(2))
    )


def reward_model_summaries(run: RunFacts) -> Iterator[tuple[str, Path]]:
    """(name, run directory) of the reward models of a run, as its config names them; it may be moved together with
    them."""
    for key, value in run.config.items():
        if key.startswith("scoring.rewards.") and key.endswith(".path") and isinstance(value, str) and value:
            beside = run.path.parent / Path(value).name
            yield key.split(".")[2], beside if beside.is_dir() else Path(value)
