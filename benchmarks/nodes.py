"""`rlhf-dist bench nodes`: tokens a second on three nodes, beside one node of as many CPUs.

The nodes are network namespaces of this machine (`launch/netns_cluster.sh`, which requires root), so both sides have
the same cores, and what differs is what crosses a network: weights, tokens and calls.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _processes import ROOT
from step import HERE, at_least, machine_facts, save

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.errors import RunError

TARGET_SHARE = 0.8
"""At least."""
NODES = 3
LIMIT_S = 600.0
KEYS = (
    *("cluster.colocate=false", "rollout.workers=2", "rollout.cpus=1", "learner.cpus=1", "telemetry.wandb=off"),
    *("eval.prompts=16", "eval.samples=0", "eval.every=0", "cluster.device=cpu"),
)
"""One CPU for the learner and one for each of two rollout workers."""


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where the target is missed. Raises `RlhfError`."""
    args = parse(argv)
    sides: dict[str, list[list[dict[str, Any]]]] = {"three": [], "one": []}
    with tempfile.TemporaryDirectory(prefix="rlhf-bench-") as folder:
        for run in range(args.runs):  # in turn, so that both see the same machine
            for side, nodes in (("three", NODES), ("one", 1)):
                print(f"run {run + 1} of {args.runs} on {side}", file=sys.stderr, flush=True)
                sides[side].append(metrics_of(Path(folder), f"{side}-{run}", nodes, args.steps))
    result = summary(sides)
    print(table(result))
    save(args.out, result | {"machine": machine_facts()})
    return 0


def metrics_of(folder: Path, name: str, nodes: int, steps: int) -> list[dict[str, Any]]:
    """Lines of the steps but the first, which warms up. Raises `RunError`."""
    script, bin_folder = ROOT / "launch" / "netns_cluster.sh", Path(sys.executable).parent
    train = [str(bin_folder / "rlhf-dist"), "train", str(ROOT / "configs" / "reverse.yaml"), *KEYS]
    words = [*train, f"loop.steps={steps}", f"output={folder}", f"name={name}"]
    own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [str(script), "--nodes", str(nodes), "--cpus", str(NODES // nodes), *words],
        env=own | {"RAY": str(bin_folder / "ray"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise RunError(f"the run on {nodes} nodes failed: {(done.stderr or done.stdout).strip()[-1000:]}")
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["step"] > 1]


def summary(sides: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """Tokens a second of each run, and the quotient of the medians."""
    rates = {
        side: [
            sum(step["rollout/response_tokens"] for step in run) / sum(step["time/step"] for step in run)
            for run in runs
        ]
        for side, runs in sides.items()
    }
    middle = {side: statistics.median(found) for side, found in rates.items()}
    share = middle["three"] / middle["one"]
    return {"tokens_per_s": middle, "share": share, "reached": {"share": share >= TARGET_SHARE}, "runs": rates}


def table(result: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"{side + (' nodes' if side == 'three' else ' node'):<14}{result['tokens_per_s'][side]:>8.0f} tokens/s"
             for side in ("three", "one")]  # fmt: skip
    met = "reached" if result["reached"]["share"] else "missed"
    return "\n".join([*lines, f"three / one = {result['share']:.2f}; at least {TARGET_SHARE:g} asked, {met}"])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises `InputError`."""
    parser = Parser(prog="rlhf-dist bench nodes", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=at_least(2), default=8, help="of each run; the first does not count")
    parser.add_argument("--runs", type=at_least(1), default=2, help="of each side, in turn; the median counts")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"nodes-{stamp}.json", help="JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
