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
    ("reward", names.REWARD_MEAN, "{:z.3f}"),
    ("gold", names.REWARD_GOLD, "{:z.3f}"),
    ("kl", names.KL_REFERENCE, "{:z.2f}"),
    ("loss", names.SFT_LOSS, "{:z.4f}"),
    ("loss", names.REWARD_MODEL_LOSS, "{:z.4f}"),
    ("loss", names.PREFER_LOSS, "{:z.4f}"),
    ("held-out", names.EVAL_GREEDY, "{:z.3f}"),
    ("held-out accuracy", names.REWARD_MODEL_ACCURACY, "{:z.3f}"),
    ("held-out accuracy", names.PREFER_ACCURACY, "{:z.3f}"),
    ("length", names.RESPONSE_LENGTH, "{:.1f}"),
    ("tok/s", names.TOKENS_PER_S, "{:,.0f}"),
)
"""Label, metric and format (`z`: no -0.00) of what a step shows; metrics that a run does not have are left out."""
EXPENDABLE = ("length", "tok/s", "kl")
"""Labels that give way, in this order, where a terminal is too narrow for all."""
BAR_WIDTH, BAR_FROM_WIDTH = 24, 120
"""Characters of the bar of steps, and of a terminal that has room for it."""
REMEMBERED = (names.EVAL_GREEDY, names.REWARD_MODEL_ACCURACY, names.PREFER_ACCURACY)
"""Of an evaluation, what the steps after it go on showing."""


class Progress(Protocol):
    """Tells a person where a run is. It never raises because the terminal went away."""

    def stage(self, message: str) -> None:
        """A wait begins ("starting 1 rollout worker"); it lasts until the next call but `warn` and `note`."""
        ...

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Step `step` of `total` is done."""
        ...

    def eval(self, step: int, results: Mapping[str, float]) -> None:
        """Held-out results of the weights after `step`."""
        ...

    def remember(self, results: Mapping[str, float]) -> None:
        """Held-out results from before a resume: the steps go on showing them."""
        ...

    def warn(self, message: str) -> None: ...

    def note(self, message: str) -> None:
        """Something to know that is no cause for concern ("resumed from step 40")."""
        ...

    def close(self, stopped: bool = False) -> None:
        """End the display; may be called twice. `stopped`: by an error, so that a stage under way did not finish."""
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


def step_facts(metrics: Mapping[str, float], left: float | None, room: int | None = None) -> str:
    """`reward 0.412  length 5.2  tok/s 1,234  eta 3m07s`, of what there is and, as far as it may, fits in `room`."""
    facts = [(label, f"{label} {form.format(metrics[name])}") for label, name, form in SHOWN if name in metrics]
    if left is not None:
        facts.append(("eta", f"eta {clock(left)}"))
    for expendable in EXPENDABLE:
        if room is not None and len("  ".join(text for _, text in facts)) > room:
            facts = [fact for fact in facts if fact[0] != expendable]
    return "  ".join(text for _, text in facts)


def stage_line(message: str, seconds: float, stopped: bool) -> str:
    """What is left of a stage that is over."""
    return f"{message}: {'stopped after ' if stopped else ''}{seconds:.1f} s"


def spoken(metric: str) -> str:
    """A held-out metric's name for people: `greedy accuracy`, `pass@4`."""
    if metric.startswith(names.EVAL_PASS_PREFIX):
        return f"pass@{metric.removeprefix(names.EVAL_PASS_PREFIX)}"
    return metric.removeprefix("eval/").replace("_", " ")


def number(value: float) -> str:
    """Counts as whole numbers, everything else with three decimals (so 0 and 1, which may be shares, too)."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:z.3f}"


def eval_line(step: int, results: Mapping[str, float]) -> str:
    facts = [f"{spoken(name)} {number(value)}" for name, value in results.items()]
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

    def _end_stage(self, stopped: bool = False) -> None:
        if self._stage is None or self._thread is None:
            return
        message, begun = self._stage
        self._stage_over.set()
        self._thread.join(timeout=1.0)
        self._stage = None
        self._print(f"  {stage_line(message, time.monotonic() - begun, stopped)}")

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self._end_stage()
        left = self._pace.seconds_left(step, total, time.monotonic())
        self._print(f"step {step:>{len(str(total))}}/{total}  {step_facts({**self._accuracy, **metrics}, left)}")

    def eval(self, step: int, results: Mapping[str, float]) -> None:
        self._end_stage()
        self.remember(results)
        self._print(eval_line(step, results))

    def remember(self, results: Mapping[str, float]) -> None:
        self._accuracy = {name: value for name, value in results.items() if name in REMEMBERED}

    def warn(self, message: str) -> None:
        self._print(f"warning: {message}")

    def note(self, message: str) -> None:
        self._print(message)

    def close(self, stopped: bool = False) -> None:
        self._end_stage(stopped)


class RichProgress:
    """A spinner with the elapsed time while the run waits, then a bar of steps with reward, accuracy, speed, ETA.

    A narrow terminal goes without the bar, and without some of the numbers, so that the clock stays in sight.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich import progress
        from rich.console import Console
        from rich.text import Text

        self._text = Text  # Not print's own `style`: that one also colours the live bars below the line.
        self._console = Console(file=stream, highlight=False)
        self._has_bar = self._console.width >= BAR_FROM_WIDTH
        self._bars = progress.Progress(
            progress.SpinnerColumn("dots" if self._console.encoding.startswith("utf") else "line"),
            progress.TextColumn("{task.description}", markup=False),
            *([progress.BarColumn(bar_width=BAR_WIDTH)] if self._has_bar else []),
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

    def _end_stage(self, stopped: bool = False) -> None:
        if self._stage is not None:
            task, message, begun = self._stage
            self._stage = None
            self._bars.remove_task(task)
            self._console.print(self._text(stage_line(message, time.monotonic() - begun, stopped), "dim"))

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self._end_stage()
        label, left = f"step {step}/{total}", self._pace.seconds_left(step, total, time.monotonic())
        taken = len("* ") + len(label) + len(" ") + (BAR_WIDTH + 1 if self._has_bar else 0) + len(" 0:00:00")
        facts = step_facts({**self._accuracy, **metrics}, left, self._console.width - taken)
        if self._steps is None:
            self._steps = self._bars.add_task("", total=total, facts="")
        self._bars.update(self._steps, description=label, completed=step, total=total, facts=facts)

    def eval(self, step: int, results: Mapping[str, float]) -> None:
        self._end_stage()
        self.remember(results)
        self._console.print(eval_line(step, results), markup=False)

    def remember(self, results: Mapping[str, float]) -> None:
        self._accuracy = {name: value for name, value in results.items() if name in REMEMBERED}

    def warn(self, message: str) -> None:
        self._console.print(self._text(f"warning: {message}", "yellow"))

    def note(self, message: str) -> None:
        self._console.print(message, markup=False)

    def close(self, stopped: bool = False) -> None:
        self._end_stage(stopped)
        self._bars.stop()
