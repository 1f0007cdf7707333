"""The processes of the learner's side: policy and critic ranks, and what every rank can do."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from rlhf_dist.algo.algorithm import Algorithm, TokenCredit
from rlhf_dist.algo.recipes import ALGORITHMS
from rlhf_dist.cluster.importing import importing
from rlhf_dist.cluster.roster import Alive, work
from rlhf_dist.cluster.spec import ActorSpec, enter
from rlhf_dist.config.schema import AlgoConfig, OptimizerConfig
from rlhf_dist.learner.checkpoint_files import CRITIC_FOLDER
from rlhf_dist.weights.receipts import MeetingPoint, Round

LOOPBACK = "127.0.0.1"
"""As in `deepspeed_engine`, whose import takes seconds."""


def algorithm(config: AlgoConfig) -> Algorithm:
    """The algorithm that the config names."""
    return ALGORITHMS[config.name](config)


class LearnerHost(Alive):
    """One learner rank's process: first `address` of rank 0, then `join` on all, then the learner's own verbs."""

    def __init__(self, spec: ActorSpec) -> None:
        enter(spec)
        self._spec = spec
        self._engine: Any = None
        self._learner: Any = None
        self._folder: Path | None = None
        self._own = LOOPBACK

    def address(self, nodes: int) -> tuple[str, int]:
        """Where the ranks meet, and a free port: on loopback, unless they are on several nodes."""
        host = LOOPBACK if nodes == 1 else ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    @work
    @importing()
    def join(self, address: str, port: int, resume: str | None, spread: bool = False) -> str:
        """Meet the other ranks, load the model, restore the optimizer of the checkpoint folder `resume`.

        `spread`: weights are sent straight to rollout workers on other nodes.
        """
        from rlhf_dist.learner.deepspeed_engine import init_process_group

        spec, config = self._spec, self._spec.config
        self._own = ray.util.get_node_ip_address() if spread or address != LOOPBACK else LOOPBACK
        init_process_group(
            spec.rank,
            config.learner.ranks,
            address,
            port,
            own_address=self._own,
            device=spec.device,
            threads=spec.threads,
            timeout_s=max(config.learner.timeout_s, config.cluster.start_timeout_s),
        )
        self._folder = None if resume is None else Path(resume)
        self._engine = self._make_engine()
        self._learner = self._make_learner()
        if self._folder is not None:
            self._restore(self._folder)
        return spec.name

    @work
    def save(self, folder: Path) -> None:
        """See `ModelEngine.save`."""
        self._engine.save(folder)

    def counts(self) -> Mapping[str, int]:
        """See `model_engine.Engine.counts`; the sums where this rank has the critic's engine, too."""
        beside = getattr(getattr(self, "_critic", None), "engine", self._engine)
        made = Counter[str]()
        for engine in (self._engine, *([] if beside is self._engine else [beside])):
            made.update({} if engine is None else engine.counts())
        return made

    def close(self) -> None:
        """Remove what lies outside the process."""
        if self._engine is not None:
            self._engine.close()

    def _restore(self, folder: Path) -> None:
        self._engine.restore(folder)

    def _optimizer(self) -> OptimizerConfig:
        return self._spec.config.learner.optimizer

    def _make_engine(self) -> Any:
        from rlhf_dist.learner.model_engine import ModelEngine

        spec, config = self._spec, self._spec.config
        return ModelEngine(
            Path(spec.source),
            config.model,
            config.learner,
            self._optimizer(),
            device=spec.device,
            bucket_mib=config.weights.bucket_mib,
            shared=config.cluster.colocate,
            mask=self._make_mask(),
            meeting=self._meeting(),
        )

    def _meeting(self) -> MeetingPoint | None:
        """How weights are sent to rollout workers; None: through shared memory."""
        weights = self._spec.config.weights
        if weights.transport == "shared_memory":
            return None
        return MeetingPoint((self._own, 0), weights.transport, weights.timeout_s)

    def _make_mask(self) -> Any:
        """What may be drawn; None: everything."""
        return None

    def _make_learner(self) -> Any:
        raise AssertionError(
            "a learner host is a policy's, a critic's, a supervised, a preferring or a reward model's one"
        )


class CriticVerbs(Alive):
    """What a process that gives credit by token can be asked for."""

    _critic: Any

    @work
    def estimate(self, batch: Any) -> Any:
        """See `CriticLearner.estimate`; the sums, and a reference to the estimate."""
        sums, estimate = self._critic.estimate(batch)
        return sums, (ray.put(estimate),)

    @work
    def update_critic(self, batch: Any, estimate: Any) -> Any:
        """See `CriticLearner.update`."""
        return self._critic.update(batch, estimate)

    def critic_fault(self) -> Any:
        """What the last optimizer step of the critic was refused for, where this rank knows; None."""
        return self._critic.check.fault

    @work
    def save_critic(self, folder: Path) -> None:
        """Into the checkpoint's own folder for the critic."""
        (folder / CRITIC_FOLDER).mkdir(exist_ok=True)
        self._critic.engine.save(folder / CRITIC_FOLDER)


