"""Prompts to requests: which sample draws from which seed. Pure."""

from __future__ import annotations

from dataclasses import replace

from stand_ins import prompts

from rlhf_dist.loop.requests import greedy, make_requests, sample_seed
from rlhf_dist.types import Sampling

SAMPLING = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_tokens=9, stop=("x",), masked=True)


def test_every_sample_has_a_seed_of_its_own_and_the_same_in_every_run() -> None:
    requests = make_requests(prompts(50), "train", 8, SAMPLING, 1)
    seeds = [seed for request in requests for seed in request.seeds]
    assert len(set(seeds)) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert requests == make_requests(prompts(50), "train", 8, SAMPLING, 1)
    others = [seed for request in make_requests(prompts(50), "train", 8, SAMPLING, 2) for seed in request.seeds]
    assert not set(seeds) & set(others)
    assert sample_seed(1, "0/0", 0) == 3381072289616014609 == requests[0].seeds[0], "a resumed run draws from it again"


def test_a_seed_is_of_the_prompt_and_the_sample_and_of_nothing_else() -> None:
    few, many = (make_requests(prompts(count), "train", n, SAMPLING, 1)[1] for count, n in ((2, 2), (9, 5)))
    assert many.seeds[:2] == few.seeds and (few.uid, few.n, many.n) == ("0/1", 2, 5)
    hot = make_requests(prompts(2), "eval", 2, replace(SAMPLING, temperature=2.0), 1)[1]
    assert hot.seeds == few.seeds
    assert few.attempt == 0 and replace(few, attempt=1).seeds == few.seeds


def test_parts_of_a_seed_are_kept_apart() -> None:
    assert len({sample_seed(1, "1/1", 1), sample_seed(11, "/1", 1), sample_seed(1, "1/", 11)}) == 3


def test_greedy_leaves_chance_out_and_keeps_the_rest() -> None:
    assert greedy(SAMPLING) == Sampling(0.0, 1.0, 0, 9, ("x",), masked=True)
