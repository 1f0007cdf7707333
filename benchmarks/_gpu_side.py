"""What the processes of `bench gpu` share: the work they are given, the verdict of a check, and how it is told.

A process is given a file with the work and the names of its checks. It tells each verdict in a line of JSON as soon as
it is there. Without torch.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf_dist.config.load import from_yaml
from rlhf_dist.config.schema import Config

Status = Literal["PASS", "FAIL", "SKIPPED"]
MEAN_NATS, MAX_NATS = 0.02, 0.5
"""At most, between logprobs in bfloat16 and in float32: in the mean, and of any token."""
AFTER_AN_ERROR = 17
"""Exit code of a process that has told of an error: what is left is for another."""


class LeftOut(Exception):
    """A check that this machine or this config cannot have; says why."""


@dataclass(frozen=True, slots=True)
class Work:
    """What every process is given."""

    config: str
    """YAML file of the run; its model is there."""
    device: str
    """cpu or cuda."""
    folder: str
    """For files and logs."""
    told: str
    """File that verdicts are added to."""

    def read_config(self) -> Config:
        """The config of the run."""
        return from_yaml(Path(self.config).read_text(encoding="utf-8"), self.config)

    @property
    def on_gpu(self) -> bool:
        """Whether it is about a GPU."""
        return self.device == "cuda"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check has found."""

    asked: Mapping[str, bool]
    """What was asked, with what was measured, in words -> whether it is so."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """What could not be looked at here, and why."""


@dataclass(frozen=True, slots=True)
class Told:
    """A check's end, as it is saved."""

    check: str
    status: Status
    why: str
    """What was measured; of one that failed, what was asked and is not so."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()


Checks = Mapping[str, Callable[[], Verdict]]


def told_of(name: str, verdict: Verdict) -> Told:
    """PASS where all is as asked."""
    missed = [text for text, met in verdict.asked.items() if not met]
    return Told(
        name, "FAIL" if missed else "PASS", "; ".join(missed or verdict.asked), verdict.figures, verdict.without
    )


def serve(argv: Sequence[str], make: Callable[[Work], Checks]) -> int:
    """Run the named checks in order: WORK.json NAME ... Ends after an error: a GPU may be of no use after one."""
    work = Work(**json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    checks = make(work)
    for name in argv[1:]:
        failed = False
        try:
            told = told_of(name, checks[name]())
        except LeftOut as reason:
            told = Told(name, "SKIPPED", str(reason))
        except Exception as error:
            traceback.print_exc()
            told, failed = Told(name, "FAIL", f"{type(error).__name__}: {error}"), True
        with Path(work.told).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(told)) + "\n")
        if failed:
            return AFTER_AN_ERROR
    return 0


def read_told(path: Path, after: int) -> list[Told]:
    """The verdicts in the file but for the first `after`; a line that is not whole yet is left for later."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [Told(**json.loads(line)) for line in lines[after:] if line.endswith("\n")]


def agreement(what: str, mean: float, most: float) -> dict[str, bool]:
    """What is asked of logprobs in bfloat16, with these differences in nats."""
    text = f"{what} differ by {mean:.4f} nats in the mean (at most {MEAN_NATS:g}), by {most:.3f} at most ({MAX_NATS:g})"
    return {text: mean <= MEAN_NATS and most <= MAX_NATS}


def run_side(make: Callable[[Work], Checks]) -> None:
    """The end of each side's file."""
    sys.exit(serve(sys.argv[1:], make))
