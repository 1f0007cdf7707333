"""An RL run from its start (or its checkpoint) to its end: collect, step, log, evaluate, checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from rlhf_dist.algo.algorithm import Algorithm
from rlhf_dist.algo.masking import all_equal
from rlhf_dist.config.rewards import solved_by
from rlhf_dist.config.schema import Config
from rlhf_dist.data.stream import PromptStream
from rlhf_dist.errors import DataError, RewardError
from rlhf_dist.learner.critic_files import critic_files
from rlhf_dist.learner.ema import EMA_FILES
from rlhf_dist.learner.mask_policy import MASK_FILES
from rlhf_dist.learner.model_engine import checkpoint_files
from rlhf_dist.loop.collect import Collected, collect
from rlhf_dist.loop.evaluate import Evaluation, evaluate
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.non_finite import NON_FINITE, counted, refuse_if_hopeless
from rlhf_dist.loop.ports import Critic, Policy, References, Rollouts, Scoring
from rlhf_dist.loop.queue import ExperienceQueue
from rlhf_dist.loop.requests import greedy, make_requests
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.loop.schedule import due
from rlhf_dist.loop.shaper import Shaper
from rlhf_dist.loop.step import Learning, learns_policy, train_step
from rlhf_dist.loop.train_state import State, put_back
from rlhf_dist.loop.watch import CollapseWatch, watch_metrics
from rlhf_dist.scoring.non_finite import told
from rlhf_dist.scoring.reference_files import reference_files
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.display import Progress
from rlhf_dist.telemetry.sinks import Telemetry
from rlhf_dist.telemetry.timeline import Stopwatch
from rlhf_dist.types import Experience, NonFinite, Prompt, Sampling
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.sync import WeightSync

NO_SIGNAL = "no_signal"
"""A prompt whose samples all scored the same."""
GREEDY_LOST = "greedy_lost"
"""A prompt whose greedy response did not come."""


@dataclass(frozen=True, slots=True)
class Run:
    """A wired run: every part the loop uses. Made by `cluster.build`."""

    config: Config
    algorithm: Algorithm
    policy: Policy
    critic: Critic | None
    """What gives credit by token, a critic or not; None where credit is by response."""
    rollouts: Rollouts
    sync: WeightSync
    """Between `policy` and `rollouts`."""
    scoring: Scoring
    reference: References | None
    """None where no KL is wanted."""
    stream: PromptStream
    held_out: Sequence[Prompt]
    queue: ExperienceQueue
    ledger: Ledger
    directory: RunDirectory
    telemetry: Telemetry
    progress: Progress
    shaper: Shaper
    watch: CollapseWatch

    @property
    def sampling(self) -> Sampling:
        """How training samples."""
        return replace(sampling_of(self.config), masked=self.algorithm.mask is not None)

    @property
    def learning(self) -> Learning:
        """How a step learns."""
        config = self.config
        return Learning(self.algorithm, config.learner, config.critic, self.sampling, config.loop.steps)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    before: dict[str, float]
    """Evaluation before the first step."""
    after: dict[str, float]
    """The last one."""
    answers: dict[str, list[str]]
    """As in `State`."""


def train(run: Run, state: State | None) -> Outcome:
    """Train to `loop.steps`; returns the evaluations before and after. `state`: of the checkpoint resumed from."""
    loop = run.config.loop
    step = resume(run, state)
    push_first(run, step)
    if state is None:
        first = measure(run, step)
        before = results = first.metrics
        asked = [prompt.messages[-1].content for prompt in run.held_out[: len(first.answers)]]
        answers = {"prompts": asked, "before": list(first.answers), "after": list(first.answers)}
        run.telemetry.log(step, before)
    else:
        before, results, answers = state.before, state.results, state.answers
    if cuts(run.sampling):
        run.telemetry.warn(
            "rollout.top_p or top_k cuts what is sampled from: rollout/logprob_diff_* then compares two distributions, "
            "and no difference is warned of"
        )
    if step < loop.steps:
        run.progress.stage(f"taking step {step + 1}")
        run.telemetry.event("training_started", f"step {step + 1} begins", step=step + 1)
    watch = Stopwatch()
    while step < loop.steps:
        step += 1
        with watch.phase("generate"):
            experiences, dropped = next_batch(run, version=step - 1)
        report, push = train_step(
            experiences,
            policy=run.policy,
            critic=run.critic,
            sync=run.sync,
            shaper=run.shaper,
            learning=run.learning,
            step=step,
            watch=watch,
        )
        run.ledger.consume([experience.prompt.uid for experience in experiences], step)
        metrics = dict(report.metrics) | watch_metrics(experiences, run.config.scoring.gold) | dropped | watch.lap()
        metrics["sync/changed_share"] = push.changed_share
        metrics[names.TOKENS_PER_S] = metrics["rollout/response_tokens"] / metrics[names.STEP_TIME]
        if due(run.config.eval.every, step, loop.steps):
            found = measure(run, step)
            results, answers = found.metrics, answers | {"after": list(found.answers)}
            metrics |= results
        tell(run, step, metrics, push.problems, experiences)
        move_reference(run, push.announcement)  # after the evaluation, whose KL is to the reference as it was
        if due(loop.checkpoint_every, step, loop.steps):
            cursor, shaper, signs = dict(run.stream.cursor()), run.shaper.state(), run.watch.state()
            totals = run.ledger.totals(step)
            checkpoint(run, State(step, loop.steps, cursor, before, results, answers, shaper, signs, totals))
        watch.lap()  # Evaluation and checkpoints are not part of a step's time.
    return Outcome(before, results, answers)


def measure(run: Run, step: int) -> Evaluation:
    """Evaluate the weights after `step` on the held-out prompts."""
    run.progress.stage(f"evaluating at step {step}")
    found = evaluate(
        run.held_out,
        run.config.eval,
        sampling_of(run.config),  # without a mask: what is measured is the model that is saved, and that has none
        seed=run.config.seed,
        rollouts=run.rollouts,
        scoring=run.scoring,
        reference=run.reference,
        gold=run.config.scoring.gold,
        solved_by=solved_by(run.config),
    )
    warn_of_non_finite(run, f"evaluation at step {step}", found.non_finite)
    run.progress.eval(step, found.metrics)
    return found


def move_reference(run: Run, announcement: Announcement) -> None:
    """Let the reference follow the policy, where `reference.update_every` says so."""
    every = run.config.reference.update_every
    if run.reference is not None and every and announcement.version % every == 0:
        run.reference.update(announcement, run.config.reference.ema)
        run.telemetry.event("reference_moved", f"the reference took version {announcement.version}")


def sampling_of(config: Config) -> Sampling:
    """Training's own way to sample, but for a mask."""
    rollout = config.rollout
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=rollout.max_response_tokens,
        stop=tuple(rollout.stop),
    )


