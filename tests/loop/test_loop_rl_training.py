"""A whole run of the loop with stand-ins for its processes; stream, ledger, files and checkpoints are real."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from stand_ins import FakeCritic, FakePolicy, FakeReference, FakeRollouts, Quiet, actors, lines, members

from rlhf_dist.algo.recipes import ALGORITHMS
from rlhf_dist.config.schema import (
    AlgoConfig,
    Config,
    CriticConfig,
    DataConfig,
    EvalConfig,
    KLConfig,
    LearnerConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    ReferenceConfig,
    RolloutConfig,
    ShapingConfig,
    TaskConfig,
    TelemetryConfig,
)
from rlhf_dist.data.stream import PromptStream, held_out
from rlhf_dist.errors import DataError, DiskError
from rlhf_dist.learner.checkpoint_files import EMA_FILES, critic_files
from rlhf_dist.loop.healing import unwatched
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.rl_training import Run, resume, train
from rlhf_dist.loop.run_directory import RunDirectory, open_run_directory
from rlhf_dist.loop.shaper import Shaper
from rlhf_dist.loop.train_state import State, read_state
from rlhf_dist.loop.watch import CollapseWatch
from rlhf_dist.telemetry.run_telemetry import open_telemetry
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.sync import WeightSync

PROMPTS, STEPS = 3, 4
CONFIG = Config(
    data=DataConfig(task=TaskConfig(train_size=20)),
    loop=LoopConfig(steps=STEPS, prompts_per_step=PROMPTS, checkpoint_every=2, logprob_diff_limit=1e-3),
    eval=EvalConfig(prompts=4, every=2, samples=0),
    telemetry=TelemetryConfig(wandb="off", samples=2),
)
ALL = STEPS * PROMPTS


def wired(path: Path, config: Config = CONFIG, again: bool = False, **parts: Any) -> Run:
    """A run in `path`; `again` is --resume."""
    directory = open_run_directory(str(path), "run", "name: run\n", again)
    telemetry, _ = open_telemetry(config.telemetry, directory.path, "run", {}, None, lambda message: None)
    sides = {name: parts.pop(name) for name in ("rollouts", "scoring", "reference", "bodies") if name in parts}
    processes = actors(**sides)
    made: dict[str, Any] = {"policy": FakePolicy(), "critic": None, "healing": unwatched()} | parts
    made.setdefault("sync", WeightSync(made["policy"], processes.rollouts))  # pyright: ignore[reportArgumentType]
    return Run(
        config=config,
        algorithm=ALGORITHMS[config.algo.name](config.algo),
        stream=PromptStream(config.data, config.seed, config.eval.prompts),
        held_out=held_out(config.data, config.eval.prompts),
        actors=processes,
        members=members(processes.reference is not None),
        ledger=Ledger(directory.ledger),
        directory=directory,
        telemetry=telemetry,
        progress=Quiet(),
        shaper=Shaper(config.algo, config.rollout.max_response_tokens),
        watch=CollapseWatch(config.algo.group_size),
        **made,
    )


def close(run: Run) -> None:
    run.ledger.close()
    run.telemetry.close()
    run.directory.close()


def whole(path: Path, config: Config = CONFIG, **parts: Any) -> Run:
    """A run from start to end."""
    run = wired(path, config, **parts)
    train(run, None)
    close(run)
    return run


def warnings(directory: RunDirectory) -> list[str]:
    return [event["message"] for event in lines(directory.events) if event["kind"] == "warning"]


def test_one_line_a_step_and_the_evaluation_is_in_it(tmp_path: Path) -> None:
    run = whole(tmp_path)
    found = lines(run.directory.metrics)
    assert [line["step"] for line in found] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in found if "eval/greedy_accuracy" in line] == [0, 2, 4]
    assert [line["step"] for line in found if "reward/mean" in line] == [1, 2, 3, 4]
    assert warnings(run.directory) == []


def test_a_checkpoints_state_is_enough_to_go_on(tmp_path: Path) -> None:
    run = whole(tmp_path)
    folder = run.directory.latest_checkpoint()
    assert folder is not None
    written = json.loads((folder / "state.json").read_text())
    kept = {"cursor", "before", "results", "answers", "shaper", "watch", "ledger", "open", "evaluated"}
    assert written.keys() == kept | {"step", "steps", "elapsed", "format", "files", "hash"}
    state = read_state(folder)
    assert (state.step, state.steps, state.cursor["position"]) == (STEPS, STEPS, ALL)
    assert state.results["eval/greedy_accuracy"] == 1.0 and state.before.keys() == state.results.keys()
    (folder / "state.json").write_text('{"step": 4, "cursor": {}, "before": {}}')
    with pytest.raises(DataError, match=r"state\.json: is not the state of such a checkpoint: it lacks results, steps"):
        read_state(folder)


def test_a_run_cut_before_its_first_checkpoint_begins_again_in_the_same_directory(tmp_path: Path) -> None:
    config = replace(CONFIG, loop=replace(CONFIG.loop, checkpoint_every=0))
    run = wired(tmp_path, config, policy=FakePolicy(fails_at=3))
    with pytest.raises(RuntimeError, match="the machine went down"):
        train(run, None)
    assert run.ledger.counts() | {"rewound": 0} == {
        "issued": 0,
        "finished": 0,
        "scored": PROMPTS,
        "consumed": 2 * PROMPTS,
        "dropped": 0,
        "rewound": 0,
    }
    close(run)
    assert run.directory.latest_checkpoint() is None

    again = wired(tmp_path, config, again=True)
    train(again, None)
    proof = again.ledger.proof()
    close(again)
    tokens = f"{ALL * 24} tokens sampled: {ALL * 24} trained on, 0 dropped, 0 lost"
    groups = f"{ALL} groups issued: {ALL} trained once, 0 dropped, 0 in flight, 0 lost, 0 used twice"
    assert proof.text() == f"{groups}; {tokens}"
    assert [line["step"] for line in lines(again.directory.metrics)] == [0, 1, 2, 3, 4]
    aside = again.directory.path / "metrics.before-resume.jsonl"
    assert [line["step"] for line in lines(aside)] == [0, 1, 2]
    (event,) = [event for event in lines(again.directory.events) if event["kind"] == "resume"]
    assert event["facts"] == {"step": 0, "prompts_reissued": 3 * PROMPTS, "metrics_moved": 3}
    first = [prompt.uid for prompt in PromptStream(config.data, config.seed, config.eval.prompts).take(PROMPTS)]
    rollouts: Any = again.actors.rollouts
    served = [uid for uid in rollouts.served if not uid.startswith("eval")]
    assert set(first) <= set(served), "the stream begins at its start"


def test_a_new_run_tells_of_no_resume(tmp_path: Path) -> None:
    run = whole(tmp_path)
    assert [event for event in lines(run.directory.events) if event["kind"] == "resume"] == []


def test_a_resume_from_a_checkpoint_goes_on_after_it(tmp_path: Path) -> None:
    run = wired(tmp_path, policy=FakePolicy(fails_at=4))
    with pytest.raises(RuntimeError):
        train(run, None)
    close(run)
    folder = run.directory.latest_checkpoint()
    assert folder is not None and folder.name == "step-2"
    again, state = wired(tmp_path, again=True), read_state(folder)
    assert 0 < state.elapsed < 100
    outcome = train(again, replace(state, elapsed=100.0))
    proof = again.ledger.proof()
    close(again)
    assert [line["time/elapsed"] > 100 for line in lines(again.directory.metrics)[1:]] == [False, False, True, True]
    assert proof.holds and (proof.consumed, proof.in_flight) == (ALL, 0)
    assert [line["step"] for line in lines(again.directory.metrics)] == [0, 1, 2, 3, 4]
    assert outcome.before["eval/greedy_accuracy"] == again.progress.remembered["eval/greedy_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("schedule", "steps", "told"),
    [("cosine", 9, True), ("linear", 9, True), ("constant", 9, False), ("cosine", STEPS, False)],
)
def test_a_resume_that_changes_the_schedules_end_says_so(tmp_path: Path, schedule: Any, steps: int, told: bool) -> None:
    learner = LearnerConfig(optimizer=OptimizerConfig(schedule=schedule))
    run = wired(tmp_path, replace(CONFIG, learner=learner, loop=replace(CONFIG.loop, steps=steps)))
    assert resume(run, State(2, STEPS, dict(run.stream.cursor()), {}, {})) == 2
    found = warnings(run.directory)
    close(run)
    assert ["loop.steps was 4 and is 9: the learning rate falls to its end by then" in text for text in found] == (
        [True] if told else []
    )


@pytest.mark.parametrize(("difference", "told"), [(1e-4, False), (2e-3, True), (math.nan, True), (math.inf, True)])
def test_the_sentinel_warns_of_a_difference_and_of_nan(tmp_path: Path, difference: float, told: bool) -> None:
    run = whole(tmp_path, policy=FakePolicy(difference=difference))
    found = warnings(run.directory)
    assert len(found) == (STEPS if told else 0)
    assert all("rollout and learner logprobs differ by up to " in text for text in found)


@pytest.mark.parametrize("rollout", [RolloutConfig(top_p=0.9), RolloutConfig(top_k=5)])
def test_a_cut_distribution_is_told_once_and_the_sentinel_is_quiet(tmp_path: Path, rollout: RolloutConfig) -> None:
    run = whole(tmp_path, replace(CONFIG, rollout=rollout), policy=FakePolicy(difference=0.5))
    (warning,) = warnings(run.directory)
    assert warning.startswith("rollout.top_p or top_k cuts what is sampled from")


def test_ranks_that_write_elsewhere_give_no_checkpoint(tmp_path: Path) -> None:
    run = wired(tmp_path, policy=FakePolicy(saves=False))
    with pytest.raises(DiskError, match=r"step-2: hf/config\.json did not arrive"):
        train(run, None)
    close(run)
    assert run.directory.latest_checkpoint() is None


def test_dropped_prompts_are_made_up_for_and_counted(tmp_path: Path) -> None:
    config = replace(CONFIG, data=replace(CONFIG.data, shuffle=False))
    gone = PromptStream(config.data, config.seed, config.eval.prompts).take(2)[1].uid
    run = wired(tmp_path, config, rollouts=FakeRollouts(drops=[gone]))
    train(run, None)
    proof = run.ledger.proof()
    close(run)
    assert (proof.consumed, dict(proof.dropped), proof.in_flight) == (ALL, {"prompt_empty": 1}, 0)
    assert [line.get("data/dropped_prompt_empty") for line in lines(run.directory.metrics)] == [
        None,
        1,
        None,
        None,
        None,
    ]


def test_answers_before_and_after_are_told_and_kept_in_the_checkpoint(tmp_path: Path) -> None:
    run = wired(tmp_path)
    outcome = train(run, None)
    close(run)
    asked = [prompt.messages[-1].content for prompt in run.held_out[:3]]
    assert outcome.answers == {"prompts": asked, "before": ["abc"] * 3, "after": ["abc"] * 3}
    folder = run.directory.latest_checkpoint()
    assert folder is not None and read_state(folder).answers == outcome.answers


LEASHED = replace(
    CONFIG,
    algo=AlgoConfig(
        name="ppo",
        kl=KLConfig(coef=0.1, controller="adaptive", target=1.0, horizon=100),
        shaping=ShapingConfig(normalize="running"),
    ),
)


def test_a_resumed_run_has_the_reward_moments_the_coefficient_and_the_signs_it_had(tmp_path: Path) -> None:
    """Cut after step 3 and resumed from step 2, it ends where a run that was never cut does."""
    parts: Any = {"critic": FakeCritic(), "reference": FakeReference()}
    uncut = whole(tmp_path / "uncut", LEASHED, **parts)
    cut = wired(tmp_path / "cut", LEASHED, policy=FakePolicy(fails_at=4), **parts)
    with pytest.raises(RuntimeError):
        train(cut, None)
    close(cut)
    folder = cut.directory.latest_checkpoint()
    assert folder is not None and folder.name == "step-2"
    again = wired(tmp_path / "cut", LEASHED, again=True, **parts)
    train(again, read_state(folder))
    close(again)
    # 24 responses a step at twice the target: 0.1 x 1.048 a step.
    assert uncut.shaper.kl_coef == pytest.approx(0.1 * (1 + 0.2 * 24 / 100) ** STEPS)
    assert again.shaper.state() == uncut.shaper.state() and again.shaper.state()["moments"]["count"] == 24 * STEPS
    assert again.watch.state() == uncut.watch.state()


def test_a_checkpoint_from_before_there_were_shapers_goes_on_with_a_new_one(tmp_path: Path) -> None:
    run = wired(tmp_path)
    assert resume(run, State(2, STEPS, dict(run.stream.cursor()), {}, {})) == 2
    close(run)
    assert run.shaper.state() == Shaper(CONFIG.algo, 8).state()


def test_critic_and_reference_are_saved_with_every_checkpoint(tmp_path: Path) -> None:
    critic, reference = FakeCritic(), FakeReference()
    whole(tmp_path, LEASHED, critic=critic, reference=reference)
    assert len(critic.saved) == len(reference.saved) == 2, "after steps 2 and 4"
    assert len(critic.given) == STEPS


@pytest.mark.parametrize(
    ("start", "missing"), [("policy", r"critic/optimizer-1\.safetensors"), ("shared", r"value_head\.safetensors")]
)
def test_a_checkpoint_without_its_critics_files_is_not_whole(tmp_path: Path, start: str, missing: str) -> None:
    needed = critic_files(start == "shared", FakePolicy.ranks)
    config = replace(LEASHED, critic=replace(LEASHED.critic, start=start))
    run = wired(tmp_path / "cut", config, critic=FakeCritic(leaves=needed[:-1]), reference=FakeReference())
    with pytest.raises(DiskError, match=rf"step-2: {missing} did not arrive"):
        train(run, None)
    close(run)
    assert run.directory.latest_checkpoint() is None
    whole(tmp_path / "whole", config, critic=FakeCritic(leaves=needed), reference=FakeReference())


MOVING = ReferenceConfig(update_every=3, ema=0.9)
BF16 = {"model": ModelConfig(dtype="bfloat16")}


@pytest.mark.parametrize(
    ("keys", "policy", "reference", "missing"),
    [
        ({"learner": LearnerConfig(ema_decay=0.9)}, (), (), r"step-2: hf_ema/config\.json"),
        ({"learner": LearnerConfig(ema_decay=0.9)}, EMA_FILES, (), None),
        # While the critic warms up the policy has no step, and its average nothing to begin with.
        (
            {"learner": LearnerConfig(ema_decay=0.9), "critic": CriticConfig(warmup_steps=2)},
            (),
            (),
            r"step-4: hf_ema/c",
        ),
        ({"reference": MOVING}, (), (), r"step-2: reference/config\.json"),
        ({"reference": MOVING}, (), ("config.json",), None),
        # A model in float32 is its own average; one in bfloat16 has another once it has moved, which is at step 3.
        ({"reference": MOVING} | BF16, (), ("config.json",), r"step-4: reference/float32_masters\.safetensors"),
        ({"reference": replace(MOVING, ema=0.0)} | BF16, (), ("config.json",), None),
        ({"reference": MOVING} | BF16, (), ("config.json", "float32_masters.safetensors"), None),
    ],
)
def test_a_checkpoint_without_its_moving_averages_is_not_whole(
    tmp_path: Path, keys: dict[str, Any], policy: Sequence[str], reference: Sequence[str], missing: str | None
) -> None:
    parts: Any = {
        "policy": FakePolicy(leaves=policy),
        "critic": FakeCritic(),
        "reference": FakeReference(leaves=[f"reference/{name}" for name in reference]),
    }
    config = replace(LEASHED, **keys)
    if missing is None:
        whole(tmp_path, config, **parts)
        return
    run = wired(tmp_path, config, **parts)
    with pytest.raises(DiskError, match=rf"{missing}.* did not arrive"):
        train(run, None)
    close(run)


def test_while_the_critic_warms_up_no_sentinel_is_missed(tmp_path: Path) -> None:
    policy, critic = FakePolicy(difference=0.5), FakeCritic()
    config = replace(LEASHED, critic=CriticConfig(warmup_steps=3))
    run = whole(tmp_path, config, policy=policy, critic=critic, reference=FakeReference())
    assert (policy.updates, len(critic.given)) == (1, STEPS)
    assert ["step 4: rollout and learner" in text for text in warnings(run.directory)] == [True]


def test_while_the_critic_warms_up_tokens_and_reference_have_the_versions_of_their_steps(tmp_path: Path) -> None:
    """The weights stay where they are, and the number goes on: policy lag stays 0, and nothing has changed."""
    reference = FakeReference()
    config = replace(LEASHED, critic=CriticConfig(warmup_steps=2), reference=ReferenceConfig(update_every=2))
    run = whole(tmp_path, config, critic=FakeCritic(), reference=reference)
    steps = lines(run.directory.metrics)[1:]
    assert [line["rollout/policy_lag_max"] for line in steps] == [0.0] * STEPS
    assert [line["sync/changed_share"] for line in steps] == [0.0, 0.0, 1.0, 1.0]
    assert [version for version, _ in reference.moved] == [2, 4]
    assert warnings(run.directory) == []


@pytest.mark.parametrize(("every", "versions"), [(0, []), (1, [1, 2, 3, 4]), (3, [3])])
def test_the_reference_moves_every_so_many_steps(tmp_path: Path, every: int, versions: list[int]) -> None:
    reference = FakeReference()
    config = replace(LEASHED, reference=ReferenceConfig(update_every=every, ema=0.9 if every else 0.0))
    run = whole(tmp_path, config, critic=FakeCritic(), reference=reference)
    assert reference.moved == [(version, 0.9) for version in versions]
    told = [event["message"] for event in lines(run.directory.events) if event["kind"] == "reference_moved"]
    assert told == [f"the reference took version {version}" for version in versions]


@dataclass
class Followed(FakeReference):
    """The policy's own weights from its first update on: no KL is left."""

    def update(self, announcement: Announcement, keep: float) -> None:
        super().update(announcement, keep)
        self.kl = 0.0


def test_the_reference_moves_after_the_evaluation_of_its_step(tmp_path: Path) -> None:
    """Otherwise `eval/kl` would be 0 at every step at which both are due."""
    config = replace(LEASHED, reference=ReferenceConfig(update_every=2), eval=replace(LEASHED.eval, samples=2))
    run = whole(tmp_path, config, critic=FakeCritic(), reference=Followed())
    found = [line["eval/kl"] for line in lines(run.directory.metrics) if "eval/kl" in line]
    assert found == [2.0, 2.0, 0.0], "at steps 0, 2 and 4"


def test_training_and_evaluation_are_compared_with_the_reference(tmp_path: Path) -> None:
    reference = FakeReference()
    config = replace(LEASHED, eval=replace(LEASHED.eval, samples=2))
    run = whole(tmp_path, config, critic=FakeCritic(), reference=reference)
    found = lines(run.directory.metrics)
    assert [line["kl/reference"] for line in found[1:]] == [2.0] * STEPS
    assert [line["eval/kl"] for line in found if "eval/kl" in line] == [2.0] * 3
    asked = {uid.split("/")[0] for (uid, _), _ in reference.asked}
    assert asked == {"0", "eval"} and {temperature for _, temperature in reference.asked} == {1.0}
