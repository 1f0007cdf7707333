"""`rlhf-dist bench load`: a whole push on one node, learner to serving engine, over one copy of as many bytes.

A model of 0.5B's shape with random bfloat16 weights: the learner writes and hashes, an engine hashes and loads, and the
receipt is compared. Then several engines load each version at once: what that costs an engine in CPU seconds. With
`weights.transport=broadcast` or `ipc` the learner hashes, and sends while the engines load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

from _arguments import canonical_arguments
from _canonical import canonical_config, write_config
from step import HERE, OPENMP, machine_facts, run_process, save, work_folder

from rlhf_dist.cluster.spec import ENGINE_MALLOC, TUNABLES
from rlhf_dist.errors import RunError

SHAPE = {"hidden_size": 896, "intermediate_size": 4864, "layers": 24, "heads": 14, "kv_heads": 2}
"""Of the Qwen2 models with 0.5B parameters."""
ENTRIES = 151_936
"""Of their vocabulary; with tied embeddings."""
SETS = ("model.dtype=bfloat16", "learner.zero_stage=1")
UNCOUNTED = 2
"""Rounds in which memory is touched for the first time: as many as there are buffers."""
LIMIT_S = 300.0
"""For an answer of a process, the start of several engines included."""
TARGET_COPIES, TARGET_CPU = 8.0, 1.1
"""At most: a push over one copy; CPU seconds of one of several engines over those of one alone."""


class Side:
    """A process that answers a line with a line."""

    def __init__(self, kind: str, path: Path, threads: int, log: Path) -> None:
        self._name = kind
        malloc = {TUNABLES: ENGINE_MALLOC} if kind == "engine" else {}  # as in the product, the user's stays
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "_load_side.py"), kind, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=malloc | os.environ | OPENMP | {"OMP_NUM_THREADS": str(threads)},
            )
        self._log = log

    def ask(self, **told: Any) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next line that is an answer; libraries print too. Raises `RunError`, also beyond the limit."""
        assert self._process.stdout is not None
        limit = Timer(LIMIT_S, self._process.kill)
        limit.start()
        try:
            for line in self._process.stdout:
                if line.startswith("{"):
                    return json.loads(line)
        finally:
            limit.cancel()
        end = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RunError(f"the {self._name} of the benchmark ended; the end of its log {self._log}:\n{end}")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(60)


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where a target is missed. Raises `RlhfError`."""
    args = parse(argv)
    with work_folder() as folder:
        words = [*(f"model.tiny.{name}={size}" for name, size in SHAPE.items()), *args.words, *SETS]
        config = canonical_config(folder, "grpo", words, 1)
        rollout = replace(config.rollout, max_concurrent=8, kv_cache_gib=0.125, cpus=args.threads)
        path = write_config(replace(config, rollout=rollout), folder)
        entries = [] if args.entries == 0 else [str(args.entries)]
        made = [sys.executable, str(HERE / "_canonical.py"), str(path), *entries]
        run_process(made, folder / "models.log", {})
        found = measure(path, args.engines, args.threads, args.rounds, folder)
    result = summary(found, args.engines)
    print(table(result))
    save(args.out, result | {"config": args.words, "threads": args.threads, "machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    return canonical_arguments(
        argv,
        "load",
        "A whole push on one node over one copy of as many bytes, and its CPU seconds with several engines.",
        {
            "rounds": (1, 7, "measured pushes"),
            "engines": (2, 4, "that load at once in the second part, with one thread each"),
            "threads": (1, 2, "of the learner, and of the engine in the first part"),
            "entries": (0, ENTRIES, "of the vocabulary; 0: as the tokenizer has"),
        },
        own={word.partition("=")[0]: "take it out" for word in SETS},
    )


def measure(path: Path, engines: int, threads: int, rounds: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each measured push took: to one engine with all threads, to the same with one, to all with one each."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ("fast", "alone", "together")}
    with ExitStack() as stack:
        learner, *others = (
            Side(kind, path, threads, folder / f"{kind}-{number}.log")
            for number, kind in enumerate(["learner", *["engine"] * engines])
        )
        for side in (learner, *others):
            stack.callback(side.close)
        for side in (learner, *others):
            side.answer()
        version = 0
        for number in range(UNCOUNTED + rounds):
            print(f"round {number + 1} of {UNCOUNTED + rounds}", file=sys.stderr, flush=True)
            for kind, asked, used in (("fast", others[:1], threads), ("alone", others[:1], 1), ("together", others, 1)):
                version += 1
                learner.ask(version=version, engines=len(asked))
                published = learner.answer()
                for side, announcement in zip(asked, published.pop("announcements"), strict=True):
                    side.ask(announcement=announcement, threads=used)
                learner.ask()
                found[kind].append(published | {"loads": [side.answer() for side in asked]})
                learner.answer()
    return {kind: pushes[UNCOUNTED:] for kind, pushes in found.items()}


def summary(found: Mapping[str, Sequence[Mapping[str, Any]]], engines: int) -> dict[str, Any]:
    """Medians over pushes, and what was asked."""
    speed = found["fast"]
    copy_s = min(push["copy_s"] for push in speed)
    publish_s = statistics.median(push["publish_s"] for push in speed)
    load_s = statistics.median(push["loads"][0]["load_s"] for push in speed)
    alone, together, copy_alone, copy_together = (
        statistics.median(load[figure] for push in found[kind] for load in push["loads"])
        for figure in ("cpu_s", "copies_cpu_s")
        for kind in ("alone", "together")
    )
    copies, cpu = (publish_s + load_s) / copy_s, together / alone
    return {
        "bytes": speed[0]["bytes"],
        "copy_s": copy_s,
        "publish_s": publish_s,
        "load_s": load_s,
        "copies": copies,
        "engines": engines,
        "cpu_alone_s": alone,
        "cpu_together_s": together,
        "cpu_ratio": cpu,
        "copy_cpu_ratio": copy_together / copy_alone,
        "kernel": {kind: kernel(found[kind]) for kind in ("alone", "together")},
        "runs": dict(found),
        "reached": {"copies": copies <= TARGET_COPIES, "cpu": cpu <= TARGET_CPU},
    }


def kernel(pushes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians of what the kernel does in a load."""
    loads = [load for push in pushes for load in push["loads"]]
    return {figure: statistics.median(load[figure] for load in loads) for figure in ("kernel_s", "faults")}


def table(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    return "\n".join(
        [
            f"{result['bytes'] / 1e9:.2f} GB; medians, ms: one copy {1e3 * result['copy_s']:.0f}, learner's write and "
            f"hashes {1e3 * result['publish_s']:.0f}, engine's hashes and load {1e3 * result['load_s']:.0f}",
            f"a push is {result['copies']:.1f} copies (at most {TARGET_COPIES:g} asked)",
            f"CPU seconds of an engine with one thread: alone {result['cpu_alone_s']:.3f}, one of "
            f"{result['engines']} at once {result['cpu_together_s']:.3f}: {result['cpu_ratio']:.2f} times (at most "
            f"{TARGET_CPU:g} asked); of plain copies {result['copy_cpu_ratio']:.2f} times",
            "the kernel's part of them, and page faults: "
            + ", ".join(
                f"{kind} {one['kernel_s']:.3f} s, {one['faults']:.0f}" for kind, one in result["kernel"].items()
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
