"""What must hold when a life ends."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.clock import Broken
from chaos.ending import Ended
from chaos.learner import WEIGHTS_FILE
from chaos.life import Life
from chaos.plan import CRITIC, LEARNER, NUMBERS, REFERENCE, SCORER, WORKER, Kind, Plan, config_of
from chaos.refusals import MOST, TOLD
from chaos.witness import Witness
from rlhf_dist.config.schema import FaultsConfig
from rlhf_dist.data.order import epoch_order
from rlhf_dist.errors import ActorLost, ActorTimeout, DiskError, NumbersError, ResourceError
from rlhf_dist.loop.best_checkpoints import best_of, best_steps
from rlhf_dist.loop.reasons import ROLLED_BACK, STEP_SKIPPED
from rlhf_dist.loop.run_end import read_summary
from rlhf_dist.models.checkpoints import (
    STATE_FILE,
    best_checkpoint,
    checkpoint_steps,
    latest_checkpoint,
    problems,
    step_of,
)
from rlhf_dist.telemetry.sinks import METRICS_FILE

OF_TIME = ("time/", "goodput/", "faults/", "rollout/group_s", "rollout/engine_", "sync/", "data/dropped_worker_lost")
"""Beginnings of names of metrics that faults may change."""
RESPAWNS = FaultsConfig().respawns
STRIKING: tuple[Kind, ...] = ("die", "ghost", "wedge", "stall", "undone", "tear", "lie", "no start", "farewell")
"""Faults after which a process may be lost, or taken for it; ..."""
GONE: tuple[Kind, ...] = ("die", "ghost", "farewell")
"""After these alone a worker is there again soon."""
DELAYING: tuple[Kind, ...] = ("cut", "slow", "late")
DELAY_S = 8.0
"""... and these, where they take so long: signs of life come every 6 s, and 15 s without one is too long."""


def explained(plan: Plan, life: Life) -> None:
    """Whether faults of this life are the reason of the failure that the run reports. Raises `Broken`."""
    error, text = life.failure, str(life.failure)
    blows = [
        one for one in life.world.fired if one.kind in STRIKING or (one.kind in DELAYING and one.seconds > DELAY_S)
    ]
    about = [fault for fault in blows if text.startswith(fault.who)]
    everybody = {fault.who for fault in blows} >= {f"{WORKER} {number}" for number in range(plan.settings.workers)}
    respawned = text.startswith((WORKER, SCORER))
    respawned |= text.startswith((REFERENCE, LEARNER, CRITIC)) and not plan.settings.moves
    # One that cannot be reached for long is lost again each time that it was started.
    too_often = len(about) > RESPAWNS or any(fault.kind in DELAYING for fault in about)
    ranks = [fault for fault in blows if fault.who in (LEARNER, CRITIC)]
    match error:
        case Ended():
            fair = any(fault.kind == "end" for fault in life.world.fired)
        case ActorLost() if text.startswith("the learner was lost"):
            fair = len(ranks) > RESPAWNS
        case ActorLost() if text.startswith("what a reference server computed"):
            fair = sum(fault.who.startswith(REFERENCE) for fault in blows) > RESPAWNS
        case NumbersError():
            fair = plan.settings.on_fault == "stop" or life.world.seen[TOLD] > MOST
            fair &= any(fault.kind in NUMBERS for fault in life.world.fired)
        case DiskError() | ResourceError():
            fair = any(fault.kind == "full" for fault in life.disk.fired)
        case ActorTimeout() if text.startswith("no rollout worker"):
            fair = everybody and any(fault.kind not in GONE for fault in blows)
        case ActorTimeout():
            fair = bool(about) and not respawned
        case ActorLost():
            fair = bool(about) and (too_often or not respawned)
        case _:
            fair = False
    if not fair:
        told = ", ".join(map(str, life.fired)) or "none"
        raise Broken("unexplained", f"{type(error).__name__}: {error} (faults: {told})")


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to, as far as it depends on nothing but its settings where these are settled."""

    weights: str
    """Of the last checkpoint."""
    metrics: tuple[dict[str, float], ...]
    """Line by line, without times and without what faults may change."""

    def differs(self, uncut: Result) -> str:
        """How it is not that of a run which nothing disturbs; empty where it is."""
        for here, there in zip(self.metrics, uncut.metrics, strict=True):
            names = [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)]
            if names:
                told = ", ".join(f"{name} {here.get(name)}, not {there.get(name)}" for name in sorted(names))
                return f"step {here['step']:.0f}: {told}"
        return "" if self.weights == uncut.weights else f"final weights {self.weights}, not {uncut.weights}"


def result_of(run: Path) -> Result:
    """Of a run that has ended."""
    folder = latest_checkpoint(run)
    assert folder is not None
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    kept = tuple({name: line[name] for name in line if not name.startswith(OF_TIME)} for line in lines)
    return Result((folder / WEIGHTS_FILE).read_text(encoding="utf-8"), kept)


