"""`rlhf-dist prefer`: train a policy on human judgements themselves."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_dist.cli import arguments


def run(argv: Sequence[str]) -> int:
    """Train by DPO, IPO, KTO, ORPO or SimPO, as the sections `preferences` and `prefer` of the config say."""
    parser = arguments.config_parser(
        "prefer",
        "Training of a policy on human judgements themselves, by DPO, IPO, KTO, ORPO or SimPO (prefer.method); see the "
        "config's preferences and prefer sections.",
    )
    arguments.add_resume(parser)
    arguments.add_dry_run(parser)
    args = arguments.parse(parser, argv)
    config = arguments.load_checked(args.words, "prefer", "prefer")
    if args.dry_run:
        return arguments.print_dry_run(config, "prefer")
    from rlhf_dist.cluster import session

    session.prepare(config.cluster)
    with arguments.loading():
        from rlhf_dist.cluster.prefer_build import prefer

    prefer(config, resume=arguments.resumes(args), resume_from=args.resume_from)
    return 0
