"""A process of Ray's own that is stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_dist.cluster.ray_watch import RayWatch
from rlhf_dist.errors import RayLost


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child of this process with that name."""
    program = tmp_path / "raylet"
    shutil.copy("/bin/sleep", program)
    process = subprocess.Popen([str(program), "60"])
    yield process
    process.kill()
    process.wait(10)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    end = time.monotonic() + 10
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_that_is_stopped_for_too_long_is_lost_and_killed(raylet: subprocess.Popen[bytes]) -> None:
    watch = RayWatch(5.0)
    watch.look(0.0)
    stop(raylet)
    for now in (2.0, 4.5, 7.0):
        watch.look(now)
    with pytest.raises(
        RayLost, match=rf"its process raylet \({raylet.pid}\) was stopped for 5 s \(faults\.heartbeat_s"
    ):
        watch.look(8.1)
    assert raylet.wait(10) == -signal.SIGKILL


def test_one_that_goes_on_is_not(raylet: subprocess.Popen[bytes]) -> None:
    watch = RayWatch(5.0)
    stop(raylet)
    watch.look(2.0)
    os.kill(raylet.pid, signal.SIGCONT)
    end = time.monotonic() + 10
    while Path(f"/proc/{raylet.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
        assert time.monotonic() < end
        time.sleep(0.01)
    watch.look(4.0)
    stop(raylet)
    watch.look(6.0)
    watch.look(10.0)
    assert raylet.poll() is None, "the time before does not count"
