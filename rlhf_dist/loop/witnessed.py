"""What the optimizer has shown of a training step (`loop.witness`), compared with the step's plan, sample by sample.

The ledger says that a step trained these groups. The witness says, for each sample, in how many optimizer steps it was.
That has to be one for each pass over the batch, but for samples that the plan leaves out because they cannot have a
gradient, and for optimizer steps that `algo.kl_stop` left out on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_dist.algo.algorithm import Algorithm
from rlhf_dist.config.schema import LearnerConfig
from rlhf_dist.errors import RunError
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.witness import Seen
from rlhf_dist.loop.batch import Batch
from rlhf_dist.loop.ledger import Presence
from rlhf_dist.telemetry.run_telemetry import Telemetry
from rlhf_dist.types import Credit

NAMED = 5
"""Differences that a message names at most."""


@dataclass(frozen=True, slots=True)
class Witnessed:
    """A step, as its optimizer has shown it."""

    groups: tuple[Presence, ...]
    """Of each group, in the order of the batch."""
    problems: tuple[str, ...]
    """Where it differs from the plan, or the plan from what it has to be: a sentence for each sample. None: nowhere."""


def compare(
    seen: Sequence[Seen],
    shards: Sequence[Shard],
    batch: Batch,
    credit: Credit,
    algorithm: Algorithm,
    learner: LearnerConfig,
    updates: int,
    *,
    cut: bool,
) -> Witnessed:
    """`seen`: by rank; ranks that share rows have to say the same of them. `updates`: optimizer steps made; `cut`: the
    learner may have left out the last ones (`algo.kl_stop` behind one at least, or numbers that went wrong)."""
    rows = {(batch.keys[g], int(s)): i for i, (g, s) in enumerate(zip(batch.groups, batch.samples, strict=True))}
    whole = learner.epochs * learner.updates_per_batch
    problems = []
    if updates != whole and not (cut and updates < whole):
        problems.append(f"the learner made {updates} optimizer steps of {whole}")
    plan, expected = planned(batch, shards, whole), planned(batch, shards, updates)
    idle = (credit.advantages == 0) & algorithm.idle_without_credit
    for row in np.flatnonzero((plan != learner.epochs) & ~((plan == 0) & idle)):
        problems.append(f"the plan has {name(batch, row)} in {plan[row]} optimizer steps, not {learner.epochs}")
    parts, unknown = max(len(seen) // len(shards), 1), list[str]()
    times = np.zeros((parts, len(rows)))
    for rank, of_rank in enumerate(seen):
        for origin, count in zip(of_rank.rows, of_rank.times, strict=True):
            if origin in rows:
                times[rank % parts, rows[origin]] += count
            elif count:
                unknown.append(f"the optimizer took sample {origin[1]} of {origin[0]}, which is not of this step")
    problems += [*differences(batch, times, expected), *unknown]
    taken, left_out = (times[0] > 0).astype(int), (expected == 0).astype(int)
    counts = [np.bincount(batch.groups, found, len(batch.keys)).astype(int) for found in (taken, left_out)]
    return Witnessed(tuple(Presence(*map(int, pair)) for pair in zip(*counts, strict=True)), tuple(problems))


def planned(batch: Batch, shards: Sequence[Shard], updates: int) -> np.ndarray:
    """int64 [B]: in how many of the plan's first `updates` optimizer steps each row is."""
    places = {pair: i for i, pair in enumerate(zip(batch.groups.tolist(), batch.samples.tolist(), strict=True))}
    found = np.zeros(len(places), np.int64)
    for shard in shards:
        pairs = zip(shard.groups.tolist(), shard.samples.tolist(), strict=True)
        mine = np.array([places[pair] for pair in pairs], np.int64)
        for number in range(updates):
            for chosen in shard.updates[number % len(shard.updates)]:
                np.add.at(found, mine[chosen], 1)
    return found


def differences(batch: Batch, times: np.ndarray, expected: np.ndarray) -> Iterator[str]:
    """A sentence for each sample that one of the ranks that share it was to see more or less often; times [P, B]."""
    for row in np.flatnonzero((times != expected).any(0)):
        part = int(np.argmax(times[:, row] != expected[row]))
        where = f" on part {part} of the ranks that share it" if len(times) > 1 else ""
        says = f"the plan says {expected[row]}" if expected[row] else "the plan leaves it out"
        yield f"the optimizer took {name(batch, row)} in {times[part, row]:g} optimizer steps{where}, and {says}"


def name(batch: Batch, row: int) -> str:
    """`sample 3 of group 0/7`."""
    return f"sample {batch.samples[row]} of group {batch.uids[batch.groups[row]]}"


def verified(found: Witnessed | None, telemetry: Telemetry, step: int) -> tuple[Presence, ...] | None:
    """What the ledger is to keep of it; None where there is no witness.

    Raises RunError after a warning where it differs from the plan: the ledger would not be true.
    """
    if found is None:
        return None
    if not found.problems:
        return found.groups
    more = f"; and {len(found.problems) - NAMED} more" if len(found.problems) > NAMED else ""
    text = f"step {step}: the witness contradicts the plan of the step: {'; '.join(found.problems[:NAMED])}{more}"
    telemetry.warn(text, step=step, differences=len(found.problems))
    raise RunError(f"{text}. The ledger does not have its groups as trained; the last checkpoint is intact")
