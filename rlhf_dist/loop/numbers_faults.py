"""Numbers of a training step that went wrong, and what is done about them (`numbers` in the config)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from rlhf_dist.config.load import to_yaml
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import DiskError, NumbersError
from rlhf_dist.learner.numbers_check import GRADIENT, RankFault
from rlhf_dist.loop.batch import Batch
from rlhf_dist.loop.ports import Estimates
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.alerts import AlertKind
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.telemetry.run_telemetry import Telemetry
from rlhf_dist.types import Credit

NOTICEABLE = 1e-3
"""Gradient norm from which on weights have to move: by Adam's eps a smaller one need not move any."""
LOW_RATE = 1e-3
"""Share of the peak learning rate below which weights may stand still: a schedule's last steps, in bfloat16."""
FAULTS_FOLDER = "faults"
"""In the run directory."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong in a step."""

    kind: AlertKind
    sentence: str
    """Names what, where and its value."""
    uids: tuple[str, ...]
    """Of the step's groups."""
    part: str = "the step"
    """What is skipped, in words."""


Save = Callable[[Path, Mapping[str, Any]], None]
"""Writes the step's batch into a file, with facts about it. Raises DiskError."""
Faulted = Callable[[Fault, Save], None]
"""Told of a fault. Returns where what is left of the step is to be skipped; else raises."""


class RolledBack(NumbersError):
    """The learner is to go back: to the newest state, or to one before that (`Numbers.went_back_to`)."""


def stopped(fault: Fault, save: Save) -> NoReturn:
    """Where nobody has another way."""
    raise NumbersError(fault.sentence)


def fault_of_inputs(batch: Batch, scores: np.ndarray, credit: Credit, max_kl: float) -> Fault | None:
    """What is wrong with a step's numbers by response, before anything is learnt; `scores`: as they were shaped."""
    by_response = {
        "score": batch.scores,
        "KL to the reference": batch.kl,
        "shaped score": scores,
        "advantage": credit.advantages,
    }
    for what, values in by_response.items():
        if len(bad := np.flatnonzero(~np.isfinite(values))):
            first = f"the {what} of {sample_of(batch, int(bad[0]))} is {values[bad[0]]}"
            more = f" (and so are those of {len(bad) - 1} more of {len(values)} samples)" if len(bad) > 1 else ""
            spread = f"; the step's scores go from {batch.scores.min():g} to {batch.scores.max():g}"
            return Fault("numbers", first + more + spread, batch.uids)
    kl = float(batch.kl.mean())
    if max_kl and batch.compared and kl > max_kl:
        text = f"the KL to the reference is {kl:.4g} nats a response, and numbers.max_kl is {max_kl:g}"
        return Fault("kl", text, batch.uids)
    return None


def fault_of_estimates(batch: Batch, estimates: Estimates) -> Fault | None:
    """What is wrong with credit by token."""
    whitening = {"whitening mean": estimates.whitening.mean, "whitening deviation": estimates.whitening.deviation}
    for name, value in {**estimates.metrics, **whitening}.items():
        if not math.isfinite(value):
            return Fault("numbers", f"the credit by token is not finite: {name} is {value}", batch.uids)
    return None


def fault_of_ranks(batch: Batch, found: Mapping[str, RankFault], what: str, limit: float = 0.0) -> Fault:
    """Of an optimizer step that the ranks refused: what each of them has found, by name.

    `what`: the model. `limit`: on the logprob difference.
    """
    # A gradient is of all ranks' rows: whoever has found more knows better.
    rank, first = min(found.items(), key=lambda one: one[1].what == GRADIENT)
    more = sum(one.what != GRADIENT for one in found.values()) - 1
    others = f" (and {more} more of its ranks found something)" if more > 0 else ""
    when = f" in optimizer step {first.update + 1} of the batch" if first.update else ""
    if first.what == GRADIENT:
        return Fault("numbers", f"the gradient of the {what} is not finite: norm {first.value}{when}", batch.uids)
    if first.origin is None:
        return Fault("numbers", f"the {first.what} on {rank} is {first.value}{when}{others}", batch.uids)
    key, sample = first.origin
    uid = dict(zip(batch.keys, batch.uids, strict=True)).get(key, key)
    where = f"token {first.token} of sample {sample} of group {uid} on {rank}"
    passed = f", and numbers.max_logprob_diff is {limit:g}" if math.isfinite(first.value) else ""
    kind: AlertKind = "mismatch" if passed else "numbers"
    return Fault(kind, f"the {first.what} of {where} is {first.value:g}{passed}{when}{others}", batch.uids)


