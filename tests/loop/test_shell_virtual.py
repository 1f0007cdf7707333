"""Fifty runs of the real shell with a real ledger, on a clock that jumps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from virtual_plan import MISSING
from virtual_shell import shell_run

from rlhf_dist.errors import ActorTimeout


@pytest.mark.parametrize("first", [*range(0, 50, 10), *range(MISSING, MISSING + 20, 10)])
def test_every_rule_holds_and_the_ledger_closes(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 10):
        folder = tmp_path / str(seed)
        folder.mkdir()
        run = shell_run(seed, folder)
        proof, rules = run.ledger.proof(), run.plan.rules
        lines = run.checks.ledger.values()
        assert proof.holds and proof.in_flight == proof.tokens_in_flight == 0, f"seed {seed}: {proof}"
        assert proof.consumed == rules.steps * rules.groups_per_step, f"seed {seed}: {proof}"
        assert proof.tokens_trained == sum(line.trained for line in lines), f"seed {seed}: {proof}"
        if not run.plan.faults.crash:  # a resume takes back what was dropped after a step was used
            dropped = Counter(line.reason for line in lines if line.state == "dropped")
            assert proof.dropped == dropped, f"seed {seed}: {proof}"
            assert proof.tokens == run.checks.sampled, f"seed {seed}: {proof}"
        run.ledger.close()


def test_a_worker_that_falls_silent_ends_the_run_within_its_limit(tmp_path: Path) -> None:
    with pytest.raises(ActorTimeout, match=r"rollout worker \d: no sign of progress for 70 s"):
        shell_run(8, tmp_path, wedges=6)
