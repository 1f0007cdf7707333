"""Kinds of GPU, and what `--cluster 4x8xH100-80G,2000G` means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rlhf_dist.errors import InputError
from rlhf_dist.planning.placement import Machine

CPUS_A_GPU = 8
"""Assumed of a node with GPUs."""
CPU = "CPU"
CPU_HOST = 4
"""GB of memory a CPU, assumed of a node without GPUs: what clouds sell as general-purpose machines."""
CLUSTER = re.compile(r"(?:([0-9]+)x)?([0-9]+)x([A-Za-z0-9-]+)(?:,([0-9]+)G)?")
DIGITS, MEMORY_DIGITS = 5, 6
"""Of a cluster that can be planned, at most."""
GB, TERA = 10**9, 1e12


@dataclass(frozen=True, slots=True)
class Kind:
    """A GPU, as its maker's data sheet describes it."""

    memory: int
    """Bytes."""
    bfloat16: float
    """Multiply-adds of dense matrices, counted as two operations, a second."""
    float32: float
    """The same in float32, without TF32."""
    bandwidth: float
    """Of its memory, bytes a second."""
    link: float
    """To another GPU of its node, one way: by NVLink, or PCIe 4.0 with 16 lanes."""
    host: int
    """GB of the node's own memory for each such GPU, in the common cloud machines that have them (their smallest
    ratio among those with 4 or 8 GPUs). An assumption."""


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "B200-180G": Kind(180 * GB, 2250 * TERA, 75 * TERA, 7.7 * TERA, 900 * GB, 256),
        "H200-141G": Kind(141 * GB, 989 * TERA, 67 * TERA, 4.8 * TERA, 450 * GB, 256),
        "H100-80G": Kind(80 * GB, 989 * TERA, 67 * TERA, 3.35 * TERA, 450 * GB, 234),
        "A100-80G": Kind(80 * GB, 312 * TERA, 19.5 * TERA, 2.04 * TERA, 300 * GB, 144),
        "A100-40G": Kind(40 * GB, 312 * TERA, 19.5 * TERA, 1.56 * TERA, 300 * GB, 85),
        "L40S-48G": Kind(48 * GB, 362 * TERA, 91.6 * TERA, 0.86 * TERA, 32 * GB, 96),
        "A10G-24G": Kind(24 * GB, 70 * TERA, 31.2 * TERA, 0.6 * TERA, 32 * GB, 48),
        "L4-24G": Kind(24 * GB, 121 * TERA, 30.3 * TERA, 0.3 * TERA, 32 * GB, 48),
        "RTX4090-24G": Kind(24 * GB, 165 * TERA, 82.6 * TERA, 1.01 * TERA, 32 * GB, 64),
    }
)


def kind_of(name: str, memory: int) -> str | None:
    """The kind whose name a driver gives as `NVIDIA H100 80GB HBM3`, of about as much memory; None: not known."""
    plain = name.upper().replace(" ", "")
    named = [kind for kind in KINDS if kind.split("-")[0] in plain]
    close = [kind for kind in named if abs(KINDS[kind].memory - memory) < 0.15 * memory]
    return max(close, key=len, default=None)


@dataclass(frozen=True, slots=True)
class Cluster:
    """What to plan for."""

    nodes: tuple[Machine, ...]
    kind: str
    """A key of `KINDS`, or `CPU`."""
    host_memory: int = 0
    """Bytes of each node's own memory; 0: not known."""
    assumed: bool = False
    """Whether that is what such nodes usually have."""

    @property
    def gpu(self) -> Kind | None:
        """None for a cluster of CPUs."""
        return KINDS.get(self.kind)


def _names() -> dict[str, str]:
    """What may be written for each kind, in small letters: its name, and `h100` where there is one H100 only."""
    models = Counter(name.split("-")[0] for name in KINDS)
    short = {name.split("-")[0].lower(): name for name in KINDS if models[name.split("-")[0]] == 1}
    return short | {name.lower(): name for name in (*KINDS, CPU)}


def parse_cluster(text: str) -> Cluster:
    """`4x8xH100-80G`: nodes, GPUs of each, their kind; `8xH100-80G`: one node; `3x16xCPU`: CPUs of each.

    `,2000G` behind it is each node's own memory; else the usual one of such nodes is assumed.

    Raises `InputError`.
    """
    kinds = _names()
    found = CLUSTER.fullmatch(text)
    if found is None:
        raise InputError(
            f"--cluster {text}: write NODESxGPUSxKIND, as in 4x8xH100-80G, or NODESxCPUSxCPU; "
            "each node's own memory may follow, as in 4x8xH100-80G,2000G"
        )
    large = any(len(digits or "") > DIGITS for digits in found.group(1, 2)) or len(found[4] or "") > MEMORY_DIGITS
    if large:
        raise InputError(
            f"--cluster {text}: nodes, and GPUs or CPUs of each, have {DIGITS} digits at most, "
            f"and each node's memory in GB {MEMORY_DIGITS}"
        )
    nodes, each, kind = int(found[1] or 1), int(found[2]), kinds.get(found[3].lower())
    if kind is None:
        raise InputError(f"--cluster {text}: {found[3]} is not known; there is {', '.join((*KINDS, CPU))}")
    if not nodes or not each:
        raise InputError(f"--cluster {text}: has nothing to run on; give 1 node or more, and 1 {kind} or more in each")
    cpus, gpus = (each, 0) if kind == CPU else (each * CPUS_A_GPU, each)
    usual = each * (CPU_HOST if kind == CPU else KINDS[kind].host)
    given = found[4] is not None
    memory = (int(found[4]) if given else usual) * GB
    if not memory:
        raise InputError(f"--cluster {text}: nodes with no memory of their own; give GB, as in 4x8xH100-80G,2000G")
    return Cluster(tuple(Machine(cpus, gpus, f"node {i}") for i in range(nodes)), kind, memory, not given)
