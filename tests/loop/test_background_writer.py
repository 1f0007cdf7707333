"""Checkpoints that are written beside the steps; processes are stand-ins, files and threads are real."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stand_ins import FakePolicy, lines
from test_loop_rl_training import STEPS, close, warnings, wired
from test_rebuilding import Learner, Ranks, config, healing, nothing, once

from rlhf_dist.errors import CommandHung, DiskError, RanksLost, RlhfError
from rlhf_dist.loop import background_writer, rebuilding
from rlhf_dist.loop.background_writer import BackgroundWriter, Pending, Start, in_a_thread, shortage
from rlhf_dist.loop.checkpointing import TO_END_S, finish_checkpoint_at_the_end
from rlhf_dist.loop.ports import Batches, Estimates
from rlhf_dist.loop.rebuilding import train_to_the_end
from rlhf_dist.loop.rl_training import Run, train
from rlhf_dist.loop.train_state import read_state
from rlhf_dist.models import guarded_files
from rlhf_dist.models.checkpoints import checkpoint_steps, problems
from rlhf_dist.telemetry.metrics import MetricSums

LIMIT_S = 20.0
SLOW_S = 0.03
EVERY = config(checkpoint_every=1)


@dataclass
class Deferred:
    """Work that is done when it is waited for, and not before."""

    work: Callable[[], Path]
    begun: bool = False

    def done(self) -> bool:
        return self.begun

    def result(self, timeout: float | None = None) -> Path:
        self.begun = True
        return self.work()


@dataclass
class Watching(FakePolicy):
    """Notes the newest checkpoint at each update."""

    newest: Callable[[], Path | None] = lambda: None
    seen: list[str] = field(default_factory=list)

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        found = self.newest()
        self.seen.append(found.name if found else "")
        return super().update(batches, estimates)


def in_background(
    path: Path, start: Start = in_a_thread, lacks: Callable[[int], str] = lambda _: "", **parts: Any
) -> Run:
    again = parts.pop("again", False)
    run = wired(path / "run", EVERY, again=again, **parts)
    memory = path / "memory"
    memory.mkdir(exist_ok=True)
    writer = BackgroundWriter(run.directory, memory, 1, limit_s=LIMIT_S, start=start, lacks=lacks)
    return replace(run, background=writer)


def newest(run: Run) -> str:
    found = run.directory.latest_checkpoint()
    assert found is not None and problems(found) == []
    return found.name


def written(run: Run) -> list[str]:
    return [event["message"] for event in lines(run.directory.events) if event["kind"] == "checkpoint"]


@pytest.mark.parametrize("start", [in_a_thread, Deferred])
def test_checkpoints_are_those_that_training_would_wait_for(tmp_path: Path, start: Start) -> None:
    runs = {"background": in_background(tmp_path, start), "foreground": wired(tmp_path / "foreground", EVERY)}
    states = {}
    for name, run in runs.items():
        train(run, None)
        close(run)
        assert newest(run) == f"step-{STEPS}" and checkpoint_steps(run.directory.checkpoints) == [STEPS - 1, STEPS]
        assert written(run) == [f"wrote {run.directory.checkpoints}/step-{step}" for step in range(1, STEPS + 1)]
        text = (run.directory.checkpoints / f"step-{STEPS}" / "state.json").read_text()
        states[name] = {key: value for key, value in json.loads(text).items() if key not in ("elapsed", "hash")}
        assert warnings(run.directory) == []
    states["foreground"]["ledger"]["id"] = states["background"]["ledger"]["id"]
    assert states["background"] == states["foreground"]
    assert list((tmp_path / "memory").iterdir()) == [], "the copy goes once it is on the disk"


def test_the_next_step_is_made_before_the_checkpoint_is_on_the_disk(tmp_path: Path) -> None:
    seen = {}
    for name, start in (("background", Deferred), ("foreground", None)):
        policy = Watching()
        run = (
            in_background(tmp_path / name, Deferred, policy=policy) if start else wired(tmp_path, EVERY, policy=policy)
        )
        policy.newest = run.directory.latest_checkpoint
        train(run, None)
        close(run)
        seen[name] = policy.seen
    assert seen == {"background": ["", "", "step-1", "step-2"], "foreground": ["", "step-1", "step-2", "step-3"]}


def test_a_disk_that_is_full_ends_the_run_as_it_does_where_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = in_background(tmp_path)

    send = os.sendfile

    def full(target: int, source: int, offset: int | None, count: int) -> int:
        if "step-3" in os.readlink(f"/proc/self/fd/{target}"):
            raise OSError(28, "No space left on device")
        return send(target, source, offset, count)

    monkeypatch.setattr(os, "sendfile", full)
    with pytest.raises(DiskError, match=r"step-3\.unfinished/.*: cannot be written: No space left on device"):
        train(run, None)
    close(run)
    assert newest(run) == "step-2" and warnings(run.directory) == []


def test_without_room_training_waits_and_a_warning_says_why_once(tmp_path: Path) -> None:
    reasons = iter(["a copy takes 3 MiB", "a copy takes 3 MiB", "", "it has come back"])
    run = in_background(tmp_path, lacks=lambda _: next(reasons))
    train(run, None)
    close(run)
    assert newest(run) == f"step-{STEPS}" and len(written(run)) == STEPS
    assert warnings(run.directory) == [
        "step 1: training waits while its checkpoint is written: a copy takes 3 MiB",
        "step 4: training waits while its checkpoint is written: it has come back",
    ]


def test_so_it_does_where_ranks_do_not_write_into_the_memory(tmp_path: Path) -> None:
    @dataclass
    class Elsewhere(FakePolicy):
        def save(self, folder: Path) -> None:
            if "memory" not in folder.parts:
                super().save(folder)

    run = in_background(tmp_path, policy=Elsewhere())
    train(run, None)
    close(run)
    (said,) = warnings(run.directory)
    assert said.endswith("hf/config.json did not arrive in the memory of the command's node")
    assert newest(run) == f"step-{STEPS}" and list((tmp_path / "memory").iterdir()) == []


def test_a_copy_that_was_given_up_goes_before_the_next_one_is_made(tmp_path: Path) -> None:
    """Ranks died while they filled it, or one that failed had others that went on. Its room counts for the next."""
    memory, rooms = tmp_path / "memory", list[bool]()

    def lacks(_: int) -> str:
        rooms.append(not list(memory.iterdir()))
        return ""

    learner = Learner(fault=once("save", 3))
    parts = {"policy": learner, "ranks": Ranks(learner), "healing": healing()}
    run = in_background(tmp_path, Deferred, lacks, **parts)
    for name in ("step-2.copy", "step-9.copy"):
        (memory / name / "hf").mkdir(parents=True)
    train_to_the_end(run, None)
    close(run)
    assert newest(run) == f"step-{STEPS}" and rooms == [True] * (STEPS + 1) and list(memory.iterdir()) == []


def test_what_is_not_finished_when_the_run_is_killed_counts_for_nothing(tmp_path: Path) -> None:
    run = in_background(tmp_path, Deferred, policy=FakePolicy(fails_at=4))
    with pytest.raises(RuntimeError):
        train(run, None)
    close(run)
    assert newest(run) == "step-2", "that of step 3 is in memory"
    folder = run.directory.latest_checkpoint()
    assert folder is not None
    again = in_background(tmp_path, again=True)
    train(again, read_state(folder))
    proof = again.ledger.proof()
    close(again)
    assert newest(again) == f"step-{STEPS}" and proof.holds
    assert [line["step"] for line in lines(again.directory.metrics)] == list(range(STEPS + 1))


def test_an_error_of_another_kind_waits_for_it(tmp_path: Path) -> None:
    run = in_background(tmp_path, Deferred, policy=FakePolicy(fails_at=4))
    with pytest.raises(RuntimeError):
        train_to_the_end(run, None)
    close(run)
    assert newest(run) == "step-3"


@pytest.mark.parametrize(("left_s", "saved"), [(LIMIT_S, "step-3"), (0.0, "step-2")], ids=["in time", "too late"])
def test_a_command_that_has_hung_waits_for_it_as_long_as_it_lives(tmp_path: Path, left_s: float, saved: str) -> None:
    def hung(message: str) -> CommandHung:
        return CommandHung(message, until=time.monotonic() + TO_END_S + left_s)

    run = in_background(tmp_path, Deferred, policy=Learner(fault=once("update", 4, hung)))
    with pytest.raises(CommandHung):
        train_to_the_end(run, None)
    close(run)
    assert newest(run) == saved
    assert warnings(run.directory) == ([] if left_s else ["step-3 was not written to its end"])


@pytest.mark.parametrize("call", [("update", 3), ("save", 3)])
def test_ranks_that_are_lost_meanwhile_go_on_from_it(tmp_path: Path, call: tuple[str, int]) -> None:
    """Step 2's is under way, or the ranks die while they write step 3's."""
    weights = []
    for name, fault in (("calm", nothing), ("struck", once(*call))):
        learner = Learner(fault=fault)
        ranks = Ranks(learner)
        run = in_background(tmp_path / name, Deferred, policy=learner, ranks=ranks, healing=healing())
        train_to_the_end(run, None)
        proof = run.ledger.proof()
        close(run)
        assert proof.holds and newest(run) == f"step-{STEPS}"
        weights.append(learner.weights)
        assert [folder.name for folder in ranks.folders if folder] == (["step-2"] if name == "struck" else [])
    assert weights[0] == weights[1]


@dataclass
class AskedAfter:
    """See `loop.ports.Stop`: to end once so many steps are logged."""

    step: int
    metrics: Path = Path()
    left: float = 0.0
    notes: list[str] = field(default_factory=list)

    def deferred(self) -> AbstractContextManager[None]:
        return nullcontext()

    def asked(self) -> bool:
        return len(lines(self.metrics)) > self.step

    def left_s(self) -> float:
        return self.left

    def tell(self, note: str) -> None:
        self.notes.append(note)


def test_a_run_that_is_told_to_end_has_its_last_step_on_the_disk(tmp_path: Path) -> None:
    run = in_background(tmp_path, Deferred)
    stop = AskedAfter(2, run.directory.metrics)
    with pytest.raises(KeyboardInterrupt):
        train(replace(run, stop=stop), None)
    close(run)
    assert stop.notes == ["step 2 is saved"] and newest(run) == "step-2"


class Failing(AskedAfter):
    """What fails counts as the end that was asked for, as `cluster.signals.Saving` has it."""

    def asked(self) -> bool:
        return False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        try:
            yield
        except RlhfError as error:
            raise KeyboardInterrupt from error


@pytest.mark.parametrize(
    ("left_s", "error", "saved"),
    [(LIMIT_S, RanksLost, "step-3"), (0.0, RanksLost, "step-2"), (LIMIT_S, CommandHung, "step-2")],
    ids=["in time", "too late", "hangs"],
)
def test_a_run_that_is_told_to_end_and_fails_waits_for_it_until_its_limit(
    tmp_path: Path, left_s: float, error: type[Exception], saved: str
) -> None:
    stop = Failing(STEPS, left=left_s)
    run = in_background(tmp_path, Deferred, policy=Learner(fault=once("update", 4, error)), stop=stop)
    with pytest.raises(KeyboardInterrupt):
        train_to_the_end(run, None)
    close(run)
    left = [] if saved == "step-3" else ["step-3 was not written to its end"]
    assert newest(run) == saved and warnings(run.directory) == left


@dataclass
class Interrupted:
    """Work in a thread; whoever waits for it is interrupted."""

    work: Callable[[], Path]

    def done(self) -> bool:
        return False

    def result(self, timeout: float | None = None) -> Path:
        raise KeyboardInterrupt


def test_where_the_wait_is_interrupted_it_is_under_way_and_nobody_else_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, others = in_background(tmp_path, Interrupted), list[float]()
    monkeypatch.setattr(rebuilding, "bring_to_disk", lambda _, limit_s: others.append(limit_s))
    with pytest.raises(KeyboardInterrupt):
        train_to_the_end(run, None)
    close(run)
    assert others == [0.0] and warnings(run.directory) == ["step-1 was not written to its end"]


def test_a_disk_that_does_not_answer_is_named_and_holds_up_no_end(tmp_path: Path) -> None:
    run, answers = wired(tmp_path / "run", EVERY), threading.Event()

    def hangs(work: Callable[[], Path]) -> Pending:
        def waits() -> Path:
            answers.wait(LIMIT_S)
            return Path("it came late")

        return in_a_thread(waits)

    writer = BackgroundWriter(run.directory, tmp_path, 1, limit_s=0.05, start=hangs)
    writer.begin(7)
    writer.submit(7, 1, {"step": 7}, [])
    assert writer.finished(wait_s=0.0) is None and writer.finished(wait_s=0.01) is None
    assert writer.under_way() == "step-7"
    with pytest.raises(DiskError, match=r"step-7: the disk has made no progress for 0\.05 s \(learner\.timeout_s\)"):
        writer.finished()
    run = replace(run, background=writer)
    assert not finish_checkpoint_at_the_end(run, RuntimeError()), "the thread may still write"
    assert warnings(run.directory) == ["step-7 was not written to its end"] and writer.under_way() == "step-7"
    answers.set()
    deadline = time.monotonic() + LIMIT_S
    while (found := writer.finished()) is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert found == Path("it came late") and writer.under_way() == ""
    close(run)


class SlowHash:
    def update(self, data: bytes) -> None:
        time.sleep(SLOW_S)

    def hexdigest(self) -> str:
        return "0" * 32


@pytest.mark.parametrize("slow", ["copying", "hashing", "syncing"])
def test_a_slow_disk_has_all_the_time_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    """Each of these takes longer than the limit, and no piece of it does."""
    run = wired(tmp_path / "run", EVERY)
    writer = BackgroundWriter(run.directory, tmp_path, 1, limit_s=10 * SLOW_S)
    folder, sync = writer.begin(7), os.fsync
    (folder / "weights").write_bytes(b"x" * 20)
    if slow == "copying":
        monkeypatch.setattr(background_writer, "PIECE", 1)
    elif slow == "hashing":
        monkeypatch.setattr(guarded_files, "READ_BLOCK", 1)
        monkeypatch.setattr(guarded_files, "xxhash", SimpleNamespace(xxh3_128=SlowHash))
    else:
        for i in range(20):
            (folder / f"empty-{i}").touch()  # nothing is copied
    if slow != "hashing":
        monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(SLOW_S), sync(descriptor)))
    began = time.monotonic()
    writer.submit(7, 1, {"step": 7}, ["weights"])
    assert writer.finished() == run.directory.latest_checkpoint() == run.directory.checkpoints / "step-7"
    assert time.monotonic() - began > 20 * SLOW_S
    close(run)


def test_what_is_short_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 2**20
    monkeypatch.setattr(
        background_writer.shutil, "disk_usage", lambda _: SimpleNamespace(free=14 * mib, total=40 * mib)
    )
    monkeypatch.setattr(background_writer, "available_here", lambda: 12 * mib)
    assert shortage(6 * mib) == "" == shortage(3 * mib, besides=7 * mib)
    assert shortage(11 * mib) == "a copy takes 11 MiB of /dev/shm, and 10 MiB are to be had"
    assert shortage(4 * mib, besides=7 * mib) == "a copy takes 4 MiB of /dev/shm, and 3 MiB are to be had"
    assert shortage(7 * mib) == "copying takes 14 MiB of memory, and 12 MiB are available"