def check_end(plan: Plan, life: Life, run: Path, witness: Witness, steps: int) -> None:
    """The run is over, after so many steps. Raises `Broken`."""
    proof, wanted = life.proof, steps * plan.settings.groups - len(witness.skipped)
    assert proof is not None
    if not proof.holds or proof.in_flight or proof.tokens_in_flight or proof.consumed != wanted:
        raise Broken("ledger", f"{wanted} groups were to be used: {proof.text()}")
    shown, learnt = proof.witness, len({step for step, _ in witness.trained})
    if (
        plan.settings.witness
        and learnt
        and (shown is None or (shown.steps, shown.seen + shown.idle) != (learnt, wanted))
    ):
        raise Broken("witness", f"it was to see {wanted} groups in {steps} steps: {proof.text()}")
    if (read_summary(run) or {}).get("step") != steps:
        raise Broken("end", f"the summary says {read_summary(run)}")
    _checkpoints(plan, run, steps, life.world.life)
    _metrics(steps, run / METRICS_FILE)
    _witnessed(plan, run, witness, proof.tokens_trained + proof.tokens_left_out)


def _checkpoints(plan: Plan, run: Path, steps: int, lives: int) -> None:
    folder = latest_checkpoint(run)
    if folder is None or folder.name != f"step-{steps}":
        raise Broken("checkpoint", f"the last one is {folder}")
    if found := problems(folder):
        raise Broken("checkpoint", "; ".join(found))
    if left := list((run / "checkpoints").glob(".*")):
        raise Broken("checkpoint", f"unfinished ones are left: {left}")
    # Those that a crash kept from being removed may stay, one for each life that has ended.
    if len(kept := checkpoint_steps(run / "checkpoints")) > plan.settings.keep + plan.settings.best + lives:
        raise Broken("checkpoint", f"these are kept: {kept}")
    best = best_of(config_of(plan, "", "", steps).loop)
    first = best_steps({step: run / "checkpoints" / f"step-{step}" for step in kept}, best)[:1] if best else []
    named = best_checkpoint(run)
    if (named and step_of(named)) != (first[0] if first else None):
        raise Broken("checkpoint", f"{named} is named the best, and of {kept} the best is {first}")


def _metrics(steps: int, path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line["step"] for line in lines]
    if found != list(range(steps + 1)):
        raise Broken("metrics", f"metrics.jsonl has steps {found}")


def _witnessed(plan: Plan, run: Path, witness: Witness, tokens: int) -> None:
    """The ledger says what the learner got, and every prompt that was read is accounted for."""
    with closing(sqlite3.connect(run / "ledger.sqlite")) as database:
        uses = Counter(database.execute("SELECT uid, step FROM uses").fetchall())
        dropped = "SELECT uid FROM groups WHERE state = 'dropped' AND reason = ?"
        skipped, left_out = (
            [uid for (uid,) in database.execute(dropped, (reason,))] for reason in (STEP_SKIPPED, ROLLED_BACK)
        )
        states: dict[str, set[str]] = {}
        for uid, state in database.execute("SELECT uid, state FROM groups"):
            states.setdefault(uid, set()).add(state)
    seen = Counter((group.uid, step) for step, group in witness.trained)
    if uses != seen:
        raise Broken(
            "witness",
            f"the ledger has {sorted((uses - seen).elements())} more, {sorted((seen - uses).elements())} less",
        )
    if sorted(skipped) != sorted(uid for _, uid in witness.skipped):
        raise Broken("skipped", f"the ledger has {skipped}, and these were: {witness.skipped}")
    if wrong := set(left_out) - witness.left_out | set(left_out) & {group.uid for _, group in witness.trained}:
        raise Broken("rolled back", f"the ledger has {sorted(wrong)} as left out")
    twice = [uid for uid, count in Counter(group.uid for _, group in witness.trained).items() if count > 1]
    if twice:
        raise Broken("witness", f"the learner got these twice: {twice}")
    if (got := sum(group.tokens for _, group in witness.trained)) != tokens:
        raise Broken("tokens", f"the learner got {got}, and the ledger has {tokens}")
    folder = latest_checkpoint(run)
    assert folder is not None
    last = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    read = set(_read(plan, last["cursor"]))
    ended = {uid for uid, found in states.items() if found & {"consumed", "dropped"}}
    ended |= last["open"].keys()  # a resume with more steps has them first
    if read != ended:
        raise Broken(
            "lost", f"prompts read and not accounted for: {sorted(read - ended)}; more: {sorted(ended - read)}"
        )


def _read(plan: Plan, cursor: Mapping[str, Any]) -> Iterator[str]:
    """uids of all prompts that the stream has given until there."""
    data = config_of(plan, "", "run", 1).data
    for epoch in range(cursor["epoch"] + 1):
        order = epoch_order(cursor["size"], plan.seed % 2**32, epoch, data.shuffle)
        here = order if epoch < cursor["epoch"] else order[: cursor["position"]]
        yield from (f"{epoch}/{index}" for index in here)
