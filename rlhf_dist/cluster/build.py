"""Config -> a wired run. The only place that sees the whole config and every room."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_dist.cluster import actors
from rlhf_dist.cluster.groups import LearnerGroup, RolloutFleet, ScoringFleet, gather, log_name
from rlhf_dist.cluster.placement import Command, Placement, bundles, first_learner_bundle, local_machine, place
from rlhf_dist.cluster.session import joins_cluster, ray_session, reserve
from rlhf_dist.config.load import to_yaml
from rlhf_dist.config.schema import Config
from rlhf_dist.data.stream import PromptStream, held_out
from rlhf_dist.errors import RunError
from rlhf_dist.loop import supervised
from rlhf_dist.loop import train as training
from rlhf_dist.loop.evaluate import evaluate as run_evaluation
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.queue import ExperienceQueue
from rlhf_dist.loop.run_directory import RunDirectory, open_run_directory, require_free_disk, write_json, write_text
from rlhf_dist.scoring.scorer import preflight
from rlhf_dist.telemetry.display import Progress, make_progress
from rlhf_dist.telemetry.report import before_after_text, curves
from rlhf_dist.telemetry.sinks import Telemetry, open_telemetry
from rlhf_dist.types import Prompt

START_KEY = "cluster.start_timeout_s"


def train(config: Config, resume: bool) -> None:
    """An RL run, from checks to table and curves."""
    check_before_start(config, "train")
    stream = PromptStream(config.data, config.seed, config.eval.prompts)
    prompts = held_out(config.data, config.eval.prompts)
    started = time.monotonic()
    with opened(config, "train", resume) as (run, telemetry, progress):
        folder = run.latest_checkpoint() if resume else None
        state = training.read_state(folder) if folder else None
        source = model_source(config, folder)
        progress.stage("starting Ray")
        with ray_session(config.cluster) as machine, ExitStack() as stack:
            placement = place(config, machine, "train")
            workers = f"{placement.rollout_workers} vLLM worker(s)"
            progress.stage(f"starting {workers} and {placement.learner_ranks} DeepSpeed rank(s) on {placement.device}")
            fleet, scoring, policy = start_fleets(config, placement, source, run.logs, folder, stack)
            ledger = Ledger(run.ledger)
            stack.callback(ledger.close)
            wired = training.Run(
                config=config,
                algorithm=actors.algorithm(config.algo),
                policy=policy,
                rollouts=fleet,
                scoring=scoring,
                stream=stream,
                held_out=prompts,
                queue=ExperienceQueue(config.loop.max_policy_lag, config.loop.prompts_per_step),
                ledger=ledger,
                directory=run,
                telemetry=telemetry,
                progress=progress,
            )
            before, after = training.train(wired, state)
            proof = ledger.proof()
        summary = {"command": "train", "before": before, "after": after, "ledger": proof.text()}
        finish(run, progress, before, after, summary, time.monotonic() - started, [proof.text()])
        if not proof.holds or proof.in_flight:
            raise RunError(f"{run.ledger}: the run ended, but its ledger does not add up: {proof.text()}")


def sft(config: Config, resume: bool) -> None:
    """A supervised run."""
    check_before_start(config, "sft")
    started = time.monotonic()
    with opened(config, "sft", resume) as (run, telemetry, progress):
        folder = run.latest_checkpoint() if resume else None
        state = supervised.read_state(folder) if folder else None
        source = model_source(config, folder)
        progress.stage("starting Ray")
        with ray_session(config.cluster) as machine, ExitStack() as stack:
            placement = place(config, machine, "sft")
            progress.stage(f"starting {placement.learner_ranks} DeepSpeed rank(s) on {placement.device}")
            group = reserve(bundles(placement, config.cluster.colocate), config.cluster.start_timeout_s)
            ranks = start_ranks(config, placement, source, run.logs, group, actors.SupervisedHost, stack)
            join_ranks(config, ranks, folder)
            learner = actors.SupervisedGroup(ranks, timeout_s=config.learner.timeout_s)
            before, after = supervised.fine_tune(
                learner, config.sft, state, directory=run, telemetry=telemetry, progress=progress
            )
        summary = {"command": "sft", "before": before, "after": after}
        finish(run, progress, before, after, summary, time.monotonic() - started, [])


def evaluate(config: Config) -> None:
    """`model.path` on held-out prompts; prints the results."""
    check_before_start(config, "eval")
    prompts: list[Prompt] = held_out(config.data, config.eval.prompts)
    progress = make_progress(config.telemetry.progress, sys.stderr)
    logs = Path(tempfile.mkdtemp(prefix="rlhf-dist-eval-"))
    source = model_source(config, None)
    try:
        progress.stage(f"starting Ray and vLLM (logs in {logs})")
        with ray_session(config.cluster) as machine, ExitStack() as stack:
            placement = place(config, machine, "eval")
            fleet, scoring, _ = start_fleets(config, placement, source, logs, None, stack)
            progress.stage(f"evaluating {len(prompts)} prompts")
            sampling = training.sampling_of(config)
            results = run_evaluation(prompts, config.eval, sampling, rollouts=fleet, scoring=scoring)
    finally:
        progress.close()
    for name, value in results.items():
        print(f"{name.removeprefix('eval/').replace('_', ' '):24} {value:.3f}")


def check_before_start(config: Config, command: Command) -> None:
    """Everything that can be known to be wrong before a process is started or a file written."""
    if not joins_cluster(config.cluster):
        place(config, local_machine(), command)
    if command != "sft":
        preflight(config.scoring)


def model_source(config: Config, checkpoint: Path | None) -> str:
    """The Hugging Face directory to start from: the checkpoint's, or what `model.path` names, after checks."""
    from rlhf_dist.models.hf import inspect, resolve

    if checkpoint is not None:
        return str((checkpoint / "hf").absolute())
    source = resolve(config.model, Path(config.output).absolute() / ".models")
    length = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    device = "cuda" if config.cluster.device != "cpu" and local_machine().gpus else "cpu"
    inspect(source.path, chat=config.data.chat, device=device, max_tokens=length)
    path = Path(source.path)
    return str(path.absolute()) if path.exists() else source.path


