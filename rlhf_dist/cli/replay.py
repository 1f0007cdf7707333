"""`rlhf-dist replay`: the losses of a step whose numbers went wrong, computed again; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_dist.cli import arguments
from rlhf_dist.errors import InputError


def run(argv: Sequence[str]) -> int:
    """Print the rows of a saved batch with their losses; returns the exit code."""
    parser = arguments.Parser(
        prog="rlhf-dist replay",
        usage="rlhf-dist replay FILE [key=value ...]",
        description="Computes the policy's loss of each row of a step's batch again, which `train` has saved below "
        "faults/ of its run directory, with the weights of the checkpoint before the step, or of model.path=DIRECTORY. "
        "In one process, without DeepSpeed. Only reads.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "words", nargs="*", metavar="FILE, key=value", help="the batch, then keys to set over its config"
    )
    parser.closing = "Exit code 0: replayed; 2: no such file, a damaged one, no checkpoint, or another model."
    words = arguments.parse(parser, argv).words
    if not words or arguments.is_override(words[0]):
        raise InputError(
            f"replay needs a file first, as in RUN/faults/step-7.safetensors\n{parser.format_usage().strip()}"
        )
    with arguments.loading():
        from rlhf_dist.cluster.step_replay import replay

        lines = replay(Path(words[0]), words[1:])
    print("\n".join(lines))
    return 0
