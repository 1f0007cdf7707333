"""Every second of every device is booked once, to the cause that held it."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from rlhf_dist.telemetry.goodput import ActorSide, Goodput


class Scene:
    """A clock, and an actor side that does as it is told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.side = ActorSide(0, 0, 0)
        self.goodput = Goodput(lambda: self.side, lambda: self.now)

    def passes(self, seconds: float, side: ActorSide) -> None:
        self.side = side
        self.now += seconds
        self.goodput.look()


def test_a_step_in_turn_by_hand() -> None:
    """Two workers: 4 s both sample, 2 s one, 1 s scores alone, then 2 s training and 1 s sync, all in 10 s."""
    scene = Scene()
    scene.goodput.phase("generate")
    scene.passes(4.0, ActorSide(2, 0, 0, 1))
    scene.passes(2.0, ActorSide(1, 1, 1))
    scene.passes(1.0, ActorSide(0, 2, 1))
    scene.goodput.phase("train")
    scene.passes(2.0, ActorSide(0, 2, 0, 1))
    scene.goodput.phase("sync")
    scene.passes(1.0, ActorSide(0, 2, 0, 1))
    scene.goodput.phase("")
    found = scene.goodput.lap()
    assert {name: share for name, share in found.items() if share} == pytest.approx(
        {
            "goodput/rollout_generate": 0.5,
            "goodput/rollout_wait_slowest": 0.1,
            "goodput/rollout_wait_score": 0.1,
            "goodput/rollout_wait_train": 0.2,
            "goodput/rollout_sync": 0.1,
            "goodput/learner_wait_generate": 0.6,
            "goodput/learner_wait_score": 0.1,
            "goodput/learner_train": 0.2,
            "goodput/learner_sync": 0.1,
            "goodput/scoring_score": 0.3,
            "goodput/scoring_wait_generate": 0.4,
            "goodput/scoring_wait_learner": 0.3,
        }
    )


def test_both_at_once() -> None:
    """Workers that have requests generate whatever the learner does."""
    scene = Scene()
    scene.goodput.phase("train")
    scene.passes(3.0, ActorSide(1, 0, 1))
    scene.goodput.phase("")
    scene.passes(1.0, ActorSide(1, 0, 1))
    found = scene.goodput.lap()
    assert found["goodput/rollout_generate"] == 1.0
    assert found["goodput/learner_train"] == 0.75 and found["goodput/learner_wait_other"] == 0.25
    assert scene.goodput.lap() == {}, "no time, no shares"


TIMES = st.lists(
    st.tuples(
        st.sampled_from(["generate", "train", "value", "sync", ""]),
        st.floats(0.001, 10.0),
        st.builds(ActorSide, st.integers(0, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2)),
    ),
    min_size=1,
)


@given(TIMES)
def test_shares_sum_to_one(times: list[tuple[str, float, ActorSide]]) -> None:
    scene = Scene()
    for phase, seconds, side in times:
        scene.goodput.phase(phase)
        scene.passes(seconds, side)
    found = scene.goodput.lap()
    for half in ("rollout", "learner", "scoring"):
        shares = [share for name, share in found.items() if name.startswith(f"goodput/{half}_")]
        assert sum(shares) == pytest.approx(1.0) and min(shares) >= 0.0
