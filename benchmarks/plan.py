"""`rlhf-dist bench plan`: the plan's memory of a learner rank against the tensors of real ranks under DeepSpeed.

Models of 3, 25 and 135 million parameters with random weights, each in a few settings. What is held between steps and
the peak of a step of two micro-batches are measured on every rank; the largest counts.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from step import HERE, machine_facts, save, work_folder

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.config.schema import LearnerConfig
from rlhf_dist.errors import RunError
from rlhf_dist.planning.memory import held_by_host, held_by_rank, learner_memory
from rlhf_dist.planning.shape import ModelShape, gated

TARGET = 0.15
"""How far the plan may be off."""
LIMIT_S = 240.0
CHUNK = 1024
SHAPES: Mapping[str, ModelShape] = {
    "3M": gated(4, 256, 768, 8, 4, 102, tied=True, bias=True),
    "25M": gated(8, 512, 1536, 8, 4, 102, tied=True, bias=True),
    "135M": gated(30, 576, 1536, 9, 3, 49152, tied=True, bias=True),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One setting."""

    model: str
    dtype: str
    ranks: int
    zero_stage: int
    checkpointing: bool
    micro_batch_tokens: int
    sequence_tokens: int
    offload: str = "none"


CASES = (
    Case("3M", "float32", 1, 0, False, 2048, 256),
    Case("3M", "bfloat16", 2, 3, False, 2048, 64),
    Case("25M", "float32", 1, 0, False, 2048, 256),
    Case("25M", "float32", 2, 1, False, 1024, 256),
    Case("25M", "float32", 2, 2, True, 2048, 512),
    Case("25M", "bfloat16", 1, 1, False, 2048, 256),
    Case("25M", "bfloat16", 2, 2, False, 1024, 512),
    Case("25M", "bfloat16", 2, 3, False, 2048, 256),
    Case("25M", "bfloat16", 2, 2, False, 1024, 256, "optimizer"),
    Case("25M", "bfloat16", 2, 3, False, 1024, 256, "optimizer"),
    Case("135M", "bfloat16", 1, 1, True, 2048, 256),
    Case("135M", "bfloat16", 2, 3, True, 1024, 256),
    Case("135M", "float32", 1, 0, True, 1024, 128),
)


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where the target is missed. Raises `RlhfError`."""
    args = parse(argv)
    chosen = [case for case in CASES if args.model in ("all", case.model)]
    rows = []
    with work_folder() as folder:
        for case in chosen:
            print(f"measuring {title(case)} ...", file=sys.stderr, flush=True)
            rows.append(compared(case, measured(case, folder)))
    print(table(rows))
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(f"farthest from what was measured: {worst:.1%} (at most {TARGET:.0%} asked)")
    save(args.out, {"rows": rows, "reached": {"memory": worst <= TARGET}, "machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench plan",
        usage="rlhf-dist bench plan [--model all|3M|25M|135M] [--out FILE]",
        description="The plan's memory of a learner rank against the tensors of real ranks.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", choices=("all", *SHAPES), default="all", help="cases of this size only (all)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"plan-{stamp}.json", help="JSON to write")
    return parser.parse_args(list(argv))


def measured(case: Case, folder: Path) -> dict[str, int]:
    """Bytes of the rank that has most. Raises `RunError` where a rank fails."""
    model = folder / case.model
    if not model.exists():
        shape = folder / f"{case.model}.json"
        shape.write_text(json.dumps(asdict(SHAPES[case.model])), encoding="utf-8")
        wait([start(["make", str(shape), str(model)], folder / "make.log")], folder / "make.log")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    work = folder / "work.json"
    given = asdict(case) | {"model": str(model), "chunk_tokens": CHUNK, "port": port}
    work.write_text(json.dumps(given), encoding="utf-8")
    log = folder / "rank.log"
    wait([start([str(work), str(rank)], log) for rank in range(case.ranks)], log)
    found = [json.loads(Path(f"{work}.{rank}").read_text(encoding="utf-8")) for rank in range(case.ranks)]
    return {name: max(one[name] for one in found) for name in ("held", "peak")}


def start(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """One process of `_learner_memory.py`."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, str(HERE / "_learner_memory.py"), *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def wait(processes: Sequence[subprocess.Popen[bytes]], log: Path) -> None:
    """Until all have ended. Raises `RunError` where one fails or takes too long."""
    try:
        for process in processes:
            if process.wait(LIMIT_S):
                end = log.read_text(encoding="utf-8", errors="replace")[-1500:]
                raise RunError(f"a measured rank ended with exit code {process.returncode}:\n{end}")
    except subprocess.TimeoutExpired as error:
        raise RunError(f"a measured rank did not end in {LIMIT_S:g} s") from error
    finally:
        for process in processes:
            process.kill()
            process.wait()


def compared(case: Case, found: Mapping[str, int]) -> dict[str, Any]:
    """The case, what was measured, and the plan's."""
    shape = SHAPES[case.model]
    learner = LearnerConfig(
        zero_stage=case.zero_stage,
        micro_batch_tokens=case.micro_batch_tokens,
        logprob_chunk_tokens=CHUNK,
        offload=case.offload,  # pyright: ignore[reportArgumentType]
    )
    planned = learner_memory(shape, learner, case.dtype, case.ranks, case.checkpointing, "cpu", case.sequence_tokens)
    offloaded = case.offload == "optimizer"
    held = sum(held_by_rank(shape, case.zero_stage, case.dtype, case.ranks, offloaded).values())
    there = held_by_host(shape, case.zero_stage, case.dtype, case.ranks, False) if offloaded else 0
    return asdict(case) | {
        "held": {"measured": found["held"], "plan": held + there},
        "peak": {"measured": found["peak"], "plan": planned.total + there},
        "ratio": (planned.total + there) / found["peak"],
    }


def title(case: Case) -> str:
    """`25M bfloat16, 2 ranks, ZeRO-3`."""
    ranks = f"{case.ranks} rank{'s' if case.ranks > 1 else ''}"
    how = (", recomputed" if case.checkpointing else "") + (", offloaded" if case.offload == "optimizer" else "")
    return f"{case.model} {case.dtype}, {ranks}, ZeRO-{case.zero_stage}{how}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the command prints."""
    heads = ("held, MB", "plan", "peak, MB", "plan", "plan / peak")
    lines = [" " * 44 + "".join(head.rjust(12) for head in heads)]
    for row in rows:
        case = Case(**{name: row[name] for name in Case.__slots__})
        numbers = (row[part][whose] / 1e6 for part in ("held", "peak") for whose in ("measured", "plan"))
        lines.append(title(case).ljust(44) + "".join(f"{number:12.0f}" for number in numbers) + f"{row['ratio']:12.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
