"""The command line of the benchmarks that run on the canonical work."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from _canonical import require_overrides
from step import HERE, at_least

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.errors import ConfigError

BOTH_HALVES = MappingProxyType(
    {
        "loop.max_policy_lag": "use --lag",
        "algo.ratio_to": "take it out; the run at once has behaviour",
        "cluster.colocate": "take it out; each half has its own cores in both runs",
    }
)
"""What benchmarks set that run both halves at once and in turn -> what is to be done instead."""


def canonical_arguments(
    argv: Sequence[str],
    name: str,
    description: str,
    numbers: Mapping[str, tuple[int, int, str]],
    flag: str = "",
    own: Mapping[str, str] = MappingProxyType({}),
) -> argparse.Namespace:
    """`rlhf-dist bench NAME [--OPTION N] ... [--out FILE] [key=value ...]`. Raises `InputError`.

    `numbers`: option -> (lowest, by default, what it is). `flag`: one that is set or not, as `option: what it is`.
    `own`: key that the benchmark sets itself -> what is to be done instead.
    """
    option, _, what = flag.partition(": ")
    shown = [f"[--{option}]"] if flag else []
    shown += [f"[--{number} N]" for number in numbers]
    parser = Parser(
        prog=f"rlhf-dist bench {name}",
        usage=f"rlhf-dist bench {name} {' '.join(shown)} [--out FILE] [key=value ...]",
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys set over the canonical config")
    if flag:
        parser.add_argument(f"--{option}", action="store_true", help=what)
    for number, (lowest, default, meaning) in numbers.items():
        parser.add_argument(f"--{number}", type=at_least(lowest), default=default, help=f"{meaning} ({default})")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{name}-{stamp}.json", help="JSON to write")
    args = parser.parse_intermixed_args(list(argv))
    require_overrides(args.words)
    for word in args.words:
        key = word.split("=", 1)[0]
        if key in own:
            raise ConfigError(f"{word}: the benchmark sets {key} itself; {own[key]}")
    return args
