"""`rlhf-dist bench overoptimization`: proxy and gold reward over KL, for best of n and for the RL stages of a pipeline.

As Gao et al. (arXiv:2210.10760) draw it: the further a policy goes from its start for the sake of a learnt reward, the
less the true reward follows. Best of n is measured here, on samples of the supervised start; the stages' paths are
those of their `metrics.jsonl`. Without a run only the categorical toy is shown, on which best of n is exact.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _best_of_n import ToyRow, Work, best_of_n, toy, write_work
from step import HERE, OPENMP, at_least, machine_facts, run_process, save, work_folder

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.config.load import from_yaml, to_yaml
from rlhf_dist.config.schema import Config, ModelConfig
from rlhf_dist.errors import ConfigError, DataError, DiskError
from rlhf_dist.models.checkpoints import latest_checkpoint
from rlhf_dist.planning.placement import local_machine
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.report import read_metrics

if TYPE_CHECKING:
    from _best_of_n import BestOfN
    from matplotlib.axes import Axes

SMOOTHED = 5
"""Steps of a path that are averaged for its line; the steps themselves are dots."""
Z95 = 1.96
COLOURS = ("#1f6fb4", "#e07b39", "#4c9a5b", "#8a5fb0")
BEST_COLOUR = "#333333"
PICTURE_NEEDS = (names.KL_REFERENCE, names.REWARD_PROXY, names.REWARD_GOLD)


@dataclass(frozen=True, slots=True)
class Way:
    """An RL stage's way, a point for each step, before that step's update."""

    stage: str
    kl: tuple[float, ...]
    """KL to the start, nats per response."""
    proxy: tuple[float, ...]
    """Mean total reward."""
    gold: tuple[float, ...]
    """Mean gold reward."""


@dataclass(frozen=True, slots=True)
class Finished:
    """An RL stage of the pipeline."""

    name: str
    folder: Path
    config: Config
    """With the paths of earlier stages as they are now."""


def main(argv: Sequence[str]) -> int:
    """Sample, estimate, draw, print, save. Raises `RlhfError`."""
    args = parse(argv)
    rows = toy(args.samples)
    print(toy_table(rows))
    result: dict[str, Any] = {"toy": [asdict(row) for row in rows]}
    if args.run is not None:
        stages = find_stages(args.run)
        paths = [path_of(stage) for stage in stages]
        with work_folder() as folder:
            best = best_of_n(sampled(stages[0], folder, args.samples, args.prompts, args.seed))
        print("\n" + table(best, paths))
        picture = args.out_picture or args.run / "overoptimization.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(best, paths, picture)
        print(f"picture: {picture}")
        result |= {"best_of_n": [asdict(row) for row in best], "paths": [asdict(path) for path in paths]}
        result |= {"run": str(args.run), "prompts": args.prompts, "samples": args.samples, "seed": args.seed}
    save(args.out, result | {"machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench overoptimization",
        usage="rlhf-dist bench overoptimization [RUN] [--samples N] [--prompts N] [--seed N] [--out FILE] "
        "[--out-picture FILE]",
        description="Proxy and gold reward over KL: best of n beside the RL stages of a finished pipeline.",
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="?", type=Path, help="directory of a finished pipeline; without it only the toy")
    parser.add_argument("--samples", type=at_least(2), default=64, help="samples a prompt, n goes up to it (64)")
    parser.add_argument("--prompts", type=at_least(1), default=16, help="held-out prompts (16)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the samples (0)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / f"overoptimization-{stamp}.json", help="JSON to write"
    )
    parser.add_argument("--out-picture", type=Path, help="PNG to write (overoptimization.png in RUN)")
    return parser.parse_intermixed_args(list(argv))


# ---- the pipeline's stages -------------------------------------------------------------------------------------------


def find_stages(run: Path) -> list[Finished]:
    """The finished RL stages below `run`, from one start, with the same rewards. Raises ConfigError, DataError."""
    found = [
        Finished(path.parent.name, path.parent, relocated(read_config(path.parent / "config.yaml"), run))
        for path in sorted(run.glob("*/summary.json"))
        if command_of(path) == "train"
    ]
    if not found:
        raise ConfigError(
            f"{run}: holds no finished stage with command train; give OUTPUT/NAME of a finished `rlhf-dist pipeline`"
        )
    first = found[0]
    if not first.config.scoring.gold:
        raise ConfigError(
            f"{first.folder}/config.yaml: scoring.gold is empty; without a gold reward nothing is compared"
        )
    for other in found[1:]:
        for key, a, b in (
            ("model.path", first.config.model.path, other.config.model.path),
            ("scoring", first.config.scoring, other.config.scoring),
        ):
            if a != b:
                raise ConfigError(
                    f"{run}: the stages {first.name} and {other.name} differ in {key}; they have to share start and "
                    "rewards to be compared"
                )
    return found


def command_of(summary: Path) -> str:
    """Which command a finished stage ran. Raises DataError."""
    try:
        return json.loads(summary.read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{summary}: not the summary of a finished stage ({error!r})") from error


def read_config(path: Path) -> Config:
    """A stage's config. Raises ConfigError, DataError."""
    try:
        return from_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def relocated(config: Config, run: Path) -> Config:
    """The config with earlier stages as they lie below `run`: its paths may be relative to another directory."""

    def there(path: str) -> str:
        folder = run / Path(path).name
        return str(folder.absolute()) if path and (folder / "config.yaml").is_file() else path

    rewards = {name: replace(spec, path=there(spec.path)) for name, spec in config.scoring.rewards.items()}
    return replace(
        config,
        model=replace(config.model, path=there(config.model.path)),
        scoring=replace(config.scoring, rewards=rewards),
    )


