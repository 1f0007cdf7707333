"""A run whose groups all score alike is told so, once."""

from __future__ import annotations

import json

from rlhf_dist.loop.watch import NO_SIGNAL, WINDOW, CollapseWatch


def warned(shares: list[float], watch: CollapseWatch) -> list[int]:
    """Steps, from 1, with a warning; each has to say what to look at."""
    found = []
    for step, share in enumerate(shares, start=1):
        for seen in watch.step({NO_SIGNAL: share}):
            sentence = seen.sentence
            assert "rollouts/*.parquet" in sentence and "the start has to succeed sometimes" in sentence
            found.append(step)
    return found


def test_ten_steps_without_any_signal_are_warned_of_once() -> None:
    assert warned([1.0] * (3 * WINDOW), CollapseWatch(4)) == [WINDOW]


def test_one_group_with_a_signal_in_ten_steps_is_enough() -> None:
    assert warned(([1.0] * (WINDOW - 1) + [0.9]) * 4, CollapseWatch(4)) == []


def test_it_is_warned_of_anew_after_the_signal_had_come_back() -> None:
    shares = [1.0] * WINDOW + [0.2] * WINDOW + [1.0] * WINDOW
    assert warned(shares, CollapseWatch(4)) == [WINDOW, 3 * WINDOW]


def test_a_resume_counts_on() -> None:
    first, second = CollapseWatch(4), CollapseWatch(4)
    assert warned([1.0] * (WINDOW - 1), first) == []
    second.restore(json.loads(json.dumps(first.state())))
    assert warned([1.0], second) == [1]
