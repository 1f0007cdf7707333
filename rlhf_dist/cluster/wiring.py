"""The processes of a run, which are ready, behind the ports of the loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlhf_dist.cluster import learner_hosts as hosts
from rlhf_dist.cluster.direct_push import DirectPush
from rlhf_dist.cluster.groups import (
    CollatorProcess,
    CriticGroup,
    PolicyCreditGroup,
    PolicyGroup,
    ReferenceFleet,
    ScoringFleet,
    silence,
)
from rlhf_dist.cluster.inbox import Inbox
from rlhf_dist.cluster.relay_hosts import Relays
from rlhf_dist.cluster.rollout_fleet import RolloutFleet
from rlhf_dist.cluster.roster import Roster
from rlhf_dist.cluster.standing import beat_s
from rlhf_dist.cluster.supervisor import Admit, Supervisor
from rlhf_dist.cluster.waits import Quiet
from rlhf_dist.config.schema import Config
from rlhf_dist.loop.events import MemberKind
from rlhf_dist.loop.healing import Healing
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.shell import Actors


@dataclass(frozen=True, slots=True)
class LearnerSide:
    """The ranks of a run, which have met."""

    policy: PolicyGroup
    critic: CriticGroup | None

    def admits(self, ranks: Iterable[str], critics: Iterable[str]) -> dict[str, list[Admit]]:
        """Who has to know of a rank that was started again, by name; `critics`: those of a critic beside the policy."""
        of_critic = [] if self.critic is None else [self.critic.admit]
        beside = dict.fromkeys(critics, of_critic)
        return {name: [self.policy.admit, *([] if beside else of_critic)] for name in ranks} | beside


@dataclass(frozen=True, slots=True)
class Parts:
    """The processes of a run, ready to work."""

    actors: Actors
    rollouts: RolloutFleet
    """`actors.rollouts`, and the receiving end of a push."""
    members: Members
    healing: Healing
    learner: LearnerSide
    roster: Roster
    supervisor: Supervisor
    inbox: Inbox


def parts_of(
    config: Config,
    roster: Roster,
    workers: dict[str, Any],
    scorers: dict[str, Any],
    references: dict[str, Any],
    collator: dict[str, Any],
    ranks: dict[str, Any],
    critics: dict[str, Any],
    relays: Relays,
    shares_gpu: bool,
) -> Parts:
    """The processes, which are ready, behind the ports of the loop. All hand their events to one inbox."""
    inbox, limit, (collating,) = Inbox(), config.scoring.timeout_s, collator.items()
    straight = ranks and config.weights.transport != "shared_memory"
    direct = DirectPush(ranks, config.rollout.tensor_parallel) if straight else None
    healing = healing_of(config, workers, scorers, references, collator, ranks, critics, relays.all())
    learner = learner_side(config, ranks, critics, inbox, lambda names: healing.quiet_s(names, inbox.now()))
    rollouts = RolloutFleet(
        workers,
        inbox,
        timeout_s=config.rollout.timeout_s,
        sync_timeout_s=config.weights.timeout_s,
        give_up_after=config.weights.give_up_after,
        relays=relays,
        direct=direct,
        shares_gpu=shares_gpu,
    )
    moves = config.reference.update_every > 0
    scoring = ScoringFleet(scorers, inbox, timeout_s=limit)
    reference = ReferenceFleet(references, inbox, timeout_s=limit, moves=moves) if references else None
    admits = dict[str, list[Admit]]({name: [] for name in collator}) | learner.admits(ranks, critics)
    if direct is not None:
        admits |= {name: [*admits[name], direct.admit] for name in ranks}
    admits |= {name: [rollouts.admit] for name in workers} | {name: [scoring.admit] for name in scorers}
    if reference is not None:
        admits |= {name: [*admits.get(name, []), reference.admit] for name in references}
    admits |= {name: [relays.admit] for name in relays.all()}
    starts, stopped = config.cluster.start_timeout_s, config.faults.heartbeat_s
    supervisor = Supervisor(roster, inbox, admits, start_s=starts, stopped_s=stopped, relays=relays)
    return Parts(
        actors=Actors(
            rollouts=rollouts,
            scoring=scoring,
            reference=reference,
            bodies=CollatorProcess(*collating, inbox, timeout_s=config.learner.timeout_s),
            arrivals=inbox,
            timeout=silence,
            processes=supervisor,
        ),
        rollouts=rollouts,
        healing=healing,
        members=members_of(config, workers, scorers, references, collating[0]),
        learner=learner,
        roster=roster,
        supervisor=supervisor,
        inbox=inbox,
    )


def members_of(
    config: Config, workers: dict[str, Any], scorers: Iterable[str], references: Iterable[str], collator: str
) -> Members:
    """The actor side as the controller sees it, by name."""
    limits: dict[MemberKind, float] = {
        "rollout": config.rollout.timeout_s,
        "scoring": config.scoring.timeout_s,
        "reference": config.scoring.timeout_s,
        "collator": config.learner.timeout_s,
    }
    return Members(
        workers,
        scorers,
        references,
        capacity=config.rollout.max_concurrent,
        limits_s=limits,
        beat_s=beat_s(len(workers)),
        collator=collator,
    )


def healing_of(
    config: Config,
    workers: Iterable[str],
    scorers: Iterable[str],
    references: Iterable[str],
    collator: Iterable[str],
    ranks: Iterable[str],
    critics: Iterable[str],
    relays: Iterable[str] = (),
) -> Healing:
    """What is done about the loss of each of these, by name; a server of scores and the reference is one of scores."""
    kinds: dict[MemberKind, Iterable[str]] = {
        "reference": references,
        "rollout": workers,
        "scoring": scorers,
        "collator": collator,
        "learner": ranks,
        "critic": critics,
        "relay": relays,
    }
    return Healing(
        {name: kind for kind, names in kinds.items() for name in names},
        respawns=config.faults.respawns,
        window_s=config.faults.window_s,
        pulse_s=config.faults.heartbeat_s,
        start_s=config.cluster.start_timeout_s,
        step_s=config.faults.step_s,
        unique=unique_in(config, references, [*ranks, *critics]),
    )


def unique_in(config: Config, references: Iterable[str], ranks: Iterable[str]) -> list[str]:
    """Those that cannot be had again. Where the reference moves, its servers hold weights that belong to the step, and
    where there is a mask on what may be drawn, the engines do: the ranks alone cannot go back."""
    moves = config.reference.update_every > 0
    alone = not moves and hosts.algorithm(config.algo).mask is None
    return [*(references if moves else ()), *(() if alone else ranks)]


def learner_side(
    config: Config, ranks: dict[str, Any], critics: dict[str, Any], inbox: Inbox, quiet_s: Quiet
) -> LearnerSide:
    """The groups of policy and critic; while their answers are waited for, events are handed over."""
    limit, recipe, critic = config.learner.timeout_s, hosts.algorithm(config.algo), None
    if ranks and recipe.credit_by_token:
        own = recipe.needs_critic and not hosts.shares_trunk(config)
        kind = CriticGroup if own else PolicyCreditGroup
        critic = kind(critics or ranks, timeout_s=limit, waits=inbox.wait, quiet_s=quiet_s, in_turn=not critics)
    return LearnerSide(PolicyGroup(ranks, timeout_s=limit, waits=inbox.wait, quiet_s=quiet_s), critic)
