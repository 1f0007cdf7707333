"""A real run whose command hangs: it ends after `faults.step_s`, and saves what only memory has."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Finished, Workplace

from rlhf_dist.models.checkpoints import problems

pytestmark = [pytest.mark.engines, pytest.mark.faults, pytest.mark.timeout(600)]
STEPS, PROMPTS, STEP_S = 4, 8, 41
CONFIG = """
include: [{base}]
output: {output}
algo: {{group_size: 4}}
rollout: {{cpus: 1, max_response_tokens: 16, timeout_s: 40}}
learner: {{cpus: 1, keep_state_every: 1, timeout_s: 40}}
weights: {{timeout_s: 40}}
scoring: {{timeout_s: 40, rewards: {{vowels: {{kind: function, function: "watchdog_rewards:vowels", timeout_s: 39}}}}}}
loop: {{steps: {steps}, prompts_per_step: {prompts}, checkpoint_every: 0}}
eval: {{prompts: 4, every: 0, samples: 0}}
faults: {{step_s: {step_s}}}
cluster: {{address: local, device: cpu, start_timeout_s: 40}}
telemetry: {{wandb: "off", samples_every: 0}}
"""
REWARDS = """
def vowels(prompts, responses, answers):
    return [sum(response.count(letter) for letter in "aeiou") / 10 for response in responses]
"""
HANGS = """
import time
from rlhf_dist.__main__ import run
from rlhf_dist.cluster import session
from rlhf_dist.config.schema import ClusterConfig

session.prepare(ClusterConfig(address="local", device="cpu"))  # as the command does before it imports Ray
from rlhf_dist.loop import rl_training

tell = rl_training.tell

def tells_and_hangs(run, shell, step, *rest):
    tell(run, shell, step, *rest)
    if step == 2:
        time.sleep(600)

rl_training.tell = tells_and_hangs
raise SystemExit(run())
"""
"""The command, whose own thread hangs after step 2."""


@dataclass(frozen=True)
class Ran:
    """What was run; tests change nothing in it."""

    path: Path
    end: Finished

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "events.jsonl").read_text().splitlines()]

    @property
    def saved(self) -> str:
        """The newest checkpoint, which is whole."""
        name = (self.path / "checkpoints" / "LATEST").read_text().strip()
        assert problems(self.path / "checkpoints" / name) == []
        return name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("watchdog")
    words = {"base": ROOT / "configs" / "reverse.yaml", "output": folder / "runs"}
    (folder / "run.yaml").write_text(CONFIG.format(**words, steps=STEPS, prompts=PROMPTS, step_s=STEP_S))
    (folder / "watchdog_rewards.py").write_text(REWARDS)
    (folder / "hangs.py").write_text(HANGS)
    return Workplace(folder)


def test_a_command_that_hangs_ends_and_saves_what_memory_has(place: Workplace) -> None:
    end = place.finish(place.start("train", "name=hung", program=("hangs.py",)))
    hung = Ran(place.output / "hung", end)
    assert end.code == 1 and f"the command itself has hung for {STEP_S} s (faults.step_s)" in end.stderr
    assert "in tells_and_hangs\n" in (hung.path / "faults" / "command.txt").read_text()
    assert json.loads((hung.path / "summary.json").read_text())["error"] == "CommandHung"
    assert hung.saved == "step-1" and any(event["message"].endswith("from memory") for event in hung.events)