def path_of(stage: Finished) -> Way:
    """KL, proxy and gold of every step. Raises DataError where one is not measured."""
    series = read_metrics(stage.folder / "metrics.jsonl")
    missing = [name for name in PICTURE_NEEDS if name not in series]
    if missing:
        raise DataError(
            f"{stage.folder}/metrics.jsonl: has no {', '.join(missing)}; run the stage with scoring.gold and with "
            "algo.kl.coef above 0, or algo.kl.measure=true"
        )
    by_name = [dict(zip(*series[name], strict=True)) for name in PICTURE_NEEDS]
    steps = sorted(set.intersection(*(set(points) for points in by_name)))
    kl, proxy, gold = (tuple(points[step] for step in steps) for points in by_name)
    return Way(stage.name, kl, proxy, gold)


def sampled(stage: Finished, folder: Path, samples: int, prompts: int, seed: int) -> list[dict[str, list[float]]]:
    """Scores of the start's samples, from a process of their own."""
    config = folder / "config.yaml"
    config.write_text(to_yaml(stage.config), encoding="utf-8")
    work = Work(
        config=str(config),
        start=str(start_of(stage.config.model)),
        samples=samples,
        prompts=prompts,
        seed=seed,
        scores=str(folder / "scores.json"),
    )
    path = folder / "work.json"
    write_work(work, path)
    print(f"sampling {prompts} prompts x {samples} from {stage.config.model.path}", file=sys.stderr, flush=True)
    threads = {"OMP_NUM_THREADS": str(local_machine().cpus)}
    run_process([sys.executable, str(HERE / "_best_of_n.py"), str(path)], folder / "sampling.log", OPENMP | threads)
    return json.loads(Path(work.scores).read_text(encoding="utf-8"))


def start_of(model: ModelConfig) -> Path:
    """The directory to sample from. Raises ConfigError when it is not on this disk."""
    path = Path(model.path)
    checkpoint = latest_checkpoint(path) if path.is_dir() else None
    start = checkpoint / "hf" if checkpoint else path
    if not (start / "config.json").is_file():
        raise ConfigError(f"model.path {model.path}: no model is there; it has to be a run directory or a model's own")
    return start.absolute()


