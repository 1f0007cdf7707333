"""The actors: plain classes made inside a Ray process from a spec, and wrapped by `ray.remote`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import ray

from rlhf_dist.cluster.importing import importing
from rlhf_dist.cluster.processes import end_now, lost_ray, process_id
from rlhf_dist.cluster.roster import Alive, work
from rlhf_dist.cluster.spec import ActorSpec, enter
from rlhf_dist.cluster.waits import fetched
from rlhf_dist.config.schema import Config, RewardSpec
from rlhf_dist.errors import AnswerLost
from rlhf_dist.planning.placement import needs_reference
from rlhf_dist.scoring.reference_files import REFERENCE_FOLDER
from rlhf_dist.types import Group, Handle, Scores
from rlhf_dist.weights.shared_memory import SHARED_MEMORY, sweep

CLOSE_LIMIT_S = 10.0
STOP_LIMIT_S = 0.5
"""The same when the command was stopped: who waits at the keyboard waits for nobody that is busy."""
PARTIAL_LIMIT_S = 10.0
"""For a rollout worker to get all that a message says others have handed over; what is missing is begun again."""
TOKENS_LIMIT_S = 30.0
"""For a server to get the tokens of a group; by then a maker that does not answer counts as lost."""
WORKER_THREADS = 4
"""Of a rollout worker: who asks for events, who loads weights, who brings messages, and one to spare."""
SERVER_THREADS = 64
"""Groups that one scoring or reference server takes at a time."""


@importing()
def make_rollout_worker(spec: ActorSpec) -> Any:
    """Engine and worker, inside the actor's process."""
    from rlhf_dist.algo.recipes import ALGORITHMS
    from rlhf_dist.data.tasks import task_of
    from rlhf_dist.rollout.conversation import nothing_more
    from rlhf_dist.rollout.masked_sampling import MaskStart
    from rlhf_dist.rollout.vllm_engine import VllmEngine
    from rlhf_dist.rollout.worker import RolloutWorker

    config = spec.config
    lag = ALGORITHMS[config.algo.name](config.algo).mask if spec.mask else None
    engine = VllmEngine(
        Path(spec.source),
        config.rollout,
        dtype=config.model.dtype,
        device=spec.device,
        threads=spec.threads,
        name=spec.name,
        chat=config.data.chat,
        special_texts=any(reward.keep_special_tokens for reward in config.scoring.rewards.values()),
        sleeps=config.cluster.colocate,
        mask=None if lag is None else MaskStart(Path(spec.mask), spec.mask_version, lag),
    )
    return RolloutWorker(
        spec.name,
        engine,
        chat=config.data.chat,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        keep=lambda group: Handle(ray.put(group)),
        get=lambda handles: fetched([handle.place for handle in handles], PARTIAL_LIMIT_S),
        observe=task_of(config.data.task.name).observe if config.data.source == "task" else nothing_more,
        copy_every_s=config.faults.copy_every_s if config.loop.max_policy_lag else 0.0,
    )


def pump(spec: ActorSpec, made: Future[Any]) -> None:
    """Body of the thread that makes an engine, and pumps it.

    OpenMP keeps the helpers of every thread that has computed with some, and lets none spin once there are more
    threads than CPUs. An engine that was made in another thread than the pump's decoded a third slower.
    """
    try:
        worker = make_rollout_worker(spec)
    except BaseException as error:  # whatever it is, who starts the process has to hear of it
        made.set_exception(error)
        return
    made.set_result(worker)
    worker.run()


class RolloutHost(Alive):
    """A rollout worker's process. Calls come on several threads; the engine has one of its own."""

    def __init__(self, spec: ActorSpec) -> None:
        enter(spec)
        made: Future[Any] = Future()
        threading.Thread(target=pump, args=(spec, made), daemon=True, name="pump").start()
        self._worker = made.result(spec.config.cluster.start_timeout_s)

    @ray.method(num_returns=0)
    def post(self, number: int, verb: Any) -> None:
        """See `RolloutWorker.post`."""
        self._worker.post(number, verb)

    def events(self, wait_s: float) -> Any:
        """See `RolloutWorker.events`."""
        return self._worker.events(wait_s)

    @work
    def load_weights(self, announcement: Any) -> Any:
        """See `RolloutWorker.load_weights`."""
        return self._worker.load_weights(announcement)

    @work
    def sleep(self, number: int) -> None:
        """See `RolloutWorker.sleep`."""
        self._worker.sleep(number)

    def between_calls(self) -> tuple[str, float]:
        """It samples; see `Alive`."""
        busy = self._worker.busy_since
        return super().between_calls() if busy is None else ("generate", busy)

    def counts(self) -> Mapping[str, int]:
        """See `RolloutWorker.counts`."""
        return self._worker.counts()

    def ready(self) -> str:
        """Answers once the engine is up."""
        return self._worker.ready()