class PolicyHost(CriticVerbs, LearnerHost):
    """A rank of the policy's learner; the critic's too where they take turns or share the trunk."""

    @work
    def update(self, batch: Any, estimate: Any, whitening: Any) -> Any:
        """See `PolicyLearner.update`."""
        found = self._learner.update(batch, estimate, whitening)
        if self._ema is not None:
            self._ema.update(self._engine.weights())
        return found

    def witnessed(self) -> Any:
        """See `Witness.seen`."""
        return self._learner.witness.seen()

    def fault(self) -> Any:
        """What the last optimizer step was refused for, where this rank knows; None."""
        return self._learner.check.fault

    @work
    def publish(self, version: int) -> Any:
        """See `ModelEngine.publish`."""
        return self._engine.publish(version)

    @work
    def send(self, made: Round) -> Any:
        """See `ModelEngine.send`."""
        return self._engine.send(made)

    @work
    def save(self, folder: Path) -> None:
        """The policy's part of a checkpoint."""
        self._engine.save(folder)
        if self._ema is not None:
            self._ema.save(self._engine.companions, folder)

    def _restore(self, folder: Path) -> None:
        self._engine.restore(folder)
        if algorithm(self._spec.config.algo).needs_critic and self._critic not in (None, self._learner):
            self._critic.engine.restore(folder / CRITIC_FOLDER)
        if self._ema is not None:
            self._ema.restore(folder)

    def _make_engine(self) -> Any:
        from rlhf_dist.learner.ema import Ema

        config = self._spec.config
        self._ema = Ema(config.learner.ema_decay, self._spec.rank) if config.learner.ema_decay else None
        if not shares_trunk(config):
            return super()._make_engine()
        from rlhf_dist.learner.shared_engine import SharedEngine

        return SharedEngine(
            Path(self._spec.source),
            config.model,
            config.learner,
            self._optimizer(),
            device=self._spec.device,
            bucket_mib=config.weights.bucket_mib,
            shared=config.cluster.colocate,
            mask=self._make_mask(),
            meeting=self._meeting(),
            resumed=self._folder,
        )

    def _make_learner(self) -> Any:
        from rlhf_dist.learner.policy_learner import PolicyLearner
        from rlhf_dist.learner.returns import ReturnsLearner
        from rlhf_dist.learner.shared_trunk import SharedPolicyLearner

        config = self._spec.config
        recipe, kl_in_reward = algorithm(config.algo), config.algo.kl.place == "reward"
        witness = self._engine.witness() if config.loop.witness else None
        check = self._engine.numbers_check(config.numbers.max_logprob_diff)
        self._critic = None
        if shares_trunk(config):
            self._critic = SharedPolicyLearner(
                self._engine,
                recipe,
                make_ptx(self._spec),
                config.critic,
                kl_in_reward=kl_in_reward,
                witness=witness,
                check=check,
            )
            return self._critic
        if recipe.needs_critic and not config.critic.side_by_side:
            self._critic = make_critic(self._spec)
        elif isinstance(recipe.credit, TokenCredit) and not recipe.needs_critic:
            self._critic = ReturnsLearner(recipe.credit, kl_in_reward=kl_in_reward)
        return PolicyLearner(self._engine, recipe, make_ptx(self._spec), witness, check)

    def _make_mask(self) -> Any:
        lag = algorithm(self._spec.config.algo).mask
        if lag is None:
            return None
        from rlhf_dist.cluster.sources import mask_source
        from rlhf_dist.learner.mask_policy import MaskPolicy

        source = mask_source(self._spec.source, self._folder)
        return MaskPolicy(source, self._spec.config.model, lag, device=self._spec.device)


class CriticHost(CriticVerbs, LearnerHost):
    """A rank of a critic that works beside the policy."""

    def _make_engine(self) -> Any:
        self._critic = make_critic(self._spec)
        return self._critic.engine

    def _make_learner(self) -> Any:
        return self._critic

    def _restore(self, folder: Path) -> None:
        self._engine.restore(folder / CRITIC_FOLDER)


def shares_trunk(config: Any) -> bool:
    """Whether the critic is a value head on the policy's trunk."""
    return algorithm(config.algo).needs_critic and config.critic.start == "shared"


def make_critic(spec: ActorSpec) -> Any:
    """A critic with its own trunk; the process group is up."""
    from rlhf_dist.learner.critic import CriticLearner
    from rlhf_dist.learner.scalar_engine import ScalarEngine

    config = spec.config
    engine = ScalarEngine(
        Path(config.critic.start), config.model, config.learner, config.critic.optimizer, device=spec.device
    )
    in_reward = config.algo.kl.place == "reward"
    check = engine.numbers_check()
    return CriticLearner(engine, algorithm(config.algo), config.critic, kl_in_reward=in_reward, check=check)


def make_ptx(spec: ActorSpec) -> Any:
    """The pre-training mix, or None where it is off."""
    config = spec.config
    if config.ptx.coef == 0:
        return None
    from rlhf_dist.data.demonstrations import ptx_demonstrations
    from rlhf_dist.learner.ptx import PtxMix
    from rlhf_dist.models.hf import load_tokenizer

    return PtxMix(
        config.ptx,
        ptx_demonstrations(config.data, config.ptx, config.seed, config.eval.prompts),
        load_tokenizer(Path(spec.source)),
        chat=config.data.chat,
        seed=config.seed,
        share=spec.rank // config.learner.sequence_parallel,
        shares=config.learner.shares,
        micro_batch_tokens=config.learner.micro_batch_tokens,
        shuffle=config.data.shuffle,
    )
