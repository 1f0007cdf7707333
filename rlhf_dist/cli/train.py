"""`rlhf-dist train`: a reinforcement learning run."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_dist.cli import arguments


def run(argv: Sequence[str]) -> int:
    """Train as the config says; the algorithm is `algo.name`."""
    parser = arguments.config_parser(
        "train", "Reinforcement learning of a policy; the algorithm is the config's algo.name."
    )
    arguments.add_resume(parser)
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="start the run again when it fails, with back-off and within faults.restarts",
    )
    arguments.add_dry_run(parser)
    args = arguments.parse(parser, argv)
    config = arguments.load_checked(args.words, "train", "train")
    if args.dry_run:
        return arguments.print_dry_run(config, "train")
    if args.supervise:
        from rlhf_dist.cluster.parent import supervise

        return supervise(config, [word for word in argv if word != "--supervise"])
    from rlhf_dist.cluster import session

    session.prepare(config.cluster)
    with arguments.loading():
        from rlhf_dist.cluster import build

    build.train(config, resume=arguments.resumes(args), resume_from=args.resume_from)
    return 0
