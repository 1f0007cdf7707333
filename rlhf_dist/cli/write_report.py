"""`rlhf-dist report`: the HTML report of a run or of a pipeline, written again from its directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_dist.cli import arguments


def run(argv: Sequence[str]) -> int:
    """Write `report.html` into the directory that is named; returns the exit code."""
    parser = arguments.Parser(
        prog="rlhf-dist report",
        usage="rlhf-dist report RUN",
        description="Write report.html into the directory of a run, or of a pipeline: what was run, results before and "
        "after, curves, answers side by side, the reward model's calibration, over-optimisation, faults and ledger. A "
        "run and a pipeline write it at their end; this writes it again, also for one that failed or is under way.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="directory of a run or a pipeline, as in runs/my/grpo or runs/my")
    parser.closing = "The page needs no network and runs no script. Nothing else in the directory is changed."
    args = parser.parse_args(list(argv))
    from rlhf_dist.loop.html_report import write_report

    print(f"report: {write_report(Path(args.run))}")
    return 0
