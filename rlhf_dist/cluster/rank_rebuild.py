"""The ranks of the learner and the critic, started again together in their places while all others stay."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_dist.cluster.inbox import Inbox
from rlhf_dist.cluster.learner_hosts import CriticHost, PolicyHost
from rlhf_dist.cluster.preflight import checkpoint_bytes, kept_bytes
from rlhf_dist.cluster.rollout_fleet import RolloutFleet
from rlhf_dist.cluster.roster import Roster
from rlhf_dist.cluster.sources import with_sources
from rlhf_dist.cluster.starts import join_ranks, sends_straight
from rlhf_dist.cluster.supervisor import Supervisor
from rlhf_dist.cluster.wiring import Parts
from rlhf_dist.config.keys import Command
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ResourceError
from rlhf_dist.loop.background_writer import BackgroundWriter, shortage
from rlhf_dist.loop.kept_state import KeptState
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.models.checkpoints import HF_FOLDER
from rlhf_dist.planning.placement import Machine, Placement
from rlhf_dist.weights.shared_memory import STATE_LOCK, private_folder, require_room


class RankRebuild:
    """See `loop.ports.Ranks`."""

    def __init__(
        self,
        config: Config,
        placement: Placement,
        source: str,
        *,
        roster: Roster,
        supervisor: Supervisor,
        rollouts: RolloutFleet,
        inbox: Inbox,
        ranks: Iterable[str],
        critics: Iterable[str],
    ) -> None:
        """`source`: the model that the run began with. `ranks`, `critics`: their names; `critics` those of a critic
        beside the policy."""
        self._config, self._placement, self._source = config, placement, source
        self._roster, self._supervisor = roster, supervisor
        self._rollouts, self._inbox = rollouts, inbox
        self._ranks, self._critics = tuple(ranks), tuple(critics)

    def rebuild(self, folder: Path | None) -> list[str]:
        """See `loop.ports.Ranks`. While the processes start, loads under way come to their end."""
        source = self._source if folder is None else str((folder / HF_FOLDER).absolute())
        config = with_sources(self._config, source, folder, learns=True)
        started = self._roster.restart_together([*self._ranks, *self._critics], config, source)
        problems = self._rollouts.begin_anew()
        spread = sends_straight(self._config, self._placement)
        self._join(started, self._ranks, folder, self._placement.spread_of_ranks(), spread)
        self._join(started, self._critics, folder, self._placement.spread_of_ranks(critic=True))
        for name in started:
            self._supervisor.admit(name)
        return problems

    def _join(
        self, started: dict[str, Any], names: Iterable[str], folder: Path | None, nodes: int, spread: bool = False
    ) -> None:
        ranks = {name: started[name] for name in names}
        join_ranks(self._config, ranks, folder, nodes, spread, self._inbox.wait)


def rebuild_of(config: Config, placement: Placement, source: str, parts: Parts) -> RankRebuild:
    """Of a run's ranks; `source`: the model that it begins with."""
    kinds = {"learner": PolicyHost, "critic": CriticHost}
    named = {kind: [n for n, one in parts.roster.members.items() if one.host is host] for kind, host in kinds.items()}
    return RankRebuild(
        config,
        placement,
        source,
        roster=parts.roster,
        supervisor=parts.supervisor,
        rollouts=parts.rollouts,
        inbox=parts.inbox,
        ranks=named["learner"],
        critics=named["critic"],
    )


def kept_state(
    config: Config, nodes: Sequence[Machine], placement: Placement, source: str, stack: ExitStack
) -> KeptState | None:
    """Where `learner.keep_state_every` keeps states, until `stack` is left: after the ranks, which write there.

    `nodes`: the command's own first. Raises `ResourceError` where a rank is, or may be, on another one, and where there
    is no room.
    """
    every = config.learner.keep_state_every
    if not every:
        return None
    if where := elsewhere(nodes, placement):
        raise ResourceError(
            f"learner.keep_state_every is {every}: states are kept in the memory of the command's node, and ranks are "
            f"{where}; set it to 0, with loop.checkpoint_every as low as you like"
        )
    require_room(0, kept_bytes(source, config))
    found = KeptState(every)
    stack.callback(found.close)
    return found


def elsewhere(nodes: Sequence[Machine], placement: Placement) -> str:
    """Where ranks are, or may be, that do not see the memory of the command's node, in words; empty: nowhere."""
    others = set(placement.rank_nodes) - {nodes[0].address}
    if others or (len(nodes) > 1 and not placement.rank_nodes):
        return f"on {', '.join(sorted(others))}" if others else "on a node that Ray chooses"
    return ""


def background_of(
    config: Config,
    command: Command,
    nodes: Sequence[Machine],
    placement: Placement,
    source: str,
    directory: RunDirectory,
    stack: ExitStack,
    note: Callable[[str], None],
) -> BackgroundWriter | None:
    """What writes checkpoints beside the steps, until `stack` is left: after the ranks, which write into its memory.

    None, with the reason, where that cannot be.
    """
    if where := elsewhere(nodes, placement):
        note(f"training waits while a checkpoint is written, since its ranks are {where}")
        return None
    try:
        memory, lock = private_folder()
    except ResourceError as error:
        note(f"training waits while a checkpoint is written: {error}")
        return None
    stack.callback(lock.close)
    stack.callback(memory.with_suffix(STATE_LOCK).unlink, missing_ok=True)
    stack.callback(shutil.rmtree, memory, ignore_errors=True)
    lacks = partial(shortage, besides=kept_bytes(source, config) if command == "train" else 0)
    nbytes = checkpoint_bytes(source, config, command)
    return BackgroundWriter(directory, memory, nbytes, limit_s=config.learner.timeout_s, lacks=lacks)
