"""The ranks of a training without rollouts (`sft`, `reward`, `prefer`): what each can be asked for, how they start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from rlhf_dist.cluster.groups import LearnerGroup
from rlhf_dist.cluster.learner_hosts import LearnerHost
from rlhf_dist.cluster.rank_rebuild import background_of
from rlhf_dist.cluster.session import ray_session
from rlhf_dist.cluster.sources import model_source
from rlhf_dist.cluster.starts import join_ranks, reserved, start_ranks
from rlhf_dist.config.schema import Config, LearnerConfig
from rlhf_dist.loop.background_writer import BackgroundWriter
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.planning.nodes import place_in
from rlhf_dist.telemetry.display import Progress
from rlhf_dist.telemetry.metrics import MetricSums


class TrainerHost(LearnerHost):
    """One rank's process."""

    def train_step(self, step: int) -> Any:
        """See the learner's own."""
        return self._learner.train_step(step)

    def evaluate(self) -> Any:
        """See the learner's own."""
        return self._learner.evaluate()


class TrainerGroup(LearnerGroup):
    """All ranks."""

    def __init__(self, ranks: Mapping[str, Any], config: LearnerConfig) -> None:
        super().__init__(ranks, timeout_s=config.timeout_s)
        self._parts = config.sequence_parallel

    def train_step(self, step: int) -> MetricSums:
        """Optimizer step `step` on every rank."""
        return MetricSums.merge(self.call("train_step", step).values())

    def evaluate(self) -> Any:
        """What the ranks found on their shares of the held-out rows, merged as its kind is."""
        found = list(self.call("evaluate").values())[:: self._parts]
        return type(found[0]).merge(found)


@contextmanager
def started(
    host: type[TrainerHost],
    config: Config,
    command: Literal["sft", "reward", "prefer"],
    folder: Path | None,
    run: RunDirectory,
    progress: Progress,
) -> Iterator[tuple[dict[str, Any], BackgroundWriter | None]]:
    """The ranks by name, and what writes checkpoints beside their steps, for the time of the block.

    They have met, and loaded the checkpoint `folder`, if any.
    """
    source, logs = model_source(config, folder, command), run.logs
    progress.stage("starting Ray")
    with ray_session(config.cluster, logs / "ray", progress.note) as nodes, ExitStack() as memory, ExitStack() as stack:
        placement = place_in(config, nodes, command)
        progress.stage(f"starting {placement.learner_ranks} DeepSpeed rank(s) on {placement.device}")
        roster = reserved(config, placement, source, logs, stack)
        ranks = start_ranks(config, placement, source, logs, roster, host, stack)
        join_ranks(config, ranks, folder, placement.spread_of_ranks())
        yield ranks, background_of(config, command, nodes, placement, source, run, memory, progress.note)
