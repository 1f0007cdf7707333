"""`rlhf-dist bench methods`: a short run of each method from one supervised start, and what it learned.

Ordinary runs of `rlhf-dist sft` and `rlhf-dist train` on the built-in task `reverse`: answers are right or wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from hh_reward import folder_for
from step import HERE, at_least, machine_facts, run_process, save

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.config.checks import check
from rlhf_dist.config.load import load
from rlhf_dist.config.methods import METHODS
from rlhf_dist.errors import ConfigError

METHOD_FILES = HERE.parent / "configs" / "algo"
SAMPLES = 256
"""Responses a step, of every method."""
GROUP = 8
STEPS = 60
BASE: dict[str, Any] = {
    "data": {"source": "task", "task": {"name": "reverse", "min_length": 3, "max_length": 5}},
    "sft": {
        "steps": 200,
        "batch_size": 64,
        "wrong_share": 0.5,
        "eval_every": 0,
        "optimizer": {"lr": 1e-3, "warmup_steps": 20, "schedule": "cosine"},
    },
    "rollout": {"max_prompt_tokens": 64, "max_response_tokens": 16, "kv_cache_gib": 0.5},
    "learner": {
        "micro_batch_tokens": 4096,
        "optimizer": {"lr": 3e-4, "warmup_steps": 5, "schedule": "linear"},
    },
    "loop": {"checkpoint_every": 0},
    "eval": {"prompts": 256, "every": 0, "samples": 4},
    "telemetry": {"wandb": "off", "progress": "plain"},
}
SHORT = {"dapo": {"shaping": {"overlong_buffer": 4}}}
"""For responses of at most 16 tokens."""
SHIPPED = [name for name in METHODS if (METHOD_FILES / f"{name}.yaml").is_file()]
CRITIC = {"optimizer": {"lr": 1e-3, "warmup_steps": 5, "schedule": "linear"}}
ACCURACY = "eval/greedy_accuracy"
REWARD = "eval/reward"


def main(argv: Sequence[str]) -> int:
    """Make the start, run each method from it, print the table, save the JSON. Raises `RlhfError`."""
    args = parse(argv)
    with folder_for(args.folder) as folder:
        files = write_configs(folder, args.only, args.steps, args.seed, args.words)
        begun = time.perf_counter()
        print("supervised start", file=sys.stderr, flush=True)
        product = [sys.executable, "-m", "rlhf_dist"]
        run_process([*product, "sft", str(files["sft"]), "name=sft", *args.words], folder / "sft.log", {})
        start_s = time.perf_counter() - begun
        rows = []
        for number, name in enumerate(args.only, start=1):
            print(f"method {number} of {len(args.only)}: {name}", file=sys.stderr, flush=True)
            begun = time.perf_counter()
            command = [*product, "train", str(files[name]), f"name={name}", f"model.path={folder / 'sft'}", *args.words]
            run_process(command, folder / f"{name}.log", {})
            rows.append(row(name, folder / name, time.perf_counter() - begun))
    print(table(rows, args.steps))
    facts = {"steps": args.steps, "seed": args.seed, "start_s": round(start_s, 1), "config": args.words}
    save(args.out, facts | {"methods": rows, "machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench methods",
        usage="rlhf-dist bench methods [--only NAME,NAME] [--steps N] [--seed N] [--folder DIR] [--out FILE] "
        "[key=value ...]",
        description="A short run of each method from one supervised start, and what it learned: 256 responses a step, "
        "1 to 5 s a step on two cores. Methods: " + ", ".join(SHIPPED) + ".",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys set over every method's config")
    parser.add_argument("--only", default=",".join(SHIPPED), help="methods, with commas between (all)")
    parser.add_argument("--steps", type=at_least(1), default=STEPS, help=f"training steps of each ({STEPS})")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights, data and sampling (0)")
    parser.add_argument("--folder", type=Path, help="new folder for models and runs, which stay (a temporary one)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"methods-{stamp}.json", help="JSON to write")
    args = parser.parse_intermixed_args(list(argv))
    args.only = args.only.split(",")
    for name in args.only:
        if name not in SHIPPED:
            raise ConfigError(
                f"--only names {name!r}, which has no file in configs/algo; there are {', '.join(SHIPPED)}"
            )
    return args


def write_configs(folder: Path, only: Sequence[str], steps: int, seed: int, words: Sequence[str]) -> dict[str, Path]:
    """A config file for the start and for each method; all are checked before the first minute of work."""
    files = {}
    for name in ("sft", *only):
        made = BASE | {"output": str(folder), "seed": seed}
        if name != "sft":
            own = yaml.safe_load((METHOD_FILES / f"{name}.yaml").read_text(encoding="utf-8"))
            group = GROUP if own["algo"].get("group_size", GROUP) > 1 else 1
            made |= {
                "include": [str(METHOD_FILES / f"{name}.yaml")],
                "algo": {"group_size": group} | SHORT.get(name, {}),
                "loop": BASE["loop"] | {"steps": steps, "prompts_per_step": SAMPLES // group},
            }
            if METHODS[name].baseline == "critic":
                made["critic"] = CRITIC
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(made), encoding="utf-8")
        check(load(files[name], list(words)), "sft" if name == "sft" else "train")
    return files


def row(name: str, run: Path, seconds: float) -> dict[str, Any]:
    """What a finished run has found."""
    found = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line["time/step"] for line in lines if "time/step" in line]
    return {
        "method": name,
        "before": found["before"][ACCURACY],
        "after": found["after"][ACCURACY],
        "reward_before": found["before"][REWARD],
        "reward_after": found["after"][REWARD],
        "step_s": sorted(steps)[len(steps) // 2],
        "seconds": round(seconds, 1),
    }


def table(rows: Sequence[Mapping[str, Any]], steps: int) -> str:
    """What the command prints."""
    lines = [
        f"{steps} steps of {SAMPLES} responses on reversing words, each from the same supervised start",
        f"{'method':24}{'greedy accuracy':>18}{'sampled reward':>18}{'s a step':>11}{'seconds':>9}",
    ]
    for r in rows:
        greedy, sampled = (
            f"{r[a]:.3f} -> {r[b]:.3f}" for a, b in (("before", "after"), ("reward_before", "reward_after"))
        )
        lines.append(f"{r['method']:24}{greedy:>18}{sampled:>18}{r['step_s']:>11.2f}{r['seconds']:>9.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
