import pytest

from rlhf_dist.telemetry.timeline import Stopwatch


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_phases_and_goodput_of_a_step() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    for name, seconds in [("generate", 3.0), ("score", 1.0), ("train", 3.0), ("sync", 1.0), ("train", 1.0)]:
        with watch.phase(name):
            clock.now += seconds
    clock.now += 1.0
    metrics = watch.lap()
    assert metrics["time/step"] == 10.0 and metrics["time/train"] == 4.0 and metrics["time/score"] == 1.0
    shares = {name: value for name, value in metrics.items() if name.startswith("goodput/")}
    assert shares == pytest.approx(
        {"goodput/generate": 0.3, "goodput/train": 0.4, "goodput/sync": 0.1, "goodput/other": 0.2}
    )
    clock.now += 2.0
    assert watch.lap() == pytest.approx(
        {
            "time/step": 2.0,
            "goodput/generate": 0.0,
            "goodput/train": 0.0,
            "goodput/sync": 0.0,
            "goodput/other": 1.0,
        }
    )


def test_a_phase_that_raises_is_counted_and_nesting_is_refused() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    with pytest.raises(RuntimeError), watch.phase("train"):
        clock.now += 2.0
        raise RuntimeError("out of memory")
    refused = pytest.raises(AssertionError, match="train begun inside phase sync")
    with watch.phase("sync"), refused, watch.phase("train"):
        pass
    assert watch.lap()["time/train"] == 2.0
