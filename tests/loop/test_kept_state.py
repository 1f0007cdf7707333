"""The state of a run in shared memory: who may see it, how much there is of it, and when it goes."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_dist.errors import DiskError, NoMemory, ResourceError
from rlhf_dist.loop.kept_state import KeptState, in_memory
from rlhf_dist.weights import shared_memory

WEIGHTS = "weights.txt"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /dev/shm."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", folder)
    return folder


def test_states_in_memory_are_for_this_user_alone_and_one_at_a_time(memory: Path) -> None:
    kept = KeptState(1)
    for step in (1, 2):
        (kept.begin(step) / WEIGHTS).write_text("x")
        folder = kept.commit(step, {"step": step}, [WEIGHTS])
    (place,) = [path for path in memory.iterdir() if path.is_dir()]
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert folder == place / "step-2" and [one.name for one in place.iterdir()] == ["step-2"]
    shared_memory.sweep(memory)
    assert folder.exists(), "its owner lives"
    kept.close()
    assert list(memory.iterdir()) == []


def test_what_a_dead_owner_left_is_swept(memory: Path) -> None:
    place, lock = shared_memory.private_folder()
    (place / "step-1").mkdir()
    lock.close()
    shared_memory.sweep(memory)
    assert list(memory.iterdir()) == []


def test_a_state_that_lacks_a_file_is_none(memory: Path) -> None:
    kept = KeptState(1)
    kept.begin(1)
    with pytest.raises(DiskError, match=r"weights\.txt did not arrive: a rank is on another node"):
        kept.commit(1, {"step": 1}, [WEIGHTS])
    assert kept.newest() is None


def test_it_is_kept_every_so_many_steps_and_not_after_the_last(memory: Path) -> None:
    kept = KeptState(3)
    assert [step for step in range(1, 10) if kept.due(step, 9)] == [3, 6]


def test_room_for_it_is_asked_for_besides_that_of_pushes(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=3, f_frsize=2**20))
    shared_memory.require_room(2**20, 2**20)
    both = "pushes need 2 MiB for two copies of the weights, and learner.keep_state_every needs 2 MiB for two states"
    with pytest.raises(ResourceError, match=both):
        shared_memory.require_room(2**20, 2**21)
    with pytest.raises(ResourceError, match=r"shm: learner\.keep_state_every needs 4 MiB for two states"):
        shared_memory.require_room(0, 2**22)


def test_where_there_is_no_room_nothing_is_left(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        KeptState(1)
    assert list(memory.iterdir()) == []


@pytest.mark.parametrize(("file", "kind"), [("memory/step-3/model", NoMemory), ("ledger.sqlite", DiskError)])
def test_only_what_cannot_be_written_in_the_folder_is_a_lack_of_memory(
    tmp_path: Path, file: str, kind: type[DiskError]
) -> None:
    """Events are handled while the ranks write, and the ledger is written then."""
    with pytest.raises(DiskError, match="cannot be written") as raised, in_memory(tmp_path / "memory" / "step-3"):
        raise DiskError(f"{tmp_path / file}: cannot be written: No space left on device")
    assert type(raised.value) is kind
