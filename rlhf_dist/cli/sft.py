"""`rlhf-dist sft`: a supervised start."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_dist.cli import arguments


def run(argv: Sequence[str]) -> int:
    """Train on demonstrations or plain text, as the config's `sft` section says."""
    parser = arguments.config_parser(
        "sft", "Supervised training on demonstrations or plain text; see the config's sft section."
    )
    arguments.add_resume(parser)
    arguments.add_dry_run(parser)
    args = arguments.parse(parser, argv)
    config = arguments.load_checked(args.words, "sft", "sft")
    if args.dry_run:
        return arguments.print_dry_run(config, "sft")
    from rlhf_dist.cluster import session

    session.prepare(config.cluster)
    with arguments.loading():
        from rlhf_dist.cluster.supervised_build import sft

    sft(config, resume=arguments.resumes(args), resume_from=args.resume_from)
    return 0
