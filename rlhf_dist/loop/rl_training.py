"""An RL run from its start (or its checkpoint) to its end: collect, step, log, evaluate, checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rlhf_dist.algo.algorithm import Algorithm
from rlhf_dist.config.reward_words import solved_by
from rlhf_dist.config.schema import Config
from rlhf_dist.data.stream import PromptStream
from rlhf_dist.loop.background_writer import BackgroundWriter
from rlhf_dist.loop.best_checkpoints import best_of, require_metric
from rlhf_dist.loop.checkpointing import finish_checkpoint
from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.controller_rules import Rules, rules_of, sampling_of
from rlhf_dist.loop.devices import Devices
from rlhf_dist.loop.evaluation import Evaluation, evaluate
from rlhf_dist.loop.events import Taken, Tell
from rlhf_dist.loop.healing import Healing
from rlhf_dist.loop.kept_scores import keep_scores
from rlhf_dist.loop.kept_state import KeptState
from rlhf_dist.loop.late_report import Report, no_report
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.left_out import counted
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.numbers_faults import Numbers, skipped
from rlhf_dist.loop.ports import AT_ONCE, Critic, Policy, Ranks, Stop
from rlhf_dist.loop.reasons import ROLLED_BACK
from rlhf_dist.loop.resumed_prompts import ResumedPrompts
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.loop.saving import Saver
from rlhf_dist.loop.schedule import due
from rlhf_dist.loop.shaper import Shaper
from rlhf_dist.loop.shell import Actors, Shell
from rlhf_dist.loop.shown_answers import keep_answers
from rlhf_dist.loop.step import Learning, StepReport, train_step
from rlhf_dist.loop.train_state import State, put_back
from rlhf_dist.loop.watch import CollapseWatch, watch_metrics
from rlhf_dist.loop.witnessed import verified
from rlhf_dist.scoring.non_finite import told
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.display import Progress
from rlhf_dist.telemetry.histograms import Histogram
from rlhf_dist.telemetry.run_telemetry import Telemetry
from rlhf_dist.telemetry.timeline import Stopwatch
from rlhf_dist.types import Experience, NonFinite, Prompt, Sampling
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.sync import PushReport, WeightSync


@dataclass(frozen=True, slots=True)
class Run:
    """A wired run: every part the loop uses. Made by `cluster.build`."""

    config: Config
    algorithm: Algorithm
    policy: Policy
    critic: Critic | None
    """What gives credit by token, a critic or not; None where credit is by response."""
    actors: Actors
    sync: WeightSync
    """Between `policy` and the rollout workers."""
    members: Members
    """The names of the actors' processes."""
    healing: Healing
    """What is done when a process is lost."""
    stream: PromptStream
    held_out: Sequence[Prompt]
    ledger: Ledger
    directory: RunDirectory
    telemetry: Telemetry
    progress: Progress
    shaper: Shaper
    watch: CollapseWatch
    stop: Stop = AT_ONCE
    ranks: Ranks | None = None
    """None where ranks that are lost stay so."""
    kept: KeptState | None = None
    """None without `learner.keep_state_every`."""
    report: Report = no_report
    """Writes down where everybody was when somebody is late."""
    background: BackgroundWriter | None = None
    """None where training waits while a checkpoint is written."""

    @property
    def rules(self) -> Rules:
        """What is asked of the controller."""
        return rules_of(self.config, self.actors.reference is not None, self.algorithm.mask is not None)

    @property
    def learning(self) -> Learning:
        """How a step learns."""
        config = self.config
        steps, witness, numbers = config.loop.steps, config.loop.witness, config.numbers
        return Learning(self.algorithm, config.learner, config.critic, self.rules.sampling, steps, witness, numbers)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    before: dict[str, float]
    """Evaluation before the first step."""
    after: dict[str, float]
    """The last one."""
    answers: dict[str, list[str]]
    """As in `State`."""


