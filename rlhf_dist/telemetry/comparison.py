"""What is left at the end of a pipeline: one table of its models, and a few answers of each side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from rlhf_dist.telemetry import console_tables, names
from rlhf_dist.telemetry.console_tables import printable as printable
from rlhf_dist.telemetry.display import clock

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

NONE = "-"
TITLE = "Models (held-out prompts)"
ANSWERS = "Answers"
GOLD_STD = f"{names.EVAL_GOLD}_std"
RESPONSE_LENGTH = "eval/response_length"
ACCURACY = "accuracy"
"""Of a reward model's summary, as `best_accuracy`, which it has where the truth is known."""
BEST_ACCURACY = "best_accuracy"


@dataclass(frozen=True, slots=True)
class Wins:
    """How often a stage's model beats the one that it started from, on the held-out prompts."""

    judge: str
    """Name of the reward whose scores decide."""
    win_rate: float
    """Ties count half."""
    low: float
    """Its 95% interval."""
    high: float
    length_controlled: float | None
    """The rate at equal length; None where it cannot be told."""
    length_low: float | None
    length_high: float | None


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a finished stage tells about itself."""

    name: str
    command: str
    start: str
    """The earlier stage that its model starts from, or the model's own name."""
    summary: Mapping[str, Any]
    """Its `summary.json`: `before` and `after`, metric -> value, and for `train` also `answers`."""
    seconds: float
    """Wall-clock time of its last start."""
    wins: Wins | None = None
    """Over its start."""


@dataclass(frozen=True, slots=True)
class Row:
    """One model. A value that nobody measured is None."""

    model: str
    gold: float | None
    """Mean gold reward."""
    lift: float | None
    """The same, less that of the model it starts from, in standard deviations of the latter's gold rewards."""
    proxy: float | None
    """Mean total reward, which training goes by."""
    kl: float | None
    """KL to the start, nats per response."""
    length: float | None
    """Mean response length, tokens."""
    seconds: float | None
    """Wall-clock time of the stage; None for a model that no stage made."""
    note: str
    """What else the stage measured."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers of several models to the same prompts."""

    prompts: tuple[str, ...]
    by_model: Mapping[str, tuple[str, ...]]
    """Model -> its answers, in the order of the prompts."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that is shown."""

    rows: tuple[Row, ...]
    wins: Mapping[tuple[str, str], Wins]
    """(a stage's model, the one that it started from) -> the former's wins."""
    answers: Answers
    seconds: float
    """Sum over the stages."""


def compare_stages(results: Sequence[StageResult]) -> Comparison:
    """The rows in the order of the stages. A start gets its figures from the first RL stage that starts from it."""
    rows: dict[str, Row] = {}
    starts: dict[str, StageResult] = {}
    for result in results:
        if result.command == "train":
            starts.setdefault(result.start, result)
    made = {result.name for result in results}
    for result in results:
        before, after = _metrics(result, "before"), _metrics(result, "after")
        if result.command == "train":
            if result.start not in made and result.start not in rows:
                rows[result.start] = _row(result.start, before, {}, None, "")
            rows[result.name] = _row(result.name, after, before, result.seconds, _greedy(after))
        else:
            own = _metrics(starts[result.name], "before") if result.name in starts else {}
            rows[result.name] = _row(result.name, own, {}, result.seconds, _note(result.command, after))
    wins = {(result.name, result.start): result.wins for result in results if result.wins is not None}
    return Comparison(tuple(rows.values()), wins, _answers(results), sum(result.seconds for result in results))


def _metrics(result: StageResult, when: str) -> dict[str, float]:
    found = result.summary.get(when)
    return {name: float(value) for name, value in found.items()} if isinstance(found, Mapping) else {}


def _row(
    model: str, metrics: Mapping[str, float], before: Mapping[str, float], seconds: float | None, note: str
) -> Row:
    gold, lift = metrics.get(names.EVAL_GOLD), None
    if gold is not None and names.EVAL_GOLD in before and before.get(GOLD_STD, 0.0) > 0:
        lift = (gold - before[names.EVAL_GOLD]) / before[GOLD_STD]
    proxy, kl, length = (metrics.get(name) for name in (names.EVAL_REWARD, names.EVAL_KL, RESPONSE_LENGTH))
    return Row(model, gold, lift, proxy, kl, length, seconds, note)


