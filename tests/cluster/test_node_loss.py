"""A node that has left: found by Ray's list or by its silence, and told with what was on it."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import ray

from rlhf_dist.cluster import node_loss
from rlhf_dist.cluster.node_loss import blame_node, gone, members_on
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ActorLost, ResourceError, RunError
from rlhf_dist.planning.placement import Machine, Placement, place

HERE = "127.0.0.1"


def spread(workers: tuple[str, ...], ranks: tuple[str, ...]) -> Placement:
    return replace(place(Config(), Machine(4, 0), "train"), worker_nodes=workers, rank_nodes=ranks)


def listed(address: str, port: int, alive: bool = True) -> dict[str, Any]:
    return {"NodeManagerAddress": address, "NodeManagerPort": port, "Alive": alive}


@pytest.fixture
def port() -> Any:
    with socket.create_server((HERE, 0)) as server:
        yield server.getsockname()[1]


def test_a_node_is_gone_when_ray_says_so_when_it_is_unknown_and_when_it_does_not_answer(port: int) -> None:
    assert gone([HERE], [listed(HERE, port)]) == []
    assert gone([HERE], [listed(HERE, port, alive=False)]) == [HERE]
    assert gone([HERE], [listed(HERE, port, alive=False), listed(HERE, port)]) == [], "it came back"
    assert gone([HERE, "10.9.9.9"], [listed(HERE, port)]) == ["10.9.9.9"]
    with socket.create_server((HERE, 0)) as server:
        closed = server.getsockname()[1]
    assert gone([HERE], [listed(HERE, closed)]) == [HERE]


def test_many_silent_nodes_take_no_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, timeout: float) -> None:
        time.sleep(timeout)
        raise TimeoutError

    monkeypatch.setattr(node_loss, "PROBE_S", 0.2)
    monkeypatch.setattr(socket, "create_connection", silent)
    nodes, begin = [f"10.9.9.{i}" for i in range(64)], time.monotonic()
    assert gone(nodes, [listed(address, 1) for address in nodes]) == nodes
    assert time.monotonic() - begin < 3.0, "one after another: 12.8 s"


def test_where_ray_lists_no_nodes_the_first_error_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_list() -> None:
        raise RuntimeError("gcs gone")

    monkeypatch.setattr(ray, "nodes", no_list)
    with pytest.raises(ActorLost, match="x died"), ExitStack() as stack:
        stack.push(partial(blame_node, spread(("b",), (HERE,))))
        raise ActorLost("x died")


def test_what_was_on_it_is_named() -> None:
    found = spread(("b", "b", "c", *"d" * 6), ("a", "b"))
    assert members_on(found, "b") == ["rollout workers 0, 1", "learner rank 1", "their weight relay"]
    assert members_on(found, "c") == ["rollout worker 2", "its weight relay"]
    assert members_on(found, "a") == ["learner rank 0"]
    assert members_on(found, "d")[0] == "6 rollout workers"


def test_a_failure_is_told_as_the_nodes_where_one_has_left(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [listed(HERE, port), listed("b", 1, alive=False)])

    def leave(placement: Placement, error: Exception) -> None:
        with ExitStack() as stack:
            stack.push(partial(blame_node, placement))
            raise error

    two = spread(("b",), (HERE,))
    for error in (ActorLost("weight relay b died during 'start': gone\nmore"), ResourceError("no room in 300 s")):
        with pytest.raises(ActorLost) as caught:
            leave(two, error)
        said = str(caught.value)
        assert said.startswith(
            "node b, which had rollout worker 0, its weight relay, has left the cluster or does not answer. "
        )
        assert "launch/ray_cluster.sh worker HEAD" in said and "lower rollout.workers or learner.ranks" in said
        assert said.endswith(f"Seen first: {str(error).splitlines()[0]}")
    with pytest.raises(RunError, match="own"):
        leave(spread((HERE,), (HERE,)), RunError("own"))
    with pytest.raises(KeyError):
        leave(two, KeyError("x"))
    with pytest.raises(RunError, match="one node"):
        leave(spread((), ()), RunError("one node"))
