"""`rlhf-dist bench controller`: what a prompt group costs the driver, with members that answer at once.

Real are Ray, the controller with its shell, the ledger and the fleets. Workers, servers and the collator
are logical: a few processes host them all (`_members.py`), so that hundreds fit on one machine. There is no learner: a
step ends when its groups are taken. The driver's CPU time is that of all of its threads, Ray's too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from step import HERE, at_least, machine_facts, save

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.cluster import session
from rlhf_dist.config.schema import AlgoConfig, ClusterConfig, Config, LoopConfig
from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.controller_rules import rules_of
from rlhf_dist.loop.devices import Devices
from rlhf_dist.loop.events import MemberKind
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.shell import Actors, Shell
from rlhf_dist.types import Message, Prompt

HOSTS, SERVERS = 4, 2
GROUPS, SAMPLES = 128, 8
"""Of a step. `LAG` versions ahead, twice as many groups are under way: one for each of 256 workers."""
LAG = 1
LIMIT_S = 120.0
CALLS = 1024
"""Bare ones, of each measurement; so many at once as groups are under way."""
TARGET_US, TARGET_GROWTH, TARGET_BYTES = 600.0, 1.25, 300.0
"""At most: a group; the most workers over one; a sample."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run with so many workers."""

    workers: int
    cpu_us: float
    """Of the driver, a group."""
    bare_us: float
    """Of the driver, a bare Ray call with its answer, just before."""
    wall_us: float
    """A group."""


class Endless:
    """Prompts, one after another."""

    def __init__(self) -> None:
        self._given = 0

    def __len__(self) -> int:
        return 10**6

    def take(self, n: int) -> list[tuple[Prompt, int]]:
        """See `rules.Prompts`."""
        first, self._given = self._given, self._given + n
        message = Message("user", "How many legs have three spiders and a dog?")
        return [(Prompt(f"0/{i}", (message,), "28", "bench"), 0) for i in range(first, self._given)]


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where a target is missed. Raises `RlhfError`."""
    args = parse(argv)
    session.prepare(ClusterConfig(address="local"))  # before anything imports ray
    with tempfile.TemporaryDirectory(prefix="rlhf-dist-bench-") as place:
        folder = Path(place)
        with session.ray_session(ClusterConfig(address="local"), folder, print):
            hosts = start_hosts()
            measure(1, hosts, folder, 1)  # what the first calls of a process cost is not to count
            runs = [measure(workers, hosts, folder, args.steps) for _ in range(args.runs) for workers in args.workers]
            sizes = weigh(args.workers[-1], hosts, folder, args.steps)
    result = summary(runs, sizes, (args.steps + 1) * GROUPS * SAMPLES)
    print(table(result))
    save(args.out, result | {"steps": args.steps, "machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench controller",
        usage="rlhf-dist bench controller [--workers N ...] [--steps N] [--runs N] [--out FILE]",
        description="The driver's CPU time and messages for a group, with members that answer at once.",
        allow_abbrev=False,
    )
    parser.add_argument("--workers", type=at_least(1), nargs="+", default=[1, 16, 256],
                        help="logical rollout workers; the last is compared with the first (1 16 256)")  # fmt: skip
    parser.add_argument("--steps", type=at_least(2), default=8, help=f"of {GROUPS} groups, in each run (8)")
    parser.add_argument("--runs", type=at_least(1), default=3, help="rounds of all runs (3)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"controller-{stamp}.json", help="JSON to write")
    return parser.parse_args(list(argv))


def start_hosts() -> list[Any]:
    """Processes for logical members."""
    import ray
    from _members import Host

    paths = {"PYTHONPATH": f"{HERE}:{HERE.parent}"}
    host: Any = ray.remote(Host)
    settings = {"num_cpus": 0, "max_concurrency": 2000, "runtime_env": {"env_vars": paths}}
    hosts = [host.options(**settings).remote() for _ in range(HOSTS)]
    ray.get([one.nothing.remote() for one in hosts], timeout=LIMIT_S)
    return hosts


def measure(workers: int, hosts: Sequence[Any], folder: Path, steps: int) -> Run:
    """Train on nothing for so many steps; the first half of the first step's groups is on its way when time begins."""
    bare = bare_call(hosts[0])
    names = [f"rollout worker {i} of {time.monotonic_ns()}" for i in range(workers)]
    ledger = Ledger(folder / f"{time.monotonic_ns()}.sqlite")
    shell = start_shell(names, hosts, ledger, steps + 1)
    shell.published(0)
    take_step(shell, ledger, 1)
    cpu, wall = time.process_time(), time.perf_counter()
    for step in range(2, steps + 2):
        take_step(shell, ledger, step)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    shell.finish()
    ledger.close()
    groups = 1e-6 * steps * GROUPS
    return Run(workers, cpu / groups, bare, wall / groups)


def bare_call(host: Any) -> float:
    """CPU time of the driver in microseconds: a call that does nothing, many under way at a time."""
    import ray

    begun = time.process_time()
    calls = [host.nothing.remote() for _ in range(CALLS)]
    while calls:
        done, calls = ray.wait(calls, num_returns=min(len(calls), 64), timeout=LIMIT_S)
        ray.get(done)
    return 1e6 * (time.process_time() - begun) / CALLS