def train(
    run: Run, state: State | None, life: int = 0, devices: Devices | None = None, numbers: Numbers | None = None
) -> Outcome:
    """Train to `loop.steps`; returns the evaluations before and after. `state`: of the checkpoint resumed from.

    `life`: how often the learner was started again before; `devices` have booked the time that the last of these took,
    `numbers` know what went wrong in them. Raises `RanksLost`, `RanksSilent` or `RolledBack` where it has to be again,
    KeyboardInterrupt where the run is told to end, once its last whole step is saved.
    """
    loop = run.config.loop
    step = resume(run, state)
    reached(run)
    devices = Devices(run.members) if devices is None else devices
    numbers = Numbers(run.config, run.directory, run.telemetry) if numbers is None else numbers
    shell = start_shell(run, state, devices, life, numbers.left_out)
    push_first(run, step)
    watch = Stopwatch(before=0.0 if state is None else state.elapsed, begins=devices.goodput.phase)
    before, results, answers = evaluate_first(run, shell) if state is None else known(run, state)
    require_metric(best_of(loop), results)
    warn_of_cuts(run)
    if step < loop.steps:
        run.progress.stage(f"taking step {step + 1}")
        run.telemetry.event("training_started", f"step {step + 1} begins", step=step + 1)
    watch.begin()
    shell.published(step)
    if not life:
        devices.goodput.lap()  # What came before belongs to no step.
    saver = Saver(run, state)
    with run.stop.deferred():
        while step < loop.steps:
            step += 1
            taken = take_step(run, shell, step, watch, saver, numbers)
            metrics = taken.metrics | devices.lap()
            if not moves_reference(run, step):
                saver.published(shell, step)  # From here on the next groups are issued, beside what follows.
            else:
                shell.serve()  # Who missed the push gets nothing more, also while the reference moves.
            if due(run.config.eval.every, step, loop.steps):
                found = measure(run, shell, step)
                results, answers = found.metrics, answers | {"after": list(found.answers)}
                metrics |= results
            tell(run, shell, step, taken, metrics)
            shell.forget([experience.key for experience in taken.experiences])
            if moves_reference(run, step):
                # After the evaluation, whose KL is to the reference as it was.
                move_reference(run, taken.push.announcement)
                saver.published(shell, step)
            saver.step_done(step, (before, results), answers, watch.elapsed)
            reached(run)
            watch.lap()  # Evaluation and checkpoints are not part of a step's time.
            devices.goodput.lap()
        finish_checkpoint(run)
    return Outcome(before, results, answers)


Results = tuple[dict[str, float], dict[str, float], dict[str, list[str]]]
"""The evaluation before the first step, the latest, and answers as in `State`."""


def evaluate_first(run: Run, shell: Shell) -> Results:
    """Evaluate before the first step, and log it."""
    found = measure(run, shell, 0)
    asked = [prompt.messages[-1].content for prompt in run.held_out[: len(found.answers)]]
    run.telemetry.log(0, found.metrics)
    return found.metrics, found.metrics, {"prompts": asked, "before": [*found.answers], "after": [*found.answers]}


def known(run: Run, state: State) -> Results:
    """As the checkpoint has them."""
    run.progress.remember(state.results)
    return state.before, state.results, state.answers


@dataclass(frozen=True, slots=True)
class Step:
    """What came of a step."""

    metrics: dict[str, float]
    histograms: Mapping[str, Histogram]
    push: PushReport
    experiences: tuple[Experience, ...]
    """What was trained on."""


