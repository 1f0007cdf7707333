"""`rlhf-dist bench curves`: learning curves of variants of one run, over samples and over time, with several seeds.

Ordinary runs of `configs/reverse.yaml` from one supervised start. The variants of a seed follow one another and the
seeds take turns, so that a slow hour of the machine hits all variants.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hh_reward import folder_for
from step import HERE, at_least, machine_facts, run_process, save

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.config.checks import check
from rlhf_dist.config.load import load
from rlhf_dist.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONFIG = HERE.parent / "configs" / "reverse.yaml"
APART = "cluster.colocate=false"
STUDIES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "lag": {
        "in turn": (APART,),
        "lag 1": (APART, "loop.max_policy_lag=1", "algo.ratio_to=behaviour"),
        "lag 4": (APART, "loop.max_policy_lag=4", "algo.ratio_to=behaviour"),
    },
    "precision": {"float32": (), "bfloat16": ("model.dtype=bfloat16", "learner.zero_stage=1")},
}
"""Study -> variant -> what it sets."""
ACCURACY = "eval/greedy_accuracy"
REWARD = "reward/mean"
ELAPSED = "time/elapsed"


@dataclass(frozen=True, slots=True)
class Curve:
    """One run."""

    variant: str
    seed: int
    steps: list[int]
    """Training steps with an evaluation; the first is 0."""
    accuracy: list[float]
    """Held-out greedy accuracy there."""
    seconds: list[float]
    """`time/elapsed` there: since the first step began, with the evaluations before."""
    reward: list[float]
    """Sampled mean reward of every training step."""
    tokens_per_s: float
    """Response tokens over `time/elapsed`, whole run."""


def main(argv: Sequence[str]) -> int:
    """Make the start, run every variant with every seed, print the table, draw, save. Raises `RlhfError`."""
    args = parse(argv)
    variants = STUDIES[args.study]
    common = [f"loop.steps={args.steps}", f"eval.every={args.every}", "loop.checkpoint_every=0", "telemetry.wandb=off"]
    with folder_for(args.folder) as folder:
        common += [f"output={folder}", *args.words]
        for words in variants.values():
            check(load(CONFIG, [*common, *words]), "train")
        product = [sys.executable, "-m", "rlhf_dist"]
        print("supervised start", file=sys.stderr, flush=True)
        start = [*product, "sft", str(CONFIG), "name=sft", f"output={folder}", "telemetry.wandb=off"]
        run_process(start, folder / "sft.log", {})
        curves = []
        for seed in range(args.seeds):
            for number, (name, words) in enumerate(variants.items()):
                print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
                run = f"{number}-{seed}"
                set_by_us = [*common, *words, f"seed={seed}", f"name={run}", f"model.path={folder / 'sft'}"]
                run_process([*product, "train", str(CONFIG), *set_by_us], folder / f"{run}.log", {})
                curves.append(curve(name, seed, folder / run / "metrics.jsonl"))
    result = summary(curves, args.study)
    print(table(result))
    facts = {"steps": args.steps, "seeds": args.seeds, "config": args.words, "machine": machine_facts()}
    save(args.out, result | facts | {"curves": [asdict(c) for c in curves]})
    picture = args.out.with_suffix(".png")
    draw(curves, picture)
    print(f"drew {picture}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench curves",
        usage="rlhf-dist bench curves lag|precision [--steps N] [--seeds N] [--every N] [--folder DIR] [--out FILE] "
        "[key=value ...]",
        description="Learning curves over samples and over time: `lag` has max_policy_lag 0, 1 and 4; `precision` has "
        "float32 and bfloat16.",
        allow_abbrev=False,
    )
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys set over configs/reverse.yaml")
    parser.add_argument("--steps", type=at_least(1), default=300, help="training steps of each run (300)")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="runs of each variant (3)")
    parser.add_argument("--every", type=at_least(1), default=50, help="steps from one evaluation to the next (50)")
    parser.add_argument("--folder", type=Path, help="new folder for models and runs, which stay (a temporary one)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"curves-{stamp}.json", help="JSON to write")
    args = parser.parse_intermixed_args(list(argv))
    for word in args.words:
        if "=" not in word:
            raise ConfigError(f"`{word}` is not of the form key=value; this benchmark takes no config file")
    return args


def curve(variant: str, seed: int, metrics: Path) -> Curve:
    """What a finished run's metrics say."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    trained = {row["step"]: row for row in rows if ELAPSED in row}
    evaluated = {row["step"]: row[ACCURACY] for row in rows if ACCURACY in row}
    steps = sorted(evaluated)
    seconds = [trained[step][ELAPSED] if step in trained else 0.0 for step in steps]
    tokens = sum(row["rollout/response_tokens"] for row in trained.values())
    return Curve(
        variant=variant,
        seed=seed,
        steps=steps,
        accuracy=[evaluated[step] for step in steps],
        seconds=seconds,
        reward=[trained[step][REWARD] for step in sorted(trained)],
        tokens_per_s=tokens / trained[max(trained)][ELAPSED],
    )


def summary(curves: Sequence[Curve], study: str) -> dict[str, Any]:
    """Of each variant: mean and deviation over its seeds of the last accuracy and of the last tenth of the rewards.

    Deviations are of the seeds (n - 1), 0 with one seed.
    """
    found = {}
    for variant in STUDIES[study]:
        those = [c for c in curves if c.variant == variant]
        last = [c.accuracy[-1] for c in those]
        rewards = [statistics.fmean(c.reward[-max(1, len(c.reward) // 10) :]) for c in those]
        found[variant] = {
            "accuracy": statistics.fmean(last),
            "accuracy_std": statistics.stdev(last) if len(last) > 1 else 0.0,
            "reward": statistics.fmean(rewards),
            "reward_std": statistics.stdev(rewards) if len(rewards) > 1 else 0.0,
            "seconds": statistics.median(c.seconds[-1] for c in those),
            "tokens_per_s": statistics.median(c.tokens_per_s for c in those),
        }
    return {"study": study, "variants": found}


def table(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    heads = ("greedy accuracy", "sampled reward", "seconds", "response tok/s")
    lines = ["at the end".ljust(12) + "".join(head.rjust(18) for head in heads)]
    for variant, found in result["variants"].items():
        cells = (
            f"{found['accuracy']:.3f} +- {found['accuracy_std']:.3f}",
            f"{found['reward']:.3f} +- {found['reward_std']:.3f}",
            f"{found['seconds']:.0f}",
            f"{found['tokens_per_s']:.0f}",
        )
        lines.append(variant.ljust(12) + "".join(cell.rjust(18) for cell in cells))
    lines.append("accuracy is held out, at the last step; reward is the mean of the last tenth of the steps")
    return "\n".join(lines)


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Accuracy over training steps and over seconds: a colour a variant, a line a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    over_steps: Axes
    over_time: Axes
    over_steps, over_time = figure.subplots(1, 2, sharey=True)
    for number, variant in enumerate(dict.fromkeys(c.variant for c in curves)):
        for index, run in enumerate(c for c in curves if c.variant == variant):
            label = variant if index == 0 else None
            over_steps.plot(run.steps, run.accuracy, color=f"C{number}", label=label, linewidth=1.2)
            over_time.plot(run.seconds, run.accuracy, color=f"C{number}", linewidth=1.2)
    over_steps.set_xlabel("training step")
    over_time.set_xlabel("seconds since the first step began")
    over_steps.set_ylabel("held-out greedy accuracy")
    over_steps.legend(frameon=False)
    for axes in (over_steps, over_time):
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 1.02)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
