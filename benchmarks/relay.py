"""`rlhf-dist bench relay`: weights into another node's shared memory, beside the same bytes over a plain socket.

Two processes of this machine, over loopback. The limit receives into memory that is there already and does nothing with
the bytes. Ours proves that it knows the secret, receives into shared memory, and hashes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _relay_side import LIMIT_S, SECRET, plan_of
from step import HERE, at_least, machine_facts, save

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.relay import Fetch, fill
from rlhf_dist.weights.shared_memory import BUFFERS

TARGET_RATIO = 2.0
"""At most."""


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where the target is missed. Raises `RlhfError`."""
    args = parse(argv)
    plan = plan_of(args.mib)
    memory = bytearray(plan.nbytes)
    node = Fetch(SECRET, timeout_s=LIMIT_S)
    plain: list[float] = []
    ours: list[float] = []
    words = [sys.executable, str(HERE / "_relay_side.py"), str(args.mib)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=dict(os.environ)) as side:
        assert side.stdin and side.stdout
        for run in range(args.runs + BUFFERS):  # memory is touched for the first time in as many as there are buffers
            print(f"round {run + 1} of {args.runs + BUFFERS}", file=sys.stderr, flush=True)
            side.stdin.write("\n")
            side.stdin.flush()
            found = json.loads(side.stdout.readline())
            plain.append(plain_seconds(tuple(found["plain"]), memory))
            where = Announcement(found["version"], found["path"], found["offset"], plan, tuple(found["hashes"]))
            begun = time.perf_counter()
            node.fetch(where, tuple(found["offer"]))
            ours.append(time.perf_counter() - begun)
        side.stdin.close()
    node.close()
    result = summary(plan.nbytes, plain[BUFFERS:], ours[BUFFERS:])
    print(table(result))
    save(args.out, result | {"machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench relay",
        usage="rlhf-dist bench relay [--mib N] [--runs N] [--out FILE]",
        description="A push to another node, from published to hashed, beside a plain socket.",
        allow_abbrev=False,
    )
    parser.add_argument("--mib", type=at_least(16), default=512, help="weights in MiB (512)")
    parser.add_argument("--runs", type=at_least(1), default=7, help="measured rounds (7)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"relay-{stamp}.json", help="JSON to write")
    return parser.parse_args(list(argv))


def plain_seconds(address: tuple[str, int], memory: bytearray) -> float:
    """From the connection to the last byte."""
    begun = time.monotonic()
    with socket.create_connection(address, LIMIT_S) as connection, memoryview(memory) as view:
        fill(connection, view, begun + LIMIT_S)
    return time.monotonic() - begun


def summary(nbytes: int, plain: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Medians, their ratio, and whether it is at most what is asked."""
    limit, own = statistics.median(plain), statistics.median(ours)
    return {
        "bytes": nbytes,
        "plain_s": limit,
        "ours_s": own,
        "ratio": own / limit,
        "runs": {"plain_s": list(plain), "ours_s": list(ours)},
        "reached": {"ratio": own / limit <= TARGET_RATIO},
    }


def table(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    gigabytes = result["bytes"] / 1e9
    lines = [
        f"{result['bytes'] / 2**20:,.0f} MiB over loopback",
        "medians".ljust(14) + "seconds".rjust(9) + "GB/s".rjust(9),
    ]
    for name, key in (("plain socket", "plain_s"), ("relay", "ours_s")):
        lines.append(f"{name:<14}{result[key]:9.3f}{gigabytes / result[key]:9.2f}")
    lines.append(f"ratio = relay / plain socket: {result['ratio']:.2f} (at most {TARGET_RATIO:g} asked)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
