"""A real run with a policy lag in which one of two rollout workers misses a push: its groups go on with the other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import make_workplace

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
LAG, STEPS, PROMPTS, MISSED = 1, 5, 6, 2
"""The push of this version is missed."""

PLUGIN = f"""
import time

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.rollout.weight_receiver import EngineWeights
from vllm.v1.core.sched.scheduler import Scheduler

def register():
    schedule, load = Scheduler.schedule, EngineWeights.load

    def slowly(self, *args, **kwargs):
        time.sleep(0.02)
        return schedule(self, *args, **kwargs)

    def refusing(self, announcement):
        if announcement.version == {MISSED} and self._name == "rollout worker 1":
            raise WeightSyncError("this version is refused")
        return load(self, announcement)

    Scheduler.schedule, EngineWeights.load = slowly, refusing
"""
"""A plugin of vLLM: decoding takes so long that groups are under way at every push, and one push is refused."""

THREE_CPUS = """
from rlhf_dist.planning import placement

placement.local_machine = lambda: placement.Machine(cpus=3, gpus=0)
from rlhf_dist.__main__ import run

raise SystemExit(run())
"""


@dataclass(frozen=True)
class HandedOver:
    path: Path

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / name).read_text().splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines("metrics.jsonl") if "reward/mean" in line]

    def told(self, kind: str) -> list[str]:
        return [event["message"] for event in self.lines("events.jsonl") if event["kind"] == kind]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> HandedOver:
    folder = tmp_path_factory.mktemp("handed-over")
    place = make_workplace(folder)
    (folder / "missed_push.py").write_text(PLUGIN)
    (folder / "three_cpus.py").write_text(THREE_CPUS)
    about = folder / "missed_push-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: missed_push\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nmissed_push = missed_push:register\n")
    words = ["name=run", "learner.ranks=1", "learner.zero_stage=0", "cluster.colocate=false", "eval.every=0"]
    words += [f"loop.max_policy_lag={LAG}", "algo.ratio_to=behaviour", f"loop.steps={STEPS}"]
    words += ["rollout.max_prompt_tokens=24", "rollout.max_response_tokens=40", "rollout.max_concurrent=8"]
    done = place.finish(place.start("train", *words, program=["three_cpus.py"]))
    assert done.code == 0, done.stderr
    return HandedOver(place.output / "run")


def test_the_groups_of_the_worker_that_missed_the_push_go_on_with_the_other(run: HandedOver) -> None:
    (warning,) = [message for message in run.told("warning") if "refused" in message]
    assert warning.endswith("rollout worker 1: this version is refused; it serves no tokens until a push succeeds")
    moved = [message for message in run.told("handed_over") if "than rollout worker 1," in message]
    assert moved and all(message.startswith("train/") for message in moved)
    assert sum(int(message.split()[-4]) for message in moved) > 0, "they had tokens"


def test_they_are_trained_on_and_no_token_is_lost(run: HandedOver) -> None:
    groups = STEPS * PROMPTS
    ledger = json.loads((run.path / "summary.json").read_text())["ledger"]
    tokens = int(sum(line["rollout/response_tokens"] for line in run.steps))
    assert ledger == (
        f"{groups} groups issued: {groups} trained once, 0 dropped, 0 in flight, 0 lost, 0 used twice; "
        f"{tokens} tokens sampled: {tokens} trained on, 0 dropped, 0 lost"
    )
    assert max(line["rollout/policy_lag_max"] for line in run.steps) == LAG


def test_every_token_has_the_version_of_the_weights_that_sampled_it(run: HandedOver) -> None:
    """Else the learner's own logprobs would differ by as much as its weights have moved."""
    fresh = [line["rollout/logprob_diff_max"] for line in run.steps if "rollout/logprob_diff_max" in line]
    stale = [line["rollout/logprob_diff/lag_1"] for line in run.steps if "rollout/logprob_diff/lag_1" in line]
    assert fresh and max(fresh) <= 1e-4, fresh
    assert stale and max(stale) > 1e-3, stale
