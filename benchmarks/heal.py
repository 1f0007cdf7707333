"""`rlhf-dist bench heal`: seconds until a lost process is noticed, is back, and the run has made its next step.

One real run of `configs/reverse.yaml`'s sizes with one rollout worker, a scoring server, a reference server and a
learner rank loses them one after the other, killed and stopped. Beside it: what watching costs while nothing is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _processes import started
from step import HERE, at_least, machine_facts, save

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.cluster.session import prepare
from rlhf_dist.config.schema import ClusterConfig
from rlhf_dist.errors import RunError

LIMIT_S = 180.0
"""For each wait."""
FAULTS = (
    ("rollout worker 0", signal.SIGKILL),
    ("rollout worker 0", signal.SIGSTOP),
    ("scoring server 0", signal.SIGKILL),
    ("scoring server 0", signal.SIGSTOP),
    ("reference server 0", signal.SIGKILL),
    ("learner rank 0", signal.SIGKILL),
    ("learner rank 0", signal.SIGSTOP),
)
BACK = ("returned", "rebuilt")
"""Events that tell of the end of a loss."""
TARGETS_S = {
    "killed noticed": 2.0,
    "stopped noticed": 20.0,
    "rollout worker dead to tokens": 20.0,
    "learner rank dead to the next step": 40.0,
}
"""At most."""
COST_TARGET = 0.02
"""Of the machine, at most."""
SETTINGS = (
    "rollout.workers=1",
    "reference.replicas=1",
    "algo.kl.coef=0.05",
    "loop.checkpoint_every=0",
    "loop.steps=100000",
    "eval.prompts=4",
    "eval.every=0",
    "telemetry.wandb=off",
    "telemetry.samples_every=0",
    "faults.respawns=1000",
    "learner.keep_state_every=1",
)


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where a target is missed. Raises `RlhfError`."""
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="rlhf-bench-") as folder:
        rounds = lose_all(Path(folder), args.rounds)
    prepare(ClusterConfig(address="local", device="cpu"))
    from _watching import watching_cost  # which imports ray

    result = summary(rounds, watching_cost(args.watched, args.seconds))
    print(table(result))
    save(args.out, result | {"machine": machine_facts()})
    return 0


def lose_all(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """What came of each fault, of so many rounds of `FAULTS` in one run."""
    run, log = folder / "runs" / "heal", folder / "heal.log"
    words = ["train", "configs/reverse.yaml", f"output={folder / 'runs'}", "name=heal", *SETTINGS]
    found = []
    with started(words, log) as (process, _):
        wait(lambda: len(lines(run / "metrics.jsonl")) > 2, process, log)
        for number, (name, how) in enumerate(FAULTS * rounds):
            print(f"{number + 1} of {len(FAULTS) * rounds}: {name}, {how.name}", file=sys.stderr, flush=True)
            found.append(one_fault(run, process, log, name, how))
    return found


def one_fault(run: Path, process: subprocess.Popen[bytes], log: Path, name: str, how: signal.Signals) -> dict[str, Any]:
    """Seconds from the signal on."""
    before = lines(run / "events.jsonl")
    warned, came = len(losses(before)), kinds(before, *BACK)
    pid = json.loads((run / "logs" / f"{name.replace(' ', '-')}.pid").read_text(encoding="utf-8"))["pid"]
    began = time.time()
    os.kill(pid, how)
    wait(lambda: kinds(lines(run / "events.jsonl"), *BACK) > came, process, log)
    steps = len(lines(run / "metrics.jsonl"))  # after a rebuild: without those that are made again
    wait(lambda: len(lines(run / "metrics.jsonl")) > steps, process, log)
    stepped = time.time() - began
    events = lines(run / "events.jsonl")
    noticed = losses(events)[warned]
    back = [event for event in events if event["kind"] in BACK][came]
    if not noticed["message"].startswith(name):
        raise RunError(f"{name} was lost, and the run told of something else: {noticed['message']}")
    return {
        "name": name,
        "how": how.name,
        "noticed_s": at(noticed) - began,
        "back_s": at(back) - began,
        "step_s": stepped,
    }


def wait(come: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    """Raises `RunError`."""
    end = time.monotonic() + LIMIT_S
    while not come():
        if process.poll() is not None or time.monotonic() > end:
            raise RunError(f"the run did not go on: {log.read_text(encoding='utf-8')[-1000:]}")
        time.sleep(0.02)


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file that is being written."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kinds(events: Sequence[Mapping[str, Any]], *wanted: str) -> int:
    """How many there are of these."""
    return sum(event["kind"] in wanted for event in events)


def losses(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that tell of a lost process; other warnings may come between them."""
    return [event for event in events if event["facts"].get("alert") == "fault"]


def at(event: Mapping[str, Any]) -> float:
    """Seconds since 1970."""
    return datetime.fromisoformat(event["time"]).timestamp()


def summary(rounds: Sequence[Mapping[str, Any]], cost: Mapping[str, float]) -> dict[str, Any]:
    """The worst of each kind, and the targets."""
    worst = {
        "killed noticed": max(one["noticed_s"] for one in rounds if one["how"] == "SIGKILL"),
        "stopped noticed": max(one["noticed_s"] for one in rounds if one["how"] == "SIGSTOP"),
        "rollout worker dead to tokens": after_kill(rounds, "rollout worker 0"),
        "learner rank dead to the next step": after_kill(rounds, "learner rank 0"),
    }
    reached = {name: worst[name] <= most for name, most in TARGETS_S.items()}
    reached["watching"] = cost["share_of_machine"] <= COST_TARGET
    return {"faults": list(rounds), "worst": worst, "watching": dict(cost), "reached": reached}


def after_kill(rounds: Sequence[Mapping[str, Any]], name: str) -> float:
    """The most seconds from its death to the next step."""
    return max(one["step_s"] for one in rounds if (one["name"], one["how"]) == (name, "SIGKILL"))


def table(result: Mapping[str, Any]) -> str:
    """For people."""
    found = [f"{'lost':<22}{'how':<10}{'noticed s':>10}{'back s':>9}{'next step s':>13}"]
    found += [
        f"{one['name']:<22}{one['how']:<10}{one['noticed_s']:>10.2f}{one['back_s']:>9.1f}{one['step_s']:>13.1f}"
        for one in result["faults"]
    ]
    for name, most in TARGETS_S.items():
        met = "reached" if result["reached"][name] else "missed"
        found.append(f"{name}: {result['worst'][name]:.2f} s, at most {most:g} s asked, {met}")
    cost, met = result["watching"], "reached" if result["reached"]["watching"] else "missed"
    found.append(
        f"watching {cost['processes']:.0f} processes: {100 * cost['share_of_machine']:.2f}% of the machine's CPU time, "
        f"at most {100 * COST_TARGET:g}% asked, {met}"
    )
    return "\n".join(found)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises `InputError`."""
    parser = Parser(prog="rlhf-dist bench heal", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=at_least(1), default=1, help="of all faults, in one run (1)")
    parser.add_argument("--watched", type=at_least(1), default=6, help="processes whose watching is measured (6)")
    parser.add_argument("--seconds", type=at_least(2), default=20, help="for which they are watched (20)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"heal-{stamp}.json", help="JSON file")
    return parser.parse_args(list(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
