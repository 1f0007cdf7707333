"""The actors: plain classes made inside a Ray process from a spec, and wrapped by `ray.remote`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_dist.algo.recipes import ALGORITHMS, Algorithm
from rlhf_dist.cluster.groups import LearnerGroup
from rlhf_dist.config.schema import AlgoConfig, Config
from rlhf_dist.scoring.scorer import Scorer
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Rollout, Scores

LOOPBACK = "127.0.0.1"
CLOSE_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class ActorSpec:
    """What an actor needs to make its plain class."""

    name: str
    """For messages and its log: `rollout worker 0`."""
    config: Config
    source: str
    """The Hugging Face directory to start from."""
    device: str
    """`cpu` or `cuda`."""
    threads: int
    log: str
    """File for everything the process prints, in the run directory."""
    rank: int
    seed: int
    """Of this actor's own random numbers."""
    search_path: str
    """Folder of the command, where a user's own modules are."""


def algorithm(config: AlgoConfig) -> Algorithm:
    """The algorithm that the config names."""
    return ALGORITHMS[config.name](config)


def enter(spec: ActorSpec) -> None:
    """Send this process's output to its log file, so that engines do not print over the user's screen."""
    path = Path(spec.log)
    path.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    if spec.search_path not in sys.path:
        sys.path.append(spec.search_path)  # last: a file there must not hide a library


def make_rollout_worker(spec: ActorSpec) -> Any:
    """Engine and worker, inside the actor's process."""
    from rlhf_dist.rollout.vllm_engine import VllmEngine
    from rlhf_dist.rollout.worker import RolloutWorker

    config = spec.config
    engine = VllmEngine(
        Path(spec.source),
        config.rollout,
        dtype=config.model.dtype,
        device=spec.device,
        threads=spec.threads,
        seed=spec.seed,
        name=spec.name,
    )
    return RolloutWorker(spec.name, engine, chat=config.data.chat, max_prompt_tokens=config.rollout.max_prompt_tokens)


class RolloutHost:
    """A rollout worker's process."""

    def __init__(self, spec: ActorSpec) -> None:
        enter(spec)
        self._worker = make_rollout_worker(spec)

    def generate(self, prompts: Any, sampling: Any) -> Any:
        """See `RolloutWorker.generate`."""
        yield from self._worker.generate(prompts, sampling)

    def load_weights(self, announcement: Any) -> Any:
        """See `RolloutWorker.load_weights`."""
        return self._worker.load_weights(announcement)

    def ready(self) -> str:
        """Answers once the engine is up."""
        return self._worker.ready()


class ScoringHost:
    """The scoring worker's process."""

    def __init__(self, spec: ActorSpec) -> None:
        enter(spec)
        self._scorer = Scorer(spec.config.scoring)

    def score(self, rollout: Rollout) -> Scores:
        """See `Scorer.score`."""
        return self._scorer.score(rollout)

    def ready(self) -> str:
        """Answers once the rewards are loaded."""
        return "scoring worker"


class LearnerHost:
    """One learner rank's process: first `address` of rank 0, then `join` on all, then the learner's own verbs."""

    def __init__(self, spec: ActorSpec) -> None:
        enter(spec)
        self._spec = spec
        self._engine: Any = None
        self._learner: Any = None

    def address(self) -> tuple[str, int]:
        """Where the ranks meet: on loopback, since they are all on one node; and a free port."""
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            return LOOPBACK, probe.getsockname()[1]

    def join(self, address: str, port: int, resume: str | None) -> str:
        """Meet the other ranks, load the model, restore the optimizer of the checkpoint folder `resume`."""
        from rlhf_dist.learner.deepspeed_engine import init_process_group
        from rlhf_dist.learner.model_engine import ModelEngine

        spec, config = self._spec, self._spec.config
        init_process_group(
            spec.rank,
            config.learner.ranks,
            address,
            port,
            device=spec.device,
            threads=spec.threads,
            timeout_s=max(config.learner.timeout_s, config.cluster.start_timeout_s),
        )
        self._engine = ModelEngine(
            Path(spec.source),
            config.model,
            config.learner,
            self._optimizer(),
            device=spec.device,
            bucket_mib=config.weights.bucket_mib,
        )
        self._learner = self._make_learner()
        if resume is not None:
            self._engine.restore(Path(resume))
        return spec.name

    def save(self, folder: Path) -> None:
        """See `ModelEngine.save`."""
        self._engine.save(folder)

    def close(self) -> None:
        """Remove what lies outside the process."""
        if self._engine is not None:
            self._engine.close()

    def _optimizer(self) -> Any:
        return self._spec.config.learner.optimizer

    def _make_learner(self) -> Any:
        raise AssertionError("a learner host is a policy's or a supervised one")