def _greedy(metrics: Mapping[str, float]) -> str:
    return f"greedy accuracy {metrics[names.EVAL_GREEDY]:.3f}" if names.EVAL_GREEDY in metrics else ""


def _note(command: str, after: Mapping[str, float]) -> str:
    if command == "reward" and ACCURACY in after:
        best = f" (best {after[BEST_ACCURACY]:.3f})" if BEST_ACCURACY in after else ""
        return f"accuracy {after[ACCURACY]:.3f}{best}"
    if names.PREFER_ACCURACY in after:
        return f"held-out accuracy {after[names.PREFER_ACCURACY]:.3f}"
    if names.SFT_HELD_OUT_LOSS in after:
        return f"held-out loss {after[names.SFT_HELD_OUT_LOSS]:.3f}"
    return ""


def _answers(results: Sequence[StageResult]) -> Answers:
    """The prompts of the first RL stage; a model that was asked others shows "-" there."""
    prompts: tuple[str, ...] = ()
    by_model: dict[str, dict[str, str]] = {}
    for result in results:
        found = result.summary.get("answers")
        if not isinstance(found, Mapping):
            continue
        asked = tuple(found.get("prompts", ()))
        prompts = prompts or asked
        for model, when in ((result.start, "before"), (result.name, "after")):
            by_model.setdefault(model, dict(zip(asked, found.get(when, ()), strict=False)))
    by_prompt = {model: tuple(said.get(prompt, NONE) for prompt in prompts) for model, said in by_model.items()}
    return Answers(prompts, by_prompt)


# ---- showing ---------------------------------------------------------------------------------------------------------


def as_json(comparison: Comparison) -> dict[str, Any]:
    """For `pipeline.json`. JSON has no NaN or infinity: they become the strings "nan", "inf", "-inf"."""
    return {
        "seconds": round(comparison.seconds, 1),
        "models": [{name: _json_number(value) for name, value in asdict(row).items()} for row in comparison.rows],
        "wins": [{"model": model, "start": start, **asdict(one)} for (model, start), one in comparison.wins.items()],
        "answers": {
            "prompts": list(comparison.answers.prompts),
            "by_model": {model: list(said) for model, said in comparison.answers.by_model.items()},
        },
    }


def _json_number(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_text(comparison: Comparison) -> str:
    """The tables in plain text, for logs and files."""
    return console_tables.as_text(partial(_parts, comparison))


def show(comparison: Comparison, stream: TextIO) -> None:
    """Tables with colours where `stream` is a terminal, plain text elsewhere."""
    console_tables.show(partial(_parts, comparison), stream)


def _parts(comparison: Comparison, box: Any) -> Iterator[RenderableType]:
    from rich.text import Text

    yield _models(comparison, box)
    for (model, start), wins in comparison.wins.items():
        yield Text(f"{model} against {start}: {_wins(wins)}")
    if comparison.answers.prompts:
        yield _side_by_side(comparison.answers, box)
    yield Text(f"all stages: {clock(comparison.seconds)}")


def _wins(wins: Wins) -> str:
    equal = ""
    if None not in (wins.length_controlled, wins.length_low, wins.length_high):
        equal = f", at equal length {wins.length_controlled:.2f} [{wins.length_low:.2f}, {wins.length_high:.2f}]"
    return f"wins {wins.win_rate:.2f} [{wins.low:.2f}, {wins.high:.2f}]{equal} (by {wins.judge})"


def _models(comparison: Comparison, box: Any) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=TITLE, title_justify="left", box=box)
    table.add_column("model", no_wrap=True)
    for header in ("gold reward", "lift, sd", "proxy reward", "KL, nats", "length", "time"):
        table.add_column(header, justify="right")
    table.add_column("")
    for row in comparison.rows:
        lift = NONE if row.lift is None else f"{row.lift:+z.2f}"
        figures = [_number(row.gold), lift, _number(row.proxy), _number(row.kl), _number(row.length)]
        time = NONE if row.seconds is None else clock(row.seconds)
        table.add_row(Text(row.model), *figures, time, Text(row.note))
    return table


def _side_by_side(answers: Answers, box: Any) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=ANSWERS, title_justify="left", box=box, show_lines=True)
    for header in ("prompt", *answers.by_model):
        table.add_column(Text(header), overflow="fold", ratio=1)
    for place, prompt in enumerate(answers.prompts):
        cells = [prompt, *(said[place] for said in answers.by_model.values())]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:z.2f}"  # z: no -0.00
