"""`python -m rlhf_dist.cluster.node_wait HEAD:PORT NODES SECONDS`: waits until so many nodes are in a Ray cluster.

Exit code 1 and one message where they are not in time. Needs no node on this machine.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from rlhf_dist.cluster.address import greet, parse

POLL_S = 0.5


def living(where: str) -> list[str]:
    """Addresses of the nodes that are up. Raises whatever Ray raises."""
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # pyright: ignore[reportAttributeAccessIssue]

    infos = GcsClient(address=where).get_all_node_info(timeout=10).values()
    return sorted(info.node_manager_address for info in infos if info.state == GcsNodeInfo.ALIVE)


def missing(where: str, count: int, limit_s: float) -> str:
    """What is said when the nodes have not come in time; empty: they are there."""
    host, port = parse(where)
    end, last = time.monotonic() + limit_s, "nobody was asked"
    while time.monotonic() < end:
        last = greet(host, port, max(end - time.monotonic(), 0.1))
        if not last:
            try:
                found = living(where)
            except Exception as error:  # Ray's own errors have many types, and no common one
                last = " ".join(str(error).split())[:200]
            else:
                if len(found) >= count:
                    return ""
                last = f"{len(found)} of {count} nodes are there: {', '.join(found)}"
        time.sleep(POLL_S)
    return f"the cluster at {where} was not ready in {limit_s:g} s: {last}"


def main(argv: Sequence[str]) -> int:
    """See the module."""
    where, count, limit = argv
    if problem := missing(where, int(count), float(limit)):
        print(f"node_wait: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # Ray's client may have a thread that still waits
