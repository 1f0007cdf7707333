"""Config -> a wired run. The only place that sees the whole config and every room."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_dist.cluster import actors, learner_hosts as hosts
from rlhf_dist.cluster.collator_host import CollatorHost
from rlhf_dist.cluster.hang_alarm import hang_alarm
from rlhf_dist.cluster.node_facts import remove_logs
from rlhf_dist.cluster.open_run import finish, opened
from rlhf_dist.cluster.preflight import check_before_start, require_shared_memory
from rlhf_dist.cluster.rank_rebuild import background_of, kept_state, rebuild_of
from rlhf_dist.cluster.resume import SUMMARY_STEP, find_start, nothing_left
from rlhf_dist.cluster.run_forecast import basis, basis_before, compared, does_not_fit
from rlhf_dist.cluster.session import ray_session
from rlhf_dist.cluster.signals import Saving
from rlhf_dist.cluster.sources import (
    model_source,
    reward_model_doubts,
    with_sources,
)
from rlhf_dist.cluster.stacks import stacks_of
from rlhf_dist.cluster.starts import (
    COLLATOR,
    START_KEY,
    are_ready,
    join_ranks,
    reserved,
    sends_straight,
    start_ranks,
    start_relays,
    start_servers,
    start_workers,
)
from rlhf_dist.cluster.waits import gather
from rlhf_dist.cluster.wiring import Parts, parts_of
from rlhf_dist.config.reward_words import reward_lines, solved_by
from rlhf_dist.config.schema import Config
from rlhf_dist.data.stream import PromptStream, held_out
from rlhf_dist.errors import RunError
from rlhf_dist.loop import rl_training as training
from rlhf_dist.loop.best_of_n_report import best_of_n_lines
from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.controller_rules import rules_of
from rlhf_dist.loop.evaluation import evaluate as run_evaluation
from rlhf_dist.loop.late_report import FOLDER, LateReports
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.ledger_proof import LedgerProof
from rlhf_dist.loop.rebuilding import train_to_the_end
from rlhf_dist.loop.resume_point import ledger_gone
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.loop.shaper import Shaper
from rlhf_dist.loop.shell import Shell
from rlhf_dist.loop.train_state import put_back, read_state
from rlhf_dist.loop.watch import CollapseWatch
from rlhf_dist.planning.nodes import place_in
from rlhf_dist.planning.placement import Machine, Placement, needs_reference
from rlhf_dist.scoring.non_finite import told
from rlhf_dist.telemetry.display import Progress, make_progress, spoken
from rlhf_dist.telemetry.run_telemetry import Telemetry
from rlhf_dist.types import Prompt, Sampling
from rlhf_dist.weights.sync import WeightSync


def train(config: Config, resume: bool, resume_from: int | None = None) -> None:
    """An RL run, from checks to table and curves; a resume of one that is at its end says so and does nothing.

    `resume_from`: the step of the checkpoint to resume from; None for the newest.
    """
    start = find_start(config, "train", resume, resume_from, read_state)
    if nothing_left(config, "loop.steps", config.loop.steps, start):
        return
    warnings = check_before_start(config, "train", start.resume)
    stream = PromptStream(config.data, config.seed, config.eval.prompts)
    prompts = held_out(config.data, config.eval.prompts)
    started = time.monotonic()
    shaper, watch = Shaper(config.algo, config.rollout.max_response_tokens), CollapseWatch(config.algo.group_size)
    if start.state is not None:
        put_back(start.state, stream, shaper, watch)
    with opened(config, "train", start) as (run, telemetry, progress):
        for text in warnings:
            telemetry.warn(text)
        source = model_source(config, start.folder)
        if resume:
            require_shared_memory(source, config)
        plan = basis_before(config, source)
        late = LateReports(telemetry, run.path, stacks_of)
        progress.stage("starting Ray")
        session = ray_session(config.cluster, run.logs / "ray", progress.note)
        with session as nodes, ExitStack() as memory, ExitStack() as stack, late.at_the_end():
            placement = place_in(config, nodes, "train")
            plan = plan or basis(config, placement, source)
            warn_of_memory(does_not_fit(config, placement, plan), telemetry)
            progress.stage(placement_line(placement))
            parts = start_fleets(config, placement, source, run.logs, start.folder, stack)
            late.watch(parts.healing, parts.inbox)
            ledger = stack.enter_context(closing(Ledger(run.ledger)))
            wired = training.Run(
                config=config,
                algorithm=hosts.algorithm(config.algo),
                policy=parts.learner.policy,
                critic=parts.learner.critic,
                actors=parts.actors,
                sync=WeightSync(parts.learner.policy, parts.rollouts),
                members=parts.members,
                healing=parts.healing,
                stream=stream,
                held_out=prompts,
                ledger=ledger,
                directory=run,
                telemetry=telemetry,
                progress=progress,
                shaper=shaper,
                watch=watch,
                stop=Saving(config.faults.save_on_stop_s),
                ranks=rebuild_of(config, placement, source, parts),
                kept=kept_state(config, nodes, placement, source, memory),
                report=late.report,
                background=background_of(config, "train", nodes, placement, source, run, memory, progress.note),
            )
            with hang_alarm(config.faults.step_s, lambda: parts.inbox.turns, run.path / FOLDER):
                outcome, proof = train_to_the_end(wired, start.state), ledger.proof()
        beside = compared(config, placement, plan, run.metrics) if plan else ("", {})
        end_train(config, run, progress, outcome, proof, beside, time.monotonic() - started)


def warn_of_memory(problem: str, telemetry: Telemetry) -> None:
    """`problem`: what does not fit by the plan; empty: everything does."""
    if problem:
        telemetry.warn(f"by the plan memory may not suffice: {problem}")


def placement_line(placement: Placement) -> str:
    """What starts."""
    workers = f"{placement.rollout_workers} vLLM worker(s)"
    return f"starting {workers} and {placement.learner_ranks} DeepSpeed rank(s) on {placement.device}"


def end_train(
    config: Config,
    run: RunDirectory,
    progress: Progress,
    outcome: training.Outcome,
    proof: LedgerProof,
    beside: tuple[str, dict[str, Any]],
    seconds: float,
) -> None:
    """Table, curves and summary; `beside`: the run's forecast. Raises `RunError` where the ledger does not add up."""
    gone, (line, planned) = ledger_gone(run), beside
    sound = proof.holds and not proof.in_flight and not gone
    step = config.loop.steps if sound else None
    summary = {"command": "train", SUMMARY_STEP: step, **asdict(outcome), "ledger": proof.text(), "forecast": planned}
    lines = [*proof.lines(), *([line] if line else [])]
    finish(run, progress, outcome.before, outcome.after, summary, seconds, lines)
    if not sound:
        why = gone or f"{run.ledger}: {proof.text()}"
        raise RunError(f"{why}. The run ended, but its ledger does not add up")


