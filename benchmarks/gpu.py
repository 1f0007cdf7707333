"""`rlhf-dist bench gpu`: the first ten minutes on a GPU, as a list of checks that each pass, fail or are skipped.

The checks run in processes of their own (`_gpu_*.py`), each within a limit. What a check found is printed and saved as
soon as it ends, and one that fails, hangs or kills its process does not keep the next from running. On a CPU the same
checks run with a tiny model; what needs a GPU is skipped by name. The learner's part needs neither vLLM nor Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _canonical import canonical_config, require_overrides, write_config
from _gpu_run import PREFIX, TRANSPORTS
from _gpu_side import AFTER_AN_ERROR, Told, Work, read_told
from _processes import MARK, processes
from load import ENTRIES, SHAPE
from step import HERE, OPENMP, at_least, machine_facts, run_process, save, work_folder

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.config.checks import check
from rlhf_dist.config.schema import Config, RewardSpec
from rlhf_dist.errors import InputError
from rlhf_dist.planning.placement import local_machine

EVERYWHERE = (
    *("model.dtype=bfloat16", "learner.zero_stage=1", "learner.optimizer.lr=1e-5", "loop.logprob_diff_limit=0.5"),
    *("rollout.max_prompt_tokens=64", "eval.prompts=4"),
)
ON_GPU = (
    *(f"model.tiny.{name}={size}" for name, size in SHAPE.items()),
    *("rollout.enforce_eager=false", "rollout.max_concurrent=256", "rollout.gpu_memory_utilization=0.5"),
    *("learner.micro_batch_tokens=4096", "loop.prompts_per_step=16", "cluster.start_timeout_s=240"),
)
ON_CPU = (
    *("model.tiny.hidden_size=256", "model.tiny.intermediate_size=768", "model.tiny.layers=4"),
    *("rollout.kv_cache_gib=0.125", "rollout.max_response_tokens=64", "rollout.max_concurrent=32"),
)
REWARD = RewardSpec(kind="regex", pattern=".*[a-m02468]")
"""By the last character, so that responses of a random model differ too."""
POLL_S = 0.1
ROOM = 0.5
"""A check begins while so much of its limit is left of the whole time."""
LOG_LINES = 60
"""Saved with a check that failed."""
END_S = 20.0
"""For a process to end in order, with all that it started."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the list."""

    name: str
    part: str
    """Also the side that runs it: `_gpu_PART.py`."""
    limit_s: float
    """The first one in a process may take as long as the longest of its part."""
    expected: str


CHECKS = (
    Check("machine", "machine", 15, "driver 580 or newer, compute mode Default, /dev/shm, Python.h, free memory"),
    Check("imports", "machine", 90, "the pinned versions; vLLM's compiled part loads; torch finds the GPU"),
    Check("compile", "machine", 60, "torch.compile of a small function"),
    Check("attention", "learner", 90, "sequence by sequence in bfloat16: values and gradients as in float32"),
    Check("varlen", "learner", 45, "flash attention over packed rows: the same, and not slower"),
    Check("bfloat16", "learner", 60, "logprobs of the learner in bfloat16: as in float32"),
    Check("step", "learner", 45, "the loss falls; a quarter of a lone product's rate at least"),
    Check("memory", "learner", 45, "what a rank holds, and its peak, within 15% of the plan"),
    Check("engine", "engine", 180, "vLLM starts and samples"),
    Check("parity", "engine", 45, "logprobs of vLLM, learner and float32 agree"),
    Check("push", "engine", 45, "weights through shared memory: receipts, and logprobs that follow"),
    Check("sleep", "engine", 45, "memory is given back; the same tokens afterwards, with the logprobs of float32"),
    *(Check(PREFIX + name, "run", 240, "GRPO: steps, receipts, flat logprob difference") for name in TRANSPORTS),
)
PARTS = tuple(dict.fromkeys(check.part for check in CHECKS))

Tell = Callable[[Check, Told, float], None]
"""A check, what it found, and its seconds."""


