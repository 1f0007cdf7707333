"""`rlhf-dist bench chaos`: searches in virtual time: thousands of runs, each with faults drawn from its seed.

Real are the loop, the controller with its shell, the ledger, the prompt stream, checkpoints and the way back from them.
Members are simulated (`chaos/`), and time jumps. A seed that fails is run again with fewer faults and simpler settings
for as long as it still fails in the same way, and is printed with how to replay it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from datetime import UTC, datetime
from itertools import count, takewhile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from chaos.plan import WRITES, plan_of
from chaos.search import search, smallest
from chaos.totals import Totals, search_all
from step import HERE, at_least, machine_facts, save

from rlhf_dist.cli.arguments import Parser

BLOCK = 20
"""Seeds that a process takes at a time."""
BLOCK_LIMIT_S = 600.0
SHRUNK = 3
"""Failing seeds that are made small; the others are named."""


def main(argv: Sequence[str]) -> int:
    """Search, or replay one seed; 1 where something does not hold. Raises `InputError`."""
    args = parse(argv)
    if args.seed is not None:
        return replay(args.seed)
    begun = time.monotonic()
    totals = run(args.first, args.seeds, args.jobs, begun + 60.0 * args.minutes if args.minutes else None)
    result = summary(totals, args.first, args.jobs, time.monotonic() - begun)
    print(table(result))
    for seed in sorted(totals.broken)[:SHRUNK]:
        replay(seed)
    for seed in sorted(totals.broken)[SHRUNK:]:
        print(f"seed {seed}: {totals.broken[seed]}")
    save(args.out, result | {"machine": machine_facts()})
    return 1 if totals.broken else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench chaos",
        usage="rlhf-dist bench chaos [--seeds N] [--first N] [--minutes N] [--jobs N] [--out FILE] | --seed N",
        description="Runs of the loop in virtual time over simulated members, with faults drawn from seeds.",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=at_least(1), default=2000, help="runs (2000)")
    parser.add_argument("--first", type=at_least(0), default=0, help="the first seed (0)")
    parser.add_argument("--minutes", type=at_least(1), default=0, help="begin no more runs after so many minutes")
    parser.add_argument("--jobs", type=at_least(1), default=os.cpu_count() or 1, help="processes (one for each CPU)")
    parser.add_argument("--seed", type=at_least(0), help="replay this one, and make it smaller if it fails")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"chaos-{stamp}.json", help="JSON to write")
    return parser.parse_args(list(argv))


def run(first: int, seeds: int, jobs: int, until: float | None) -> Totals:
    """All seeds, in so many processes; `until`: when no more are begun, on the monotonic clock."""
    totals = Totals()
    if jobs == 1:
        for block in blocks(first, seeds, until):
            totals.merge(search_all(block))
        return totals
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        under_way: set[Future[Totals]] = set()
        for block in blocks(first, seeds, until):
            under_way.add(pool.submit(search_all, block))
            while len(under_way) >= 2 * jobs:
                under_way = collect(under_way, totals)
        while under_way:
            under_way = collect(under_way, totals)
    return totals


def blocks(first: int, seeds: int, until: float | None) -> Iterator[range]:
    """Parts of the seeds, until the time is over."""
    starts = takewhile(lambda start: start < first + seeds, count(first, BLOCK))
    for start in starts:
        if until is not None and time.monotonic() >= until:
            return
        yield range(start, min(start + BLOCK, first + seeds))


def collect(under_way: set[Future[Totals]], totals: Totals) -> set[Future[Totals]]:
    """Wait for one block at least; returns the others."""
    done, rest = wait(under_way, timeout=BLOCK_LIMIT_S, return_when=FIRST_COMPLETED)
    if not done:
        raise TimeoutError(f"{BLOCK} seeds took more than {BLOCK_LIMIT_S:.0f} s")
    for block in done:
        totals.merge(block.result(timeout=0))
    return rest


def replay(seed: int) -> int:
    """Run one seed, say what came of it, and make it small where it fails."""
    found = search(plan_of(seed))
    print(found.plan)
    if found.broken is None:
        print(f"  all holds: {found.lives} starts, {found.seconds:.0f} s of virtual time")
        return 0
    print(f"  FAILS: {found.broken}")
    small = smallest(found)
    print(f"the smallest that fails so:\n{small.plan}\n  {small.broken}\nreplay: rlhf-dist bench chaos --seed {seed}")
    return 1


def summary(totals: Totals, first: int, jobs: int, seconds: float) -> dict[str, Any]:
    """What is saved."""
    writes = Counter({name: number for name, number in totals.faults.items() if name.startswith(WRITES)})
    return {
        "first": first,
        "seeds": totals.seeds,
        "failing": {str(seed): text for seed, text in sorted(totals.broken.items())},
        "jobs": jobs,
        "seconds": round(seconds, 1),
        "seeds_a_minute_and_core": round(60.0 * totals.seeds / seconds / jobs),
        "starts": totals.lives,
        "steps": totals.steps,
        "events": totals.calls,
        "durable_writes": totals.writes,
        "virtual_hours": round(totals.virtual_s / 3600.0, 1),
        "seen": dict(totals.seen.most_common()),
        "endings": dict(totals.endings.most_common()),
        "faults_of_members": dict((totals.faults - writes).most_common()),
        "faults_at_writes": dict(writes.most_common()),
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    names = (
        "seeds",
        "starts",
        "steps",
        "events",
        "durable_writes",
        "virtual_hours",
        "seconds",
        "seeds_a_minute_and_core",
    )
    lines = [f"{name.replace('_', ' '):26} {result[name]:>12,}" for name in names]
    lines += [f"{'starts that ended so':26} {told(result['endings'])}"]
    lines += [f"{'faults of members':26} {told(result['faults_of_members'])}"]
    lines += [f"{'faults at durable writes':26} {sum(result['faults_at_writes'].values()):>12,}"]
    return "\n".join([*lines, f"{'seeds that fail':26} {len(result['failing']):>12,}"])


def told(counts: dict[str, int]) -> str:
    """`die 12, cut 3`."""
    return ", ".join(f"{name} {number:,}" for name, number in counts.items()) or "none"