def tokens_at(places: Sequence[Any]) -> Group:
    """The group that a list of one reference stands for.

    In a list, so that Ray does not fetch it for the call: it would hold all later calls back, signs of life too, while
    the maker's node does not answer. Raises `AnswerLost` where the tokens are lost, or do not come in time.
    """
    (group,) = fetched(places, TOKENS_LIMIT_S)
    if group is None:
        raise AnswerLost(f"the tokens of a group are lost, or did not come in {TOKENS_LIMIT_S:g} s")
    return group


class ReferenceHost(Alive):
    """A process that holds the reference model and nothing else."""

    def __init__(self, spec: ActorSpec) -> None:
        enter(spec)
        self._reference = make_reference(spec)
        self._name, self._groups = spec.name, 0

    @work
    def reference(self, places: Sequence[Any], temperature: float) -> Any:
        """See `ReferenceServer.logprobs`, and `tokens_at`; the head, and a reference to the logprobs."""
        head, logprobs = self._reference.logprobs(tokens_at(places), temperature)
        self._groups += 1
        return head, (ray.put(logprobs),)

    @work
    def move(self, announcement: Any, keep: float) -> Any:
        """See `ReferenceServer.update`."""
        return self._reference.update(announcement, keep)

    @work
    def save_reference(self, folder: Path) -> None:
        """See `ReferenceServer.save`."""
        self._reference.save(folder / REFERENCE_FOLDER)

    def counts(self) -> Mapping[str, int]:
        """Groups that it has scored or compared; see `Alive`."""
        return {"groups": self._groups}

    def ready(self) -> str:
        """Answers once everything is loaded."""
        return self._name


class ScoringHost(ReferenceHost):
    """A scoring server's process; it holds the reference too where that has no servers of its own."""

    def __init__(self, spec: ActorSpec) -> None:
        from rlhf_dist.scoring.scorer import Scorer, asked_by

        enter(spec)
        self._scorer = Scorer(spec.config.scoring, partial(make_reward_model, spec), asked_by(spec.config))
        with_reference = needs_reference(spec.config) and spec.config.reference.replicas == 0
        self._reference = make_reference(spec) if with_reference else None
        self._name, self._groups = spec.name, 0

    @work
    def score(self, places: Sequence[Any]) -> Scores:
        """See `Scorer.score`, and `tokens_at`."""
        found = self._scorer.score(tokens_at(places))
        self._groups += 1
        return found


def set_threads(spec: ActorSpec) -> None:
    """torch's own share of the CPUs. Called where a model is held: rewards without one need no torch."""
    import torch

    torch.set_num_threads(spec.threads)


@importing()
def make_reward_model(spec: ActorSpec, name: str, reward: RewardSpec) -> Any:
    """A reward of kind model, inside the actor's process."""
    from rlhf_dist.scoring.reward_model import RewardModel

    set_threads(spec)
    return RewardModel(name, reward, spec.config.scoring, model_setting(spec.config, spec.source, spec.device))


def model_setting(config: Config, policy: str, device: str) -> Any:
    """What a reward model has to know of a run whose policy starts from the directory or hub name `policy`."""
    from rlhf_dist.scoring.reward_model import ModelSetting

    return ModelSetting(
        policy=policy,
        max_tokens=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
        chat=config.data.chat,
        model=config.model,
        device=device,
        cache=Path(config.output).absolute() / ".models",
        system=config.data.system,
    )


@importing()
def make_reference(spec: ActorSpec) -> Any:
    """The reference model behind its batcher, inside the actor's process."""
    from rlhf_dist.scoring.reference import ReferenceModel, ReferenceServer

    set_threads(spec)
    config = spec.config
    model = ReferenceModel(
        config.reference.path,
        config.model,
        device=spec.device,
        batch_tokens=config.scoring.batch_tokens,
        chunk_tokens=config.learner.logprob_chunk_tokens,
        name=spec.name,
    )
    return ReferenceServer(
        model, batch_tokens=config.scoring.batch_tokens, timeout_s=config.scoring.timeout_s, name=spec.name
    )


def close_all(ranks: dict[str, Any], limit_s: float = CLOSE_LIMIT_S) -> None:
    """Let ranks remove what lies outside them; those that do not answer are killed, and theirs is removed here."""
    silent = list(ranks)
    if lost_ray() is None:
        calls = {rank.close.remote(): name for name, rank in ranks.items()}
        left = ray.wait(list(calls), num_returns=len(calls), timeout=limit_s)[1]
        silent = [calls[call] for call in left]
        for name in silent:
            ray.kill(ranks[name])
    pids = [pid for name in silent if (pid := process_id(name)) is not None]
    if pids:
        end_now(pids)
        sweep(SHARED_MEMORY)
