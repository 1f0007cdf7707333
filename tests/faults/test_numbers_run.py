"""Real runs with rewards so large that the gradient of a step is none: skipped, rolled back, stopped; and replayed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Finished, Workplace

from rlhf_dist.config.load import load
from rlhf_dist.data.stream import PromptStream

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
STEPS, PROMPTS, BAD_STEP = 5, 4, 3
CONFIG = """
include: [{base}]
output: {output}
rollout: {{cpus: 1, max_response_tokens: 16}}
learner: {{cpus: 1, ranks: 2, zero_stage: 2}}
algo: {{name: dr_grpo, group_size: 4, kl: {{coef: 0.0}}}}
scoring: {{rewards: {{huge: {{kind: function, function: "numbers_rewards:huge"}}}}}}
loop: {{steps: 5, prompts_per_step: 4, checkpoint_every: 1, witness: true}}
eval: {{prompts: 4, every: 0, samples: 0}}
cluster: {{address: local, device: cpu}}
telemetry: {{wandb: "off", samples_every: 0}}
"""
REWARDS = """
def huge(prompts, responses, answers):
    factor = 1e37 if BAD in prompts[0] else 1.0
    return [factor * (response.count("a") - len(response) / 20 + i) for i, response in enumerate(responses)]
"""
WAYS = ("skip", "roll_back", "stop")


@dataclass(frozen=True)
class Ran:
    """What was run; tests change nothing in it."""

    folder: Path
    ends: dict[str, Finished]
    uids: list[str]
    """Of the bad step."""

    def lines(self, way: str, file: str) -> list[dict[str, Any]]:
        text = (self.folder / "runs" / way / file).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def told(self, way: str) -> str:
        """The one warning."""
        told = [one["message"] for one in self.lines(way, "events.jsonl") if one["kind"] == "warning"]
        (found,) = [message for message in told if "numbers.on_fault" in message]
        return found

    def ledger(self, way: str) -> dict[str, Any]:
        words = [sys.executable, "-m", "rlhf_dist", "ledger", str(self.folder / "runs" / way), "--json"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return json.loads(subprocess.run(words, env=env, capture_output=True, check=True, timeout=60).stdout)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("numbers")
    place = Workplace(folder)
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(base=ROOT / "configs" / "reverse.yaml", output=folder / "runs"))
    config = load(path)
    prompts = PromptStream(config.data, config.seed, config.eval.prompts).take(STEPS * PROMPTS)
    first = (BAD_STEP - 1) * PROMPTS
    (folder / "numbers_rewards.py").write_text(f"BAD = {prompts[first + 1].messages[-1].content!r}\n{REWARDS}")
    ends = {way: place.finish(place.start("train", f"name={way}", f"numbers.on_fault={way}")) for way in WAYS}
    yield Ran(folder, ends, [prompt.uid for prompt in prompts[first : first + PROMPTS]])


def test_a_skipped_step_leaves_the_weights_and_the_run_goes_on(ran: Ran) -> None:
    assert ran.ends["skip"].code == 0, ran.ends["skip"].stderr
    metrics = ran.lines("skip", "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(STEPS + 1))
    assert [line.get("learner/skipped") for line in metrics[1:]] == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert [line["sync/changed_share"] > 0 for line in metrics[1:]] == [True, True, False, True, True]
    ledger = ran.ledger("skip")
    assert ledger["adds_up"] and ledger["groups"]["dropped"] == {"step_skipped": PROMPTS}
    assert ledger["witness"]["agrees"] and ledger["witness"]["steps"] == STEPS - 1
    assert ran.told("skip").startswith(
        "step 3: the gradient of the policy is not finite: norm inf; the step is skipped"
    )


def test_a_roll_back_makes_the_step_with_other_groups(ran: Ran) -> None:
    assert ran.ends["roll_back"].code == 0, ran.ends["roll_back"].stderr
    metrics = ran.lines("roll_back", "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(STEPS + 1))
    ledger = ran.ledger("roll_back")
    assert ledger["adds_up"] and ledger["groups"]["dropped"] == {"rolled_back": PROMPTS}
    assert ledger["groups"]["trained_once"] == STEPS * PROMPTS and ledger["witness"]["agrees"]
    (rebuilt,) = [one for one in ran.lines("roll_back", "events.jsonl") if one["kind"] == "rebuilt"]
    assert rebuilt["facts"]["step"] == BAD_STEP - 1
    before = [line["policy/loss"] for line in metrics[1:3]]
    assert before == [line["policy/loss"] for line in ran.lines("skip", "metrics.jsonl")[1:3]]


def test_a_stop_says_what_and_where(ran: Ran) -> None:
    end = ran.ends["stop"]
    assert end.code == 1 and "step 3: the gradient of the policy is not finite" in end.stderr
    assert "Traceback" not in end.stderr and "the last checkpoint is intact" in end.stderr


def test_the_batch_is_replayed_with_the_weights_of_the_step(ran: Ran) -> None:
    file = ran.folder / "runs" / "stop" / "faults" / "step-3.safetensors"
    assert f"rlhf-dist replay {file}" in ran.told("stop")
    words = [sys.executable, "-m", "rlhf_dist", "replay", str(file)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=env, cwd=ran.folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert out[1].endswith("checkpoints/step-2: those that the step began with")
    rows = [line.split() for line in out[3:-1]]
    assert {row[0] for row in rows} <= set(ran.uids) and len(rows) == PROMPTS * 4
    # The four samples of one group, whose gradients are beyond all numbers, come first; sampler and learner agree.
    assert len({row[0] for row in rows[:4]}) == 1 and float(rows[0][4]) > 1e30 > float(rows[4][4])
    assert all(abs(float(row[7]) - float(row[8])) < 1e-3 for row in rows)
