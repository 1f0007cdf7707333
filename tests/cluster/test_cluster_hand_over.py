"""A worker misses a push, and what it has goes on with another: controller, fleets, collator and Ray's object store."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import cluster_line
import cluster_stand_ins
import pytest
import ray
from cluster_line import line, shard, until_lost
from cluster_stand_ins import ANNOUNCEMENT, REQUESTS, Ears, fleet, makers, start, tell

from rlhf_dist.cluster.waits import fetched, gather
from rlhf_dist.types import Answered, Copied, Partial, PartialLost

workers, collator = cluster_stand_ins.workers, cluster_line.collator


@pytest.mark.parametrize("tokens", [4, 30_000])
def test_groups_of_a_worker_that_missed_a_push_go_on_with_another_and_are_trained_on(
    workers: dict[str, Any], collator: Any, tokens: int
) -> None:
    """`tokens` of a response: few go inline through Ray, many through its object store.

    With a lag of one version: a group of each step is under way, the first is trained on, and the worker of the second
    refuses the version that comes of it. It has sampled half of that group by then; the other worker samples the rest.
    """
    left, other = start("left", tokens), start("other", tokens)
    two = {"rollout worker 0": other, "rollout worker 1": left}
    run = line(two, workers["one"], collator, 1, steps=2, max_policy_lag=1)
    assert run.rollouts.load_weights(replace(ANNOUNCEMENT, version=0)) == []
    tell(left, "holds 0/1 torn")
    run.shell.published(0)
    first = run.shell.next_step()
    assert first.attempts == (("0/0", 0),)
    run.shell.forget([first.experiences[0].key])
    (problem,) = run.rollouts.load_weights(replace(ANNOUNCEMENT, version=1))
    assert problem.endswith("arrived torn; nothing was loaded; it serves no tokens until a push succeeds")
    run.shell.published(1)
    second = run.shell.next_step()
    assert second.attempts == (("0/1", 0),), "the attempt is not lost"
    half, (found,) = tokens // 2, second.experiences
    assert run.told == [f"train/0/1/0 goes on with another worker than rollout worker 1, {2 * half} tokens so far"]
    assert found.key == "train/0/1/0+1" and found.head.lengths.tolist() == [tokens] * 2
    late = found.head
    assert (late.oldest_version, late.newest_version, late.mean_version) == (0, 1, 0.5)
    assert (found.key, "other") in makers(run.heard)
    (batch,) = run.bodies.batches([shard(1)], [found.key], False)
    row = gather({"batch": batch.place}, "fetch", 60)["batch"]
    sampled = row.tokens[-tokens:].tolist()
    assert sampled == list(range(sampled[0], sampled[0] + tokens)), "none is sampled again, and none is left out"
    assert row.cache_versions.tolist() == [0] * half + [1] * half
    run.shell.forget([found.key])


@pytest.mark.parametrize("tokens", [4, 30_000])
def test_groups_of_a_worker_that_dies_go_on_from_copies_that_outlive_it(
    workers: dict[str, Any], collator: Any, tokens: int
) -> None:
    """It has sampled half of a group when it dies, and the other worker samples the rest."""
    doomed, other = start("doomed", tokens, copy_every_s=0.05), start("other", tokens)
    run = line({"rollout worker 0": doomed, "rollout worker 1": other}, workers["one"], collator, 1, max_policy_lag=1)
    assert run.rollouts.load_weights(replace(ANNOUNCEMENT, version=0)) == []
    tell(doomed, "holds 0/0")
    run.shell.published(0)
    run.until(lambda: any(isinstance(event, Copied) for event in run.heard))
    (copy, *_) = [event for event in run.heard if isinstance(event, Copied)]
    assert copy.key == "train/0/0/0"
    gather({"the collator": collator.texts.remote([])}, "take the copy over", 60)
    ray.kill(doomed)
    until_lost(copy.body)
    step = run.shell.next_step()
    half, (found,) = tokens // 2, step.experiences
    assert step.attempts == (("0/0", 0),), "the attempt is not lost"
    assert f"train/0/0/0 goes on from its last copy, {2 * half} tokens so far" in run.told
    assert found.key == "train/0/0/0+1" and found.head.lengths.tolist() == [tokens] * 2
    (batch,) = run.bodies.batches([shard(1)], [found.key], False)
    sampled = gather({"batch": batch.place}, "fetch", 60)["batch"].tokens[-tokens:].tolist()
    assert sampled == list(range(sampled[0], sampled[0] + tokens)), "none is sampled again, and none is left out"
    run.shell.forget([found.key])


@pytest.mark.usefixtures("workers")
def test_what_others_have_handed_over_is_fetched_within_one_limit() -> None:
    """Four that do not come take 2 s, not 2 s each; and one is there."""
    silent = start("silent")
    late = [silent.events.remote(60.0) for _ in range(4)]
    begun = time.monotonic()
    assert fetched([*late, ray.put("there")], 2.0) == [None] * 4 + ["there"]
    assert time.monotonic() - begun < 6.0


@pytest.mark.parametrize(("tokens", "lost"), [(4, False), (60_000, False), (60_000, True)])
def test_a_worker_answers_whatever_becomes_of_who_handed_over(workers: dict[str, Any], tokens: int, lost: bool) -> None:
    """Ray may still have a copy on the node, or (`lost`) not. Others of the message are sampled in any case."""
    doomed, ears, request = start("doomed", tokens), Ears(), REQUESTS[0]
    rollouts = fleet({"doomed": doomed, "one": workers["one"]}, ears)
    tell(doomed, "holds 0/0")
    rollouts.submit("doomed", [request])
    rollouts.hand_over("doomed", [request.key])
    (event,) = ears.hear(Partial, 1)
    assert event.lengths.tolist() == [tokens // 2] * 2
    ray.kill(doomed)
    while "doomed" in rollouts.serving():
        ears.inbox.pump()
    if lost:
        until_lost(event.body)
    again = replace(request, part=1, begun=event.body)
    rollouts.submit("one", [again, REQUESTS[1]])
    ears.until(lambda: len(ears.of(Answered, PartialLost)) == 2)
    found = {event.key: type(event) for event in ears.of(Answered, PartialLost)}
    assert found.keys() == {again.key, REQUESTS[1].key} and found[REQUESTS[1].key] is Answered
    assert found[again.key] is PartialLost or not lost