def start_shell(names: Sequence[str], hosts: Sequence[Any], ledger: Ledger, steps: int) -> Shell:
    """A run's actor side over logical members."""
    from _members import COLLATOR, SERVER, WORKER, Member

    from rlhf_dist.cluster.groups import CollatorProcess, ScoringFleet, silence
    from rlhf_dist.cluster.inbox import Inbox
    from rlhf_dist.cluster.rollout_fleet import RolloutFleet
    from rlhf_dist.cluster.standing import beat_s

    # `keep`: the answers name version 0 for ever.
    loop = LoopConfig(prompts_per_step=GROUPS, steps=steps, max_policy_lag=LAG, stale="keep")
    rules = rules_of(Config(loop=loop, algo=AlgoConfig(group_size=SAMPLES)), compares=False, masked=False)
    workers = {name: Member(hosts[i % HOSTS], name, WORKER) for i, name in enumerate(names)}
    servers = {f"scoring server {i}": Member(hosts[i % HOSTS], str(i), SERVER) for i in range(SERVERS)}
    inbox = Inbox()
    actors = Actors(
        rollouts=RolloutFleet(workers, inbox, timeout_s=LIMIT_S, sync_timeout_s=LIMIT_S),
        scoring=ScoringFleet(servers, inbox, timeout_s=LIMIT_S),
        reference=None,
        bodies=CollatorProcess("collator", Member(hosts[-1], "collator", COLLATOR), inbox, timeout_s=LIMIT_S),
        arrivals=inbox,
        timeout=silence,
    )
    limits: dict[MemberKind, float] = dict.fromkeys(get_args(MemberKind), LIMIT_S)
    capacity = GROUPS * SAMPLES * (LAG + 1)
    members = Members(names, servers, [], capacity=capacity, limits_s=limits, beat_s=beat_s(len(names)))
    controller, look = Controller(rules, Endless(), members), Devices(members).goodput.look
    return Shell(controller, actors, ledger=ledger, before=look)


def take_step(shell: Shell, ledger: Ledger, step: int) -> None:
    """What the loop does in a step, but for the learning."""
    taken = shell.next_step()
    ledger.consume(taken.attempts, step, [int(one.head.lengths.sum()) for one in taken.experiences])
    shell.published(step)
    shell.forget([one.key for one in taken.experiences])


def weigh(workers: int, hosts: Sequence[Any], folder: Path, steps: int) -> dict[str, list[int]]:
    """Kind of message -> bytes of each, in a run of its own: to weigh them takes the hosts' time."""
    import ray

    ray.get([host.weigh.remote() for host in hosts], timeout=LIMIT_S)
    measure(workers, hosts, folder, steps)
    found: dict[str, list[int]] = {}
    for sizes in ray.get([host.sizes.remote() for host in hosts], timeout=LIMIT_S):
        for kind, messages in sizes.items():
            found.setdefault(kind, []).extend(messages)
    return found


def summary(runs: Sequence[Run], sizes: Mapping[str, Sequence[int]], samples: int) -> dict[str, Any]:
    """Of each number of workers the median run; `sizes` in bytes, of so many samples."""
    lines = []
    for workers in dict.fromkeys(run.workers for run in runs):
        same = [run for run in runs if run.workers == workers]
        middle = sorted(same, key=lambda run: run.cpu_us)[len(same) // 2]
        lines.append(asdict(middle) | {"calls": middle.cpu_us / middle.bare_us, "spread_us": [r.cpu_us for r in same]})
    growth = lines[-1]["calls"] / lines[0]["calls"]
    messages = {kind: {"sample": sum(found) / samples, "largest": max(found)} for kind, found in sizes.items()}
    total = sum(kind["sample"] for kind in messages.values())
    return {
        "lines": lines,
        "growth": growth,
        "messages": messages,
        "bytes_per_sample": total,
        "reached": {
            "cpu": max(line["cpu_us"] for line in lines) <= TARGET_US,
            "growth": growth <= TARGET_GROWTH,
            "bytes": total <= TARGET_BYTES,
        },
    }


def table(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    lines = [
        f"groups of {SAMPLES}, {GROUPS} a step, {(LAG + 1) * GROUPS} under way; driver's CPU time, medians",
        f"{'workers':>8}{'us a group':>12}{'us a bare call':>16}{'in bare calls':>15}{'wall us':>9}",
    ]
    for line in result["lines"]:
        lines.append(
            f"{line['workers']:8}{line['cpu_us']:12.0f}{line['bare_us']:16.0f}{line['calls']:15.1f}{line['wall_us']:9.0f}"
        )
    lines.append(f"{'message':8}{'bytes a sample':>16}{'largest':>10}")
    for kind, found in result["messages"].items():
        lines.append(f"{kind:8}{found['sample']:16.0f}{found['largest']:10}")
    first, last = result["lines"][0]["workers"], result["lines"][-1]["workers"]
    lines += [
        f"a group costs the driver at most {TARGET_US:g} us asked; from {first} to {last} workers "
        f"{result['growth']:.2f} times as many bare calls (at most {TARGET_GROWTH:g} asked)",
        f"{result['bytes_per_sample']:.0f} bytes a sample through the controller (at most {TARGET_BYTES:g} asked)",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