def main(argv: Sequence[str]) -> int:
    """Run the checks, print and save each; returns 1 where one failed. Raises `RlhfError`."""
    args = parse(argv)
    ends = time.monotonic() + 60 * args.minutes
    print(f"{len(args.only)} checks on {args.device}, at most {args.minutes} minutes", flush=True)
    with work_folder() as folder:
        listed = Listed(args, folder)
        work = prepared(args, folder)
        for part in PARTS:
            run_part(work, part, [one for one in args.only if one.part == part], ends, listed.add)
    counts = listed.counts()
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    listed.write(complete=True)
    return int("FAIL" in counts)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench gpu",
        usage="rlhf-dist bench gpu [--device NAME] [--only NAME,NAME] [--model DIR] [--minutes N] [--steps N] "
        "[--out FILE] [key=value ...]",
        description="The checks for the first ten minutes on a GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys set over the benchmark's config")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda with a GPU")
    parser.add_argument("--only", type=chosen, default=list(CHECKS), help=f"parts or checks: {', '.join(PARTS)} (all)")
    parser.add_argument("--model", type=Path, help="Hugging Face directory; else random weights of model.tiny's sizes")
    parser.add_argument("--minutes", type=at_least(1), default=10, help="for all checks together (10)")
    parser.add_argument("--steps", type=at_least(2), default=5, help="of each run (5)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"gpu-{stamp}.json", help="JSON to write")
    args = parser.parse_intermixed_args(list(argv))
    require_overrides(args.words)
    gpus = local_machine().gpus
    if args.device == "cuda" and not gpus:
        raise InputError("--device cuda: nvidia-smi lists no GPU here; use --device cpu, or see docs/gpu.md")
    if args.device == "auto":
        args.device = "cuda" if gpus else "cpu"
    if args.model is not None and not (args.model / "config.json").exists():
        raise InputError(f"--model {args.model}: has no config.json; give a Hugging Face directory")
    return args


def chosen(text: str) -> list[Check]:
    """The checks that `machine,memory` names, in the list's order."""
    wanted = [name.strip() for name in text.split(",")]
    known = {*PARTS, *(one.name for one in CHECKS)}
    for name in wanted:
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"there is no part or check {name!r}; parts: {', '.join(PARTS)}; checks: "
                f"{', '.join(one.name for one in CHECKS)}"
            )
    return [one for one in CHECKS if one.part in wanted or one.name in wanted]


def prepared(args: argparse.Namespace, folder: Path) -> Work:
    """The config of all checks, and a model where none is given. Raises `RlhfError`."""
    on_gpu = args.device == "cuda"
    words = [*EVERYWHERE, *(ON_GPU if on_gpu else ON_CPU), f"cluster.device={args.device}", *args.words]
    config: Config = canonical_config(folder, "grpo", words, args.steps)
    config = replace(config, scoring=replace(config.scoring, rewards={"last": REWARD}))
    if args.model is not None:
        config = replace(config, model=replace(config.model, path=str(args.model.resolve())))
    path = write_config(config, folder)
    check(config, "train")
    if args.model is None:
        made = [sys.executable, str(HERE / "_canonical.py"), str(path), *([str(ENTRIES)] if on_gpu else [])]
        run_process(made, folder / "models.log", {})
    return Work(str(path), args.device, str(folder), str(folder / "told.jsonl"))