class PolicyHost(LearnerHost):
    """A rank of the policy's learner."""

    def update(self, shard: Any, *rollouts: Rollout) -> Any:
        """See `PolicyLearner.update`."""
        return self._learner.update(shard, *rollouts)

    def publish(self, version: int) -> Any:
        """See `ModelEngine.publish`."""
        return self._engine.publish(version)

    def _make_learner(self) -> Any:
        from rlhf_dist.learner.policy import PolicyLearner

        return PolicyLearner(self._engine, algorithm(self._spec.config.algo))


class SupervisedHost(LearnerHost):
    """A rank of supervised training."""

    def train_step(self, step: int) -> Any:
        """See `SupervisedLearner.train_step`."""
        return self._learner.train_step(step)

    def evaluate(self) -> Any:
        """See `SupervisedLearner.evaluate`."""
        return self._learner.evaluate()

    def _optimizer(self) -> Any:
        return self._spec.config.sft.optimizer

    def _make_learner(self) -> Any:
        from rlhf_dist.data.demonstrations import demonstrations, held_out_demonstrations
        from rlhf_dist.learner.supervised import SupervisedLearner
        from rlhf_dist.models.hf import load_tokenizer

        config = self._spec.config
        return SupervisedLearner(
            self._engine,
            config.sft,
            demonstrations(config.data, config.sft, config.seed, config.eval.prompts),
            held_out_demonstrations(config.data, config.sft, config.eval.prompts),
            load_tokenizer(Path(self._spec.source)),
            chat=config.data.chat,
            seed=config.seed,
            ranks=config.learner.ranks,
            micro_batch_tokens=config.learner.micro_batch_tokens,
        )


class SupervisedGroup(LearnerGroup):
    """All ranks of supervised training."""

    def train_step(self, step: int) -> MetricSums:
        """Optimizer step `step` on every rank."""
        return MetricSums.merge(self.call("train_step", step).values())

    def evaluate(self) -> MetricSums:
        """Held-out loss over all ranks."""
        return MetricSums.merge(self.call("evaluate").values())


def start_all(
    host: type, specs: Sequence[ActorSpec], group: Any, first_bundle: int, num_cpus: float, num_gpus: float
) -> dict[str, Any]:
    """Actors by name, started side by side, each in its bundle of the placement group.

    Never restarted by Ray itself: an actor that comes back has lost its state.
    """
    return {
        spec.name: ray.remote(host)
        .options(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=0,
            runtime_env={"env_vars": environment(spec)},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=first_bundle + i),
        )
        .remote(spec)
        for i, spec in enumerate(specs)
    }


def start_scoring(spec: ActorSpec) -> Any:
    """The scoring worker; takes no CPU in Ray's books, since it works while others wait."""
    return (
        ray.remote(ScoringHost)
        .options(num_cpus=0, max_restarts=0, runtime_env={"env_vars": environment(spec)})
        .remote(spec)
    )


def close_all(ranks: dict[str, Any]) -> None:
    """Let ranks remove what lies outside them; what one that does not answer leaves is swept later."""
    ray.wait([rank.close.remote() for rank in ranks.values()], num_returns=len(ranks), timeout=CLOSE_LIMIT_S)


def environment(spec: ActorSpec) -> dict[str, str]:
    """OpenMP reads its settings when torch is imported, which is before any code of ours runs in the actor."""
    variables = {"OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false"}
    if spec.device == "cpu":
        # Threads that wait for each other spin for microseconds, then sleep. Sleeping at once halves the speed of
        # decoding; spinning for milliseconds, OpenMP's own choice, is many times slower where others use the cores too.
        variables["GOMP_SPINCOUNT"] = "10000"
        variables["KMP_BLOCKTIME"] = "1"
    return variables
