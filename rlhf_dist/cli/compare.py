"""`rlhf-dist compare`: policies head to head on the same held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rlhf_dist.cli import arguments
from rlhf_dist.errors import InputError

USAGE = "rlhf-dist compare CONFIG.yaml A B [C ...] [key=value ...] [options]"
DESCRIPTION = """
Two or more policies answer the same held-out prompts with the same seeds, and each two are judged response by response:
wins, ties and losses, win rates with intervals, also at equal length, and Elo of three or more. A, B, C: run
directories, checkpoints, model directories or hub names. The config says which prompts, how to sample and who judges
(scoring, compare); its model.path is not read. The config.yaml of an RL run will do. Results go to OUTPUT/NAME:
compare.html, compare.json and answers.jsonl.
"""


def run(argv: Sequence[str]) -> int:
    """Compare the policies that the words name."""
    parser = arguments.config_parser("compare", DESCRIPTION)
    parser.usage = USAGE
    parser.closing = "Keys: docs/configuration.md, docs/comparing.md"
    arguments.add_dry_run(parser)
    args = arguments.parse(parser, argv)
    file, policies, overrides = split(args.words)
    from rlhf_dist.config.checks import check
    from rlhf_dist.config.load import load

    config = load(Path(file), overrides)
    first = replace(config, model=replace(config.model, path=policies[0]))
    check(first, "eval")
    from rlhf_dist.loop.compare_directory import require_new

    require_new(config.output, config.name)
    if args.dry_run:
        code = arguments.print_dry_run(first, "eval")
        print(f"# compares {', '.join(policies)}\n# directory: {Path(config.output) / config.name}")
        return code
    from rlhf_dist.cluster import session

    session.prepare(config.cluster)
    with arguments.loading():
        from rlhf_dist.cluster import compare_build

    compare_build.compare_policies(config, policies)
    return 0


def split(words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Config file, policies, overrides. Raises InputError where one of them is missing."""
    file = words[0] if words else ""
    if not file or arguments.is_override(file) or Path(file).is_dir():
        own = Path(file) / "config.yaml"
        hint = f"; that of this run is {own}" if file and own.is_file() else ""
        raise InputError(f"compare needs a config file first: {USAGE}{hint}")
    overrides = [word for word in words[1:] if arguments.is_override(word)]
    policies = [word for word in words[1:] if not arguments.is_override(word)]
    if len(policies) < 2:
        one = f"{policies[0]} is one" if policies else "there is none"
        raise InputError(f"compare needs two policies or more, and {one}: {USAGE}")
    for word in overrides:
        if word.partition("=")[0].strip() == "model.path":
            raise InputError(f"compare takes its policies from the command line: leave out {word}; {USAGE}")
    return file, policies, overrides
