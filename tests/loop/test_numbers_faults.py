"""Whole runs of the loop in which numbers go wrong; processes are stand-ins, ledger and checkpoints are real."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_ins import FakeBodies, FakeCritic, FakePolicy, FakeReference, FakeScoring, asked_for, lines, scores_of
from test_loop_rl_training import ALL, CONFIG, PROMPTS, STEPS, close, warnings, wired
from test_rebuilding import Learner, Ranks, healing

from rlhf_dist.config.schema import (
    AlgoConfig,
    Config,
    KLConfig,
    LearnerConfig,
    LoopConfig,
    NumbersConfig,
    ShapingConfig,
)
from rlhf_dist.data.stream import PromptStream
from rlhf_dist.errors import NumbersError
from rlhf_dist.learner.numbers_check import RankFault
from rlhf_dist.learner.token_sums import Estimate, EstimateSums
from rlhf_dist.learner.witness import Seen
from rlhf_dist.loop.ledger_proof import LedgerProof
from rlhf_dist.loop.numbers_faults import skipped_part
from rlhf_dist.loop.ports import Batches, Estimates
from rlhf_dist.loop.rebuilding import train_to_the_end
from rlhf_dist.loop.rl_training import Run, train
from rlhf_dist.loop.train_state import read_state
from rlhf_dist.loop.watch import CollapseWatch
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Group, Handle, Scores

HUGE = 3e38
ORDER = [prompt.uid for prompt in PromptStream(CONFIG.data, CONFIG.seed, CONFIG.eval.prompts).take(2 * ALL)]
"""In which groups are issued: the third step has the groups of places 6 to 8."""


@dataclass
class HugeScoring(FakeScoring):
    """Rewards of some groups are so large that the difference of two is none."""

    groups: Sequence[str] = ()
    reward: float = HUGE

    def scores(self, uid: str, samples: int) -> Scores:
        found = super().scores(uid, samples)
        if uid not in self.groups and "*" not in self.groups:
            return found
        total = np.full(samples, self.reward, np.float32)
        total[0] = -self.reward
        return scores_of(total, {"exact": total})


def config_of(on_fault: Any, checkpoint_every: int = 2, **numbers: Any) -> Config:
    loop = LoopConfig(steps=STEPS, prompts_per_step=PROMPTS, checkpoint_every=checkpoint_every)
    return replace(
        CONFIG, loop=loop, algo=AlgoConfig(name="dr_grpo"), numbers=NumbersConfig(on_fault=on_fault, **numbers)
    )


def run_of(path: Path, config: Config, groups: Sequence[str], **parts: Any) -> Run:
    learner = Learner()
    parts = {"policy": learner, "ranks": Ranks(learner), "healing": healing()} | parts
    return wired(path, config, scoring=HugeScoring(groups=groups), **parts)


def ended(run: Run) -> tuple[LedgerProof, list[dict[str, Any]]]:
    """Its ledger, which has to hold, and its metrics: a line for each step."""
    proof = run.ledger.proof()
    close(run)
    found = lines(run.directory.metrics)
    assert proof.holds and proof.in_flight == 0 and [line["step"] for line in found] == list(range(STEPS + 1))
    return proof, found


def told(run: Run) -> list[str]:
    return [text for text in warnings(run.directory) if "numbers.on_fault" in text]


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
class TestHugeRewards:
    def test_stop_names_the_sample_and_keeps_the_batch(self, tmp_path: Path) -> None:
        run = run_of(tmp_path, config_of("stop"), [ORDER[7]])
        with pytest.raises(NumbersError) as raised:
            train_to_the_end(run, None)
        close(run)
        (warning,) = told(run)
        assert str(raised.value).startswith(f"{warning}; the last checkpoint is intact, and a resume may set ")
        file = run.directory.path.absolute() / "faults" / "step-3.safetensors"
        assert warning.startswith(f"step 3: the advantage of sample 0 of group {ORDER[7]} is ")
        assert warning.endswith(
            f"the run ends (numbers.on_fault stop); look at its batch with `rlhf-dist replay {file}`"
        )
        facts = json.loads(file.read_text())
        assert (facts["step"], facts["checkpoint"], facts["updates"]) == (3, "step-2", 0)
        assert ORDER[7] in facts["uids"].values() and "on_fault: stop" in facts["config"]
        (event,) = [event for event in lines(run.directory.events) if event["facts"].get("policy") == "stop"]
        assert event["facts"]["alert"] == "numbers"

    def test_skip_learns_nothing_from_the_step_and_goes_on(self, tmp_path: Path) -> None:
        run = run_of(tmp_path, config_of("skip"), [ORDER[7]])
        train_to_the_end(run, None)
        policy: Any = run.policy
        proof, metrics = ended(run)
        assert dict(proof.dropped) == {"step_skipped": PROMPTS} and proof.consumed == ALL - PROMPTS
        assert policy.calls.count("update") == STEPS - 1
        assert [line.get("learner/skipped") for line in metrics] == [None, 0.0, 0.0, 1.0, 0.0]
        assert metrics[3]["sync/changed_share"] == 0.0 and "policy/loss" not in metrics[3]
        assert len(told(run)) == 1 and "; the step is skipped (numbers.on_fault skip); " in told(run)[0]

    def test_roll_back_leaves_the_groups_out_and_makes_the_step_again_with_others(self, tmp_path: Path) -> None:
        run = run_of(tmp_path, config_of("roll_back"), [ORDER[10]])
        train_to_the_end(run, None)
        ranks: Any = run.ranks
        proof, metrics = ended(run)
        assert dict(proof.dropped) == {"rolled_back": PROMPTS} and proof.consumed == ALL
        assert [folder.name for folder in ranks.folders] == ["step-2"]
        assert all(line["learner/skipped"] == 0.0 for line in metrics[1:])
        uses = run_uses(run)
        assert not set(ORDER[9:12]) & set(uses) and set(ORDER[12:15]) <= set(uses)

    @pytest.mark.parametrize(("on_fault", "tried"), [("skip", [1, 2, 3]), ("roll_back", [1, 1, 1])])
    def test_it_does_not_go_on_for_ever(self, tmp_path: Path, on_fault: str, tried: list[int]) -> None:
        run = run_of(tmp_path, config_of(on_fault, max_faults=2), ["*"])
        with pytest.raises(NumbersError) as raised:
            train_to_the_end(run, None)
        close(run)
        assert "There were 3 faults in a row" in str(raised.value)
        assert "numbers.max_faults is 2; those before it: step 1: the advantage" in str(raised.value)
        assert [int(text.split()[1].rstrip(":")) for text in told(run)] == tried
        assert len(list((run.directory.path / "faults").iterdir())) == 3, "none is written over another"

    @pytest.mark.parametrize("on_fault", ["skip", "roll_back"])
    def test_a_run_that_was_killed_after_it_is_resumed(self, tmp_path: Path, on_fault: str) -> None:
        """Two steps in a row go wrong; the process dies in the last one."""
        config = config_of(on_fault, checkpoint_every=1)
        run = run_of(tmp_path, config, ORDER[3:9:3], policy=(dies := Learner()))
        made = {"skip": 2, "roll_back": STEPS}[on_fault]

        def die(call: str, count: int) -> None:
            if call == "publish" and dies.calls.count("update") == made:
                raise RuntimeError("killed")

        dies.fault = die
        with pytest.raises(RuntimeError, match="killed"):
            train_to_the_end(replace(run, ranks=Ranks(dies)), None)
        close(run)
        folder = run.directory.latest_checkpoint()
        assert folder is not None and folder.name == f"step-{STEPS - 1}"
        again = wired(tmp_path, config, again=True, policy=Learner())
        train(again, read_state(folder))
        proof, _ = ended(again)
        assert proof.consumed == {"skip": ALL - 2 * PROMPTS, "roll_back": ALL}[on_fault]


@dataclass
class InfiniteReference(FakeReference):
    """One group is infinitely far away."""

    group: str = ""

    def submit(self, server: str, key: str, body: Handle[Group], temperature: float) -> None:
        self.kl = math.inf if asked_for(body)[0] == self.group else 2.0
        super().submit(server, key, body, temperature)


def test_a_skipped_step_leaves_nothing_in_the_running_moments_and_the_kl_coefficient(tmp_path: Path) -> None:
    shaping, kl = ShapingConfig(normalize="running"), KLConfig(coef=0.1, controller="adaptive", target=1.0)
    config = replace(config_of("skip"), algo=AlgoConfig(shaping=shaping, kl=kl))
    scoring, reference = HugeScoring(groups=ORDER[6:9], reward=100.0), InfiniteReference(group=ORDER[7])
    run = wired(tmp_path, config, scoring=scoring, reference=reference)
    train(run, None)
    _, metrics = ended(run)
    assert told(run)[0].startswith(
        f"step 3: the KL to the reference of sample 0 of group {ORDER[7]} is inf (and so are"
    )
    assert metrics[4]["reward/running_mean"] == pytest.approx(metrics[2]["reward/running_mean"])
    assert metrics[4]["kl/coef"] == metrics[3]["kl/coef"] != metrics[2]["kl/coef"]


def run_uses(run: Run) -> list[str]:
    """Groups that were trained on."""
    with sqlite3.connect(run.directory.ledger) as database:
        return [uid for (uid,) in database.execute("SELECT uid FROM uses")]


@dataclass
class RefusingPolicy(FakePolicy):
    """Its ranks refuse the second of three optimizer steps in the third update."""

    bodies: FakeBodies = field(default_factory=FakeBodies)
    sees_more: bool = False

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        stats = super().update(batches, estimates)
        made = MetricSums({"learner/updates": (2 * float(self._made()), 2.0)})
        refused = MetricSums({}, {names.FAULT: 1.0} if self.updates == 3 else {})
        return MetricSums.merge([stats, made, refused])

    def _made(self) -> int:
        return 1 if self.updates == 3 else 3

    def faults(self) -> Mapping[str, RankFault]:
        key = self.bodies.given[-1][0][1]
        found = RankFault("rollout logprobs", -math.inf, 1, (key, 2), 4)
        return {"learner rank 0": RankFault("gradient", math.inf, 1), "learner rank 1": found}

    def witnessed(self) -> Sequence[Seen]:
        keys, _ = self.bodies.given[-1]
        shards, _ = self.given[-1]
        found = []
        for shard in shards:
            chosen = [int(row) for update in shard.updates[: self._made()] for rows in update for row in rows]
            origins = [(str(keys[g]), int(s)) for g, s in zip(shard.groups, shard.samples, strict=True)]
            times = np.bincount(np.array(chosen, np.int64), minlength=len(origins)).astype(float)
            found.append(Seen(tuple(origins), times + (self.sees_more and self.updates == 3)))
        return found


def refusing(on_fault: str) -> Config:
    """Three optimizer steps a batch, a group each, and a witness."""
    config = config_of(on_fault)
    return replace(config, loop=replace(config.loop, witness=True), learner=LearnerConfig(updates_per_batch=3))


def test_groups_of_optimizer_steps_that_were_taken_before_count_as_trained(tmp_path: Path) -> None:
    """And the witness, which has seen these alone, agrees."""
    bodies = FakeBodies()
    run = wired(tmp_path, refusing("skip"), policy=RefusingPolicy(bodies=bodies), bodies=bodies)
    train(run, None)
    proof, metrics = ended(run)
    assert dict(proof.dropped) == {"step_skipped": 2} and proof.consumed == ALL - 2
    assert proof.witness is not None and proof.witness.groups == ALL - 2
    assert metrics[3]["learner/updates"] == 1 and metrics[3]["learner/skipped"] == 0.0
    assert names.FAULT not in metrics[3]
    assert told(run)[0].startswith(
        f"step 3: the rollout logprobs of token 4 of sample 2 of group {ORDER[7]} on learner rank 1 is -inf in "
        "optimizer step 2 of the batch; the rest of the step is skipped"
    )


def test_a_witness_that_saw_more_than_was_taken_ends_the_run(tmp_path: Path) -> None:
    bodies = FakeBodies()
    run = wired(tmp_path, refusing("skip"), policy=RefusingPolicy(bodies=bodies, sees_more=True), bodies=bodies)
    with pytest.raises(Exception, match="step 3: the witness contradicts the plan of the step"):
        train(run, None)
    close(run)


@pytest.mark.parametrize(("limit", "fault"), [(1.5, True), (2.0, False), (0.0, False)])
def test_a_kl_beyond_its_limit_is_found_before_anything_is_learnt(tmp_path: Path, limit: float, fault: bool) -> None:
    algo = AlgoConfig(kl=KLConfig(coef=0.1))
    policy = FakePolicy()
    run = wired(
        tmp_path, replace(config_of("stop", max_kl=limit), algo=algo), reference=FakeReference(kl=2.0), policy=policy
    )
    if fault:
        with pytest.raises(
            NumbersError, match=r"step 1: the KL to the reference is 2 nats a response, and numbers\.max_kl"
        ):
            train(run, None)
    else:
        train(run, None)
    close(run)
    assert policy.updates == (0 if fault else STEPS) and len(told(run)) == fault


@dataclass
class NoNumbersCritic(FakeCritic):
    """Its values are none."""

    def estimate(self, batches: Batches) -> tuple[Sequence[Handle[Estimate]], EstimateSums]:
        handles, sums = super().estimate(batches)
        return handles, replace(sums, values=math.nan)


def test_credit_by_token_that_is_none_is_found_before_critic_and_policy_learn(tmp_path: Path) -> None:
    policy, critic = FakePolicy(), NoNumbersCritic()
    run = wired(tmp_path, replace(config_of("stop"), algo=AlgoConfig(name="ppo")), policy=policy, critic=critic)
    with pytest.raises(NumbersError, match="step 1: the credit by token is not finite: critic/value_mean is nan"):
        train(run, None)
    close(run)
    assert policy.updates == 0 and critic.given == []


@dataclass
class RefusingCritic(FakeCritic):
    """Its ranks refuse an optimizer step in the third update."""

    def finish_update(self, pending: Handle[MetricSums]) -> MetricSums:
        refused = MetricSums({"critic/updates": (0.0, 2.0)}, {names.CRITIC_FAULT: 1.0} if len(self.given) == 3 else {})
        return MetricSums.merge([super().finish_update(pending), refused])

    def faults(self) -> Mapping[str, RankFault]:
        return {"critic rank 0": RankFault("loss", math.nan, 0)}


@dataclass
class TellingPolicy(FakePolicy):
    """Says how many optimizer steps it takes."""

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        return MetricSums.merge([super().update(batches, estimates), MetricSums({"learner/updates": (2.0, 2.0)})])


def test_a_step_is_not_skipped_where_the_critic_alone_does_not_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[float] = []
    monkeypatch.setattr(CollapseWatch, "step", lambda self, stats: watched.append(stats["learner/updates"]) or [])
    config = replace(config_of("skip", 0), algo=AlgoConfig(name="ppo"))
    run = wired(tmp_path, config, policy=TellingPolicy(), critic=RefusingCritic())
    train(run, None)
    proof, metrics = ended(run)
    (text,) = told(run)
    assert text.startswith("step 3: the loss on critic rank 0 is nan; the critic's part of the step is skipped (")
    assert proof.consumed == ALL and [line["learner/skipped"] for line in metrics[1:]] == [0.0] * STEPS
    assert watched == [1.0] * STEPS


@pytest.mark.parametrize(
    ("refused", "others", "part"),
    [
        ({"policy": 0}, False, "the step"),
        ({"policy": 2}, False, "the rest of the step"),
        ({"policy": 0}, True, "the policy's part of the step"),
        ({"critic": 1}, True, "the rest of the critic's part of the step"),
        ({"policy": 0, "critic": 0}, False, "the step"),
        ({"policy": 0, "critic": 1}, False, "the rest of the step"),
    ],
)
def test_what_is_skipped_in_words(refused: dict[str, int], others: bool, part: str) -> None:
    assert skipped_part(refused, others) == part
