"""When evaluation and checkpoints happen."""

from __future__ import annotations

import pytest

from rlhf_dist.loop.schedule import due


@pytest.mark.parametrize(("every", "expected"), [(0, [7]), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7])])
def test_due_every_so_many_steps_and_at_the_end(every: int, expected: list[int]) -> None:
    assert [step for step in range(1, 8) if due(every, step, 7)] == expected
