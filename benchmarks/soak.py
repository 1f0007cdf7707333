"""`rlhf-dist bench soak`: a run that loses a process every two minutes, beside itself without losses.

One real run of `bench heal`'s settings, which saves checkpoints, too. It is first left alone for a while. Then one
process after the other is killed, at a random moment of each interval; of each four one is a learner rank. At the end
it is stopped as people stop a run, and resumed for its last steps, so that its ledger closes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _processes import started
from heal import BACK, SETTINGS, at, lines, losses, wait
from memory import held
from step import HERE, at_least, machine_facts, save

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.cluster.parent import last_step
from rlhf_dist.errors import RunError

WARM_STEPS = 5
"""Before anything counts."""
LAST_STEPS = 3
"""After the resume."""
LOOK_S = 2.0
STOP_LIMIT_S, END_LIMIT_S = 180.0, 300.0
RANK = "learner rank 0"
OTHERS = ("rollout worker 0", "scoring server 0", "reference server 0")
THROUGHPUT, GROWTH = 0.70, 0.05
"""At least, of that without faults; at most, of all memory."""
TOKENS, STEP_S = "rollout/response_tokens", "time/step"
SAVED_EVERY = 50
WORDS = (f"loop.checkpoint_every={SAVED_EVERY}", "learner.optimizer.lr=1e-8", "learner.optimizer.schedule=constant")
"""Over those of `bench heal`. The learning rate: with a real one lengths drift, and throughput with them."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment of the run."""

    seconds: float
    """Since 1970."""
    step: int


@dataclass(slots=True)
class Watched:
    """What was seen from outside."""

    marks: list[Mark] = field(default_factory=list)
    """Begin of the time without faults, its end, and the end of the one with faults."""
    kills: list[tuple[float, str]] = field(default_factory=list)
    """(seconds since 1970, whom)."""
    memory: list[dict[str, float]] = field(default_factory=list)
    """MiB while there were faults: `controller`, `all`, `shm`."""


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where a target is missed. Raises `RlhfError`."""
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="rlhf-bench-") as folder:
        run, log = Path(folder) / "runs" / "soak", Path(folder) / "soak.log"
        seen = Watched()
        words = ["train", "configs/reverse.yaml", f"output={run.parent}", f"name={run.name}", *SETTINGS, *WORDS]
        with started(words, log) as (process, mark):
            soak(args, run, seen, process, mark, log)
            stop(process, log)
        close(words, last_step(run / "metrics.jsonl") or 0, log)
        ledger = json.loads((run / "summary.json").read_text(encoding="utf-8"))["ledger"]
        result = summary(seen, lines(run / "metrics.jsonl"), lines(run / "events.jsonl"), ledger)
    print(table(result))
    asked = {"minutes": args.minutes, "every": args.every, "quiet": args.quiet, "seed": args.seed}
    save(args.out, result | {"asked": asked, "machine": machine_facts()})
    return 0


def soak(
    args: argparse.Namespace, run: Path, seen: Watched, process: subprocess.Popen[bytes], mark: str, log: Path
) -> None:
    """The time without faults, then the one with them. Raises `RunError` where the run ends."""
    metrics = run / "metrics.jsonl"
    wait(lambda: (last_step(metrics) or 0) >= WARM_STEPS, process, log)
    seen.marks.append(Mark(time.time(), last_step(metrics) or 0))
    pass_time(seen.marks[0].seconds + args.quiet, process, log)
    seen.marks.append(Mark(time.time(), last_step(metrics) or 0))
    begin, end = seen.marks[1].seconds, seen.marks[1].seconds + 60 * args.minutes
    for after_s, name in kills(60 * args.minutes, args.every, args.seed):
        pass_time(begin + after_s, process, log, lambda: seen.memory.append(memory_of(mark)))
        if kill(run, name):
            seen.kills.append((time.time(), name))
            print(f"{after_s / 60:.1f} of {args.minutes:g} minutes: {name}", file=sys.stderr, flush=True)
    pass_time(end, process, log, lambda: seen.memory.append(memory_of(mark)))
    seen.marks.append(Mark(time.time(), last_step(metrics) or 0))


def kills(seconds: float, every_s: float, seed: int) -> list[tuple[float, str]]:
    """(seconds from the begin, whom) of each: one in each whole interval, early enough to heal before the next."""
    draw, found, names = random.Random(seed), [], list[str]()
    for number in range(int(seconds / every_s)):
        if not names:
            names = [RANK, *(draw.choice(OTHERS) for _ in range(3))]
            draw.shuffle(names)
        found.append((every_s * (number + 0.5 * draw.random()), names.pop()))
    return found


def pass_time(until: float, process: subprocess.Popen[bytes], log: Path, look: Any = lambda: None) -> None:
    """Until then, looking now and then. Raises `RunError` where the run ends."""
    while (left := until - time.time()) > 0:
        if process.poll() is not None:
            raise RunError(f"the run ended: {log.read_text(encoding='utf-8')[-2000:]}")
        look()
        time.sleep(min(LOOK_S, left))


def kill(run: Path, name: str) -> bool:
    """Whether there was a process to kill."""
    with suppress(OSError, ValueError):
        text = (run / "logs" / f"{name.replace(' ', '-')}.pid").read_text(encoding="utf-8")
        os.kill(json.loads(text)["pid"], signal.SIGKILL)
        return True
    return False


def memory_of(mark: str) -> dict[str, float]:
    """MiB now: proportional shares (PSS) of the controller and of all processes, and the run's shared memory."""
    found, shared = held(mark), 0
    for path in Path("/dev/shm").glob(f"rlhf_dist-{os.getuid()}-*"):
        with suppress(OSError):
            shared += path.stat().st_blocks * 512
    return {"controller": found.get("controller", 0.0), "all": sum(found.values()), "shm": shared / 2**20}


