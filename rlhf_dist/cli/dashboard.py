"""`rlhf-dist dashboard`: a saved wandb workspace for a run's project."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_dist.cli import arguments
from rlhf_dist.errors import DataError, InputError


def run(argv: Sequence[str]) -> int:
    """Make a workspace of the panels that a run has metrics for; returns the exit code."""
    parser = arguments.Parser(
        prog="rlhf-dist dashboard",
        usage="rlhf-dist dashboard RUN [--dry-run]",
        description="Save a wandb workspace in the run's project: panels for what the run has logged.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="run directory, as in runs/my/grpo")
    parser.add_argument("--dry-run", action="store_true", help="print sections and panels, and save nothing")
    parser.closing = "docs/dashboards.md explains what a run logs, and where."
    args = parser.parse_args(list(argv))
    from rlhf_dist.loop.saved_config import saved_config
    from rlhf_dist.telemetry.report import read_metrics
    from rlhf_dist.telemetry.sinks import METRICS_FILE
    from rlhf_dist.telemetry.workspace import require_wandb, save, sections_of

    folder = Path(args.run)
    if not (folder / METRICS_FILE).is_file():
        raise InputError(f"{folder}: not a run directory with a {METRICS_FILE}; name one, as in runs/my/grpo")
    sections = sections_of(read_metrics(folder / METRICS_FILE))
    if not sections:
        raise DataError(f"{folder / METRICS_FILE}: no step has been logged yet; there is nothing to show")
    config = saved_config(folder / "config.yaml")
    project, entity = (str(config.get(f"telemetry.{key}") or default) for key, default in DEFAULTS)
    if args.dry_run:
        for section in sections:
            print(f"{section.title}\n" + "\n".join(f"  {p.title}: {', '.join(p.metrics)}" for p in section.plots))
        return 0
    require_wandb()
    print(save(entity, project, sections))
    offline = sorted(str(path) for path in (folder / "wandb").glob("offline-run-*"))
    if offline:
        print(f"parts of the run were logged offline: upload them with `wandb sync {' '.join(offline)}`")
    return 0


DEFAULTS = (("project", "rlhf-dist"), ("entity", ""))
"""Key of `telemetry` -> its value where the saved config lacks it."""
