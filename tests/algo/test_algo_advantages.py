"""Group-relative advantages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algo.advantages import group_normalized, leave_one_out
from rlhf_dist.errors import ConfigError

STDS = ("unbiased", "population", "none")
scores = st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(0, 3)), min_size=1, max_size=16)


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        ("unbiased", [-0.5 / math.sqrt(1 / 3), 0.5 / math.sqrt(1 / 3)] * 2),
        ("population", [-1.0, 1.0] * 2),
        ("none", [-0.5, 0.5] * 2),
    ],
)
def test_by_hand(std, expected: list[float]) -> None:
    got = group_normalized(torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.long), std)
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-5, rtol=0)


def test_unbiased_is_the_default_and_groups_may_interleave() -> None:
    score, group = torch.tensor([1.0, 10.0, 3.0, 40.0]), torch.tensor([7, -2, 7, -2])
    half = math.sqrt(0.5)
    torch.testing.assert_close(group_normalized(score, group), torch.tensor([-half, -half, half, half]))


def test_leave_one_out_by_hand() -> None:
    got = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(got, torch.tensor([1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5, 0.0]))


@given(score=st.floats(-1e6, 1e6, width=32), rows=st.integers(1, 9), double=st.booleans())
def test_a_group_without_variance_is_exactly_zero(score: float, rows: int, double: bool) -> None:
    same = torch.full((rows,), score, dtype=torch.float64 if double else torch.float32) * 1.1
    mixed = torch.cat([same, same.new_tensor([0.0, 1.0])])
    group = torch.cat([torch.zeros(rows, dtype=torch.long), torch.ones(2, dtype=torch.long)])
    for got in (*(group_normalized(mixed, group, std) for std in STDS), leave_one_out(mixed, group)):
        assert not got[:rows].any()
        assert got[rows:].abs().min() > 0.4


@given(rows=scores, data=st.data())
def test_order_and_names_of_groups_do_not_matter(rows, data) -> None:
    score = torch.tensor([s for s, _ in rows], dtype=torch.float64)
    group = torch.tensor([g for _, g in rows])
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    names = torch.tensor(data.draw(st.lists(st.integers(-99, 99), min_size=4, max_size=4, unique=True)))
    for function in (lambda s, g: group_normalized(s, g, "none"), leave_one_out):
        torch.testing.assert_close(function(score[order], names[group][order]), function(score, group)[order])


@given(rows=scores)
def test_each_group_sums_to_zero_and_follows_its_scores(rows) -> None:
    score = torch.tensor([s for s, _ in rows], dtype=torch.float64)
    group = torch.tensor([g for _, g in rows])
    for got in (*(group_normalized(score, group, std) for std in STDS), leave_one_out(score, group)):
        assert got.isfinite().all()
        for name in group.unique():
            mine = group == name
            assert got[mine].sum().item() == pytest.approx(0.0, abs=1e-6)
            order = score[mine].argsort()
            assert (got[mine][order].diff() >= -1e-9).all()


def test_scaling_the_scores_changes_only_the_unscaled_kind() -> None:
    score, group = torch.tensor([0.0, 2.0, 3.0]).double(), torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(group_normalized(100 * score, group), group_normalized(score, group), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        group_normalized(100 * score, group, "none"), 100 * group_normalized(score, group, "none")
    )


def test_no_rows_and_precision() -> None:
    nothing = torch.zeros(0)
    assert group_normalized(nothing, nothing.long()).shape == (0,)
    assert leave_one_out(nothing, nothing.long()).shape == (0,)
    score, group = torch.tensor([1, 0]), torch.zeros(2, dtype=torch.long)
    assert group_normalized(score, group).dtype == torch.float32
    assert group_normalized(score.double(), group).dtype == torch.float64


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'sample' is unknown: one of unbiased, population, none"):
        group_normalized(torch.zeros(2), torch.zeros(2), "sample")  # pyright: ignore[reportArgumentType]
