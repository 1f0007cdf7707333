"""What is said of a node that is not like the others: by hand, and through a real Ray of one node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import ray

from rlhf_dist.cluster import node_facts
from rlhf_dist.cluster.node_facts import NodeFacts, check_nodes, difference, facts, remove_logs
from rlhf_dist.errors import ResourceError

HERE = NodeFacts({"Python": "3.11.7", "ray": "2.60.0"}, "code", True, "", True)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (HERE, ""),
        (
            replace(HERE, versions={"Python": "3.11.7", "ray": "2.59.0"}),
            "ray is 2.59.0 there and 2.60.0 here: install the same",
        ),
        (replace(HERE, versions={"Python": "3.11.7"}), "ray is none there and 2.60.0 here: install the same"),
        (replace(HERE, code="other"), "the code of rlhf_dist is another one there: install the same"),
        (
            replace(HERE, has_model=False, no_logs="Permission denied"),
            "/m is not there: put the model on a disk that the nodes share, or give its hub name; "
            "/logs cannot be made there (Permission denied): give an output= that each node can write to",
        ),
        (replace(HERE, no_room="/dev/shm: pushes need 9 MiB"), "/dev/shm: pushes need 9 MiB"),
        (replace(HERE, no_sandbox="bwrap is missing"), "a reward has sandbox true, and bwrap is missing"),
    ],
)
def test_a_node_that_differs_is_told_with_the_way_out(there: NodeFacts, said: str) -> None:
    assert difference(HERE, there, "/m", "/logs", writes=False) == said
    assert said in difference(HERE, there, "/m", "/logs", writes=True)


def test_a_node_that_writes_checkpoints_has_to_share_the_folder() -> None:
    apart = replace(HERE, shares=False)
    assert difference(HERE, apart, "/m", "/logs", writes=False) == ""
    assert "/logs is another folder there: give an output= on a disk" in difference(
        HERE, apart, "/m", "/logs", writes=True
    )


def test_facts_of_this_machine(tmp_path: Path) -> None:
    found = facts("Qwen/Qwen2.5-0.5B", str(tmp_path / "a" / "logs"), "mark")
    assert found.has_model and found.no_logs == "" and not found.shares and (tmp_path / "a" / "logs").is_dir()
    assert found.versions["ray"] == ray.__version__ and len(found.code) == 32
    (tmp_path / "file").touch()
    found = facts(str(tmp_path / "none"), str(tmp_path / "file" / "logs"), "mark")
    assert not found.has_model and found.no_logs == "Not a directory" and found.no_room == ""
    assert facts("a/model", str(tmp_path), "mark", pushed=1).no_room == ""
    assert facts("a/model", str(tmp_path), "mark", pushed=10**18).no_room.startswith("/dev/shm: pushes need ")


def test_a_node_of_servers_is_asked_for_a_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts("a/model", str(tmp_path), "mark").no_sandbox == ""
    there = facts("a/model", str(tmp_path), "mark", sandboxed=True)
    assert there.no_sandbox.startswith("bubblewrap (bwrap) is not installed here: install the package")


@pytest.mark.engines
@pytest.mark.timeout(300)
def test_each_node_is_asked_once(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (node,) = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    check_nodes((), (), "/none", tmp_path, 60, "key")
    check_nodes((node, node), (node,), str(tmp_path), tmp_path / "logs", 60, "key")
    with pytest.raises(ResourceError) as caught:
        check_nodes((node, node), (), "/none", tmp_path / "logs", 60, "key")
    assert str(caught.value).startswith(f"node {node}: /none is not there") and str(caught.value).count("node ") == 1
    assert list((tmp_path / "logs").iterdir()) == []
    with pytest.raises(ResourceError, match=f"node {node}: /dev/shm: pushes need "):
        check_nodes((node,), (), str(tmp_path), tmp_path / "logs", 60, "key", {node: 10**18})
    check_nodes((node,), (), str(tmp_path), tmp_path / "logs", 60, "key", {"10.0.0.9": 10**18}, ("10.0.0.9",))
    # Only here, so that the node's code is another one.
    monkeypatch.setattr(node_facts, "PACKAGE", tmp_path)
    with pytest.raises(ResourceError, match="the code of rlhf_dist is another one there"):
        check_nodes((node,), (), str(tmp_path), tmp_path / "logs", 60, "key")


def test_logs_are_removed_on_each_node_and_one_that_is_gone_is_named(local_ray: None, tmp_path: Path) -> None:
    (node,) = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    logs = tmp_path / "logs"
    (logs / "ray").mkdir(parents=True)
    assert remove_logs([], logs, 1.0, "a.key") == "" and logs.is_dir(), "a run on one node"
    assert remove_logs([node, node], logs, 60.0, "a.key") == "" and not logs.exists()
    left = remove_logs(["10.255.255.1"], logs, 0.1, "a.key")
    assert left == f"logs may be left in {logs}: node 10.255.255.1 did not finish 'remove its logs' in 0.1 s (a.key)"
