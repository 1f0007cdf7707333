"""A run's directory, telemetry and display around its work, and what is left at its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_dist.cluster import signals
from rlhf_dist.cluster.preflight import disk_need, require_shared_memory
from rlhf_dist.cluster.resume import Start, resumed
from rlhf_dist.cluster.sources import model_source, reward_model_doubts
from rlhf_dist.config.load import to_yaml
from rlhf_dist.config.reward_words import reward_lines
from rlhf_dist.config.schema import Config
from rlhf_dist.loop.html_report import reported
from rlhf_dist.loop.run_directory import RunDirectory, open_run_directory, require_free_disk, write_json, write_text
from rlhf_dist.loop.run_end import FINISHED, OUTCOME, end_recorded
from rlhf_dist.planning.placement import Command
from rlhf_dist.telemetry.code_version import versions
from rlhf_dist.telemetry.display import Progress, make_progress
from rlhf_dist.telemetry.fault_tally import FaultTally
from rlhf_dist.telemetry.report import before_after_text, curves
from rlhf_dist.telemetry.run_telemetry import Telemetry, open_telemetry, require_sinks


@contextmanager
def opened(config: Config, command: Command, start: Start[Any]) -> Iterator[tuple[RunDirectory, Telemetry, Progress]]:
    """Run directory, telemetry and progress of a run; model, memory and sinks are checked before it is made."""
    require_sinks(config.telemetry)
    if not start.resume:
        source = model_source(config, None, command)
        require_free_disk(Path(config.output), disk_need(source, config, command))
        if command == "train":
            require_shared_memory(source, config)
    run = open_run_directory(config.output, config.name, to_yaml(config), start.resume)
    with ExitStack() as stack:
        stack.callback(run.close)
        progress = make_progress(config.telemetry.progress, sys.stderr)
        stack.push(lambda kind, *_: progress.close(stopped=kind is not None))
        if start.resume:
            progress.note(resumed(start.folder))
        aside = [] if start.folder is None else run.go_back_to(start.folder)
        progress.stage("opening telemetry")
        wandb_id, no_id = run.read_wandb_id()
        telemetry, new_id = open_telemetry(
            config.telemetry, run.path.absolute(), config.name, asdict(config), wandb_id, progress.warn, progress.note
        )
        stack.callback(telemetry.close)
        for problem in resume_notes(start, aside, no_id):
            telemetry.warn(problem)
        if new_id is not None and new_id != wandb_id:
            write_text(run.wandb_id, new_id + "\n")
        for line in reward_lines(config) if command == "train" else ():
            progress.note(line)
            telemetry.event("rewards", line)
        for doubt in reward_model_doubts(config, begins=start.folder is None) if command == "train" else ():
            telemetry.warn(doubt)
        with end_recorded(run, telemetry, command, signals.how_stopped):
            yield run, telemetry, progress


def resume_notes(start: Start[Any], aside: Sequence[Path], no_id: str) -> list[str]:
    """What is to be warned of as a run opens."""
    notes = [f"{no_id}; a new wandb run is begun"] if no_id else []
    if aside:
        names = ", ".join(path.name for path in aside)
        notes.append(f"later checkpoints are not used any more and are kept as {names}; delete them to free the disk")
    if start.unchecked:
        notes.append(
            f"{start.folder} was written by a version that stored no hashes, so its files and the ledger could not be "
            "compared; the next checkpoint will have them"
        )
    return notes


def finish(
    run: RunDirectory,
    progress: Progress,
    before: dict[str, float],
    after: dict[str, float],
    summary: dict[str, Any],
    seconds: float,
    lines: list[str],
) -> None:
    """Table, curves, summary and report, with the faults of a run that had any."""
    progress.stage("drawing curves")
    curves(run.metrics, run.curves)
    tally = FaultTally.of(run.events)
    faults = {name.removeprefix("faults/"): round(value, 1) for name, value in tally.metrics().items()}
    told = {"faults": faults} if faults else {}
    facts = {"versions": versions(), "seconds": round(seconds, 1)}
    write_json(run.summary, {OUTCOME: FINISHED} | summary | told | facts)
    progress.close()
    print(before_after_text(before, after))
    for line in filter(None, [*lines, tally.line()]):
        print(line)
    best = run.best_checkpoint()
    models = f"model: {run.latest_checkpoint()}/hf" + (f"  best: {best}/hf" if best else "")
    print(f"run directory: {run.path}  {reported(run.path)}  {models}  ({seconds:.0f} s)")
