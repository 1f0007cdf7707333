"""`rlhf-dist reward`: train a reward model."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_dist.cli import arguments


def run(argv: Sequence[str]) -> int:
    """Train on human judgements, as the sections `preferences` and `reward` of the config say."""
    parser = arguments.config_parser(
        "reward", "Training of a reward model on human judgements; see the config's preferences and reward sections."
    )
    arguments.add_resume(parser)
    arguments.add_dry_run(parser)
    args = arguments.parse(parser, argv)
    config = arguments.load_checked(args.words, "reward", "reward")
    if args.dry_run:
        return arguments.print_dry_run(config, "reward")
    from rlhf_dist.cluster import session

    session.prepare(config.cluster)
    with arguments.loading():
        from rlhf_dist.cluster.reward_build import reward

    reward(config, resume=arguments.resumes(args), resume_from=args.resume_from)
    return 0
