"""`rlhf-dist pipeline`: several runs in order, each from what the earlier ones left."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_dist.cli import arguments
from rlhf_dist.errors import InputError

if TYPE_CHECKING:
    from rlhf_dist.config.pipeline_checks import Stage

DESCRIPTION = """
The stages of the config's section pipeline.stages, in order, each from what the earlier ones left. They are the runs
OUTPUT/NAME/STAGE, as in runs/my/sft with name=my; without name= it is that of the file. At the end comes a table of all
models, also in OUTPUT/NAME/pipeline.txt. The same command again goes on by itself: what is complete is skipped,
what was cut is resumed from its newest checkpoint, and a stage that was made from something else runs anew, its earlier
run kept as STAGE.old-1, .old-2 and so on. key=value reaches every stage, STAGE:key=value that one alone.
"""


def run(argv: Sequence[str]) -> int:
    """Run the config's stages; the same call again skips what is complete and goes on where it was cut."""
    parser = arguments.config_parser("pipeline", DESCRIPTION)
    parser.closing = "Keys: docs/configuration.md, docs/pipeline.md"
    parser.add_argument(
        "--dry-run", action="store_true", help="what each stage would do, and its rewards; starts nothing"
    )
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = arguments.parse(parser, argv)
    if args.resume:
        raise InputError("a pipeline goes on by itself where it was cut: leave out --resume")
    if not args.words or arguments.is_override(args.words[0]):
        raise InputError("pipeline needs a config file first: rlhf-dist pipeline CONFIG.yaml [key=value ...]")
    from rlhf_dist.config.pipeline_checks import held_back, load_stages

    stages = load_stages(Path(args.words[0]), args.words[1:])
    for note in held_back(stages, args.words[1:]):
        print(f"note: {note}")
    if args.dry_run:
        return dry_run(stages)
    print(f"checking what the {len(stages)} stages of {args.words[0]} start from", flush=True)
    from rlhf_dist.cluster import session

    session.prepare(stages[0].config.cluster)
    with arguments.loading():
        from rlhf_dist.cluster.stage_runs import pipeline

    pipeline(stages)
    return 0


def dry_run(stages: Sequence[Stage]) -> int:
    """Print what would be done with each stage. Raises `ResourceError` where one does not fit on this machine."""
    from rlhf_dist.config.pipeline_checks import named
    from rlhf_dist.config.reward_words import reward_lines
    from rlhf_dist.planning.placement import local_machine

    machine = local_machine()
    for stage in stages:
        with named(stage):
            arguments.plan_lines(stage.config, machine, stage.command)
    for number, (stage, action) in enumerate(zip(stages, foresee(stages), strict=True), start=1):
        print(f"stage {number} of {len(stages)}, {stage.name}: {action}")
        for line in reward_lines(stage.config) if stage.command == "train" else ():
            print(f"  {line}")
    return 0


def foresee(stages: Sequence[Stage]) -> list[str]:
    """What would be done with each stage now, as far as it can be known before the earlier ones have run."""
    from rlhf_dist.config.pipeline_checks import named
    from rlhf_dist.loop.stages import Basis, Finished, aside, basis_of, decide, listed, read_finished

    not_yet = Finished(Basis("", {}, {}), "", {}, 0)
    finished: dict[str, Finished] = {}
    actions = []
    for stage in stages:
        waits = [name for name in stage.needs if name not in finished]
        with named(stage):
            decision = decide(stage, basis_of(stage, finished | dict.fromkeys(waits, not_yet)))
            record = read_finished(stage.path) if decision.kind == "skip" else None
        if record is not None:
            finished[stage.name] = record
        action = decision.text(stage)
        if decision.kind == "rerun" and decision.why == listed([f"the output of stage {name}" for name in waits]):
            action = f"run anew {stage.path} if another model comes from {', '.join(waits)}"
        elif waits:
            action = action.replace(str(stage.path), f"{stage.path} after {', '.join(waits)}", 1)
        kept = f"; the earlier one is kept as {aside(stage.path).name}" if decision.kind == "rerun" else ""
        actions.append(action + kept)
    return actions
