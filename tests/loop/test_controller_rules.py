"""What a run's rules are, from its config."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf_dist.config.schema import AlgoConfig, Config, LoopConfig
from rlhf_dist.loop.controller_rules import rules_of


@pytest.mark.parametrize(("lag", "filtered"), [(0, 4), (1, 12)])
def test_every_step_under_way_has_its_rounds_of_filtering(lag: int, filtered: int) -> None:
    """Four groups a step and two rounds: one round can be made up for, and at lag 1 two steps are under way."""
    loop = LoopConfig(prompts_per_step=4, max_policy_lag=lag)
    config = replace(Config(), loop=loop, algo=AlgoConfig(filter_groups=True, filter_rounds=2))
    assert rules_of(config, compares=False, masked=False).filtered == filtered
