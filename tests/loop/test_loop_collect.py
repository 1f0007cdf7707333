"""Prompts to experiences, with stand-ins for the processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import FakeReference, FakeRollouts, FakeScoring, prompts

from rlhf_dist.errors import RunError
from rlhf_dist.loop.collect import collect
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.requests import make_requests
from rlhf_dist.types import Request, Sampling

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=9, stop=())


def requests(count: int, sampling: Sampling = SAMPLING) -> list[Request]:
    return make_requests(prompts(count), "train", 4, sampling, 1)


def test_experiences_come_in_the_order_of_the_prompts_and_drops_beside_them(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.issue([prompt.uid for prompt in prompts(4)], 0)
    found = collect(requests(4), rollouts=FakeRollouts(drops=["0/1"]), scoring=FakeScoring(), ledger=ledger)
    assert [experience.prompt.uid for experience in found.experiences] == ["0/0", "0/2", "0/3"]
    assert [experience.scores.total.tolist() for experience in found.experiences] == [[1, 0, 0, 0]] * 3
    assert [(drop.uid, drop.reason) for drop in found.dropped] == [("0/1", "prompt_empty")]
    assert (ledger.counts()["scored"], ledger.counts()["dropped"]) == (3, 1)


def test_a_prompt_that_never_comes_back_ends_the_run() -> None:
    with pytest.raises(RunError, match="2 of 4 prompts came back neither sampled nor dropped, first 0/2"):
        collect(requests(4), rollouts=FakeRollouts(loses=["0/2", "0/3"]), scoring=FakeScoring())


def test_every_group_is_compared_with_the_reference_at_the_samplers_temperature() -> None:
    reference = FakeReference()
    found = collect(
        requests(3, replace(SAMPLING, temperature=0.6)),
        rollouts=FakeRollouts(drops=["0/1"]),
        scoring=FakeScoring(),
        reference=reference,
    ).experiences
    assert sorted(reference.asked) == [(("0/0", 4), 0.6), (("0/2", 4), 0.6)], "one that was dropped is not"
    assert [e.reference.logprobs.place for e in found if e.reference] == ["reference 0/0", "reference 0/2"]
    assert [e.reference.head.kl.tolist() for e in found if e.reference] == [[2.0] * 4] * 2


def test_without_a_reference_there_is_nothing_to_compare() -> None:
    found = collect(requests(2), rollouts=FakeRollouts(), scoring=FakeScoring())
    assert [experience.reference for experience in found.experiences] == [None, None]
