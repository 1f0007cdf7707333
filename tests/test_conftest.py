"""Which tests with engines are found, and which stay in one process where several run them side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import group_of, pytest_collection_modifyitems, pytest_ignore_collect, pytest_xdist_make_scheduler

TEXTS = {
    "fleets": "def test_one(workers: dict, local_ray: None) -> None",
    "inbox": "from cluster_stand_ins import workers",
    "submit": "def test_job(cluster: Cluster, shared_run: SharedRun) -> None",
    "resume": "def history(shared_run: SharedRun) -> History",
    "methods": "pytestmark = pytest.mark.engines",
    "matrix": "pytestmark = [pytest.mark.engines, pytest.mark.faults]",
    "light": "What engines do.",
}


class Item:
    """What the order and the marks of tests are made from."""

    def __init__(self, file: str, *fixtures: str, marks: Iterable[str] = ()) -> None:
        self.path = Path(file)
        self.fixturenames = fixtures
        self.marks = set(marks)

    def add_marker(self, marker: str) -> None:
        self.marks.add(marker)

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None


class Asked:
    """pytest's config with `-m MARKS`; notes what is left out."""

    def __init__(self, marks: str = "") -> None:
        self.marks, self.deselected = marks, []
        self.hook = SimpleNamespace(pytest_deselected=lambda items: self.deselected.extend(items))

    def getoption(self, name: str) -> str:
        return {"markexpr": self.marks}[name]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with files of tests."""
    monkeypatch.chdir(tmp_path)
    for name, text in TEXTS.items():
        Path(f"test_{name}.py").write_text(text)
    return tmp_path


def test_this_processs_ray_comes_last(here: Path) -> None:
    light, actors = Item("test_fleets.py"), Item("test_fleets.py", "workers", "local_ray")
    reads, alone = Item("test_submit.py", "shared_run"), Item("test_methods.py", marks=["engines"])
    items: list[Any] = [light, actors, reads, alone]
    config: Any = Asked()
    pytest_collection_modifyitems(config, items)
    assert items == [light, reads, alone, actors]
    assert [item for item in items if "engines" in item.marks] == [reads, alone, actors]


@pytest.mark.parametrize(("marks", "kept"), [("", 1), ("engines", 1), ("faults", 2), ("faults and engines", 2)])
def test_long_tests_of_faults_run_where_they_are_asked_for(here: Path, marks: str, kept: int) -> None:
    items: list[Any] = [Item("test_light.py"), Item("test_matrix.py", marks=["engines", "faults"])]
    config: Any = Asked(marks)
    long = items[kept:]
    pytest_collection_modifyitems(config, items)
    assert len(items) == kept and config.deselected == long


def test_files_that_share_a_session_or_a_run_stay_together(here: Path) -> None:
    groups = {name: group_of(here / f"test_{name}.py") for name in TEXTS}
    assert groups["fleets"] == groups["inbox"] and groups["submit"] == groups["resume"]
    assert len(set(groups.values())) == len(TEXTS) - 2


def test_the_processes_share_the_groups(here: Path) -> None:
    def scheduler(how: str) -> Any:
        options = {"dist": how, "tx": ["2*popen"]}
        config: Any = SimpleNamespace(getoption=options.get, getvalue=options.get, rootpath=here)
        return pytest_xdist_make_scheduler(config, None)

    split = scheduler("loadfile")._split_scope
    assert split("test_submit.py::test_job") == split("test_resume.py::test_end[1]") != split("test_inbox.py::test_x")
    assert scheduler("load") is None


def test_files_without_engines_are_not_read_where_only_engines_are_asked_for(here: Path) -> None:
    def ignored(name: str, marks: str) -> bool | None:
        config: Any = Asked(marks)
        return pytest_ignore_collect(Path(name), config)

    assert ignored("test_light.py", "engines") is True
    assert ignored("test_methods.py", "faults") is True and ignored("test_matrix.py", "faults") is None
    # Whether others are read is for others to say.
    assert ignored("test_methods.py", "engines") is ignored("conftest.py", "engines") is None
    assert ignored("test_light.py", "not engines") is ignored("test_light.py", "") is None


def test_a_file_that_would_not_be_found_is_named(here: Path) -> None:
    hidden: Any = Item("test_light.py", "shared_run")
    config: Any = Asked()
    with pytest.raises(AssertionError, match=r"would not find them .*: \['test_light\.py'\]"):
        pytest_collection_modifyitems(config, [hidden])
