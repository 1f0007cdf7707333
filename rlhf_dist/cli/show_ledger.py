"""`rlhf-dist ledger`: what became of the groups and tokens of a run; changes nothing in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rlhf_dist.cli import arguments
from rlhf_dist.errors import RunError


def run(argv: Sequence[str]) -> int:
    """Print what a run's ledger adds up to; returns the exit code. Raises RunError where it does not add up."""
    parser = arguments.Parser(
        prog="rlhf-dist ledger",
        usage="rlhf-dist ledger RUN [--json]",
        description="What became of every group and token of a run of `train`: of one that has ended, that was "
        "interrupted, or that is under way. With loop.witness also what its optimizer has shown. Only reads.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="run directory, as in runs/my/grpo")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.closing = "Exit code 0: it adds up; 1: it does not; 2: no ledger that can be read."
    args = parser.parse_args(list(argv))
    from rlhf_dist.loop.ledger_report import report_of

    report = report_of(Path(args.run))
    print(json.dumps(report.facts(), indent=2) if args.json else "\n".join(report.lines()))
    if report.problem:
        raise RunError(f"{report.problem}. The ledger does not add up")
    return 0