class Listed:
    """What was found so far, printed and saved check by check."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """`folder`: of the logs, whose end is saved with what failed."""
        self._args = args
        self._folder = folder
        self._machine = machine_facts()
        self._rows: list[dict[str, Any]] = []

    def add(self, one: Check, told: Told, seconds: float) -> None:
        """One more."""
        print(line(one, told, seconds), flush=True)
        row = asdict(told) | {"expected": one.expected, "seconds": seconds, "limit_s": one.limit_s}
        if told.status == "FAIL":
            row["log"] = log_lines(self._folder)[-LOG_LINES:]
        self._rows.append(row)
        self.write(complete=False)

    def counts(self) -> dict[str, int]:
        """How many passed, failed, were skipped; those that there are."""
        found = [row["status"] for row in self._rows]
        return {status: found.count(status) for status in ("PASS", "FAIL", "SKIPPED") if status in found}

    def write(self, complete: bool) -> None:
        """Save all; of a list that was cut off, what it had."""
        args = self._args
        result = {
            "complete": complete,
            "device": args.device,
            "model": None if args.model is None else str(args.model),
            "config": args.words,
            "minutes": args.minutes,
            "checks": self._rows,
            "machine": self._machine,
        }
        if complete:
            save(args.out, result)
            return
        args.out.parent.mkdir(parents=True, exist_ok=True)
        beside = args.out.with_suffix(".part")
        beside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        beside.replace(args.out)


def line(one: Check, told: Told, seconds: float) -> str:
    """What is printed of a check."""
    first, *more = told.why.replace("; ", "\n").splitlines() or [""]
    lines = [f"{told.status:<8}{one.name:<20}{seconds:6.1f} s  {first}"]
    more += [f"not here: {text}" for text in told.without]
    return "\n".join([*lines, *(f"{'':<38}{text}" for text in more)])


def run_part(work: Work, part: str, checks: Sequence[Check], ends: float, tell: Tell) -> None:
    """The checks of one part, in a process; in another one after each that ended its process."""
    left = list(checks)
    while left:
        left[0] = with_start(left[0])
        if ends - time.monotonic() < ROOM * left[0].limit_s:
            one = left.pop(0)
            text = f"takes up to {one.limit_s:g} s, and {max(0.0, ends - time.monotonic()):.0f} s are left of --minutes"
            tell(one, Told(one.name, "SKIPPED", text), 0.0)
            continue
        with started(work, part, left) as process:
            watch(process, work, left, ends, tell)


def with_start(one: Check) -> Check:
    """As the first one in a process: what starts there, an engine say, may take as long as in the part's longest."""
    limits = [other.limit_s for other in CHECKS if other.part == one.part]
    return replace(one, limit_s=max([one.limit_s, *limits]))


def watch(process: subprocess.Popen[bytes], work: Work, left: list[Check], ends: float, tell: Tell) -> None:
    """Take from `left` what the process tells of, until it is to be ended, or has."""
    told_file, taken, since = Path(work.told), 0, time.monotonic()
    while left:
        one, over = left[0], process.poll()
        found, seconds = read_told(told_file, taken), time.monotonic() - since
        for told in found:
            tell(left.pop(0), told, seconds)
            taken, since, seconds = taken + 1, time.monotonic(), 0.0
        if found:
            if left and ends - since < ROOM * left[0].limit_s:
                return
        elif over == AFTER_AN_ERROR and taken:
            return
        elif over is not None:
            text = f"its process ended with exit code {over}: {end_of_log(work)}"
            tell(left.pop(0), Told(one.name, "FAIL", text), seconds)
            return
        elif time.monotonic() > ends:
            tell(left.pop(0), Told(one.name, "SKIPPED", "the time of --minutes ended while it ran"), seconds)
            return
        elif seconds > one.limit_s:
            text = f"not done in {one.limit_s:g} s: {end_of_log(work)}"
            tell(left.pop(0), Told(one.name, "FAIL", text), seconds)
            return
        else:
            time.sleep(POLL_S)


@contextmanager
def started(work: Work, part: str, checks: Sequence[Check]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs these checks; at the end it is ended, with whatever it has started."""
    given, mark = Path(work.folder, "work.json"), uuid.uuid4().hex
    given.write_text(json.dumps(asdict(work)), encoding="utf-8")
    Path(work.told).unlink(missing_ok=True)
    words = [sys.executable, str(HERE / f"_gpu_{part}.py"), str(given), *(one.name for one in checks)]
    with Path(work.folder, f"{part}.log").open("ab") as log:
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | OPENMP | {MARK: mark},
            cwd=HERE.parent,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            end(process, f"{MARK}={mark}")


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """First in order, as a run ends its own processes; then whatever of them is left."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    begun = time.monotonic()
    while time.monotonic() - begun < END_S and (process.poll() is None or any(processes(mark))):
        time.sleep(POLL_S)
    for folder, _ in processes(mark):
        with suppress(ProcessLookupError):
            os.kill(int(folder.name), signal.SIGKILL)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} was killed and has not ended in {END_S:g} s; it may hold a GPU", flush=True)


def log_lines(folder: Path) -> list[str]:
    """What the log that was written to last says; a part's, or that of a run which it has started."""
    logs = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
    text = logs[-1].read_text(encoding="utf-8", errors="replace") if logs else ""
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def end_of_log(work: Work) -> str:
    """Its last line."""
    return next(reversed(log_lines(Path(work.folder))), "its log is empty")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
