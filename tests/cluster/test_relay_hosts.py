"""A push to workers of two nodes, one of which has a relay: light actors in a real Ray, and the hosts themselves."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cluster_stand_ins
import pytest
import ray
from cluster_stand_ins import ANNOUNCEMENT, Ears, remote, serve, start, tell

from rlhf_dist.cluster.relay_hosts import OFFER, FetchHost, OfferHost, Relays
from rlhf_dist.cluster.rollout_fleet import RolloutFleet
from rlhf_dist.cluster.spec import ActorSpec
from rlhf_dist.cluster.waits import gather
from rlhf_dist.config.schema import Config
from rlhf_dist.loop.events import Lost
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.shared_memory import WeightReader, WeightWriter

workers = cluster_stand_ins.workers
RELAY = "weight relay B"


@pytest.fixture(scope="module")
def relay(local_ray: None) -> Any:
    return start("relay")


def fleet(workers: dict[str, Any], relay: Any, ears: Ears, limit_s: float = 30.0) -> RolloutFleet:
    """`one` is on the learner's node, `two` on the relay's."""
    tell(relay, "right")
    relays = Relays(workers["one"], {RELAY: relay}, {"two": RELAY})
    return RolloutFleet(workers, ears.inbox, timeout_s=30.0, sync_timeout_s=limit_s, relays=relays)


def version(number: int) -> Announcement:
    return replace(ANNOUNCEMENT, version=number, hashes=(f"hash {number}",))


def test_each_worker_loads_from_its_own_node(workers: dict[str, Any], relay: Any) -> None:
    rollouts = fleet(workers, relay, ears := Ears())
    assert rollouts.load_weights(version(4)) == []
    assert serve(rollouts, ears) == {"one", "two"}
    paths = gather({name: worker.loaded_from.remote() for name, worker in workers.items()}, "tell", 30)
    assert paths == {"one": "unused", "two": "of relay, from one"}


def test_a_node_that_does_not_get_the_weights_misses_the_push_and_no_more(workers: dict[str, Any], relay: Any) -> None:
    rollouts = fleet(workers, relay, ears := Ears())
    tell(relay, "refuses")
    assert rollouts.load_weights(version(4)) == [
        "two did not get version 4: data.jsonl:3: not JSON; it serves no tokens until a push succeeds"
    ]
    assert serve(rollouts, ears) == {"one"}
    tell(relay, "right")
    assert rollouts.load_weights(version(5)) == []
    assert serve(rollouts, ears) == {"one", "two"}


def test_a_relay_that_is_still_at_an_earlier_version_is_neither_asked_nor_waited_for(
    workers: dict[str, Any], relay: Any
) -> None:
    rollouts = fleet(workers, relay, ears := Ears(), limit_s=0.7)
    tell(relay, "sleeps")
    (problem,) = rollouts.load_weights(version(4))
    assert problem.startswith("two did not get version 4: weight relay B did not copy it in time")
    begun = time.monotonic()
    (problem,) = rollouts.load_weights(version(5))
    assert (
        problem.startswith("two did not get version 5: its relay is still copying an earlier one")
        and time.monotonic() - begun < 0.6
    )
    assert serve(rollouts, ears) == {"one"}
    tell(relay, "right")
    time.sleep(1.0)
    assert rollouts.load_weights(version(6)) == []
    assert serve(rollouts, ears) == {"one", "two"}


def test_workers_whose_relay_died_are_given_up_after_three_pushes(local_ray: None) -> None:
    doomed, pair = start("relay"), {"one": start("one"), "two": start("two")}
    rollouts = fleet(pair, doomed, ears := Ears())
    tell(doomed, "dies")
    for number in (4, 5):
        (problem,) = rollouts.load_weights(version(number))
        assert f"two did not get version {number}: {RELAY} died during 'fetch'" in problem
    (problem,) = rollouts.load_weights(version(6))
    assert "it missed 3 pushes in a row; it is given up, 1 rollout worker is left" in problem
    assert [event.member for event in ears.hear(Lost, 1)] == ["two"]
    assert serve(rollouts, ears) == {"one"}


def test_the_learners_relay_is_named_where_it_is_the_one_that_died(local_ray: None) -> None:
    offer, relay, pair = start("offer"), start("relay"), {"one": start("one"), "two": start("two")}
    ears = Ears()
    relays = Relays(offer, {RELAY: relay}, {"two": RELAY})
    rollouts = RolloutFleet(pair, ears.inbox, timeout_s=30.0, sync_timeout_s=30.0, relays=relays)
    assert rollouts.load_weights(version(4)) == []
    tell(offer, "dies")
    (problem,) = rollouts.load_weights(version(5))
    assert "two did not get version 5: weight relay of the learner died during 'offer'" in problem
    assert serve(rollouts, ears) == {"one"}


def test_a_relay_that_was_started_again_is_used_from_then_on(local_ray: None) -> None:
    offer, relay, pair = start("offer"), start("relay"), {"one": start("one"), "two": start("two")}
    relays = Relays(offer, {RELAY: relay}, {"two": RELAY})
    rollouts = RolloutFleet(pair, (ears := Ears()).inbox, timeout_s=30.0, sync_timeout_s=30.0, relays=relays)
    assert rollouts.load_weights(version(4)) == []
    for number, name in ((5, RELAY), (7, OFFER)):
        tell(relays.all()[name], "dies")
        (problem,) = rollouts.load_weights(version(number))
        assert f"two did not get version {number}: {name} died during" in problem
        relays.admit(name, start(name))
        assert rollouts.load_weights(version(number + 1)) == []
    assert serve(rollouts, ears) == {"one", "two"} and set(relays.all()) == {OFFER, RELAY}


@pytest.mark.parametrize("again", [False, True], ids=["same relay", "relay started again"])
def test_a_worker_that_is_back_gets_what_its_node_missed_meanwhile(local_ray: None, again: bool) -> None:
    """Nobody there could load the last version, and the next push may never come without this worker."""
    offer, relay, pair = start("offer"), start("relay"), {"one": start("one"), "two": start("two")}
    relays = Relays(offer, {RELAY: relay}, {"two": RELAY})
    rollouts = RolloutFleet(pair, (ears := Ears()).inbox, timeout_s=30.0, sync_timeout_s=30.0, relays=relays)
    assert rollouts.load_weights(version(4)) == []
    ray.kill(pair["two"])
    ears.hear(Lost, 1)
    assert rollouts.load_weights(version(5)) == []
    if again:
        relays.admit(RELAY, start("relay again"))
    rollouts.admit("two", two := start("two"))
    ears.until(lambda: set(rollouts.serving()) == {"one", "two"})
    path = gather({"two": two.loaded_from.remote()}, "tell", 30)["two"]
    assert path == f"of {'relay again' if again else 'relay'}, from offer"


def test_a_relay_that_cannot_copy_for_a_worker_that_is_back_is_lost_and_says_why(local_ray: None) -> None:
    offer, relay, pair = start("offer"), start("relay"), {"one": start("one"), "two": start("two")}
    relays = Relays(offer, {RELAY: relay}, {"two": RELAY})
    rollouts = RolloutFleet(pair, (ears := Ears()).inbox, timeout_s=30.0, sync_timeout_s=30.0, relays=relays)
    assert rollouts.load_weights(version(4)) == []
    ray.kill(pair["two"])
    ears.hear(Lost, 1)
    assert rollouts.load_weights(version(5)) == []
    tell(relay, "refuses")
    rollouts.admit("two", start("two"))
    rollouts.serving()
    lost = ears.hear(Lost, 2)[1]
    assert (lost.member, lost.why) == (RELAY, f"{RELAY} did not copy the published weights: data.jsonl:3: not JSON")


def test_a_slow_node_does_not_hold_back_another(local_ray: None) -> None:
    fast, slow = start("fast"), start("slow")
    pair = {"one": start("one"), "two": start("two")}
    relays = Relays(fast, {"fast": fast, "slow": slow}, {"one": "fast", "two": "slow"})
    ears = Ears()
    rollouts = RolloutFleet(pair, ears.inbox, timeout_s=30.0, sync_timeout_s=1.0, relays=relays)
    for each in (fast, *pair.values()):
        tell(each, "right")
    tell(slow, "sleeps")
    begun = time.monotonic()
    (problem,) = rollouts.load_weights(version(4))
    assert problem.startswith("two did not get version 4: slow did not copy it in time")
    assert serve(rollouts, ears) == {"one"} and time.monotonic() - begun < 1.45, "one limit for the whole push"


def test_the_hosts_bring_a_version_from_file_to_file(local_ray: None, tmp_path: Path) -> None:
    """On one node here: two files in the same shared memory."""
    import torch

    specs = [ActorSpec(name, Config(), "", "cpu", 1, str(tmp_path / f"{name}.log"), 0, "") for name in ("a", "b")]
    offer, fetch = (
        remote(host).remote(spec, b"secret") for host, spec in zip((OfferHost, FetchHost), specs, strict=True)
    )
    writer = WeightWriter(make_plan([("w", (1000,), "float32")], 1024))
    published = writer.write(7, [("w", torch.arange(1000.0))])
    address = gather({"a": offer.offer.remote(published)}, "offer", 60)["a"]
    calls = Relays(offer, {"b": fetch}, {"two": "b"}).send(published, address, busy=())
    found: Announcement = gather(calls, "fetch", 60)["b"]
    assert (found.version, found.hashes) == (7, published.hashes) and found.path != published.path
    lease = WeightReader().take(found)
    assert torch.equal(lease.tensors()[0][1], torch.arange(1000.0))
    lease.close()
    assert Relays(offer, {"b": fetch}, {}).send(published, address, busy=("b",)) == {}
    assert Path(found.path).exists()
    gather({"b": fetch.close.remote()}, "close", 30)
    assert not Path(found.path).exists()
    writer.close()
    for actor in (offer, fetch):
        ray.kill(actor)


def test_a_relay_without_workers_is_idle_and_each_knows_its_node() -> None:
    relays = Relays("offer", {"b": "first", "c": "other"}, {"two": "b", "three": "c"}, {"b": "10.0.0.2"})
    assert relays.idle({"one", "two"}) == ["c"] and relays.idle({"one"}) == ["b", "c"]
    assert [relays.node_of(name) for name in ("two", "b", "one", "three")] == ["10.0.0.2", "10.0.0.2", "", ""]
