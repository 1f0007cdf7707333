"""`rlhf-dist bench timeline`: a picture of who computes when, in turn and at once.

The canonical run with `loop.max_policy_lag` 0 and above it, one core for each half in both. Twenty times a second the
processor time of each of its processes is read from `/proc`: nothing in the run has to take part.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _arguments import BOTH_HALVES, canonical_arguments
from _canonical import canonical_config, write_config
from _processes import processes, started
from step import HERE, machine_facts, run_process, save, work_folder

from rlhf_dist.errors import RunError

APART = ("cluster.colocate=false",)
EVERY_S = 0.05
SMOOTH_S = 0.25
"""Width of the mean over time in the picture."""
TICKS = os.sysconf("SC_CLK_TCK")
SHOWN = {
    "RolloutHost": "rollout worker (vLLM)",
    "PolicyHost": "learner (DeepSpeed)",
    "ScoringHost": "scoring server",
    "CollatorHost": "collator",
    "controller": "controller",
    "Ray itself": "Ray itself",
}
"""Kind of process -> lane, from the top."""


@dataclass(slots=True)
class Watched:
    """What was seen of a run."""

    lanes: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Kind of process -> (time, processor seconds so far of all of that kind)."""
    ends: list[float] = field(default_factory=list)
    """When each training step was logged. Times in seconds, of one clock."""


def main(argv: Sequence[str]) -> int:
    """Run both, draw, save the JSON. Raises `RlhfError`."""
    args = parse(argv)
    sides = {"in turn": APART, "at once": (*APART, f"loop.max_policy_lag={args.lag}", "algo.ratio_to=behaviour")}
    found: dict[str, Watched] = {}
    with work_folder() as folder:
        for name, words in sides.items():
            print(name, file=sys.stderr, flush=True)
            config = canonical_config(folder, "grpo", [*args.words, *words], args.warmup + args.steps + args.lag + 1)
            path = write_config(config, folder)
            if not (folder / "model").exists():
                run_process([sys.executable, str(HERE / "_canonical.py"), str(path)], folder / "models.log", {})
            seen = watch(path, folder, name.replace(" ", "-"))
            # Without the end of the run, where nothing more is sampled, and its evaluation.
            found[name] = Watched(seen.lanes, seen.ends[: args.warmup + args.steps])
    shares = {name: summary(seen, args.warmup) for name, seen in found.items()}
    print(table(shares))
    save(args.out, {"lag": args.lag, "shares": shares, "config": args.words, "machine": machine_facts()})
    picture = args.out.with_suffix(".png")
    draw(found, args.warmup, args.lag, picture)
    print(f"drew {picture}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    return canonical_arguments(
        argv,
        "timeline",
        "A picture of who computes when, in turn and at once. Linux only.",
        {
            "lag": (1, 1, "loop.max_policy_lag"),
            "steps": (1, 4, "steps shown"),
            "warmup": (1, 2, "steps before them"),
        },
        own=BOTH_HALVES,
    )


def watch(config: Path, folder: Path, name: str) -> Watched:
    """One run. Raises `RunError` where it fails."""
    log, metrics = folder / f"{name}.log", folder / name / "metrics.jsonl"
    seen, members = Watched(), list[tuple[Path, str]]()
    with started(["train", str(config), f"name={name}"], log) as (process, mark):
        while process.poll() is None:
            time.sleep(EVERY_S)
            done, now = steps_done(metrics), time.monotonic()
            if done and not seen.ends:
                members = list(processes(mark))  # by now all have started; to look for them takes a while
            seen.ends += [now] * (done - len(seen.ends))
            for kind, seconds in used(members).items():
                seen.lanes.setdefault(kind, []).append((now, seconds))
    if process.returncode:
        raise RunError(f"the run ended with exit code {process.returncode}; its log: {log}")
    return seen


def steps_done(metrics: Path) -> int:
    """Training steps that have metrics."""
    if not metrics.exists():
        return 0
    return sum("time/step" in json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines())


def used(members: Sequence[tuple[Path, str]]) -> dict[str, float]:
    """Processor seconds so far by kind of process, all threads; one that has ended is left out."""
    found: dict[str, float] = {}
    for folder, kind in members:
        try:
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        found[kind] = found.get(kind, 0.0) + (int(fields[11]) + int(fields[12])) / TICKS
    return found


def summary(seen: Watched, warmup: int) -> dict[str, float]:
    """Cores in use by kind of process, mean over the steps after the first `warmup`."""
    begin, end = seen.ends[warmup - 1], seen.ends[-1]
    shares = {}
    for kind, points in seen.lanes.items():
        within = [point for point in points if begin <= point[0] <= end]
        shares[kind] = (within[-1][1] - within[0][1]) / (within[-1][0] - within[0][0]) if len(within) > 1 else 0.0
    return shares | {"step_s": (end - begin) / (len(seen.ends) - warmup)}


def table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """What the command prints."""
    kinds = [kind for kind in SHOWN if any(kind in of_side for of_side in shares.values())]
    kinds += sorted({kind for of_side in shares.values() for kind in of_side} - {*kinds, "step_s"})
    lines = ["cores in use".ljust(26) + "".join(name.rjust(12) for name in shares)]
    for kind in kinds:
        lines.append(SHOWN.get(kind, kind).ljust(26) + "".join(f"{s.get(kind, 0.0):12.2f}" for s in shares.values()))
    lines.append("seconds a step".ljust(26) + "".join(f"{s['step_s']:12.2f}" for s in shares.values()))
    return "\n".join(lines)


def draw(found: Mapping[str, Watched], warmup: int, lag: int, path: Path) -> None:
    """A row of lanes a run, on one scale of time; a lane's height is one core."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [kind for kind in SHOWN if any(kind in seen.lanes for seen in found.values())]
    figure = Figure(figsize=(11, 5.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rows: Any = figure.subplots(len(found), 1, sharex=True)
    for axes, (name, seen) in zip(np.atleast_1d(rows), found.items(), strict=True):
        begin = seen.ends[warmup - 1]
        for lane, kind in enumerate(reversed(kinds)):
            points = np.array(seen.lanes.get(kind, [(begin, 0.0), (begin + 1, 0.0)]))
            times = np.arange(begin, seen.ends[-1], EVERY_S)
            spent = np.interp(times + SMOOTH_S / 2, *points.T) - np.interp(times - SMOOTH_S / 2, *points.T)
            cores = np.clip(spent / SMOOTH_S, 0.0, 1.1)
            axes.fill_between(times - begin, lane, lane + 0.85 * cores, color=f"C{lane}", linewidth=0)
        for end in seen.ends[warmup - 1 :]:
            axes.axvline(end - begin, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(np.arange(len(kinds)) + 0.4, [SHOWN[kind] for kind in reversed(kinds)], fontsize=9)
        axes.set_ylim(-0.1, len(kinds))
        title = "in turn (loop.max_policy_lag 0)" if name == "in turn" else f"at once (loop.max_policy_lag {lag})"
        axes.set_title(f"{title}: a dotted line is the end of a step", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(rows)[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
