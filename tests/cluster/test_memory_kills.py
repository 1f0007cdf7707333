"""The system's count of processes that it killed for memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.cluster import memory_kills as module
from rlhf_dist.cluster.memory_kills import memory_kills

EVENTS = "low 0\nhigh 3\nmax 12\noom 2\noom_kill 5\noom_group_kill 0\n"


def test_it_is_read_and_does_not_change_by_itself() -> None:
    assert memory_kills() >= 0


def test_the_count_of_a_group(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text(EVENTS)
    assert module._count(tmp_path / "memory.events") == 5
    (tmp_path / "memory.events").write_text("low 0\n")
    with pytest.raises(ValueError, match="has no oom_kill"):
        module._count(tmp_path / "memory.events")
