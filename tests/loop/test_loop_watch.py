"""Signs of collapse: the numbers of a step by hand, and warnings over made series."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from stand_ins import head_of

from rlhf_dist.loop.watch import KL_FLOOR, REWARD_STD, CollapseWatch, correlation, watch_metrics
from rlhf_dist.telemetry import names
from rlhf_dist.types import Experience, Message, Prompt, ReferenceHead, Scores

Series = dict[str, np.ndarray]

STEPS = 60


def experience(uid: str, lengths: list[int], gold: list[float], texts: list[int], kl: list[float] | None) -> Experience:
    """A group whose total is twice its gold reward plus 1, and whose reference gives each token 0.5."""
    components = {"model": np.array(gold, np.float32) * 2 + 1, "truth": np.array(gold, np.float32)}
    reference = None
    if kl is not None:
        logprob = (np.array(lengths) * math.log(0.5)).astype(np.float32)
        reference = ReferenceHead(np.array(kl, np.float32), logprob)
    return Experience(
        prompt=Prompt(uid, (Message("user", "x"),), "", "test"),
        head=head_of(uid, 2, lengths, ("stop",) * len(lengths), 0),
        scores=Scores(
            components["model"], components, np.full(len(lengths), 0.25, np.float32), np.array(texts, np.uint64)
        ),
        key=f"train/{uid}/0",
        reference=reference,
    )


def test_the_numbers_of_a_step_by_hand() -> None:
    groups = [experience("0/0", [1, 2], [0, 1], [7, 8], [1, 2]), experience("0/1", [3, 4], [2, 3], [7, 7], [3, -2])]
    assert watch_metrics(groups, "truth") == pytest.approx(
        {
            names.DISTINCT_PAIRS: 0.25,
            names.DISTINCT_RESPONSES: 0.5,
            names.LENGTH_REWARD_CORRELATION: 1.0,
            names.REWARD_PROXY: 4.0,
            names.REWARD_GOLD: 1.5,
            names.REFERENCE_PERPLEXITY: 2.0,
            names.KL_REFERENCE: 1.0,
            names.KL_REFERENCE_PER_TOKEN: 0.4,
            names.KL_REFERENCE_MAX: 3.0,
        }
    )
    assert watch_metrics(groups, "truth").keys() - watch_metrics(groups, "").keys() == {
        names.REWARD_PROXY,
        names.REWARD_GOLD,
    }
    plain = watch_metrics([experience("0/0", [3, 3], [0, 1], [7, 8], None)], "")
    assert plain == {
        names.DISTINCT_PAIRS: 0.25,
        names.DISTINCT_RESPONSES: 1.0,
        names.LENGTH_REWARD_CORRELATION: 0.0,
    }


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=20))
def test_correlation_is_bounded_symmetric_and_blind_to_scale(pairs: list[tuple[int, float]]) -> None:
    lengths, total = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], np.float32)
    found = correlation(lengths, total)
    assert -1.0 <= found <= 1.0
    assert correlation(total, lengths) == pytest.approx(found)
    assert correlation(lengths * 8, -total) == pytest.approx(-found)
    if np.ptp(total) and np.ptp(lengths):
        assert found == pytest.approx(np.corrcoef(lengths, total.astype(np.float64))[0, 1], abs=1e-6)


def steady(steps: int = STEPS) -> Series:
    """A run in which nothing happens."""
    values = {
        names.REWARD_PROXY: 1.0,
        names.REWARD_GOLD: 1.0,
        names.KL_REFERENCE: 2.0,
        names.DISTINCT_RESPONSES: 0.9,
        names.REFERENCE_PERPLEXITY: 3.0,
        names.CUT_SHARE: 0.0,
        names.RESPONSE_LENGTH: 12.0,
    }
    return {name: np.full(steps, value) for name, value in values.items()}


def warnings(series: Series, group_size: int = 4) -> list[tuple[int, str]]:
    """(step, sentence) of all that a run is warned of."""
    watch = CollapseWatch(group_size)
    count = len(next(iter(series.values())))
    return [
        (step + 1, seen.sentence)
        for step in range(count)
        for seen in watch.step({name: float(values[step]) for name, values in series.items()})
    ]


def bump(before: float, within: float, start: int, end: int, steps: int) -> np.ndarray:
    """`before`, and from step `start` up to `end` (counted from 0) `within`."""
    values = np.full(steps, before)
    values[start:end] = within
    return values


ONSETS = {
    "the reward is over-optimised": {names.REWARD_PROXY: (1.0, 1.5), names.REWARD_GOLD: (1.0, 0.5)},
    "the reward collapsed": {names.REWARD_MEAN: (1.0, 0.2)},
    "the KL to the reference explodes": {names.KL_REFERENCE: (2.0, 2 * KL_FLOOR)},
    "responses differ from each other": {names.DISTINCT_RESPONSES: (0.9, 0.05)},
    "perplexity under the reference": {names.REFERENCE_PERPLEXITY: (3.0, 7.0)},
    "responses are cut at": {names.CUT_SHARE: (0.0, 0.8)},
}
"""What a warning says -> metrics that bring it about: (before, within)."""


@pytest.mark.parametrize("said", ONSETS)
def test_each_onset_is_warned_of_once_and_again_after_it_recovered(said: str) -> None:
    steps = 200
    once, twice = steady(steps), steady(steps)
    for name, (before, within) in ONSETS[said].items():
        once[name] = bump(before, within, 40, steps, steps)
        twice[name] = np.where(np.arange(steps) < 100, bump(before, within, 40, 70, steps), once[name])
        twice[name][100:130] = before
    found = warnings(once)
    assert len(found) == 1 and 40 < found[0][0] <= 50 and said in found[0][1], found
    found = warnings(twice)
    assert len(found) == 2 and 40 < found[0][0] <= 50 and 130 < found[1][0] <= 140, found


def test_a_run_without_trouble_is_not_warned_of() -> None:
    steps = np.arange(STEPS)
    learning = steady() | {
        names.REWARD_PROXY: steps / 10,
        names.REWARD_GOLD: steps / 20,
        names.KL_REFERENCE: np.minimum(steps / 4, 9.0),
        names.REFERENCE_PERPLEXITY: 3.0 + steps / 30,
        names.DISTINCT_RESPONSES: np.linspace(0.9, 0.3, STEPS),
    }
    assert warnings(steady()) == warnings(learning) == []


def test_gold_that_falls_with_the_proxy_is_no_over_optimisation() -> None:
    falling = np.linspace(1.0, 0.0, STEPS)
    assert warnings(steady() | {names.REWARD_PROXY: falling, names.REWARD_GOLD: falling}) == []


def test_the_best_steps_of_gold_are_named_although_it_falls_slowly() -> None:
    """0.02 a step under noise of 0.1: no two neighbouring windows would show it."""
    noise = np.random.default_rng(1).normal(scale=0.1, size=(2, 150))
    steps = np.arange(150)
    series = {names.REWARD_PROXY: steps * 0.02 + noise[0], names.REWARD_GOLD: -abs(steps - 60) * 0.02 + noise[1]}
    [(step, sentence)] = warnings(series)
    assert 70 < step < 110
    best = int(sentence.split("checkpoint of step ")[1].split()[0])
    assert 55 <= best <= 75


def test_a_reward_that_loses_half_of_its_gain_collapses_and_one_that_sags_does_not() -> None:
    noise = np.random.default_rng(2).normal(scale=0.02, size=STEPS)
    rising = np.minimum(0.2 + np.arange(STEPS) / 40, 0.8)
    spread = {REWARD_STD: np.full(STEPS, 0.4)}
    for end, count in ((0.3, 1), (0.7, 0)):
        series = {names.REWARD_MEAN: np.where(np.arange(STEPS) < 40, rising, end) + noise} | spread
        found = warnings(series)
        assert len(found) == count, (end, found)
    noisy = np.random.default_rng(3).normal(scale=0.25, size=(40, 2 * STEPS))
    assert sum(len(warnings({names.REWARD_MEAN: row, REWARD_STD: np.full(2 * STEPS, 1.0)})) for row in noisy) == 0
    few = {names.REWARD_MEAN: bump(0.5, 0.4, 30, STEPS, STEPS), REWARD_STD: np.full(STEPS, 0.5)}
    assert warnings(few) == [], "a tenth is less than half of how much single responses differ"


def test_a_kl_that_grows_steadily_or_stays_small_does_not_explode() -> None:
    assert warnings({names.KL_REFERENCE: np.arange(STEPS) * 3.0}) == []
    assert warnings({names.KL_REFERENCE: 0.01 * 1.13 ** np.arange(STEPS)}) == []
    assert len(warnings({names.KL_REFERENCE: np.minimum(0.1 * 1.2 ** np.arange(STEPS), 1e3)})) == 1
    assert len(warnings({names.KL_REFERENCE: bump(-0.01, 90.0, 40, STEPS, STEPS)})) == 1


def test_one_right_answer_for_each_prompt_is_no_collapse() -> None:
    one_each = {names.DISTINCT_RESPONSES: bump(0.95, 1 / 8, 30, STEPS, STEPS)}
    assert warnings(one_each, group_size=8) == []
    assert len(warnings(one_each, group_size=1)) == 1


def test_noise_alone_is_hardly_ever_warned_of() -> None:
    generator = np.random.default_rng(0)
    apart, against = 0, 0
    for _ in range(60):
        proxy, gold = generator.normal(size=(2, 2 * STEPS))
        apart += len(warnings({names.REWARD_PROXY: proxy, names.REWARD_GOLD: gold}))
        against += len(warnings({names.REWARD_PROXY: proxy, names.REWARD_GOLD: -proxy}))
    assert apart == 0
    assert against <= 4, "noise that raises the one and lowers the other is the worst there is"


@given(st.integers(1, STEPS - 1), st.sampled_from(sorted(ONSETS)))
def test_a_watch_goes_on_from_its_state(cut: int, said: str) -> None:
    series = steady()
    for name, (before, within) in ONSETS[said].items():
        series[name] = bump(before, within, 25, 45, STEPS)
    rows = [{name: float(values[step]) for name, values in series.items()} for step in range(STEPS)]
    first = CollapseWatch(4)
    found = [first.step(row) for row in rows[:cut]]
    second = CollapseWatch(4)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    found += [second.step(row) for row in rows[cut:]]
    assert [(step + 1, s.sentence) for step, sentences in enumerate(found) for s in sentences] == warnings(series)


def test_numbers_that_are_none_are_not_taken_for_trouble() -> None:
    assert warnings({name: np.full(STEPS, math.nan) for name in steady()}) == []
