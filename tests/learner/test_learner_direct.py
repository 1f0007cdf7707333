"""Ranks under ZeRO 3 that send their weights straight to an engine; see `direct_ranks.py`."""

from __future__ import annotations

from typing import Any

import pytest
from forks import ForkServer
from rank_processes import run_ranks

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.models.tiny import make_tiny

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]
# Its largest matrices have more than 100,000 elements: ZeRO-3 leaves smaller ones whole on every rank.
MODEL = TinyConfig(hidden_size=192, intermediate_size=640, layers=2, heads=2, kv_heads=1, max_positions=128)
Found = dict[tuple[int, int], dict[Any, Any]]


@pytest.fixture(scope="module")
def ranks(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("direct")
    return run_ranks(forks, "direct_ranks.py", folder, make_tiny(MODEL, folder), folder, worlds=(2,))


@pytest.mark.parametrize("transport", ["broadcast", "ipc"])
def test_what_arrives_is_the_learners_bit_for_bit(ranks: Found, transport: str) -> None:
    found = ranks[2, 0][transport]
    assert found["same"] == [True, True, False, True] and found["number alone"]


@pytest.mark.parametrize("transport", ["broadcast", "ipc"])
def test_a_failure_of_one_rank_is_told_by_all_and_holds_nobody_up(ranks: Found, transport: str) -> None:
    assert ranks[2, 0][transport]["sent"] == ranks[2, 1][transport]["sent"]
    problems = [sent.problem for sent in ranks[2, 0][transport]["sent"]]
    assert problems == ["", "", "the cable is cut", ""]
    assert all(sent.begun for sent in ranks[2, 0][transport]["sent"])