def take_step(run: Run, shell: Shell, step: int, watch: Stopwatch, saver: Saver, numbers: Numbers) -> Step:
    """Take a step's groups, train, push. Until the groups are there, the run may be told to end."""
    with watch.phase("generate"):
        taken = shell.next_step(saver.end_if_asked)
    warn_of_non_finite(run, f"step {step}", taken.tally.found)
    experiences = taken.experiences
    with watch.phase("sync"):
        for problem in run.actors.rollouts.sleep():
            run.telemetry.warn(f"step {step}: {problem}", "fault", who(problem))
    report, push = train_step(
        experiences,
        policy=run.policy,
        critic=run.critic,
        bodies=run.actors.bodies,
        sync=run.sync,
        shaper=run.shaper,
        learning=run.learning,
        step=step,
        watch=watch,
        faulted=partial(numbers.faulted, step),
    )
    numbers.done(step)
    book(run, taken, step, report)
    metrics = dict(report.metrics) | watch_metrics(experiences, run.config.scoring.gold)
    metrics |= {f"data/dropped_{reason}": float(count) for reason, count in taken.dropped.items()}
    metrics |= counted(taken.tally, run.config.scoring) | watch.lap()
    metrics[names.ELAPSED] = watch.elapsed
    metrics["sync/changed_share"], metrics["sync/sent_share"] = push.changed_share, push.sent_share
    metrics["rollout/group_s"], metrics["goodput/late_events"] = taken.seconds, float(taken.late)
    metrics[names.TOKENS_PER_S] = metrics["rollout/response_tokens"] / watch.split()
    metrics[names.LOG_TIME] = run.telemetry.spent()
    return Step(metrics, report.histograms, push, experiences)


def book(run: Run, taken: Taken, step: int, report: StepReport) -> None:
    """Tell the ledger which of a step's groups were learnt from, and which were skipped."""
    shown = verified(report.witnessed, run.telemetry, step)
    learnt = [i for i, one in enumerate(report.learnt) if one]
    if len(learnt) < len(taken.attempts):
        run.ledger.skip([attempt for i, attempt in enumerate(taken.attempts) if i not in learnt], step, report.left)
    tokens = [int(taken.experiences[i].head.lengths.sum()) for i in learnt]
    presence = None if shown is None else [shown[i] for i in learnt]
    run.ledger.consume([taken.attempts[i] for i in learnt], step, tokens, presence)


def start_shell(
    run: Run, state: State | None, devices: Devices, life: int = 0, left_out: Collection[str] = ()
) -> Shell:
    """The controller with its shell; groups that were open in `state` are issued first, but for those left out."""
    step = 0 if state is None else state.step
    prompts = ResumedPrompts(run.stream, {} if state is None else state.open, left_out, partial(leave_out, run, step))
    rules = replace(run.rules, life=life)
    controller = Controller(rules, prompts, run.members, step, run.healing)
    before = devices.goodput.look
    tell = partial(tell_of, run)
    return Shell(controller, run.actors, ledger=run.ledger, tell=tell, before=before, report=run.report)


def tell_of(run: Run, line: Tell) -> None:
    """Into the event log; a warning calls people, too."""
    if line.kind == "warning":
        run.telemetry.warn(line.message, "fault", who(line.message))
    else:
        run.telemetry.event(line.kind, line.message, uid=line.uid)


def leave_out(run: Run, version: int, attempt: tuple[str, int]) -> None:
    """A group that the run went back from is not sampled again: where it would be issued, it is dropped at once."""
    run.ledger.issue([attempt], version)
    run.ledger.drop([attempt], ROLLED_BACK)


def measure(run: Run, shell: Shell, step: int) -> Evaluation:
    """Evaluate the weights after `step` on the held-out prompts."""
    run.progress.stage(f"evaluating at step {step}")
    found = evaluate(
        run.held_out,
        run.config.eval,
        sampling_of(run.config),  # without a mask: what is measured is the model that is saved, and that has none
        seed=run.config.seed,
        shell=shell,
        gold=run.config.scoring.gold,
        solved_by=solved_by(run.config),
    )
    assert found.version == step, f"the evaluation at step {step} is of version {found.version}"
    reached(run)
    warn_of_non_finite(run, f"evaluation at step {step}", found.non_finite)
    run.progress.eval(step, found.metrics)
    keep_answers(run.directory.path, step, found.shown)
    keep_scores(run.directory.path, run.config, step, found.measured)
    return found