def resume(run: Run, state: State | None) -> int:
    """Put stream, ledger and metrics back to the checkpoint; returns its step, 0 for a new run."""
    if state is not None:
        put_back(state, run.stream, run.shaper, run.watch)
    step = 0 if state is None else state.step
    # A run that was cut before its first checkpoint goes back to its very start; in a new one there is nothing to move.
    rewound = run.ledger.rewind(step)
    moved = run.directory.rewind_metrics(-1 if state is None else step)
    if state is not None or rewound or moved:
        facts = {"step": step, "prompts_reissued": len(rewound), "metrics_moved": moved}
        run.telemetry.event("resume", f"resumed from step {step}", **facts)
    learner = run.config.learner.optimizer
    if state is not None and state.steps != run.config.loop.steps and learner.schedule != "constant":
        run.telemetry.warn(
            f"loop.steps was {state.steps} and is {run.config.loop.steps}: the learning rate falls to its end by then "
            f"({learner.schedule}), so it changes at once"
        )
    return step


def push_first(run: Run, step: int) -> None:
    """Push the starting weights, so that every worker has proved what it holds before the first sample."""
    for problem in run.sync.push(version=step).problems:
        run.telemetry.warn(problem)


def next_batch(run: Run, version: int) -> tuple[tuple[Experience, ...], dict[str, float]]:
    """Issue prompts, as many as the queue lets, until a step's worth of experiences is there.

    Returns them and how many prompts were dropped meanwhile, by reason, and how many responses had rewards that are not
    finite. A dropped prompt is made up for by another.
    """
    dropped: Counter[str] = Counter()
    non_finite: tuple[NonFinite, ...] = ()
    rounds = 0
    while True:
        experiences, stale = run.queue.take(run.config.loop.prompts_per_step, version)
        if stale:
            run.ledger.drop([experience.prompt.uid for experience in stale], "stale")
            dropped["stale"] += len(stale)
        if experiences:
            warn_of_non_finite(run, f"step {version + 1}", non_finite)
            lost_by_reason = {f"data/dropped_{reason}": float(count) for reason, count in dropped.items()}
            return experiences, lost_by_reason | counted(non_finite, run.config.scoring.non_finite)
        refuse_if_hopeless(dropped[NON_FINITE], run.config.loop.prompts_per_step, non_finite)
        prompts = run.stream.take(run.queue.may_issue(version))
        run.ledger.issue([prompt.uid for prompt in prompts], version)
        run.queue.issued(len(prompts))
        found = collect(
            make_requests(prompts, "train", run.config.algo.group_size, run.sampling, run.config.seed),
            rollouts=run.rollouts,
            scoring=run.scoring,
            reference=run.reference,
            ledger=run.ledger,
        )
        rounds += 1
        arrived, lost, non_finite = found.experiences, found.dropped, non_finite + found.non_finite
        if run.algorithm.greedy_baseline:
            found = against_greedy_scores(run, arrived)
            arrived, lost, non_finite = found.experiences, lost + found.dropped, non_finite + found.non_finite
        if run.config.algo.filter_groups and rounds < run.config.algo.filter_rounds:
            flat = [e for e in arrived if all_equal(torch.from_numpy(e.scores.total))]
            arrived = [e for e in arrived if not all_equal(torch.from_numpy(e.scores.total))]
            run.ledger.drop([experience.prompt.uid for experience in flat], NO_SIGNAL)
            run.queue.dropped(len(flat))
            dropped[NO_SIGNAL] += len(flat)
        run.queue.dropped(len(lost))
        run.queue.put(arrived)
        for drop in lost:
            dropped[drop.reason] += 1
            if drop.reason != NON_FINITE:  # of those there is one warning a step
                run.telemetry.event("dropped", f"prompt {drop.uid}: {drop.reason}: {drop.detail}", uid=drop.uid)
        # A prompt without signal is fit for use, and taken after so many rounds.
        if lost and not found.experiences and dropped.total() - dropped[NO_SIGNAL] >= len(run.stream):
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            failure = RewardError if lost[-1].reason == NON_FINITE else DataError
            raise failure(f"a whole epoch of prompts was dropped ({reasons}; the last: {lost[-1].detail})")


