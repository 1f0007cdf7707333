"""The checks of `bench gpu` that are whole runs: `rlhf-dist train` for a few steps, with each `weights.transport`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from _gpu_side import Checks, LeftOut, Verdict, Work, run_side
from step import run_ours

from rlhf_dist.config.checks import check
from rlhf_dist.config.load import to_yaml
from rlhf_dist.config.schema import Config, WeightsConfig
from rlhf_dist.errors import RlhfError
from rlhf_dist.planning.memory import BYTES
from rlhf_dist.planning.placement import local_machine, place
from rlhf_dist.planning.shape import shape_of
from rlhf_dist.telemetry import names

TRANSPORTS: tuple[str, ...] = tuple(
    sorted(get_args(get_type_hints(WeightsConfig)["transport"]), key=lambda name: name == "broadcast")
)
"""The one that needs two GPUs comes last."""
PREFIX = "run "
"""A check's name is this and the transport."""
ALERTS = ("push", "wait", "fault")
"""Kinds of warnings about a push and its receipts, or about processes."""
LEAST_CHANGED = 0.9
"""Share of bytes in buckets that an optimizer step changes."""
GROWTH, NOISE = 2.0, 1e-3
"""The logprob difference of the last step may be so many times the first's, and so many nats more."""
MOST_START_S, MOST_SYNC_S = 180.0, 2.0
"""From the command to the end of the first optimizer step, and a push of 0.5B parameters; asked on a GPU."""


def checks(work: Work) -> Checks:
    """By name."""
    return {PREFIX + transport: partial(run, work, transport) for transport in TRANSPORTS}


def run(work: Work, transport: str) -> Verdict:
    """A run from start to end; its own metrics are judged."""
    config = accepted(work, transport)
    path, folder = Path(work.folder, f"{transport}.yaml"), Path(config.output)
    path.write_text(to_yaml(config), encoding="utf-8")
    _, begun_s = run_ours(path, folder, transport, ())
    rows = read_lines(folder / transport / "metrics.jsonl")
    events = read_lines(folder / transport / "events.jsonl")
    complaints = [str(one["message"]) for one in events if one.get("alert") in ALERTS]
    steps = [row for row in rows if "time/step" in row]
    return judged(config, begun_s, steps, complaints, work.on_gpu)


def accepted(work: Work, transport: str) -> Config:
    """The config with this transport, halves in turn or on GPUs of their own. Raises `LeftOut` where both are refused.

    What the schema has by default is accepted everywhere, so its refusal is an error.
    """
    config, why = work.read_config(), ""
    for colocate in (True, False):
        found = replace(
            config,
            weights=replace(config.weights, transport=transport),  # pyright: ignore[reportArgumentType]
            cluster=replace(config.cluster, colocate=colocate),
        )
        try:
            check(found, "train")
            place(found, local_machine(), "train")
        except RlhfError as error:
            if transport == WeightsConfig().transport:
                raise
            why = why or str(error)
        else:
            return found
    raise LeftOut(why)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def judged(
    config: Config, begun_s: float, steps: Sequence[Mapping[str, Any]], complaints: Sequence[str], on_gpu: bool
) -> Verdict:
    """`begun_s`: from the command to the begin of the first step. `steps`: its metrics, step by step."""
    first_s = begun_s + steps[0]["time/step"]
    differences = [float(step[names.LOGPROB_DIFF_MEAN]) for step in steps]
    # The weights before the first step are those that are pushed first: all of them are new then.
    changed = min(float(step["sync/changed_share"]) for step in steps)
    sync_s = statistics.median(float(step["time/sync"]) for step in steps)
    nbytes = shape_of(config.model).parameters * BYTES[config.model.dtype]
    flat = differences[-1] <= GROWTH * differences[0] + NOISE
    largest = max(float(step[names.LOGPROB_DIFF_MAX]) for step in steps)
    limit = config.loop.logprob_diff_limit
    asked = {
        f"{len(steps)} of {config.loop.steps} steps": len(steps) == config.loop.steps,
        f"first step done after {first_s:.1f} s" + f" (at most {MOST_START_S:g})" * on_gpu: (
            not on_gpu or first_s <= MOST_START_S
        ),
        f"changed_share {changed:.2f} (at least {LEAST_CHANGED:g})": changed >= LEAST_CHANGED,
        f"logprob_diff_mean from {differences[0]:.1e} to {differences[-1]:.1e} (flat)": flat,
        f"logprob_diff_max {largest:.2g} (at most {limit:g})": largest <= limit,
        f"push {sync_s:.2f} s, {nbytes / sync_s / 1e9:.2f} GB/s" + f" (at most {MOST_SYNC_S:g} s)" * on_gpu: (
            not on_gpu or sync_s <= MOST_SYNC_S
        ),
        f"pushes: {complaints[0] if complaints else 'every receipt is right'}": not complaints,
    }
    keys = ("time/step", "time/generate", "time/train", "time/sync", "sync/changed_share", names.LOGPROB_DIFF_MEAN)
    figures = {
        "first_step_s": first_s,
        "bytes": nbytes,
        "push_s": sync_s,
        "colocate": config.cluster.colocate,
        "steps": [{key: step.get(key) for key in keys} for step in steps],
    }
    return Verdict(asked, figures)


if __name__ == "__main__":
    run_side(checks)
