"""Weights that do not move; processes are stand-ins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from stand_ins import FakePolicy
from test_loop_rl_training import PROMPTS, close, wired
from test_numbers_faults import config_of, told

from rlhf_dist.errors import NumbersError
from rlhf_dist.loop.ports import Batches, Estimates
from rlhf_dist.loop.rl_training import train
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.weights.receipts import Announcement


@dataclass
class StillPolicy(FakePolicy):
    """Its weights do not move, but in some updates, whatever it says of gradients."""

    norm: float = 1.0
    rate: float = 1e-6
    moves: Sequence[int] = ()

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        stats = super().update(batches, estimates)
        made = MetricSums({"learner/grad_norm": (self.norm, 1.0), "learner/lr": (self.rate, 1.0)})
        return MetricSums.merge([stats, made])

    def publish(self, version: int) -> Announcement:
        self.published = self.updates
        self.hash = f"moved {version}" if self.updates in self.moves else self.hash or "first"
        return super().publish(version)


@pytest.mark.parametrize(
    ("policy", "watched", "step"),
    [
        (StillPolicy(), True, 2),
        (StillPolicy(), False, 0),
        (StillPolicy(norm=0.0), True, 0),
        (StillPolicy(rate=0.9e-9), True, 0),
        (StillPolicy(rate=1.1e-9), True, 2),
        (StillPolicy(moves=(2,)), True, 4),
        (StillPolicy(moves=(2, 4)), True, 0),
        (StillPolicy(moves=(1, 2, 3)), True, 0),
    ],
)
def test_weights_that_did_not_move_in_two_steps_in_a_row_are_found(
    tmp_path: Path, policy: StillPolicy, watched: bool, step: int
) -> None:
    """Below a thousandth of the peak learning rate, 1e-6, they need not."""
    run = wired(tmp_path, config_of("stop", still_weights=watched), policy=policy)
    if step:
        with pytest.raises(NumbersError, match=rf"^step {step}: no weight has changed in an optimizer step with learn"):
            train(run, None)
    else:
        train(run, None)
    close(run)


def test_weights_that_never_move_end_a_run_that_skips(tmp_path: Path) -> None:
    """The first step is none yet; the third fault in a row is one too many."""
    run = wired(tmp_path, config_of("skip", max_faults=2), policy=StillPolicy())
    with pytest.raises(NumbersError, match="There were 3 faults in a row"):
        train(run, None)
    proof = run.ledger.proof()
    close(run)
    assert proof.consumed == 3 * PROMPTS, "they were trained on"
    assert [text.split(";")[1] for text in told(run)] == [
        " the run goes on (numbers.on_fault skip)",
        " the run goes on (numbers.on_fault skip)",
        " the run ends (numbers.on_fault skip)",
    ]