def evaluate(config: Config) -> None:
    """`model.path` on held-out prompts; prints the results."""
    warnings = check_before_start(config, "eval")
    prompts: list[Prompt] = held_out(config.data, config.eval.prompts)
    source = model_source(config, None, "eval")
    with eval_display(config) as (progress, logs):
        for line in reward_lines(config):
            progress.note(line)
        for doubt in (*warnings, *reward_model_doubts(config, begins=False)):
            progress.warn(doubt)
        progress.stage(f"starting Ray and vLLM (logs in {logs})")
        with (
            ray_session(config.cluster, logs / "ray", progress.note) as nodes,
            policy_at_work(config, source, nodes, logs, progress.warn) as (shell, sampling),
        ):
            progress.stage(f"evaluating {len(prompts)} prompts")
            results = run_evaluation(
                prompts,
                config.eval,
                sampling,
                seed=config.seed,
                shell=shell,
                gold=config.scoring.gold,
                solved_by=solved_by(config),
            )
        if results.non_finite:
            progress.note(told(results.non_finite, config.scoring.non_finite))
    for name, value in results.metrics.items():
        print(f"{spoken(name):24} {value:z.3f}")
    for line in best_of_n_lines(results.measured, config.scoring.gold) if config.eval.samples else ():
        print(line)


@contextmanager
def policy_at_work(
    config: Config, source: str, nodes: Sequence[Machine], logs: Path, warn: Callable[[str], None]
) -> Iterator[tuple[Shell, Sampling]]:
    """The engines of the policy at `source`, with their scorers, for the time of the block; and how it samples."""
    with ExitStack() as stack:
        placement = place_in(config, nodes, "eval")
        parts = start_fleets(config, placement, source, logs, None, stack)
        rules = rules_of(config, parts.actors.reference is not None, masked=False)
        yield Shell(Controller(rules, None, parts.members, healing=parts.healing), parts.actors), rules.sampling
        if left := remove_logs(placement.worker_nodes, logs, config.cluster.start_timeout_s, START_KEY):
            warn(left)


@contextmanager
def eval_display(config: Config) -> Iterator[tuple[Progress, Path]]:
    """A display, and a folder for logs that goes again unless the work inside fails: then it stays and is named."""
    progress = make_progress(config.telemetry.progress, sys.stderr)
    logs = Path(tempfile.mkdtemp(prefix="rlhf-dist-eval-"))
    try:
        yield progress, logs
    except BaseException:
        progress.close(stopped=True)
        progress.note(f"logs are kept in {logs}")
        raise
    progress.close()
    shutil.rmtree(logs, ignore_errors=True)


def start_fleets(
    config: Config, placement: Placement, source: str, logs: Path, folder: Path | None, stack: ExitStack
) -> Parts:
    """Start all actors side by side and wait until each is ready; `folder`: the checkpoint resumed from."""
    config = with_sources(config, source, folder, learns=placement.learner_ranks > 0)
    roster = reserved(config, placement, source, logs, stack)
    workers = start_workers(config, placement, source, logs, folder, roster)
    if placement.device == "cuda":
        # vLLM sizes its cache by how the free memory of the whole GPU changes while it starts.
        gather(are_ready(workers), "start", config.cluster.start_timeout_s, START_KEY)
    count, booked = config.scoring.replicas, placement.scoring_places
    scorers = start_servers(
        config, placement, source, logs, roster, actors.ScoringHost, "scoring server", count, booked
    )
    references = scorers if needs_reference(config) else {}
    if (count := config.reference.replicas) and references:
        host, booked = actors.ReferenceHost, placement.reference_places
        references = start_servers(config, placement, source, logs, roster, host, "reference server", count, booked)
    collator = start_servers(config, placement, source, logs, roster, CollatorHost, COLLATOR, 1, threads=1)
    relays = start_relays(config, placement, source, logs, roster, workers, stack)
    ranks = start_ranks(config, placement, source, logs, roster, hosts.PolicyHost, stack)
    critics = start_ranks(config, placement, source, logs, roster, hosts.CriticHost, stack, critic=True)
    ready = are_ready(workers | scorers | references | collator | relays.all())
    join_ranks(config, ranks, folder, placement.spread_of_ranks(), sends_straight(config, placement))
    join_ranks(config, critics, folder, placement.spread_of_ranks(critic=True))
    gather(ready, "start", config.cluster.start_timeout_s, START_KEY)
    shares_gpu = placement.paired and placement.device == "cuda"
    return parts_of(config, roster, workers, scorers, references, collator, ranks, critics, relays, shares_gpu)