@contextmanager
def opened(config: Config, command: Command, resume: bool) -> Iterator[tuple[RunDirectory, Telemetry, Progress]]:
    """Run directory, telemetry and progress of a run; the model is checked before the directory is made."""
    if not resume:
        require_free_disk(Path(config.output), disk_need(model_source(config, None), config, command))
    run = open_run_directory(config.output, config.name, to_yaml(config), resume)
    with ExitStack() as stack:
        stack.callback(run.close)
        progress = make_progress(config.telemetry.progress, sys.stderr)
        stack.callback(progress.close)
        progress.stage("opening telemetry")
        wandb_id = run.wandb_id.read_text().strip() if run.wandb_id.exists() else None
        telemetry, new_id = open_telemetry(
            config.telemetry, run.path.absolute(), config.name, asdict(config), wandb_id, progress.warn
        )
        stack.callback(telemetry.close)
        if new_id is not None and new_id != wandb_id:
            write_text(run.wandb_id, new_id + "\n")
        yield run, telemetry, progress


def disk_need(source: str, config: Config, command: Command) -> int:
    """Bytes of the checkpoints kept: weights, and three float32 copies by the optimizer."""
    folder = Path(source)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    kept = 1 if command == "sft" else config.loop.keep_checkpoints
    width = 1 if config.model.dtype == "float32" else 2
    return weights * (1 + 3 * width) * (kept + 1)


