"""What `--cluster` may say."""

from __future__ import annotations

import pytest

from rlhf_dist.errors import InputError
from rlhf_dist.planning.hardware import GB, KINDS, kind_of, parse_cluster


def test_nodes_gpus_and_kind() -> None:
    found = parse_cluster("4x8xh100-80g")
    assert (len(found.nodes), found.kind, found.gpu) == (4, "H100-80G", KINDS["H100-80G"])
    assert {(node.cpus, node.gpus) for node in found.nodes} == {(64, 8)}
    assert len({node.address for node in found.nodes}) == 4
    one = parse_cluster("2xL4-24G")
    assert [(node.cpus, node.gpus) for node in one.nodes] == [(16, 2)]
    assert one.assumed and one.host_memory == 2 * KINDS["L4-24G"].host * GB
    given = parse_cluster("4x8xH100-80G,1000G")
    assert given.host_memory == 1000 * GB and not given.assumed and len(given.nodes) == 4
    cpus = parse_cluster("3x16xCPU")
    assert cpus.host_memory == 64 * GB
    assert [(node.cpus, node.gpus) for node in cpus.nodes] == [(16, 0)] * 3 and cpus.gpu is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("H100", "write NODESxGPUSxKIND, as in 4x8xH100-80G"),
        ("4x8xH100-79G", "H100-79G is not known; there is B200-180G, "),
        ("0x8xH100-80G", "give 1 node or more"),
        ("-1x8xH100-80G", "write NODESxGPUSxKIND"),
        ("8xH100-80G,1T", "as in 4x8xH100-80G,2000G"),
        ("8xH100-80G,0G", "nodes with no memory of their own"),
        ("", "write NODESxGPUSxKIND"),
        ("\N{ARABIC-INDIC DIGIT THREE}x8xH100-80G", "write NODESxGPUSxKIND"),
    ],
)
def test_anything_else_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_cluster(text)
    assert said in str(caught.value) and str(caught.value).startswith(f"--cluster {text}")


@pytest.mark.parametrize(
    ("name", "gib", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "H100-80G"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40G"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100-80G"),
        ("NVIDIA L4", 22.0, "L4-24G"),
        ("NVIDIA L40S", 44.4, "L40S-48G"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX4090-24G"),
        ("Tesla T4", 14.6, None),
    ],
)
def test_a_drivers_name_is_recognized(name: str, gib: float, kind: str | None) -> None:
    assert kind_of(name, int(gib * 2**30)) == kind