def fault_of_still_weights(batch: Batch, learnt: MetricSums, changed_share: float, peak: float) -> Fault | None:
    """Weights that optimizer steps with a learning rate and a gradient have left as they were.

    `learnt`: the metrics of the policy's update; `peak`: the highest learning rate of its schedule.
    """
    metrics = learnt.values()
    norm, rate = metrics.get("learner/grad_norm", 0.0), metrics.get("learner/lr", 0.0)
    if changed_share > 0 or norm < NOTICEABLE or not rate or rate < LOW_RATE * peak:
        return None
    text = (
        f"no weight has changed in an optimizer step with learning rate {rate:g} and gradient norm {norm:g} "
        "for the second time in a row (numbers.still_weights)"
    )
    return Fault("still", text, batch.uids)


def sample_of(batch: Batch, row: int) -> str:
    """`sample 3 of group 0/7`."""
    return f"sample {batch.samples[row]} of group {batch.uids[batch.groups[row]]}"


class Numbers:
    """What is done about faults, and how often in a row: of one run, over all lives of its learner."""

    def __init__(self, config: Config, directory: RunDirectory, telemetry: Telemetry) -> None:
        self._config, self._directory, self._telemetry = config, directory, telemetry
        self._recent: list[tuple[int, str]] = []
        """(step, what) of the faults since the last new step that was learnt from."""
        self._passed = 0
        """The last step that the run went on from with a fault."""
        self.went_back_to: int | None = None
        """Step of the state that the last roll back went to, while no new step has been learnt from since: it may be
        the cause itself, and the next goes to one before it."""
        self._still = 0
        """The last step of those in a row in which no weight has changed; 0: none."""
        self.left_out: set[str] = set()
        """Groups of steps that were rolled back."""

    def faulted(self, step: int, fault: Fault, save: Save) -> None:
        """Save the batch, tell, and do as the config says: returns where the step is to be skipped.

        Weights that did not move are no fault before the second step in a row. Raises `RolledBack`, or `NumbersError`
        where the run ends.
        """
        config = self._config.numbers
        if fault.kind == "still":
            first, self._still = not self._still, step
            if first:
                return
        self._recent.append((step, fault.sentence))
        path = self._free(step)
        kept = self._saved(step, fault, save, path)
        way = config.on_fault if len(self._recent) <= config.max_faults else "stop"
        state = f"a state before step {self.went_back_to}'s" if self.went_back_to else "the newest state"
        done = {
            "stop": "the run ends",
            "skip": "the run goes on" if fault.kind == "still" else f"{fault.part} is skipped",
            "roll_back": f"the learner goes back to {state}, and the step's groups are left out from then on",
        }[way]
        text = f"step {step}: {fault.sentence}; {done} (numbers.on_fault {config.on_fault}); {kept}"
        self._telemetry.warn(text, fault.kind, step=step, policy=way, file=str(path))
        if way == "roll_back":
            self.left_out |= set(fault.uids)
            raise RolledBack(f"step {step}: {fault.sentence}")
        if way == "stop":
            ways = "" if config.on_fault != "stop" else ", and a resume may set numbers.on_fault to skip or roll_back"
            raise NumbersError(f"{text}{self._tried()}; the last checkpoint is intact{ways}")
        self._passed = step

    def done(self, step: int) -> None:
        """A step is done. One without a fault, and not before any with one, begins the count anew."""
        if step > self._still:
            self._still = 0
        if self._recent and self._passed != step >= max(at for at, _ in self._recent):
            self._recent.clear()
            self.went_back_to = None

    def _tried(self) -> str:
        before = self._recent[:-1]
        if not before:
            return ""
        told = "; ".join(f"step {step}: {what}" for step, what in before)
        return (
            f". There were {len(self._recent)} faults in a row without a new step that was learnt from, and "
            f"numbers.max_faults is {self._config.numbers.max_faults}; those before it: {told}"
        )

    def _saved(self, step: int, fault: Fault, save: Save, path: Path) -> str:
        """Where the batch is, in words."""
        newest = self._directory.latest_checkpoint()
        facts = {
            "step": step,
            "fault": fault.sentence,
            "run": str(self._directory.path.absolute()),
            "checkpoint": "" if newest is None else newest.name,
            "config": to_yaml(self._config),
        }
        try:
            path.parent.mkdir(exist_ok=True)
            save(path, facts)
        except (DiskError, OSError) as error:
            return f"its batch could not be saved: {error}"
        return f"look at its batch with `rlhf-dist replay {path}`"

    def _free(self, step: int) -> Path:
        """A name that no fault before has."""
        folder, number = self._directory.path.absolute() / FAULTS_FOLDER, 1
        while (path := folder / f"step-{step}{f'-{number}' if number > 1 else ''}.safetensors").exists():
            number += 1
        return path


def skipped_part(refused: Mapping[str, int], others: bool) -> str:
    """What of a step is skipped, in words. `refused`: models that refused an optimizer step -> how many they took
    before; `others`: another has learnt all of it."""
    part = f"the {' and '.join(refused)}'s part of the step" if others else "the step"
    return f"the rest of {part}" if any(refused.values()) else part


def skipped(stats: Mapping[str, float]) -> bool:
    """Whether a step's metrics are of one from which nothing was learnt for its numbers."""
    return stats.get(names.SKIPPED, 0.0) == 1.0
