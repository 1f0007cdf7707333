"""`rlhf-dist bench logprobs`: logprobs and entropies in chunks, beside holding the logits of the whole batch.

Each side runs forward and backward through a trained head in processes of its own, in turns, and reports its time and
how far its memory rose. The other side is what plain PyTorch does: logits, log-softmax, gather, entropy, backward; it
lets go of the logits as soon as the log-softmax is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from step import HERE, OPENMP, at_least, machine_facts, run_process, save

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.config.schema import LearnerConfig
from rlhf_dist.errors import RunError

SIDES = ("held", "chunked")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**21)}
"""What is freed goes back at once, so that a peak is of what is held and not of what glibc keeps for later."""
TARGET_MEMORY, TARGET_TIME = 1 / 8, 1.4
"""At most; ours over the other."""
SAME = 1e-3
"""Relative difference of the sides' sums, above which they did not compute the same."""


@dataclass(frozen=True, slots=True)
class Size:
    """What is computed, float32."""

    tokens: int
    vocabulary: int
    hidden: int
    chunk: int
    """Tokens whose logits ours holds at once."""

    @property
    def logits_mib(self) -> float:
        """Of the whole batch."""
        return self.tokens * self.vocabulary * 4 / 2**20


FULL = Size(8192, 151_936, 896, LearnerConfig().logprob_chunk_tokens)
"""A head as that of Qwen2.5-0.5B."""
QUICK = Size(1024, 50_000, 64, 32)


@dataclass(frozen=True, slots=True)
class Side:
    """One run of one side."""

    forward_s: float
    backward_s: float
    cpu_s: float
    """Of all threads, in both."""
    peak_mib: float
    """How far the resident memory rose above what the weights, their inputs and the libraries take."""
    sums: Mapping[str, float]
    """Of logprobs, entropies and the head's gradient: both sides' are the same."""

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward_s + self.backward_s


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where a target is missed. Raises `RlhfError`."""
    args = parse(argv)
    size = Size(args.tokens, args.vocabulary, args.hidden, args.chunk)
    found: dict[str, list[Side]] = {side: [] for side in SIDES}
    for number in range(args.runs):
        for side in SIDES:
            found[side].append(run_side(side, size, args.out.with_suffix(f".{side}-{number}.log")))
    best = {side: min(runs, key=lambda run: run.seconds) for side, runs in found.items()}
    require_same(best)
    print(table(size, best))
    facts = {"size": asdict(size), "ratios": ratios(best), "runs": {s: [asdict(r) for r in found[s]] for s in SIDES}}
    save(args.out, facts | {"machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench logprobs",
        usage="rlhf-dist bench logprobs [--quick] [--tokens N] [--vocabulary N] [--hidden N] [--chunk N] [--runs N] "
        "[--out FILE]",
        description="Memory and time of logprobs and entropies with a trained head, in chunks and all at once.",
        epilog="At the full size the side that holds the logits takes 15 GB of memory; fewer --tokens take less.",
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="a small size, whose figures say little")
    for name, text in (("tokens", "of the batch"), ("vocabulary", "of the head"), ("hidden", "size of a hidden state"),
                       ("chunk", "learner.logprob_chunk_tokens")):  # fmt: skip
        parser.add_argument(f"--{name}", type=at_least(1), help=f"{text} ({getattr(FULL, name)})")
    parser.add_argument("--runs", type=at_least(1), default=2, help="of each side, of which the fastest counts (2)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"logprobs-{stamp}.json", help="JSON to write")
    args = parser.parse_args(list(argv))
    for name, value in asdict(QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def run_side(side: str, size: Size, log: Path) -> Side:
    """In a process of its own, whose last line is the result. Raises `RunError` with the log where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, HERE / "_logprobs_side.py", side, *asdict(size).values()]
    run_process([str(word) for word in words], log, OPENMP | MALLOC)
    result: dict[str, Any] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    log.unlink()
    return Side(**result)


def require_same(found: Mapping[str, Side]) -> None:
    """Raises `RunError` where the sides did not compute the same."""
    held, chunked = (found[side].sums for side in SIDES)
    for name, value in held.items():
        if not abs(chunked[name] - value) <= SAME * abs(value):
            raise RunError(f"the sides differ: {name} is {value:g} with the logits held, {chunked[name]:g} in chunks")


def ratios(found: Mapping[str, Side]) -> dict[str, float]:
    """Chunked over held."""
    held, chunked = (found[side] for side in SIDES)
    return {
        "memory": chunked.peak_mib / held.peak_mib,
        "time": chunked.seconds / held.seconds,
        "cpu": chunked.cpu_s / held.cpu_s,
    }


def table(size: Size, found: Mapping[str, Side]) -> str:
    """A line for each side, and what was asked."""
    lines = [
        f"{size.tokens} tokens x {size.vocabulary} words, hidden {size.hidden}, float32; the logits are "
        f"{size.logits_mib:,.0f} MiB, of a chunk of {size.chunk} {size.logits_mib * size.chunk / size.tokens:,.0f} MiB",
        f"{'':10}{'forward s':>11}{'backward s':>12}{'both s':>9}{'cpu s':>9}{'peak MiB':>11}",
    ]
    for side, run in found.items():
        lines.append(
            f"{side:10}{run.forward_s:11.2f}{run.backward_s:12.2f}{run.seconds:9.2f}{run.cpu_s:9.2f}{run.peak_mib:11,.0f}"
        )
    ratio = ratios(found)
    lines += [
        f"memory: {ratio['memory']:.3f} of the held logits'; at most {TARGET_MEMORY:.3f} is asked",
        f"time:   {ratio['time']:.2f} of theirs (cpu time {ratio['cpu']:.2f}); at most {TARGET_TIME:.2f} is asked",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
