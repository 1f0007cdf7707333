"""`rlhf-dist bench pack`: how well `data.packing.plan` fills micro-batches and how evenly it loads ranks.

No model runs: lengths are drawn, the plan that training would use is made, and its figures are compared with what no
plan could beat for the same lengths.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from step import HERE, at_least, machine_facts, save

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.data.packing import plan

SHAPES = ((8, 8), (16, 8), (32, 8), (32, 16), (64, 16))
"""Groups x samples."""
RANKS = (1, 2, 4, 8)
PROMPT_TOKENS = (9, 300)
RESPONSE_MEDIAN, RESPONSE_SIGMA, RESPONSE_LIMIT = 100, 1.0, 1024
"""Of the log-normal distribution of response tokens: the longest are cut, as a run's limit cuts them."""
TARGET_EFFICIENCY = 0.95
"""At least; tokens over slots."""
TARGET_IMBALANCE = 0.02
"""At most."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one batch, or the means of several."""

    micro_batches: float
    """Of each rank."""
    efficiency: float
    """Tokens over slots: micro-batches of all ranks x `micro_batch_tokens`."""
    limit: float
    """The same with the fewest micro-batches that any plan could have, as many on every rank."""
    imbalance: float
    """(tokens of the fullest rank - mean) / mean; of several batches the largest."""
    lockstep: float
    """Tokens over ranks x the fullest rank's tokens of each pass: passes hold no padding, but ranks wait."""
    ms: float
    """To plan; of several batches the longest."""

    @staticmethod
    def over(batches: Sequence[Figures]) -> Figures:
        """Of several batches."""
        means = {each.name: float(np.mean([getattr(b, each.name) for b in batches])) for each in fields(Figures)}
        worst = {name: max(getattr(b, name) for b in batches) for name in ("imbalance", "ms")}
        return Figures(**means | worst)


@dataclass(frozen=True, slots=True)
class Case:
    """What is planned."""

    lengths: str
    """A key of `DRAWS`."""
    groups: int
    samples: int
    ranks: int


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where a target is missed. Raises `RlhfError`."""
    args = parse(argv)
    cases = [Case(name, *shape, ranks) for name in DRAWS for shape in SHAPES for ranks in RANKS]
    found = [measure(case, args.budget, args.batches, args.seed) for case in cases]
    print(table(cases, found, args.budget))
    facts = {"micro_batch_tokens": args.budget, "batches": args.batches, "seed": args.seed}
    rows = [asdict(case) | asdict(figures) for case, figures in zip(cases, found, strict=True)]
    save(args.out, facts | {"rows": rows, "machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench pack",
        usage="rlhf-dist bench pack [--budget N] [--batches N] [--seed N] [--out FILE]",
        description="How full micro-batches are and how even ranks, on drawn lengths; seconds, no model runs.",
        allow_abbrev=False,
    )
    parser.add_argument("--budget", type=at_least(RESPONSE_LIMIT + PROMPT_TOKENS[1]), default=2048,
                        help="learner.micro_batch_tokens (2048); at least the longest row")  # fmt: skip
    parser.add_argument("--batches", type=at_least(1), default=20, help="batches of each line (20)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the lengths (0)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"pack-{stamp}.json", help="JSON to write")
    return parser.parse_args(list(argv))


def draw_groups(rng: np.random.Generator, groups: int, samples: int) -> np.ndarray:
    """GRPO: the rows of a group share their prompt; int64 [groups x samples]."""
    prompts = rng.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1, groups).repeat(samples)
    return prompts + draw_responses(rng, groups * samples)


def draw_responses(rng: np.random.Generator, count: int) -> np.ndarray:
    """int64 [count]."""
    drawn = rng.lognormal(math.log(RESPONSE_MEDIAN), RESPONSE_SIGMA, count)
    return np.clip(drawn, 1, RESPONSE_LIMIT).astype(np.int64)


DRAWS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "groups": draw_groups,
    "tail": lambda rng, groups, samples: PROMPT_TOKENS[0] + draw_responses(rng, groups * samples),
}
"""`groups`: prompts of 9 to 300 tokens. `tail`: prompts of 9, so that the responses' long tail is all there is."""


def judge(lengths: np.ndarray, ranks: int, budget: int) -> Figures:
    """Plan one batch and judge the plan; no row may be longer than the budget."""
    begun = time.perf_counter()
    planned = plan(lengths, ranks, budget)
    ms = 1e3 * (time.perf_counter() - begun)
    loads = np.array([[int(lengths[rows].sum()) for rows in parts] for parts in planned])  # [ranks, micro-batches]
    tokens = int(lengths.sum())
    fewest = math.ceil(tokens / ranks / budget)
    return Figures(
        micro_batches=loads.shape[1],
        efficiency=tokens / (loads.size * budget),
        limit=tokens / (ranks * fewest * budget),
        imbalance=float(loads.sum(1).max()) * ranks / tokens - 1.0,
        lockstep=tokens / (ranks * float(loads.max(0).sum())),
        ms=ms,
    )


def measure(case: Case, budget: int, batches: int, seed: int) -> Figures:
    """Over several batches, whose lengths do not depend on the ranks."""
    rngs = [np.random.default_rng([seed, number, case.groups, case.samples]) for number in range(batches)]
    drawn = [DRAWS[case.lengths](rng, case.groups, case.samples) for rng in rngs]
    return Figures.over([judge(lengths, case.ranks, budget) for lengths in drawn])


def table(cases: Sequence[Case], found: Sequence[Figures], budget: int) -> str:
    """A line for each case, and what was asked."""
    lines = [
        f"micro-batches of {budget} tokens",
        f"{'lengths':8}{'groups':>8}{'ranks':>7}{'passes':>8}{'efficiency':>12}{'limit':>8}{'of limit':>10}"
        f"{'imbalance':>11}{'lockstep':>10}{'plan ms':>9}",
    ]
    for case, row in zip(cases, found, strict=True):
        lines.append(
            f"{case.lengths:8}{f'{case.groups}x{case.samples}':>8}{case.ranks:7}{row.micro_batches:8.1f}"
            f"{row.efficiency:12.3f}{row.limit:8.3f}{row.efficiency / row.limit:10.3f}{row.imbalance:11.2%}"
            f"{row.lockstep:10.3f}{row.ms:9.1f}"
        )
    full = sum(row.efficiency >= TARGET_EFFICIENCY for row in found)
    possible = sum(row.limit >= TARGET_EFFICIENCY for row in found)
    even = sum(row.imbalance <= TARGET_IMBALANCE for row in found)
    lines += [
        f"efficiency of at least {TARGET_EFFICIENCY:g}: {full} of {len(found)} lines; the limit: {possible}",
        f"imbalance of at most {TARGET_IMBALANCE:.0%}: {even} of {len(found)} lines",
    ]
    return "\n".join(lines)
