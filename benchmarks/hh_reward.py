"""`rlhf-dist bench hh_reward`: a reward model of real human preferences (HH-RLHF), from nothing, and its accuracy.

Ordinary runs of `rlhf-dist sft` (a tiny language model of the training side's text) and `rlhf-dist reward`; the pairs
of the test side are looked at once, at the end. Prints and stores figures only, none of the texts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from _hh import (
    CONFIG_FILE,
    MADE_FILE,
    MODEL_FOLDER,
    PICTURE_FILE,
    SCORED_FILE,
    TEXT_FILE,
    TRAIN_FILE,
    split,
    write_split,
)
from step import HERE, OPENMP, at_least, machine_facts, run_process, save, work_folder

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.config.checks import check
from rlhf_dist.config.load import load, to_yaml
from rlhf_dist.config.schema import Config
from rlhf_dist.data.files import read_rows
from rlhf_dist.errors import ConfigError, InputError
from rlhf_dist.planning.placement import local_machine

TRAIN = 1800
"""Pairs at the beginning of the file that may be learnt from; the others are the test."""
CONFIG = {
    "model": {
        "tiny": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "layers": 4,
            "heads": 8,
            "kv_heads": 4,
            "max_positions": 2048,
        }
    },
    "data": {"source": "jsonl", "response_key": "text", "answer_key": ""},
    # The longest pair has about 1,300 tokens: none is dropped.
    "preferences": {"source": "jsonl", "form": "transcripts", "held_out": 200, "max_tokens": 1536},
    "sft": {
        "objective": "text",
        "steps": 250,
        "batch_size": 32,
        "max_tokens": 1536,
        "eval_every": 50,
        "optimizer": {"lr": 1e-3, "warmup_steps": 20, "schedule": "cosine"},
    },
    "reward": {
        "steps": 150,
        "batch_size": 32,
        "eval_every": 25,
        "patience": 3,
        "optimizer": {"lr": 2e-4, "warmup_steps": 10, "schedule": "cosine"},
    },
    "learner": {"micro_batch_tokens": 4096},
    "telemetry": {"wandb": "offline", "progress": "plain"},
}
OWN_KEYS = (
    *("name", "output", "seed", "model.path", "data.source", "data.path", "data.eval_path", "data.chat"),
    *("preferences.source", "preferences.path", "preferences.eval_path", "preferences.form", "eval.prompts"),
    "sft.objective",
)
"""Set by the benchmark itself."""
STAGES = ("tokenizer", "language model", "reward model", "test")
LM_LOSS = "sft/held_out_loss"


def main(argv: Sequence[str]) -> int:
    """Run all stages, print the table, save the JSON. Raises `RlhfError`."""
    args = parse(argv)
    rows = read_rows("jsonl", str(args.data), "--data")
    with folder_for(args.folder) as folder:
        config = config_of(folder, args.words, args.seed)
        found = split(rows, args.train, config.preferences)
        write_split(found, folder)
        result = run(config, folder)
        if args.out_picture:
            args.out_picture.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / PICTURE_FILE, args.out_picture)
    result |= {"file_pairs": len(rows), "unusable": list(found.unusable)}
    print(table(result, config))
    save(args.out, result | {"config": args.words, "seed": args.seed, "machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench hh_reward",
        usage="rlhf-dist bench hh_reward --data FILE [--train N] [--seed N] [--folder DIR] [--out FILE] "
        "[--out-picture FILE] [key=value ...]",
        description="A reward model of human preferences (HH-RLHF) from nothing: text, language model, reward, test.",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys set over the benchmark's own config")
    parser.add_argument(
        "--data", type=Path, required=True, help="JSON lines of HH-RLHF, as harmless-base-test.jsonl.gz"
    )
    parser.add_argument("--train", type=at_least(1), default=TRAIN, help=f"pairs to learn from, the first ({TRAIN})")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights and data order (0)")
    parser.add_argument("--folder", type=Path, help="new folder for models and runs, which stay (a temporary one)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"hh_reward-{stamp}.json", help="JSON to write")
    parser.add_argument("--out-picture", type=Path, help="PNG to write: scores and calibration on the test pairs")
    args = parser.parse_intermixed_args(list(argv))
    for word in args.words:
        if "=" not in word:
            raise ConfigError(f"`{word}` is not of the form key=value; this benchmark takes no config file")
    return args


@contextmanager
def folder_for(given: Path | None) -> Iterator[Path]:
    """`given`, made now, or a temporary folder. Raises ConfigError when it exists."""
    if given is None:
        with work_folder() as folder:
            yield folder
        return
    try:
        given.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"--folder {given} exists; give a new one") from None
    try:
        yield given.absolute()
    except InputError:
        shutil.rmtree(given)  # Nothing was made yet: it must not stand in the way of a second try.
        raise


def config_of(folder: Path, overrides: Sequence[str], seed: int) -> Config:
    """The config of both runs below `folder`, whose files are still to be made. Raises `ConfigError`."""
    for text in overrides:
        key = text.split("=", 1)[0]
        if key in OWN_KEYS:
            raise ConfigError(f"{text}: the benchmark sets {key} itself; take it out (seed: --seed)")
    base = folder / "base.yaml"
    base.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    config = load(base, overrides)
    return replace(
        config,
        output=str(folder),
        seed=seed,
        model=replace(config.model, path=str(folder / MODEL_FOLDER), tiny=replace(config.model.tiny, seed=seed)),
        data=replace(config.data, path=str(folder / TEXT_FILE)),
        preferences=replace(config.preferences, path=str(folder / TRAIN_FILE)),
        # The same pairs are held out by both runs.
        eval=replace(config.eval, prompts=config.preferences.held_out),
    )


def run(config: Config, folder: Path) -> dict[str, Any]:
    """All stages in order, each in a process of its own, and what they found."""
    path = folder / CONFIG_FILE
    path.write_text(to_yaml(config), encoding="utf-8")
    parts = str(HERE / "_hh.py")
    threads = {"OMP_NUM_THREADS": str(local_machine().cpus)}
    product = [sys.executable, "-m", "rlhf_dist"]
    commands = (
        [sys.executable, parts, "make", str(folder)],
        [*product, "sft", str(path), "name=sft"],
        [*product, "reward", str(path), "name=reward", f"model.path={folder / 'sft'}"],
        [sys.executable, parts, "score", str(folder), str(folder / "reward")],
    )
    seconds: dict[str, float] = {}
    for number, (stage, command) in enumerate(zip(STAGES, commands, strict=True), start=1):
        print(f"stage {number} of {len(STAGES)}: {stage}", file=sys.stderr, flush=True)
        begun = time.perf_counter()
        own = OPENMP | threads if command[1] == parts else {}
        run_process(command, folder / f"{stage.replace(' ', '-')}.log", own)
        seconds[stage] = round(time.perf_counter() - begun, 1)
        if number == 1:  # Now that the files are there, so that a wrong key is told before minutes of work.
            check(config, "sft")
            check(config, "reward")
    return collected(folder, seconds)


def collected(folder: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What the stages left in the folder, as figures."""
    made, test = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (MADE_FILE, SCORED_FILE))
    sft, reward = (
        json.loads((folder / name / "summary.json").read_text(encoding="utf-8")) for name in ("sft", "reward")
    )
    return {
        **made,
        "test": test,
        "language_model": {when: sft[when][LM_LOSS] for when in ("before", "after")},
        "early_stop": {key: reward[key] for key in ("before", "after", "kept_step", "last_step")},
        "seconds": dict(seconds),
    }


