"""`rlhf-dist eval`: a model on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_dist.cli import arguments


def run(argv: Sequence[str]) -> int:
    """Evaluate `model.path` as the config's `eval` section says."""
    parser = arguments.config_parser("eval", "Greedy accuracy and pass@k of model.path on held-out prompts.")
    arguments.add_dry_run(parser)
    args = arguments.parse(parser, argv)
    config = arguments.load_checked(args.words, "eval", "eval")
    if args.dry_run:
        return arguments.print_dry_run(config, "eval")
    from rlhf_dist.cluster import session

    session.prepare(config.cluster)
    with arguments.loading():
        from rlhf_dist.cluster import build

    build.evaluate(config)
    return 0