def warn_of_non_finite(run: Run, when: str, found: Sequence[NonFinite]) -> None:
    """One warning for all responses of `when` whose rewards are not finite; none where there are none."""
    if found:
        facts = {"responses": len(found), "uid": found[0].uid, "rewards": list(found[0].rewards)}
        run.telemetry.warn(f"{when}: {told(found, run.config.scoring.non_finite)}", **facts)


def against_greedy_scores(run: Run, experiences: Sequence[Experience]) -> Collected:
    """The experiences with the score of the greedy response to their prompt; those whose prompt gave none apart."""
    prompts = [experience.prompt for experience in experiences]
    requests = make_requests(prompts, "baseline", 1, greedy(run.sampling), run.config.seed)
    found = collect(requests, rollouts=run.rollouts, scoring=run.scoring)
    scores = {experience.prompt.uid: float(experience.scores.total[0]) for experience in found.experiences}
    lost = [drop if drop.reason == NON_FINITE else replace(drop, reason=GREEDY_LOST) for drop in found.dropped]
    for drop in lost:
        run.ledger.drop([drop.uid], drop.reason)
    kept = [replace(e, baseline=scores[e.prompt.uid]) for e in experiences if e.prompt.uid in scores]
    return Collected(kept, lost, found.non_finite)


def tell(
    run: Run, step: int, metrics: dict[str, float], problems: Sequence[str], experiences: Sequence[Experience]
) -> None:
    """Log a step; warn of receipts that were wrong and of logprobs that drift apart."""
    config = run.config
    for problem in problems:
        run.telemetry.warn(f"step {step}: {problem}")
    # Absent while a critic warms up. Written so that NaN warns too. A cut distribution is renormalised by the sampler
    # and not by the learner.
    difference = metrics.get(names.LOGPROB_DIFF_MAX, 0.0)
    if not difference <= config.loop.logprob_diff_limit and not cuts(run.sampling):
        run.telemetry.warn(
            f"step {step}: rollout and learner logprobs differ by up to {difference:.2g}, "
            f"loop.logprob_diff_limit is {config.loop.logprob_diff_limit:g}"
        )
    for sign in run.watch.step(metrics):
        run.telemetry.warn(f"step {step}: {sign}")
    run.telemetry.log(step, metrics)
    run.progress.step(step, config.loop.steps, metrics)
    every = config.telemetry.samples_every
    if every and (step == 1 or step % every == 0):
        run.telemetry.samples(step, sample_rows(run, experiences))


def cuts(sampling: Sampling) -> bool:
    """Whether tokens are drawn from a part of the distribution only, so that logprobs do not compare."""
    return sampling.top_p < 1.0 or sampling.top_k > 0


def sample_rows(run: Run, experiences: Sequence[Experience]) -> list[dict[str, Any]]:
    """A few responses of a step, one of each prompt."""
    rows = []
    for experience in experiences[: run.config.telemetry.samples]:
        rows.append(
            {
                "uid": experience.prompt.uid,
                "prompt": experience.prompt.messages[-1].content,
                "response": run.rollouts.texts(experience.body)[int(experience.samples[0])],
                "answer": experience.prompt.answer,
                "reward": float(experience.scores.total[0]),
                "components": {name: float(values[0]) for name, values in experience.scores.components.items()},
            }
        )
    return rows


def checkpoint(run: Run, state: State) -> None:
    """Write a checkpoint that a resume and `from_pretrained` can use; the one before stays until this one is whole."""
    folder = run.directory.begin_checkpoint(state.step).absolute()
    run.policy.save(folder)
    if run.critic is not None:
        run.critic.save(folder)
    if run.reference is not None:
        run.reference.save(folder)
    needed = checkpoint_files(run.policy.ranks)
    if run.algorithm.mask is not None:
        needed += MASK_FILES
    if run.algorithm.needs_critic:
        needed += critic_files(run.config.critic.start == "shared", run.policy.ranks)
    if run.config.learner.ema_decay and learns_policy(run.learning, state.step):
        needed += EMA_FILES
    if run.reference is not None:
        needed += reference_files(run.config.reference, run.config.model.dtype, state.step)
    final = run.directory.commit_checkpoint(state.step, run.config.loop.keep_checkpoints, asdict(state), needed)
    run.telemetry.event("checkpoint", f"wrote {final}", step=state.step)
