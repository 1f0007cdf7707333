"""A real run whose disk is full in the middle of a checkpoint, and then can only be read: `--supervise` starts it again
from its last good checkpoint, and it comes to the same as a run on a sound disk."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Workplace, end, wait_until
from matrix_runs import lines, make_place, metrics, weights

from rlhf_dist.models.checkpoints import problems

pytestmark = [pytest.mark.engines, pytest.mark.faults, pytest.mark.timeout(600)]
STEPS, MIB = 10, 2**20
DISK_MIB, LEFT_MIB = 600, 12
"""Of the disk; what is left on it when it is full, which is less than a checkpoint."""
WORDS = ("reference.replicas=0", "critic.side_by_side=false", "loop.checkpoint_every=1", f"loop.steps={STEPS}")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path_factory.mktemp("disk")
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(disk: Path) -> Path:
    """A file that takes all space but a little, while others write there, too."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file, suppress(OSError):
        while shutil.disk_usage(disk).free > LEFT_MIB * MIB:
            file.write(bytes(4 * MIB))
            file.flush()
    return ballast


def remount(disk: Path, how: str) -> bool:
    """Whether it could be: not while a file is open for writing."""
    words = ["mount", "-o", f"remount,{how}", str(disk)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def restarts(run: Path) -> list[str]:
    return [event["facts"]["class"] for event in lines(run / "events.jsonl") if event["kind"] == "restart"]


def last_step(run: Path) -> int:
    return max((line["step"] for line in lines(run / "metrics.jsonl")), default=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_place(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def sound(place: Workplace) -> Path:
    """The run that has room."""
    finished = place.finish(place.start("train", "name=sound", *WORDS))
    assert finished.code == 0, finished.stderr
    return place.output / "sound"


def test_a_full_disk_costs_no_step_that_was_saved(disk: Path, place: Workplace, sound: Path) -> None:
    run = disk / "full"
    words = [*WORDS, "name=full", f"output={disk}", "--supervise", "faults.backoff_s=1"]
    process = place.start("train", *words)
    try:
        wait_until(lambda: last_step(run) >= 3, process)
        ballast = fill(disk)
        wait_until(lambda: restarts_or_stderr(place, run), process)
        newest = (run / "checkpoints" / "LATEST").read_text().strip()
        assert not problems(run / "checkpoints" / newest), "what LATEST names is whole"
        ballast.unlink()
        before = last_step(run)
        wait_until(lambda: last_step(run) > before, process)
        finished = place.finish(process)
    finally:
        end(process)
    assert finished.code == 0, finished.stderr
    assert "the disk at step" in finished.stderr and "No space left on device" in finished.stderr
    assert metrics(run) == metrics(sound) and weights(run, STEPS) == weights(sound, STEPS)
    ledger = json.loads((run / "summary.json").read_text())["ledger"]
    assert "0 in flight, 0 lost, 0 used twice" in ledger


def restarts_or_stderr(place: Workplace, run: Path) -> bool:
    """Whether the parent has told of the full disk; the event may have found no room."""
    newest = max(place.folder.glob("*.stderr"), key=lambda path: int(path.stem))
    return bool(restarts(run)) or "the disk at step" in newest.read_text()


def test_a_disk_that_can_only_be_read_ends_a_command_with_one_message(disk: Path, place: Workplace) -> None:
    """After the run above: a disk cannot be made so while files are open for writing."""
    run = disk / "full"
    assert remount(disk, "ro"), "nobody writes there"
    try:
        again = place.finish(place.start("train", *WORDS, "name=full", f"output={disk}", "--resume"))
        other = place.finish(place.start("train", *WORDS, "name=other", f"output={disk}"))
    finally:
        assert remount(disk, "rw")
    for ended, where in ((again, run), (other, disk)):
        message = f"rlhf-dist: output: {where} cannot be written to (no permission, or read-only)"
        assert ended.code == 2 and ended.stderr.splitlines()[-1].startswith(message)
    assert not problems(run / "checkpoints" / f"step-{STEPS}")
    assert not (disk / "other").exists()
