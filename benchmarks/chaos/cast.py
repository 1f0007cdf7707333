"""All simulated members of one life, behind the ports of the loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from chaos.critic import Critic
from chaos.disk import Disk
from chaos.fleet import GIVE_UP_AFTER, Fleet
from chaos.learner import Learner
from chaos.plan import COLLATOR, CRITIC, LEARNER, REFERENCE, SCORER, WORKER
from chaos.ranks import Ranks
from chaos.refusals import Refusals
from chaos.servers import Collator, Servers
from chaos.supervisor import Part, Supervisor
from chaos.witness import Witness
from chaos.workers import BEAT_S
from chaos.world import World
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ActorTimeout
from rlhf_dist.loop.events import MemberKind, TimedOut
from rlhf_dist.loop.healing import Healing
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.shell import Actors

START_S = 30.0
"""The longest that a start may take."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Who is there."""

    fleet: Fleet
    scoring: Servers
    reference: Servers | None
    collator: Collator
    learner: Learner
    critic: Critic | None
    ranks: Ranks
    actors: Actors
    members: Members
    healing: Healing


def cast_of(config: Config, world: World, disk: Disk, folder: Path | None, witness: Witness) -> Cast:
    """Start them, from the checkpoint in `folder`. `witness` is told of what is learnt."""
    settings = world.plan.settings
    workers = [f"{WORKER} {i}" for i in range(settings.workers)]
    fleet = Fleet(world, workers, config.weights.timeout_s)
    assert config.weights.give_up_after == GIVE_UP_AFTER
    scoring = Servers("scoring", [f"{SCORER} {i}" for i in range(settings.scorers)], world, disk)
    reference = None
    if settings.reference:
        reference = Servers("reference", [f"{REFERENCE} {i}" for i in range(settings.reference)], world, disk)
        reference.restore(folder, settings.moves > 0)
    collator = Collator(world, disk, settings.lag, settings.age)
    refusals = Refusals(world, Path(config.output) / config.name / "checkpoints", witness)
    ranks = Ranks(world, disk, [LEARNER, CRITIC] if settings.critic else [LEARNER], settings.kept, refusals)
    alone = config.critic.warmup_steps
    critic = Critic(world, disk, ranks, folder, witness.saw, alone) if settings.critic else None
    learner = Learner(world, disk, ranks, collator.history, folder, witness.saw)
    collator.faulted = refusals.told
    ranks.begin_anew, ranks.went_back = fleet.begin_anew, witness.go_back
    parts: dict[str, Part] = {COLLATOR: collator, **dict.fromkeys(ranks.ranks, ranks)}
    parts |= dict.fromkeys(workers, fleet) | dict.fromkeys(scoring.servers, scoring)
    parts |= dict.fromkeys(reference.servers, reference) if reference else {}
    limits: dict[MemberKind, float] = {
        "rollout": config.rollout.timeout_s,
        "scoring": config.scoring.timeout_s,
        "reference": config.scoring.timeout_s,
        "collator": config.learner.timeout_s,
    }
    members = Members(
        workers,
        scoring.servers,
        reference.servers if reference else [],
        capacity=config.rollout.max_concurrent,
        limits_s=limits,
        beat_s=BEAT_S,
    )
    processes = Supervisor(world, parts)
    actors = Actors(fleet, scoring, reference, collator, world.inbox, timed_out, processes)
    heals = healing(config, parts, settings.moves > 0)
    return Cast(fleet, scoring, reference, collator, learner, critic, ranks, actors, members, heals)


def healing(config: Config, names: Iterable[str], moves: bool) -> Healing:
    """As `cluster.wiring` makes it. `moves`: whether the reference does; it and the ranks cannot be had again then."""
    kinds: dict[str, MemberKind] = {
        **dict.fromkeys([name for name in names if name.startswith(WORKER)], "rollout"),
        **dict.fromkeys([name for name in names if name.startswith(SCORER)], "scoring"),
        **dict.fromkeys([name for name in names if name.startswith(REFERENCE)], "reference"),
        COLLATOR: "collator",
        LEARNER: "learner",
        **dict.fromkeys([name for name in names if name == CRITIC], "critic"),
    }
    return Healing(
        kinds,
        respawns=config.faults.respawns,
        window_s=config.faults.window_s,
        pulse_s=config.faults.heartbeat_s,
        start_s=START_S,
        unique=[name for name in kinds if moves and name.startswith((REFERENCE, LEARNER, CRITIC))],
    )


def timed_out(late: TimedOut) -> ActorTimeout:
    """As `cluster.groups.silence` says it."""
    return ActorTimeout(f"{late.member or 'no rollout worker'}: no {late.limit} for {late.limit_s:g} s")
