"""The order of rows within an epoch: a permutation of its own, or the file's."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, strategies as st

from rlhf_dist.data.order import RowOrder, epoch_order

SIZES = st.integers(1, 300)


@given(SIZES, st.integers(0, 5), st.integers(0, 3), st.booleans())
def test_an_epoch_passes_over_every_row_once(size: int, seed: int, epoch: int, shuffle: bool) -> None:
    assert sorted(epoch_order(size, seed, epoch, shuffle)) == list(range(size))


@given(SIZES, st.integers(1, 7), st.integers(0, 60), st.booleans())
def test_a_batch_is_found_again_from_its_number_alone(size: int, batch: int, number: int, shuffle: bool) -> None:
    """A resume goes on with the rows that an uninterrupted run would take."""
    whole = RowOrder(size, 3, shuffle)
    assert [whole.batch(n, batch) for n in range(number + 1)][-1] == RowOrder(size, 3, shuffle).batch(number, batch)


def test_batches_run_over_the_end_of_an_epoch() -> None:
    order = RowOrder(5, 0, shuffle=False)
    assert [order.batch(n, 3) for n in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    shuffled = RowOrder(5, 0, shuffle=True)
    drawn = [index for n in range(5) for index in shuffled.batch(n, 3)]
    assert [drawn[at : at + 5] for at in (0, 5, 10)] == [list(epoch_order(5, 0, epoch, True)) for epoch in (0, 1, 2)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    assert len({tuple(epoch_order(50, seed, epoch, True)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_an_order_is_a_permutation_and_not_a_walk_by_a_stride() -> None:
    for epoch in range(3):
        order = epoch_order(100, 0, epoch, True)
        assert len({(after - before) % 100 for before, after in pairwise(order)}) > 20
