"""What a person sees of a run: a live display in a terminal, one line a step elsewhere."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Literal, Protocol, TextIO

from rlhf_dist.telemetry import names

HEARTBEAT_S = 10.0
"""Plain output: seconds between two signs of life of a long stage."""
SHOWN = (
    ("reward", names.REWARD_MEAN, "{:.3f}"),
    ("loss", names.SFT_LOSS, "{:.4f}"),
    ("held-out", names.EVAL_GREEDY, "{:.3f}"),
    ("length", names.RESPONSE_LENGTH, "{:.1f}"),
    ("tok/s", names.TOKENS_PER_S, "{:,.0f}"),
)
"""Label, metric and format of what a step shows; metrics that a run does not have are left out."""


class Progress(Protocol):
    """Tells a person where a run is. It never raises because the terminal went away."""

    def stage(self, message: str) -> None:
        """A wait begins ("starting 1 rollout worker"); it lasts until the next call of any kind but `warn`."""
        ...

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Step `step` of `total` is done."""
        ...

    def eval(self, step: int, results: Mapping[str, float]) -> None:
        """Held-out results of the weights after `step`."""
        ...

    def warn(self, message: str) -> None: ...

    def close(self) -> None:
        """End the display; may be called twice."""
        ...


def make_progress(kind: Literal["auto", "rich", "plain"], stream: TextIO) -> Progress:
    """`auto` is rich when `stream` is a terminal that can move its cursor, else plain."""
    terminal = stream.isatty() and os.environ.get("TERM", "") != "dumb"
    return RichProgress(stream) if kind == "rich" or (kind == "auto" and terminal) else PlainProgress(stream)


class Pace:
    """Seconds left, from the mean of the steps seen since this process began (a resume starts anew)."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def seconds_left(self, step: int, total: int, now: float) -> float | None:
        """None at the first step seen: one point has no slope."""
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        return None if step <= first_step else (now - first_time) / (step - first_step) * (total - step)


def clock(seconds: float) -> str:
    """`42 s`, `3m07s`, `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def step_facts(metrics: Mapping[str, float], left: float | None) -> str:
    """`reward 0.412  length 5.2  tok/s 1,234  eta 3m07s`, of what there is."""
    facts = [f"{label} {form.format(metrics[name])}" for label, name, form in SHOWN if name in metrics]
    return "  ".join(facts if left is None else [*facts, f"eta {clock(left)}"])


def number(value: float) -> str:
    """Counts as whole numbers, everything else with three decimals (so 0 and 1, which may be shares, too)."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.3f}"


def eval_line(step: int, results: Mapping[str, float]) -> str:
    facts = [f"{name.removeprefix('eval/').replace('_', ' ')} {number(value)}" for name, value in results.items()]
    return f"held out, step {step}: " + "  ".join(facts)


class PlainProgress:
    """Whole lines only, so that a log file or a CI page reads well."""

    def __init__(self, stream: TextIO, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._stream = stream
        self._heartbeat_s = heartbeat_s
        self._pace = Pace()
        self._accuracy: dict[str, float] = {}
        self._stage: tuple[str, float] | None = None
        self._stage_over = threading.Event()
        self._thread: threading.Thread | None = None

    def _print(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass  # The reader went away (a closed pipe): no reason to stop a run; events.jsonl has it all.

    def stage(self, message: str) -> None:
        self._end_stage()
        self._print(f"{message} ...")
        self._stage = (message, time.monotonic())
        self._stage_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(*self._stage, self._stage_over), daemon=True)
        self._thread.start()

    def _beat(self, message: str, begun: float, over: threading.Event) -> None:
        while not over.wait(self._heartbeat_s):
            self._print(f"  still {message} ({clock(time.monotonic() - begun)})")

    def _end_stage(self) -> None:
        if self._stage is None or self._thread is None:
            return
        message, begun = self._stage
        self._stage_over.set()
        self._thread.join(timeout=1.0)
        self._stage = None
        self._print(f"  {message}: {time.monotonic() - begun:.1f} s")

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self._end_stage()
        left = self._pace.seconds_left(step, total, time.monotonic())
        self._print(f"step {step:>{len(str(total))}}/{total}  {step_facts({**self._accuracy, **metrics}, left)}")

    def eval(self, step: int, results: Mapping[str, float]) -> None:
        self._end_stage()
        self._accuracy = {name: value for name, value in results.items() if name == names.EVAL_GREEDY}
        self._print(eval_line(step, results))

    def warn(self, message: str) -> None:
        self._print(f"warning: {message}")

    def close(self) -> None:
        self._end_stage()


class RichProgress:
    """A spinner with the elapsed time while the run waits, then a bar of steps with reward, accuracy, speed, ETA."""

    def __init__(self, stream: TextIO) -> None:
        from rich import progress
        from rich.console import Console
        from rich.text import Text

        self._text = Text  # Not print's own `style`: that one also colours the live bars below the line.
        self._console = Console(file=stream, highlight=False)
        self._bars = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.fields[facts]}", markup=False),
            progress.TimeElapsedColumn(),
            console=self._console,
        )
        self._pace = Pace()
        self._accuracy: dict[str, float] = {}
        self._steps: progress.TaskID | None = None
        self._stage: tuple[progress.TaskID, str, float] | None = None
        self._bars.start()

    def stage(self, message: str) -> None:
        self._end_stage()
        task = self._bars.add_task(f"{message} ...", total=None, facts="")
        self._stage = (task, message, time.monotonic())

    def _end_stage(self) -> None:
        if self._stage is not None:
            task, message, begun = self._stage
            self._stage = None
            self._bars.remove_task(task)
            self._console.print(self._text(f"{message}: {time.monotonic() - begun:.1f} s", "dim"))

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self._end_stage()
        facts = step_facts({**self._accuracy, **metrics}, self._pace.seconds_left(step, total, time.monotonic()))
        if self._steps is None:
            self._steps = self._bars.add_task("", total=total, facts="")
        self._bars.update(self._steps, description=f"step {step}/{total}", completed=step, total=total, facts=facts)

    def eval(self, step: int, results: Mapping[str, float]) -> None:
        self._end_stage()
        self._accuracy = {name: value for name, value in results.items() if name == names.EVAL_GREEDY}
        self._console.print(eval_line(step, results), markup=False)

    def warn(self, message: str) -> None:
        self._console.print(self._text(f"warning: {message}", "yellow"))

    def close(self) -> None:
        self._end_stage()
        self._bars.stop()