def table(result: Mapping[str, Any], config: Config) -> str:
    """What the command prints."""
    test, lm, stop = result["test"], result["language_model"], result["early_stop"]
    results = test["results"]
    low, high = (results[f"reward_model/accuracy_{end}"] for end in ("low", "high"))
    pairs, long = result["pairs"], result["too_long"]
    held_out, seconds = config.preferences.held_out, result["seconds"]
    lines = [
        f"{result['file_pairs']} pairs: {pairs['train']} to learn from ({held_out} of them for early stop), "
        f"{pairs['test']} to test; unusable: {len(result['unusable'])}, "
        f"longer than {config.preferences.max_tokens} tokens: {long['train']} and {long['test']}",
        f"model: {result['parameters'] / 1e6:.1f}M parameters, {result['vocabulary']} tokens",
        f"language model: held-out loss {lm['before']:.3f} -> {lm['after']:.3f} nats per token",
        f"reward model: kept step {stop['kept_step']} of {stop['last_step']}, early-stop accuracy "
        f"{stop['after']['accuracy']:.3f}",
        f"test accuracy: {results['reward_model/accuracy']:.3f} (95%: {low:.3f} to {high:.3f}), {test['pairs']} pairs; "
        f"always the longer response: {test['longer_is_better']:.3f}",
        f"calibration error: {results['reward_model/calibration_error']:.3f}",
        "seconds: "
        + ", ".join(f"{stage} {s:.0f}" for stage, s in seconds.items())
        + f"; all {sum(seconds.values()):.0f}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
