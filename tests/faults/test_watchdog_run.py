"""Real runs whose step takes too long (`faults.step_s`): a server that hangs, one that is slow, a command that hangs.

The limits of single waits come later than that of the step here, or not at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Finished, Workplace

from rlhf_dist.models.checkpoints import problems

pytestmark = [pytest.mark.engines, pytest.mark.faults, pytest.mark.timeout(600)]
STEPS, PROMPTS, STEP_S = 4, 8, 61
CONFIG = """
include: [{base}]
output: {output}
algo: {{group_size: 4}}
rollout: {{cpus: 1, max_response_tokens: 16, timeout_s: 60}}
learner: {{cpus: 1, keep_state_every: 1, timeout_s: 60}}
weights: {{timeout_s: 60}}
scoring: {{timeout_s: 60, rewards: {{vowels: {{kind: function, function: "watchdog_rewards:vowels", timeout_s: 59}}}}}}
loop: {{steps: {steps}, prompts_per_step: {prompts}, checkpoint_every: 0}}
eval: {{prompts: 4, every: 0, samples: 0}}
faults: {{step_s: {step_s}}}
cluster: {{address: local, device: cpu, start_timeout_s: 60}}
telemetry: {{wandb: "off", samples_every: 0}}
"""
REWARDS = """
import json, time
from pathlib import Path

HERE = Path(__file__).parent

def step():
    lines = Path(HERE, "runs", "late", "metrics.jsonl").read_text().splitlines()
    return 1 + json.loads(lines[-1])["step"] if lines else 0

def vowels(prompts, responses, answers):
    if step() == 2 and not HERE.joinpath("hung").exists():
        HERE.joinpath("begun").exists() and (HERE.joinpath("hung").touch(), time.sleep(600))
        HERE.joinpath("begun").touch()
        time.sleep(5)
    if step() == 4:
        time.sleep(12)
    return plain(prompts, responses, answers)

def plain(prompts, responses, answers):
    return [sum(response.count(letter) for letter in "aeiou") / 10 for response in responses]
"""
"""In step 2 the second call hangs, once; in step 4 each takes long."""
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
    def last_step(self) -> int:
        return json.loads((self.path / "metrics.jsonl").read_text().splitlines()[-1])["step"]

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


@pytest.fixture(scope="module")
def late(place: Workplace) -> Ran:
    """Loses its scoring server in step 2, and ends in step 4."""
    return Ran(place.output / "late", place.finish(place.start("train", "name=late")))


def test_who_hangs_is_reported_and_started_again(late: Ran) -> None:
    found = [event for event in late.events if event["kind"] == "late"]
    assert len(found) == 2, late.end.stderr
    assert found[0]["message"].startswith(
        f"no step or evaluation was done in {STEP_S} s (faults.step_s): scoring server"
    )
    assert "has made no progress in 'score' for" in found[0]["message"]
    assert found[0]["facts"]["silent"] == ["scoring server 0"]
    text = Path(found[0]["facts"]["stacks"]).read_text()
    assert "==== scoring server 0 ====" in text and "function.py" in text
    assert [event["message"] for event in late.events if event["kind"] == "returned"] == [
        "scoring server 0 is ready again"
    ]
    assert late.last_step == 3, "the run went on"


def test_where_all_go_on_the_run_ends_and_says_so(late: Ran) -> None:
    assert late.end.code == 1
    last = late.end.stderr.splitlines()[-1]
    assert f"no step or evaluation was done in {STEP_S} s (faults.step_s): all that have work (" in last
    assert "go on with it, so a step takes longer: raise the limit; stacks: " in last
    assert json.loads((late.path / "summary.json").read_text())["exit_code"] == 1
    assert late.saved == "step-3", "the state that only memory had"


def test_a_command_that_hangs_ends_and_saves_what_memory_has(place: Workplace) -> None:
    words = ["name=hung", "scoring.rewards.vowels.function=watchdog_rewards:plain"]
    end = place.finish(place.start("train", *words, program=("hangs.py",)))
    hung = Ran(place.output / "hung", end)
    assert end.code == 1 and f"the command itself has hung for {STEP_S} s (faults.step_s)" in end.stderr
    assert "in tells_and_hangs\n" in (hung.path / "faults" / "command.txt").read_text()
    assert json.loads((hung.path / "summary.json").read_text())["error"] == "CommandHung"
    assert hung.saved == "step-1" and any(event["message"].endswith("from memory") for event in hung.events)