def stop(process: subprocess.Popen[bytes], log: Path) -> None:
    """As Ctrl-C does. Raises `RunError` where it does not save and end."""
    process.send_signal(signal.SIGTERM)
    code = process.wait(STOP_LIMIT_S)
    if code != 128 + signal.SIGTERM:
        raise RunError(f"told to stop, the run ended with {code}: {log.read_text(encoding='utf-8')[-2000:]}")


def close(words: Sequence[str], step: int, log: Path) -> None:
    """The last steps, after which nothing is open. Raises `RunError` where the ledger does not add up."""
    with started([*words, f"loop.steps={step + LAST_STEPS}", "--resume"], log) as (process, _):
        if process.wait(END_LIMIT_S):
            raise RunError(f"the resume failed: {log.read_text(encoding='utf-8')[-2000:]}")


def summary(
    seen: Watched, metrics: Sequence[Mapping[str, Any]], events: Sequence[dict[str, Any]], ledger: str
) -> dict[str, Any]:
    """Both stretches side by side, and the targets."""
    begin, turn, end = seen.marks
    alone, struck = stretch(metrics, begin, turn), stretch(metrics, turn, end)
    useful_s = sum(min(line[STEP_S], alone["step_s"]) for line in between(metrics, turn, end))
    share = struck["tokens_per_s"] / alone["tokens_per_s"]
    memory = {kind: growth([one[kind] for one in seen.memory]) for kind in ("controller", "all", "shm")}
    during = [event for event in events if turn.seconds < at(event) <= end.seconds]
    back = Counter(event["kind"] for event in during if event["kind"] in BACK)
    return {
        "alone": alone,
        "struck": struck,
        "throughput": share,
        "effective": useful_s / struck["seconds"],
        "kills": [{"after_s": when - turn.seconds, "name": name} for when, name in seen.kills],
        "losses_told": len(losses(during)),
        "respawned": back["returned"],
        "rebuilt": back["rebuilt"],
        "memory_mib": memory,
        "memory": seen.memory,
        "ledger": ledger,
        "reached": {
            "throughput": share >= THROUGHPUT,
            "memory": memory["all"]["growth"] <= GROWTH,
            "nothing lost": "0 in flight, 0 lost, 0 used twice" in ledger,
        },
    }


def between(metrics: Sequence[Mapping[str, Any]], begin: Mark, end: Mark) -> list[Mapping[str, Any]]:
    """The steps that were kept. Raises `RunError` where there are none."""
    found = [line for line in metrics if begin.step < line["step"] <= end.step]
    if not found:
        raise RunError(f"no step was made in {end.seconds - begin.seconds:.0f} s")
    return found


def stretch(metrics: Sequence[Mapping[str, Any]], begin: Mark, end: Mark) -> dict[str, float]:
    """Steps and tokens by the clock on the wall; of a step that was made twice the last one counts.

    `step_s`: the median; where it differs between the stretches, the machine had other work in one of them.
    """
    found, seconds = between(metrics, begin, end), end.seconds - begin.seconds
    tokens = sum(line[TOKENS] for line in found)
    step_s = statistics.median(line[STEP_S] for line in found)
    return {"seconds": seconds, "steps": len(found), "tokens_per_s": tokens / seconds, "step_s": step_s}


def growth(values: Sequence[float]) -> dict[str, float]:
    """Medians of the first and the last quarter: processes come and go."""
    part = max(1, len(values) // 4)
    first, last = statistics.median(values[:part]), statistics.median(values[-part:])
    return {"first": first, "last": last, "growth": last / first - 1 if first else 0.0}


def table(result: Mapping[str, Any]) -> str:
    """For people."""
    names = Counter(one["name"] for one in result["kills"])
    met = {name: "reached" if held else "missed" for name, held in result["reached"].items()}
    found = [f"{'':<16}{'seconds':>9}{'steps':>8}{'tokens/s':>11}{'a step, s':>11}"]
    found += [
        f"{name:<16}{one['seconds']:>9.0f}{one['steps']:>8}{one['tokens_per_s']:>11.1f}{one['step_s']:>11.2f}"
        for name, one in (("without faults", result["alone"]), ("with faults", result["struck"]))
    ]
    found += [
        f"killed: {', '.join(f'{name} {count} times' for name, count in sorted(names.items())) or 'nobody'}; "
        f"started again: {result['respawned']}, ranks rebuilt: {result['rebuilt']}",
        f"throughput: {result['throughput']:.2f} of that without faults, at least {THROUGHPUT:g} asked, "
        f"{met['throughput']}",
        f"effective training time: {100 * result['effective']:.0f}% of the time with faults",
    ]
    for kind, one in result["memory_mib"].items():
        found.append(f"memory, {kind}: {one['first']:.0f} MiB at first, {one['last']:.0f} MiB at the end")
    found.append(f"growth of all: {100 * result['memory_mib']['all']['growth']:.1f}%, at most {100 * GROWTH:g}% asked, "
                 f"{met['memory']}")  # fmt: skip
    found.append(f"ledger: {result['ledger']}, {met['nothing lost']}")
    return "\n".join(found)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises `InputError`."""
    parser = Parser(prog="rlhf-dist bench soak", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=at_least(1), default=30, help="with faults (30)")
    parser.add_argument("--every", type=at_least(10), default=120, help="seconds between two kills (120)")
    parser.add_argument("--quiet", type=at_least(10), default=180, help="seconds without faults before (180)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the moments and the processes (0)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"soak-{stamp}.json", help="JSON file")
    return parser.parse_args(list(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