# ---- showing ---------------------------------------------------------------------------------------------------------


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over `SMOOTHED` steps in the middle of which each value stands; fewer at both ends."""
    half = SMOOTHED // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]


def table(best: Sequence[BestOfN], paths: Sequence[Way]) -> str:
    """Best of n, and where each stage's gold was highest and where it ended (means over a few steps)."""
    lines = [
        "best of n of the start, chosen by the proxy",
        f"{'n':>6}{'KL, nats':>12}{'proxy':>10}{'gold':>10}{'+-':>8}",
    ]
    lines += [f"{b.n:6}{b.kl:12.2f}{b.proxy:10.3f}{b.gold:10.3f}{Z95 * b.gold_error:8.3f}" for b in best]
    lines += ["", f"{'stage':14}{'':14}{'KL, nats':>10}{'proxy':>10}{'gold':>10}"]
    for path in paths:
        kl, proxy, gold = (smoothed(values) for values in (path.kl, path.proxy, path.gold))
        top = max(range(len(gold)), key=gold.__getitem__)
        for label, i in (("highest gold", top), ("last", len(gold) - 1)):
            lines.append(f"{path.stage:14}{label:14}{kl[i]:10.2f}{proxy[i]:10.3f}{gold[i]:10.3f}")
    return "\n".join(lines)


def toy_table(rows: Sequence[ToyRow]) -> str:
    """The categorical toy."""
    sizes = sorted(rows[0].kl)
    lines = [
        "best of n by the gold reward on a categorical distribution, exact: KL in nats, gold in standard deviations",
        f"{'n':>6}{'log n - (n-1)/n':>18}" + "".join(f"{f'KL, {s} resp.':>18}{'gold':>8}" for s in sizes),
    ]
    for row in rows:
        figures = "".join(f"{shown(row.kl[size]):18.4f}{shown(row.gold[size]):8.3f}" for size in sizes)
        lines.append(f"{row.n:6}{row.formula:18.4f}{figures}")
    return "\n".join(lines)


def shown(value: float) -> float:
    """Without the sign of a zero that is one but for rounding."""
    return round(value, 9) + 0.0


def draw(best: Sequence[BestOfN], paths: Sequence[Way], out: Path) -> None:
    """Two panels, gold and proxy, over KL on a square-root axis. Raises DiskError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, what in zip(figure.subplots(1, 2), ("gold", "proxy"), strict=True):
        for path, colour in zip(paths, cycle(COLOURS), strict=False):
            draw_path(axes, path.stage, path.kl, getattr(path, what), colour)
        draw_best(axes, best, what)
        finish_axes(axes, what)
    try:
        figure.savefig(out, dpi=130, format="png")
    except OSError as error:
        raise DiskError(f"{out}: cannot be written: {error.strerror or error}") from error


def draw_path(axes: Axes, label: str, kl: Sequence[float], values: Sequence[float], colour: str) -> None:
    """Every step a dot, their running means a line. An estimate of KL may be below 0 at the start: it is drawn at 0."""
    axes.plot([max(x, 0.0) for x in kl], values, linestyle="", marker=".", markersize=4, alpha=0.35, color=colour)
    axes.plot([max(x, 0.0) for x in smoothed(kl)], smoothed(values), linewidth=1.8, color=colour, label=label)


def draw_best(axes: Axes, best: Sequence[BestOfN], what: str) -> None:
    """Best of n, with the 95% interval of its gold."""
    kl, values = [b.kl for b in best], [getattr(b, what) for b in best]
    axes.plot(kl, values, color=BEST_COLOUR, linewidth=1.4, linestyle="--", marker="o", markersize=4, label="best of n")
    if what == "gold":
        low, high = ([b.gold + sign * Z95 * b.gold_error for b in best] for sign in (-1, 1))
        axes.fill_between(kl, low, high, color=BEST_COLOUR, alpha=0.12, linewidth=0)


def finish_axes(axes: Axes, what: str) -> None:
    """Scale, title, labels."""
    axes.set_xscale("function", functions=(_root, _square))
    axes.set_xlim(left=0.0)
    axes.set_title(f"{what.capitalize()} reward", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("KL to the start, nats per response (square-root scale)", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _root(x: Any) -> Any:
    import numpy as np

    return np.sqrt(np.maximum(x, 0.0))


def _square(x: Any) -> Any:
    return x**2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