def reached(run: Run) -> None:
    """A whole step, an evaluation or a start of training takes no longer than `faults.step_s`."""
    run.healing.reached(run.actors.arrivals.now())


def moves_reference(run: Run, step: int) -> bool:
    """Whether the reference follows the policy after this step."""
    every = run.config.reference.update_every
    return run.actors.reference is not None and every > 0 and step % every == 0


def move_reference(run: Run, announcement: Announcement) -> None:
    """Let the reference follow the policy."""
    assert run.actors.reference is not None
    run.actors.reference.update(announcement, run.config.reference.ema)
    run.telemetry.event("reference_moved", f"the reference took version {announcement.version}")


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
        run.telemetry.warn(problem, "push", who(problem))


def warn_of_non_finite(run: Run, when: str, found: Sequence[NonFinite]) -> None:
    """One warning for all responses of `when` whose rewards failed or are not finite; none where there are none."""
    if found:
        facts = {"responses": len(found), "uid": found[0].uid, "rewards": [*found[0].failed, *found[0].rewards]}
        run.telemetry.warn(f"{when}: {told(found, run.config.scoring.non_finite)}", **facts)


def who(sentence: str) -> str:
    """The process that a sentence names first, as in `rollout worker 0`; empty where it names none."""
    found = re.search("[a-z]+ [a-z]+ [0-9]+", sentence)
    return found[0] if found else ""


def tell(run: Run, shell: Shell, step: int, taken: Step, metrics: dict[str, float]) -> None:
    """Log a step with its `metrics`; warn of receipts that were wrong and of logprobs that drift apart."""
    config = run.config
    for problem in taken.push.problems:
        run.telemetry.warn(f"step {step}: {problem}", "push", who(problem))
    # Absent while a critic warms up. Written so that NaN warns too. A cut distribution is renormalised by the sampler
    # and not by the learner.
    difference = metrics.get(names.LOGPROB_DIFF_MAX, 0.0)
    if not difference <= config.loop.logprob_diff_limit and not cuts(run.rules.sampling):
        run.telemetry.warn(
            f"step {step}: rollout and learner logprobs differ by up to {difference:.2g}, "
            f"loop.logprob_diff_limit is {config.loop.logprob_diff_limit:g}",
            "mismatch",
        )
    for sign in [] if skipped(metrics) else run.watch.step(metrics):
        run.telemetry.warn(f"step {step}: {sign.sentence}", sign.kind)
    run.telemetry.log(step, metrics, taken.histograms)
    run.progress.step(step, config.loop.steps, metrics)
    every = config.telemetry.samples_every
    if every and (step == 1 or step % every == 0):
        run.telemetry.samples(step, sample_rows(run, shell, taken.experiences))


def warn_of_cuts(run: Run) -> None:
    """Where tokens are drawn from a part of the distribution only."""
    if cuts(run.rules.sampling):
        run.telemetry.warn(
            "rollout.top_p or top_k cuts what is sampled from: rollout/logprob_diff_* then compares two distributions, "
            "and no difference is warned of"
        )


def cuts(sampling: Sampling) -> bool:
    """Whether tokens are drawn from a part of the distribution only, so that logprobs do not compare."""
    return sampling.top_p < 1.0 or sampling.top_k > 0


def sample_rows(run: Run, shell: Shell, experiences: Sequence[Experience]) -> list[dict[str, Any]]:
    """A few responses of a step, one of each prompt."""
    shown = experiences[: run.config.telemetry.samples]
    return [
        {
            "uid": experience.prompt.uid,
            "prompt": experience.prompt.messages[-1].content,
            "response": texts[int(experience.samples[0])],
            "answer": experience.prompt.answer,
            "reward": float(experience.scores.total[0]),
            "components": {name: float(values[0]) for name, values in experience.scores.components.items()},
        }
        for experience, texts in zip(shown, shell.texts([one.key for one in shown]), strict=True)
    ]
