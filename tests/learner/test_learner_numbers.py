"""Optimizer steps with numbers that are not finite, on one rank and on one of two, under every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forks import ForkServer
from numbers_checks import refused
from rank_processes import run_ranks
from witness_ranks import OF_NUMBERS, cases, learner_of

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
ALL = [(world, case) for world in (1, 2) for case in (*cases(world), *OF_NUMBERS)]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, forks: ForkServer, tiny_model: Path
) -> dict[tuple[int, int], dict[Any, Any]]:
    """(world size, rank) -> what `numbers_ranks.py` found."""
    folder = tmp_path_factory.mktemp("numbers")
    return run_ranks(forks, "numbers_ranks.py", folder, tiny_model, folder)


@pytest.mark.parametrize(("world", "case"), ALL)
def test_all_ranks_refuse_and_nothing_is_left_behind(results: dict, world: int, case: str) -> None:
    refused([results[world, rank][case] for rank in range(world)], learner_of(world, case).shares)
