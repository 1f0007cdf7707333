import pytest

from rlhf_dist.telemetry.timeline import Patience, Stopwatch


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_phases_of_a_step() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    for name, seconds in [("generate", 3.0), ("score", 1.0), ("train", 3.0), ("sync", 1.0), ("train", 1.0)]:
        with watch.phase(name):
            clock.now += seconds
    clock.now += 1.0
    metrics = watch.lap()
    assert metrics["time/step"] == 10.0 and metrics["time/train"] == 4.0 and metrics["time/score"] == 1.0
    clock.now += 2.0
    assert watch.lap() == {"time/step": 2.0}


def test_elapsed_time_goes_on_over_steps_and_what_is_between_them() -> None:
    clock = Clock()
    watch = Stopwatch(clock, before=100.0)
    with watch.phase("train"):
        clock.now += 2.0
    watch.lap()
    clock.now += 5.0
    watch.lap()
    clock.now += 1.0
    assert watch.elapsed == 108.0


def test_a_split_has_what_is_between_steps_and_before_the_first() -> None:
    clock = Clock()
    watch = Stopwatch(clock, before=100.0)
    clock.now += 3.0
    watch.begin()
    clock.now += 2.0
    assert (watch.lap(), watch.elapsed, watch.split()) == ({"time/step": 2.0}, 102.0, 5.0)
    clock.now += 4.0
    watch.lap()
    clock.now += 1.0
    assert (watch.lap(), watch.elapsed, watch.split()) == ({"time/step": 1.0}, 107.0, 5.0)


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


def waits(clock: Clock, seconds: float) -> float:
    clock.now += seconds
    return seconds


def test_patience_is_spent_in_slices_of_a_second() -> None:
    clock = Clock()
    patience = Patience(2.5, clock)
    asked = [patience.wait(lambda seconds: waits(clock, seconds)) for _ in range(3)]
    assert asked == [1.0, 1.0, 0.5] and patience.left == 0
    assert patience.wait(lambda seconds: waits(clock, seconds)) == 0.0, "at its end it still looks, without a wait"


def test_a_time_in_which_the_process_was_stopped_is_not_charged() -> None:
    clock = Clock()
    patience = Patience(10.0, clock)
    patience.wait(lambda seconds: waits(clock, seconds + 3600))  # stopped within a wait
    assert patience.left == 9.0
    waits(clock, 3600)  # or between two
    patience.wait(lambda _: waits(clock, 0.25))
    assert patience.left == 8.75, "an answer that came early costs what it took"
