"""`rlhf-dist pipeline`: several runs in order, each from what the earlier ones left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_dist.cli import arguments
from rlhf_dist.errors import InputError

if TYPE_CHECKING:
    from rlhf_dist.config.pipeline_checks import Stage


def run(argv: Sequence[str]) -> int:
    """Run the config's stages; the same call again skips what is complete and goes on where it was cut."""
    parser = arguments.config_parser(
        "pipeline", "The config's pipeline.stages in order; what is complete is skipped, what was cut is resumed."
    )
    arguments.add_dry_run(parser)
    args = arguments.parse(parser, argv)
    if not args.words or ("=" in args.words[0] and not Path(args.words[0]).exists()):
        raise InputError("pipeline needs a config file first: rlhf-dist pipeline CONFIG.yaml [key=value ...]")
    from rlhf_dist.config.pipeline_checks import held_back, load_stages

    stages = load_stages(Path(args.words[0]), args.words[1:])
    notes = held_back(stages, args.words[1:])
    if args.dry_run:
        return dry_run(stages, notes)
    for note in notes:
        print(f"note: {note}")
    from rlhf_dist.cluster import session

    session.prepare(stages[0].config.cluster)
    from rlhf_dist.cluster.pipeline import pipeline

    pipeline(stages)
    return 0


def dry_run(stages: Sequence[Stage], notes: Sequence[str]) -> int:
    """Print each stage's resolved config as a YAML document, with what would be done and the plan as comments."""
    for note in notes:
        print(f"# note: {note}")
    for number, (stage, action) in enumerate(zip(stages, foresee(stages), strict=True), start=1):
        print(f"---\n# stage {number} of {len(stages)}, {stage.name} ({stage.command}): {action}")
        arguments.print_dry_run(stage.config, stage.command)
    return 0


def foresee(stages: Sequence[Stage]) -> list[str]:
    """What would be done with each stage now, as far as it can be known before the earlier ones have run."""
    from rlhf_dist.loop.pipeline import Finished, basis_of, decide, read_finished

    finished: dict[str, Finished] = {}
    actions = []
    for stage in stages:
        waits = [name for name in stage.needs if name not in finished]
        if waits:
            actions.append(f"run {stage.path} after {', '.join(waits)}")
            continue
        decision = decide(stage, basis_of(stage, finished))
        actions.append(decision.text(stage))
        record = read_finished(stage.path) if decision.kind == "skip" else None
        if record is not None:
            finished[stage.name] = record
    return actions
