"""What is left at the end of a run: the table before/after and `curves.png`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_dist.errors import DataError, DiskError
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.display import number, spoken

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

Series = dict[str, tuple[list[int], list[float]]]
"""Metric name -> (steps, values), in the order of the steps."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of `curves.png`."""

    title: str
    lines: tuple[tuple[str, str], ...]
    """(metric name, label); a name that ends in `_` stands for all that begin so, and its label for what follows.
    A panel without any of its metrics is not drawn."""
    unit: str = ""
    log: bool = False
    """Logarithmic vertical axis; values that are not positive are left out."""
    bottom: float | None = None
    top: float | None = None


PANELS = (
    Panel(
        "Reward of sampled responses",
        ((names.REWARD_MEAN, "total"), (names.REWARD_GOLD, "gold"), (names.EVAL_GOLD, "gold, held out")),
    ),
    Panel(
        "Held-out accuracy", ((names.EVAL_GREEDY, "greedy"), (names.EVAL_PASS_PREFIX, "pass@")), bottom=-0.02, top=1.02
    ),
    Panel("Loss", ((names.SFT_LOSS, "train"), (names.SFT_HELD_OUT_LOSS, "held out")), "nats per token"),
    Panel("Reward model loss", ((names.REWARD_MODEL_LOSS, "train"), (names.REWARD_MODEL_HELD_OUT_LOSS, "held out"))),
    Panel("Reward model accuracy, held out", ((names.REWARD_MODEL_ACCURACY, "pairs"),), bottom=0.4, top=1.02),
    Panel("Preference loss", ((names.PREFER_LOSS, "train"), (names.PREFER_HELD_OUT_LOSS, "held out"))),
    Panel("Preference accuracy, held out", ((names.PREFER_ACCURACY, "pairs"),), bottom=0.4, top=1.02),
    Panel("KL to the reference", ((names.KL_REFERENCE, "train"), (names.EVAL_KL, "held out")), "nats per response"),
    # Far below 0 at first, when the critic knows nothing: cut, or the rest would be a flat line.
    Panel("Critic's explained variance", ((names.CRITIC_EXPLAINED_VARIANCE, "mean"),), "share", bottom=-1.02, top=1.02),
    Panel("Response length", ((names.RESPONSE_LENGTH, "mean"),), "tokens", bottom=0),
    Panel(
        "Different from each other",
        ((names.DISTINCT_RESPONSES, "responses of a step"), (names.DISTINCT_PAIRS, "word pairs of a response")),
        "share",
        bottom=-0.02,
        top=1.02,
    ),
    Panel(
        "Rollout/learner logprob difference",
        ((names.LOGPROB_DIFF_MAX, "max"), (names.LOGPROB_DIFF_MEAN, "mean")),
        "nats",
        log=True,
    ),
    Panel("Policy entropy", ((names.ENTROPY, "mean"),), "nats per token", bottom=0),
    Panel("Speed", ((names.TOKENS_PER_S, "whole step"),), "response tokens per second", bottom=0),
)
"""In columns of three: a reinforcement run with critic, reference and gold reward has nine, three of each kind, the
first three about what it learns."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row of the table before/after."""

    name: str
    before: str
    after: str
    change: str


def compare(before: Mapping[str, float], after: Mapping[str, float]) -> list[Comparison]:
    """Rows in the order of `after`, then what only `before` has; "-" where one of them lacks the metric."""
    rows: list[Comparison] = []
    for name in [*after, *(name for name in before if name not in after)]:
        change = f"{after[name] - before[name]:+z.3f}" if name in before and name in after else "-"
        first = number(before[name]) if name in before else "-"
        second = number(after[name]) if name in after else "-"
        rows.append(Comparison(spoken(name), first, second, change))
    return rows


def before_after_text(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """The table in plain text, for logs and files."""
    cells = [("held out", "before", "after", "change")]
    cells += [(row.name, row.before, row.after, row.change) for row in compare(before, after)]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def before_after_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """The same table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Held-out results")
    table.add_column("")
    for header in ("before", "after", "change"):
        table.add_column(header, justify="right")
    for row in compare(before, after):
        table.add_row(Text(row.name), row.before, Text(row.after, style="bold"), row.change)
    return table


def is_drawn(name: str) -> bool:
    """Whether a panel has this metric."""
    lines = (line for panel in PANELS for line, _ in panel.lines)
    return any(name.startswith(line) if line.endswith("_") else name == line for line in lines)


def read_metrics(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Series:
    """The series of a `metrics.jsonl`, of the metrics that are `wanted`.

    A half-written last line (a run still going) is left out. Raises DataError naming file and line.
    """
    found: dict[str, dict[int, float]] = {}
    try:
        with path.open("rb") as file:
            for row, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    step, record = _numbers(line, f"{path}:{row}")
                    for name in filter(wanted, record):
                        found.setdefault(name, {})[step] = record[name]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; is it a run directory's metrics.jsonl?") from error
    ordered = {name: sorted(points.items()) for name, points in found.items()}
    return {name: ([step for step, _ in points], [v for _, v in points]) for name, points in ordered.items()}


def _numbers(line: bytes, place: str) -> tuple[int, dict[str, float]]:
    """(step, metrics) of a line."""
    try:
        record = {name: float(value) for name, value in json.loads(line).items()}
        return int(record.pop("step")), record
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        shown = line[:80].decode("utf-8", errors="backslashreplace")
        raise DataError(f"{place}: not an object of numbers with a `step`: {shown!r}") from error


def curves(metrics_path: Path, out: Path) -> tuple[str, ...]:
    """Draw `metrics.jsonl` as `curves.png`, without a display.

    Returns the titles drawn; when there are none (no step was logged), no file is written.
    Raises DataError for a file that is no metrics.jsonl, DiskError when `out` cannot be written.
    """
    series = read_metrics(metrics_path, is_drawn)
    panels = [panel for panel in PANELS if found_lines(panel, series)]
    if not panels:
        return ()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        _draw(axes, panel, series)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if place + columns >= len(panels):
            axes.set_xlabel("step")
    try:
        figure.savefig(out, dpi=130, format="png")
    except OSError as error:
        raise DiskError(f"{out}: cannot be written: {error.strerror or error}") from error
    return tuple(panel.title for panel in panels)


def found_lines(panel: Panel, series: Series) -> list[tuple[str, str]]:
    """(metric name, label) of what the run has of a panel."""
    found: list[tuple[str, str]] = []
    for name, label in panel.lines:
        if name.endswith("_"):
            found += [(full, label + full.removeprefix(name)) for full in sorted(series) if full.startswith(name)]
        elif name in series:
            found.append((name, label))
    return found


def _draw(axes: Axes, panel: Panel, series: Series) -> None:
    drawn = found_lines(panel, series)
    for (name, label), colour in zip(drawn, cycle(("#1f6fb4", "#e07b39", "#4c9a5b"))):
        steps, values = series[name]
        marker = "o" if len(steps) <= 20 else ""
        axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=label)
    if panel.log and any(value > 0 for name, _ in drawn for value in series[name][1]):
        axes.set_yscale("log", nonpositive="mask")
    if panel.bottom is not None:
        axes.set_ylim(panel.bottom, axes.get_ylim()[1] * 1.08 if panel.top is None else panel.top)
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if len(drawn) > 1:
        axes.legend(frameon=False, fontsize=9)
