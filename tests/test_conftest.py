"""Which tests stay in one process where several run the tests with engines side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import pytest_collection_modifyitems


class Item:
    """What the order and the groups of tests are made from."""

    def __init__(self, file: str, *fixtures: str, engines: bool = False) -> None:
        self.path = Path(file)
        self.fixturenames = fixtures
        self.marks: dict[str, tuple[Any, ...]] = {"engines": ()} if engines else {}

    def add_marker(self, marker: Any) -> None:
        found = getattr(pytest.mark, marker) if isinstance(marker, str) else marker
        self.marks[found.name] = found.args

    def get_closest_marker(self, name: str) -> Any:
        return name if name in self.marks else None


def test_tests_that_share_an_engine_a_session_or_a_run_stay_together() -> None:
    light, actors = Item("test_fleets.py"), Item("test_fleets.py", "workers", "local_ray")
    reads, beside = Item("test_submit.py", "cluster", "shared_run", engines=True), Item("test_submit.py", engines=True)
    resumed, alone = Item("test_resume.py", "history", "shared_run"), Item("test_ranks.py", "results", engines=True)
    sampled = [Item(file, "worker", "engine", engines=True) for file in ("test_engine.py", "test_weights.py")]
    items: list[Any] = [light, actors, reads, beside, resumed, alone, *sampled]
    pytest_collection_modifyitems(items)
    assert items == [light, reads, beside, resumed, alone, *sampled, actors], "this process's Ray comes last"
    assert "engines" not in light.marks and "xdist_group" not in light.marks
    groups = {id(item): item.marks["xdist_group"][0] for item in items if "engines" in item.marks}
    assert groups[id(reads)] == groups[id(beside)] == groups[id(resumed)], "one file, and one run"
    assert groups[id(sampled[0])] == groups[id(sampled[1])]
    assert len({groups[id(item)] for item in (reads, alone, sampled[0], actors)}) == 4
