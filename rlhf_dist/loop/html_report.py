"""`report.html`: one run, or a whole pipeline, as a page that opens in any browser; made from its directory alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_dist.errors import DataError, InputError
from rlhf_dist.loop.report_parts import (
    Side,
    answers,
    calibration,
    config_keys,
    curves,
    over_optimization,
    reward_model_summaries,
    with_interval,
)
from rlhf_dist.loop.run_directory import write_text
from rlhf_dist.loop.run_facts import RunFacts, is_run, read_run
from rlhf_dist.models.guarded_files import read_json
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.code_version import code_version
from rlhf_dist.telemetry.display import clock, number, spoken
from rlhf_dist.telemetry.html_page import facts, missing, page, section, shown, soft, table, tiles
from rlhf_dist.telemetry.report import compare

REPORT_FILE = "report.html"
PIPELINE_FILE = "pipeline.json"
MOST_STAGES = 20
"""Stages of a pipeline that are read."""
FACTS = {
    "train": (
        *("algo.name", "model.path", "loop.steps", "loop.prompts_per_step", "algo.group_size", "algo.kl.coef"),
        *("learner.optimizer.lr", "rollout.temperature", "loop.max_policy_lag", "seed"),
    ),
    "sft": ("model.path", "sft.steps", "sft.batch_size", "sft.optimizer.lr", "seed"),
    "prefer": (
        *("prefer.method", "model.path", "prefer.reference", "prefer.beta", "preferences.source", "prefer.steps"),
        *("prefer.batch_size", "prefer.optimizer.lr", "seed"),
    ),
    "reward": ("model.path", "preferences.source", "reward.steps", "reward.batch_size", "reward.optimizer.lr", "seed"),
}
"""Command -> the keys that say most about a run of it."""
HEADLINES = (
    (names.EVAL_GOLD, "gold reward"),
    (names.EVAL_REWARD, "reward"),
    (names.EVAL_GREEDY, "greedy accuracy"),
    (names.SFT_HELD_OUT_LOSS, "held-out loss"),
    (names.PREFER_HELD_OUT_LOSS, "held-out loss"),
    (names.PREFER_ACCURACY, "held-out accuracy"),
    ("accuracy", "held-out accuracy"),
)
INTERVALS = (
    "In parentheses 95% intervals: of means, as if all responses were independent; of shares, Wilson's. Other figures "
    "have none."
)


def write_report(path: Path) -> Path:
    """Write `report.html` into a run's or a pipeline's directory; returns its path.

    Raises InputError where it is neither, DiskError.
    """
    target = path / REPORT_FILE
    write_text(target, run_page(read_run(path)) if is_run(path) else pipeline_page(path))
    return target


def reported(path: Path) -> str:
    """Write it at the end of a run or a pipeline; where it is, or why not: nothing that is done fails for its page."""
    try:
        return f"report: {write_report(path)}"
    except Exception as error:
        return f"no report: {type(error).__name__}: {error}; `rlhf-dist report {path}` writes it"


# ---- one run ---------------------------------------------------------------------------------------------------------


def run_page(run: RunFacts) -> str:
    """The page of one run."""
    parts = [_tiles(run), section("What was run", _what(run), config_keys(run))]
    parts.append(section("Before and after", _table(run)))
    if run.command == "train":
        parts.append(section("Answers", _answers_of([run], {run.name: "before training"})))
    parts.append(section("Curves", curves(run)))
    if run.command == "train":
        parts.append(section("Over-optimisation", over_optimization([run])))
        parts.append(section("Calibration of the reward model", _reward_models(run)))
    elif run.command == "reward":
        parts.append(section("Calibration", calibration(run.summary, run.name)))
    parts.append(section("Faults and ledger", _faults([run])))
    return page(f"{run.command or 'run'}: {run.name}", f"{run.outcome} · {run.path}", [*parts, _footer()])


def _tiles(run: RunFacts) -> str:
    before, after = run.metrics("before"), run.metrics("after")
    found = [
        (f"{before[name]:z.2f} → {after[name]:z.2f}", what)
        for name, what in HEADLINES
        if {name} <= before.keys() & after.keys()
    ]
    if names.EVAL_KL in after:
        found.append((f"{after[names.EVAL_KL]:.1f} nats", "KL to the reference"))
    return tiles([*found, *([(_time(run), "time")] if _time(run) else [])])


def _time(run: RunFacts) -> str:
    seconds = run.summary.get("seconds")
    return clock(seconds) if isinstance(seconds, int | float) and 0 <= seconds < 1e9 else ""


def _what(run: RunFacts) -> str:
    versions = run.summary.get("versions")
    told = ", ".join(f"{name} {value}" for name, value in versions.items()) if isinstance(versions, dict) else ""
    rows = [("command", run.command or "unknown"), ("outcome", run.outcome), ("time", _time(run) or "not recorded")]
    rows += [("begun", run.events.begun)] if run.events.begun else []
    rows += [(key, str(run.config[key])) for key in FACTS.get(run.command, ()) if key in run.config]
    rows += [(f"reward {name}", _reward(run, name)) for name in _rewards(run)] if run.command == "train" else []
    return facts([*rows, ("versions", told or "not recorded by this run")])


def _rewards(run: RunFacts) -> list[str]:
    keys = (key.split(".") for key in run.config if key.startswith("scoring.rewards."))
    return list(dict.fromkeys(parts[2] for parts in keys if len(parts) > 3))


def _reward(run: RunFacts, name: str) -> str:
    kind, weight, path = (run.config.get(f"scoring.rewards.{name}.{key}") for key in ("kind", "weight", "path"))
    gold = ", the gold reward" if run.config.get("scoring.gold") == name else ""
    return f"{kind}{f' {path}' if path else ''}, weight {weight}{gold}{', only measured' if weight == 0 else ''}"


def _table(run: RunFacts) -> str:
    before, after = run.metrics("before"), run.metrics("after")
    if not before and not after:
        return missing(f"No results: {run.gaps.get('summary.json', 'its summary.json has none; ' + run.outcome)}")
    rows = []
    ends = ("_low", "_high")
    for name in dict.fromkeys([*after, *before]):
        if name.endswith(ends):
            continue
        (row,) = compare(_only(before, name), _only(after, name))
        rows.append((spoken(name), with_interval(name, before, run), with_interval(name, after, run), row.change))
    return table(("held out", "before", "after", "change"), rows) + soft(INTERVALS)


def _only(metrics: dict[str, float], name: str) -> dict[str, float]:
    return {name: metrics[name]} if name in metrics else {}


def _answers_of(runs: Sequence[RunFacts], starts: dict[str, str]) -> str:
    """Answers of the RL runs beside those before the first of them that has any."""
    first = next((run for run in runs if run.before is not None), None)
    if first is None or first.before is None:
        return missing("No answers: no evaluation of this run was kept.")
    ends = [Side(run.name, run.after) for run in runs if run.after is not None]
    why = f"No answers after training: answers/after.json {first.gaps.get('answers/after.json', 'is missing')}"
    return answers(Side(starts[first.name], first.before), ends, why)


def _reward_models(run: RunFacts) -> str:
    parts = []
    for name, folder in reward_model_summaries(run):
        try:
            found: Any = read_json(folder / "summary.json")
        except DataError as error:
            parts.append(missing(f"{name}: {error}"))
            continue
        parts.append(calibration(found if isinstance(found, dict) else {}, name))
    return "".join(parts) or missing("No reward of this run is a reward model.")


def _faults(runs: Sequence[RunFacts]) -> str:
    rows, told = [], []
    for run in runs:
        ledger = run.summary.get("ledger")
        kept = str(ledger) if ledger else "none: only train has one" if run.command != "train" else "not recorded"
        unread = f"events.jsonl {run.gaps['events.jsonl']}" if "events.jsonl" in run.gaps else ""
        rows.append((run.name, unread or run.events.faults or "none", kept))
        told += [(run.name, *event) for event in run.events.told]
    events = table(("run", "time", "kind", "what"), told, range(4)) if told else soft("No warning was logged.")
    more = sum(run.events.more for run in runs)
    return (
        table(("run", "faults", "ledger"), rows, range(3))
        + events
        + (soft(f"And {more:,} more in events.jsonl.") if more else "")
    )


def _footer() -> str:
    now, made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), " ".join(code_version().values())
    return soft(f"Written {now} by rlhf_dist {made}. This page has no script and loads nothing.")


# ---- a pipeline ------------------------------------------------------------------------------------------------------


def pipeline_page(folder: Path) -> str:
    """The page of a pipeline: all stages of it that are there. Raises InputError where there is none."""
    runs, ended = _stages(folder)
    learnt = [run for run in runs if run.command == "train"]
    models = [run for run in runs if run.command == "reward"]
    parts = [_lifts(runs, learnt)]
    if not ended:
        parts.append(missing(f"The pipeline has not ended: there is no {PIPELINE_FILE}. These are its stages so far."))
    parts.append(section("Models", _models(runs, learnt), soft(INTERVALS)))
    starts = {run.name: f"{Path(str(run.config.get('model.path', 'start'))).name} (before)" for run in learnt}
    parts.append(section("Answers", _answers_of(learnt, starts)))
    parts.append(section("Over-optimisation", over_optimization(learnt)))
    told = [calibration(run.summary, run.name) for run in models]
    parts.append(section("Calibration of the reward model", *(told or [missing("No stage trains a reward model.")])))
    for run in runs:
        inner = (
            f'<p><a href="{shown(run.name)}/{REPORT_FILE}">its own page</a></p>'
            if (run.path / REPORT_FILE).is_file()
            else ""
        )
        parts.append(section(f"Stage {run.name}", _what(run), inner, config_keys(run), curves(run)))
    parts.append(section("Faults and ledger", _faults(runs)))
    return page(f"pipeline: {folder.resolve().name}", f"{len(runs)} stages · {folder}", [*parts, _footer()])


def _stages(folder: Path) -> tuple[list[RunFacts], bool]:
    """The runs of the stages, in order, and whether the pipeline has ended."""
    try:
        found: Any = read_json(folder / PIPELINE_FILE)
        listed = [str(row["model"]) for row in found["models"]]
    except (DataError, TypeError, KeyError):
        listed = []
    there = sorted(entry.name for entry in folder.iterdir() if is_run(entry)) if folder.is_dir() else []
    chosen = [name for name in listed if name in there] or [name for name in there if ".old-" not in name]
    if not chosen:
        why = "it has no metrics.jsonl, no summary.json and no stage with one"
        raise InputError(f"{folder}: neither a run's directory nor a pipeline's: {why}")
    runs = [read_run(folder / name) for name in chosen[:MOST_STAGES]]
    return runs if listed else sorted(runs, key=lambda run: run.events.begun), bool(listed)


def _lifts(runs: Sequence[RunFacts], learnt: Sequence[RunFacts]) -> str:
    """The gold reward, or else the reward, of each RL stage, as large figures."""
    found = []
    for run in learnt:
        before, after = run.metrics("before"), run.metrics("after")
        for name, what in HEADLINES[:3]:
            if name in before and name in after:
                found.append((f"{before[name]:z.2f} → {after[name]:z.2f}", f"{what}, {run.name}"))
                break
    seconds = [run.summary.get("seconds") for run in runs]
    total = sum(s for s in seconds if isinstance(s, int | float))
    return tiles([*found, *([(clock(total), "all stages")] if 0 < total < 1e9 else [])])


def _models(runs: Sequence[RunFacts], learnt: Sequence[RunFacts]) -> str:
    rows = []
    for run in runs:
        after, own = run.metrics("after"), run
        if run.command != "train":  # what it is as a start, the first RL stage has measured
            child = next((r for r in learnt if Path(str(r.config.get("model.path"))).name == run.name), None)
            own, measured = (child, child.metrics("before")) if child else (run, {})
        else:
            measured = after
        cells = [with_interval(name, measured, own) for name in (names.EVAL_GOLD, names.EVAL_REWARD)]
        kl, length = (measured.get(name) for name in (names.EVAL_KL, "eval/response_length"))
        note = [f"{what} {with_interval(name, after, run)}" for name, what in HEADLINES[2:] if name in after]
        figures = ["-" if value is None else number(value) for value in (kl, length)]
        rows.append((run.name, *cells, *figures, _time(run) or "-", ", ".join(note) or ("-" if after else run.outcome)))
    return table(("model", "gold reward", "reward (proxy)", "KL, nats", "length, tokens", "time", ""), rows, (0, 6))
