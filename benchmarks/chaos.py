"""`rlhf-dist bench chaos`: searches in virtual time: thousands of runs, each with faults drawn from its seed.

Real are the loop, the controller with its shell, the ledger, the prompt stream, checkpoints and the way back from them.
Members are simulated (`chaos/`), and time jumps. A seed that fails is run again with fewer faults and simpler settings
for as long as it still fails in the same way, and is printed with how to replay it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from datetime import UTC, datetime
from itertools import count, takewhile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from chaos.plan import WRITES, plan_of
from chaos.search import search, smallest
from chaos.totals import Totals, search_all
from step import HERE, at_least, machine_facts

from rlhf_dist.cli.arguments import Parser

BLOCK = 20
"""Seeds that a process takes at a time."""
BLOCK_LIMIT_S, WAIT_S = 600.0, 10.0
SHRUNK = 3
"""Failing seeds that are made small; the others are named."""


def main(argv: Sequence[str]) -> int:
    """Search, or replay one seed; 1 where something does not hold. Raises `InputError`."""
    args = parse(argv)
    if args.seed is not None:
        return replay(args.seed)
    totals, log = Totals(), Log(args.out, args.seeds, args.every)
    until = time.monotonic() + 60.0 * args.minutes if args.minutes else None

    def so_far() -> dict[str, Any]:
        return summary(totals, args.first, args.jobs, log.seconds) | {"machine": machine_facts()}

    for block in run(args.first, args.seeds, args.jobs, until):
        totals.merge(block)
        log.failed(block.broken)
        log.went_on(totals, so_far)
    result = so_far()
    write(args.out, result | {"complete": True})
    print(table(result), flush=True)
    for seed in sorted(totals.broken)[:SHRUNK]:
        replay(seed)
    return 1 if totals.broken else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench chaos",
        usage="rlhf-dist bench chaos [options] | --seed N",
        description="Runs of the loop in virtual time over simulated members, with faults drawn from seeds.",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=at_least(1), default=2000, help="runs (2000)")
    parser.add_argument("--first", type=at_least(0), default=0, help="the first seed (0)")
    parser.add_argument("--minutes", type=at_least(1), default=0, help="begin no more runs after so many minutes")
    parser.add_argument("--jobs", type=at_least(1), default=os.cpu_count() or 1, help="processes (one for each CPU)")
    parser.add_argument("--seed", type=at_least(0), help="replay this one, and make it smaller if it fails")
    parser.add_argument("--every", type=at_least(1), default=60, help="seconds between two lines of progress (60)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"chaos-{stamp}.json", help="JSON to write")
    return parser.parse_args(list(argv))


def run(first: int, seeds: int, jobs: int, until: float | None) -> Iterator[Totals]:
    """What each block of seeds came to, in so many processes; `until`: when no more are begun, on the monotonic
    clock."""
    if jobs == 1:
        yield from map(search_all, blocks(first, seeds, until))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        under_way: set[Future[Totals]] = set()
        try:
            for block in blocks(first, seeds, until):
                under_way.add(pool.submit(search_all, block))
                while len(under_way) >= 2 * jobs:
                    yield collect(under_way)
            while under_way:
                yield collect(under_way)
        finally:
            pool.shutdown(cancel_futures=True)


def blocks(first: int, seeds: int, until: float | None) -> Iterator[range]:
    """Parts of the seeds, until the time is over."""
    starts = takewhile(lambda start: start < first + seeds, count(first, BLOCK))
    for start in starts:
        if until is not None and time.monotonic() >= until:
            return
        yield range(start, min(start + BLOCK, first + seeds))


def collect(under_way: set[Future[Totals]]) -> Totals:
    """Wait for one block at least; those that are done are taken out. The time that this process was stopped does not
    count: of a wait that a stop fell into there is one more."""
    totals = Totals()
    for _ in range(round(BLOCK_LIMIT_S / WAIT_S)):
        done, _ = wait(under_way, timeout=WAIT_S, return_when=FIRST_COMPLETED)
        for block in done:
            under_way.remove(block)
            totals.merge(block.result(timeout=0))
        if done:
            return totals
    raise TimeoutError(f"{BLOCK} seeds took more than {BLOCK_LIMIT_S:.0f} s")


class Log:
    """What is shown and saved while the search goes on."""

    def __init__(self, out: Path, of: int, every_s: float) -> None:
        """`out`: where the result goes; failing seeds go beside it as they are found. `of`: seeds in all."""
        self._out, self._of, self._every_s = out, of, every_s
        self._failing = out.with_suffix(".failing.txt")
        self._begun = self._told = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._begun

    def failed(self, broken: dict[int, str]) -> None:
        """Seeds that fail: at once, on the screen and in a file."""
        if broken:
            lines = [f"seed {seed}: {text}" for seed, text in sorted(broken.items())]
            print(*lines, sep="\n", flush=True)
            self._failing.parent.mkdir(parents=True, exist_ok=True)
            with self._failing.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)

    def went_on(self, totals: Totals, result: Callable[[], dict[str, Any]]) -> None:
        """Now and then a line, and what is known so far where the result will be."""
        if time.monotonic() - self._told < self._every_s:
            return
        self._told, rate = time.monotonic(), totals.seeds / self.seconds
        left = (self._of - totals.seeds) / rate / 60.0
        print(
            f"{totals.seeds:,} of {self._of:,} seeds, {len(totals.broken)} fail; {60.0 * rate:,.0f} a minute, "
            f"{left:,.0f} minutes left",
            flush=True,
        )
        write(self._out, result() | {"complete": False})


def write(path: Path, result: dict[str, Any]) -> None:
    """As a whole, so that whoever reads it meanwhile finds the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


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
