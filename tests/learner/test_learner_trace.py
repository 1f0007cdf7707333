"""The recorded trace: three training steps of GRPO and PPO come to the numbers of `trace.json`, on one rank and on two.

Fixed weights, trajectories and scores (`trace_ranks.py`) go through the real training step on real DeepSpeed, with
several optimizer steps a batch, and with the witness, of which the recorded run knew nothing. Compared are what each
step reports, every gradient norm, and how far every parameter has gone. No redesign may change these numbers: if this
test fails, find the change in the code. Where a metric or a function only gets another name, follow it in
`trace_ranks.py` and, for a metric, in `trace.json` by hand.

Record it again only where the maths is meant to change, and say which number changed and why in docs/decisions.md:

    PYTHONPATH=$PWD .venv/bin/python tests/learner/trace_ranks.py record

The limits are ten times the largest difference that was seen between one and two ranks and, on one processor, between
the kernels for AVX-512, AVX2 and SSE of ATen, MKL and oneDNN, with one thread and with two: 3e-6 of a loss, 2e-6 of a
gradient norm, 2e-5 of a parameter's way.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from forks import ForkServer
from rank_processes import run_ranks
from trace_ranks import METHODS, METRICS, RECORDED, TRACE, make_models

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]
RECORD: dict[str, Any] = json.loads(TRACE.read_text())
RANKS = ((1, 0), (2, 0), (2, 1))
OF_A_LOSS, OF_A_NORM, OF_A_WAY = 3e-5, 2e-5, 2e-4
LEAST = 1e-6


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> dict[tuple[int, int], dict[str, Any]]:
    """(world size, rank) -> what `trace_ranks.py` found."""
    folder = tmp_path_factory.mktemp("trace")
    make_models(folder)
    return run_ranks(forks, "trace_ranks.py", folder, folder)


@pytest.mark.parametrize("key", RANKS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_steps_report_the_recorded_numbers(results: dict, method: str, key: tuple[int, int]) -> None:
    for found, recorded in zip(results[key][method]["metrics"], RECORD[method]["metrics"], strict=True):
        assert found == pytest.approx(recorded, rel=OF_A_LOSS, abs=LEAST)


@pytest.mark.parametrize("key", RANKS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_norms_are_the_recorded_ones(results: dict, method: str, key: tuple[int, int]) -> None:
    assert results[key][method]["grad_norms"].keys() == RECORD[method]["grad_norms"].keys()
    for model, recorded in RECORD[method]["grad_norms"].items():
        assert results[key][method]["grad_norms"][model] == pytest.approx(recorded, rel=OF_A_NORM, abs=LEAST), model


@pytest.mark.parametrize("key", RANKS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_went_where_they_were_recorded(results: dict, method: str, key: tuple[int, int]) -> None:
    """A sum that changed by less than the rounding of the whole way is not to be told from it."""
    for model, recorded in RECORD[method]["moved"].items():
        found = results[key][method]["moved"][model]
        assert found.keys() == recorded.keys()
        for name, numbers in recorded.items():
            assert found[name] == pytest.approx(numbers, rel=0, abs=OF_A_WAY * numbers[0]), (model, name)


def test_the_trace_says_something(results: dict) -> None:
    """All weights have moved; bounds are met; norms lie on both sides of the limit; rows and ranks are idle."""
    for method, recorded in RECORD.items():
        assert set(recorded) == set(RECORDED) and method in METHODS
        assert all(way[0] > 1e-4 for ways in recorded["moved"].values() for way in ways.values())
        for bound in ("policy/clipped_low", "policy/clipped_high"):
            assert any(step[bound] > 0 for step in recorded["metrics"])
        norms = [norm for of_model in recorded["grad_norms"].values() for norm in of_model]
        assert min(norms) < 2.5 < max(norms)
        assert any(0 in counts for counts in results[2, 0][method]["rows"])
    assert all(step["learner/trained_share"] < 1 for step in RECORD["grpo"]["metrics"]), "some rows are idle"
    assert all(step["critic/value_clipped"] > 0 for step in RECORD["ppo with critic"]["metrics"])
    assert {name for found in RECORD.values() for step in found["metrics"] for name in step} == set(METRICS)
