"""A real run whose learner sends its weights straight to the workers: the same run, and nothing more can be reached."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, SharedRun

pytestmark = pytest.mark.timeout(600)
BROADCAST = pytest.param("broadcast", marks=pytest.mark.faults)
"""Left out of most runs for its time: `test_netns_cluster.py` has a run with that transport."""
BOTH = pytest.mark.parametrize("direct", ["ipc", BROADCAST], indirect=True)
TIMES = ("time/", "goodput/", "rollout/group_s", "rollout/engine_")


@dataclass(frozen=True, slots=True)
class Direct:
    """The run, and what its own processes opened."""

    train: Finished
    path: Path
    weights: frozenset[str]
    listening: frozenset[tuple[str, str]]


@pytest.fixture(scope="module")
def direct(shared_run: SharedRun, request: pytest.FixtureRequest) -> Direct:
    """With `weights.transport` as the test asks for."""
    place = shared_run.workplace
    words = [f"weights.transport={request.param}", "weights.bucket_mib=1", "loop.checkpoint_every=0", "eval.every=0"]
    weights, listening = set(place.weights), set(place.listening)
    place.weights.clear()
    place.listening.clear()
    train = place.run("train", f"name={request.param}", f"model.path={place.output / 'sft'}", *words)
    found = Direct(train, place.output / request.param, frozenset(place.weights), frozenset(place.listening))
    place.weights.update(weights)
    place.listening.update(listening)
    return found


def steps(path: Path) -> list[dict[str, Any]]:
    """Metrics of the training steps that do not tell of time."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "reward/mean" in line]
    return [{name: value for name, value in line.items() if is_exact(name)} for line in found]


def is_exact(name: str) -> bool:
    return not name.startswith((*TIMES, "eval/"))


@BOTH
def test_it_comes_to_the_same_as_by_shared_memory(shared_run: SharedRun, direct: Direct) -> None:
    assert direct.train.code == 0, direct.train.stderr
    own, other = steps(direct.path), steps(shared_run.path)
    assert len(own) == 4 and all(line["sync/changed_share"] > 0 for line in own[1:])
    assert own == other


@pytest.mark.parametrize("direct", [BROADCAST], indirect=True)
def test_no_weights_go_through_shared_memory(shared_run: SharedRun, direct: Direct) -> None:
    assert direct.train.code == 0 and not direct.weights
    assert shared_run.workplace.weights, "those of the other run were seen"


@BOTH
def test_what_it_listens_on_is_loopback(direct: Direct) -> None:
    assert direct.train.code == 0
    listening = direct.listening
    assert listening and not [one for one in listening if one[1] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