def start_fleets(
    config: Config, placement: Placement, source: str, logs: Path, folder: Path | None, stack: ExitStack
) -> tuple[RolloutFleet, ScoringFleet, LearnerGroup]:
    """Start all actors side by side and wait until each is ready."""
    group = reserve(bundles(placement, config.cluster.colocate), config.cluster.start_timeout_s)
    specs = [
        spec(config, f"rollout worker {i}", source, placement.device, placement.rollout_threads, logs, i, folder)
        for i in range(placement.rollout_workers)
    ]
    workers = actors.start_all(
        actors.RolloutHost, specs, group, 0, placement.rollout_num_cpus, placement.rollout_num_gpus
    )
    scorer_spec = spec(config, "scoring worker", source, placement.device, 1, logs, 0)
    scorer = actors.start_scoring(scorer_spec)
    ranks = start_ranks(config, placement, source, logs, group, actors.PolicyHost, stack)
    ready = {name: worker.ready.remote() for name, worker in {**workers, scorer_spec.name: scorer}.items()}
    join_ranks(config, ranks, folder)
    gather(ready, "start", config.cluster.start_timeout_s, START_KEY)
    fleet = RolloutFleet(workers, timeout_s=config.rollout.timeout_s, sync_timeout_s=config.weights.timeout_s)
    scoring = ScoringFleet(scorer, timeout_s=config.scoring.timeout_s)
    return fleet, scoring, LearnerGroup(ranks, timeout_s=config.learner.timeout_s)


def start_ranks(
    config: Config, placement: Placement, source: str, logs: Path, group: Any, host: type, stack: ExitStack
) -> dict[str, Any]:
    """Start the learner's ranks; they have not met yet. On leaving `stack` they remove what lies outside them."""
    specs = [
        spec(config, f"learner rank {i}", source, placement.device, placement.learner_threads, logs, i)
        for i in range(placement.learner_ranks)
    ]
    first = first_learner_bundle(placement, config.cluster.colocate)
    ranks = actors.start_all(host, specs, group, first, placement.learner_num_cpus, placement.learner_num_gpus)
    stack.callback(actors.close_all, ranks)
    return ranks


def join_ranks(config: Config, ranks: dict[str, Any], folder: Path | None) -> None:
    """Let the ranks meet and load; restores the optimizer of the checkpoint `folder`."""
    if not ranks:
        return
    limit = config.cluster.start_timeout_s
    first = next(iter(ranks))
    address, port = gather({first: ranks[first].address.remote()}, "give its address", limit, START_KEY)[first]
    resume = str(folder.absolute()) if folder else None
    gather({name: rank.join.remote(address, port, resume) for name, rank in ranks.items()}, "join", limit, START_KEY)


def spec(
    config: Config,
    name: str,
    source: str,
    device: str,
    threads: int,
    logs: Path,
    rank: int,
    folder: Path | None = None,
) -> actors.ActorSpec:
    """What one actor is made from; `folder` is the checkpoint resumed from."""
    # Workers must not draw the same numbers, nor a resumed run those of its first steps.
    chance = f"{config.seed}/{name}/{folder.name if folder else 'start'}"
    return actors.ActorSpec(
        name=name,
        config=config,
        source=source,
        device=device,
        threads=threads,
        log=str((logs / log_name(name)).absolute()),
        rank=rank,
        seed=random.Random(chance).getrandbits(32),
        search_path=os.getcwd(),
    )


def finish(
    run: RunDirectory,
    progress: Progress,
    before: dict[str, float],
    after: dict[str, float],
    summary: dict[str, Any],
    seconds: float,
    lines: list[str],
) -> None:
    """Table, curves and summary."""
    progress.stage("drawing curves")
    curves(run.metrics, run.curves)
    write_json(run.summary, summary | {"seconds": round(seconds, 1)})
    progress.close()
    print(before_after_text(before, after))
    for line in lines:
        print(line)
    print(f"run directory: {run.path}  curves: {run.curves}  model: {run.latest_checkpoint()}/hf  ({seconds:.0f} s)")
