"""Which tests with engines are found, and which stay in one process where several run them side by side."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import pytest_collection_modifyitems, pytest_ignore_collect


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


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory, with files whose text tells that they start engines, and one that tells nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("fleets", "submit", "resume", "ranks", "engine", "weights"):
        Path(f"test_{name}.py").write_text("pytestmark = pytest.mark.engines")
    Path("test_light.py").write_text("engines")


def test_tests_that_share_an_engine_a_session_or_a_run_stay_together(here: None) -> None:
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


def test_files_without_engines_are_not_read_where_only_engines_are_asked_for(here: None) -> None:
    def ignored(name: str, marks: str) -> bool | None:
        config: Any = SimpleNamespace(getoption={"markexpr": marks}.__getitem__)
        return pytest_ignore_collect(Path(name), config)

    assert ignored("test_light.py", "engines") is True
    # Whether others are read is for others to say.
    assert ignored("test_ranks.py", "engines") is ignored("conftest.py", "engines") is None
    assert ignored("test_light.py", "not engines") is ignored("test_light.py", "") is None


def test_a_file_that_would_not_be_found_is_named(here: None) -> None:
    hidden: Any = Item("test_light.py", "shared_run")
    with pytest.raises(AssertionError, match=r"would not find them .*: \['test_light\.py'\]"):
        pytest_collection_modifyitems([hidden])
