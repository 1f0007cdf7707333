import numpy as np
from hypothesis import given, settings, strategies as st

from rlhf_dist.data.packing import LEVEL, pack, plan, relieved, split_rows

lengths_of = st.lists(st.integers(1, 300), max_size=60).map(lambda x: np.array(x, np.int64))


def loads(lengths, parts):
    return [int(lengths[p].sum()) for p in parts]


def every_row_once(parts, count):
    rows = np.concatenate([*parts, np.empty(0, np.int64)])
    assert sorted(rows.tolist()) == list(range(count))
    assert all(p.dtype == np.int64 and (np.diff(p) > 0).all() for p in parts)


@given(lengths_of, st.integers(1, 9))
def test_split_rows_is_even_and_complete(lengths, parts):
    cut = split_rows(lengths, parts)
    assert len(cut) == parts
    every_row_once(cut, len(lengths))
    # Longest first: before a part's last row came, it was the lightest, so parts differ by one row at most.
    assert max(loads(lengths, cut)) - min(loads(lengths, cut)) <= max(lengths, default=0)
    assert [p.tolist() for p in cut] == [p.tolist() for p in split_rows(lengths, parts)]


@given(lengths_of, st.integers(1, 500))
def test_pack_keeps_the_budget_with_few_micro_batches(lengths, budget):
    packed = pack(lengths, budget)
    every_row_once(packed, len(lengths))
    assert all(len(p) > 0 for p in packed)
    assert all(load <= budget or len(p) == 1 for p, load in zip(packed, loads(lengths, packed), strict=True))
    assert loads(lengths, packed) == sorted(loads(lengths, packed), reverse=True)
    # No way of packing needs fewer than the tokens ask for; longest-first needs at most about twice as many.
    fitting = lengths[lengths <= budget]
    assert len(packed) <= (lengths > budget).sum() + 2 * np.ceil(fitting.sum() / budget) + 1


@settings(deadline=None)
@given(lengths_of, st.integers(1, 5), st.integers(1, 500))
def test_plan_gives_every_rank_as_many_micro_batches(lengths, ranks, budget):
    planned = plan(lengths, ranks, budget)
    assert len(planned) == ranks
    assert len({len(parts) for parts in planned}) == 1
    every_row_once([p for parts in planned for p in parts], len(lengths))
    for parts in planned:
        assert all(load <= budget or len(p) == 1 for p, load in zip(parts, loads(lengths, parts), strict=True))
        sizes = [len(p) > 0 for p in parts]
        assert sizes == sorted(sizes, reverse=True)
    totals = [sum(loads(lengths, parts)) for parts in planned]
    assert max(totals) - min(totals) <= max(lengths, default=0)


def test_a_batch_with_a_long_tail_is_balanced_across_ranks_and_micro_batches():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4, 1, 512), 1024).astype(np.int64) + 1
    planned = plan(lengths, 4, 4096)
    totals = [sum(loads(lengths, parts)) for parts in planned]
    assert max(totals) / min(totals) < 1.01
    each = [load for parts in planned for load in loads(lengths, parts)]
    assert max(each) <= 4096
    assert max(each) / min(each) < 1.05
    assert len(planned[0]) <= np.ceil(max(totals) / 4096) + 1


def test_exchanging_rows_saves_a_micro_batch_by_hand():
    """Longest first gives 3 + 2 + 2 and 3 + 2; exchanging a 3 for a 2 makes both 6."""
    lengths = np.array([3, 3, 2, 2, 2])
    assert loads(lengths, split_rows(lengths, 2)) == [7, 5]
    assert [p.tolist() for p in pack(lengths, 6)] == [[2, 3, 4], [0, 1]]
    assert [[p.tolist() for p in parts] for parts in plan(lengths, 2, 6)] == [[[2, 3, 4]], [[0, 1]]]
    # 6 + 5 and 4: the 6 for the 4, or the 5 for nothing, halve the gap of 7 to 3; the first counts.
    assert [p.tolist() for p in relieved(np.array([6, 5, 4]), [np.array([0, 1]), np.array([2])], 8)] == [[1, 2], [0]]
    assert [p.tolist() for p in relieved(np.array([6, 5, 4]), [np.array([0, 1]), np.array([2])], 11)] == [[0, 1], [2]]


@given(lengths_of, st.integers(1, 9), st.integers(0, 4000), st.randoms(use_true_random=False))
def test_relieving_keeps_every_row_and_makes_no_part_fuller(lengths, count, limit, random):
    places = np.array([random.randrange(count) for _ in lengths], np.int64)
    parts = [np.flatnonzero(places == part) for part in range(count)]
    found = relieved(lengths, parts, limit)
    assert len(found) == count
    every_row_once(found, len(lengths))
    before, after = loads(lengths, parts), loads(lengths, found)
    assert max(after) <= max(before) and min(after) >= min(before)
    if max(before) <= limit:
        assert [p.tolist() for p in found] == [p.tolist() for p in parts], "nothing is moved without need"


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([8, 16, 32, 64]), st.sampled_from([8, 16]), st.sampled_from([1, 2, 4, 8]))
def test_grpo_batches_fill_few_micro_batches_and_level_ranks(seed, groups, samples, ranks):
    """Prompts of 9 to 300 tokens, responses with a long tail: as a run has them."""
    rng = np.random.default_rng(seed)
    responses = np.clip(rng.lognormal(np.log(100), 1.0, groups * samples), 1, 1024).astype(np.int64)
    lengths, budget = rng.integers(9, 301, groups).repeat(samples) + responses, 2048
    planned = plan(lengths, ranks, budget)
    totals = [sum(loads(lengths, parts)) for parts in planned]
    assert max(totals) <= max(np.mean(totals) * 1.02, lengths.max()) and LEVEL < 0.02
    fewest = np.ceil(lengths.sum() / ranks / budget)
    assert fewest <= len(planned[0]) <= np.ceil(fewest * 1.03)


def test_by_hand():
    lengths = np.array([5, 3, 3, 2, 2, 1])
    assert [p.tolist() for p in split_rows(lengths, 2)] == [[0, 3, 5], [1, 2, 4]]
    assert [p.tolist() for p in pack(np.array([9, 2, 2, 2]), 4)] == [[0], [1, 3], [2]]
    planned = plan(np.array([10, 1, 1]), 2, 10)
    assert [[p.tolist() for p in parts] for parts in planned] == [[[0]], [[1, 2]]]


def test_too_few_rows_leave_empty_micro_batches():
    planned = plan(np.array([10, 4, 4, 4]), 2, 4)
    assert [[p.tolist() for p in parts] for parts in planned] == [[[0], [], []], [[1], [2], [3]]]
    assert plan(np.empty(0, np.int64), 3, 8) == [[], [], []]
    assert [[len(p) for p in parts] for parts in plan(np.array([7]), 3, 8)] == [[1], [0], [0]]


def test_many_rows_of_half_the_budget_are_packed_one_by_one():
    assert len(pack(np.full(2000, 33), 64)) == 2000
