"""What the optimizer has shown of a step, compared with the plan by hand; and whole runs whose learner tells the truth
or not, with stand-ins for the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_ins import EXPERIENCES, FakeBodies, FakePolicy, lines
from test_loop_rl_training import CONFIG, PROMPTS, STEPS, close, warnings, whole, wired

from rlhf_dist.algo.algorithm import Algorithm
from rlhf_dist.algo.recipes import grpo
from rlhf_dist.cli.main import main
from rlhf_dist.config.schema import AlgoConfig, CriticConfig, KLConfig, LearnerConfig
from rlhf_dist.errors import RunError
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.witness import Seen
from rlhf_dist.loop.ledger import Presence
from rlhf_dist.loop.ports import Batches, Estimates
from rlhf_dist.loop.rl_training import train
from rlhf_dist.loop.step import Learning, collate, make_shards
from rlhf_dist.loop.train_state import read_state
from rlhf_dist.loop.witnessed import Witnessed, compare
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Credit, Sampling

SAMPLING = Sampling(temperature=0.8, top_p=1.0, top_k=0, max_tokens=9, stop=())
METHOD = grpo(AlgoConfig(kl=KLConfig(coef=0.0)))
LEARNER = LearnerConfig(micro_batch_tokens=20, epochs=2, updates_per_batch=2)
BATCH = collate(EXPERIENCES)
CREDIT = Credit(np.array([1, -1, 0, 0, 0, 2, 1, -1], np.float32))
"""Group 1 and the first sample of group 2 have nothing to learn."""
SHARDS = make_shards(
    BATCH, BATCH.scores, CREDIT, Learning(METHOD, LEARNER, CriticConfig(), SAMPLING, 9), 0.0, step=1, shares=2
)


def told(times: dict[int, float]) -> Seen:
    """A rank whose optimizer took these rows of the batch so often."""
    rows = tuple((BATCH.keys[BATCH.groups[row]], int(BATCH.samples[row])) for row in times)
    return Seen(rows, np.array(list(times.values())))


def rows_of(shard: Shard) -> list[int]:
    pairs = list(zip(BATCH.groups.tolist(), BATCH.samples.tolist(), strict=True))
    return [pairs.index(pair) for pair in zip(shard.groups.tolist(), shard.samples.tolist(), strict=True)]


def truth(times: float = 2.0) -> list[dict[int, float]]:
    """Of each share, what is seen where all goes well."""
    return [dict.fromkeys(rows_of(shard), times) for shard in SHARDS]


def found(
    seen: Sequence[Seen],
    shards: Sequence[Shard] = SHARDS,
    algorithm: Algorithm = METHOD,
    learner: LearnerConfig = LEARNER,
    updates: int = 4,
) -> Witnessed:
    return compare(seen, shards, BATCH, CREDIT, algorithm, learner, updates, cut=algorithm.kl_stop > 0)


def test_samples_that_cannot_have_a_gradient_are_left_out_by_the_plan() -> None:
    assert sorted(row for share in truth() for row in share) == [0, 1, 5, 6, 7]
    assert found([told(share) for share in truth()]) == Witnessed(
        (Presence(2, 0), Presence(0, 2), Presence(1, 1), Presence(2, 0)), ()
    )


CHANGES: dict[str, tuple[Callable[[list[dict[int, float]]], object], str]] = {
    "not at all": (lambda shares: shares[0].pop(rows_of(SHARDS[0])[0]), "in 0 optimizer steps, and the plan says 2"),
    "once": (
        lambda shares: shares[0].update({rows_of(SHARDS[0])[0]: 1.0}),
        "in 1 optimizer steps, and the plan says 2",
    ),
    "by both": (lambda shares: shares[1].update({rows_of(SHARDS[0])[0]: 2.0}), "in 4 optimizer steps, and the plan s"),
    "in part": (lambda shares: shares[0].update({rows_of(SHARDS[0])[0]: 1.5}), "in 1.5 optimizer steps, and the plan "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_count_that_differs_is_named(change: str) -> None:
    row, shares = rows_of(SHARDS[0])[0], truth()
    CHANGES[change][0](shares)
    (problem,) = found([told(share) for share in shares]).problems
    name = f"sample {BATCH.samples[row]} of group {BATCH.uids[BATCH.groups[row]]}"
    assert problem.startswith(f"the optimizer took {name} in ") and CHANGES[change][1] in problem


def test_a_sample_that_the_plan_leaves_out_must_not_be_trained() -> None:
    shares = truth()
    shares[1][3] = 2.0
    (problem,) = found([told(share) for share in shares]).problems
    assert problem == "the optimizer took sample 1 of group 0/1 in 2 optimizer steps, and the plan leaves it out"


def test_samples_of_another_step_are_named() -> None:
    first, second = map(told, truth())
    first = Seen((*first.rows, ("train/0/77/0", 3)), np.append(first.times, 1.0))
    (problem,) = found([first, second]).problems
    assert problem == "the optimizer took sample 3 of train/0/77/0, which is not of this step"


def test_a_plan_that_leaves_out_what_has_a_gradient_is_no_excuse() -> None:
    """What was planned was done: nobody else would see it."""
    kept = [replace(shard, updates=tuple(tuple(c[:0] for c in u) for u in shard.updates)) for shard in SHARDS[:1]]
    seen = [told(dict.fromkeys(rows_of(SHARDS[0]), 0.0)), told(truth()[1])]
    problems = found(seen, [*kept, SHARDS[1]]).problems
    assert len(problems) == len(rows_of(SHARDS[0]))
    assert all(
        problem.startswith("the plan has sample ") and "in 0 optimizer steps, not 2" in problem for problem in problems
    )
    others = replace(METHOD, idle_without_credit=False)
    assert len(found([told(share) for share in truth()], algorithm=others).problems) == 3, "rows 2, 3 and 4"


def test_a_pass_that_was_stopped_for_its_kl_was_left_out_on_all_ranks_alike() -> None:
    """After three of four optimizer steps the groups of the second half were trained once."""
    counts = {row: 2.0 if row < 4 else 1.0 for row in range(8)}
    shares = [{row: counts[row] for row in share} for share in truth()]
    stopping = replace(METHOD, kl_stop=0.1)
    assert found([told(share) for share in shares], algorithm=stopping, updates=3).problems == ()
    problems = found([told(share) for share in shares], updates=3).problems
    assert problems == ("the learner made 3 optimizer steps of 4",), "nothing may stop it"
    assert len(found([told(share) for share in truth()], algorithm=stopping, updates=3).problems) == 3
    once = [{row: 1.0 for row in share if row < 4} for share in truth()]
    groups = found([told(share) for share in once], algorithm=stopping, updates=1).groups
    assert groups == (Presence(2, 0), Presence(0, 2), Presence(0, 2), Presence(0, 2))


def test_ranks_that_share_rows_count_once_and_have_to_agree() -> None:
    """Two ranks a share: ranks 0 and 1 have the rows of the first, ranks 2 and 3 those of the second."""
    seen = [told(share) for share in truth() for _ in range(2)]
    assert found(seen).problems == () and found(seen).groups[0] == Presence(2, 0)
    row, shares = rows_of(SHARDS[1])[0], truth()
    shares[1][row] = 1.0
    (problem,) = found([*seen[:3], told(shares[1])]).problems
    assert " in 1 optimizer steps on part 1 of the ranks that share it, and the plan says 2" in problem


# ---- whole runs ------------------------------------------------------------------------------------------------------


@dataclass
class WitnessedPolicy(FakePolicy):
    """Its optimizer takes what the plan says, but for what `changed` does to that."""

    bodies: FakeBodies = field(default_factory=FakeBodies)
    changed: Callable[[int, list[dict[tuple[str, int], float]]], object] = lambda update, seen: None
    """(number of the update, by rank how often each sample was seen)."""

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        shard = batches[0].place
        made = MetricSums({"learner/updates": (float(shard.epochs * len(shard.updates)), 1.0)})
        return MetricSums.merge([super().update(batches, estimates), made])

    def witnessed(self) -> Sequence[Seen]:
        keys, _ = self.bodies.given[-1]
        shards, _ = self.given[-1]
        seen = [
            {(str(keys[g]), int(s)): float(shard.epochs) for g, s in zip(shard.groups, shard.samples, strict=True)}
            for shard in shards
        ]
        self.changed(self.updates, seen)
        return [Seen(tuple(rank), np.array(list(rank.values()))) for rank in seen]


WITNESS = replace(CONFIG, loop=replace(CONFIG.loop, witness=True))
GROUP = WITNESS.algo.group_size


def parts(changed: Callable[..., object] = lambda update, seen: None) -> dict[str, Any]:
    bodies = FakeBodies()
    return {"policy": WitnessedPolicy(bodies=bodies, changed=changed), "bodies": bodies}


def test_a_run_with_a_witness_says_so_beside_the_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = whole(tmp_path, WITNESS, **parts())
    samples = STEPS * PROMPTS * GROUP
    said = (
        f"witness: {STEPS} of {STEPS} steps: the optimizer took {samples} samples of {STEPS * PROMPTS} groups, the "
        f"plan left out 0; this agrees with {STEPS * PROMPTS} groups in the ledger"
    )
    capsys.readouterr()
    assert main(["ledger", str(run.directory.path)]) == 0 and capsys.readouterr().out.splitlines()[-1] == said
    assert warnings(run.directory) == []


def dropped(update: int, seen: list[dict[tuple[str, int], float]]) -> None:
    if update == 3:
        seen[1].pop(next(iter(seen[1])))


def twice(update: int, seen: list[dict[tuple[str, int], float]]) -> None:
    if update == 3:
        seen[0][next(iter(seen[0]))] += 1


@pytest.mark.parametrize(("changed", "times"), [(dropped, 0), (twice, 2)])
def test_a_sample_that_is_lost_or_trained_twice_ends_the_run(
    tmp_path: Path, changed: Callable[..., object], times: int
) -> None:
    """In the third step. Its groups are not consumed, and a resume from the second trains them for the first time."""
    run = wired(tmp_path, WITNESS, **parts(changed))
    with pytest.raises(RunError, match=r"step 3: the witness contradicts the plan of the step: ") as raised:
        train(run, None)
    (warning,) = warnings(run.directory)
    assert f" in {times} optimizer steps, and the plan says 1" in warning and str(raised.value).startswith(warning)
    uid = warning.split("of group ")[1].split(" in ")[0]
    (event,) = [event for event in lines(run.directory.events) if event["kind"] == "warning"]
    assert event["facts"] == {"step": 3, "differences": 1}
    assert run.ledger.counts()["consumed"] == 2 * PROMPTS
    state = run.ledger._database.execute("SELECT state FROM groups WHERE uid = ?", (uid,)).fetchall()
    assert state == [("scored",)]
    close(run)
    folder = run.directory.latest_checkpoint()
    assert folder is not None and folder.name == "step-2"
    again = wired(tmp_path, WITNESS, again=True, **parts())
    train(again, read_state(folder))
    proof = again.ledger.proof()
    close(again)
    assert proof.holds and proof.witness is not None
    assert (proof.witness.steps, proof.witness.samples) == (STEPS, STEPS * PROMPTS * GROUP)


@dataclass
class StoppingPolicy(WitnessedPolicy):
    """In its third update it stops after the first of three optimizer steps."""

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        stats = super().update(batches, estimates)
        return replace(stats, sums={**stats.sums, "learner/updates": (1.0, 1.0)}) if self.updates == 3 else stats

    def witnessed(self) -> Sequence[Seen]:
        shards, seen = self.given[-1][0], super().witnessed()
        if self.updates != 3:
            return seen
        first = [np.concatenate(shard.updates[0]) for shard in shards]
        return [
            replace(one, times=np.isin(np.arange(len(one.times)), rows).astype(float))
            for one, rows in zip(seen, first, strict=True)
        ]


def test_groups_that_a_limit_on_the_kl_left_out_are_not_told_of_as_trained(tmp_path: Path) -> None:
    """The third step has three optimizer steps with a group each, and makes the first of them."""
    algo, learner = replace(WITNESS.algo, kl_stop=0.1), LearnerConfig(updates_per_batch=PROMPTS)
    bodies = FakeBodies()
    run = wired(
        tmp_path, replace(WITNESS, algo=algo, learner=learner), policy=StoppingPolicy(bodies=bodies), bodies=bodies
    )
    train(run, None)
    proof = run.ledger.proof()
    close(run)
    assert proof.holds and proof.consumed == (STEPS - 1) * PROMPTS + 1
    assert dict(proof.dropped) == {"kl_stop": PROMPTS - 1}
    assert proof.witness is not None and proof.witness.groups == proof.consumed


@dataclass
class IdlePolicy(WitnessedPolicy):
    """Makes no optimizer step in its third update, and says so."""

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        stats = super().update(batches, estimates)
        return replace(stats, sums={**stats.sums, "learner/updates": (0.0, 1.0)}) if self.updates == 3 else stats

    def witnessed(self) -> Sequence[Seen]:
        seen = super().witnessed()
        return [replace(one, times=one.times * 0) for one in seen] if self.updates == 3 else seen


def test_a_limit_on_the_kl_is_no_excuse_for_no_optimizer_step_at_all(tmp_path: Path) -> None:
    config = replace(WITNESS, algo=replace(WITNESS.algo, kl_stop=0.1), learner=LearnerConfig(epochs=2))
    bodies = FakeBodies()
    run = wired(tmp_path, config, policy=IdlePolicy(bodies=bodies), bodies=bodies)
    with pytest.raises(RunError, match=r"step 3: the witness contradicts .*: the learner made 0 optimizer steps of 2"):
        train(run, None)
    close(run)


def test_a_witness_may_be_called_when_a_run_is_resumed(tmp_path: Path) -> None:
    """What was trained before has none; that is said, and is no contradiction."""
    run = wired(tmp_path, CONFIG, policy=FakePolicy(fails_at=3))
    with pytest.raises(RuntimeError):
        train(run, None)
    close(run)
    folder = run.directory.latest_checkpoint()
    assert folder is not None
    again = wired(tmp_path, WITNESS, again=True, **parts())
    train(again, read_state(folder))
    proof = again.ledger.proof()
    close(again)
    assert proof.holds and proof.witness is not None and (proof.witness.steps, proof.witness.of_steps) == (2, STEPS)
